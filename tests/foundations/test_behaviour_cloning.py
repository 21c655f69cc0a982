"""Behaviour cloning: against counting, closed forms, sampled episodes, both theorems, and its own broken copies."""

import math
from statistics import mean

import pytest
import torch
from torch.testing import assert_close

from snippets.foundations import behaviour_cloning as original
from snippets.worlds import mdps
from tests.mutation import caught_by, load_mutant

torch.set_num_threads(1)
PATH = "snippets/foundations/behaviour_cloning.py"
SEEDS = [0, 1, 2, 3, 4]
EPSILON = 1e-4
HORIZONS = [10, 20, 50, 100, 200, 500, 1000]
OFF = {"goes on away": (0.0, 1.0), "acts at random": (0.5, 0.5), "labels on its own states": (1 - EPSILON, EPSILON)}


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def world(module, width, **options):
    """The lane, its expert, the start on the path, and a cost of 1 for each step off it."""
    table = module.lane(width, **options)
    start, cost = torch.zeros(width + 1, dtype=torch.float64), torch.ones(width + 1, dtype=torch.float64)
    start[0], cost[0] = 1.0, 0.0
    return table, tensor(1.0, 0.0).repeat(width + 1, 1), start, cost


def errs(width, off, epsilon=EPSILON):
    """A policy that errs with epsilon on the path, and does `off` = (towards, away) elsewhere."""
    policy = tensor(*off).repeat(width + 1, 1)
    policy[0] = tensor(1 - epsilon, epsilon)
    return policy


def random_policies(seed, states=4, actions=3):
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    expert, policy = (torch.randn(states, actions, **options).softmax(-1) for _ in range(2))
    return expert, policy, torch.randn(states, **options).softmax(-1)


# The checks.


def check_the_clone_counts(module):
    states, actions = torch.tensor([0, 0, 0, 2, 2]), torch.tensor([1, 1, 0, 2, 2])
    expected = [[1 / 3, 2 / 3, 0], [1 / 3, 1 / 3, 1 / 3], [0, 0, 1]]
    assert_close(module.clone(states, actions, shape=(3, 3)), torch.tensor(expected, dtype=torch.float64))
    once = module.clone(torch.tensor([1]), torch.tensor([0]), shape=(2, 2))
    assert once.tolist() == [[0.5, 0.5], [1.0, 0.0]]
    none = torch.zeros(0, dtype=torch.long)
    assert_close(module.clone(none, none, shape=(2, 4)), torch.full((2, 4), 0.25, dtype=torch.float64))


def check_the_clone_has_the_highest_likelihood(module):
    """No random policy, and none near the clone, is as likely as it is on its demonstrations."""
    generator = torch.Generator().manual_seed(0)
    states, actions = (torch.randint(0, 3, (40,), generator=generator) for _ in range(2))
    clone = module.clone(states, actions, shape=(3, 3))
    best = clone[states, actions].log().sum()
    for seed in range(20):
        other = random_policies(seed, 3, 3)[1]
        for policy in (other, 0.99 * clone + 0.01 * other):
            assert policy[states, actions].log().sum() < best


def check_likelihood_and_kl_differ_by_a_constant(module):
    for seed in range(3):
        expert, policy, seen = random_policies(seed)
        nll, kl = module.cloning_loss(expert, policy, seen)
        expected = sum(seen[s] * expert[s, a] * (expert[s, a] / policy[s, a]).log() for s in range(4) for a in range(3))
        assert kl.item() == pytest.approx(expected.item(), abs=1e-12)
        entropy = -(seen[:, None] * expert * expert.log()).sum()
        assert (nll - kl).item() == pytest.approx(entropy.item(), abs=1e-12)
        assert module.cloning_loss(expert, expert, seen)[1].item() == pytest.approx(0, abs=1e-12)
        logits = policy.log().requires_grad_()
        losses = module.cloning_loss(expert, logits.softmax(-1), seen)
        grads = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in losses]
        assert_close(grads[0], grads[1])
        assert_close(grads[0], seen[:, None] * (policy - expert))
    # What the expert never does may have any chance: 0 * log 0 counts nothing.
    sure, half = tensor(1.0, 0.0).repeat(2, 1), tensor(0.5, 0.5).repeat(2, 1)
    assert_close(torch.stack(module.cloning_loss(sure, half, tensor(1.0, 0.0))), tensor(math.log(2), math.log(2)))
    assert module.cloning_loss(sure, sure, tensor(0.5, 0.5))[1] == 0


