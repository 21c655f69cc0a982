"""Bellman equations: what a policy is worth, what the best one is worth, and how to compute both.

A finite Markov decision process as tensors: `transitions` (S, A, S) holds the chance of each next
state, `rewards` (S, A) the mean reward of an action (for rewards of single steps, (S, A, S), that
is (transitions * rewards).sum(-1)), `gamma` in [0, 1] the discount. A policy is a table (S, A) of
probabilities, values are (S,), q_values (S, A), all in units of reward. Backups, value iteration
and policy iteration: Sutton and Barto 2018, chapters 3 and 4. The soft equation has the optimum of
E[sum of rewards] - beta * KL(pi || pi_ref) as its fixed point.

With gamma = 1 there must be an end: a state that every action leads back to and that pays nothing.

    python -m snippets.foundations.bellman
"""

from collections.abc import Callable

import torch
from torch import Tensor


def _check(transitions: Tensor, rewards: Tensor, gamma: float, policy: Tensor | None = None):
    """ValueError on shapes that disagree, on what are no probabilities, on gamma outside [0, 1]."""
    shape = tuple(transitions.shape)
    if len(shape) != 3 or shape[0] != shape[2] or tuple(rewards.shape) != shape[:2]:
        raise ValueError(f"transitions {shape} and rewards {tuple(rewards.shape)} disagree")
    if policy is not None and tuple(policy.shape) != shape[:2]:
        raise ValueError(f"policy {tuple(policy.shape)} and transitions {shape} disagree")
    for name, chances in (("transitions", transitions), ("policy", policy)):
        if chances is not None and not (
            (chances >= 0).all() and ((chances.sum(-1) - 1).abs() < 1e-5).all()
        ):
            raise ValueError(f"{name}: a row is negative or does not sum to 1")
    if not torch.isfinite(rewards).all():
        raise ValueError("rewards must be finite")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")


def q_values(transitions: Tensor, rewards: Tensor, values: Tensor, gamma: float) -> Tensor:
    """Q(s, a) = r(s, a) + gamma * sum_t P(t | s, a) V(t): one action, then `values` (S,) -> (S, A)."""
    return rewards + gamma * transitions @ values


def expectation_backup(policy: Tensor, q_values: Tensor) -> Tensor:
    """V(s) = sum_a pi(a | s) Q(s, a), (S, A) and (S, A) -> (S,): Bellman's expectation equation."""
    return (policy * q_values).sum(-1)


def optimality_backup(q_values: Tensor) -> Tensor:
    """V(s) = max_a Q(s, a), (S, A) -> (S,): Bellman's optimality equation."""
    return q_values.amax(-1)


def greedy(q_values: Tensor) -> Tensor:
    """The deterministic policy (S, A) that takes the best action, the first of equals."""
    return torch.nn.functional.one_hot(q_values.argmax(-1), q_values.shape[-1]).to(q_values.dtype)


def evaluate_policy(transitions: Tensor, rewards: Tensor, policy: Tensor, gamma: float) -> Tensor:
    """V of a policy (S, A), exactly: the solution of (I - gamma P_pi) V = r_pi -> (S,).

    Raises ValueError on bad shapes or numbers, and with gamma = 1 where the policy never reaches an
    end from some state: the matrix is singular then.
    """
    _check(transitions, rewards, gamma, policy)
    chain = torch.einsum("sa,sat->st", policy, transitions)  # (S, S): P_pi
    ends = (transitions.diagonal(dim1=0, dim2=2) == 1).all(0) & (rewards == 0).all(-1)  # (S,)
    if gamma == 1:
        leads = ends
        for _ in ends:  # the shortest path to an end has at most S - 1 steps
            leads = leads | (chain @ leads.to(chain) > 0)
        if not leads.all():
            lost = (~leads).nonzero().flatten().tolist()
            raise ValueError(f"gamma = 1, and the policy never ends from states {lost}")
    live = ~ends  # an end is worth 0, and its row would be singular at gamma = 1
    values = torch.zeros_like(rewards[:, 0])
    matrix = torch.eye(int(live.sum())).to(chain) - gamma * chain[live][:, live]
    values[live] = torch.linalg.solve(matrix, expectation_backup(policy, rewards)[live])
    return values


def fixed_point(
    backup: Callable[[Tensor], Tensor],
    values: Tensor,
    gamma: float,
    *,
    error: float = 1e-9,
    max_sweeps: int = 10_000,
) -> tuple[Tensor, list[float]]:
    """Repeat a backup that shrinks sup-norm distances by gamma until the fixed point is near.

    -> values (S,), at most `error` (and rounding) from the fixed point, and the largest change of
    each sweep. Banach: |V' - V*| <= gamma / (1 - gamma) * |V' - V| for V' = backup(V). With
    gamma = 1 there is no such bound, and this stops when a sweep changes nothing by more than
    `error`. ValueError where `max_sweeps` do not suffice.
    """
    changes = []
    for _ in range(max_sweeps):
        before, values = values, backup(values)
        changes.append((values - before).abs().max().item())
        if changes[-1] * (gamma / (1 - gamma) if gamma < 1 else 1.0) <= error:
            return values, changes
    raise ValueError(f"still {changes[-1]} of change after {max_sweeps} sweeps, gamma {gamma}")


