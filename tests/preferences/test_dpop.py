"""DPOP against its paper in explicit loops, its gradient and its fixed points against theory, and its own broken
copies. TRL 1.16 has no DPOP."""

import functools
import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from snippets.preferences import dpo, loop
from snippets.preferences import dpop as original
from snippets.worlds import arithmetic, exact, exact_pairs, trials
from tests.mutation import caught_by, load_mutant
from tests.preferences.losses import (
    DTYPES,
    NEGATIVE,
    NOT_POSITIVE,
    adapter_passes,
    computed_in_float32,
    finite_step,
    no_gradient_to_reference_or_rewards,
    refused,
    rows_are_independent,
    shapes_are_named,
    with_reference,
)

PATH = "snippets/preferences/dpop.py"
SNIPPET = "preferences/dpop"
SETTINGS = [{}, {"beta": 0.1, "lam": 5.0}, {"beta": 1.0, "lam": 0.5}, {"beta": 0.5, "lam": 0.0}]


# The formula, its gradient and its inputs. Each check takes the module, so that broken copies can be put to it.


def check_equation_3_in_loops(dpop):
    for options in SETTINGS:
        beta, lam, four = options.get("beta", 0.3), options.get("lam", 50.0), with_reference(scale=1.0)
        losses, chosen_rewards, rejected_rewards = dpop.dpop_loss(*four, **options)
        for i, (chosen, rejected, ref_chosen, ref_rejected) in enumerate(zip(*(x.tolist() for x in four), strict=True)):
            penalty = lam * max(0.0, math.log(math.exp(ref_chosen) / math.exp(chosen)))
            z = beta * ((chosen - ref_chosen) - (rejected - ref_rejected) - penalty)
            assert losses[i].item() == pytest.approx(-math.log(1 / (1 + math.exp(-z))), rel=1e-9)
            assert chosen_rewards[i].item() == pytest.approx(beta * (chosen - ref_chosen), rel=1e-9)
            assert rejected_rewards[i].item() == pytest.approx(beta * (rejected - ref_rejected), rel=1e-9)


def check_below_the_reference_the_chosen_weighs_more(dpop):
    """d loss / d log pi(chosen) is DPO's, times 1 + lam where the chosen response has fallen below the reference."""
    for options in SETTINGS:
        four = [x.requires_grad_() for x in with_reference(scale=1.0)]
        losses = dpop.dpop_loss(*four, **options)[0]
        losses.sum().backward()
        weight = options.get("beta", 0.3) * -torch.expm1(-losses.detach())  # beta * (1 - sigmoid(z))
        fallen = four[0].detach() < four[2].detach()
        assert 0 < fallen.sum() < len(fallen)
        factor = torch.where(fallen, 1 + options.get("lam", 50.0), 1.0)
        assert_close(four[0].grad, -weight * factor)
        assert_close(four[1].grad, weight)


def check_it_is_dpo_above_the_reference_and_without_lam(dpop):
    four = with_reference()
    above = [torch.maximum(four[0], four[2]), *four[1:]]
    assert_close(dpop.dpop_loss(*above, beta=0.4)[0], dpo.dpo_loss(*above, beta=0.4)[0])
    assert_close(dpop.dpop_loss(*four, beta=0.4, lam=0.0)[0], dpo.dpo_loss(*four, beta=0.4)[0])
    assert_close(dpop.dpop_loss(*four, beta=0.4)[1:], dpo.dpo_loss(*four, beta=0.4)[1:])


def check_the_first_step_is_that_of_dpo(dpop):
    """At the reference itself, the kink: its gradient is taken as 0."""
    for module, options in ((dpop, {"lam": 50.0}), (dpop, {"lam": 1.0})):
        four = [x.requires_grad_() for x in with_reference()]
        losses = module.dpop_loss(four[0], four[1], four[0].detach(), four[1].detach(), beta=0.4, **options)[0]
        losses.sum().backward()
        assert_close(losses, torch.full_like(losses, math.log(2)))
        assert_close(four[0].grad, torch.full_like(four[0], -0.2))
        assert_close(four[1].grad, torch.full_like(four[0], 0.2))