def check_states_that_were_not_demonstrated_have_no_loss(module):
    expert, policy, _ = random_policies(5)
    seen = tensor(0.5, 0.5, 0.0, 0.0)
    other = policy.clone()
    other[2:] = policy[2:].flip(-1)
    assert_close(module.cloning_loss(expert, policy, seen), module.cloning_loss(expert, other, seen))


def check_the_lane(module):
    assert module.lane(1).tolist() == [[[1, 0], [0, 1]], [[1, 0], [0, 1]]]
    for slip in (0.0, 0.3):
        table = module.lane(3, slip=slip)
        start = tensor(1.0, 0.0, 0.0, 0.0)
        mdps.MDP(table, torch.zeros_like(table), start, torch.zeros(4, dtype=torch.bool))
        assert table[0, 0, 0] == 1 - slip and table[2, 0, 1] == 1 - slip
        assert table[0, 1, 1] == table[1, 1, 2] == table[3, 1, 3] == 1
        assert table[1, 0, 2] == slip


def check_visits_and_costs_by_sampling(module):
    """20,000 episodes of 6 steps: each state at each step, and the sum of the costs, by z-tests."""
    table, _, start, cost = world(module, 4, slip=0.2)
    policy = errs(4, (0.6, 0.4), epsilon=0.3)
    seen = module.visits(table, policy, start, horizon=6)
    assert_close(seen.sum(-1), torch.ones(6, dtype=torch.float64))
    assert_close(seen[0], start)
    generator, count = torch.Generator().manual_seed(0), 20_000
    s, paid = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.float64)
    totals = module.costs(table, policy, start, cost, 6)
    for t in range(6):
        share = torch.nn.functional.one_hot(s, 5).double().mean(0)
        assert ((share - seen[t]).abs() <= 4.5 * (seen[t] * (1 - seen[t]) / count).sqrt() + 1e-12).all()
        paid += cost[s]
        assert (paid.mean() - totals[t]).abs() <= 4.5 * paid.std() / math.sqrt(count) + 1e-12
        a = torch.multinomial(policy[s], 1, generator=generator).squeeze(-1)
        s = torch.multinomial(table[s, a], 1, generator=generator).squeeze(-1)


def check_the_square_in_closed_form(module):
    """Lost for ever with chance epsilon a step: off the path at step t with 1 - (1 - epsilon)^t, t from 0."""
    table, _, start, cost = world(module, 60)
    for epsilon in (1e-4, 0.02):
        found = module.costs(table, errs(60, (0.0, 1.0), epsilon), start, cost, 50)
        expected = sum(1 - (1 - epsilon) ** t for t in range(50))
        assert found[-1].item() == pytest.approx(expected, rel=1e-9)


def check_one_first_mistake_reaches_the_bound(module):
    """All of the error in the first step and no way back: (T - 1) / T of T^2 * epsilon, epsilon the mean over steps."""
    table = torch.zeros(3, 2, 3, dtype=torch.float64)
    table[0, 0, 1] = table[0, 1, 2] = table[1, :, 1] = table[2, :, 2] = 1.0
    expert, start, cost = tensor(1.0, 0.0).repeat(3, 1), tensor(1.0, 0.0, 0.0), tensor(0.0, 0.0, 1.0)
    policy = expert.clone()
    policy[0] = tensor(0.97, 0.03)
    epsilon = module.visits(table, expert, start, horizon=100).mean(0) @ policy[:, 1]
    assert module.costs(table, policy, start, cost, 100)[-1].item() == pytest.approx(0.99 * 100**2 * epsilon.item())


