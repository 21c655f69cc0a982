"""Bandits: rules against exact expectations over all courses of play, regret against its bounds."""

import functools
import math

import pytest
import torch
from scipy import integrate, stats
from torch.testing import assert_close

from snippets.foundations import bandits as original
from tests.mutation import caught_by, load_mutant

torch.set_num_threads(1)
PATH = "snippets/foundations/bandits.py"
NAME = "foundations/bandits"
SEEDS = [0, 1, 2, 3, 4]
ARMS = torch.tensor([0.8, 0.6, 0.5, 0.4, 0.2], dtype=torch.float64)
TWO = (0.7, 0.4)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def z_score(samples, expected):
    samples = torch.as_tensor(samples, dtype=torch.float64)
    return ((samples.mean() - expected) / (samples.std() / math.sqrt(len(samples)))).item()


# The oracle: what two arms cost on average, over all courses of play.


def beats(a, b, c, d):
    """The chance that Beta(a, b) < Beta(c, d), by numerical integration."""
    return integrate.quad(lambda x: stats.beta.cdf(x, a, b) * stats.beta.pdf(x, c, d), 0, 1)[0]


def share(left, right):
    """The chance of the first of two arms with these scores, ties broken by a coin."""
    return 0.5 if left == right else float(left > right)


def greedy_chance(n, w):
    left, right = (w[i] / n[i] if n[i] else math.inf for i in (0, 1))
    return share(left, right)


def exact_chance(rule, n, w, t):
    """The chance that the rule pulls the first of two arms after n = (n0, n1) pulls and w wins."""
    if rule == "epsilon":
        return 0.3 * 0.5 + 0.7 * greedy_chance(n, w)
    if rule == "decaying":
        rate = min(1.0, 0.5 * 2 / (0.3**2 * t * 5))
        return rate * 0.5 + (1 - rate) * greedy_chance(n, w)
    if rule == "ucb1":
        scores = [w[i] / n[i] + math.sqrt(2 * math.log(t - 1) / n[i]) if n[i] else math.inf for i in (0, 1)]
        return share(*scores)
    return beats(1 + w[1], 1 + n[1] - w[1], 1 + w[0], 1 + n[0] - w[0])


@functools.cache
def exact_regret(rule, steps):
    """Expected regret on TWO: the probability of each (n, w), step by step."""
    states, gap, total = {((0, 0), (0, 0)): 1.0}, TWO[0] - TWO[1], 0.0
    for t in range(1, steps + 1):
        following = {}
        for (n, w), weight in states.items():
            first = exact_chance(rule, n, w, t)
            total += weight * (1 - first) * gap
            for arm, chance in ((0, first), (1, 1 - first)):
                for win, pay in ((1, TWO[arm]), (0, 1 - TWO[arm])):
                    pulls, wins = list(n), list(w)
                    pulls[arm] += 1
                    wins[arm] += win
                    key = (tuple(pulls), tuple(wins))
                    following[key] = following.get(key, 0.0) + weight * chance * pay
        states = {key: weight for key, weight in following.items() if weight > 0}
        assert sum(states.values()) == pytest.approx(1)
    return total


def rules_of(module):
    return {
        "epsilon": lambda *s: module.epsilon_greedy(*s, epsilon=0.3),
        "decaying": lambda *s: module.epsilon_greedy(*s, epsilon=module.decaying(2, 0.3, c=0.1)),
        "ucb1": module.ucb1,
        "thompson": module.thompson,
    }


def check_mean_regret_is_the_exact_one(module):
    for rule, function in rules_of(module).items():
        regret, _ = module.play(function, torch.tensor(TWO).double(), steps=7, runs=20_000, generator=rng(0))
        for steps in (1, 2, 3, 5, 7):
            found = regret[:, steps - 1]
            expected = exact_regret(rule, steps)
            if found.std() == 0:
                assert found[0].item() == pytest.approx(expected)
            else:
                assert abs(z_score(found, expected)) < 4, (rule, steps, found.mean(), expected)


