"""SARSA and its relatives: against replays by hand, linear systems, Gymnasium's cliff, and their own broken copies."""

import functools
import itertools
import math

import gymnasium
import pytest
import torch
from torch.testing import assert_close

from snippets.foundations import q_learning as original
from snippets.worlds import mdps
from tests.mutation import caught_by, load_mutant

torch.set_num_threads(1)
PATH = "snippets/foundations/q_learning.py"
RUNS = list(range(20))  # side by side, each with draws of its own from one generator: the page says so
METHODS = original.METHODS
START, GOAL = 36, 47


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Small worlds for `learn`.


def endless(runs):
    """One state, two actions, 1 a step for ever."""
    zeros = torch.zeros(runs, dtype=torch.long)
    return zeros.clone, lambda s, a: (zeros, torch.ones(runs, dtype=torch.float64), zeros.bool())


def corridor(runs):
    """0 -> 1 -> end, which pays 1; the step that ends names state 0, whose value must then not be looked at."""
    zeros = torch.zeros(runs, dtype=torch.long)
    return zeros.clone, lambda s, a: (1 - s, s.double(), s == 1)


def make_mdp(seed=3):
    """Four states, two actions; the last state ends the episode."""
    mdp = mdps.random_mdp(4, 2, seed=seed, gamma=0.9)
    transitions, rewards = mdp.transitions.clone(), mdp.rewards.clone()
    transitions[3], rewards[3] = 0.0, 0.0
    transitions[3, :, 3] = 1.0
    return mdps.MDP(transitions, rewards, mdp.start, torch.tensor([False, False, False, True]), 0.9)


def acting(mdp, runs, generator, start=0, record=None):
    """reset and step of `runs` copies of an MDP."""

    def step(states, actions):
        after, rewards = mdps.sample(mdp, states, actions, generator)
        if record is not None:
            record.append((states, actions, rewards, after))
        return after, rewards, mdp.terminal[after]

    return (lambda: torch.full((runs,), start)), step


def soft_q(mdp, q_values, epsilon):
    """Q of the epsilon-greedy policy of a table: a linear system. (S, A)."""
    best = (q_values == q_values.max(-1, keepdim=True).values).double()
    policy = epsilon / best.shape[1] + (1 - epsilon) * best / best.sum(-1, keepdim=True)
    live = ~mdp.terminal
    steps = torch.einsum("sa,sat->st", policy, mdp.transitions)[live][:, live]
    paid = (policy * mdp.expected_rewards).sum(-1)[live]
    values = torch.zeros(len(live), dtype=torch.float64)
    values[live] = torch.linalg.solve(torch.eye(int(live.sum())) - mdp.gamma * steps, paid)
    return mdp.expected_rewards + mdp.gamma * mdp.transitions @ values


# The formulas. Each check takes the module, so that broken copies can be put to it.


def check_the_targets_in_loops(q):
    rewards, next_q, other_q, policy = random(0, 9), random(1, 9, 3), random(2, 9, 3), random(3, 9, 3).softmax(-1)
    actions, ended = torch.arange(9) % 3, torch.arange(9) % 4 == 0
    dirty = torch.where(ended[:, None], torch.inf, next_q)  # what stands at a terminal state never matters
    found = {
        "sarsa": q.sarsa_target(rewards, dirty, actions, ended, gamma=0.7),
        "expected": q.expected_sarsa_target(rewards, dirty, policy, ended, gamma=0.7),
        "max": q.q_learning_target(rewards, dirty, ended, gamma=0.7),
        "double": q.double_q_target(rewards, next_q, other_q, ended, gamma=0.7),
    }
    for n in range(9):
        row, other = next_q[n].tolist(), other_q[n].tolist()
        after = {
            "sarsa": row[n % 3],
            "expected": sum(p * x for p, x in zip(policy[n].tolist(), row, strict=True)),
            "max": max(row),
            "double": other[row.index(max(row))],
        }
        for name, value in after.items():
            expected = rewards[n].item() + (0.0 if n % 4 == 0 else 0.7 * value)
            assert found[name][n].item() == pytest.approx(expected, abs=1e-12), name