def check_both_bounds(module):
    """T^2 * epsilon with epsilon on the expert's states; u * T * epsilon with epsilon on the learner's own."""
    for slip in (0.0, 0.2):
        table, expert, start, cost = world(module, 40, slip=slip)
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            policy = torch.rand(41, 1, generator=generator, dtype=torch.float64) ** (4 * (seed % 2) + 1)
            policy = torch.cat([1 - policy, policy], -1)
            for horizon in (2, 5, 30):
                error = policy[:, 1]
                excess = (
                    module.costs(table, policy, start, cost, horizon)[-1]
                    - module.costs(table, expert, start, cost, horizon)[-1]
                ).item()
                theirs = module.visits(table, expert, start, horizon=horizon).mean(0) @ error
                mine = module.visits(table, policy, start, horizon=horizon).mean(0) @ error
                u = module.price_of_a_mistake(table, expert, cost, horizon)
                assert excess <= horizon**2 * theirs.item() + 1e-9
                assert excess <= u * horizon * mine.item() + 1e-9
                assert excess <= u * horizon


def check_the_price_of_a_mistake(module):
    """Without slips a step away from the path costs two steps: one off it, one back. At the end, less."""
    table, expert, _, cost = world(module, 10)
    assert module.price_of_a_mistake(table, expert, cost, 1) == 0
    assert module.price_of_a_mistake(table, expert, cost, 2) == 1
    assert module.price_of_a_mistake(table, expert, cost, 20) == 2
    lost = tensor(0.0, 1.0).repeat(11, 1)
    lost[0] = expert[0]
    assert module.price_of_a_mistake(table, lost, cost, 20) == 19
    # A mistake that costs most just before the end: 0 -> 1 -> 2 -> 3, or straight to 2, which alone costs.
    chain = torch.zeros(4, 2, 4, dtype=torch.float64)
    chain[0, 0, 1] = chain[0, 1, 2] = chain[1, :, 2] = chain[2, :, 3] = chain[3, :, 3] = 1.0
    prices = [module.price_of_a_mistake(chain, expert[:4], tensor(0.0, 0.0, 1.0, 0.0), n) for n in (1, 2, 9)]
    assert prices == [0, 1, 1]


def check_the_trembling_hand(module):
    assert_close(module.trembling(tensor(1.0, 0.0, 0.0)[None], 0.3), tensor(0.8, 0.1, 0.1)[None])
    assert_close(module.trembling(tensor(1.0, 0.0)[None], 0.0), tensor(1.0, 0.0)[None])
    assert_close(module.trembling(tensor(1.0, 0.0)[None], 1.0), tensor(0.5, 0.5)[None])


def collect(module, seed, on_policy, rounds=10, width=30):
    table, expert, start, _ = world(module, width)
    generator = torch.Generator().manual_seed(seed)
    options = {"rounds": rounds, "episodes": 1, "horizon": 20, "tremble": 0.05, "generator": generator}
    return module.dagger(table, expert, start, on_policy=on_policy, **options)


def check_dagger_learns_where_it_goes(module):
    """The clone of the path alone acts at random off it, with any number of labels; DAgger's states become known."""
    policies = collect(module, 0, False)
    assert len(policies) == 10
    for policy in policies:
        assert policy[0].tolist() == [1, 0] and (policy[1:] == 0.5).all()
    policies = collect(module, 0, True, rounds=40)
    assert_close(policies[0], collect(module, 1, False)[0])
    known = [int((policy[:, 0] == 1).sum()) for policy in policies]
    assert known == sorted(known) and known[0] == 1 and known[-1] >= 3
    for policy in policies:  # all labels are kept and none is wrong
        assert ((policy == 0.5).all(-1) | (policy[:, 0] == 1)).all()