def check_thompson_matches_the_posterior(module):
    """An arm is pulled with the posterior probability that it is the best."""
    counts, wins = torch.tensor([[12.0, 5.0]]).expand(40_000, 2), torch.tensor([[6.0, 3.0]]).expand(40_000, 2)
    second = (module.thompson(counts, wins, 18, rng(1)) == 1).double()
    assert abs(z_score(second, beats(7, 7, 4, 3))) < 4
    three = torch.tensor([[3.0, 0.0, 9.0]]).expand(40_000, 3), torch.tensor([[1.0, 0.0, 8.0]]).expand(40_000, 3)
    pulls = torch.bincount(module.thompson(*three, 13, rng(2)), minlength=3).double() / 40_000
    laws = [stats.beta(2, 3), stats.beta(1, 1), stats.beta(9, 2)]
    for arm in range(3):
        others = [laws[i] for i in range(3) if i != arm]
        chance = integrate.quad(
            lambda x, arm=arm, others=others: laws[arm].pdf(x) * others[0].cdf(x) * others[1].cdf(x), 0, 1
        )[0]
        assert abs(pulls[arm].item() - chance) < 4.5 * math.sqrt(chance * (1 - chance) / 40_000)


def check_ties_are_broken_at_random(module):
    scores = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0]]).expand(30_000, 5)
    found = torch.bincount(module.random_argmax(scores, rng(3)), minlength=5)
    assert found[0] == found[3] == 0
    for arm in (1, 2, 4):
        assert abs(found[arm].item() / 30_000 - 1 / 3) < 4.5 * math.sqrt(2 / 9 / 30_000)
    infinite = torch.tensor([[math.inf, 1.0, math.inf]]).expand(1000, 3)
    assert set(module.random_argmax(infinite, rng(4)).tolist()) == {0, 2}


def check_every_arm_is_tried_first(module):
    """Optimism for arms never pulled: UCB1 and the greedy rule pull each of K arms once in the first K pulls."""
    for rule in (module.ucb1, lambda *s: module.epsilon_greedy(*s, epsilon=0.0)):
        _, counts = module.play(rule, ARMS, steps=5, runs=200, generator=rng(5))
        assert (counts == 1).all()
    empty = torch.zeros(4000, 3)
    for rule in (module.ucb1, module.epsilon_greedy, module.thompson):
        pulls = torch.bincount(rule(empty, empty, 1, rng(6)), minlength=3)
        assert (pulls / 4000 - 1 / 3).abs().max() < 4.5 * math.sqrt(2 / 9 / 4000)


def check_ucb1_by_hand(module):
    """sqrt(2 ln n / n_i): arm 1 has the lower mean and the larger index; with 13 pulls made, pull 14 is next."""
    counts, wins = torch.tensor([[10.0, 3.0]]), torch.tensor([[6.0, 1.0]])
    index = [w / n + math.sqrt(2 * math.log(13) / n) for n, w in ((10, 6), (3, 1))]
    assert index[1] > index[0]
    assert module.ucb1(counts, wins, 14, rng(0)).tolist() == [1]
    assert module.ucb1(counts, wins, 14, rng(0), scale=0.0).tolist() == [0]
    # At the scale where the two indices meet, the choice turns.
    gap = 6 / 10 - 1 / 3
    meet = (gap / (math.sqrt(math.log(13) / 3) - math.sqrt(math.log(13) / 10))) ** 2
    assert module.ucb1(counts, wins, 14, rng(0), scale=meet * 1.001).tolist() == [1]
    assert module.ucb1(counts, wins, 14, rng(0), scale=meet * 0.999).tolist() == [0]


def check_greedy_is_greedy(module):
    counts, wins = torch.full((500, 2), 9.0), torch.tensor([[8.0, 1.0]]).expand(500, 2)
    assert not module.RULES["greedy"](counts, wins, 19, rng(13)).any()


def check_epsilon_one_is_uniform(module):
    regret, counts = module.play(
        lambda *s: module.epsilon_greedy(*s, epsilon=1.0), ARMS, steps=50, runs=2000, generator=rng(7)
    )
    assert abs(z_score(regret[:, -1], 50 * module.epsilon_slope(ARMS, 1.0))) < 4
    assert module.epsilon_slope(ARMS, 1.0) == pytest.approx(0.3) and module.epsilon_slope(ARMS, 0.1) == pytest.approx(
        0.03
    )
    assert (counts.sum(-1) == 50).all()
    known, won = torch.full((8000, 2), 9.0), torch.tensor([[8.0, 1.0]]).expand(8000, 2)
    worse = module.epsilon_greedy(known, won, 19, rng(12)).double()  # epsilon is 0.1: half of it to the worse arm
    assert abs(z_score(worse, 0.05)) < 4


