"""Monte Carlo and TD against linear systems, sums over all episodes, loops, a printed example, and broken copies."""

import dataclasses
import itertools
import math

import numpy
import pytest
import torch
from torch.testing import assert_close

from snippets.foundations import bellman
from snippets.foundations import td as original
from snippets.rlhf import ppo
from snippets.worlds import mdps
from tests.mutation import caught_by, load_mutant

torch.set_num_threads(1)
PATH = "snippets/foundations/td.py"
SEEDS = list(range(20))
LAMS = [0.0, 0.4, 0.8, 0.9, 0.95, 0.99, 1.0]
ALPHAS = [0.0025, 0.005, 0.01] + [0.02 * k for k in range(1, 6)] + [0.05 * k for k in range(3, 21)]


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ones(mdp):
    states, actions, _ = mdp.transitions.shape
    return torch.full((states, actions), 1 / actions, dtype=torch.float64)


def truth(mdp, policy=None):
    policy = ones(mdp) if policy is None else policy
    return bellman.evaluate_policy(mdp.transitions, mdp.expected_rewards, policy, mdp.gamma)


def walks(module, count, seed=0, states=5, limit=10_000):
    mdp, generator = mdps.random_walk(states), torch.Generator().manual_seed(seed)
    return [module.rollout(mdp, ones(mdp), generator, limit=limit) for _ in range(count)]


def some_episode(module, seed=0, length=12, terminated=False, states=4):
    """Any numbers will do: identities between updates hold on all of them."""
    path = torch.randint(states, (length + 1,), generator=torch.Generator().manual_seed(seed))
    return module.Episode(path, normal(seed, length), terminated)


# Each check takes the module, so that broken copies can be put to it.


def check_targets_in_loops(td):
    """n-step returns from their definition; lambda-returns as the weighted sum of them."""
    for terminated in (True, False):
        seed = int(terminated)
        episode, values = some_episode(td, seed, 7, terminated), normal(seed + 50, 4)
        paid = episode.rewards.tolist()
        after = td.next_values(values, episode)
        for t in range(7):
            cut = t == 6 and terminated
            assert after[t].item() == (0.0 if cut else values[episode.states[t + 1]].item())
        assert_close(values, normal(seed + 50, 4), rtol=0, atol=0)  # the table itself is left alone
        for gamma in (1.0, 0.9, 0.0):
            table = {}
            for n in range(1, 10):
                table[n] = td.n_step_returns(episode.rewards, after, n=n, gamma=gamma)
                for t in range(7):
                    end = min(t + n, 7)
                    total = sum(gamma ** (k - t) * paid[k] for k in range(t, end))
                    behind = 0.0 if end == 7 and terminated else values[episode.states[end]].item()
                    assert abs(table[n][t].item() - total - gamma ** (end - t) * behind) < 1e-12
            for lam in (0.0, 0.5, 0.9, 1.0):
                found = td.lambda_returns(episode.rewards, after, lam=lam, gamma=gamma)
                for t in range(7):
                    left = 7 - t
                    mix = sum((1 - lam) * lam ** (n - 1) * table[n][t].item() for n in range(1, left))
                    mix += lam ** (left - 1) * table[left][t].item()
                    assert abs(found[t].item() - mix) < 1e-12


