"""SARSA, Expected SARSA, Q-learning and double Q-learning on tables: one loop, four targets.

SARSA: Rummery and Niranjan 1994. Q-learning: Watkins and Dayan 1992. Expected SARSA: van Seijen et
al. 2009. Double Q-learning: van Hasselt 2010. N agents act side by side, each with episodes of its
own and with a table of its own or, with `copies`, a shared one. r_t: reward for the step taken at t.

    python -m snippets.foundations.q_learning
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

METHODS = ("sarsa", "expected_sarsa", "q_learning", "double_q")


def epsilon_greedy(q_values: Tensor, epsilon: float | Tensor) -> Tensor:
    """The chances of actions: epsilon is spread over all, the rest goes to the best; ties share.

    q_values (..., A), epsilon a number or (...,) -> (..., A)."""
    best = (q_values == q_values.amax(-1, keepdim=True)).to(q_values.dtype)
    epsilon = torch.as_tensor(epsilon, dtype=q_values.dtype)[..., None]
    return epsilon / q_values.shape[-1] + (1 - epsilon) * best / best.sum(-1, keepdim=True)


def sarsa_target(rewards, next_q, next_actions, terminated, *, gamma: float) -> Tensor:
    """r + gamma * Q(s', a'), a' the action that the policy takes next. All (N,); next_q (N, A)."""
    after = next_q.gather(-1, next_actions[:, None]).squeeze(-1)
    return rewards + gamma * torch.where(terminated, 0.0, after)


def q_learning_target(rewards, next_q, terminated, *, gamma: float) -> Tensor:
    """r + gamma * max_b Q(s', b), whatever is done next. All (N,); next_q (N, A)."""
    return rewards + gamma * torch.where(terminated, 0.0, next_q.amax(-1))


def expected_sarsa_target(rewards, next_q, policy, terminated, *, gamma: float) -> Tensor:
    """r + gamma * sum_b pi(b|s') Q(s', b): SARSA's mean over a'. All (N,); next_q, policy (N, A)."""
    return rewards + gamma * torch.where(terminated, 0.0, (policy * next_q).sum(-1))


def double_q_target(rewards, next_q, other_q, terminated, *, gamma: float) -> Tensor:
    """r + gamma * Q_other(s', argmax_b Q(s', b)): one table chooses, the other one, which is not
    updated in this step, says what the choice is worth. All (N,); next_q, other_q (N, A)."""
    chosen = next_q.argmax(-1, keepdim=True)
    after = other_q.gather(-1, chosen).squeeze(-1)
    return rewards + gamma * torch.where(terminated, 0.0, after)