def check_the_schedule(module):
    epsilon = module.decaying(5, 0.2, c=4.0)
    assert epsilon(1) == epsilon(499) == 1.0
    assert module.decaying(5, 0.2)(10_000) == pytest.approx(0.0625)  # c = 5
    assert epsilon(1000) == pytest.approx(0.5) and epsilon(10_000) == pytest.approx(0.05)


def check_regret_counts_gaps(module):
    """Regret is sum of gap times pulls, whatever was paid, and never falls."""
    for rule in rules_of(module).values():
        regret, counts = module.play(rule, ARMS, steps=40, runs=50, generator=rng(8))
        assert_close(regret[:, -1], counts.double() @ (0.8 - ARMS))
        assert (regret.diff(dim=-1) >= 0).all() and regret.shape == (50, 40)
    _, counts = module.play(module.thompson, torch.tensor([1.0, 0.0]), steps=60, runs=20, generator=rng(9))
    assert (counts[:, 0] > 45).all()  # a sure arm against one that never pays
    again = [module.play(module.ucb1, ARMS, steps=30, runs=5, generator=rng(10))[0] for _ in range(2)]
    assert torch.equal(*again)


def check_arms_have_no_order(module):
    """Turned round, the arms cost the same on average."""
    for rule in rules_of(module).values():
        ends = [module.play(rule, x, steps=40, runs=2000, generator=rng(11))[0][:, -1] for x in (ARMS, ARMS.flip(0))]
        error = math.sqrt(sum(x.var().item() / len(x) for x in ends))
        assert abs((ends[0].mean() - ends[1].mean()).item()) < 4.5 * error


def check_the_bounds(module):
    for p in (0.0, 0.1, 0.5, 0.9, 1.0):
        for q in (0.2, 0.5, 0.99):
            x, y = (torch.distributions.Bernoulli(torch.tensor(v).double()) for v in (p, q))
            expected = torch.distributions.kl_divergence(x, y)
            assert_close(module.bernoulli_kl(torch.tensor(p).double(), torch.tensor(q).double()), expected)
    expected = sum((0.8 - p) / stats.entropy([p, 1 - p], [0.8, 0.2]) for p in (0.6, 0.5, 0.4, 0.2))
    assert module.lai_robbins(ARMS) == pytest.approx(expected)
    assert module.lai_robbins(torch.tensor([0.5, 0.5]).double()) == 0.0
    gaps = [0.2, 0.3, 0.4, 0.6]
    expected = sum(8 * math.log(1000) / gap for gap in gaps) + (1 + math.pi**2 / 3) * sum(gaps)
    assert module.ucb1_bound(ARMS, 1000) == pytest.approx(expected)
    for seed in range(20):  # Pinsker: KL >= 2 gap^2, so UCB1's bound is at least 16 times the limit
        chances = 0.98 * torch.rand(4, generator=rng(seed), dtype=torch.float64)
        per_log = module.ucb1_bound(chances, math.e**2) - module.ucb1_bound(chances, math.e)
        assert per_log >= 16 * module.lai_robbins(chances) > 0


def check_bad_input_is_named(module):
    x = torch.ones(2, 3)
    cases = [
        (lambda: module.ucb1(x, x[:1], 3, rng(0)), r"counts \(2, 3\) and wins \(1, 3\)"),
        (lambda: module.thompson(x[0], x[0], 3, rng(0)), r"counts \(3,\) and wins \(3,\): want \(N, K\)"),
        (lambda: module.thompson(x, 2 * x, 3, rng(0)), "wins must lie between 0 and counts"),
        (lambda: module.epsilon_greedy(x, -x, 3, rng(0)), "wins must lie between 0 and counts"),
        (lambda: module.epsilon_greedy(x, x, 3, rng(0), epsilon=1.5), r"epsilon must lie in \[0, 1\], got 1.5"),
        (lambda: module.epsilon_greedy(x, x, 3, rng(0), epsilon=lambda t: -0.1 * t), "got -0.3"),
        (
            lambda: module.play(module.ucb1, torch.tensor([0.5, 1.5]), steps=1, runs=1, generator=rng(0)),
            "got .0.5, 1.5.",
        ),
        (
            lambda: module.play(module.ucb1, torch.ones(1, 2), steps=1, runs=1, generator=rng(0)),
            r"chances must be \(K,\)",
        ),
        (lambda: module.lai_robbins(torch.tensor([0.5, 1.0])), r"want chances in \[0, 1\), got \[0.5, 1.0\]"),
        (lambda: module.lai_robbins(torch.tensor([0.5, 1.5])), "got .0.5, 1.5."),
        (lambda: module.lai_robbins(torch.tensor([0.5, -0.5])), "got .0.5, -0.5."),
    ]
    for function, message in cases:
        with pytest.raises(ValueError, match=message):
            function()


