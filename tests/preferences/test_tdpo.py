"""TDPO against explicit loops from the paper and the authors' code, the optimum of each variant in the exact world, and
its own broken copies. TRL 1.16 has no TDPO."""

import copy
import functools
import math

import pytest
import torch
from torch.testing import assert_close

from snippets.preferences import dpo, loop
from snippets.preferences import tdpo as original
from snippets.worlds import exact, exact_pairs, trials
from tests.mutation import caught_by, load_mutant
from tests.preferences.losses import (
    DTYPES,
    NEGATIVE,
    NOT_POSITIVE,
    PAIRS,
    adapter_passes,
    computed_in_float32,
    finite_step,
    no_gradient_to_reference_or_rewards,
    refused,
    rows_are_independent,
    shapes_are_named,
)
from tests.trainers import tiny

PATH = "snippets/preferences/tdpo.py"
SNIPPET = "preferences/tdpo"
SETTINGS = [{}, {"variant": 1}, {"beta": 0.5, "alpha": 2.0}, {"beta": 0.3, "alpha": 0.0}]


def numbers(seed=0, size=64, scale=10.0, dtype=torch.float64):
    """Policy chosen, policy rejected, reference chosen, reference rejected, and the two KLs."""
    generator = torch.Generator().manual_seed(seed)
    six = [-scale * torch.rand(size, generator=generator, dtype=torch.float64) for _ in range(4)]
    six += [scale / 2 * torch.rand(size, generator=generator, dtype=torch.float64) for _ in range(2)]
    return [x.to(dtype) for x in six]


def full_logps(seed=0, shape=(3, 4, 7), dtype=torch.float64):
    """Reference and policy over the vocabulary (B, T, V), and a mask with rows of 4, 2 and 1 tokens."""
    generator = torch.Generator().manual_seed(seed)
    ref, policy = (2 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0]])
    return ref.log_softmax(-1).to(dtype), policy.log_softmax(-1).to(dtype), mask


# The formula, its gradient and its inputs. Each check takes the module, so that broken copies can be put to it.


def check_both_variants_in_loops(tdpo):
    """With the authors' names: values = log-ratio + position KL, and the two forms of the logits."""
    for options in SETTINGS:
        six = numbers()
        losses, chosen_rewards, rejected_rewards = tdpo.tdpo_loss(*six, **options)
        beta, alpha = options.get("beta", 0.1), options.get("alpha", 0.5)
        for i, row in enumerate(zip(*(x.tolist() for x in six), strict=True)):
            chosen_logps_margin, rejected_logps_margin = row[0] - row[2], row[1] - row[3]
            chosen_position_kl, rejected_position_kl = row[4:]
            u = beta * (chosen_logps_margin - rejected_logps_margin)
            delta = beta * rejected_position_kl - beta * chosen_position_kl
            z = u - delta if options.get("variant") == 1 else u - alpha * delta
            assert losses[i].item() == pytest.approx(-math.log(1 / (1 + math.exp(-z))), rel=1e-9, abs=1e-12)
            values = beta * (chosen_logps_margin + chosen_position_kl)
            assert chosen_rewards[i].item() == pytest.approx(values, rel=1e-9)
            values = beta * (rejected_logps_margin + rejected_position_kl)
            assert rejected_rewards[i].item() == pytest.approx(values, rel=1e-9)


def check_who_is_pushed_where(tdpo):
    """Both: the rejected response's KL is pushed down. Variant 1: the chosen one's is pushed up. Variant 2: it is not
    touched. In units of beta * sigmoid(-z), which is DPO's weight too."""
    for options in SETTINGS:
        six = [x.requires_grad_() for x in numbers()]
        losses = tdpo.tdpo_loss(*six, **options)[0]
        losses.sum().backward()
        weight = options.get("beta", 0.1) * -torch.expm1(-losses.detach())  # beta * (1 - sigmoid(z))
        first = options.get("variant") == 1
        alpha = 1.0 if first else options.get("alpha", 0.5)
        assert_close(six[0].grad, -weight)
        assert_close(six[1].grad, weight)
        assert_close(six[5].grad, alpha * weight)
        if first:
            assert_close(six[4].grad, -weight)
        else:
            assert six[4].grad is None or (six[4].grad == 0).all()


