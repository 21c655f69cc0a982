"""The policy gradient: REINFORCE with reward-to-go and baselines, and the theorem it samples.

Williams 1992 (doi:10.1007/BF00992696); Sutton et al. 1999, theorem 1; the discount gamma^t that
practice leaves out: Nota and Thomas 2019 (arXiv:1906.07073); the baseline of least variance:
Greensmith et al. 2004. Steps are (T, N), time first: T steps of N copies of an environment.

    python -m snippets.foundations.policy_gradient
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


def _same(**tensors: Tensor) -> None:
    """ValueError, with all shapes, unless they are the same."""
    if len({tuple(x.shape) for x in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"shapes disagree: {shapes}")


def policy_gradient(visits: Tensor, probs: Tensor, q_values: Tensor) -> Tensor:
    """The theorem for a table of logits: d(s) * pi(a|s) * (Q(s, a) - V(s)), all of it known.

    visits (S,), the discounted visits d(s) = sum_t gamma^t * Pr(s_t = s); probs, q_values (S, A) ->
    the gradient of the expected return (S, A). sum_a Q(s, a) * d pi(a|s) / d logits is what stands
    here for a softmax. Raises ValueError on shapes that disagree. Sutton et al. 1999, theorem 1.
    """
    _same(probs=probs, q_values=q_values)
    _same(visits=visits, states=probs[:, 0])
    values = (probs * q_values).sum(-1, keepdim=True)  # (S, 1)
    return visits.unsqueeze(-1) * probs * (q_values - values)


def rewards_to_go(
    rewards: Tensor, over: Tensor, *, gamma: float = 0.99, from_start: bool = False
) -> Tensor:
    """G_t = r_t + gamma * G_(t+1) within an episode: what came after the action, it included.

    rewards (T, N), over (T, N), true on the last step of an episode -> (T, N), in units of reward,
    without gradient. Rewards of an episode that the rollout cuts off are missing from G: leave its
    steps out. from_start multiplies by gamma^t, t counted from the episode's first step in the
    rollout: the weights of the exact gradient of E[sum_t gamma^t * r_t]. Practice omits it. Raises
    ValueError on shapes that disagree and gamma outside [0, 1].
    """
    _same(rewards=rewards, over=over)
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
    rewards, over = rewards.detach(), over.bool()
    togo, after = torch.zeros_like(rewards), rewards.new_zeros(rewards.shape[1:])
    for t in reversed(range(len(rewards))):
        after = rewards[t] + gamma * torch.where(over[t], 0.0, after)
        togo[t] = after
    if not from_start:
        return togo
    discount, factor = torch.ones_like(rewards), rewards.new_ones(rewards.shape[1:])
    for t in range(len(rewards)):
        discount[t] = factor
        factor = torch.where(over[t], 1.0, gamma * factor)
    return discount * togo


def others_mean(togo: Tensor, mask: Tensor) -> Tensor:
    """A baseline from the batch itself: at each time the mean of the *other* episodes.

    togo (T, N), a column an episode from its start on; mask (T, N), 0 after its end, where nothing
    more is earned -> (T, N). It does not see the episode that it is subtracted from, so the gradient
    stays unbiased. Raises ValueError on shapes that disagree and on a single episode.
    """
    _same(togo=togo, mask=mask)
    if togo.shape[1] < 2:
        raise ValueError(f"one episode has no others: shape {tuple(togo.shape)}")
    togo = torch.where(mask.bool(), togo, 0.0)
    return (togo.sum(1, keepdim=True) - togo) / (togo.shape[1] - 1)


def reinforce_loss(logps: Tensor, advantages: Tensor, *, episodes: int) -> Tensor:
    """-sum_t advantage_t * log pi(a_t|s_t), a mean over episodes. Minus its gradient estimates that
    of the expected return; its value means nothing.

    logps (...) with gradient, under the policy that acted, of all steps of so many `episodes`;
    advantages (...), taken as constants: rewards to go, less a baseline that does not depend on the
    action -> scalar. Raises ValueError on shapes that disagree and episodes < 1. Williams 1992;
    Sutton et al. 1999.
    """
    _same(logps=logps, advantages=advantages)
    if episodes < 1:
        raise ValueError(f"episodes must be positive, got {episodes}")
    return -(advantages.detach() * logps).sum() / episodes


def optimal_baselines(weights: Tensor, scores: Tensor, probs: Tensor, groups: Tensor) -> Tensor:
    """The baselines, one a group of steps, for which sum_t (w_t - b) * grad log pi varies least.

    weights (K, T) without baseline; scores (K, T, D), grad log pi(a_t|s_t); probs (K,) of the K
    courses that an episode can take; groups (K, T), integers that the state or the time decides and
    never the action -> (J,). All zeros as groups: one baseline. With 1/K as probs it is estimated
    from K samples, and is then no constant for these same samples. b_j = E[sum_(t in j) g_t . sum_u
    w_u * g_u] / E[sum_(t in j) |g_t|^2]: products g_t . g_u of two steps have mean zero, so no
    baseline disturbs another. Raises ValueError on shapes that disagree and on a group whose scores
    are all zero. Greensmith et al. 2004 treat single steps, where only squares are left.
    """
    _same(weights=weights, groups=groups, scores=scores[..., 0])
    _same(probs=probs, courses=weights[:, 0])
    total = (weights.unsqueeze(-1) * scores).sum(1, keepdim=True)  # (K, 1, D): without baseline
    products = probs[:, None] * (scores * total).sum(-1)  # (K, T)
    squares = probs[:, None] * scores.square().sum(-1)
    above, below = weights.new_zeros(2, int(groups.max()) + 1)
    above.index_add_(0, groups.flatten(), products.flatten())
    below.index_add_(0, groups.flatten(), squares.flatten())
    if (below <= 0).any():
        raise ValueError(f"no score in a group: squared norms {below.tolist()}")
    return above / below


@functools.cache
def algorithm():
    """REINFORCE in the shared loop: whole episodes, rewards to go, the other episodes as baseline."""
    from snippets.foundations.loop import Algorithm, Settings, descend

    @dataclass
    class REINFORCESettings(Settings):
        """REINFORCE: `envs` whole episodes an update, one step of the optimizer on all of them."""

        envs: int = 16
        horizon: int = 0  # whole episodes
        hidden: int = 32
        lr: float = 1e-2
        epochs: int = 1
        minibatch: int = 0
        max_norm: float = 1e9
        check_every: int = 5

    def advantages(rollout, settings):
        over = rollout.terminated | rollout.truncated
        togo = rewards_to_go(rollout.rewards, over, gamma=settings.gamma)
        return togo - others_mean(togo, rollout.mask), togo

    def loss(agent, batch, settings):
        logps, _ = agent.logps(batch.obs, batch.actions)
        return reinforce_loss(logps, batch.advantages, episodes=settings.envs)

    return Algorithm(REINFORCESettings, advantages, descend(loss))


def main() -> None:
    """The demo: CartPole, until the stochastic policy solves it."""
    from snippets.foundations.loop import run_demo
    from snippets.worlds.classic import CARTPOLE

    run_demo(algorithm(), algorithm().settings, CARTPOLE)


if __name__ == "__main__":
    main()