CHECKS = [function for name, function in list(globals().items()) if name.startswith("check_")]
MISTAKES = {
    "ties to the first arm": (
        "return torch.multinomial(best.float(), 1, generator=generator).squeeze(-1)",
        "return scores.argmax(-1)",
    ),
    "the worst arm": (
        "best = scores == scores.amax(-1, keepdim=True)",
        "best = scores == scores.amin(-1, keepdim=True)",
    ),
    "an arm never pulled is worth nothing": (
        "torch.where(counts > 0, wins / counts, math.inf)",
        "wins / counts.clamp(min=1)",
    ),
    "an arm never pulled is worth one": (
        "torch.where(counts > 0, wins / counts, math.inf)",
        "torch.where(counts > 0, wins / counts, 1.0)",
    ),
    "wins for means": ("wins / counts, math.inf", "wins, math.inf"),
    "explores when it should not": ("generator=generator) < rate", "generator=generator) > rate"),
    "explores the other arms only": (
        "torch.randint(counts.shape[1], greedy",
        "any arm but the greedy one: see below",
    ),
    "one coin for all runs": (
        "torch.rand(greedy.shape, generator=generator) < rate",
        "torch.rand(1, generator=generator) < rate",
    ),
    "another constant": ("c: float = 5.0", "c: float = 4.0"),
    "another rate": ("Callable[[int], float] = 0.1", "Callable[[int], float] = 0.2"),
    "schedule without the number of arms": ("c * arms /", "c /"),
    "schedule without the square": ("(gap**2 * t)", "(gap * t)"),
    "schedule in sqrt t": ("(gap**2 * t)", "(gap**2 * t**0.5)"),
    "bonus without the root": (".clamp(min=1)).sqrt()", ".clamp(min=1))"),
    "bonus without the logarithm": ("scale * math.log(max(t - 1, 1))", "scale * max(t - 1, 1)"),
    "bonus that does not grow": ("scale * math.log(max(t - 1, 1))", "scale"),
    "bonus from one pull too late": ("math.log(max(t - 1, 1))", "math.log(t)"),
    "half the bonus": ("scale: float = 2.0", "scale: float = 1.0"),
    "pessimism": ("means_of(counts, wins) + bonus", "means_of(counts, wins) - bonus"),
    "posterior without a prior": (
        "torch.stack([1 + wins, 1 + counts - wins])",
        "torch.stack([0.01 + wins, 0.01 + counts - wins])",
    ),
    "wins and losses exchanged": (
        "torch.stack([1 + wins, 1 + counts - wins])",
        "torch.stack([1 + counts - wins, 1 + wins])",
    ),
    "losses forget the wins": ("1 + counts - wins])", "1 + counts])"),
    "a draw that is no Beta": ("first / (first + second)", "first / second.clamp(min=1e-9) + first"),
    "the mean of the posterior": ("first / (first + second)", "shapes[0] / shapes.sum(0)"),
    "every run draws the same": (
        "torch.rand(runs, generator=generator) < chances[a]",
        "torch.rand(1, generator=generator) < chances[a]",
    ),
    "losses are paid": ("< chances[a]", "> chances[a]"),
    "only wins are counted": ("counts[row, a] += 1", "counts[row, a] += paid"),
    "gap to the mean": ("gaps, row = chances.max() - chances", "gaps, row = chances.mean() - chances"),
    "regret of a pull": ("return regret.cumsum(-1), counts", "return regret, counts"),
    "KL turned round": (
        "torch.xlogy(p, p / q) + torch.xlogy(1 - p, (1 - p) / (1 - q))",
        "torch.xlogy(q, q / p) + torch.xlogy(1 - q, (1 - q) / (1 - p))",
    ),
    "KL of one side": (" + torch.xlogy(1 - p, (1 - p) / (1 - q))", ""),
    "limit of arms that pay always": ("(chances < 1)).all()", "(chances <= 1)).all()"),
    "limit of chances below 0": ("not ((chances >= 0) & (chances < 1)).all()", "not (chances < 1).all()"),
    "limit without the gap": ("((best - worse) / bernoulli_kl", "(1 / bernoulli_kl"),
    "bound with a gap instead of its inverse": ("(8 * math.log(t) / gaps)", "(8 * math.log(t) * gaps)"),
    "bound without its constant": ("(1 + math.pi**2 / 3)", "(math.pi**2 / 3)"),
    "slope over the other arms": (
        "(chances.max() - chances).mean()",
        "(chances.max() - chances)[chances < chances.max()].mean()",
    ),
}