def check_without_the_kl_it_is_dpo(tdpo):
    six = numbers()
    expected = dpo.dpo_loss(*six[:4], beta=0.4)[0]
    assert_close(tdpo.tdpo_loss(*six, beta=0.4, alpha=0.0)[0], expected)
    zeros = [torch.zeros_like(x) for x in six[4:]]
    for variant in (1, 2):
        losses, *rewards = tdpo.tdpo_loss(*six[:4], *zeros, beta=0.4, variant=variant)
        assert_close(losses, expected)
        assert_close(rewards, list(dpo.dpo_loss(*six[:4], beta=0.4)[1:]))


def check_no_gradient_reaches_the_reference_or_the_rewards(tdpo):
    for variant in (1, 2):
        no_gradient_to_reference_or_rewards(functools.partial(tdpo.tdpo_loss, variant=variant), numbers())


def check_large_numbers_stay_finite(tdpo):
    for dtype in DTYPES:
        for options in SETTINGS:
            for chosen, rejected_kl in ((1e4, 0.0), (-1e4, 0.0), (0.0, 1e4), (-1e4, 1e4), (0.0, 0.0)):
                finite_step(functools.partial(tdpo.tdpo_loss, **options), (chosen, 0, 0, 0, 0, rejected_kl), dtype)


def check_half_precision_is_computed_in_float32(tdpo):
    computed_in_float32(tdpo.tdpo_loss, numbers(scale=1000.0))


def check_equal_responses_have_loss_log_2(tdpo):
    same = [torch.tensor([-3.0]), torch.tensor([-3.0]), torch.tensor([-1.0]), torch.tensor([-1.0])]
    for variant in (1, 2):
        losses = tdpo.tdpo_loss(*same, torch.tensor([2.0]), torch.tensor([2.0]), variant=variant)[0]
        assert losses.item() == pytest.approx(math.log(2))


def check_a_batch_is_its_pairs_one_by_one(tdpo):
    rows_are_independent(tdpo.tdpo_loss, numbers(), SETTINGS)


def check_bad_input_is_named(tdpo):
    six = numbers(size=3)
    shapes_are_named(tdpo.tdpo_loss, six)
    refused(tdpo.tdpo_loss, six, "beta must be .* and finite", NOT_POSITIVE)
    refused(tdpo.tdpo_loss, six, "alpha must be .* and finite", NEGATIVE)
    refused(tdpo.tdpo_loss, six, "variant must be 1 or 2", (3,))


def check_sequential_kl_in_loops(tdpo):
    ref, policy, mask = full_logps()
    kl = tdpo.sequential_kl(ref, policy, mask)
    for b in range(3):
        total = 0.0
        for t in range(4):
            if mask[b, t]:
                for v in range(7):
                    p = math.exp(ref[b, t, v])
                    total += p * (ref[b, t, v].item() - policy[b, t, v].item())
        assert kl[b].item() == pytest.approx(total, rel=1e-9)


def check_its_gradient_is_policy_minus_reference(tdpo):
    """With respect to the policy's logits, at each token of the response; none reaches the reference."""
    ref, policy, mask = full_logps()
    logits = policy.clone().requires_grad_()
    ref = ref.requires_grad_()
    tdpo.sequential_kl(ref, logits.log_softmax(-1), mask).sum().backward()
    assert_close(logits.grad, mask.unsqueeze(-1) * (policy.exp() - ref.detach().exp()))
    assert ref.grad is None


def check_what_is_masked_never_matters(tdpo):
    """Not its value, not NaN, and not in the gradient; a row of nothing gives 0, and so do equal policies."""
    ref, policy, mask = full_logps()
    expected = tdpo.sequential_kl(ref, policy, mask)
    for junk in (math.nan, -math.inf, 1e4):
        spoilt = [torch.where(mask.bool().unsqueeze(-1), x, junk) for x in (ref, policy)]
        spoilt[1].requires_grad_()
        kl = tdpo.sequential_kl(*spoilt, mask)
        assert_close(kl, expected)
        kl.sum().backward()
        assert spoilt[1].grad.isfinite().all() and (spoilt[1].grad[mask == 0] == 0).all()
    assert (tdpo.sequential_kl(ref, policy, torch.zeros_like(mask)) == 0).all()
    assert_close(tdpo.sequential_kl(ref, ref, mask), torch.zeros_like(expected), atol=1e-12, rtol=0)


