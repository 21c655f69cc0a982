"""Behaviour cloning: a policy by maximum likelihood of demonstrations, and what its errors cost.

The likelihood's optimum is the policy of least KL(expert || policy). A policy that errs with chance
epsilon on the expert's states may cost T^2 * epsilon more than the expert over T steps (Ross and
Bagnell 2010). Labels on states that the learner itself visits make that linear in T: DAgger (Ross,
Gordon and Bagnell 2011, arXiv:1011.0686). SFT is behaviour cloning of text.

    python -m snippets.foundations.behaviour_cloning
"""

import math

import torch
from torch import Tensor


def clone(states: Tensor, actions: Tensor, *, shape: tuple[int, int]) -> Tensor:
    """Maximum likelihood from demonstrations: the shares of the actions in each state.

    states, actions (N,) -> policy (S, A). A state that was not demonstrated gets the uniform
    policy: the likelihood says nothing about it. ValueError on shapes that disagree, or a number
    outside of `shape` = (S, A).
    """
    if states.shape != actions.shape or states.dim() != 1:
        shapes = f"{tuple(states.shape)} against {tuple(actions.shape)}"
        raise ValueError(f"states and actions disagree: {shapes}; want (N,) for both")
    for name, x, count in (("states", states, shape[0]), ("actions", actions, shape[1])):
        if len(x) and not 0 <= x.min() <= x.max() < count:
            raise ValueError(f"{name} reach from {x.min()} to {x.max()}, want 0 to {count - 1}")
    counts = torch.zeros(shape, dtype=torch.float64)
    counts.index_put_((states, actions), torch.ones(len(states)).double(), accumulate=True)
    total = counts.sum(-1, keepdim=True)  # (S, 1)
    return torch.where(total > 0, counts / total.clamp(min=1), 1 / shape[1])


def cloning_loss(expert: Tensor, policy: Tensor, visits: Tensor) -> tuple[Tensor, Tensor]:
    """(-E log pi, KL(expert || pi)) in nats, the mean over the expert's states.

    expert, policy (S, A), visits (S,) chances of the expert's states. The two differ by the
    expert's entropy, so they have one minimum: policy = expert wherever visits > 0. ValueError on
    shapes that disagree.
    """
    if expert.shape != policy.shape or visits.shape != expert.shape[:1]:
        shapes = f"{tuple(expert.shape)}, {tuple(policy.shape)}, {tuple(visits.shape)}"
        raise ValueError(f"expert, policy and visits disagree: {shapes}")
    weights = visits[:, None] * expert  # (S, A); xlogy: 0 * log 0 is 0
    nll = -torch.xlogy(weights, policy).sum()
    return nll, nll + torch.xlogy(weights, expert).sum()


def lane(width: int, *, slip: float = 0.0) -> Tensor:
    """Transitions (S, 2, S) of a lane: state s is the distance from the expert's path, at most
    `width`; action 0 steps towards it, 1 away, and with chance `slip` the world steps away."""
    if width < 1 or not 0 <= slip < 1:
        raise ValueError(f"want width >= 1 and slip in [0, 1), got {width}, {slip}")
    states = torch.arange(width + 1)
    transitions = torch.zeros(width + 1, 2, width + 1, dtype=torch.float64)
    away = (states + 1).clamp(max=width)
    transitions[states, 0, (states - 1).clamp(min=0)] = 1 - slip
    transitions[states, 0, away] += slip
    transitions[states, 1, away] = 1.0
    return transitions


def visits(transitions: Tensor, policy: Tensor, start: Tensor, *, horizon: int) -> Tensor:
    """The chances of each state at steps 0 to T - 1, (T, S), T >= 1: start (S,), policy (S, A)."""
    if policy.shape != transitions.shape[:2] or start.shape != policy.shape[:1]:
        shapes = f"{tuple(transitions.shape)}, {tuple(policy.shape)}, {tuple(start.shape)}"
        raise ValueError(f"transitions, policy and start disagree: {shapes}")
    matrix = torch.einsum("sa,sat->st", policy, transitions)  # (S, S)
    rows = [start]
    for _ in range(horizon - 1):
        rows.append(rows[-1] @ matrix)
    return torch.stack(rows)