def check_the_two_ends_of_lambda(td):
    """lam 0 is the one-step target, lam 1 the whole return: of targets, of updates, of batches."""
    for seed, terminated in itertools.product(range(3), (True, False)):
        episode, values = some_episode(td, seed, 9, terminated), normal(seed + 60, 4)
        after = td.next_values(values, episode)
        zero = td.lambda_returns(episode.rewards, after, lam=0.0, gamma=0.9)
        assert_close(zero, episode.rewards + 0.9 * after, rtol=0, atol=1e-12)
        assert_close(zero, td.n_step_returns(episode.rewards, after, n=1, gamma=0.9), rtol=0, atol=1e-12)
        one = td.lambda_returns(episode.rewards, after, lam=1.0, gamma=0.9)
        assert_close(one, td.n_step_returns(episode.rewards, after, n=9, gamma=0.9), rtol=0, atol=1e-12)
        # TD(0), step by step in place, is the usual loop.
        table = values.clone()
        for t in range(9):
            s = episode.states[t]
            behind = 0.0 if terminated and t == 8 else table[episode.states[t + 1]]
            table[s] = table[s] + 0.1 * (episode.rewards[t] + 0.9 * behind - table[s])
        assert_close(td.td_lambda(values, episode, alpha=0.1, lam=0.0, gamma=0.9), table, rtol=0, atol=1e-12)
    episodes = walks(td, 6)
    total, visits = torch.zeros(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    for episode in episodes:  # the mean over all visits
        for t, s in enumerate(episode.states[:-1].tolist()):
            total[s], visits[s] = total[s] + episode.rewards[t:].sum(), visits[s] + 1
    assert_close(
        td.batch_values(episodes, 7, lam=1.0, gamma=1.0, sweeps=5), total / visits.clamp(min=1), rtol=0, atol=1e-10
    )


def check_forward_is_backward_off_line(td):
    """The increments of a whole episode, with the table held still: equal for all lam, gamma, cut or not."""
    for seed, terminated in enumerate((True, False)):
        episode, values = some_episode(td, seed, 30, terminated), normal(seed + 70, 4)
        for lam, gamma in itertools.product((0.0, 0.5, 0.95, 1.0), (0.9, 1.0)):
            back = td.td_lambda(values, episode, alpha=0.05, lam=lam, gamma=gamma, online=False)
            forward = td.forward_update(values, episode, alpha=0.05, lam=lam, gamma=gamma)
            assert_close(back, forward, rtol=0, atol=1e-10)
            assert_close(values, normal(seed + 70, 4), rtol=0, atol=0)  # the old table is left alone


def check_on_line_differs_in_second_order(td):
    """Ten times smaller steps, a hundred times smaller difference to the off-line update. With lam 0, an episode that
    comes to no state twice has none: no step reads a value that an earlier one changed."""
    episode, values = some_episode(td, 3, 40), normal(73, 4)
    gaps = []
    for alpha in (1e-2, 1e-3, 1e-4):
        on, off = (td.td_lambda(values, episode, alpha=alpha, lam=0.9, gamma=0.9, online=x) for x in (True, False))
        gaps.append((on - off).abs().max().item())
    assert gaps[0] > 1e-4
    assert gaps[0] / gaps[1] == pytest.approx(100, rel=0.3) and gaps[1] / gaps[2] == pytest.approx(100, rel=0.05)
    path = td.Episode(torch.arange(5), normal(5, 4), True)
    table = normal(6, 5)
    on, off = (td.td_lambda(table, path, alpha=0.3, lam=0.0, online=x) for x in (True, False))
    assert_close(on, off, rtol=0, atol=1e-12)


def check_gae_is_a_lambda_return(td):
    """Less V(s_t), with the same gamma and lam, in the code of the LLM half: an answer that ended, masks all ones."""
    for seed in range(3):
        episode, values = some_episode(td, seed, 10, terminated=True), normal(seed + 80, 4)
        here = values[episode.states[:-1]]
        advantages, returns = ppo.gae(episode.rewards[None], here[None], torch.ones(1, 10), gamma=0.95, lam=0.8)
        found = td.lambda_returns(episode.rewards, td.next_values(values, episode), lam=0.8, gamma=0.95)
        assert_close(advantages[0].double(), found - here, rtol=0, atol=1e-6)
        assert_close(returns[0].double(), found, rtol=0, atol=1e-6)


def predictor(td):
    """Sutton and Barto 2018, example 6.4: A, 0, B, 0 once; B, 1 six times; B, 0 once. States A 0, B 1, the end 2."""
    first = td.Episode(torch.tensor([0, 1, 2]), torch.tensor([0.0, 0.0], dtype=torch.float64), True)
    rest = [td.Episode(torch.tensor([1, 2]), torch.tensor([x], dtype=torch.float64), True) for x in [1.0] * 6 + [0.0]]
    return [first, *rest]


def check_you_are_the_predictor(td):
    episodes = predictor(td)
    assert_close(td.batch_values(episodes, 3, lam=0.0, gamma=1.0, sweeps=500), torch.tensor([0.75, 0.75, 0.0]).double())
    assert_close(td.batch_values(episodes, 3, lam=1.0, gamma=1.0, sweeps=5), torch.tensor([0.0, 0.75, 0.0]).double())
    values, visits = td.monte_carlo(episodes, 3, gamma=1.0)
    assert values.tolist() == [0.0, 0.75, 0.0] and visits.tolist() == [1, 8, 0]


def certainty_equivalence(episodes, states, gamma):
    """V of the model with the counted frequencies and the mean rewards, by a linear solve; unseen states are 0."""
    counts, pay = torch.zeros(states, states, dtype=torch.float64), torch.zeros(states, dtype=torch.float64)
    live, ends = torch.zeros(states), []
    for episode in episodes:
        path = episode.states.tolist()
        for t, r in enumerate(episode.rewards.tolist()):
            pay[path[t]] += r
            live[path[t]] = 1
            if not (episode.terminated and t == len(episode.rewards) - 1):
                counts[path[t], path[t + 1]] += 1
            else:
                ends.append(path[t])
    visits = counts.sum(-1) + torch.bincount(torch.tensor(ends, dtype=torch.long), minlength=states)
    chain, mean = counts / visits.clamp(min=1).unsqueeze(-1), pay / visits.clamp(min=1)
    return torch.linalg.solve(torch.eye(states) - gamma * chain, mean)


def check_batch_td_is_certainty_equivalence(td):
    episodes = walks(td, 8, seed=4)
    found = td.batch_values(episodes, 7, lam=0.0, gamma=1.0, sweeps=300)
    assert_close(found, certainty_equivalence(episodes, 7, 1.0), rtol=0, atol=1e-8)
    mdp, generator = mdps.random_mdp(4, 2, seed=1, gamma=0.8), torch.Generator().manual_seed(0)
    cut = [td.rollout(mdp, ones(mdp), generator, limit=n) for n in (1, 3, 7, 20)]
    assert not any(episode.terminated for episode in cut)
    found = td.batch_values(cut, 4, lam=0.0, gamma=0.8, sweeps=500)
    assert_close(found, certainty_equivalence(cut, 4, 0.8), rtol=0, atol=1e-8)
    paid = [e._replace(rewards=1e9 * (e.rewards + 0.1)) for e in episodes]  # what counts as still depends on the size
    found = td.batch_values(paid, 7, lam=0.0, gamma=1.0, sweeps=300)
    assert_close(found, certainty_equivalence(paid, 7, 1.0), rtol=1e-8, atol=0)


def loop_values(td, gamma, limit, lam=0.0, honest=True, sweeps=500):
    """One state that pays 1 for ever, watched in pieces of `limit` steps; honest: a piece is cut off, not ended."""
    piece = td.Episode(torch.zeros(limit + 1, dtype=torch.long), torch.ones(limit, dtype=torch.float64), not honest)
    return td.batch_values([piece], 1, lam=lam, gamma=gamma, sweeps=sweeps).item()


def check_a_cut_is_no_end(td):
    """1 / (1 - gamma) whatever the limit, if the cut state keeps its value. Taken for an end it is worth 1 / (1 - gamma
    (L - 1) / L) with lam 0: 3.57 instead of 10 for five steps and gamma 0.9."""
    for limit, lam in itertools.product((1, 5, 20), (0.0, 0.7)):
        assert loop_values(td, 0.9, limit, lam) == pytest.approx(10, abs=1e-8)
    assert loop_values(td, 0.9, 5, honest=False) == pytest.approx(1 / (1 - 0.9 * 4 / 5), abs=1e-8)
    episode, values = some_episode(td, 1, 5), normal(2, 4)
    ended = episode._replace(terminated=True)
    for online, lam in itertools.product((True, False), (0.0, 0.9)):
        kept, lost = (td.td_lambda(values, e, alpha=0.1, lam=lam, gamma=0.9, online=online) for e in (episode, ended))
        assert (kept - lost).abs().max() > 1e-4


def check_first_visits_only(td):
    """A state that comes back: 0 -> 1 -> 0 -> end with rewards 1, 2, 4. First visit of 0: 7; every visit: 5.5."""
    episode = td.Episode(torch.tensor([0, 1, 0, 2]), torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64), True)
    values, visits = td.monte_carlo([episode], 4, gamma=1.0)
    assert values.tolist() == [7, 6, 0, 0] and visits.tolist() == [1, 1, 0, 0]
    assert td.monte_carlo([episode], 3, gamma=0.5)[0].tolist() == [3, 4, 0]
    assert_close(td.batch_values([episode], 3, lam=1.0, gamma=1.0, sweeps=5), torch.tensor([5.5, 6.0, 0.0]).double())
    for episodes in ([episode, episode._replace(terminated=False)], []):
        with pytest.raises(ValueError, match="needs whole episodes, and one was cut off or none given"):
            td.monte_carlo(episodes, 3, gamma=1.0)