def check_more_padding_on_either_side_changes_nothing(tdpo):
    ref, policy, mask = full_logps()
    expected = tdpo.sequential_kl(ref, policy, mask)
    more = [torch.nn.functional.pad(x, (0, 0, 2, 3)) for x in (ref, policy)]
    assert_close(tdpo.sequential_kl(*more, torch.nn.functional.pad(mask, (2, 3))), expected)


def check_a_token_that_the_reference_excludes_adds_nothing(tdpo):
    ref, policy, mask = full_logps()
    ref = torch.cat([ref, torch.full((3, 4, 1), -math.inf, dtype=ref.dtype)], -1)
    logits = torch.cat([policy, torch.zeros(3, 4, 1, dtype=ref.dtype)], -1).requires_grad_()
    kl = tdpo.sequential_kl(ref, logits.log_softmax(-1), mask)
    kl.sum().backward()
    assert kl.isfinite().all() and logits.grad.isfinite().all()


def check_large_logits_give_a_finite_kl(tdpo):
    for dtype in (torch.float32, torch.bfloat16):
        ref = torch.tensor([[[1e4, 0.0, -1e4]]]).log_softmax(-1).to(dtype)
        logits = torch.tensor([[[-1e4, 0.0, 1e4]]], requires_grad=True)
        kl = tdpo.sequential_kl(ref, logits.log_softmax(-1).to(dtype), torch.ones(1, 1))
        kl.sum().backward()
        assert kl.dtype == torch.float32 and kl.item() == pytest.approx(2e4, rel=1e-2)
        assert logits.grad.isfinite().all()