def check_no_gradient_reaches_the_reference_or_the_rewards(dpop):
    no_gradient_to_reference_or_rewards(dpop.dpop_loss, with_reference())


def check_large_numbers_stay_finite(dpop):
    for dtype in DTYPES:
        for options in SETTINGS:
            for chosen, rejected in ((1e4, 0.0), (-1e4, 0.0), (0.0, 1e4), (-1e4, -1e4), (0.0, 0.0)):
                loss = functools.partial(dpop.dpop_loss, **options)
                _, (gradient, *_) = finite_step(loss, (chosen, rejected, 0.0, 0.0), dtype)
                if chosen < 0 and options.get("lam", 50.0) >= 1:
                    assert gradient < 0  # it is lifted, however far it has fallen


def check_the_penalty_has_no_ceiling(dpop):
    """It grows in proportion to the fall, however deep the fall is."""
    fall = torch.tensor([-1.0, -10.0, -100.0, -1000.0], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(4, dtype=torch.float64)
    losses = dpop.dpop_loss(fall, zero, zero, zero, beta=0.5, lam=3.0)[0]
    losses.sum().backward()
    z = 0.5 * (1 + 3.0) * fall.detach()
    assert_close(losses.detach(), torch.log1p(torch.exp(z)) - z)
    assert_close(fall.grad, -0.5 * (1 + 3.0) * torch.sigmoid(-z))


def check_half_precision_is_computed_in_float32(dpop):
    computed_in_float32(dpop.dpop_loss, with_reference(scale=1000.0))


def check_equal_responses_leave_the_penalty(dpop):
    """Their difference is 0; below the reference, both gradients fall on the same response and the penalty lifts it."""
    for start, expected in ((-3.0, -1.0), (-0.5, 0.0)):
        same = torch.tensor([start], requires_grad=True)
        losses = dpop.dpop_loss(same, same, torch.tensor([-1.0]), torch.tensor([-1.0]), beta=0.3, lam=2.0)[0]
        losses.sum().backward()
        assert losses.isfinite().all() and same.grad.sign().item() == expected


def check_a_batch_is_its_pairs_one_by_one(dpop):
    rows_are_independent(dpop.dpop_loss, with_reference(), SETTINGS)


def check_bad_input_is_named(dpop):
    four = with_reference(size=3)
    shapes_are_named(dpop.dpop_loss, four)
    refused(dpop.dpop_loss, four, "beta must be positive and finite", NOT_POSITIVE)
    refused(dpop.dpop_loss, four, "lam must be at least 0 and finite", NEGATIVE)


def check_standstill_is_where_the_gains_of_the_best_cost_too_much(dpop):
    wins = torch.tensor([[0.2, 0.5, 0.8], [0.4, 0.5, 0.6]], dtype=torch.float64)
    assert_close(dpop.standstill(wins), torch.tensor([6.0, 1.0], dtype=torch.float64))


def check_the_adapter_passes_what_is_set(dpop):
    four, method = with_reference(), dpop.algorithm()
    ones = torch.ones(64, dtype=torch.long)
    assert method.reference and (method.settings().beta, method.settings().lam) == (0.1, 5.0)
    pairs = loop.PairLogps(four[0], four[1], ones, ones, four[2], four[3])
    adapter_passes(method, dpop.dpop_loss, pairs, four, beta=0.7, lam=3.0)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_loss(check):
    check(original)


LOSS = "-logsigmoid(beta * (chosen_logratios - rejected_logratios - lam * fallen))"
CHOSEN = "policy_chosen_logps.to(dtype) - ref_chosen_logps.detach().to(dtype)"
MISTAKES = {
    "lam outside of beta": (LOSS, "-logsigmoid(beta * (chosen_logratios - rejected_logratios) - lam * fallen)"),
    "penalty outside of the sigmoid": (
        LOSS,
        "-logsigmoid(beta * (chosen_logratios - rejected_logratios)) + lam * fallen",
    ),
    "penalty added inside": (LOSS, LOSS.replace("- lam", "+ lam")),
    "penalty on the rejected": ("relu(-chosen_logratios)", "relu(-rejected_logratios)"),
    "penalty above the reference": ("relu(-chosen_logratios)", "relu(chosen_logratios)"),
    "penalty on both sides": ("relu(-chosen_logratios)", "(-chosen_logratios).abs()"),
    "penalty without max": ("relu(-chosen_logratios)", "-chosen_logratios"),
    "penalty on log pi, no reference": ("relu(-chosen_logratios)", "relu(-policy_chosen_logps.to(dtype))"),
    "penalty without gradient": ("relu(-chosen_logratios)", "relu(-chosen_logratios).detach()"),
    "another gradient at the kink": ("relu(-chosen_logratios)", "(-chosen_logratios).clamp(min=0)"),
    "half a gradient at the kink": (
        "relu(-chosen_logratios)",
        "torch.maximum(-chosen_logratios, torch.zeros_like(chosen_logratios))",
    ),
    "flipped sign": (LOSS, "-logsigmoid(-beta * (chosen_logratios - rejected_logratios - lam * fallen))"),
    "log(sigmoid)": (LOSS, "-(beta * (chosen_logratios - rejected_logratios - lam * fallen)).sigmoid().log()"),
    "no reference": (CHOSEN, "policy_chosen_logps.to(dtype)"),
    "difference before the upcast": (CHOSEN, "(policy_chosen_logps - ref_chosen_logps.detach()).to(dtype)"),
    "gradient into the reference": ("ref_rejected_logps.detach()", "ref_rejected_logps"),
    "gradient into the rewards": ("beta * chosen_logratios.detach()", "beta * chosen_logratios"),
    "rewards with the penalty": (
        "losses, beta * chosen_logratios.detach()",
        "losses, beta * (chosen_logratios - lam * fallen).detach()",
    ),
    "beta may be 0": ("if not 0 < beta", "if not 0 <= beta"),
    "lam may be negative": ("if not 0 <= lam < math.inf", "if False"),
    "shapes unchecked": ("x.shape != policy_chosen_logps.shape or x.dim() != 1", "False"),
    "standstill at half": ("return 2 * (wins", "return (wins"),
    "standstill without its 1": ("wins.amin(-1) - 1)", "wins.amin(-1))"),
    "penalty with a ceiling": ("relu(-chosen_logratios)", "relu(-chosen_logratios).clamp(max=5.0)"),
    "adapter with the paper's lam as default": ("default=5.0", "default=50.0"),
    "adapter without lam": (", lam=settings.lam", ""),
}


def test_no_check_fails_on_the_original():
    assert caught_by(original, CHECKS) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    """Each deliberate mistake makes at least one check fail."""
    assert caught_by(load_mutant(PATH, *MISTAKES[mistake]), CHECKS)


def test_trl_has_no_dpop():
    """Its DPOTrainer names all its losses where it is given another one."""
    import trl.trainer.dpo_trainer

    source = Path(trl.trainer.dpo_trainer.__file__).read_text(encoding="utf-8")
    named = source[source.index("Should be one of") :][:400]
    assert "'sigmoid'" in named and "'ipo'" in named and "'robust'" in named
    assert "dpop" not in named


# What it is for: the chosen response does not fall


def position_free(world, theta):
    """One softmax for every position: all responses share all parameters. -> (Y,)"""
    return theta.log_softmax(-1)[world.tokens].sum(-1)


@functools.cache
def shared():
    """A policy in which DPO lowers some chosen responses: logits, the gradients' inner products (Y, Y), and the pairs
    (chosen, rejected) that DPO's first step lowers."""
    world = exact.make_world(0)
    theta = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(functools.partial(position_free, world), theta)
    inner = jacobian @ jacobian.T
    speed = inner.diagonal().unsqueeze(1) - inner  # [w, l] = <g_w, g_w - g_l>
    return world, theta, inner, (speed < -1e-3).nonzero().tolist()


def test_which_lam_turns_the_fall():
    """Below the reference d log pi(chosen) / dt = beta * sigmoid(-z) * ((1 + lam) |g_w|^2 - <g_w, g_l>): it rises once
    lam exceeds <g_w, g_l> / |g_w|^2 - 1."""
    world, theta, inner, pairs = shared()
    eta, below = 1e-6, 0.1
    for w, lost in pairs[::10]:
        needed = (inner[w, lost] / inner[w, w] - 1).item()
        assert needed > 0  # DPO, which is lam = 0, lowers it
        for lam in (0.5 * needed, 2 * needed):
            leaf = theta.clone().requires_grad_()
            logps = position_free(world, leaf)
            ref = logps.detach()
            pair = (logps[w : w + 1], logps[lost : lost + 1], ref[w : w + 1] + below, ref[lost : lost + 1] - below)
            losses = original.dpop_loss(*pair, beta=0.5, lam=lam)[0]
            (gradient,) = torch.autograd.grad(losses.sum(), leaf)
            moved = (position_free(world, theta - eta * gradient)[w] - ref[w]).item() / eta
            weight = 0.5 * -torch.expm1(-losses.detach()).item()
            assert moved == pytest.approx(weight * ((1 + lam) * inner[w, w] - inner[w, lost]).item(), abs=1e-4)
            assert (moved > 0) == (lam > needed)


@pytest.mark.evidence
def test_the_chosen_response_is_held(evidence):
    """200 steps down each pair alone, with one softmax for all positions, on all pairs that DPO's first step lowers."""
    world, theta, _, pairs = shared()
    (chosen, rejected), ends = torch.tensor(pairs).T, {}

    def logps(leaf):
        """Of chosen and rejected (pairs,), a policy (V,) for each pair."""
        table = leaf.log_softmax(-1)
        return [table.gather(1, world.tokens[which]).sum(-1) for which in (chosen, rejected)]

    ref = logps(theta.repeat(len(pairs), 1))
    for name, lam in (("DPO", 0.0), ("DPOP", 50.0)):
        leaf = theta.repeat(len(pairs), 1).requires_grad_()
        for step in range(200):
            losses = original.dpop_loss(*logps(leaf), *ref, beta=0.1, lam=lam)[0]
            (gradient,) = torch.autograd.grad(losses.sum(), leaf)
            leaf = (leaf - 0.1 * (1 - step / 200) * gradient).detach().requires_grad_()
        changes, others = (x - y for x, y in zip(logps(leaf.detach()), ref, strict=True))
        assert (changes > others).all()  # both learn the order
        ends[name] = changes
        evidence(
            SNIPPET,
            f"Pairs that share all parameters: change of log π(chosen), {name}",
            value=changes.mean(),
            bar=0.0 if name == "DPO" else None,
            better="<",
            unit="nats",
            note=f"{len(pairs)} pairs that DPO's first step lowers, one at a time, 200 steps, β = 0.1"
            + ("." if name == "DPO" else ", λ = 50."),
        )
    assert ends["DPO"].max() < 0
    evidence(
        SNIPPET,
        "Pairs that share all parameters: the deepest fall, DPOP",
        value=ends["DPOP"].min(),
        bar=-0.02,
        better=">=",
        unit="nats",
        note="It oscillates about the kink by less than a step.",
    )


def test_it_is_no_barrier():
    """The penalty stands inside the sigmoid: once the rejected response is low enough, a fallen chosen one is left
    alone."""
    four = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (-0.1, -100.0, 0.0, 0.0)]
    original.dpop_loss(*four, beta=1.0, lam=50.0)[0].sum().backward()
    assert -1e-30 < four[0].grad.item() < 0  # z = -0.1 - 5 + 100
    fresh = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (-0.1, 0.0, 0.0, 0.0)]
    original.dpop_loss(*fresh, beta=1.0, lam=50.0)[0].sum().backward()
    assert fresh[0].grad.item() < -50


