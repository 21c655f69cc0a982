"""Generalised advantage estimation: a weighted sum of TD errors between one step and the whole return.

Schulman et al. 2015 (arXiv:1506.02438), equation 16; its recursion is that of every on-policy
library. All tensors are (T, N): T steps of N copies of an environment, time first.

`terminated` marks a step into a state beyond which nothing can be earned, `truncated` one at which
the clock ran out. Both end an episode; only the first says that the next value is 0.

    python -m snippets.foundations.gae
"""

import torch
from torch import Tensor


def _check(rewards: Tensor, others: dict[str, Tensor], **rates: float) -> None:
    """ValueError unless all shapes are (T, N) and equal, and each rate lies in [0, 1]."""
    for name, x in others.items():
        if x.shape != rewards.shape or rewards.dim() != 2:
            raise ValueError(
                f"shapes disagree: {name} {tuple(x.shape)} against rewards {tuple(rewards.shape)}; "
                "want (T, N) for all"
            )
    for name, rate in rates.items():
        if not 0 <= rate <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {rate}")


def td_errors(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, *, gamma: float = 0.99
) -> Tensor:
    """delta_t = r_t + gamma * V(s_(t+1)) - V(s_t), where V of a terminal state is 0.

    rewards, values, next_values, terminated (T, N) -> (T, N), in units of reward, without gradient.
    next_values[t] is V of the state that step t *led to*: after a truncation that is the cut-off
    episode's last state, not the first one of the episode after. Raises ValueError on shapes that
    disagree and gamma outside [0, 1]. Schulman et al. 2015, section 3.
    """
    others = {"values": values, "next_values": next_values, "terminated": terminated}
    _check(rewards, others, gamma=gamma)
    # Not a product with (1 - terminated): what a critic says of a terminal state may be NaN.
    after = torch.where(terminated.bool(), 0.0, next_values)
    return (rewards + gamma * after - values).detach()


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float = 0.99,
    lam: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Advantages A_t = delta_t + gamma * lam * A_(t+1), and the critic's targets A_t + V(s_t).

    All tensors (T, N) -> advantages (T, N), returns (T, N), in units of reward, without gradient.
    The sum ends with its episode, however that ended, and with the rollout; only a termination sets
    the next value to 0. lam = 0: the TD error. lam = 1: all rewards to the end of the episode or
    rollout, plus gamma^k * V of the state there unless it is terminal, minus V(s_t). Raises
    ValueError on shapes that disagree, gamma or lam outside [0, 1]. Schulman et al. 2015,
    equation 16.
    """
    _check(rewards, {"truncated": truncated}, lam=lam)
    deltas = td_errors(rewards, values, next_values, terminated, gamma=gamma)  # (T, N)
    over = terminated.bool() | truncated.bool()
    advantages = torch.zeros_like(deltas)
    after = deltas.new_zeros(deltas.shape[1:])  # (N,): the advantage one step later
    for t in reversed(range(len(deltas))):
        after = deltas[t] + gamma * lam * torch.where(over[t], 0.0, after)
        advantages[t] = after
    return advantages, advantages + values.detach()


def n_step_advantages(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    n: int,
    gamma: float = 0.99,
) -> Tensor:
    """r_t + gamma * r_(t+1) + ... + gamma^n * V(s_(t+n)) - V(s_t): n rewards, then the critic.

    All tensors (T, N) -> (T, N). Fewer than n rewards where the episode or the rollout ends before.
    n = 1 is the TD error. The sum of n TD errors, each discounted, is the same number: the values
    in between cancel. GAE is the mean of these over n with the weights (1 - lam) * lam^(n - 1).
    Raises ValueError on n < 1 and as `gae`. Schulman et al. 2015, equations 11 to 15.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    _check(rewards, {"truncated": truncated})
    deltas = td_errors(rewards, values, next_values, terminated, gamma=gamma)
    over = terminated.bool() | truncated.bool()
    advantages, going, discount = torch.zeros_like(deltas), torch.ones_like(over), 1.0
    for k in range(min(n, len(deltas))):
        length = len(deltas) - k  # steps that still have one k later
        going = going[:length]  # has the episode of step t not ended before step t + k?
        advantages[:length] += discount * torch.where(going, deltas[k:], 0.0)
        going, discount = going & ~over[k:], discount * gamma
    return advantages


def main() -> None:
    """The demo: three steps that pay 1, as they run on, are cut off, or end for good."""
    ones, never = torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.bool)
    end, values = torch.tensor([[False], [False], [True]]), torch.full((3, 1), 10.0)
    cases = {"runs on": (never, never), "truncated": (never, end), "terminated": (end, never)}
    print("A reward of 1 a step, gamma 0.9, V = 10: advantages of three steps")
    for name, (terminated, truncated) in cases.items():
        for lam in (0.0, 0.95, 1.0):
            found, _ = gae(ones, values, values, terminated, truncated, gamma=0.9, lam=lam)
            numbers = "  ".join(f"{x + 0.0:6.2f}" for x in found[:, 0].tolist())
            print(f"{name:10}  lam {lam:4.2f}  {numbers}")


if __name__ == "__main__":
    main()
