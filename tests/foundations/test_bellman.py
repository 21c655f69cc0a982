"""Bellman equations against linear programs, all policies, Gymnasium's tables, printed values, and broken copies."""

import functools
import itertools
import math

import gymnasium
import numpy
import pytest
import torch
from scipy.optimize import linprog
from torch.testing import assert_close

from snippets.foundations import bellman as original
from snippets.worlds import exact, mdps
from tests.mutation import caught_by, load_mutant

torch.set_num_threads(1)
PATH = "snippets/foundations/bellman.py"
SEEDS = list(range(10))


def parts(mdp):
    return mdp.transitions, mdp.expected_rewards, mdp.gamma


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_policy(seed, states, actions):
    return normal(seed + 500, states, actions).softmax(-1)


def linear_program(transitions, rewards, gamma):
    """V* as the least V with V(s) >= r(s, a) + gamma * P V for all s, a; a state that never pays and stays is 0."""
    states, actions = rewards.shape
    rows, bounds = [], []
    ends = [bool((transitions[s, :, s] == 1).all() and (rewards[s] == 0).all()) for s in range(states)]
    for s in range(states):
        for a in range(0 if ends[s] else actions):
            row = gamma * transitions[s, a].numpy().copy()
            row[s] -= 1
            rows.append(row)
            bounds.append(-rewards[s, a].item())
    limits = [(0, 0) if end else (None, None) for end in ends]
    found = linprog(numpy.ones(states), numpy.array(rows), numpy.array(bounds), bounds=limits, method="highs")
    assert found.status == 0
    return torch.tensor(found.x)


def gridworld(special):
    """Sutton and Barto's 5 x 5 grid (examples 3.5 and 3.8): off the grid -1, A to A' +10, B to B' +5; north, south,
    east, west; gamma 0.9."""
    transitions, rewards = torch.zeros(25, 4, 25, dtype=torch.float64), torch.zeros(25, 4, dtype=torch.float64)
    for row, column, (a, (down, right)) in itertools.product(
        range(5), range(5), enumerate([(-1, 0), (1, 0), (0, 1), (0, -1)])
    ):
        s, (y, x) = 5 * row + column, (row + down, column + right)
        after, pay = (5 * y + x, 0.0) if 0 <= y < 5 and 0 <= x < 5 else (s, -1.0)
        after, pay = special.get(s, (after, pay))
        transitions[s, a, after], rewards[s, a] = 1.0, pay
    return transitions, rewards