def test_rounding_at_the_start_decides_the_weight():
    """A log-ratio of -1e-6 in the place of 0 is below the reference: 1 + lam times the weight of one of +1e-6."""
    chosen = torch.tensor([1e-6, 0.0, -1e-6], requires_grad=True)
    zero = torch.zeros(3)
    original.dpop_loss(chosen, zero, zero, zero, beta=0.3, lam=50.0)[0].sum().backward()
    assert_close(chosen.grad, torch.tensor([-0.15, -0.15, -0.15 * 51]), rtol=1e-4, atol=0)


def test_deterministic_pairs_still_run_away():
    """With the chosen response at the reference or above, it is DPO: the margin is pushed on at every size."""
    margins = torch.tensor([0.0, 1.0, 10.0, 30.0], dtype=torch.float64)
    rejected = (-margins).requires_grad_()
    zero = torch.zeros(4, dtype=torch.float64)
    original.dpop_loss(zero, rejected, zero, zero)[0].sum().backward()
    assert (rejected.grad > 0).all()


# What it costs: the exact world


def expected_loss(world, lam, soft=0.0):
    """DPOP's, or (soft > 0) with a softplus in the place of max, which lies above it by lam * soft * log 2 at most."""

    def loss(pairs):
        four = (pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected)
        if not soft:
            return original.dpop_loss(*four, beta=world.beta, lam=lam)[0]
        chosen, rejected = pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected
        fallen = soft * torch.nn.functional.softplus(-chosen / soft)
        return -torch.nn.functional.logsigmoid(world.beta * (chosen - rejected - lam * fallen))

    return loss


