"""UCT against enumeration, a hand computation and plain UCB1."""

import math
import random
from collections import Counter

import pytest

from snippets.reasoning import loop, mcts
from tests.mutation import caught_by, load_mutant


def random_tree(depth, branching, seed, dead=0.0):
    """A finite tree of strings with uniform rewards at its leaves; a share `dead` of inner nodes has no children."""
    rng = random.Random(seed)
    children, rewards = {}, {}

    def build(state):
        if len(state) == depth:
            rewards[state] = rng.random()
            return
        cut = bool(state) and rng.random() < dead
        children[state] = [] if cut else [state + letter for letter in "abcdefgh"[:branching]]
        for child in children[state]:
            build(child)

    build("")
    return children, rewards


def run(m, children, rewards, simulations, seed=0, **options):
    """Search it; returns the path, and how often each path was rewarded and each state's proposals asked for."""
    calls, asked = Counter(), Counter()

    def reward(path):
        calls[path] += 1
        return rewards[path[-1]]

    def propose(state):
        asked[state] += 1
        return children[state]

    path = m.search(
        "",
        propose=propose,
        is_terminal=rewards.__contains__,
        reward=reward,
        simulations=simulations,
        rng=random.Random(seed),
        **options,
    )
    return path, calls, asked


def prefixes(leaf):
    return tuple(leaf[:k] for k in range(len(leaf) + 1))


def walk(node):
    yield node
    for child in node.children or []:
        yield from walk(child)


# ------------------------------------------------------------------- checks: each holds for the snippet


def check_uct_score_by_hand(m):
    # Q = 3/4; ln 10 = 2.302585; sqrt(2.302585 / 4) = 0.758713; 0.75 + 1.4 * 0.758713
    assert m.uct_score(3.0, 4, 10, 1.4) == pytest.approx(1.812199, abs=1e-6)
    assert m.uct_score(0.0, 0, 10, 1.4) == math.inf
    assert m.uct_score(1.0, 2, 7, 0.0) == 0.5


def check_finds_the_optimum(m):
    """With twice as many simulations as the tree has nodes all of it is evaluated: the result is enumeration's."""
    for seed in range(12):
        children, rewards = random_tree(4, 3, seed, dead=0.15)
        if not rewards:
            continue
        path, calls, _ = run(m, children, rewards, 2 * (len(children) + len(rewards)), seed)
        best = max(rewards, key=rewards.get)
        assert path == prefixes(best)
        assert set(calls) == {prefixes(leaf) for leaf in rewards}


def check_reward_once_a_path(m):
    children, rewards = random_tree(3, 3, 1)
    _, calls, asked = run(m, children, rewards, 500)
    assert set(calls.values()) == {1}
    assert set(asked.values()) == {1}


def check_returns_the_best_it_evaluated(m):
    for seed in range(10):
        children, rewards = random_tree(6, 4, seed)
        path, calls, _ = run(m, children, rewards, 60, seed)
        assert 1 < len(calls) < len(rewards)
        assert rewards[path[-1]] == max(rewards[p[-1]] for p in calls)


def check_a_reward_may_depend_on_the_path(m):
    """Two ways to one terminal state, worth different rewards: neither is mistaken for the other."""
    ways = {"root": ["left", "right"], "left": ["end"], "right": ["end"]}
    worth = {("root", "left", "end"): 0.2, ("root", "right", "end"): 0.9}
    for seed in range(4):
        options = {"propose": ways.get, "is_terminal": lambda s: s == "end", "reward": worth.get}
        assert m.search("root", **options, simulations=20, rng=random.Random(seed)) == ("root", "right", "end")


def check_statistics_of_the_tree(m):
    """Each simulation adds one visit and its result to every node of its path, from the leaf to the root."""
    children, rewards = random_tree(3, 3, 3)
    tree = m.Node("")
    run(m, children, rewards, 100, tree=tree)
    assert {n.state: n.total for n in walk(tree) if n.state in rewards} == rewards  # each visited once
    children, rewards = random_tree(5, 3, 3)
    rewards = dict.fromkeys(rewards, 0.5)
    tree = m.Node("")
    run(m, children, rewards, 80, tree=tree)
    assert tree.visits == 80
    for node in walk(tree):
        assert node.total == pytest.approx(0.5 * node.visits)
        if node.children:  # one visit was its own, before it was expanded; the root is expanded at once
            assert node.visits == (node is not tree) + sum(child.visits for child in node.children)
    assert max(len(node.state) for node in walk(tree)) > 2