SLOW = ("arms_have_no_order", "regret_counts_gaps", "the_exact_one")  # last, for the mutations
CHECKS.sort(key=lambda check: max((i for i, name in enumerate(SLOW) if name in check.__name__), default=-1))


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__[6:])
def test_the_functions(check):
    check(original)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    """Each deliberate mistake makes at least one check fail."""
    old, new = MISTAKES[mistake]
    if mistake == "explores the other arms only":
        old = "greedy.shape, generator=generator)\n"
        new = old + "    any_arm = (greedy + 1 + any_arm % (counts.shape[1] - 1)) % counts.shape[1]\n"
    mutant = load_mutant(PATH, old, new)
    assert any(caught_by(mutant, [check]) for check in CHECKS)


# Regret against its bounds.

RULES = {
    "ε = 0.1": original.epsilon_greedy,
    "greedy": lambda *s: original.epsilon_greedy(*s, epsilon=0.0),
    "decaying ε": lambda *s: original.epsilon_greedy(*s, epsilon=original.decaying(5, 0.2, c=0.5)),
    "UCB1": original.ucb1,
    "Thompson": original.thompson,
}


LAST = {}  # rule -> (runs,): the regret at the end, run by run


@functools.cache
def curves(rule, full):
    """Per seed, the mean regret (T,) of its runs."""
    steps, runs, seeds = (5000, 200, SEEDS) if full else (600, 60, SEEDS[:1])
    found = [original.play(RULES[rule], ARMS, steps=steps, runs=runs, generator=rng(s))[0] for s in seeds]
    LAST[rule] = torch.cat([x[:, -1] for x in found])
    return [x.mean(0) for x in found], seeds