def minimise(world, lam, sampler, steps=300):
    """Through ever sharper softplus, since L-BFGS stops at kinks. The problem is convex in the log-ratios, so its
    minimum is one."""
    logits = world.ref_logits
    for soft in (0.3, 0.03, 0.003, 0.0003):
        start = exact.World(logits, world.rewards, world.beta, world.vocab, world.length)

        def objective(x, soft=soft):
            return exact_pairs.population_loss(world, x, expected_loss(world, lam, soft), sampler)

        logits = exact_pairs.minimise(start, objective, steps)
    return logits


def win_rates(world, sampler):
    X, Y = sampler.shape
    return (exact_pairs.bradley_terry(world).view(X, Y, Y) * sampler.unsqueeze(1)).sum(-1)


def mean(values):
    return sum(values) / len(values)


@pytest.mark.evidence
def test_the_price_is_the_optimum(evidence):
    """Noisy preferences among one pool of responses: each of them is chosen now and then, so the penalty holds all of
    them at the reference, and the mass for the better ones has to come from somewhere."""
    seeds, prompts = (list(range(5)), 4) if evidence.full else ([0], 1)
    distances, drifts = {}, {}
    for lam in (0.0, 1.0, 5.0) if evidence.full else (1.0,):
        distances[lam], drifts[lam] = [], []
        for seed in seeds:
            world = exact.make_world(seed, prompts=prompts)
            logits = minimise(world, lam, world.ref_logps.exp(), steps=300 if evidence.full else 100)
            distances[lam].append(exact.distance(world, logits))
            drifts[lam].append(exact.kl(exact.response_logps(world, logits), world.ref_logps).mean().item())
        evidence(
            SNIPPET,
            f"KL(π‖π*), exact population loss, λ = {lam:g}",
            value=mean(distances[lam]),
            bar=1e-3 if lam == 0 else 0.3,
            better="<=" if lam == 0 else ">",
            unit="nats",
            seeds=seeds,
            spread=distances[lam],
            note="Bradley–Terry labels on pairs from the reference, β = 0.5. λ = 0 is DPO.",
        )
        evidence(
            SNIPPET,
            f"KL(π‖π_ref), exact population loss, λ = {lam:g}",
            value=mean(drifts[lam]),
            unit="nats",
            seeds=seeds,
            spread=drifts[lam],
        )