def check_rollouts_follow_the_world(td):
    walk = mdps.random_walk(5)
    episodes = walks(td, 60)
    assert all(
        e.terminated and walk.terminal[e.states[-1]] and not walk.terminal[e.states[:-1]].any() for e in episodes
    )
    assert all((e.states.diff().abs() == 1).all() and e.states[0] == 3 for e in episodes)
    assert all(len(e.states) == len(e.rewards) + 1 for e in episodes)
    assert all(e.rewards[-1] == (1 if e.states[-1] == 6 else -1) and not e.rewards[:-1].any() for e in episodes)
    assert {e.states[-1].item() for e in episodes} == {0, 6}
    assert all(e.terminated for e in walks(td, 3, states=1, limit=1))  # an end at the limit is an end
    short = walks(td, 20, limit=3)
    assert all(len(e.rewards) == 3 or e.terminated for e in short) and not all(e.terminated for e in short)
    mdp, generator = mdps.random_mdp(3, 2, seed=0), torch.Generator().manual_seed(0)
    taken = torch.tensor([0, 1, 0])  # the policy decides, state by state
    long = td.rollout(mdp, torch.eye(2, dtype=torch.float64)[taken], generator, limit=1500)
    assert not long.terminated and len(long.rewards) == 1500
    for s in range(3):
        here = long.states[:-1] == s
        frequency = torch.bincount(long.states[1:][here], minlength=3) / here.sum()
        assert (frequency - mdp.transitions[s, taken[s]]).abs().max() < 5 / (2 * math.sqrt(here.sum()))
    assert_close(long.rewards, mdp.rewards[long.states[:-1], taken[long.states[:-1]], long.states[1:]])