def check_equals_ucb1(m):
    """Where the value depends on the first move alone, the root is a bandit, and its visits are those of plain UCB1."""
    worth, c, n = {"a": 0.55, "b": 0.6, "c": 0.3}, 0.7, 300
    pulls = Counter()
    for t in range(n):
        unseen = [arm for arm in worth if not pulls[arm]]
        arm = unseen[0] if unseen else max(worth, key=lambda x: worth[x] + c * math.sqrt(math.log(t) / pulls[x]))
        pulls[arm] += 1
    tree = m.Node("")
    options = {
        "propose": lambda s: [s + "a", s + "b", s + "c"],
        "is_terminal": lambda s: False,
        "reward": lambda p: 0.0,
        "value": lambda s: worth[s[0]],
    }
    with pytest.raises(ValueError):  # there is no terminal to return, but the tree has grown
        m.search("", **options, simulations=n, c_uct=c, rng=random.Random(0), tree=tree)
    assert {child.state: child.visits for child in tree.children} == dict(pulls)


def bandit(m, n, seed, means=(0.1, 0.9, 0.5)):
    """Visits of the root's arms, below each of which lie 2^30 leaves with independent 0/1 rewards of that mean."""
    tree = m.Node(())

    def reward(path):
        return float(random.Random(repr((seed, path[-1]))).random() < means[path[-1][0]])

    m.search(
        (),
        propose=lambda s: [(*s, k) for k in range(len(means) if not s else 2)],
        is_terminal=lambda s: len(s) == 31,
        reward=reward,
        simulations=n,
        c_uct=math.sqrt(2),
        rng=random.Random(seed),
        tree=tree,
    )
    return {child.state[0]: child.visits for child in tree.children}


def check_visits_concentrate(m):
    """UCB1's Theorem 1: an arm worse by Delta gets at most 8 ln n / Delta^2 + 1 + pi^2 / 3 visits on average."""
    visits = bandit(m, 1000, seed=0)
    assert visits[1] > 0.7 * 1000
    assert visits[0] <= 8 * math.log(1000) / 0.8**2 + 1 + math.pi**2 / 3
    assert min(visits.values()) > 3  # and none is given up


def check_recovers_from_a_bad_first_impression(m):
    """The better arm begins with a worthless subtree; a greedy search would not come back to it."""

    def reward(path):
        state = path[-1]
        return 0.4 if state[0] == "b" else 0.0 if state[1] == "a" else 1.0

    for seed in range(5):
        path = m.search(
            "",
            propose=lambda s: [s + "a", s + "b"],
            is_terminal=lambda s: len(s) == 12,
            reward=reward,
            simulations=80,
            rng=random.Random(seed),
        )
        assert reward(path) == 1.0


def check_dead_ends(m):
    """They count as reward 0, are never returned, and the search turns away from them."""
    children, rewards = {"": ["a", "b"], "b": ["ba"], "ba": ["baa", "bab"]}, {"baa": -1.0, "bab": -2.0}
    children |= {"a": ["aa", "ab"], "aa": [], "ab": []}
    path, _, _ = run(m, children, rewards, 50)
    assert path == ("", "b", "ba", "baa")
    endless = m.Node("")
    m.search(
        "",
        propose=lambda s: [s + "a", s + "b"] if not s.startswith("a") or len(s) < 20 else [],
        is_terminal=lambda s: len(s) == 21,
        reward=lambda path: 0.5,
        simulations=200,
        rng=random.Random(0),
        tree=endless,
    )
    dead, alive = endless.children
    assert dead.total == 0 and alive.total == 0.5 * alive.visits and alive.visits > 2 * dead.visits


def check_rollouts_are_random(m):
    firsts = Counter()
    for seed in range(60):
        children, rewards = random_tree(2, 3, 0)
        _, calls, _ = run(m, children, rewards, 1, seed)
        firsts.update(path[-1] for path in calls)
    assert set(firsts) == {"aa", "ab", "ac"}  # the first child, then any of its three