def test_the_one_sided_derivatives_at_the_reference():
    """Of the expected loss of a pair, with respect to one log-ratio: beta * pi_ref(y) times 1 - 2 g(y) upwards and
    1 - (2 + lam) g(y) downwards, g being the win rate against the reference, a draw counting as a half."""
    world, beta, lam, step = exact.make_world(0, prompts=1), 0.5, 3.0, 1e-6
    ref = world.ref_logps.exp()
    wins, (first, second) = win_rates(world, ref), exact_pairs.all_pairs(ref)

    def loss(ratios):
        pair, zero = exact_pairs.all_pairs(ratios), torch.zeros(125**2, dtype=torch.float64)
        losses = original.dpop_loss(*pair, zero, zero, beta=beta, lam=lam)[0]
        return (2 * first * second * exact_pairs.bradley_terry(world) * losses).sum()

    start = torch.zeros(1, 125, dtype=torch.float64)
    for y in range(0, 125, 25):
        move = start.clone()
        move[0, y] = step
        up, down = (loss(move) - loss(start)) / step, (loss(start) - loss(-move)) / step
        scale, g = beta * ref[0, y], wins[0, y]
        assert (up / scale).item() == pytest.approx((1 - 2 * g).item(), abs=1e-4)
        assert (down / scale).item() == pytest.approx((1 - (2 + lam) * g).item(), abs=1e-4)