def small_grid():
    """The 4 x 4 grid of example 4.1: -1 a step until one of two corners."""
    transitions, rewards = torch.zeros(16, 4, 16, dtype=torch.float64), torch.zeros(16, 4, dtype=torch.float64)
    for s, (a, (down, right)) in itertools.product(range(16), enumerate([(-1, 0), (1, 0), (0, 1), (0, -1)])):
        y, x = min(max(s // 4 + down, 0), 3), min(max(s % 4 + right, 0), 3)
        after = s if s in (0, 15) else 4 * y + x
        transitions[s, a, after], rewards[s, a] = 1.0, 0.0 if s in (0, 15) else -1.0
    return transitions, rewards


# Each check takes the module, so that broken copies can be put to it.


def check_backups_in_loops(bellman):
    mdp, values = mdps.random_mdp(4, 3, seed=1, gamma=0.8), normal(0, 4)
    policy = random_policy(0, 4, 3)
    q = bellman.q_values(*parts(mdp)[:2], values, mdp.gamma)
    for s in range(4):
        row = []
        for a in range(3):
            terms = [mdp.transitions[s, a, t] * (mdp.rewards[s, a, t] + mdp.gamma * values[t]) for t in range(4)]
            row.append(sum(terms).item())
            assert q[s, a].item() == pytest.approx(row[-1], abs=1e-12)
        assert bellman.optimality_backup(q)[s].item() == pytest.approx(max(row), abs=1e-12)
        mean = sum(policy[s, a].item() * row[a] for a in range(3))
        assert bellman.expectation_backup(policy, q)[s].item() == pytest.approx(mean, abs=1e-12)
        assert bellman.greedy(q)[s].argmax() == row.index(max(row)) and bellman.greedy(q)[s].sum() == 1


def check_values_are_expected_returns(bellman):
    """By enumeration of every episode: the first H rewards, and V of where they end."""
    mdp, policy = mdps.random_mdp(3, 2, seed=2, gamma=0.7), random_policy(1, 3, 2)
    values = bellman.evaluate_policy(*parts(mdp)[:2], policy, mdp.gamma)
    episodes = mdps.all_episodes(mdp, 5)
    chance = (episodes.world_logps + policy.log()[episodes.states[:, :-1], episodes.actions].sum(-1)).exp()
    discount = mdp.gamma ** torch.arange(6, dtype=torch.float64)
    returns = (episodes.rewards * discount[:5]).sum(-1) + discount[5] * values[episodes.states[:, -1]]
    for s in range(3):
        here = episodes.states[:, 0] == s
        assert ((chance * returns)[here].sum() / chance[here].sum()).item() == pytest.approx(
            values[s].item(), abs=1e-10
        )
    assert values.abs().max() <= mdp.expected_rewards.abs().max() / (1 - mdp.gamma)


def check_evaluation_solves_its_equation(bellman):
    for seed in range(2):
        mdp, policy = mdps.random_mdp(5, 3, seed=seed, gamma=0.8), random_policy(seed, 5, 3)
        transitions, rewards, gamma = parts(mdp)
        values = bellman.evaluate_policy(transitions, rewards, policy, gamma)
        again = bellman.expectation_backup(policy, bellman.q_values(transitions, rewards, values, gamma))
        assert_close(values, again, rtol=0, atol=1e-11)
        step = lambda v, p=policy, t=transitions, r=rewards: bellman.expectation_backup(  # noqa: E731
            p, bellman.q_values(t, r, v, 0.8)
        )
        swept, _ = bellman.fixed_point(step, normal(seed, 5), gamma, error=1e-8)
        assert (swept - values).abs().max() <= 1e-8


def check_printed_values(bellman):
    """Sutton and Barto 2018, figures 3.2 and 3.5 to one decimal, and the integers of figure 4.1."""
    transitions, rewards = gridworld({1: (21, 10.0), 3: (13, 5.0)})
    uniform = torch.full((25, 4), 0.25, dtype=torch.float64)
    printed = [
        *(3.3, 8.8, 4.4, 5.3, 1.5, 1.5, 3.0, 2.3, 1.9, 0.5, 0.1, 0.7, 0.7, 0.4, -0.4),
        *(-1.0, -0.4, -0.4, -0.6, -1.2, -1.9, -1.3, -1.2, -1.4, -2.0),
    ]
    best = [
        *(22.0, 24.4, 22.0, 19.4, 17.5, 19.8, 22.0, 19.8, 17.8, 16.0, 17.8, 19.8, 17.8, 16.0, 14.4),
        *(16.0, 17.8, 16.0, 14.4, 13.0, 14.4, 16.0, 14.4, 13.0, 11.7),
    ]
    assert_close(
        bellman.evaluate_policy(transitions, rewards, uniform, 0.9), torch.tensor(printed).double(), rtol=0, atol=0.0501
    )
    for found in (
        bellman.value_iteration(transitions, rewards, 0.9),
        bellman.policy_iteration(transitions, rewards, 0.9),
    ):
        assert_close(found[0], torch.tensor(best).double(), rtol=0, atol=0.0501)
        assert found[0][1].item() == pytest.approx(10 / (1 - 0.9**5), abs=1e-7)  # A, its prize, and four steps back
    values = bellman.evaluate_policy(*small_grid(), torch.full((16, 4), 0.25, dtype=torch.float64), 1.0)
    rows = [0, -14, -20, -22, -14, -18, -20, -20, -20, -20, -18, -14, -22, -20, -14, 0]
    assert_close(values, torch.tensor(rows).double(), rtol=0, atol=1e-10)


def check_both_iterations_solve_the_linear_program(bellman):
    for seed in range(4):
        for gamma in (0.5, 0.9, 0.99):
            model = parts(mdps.random_mdp(5, 3, seed=seed, gamma=gamma, noise=2.0))
            truth = linear_program(*model)
            for solve in (bellman.value_iteration, bellman.policy_iteration):
                values, policy, _ = solve(*model)
                assert_close(values, truth, rtol=0, atol=1e-6)
                assert_close(bellman.evaluate_policy(*model[:2], policy, gamma), truth, rtol=0, atol=1e-6)


def check_no_deterministic_policy_is_better(bellman):
    """All 3^3 policies: the best of them in every state at once, and one of them attains V*."""
    for seed in range(4):
        transitions, rewards, gamma = parts(mdps.random_mdp(3, 3, seed=seed, noise=2.0))
        tables = [torch.eye(3, dtype=torch.float64)[list(c)] for c in itertools.product(range(3), repeat=3)]
        each = torch.stack([bellman.evaluate_policy(transitions, rewards, p, gamma) for p in tables])
        values, _, _ = bellman.value_iteration(transitions, rewards, gamma)
        assert_close(each.amax(0), values, rtol=0, atol=1e-8)
        assert (each - values).abs().amax(-1).min() < 1e-8
        mixed = bellman.evaluate_policy(transitions, rewards, random_policy(seed, 3, 3), gamma)
        assert (mixed <= values + 1e-9).all()


def check_backups_are_contractions(bellman):
    """|T V - T U| <= gamma * |V - U| in the largest entry, for the three backups; and the constant is attained."""
    for seed in range(20):
        gamma = (0.3, 0.9, 0.99)[seed % 3]
        transitions, rewards, _ = parts(mdps.random_mdp(4, 3, seed=seed))
        policy, ref = random_policy(seed, 4, 3), random_policy(seed + 1, 4, 3).log()
        one, two = 3 * normal(seed, 4), 3 * normal(seed + 99, 4)
        before = (one - two).abs().max()
        q = [bellman.q_values(transitions, rewards, v, gamma) for v in (one, two)]
        for backup in (
            lambda q, p=policy: bellman.expectation_backup(p, q),
            bellman.optimality_backup,
            lambda q, r=ref: bellman.soft_backup(q, r, 0.3),
        ):
            assert (backup(q[0]) - backup(q[1])).abs().max() <= gamma * before * (1 + 1e-12)
            shifted = bellman.q_values(transitions, rewards, one + 2.0, gamma)
            assert_close(backup(shifted) - backup(q[0]), torch.full((4,), 2.0 * gamma).double())


def check_the_error_after_k_sweeps(bellman):
    """At most gamma^k of what it was at the start; and with one state and one action exactly that."""
    for seed in range(5):
        transitions, rewards, gamma = parts(mdps.random_mdp(4, 2, seed=seed, gamma=0.8))
        truth = linear_program(transitions, rewards, gamma)
        values = torch.zeros(4, dtype=torch.float64)
        for k in range(1, 30):
            values = bellman.optimality_backup(bellman.q_values(transitions, rewards, values, gamma))
            assert (values - truth).abs().max() <= gamma**k * truth.abs().max() + 1e-9
    loop, pay = torch.ones(1, 1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    values, _, changes = bellman.value_iteration(loop, pay, 0.9, error=1.0)
    assert values.item() == pytest.approx(10 * (1 - 0.9 ** len(changes)))
    assert bellman.evaluate_policy(loop, pay, pay, 0.9).item() == pytest.approx(10)  # it stays, and is no end
    two, pays = torch.ones(1, 2, 1, dtype=torch.float64), torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    assert bellman.evaluate_policy(two, pays, pays, 0.9).item() == pytest.approx(10)  # nor where one action pays
    enough = len(changes)  # as many sweeps as it took suffice, and one less does not
    assert bellman.value_iteration(loop, pay, 0.9, error=1.0, max_sweeps=enough)[0] == values
    with pytest.raises(ValueError, match=f"still .* after {enough - 1} sweeps"):
        bellman.value_iteration(loop, pay, 0.9, error=1.0, max_sweeps=enough - 1)


def check_the_stopping_rule_keeps_its_word(bellman):
    """Values within `error`, the greedy policy within 2 * gamma * error; on one state the first bound is attained."""
    for seed in range(12):
        gamma, error = (0.5, 0.9, 0.99)[seed % 3], (1.0, 0.1, 0.01)[seed % 3]
        transitions, rewards, _ = parts(mdps.random_mdp(5, 3, seed=seed, noise=2.0))
        truth = linear_program(transitions, rewards, gamma)
        values, policy, changes = bellman.value_iteration(transitions, rewards, gamma, error=error)
        assert (values - truth).abs().max() <= error + 1e-9
        loss = truth - bellman.evaluate_policy(transitions, rewards, policy, gamma)
        assert -1e-9 <= loss.min() and loss.max() <= 2 * gamma * error + 1e-9
        assert changes[-1] * gamma / (1 - gamma) <= error and all(c * gamma / (1 - gamma) > error for c in changes[:-1])
    loop, pay = torch.ones(1, 1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    values, _, changes = bellman.value_iteration(loop, pay, 0.9, error=0.5)
    assert 10 - values.item() == pytest.approx(9 * changes[-1])
    among = torch.eye(20, dtype=torch.float64)[:, None], torch.eye(20, dtype=torch.float64)[:, :1]  # and 19 ends
    values, _, _ = bellman.value_iteration(*among, 0.9, error=0.5)
    assert 10 - values[0] <= 0.5 and not values[1:].any()


def check_policies_only_improve(bellman):
    """The policy improvement theorem, and by how much: V' - V = (I - gamma P')^-1 (T' V - V), state by state."""
    for seed in range(8):
        transitions, rewards, gamma = parts(mdps.random_mdp(5, 3, seed=seed, noise=2.0))
        old = random_policy(seed, 5, 3)
        values = bellman.evaluate_policy(transitions, rewards, old, gamma)
        q = bellman.q_values(transitions, rewards, values, gamma)
        half = 0.5 * old + 0.5 * bellman.greedy(q)  # need not be greedy: better on average is enough
        for new in (bellman.greedy(q), half):
            gain = bellman.expectation_backup(new, q) - values
            assert (gain >= -1e-12).all()
            chain = torch.einsum("sa,sat->st", new, transitions)
            rise = torch.linalg.inv(torch.eye(5) - gamma * chain) @ gain
            found = bellman.evaluate_policy(transitions, rewards, new, gamma) - values
            assert_close(found, rise, rtol=0, atol=1e-9)
            assert (found >= -1e-10).all() and found.max() > 0
        best, policy, history = bellman.policy_iteration(transitions, rewards, gamma, old)
        assert_close(history[0], values)
        assert_close(history[-1], best)
        assert_close(history[1], bellman.evaluate_policy(transitions, rewards, bellman.greedy(q), gamma))
        for before, after in zip(history, history[1:], strict=False):
            assert (after >= before - 1e-10).all() and (after - before).max() > 0
        assert len(history) <= 3**5 + 1
        assert ((policy == 0) | (policy == 1)).all()


def check_ties_do_not_keep_policy_iteration_busy(bellman):
    """Equal actions everywhere, and the two mirror images of a symmetric world: it stops, whatever the rounding."""
    for scale in (1.0, 1e6):
        same = torch.tensor([[0.1, 0.9], [0.9, 0.1]], dtype=torch.float64)[:, None].expand(2, 4, 2)
        pay = scale * torch.tensor([[1 / 3] * 4, [0.1 + 0.2] * 4], dtype=torch.float64)
        values, policy, history = bellman.policy_iteration(same, pay, 0.99)
        assert len(history) == 1 and (policy == 0.25).all()
    assert_close(values, bellman.value_iteration(same, pay, 0.99)[0], rtol=1e-9, atol=0)
    for seed in range(5):  # values in the millions are rounded more coarsely
        one = mdps.random_mdp(6, 1, seed=seed, gamma=0.99)
        same, pay = one.transitions.expand(6, 3, 6), 1e6 * one.expected_rewards.expand(6, 3)
        assert len(bellman.policy_iteration(same, pay, 0.99)[2]) == 1


def check_gymnasium_cliff(bellman):
    """Undiscounted, each cell is worth minus its distance to the goal; the start -13."""
    model = parts(mdps.from_gymnasium("CliffWalking-v1", 1.0))
    for solve in (bellman.value_iteration, bellman.policy_iteration):
        values, policy, _ = solve(*model)
        for row, column in itertools.product(range(3), range(12)):
            assert values[12 * row + column].item() == pytest.approx(-(3 - row) - (11 - column), abs=1e-9)
        assert values[36].item() == pytest.approx(-13, abs=1e-9) and values[47] == 0
        assert_close(bellman.evaluate_policy(*model[:2], policy, 1.0), values, rtol=0, atol=1e-9)


def check_gymnasium_frozen_lake(bellman):
    """The linear program again, discounted and not; undiscounted the chance to arrive from the start is 14/17."""
    for gamma in (0.9, 1.0):
        model = parts(mdps.from_gymnasium("FrozenLake-v1", gamma))
        truth = linear_program(*model)
        for solve in (bellman.value_iteration, bellman.policy_iteration):
            values, _, _ = solve(*model)
            assert_close(values, truth, rtol=0, atol=1e-6)
        if gamma == 1:
            assert values[0].item() == pytest.approx(14 / 17, abs=1e-9)


def check_gamma_one_needs_an_end(bellman):
    """Right where the end is reached, refused where it is not, and a policy that is greedy on ties may never arrive."""
    walk = mdps.random_walk(19)
    model = walk.transitions, walk.expected_rewards
    values = bellman.evaluate_policy(*model, torch.ones(21, 1, dtype=torch.float64), 1.0)
    assert_close(values[1:-1], torch.arange(1, 20).double() / 10 - 1, rtol=0, atol=1e-10)
    assert values[0] == values[-1] == 0
    endless = parts(mdps.random_mdp(3, 2))
    with pytest.raises(ValueError, match=r"gamma = 1, and the policy never ends from states \[0, 1, 2\]"):
        bellman.evaluate_policy(*endless[:2], random_policy(0, 3, 2), 1.0)
    with pytest.raises(ValueError, match=r"still .* of change after 50 sweeps, gamma 1"):
        bellman.value_iteration(*endless[:2], 1.0, max_sweeps=50)
    with pytest.raises(ValueError, match="never ends"):
        bellman.policy_iteration(*endless[:2], 1.0)
    lake = parts(mdps.from_gymnasium("FrozenLake-v1", 1.0, is_slippery=False))
    values, policy, _ = bellman.value_iteration(*lake)
    assert values[0] == 1.0
    with pytest.raises(ValueError, match="never ends from states"):  # all moves are worth 1, and it stays where it is
        bellman.evaluate_policy(*lake[:2], policy, 1.0)
    values, policy, _ = bellman.policy_iteration(*lake)
    assert values[0].item() == pytest.approx(1.0)
    assert_close(bellman.evaluate_policy(*lake[:2], policy, 1.0), values)
    # A corridor: to stay is as good as to go on, and must not be taken for that while something else improves.
    transitions, rewards = torch.zeros(4, 2, 4, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64)
    for s, a, t in ((0, 0, 0), (0, 1, 1), (1, 0, 3), (1, 1, 3), (2, 0, 3), (2, 1, 3), (3, 0, 3), (3, 1, 3)):
        transitions[s, a, t] = 1.0
    rewards[1], rewards[2, 1] = 1.0, 0.5
    first = torch.tensor([[0, 1], [1, 0], [1, 0], [1, 0]], dtype=torch.float64)
    values, policy, history = bellman.policy_iteration(transitions, rewards, 1.0, first)
    assert values.tolist() == [1, 1, 0.5, 0] and policy[0, 1] == 1 and len(history) == 2


def world_as_mdp(world):
    """The exact world of one prompt after the other: a state for each prefix of each prompt, and one for the end. The
    last token pays the response's reward."""
    prompts, prefixes, vocab = world.ref_logits.shape
    end = prompts * prefixes
    transitions = torch.zeros(end + 1, vocab, end + 1, dtype=torch.float64)
    rewards = torch.zeros(end + 1, vocab, dtype=torch.float64)
    transitions[end, :, end] = 1.0
    for x, (y, tokens) in itertools.product(range(prompts), enumerate(world.tokens.tolist())):
        path = [x * prefixes + p for p in world.prefixes[y].tolist()] + [end]
        for s, a, t in zip(path, tokens, path[1:], strict=False):
            transitions[s, a, t] = 1.0
        rewards[path[-2], tokens[-1]] = world.rewards[x, y]
    return transitions, rewards


def soft_world(bellman, world):
    """(KL between the soft optimum over prefixes and the closed form, values of the prompts against beta log Z)."""
    transitions, rewards = world_as_mdp(world)
    prompts, prefixes, vocab = world.ref_logits.shape
    ref = torch.cat([world.ref_logits.log_softmax(-1).flatten(0, 1), torch.full((1, vocab), 1 / vocab).double().log()])
    values, logps = bellman.soft_value_iteration(transitions, rewards, ref, 1.0, beta=world.beta)
    found = exact.response_logps(world, logps[:-1].view(prompts, prefixes, vocab))
    truth = exact.optimal_policy(world.ref_logps, world.rewards, world.beta)
    log_z = torch.logsumexp(world.ref_logps + world.rewards / world.beta, -1)
    return (found - truth).abs().max(), (values[:-1].view(prompts, prefixes)[:, 0] - world.beta * log_z).abs().max()


def check_soft_backups_over_prefixes_give_the_optimum_of_rlhf(bellman):
    for seed in range(2):
        world = exact.make_world(seed, prompts=2, vocab=3, length=3, beta=(0.5, 0.1)[seed])
        policy, values = soft_world(bellman, world)
        assert policy < 1e-10 and values < 1e-10
    # Without the penalty: V of a prefix is the mean reward of its completions, Q of a token that of the longer prefix.
    transitions, rewards = world_as_mdp(world)
    prompts, prefixes, vocab = world.ref_logits.shape
    ref = torch.cat([world.ref_logits.softmax(-1).flatten(0, 1), torch.full((1, vocab), 1 / vocab).double()])
    values = bellman.evaluate_policy(transitions, rewards, ref, 1.0)
    mean = (world.ref_logps.exp() * world.rewards).sum(-1)
    assert_close(values[:-1].view(prompts, prefixes)[:, 0], mean, rtol=0, atol=1e-12)


def check_the_soft_optimum_is_one(bellman):
    """Discounted: its value is that of the policy with the penalty paid, no other policy is worth more, and beta goes
    from the reference (large) to the greedy policy (small)."""
    for seed in range(2):
        transitions, rewards, gamma = parts(mdps.random_mdp(4, 3, seed=seed, noise=2.0))
        ref = random_policy(seed, 4, 3).log()
        values, logps = bellman.soft_value_iteration(transitions, rewards, ref, gamma, beta=0.4)

        def worth(logps, t=transitions, r=rewards, ref=ref, gamma=gamma):
            return bellman.evaluate_policy(t, r - 0.4 * (logps - ref), logps.exp(), gamma)

        assert_close(worth(logps), values, rtol=0, atol=1e-8)
        for other in (ref, (logps + 0.1 * normal(seed, 4, 3)).log_softmax(-1), random_policy(seed + 9, 4, 3).log()):
            assert (worth(other) <= values + 1e-9).all() and (worth(other) < values - 1e-6).any()
        assert (logps.exp().sum(-1) - 1).abs().max() < 1e-12
        hard, policy, _ = bellman.value_iteration(transitions, rewards, gamma)
        cold, cold_logps = bellman.soft_value_iteration(transitions, rewards, ref, gamma, beta=1e-3)
        assert_close(cold, hard, rtol=0, atol=0.1)
        assert_close(cold_logps.exp(), policy, rtol=0, atol=1e-2)
        mean, warm = bellman.soft_value_iteration(transitions, rewards, ref, gamma, beta=1e6)
        assert_close(warm, ref, rtol=0, atol=1e-4)
        assert_close(mean, bellman.evaluate_policy(transitions, rewards, ref.exp(), gamma), rtol=0, atol=1e-3)


def check_bad_input_is_named(bellman):
    transitions, rewards, gamma = parts(mdps.random_mdp(3, 2))
    policy = torch.full((3, 2), 0.5, dtype=torch.float64)
    sweep = functools.partial(bellman.value_iteration, max_sweeps=9)
    soft = functools.partial(bellman.soft_value_iteration, transitions, rewards, gamma=gamma, max_sweeps=9)
    cases = [
        (
            lambda: bellman.value_iteration(transitions, rewards.T, gamma),
            r"transitions \(3, 2, 3\) and rewards \(2, 3\)",
        ),
        (lambda: bellman.value_iteration(transitions[..., :2], rewards, gamma), r"transitions \(3, 2, 2\) and"),
        (lambda: bellman.value_iteration(rewards, rewards, gamma), r"transitions \(3, 2\) and"),
        (
            lambda: sweep(2 * transitions, rewards, gamma),
            "transitions: a row is negative or does not",
        ),
        (lambda: sweep(2 * transitions - 1 / 3, rewards, gamma), "transitions: a row is negative"),
        (lambda: sweep(1.001 * transitions, rewards, gamma), "transitions: a row is negative or does not sum"),
        (lambda: sweep(transitions * math.nan, rewards, gamma), "transitions: a row is negative"),
        (lambda: sweep(transitions, rewards * math.inf, gamma), "rewards must be finite"),
        (lambda: sweep(transitions, rewards, 1.1), r"gamma must lie in \[0, 1\], got 1.1"),
        (lambda: soft(policy.log(), beta=0.1), "after 9 sweeps"),
        (lambda: bellman.policy_iteration(transitions, rewards, -0.1), "got -0.1"),
        (lambda: bellman.policy_iteration(transitions, rewards, gamma, max_rounds=1), "still improving after 1 rounds"),
        (lambda: bellman.evaluate_policy(transitions, rewards, policy, math.nan), "got nan"),
        (
            lambda: bellman.evaluate_policy(transitions, rewards, policy[:2], gamma),
            r"policy \(2, 2\) and transitions \(3",
        ),
        (
            lambda: bellman.evaluate_policy(transitions, rewards, 2 * policy, gamma),
            "policy: a row is negative or does not",
        ),
        (lambda: bellman.policy_iteration(transitions, rewards, gamma, policy - 1), "policy: a row is negative"),
        (lambda: soft(policy, beta=0.1), "policy: a row"),
        (lambda: soft(policy.log(), beta=0.0), "beta must be positive"),
    ]
    for function, message in cases:
        with pytest.raises(ValueError, match=message):
            function()


def check_precision_and_extremes(bellman):
    transitions, rewards, gamma = parts(mdps.random_mdp(4, 2))
    values, policy, _ = bellman.policy_iteration(transitions, rewards, gamma)
    small, small_policy, _ = bellman.policy_iteration(transitions.float(), rewards.float(), gamma)
    assert values.dtype == torch.float64 and small.dtype == torch.float32
    assert_close(small.double(), values, rtol=1e-4, atol=1e-4)
    assert_close(small_policy.double(), policy)
    assert_close(bellman.value_iteration(transitions, rewards, 0.0, error=0.0)[0], rewards.amax(-1))  # the next reward
    ref = torch.full((4, 2), 0.5).double().log()
    for size in (1e4, -1e4):
        huge = bellman.soft_backup(torch.full((4, 2), size).bfloat16(), ref.bfloat16(), 0.1)
        assert torch.isfinite(huge).all()


CHECKS = [function for name, function in list(globals().items()) if name.startswith("check_")]
FIRST = [
    check_backups_in_loops,
    check_bad_input_is_named,
    check_gamma_one_needs_an_end,
    check_the_error_after_k_sweeps,
    check_policies_only_improve,
    check_the_stopping_rule_keeps_its_word,
    check_the_soft_optimum_is_one,
]  # quick, and they catch most


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_functions(check):
    check(original)


MISTAKES = {
    "no discount": ("return rewards + gamma * transitions @ values", "return rewards + transitions @ values"),
    "discounted reward": (
        "return rewards + gamma * transitions @ values",
        "return gamma * (rewards + transitions @ values)",
    ),
    "minus": ("return rewards + gamma * transitions @ values", "return rewards - gamma * transitions @ values"),
    "mean over actions": ("return (policy * q_values).sum(-1)", "return q_values.mean(-1)"),
    "missing max": ("return q_values.amax(-1)", "return q_values.mean(-1)"),
    "min for max": ("return q_values.amax(-1)", "return q_values.amin(-1)"),
    "worst action": ("one_hot(q_values.argmax(-1)", "one_hot(q_values.argmin(-1)"),
    "transposed chain": ('"sa,sat->st"', '"sa,sat->ts"'),
    "no discount in the solve": ("- gamma * chain[live]", "- chain[live]"),
    "ends unseen": (
        "ends = (transitions.diagonal",
        "ends = torch.zeros_like(rewards[:, 0]).bool() & (transitions.diagonal",
    ),
    "a paying loop is an end": ("& (rewards == 0).all(-1)  #", "#"),
    "one way to the end is every way": (
        "(transitions.diagonal(dim1=0, dim2=2) == 1).all(0)",
        "(transitions.diagonal(dim1=0, dim2=2) == 1).any(0)",
    ),
    "endless policies allowed": ("if not leads.all()", "if False"),
    "reach unused": ("leads = leads | (chain @ leads.to(chain) > 0)", "leads = leads | True"),
    "one step of reach": ("for _ in ends:", "for _ in ends[:1]:"),
    "bound without 1 - gamma": ("(gamma / (1 - gamma) if gamma < 1 else 1.0)", "1.0"),
    "bound without gamma": ("(gamma / (1 - gamma) if gamma < 1 else 1.0)", "(1 / (1 - gamma) if gamma < 1 else 1.0)"),
    "mean change": ("(values - before).abs().max()", "(values - before).abs().mean()"),
    "signed change": ("(values - before).abs().max()", "(values - before).max()"),
    "gives up silently": (
        '    raise ValueError(f"still {changes[-1]} of change after {max_sweeps} sweeps, gamma {gamma}")',
        "    return values, changes",
    ),
    "starts from ones": ("start = torch.zeros_like(rewards[:, 0])", "start = torch.ones_like(rewards[:, 0])"),
    "improves on noise": ("better = q.amax(-1) > values + noise", "better = q.amax(-1) >= values"),
    "never improves": ("better = q.amax(-1) > values + noise", "better = q.amax(-1) > values + 1e9"),
    "changes what is equal": ("torch.where(better[:, None], greedy(q), policy)", "greedy(q)"),
    "one state at a time, the wrong ones": (
        "torch.where(better[:, None], greedy(q), policy)",
        "torch.where(better[:, None], policy, greedy(q))",
    ),
    "soft without reference": (
        "beta * (ref_logps + q_values / beta).logsumexp(-1)",
        "beta * (q_values / beta).logsumexp(-1)",
    ),
    "soft times beta": (
        "beta * (ref_logps + q_values / beta).logsumexp(-1)",
        "beta * (ref_logps + q_values * beta).logsumexp(-1)",
    ),
    "soft without beta outside": (
        "beta * (ref_logps + q_values / beta).logsumexp(-1)",
        "(ref_logps + q_values / beta).logsumexp(-1)",
    ),
    "overflow": (
        "beta * (ref_logps + q_values / beta).logsumexp(-1)",
        "beta * (ref_logps + q_values / beta).exp().sum(-1).log()",
    ),
    "greedy for soft": (
        "return values, (ref_logps + q / beta).log_softmax(-1)",
        "return values, (q / beta).log_softmax(-1)",
    ),
    "shapes unchecked": ("tuple(rewards.shape) != shape[:2]", "False"),
    "policy unchecked": ("if policy is not None and tuple(policy.shape) != shape[:2]", "if False"),
    "chances unchecked": ("if chances is not None and not (", "if False and not ("),
    "gamma unchecked": ("if not 0 <= gamma <= 1", "if False"),
    "beta unchecked": ("if not beta > 0", "if False"),
    "rewards unchecked": ("if not torch.isfinite(rewards).all()", "if False"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_caught(mistake):
    broken = load_mutant(PATH, *MISTAKES[mistake])
    assert any(caught_by(broken, [check]) for check in dict.fromkeys(FIRST + CHECKS))  # until the first


# Measured.


def test_against_oracles(evidence):
    worst = {"linear": 0.0, "all": 0.0, "tables": 0.0}
    for seed in SEEDS if evidence.full else SEEDS[:5]:
        for gamma in (0.5, 0.9, 0.99):
            model = parts(mdps.random_mdp(6, 3, seed=seed, gamma=gamma, noise=2.0))
            found = original.policy_iteration(*model)[0], original.value_iteration(*model)[0]
            truth = linear_program(*model)
            worst["linear"] = max(worst["linear"], *((values - truth).abs().max().item() for values in found))
    evidence(
        "foundations/bellman",
        "Value and policy iteration against a linear program, random worlds",
        value=worst["linear"],
        bar=1e-6,
        unit="reward",
        seeds=SEEDS,
        note="largest difference in V* over all states; scipy's HiGHS; γ 0.5, 0.9 and 0.99",
    )
    for name in ("FrozenLake-v1", "CliffWalking-v1", "Taxi-v4"):
        model = parts(mdps.from_gymnasium(name, 0.99))
        truth = linear_program(*model)
        for solve in (original.value_iteration, original.policy_iteration):
            worst["tables"] = max(worst["tables"], (solve(*model)[0] - truth).abs().max().item())
    evidence(
        "foundations/bellman",
        "The same on Gymnasium's FrozenLake, CliffWalking and Taxi",
        value=worst["tables"],
        bar=1e-6,
        unit="reward",
        note="γ 0.99",
    )


def test_taxi_pays_what_the_values_promise():
    """The real environment, undiscounted: the greedy policy's return from a start is V* of it, exactly."""
    model = parts(mdps.from_gymnasium("Taxi-v4", 1.0))
    values, policy, _ = original.value_iteration(*model)
    env = gymnasium.make("Taxi-v4")
    for seed in SEEDS:
        state, _ = env.reset(seed=seed)
        promised, total, over = values[state].item(), 0.0, False
        while not over:
            state, reward, ended, cut, _ = env.step(int(policy[state].argmax()))
            total, over = total + reward, ended or cut
        assert ended and total == pytest.approx(promised, abs=1e-9)


def test_frozen_lake_is_crossed_as_often_as_promised(evidence):
    """The real environment without its limit of 100 steps, undiscounted: 14 of 17 times, within noise."""
    transitions, rewards, gamma = parts(mdps.from_gymnasium("FrozenLake-v1", 1.0))
    values, policy, _ = original.policy_iteration(transitions, rewards, gamma)
    episodes, arrived = 2000 if evidence.full else 300, 0
    env = gymnasium.make("FrozenLake-v1", max_episode_steps=10**6)
    choice = numpy.random.default_rng(0)
    state, _ = env.reset(seed=0)
    for _ in range(episodes):
        over = False
        while not over:
            state, reward, over, _, _ = env.step(int(choice.choice(4, p=policy[state].numpy())))
        arrived += reward
        state, _ = env.reset()
    p = values[0].item()
    z = (arrived - episodes * p) / math.sqrt(episodes * p * (1 - p))
    evidence(
        "foundations/bellman",
        "FrozenLake crossed as often as V* says, deviation",
        value=abs(z),
        bar=4.0,
        unit="standard errors",
        note="in Gymnasium itself, no limit of steps, γ = 1, V*(start) = 14/17",
    )


def errors_of_sweeps(gamma, seed, sweeps=60):
    """Per sweep of value iteration: the error of the values over its start, and the greedy policy's loss."""
    model = parts(mdps.random_mdp(20, 4, seed=seed, gamma=gamma, noise=3.0))
    truth, _, history = original.policy_iteration(*model)
    values, error, loss = torch.zeros(20, dtype=torch.float64), [], []
    for _ in range(sweeps):
        q = original.q_values(*model[:2], values, gamma)
        own = original.evaluate_policy(*model[:2], original.greedy(q), gamma)
        error.append(((values - truth).abs().max() / truth.abs().max()).item())
        loss.append(((truth - own).max() / truth.abs().max()).item())
        values = original.optimality_backup(q)
    return error, loss, history


def test_errors_shrink_by_gamma(evidence):
    """Each sweep of value iteration shrinks the error by gamma at least; policy iteration is done after a few rounds;
    the greedy policy is optimal long before the values are."""
    gamma, sweeps = 0.9, 60
    runs = [errors_of_sweeps(gamma, seed, sweeps) for seed in SEEDS]
    ratios = [max(b / a for a, b in zip(error, error[1:], strict=False) if a > 1e-9) for error, _, _ in runs]
    evidence(
        "foundations/bellman",
        "Largest factor by which a sweep of value iteration shrank the error, γ = 0.9",
        value=max(ratios),
        bar=gamma + 1e-9,
        seeds=SEEDS,
        spread=ratios,
        note="random worlds of 20 states and 4 actions; the theorem: at most γ",
        curve={
            "x": list(range(sweeps)),
            "y": {"error": [error for error, _, _ in runs], "loss": [loss for _, loss, _ in runs]},
            "gamma": gamma,
        },
    )
    rounds = [len(history) for _, _, history in runs]
    evidence(
        "foundations/bellman",
        "Rounds of policy iteration until it stops",
        value=max(rounds),
        bar=10,
        seeds=SEEDS,
        spread=rounds,
        note="the same worlds, which have 4²⁰ deterministic policies; from the uniform policy",
    )
    first = [1 + max((k for k, x in enumerate(loss) if x > 1e-12), default=-1) for _, loss, _ in runs]  # and stays so
    left = [error[k] for (error, _, _), k in zip(runs, first, strict=True)]
    evidence(
        "foundations/bellman",
        "Sweeps until the greedy policy is optimal and stays so",
        value=float(numpy.median(first)),
        seeds=SEEDS,
        spread=first,
        note="the same worlds; from V = 0",
    )
    evidence(
        "foundations/bellman",
        "Error of the values then, relative",
        value=float(numpy.median(left)),
        bar=0.05,
        better=">=",
        seeds=SEEDS,
        spread=left,
        note="so the policy is right long before the values are",
    )


def test_the_bound_on_the_loss_is_attained(evidence):
    """Two loops that pay +x and -x, and a fork: V = 0 cannot tell them apart, and the wrong branch loses all that the
    bound allows."""
    gamma, x = 0.9, 1.0
    transitions, rewards = torch.zeros(3, 2, 3, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    transitions[0, 0, 1] = transitions[0, 1, 2] = 1.0  # the fork: the first of equals leads to the bad loop
    transitions[1, :, 1] = transitions[2, :, 2] = 1.0
    rewards[1], rewards[2] = -x, x
    values = torch.zeros(3, dtype=torch.float64)
    q = original.q_values(transitions, rewards, values, gamma)
    residual = (original.optimality_backup(q) - values).abs().max().item()
    best = original.policy_iteration(transitions, rewards, gamma)[0]
    loss = (best - original.evaluate_policy(transitions, rewards, original.greedy(q), gamma)).max().item()
    evidence(
        "foundations/bellman",
        "Loss of a greedy policy over the bound 2γ/(1 − γ) · residual, worst case",
        value=loss / (2 * gamma / (1 - gamma) * residual),
        bar=1.0 - 1e-9,
        better=">=",
        note="attained: the bound cannot be improved",
    )
    assert loss == pytest.approx(2 * gamma * x / (1 - gamma))


def test_soft_backups_find_the_optimum_of_the_exact_world(evidence):
    gaps = [max(soft_world(original, exact.make_world(seed))).item() for seed in SEEDS[:5]]
    evidence(
        "foundations/bellman",
        "Soft value iteration over prefixes against π* of the exact world",
        value=max(gaps),
        bar=1e-9,
        unit="nats",
        seeds=SEEDS[:5],
        spread=gaps,
        note="largest difference in log π*(y|x) over 4 prompts and 125 responses, and of V at the prompt from β log Z",
    )


def test_the_demo_prints_its_table(capsys):
    original.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["FrozenLake-v1", "CliffWalking-v1", "Taxi-v4"]
    assert float(lines[2].split()[-1]) == pytest.approx(-(1 - 0.99**13) / 0.01, abs=1e-3)
