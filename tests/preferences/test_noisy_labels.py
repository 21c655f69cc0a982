"""Flipped labels: what cDPO and robust DPO do to a pair, where each ends up in the exact world as a function of the
rate, what a wrong rate does, what robust costs in variance, and which noise no rate describes."""

import math

import pytest
import torch
from torch.testing import assert_close

from snippets.preferences import dpo, loop
from snippets.worlds import exact, exact_pairs, trials
from tests.mutation import caught_by, load_mutant

SNIPPET = "preferences/dpo"
SEEDS = list(range(5))
METHODS = {
    "DPO": lambda e: {},
    "cDPO": lambda e: {"label_smoothing": e},
    "robust DPO": lambda e: {"label_smoothing": e, "robust": True},
}


def flip(chances, e):
    """The chance that the label says "the first", if a share e of the labels is flipped."""
    return (1 - e) * chances + e * (1 - chances)


def margin_losses(margins, **options):
    """(B,) -> (B,): the loss of pairs at these margins, beta = 1."""
    zero = torch.zeros_like(margins)
    return dpo.dpo_loss(margins, zero, zero, zero, beta=1.0, **options)[0]


def slopes(margins, q, **options):
    """The derivative with respect to the margin of the expected loss, the label saying "the first" with chance q."""
    leaf = margins.clone().requires_grad_()
    loss = q * margin_losses(leaf, **options) + (1 - q) * margin_losses(-leaf, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return gradient


def grid():
    return [(p, e) for p in (0.5, 0.6, 0.9, 0.99) for e in (0.0, 0.1, 0.3, 0.45)]


# The adapter


def check_the_adapter_passes_the_noise(module):
    """label_smoothing and robust reach the loss; the default is plain DPO."""
    generator = torch.Generator().manual_seed(0)
    four = [-10 * torch.rand(8, generator=generator, dtype=torch.float64) for _ in range(4)]
    ones, method = torch.ones(8, dtype=torch.long), module.algorithm()
    pairs = loop.PairLogps(four[0], four[1], ones, ones, *four[2:])
    for options in ({}, {"label_smoothing": 0.2}, {"label_smoothing": 0.2, "robust": True}):
        ours = method.loss(pairs, method.settings(beta=0.7, **options))
        for x, wanted in zip(ours, module.dpo_loss(*four, beta=0.7, **options), strict=True):
            assert_close(x, wanted)


@pytest.mark.parametrize(
    "mistake",
    [
        ("label_smoothing=settings.label_smoothing,", ""),
        ("robust=settings.robust,", ""),
        ("robust: bool = field(default=False", "robust: bool = field(default=True"),
        (
            "label_smoothing: float = field(\n            default=0.0",
            "label_smoothing: float = field(\n            default=0.1",
        ),
    ],
    ids=["no smoothing", "never robust", "robust as default", "smoothing as default"],
)
def test_the_adapter(mistake):
    check_the_adapter_passes_the_noise(dpo)
    assert caught_by(load_mutant("snippets/preferences/dpo.py", *mistake), [check_the_adapter_passes_the_noise])


# One pair


def test_where_each_loss_is_least_for_a_pair():
    """sigmoid(margin) = q for DPO, q flipped once more for cDPO, (q - e) / (1 - 2e) = p for robust DPO."""
    for p, e in grid():
        q = flip(p, e)
        for name, target in (("DPO", q), ("cDPO", flip(q, e)), ("robust DPO", p)):
            best = torch.tensor([math.log(target / (1 - target))], dtype=torch.float64)
            assert slopes(best, q, **METHODS[name](e)).item() == pytest.approx(0.0, abs=1e-12)
            assert slopes(best + 0.1, q, **METHODS[name](e)) > 0 > slopes(best - 0.1, q, **METHODS[name](e))


def test_cdpo_flips_the_labels_a_second_time():
    """Its expected loss on labels with flips e is DPO's on labels with flips e + e - 2 e * e, and cDPO on clean labels
    is DPO on flipped ones: smoothing is noise added on purpose."""
    margins = torch.linspace(-5, 5, 11, dtype=torch.float64)
    for p, e in grid():
        for data in (0.0, e):
            q, more = flip(p, data), flip(flip(p, data), e)
            cdpo = q * margin_losses(margins, label_smoothing=e) + (1 - q) * margin_losses(-margins, label_smoothing=e)
            assert_close(cdpo, more * margin_losses(margins) + (1 - more) * margin_losses(-margins))
        assert flip(flip(p, e), e) == pytest.approx(flip(p, e + e - 2 * e * e))


def test_the_variance_of_the_robust_gradient():
    """The derivative of a labelled pair is sigmoid(m) - T with T = (label - e) / (1 - 2e): mean p, and variance p (1 -
    p), that of clean labels, and e (1 - e) / (1 - 2e)^2 on top, whatever the pair and the policy."""
    margins = torch.linspace(-3, 3, 7, dtype=torch.float64)
    for p, e in grid():
        q, options = flip(p, e), METHODS["robust DPO"](e)
        leaf = margins.clone().requires_grad_()
        (kept,) = torch.autograd.grad(margin_losses(leaf, **options).sum(), leaf)
        (turned,) = torch.autograd.grad(margin_losses(-leaf, **options).sum(), leaf)
        assert_close(kept, torch.sigmoid(margins) - (1 - e) / (1 - 2 * e))
        assert_close(turned, torch.sigmoid(margins) + e / (1 - 2 * e))
        mean = q * kept + (1 - q) * turned
        assert_close(mean, torch.sigmoid(margins) - p)
        variance = q * (kept - mean) ** 2 + (1 - q) * (turned - mean) ** 2
        expected = p * (1 - p) + e * (1 - e) / (1 - 2 * e) ** 2
        assert_close(variance, torch.full_like(variance, expected))
        assert variance[0].item() == pytest.approx(q * (1 - q) / (1 - 2 * e) ** 2)  # noisy DPO's, times 1 / (1 - 2e)^2


def test_a_pair_that_is_seen_once_has_no_robust_minimum():
    """Always the same label: DPO's push fades, robust DPO's tends to e / (1 - 2e) for ever, cDPO's turns around."""
    far = torch.tensor([50.0], dtype=torch.float64)
    for e in (0.05, 0.2, 0.4):
        assert -1e-20 < slopes(far, 1.0).item() < 0
        assert slopes(far, 1.0, **METHODS["robust DPO"](e)).item() == pytest.approx(-e / (1 - 2 * e))
        assert slopes(far, 1.0, **METHODS["cDPO"](e)).item() == pytest.approx(e)


# The exact world


def expected_loss(world, **options):
    def loss(pairs):
        four = (pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected)
        return dpo.dpo_loss(*four, beta=world.beta, **options)[0]

    return loss


def population_loss(world, logits, preference, **options):
    sampler = exact_pairs.samplers(world)["all responses evenly"]
    return exact_pairs.population_loss(world, logits, expected_loss(world, **options), sampler, preference)


def minimise(world, preference, steps=800, **options):
    return exact_pairs.minimise(world, lambda x: population_loss(world, x, preference, **options), steps)


def mean(values):
    return sum(values) / len(values)


def worlds(evidence):
    return [exact.make_world(seed, prompts=4 if evidence.full else 1) for seed in (SEEDS if evidence.full else [0])]


@pytest.mark.evidence("preferences/dpo")
def test_where_each_ends_up_as_the_rate_grows(evidence):
    rates = (0.0, 0.1, 0.2, 0.3, 0.4) if evidence.full else (0.2,)
    found = {name: {e: [] for e in rates} for name in METHODS}
    for world in worlds(evidence):
        clean = exact_pairs.bradley_terry(world)
        for e in rates:
            for name, options in METHODS.items():
                logits = minimise(world, flip(clean, e), **options(e))
                found[name][e].append(exact.distance(world, logits))
    for name, by_rate in found.items():
        for e, values in by_rate.items():
            robust = name == "robust DPO" or e == 0
            evidence(
                SNIPPET,
                f"Noisy labels: KL(π‖π*) at a rate of {e:g}, {name}",
                value=mean(values),
                bar=1e-6 if robust else None,
                unit="nats",
                seeds=SEEDS[: len(values)],
                spread=values,
                note="Minimum of the exact population loss, told the true rate; β = 0.5, even pairs.",
            )
    for e in rates[1:] if evidence.full else rates:
        assert all(x < y for x, y in zip(found["DPO"][e], found["cDPO"][e], strict=True))


@pytest.mark.evidence("preferences/dpo")
def test_an_assumed_rate_that_is_too_low_repairs_in_part(evidence):
    """A fifth is flipped; robust DPO is told less."""
    for assumed in (0.1, 0.15):
        values = []
        for world in worlds(evidence):
            noisy = flip(exact_pairs.bradley_terry(world), 0.2)
            values.append(exact.distance(world, minimise(world, noisy, **METHODS["robust DPO"](assumed))))
        evidence(
            SNIPPET,
            f"Noisy labels: KL(π‖π*) at a rate of 0.2, robust DPO told {assumed:g}",
            value=mean(values),
            unit="nats",
            seeds=SEEDS[: len(values)],
            spread=values,
        )
        assert 0.01 < mean(values) < 0.5


def upset_rates(world, preference):
    """(X, Y - 1): for each k, how often one of the k best responses loses against one of the others."""
    X, Y = world.rewards.shape
    order = world.rewards.argsort(-1, descending=True)
    rows = []
    for x in range(X):
        table = preference.view(X, Y, Y)[x][order[x]][:, order[x]]
        rows.append(torch.stack([1 - table[:k, k:].mean() for k in range(1, Y)]))
    return torch.stack(rows)


@pytest.mark.evidence("preferences/dpo")
def test_an_assumed_rate_that_is_too_high_has_no_minimum(evidence):
    """Push a set S of responses up by t against the rest: robust DPO's loss changes at the rate of (upsets - e) / (1 -
    2e) as t grows, where upsets is how often a member of S loses against a non-member. So there is a minimum only if
    the assumed e is below that for every S. With pairs drawn evenly the worst S are the k best responses."""
    limits, clean_limits = [], []
    for world in [exact.make_world(seed) for seed in SEEDS]:
        clean = exact_pairs.bradley_terry(world)
        limits.append(upset_rates(world, flip(clean, 0.2)).min().item())
        clean_limits.append(upset_rates(world, clean).min().item())
    world = exact.make_world(0, prompts=1)
    noisy = flip(exact_pairs.bradley_terry(world), 0.2)
    rates = upset_rates(world, noisy)
    limit, k = rates.min().item(), rates.argmin().item() + 1
    up = torch.zeros(1, 125, dtype=torch.float64)
    up[0, world.rewards[0].argsort(descending=True)[:k]] = 1.0
    for assumed in (limit - 0.02, limit + 0.02):
        options, values = METHODS["robust DPO"](assumed), []
        for t in (400.0, 500.0):
            logits = exact.logits_of(world, (world.ref_logps + t * up).log_softmax(-1))
            values.append(population_loss(world, logits, noisy, **options).item())
        share = 2 * k * (125 - k) / 125**2  # of pairs across the cut
        slope = share * world.beta * (limit - assumed) / (1 - 2 * assumed)
        assert (values[1] - values[0]) / 100 == pytest.approx(slope, rel=1e-3)
    inside = minimise(world, noisy, **METHODS["robust DPO"](limit - 0.03))
    assert exact.distance(world, inside) < 3  # far out, but there
    common = {"seeds": SEEDS, "note": "The smallest of four prompts; pairs from all responses evenly."}
    evidence(
        SNIPPET,
        "Noisy labels: the assumed rate from which robust DPO has no minimum, true rate 0.2",
        value=mean(limits),
        bar=0.2,
        better=">",
        spread=limits,
        **common,
    )
    evidence(
        SNIPPET,
        "Noisy labels: the assumed rate from which robust DPO has no minimum, no flips",
        value=mean(clean_limits),
        bar=0.0,
        better=">",
        spread=clean_limits,
        **common,
    )


@pytest.mark.evidence("preferences/dpo")
def test_bradley_terry_chance_is_no_flip(evidence):
    """Clean Bradley-Terry labels contradict each other already. Who takes that for flips and corrects it overshoots."""
    values = []
    for world in worlds(evidence):
        clean = exact_pairs.bradley_terry(world)
        values.append(exact.distance(world, minimise(world, clean, **METHODS["robust DPO"](0.03))))
    evidence(
        SNIPPET,
        "Noisy labels: KL(π‖π*) with no flips, robust DPO told 0.03",
        value=mean(values),
        bar=0.01,
        better=">",
        unit="nats",
        seeds=SEEDS[: len(values)],
        spread=values,
    )


@pytest.mark.evidence("preferences/dpo")
def test_few_pairs_turn_the_order_around(evidence):
    """500 pairs a prompt, a fifth of their labels flipped, gone through again and again: the variance decides. Robust
    DPO has no minimum there and leaves furthest; cDPO, the most biased, has one and stays nearest."""
    e, pairs, steps = 0.2, 500 if evidence.full else 100, 1000 if evidence.full else 300
    ends = {name: [] for name in METHODS}
    for seed in SEEDS if evidence.full else [0]:
        world = exact.make_world(seed)
        noisy = flip(exact_pairs.bradley_terry(world), e)
        generator = torch.Generator().manual_seed(seed)
        chosen, rejected = exact_pairs.sample_labelled(world, pairs, generator, preference=noisy)
        rows = torch.arange(4).repeat_interleave(pairs)
        for name, options in METHODS.items():
            logits = world.ref_logits.clone().requires_grad_()
            optimizer = torch.optim.Adam([logits], lr=0.02)
            for _ in range(steps):
                optimizer.zero_grad()
                batch = exact_pairs.pair_logps(world, logits, rows, chosen.flatten(), rejected.flatten())
                expected_loss(world, **options(e))(batch).mean().backward()
                optimizer.step()
            ends[name].append(exact.distance(world, logits))
    for name, values in ends.items():
        evidence(
            SNIPPET,
            f"Noisy labels: KL(π‖π*) after 1,000 steps on 500 fixed pairs a prompt, rate 0.2, {name}",
            value=mean(values),
            unit="nats",
            seeds=SEEDS[: len(values)],
            spread=values,
        )
    assert mean(ends["cDPO"]) < mean(ends["DPO"]) < mean(ends["robust DPO"])


@pytest.mark.evidence("preferences/dpo")
def test_fresh_pairs(evidence):
    """Fresh labels at every step: each goes where its population loss leads, robust DPO the slowest."""
    ends, e = {name: [] for name in METHODS}, 0.2
    budget = {"steps": 4000, "pairs": 32} if evidence.full else {"steps": 600, "pairs": 8}
    for seed in SEEDS if evidence.full else [0]:
        world = exact.make_world(seed)
        noisy = flip(exact_pairs.bradley_terry(world), e)
        for name, options in METHODS.items():
            trial = trials.exact_preferences(dpo.algorithm(), world, seed, preference=noisy, **budget, **options(e))
            ends[name].append(trial.to_optimum)
    for name, values in ends.items():
        evidence(
            SNIPPET,
            f"Noisy labels: KL(π‖π*) with fresh pairs at a rate of 0.2, {name}",
            value=mean(values),
            bar=(0.15 if evidence.full else 1.0) if name == "robust DPO" else None,
            unit="nats",
            seeds=SEEDS[: len(values)],
            spread=values,
            note="128 pairs a step from the reference, 4,000 steps.",
        )
    assert mean(ends["robust DPO"]) < mean(ends["DPO"]) < mean(ends["cDPO"])


# Noise that is no coin


def flagged(world):
    """(X, Y), 1 or 0: a feature of the response that has nothing to do with its reward; say, it is long."""
    generator = torch.Generator().manual_seed(17)
    return (torch.rand(world.rewards.shape, generator=generator) < 0.5).double()


def test_a_common_taste_is_learned_as_reward():
    """Annotators who add b to whatever is long, sigmoid(r_1 - r_2 + b (f_1 - f_2)), are Bradley-Terry with another
    reward. DPO finds its optimum to the last digit; nothing in the labels tells it from the truth."""
    world = exact.make_world(0, prompts=1)
    taste = world.rewards + 1.5 * flagged(world)
    first, second = exact_pairs.all_pairs(taste)
    logits = minimise(world, torch.sigmoid(first - second))
    assert (
        exact.kl(exact.response_logps(world, logits), exact.optimal_policy(world.ref_logps, taste, 0.5)).mean() < 1e-6
    )
    assert exact.distance(world, logits) > 0.2


@pytest.mark.evidence("preferences/dpo")
def test_flips_in_one_direction_need_two_rates(evidence):
    """Between a long and a short response the label is flipped with chance 0.15 if the short one should win, and never
    if the long one should; other pairs are clean. Robust DPO with the true share of flips does not reach pi*. With the
    two rates in the place of the one it does: the label (z - b) / (1 - a - b), as in learning with class-conditional
    noise."""
    a, b = 0.0, 0.15  # chances of a flip, if the long one should win and if the short one should
    one_rate, plain = [], []
    for world in worlds(evidence):
        clean = exact_pairs.bradley_terry(world)
        long_first, long_second = exact_pairs.all_pairs(flagged(world))
        mixed = long_first != long_second
        toward = torch.where(long_first == 1, clean * (1 - a) + (1 - clean) * b, clean * (1 - b) + (1 - clean) * a)
        noisy = torch.where(mixed, toward, clean)
        truly = torch.where(long_first == 1, 1 - clean, clean)  # the chance that the short one should win
        share = torch.where(mixed, b * truly, 0.0).mean().item()
        plain.append(exact.distance(world, minimise(world, noisy)))
        one_rate.append(exact.distance(world, minimise(world, noisy, **METHODS["robust DPO"](share))))

        def two_rates(logits, world=world, noisy=noisy, mixed=mixed, long_first=long_first):
            """The soft label (z - b) / (1 - a - b), z = 1 for "the long one", weights right and wrong outcome."""
            pairs = exact_pairs.every_pair(world, logits)
            four = (pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected)
            turned = (pairs.rejected, pairs.chosen, pairs.ref_rejected, pairs.ref_chosen)
            right, wrong = (dpo.dpo_loss(*x, beta=world.beta)[0] for x in (four, turned))
            missed = torch.where(long_first == 1, b, a)  # the rate of flips towards the first response
            label = torch.where(mixed, (noisy - missed) / (1 - a - b), noisy)
            return (label * right + (1 - label) * wrong).mean()

        assert exact.distance(world, exact_pairs.minimise(world, two_rates, 800)) < 1e-6
    for name, values in (("DPO", plain), ("robust DPO told the share of flips", one_rate)):
        evidence(
            SNIPPET,
            f"Noisy labels: KL(π‖π*), flips in one direction, {name}",
            value=mean(values),
            bar=0.005,
            better=">",
            unit="nats",
            seeds=SEEDS[: len(values)],
            spread=values,
            note="Flipped with chance 0.15 where a short response should beat a long one. β = 0.5.",
        )