@pytest.mark.evidence
def test_from_some_lam_on_nothing_is_learned(evidence):
    """At the reference, along every direction that keeps the sum of probabilities, the one-sided derivative of the
    population loss is at least 0 from `standstill` on, and negative for the best and the worst response below it. The
    loss is convex in the log-ratios: so the reference is its minimum."""
    limits = []
    for seed in range(5):
        world = exact.make_world(seed)
        ref = world.ref_logps
        wins = win_rates(world, ref.exp())
        limit = original.standstill(wins)  # (X,)
        limits.append(limit.max().item())
        if seed and not evidence.full:
            continue
        for x in range(4):
            one = exact.World(world.ref_logits[x : x + 1], world.rewards[x : x + 1], world.beta, 5, 3)
            best, worst = wins[x].argmax().item(), wins[x].argmin().item()

            def slope(direction, lam, one=one):
                """Of the loss along log-ratios (Y,), from the reference."""
                eta = torch.zeros((), dtype=torch.float64)
                values = []
                for step in (0.0, 1e-6):
                    ratios = (step * direction).unsqueeze(0)
                    first, second = exact_pairs.all_pairs(one.ref_logps + ratios)
                    ref_first, ref_second = exact_pairs.all_pairs(one.ref_logps)
                    losses = original.dpop_loss(first, second, ref_first, ref_second, beta=one.beta, lam=lam)[0]
                    u, v = exact_pairs.all_pairs(one.ref_logps.exp())
                    values.append((u * v * exact_pairs.bradley_terry(one) * losses).sum())
                return (values[1] - values[0] + eta).item() / 1e-6

            weights = one.ref_logps.exp()[0]
            move = torch.zeros(125, dtype=torch.float64)
            move[best], move[worst] = 1 / weights[best], -1 / weights[worst]  # keeps the sum of probabilities
            assert slope(move, 0.95 * limit[x].item()) < -1e-4 < 1e-5 < slope(move, 1.05 * limit[x].item())
            generator = torch.Generator().manual_seed(x)
            for _ in range(20):
                move = torch.randn(125, generator=generator, dtype=torch.float64)
                move -= (weights * move).sum()
                assert slope(move, 1.0001 * limit[x].item()) > 0
    evidence(
        SNIPPET,
        "The λ from which on the reference is the minimum",
        value=mean(limits),
        bar=50.0,
        better="<",
        seeds=list(range(5)),
        spread=limits,
        note="The largest of four prompts; Bradley–Terry labels on pairs from the reference. The paper sets λ = 50.",
    )