def check_bad_shapes_of_the_kl_are_named(tdpo):
    ref, policy, mask = full_logps()
    for changed, message in [
        ((ref, policy[:, :2], mask), r"shapes disagree: \(3, 4, 7\) against \(3, 2, 7\); want \(B, T, V\) for both"),
        ((ref[0], policy[0], mask), r"shapes disagree: \(4, 7\) against \(4, 7\); want \(B, T, V\)"),
        ((ref, policy, mask[:, :3]), r"shapes disagree: mask \(3, 3\) against \(3, 4, 7\); want \(B, T\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            tdpo.sequential_kl(*changed)


def check_the_optimum_improves_on_the_reference_one_token_at_a_time(tdpo):
    """pi(a|s) is proportional to pi_ref(a|s) * exp(E[r | s, a, the reference from there] / beta), by enumeration."""
    world = exact.make_world(0, prompts=2, vocab=3)
    logits = tdpo.tdpo1_optimum(world.ref_logits, world.rewards, 0.7)
    ref = world.ref_logps.exp()
    for x in range(2):
        for prefix in ((), (1,), (2, 0)):
            weights = []
            for a in range(3):
                inside = (world.tokens[:, : len(prefix) + 1] == torch.tensor([*prefix, a])).all(1)
                mean = (ref[x, inside] * world.rewards[x, inside]).sum() / ref[x, inside].sum()
                weights.append(ref[x, inside].sum().item() * math.exp(mean.item() / 0.7))
            row = world.prefixes[(world.tokens[:, : len(prefix)] == torch.tensor(prefix)).all(1).nonzero()[0, 0]]
            for a in range(3):
                expected = math.log(weights[a] / sum(weights))
                assert logits[x, row[len(prefix)], a].item() == pytest.approx(expected, abs=1e-9)
    optimum = (world.ref_logits, world.rewards)
    refused(tdpo.tdpo1_optimum, optimum, "beta must be positive and finite", NOT_POSITIVE)


def check_the_adapter_passes_what_is_set(tdpo):
    six, method = numbers(), tdpo.algorithm()
    assert method.vocab_kl and method.reference and not method.mismatched
    assert (method.settings().variant, method.settings().alpha) == (2, 0.5)  # the authors' function's defaults
    ones = torch.ones(64, dtype=torch.long)
    pairs = loop.PairLogps(six[0], six[1], ones, ones, six[2], six[3], six[4], six[5])
    for options in ({"variant": 1, "beta": 0.3}, {"variant": 2, "alpha": 0.9, "beta": 0.7}):
        adapter_passes(method, tdpo.tdpo_loss, pairs, six, **options)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_loss(check):
    check(original)


FIRST, SECOND = "delta = rejected_kl - chosen_kl\n", "delta = alpha * (rejected_kl - chosen_kl.detach())"
MARGIN = "beta * (chosen_logratios - rejected_logratios - delta)"
KL = "torch.where(probs > 0, probs * (ref - policy), 0.0).sum((-2, -1))"
MISTAKES = {
    "delta added": (MARGIN, "beta * (chosen_logratios - rejected_logratios + delta)"),
    "delta not scaled by beta": (MARGIN, "beta * (chosen_logratios - rejected_logratios) - delta"),
    "variant 1 with the sign of delta turned": (FIRST, "delta = chosen_kl - rejected_kl\n"),
    "variant 1 with a detach": (FIRST, "delta = rejected_kl - chosen_kl.detach()\n"),
    "variant 2 without its detach": (SECOND, "delta = alpha * (rejected_kl - chosen_kl)"),
    "variant 2 detaches the rejected": (SECOND, "delta = alpha * (rejected_kl.detach() - chosen_kl)"),
    "variant 2 detaches both": (SECOND, "delta = alpha * (rejected_kl - chosen_kl).detach()"),
    "variant 2 without alpha": (SECOND, "delta = rejected_kl - chosen_kl.detach()"),
    "alpha on one of the two": (SECOND, "delta = alpha * rejected_kl - chosen_kl.detach()"),
    "the variants exchanged": ("if variant == 1:", "if variant == 2:"),
    "rewards without the KL": ("(chosen_logratios + chosen_kl).detach()", "chosen_logratios.detach()"),
    "rewards with the KL subtracted": ("(rejected_logratios + rejected_kl)", "(rejected_logratios - rejected_kl)"),
    "gradient into the rewards": ("(chosen_logratios + chosen_kl).detach()", "(chosen_logratios + chosen_kl)"),
    "gradient into the reference": ("ref_rejected_logps.detach()", "ref_rejected_logps"),
    "no reference": ("policy_chosen_logps.to(dtype) - ref_chosen_logps.detach().to(dtype)", "policy_chosen_logps"),
    "log(sigmoid)": ("-logsigmoid(", "-torch.log(torch.sigmoid("),
    "beta may be 0": (
        'if not 0 < beta < math.inf:\n        raise ValueError(f"beta must be positive and finite, got {beta}: at 0',
        'if not 0 <= beta < math.inf:\n        raise ValueError(f"beta must be positive and finite, got {beta}: at 0',
    ),
    "beta of the optimum unchecked": (
        'if not 0 < beta < math.inf:\n        raise ValueError(f"beta must be positive and finite, got {beta}")',
        "pass",
    ),
    "a negative alpha": ("if not 0 <= alpha < math.inf", "if False"),
    "any variant": ("if variant not in (1, 2)", "if False"),
    "shapes unchecked": ("x.shape != policy_chosen_logps.shape or x.dim() != 1", "False"),
    "reverse KL": ("probs = ref.exp()", "ref, policy = policy, ref; probs = ref.exp()"),
    "KL at the tokens that stand there": (KL, "torch.where(probs > 0, ref - policy, 0.0).sum((-2, -1))"),
    "KL as a mean over tokens": (KL, "torch.where(probs > 0, probs * (ref - policy), 0.0).sum(-1).mean(-1)"),
    "KL with its sign turned": (KL, "torch.where(probs > 0, probs * (policy - ref), 0.0).sum((-2, -1))"),
    "mask multiplied": ("torch.where(valid, policy_logps.to(dtype), 0.0)", "valid * policy_logps.to(dtype)"),
    "mask left out": ("valid = mask.bool().unsqueeze(-1)", "valid = torch.ones_like(mask).bool().unsqueeze(-1)"),
    "KL in half precision": (
        "dtype = torch.float64 if policy_logps.dtype == torch.float64 else torch.float32",
        "dtype = policy_logps.dtype",
    ),
    "minus infinity in the reference": (KL, "(probs * (ref - policy)).sum((-2, -1))"),
    "gradient into the reference's KL": ("ref_logps.detach().to(dtype), 0.0", "ref_logps.to(dtype), 0.0"),
    "optimum with a soft value": ("(last.exp() * q).sum(-1)", "beta * (last + q / beta).logsumexp(-1)"),
    "optimum that values its own policy": ("(last.exp() * q)", "((last + q / beta).softmax(-1) * q)"),
    "optimum without beta": ("levels.insert(0, last + q / beta)", "levels.insert(0, last + q)"),
    "adapter with variant 1 as default": ("field(default=2, metadata", "field(default=1, metadata"),
    "adapter with another alpha": ("field(default=0.5, metadata", "field(default=1.0, metadata"),
    "adapter without alpha": ('"alpha": settings.alpha, ', ""),
    "adapter exchanges the KLs": ("pairs.chosen_kl, pairs.rejected_kl", "pairs.rejected_kl, pairs.chosen_kl"),
}


def test_no_check_fails_on_the_original():
    assert caught_by(original, CHECKS) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    """Each deliberate mistake makes at least one check fail."""
    old, new = MISTAKES[mistake]
    if mistake == "log(sigmoid)":  # one more bracket to close
        old, new = (
            "-logsigmoid(beta * (chosen_logratios - rejected_logratios - delta))",
            f"-torch.log({MARGIN}.sigmoid())",
        )
    assert caught_by(load_mutant(PATH, old, new), CHECKS)


def test_trl_has_no_tdpo():
    """So the oracles are explicit loops and enumeration."""
    import trl

    assert not [name for name in dir(trl) if "tdpo" in name.lower()]


# Where the loss leads: the exact world


def expected_loss(**options):
    def loss(pairs):
        four = (pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected)
        return original.tdpo_loss(*four, pairs.chosen_kl, pairs.rejected_kl, **options)[0]

    return loss


def gradient(world, logits, sampler, **options):
    """Of the population loss; the loss of variant 2 has a detach in it, so this field has no potential."""
    leaf = logits.detach().clone().requires_grad_()
    loss = expected_loss(beta=world.beta, **options)
    exact_pairs.population_loss(world, leaf, loss, sampler).backward()
    return leaf.grad


@functools.cache
def rest(seed, prompts, name, alpha, steps):
    """Where exact gradients of variant 2 come to rest: Adam, since a line search needs a potential."""
    world = exact.make_world(seed, prompts=prompts)
    sampler = exact_pairs.samplers(world)[name]
    logits = world.ref_logits.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        logits.grad = gradient(world, logits, sampler, alpha=alpha)
        optimizer.step()
    return world, sampler, logits.detach()


def nats(world, logits, other):
    return exact.kl(exact.response_logps(world, logits), other).mean().item()


def mean(values):
    return sum(values) / len(values)


def worlds(evidence):
    return (list(range(5)), 4) if evidence.full else ([0], 1)


def test_the_worlds_own_kl_is_this_one():
    """What exact_pairs and the loop pass on is `sequential_kl`; averaged over responses of the reference, it is the KL
    of whole responses, KL(pi_ref || pi), by the chain rule."""
    world = exact.make_world(0)
    logits = world.ref_logits + torch.randn(world.ref_logits.shape, generator=torch.Generator().manual_seed(0))
    ref, policy = (x.log_softmax(-1)[:, world.prefixes] for x in (world.ref_logits, logits))  # (X, Y, T, V)
    ones = torch.ones(125, 3)
    ours = torch.stack([original.sequential_kl(ref[x], policy[x], ones) for x in range(4)])
    assert_close(ours, exact_pairs.vocab_kl(world, logits))
    whole = exact.kl(world.ref_logps, exact.response_logps(world, logits))
    assert_close((world.ref_logps.exp() * ours).sum(-1), whole)


@pytest.mark.evidence
def test_variant_1_reaches_its_own_optimum(evidence):
    """The population loss is least at pi_ref * exp(Q_ref / beta), prefix by prefix: one step of policy improvement on
    the reference, not the optimum of RLHF."""
    seeds, prompts = worlds(evidence)
    reached, distances, shares, forward, soft = [], [], [], [], []
    for seed in seeds:
        world = exact.make_world(seed, prompts=prompts)
        closed = original.tdpo1_optimum(world.ref_logits, world.rewards, world.beta)
        closed_logps = exact.response_logps(world, closed)
        loss = expected_loss(beta=world.beta, variant=1)
        for sampler in exact_pairs.samplers(world).values():
            objective = functools.partial(exact_pairs.population_loss, world, loss=loss, sampler=sampler)
            logits = exact_pairs.minimise(world, objective, steps=2000)
            reached.append(nats(world, logits, closed_logps))
        distances.append(exact.distance(world, closed))
        shares.append(trials.judge(world, closed, []).share)
        forward.append(exact.kl(world.ref_logps, closed_logps).mean().item())
        best = exact.optimal_policy(world.ref_logps, world.rewards, world.beta)
        soft.append(exact.kl(world.ref_logps, best).mean().item())
    common = {"seeds": seeds, "unit": "nats"}
    evidence(
        SNIPPET,
        "TDPO1: KL to its own optimum, exact population loss",
        value=max(reached),
        bar=0.01,
        spread=reached,
        note="The largest of the worlds and of two samplers of pairs; β = 0.5, L-BFGS in float64.",
        **common,
    )
    evidence(
        SNIPPET,
        "TDPO1: KL(π‖π*) at its optimum",
        value=mean(distances),
        bar=0.1,
        better=">",
        spread=distances,
        note="In closed form. π* is DPO's optimum at the same β = 0.5.",
        **common,
    )
    evidence(
        SNIPPET,
        "TDPO1: share of the optimal objective at its optimum",
        value=mean(shares),
        bar=1.0,
        better="<",
        spread=shares,
        note="Of what E[r] − 0.5 KL can gain over the reference.",
        seeds=seeds,
    )
    evidence(SNIPPET, "TDPO1: KL(π_ref‖π) at its optimum", value=mean(forward), spread=forward, **common)
    evidence(SNIPPET, "DPO: KL(π_ref‖π) at its optimum", value=mean(soft), spread=soft, **common)


def test_implicit_rewards_of_variant_1_are_absolute():
    """At the optimum beta * (log-ratio + sequential KL) is r minus the reference's mean reward: the KL fixes the term
    of the prompt that DPO leaves open. Token by token it is the reference's advantage."""
    world = exact.make_world(0)
    closed = original.tdpo1_optimum(world.ref_logits, world.rewards, world.beta)
    pairs = exact_pairs.every_pair(world, closed)
    four = (pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected)
    _, rewards, _ = original.tdpo_loss(*four, pairs.chosen_kl, pairs.rejected_kl, beta=world.beta, variant=1)
    baseline = (world.ref_logps.exp() * world.rewards).sum(-1, keepdim=True)
    assert_close(rewards, exact_pairs.all_pairs(world.rewards - baseline)[0])
    ref, policy = world.ref_logits.log_softmax(-1), closed.log_softmax(-1)
    advantages = world.beta * (policy - ref + (ref.exp() * (ref - policy)).sum(-1, keepdim=True))  # (X, N, V)
    assert_close((ref.exp() * advantages).sum(-1), torch.zeros_like(advantages[..., 0]), atol=1e-12, rtol=0)
    last = world.rewards.view(4, 25, 5)  # of the last token: r(y) minus its mean under the reference
    assert_close(advantages[:, -25:], last - (ref[:, -25:].exp() * last).sum(-1, keepdim=True))


def test_with_one_token_variant_1_is_dpo():
    """There is nothing after the first token to value, so mean and log-mean-exp agree."""
    world = exact.make_world(0, length=1, vocab=50)
    closed = original.tdpo1_optimum(world.ref_logits, world.rewards, world.beta)
    assert exact.distance(world, closed) < 1e-12


def prefix_sums(world, table):
    """(X, Y) -> (X, N, V): the sum over the responses that take token a at prefix s."""
    levels = [table.reshape(len(table), world.vocab**t, world.vocab, -1).sum(-1) for t in range(world.length)]
    return torch.cat(levels, 1)


@pytest.mark.evidence
def test_variant_2_rests_where_preference_and_kl_balance(evidence):
    """No potential, but an equation. With e(y) the error of y's win rate, k(y) the weight with which y's KL is pulled,
    and E(s, a), E(s), K(s) their sums over the responses through (s, a) and s, a fixed point has

        pi(a|s) = (E(s, a) + alpha * K(s) * pi_ref(a|s)) / (E(s) + alpha * K(s))."""
    seeds, prompts = worlds(evidence)
    residuals, distances, drifts, firsts, bests = [], [], [], [], []
    for seed in seeds:
        for name in ("the reference", "all responses evenly"):
            world, sampler, logits = rest(seed, prompts, name, 0.5, 2000 if evidence.full else 400)
            logps, kl = exact.response_logps(world, logits), exact_pairs.vocab_kl(world, logits)
            first, second = exact_pairs.all_pairs(logps - world.ref_logps + 0.5 * kl)
            chance = torch.sigmoid(world.beta * (first - second)).view(prompts, 125, 125)
            truth = exact_pairs.bradley_terry(world).view(prompts, 125, 125)
            error = ((truth - chance) * sampler.unsqueeze(1)).sum(-1) * sampler  # (X, Y)
            pull = ((1 - truth) * chance * sampler.unsqueeze(1)).sum(-1) * sampler
            errors, pulls = prefix_sums(world, error), 0.5 * prefix_sums(world, pull).sum(-1, keepdim=True)
            ref = world.ref_logits.softmax(-1)
            balance = (errors + pulls * ref) / (errors.sum(-1, keepdim=True) + pulls)
            residuals.append((balance - logits.softmax(-1)).abs().max().item())
            assert error.abs().sum() > 1e-2  # the preferences are not fitted: they pull against the KL
            if name == "the reference":
                distances.append(exact.distance(world, logits))
                drifts.append(nats(world, logits, world.ref_logps))
                closed = original.tdpo1_optimum(world.ref_logits, world.rewards, world.beta)
                firsts.append(nats(world, closed, world.ref_logps))
                best = exact.optimal_policy(world.ref_logps, world.rewards, world.beta)
                bests.append(exact.kl(best, world.ref_logps).mean().item())
    common = {"seeds": seeds, "unit": "nats"}
    evidence(
        SNIPPET,
        "TDPO2: largest violation of its balance equation at rest",
        value=max(residuals),
        bar=1e-6,
        spread=residuals,
        note="A difference of probabilities, after exact gradients; α = 0.5, β = 0.5, two samplers of pairs.",
        seeds=seeds,
    )
    evidence(
        SNIPPET,
        "TDPO2: KL(π‖π*) at rest",
        value=mean(distances),
        bar=0.1,
        better=">",
        spread=distances,
        note="Pairs from the reference, α = 0.5, β = 0.5.",
        **common,
    )
    for name, values in (("TDPO2, at rest", drifts), ("TDPO1, at its optimum", firsts), ("DPO, at π*", bests)):
        evidence(SNIPPET, f"KL(π‖π_ref): {name}", value=mean(values), spread=values, **common)
    assert all(a < b < c for a, b, c in zip(drifts, firsts, bests, strict=True))


def test_without_the_detach_variant_2_at_alpha_1_is_variant_1():
    """The same value; the gradients differ by the chosen response's KL alone."""
    world = exact.make_world(0, prompts=1)
    sampler = world.ref_logps.exp()
    generator = torch.Generator().manual_seed(0)
    logits = world.ref_logits + torch.randn(world.ref_logits.shape, generator=generator, dtype=torch.float64)
    pairs = exact_pairs.every_pair(world, logits)
    one, two = (expected_loss(beta=world.beta, alpha=1.0, variant=v)(pairs) for v in (1, 2))
    assert_close(one, two)
    apart = gradient(world, logits, sampler, variant=1) - gradient(world, logits, sampler, alpha=1.0)
    leaf = logits.clone().requires_grad_()
    kl = exact_pairs.all_pairs(exact_pairs.vocab_kl(world, leaf))[0]
    first, second = exact_pairs.all_pairs(sampler)
    weights = 2 * first * second * exact_pairs.bradley_terry(world)
    (push,) = torch.autograd.grad((weights * -world.beta * -torch.expm1(-one) * kl).sum(), leaf)
    assert_close(apart, push)


def test_both_variants_at_alpha_0_or_no_drift_start_as_dpo():
    """At the reference both KLs are zero and at their minimum, so the first step of either variant is DPO's."""
    world = exact.make_world(0, prompts=1)
    sampler = world.ref_logps.exp()
    first = gradient(world, world.ref_logits, sampler, alpha=0.0)
    for options in ({"variant": 1}, {"alpha": 0.5}, {"alpha": 5.0}):
        assert_close(gradient(world, world.ref_logits, sampler, **options), first)


@pytest.mark.evidence
def test_sampled_pairs_reach_it(evidence):
    seeds, ends = list(range(5)) if evidence.full else [0], {1: [], 2: []}
    budget = {"steps": 4000, "pairs": 32} if evidence.full else {"steps": 400, "pairs": 8}
    for seed in seeds:
        world = exact.make_world(seed)
        leads = {
            1: original.tdpo1_optimum(world.ref_logits, world.rewards, world.beta),
            2: rest(seed, 4, "the reference", 0.5, 2000 if evidence.full else 400)[2],
        }
        for variant, logits in leads.items():
            trial = trials.exact_preferences(original.algorithm(), world, seed, variant=variant, **budget)
            ends[variant].append(nats(world, trial.logits, exact.response_logps(world, logits)))
    for variant, values in ends.items():
        evidence(
            SNIPPET,
            f"TDPO{variant}: KL to where its exact gradients lead, sampled pairs",
            value=mean(values),
            bar=0.05 if evidence.full else 0.3,
            unit="nats",
            seeds=seeds,
            spread=values,
            note="32 fresh pairs of each prompt a step from the reference, 4,000 steps, β = 0.5.",
        )


# In the shared loop


def test_the_loop_passes_the_kl_of_this_file():
    """On a model: the loop's chosen_kl and rejected_kl are `sequential_kl` of both models' distributions at the tokens
    of the response, its EOS included and the prompt left out; with the same gradient."""
    policy, tokenizer = tiny(1)
    reference, _ = tiny(0)
    pairs, method = PAIRS, original.algorithm()
    tokens, pad = loop.tokenize_pairs(tokenizer, pairs), tokenizer.pad_token_id
    ref_logps = loop.reference_logps(reference, tokenizer, pairs, batch=4)
    scored = loop.score_pairs(policy, tokens, pad, method, ref_logps=ref_logps, reference=reference)
    ours = []
    for prompt, chosen, rejected in tokens:
        for response in (chosen, rejected):
            ids = torch.tensor([prompt + response])
            ref, mine = (m(input_ids=ids).logits.log_softmax(-1)[:, len(prompt) - 1 : -1] for m in (reference, policy))
            ours.append(original.sequential_kl(ref, mine, torch.ones(1, len(response)))[0])
    chosen, rejected = torch.stack(ours[::2]), torch.stack(ours[1::2])
    assert_close(scored.chosen_kl, chosen, rtol=1e-4, atol=1e-5)
    assert_close(scored.rejected_kl, rejected, rtol=1e-4, atol=1e-5)
    weights = list(policy.parameters())
    ours, theirs = (
        torch.autograd.grad((x[0] - 2 * x[1]).sum(), weights)
        for x in ((chosen, rejected), (scored.chosen_kl, scored.rejected_kl))
    )
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("variant", [1, 2])
def test_a_few_steps_in_the_loop_learn_the_pairs(variant, tmp_path):
    policy, tokenizer = tiny()
    before = copy.deepcopy(policy.state_dict())
    method = original.algorithm()
    settings = method.settings(steps=30, lr=1e-2, batch=4, beta=0.5, variant=variant, out=str(tmp_path))
    history = loop.train(policy, tokenizer, PAIRS, method, settings).history
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert history[-1]["loss"] < 0.3 and history[-1]["accuracy"] == 1.0
    assert any((before[name] != x).any() for name, x in policy.state_dict().items())