def costs(transitions: Tensor, policy: Tensor, start: Tensor, cost: Tensor, horizon: int) -> Tensor:
    """(T,) the expected sum of cost (S,) over the first 1, 2, ..., T steps, exact."""
    return (visits(transitions, policy, start, horizon=horizon) @ cost).cumsum(0)


def price_of_a_mistake(transitions: Tensor, expert: Tensor, cost: Tensor, horizon: int) -> float:
    """u: the most that one wrong action costs, if the expert acts from then on; over all states and
    steps. DAgger's bound is u * T * epsilon (Ross et al. 2011). ValueError as `visits`."""
    if expert.shape != transitions.shape[:2] or cost.shape != expert.shape[:1]:
        shapes = f"{tuple(transitions.shape)}, {tuple(expert.shape)}, {tuple(cost.shape)}"
        raise ValueError(f"transitions, expert and cost disagree: {shapes}")
    values, worst = torch.zeros_like(cost), 0.0
    for _ in range(horizon):  # from the last step to the first
        q_values = cost[:, None] + transitions @ values  # (S, A)
        values = (expert * q_values).sum(-1)
        worst = max(worst, (q_values - values[:, None]).max().item())
    return worst


def trembling(policy: Tensor, chance: float) -> Tensor:
    """The policy (S, A) with a hand that trembles: an action at random with this chance."""
    if not 0 <= chance <= 1:
        raise ValueError(f"a chance must lie in [0, 1], got {chance}")
    return (1 - chance) * policy + chance / policy.shape[1]


def dagger(
    transitions: Tensor,
    expert: Tensor,
    start: Tensor,
    *,
    rounds: int,
    episodes: int,
    horizon: int,
    tremble: float,
    generator: torch.Generator,
    on_policy: bool = True,
) -> list[Tensor]:
    """Policies (S, A) after each round: act, let the expert label, clone all labels so far.

    In the first round the expert acts, later the newest clone with a hand that trembles (beta_i =
    1, 0, 0, ... in Ross et al.). on_policy=False: the expert acts in every round, which is
    behaviour cloning with as many labels. A round has `episodes` episodes of `horizon` steps.
    """
    states, labels, policies, actor = [], [], [], expert
    for _ in range(rounds):
        s = torch.multinomial(start, episodes, replacement=True, generator=generator)  # (E,)
        for _ in range(horizon):
            a = torch.multinomial(actor[s], 1, generator=generator).squeeze(-1)
            states.append(s)
            labels.append(torch.multinomial(expert[s], 1, generator=generator).squeeze(-1))
            s = torch.multinomial(transitions[s, a], 1, generator=generator).squeeze(-1)
        policies.append(clone(torch.cat(states), torch.cat(labels), shape=expert.shape))
        actor = trembling(policies[-1], tremble) if on_policy else expert
    return policies


def main() -> None:
    """The demo: what an error of 1e-4 a step costs after T steps, by what is known off the path."""
    torch.set_num_threads(1)
    epsilon, table = 1e-4, lane(400)
    start, cost = torch.zeros(401, dtype=torch.float64), torch.ones(401, dtype=torch.float64)
    start[0], cost[0] = 1.0, 0.0
    kinds = {
        "goes on away": (0.0, 1.0),
        "acts at random": (0.5, 0.5),
        "DAgger": (1 - epsilon, epsilon),
    }
    print("off the path      T = 10       100      1000   slope from 100 to 1000")
    for name, row in kinds.items():
        policy = torch.tensor(row, dtype=torch.float64).repeat(401, 1)
        policy[0] = torch.tensor((1 - epsilon, epsilon))
        total = costs(table, policy, start, cost, 1000)
        slope = math.log10(total[999] / total[99])
        print(f"{name:15s}", *(f"{total[t - 1]:9.5f}" for t in (10, 100, 1000)), f"{slope:9.2f}")


if __name__ == "__main__":
    main()