def check_rounds_begin_at_the_start_and_hands_tremble_as_told(module):
    table, expert, start, _ = world(module, 6, slip=0.5)
    options = {"rounds": 8, "episodes": 3, "generator": torch.Generator().manual_seed(0)}
    assert (module.dagger(table, expert, start, horizon=1, tremble=1.0, **options)[-1][1:] == 0.5).all()
    table = module.lane(6)  # never off the path with a steady hand, at once with a hand that always trembles
    assert (module.dagger(table, expert, start, horizon=9, tremble=0.0, **options)[-1][1:] == 0.5).all()
    assert module.dagger(table, expert, start, horizon=9, tremble=1.0, **options)[1][1:3, 0].tolist() == [1, 1]


def check_the_newest_clone_acts(module):
    """Once it knows the way back it stays near: 100 rounds reach few states. The first clone walks at random."""
    known = [int((collect(module, seed, True, rounds=100)[-1][:, 0] == 1).sum()) for seed in range(3)]
    assert sum(known) < 23


def check_labels_are_the_experts(module):
    """An expert that steps away in every second state: the clone has it, and not what the learner did there."""
    table, expert, start, _ = world(module, 6, slip=0.4)
    expert[2] = tensor(0.0, 1.0)
    options = {"rounds": 6, "episodes": 20, "horizon": 20, "tremble": 0.5}
    last = module.dagger(table, expert, start, generator=torch.Generator().manual_seed(0), **options)[-1]
    assert_close(last[:5], expert[:5])
    mixed = tensor(0.7, 0.3).repeat(7, 1)
    last = module.dagger(table, mixed, start, generator=torch.Generator().manual_seed(1), **options)[-1]
    assert (last[:3, 0] - 0.7).abs().max() < 0.12