def draw(policy: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """An action for each row of chances (N, A) -> (N,), by inverting the cumulated chances."""
    uniform = torch.rand(len(policy), 1, dtype=policy.dtype, generator=generator)
    return (policy.cumsum(-1)[:, :-1] <= uniform).sum(-1)


@dataclass(frozen=True)
class Runs:
    """q_values, visits (N / copies, S, A); undiscounted returns and lengths (N, E) of episodes."""

    q_values: Tensor
    visits: Tensor
    returns: Tensor
    lengths: Tensor


def learn(
    reset: Callable[[], Tensor],
    step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    shape: tuple[int, int],
    *,
    method: str = "q_learning",
    episodes: int = 500,
    gamma: float = 1.0,
    epsilon: float | Callable[[Tensor], Tensor] = 0.1,
    alpha: float = 0.5,
    halve: float = math.inf,
    limit: float = math.inf,
    copies: int = 1,
    generator: torch.Generator | None = None,
) -> Runs:
    """Let N agents act epsilon-greedily and learn, until each has finished `episodes` episodes.

    reset() -> states (N,); step(states, actions) -> next states, rewards, terminated, each (N,);
    shape = (S, A). epsilon may be a function of the number of finished episodes (N,). The step
    size of a pair's n-th visit is alpha / (1 + n / halve): constant at halve = inf, else falling
    like 1/n (Robbins and Monro). An episode of `limit` steps is cut off, not terminated: its last
    target still bootstraps. Each `copies` agents in a row share a table. Where k of them stand at
    one pair, it moves to the mean of their k targets by alpha / (1 + n / (halve k)). ValueError on
    an unknown method, gamma or a fixed epsilon outside [0, 1], alpha outside (0, 1], halve <= 0,
    episodes or limit < 1, copies that do not divide N.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if not 0 <= gamma <= 1 or not (callable(epsilon) or 0 <= epsilon <= 1):
        raise ValueError(f"gamma and epsilon must lie in [0, 1], got {gamma} and {epsilon}")
    if not 0 < alpha <= 1 or halve <= 0:
        raise ValueError(f"alpha must lie in (0, 1] and halve above 0, got {alpha} and {halve}")
    if episodes < 1 or limit < 1:
        raise ValueError(f"episodes and limit must be 1 or more, got {episodes} and {limit}")
    states, (count, actions_count), double = reset(), shape, method == "double_q"
    if copies < 1 or len(states) % copies:
        raise ValueError(f"copies must divide the number of agents {len(states)}, got {copies}")
    runs = torch.arange(len(states)) // copies * count  # the first row of each agent's table
    tables = torch.zeros(1 + double, runs[-1] + count, actions_count, dtype=torch.float64)
    visits, finished = torch.zeros_like(tables), torch.zeros_like(states)
    returns = torch.zeros(len(states), episodes, dtype=tables.dtype)
    lengths = torch.zeros(len(states), episodes, dtype=torch.long)
    total, length = torch.zeros_like(returns[:, 0]), torch.zeros_like(states)
    which = torch.zeros_like(states)  # the table that learns; double Q-learning tosses a coin

    def policy_at(s: Tensor) -> Tensor:
        q_values = tables.mean(0)[runs + s] if double else tables[0, runs + s]
        return epsilon_greedy(q_values, epsilon(finished) if callable(epsilon) else epsilon)

    actions = draw(policy_at(states), generator)
    while (live := finished < episodes).any():
        after, rewards, terminated = step(states, actions)
        if double:
            which = torch.randint(2, states.shape, generator=generator)
        next_q = tables[which, runs + after]  # (N, A)
        if method == "sarsa":
            next_actions = draw(policy_at(after), generator)
            targets = sarsa_target(rewards, next_q, next_actions, terminated, gamma=gamma)
        elif method == "expected_sarsa":
            policy = policy_at(after)
            targets = expected_sarsa_target(rewards, next_q, policy, terminated, gamma=gamma)
        elif method == "double_q":
            other_q = tables[1 - which, runs + after]
            targets = double_q_target(rewards, next_q, other_q, terminated, gamma=gamma)
        else:
            targets = q_learning_target(rewards, next_q, terminated, gamma=gamma)
        here = (which, runs + states, actions)
        together = torch.zeros_like(tables).index_put_(here, live.double(), accumulate=True)  # k
        visits += together
        rates = live * alpha / (together[here].clamp(min=1) + visits[here] / halve)
        tables.index_put_(here, rates * (targets - tables[here]), accumulate=True)

        total, length = total + rewards, length + 1
        ended = terminated | (length >= limit)
        if ended.any():
            done = (ended & live).nonzero().squeeze(-1)
            returns[done, finished[done]], lengths[done, finished[done]] = total[done], length[done]
            finished[done] += 1
            total, length = total.masked_fill(ended, 0.0), length.masked_fill(ended, 0)
            after = torch.where(ended, reset(), after)
        states = after
        if method != "sarsa" or ended.any():  # SARSA takes the action that it has learned from
            actions = draw(policy_at(states), generator)
        if method == "sarsa":
            actions = torch.where(ended, actions, next_actions)
    split = (1 + double, -1, count, actions_count)
    return Runs(tables.view(split).mean(0), visits.view(split).sum(0), returns, lengths)


def solve(
    transitions: Tensor, rewards: Tensor, *, gamma: float, epsilon: float = 0.0, sweeps: int = 9999
) -> Tensor:
    """What the tables should converge to: the best Q among policies that explore with epsilon.

    Q(s, a) <- sum_t P(t|s,a) (r + gamma ((1 - epsilon) max_b Q(t, b) + epsilon mean_b Q(t, b))) until
    it stands still: Q* at epsilon = 0, Q-learning's limit; SARSA's at a fixed epsilon. transitions and
    rewards (S, A, S), terminal states lead to themselves and pay 0 -> (S, A). ValueError if it has
    not converged after `sweeps`.
    """
    paid, q_values = (transitions * rewards).sum(-1), torch.zeros_like(rewards[..., 0])
    for _ in range(sweeps):
        values = (1 - epsilon) * q_values.amax(-1) + epsilon * q_values.mean(-1)
        before, q_values = q_values, paid + gamma * transitions @ values
        if (q_values - before).abs().max() < 1e-12:
            return q_values
    raise ValueError(f"no convergence within {sweeps} sweeps: with gamma = 1 every policy must end")


def main() -> None:
    """The demo: 20 runs of each method on Gymnasium's CliffWalking-v1."""
    from snippets.worlds import mdps

    mdp, generator = mdps.from_gymnasium("CliffWalking-v1"), torch.Generator().manual_seed(0)
    start = mdp.start.argmax().repeat(20)

    def step(states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        after, rewards = mdps.sample(mdp, states, actions, generator)
        return after, rewards, mdp.terminal[after]

    for method in METHODS[:3]:
        runs = learn(start.clone, step, (48, 4), method=method, episodes=300, generator=generator)
        states, paid = start, torch.zeros(20, dtype=torch.float64)
        for _ in range(50):  # greedily; the terminal state pays 0, a run that walks in circles -50
            states, rewards, _ = step(states, runs.q_values[torch.arange(20), states].argmax(-1))
            paid += rewards
        found = ", ".join(f"{int(x)} in {(paid == x).sum()} runs" for x in paid.unique())
        online = runs.returns[:, -100:].mean()
        print(f"{method:15s} while exploring {online:5.1f}, greedy {found}", flush=True)


if __name__ == "__main__":
    main()