def check_the_policy(q):
    table = torch.tensor([[1.0, 3.0, 2.0, 0.0], [1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    assert_close(
        q.epsilon_greedy(table, 0.2), torch.tensor([[0.05, 0.85, 0.05, 0.05], [0.45, 0.45, 0.05, 0.05]]).double()
    )
    each = q.epsilon_greedy(table, torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert_close(each, torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0]]).double())
    chances = torch.tensor([0.1, 0.0, 0.6, 0.3], dtype=torch.float64)
    drawn = q.draw(chances.repeat(10_000, 1), torch.Generator().manual_seed(0))
    for a, p in enumerate(chances.tolist()):  # within 4 standard errors
        assert abs((drawn == a).double().mean().item() - p) <= 4 * math.sqrt(p * (1 - p) / 10_000)


def check_it_is_what_a_replay_by_hand_gives(q):
    """Every step of six agents, recorded and learned again one number at a time: each with a table of its own, and
    three to a table, where those who stand at one pair move it by their mean."""
    mdp = make_mdp()
    for method, copies in itertools.product(("sarsa", "expected_sarsa", "q_learning"), (1, 3)):
        record, generator = [], torch.Generator().manual_seed(5)
        reset, step = acting(mdp, 6, generator, record=record)
        settings = {"alpha": 0.4, "halve": 8.0, "epsilon": 0.3, "gamma": 0.9, "episodes": 4}
        runs = q.learn(reset, step, (4, 2), method=method, copies=copies, generator=generator, **settings)
        assert len(runs.q_values) == 6 // copies and len(runs.returns) == 6
        for table_number in range(6 // copies):
            table, count, episodes = [[0.0, 0.0] for _ in range(4)], [[0, 0] for _ in range(4)], [0] * 6
            for t, (states, actions, rewards, after) in enumerate(record):
                targets = {}  # of each pair
                for n in range(table_number * copies, (table_number + 1) * copies):
                    s, a, r, s2 = (int(states[n]), int(actions[n]), rewards[n].item(), int(after[n]))
                    if episodes[n] == 4:
                        continue
                    best = max(table[s2])
                    if s2 == 3:
                        value = 0.0
                    elif method == "sarsa":
                        value = table[s2][int(record[t + 1][1][n])]
                    elif method == "q_learning":
                        value = best
                    else:
                        value = 0.7 * best + 0.3 * sum(table[s2]) / 2
                    targets.setdefault((s, a), []).append(r + 0.9 * value)
                    episodes[n] += s2 == 3
                    assert s2 != 3 or t + 1 == len(record) or record[t + 1][0][n] == 0  # the next one starts anew
                for (s, a), each in targets.items():
                    k = len(each)
                    count[s][a] += k
                    table[s][a] += 0.4 / (1 + count[s][a] / (8 * k)) * (sum(each) / k - table[s][a])
            assert_close(runs.q_values[table_number], torch.tensor(table, dtype=torch.float64))
            assert runs.visits[table_number].tolist() == count


def check_a_cut_off_episode_still_bootstraps(q):
    """1 a step for ever is worth 1 / (1 - gamma) = 2, in episodes of 3 steps as well."""
    for method in METHODS:
        generator = torch.Generator().manual_seed(0)
        runs = q.learn(
            *endless(4),
            (1, 2),
            method=method,
            alpha=1.0,
            gamma=0.5,
            epsilon=1.0,
            limit=3,
            episodes=40,
            generator=generator,
        )
        assert_close(runs.q_values, torch.full((4, 1, 2), 2.0).double(), atol=1e-3, rtol=0)
        assert (runs.returns == 3).all() and (runs.lengths == 3).all()
        assert runs.visits.sum((1, 2)).tolist() == [120] * 4


def check_the_end_is_worth_nothing(q):
    for method in METHODS:
        generator = torch.Generator().manual_seed(0)
        runs = q.learn(
            *corridor(4), (2, 2), method=method, alpha=1.0, gamma=0.5, epsilon=1.0, episodes=40, generator=generator
        )
        assert_close(runs.q_values, torch.tensor([[0.5, 0.5], [1.0, 1.0]]).double().expand(4, 2, 2))
        assert (runs.returns == 1).all() and (runs.lengths == 2).all()


def check_epsilon_may_change_with_the_episode(q):
    """50 one-step episodes at random, then greedily: from then on every first action is the one that pays."""
    zeros, seen = torch.zeros(5, dtype=torch.long), []
    for method in METHODS:
        runs = q.learn(
            zeros.clone,
            lambda s, a: (zeros + 1, 1.0 - a.double(), zeros == 0),
            (2, 2),
            method=method,
            epsilon=lambda finished: (seen.append(int(finished.max())), (finished < 50).double())[1],
            episodes=80,
            generator=torch.Generator().manual_seed(1),
        )
        assert (runs.returns[:, 50:] == 1).all() and 0.3 < runs.returns[:, :50].mean() < 0.7
    assert min(seen) == 0


def check_it_acts_greedily_and_by_both_tables(q):
    """Without exploration two actions that cost something are tried in turn, then each state's cheaper one is taken."""
    zeros = torch.zeros(50, dtype=torch.long)
    for method in METHODS:
        for episodes in (2, 4):
            runs = q.learn(
                zeros.clone,
                lambda s, a: (1 - s, (a == s).double() - 2, s == 1),
                (2, 2),
                method=method,
                alpha=1.0,
                gamma=0.0,
                epsilon=0.0,
                episodes=episodes,
                generator=torch.Generator().manual_seed(3),
            )
            assert episodes == 4 or (runs.visits == 1).all()
            assert episodes == 2 or method == "double_q" or (runs.returns[:, 2:] == -2).all()


def check_two_tables_toss_a_coin(q):
    """Rewards of +-1, two arms, one step: each table sees half of the visits, and learns from its own."""
    zeros, generator = torch.zeros(400, dtype=torch.long), torch.Generator().manual_seed(2)

    def step(s, a):
        return zeros, torch.randint(2, (400,), generator=generator) * 2.0 - 1, zeros == 0

    runs = q.learn(
        zeros.clone, step, (1, 2), method="double_q", alpha=1.0, epsilon=1.0, episodes=20, generator=generator
    )
    # alpha 1: a table holds its last reward, and the mean of two independent signs is 0 half of the time
    share = (runs.q_values == 0).double().mean().item()
    assert abs(share - 0.5) < 4 * math.sqrt(0.25 / 800) + 0.01


def check_the_exact_solution(q):
    for epsilon in (0.0, 0.1, 0.5, 1.0):
        mdp = make_mdp()
        exact = q.solve(mdp.transitions, mdp.rewards, gamma=0.9, epsilon=epsilon)
        assert_close(soft_q(mdp, exact, epsilon), exact, atol=1e-9, rtol=0)  # its own policy has this value


def check_bad_input(q):
    for message, settings in {
        "method must be one of .*'dqn'": {"method": "dqn"},
        "gamma and epsilon must lie in .0, 1., got 1.5 and 0.1": {"gamma": 1.5},
        "got 1.0 and -0.1": {"epsilon": -0.1},
        "alpha must lie in .0, 1. and halve above 0, got 0 and inf": {"alpha": 0},
        "got 0.5 and 0": {"halve": 0},
        "episodes and limit must be 1 or more, got 0 and inf": {"episodes": 0},
        "got 2 and 0": {"limit": 0},
        "copies must divide the number of agents 1, got 2": {"copies": 2},
        "copies must divide the number of agents 1, got 0": {"copies": 0},
    }.items():
        with pytest.raises(ValueError, match=message):
            q.learn(*corridor(1), (2, 2), **{"episodes": 2} | settings)
    with pytest.raises(ValueError, match="no convergence within 50 sweeps"):
        q.solve(torch.ones(1, 1, 1), torch.ones(1, 1, 1), gamma=1.0, sweeps=50)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_functions(check):
    check(original)


MAX = "next_q.amax(-1))\n"
MISTAKES = {
    "the end still bootstraps, SARSA": ("torch.where(terminated, 0.0, after)\n\n\ndef q", "after\n\n\ndef q"),
    "the end still bootstraps, Q-learning": ("torch.where(terminated, 0.0, next_q.amax(-1))", "next_q.amax(-1)"),
    "the end still bootstraps, expected": (
        "torch.where(terminated, 0.0, (policy * next_q).sum(-1))",
        "(policy * next_q).sum(-1)",
    ),
    "the end still bootstraps, double": ("torch.where(terminated, 0.0, after)\n\n\ndef draw", "after\n\n\ndef draw"),
    "no max": (MAX, "next_q.mean(-1))\n"),
    "a max in SARSA": ("after = next_q.gather(-1, next_actions[:, None]).squeeze(-1)", "after = next_q.amax(-1)"),
    "double Q chooses and values with one table": ("other_q.gather(-1, chosen)", "next_q.gather(-1, chosen)"),
    "double Q chooses with the other table": ("chosen = next_q.argmax", "chosen = other_q.argmax"),
    "no discount": (
        "rewards + gamma * torch.where(terminated, 0.0, next_q",
        "rewards + torch.where(terminated, 0.0, next_q",
    ),
    "the discount on the reward": (
        "return rewards + gamma * torch.where(terminated, 0.0, (",
        "return gamma * rewards + torch.where(terminated, 0.0, (",
    ),
    "cut off is terminated": (
        "        next_q = tables[which, runs + after]",
        "        terminated = terminated | (length + 1 >= limit)\n        next_q = tables[which, runs + after]",
    ),
    "one step too many": ("length >= limit", "length > limit"),
    "epsilon over the other actions": ("epsilon / q_values.shape[-1] +", "epsilon / (q_values.shape[-1] - 1) +"),
    "ties to all": ("* best / best.sum(-1, keepdim=True)", "* best"),
    "SARSA forgets the action it learned from": (
        "actions = torch.where(ended, actions, next_actions)",
        "actions = draw(policy_at(states), generator)",
    ),
    "SARSA keeps the action over the end": (
        "actions = torch.where(ended, actions, next_actions)",
        "actions = next_actions",
    ),
    "step sizes do not fall": ("clamp(min=1) + visits[here] / halve", "clamp(min=1)"),
    "step sizes fall too fast": ("+ visits[here] / halve)", "+ visits[here] / halve) ** 2"),
    "adds the target": ("(targets - tables[here])", "targets"),
    "finished runs go on": ("index_put_(here, live.double(), ", "index_put_(here, torch.ones_like(rewards), "),
    "finished runs go on learning": ("live * alpha", "alpha"),
    "copies add up, not their mean": ("together[here].clamp(min=1)", "1"),
    "more copies, smaller steps": (
        "clamp(min=1) + visits[here] / halve",
        "clamp(min=1) * (1 + visits[here] / halve)",
    ),
    "one copy counts": ("live.double(), accumulate=True", "live.double(), accumulate=False"),
    "one copy learns": ("(targets - tables[here]), accumulate=True", "(targets - tables[here]), accumulate=False"),
    "no table is shared": ("// copies * count", "* count"),
    "copies take turns": ("torch.arange(len(states)) // copies", "torch.arange(len(states)) % (len(states) // copies)"),
    "copies unchecked": ("if copies < 1 or len(states) % copies:", "if False:"),
    "the next state's pair": ("here = (which, runs + states, actions)", "here = (which, runs + after, actions)"),
    "one table after all": ("which = torch.randint(2,", "which = torch.randint(1,"),
    "all runs in one table": ("torch.arange(len(states)) // copies * count", "torch.zeros_like(states)"),
    "epsilon stays": ("epsilon(finished) if", "epsilon(0 * finished) if"),
    "acts by one of two tables": ("tables.mean(0)[runs + s]", "tables[0, runs + s]"),
    "keeps its action to the end": ('if method != "sarsa" or ended.any():', "if ended.any():"),
    "episodes go on from the end": ("torch.where(ended, reset(), after)", "after"),
    "epsilon an episode early": ("epsilon(finished) if", "epsilon(finished + 1) if"),
    "returns pile up": ("total.masked_fill(ended, 0.0)", "total"),
    "solve without exploring": ("(1 - epsilon) * q_values.amax(-1) + epsilon * q_values.mean(-1)", "q_values.amax(-1)"),
    "solve without discount": ("paid + gamma * transitions", "paid + 0.99 * transitions"),
    "alpha unchecked": ("if not 0 < alpha <= 1 or halve <= 0:", "if False:"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    """Each deliberate mistake makes at least one check fail."""
    with pytest.MonkeyPatch.context() as patch:  # a broken copy that never ends is stopped
        count = iter(range(1500))
        patch.setattr(mdps, "sample", lambda *args, real=mdps.sample: (next(count), real(*args))[1])
        mutant = load_mutant(PATH, *MISTAKES[mistake])
        assert any(caught_by(mutant, [check]) for check in CHECKS)


# The same fixed points as dynamic programming.


@pytest.mark.parametrize("method", METHODS)
def test_the_limit_is_that_of_dynamic_programming(method):
    """40 tables of 4 agents in a random world that never ends, cut off every 50 steps: within 4 standard errors and
    0.02 of the exact table, which for SARSA is that of the best policy that explores as it does."""
    mdp, runs = mdps.random_mdp(3, 2, seed=1, gamma=0.8), 40
    generator = torch.Generator().manual_seed(4)
    settings = {"gamma": 0.8, "epsilon": 0.3, "alpha": 0.5, "halve": 20.0, "limit": 50, "episodes": 30, "copies": 4}
    found = original.learn(
        *acting(mdp, 4 * runs, generator), (3, 2), method=method, generator=generator, **settings
    ).q_values
    soft = 0.3 if "sarsa" in method else 0.0
    exact = original.solve(mdp.transitions, mdp.rewards, gamma=0.8, epsilon=soft)
    other = original.solve(mdp.transitions, mdp.rewards, gamma=0.8, epsilon=0.3 - soft)
    noise = found.std(0) / math.sqrt(runs)
    assert ((found.mean(0) - exact).abs() <= 4 * noise + 0.02).all()
    assert (found.mean(0) - exact).abs().max() < 0.2 * (found.mean(0) - other).abs().max()


# The cliff.


@functools.cache
def cliff():
    return mdps.from_gymnasium("CliffWalking-v1")


@functools.cache
def on_the_cliff(method, episodes, alpha, halve=math.inf, limit=math.inf, copies=1, epsilon=0.1):
    """20 tables with gamma 1; the cliff has no chance in it, so that its steps can be looked up."""
    mdp, reset = cliff(), lambda: torch.full((len(RUNS) * copies,), START)
    assert torch.isin(mdp.transitions, torch.tensor([0.0, 1.0])).all()
    leads_to = mdp.transitions.argmax(-1)  # (S, A)

    def step(states, actions):
        after = leads_to[states, actions]
        return after, mdp.rewards[states, actions, after], mdp.terminal[after]

    settings = {"episodes": episodes, "alpha": alpha, "halve": halve, "limit": limit, "copies": copies}
    generator = torch.Generator().manual_seed(0)
    return original.learn(reset, step, (48, 4), method=method, epsilon=epsilon, generator=generator, **settings)


@functools.cache
def environment():
    return gymnasium.make("CliffWalking-v1").unwrapped


def greedy_path(q_values, most=60):
    """The states that the greedy policy passes, and its return, in Gymnasium's environment itself."""
    env = environment()
    state, _ = env.reset(seed=0)
    path, paid = [int(state)], 0.0
    for _ in range(most):
        state, reward, terminated, _, _ = env.step(int(q_values[int(state)].argmax()))
        path.append(int(state))
        paid += float(reward)
        if terminated:
            break
    return path, paid


def path_error(q_values, exact):
    """The largest |V - V_exact| over the states of the greedy path."""
    states = [s for s in greedy_path(q_values)[0] if s != GOAL]
    return (q_values[states].amax(-1) - exact[states].amax(-1)).abs().max().item()


def smooth(returns, width):
    """Means of `width` episodes, (N, E / width)."""
    return returns.view(len(returns), -1, width).mean(-1)


def report_cliff(evidence, name, runs, exact, *, bar, error_bar, path_note):
    paths = [greedy_path(table)[1] for table in runs.q_values]
    errors = [path_error(table, exact) for table in runs.q_values]
    evidence(
        "foundations/q_learning",
        f"{name}: return of the greedy path",
        value=sum(paths) / len(paths),
        bar=bar,
        better=">=",
        seeds=RUNS,
        spread=paths,
        note=path_note,
    )
    evidence(
        "foundations/q_learning",
        f"{name}: error of the values along the greedy path",
        value=max(errors),
        bar=error_bar,
        seeds=RUNS,
        spread=errors,
        note="The largest |max_a Q − exact| over the states of a run's greedy path, against dynamic programming.",
    )
    return paths


def report_online(evidence, name, runs, exact, last, width):
    """The mean return of the last episodes, beside the exact value of exploring with the exact table."""
    returns = runs.returns.view(len(RUNS), -1, runs.returns.shape[1]).mean(1)  # the mean of a table's agents
    online = returns[:, -last:].mean(-1)
    values, policy = soft_q(cliff(), exact, 0.1)[START], original.epsilon_greedy(exact[START], 0.1)
    blocks = smooth(returns[:, : width * (returns.shape[1] // width)], width)
    evidence(
        "foundations/q_learning",
        f"{name}: return while it explores",
        value=online.mean(),
        seeds=RUNS,
        spread=online.tolist(),
        note=f"Mean of the last {last} episodes, ε = 0.1.",
        curve={"x": [width * (i + 1) for i in range(blocks.shape[1])], "y": {"return": blocks.tolist()}},
    )
    evidence(
        "foundations/q_learning",
        f"{name}: exact return while exploring",
        value=(policy * values).sum(),
        note="Of the ε-greedy policy of the exact table, ε = 0.1: a linear system.",
    )
    return online, (policy * values).sum()


def test_q_learning_walks_along_the_edge(evidence):
    """-13 in all of 20 runs, in Gymnasium itself; exact values on every pair visited 100 times; and while it
    explores it pays for falls what the exact value of its own epsilon-greedy policy says."""
    episodes, copies = (500, 1) if evidence.full else (50, 8)
    runs = on_the_cliff("q_learning", episodes, 0.5, copies=copies)
    exact = original.solve(cliff().transitions, cliff().rewards, gamma=1.0)
    note = "500 episodes, α = 0.5, ε = 0.1; the shortest path has 13 steps."
    paths = report_cliff(evidence, "Q-learning", runs, exact, bar=-13, error_bar=0.1, path_note=note)
    assert paths == [-13] * 20
    often = runs.visits >= 100
    evidence(
        "foundations/q_learning",
        "Q-learning: error of Q on the pairs visited 100 times or more",
        value=((runs.q_values - exact).abs() * often).max(),
        bar=0.1,
        seeds=RUNS,
        note=f"The largest of {int(often.sum(0).bool().sum())} pairs and 20 runs, against value iteration.",
    )
    online, predicted = report_online(evidence, "Q-learning", runs, exact, episodes // 2, 20)
    assert (online.mean() - predicted).abs() < 4 * online.std() / math.sqrt(20)


CLIFF = {  # name: settings in full, what differs in short, bar of the error, note
    "SARSA, 512 agents to a table": (
        {"method": "sarsa", "alpha": 1.0, "halve": 10.0, "copies": 512, "episodes": 800},
        {"copies": 32, "episodes": 30, "halve": 5.0},
        0.1,
        "800 episodes of each agent, step size 1 / (1 + n / (10 k)) for k agents at the pair's n-th visit",
    ),
    "SARSA, one agent": (
        {"method": "sarsa", "alpha": 0.1, "halve": 500.0, "episodes": 5000},
        None,
        None,
        "5,000 episodes, step size 0.1 / (1 + n / 500)",
    ),
    "Expected SARSA": (
        {"method": "expected_sarsa", "alpha": 1.0, "episodes": 2000},
        {"episodes": 40, "copies": 16},
        0.1,
        "One agent to a table, 2,000 episodes, α = 1",
    ),
}


@pytest.mark.parametrize("name", CLIFF)
def test_sarsa_keeps_away_from_the_edge(evidence, name):
    """The greedy path leaves the edge's row at the start and comes back above the goal, and its values are those of
    dynamic programming, where SARSA has 512 agents to share the noise among. One agent alone is noisier."""
    settings, short, error_bar, note = CLIFF[name]
    if not (evidence.full or short):
        pytest.skip("a long run: make evidence")
    runs = on_the_cliff(**settings | ({} if evidence.full else short))
    exact = original.solve(cliff().transitions, cliff().rewards, gamma=1.0, epsilon=0.1)
    online, predicted = report_online(evidence, name, runs, exact, runs.returns.shape[1] // 5, 20)
    assert abs(online.mean() - predicted) < (1 if evidence.full else 5)
    edge = set(range(25, 35))
    safe = sum(not edge & set(greedy_path(table)[0]) for table in runs.q_values)
    evidence(
        "foundations/q_learning",
        f"{name}: greedy paths that never stand beside the cliff",
        value=safe,
        bar=20 if error_bar else None,
        better=">=",
        unit="of 20 runs",
        seeds=RUNS,
    )
    if name == "Expected SARSA":
        assert all(len(greedy_path(table)[0]) == 16 for table in runs.q_values)
    if not evidence.full:
        assert sum(path_error(table, exact) for table in runs.q_values) / 20 < 4
        return
    note += "; the best policy with ε = 0.1 scores −15."
    report_cliff(evidence, name, runs, exact, bar=-15 if error_bar else None, error_bar=error_bar, path_note=note)
    if error_bar:
        agents = runs.returns.shape[0] // len(RUNS)
        often = runs.visits >= 0.1 * agents * runs.returns.shape[1]
        evidence(
            "foundations/q_learning",
            f"{name}: error of Q on the pairs visited in 10 episodes once or more",
            value=((runs.q_values - exact).abs() * often).max(),
            bar=error_bar,
            seeds=RUNS,
            spread=((runs.q_values - exact).abs() * often).amax((1, 2)).tolist(),
            note=f"The largest of {int(often.sum(0).bool().sum())} pairs and 20 tables, against dynamic programming.",
        )


def test_a_large_constant_step_takes_sarsa_to_the_top_row(evidence):
    """The picture in the textbooks, -17, is what noise does: with epsilon 0.1 the best policy takes -15."""
    runs = on_the_cliff("sarsa", 500 if evidence.full else 30, 0.5)
    paths = [greedy_path(table)[1] for table in runs.q_values]
    evidence(
        "foundations/q_learning",
        "SARSA, α = 0.5: share of runs whose greedy path is −17",
        value=100 * sum(x == -17 for x in paths) / 20,
        unit="%",
        seeds=RUNS,
        spread=paths,
        note="500 episodes. The spread holds each run's greedy return; −60: it walks in circles.",
    )
    assert -13 not in paths and (not evidence.full or paths.count(-17) > 10 * max(1, paths.count(-15)))


def test_the_best_path_moves_away_as_exploration_grows(evidence):
    """Exactly: 13 steps without exploration, one row up with a little, the top row with more."""
    lengths = {}
    for percent in range(0, 31):
        exact = original.solve(cliff().transitions, cliff().rewards, gamma=1.0, epsilon=percent / 100)
        path, _ = greedy_path(exact)
        lengths[percent] = len(path) - 1
    assert lengths[0] == 13 and lengths[1] == lengths[10] == 15 and lengths[30] == 17
    assert list(lengths.values()) == sorted(lengths.values())
    evidence(
        "foundations/q_learning",
        "Smallest ε at which the best path takes the top row",
        value=min(p for p, n in lengths.items() if n == 17) / 100,
        note="Of multiples of 0.01, by dynamic programming; below it the best path is one row lower, −15.",
        curve={"x": list(lengths), "y": {"steps": list(lengths.values())}},
    )


def test_sarsa_stays_cautious_long_after_exploration_has_died_down(evidence):
    """Without exploration the best path has -13, but not this one after 2,500 episodes: the edge is hardly tried."""
    if not evidence.full:
        pytest.skip("a long run: make evidence")
    runs = on_the_cliff("sarsa", 2500, 0.3, epsilon=lambda k: 0.3 / (1 + k / 50))
    paths = [greedy_path(table)[1] for table in runs.q_values]
    evidence(
        "foundations/q_learning",
        "SARSA with ε → 0: return of the greedy path",
        value=sum(paths) / 20,
        seeds=RUNS,
        spread=paths,
        note="2,500 episodes, α = 0.3, ε = 0.3 / (1 + k / 50) in episode k. Without exploration the best path has −13.",
    )
    assert all(-17 <= x <= -13 for x in paths)


def test_a_cut_off_does_not_change_what_is_learned(evidence):
    """Episodes of 40 steps at most on the cliff: still -13 with exact values; and what the wrong target would say."""
    runs = on_the_cliff("q_learning", 600 if evidence.full else 50, 0.5, limit=40, copies=1 if evidence.full else 8)
    exact = original.solve(cliff().transitions, cliff().rewards, gamma=1.0)
    assert all(greedy_path(table)[1] == -13 for table in runs.q_values)
    assert max(path_error(table, exact) for table in runs.q_values) < 0.1
    for name, module in {
        "right": original,
        "as the end": load_mutant(PATH, *MISTAKES["cut off is terminated"]),
    }.items():
        generator = torch.Generator().manual_seed(0)
        settings = {"alpha": 0.5, "gamma": 0.9, "limit": 5, "episodes": 120, "generator": generator}
        found = module.learn(*endless(20), (1, 2), **settings).q_values.amax(-1).mean().item()
        evidence(
            "foundations/q_learning",
            f"An endless task cut after 5 steps, the cut treated {name if name != 'right' else 'as a cut'}",
            value=found,
            seeds=RUNS,
            note="1 a step, γ = 0.9: the true value is 10.",
        )
        assert (abs(found - 10) < 0.01) == (name == "right")


# The noise of the targets.


def test_expected_sarsa_has_the_same_mean_and_less_noise():
    """Exactly, over a': the mean of SARSA's targets is Expected SARSA's, and its variance is what is saved."""
    next_q, policy = random(0, 1, 4), original.epsilon_greedy(random(0, 1, 4), 0.3)
    no, nothing = torch.zeros(4, dtype=torch.bool), torch.zeros(4, dtype=torch.float64)
    each = original.sarsa_target(nothing, next_q.expand(4, 4), torch.arange(4), no, gamma=0.9)
    mean = original.expected_sarsa_target(nothing[:1], next_q, policy, no[:1], gamma=0.9)
    assert_close((policy[0] * each).sum(), mean[0])
    assert (policy[0] * (each - mean) ** 2).sum() > 0.1


NORMAL_MAX = 1.5387527308351729  # E[max of 10 standard normals]: n * integral of x phi(x) Phi(x)^(n-1)


def test_the_maximum_of_noise_is_no_noise():
    """Ten arms of equal worth -0.1, one noisy estimate of each: the max is 1.54 standard deviations too high in the
    mean, the double estimator right, each within 4 standard errors."""
    x = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, 1.0)
    density = 10 * x * normal.log_prob(x).exp() * normal.cdf(x) ** 9
    assert torch.trapezoid(density, x).item() == pytest.approx(NORMAL_MAX, abs=1e-9)
    n, no = 40_000, torch.zeros(40_000, dtype=torch.bool)
    one, other = random(1, n, 10) - 0.1, random(2, n, 10) - 0.1
    single = original.q_learning_target(torch.zeros(n), one, no, gamma=1.0)
    double = original.double_q_target(torch.zeros(n), one, other, no, gamma=1.0)
    for found, expected in ((single, NORMAL_MAX - 0.1), (double, -0.1)):
        assert abs(found.mean().item() - expected) < 4 * found.std().item() / math.sqrt(n)


def biased_world(runs, generator):
    """After example 6.7 of Sutton and Barto: from A five actions end the episode with 0 and five lead to B, where each
    of ten actions ends it with a reward from N(-0.1, 1)."""
    zeros = torch.zeros(runs, dtype=torch.long)

    def step(states, actions):
        left = (states == 0) & (actions < 5)
        noise = torch.randn(runs, generator=generator, dtype=torch.float64)
        return left.long(), torch.where(states == 0, 0.0, noise - 0.1), ~left

    return zeros.clone, step


def test_maximisation_bias(evidence):
    """Left is worth -0.1 and right 0: an epsilon-greedy policy that knows it goes left in 5 % of the episodes."""
    count, episodes = (10_000, 300) if evidence.full else (400, 100)
    share, curves = {}, {}
    for method in METHODS:
        generator = torch.Generator().manual_seed(0)
        runs = original.learn(
            *biased_world(count, generator), (2, 10), method=method, alpha=0.1, episodes=episodes, generator=generator
        )
        groups = (runs.lengths == 2).double().view(20, -1, episodes).mean(1)  # (20, E): the runs in 20 groups
        share[method], curves[method] = groups, smooth(groups, 5)
    for method, name in zip(METHODS, ("SARSA", "Expected SARSA", "Q-learning", "double Q-learning"), strict=True):
        last, peak = share[method][:, -20:].mean(-1), share[method].mean(0).argmax()
        evidence(
            "foundations/q_learning",
            f"Maximisation bias, {name}: goes left at most",
            value=100 * share[method][:, peak].mean(),
            unit="% of the runs",
            seeds=RUNS,
            spread=(100 * share[method][:, peak]).tolist(),
            note="10,000 runs in 20 groups, one generator, α = 0.1, ε = 0.1; the spread is that of the groups in the "
            "episode with the largest share of all. Right: 5 %.",
            curve={"x": list(range(5, episodes + 1, 5)), "y": {"left": (100 * curves[method]).tolist()}},
        )
        evidence(
            "foundations/q_learning",
            f"Maximisation bias, {name}: goes left in episodes 281 to 300",
            value=100 * last.mean(),
            unit="% of the runs",
            seeds=RUNS,
            spread=(100 * last).tolist(),
        )
        assert last.mean() > 0.05
    peaks = {method: share[method].mean(0).max() for method in METHODS}
    assert peaks["double_q"] < 0.7 < 0.85 < min(peaks[m] for m in METHODS if m != "double_q")