CHECKS = [check for name, check in sorted(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_search(check):
    check(mcts)


MUTATIONS = {
    "exploration subtracted": ("total / visits + c_uct", "total / visits - c_uct"),
    "value subtracted": ("return total / visits +", "return -total / visits +"),
    "child's visits left out of the bonus": ("math.log(parent_visits) / visits)", "math.log(parent_visits))"),
    "logarithm of the wrong count": ("math.log(parent_visits)", "math.log(visits)"),
    "sum instead of mean": ("return total / visits +", "return total +"),
    "worst child selected": ("max(candidates, key=lambda c:", "min(candidates, key=lambda c:"),
    "backup of the leaf only": ("in reversed(nodes):", "in nodes[-1:]:"),
    "backup stops below the root": ("in reversed(nodes):", "in reversed(nodes[1:]):"),
    "backup leaves the leaf out": ("in reversed(nodes):", "in reversed(nodes[:-1]):"),
    "visits not counted": ("node.visits += 1", "node.visits += 0"),
    "worst path returned": ("return max(rewards", "return min(rewards"),
    "reward asked again": ("if path not in rewards:", "if True:"),
    "reward remembered for the wrong path": ("result = rewards[path]", "result = list(rewards.values())[-1]"),
    "proposals asked again": ("if path[-1] not in proposals:", "if True:"),
    "dead end is worth 1": ("result = 0.0  # a dead end", "result = 1.0"),
    "closed too early": ("all(c.closed", "any(c.closed"),
    "rollout takes the first step": ("rng.choice(options)", "options[0]"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations(name):
    """Each deliberate mistake fails a check that the snippet passes (test_search)."""
    assert caught_by(load_mutant("snippets/reasoning/mcts.py", *MUTATIONS[name]), CHECKS)


# -------------------------------------------------------------------------------------------------- the rest of search


def test_same_seed_same_result():
    children, rewards = random_tree(8, 3, 5)
    runs = [run(mcts, children, rewards, 50, seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert set(runs[0][1]) != set(runs[2][1])


def test_rewards_may_have_any_scale_and_sign():
    """All is evaluated in the end, so scale and sign only matter for the order."""
    children, rewards = random_tree(3, 3, 2)
    for scale, shift in ((1e6, 0.0), (-1e3, 5.0)):
        scaled = {leaf: scale * r + shift for leaf, r in rewards.items()}
        assert run(mcts, children, scaled, 40)[0] == prefixes(max(scaled, key=scaled.get))


def test_stop_at_ends_the_search():
    children, rewards = random_tree(6, 3, 0)
    _, everything, _ = run(mcts, children, rewards, 10_000)
    path, calls, _ = run(mcts, children, rewards, 10_000, stop_at=0.9)
    assert rewards[path[-1]] >= 0.9 > max((rewards[p[-1]] for p in calls if p != path), default=0)
    assert len(calls) < len(everything) == 3**6


def test_a_terminal_root_is_its_own_path():
    seen = []
    path = mcts.search(
        7, propose=None, is_terminal=lambda s: True, reward=lambda p: seen.append(p) or 1.0, simulations=9, rng=None
    )
    assert path == (7,) and seen == [(7,)]


def options(**changes):
    base = {"propose": lambda s: [s + "x"], "is_terminal": lambda s: len(s) == 3, "reward": lambda p: 1.0}
    return base | {"simulations": 10, "rng": random.Random(0)} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"simulations": 0}, "simulations must be at least 1, got 0"),
        ({"simulations": -3}, "got -3"),
        ({"c_uct": -1.0}, "c_uct must be finite and at least 0, got -1.0"),
        ({"c_uct": math.nan}, "got nan"),
        ({"reward": lambda p: math.nan}, r"reward of \('', 'x', 'xx', 'xxx'\) must be finite, got nan"),
        ({"reward": lambda p: math.inf}, "got inf"),
        ({"value": lambda s: -math.inf}, "value of 'x' must be finite, got -inf"),
        ({"propose": lambda s: []}, "no path from '' to a terminal state: there is none"),
        ({"propose": lambda s: [s]}, "there is none"),  # a circle
        ({"propose": lambda s: [s + "x"] if len(s) < 2 else []}, "there is none"),
        ({"is_terminal": lambda s: False}, "10 simulations found none"),  # and no end
    ],
)
def test_bad_input_of_search(changes, message):
    with pytest.raises(ValueError, match=message):
        mcts.search("", **options(**changes))


@pytest.mark.evidence
def test_reward_scale_pitfall(evidence):
    """c_uct fits rewards in [0, 1]: with rewards a hundred times larger the bonus is lost and the search is greedy."""

    def found(scale, seed):
        path = mcts.search(
            "",
            propose=lambda s: [s + "a", s + "b"],
            is_terminal=lambda s: len(s) == 12,
            reward=lambda p: scale * (0.4 if p[-1][0] == "b" else 0.0 if p[-1][1] == "a" else 1.0),
            simulations=80,
            rng=random.Random(seed),
        )
        return path[-1][0] == "a"

    right, wrong = (sum(found(scale, seed) for seed in range(20)) / 20 for scale in (1, 100))
    assert wrong < right
    name = "A better arm that begins badly is found, of 20 seeds, rewards in [0, 1]"
    evidence("reasoning/mcts", name, value=right, bar=1.0, better=">=", unit="share", seeds=range(20))
    name = "The same with rewards 100 times larger and c_uct unchanged (the pitfall)"
    evidence("reasoning/mcts", name, value=wrong, bar=0.5, better="<=", unit="share", seeds=range(20))


@pytest.mark.evidence
def test_regret(evidence):
    seeds = range(5) if evidence.full else range(1)
    visits = [bandit(mcts, 1000, seed) for seed in seeds]
    bound = 8 * math.log(1000) / 0.8**2 + 1 + math.pi**2 / 3
    worse = [v[0] for v in visits]
    name = "Visits of an arm worse by 0.8, of 1,000; the bar is UCB1's bound"
    evidence(
        "reasoning/mcts", name, value=sum(worse) / len(worse), bar=bound, unit="visits", seeds=seeds, spread=worse
    )


def test_majority_vote_and_best_of_n():
    assert loop.majority_vote(["b", "a", None, None, None, "a"]) == "a"
    assert loop.majority_vote(["b", "a"]) == "b"  # the first of equals
    assert loop.majority_vote([None]) is None
    assert loop.best_of_n(["x", "yyy", "zzz"], len) == "yyy"
