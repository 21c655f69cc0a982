"""Monte Carlo and temporal differences: the values of a policy from its episodes, without a model.

Time runs t = 0 .. T - 1 with reward r_t for the step from s_t to s_(t+1), so G_t = r_t + gamma *
G_(t+1). TD(lambda): Sutton 1988; targets and traces as in Sutton and Barto 2018, chapters 5 to 7
and 12, whose R_(t+1) is r_t here. Values are tables (S,), in units of reward.

An episode either terminated: nothing follows s_T. Or it was cut off: V(s_T) stands for what would.

    python -m snippets.foundations.td
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Episode(NamedTuple):
    """states (T + 1,) long, rewards (T,); terminated is False where a limit cut the episode off."""

    states: Tensor
    rewards: Tensor
    terminated: bool


def rollout(mdp, policy: Tensor, generator: torch.Generator, *, limit: int = 10_000) -> Episode:
    """One episode of a policy (S, A) in anything with transitions and rewards (S, A, S), start (S,)
    and terminal (S,) bool.

    It stops in a terminal state, or after `limit` steps and has not terminated then. ValueError on
    a policy of another shape and where there would be no step.
    """
    if policy.shape != mdp.transitions.shape[:2]:
        shapes = f"{tuple(policy.shape)} and transitions {tuple(mdp.transitions.shape)}"
        raise ValueError(f"policy {shapes} disagree")
    s = int(torch.multinomial(mdp.start, 1, generator=generator))
    if limit < 1 or mdp.terminal[s]:
        raise ValueError(f"no step to take: limit {limit}, start in state {s}")
    states, paid = [s], []
    while len(paid) < limit and not mdp.terminal[s]:
        a = int(torch.multinomial(policy[s], 1, generator=generator))
        after = int(torch.multinomial(mdp.transitions[s, a], 1, generator=generator))
        paid.append(mdp.rewards[s, a, after])
        states.append(s := after)
    return Episode(torch.tensor(states), torch.stack(paid), bool(mdp.terminal[s]))


def next_values(values: Tensor, episode: Episode) -> Tensor:
    """V(s_(t+1)) of each step, (S,) -> (T,): 0 behind a termination, V(s_T) behind a cut."""
    after = values[episode.states[1:]]
    if episode.terminated:
        after[-1] = 0.0
    return after


def n_step_returns(rewards: Tensor, next_values: Tensor, *, n: int, gamma: float) -> Tensor:
    """r_t + ... + gamma^(n-1) r_(t+n-1) + gamma^n V(s_(t+n)); fewer steps where the episode stops.

    rewards, next_values (T,) -> (T,). n = 1: the target of TD(0); n >= T: the return, unless the
    episode was cut. ValueError on shapes that disagree, n < 1, gamma outside [0, 1].
    """
    _check(rewards, next_values, gamma)
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    total = torch.zeros_like(rewards)
    for t in range(len(rewards)):
        end = min(t + n, len(rewards))
        total[t] = next_values[end - 1]
        for k in reversed(range(t, end)):
            total[t] = rewards[k] + gamma * total[t]
    return total


def lambda_returns(rewards: Tensor, next_values: Tensor, *, lam: float, gamma: float) -> Tensor:
    """G_t = r_t + gamma * ((1 - lam) * V(s_(t+1)) + lam * G_(t+1)), the forward view.

    rewards, next_values (T,) -> (T,): (1 - lam) * lam^(n-1) of each n-step return, the rest of the
    weight on the longest. lam = 0: TD(0). lam = 1: the return, if it ended. Less V(s_t): GAE's.
    ValueError on shapes that disagree, lam or gamma outside [0, 1].
    """
    _check(rewards, next_values, gamma)
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must lie in [0, 1], got {lam}")
    total, after = torch.zeros_like(rewards), next_values[-1]  # a cut episode goes on in V(s_T)
    for t in reversed(range(len(rewards))):
        after = rewards[t] + gamma * ((1 - lam) * next_values[t] + lam * after)
        total[t] = after
    return total


def _check(rewards: Tensor, next_values: Tensor, gamma: float) -> None:
    if rewards.ndim != 1 or rewards.shape != next_values.shape or not len(rewards):
        shapes = f"rewards {tuple(rewards.shape)}, next_values {tuple(next_values.shape)}"
        raise ValueError(f"{shapes}: want one shape (T,) with T >= 1")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")


def monte_carlo(episodes: list[Episode], num_states: int, *, gamma: float) -> tuple[Tensor, Tensor]:
    """First-visit Monte Carlo: the mean return behind the first visit of each state in an episode.

    -> values (S,), 0 where a state never came, and the number of visits (S,) behind each. A cut
    episode has no return to average: ValueError, as on no episodes.
    """
    if not episodes or not all(episode.terminated for episode in episodes):
        raise ValueError("Monte Carlo needs whole episodes, and one was cut off or none given")
    total, visits = torch.zeros(2, num_states, dtype=episodes[0].rewards.dtype)
    for episode in episodes:
        after = torch.zeros_like(episode.rewards)
        returns = lambda_returns(episode.rewards, after, lam=1.0, gamma=gamma)
        states = episode.states[:-1].tolist()
        for s in set(states):
            total[s] += returns[states.index(s)]  # index: the first visit
            visits[s] += 1
    return total / visits.clamp(min=1), visits


def td_lambda(
    values: Tensor, episode: Episode, *, alpha, lam, gamma: float = 1.0, online: bool = True
) -> Tensor:
    """One episode of TD(lambda), backward view with accumulating traces: (S,) -> the new table.

    Each TD error delta_t = r_t + gamma * V(s_(t+1)) - V(s_t) goes back to all states seen, by their
    trace. online: V changes at each step. Otherwise at the end, and the sum is exactly that of
    `forward_update`. lam = 0 is TD(0). For K runs at once: values (K, S), alpha and lam (K, 1).
    """
    table, traces = values, torch.zeros_like(values)
    states, steps = episode.states.tolist(), len(episode.rewards)
    for t in range(steps):
        now = table if online else values
        ended = episode.terminated and t == steps - 1
        after = 0.0 if ended else now[..., [states[t + 1]]]
        delta = episode.rewards[t] + gamma * after - now[..., [states[t]]]
        traces = gamma * lam * traces
        traces[..., states[t]] += 1
        table = table + alpha * delta * traces
    return table


def forward_update(
    values: Tensor, episode: Episode, *, alpha: float, lam: float, gamma: float = 1.0
) -> Tensor:
    """One episode of the off-line lambda-return algorithm: each V(s_t) moves by alpha towards its
    lambda-return, all measured with the old table, (S,) -> (S,)."""
    after = next_values(values, episode)
    targets = lambda_returns(episode.rewards, after, lam=lam, gamma=gamma)
    errors = targets - values[episode.states[:-1]]
    return values.index_add(0, episode.states[:-1], alpha * errors)


def batch_values(
    episodes: list[Episode], num_states: int, *, lam: float, gamma: float, sweeps: int = 10_000
) -> Tensor:
    """Where the same episodes, shown again and again, lead: (S,), 0 where a state never came.

    A sweep moves each value to the mean of its lambda-returns. lam = 0: the values of the
    maximum-likelihood model. lam = 1: the mean return of all visits. ValueError where `sweeps` do
    not suffice.
    """
    values = torch.zeros(num_states, dtype=episodes[0].rewards.dtype)
    seen = torch.cat([episode.states[:-1] for episode in episodes])
    visits = torch.bincount(seen, minlength=num_states).clamp(min=1)
    for _ in range(sweeps):
        moved = sum(forward_update(values, e, alpha=1.0, lam=lam, gamma=gamma) for e in episodes)
        step = (moved - len(episodes) * values) / visits
        values = values + step
        if step.abs().max() <= 1e4 * torch.finfo(step.dtype).eps * (1 + values.abs().max()):
            return values
    raise ValueError(f"no fixed point after {sweeps} sweeps: moved by {step.abs().max()}")


def main() -> None:
    """The demo: TD(lambda) on the random walk of 19 states, error after 10 episodes."""
    from snippets.worlds import mdps

    torch.set_num_threads(1)
    walk, policy = mdps.random_walk(), torch.ones(21, 1, dtype=torch.float64)
    truth = torch.arange(1, 20, dtype=torch.float64) / 10 - 1
    alphas, lams = (
        torch.tensor([0.025, 0.05, 0.1, 0.2, 0.4]),
        torch.tensor([0.0, 0.4, 0.8, 0.9, 1.0]),
    )
    alpha, lam = alphas.double().repeat_interleave(5)[:, None], lams.double().repeat(5)[:, None]
    errors = []
    for seed in range(5):
        generator, values = torch.Generator().manual_seed(seed), torch.zeros(25, 21).double()
        for _ in range(10):
            values = td_lambda(values, rollout(walk, policy, generator), alpha=alpha, lam=lam)
        errors.append((values[:, 1:-1] - truth).square().mean(-1).sqrt())
    table = torch.stack(errors).mean(0).view(5, 5)
    print(
        "RMS error, mean of 5 seeds\nalpha   " + "".join(f"lam {x:4.1f}   " for x in lams.tolist())
    )
    for a, row in zip(alphas.tolist(), table.tolist(), strict=True):
        print(f"{a:5.3f}" + "".join(f"{x:11.3g}" for x in row))


if __name__ == "__main__":
    main()