def check_many_runs_at_once(td):
    """values (K, S) with alpha and lam (K, 1) are K runs, cut or not, on-line or not."""
    alpha, lam = torch.tensor([[0.1], [0.2], [0.3]]).double(), torch.tensor([[0.0], [0.5], [1.0]]).double()
    for terminated, online in itertools.product((True, False), (True, False)):
        episode, values = some_episode(td, 4, 15, terminated), normal(90, 3, 4)
        found = td.td_lambda(values, episode, alpha=alpha, lam=lam, gamma=0.9, online=online)
        for k in range(3):
            a, x = alpha[k].item(), lam[k].item()
            single = td.td_lambda(values[k], episode, alpha=a, lam=x, gamma=0.9, online=online)
            assert_close(found[k], single, rtol=0, atol=1e-12)


def check_bad_input_is_named(td):
    mdp, generator, r = mdps.random_walk(3), torch.Generator().manual_seed(0), torch.ones(4)
    ended = dataclasses.replace(mdp, start=mdp.terminal.double() * torch.tensor([1, 0, 0, 0, 0]))
    cases = [
        (lambda: td.rollout(mdp, torch.ones(5, 2), generator), r"policy \(5, 2\) and transitions \(5, 1, 5\) disagree"),
        (lambda: td.rollout(mdp, ones(mdp), generator, limit=0), "no step to take: limit 0, start in state 2"),
        (lambda: td.rollout(ended, ones(mdp), generator), "no step to take: limit 10000, start in state 0"),
        (lambda: td.n_step_returns(r, r[:3], n=1, gamma=1.0), r"rewards \(4,\), next_values \(3,\): want one shape"),
        (lambda: td.lambda_returns(r[None], r[None], lam=1.0, gamma=1.0), r"rewards \(1, 4\), next_values \(1, 4\)"),
        (lambda: td.lambda_returns(r[:0], r[:0], lam=1.0, gamma=1.0), r"rewards \(0,\)"),
        (lambda: td.n_step_returns(r, r, n=0, gamma=1.0), "n must be at least 1, got 0"),
        (lambda: td.n_step_returns(r, r, n=1, gamma=1.1), r"gamma must lie in \[0, 1\], got 1.1"),
        (lambda: td.lambda_returns(r, r, lam=-0.1, gamma=1.0), r"lam must lie in \[0, 1\], got -0.1"),
        (lambda: td.lambda_returns(r, r, lam=math.nan, gamma=1.0), "got nan"),
        (lambda: loop_values(td, 1.0, 5, sweeps=9), "no fixed point after 9 sweeps: moved by 1.0"),
    ]
    for function, message in cases:
        with pytest.raises(ValueError, match=message):
            function()
    assert td.lambda_returns(r, r, lam=0.5, gamma=0.9).dtype == torch.float32
    episode, values = some_episode(td, terminated=True), normal(0, 4)
    for update in (td.td_lambda, td.forward_update):
        assert_close(
            update(values, episode, alpha=0.1, lam=0.5), update(values, episode, alpha=0.1, lam=0.5, gamma=1.0)
        )
    assert td.monte_carlo([episode], 4, gamma=0.9)[0].dtype == torch.float64