def check_bad_input_is_named(module):
    one, two = torch.zeros(3, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    expert, policy, seen = random_policies(0)
    table, guide, start, cost = world(module, 3)
    cases = [
        (lambda: module.clone(one, two, shape=(2, 2)), r"\(3,\) against \(2,\)"),
        (lambda: module.clone(one[None], one[None], shape=(2, 2)), r"want \(N,\) for both"),
        (lambda: module.clone(one + 2, one, shape=(2, 2)), "states reach from 2 to 2, want 0 to 1"),
        (lambda: module.clone(one, one - 1, shape=(2, 2)), "actions reach from -1"),
        (lambda: module.cloning_loss(expert, policy[:3], seen), r"\(3, 3\)"),
        (lambda: module.cloning_loss(expert, policy, seen[:2]), r"\(2,\)"),
        (lambda: module.lane(0), "width >= 1"),
        (lambda: module.lane(3, slip=1.0), "slip"),
        (lambda: module.visits(table, guide[:2], start, horizon=2), r"\(2, 2\)"),
        (lambda: module.visits(table, guide, start[:2], horizon=2), r"\(2,\)"),
        (lambda: module.price_of_a_mistake(table, guide, cost[:2], 3), r"\(2,\)"),
        (lambda: module.trembling(guide, 1.5), "1.5"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]

MISTAKES = {
    "counts not divided": ("counts / total.clamp(min=1), 1 / shape[1]", "counts, 1 / shape[1]"),
    "zeros where nothing was seen": ("total.clamp(min=1), 1 / shape[1])", "total.clamp(min=1), 0.0)"),
    "each pair once": ("accumulate=True", "accumulate=False"),
    "the reverse KL": ("torch.xlogy(weights, expert).sum()", "torch.xlogy(visits[:, None] * policy, expert).sum()"),
    "the expert's states ignored": ("weights = visits[:, None] * expert", "weights = expert / len(visits)"),
    "the likelihood with the wrong sign": ("nll = -torch.xlogy(weights, policy)", "nll = torch.xlogy(weights, policy)"),
    "the entropy twice": ("nll + torch.xlogy(weights, expert).sum()", "nll + 2 * torch.xlogy(weights, expert).sum()"),
    "no way back": ("(states - 1).clamp(min=0)] = 1 - slip", "states] = 1 - slip"),
    "the slip towards the path": (
        "transitions[states, 0, away] += slip",
        "transitions[states, 0, (states - 1).clamp(min=0)] += slip",
    ),
    "visits one step late": ("rows = [start]", "rows = [start @ matrix]"),
    "costs not summed": ("@ cost).cumsum(0)", "@ cost)"),
    "the price without its cost": ("= cost[:, None] + transitions @ values", "= transitions @ values"),
    "the price of the best mistake": ("(q_values - values[:, None]).max()", "(q_values - values[:, None]).min()"),
    "the price under the best action": ("values = (expert * q_values).sum(-1)", "values = q_values.amin(-1)"),
    "a hand that trembles twice": ("return (1 - chance) * policy +", "return policy +"),
    "the learner labels": ("torch.multinomial(expert[s], 1, generator=generator)", "a[:, None]"),
    "the last round only": (
        "policies.append(clone(torch.cat(states), torch.cat(labels),",
        "policies.append(clone(torch.cat(states[-horizon:]), torch.cat(labels[-horizon:]),",
    ),
    "the expert always acts": ("if on_policy else expert", "if not on_policy else expert"),
    "the first clone acts": ("actor = trembling(policies[-1], tremble)", "actor = trembling(policies[0], tremble)"),
    "no trembling on the way": ("actor = trembling(policies[-1], tremble)", "actor = policies[-1]"),
    "labels a step late": ("states.append(s)", "states.append(s * 0)"),
    "rounds go on where they stopped": (
        "        s = torch.multinomial(start, episodes",
        "        s = s if policies else torch.multinomial(start, episodes",
    ),
    "one and the same hand": ("trembling(policies[-1], tremble)", "trembling(policies[-1], 0.05)"),
    "the price at the first step only": ("worst = max(worst, (q_values", "worst = max(0.0, (q_values"),
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__.removeprefix("check_"))
def test_the_functions(check):
    check(original)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_caught(name):
    mutant = load_mutant(PATH, *MISTAKES[name])
    assert any(caught_by(mutant, [check]) for check in CHECKS)  # stops at the first


@pytest.mark.evidence
def test_what_an_error_costs_as_episodes_grow(evidence):
    """Exact. The slope of log cost against log T from 100 to 1,000 steps, by what the policy does off the path."""
    table, _, start, cost = world(original, 400)
    curves = {}
    for name, off in OFF.items():
        policy = errs(400, off)
        totals = original.costs(table, policy, start, cost, 1000)
        last = original.visits(table, policy, start, horizon=1000)[:, 1:].sum(-1)
        curves[name] = ([totals[n - 1].item() for n in HORIZONS], [last[n - 1].item() for n in HORIZONS])
    for name, (totals, _) in curves.items():
        slope = math.log10(totals[-1] / totals[HORIZONS.index(100)])
        expected = {"goes on away": 2, "acts at random": 1.5, "labels on its own states": 1}[name]
        assert slope == pytest.approx(expected, abs=0.05)
        evidence(
            "foundations/behaviour_cloning",
            f"Slope of the cost against T: off the path it {name}" if "labels" not in name else
            "Slope of the cost against T: labels on its own states",
            value=slope,
            bar=1.05 if expected == 1 else expected - 0.05,
            better="<=" if expected == 1 else ">=",
            note="log-log, from 100 to 1,000 steps; error 1e-4 a step on the path; exact sums.",
            curve={"x": HORIZONS, "y": {"cost": [totals]}},
        )  # fmt: skip
    last = curves["goes on away"][1]
    evidence(
        "foundations/behaviour_cloning",
        "Slope against T where only the last step is scored, never back",
        value=math.log10(last[-1] / last[HORIZONS.index(100)]),
        bar=1.05,
        note="The chance to be off the path at the end: at most T times the error.",
    )
    assert all(chance <= EPSILON * n for chance, n in zip(last, HORIZONS, strict=True))


@pytest.mark.evidence
def test_the_bounds_hold_and_one_is_nearly_reached(evidence):
    """The cost over the bound: T^2 * epsilon for the clone that is lost for ever, u * T * epsilon for the other."""
    table, expert, start, cost = world(original, 400)
    lost = original.costs(table, errs(400, OFF["goes on away"]), start, cost, 1000)
    own = original.costs(table, errs(400, OFF["labels on its own states"]), start, cost, 1000)
    u = original.price_of_a_mistake(table, expert, cost, 1000)
    for name, value in (
        ("T²ε, never back", max(lost[n - 1].item() / (EPSILON * n**2) for n in HORIZONS)),
        ("uTε, labels on its own states", max(own[n - 1].item() / (u * EPSILON * n) for n in HORIZONS)),
    ):
        evidence(
            "foundations/behaviour_cloning",
            f"Largest share of the bound that is reached: {name}",
            value=value,
            bar=1.0,
            note="10 to 1,000 steps, error 1e-4 a step; exact sums. u = 2 steps.",
        )


@pytest.mark.evidence
def test_labels_on_own_states_against_more_demonstrations(evidence):
    """A learner whose hand trembles once in twenty steps: cost of 100 steps, by the number of labels."""
    seeds = SEEDS if evidence.full else SEEDS[:2]
    table, expert, start, cost = world(original, 30)
    found = {"behaviour cloning": [], "DAgger": []}
    for name in found:
        for seed in seeds:
            policies = collect(original, seed, name == "DAgger", rounds=25)
            found[name].append(
                [original.costs(table, original.trembling(p, 0.05), start, cost, 100)[-1].item() for p in policies]
            )
    floor = original.costs(table, original.trembling(expert, 0.05), start, cost, 100)[-1].item()
    labels = [20 * (i + 1) for i in range(25)]
    for name, runs in found.items():
        ends = [run[-1] for run in runs]
        evidence(
            "foundations/behaviour_cloning",
            f"Steps off the path in 100, 500 labels: {name}",
            value=mean(ends),
            bar=floor * 1.5 if name == "DAgger" else floor * 3,
            better="<=" if name == "DAgger" else ">=",
            unit="steps",
            seeds=seeds,
            spread=ends,
            note="One action in twenty is drawn at random, also of those that are right.",
            curve={"x": labels, "y": {"cost": runs}},
        )
    evidence(
        "foundations/behaviour_cloning",
        "Steps off the path in 100: the expert with the same hand",
        value=floor,
        unit="steps",
    )


@pytest.mark.evidence
def test_where_the_world_slips_demonstrations_show_the_way_back(evidence):
    """One step in five slips away, for everybody: 500 labels in episodes of 50 steps, cost beyond the expert's."""
    table, expert, start, cost = world(original, 20, slip=0.2)
    floor = original.costs(table, expert, start, cost, 50)[-1].item()
    seeds = list(range(20)) if evidence.full else SEEDS
    for name in ("behaviour cloning", "DAgger"):
        ends = []
        for seed in seeds:
            options = {"rounds": 10, "episodes": 1, "horizon": 50, "tremble": 0.0, "on_policy": name == "DAgger"}
            generator = torch.Generator().manual_seed(seed)
            policies = original.dagger(table, expert, start, generator=generator, **options)
            ends.append(original.costs(table, policies[-1], start, cost, 50)[-1].item() - floor)
        evidence(
            "foundations/behaviour_cloning",
            f"Excess steps off the path where the world slips, 500 labels: {name}",
            value=mean(ends),
            bar=2.0,
            unit="steps",
            seeds=seeds,
            spread=ends,
            note=f"In 50 steps; the expert spends {floor:.1f} of them off the path.",
        )
    assert all(end > -1e-9 for end in ends)


def test_the_demo_runs(capsys):
    original.main()
    assert "DAgger" in capsys.readouterr().out