def per_log(curve):
    """The growth per unit of ln t over the last tenfold of pulls."""
    last = len(curve)
    return ((curve[last - 1] - curve[last // 10 - 1]) / math.log(10)).item()


def per_pull(curve):
    """The growth per pull over the second half."""
    half = len(curve) // 2
    return ((curve[-1] - curve[half - 1]) / (len(curve) - half)).item()


def points(steps):
    return sorted({round(10 ** (k / 12)) for k in range(12, 100) if 10 ** (k / 12) <= steps} | {steps})


def test_regret_of_each_rule(evidence):
    for rule in RULES:
        found, seeds = curves(rule, evidence.full)
        ends = [x[-1].item() for x in found]
        x = points(len(found[0]))
        curve = {"x": x, "y": {rule: [[round(run[t - 1].item(), 3) for t in x] for run in found]}}
        evidence(
            NAME,
            f"Regret after 5,000 pulls: {rule}",
            value=sum(ends) / len(ends),
            unit="reward",
            seeds=seeds,
            spread=ends,
            note="a mean over 200 runs a seed; arms 0.8, 0.6, 0.5, 0.4, 0.2",
            curve=curve,
        )


def test_constant_epsilon_pays_for_ever(evidence):
    found, seeds = curves("ε = 0.1", evidence.full)
    slopes = [per_pull(x) / original.epsilon_slope(ARMS, 0.1) for x in found]
    off = max(abs(x - 1) for x in slopes)
    evidence(
        NAME,
        "Constant ε: regret a pull over ε times the mean gap, off 1 by at most",
        value=off,
        bar=0.05 if evidence.full else 0.5,
        seeds=seeds,
        spread=[abs(x - 1) for x in slopes],
    )


def test_without_exploration_the_regret_is_linear(evidence):
    """Greedy after one pull of each arm stays on a wrong arm in some runs, for ever."""
    found, seeds = curves("greedy", evidence.full)
    slopes = [per_pull(x) for x in found]
    evidence(
        NAME,
        "Greedy: regret a pull in the second half",
        value=min(slopes),
        bar=0.03,
        better=">=",
        unit="reward",
        seeds=seeds,
        spread=slopes,
        note="the least of the seeds; constant ε = 0.1 pays 0.03",
    )
    if evidence.full:  # the worst mean of the five, though most of its runs were lucky and beat every run of Thompson
        for rule in RULES:
            curves(rule, True)
        assert max(LAST, key=lambda rule: LAST[rule].mean()) == "greedy"
        assert LAST["greedy"].median() < LAST["Thompson"].min()


def test_a_decaying_epsilon_has_a_logarithm_and_its_slope(evidence):
    """Exploration at the rate c K / (d^2 t) costs c / d^2 times the sum of gaps per unit of ln t, and little more."""
    found, seeds = curves("decaying ε", evidence.full)
    exact = 0.5 / 0.2**2 * (0.8 - ARMS).sum().item()
    ratios = [per_log(x) / exact for x in found]
    low, high = (0.9, 1.1) if evidence.full else (0.5, 1.5)
    assert all(low < ratio < high for ratio in ratios)
    evidence(
        NAME,
        "Decaying ε: growth per ln t over (c / d²) Σ gaps",
        value=sum(ratios) / len(ratios),
        bar=high,
        unit="×",
        seeds=seeds,
        spread=ratios,
        note="c = 0.5, d = 0.2",
    )


def test_ucb1_stays_below_its_bound(evidence):
    found, seeds = curves("UCB1", evidence.full)
    bound = torch.tensor([original.ucb1_bound(ARMS, t) for t in range(1, len(found[0]) + 1)])
    shares = [(x / bound).max().item() for x in found]
    evidence(
        NAME,
        "UCB1: regret over its bound, the largest over all pulls",
        value=max(shares),
        bar=1,
        unit="×",
        seeds=seeds,
        spread=shares,
    )
    above = [per_log(x) / original.lai_robbins(ARMS) for x in found]
    if evidence.full:
        evidence(
            NAME,
            "UCB1: growth per ln t over Lai and Robbins' constant",
            value=min(above),
            bar=2,
            better=">=",
            unit="×",
            seeds=seeds,
            spread=above,
            note="the least of the seeds, over the last tenfold of pulls",
        )


def test_thompson_grows_as_lai_and_robbins_allow(evidence):
    """Asymptotically their ratio is 1. At a finite time it is near, and the regret itself may lie below C ln T."""
    found, seeds = curves("Thompson", evidence.full)
    limit = original.lai_robbins(ARMS)
    ratios = [per_log(x) / limit for x in found]
    assert all(0.4 < ratio < (1.4 if evidence.full else 2.5) for ratio in ratios)
    evidence(
        NAME,
        "Thompson: growth per ln t over Lai and Robbins' constant",
        value=sum(ratios) / len(ratios),
        bar=1.4 if evidence.full else 2.5,
        unit="×",
        seeds=seeds,
        spread=ratios,
        note="over the last tenfold of pulls",
    )
    evidence(NAME, "Lai and Robbins' constant C of these arms", value=limit, unit="reward per ln t")
    if evidence.full:
        under = [(x[-1] / (limit * math.log(len(x)))).item() for x in found]
        evidence(
            NAME,
            "Thompson: regret after 5,000 pulls over C ln T",
            value=sum(under) / len(under),
            bar=1,
            unit="×",
            seeds=seeds,
            spread=under,
            note="below 1: the bound is one of the limit",
        )


def test_the_demo_prints_its_table(capsys):
    original.main()
    printed = capsys.readouterr().out
    assert all(name in printed for name in original.RULES)