CHECKS = [function for name, function in list(globals().items()) if name.startswith("check_")]
FIRST = [
    check_bad_input_is_named,
    check_first_visits_only,
    check_you_are_the_predictor,
    check_the_two_ends_of_lambda,
    check_many_runs_at_once,
    check_rollouts_follow_the_world,
]  # quick, and they catch most


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_functions(check):
    check(original)


MISTAKES = {
    "cut taken for an end": ("    if episode.terminated:\n        after[-1]", "    if True:\n        after[-1]"),
    "end taken for a cut": ("    if episode.terminated:\n        after[-1]", "    if False:\n        after[-1]"),
    "cut taken for an end, backward": ("ended = episode.terminated and t", "ended = t"),
    "end taken for a cut, backward": ("ended = episode.terminated and t", "ended = False and t"),
    "every step an end": ("ended = episode.terminated and t == steps - 1", "ended = episode.terminated"),
    "values of the states left": ("values[episode.states[1:]]", "values[episode.states[:-1]]"),
    "one step too many": ("end = min(t + n, len(rewards))", "end = min(t + n + 1, len(rewards))"),
    "bootstrap a step late": ("next_values[end - 1]", "next_values[min(end, len(rewards) - 1)]"),
    "n-step without discount": ("rewards[k] + gamma * total[t]", "rewards[k] + total[t]"),
    "lambda the other way round": (
        "(1 - lam) * next_values[t] + lam * after",
        "lam * next_values[t] + (1 - lam) * after",
    ),
    "lambda without discount": ("rewards[t] + gamma * ((1 - lam)", "rewards[t] + ((1 - lam)"),
    "tail forgotten": ("torch.zeros_like(rewards), next_values[-1]", "torch.zeros_like(rewards), 0.0"),
    "every visit": ("for s in set(states):", "for s in states:"),
    "last visit": ("returns[states.index(s)]", "returns[len(states) - 1 - states[::-1].index(s)]"),
    "cut episodes averaged": (" or not all(episode.terminated for episode in episodes)", ""),
    "no episodes averaged": ("not episodes or not all", "not all"),
    "Monte Carlo without discount": ("lam=1.0, gamma=gamma)\n        states", "lam=1.0, gamma=1.0)\n        states"),
    "sum for mean": ("total / visits.clamp(min=1), visits", "total, visits"),
    "trace not decayed by gamma": ("traces = gamma * lam * traces", "traces = lam * traces"),
    "trace not decayed by lambda": ("traces = gamma * lam * traces", "traces = gamma * traces"),
    "replacing traces": ("traces[..., states[t]] += 1", "traces[..., states[t]] = 1"),
    "trace of the next state": ("traces[..., states[t]] += 1", "traces[..., states[t + 1]] += 1"),
    "sign of delta": ("- now[..., [states[t]]]", "+ now[..., [states[t]]]"),
    "delta without discount": ("episode.rewards[t] + gamma * after", "episode.rewards[t] + after"),
    "reward of the next step": ("delta = episode.rewards[t]", "delta = episode.rewards[min(t + 1, steps - 1)]"),
    "always on-line": ("now = table if online else values", "now = table"),
    "never on-line": ("now = table if online else values", "now = values"),
    "table changed in place": ("table = table + alpha * delta * traces", "table += alpha * delta * traces"),
    "one visit counted": (
        "values.index_add(0, episode.states[:-1], alpha * errors)",
        "values.index_put((episode.states[:-1],), values[episode.states[:-1]] + alpha * errors)",
    ),
    "errors of the next states": (
        "errors = targets - values[episode.states[:-1]]",
        "errors = targets - values[episode.states[1:]]",
    ),
    "batch by episodes": (
        "(moved - len(episodes) * values) / visits",
        "(moved - len(episodes) * values) / len(episodes)",
    ),
    "batch counts one value": ("(moved - len(episodes) * values)", "(moved - values)"),
    "one sweep": ("if step.abs().max() <= 1e4 * torch.finfo(step.dtype).eps * (1 + values.abs().max()):", "if True:"),
    "never still": ("eps * (1 + values.abs().max()):", "eps:"),
    "first state always": ("torch.multinomial(mdp.start, 1, generator=generator)", "mdp.start.argmax() - 1"),
    "policy ignored": (
        "torch.multinomial(policy[s], 1, generator=generator)",
        "torch.multinomial(torch.ones_like(policy[s]), 1, generator=generator)",
    ),
    "no limit": ("while len(paid) < limit and", "while len(paid) < 2 * limit and"),
    "walks through the end": ("and not mdp.terminal[s]:", "and len(paid) < 9:"),
    "a cut is called an end": ("bool(mdp.terminal[s]))", "True)"),
    "policy unchecked": ("if policy.shape != mdp.transitions.shape[:2]", "if False"),
    "shapes unchecked": ("if rewards.ndim != 1 or rewards.shape != next_values.shape or not len(rewards)", "if False"),
    "lambda unchecked": ("if not 0 <= lam <= 1", "if False"),
    "n unchecked": ("if n < 1:", "if False:"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_caught(mistake):
    broken = load_mutant(PATH, *MISTAKES[mistake])
    assert any(caught_by(broken, [check]) for check in dict.fromkeys(FIRST + CHECKS))  # until the first


# Measured.


def test_forward_and_backward(evidence):
    worst = 0.0
    for seed, terminated in itertools.product(range(10 if evidence.full else 2), (True, False)):
        episode, values = some_episode(original, seed, 200, terminated), normal(seed, 4)
        for lam in LAMS:
            back = original.td_lambda(values, episode, alpha=0.1, lam=lam, gamma=0.99, online=False)
            ahead = original.forward_update(values, episode, alpha=0.1, lam=lam, gamma=0.99)
            worst = max(worst, (back - ahead).abs().max().item())
    evidence(
        "foundations/td",
        "Forward against backward view, off-line, 200 steps",
        value=worst,
        bar=1e-10,
        unit="reward",
        seeds=list(range(10)),
        note="largest difference in a table of 4 states; 7 values of λ, ended and cut episodes",
    )


def test_the_predictor(evidence):
    episodes = predictor(original)
    for name, lam, expected in (("TD(0)", 0.0, 0.75), ("Monte Carlo", 1.0, 0.0)):
        found = original.batch_values(episodes, 3, lam=lam, gamma=1.0)
        evidence(
            "foundations/td",
            f"You are the predictor: V(A) of batch {name}",
            value=found[0].item(),
            bar=expected,
            better="==",
            note="Sutton and Barto's example 6.4; V(B) = 3/4 for both",
        )
        assert found[1].item() == pytest.approx(0.75, abs=1e-12)


def test_a_cut_taken_for_an_end(evidence):
    """A state that pays 1 for ever, gamma 0.9, in pieces of five steps."""
    evidence(
        "foundations/td",
        "V of a state that pays 1 a step for ever, cut every 5 steps, γ = 0.9",
        value=loop_values(original, 0.9, 5),
        bar=10 - 1e-6,
        better=">=",
        unit="reward",
        note="TD(0) that bootstraps where the episode was cut; the truth is 10",
    )
    evidence(
        "foundations/td",
        "The same, the cut taken for an end",
        value=loop_values(original, 0.9, 5, honest=False),
        bar=4,
        unit="reward",
        note="1/(1 − γ·4/5) = 3.57, and the error grows with γ",
    )


def test_monte_carlo_is_unbiased(evidence):
    """First-visit returns from the start of the walk of 5 states; every-visit means of one episode are biased."""
    episodes = walks(original, 4000 if evidence.full else 400, seed=1)
    returns = torch.stack([episode.rewards.sum() for episode in episodes])
    z = (returns.mean() - 0.0) / (returns.std() / math.sqrt(len(returns)))
    values, visits = original.monte_carlo(episodes, 7, gamma=1.0)
    expected = truth(mdps.random_walk(5))
    error = ((1 - expected**2) / visits.clamp(min=1)).sqrt()  # returns are -1 or 1
    deviation = ((values - expected)[1:-1] / error[1:-1]).abs().max()
    evidence(
        "foundations/td",
        "First-visit Monte Carlo against the true values, worst of 5 states",
        value=max(abs(z).item(), deviation.item()),
        bar=4.0,
        unit="standard errors",
        note=f"{len(episodes)} random walks",
    )


def rms_errors(seed, episodes=10):
    """(A, L): RMS error over the 19 states, mean of the tables after each of the first ten walks, per alpha and lam."""
    walk, generator = mdps.random_walk(19), torch.Generator().manual_seed(seed)
    alpha = torch.tensor(ALPHAS, dtype=torch.float64).repeat_interleave(len(LAMS))[:, None]
    lam = torch.tensor(LAMS, dtype=torch.float64).repeat(len(ALPHAS))[:, None]
    expected = torch.arange(1, 20, dtype=torch.float64) / 10 - 1
    values, total = torch.zeros(len(alpha), 21, dtype=torch.float64), 0.0
    for _ in range(episodes):
        values = original.td_lambda(values, original.rollout(walk, ones(walk), generator), alpha=alpha, lam=lam)
        total = total + (values[:, 1:-1] - expected).square().mean(-1).sqrt()
    return torch.nan_to_num(total / episodes, nan=1e9).clamp(max=1e9).view(len(ALPHAS), len(LAMS))


def independent_rms(seed, alpha, lam, episodes=10):
    """The same for one alpha and lam, in plain numpy loops with its own traces, on the same walks."""
    walk, generator = mdps.random_walk(19), torch.Generator().manual_seed(seed)
    values, expected, errors = numpy.zeros(21), numpy.arange(-9, 10) / 10, []
    for _ in range(episodes):
        path = original.rollout(walk, ones(walk), generator).states.tolist()
        trace = numpy.zeros(21)
        for s, t in zip(path, path[1:], strict=False):
            delta = (t == 20) - (t == 0) + values[t] - values[s]
            trace *= lam
            trace[s] += 1
            values += alpha * delta * trace
            values[0] = values[20] = 0.0
        errors.append(math.sqrt(((values[1:20] - expected) ** 2).mean()))
    return sum(errors) / episodes


def test_lambda_between_the_ends_is_best(evidence):
    """The walk of 19 states: an intermediate lam at its best alpha beats both ends, in the mean of the seeds."""
    seeds = SEEDS if evidence.full else SEEDS[:2]
    errors = torch.stack([rms_errors(seed) for seed in seeds])  # (seeds, A, L)
    mine = independent_rms(seeds[0], ALPHAS[9], LAMS[2])
    assert errors[0, 9, 2].item() == pytest.approx(mine, abs=1e-9)
    best = {}
    for k, lam in enumerate(LAMS):
        a = int(errors[:, :, k].mean(0).argmin())
        best[lam] = errors[:, a, k]
        evidence(
            "foundations/td",
            f"RMS error with λ = {lam:g} and its best α",
            value=best[lam].mean().item(),
            unit="reward",
            seeds=seeds,
            spread=best[lam].tolist(),
            note=f"random walk of 19 states, mean over the first 10 episodes; best α = {ALPHAS[a]:g}",
            curve={"x": ALPHAS, "y": {f"{lam:g}": errors[:, :, k].tolist()}},
        )
    means = {lam: x.mean().item() for lam, x in best.items()}
    inner = min(means[lam] for lam in (0.4, 0.8, 0.9, 0.95))
    evidence(
        "foundations/td",
        "Best λ between 0 and 1 over the better of the two ends, error",
        value=inner / min(means[0.0], means[1.0]),
        bar=0.95,
        seeds=seeds,
        note="below 1: neither TD(0) nor λ = 1 is best here",
    )


def lambda_moments(lam, values, mdp, horizon=400):
    """Bias and standard deviation (S,) of the lambda-return of each state, exactly, by the recursion of its first two
    moments: G = r + gamma * ((1 - lam) * V(s') + lam * G')."""
    chain, pay = mdp.transitions[:, 0], mdp.rewards[:, 0]
    values = torch.where(mdp.terminal, 0.0, values)
    first, second = torch.zeros_like(values), torch.zeros_like(values)
    for _ in range(horizon):
        known = pay + mdp.gamma * (1 - lam) * values  # (S, S), of the step that is taken
        second = (chain * (known**2 + 2 * known * mdp.gamma * lam * first + (mdp.gamma * lam) ** 2 * second)).sum(-1)
        first = (chain * (known + mdp.gamma * lam * first)).sum(-1)
        first, second = first.masked_fill(mdp.terminal, 0.0), second.masked_fill(mdp.terminal, 0.0)
    return (first - truth(mdp)), (second - first**2).clamp(min=0).sqrt()


def test_bias_and_spread(evidence):
    """A critic with an error of 0.3 a state: the bias falls with lam to 0, and the spread rises."""
    walk, grid = mdps.random_walk(9), [0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 1.0]
    bias, spread = [], []
    for seed in SEEDS[: 10 if evidence.full else 3]:
        critic = truth(walk) + 0.3 * normal(seed, 11)
        rows = [lambda_moments(lam, critic, walk) for lam in grid]
        bias.append([x[1:-1].square().mean().sqrt().item() for x, _ in rows])
        spread.append([x[1:-1].square().mean().sqrt().item() for _, x in rows])
    # A sample of lambda-returns agrees.
    sampled, critic = [], truth(walk) + 0.3 * normal(SEEDS[9], 11)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000 if evidence.full else 300):
        episode = original.rollout(walk, ones(walk), generator)
        after = original.next_values(critic, episode)
        sampled.append(original.lambda_returns(episode.rewards, after, lam=0.6, gamma=1.0)[0])
    sampled = torch.stack(sampled)
    off, deviation = lambda_moments(0.6, critic, walk)
    z = (sampled.mean() - (truth(walk) + off)[5]) / (deviation[5] / math.sqrt(len(sampled)))
    assert abs(z) < 4 and sampled.std() / deviation[5] == pytest.approx(1, abs=0.15)
    for name, runs in (("bias", bias), ("standard deviation", spread)):
        for at, lam in ((0, "0"), (4, "0.8"), (-1, "1")):
            evidence(
                "foundations/td",
                f"{name.capitalize()} of the λ-return, λ = {lam}",
                value=sum(run[at] for run in runs) / len(runs),
                unit="reward",
                seeds=SEEDS[:10],
                spread=[run[at] for run in runs],
                note="random walk of 9 states, RMS over them; a critic off by 0.3 (normal, a draw a seed); exact",
                curve={"x": grid, "y": {name: runs}} if at == 0 else None,
            )
    means = [torch.tensor(runs).mean(0) for runs in (bias, spread)]
    assert (means[0].diff() < 0).all() and max(b[-1] for b in bias) < 1e-6
    assert (means[1][grid.index(0.4) :].diff() > 0).all()  # below that the critic's own errors are the noise


def test_n_steps_shrink_the_bias(evidence):
    """max_s |E G^(n) - V| <= gamma^n * max_s |V_hat - V|, by sums over all episodes."""
    worst = 0.0
    for seed in range(5):
        mdp = mdps.random_mdp(3, 2, seed=seed, gamma=0.8)
        expected, critic = truth(mdp), truth(mdp) + normal(seed, 3)
        episodes = mdps.all_episodes(mdp, 5)
        chance = episodes.world_logps.exp() / 2**5
        start, discount = episodes.states[:, 0], 0.8 ** torch.arange(6, dtype=torch.float64)
        weight = torch.zeros(3, dtype=torch.float64).index_add(0, start, chance)
        for n in (1, 2, 3, 5):
            targets = (episodes.rewards * discount[:5])[:, :n].sum(-1) + discount[n] * critic[episodes.states[:, n]]
            mean = torch.zeros(3, dtype=torch.float64).index_add(0, start, chance * targets) / weight
            bias = (mean - expected).abs().max()
            worst = max(worst, (bias / (0.8**n * (critic - expected).abs().max())).item())
    evidence(
        "foundations/td",
        "Bias of n-step targets over its bound γⁿ · error of the critic",
        value=worst,
        bar=1 + 1e-9,
        seeds=list(range(5)),
        note="n = 1, 2, 3 and 5, by sums over all episodes",
    )


def test_the_demo_prints_its_table(capsys):
    original.main()
    lines = capsys.readouterr().out.splitlines()
    table = [[float(x) for x in line.split()] for line in lines[2:]]
    assert [row[0] for row in table] == [0.025, 0.05, 0.1, 0.2, 0.4]
    assert min(table[3][1:]) == table[3][3] and min(table[4][1:]) == table[4][2]  # alpha 0.2: lam 0.8; 0.4: 0.4