@pytest.mark.evidence
def test_sampled_pairs_stay_at_the_reference(evidence):
    """The same by gradient descent on sampled pairs, beside DPO on the same pairs."""
    seeds = list(range(5)) if evidence.full else [0]
    for name, lam in (("DPO", 0.0), ("λ = 50", 50.0)):
        drifts = []
        for seed in seeds:
            world = exact.make_world(seed)
            steps = 2000 if evidence.full else 300
            drifts.append(
                trials.exact_preferences(original.algorithm(), world, seed, lam=lam, steps=steps).from_reference
            )
        evidence(
            SNIPPET,
            f"KL(π‖π_ref), sampled pairs, {name}",
            value=mean(drifts),
            bar=None if name == "DPO" else 0.05,
            unit="nats",
            seeds=seeds,
            spread=drifts,
            note="Eight fresh pairs of each prompt a step from the reference, 2,000 steps, β = 0.5.",
        )


@pytest.mark.evidence
def test_where_right_and_wrong_are_apart_it_costs_nothing(evidence):
    """A verifier's labels: some responses are always chosen, the others always rejected. The mass of the wrong ones
    pays for the right ones, so the penalty has next to nothing to forbid. After 200 exact steps of each."""
    world = exact.make_world(0, prompts=1)
    right = (world.rewards > world.rewards.median()).double()
    first, second = exact_pairs.all_pairs(right)
    preference = first * (1 - second)
    ends = []
    for lam in (0.0, 50.0):
        logits = world.ref_logits.clone().requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=0.02)
        for _ in range(200):
            optimizer.zero_grad()
            loss = expected_loss(world, lam)
            exact_pairs.population_loss(world, logits, loss, world.ref_logps.exp(), preference).backward()
            optimizer.step()
        logps = exact.response_logps(world, logits.detach())
        ends.append((logps.exp() * right).sum().item())
    evidence(SNIPPET, "Right and wrong apart: chance of a right response, DPO", value=ends[0], bar=0.9, better=">")
    evidence(SNIPPET, "Right and wrong apart: chance of a right response, λ = 50", value=ends[1], bar=0.9, better=">")


# On a language model


def learn_arithmetic(seed, out, **changes):
    """-> the change of log pi of chosen and rejected, as a mean over the first 256 pairs, and held-out exact match."""
    method = original.algorithm()
    policy, tokenizer = arithmetic.warm_start()
    settings = method.settings(seed=seed, out=str(out), **changes)
    pairs = loop.arithmetic_pairs(policy, tokenizer, settings)
    before = loop.reference_logps(policy, tokenizer, pairs, batch=64)
    loop.train(policy, tokenizer, pairs, method, settings, ref_logps=before)
    after = loop.reference_logps(policy, tokenizer, pairs[:256], batch=64)
    chosen, rejected = ((x - y[:256]).mean().item() for x, y in zip(after, before, strict=True))
    held_out = arithmetic.problems(held_out=True)[: None if settings.steps == 120 else 200]
    return chosen, rejected, arithmetic.greedy_accuracy(policy, tokenizer, held_out)


@pytest.mark.evidence
def test_arithmetic_with_the_beta_that_breaks_dpo(evidence, tmp_path):
    """At beta = 0.1 DPO lowers both responses and unlearns addition (test_dpo.py). With the penalty it does not."""
    seeds = list(range(5)) if evidence.full else [0]
    short = {} if evidence.full else {"steps": 12, "sampled_prompts": 100}
    for lam in (0.0, 5.0, 50.0) if evidence.full else (5.0,):
        runs = [learn_arithmetic(seed, tmp_path / f"{lam}-{seed}", beta=0.1, lam=lam, **short) for seed in seeds]
        for k, what in enumerate(("change of log π(chosen)", "change of log π(rejected)", "exact match at the end")):
            values = [run[k] for run in runs]
            bar = (0.0, None, 0.7 if evidence.full else 0.3)[k] if lam else None
            evidence(
                SNIPPET,
                f"Arithmetic, β = 0.1, λ = {lam:g}: {what}",
                value=mean(values),
                bar=bar,
                better=">",
                unit="" if k == 2 else "nats",
                seeds=seeds,
                spread=values,
                note="Pairs sampled once from the warm start and judged by the verifier, 120 steps. λ = 0 is DPO."
                + (" Of the first 256 pairs that it was trained on." if k < 2 else ""),
            )