def value_iteration(
    transitions: Tensor, rewards: Tensor, gamma: float, *, error: float = 1e-9, **options
) -> tuple[Tensor, Tensor, list[float]]:
    """V* (S,) to within `error`, its greedy policy (S, A), and the change of each sweep.

    With gamma < 1 the policy loses at most 2 * gamma * error in any state. Starts from 0. Raises
    ValueError as `fixed_point`, and on bad shapes or numbers.
    """
    _check(transitions, rewards, gamma)

    def backup(values: Tensor) -> Tensor:
        return optimality_backup(q_values(transitions, rewards, values, gamma))

    start = torch.zeros_like(rewards[:, 0])
    values, changes = fixed_point(backup, start, gamma, error=error, **options)
    return values, greedy(q_values(transitions, rewards, values, gamma)), changes


def policy_iteration(
    transitions: Tensor,
    rewards: Tensor,
    gamma: float,
    policy: Tensor | None = None,
    *,
    max_rounds: int = 1000,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """V* (S,), an optimal policy (S, A), and the values of each policy on the way (Howard 1960).

    Evaluates exactly, then acts greedily where that is strictly better; a state whose actions are
    all equally good keeps what it had. Starts from `policy`, uniform if None, which must reach an
    end if gamma = 1. Each round is better, so the loop ends. Use float64: in float32 a gain below
    0.1% of the values counts as rounding. ValueError as `evaluate_policy`, and after `max_rounds`.
    """
    if policy is None:
        policy = torch.full_like(rewards, 1 / rewards.shape[-1])
    history = []
    for _ in range(max_rounds):
        values = evaluate_policy(transitions, rewards, policy, gamma)
        history.append(values)
        q = q_values(transitions, rewards, values, gamma)
        # Rounding must not pass for improvement: two equal policies would take turns for ever.
        noise = 1e4 * torch.finfo(q.dtype).eps * (1 + values.abs().max())
        better = q.amax(-1) > values + noise
        if not better.any():
            return values, policy, history
        policy = torch.where(better[:, None], greedy(q), policy)
    raise ValueError(f"still improving after {max_rounds} rounds, gamma {gamma}")


def soft_backup(q_values: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """V(s) = beta * log sum_a pi_ref(a | s) exp(Q(s, a) / beta), (S, A) -> (S,): the largest value
    of E_pi[Q] - beta * KL(pi || pi_ref) over pi."""
    return beta * (ref_logps + q_values / beta).logsumexp(-1)


def soft_value_iteration(
    transitions: Tensor, rewards: Tensor, ref_logps: Tensor, gamma: float, *, beta: float, **options
) -> tuple[Tensor, Tensor]:
    """Soft V* (S,) and log pi* (S, A) = log pi_ref + (Q - V) / beta, the optimum of
    E[sum of gamma^t (r - beta * log(pi / pi_ref))].

    beta > 0 in units of reward a nat, ref_logps (S, A). Raises ValueError as `fixed_point`, on bad
    shapes or numbers, and on beta <= 0.
    """
    _check(transitions, rewards, gamma, ref_logps.exp())
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    ref_logps = ref_logps.log_softmax(-1)  # what is missing from 1 would add up at gamma = 1

    def backup(values: Tensor) -> Tensor:
        return soft_backup(q_values(transitions, rewards, values, gamma), ref_logps, beta)

    values, _ = fixed_point(backup, torch.zeros_like(rewards[:, 0]), gamma, **options)
    q = q_values(transitions, rewards, values, gamma)
    return values, (ref_logps + q / beta).log_softmax(-1)


def main() -> None:
    """The demo: both iterations on Gymnasium's tables, and what the first state is worth."""
    from snippets.worlds import mdps

    torch.set_num_threads(1)
    print("gamma 0.99        states   sweeps of value iteration   rounds of policy iteration   V*")
    for name in ("FrozenLake-v1", "CliffWalking-v1", "Taxi-v4"):
        mdp = mdps.from_gymnasium(name, 0.99)
        model = mdp.transitions, mdp.expected_rewards, mdp.gamma
        values, _, changes = value_iteration(*model)
        _, _, history = policy_iteration(*model)
        start = (mdp.start * values).sum().item()
        print(f"{name:17s}{len(values):7d}{len(changes):20d}{len(history):28d}{start:19.4f}")


if __name__ == "__main__":
    main()
