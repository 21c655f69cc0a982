"""DPO against its paper in explicit loops, TRL, the exact world's optimum, and its own broken copies."""

import copy
import functools
import json
import math
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from snippets.preferences import dpo as original
from snippets.preferences import loop
from snippets.worlds import arithmetic, exact, exact_pairs, lm
from tests.mutation import caught_by, load_mutant
from tests.preferences.losses import (
    DTYPES,
    NOT_POSITIVE,
    PAIRS,
    apart,
    computed_in_float32,
    edges_of,
    finite_step,
    no_gradient_to_reference_or_rewards,
    real_loss,
    real_trainer,
    refused,
    rows_are_independent,
    shapes_are_named,
    trl_dpo,
    with_reference,
)
from tests.trainers import QUIET, same_loss_and_gradients, tiny

ROOT = Path(__file__).parents[2]
PATH = "snippets/preferences/dpo.py"
SETTINGS = [{}, {"beta": 0.5}, {"label_smoothing": 0.2}, {"beta": 2.0, "label_smoothing": 0.3, "robust": True}]


# The formula, its gradient and its inputs. Each check takes the module, so that broken copies can be put to it.


def check_equation_7_in_loops(dpo):
    for options in SETTINGS:
        four = with_reference()
        losses, chosen_rewards, rejected_rewards = dpo.dpo_loss(*four, **options)
        beta, e = options.get("beta", 0.1), options.get("label_smoothing", 0.0)
        for i, (chosen, rejected, ref_chosen, ref_rejected) in enumerate(zip(*(x.tolist() for x in four), strict=True)):
            margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
            right, flipped = -math.log(1 / (1 + math.exp(-margin))), -math.log(1 / (1 + math.exp(margin)))
            expected = (1 - e) * right + e * flipped
            if options.get("robust"):
                expected = ((1 - e) * right - e * flipped) / (1 - 2 * e)
            assert losses[i].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
            assert chosen_rewards[i].item() == pytest.approx(beta * (chosen - ref_chosen), rel=1e-12)
            assert rejected_rewards[i].item() == pytest.approx(beta * (rejected - ref_rejected), rel=1e-12)


def check_gradient_is_minus_beta_times_the_chance_of_being_wrong(dpo):
    """d loss / d log pi(chosen) = -beta * sigmoid(-m), and the same with the other sign for the rejected one."""
    four = [x.requires_grad_() for x in with_reference()]
    losses, chosen_rewards, rejected_rewards = dpo.dpo_loss(*four, beta=0.7)
    losses.sum().backward()
    weight = 0.7 * torch.sigmoid(rejected_rewards - chosen_rewards)
    assert_close(four[0].grad, -weight)
    assert_close(four[1].grad, weight)


def check_no_gradient_reaches_the_reference_or_the_rewards(dpo):
    no_gradient_to_reference_or_rewards(dpo.dpo_loss, with_reference())


def check_large_margins_stay_finite(dpo):
    """At a margin of -1e4 the loss is linear: a pair that is utterly wrong teaches with the full weight beta."""
    for dtype in DTYPES:
        for options in SETTINGS:
            for margin in (1e4, 100.0, 0.0, -100.0, -1e4):
                loss = functools.partial(dpo.dpo_loss, **options)
                _, (chosen, rejected, *_) = finite_step(loss, (margin, 0.0, 0.0, 0.0), dtype)
                if margin <= 0:
                    assert chosen.item() < 0 < rejected.item()
    _, (chosen, *_) = finite_step(dpo.dpo_loss, (-1e4, 0.0, 0.0, 0.0), torch.float32)
    assert chosen.item() == pytest.approx(-0.1)


def check_half_precision_is_computed_in_float32(dpo):
    """Near -1000 the neighbours in bf16 are 4 apart: the difference must be taken after the upcast."""
    computed_in_float32(dpo.dpo_loss, with_reference(scale=1000.0))


def check_a_term_of_the_prompt_alone_changes_nothing(dpo):
    """log Z(x), or any f(x) in the reward: added to both log-ratios of a pair, it cancels."""
    four = with_reference()
    shift = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for shifted in ([four[0] + shift, four[1] + shift, *four[2:]], [*four[:2], four[2] + shift, four[3] + shift]):
        assert_close(dpo.dpo_loss(*shifted)[0], dpo.dpo_loss(*four)[0])


def check_the_policy_that_is_the_reference_has_loss_log_2(dpo):
    chosen, rejected, *_ = with_reference()
    losses, chosen_rewards, _ = dpo.dpo_loss(chosen, rejected, chosen, rejected)
    assert_close(losses, torch.full_like(losses, math.log(2)))
    assert (chosen_rewards == 0).all()


def check_a_batch_is_its_pairs_one_by_one(dpo):
    rows_are_independent(dpo.dpo_loss, with_reference(), SETTINGS)


def check_bad_input_is_named(dpo):
    four = with_reference(size=3)
    shapes_are_named(dpo.dpo_loss, four)
    refused(dpo.dpo_loss, four, "beta must be positive and finite", NOT_POSITIVE)
    refused(dpo.dpo_loss, four, r"label_smoothing must lie in \[0, 0.5\)", (-0.1, 0.5, 1.0, math.nan))


def check_cdpo_has_its_minimum_at_a_finite_margin(dpo):
    """At log((1 - e) / e) / beta, where the policy's own odds are those of the labels."""
    for beta, e in ((0.1, 0.1), (0.5, 0.3), (1.0, 0.01)):
        best = math.log((1 - e) / e) / beta
        margins = torch.tensor([best, best - 0.1, best + 0.1, 10 * best], dtype=torch.float64, requires_grad=True)
        zero = torch.zeros(4, dtype=torch.float64)
        losses = dpo.dpo_loss(margins, zero, zero, zero, beta=beta, label_smoothing=e)[0]
        losses.sum().backward()
        assert margins.grad[0].item() == pytest.approx(0.0, abs=1e-12)
        assert margins.grad[1] < 0 < margins.grad[2]
        assert losses[0] == losses.min()


def check_robust_is_unbiased(dpo):
    """Over labels flipped with chance e, its mean is the loss on the true labels, and so is its gradient's."""
    chosen, rejected, ref_chosen, ref_rejected = with_reference()
    chosen.requires_grad_()
    clean = dpo.dpo_loss(chosen, rejected, ref_chosen, ref_rejected)[0]
    for e in (0.0, 0.1, 0.4):
        kept = dpo.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, label_smoothing=e, robust=True)[0]
        flipped = dpo.dpo_loss(rejected, chosen, ref_rejected, ref_chosen, label_smoothing=e, robust=True)[0]
        mean = (1 - e) * kept + e * flipped
        assert_close(mean, clean)
        assert_close(
            torch.autograd.grad(mean.sum(), chosen, retain_graph=True),
            torch.autograd.grad(clean.sum(), chosen, retain_graph=True),
        )
    smooth = dpo.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, label_smoothing=0.4)[0]
    turned = dpo.dpo_loss(rejected, chosen, ref_rejected, ref_chosen, label_smoothing=0.4)[0]
    assert ((0.6 * smooth + 0.4 * turned - clean).abs() > 1e-3).any()  # cDPO is not


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_loss(check):
    check(original)


MARGINS = "margins = beta * (chosen_logratios"
LOSSES = "right, flipped = -logsigmoid(margins), -logsigmoid(-margins)"
CHOSEN = "policy_chosen_logps.to(dtype) - ref_chosen_logps.detach().to(dtype)"
SMOOTH = "(1 - label_smoothing) * right + label_smoothing * flipped"
MISTAKES = {
    "flipped sign": (MARGINS, "margins = -beta * (chosen_logratios"),
    "log(sigmoid)": (LOSSES, "right, flipped = -margins.sigmoid().log(), -(-margins).sigmoid().log()"),
    "log(sigmoid + 1e-8)": (
        "right, flipped = -logsigmoid(margins)",
        "right, flipped = -(margins.sigmoid() + 1e-8).log()",
    ),
    "no reference": (CHOSEN, "policy_chosen_logps.to(dtype)"),
    "difference before the upcast": (CHOSEN, "(policy_chosen_logps - ref_chosen_logps.detach()).to(dtype)"),
    "gradient into the reference": ("ref_rejected_logps.detach()", "ref_rejected_logps"),
    "gradient into the rewards": ("beta * chosen_logratios.detach()", "beta * chosen_logratios"),
    "references swapped": ("- ref_rejected_logps", "- ref_chosen_logps"),
    "no beta": (MARGINS, "margins = (chosen_logratios"),
    "rewards without beta": ("losses, beta * chosen_logratios", "losses, chosen_logratios"),
    "smoothing the wrong way": (SMOOTH, "label_smoothing * right + (1 - label_smoothing) * flipped"),
    "robust without its scale": ("losses = losses / (1 - 2 * label_smoothing)", "losses = losses / 1"),
    "robust that adds": ("right - label_smoothing * flipped", "right + label_smoothing * flipped"),
    "mean over the batch": ("return losses, beta", "return losses.mean().expand_as(losses), beta"),
    "beta may be 0": ("if not 0 < beta", "if not 0 <= beta"),
    "shapes unchecked": ("x.shape != policy_chosen_logps.shape or x.dim() != 1", "False"),
}


def test_no_check_fails_on_the_original():
    assert caught_by(original, CHECKS) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    """Each deliberate mistake makes at least one check fail."""
    assert caught_by(load_mutant(PATH, *MISTAKES[mistake]), CHECKS)


# TRL


def trl_loss(four, loss_type, *, beta=0.1, label_smoothing=0.0, weights=None):
    """Of TRL, and its mean rewards, for responses of one token."""
    mask = torch.tensor([[0, 1]]).expand(2 * len(four[0]), 2)
    settings = {"beta": beta, "label_smoothing": label_smoothing, "loss_weights": weights or [1.0]}
    settings["loss_types"] = loss_type if isinstance(loss_type, list) else [loss_type]
    loss, logged = trl_dpo(torch.cat(four[:2])[:, None], mask, *four[2:], **settings)
    return loss, logged["rewards/chosen"][0], logged["rewards/rejected"][0]


def trl_cdpo(e):
    """TRL 1.16 has no label smoothing for the sigmoid loss, but two of its losses add up to cDPO:
    2 * (1 - e) * sigmoid - (1 - 2e) * robust = (1 - e) * loss(m) + e * loss(-m)."""
    return {"loss_type": ["sigmoid", "robust"], "label_smoothing": e, "weights": [2 * (1 - e), -(1 - 2 * e)]}


ORACLES = {
    "sigmoid": ({}, {"loss_type": "sigmoid"}),
    "robust": ({"label_smoothing": 0.1, "robust": True}, {"loss_type": "robust", "label_smoothing": 0.1}),
    "robust, 0.45": ({"label_smoothing": 0.45, "robust": True}, {"loss_type": "robust", "label_smoothing": 0.45}),
    "cDPO": ({"label_smoothing": 0.1}, trl_cdpo(0.1)),
    "cDPO, 0.4": ({"label_smoothing": 0.4}, trl_cdpo(0.4)),
    "cDPO as aot of one pair": ({"label_smoothing": 0.1}, {"loss_type": "aot", "label_smoothing": 0.1}),
}


@functools.cache
def edges():
    """Random pairs, equal ones, and margins up to 1e4 nats, in float32."""
    rows = [[0.0, 0, 0, 0], [-5, -5, -5, -5], [-1e4, 0, 0, 0], [0, -1e4, 0, 0], [-1e4, -1e4, 0, 0], [-1, -2, -1e4, -3]]
    return edges_of(with_reference, rows)


def difference_from_trl(oracle, beta):
    """The largest difference of a loss or a gradient, relative where they exceed 1."""
    ours, theirs = ORACLES[oracle]
    leaves = [x.clone().requires_grad_() for x in edges()]
    losses, chosen_rewards, rejected_rewards = original.dpo_loss(*leaves, beta=beta, **ours)
    losses.sum().backward()
    others = [x.clone().requires_grad_() for x in edges()]
    worst = []
    for i in range(len(losses)):  # one at a time: TRL gives the mean of a batch
        loss, chosen_reward, rejected_reward = trl_loss([x[i : i + 1] for x in others], beta=beta, **theirs)
        loss.backward()
        worst.append(apart(losses[i], loss))
        worst.append(apart(chosen_rewards[i], chosen_reward))
        worst.append(apart(rejected_rewards[i], rejected_reward))
    for x, other in zip(leaves[:2], others[:2], strict=True):
        worst.append(apart(x.grad, other.grad))
    if "aot" not in theirs["loss_type"]:  # which sorts the batch
        worst.append(apart(losses.mean(), trl_loss(edges(), beta=beta, **theirs)[0]))
    return max(worst)


@pytest.mark.evidence
def test_agrees_with_trl(evidence):
    worst = {oracle: max(difference_from_trl(oracle, beta) for beta in (0.1, 0.5, 3.0)) for oracle in ORACLES}
    for oracle, value in worst.items():
        assert value <= 1e-6, (oracle, value)
    evidence(
        "preferences/dpo",
        "Largest difference from TRL 1.16.0",
        value=max(worst.values()),
        bar=1e-6,
        note="Losses, gradients and rewards in float32; sigmoid, robust and cDPO; margins up to 10,000 nats.",
    )


def test_trl_leaves_label_smoothing_out_of_the_sigmoid_loss():
    """So DPOConfig(loss_type="sigmoid", label_smoothing=0.1) trains plain DPO, without a word."""
    smoothed, plain = (trl_loss(edges(), "sigmoid", label_smoothing=e)[0] for e in (0.1, 0.0))
    assert smoothed == plain
    assert not torch.isclose(original.dpo_loss(*edges(), label_smoothing=0.1)[0].mean(), smoothed)


@pytest.mark.parametrize("oracle", ["sigmoid", "robust", "cDPO"])
def test_agrees_with_trl_on_a_real_model(oracle, tmp_path):
    """Tokens, masks, EOS, sums, reference and loss together: TRL's trainer, its collator and its forward pass."""
    from trl import DPOConfig, DPOTrainer

    ours, theirs = copy.deepcopy(ORACLES[oracle])
    weights, loss_type = theirs.pop("weights", None), theirs.pop("loss_type")
    (policy, tokenizer), (reference, _) = tiny(1), tiny(0)
    loss_type = loss_type if isinstance(loss_type, list) else [loss_type]
    config = DPOConfig(str(tmp_path), beta=0.5, loss_type=loss_type, loss_weights=weights, **theirs, **QUIET)
    trainer = real_trainer(DPOTrainer, config, policy, tokenizer, reference=reference)
    ref = loop.reference_logps(reference, tokenizer, PAIRS, batch=2)
    logps = loop.response_logps(policy, loop.encode_pairs(tokenizer, PAIRS, policy.device))
    loss = original.dpo_loss(*logps, *ref, beta=0.5, **ours)[0].mean()
    same_loss_and_gradients(loss, policy, real_loss(trainer), trainer.model)


# Where the loss leads: the exact world


def expected_loss(world, **options):
    """The population loss of DPO, as exact_pairs wants it."""

    def loss(pairs):
        four = (pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected)
        return original.dpo_loss(*four, beta=world.beta, **options)[0]

    return loss


def population_loss(world, logits, sampler, preference, **options):
    return exact_pairs.population_loss(world, logits, expected_loss(world, **options), sampler, preference)


def minimise(world, sampler, preference, steps=500, **options):
    return exact_pairs.minimise(world, lambda x: population_loss(world, x, sampler, preference, **options), steps)


@pytest.mark.evidence
def test_population_loss_reaches_the_optimum(evidence):
    """Minimised exactly, DPO's expected loss gives the optimum of E[r] - beta * KL, whoever sampled the pairs."""
    seeds = list(range(5)) if evidence.full else [0]
    for name in ("the reference", "all responses evenly"):
        distances, seconds = [], []
        for seed in seeds:
            world = exact.make_world(seed)
            start = time.process_time()
            logits = minimise(world, exact_pairs.samplers(world)[name], exact_pairs.bradley_terry(world), steps=2500)
            seconds.append(time.process_time() - start)
            distances.append(exact.distance(world, logits))
        evidence(
            "preferences/dpo",
            f"KL(π‖π*), exact population loss, pairs from {name}",
            value=max(distances),
            bar=1e-6,
            unit="nats",
            seeds=seeds,
            spread=distances,
            note=f"The largest of the worlds. L-BFGS in float64, at most {max(seconds):.0f} CPU seconds a world.",
        )


def sampled_loss(world, logits, chosen, rejected, **options):
    rows = torch.arange(len(chosen)).repeat_interleave(chosen.shape[1])
    pairs = exact_pairs.pair_logps(world, logits, rows, chosen.flatten(), rejected.flatten())
    return expected_loss(world, **options)(pairs).mean()


def learn_from_samples(world, seed, steps=4000, pairs=32, lr=0.05, every=100):
    """Adam, the rate falling linearly to 0; -> logits and the curve [(step, KL(pi || pi*))]."""
    generator = torch.Generator().manual_seed(seed)
    logits = world.ref_logits.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=lr)
    curve = [(0, exact.distance(world, logits))]
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = lr * (1 - (step - 1) / steps)
        optimizer.zero_grad()
        sampled_loss(world, logits, *exact_pairs.sample_labelled(world, pairs, generator)).backward()
        optimizer.step()
        if step % every == 0:
            curve.append((step, exact.distance(world, logits)))
    return logits.detach(), curve


@pytest.mark.evidence
def test_sampled_pairs_reach_the_optimum(evidence):
    seeds = list(range(5)) if evidence.full else [0]
    curves, seconds = [], []
    for seed in seeds:
        world = exact.make_world(seed)
        start = time.process_time()
        curves.append(learn_from_samples(world, seed)[1])
        seconds.append(time.process_time() - start)
    ends = [curve[-1][1] for curve in curves]
    evidence(
        "preferences/dpo",
        "KL(π‖π*), sampled pairs",
        value=sum(ends) / len(ends),
        bar=0.05,
        unit="nats",
        seeds=seeds,
        spread=ends,
        note=f"128 fresh pairs a step from the reference, 4,000 steps, at most {max(seconds):.1f} CPU seconds a run.",
        curve={
            "x": [step for step, _ in curves[0]],
            "y": {"sampled pairs": [[nats for _, nats in curve] for curve in curves]},
            "xlabel": "step",
            "ylabel": "KL(π‖π*), nats",
        },
    )


def test_the_mean_of_sampled_gradients_is_the_exact_gradient():
    """z-test over all parameters, away from the reference."""
    world = exact.make_world(0)
    generator = torch.Generator().manual_seed(0)
    logits = (world.ref_logits + 0.5 * torch.randn(world.ref_logits.shape, generator=generator)).requires_grad_()
    truth = population_loss(world, logits, world.ref_logps.exp(), exact_pairs.bradley_terry(world))
    (truth,) = torch.autograd.grad(truth, logits)
    samples = []
    for _ in range(2000):
        loss = sampled_loss(world, logits, *exact_pairs.sample_labelled(world, 4, generator))
        samples.append(torch.autograd.grad(loss, logits)[0])
    samples = torch.stack(samples)
    seen = (samples != 0).sum(0) > 500  # where the normal law holds: rare prefixes are too skewed
    z = ((samples.mean(0) - truth) / (samples.std(0) / len(samples) ** 0.5))[seen]
    assert z.numel() > 100
    assert z.square().mean().item() == pytest.approx(1.0, abs=0.4)
    assert z.abs().max() < 4.5


def test_implicit_reward_differences_are_the_true_ones_at_the_optimum():
    """beta * log(pi* / pi_ref) = r - beta * log Z: equal differences within a prompt, another level for each prompt."""
    world = exact.make_world(0)
    optimum = exact.optimal_policy(world.ref_logps, world.rewards, world.beta)
    ref = world.ref_logps
    _, rewards, _ = original.dpo_loss(*[x.flatten() for x in (optimum, optimum, ref, ref)], beta=world.beta)
    offsets = world.rewards - rewards.view_as(ref)
    log_z = torch.logsumexp(ref + world.rewards / world.beta, -1, keepdim=True)
    assert_close(offsets, (world.beta * log_z).expand_as(offsets))
    assert log_z.flatten().diff().abs().min() > 0.01  # so one threshold for all prompts would be wrong


@pytest.mark.parametrize("beta", [0.25, 1.0])
def test_beta_sets_the_optimum(beta):
    world = exact.make_world(0, beta=beta)
    logits = minimise(world, exact_pairs.samplers(world)["all responses evenly"], exact_pairs.bradley_terry(world))
    assert exact.distance(world, logits) < 1e-6
    other = exact.optimal_policy(world.ref_logps, world.rewards, 0.5)
    assert exact.kl(exact.response_logps(world, logits), other).mean() > 0.1


@pytest.mark.evidence
def test_robust_finds_the_clean_optimum_under_flipped_labels(evidence):
    """With a fifth of the labels flipped, plain DPO stops short, cDPO shorter still, and robust DPO reaches pi*."""
    world, e = exact.make_world(0), 0.2
    clean = exact_pairs.bradley_terry(world)
    noisy = (1 - e) * clean + e * (1 - clean)
    sampler = exact_pairs.samplers(world)["all responses evenly"]
    results = {
        "robust DPO": minimise(world, sampler, noisy, label_smoothing=e, robust=True),
        "DPO": minimise(world, sampler, noisy),
        "cDPO": minimise(world, sampler, noisy, label_smoothing=e),
    }
    nats = {name: exact.distance(world, logits) for name, logits in results.items()}
    for name, value in nats.items():
        evidence(
            "preferences/dpo",
            f"KL(π‖π*), a fifth of the labels flipped, {name}",
            value=value,
            bar=1e-6 if name == "robust DPO" else None,
            unit="nats",
            seeds=[0],
        )
    assert 0.1 < nats["DPO"] < nats["cDPO"]


# Why both log-probabilities fall


@pytest.mark.evidence
def test_both_fall_on_average_at_the_optimum(evidence):
    """Pairs from the reference: at pi* itself, chosen and rejected stand below the reference on average, because
    their mean is -KL(pi_ref || pi*), exactly."""
    falls, rejected_falls, shares = [], [], []
    for seed in range(5):
        world = exact.make_world(seed)
        reference = world.ref_logps
        optimum = exact.optimal_policy(reference, world.rewards, world.beta)
        wins = (exact_pairs.bradley_terry(world).view(4, 125, 125) * reference.exp().unsqueeze(1)).sum(-1)  # (X, Y)
        chosen, rejected = 2 * reference.exp() * wins, 2 * reference.exp() * (1 - wins)
        ratios = optimum - reference
        assert_close(chosen.sum(-1), torch.ones(4, dtype=torch.float64))
        both = ((chosen + rejected) * ratios).sum(-1) / 2
        assert_close(both, -exact.kl(reference, optimum))
        falls.append((chosen * ratios).sum(-1).mean().item())
        rejected_falls.append((rejected * ratios).sum(-1).mean().item())
        shares.append((chosen * (ratios < 0)).sum(-1).mean().item())
    common = {"unit": "nats", "seeds": list(range(5))}
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    evidence(
        "preferences/dpo",
        "Change of log π(chosen) at π* itself",
        value=mean(falls),
        bar=0.0,
        better="<",
        spread=falls,
        **common,
    )
    evidence(
        "preferences/dpo",
        "Change of log π(rejected) at π* itself",
        value=mean(rejected_falls),
        bar=0.0,
        better="<",
        spread=rejected_falls,
        **common,
    )
    evidence(
        "preferences/dpo",
        "Share of chosen responses less likely at π* than before",
        value=mean(shares),
        seeds=list(range(5)),
        spread=shares,
    )


def tabular(world, theta):
    """A logit for every prefix: nothing is shared after two responses part. One prompt. -> (Y,)"""
    return theta.log_softmax(-1)[world.prefixes, world.tokens].sum(-1)


def position_free(world, theta):
    """One softmax for every position: all responses share all parameters. -> (Y,)"""
    return theta.log_softmax(-1)[world.tokens].sum(-1)


def step_on_one_pair(logps_of, theta, chosen, rejected, beta=0.5, eta=1e-6):
    """The change of (log pi(chosen), log pi(rejected)) / eta after one small step down dpo_loss of this pair."""
    leaf = theta.clone().requires_grad_()
    logps = logps_of(leaf)
    ref = logps.detach()
    pair = [
        logps[chosen : chosen + 1],
        logps[rejected : rejected + 1],
        ref[chosen : chosen + 1],
        ref[rejected : rejected + 1],
    ]
    (gradient,) = torch.autograd.grad(original.dpo_loss(*pair, beta=beta)[0].sum(), leaf)
    after = logps_of(theta - eta * gradient)
    return (after[chosen] - ref[chosen]).item() / eta, (after[rejected] - ref[rejected]).item() / eta


@pytest.mark.parametrize("policy", [tabular, position_free])
def test_the_sign_condition_predicts_a_small_step(policy):
    """d log pi(chosen) / dt = beta * sigmoid(-m) * <g_w, g_w - g_l>, with g the gradient of a log-probability."""
    world = exact.make_world(0)
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn((31, 5) if policy is tabular else (5,), generator=generator, dtype=torch.float64)
    logps_of = functools.partial(policy, world)
    jacobian = torch.autograd.functional.jacobian(logps_of, theta).flatten(1)  # (Y, parameters)
    inner = jacobian @ jacobian.T
    speed = inner.diagonal().unsqueeze(1) - inner  # [w, l] = <g_w, g_w - g_l>
    others = ~torch.eye(125, dtype=torch.bool)
    if policy is tabular:
        # At the token where they part, both gradients are (one-hot - p): their part is 1 - p_w + p_l, always positive.
        assert speed[others].min() > 0
    else:
        assert 0.05 < (speed[others] < -1e-9).double().mean() < 0.3
    for w, lost in torch.randint(125, (300, 2), generator=generator).tolist():
        if w == lost:
            continue
        chosen, rejected = step_on_one_pair(logps_of, theta, w, lost)
        assert chosen == pytest.approx(0.25 * speed[w, lost].item(), abs=1e-4)
        assert rejected == pytest.approx(-0.25 * speed[lost, w].item(), abs=1e-4)
        assert chosen > rejected or torch.allclose(jacobian[w], jacobian[lost])  # the difference never shrinks


def test_a_tabular_policy_never_lowers_the_chosen_response():
    """Term by term: the shared prefix cancels, the token where the two part gives 1 - p_w + p_l, and each later token
    of the chosen response, which shares no logits with the rejected one, gives |one-hot - p|^2."""
    world = exact.make_world(0)
    generator = torch.Generator().manual_seed(1)
    theta = torch.randn(31, 5, generator=generator, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(functools.partial(tabular, world), theta).flatten(1)
    probs, one_hot = theta.softmax(-1), torch.eye(5, dtype=torch.float64)
    for w, lost in torch.randint(125, (300, 2), generator=generator).tolist():
        if w == lost:
            continue
        parted = (world.tokens[w] != world.tokens[lost]).nonzero()[0].item()
        rows, tokens = world.prefixes[w], world.tokens[w]
        p = probs[rows[parted]]
        expected = 1 - p[tokens[parted]] + p[world.tokens[lost, parted]]
        for t in range(parted + 1, 3):
            expected = expected + (one_hot[tokens[t]] - probs[rows[t]]).square().sum()
        assert_close(jacobian[w] @ (jacobian[w] - jacobian[lost]), expected)


def test_where_the_mass_goes_when_both_fall():
    """The freed probability goes to responses in neither role."""
    world = exact.make_world(0)
    theta = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(functools.partial(position_free, world), theta)
    speed = (jacobian @ jacobian.T).diagonal().unsqueeze(1) - jacobian @ jacobian.T
    w, lost = divmod(speed.argmin().item(), 125)
    before = position_free(world, theta).exp()
    after = position_free(world, theta + 0.01 * (jacobian[w] - jacobian[lost])).exp()
    assert after[w] < before[w] and after[lost] < before[lost]
    assert (after - before).sum().item() == pytest.approx(0.0, abs=1e-12)


def arithmetic_pairs(prompts):
    policy, tokenizer = arithmetic.warm_start()
    records = arithmetic.problems(held_out=False)[:prompts]
    settings = original.algorithm().settings()
    return policy, tokenizer, loop.sample_pairs(policy, tokenizer, records, arithmetic.exact_match, settings)


@pytest.mark.evidence
def test_both_fall_in_a_language_model(evidence):
    """The same condition on pairs of the arithmetic model: a small step on each pair alone."""
    policy, tokenizer, pairs = arithmetic_pairs(300 if evidence.full else 40)
    policy.double()
    weights = dict(policy.named_parameters())
    predicted, measured = [], []
    for pair in pairs[: 200 if evidence.full else 25]:
        batch = loop.encode_pairs(tokenizer, [pair], policy.device)
        chosen, rejected = loop.response_logps(policy, batch)
        gradients = [torch.autograd.grad(x.sum(), weights.values(), retain_graph=True) for x in (chosen, rejected)]
        difference = [w - lost for w, lost in zip(*gradients, strict=True)]
        predicted.append(sum((w * d).sum() for w, d in zip(gradients[0], difference, strict=True)).item())
        eta = 1e-3 / sum(d.square().sum() for d in difference).sqrt().item()
        moved = []
        with torch.no_grad():
            for move in (1, -2):  # a step forward, then from there one step back behind the start
                for weight, d in zip(weights.values(), difference, strict=True):
                    weight.add_(move * eta * d)
                moved.append(loop.response_logps(policy, batch)[0].item())
            for weight, d in zip(weights.values(), difference, strict=True):
                weight.add_(eta * d)
        measured.append((moved[0] - moved[1]) / (2 * eta))
    wrong = sum((p < 0) != (m < 0) for p, m in zip(predicted, measured, strict=True))
    share = sum(p < 0 for p in predicted) / len(predicted)
    note = f"{len(predicted)} pairs of the warm start, one small step on each alone."
    evidence(
        "preferences/dpo", "Arithmetic pairs whose chosen response falls", value=share, bar=0.0, better=">", note=note
    )
    evidence(
        "preferences/dpo",
        "Pairs where ⟨g_w, g_w − g_l⟩ has the wrong sign",
        value=wrong,
        bar=0.0,
        better="==",
        note=note,
    )


@pytest.mark.evidence
def test_deterministic_labels_run_away_and_smoothing_stops_them(evidence):
    """If the better response always wins, the loss goes to 0, the margin and the KL grow without end: beta has lost
    its force. Bradley-Terry labels and label smoothing stop them."""
    world = exact.make_world(0)
    sampler = exact_pairs.samplers(world)["all responses evenly"]
    first, second = exact_pairs.all_pairs(world.rewards)
    always = (first > second).double()
    x, margins, drifts, losses = [50, 200, 800], defaultdict(list), defaultdict(list), defaultdict(list)
    for name, preference, options in [
        ("always the better one", always, {}),
        ("always the better one, cDPO 0.1", always, {"label_smoothing": 0.1}),
        ("Bradley–Terry labels", exact_pairs.bradley_terry(world), {}),
    ]:
        logits = world.ref_logits.clone().requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=0.1)
        for step in range(1, x[-1] + 1):
            optimizer.zero_grad()
            loss = population_loss(world, logits, sampler, preference, **options)
            loss.backward()
            optimizer.step()
            if step in x:
                logps = exact.response_logps(world, logits.detach())
                implied = exact_pairs.all_pairs(logps - world.ref_logps)
                margins[name].append(((implied[0] - implied[1]) * always).sum().item() / always.sum().item())
                drifts[name].append(exact.kl(logps, world.ref_logps).mean().item())
                losses[name].append(loss.item())
    runaway = margins["always the better one"]
    assert runaway[0] < runaway[1] < runaway[2] and runaway[2] > 1.5 * runaway[1]
    assert losses["always the better one"][2] < 0.5 * losses["always the better one"][1]
    for name in list(margins)[1:]:
        assert margins[name][2] == pytest.approx(margins[name][1], rel=0.1), name
    for name, values in margins.items():
        evidence("preferences/dpo", f"Mean margin after 800 steps: {name}", value=values[-1], unit="nats", seeds=[0])


@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_no_beta_prevents_the_runaway(beta):
    """One pair, always the same winner: the gradient points to a wider margin at every margin."""
    margins = torch.tensor([0.0, 1.0, 10.0, 30.0], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(4, dtype=torch.float64)
    original.dpo_loss(margins, zero, zero, zero, beta=beta)[0].sum().backward()
    assert (margins.grad < 0).all()


def test_sum_and_mean_can_disagree_in_sign():
    """A short chosen response a little better a token, a long rejected one: divided by length, the margin turns."""
    zero = torch.zeros(1)
    chosen, rejected = torch.full((2,), -0.5), torch.full((10,), -0.2)  # log-ratios of the tokens
    _, *summed = original.dpo_loss(chosen.sum()[None], rejected.sum()[None], zero, zero)
    _, *averaged = original.dpo_loss(chosen.mean()[None], rejected.mean()[None], zero, zero)
    assert summed[0] > summed[1] and averaged[0] < averaged[1]


# Learning


def share_that_falls(policy, tokenizer, pairs, ref_logps, beta):
    """The share of chosen responses that a small step of gradient descent on all these pairs makes less likely."""
    batch, weights = loop.encode_pairs(tokenizer, pairs, policy.device), list(policy.parameters())
    losses = original.dpo_loss(*loop.response_logps(policy, batch), *ref_logps, beta=beta)[0]
    gradients = torch.autograd.grad(losses.mean(), weights)
    eta = 1e-3 / sum(g.square().sum() for g in gradients).sqrt().item()
    moved = []
    with torch.no_grad():
        for move in (-1, 2, -1):
            for weight, g in zip(weights, gradients, strict=True):
                weight.add_(move * eta * g)
            moved.append(loop.response_logps(policy, batch)[0])
    return (moved[0] < moved[1]).float().mean().item()


def learn_arithmetic(seed, **changes):
    """DPO from the warm start on its own pairs: at each evaluation the step, the greedy held-out exact match, and the
    mean log-probabilities of the first 256 pairs; the CPU seconds without evaluation; and, before and after, the share
    of those pairs whose chosen response the next step on all of them would lower."""
    policy, tokenizer = arithmetic.warm_start()
    settings = original.algorithm().settings(seed=seed, **changes)
    run, evaluating = {"step": [], "accuracy": [], "chosen": [], "rejected": []}, 0.0

    def evaluate(model):
        nonlocal evaluating
        start = time.process_time()
        run["step"].append(settings.eval_every * len(run["step"]))
        run["accuracy"].append(arithmetic.greedy_accuracy(model, tokenizer, arithmetic.problems(held_out=True)))
        for role, logps in zip(
            ("chosen", "rejected"), loop.reference_logps(model, tokenizer, pairs[:256], batch=64), strict=True
        ):
            run[role].append(logps.mean().item())
        evaluating += time.process_time() - start
        return run["accuracy"][-1]

    start = time.process_time()
    problems = arithmetic.problems(held_out=False)[: settings.sampled_prompts]
    pairs = loop.sample_pairs(policy, tokenizer, problems, arithmetic.exact_match, settings)
    evaluate(policy)
    ref_logps = loop.reference_logps(policy, tokenizer, pairs, batch=settings.batch)
    loop.train(policy, tokenizer, pairs, original.algorithm(), settings, evaluate=evaluate, ref_logps=ref_logps)
    seconds = time.process_time() - start - evaluating
    some = [x[:256] for x in ref_logps]
    shares = [
        share_that_falls(model, tokenizer, pairs[:256], some, settings.beta)
        for model in (arithmetic.warm_start()[0], policy)
    ]
    return run | {"seconds": seconds, "falling": shares}


def curve(runs, name, ylabel):
    """An evidence curve: for each label, a series of each seed."""
    series = {label: [run[name] for run in group] for label, group in runs.items()}
    return {"x": next(iter(runs.values()))[0]["step"], "y": series, "xlabel": "step", "ylabel": ylabel}


@pytest.mark.evidence
@pytest.mark.slow
def test_learns_arithmetic(evidence, tmp_path):
    """Pairs sampled once from the warm start and judged by the verifier. A small beta lets the same pairs do harm."""
    if not evidence.full:
        run = learn_arithmetic(0, sampled_prompts=500, steps=60, eval_every=60, out=str(tmp_path))
        assert run["accuracy"][-1] >= run["accuracy"][0] + 0.15, run
        return
    seeds = list(range(5))
    runs = [learn_arithmetic(seed, out=str(tmp_path)) for seed in seeds]
    small = [learn_arithmetic(seed, beta=0.1, out=str(tmp_path)) for seed in seeds]
    both = {"β = 1": runs, "β = 0.1": small}
    name, common = "preferences/dpo", {"seeds": seeds}

    def mean(values):
        return sum(values) / len(values)

    gains = [run["accuracy"][-1] - run["accuracy"][0] for run in runs]
    evidence(
        name,
        "Arithmetic: mean gain of greedy held-out exact match",
        value=mean(gains),
        bar=0.15,
        better=">=",
        unit="exact match",
        spread=gains,
        note=f"From {runs[0]['accuracy'][0]:.3f}; pairs sampled once from the warm start and judged by the verifier.",
        curve=curve(both, "accuracy", "greedy held-out exact match"),
        **common,
    )
    evidence(
        name,
        "Arithmetic: smallest gain of a seed",
        value=min(gains),
        bar=0.0,
        better=">=",
        unit="exact match",
        spread=gains,
        **common,
    )
    seconds = [run["seconds"] for run in runs]
    evidence(
        name,
        "Arithmetic: CPU seconds of the slowest seed",
        value=max(seconds),
        bar=90,
        unit="s",
        spread=seconds,
        note="One thread, with the sampling of the pairs, without evaluation.",
        **common,
    )
    peaks, ends = [max(run["accuracy"]) for run in small], [run["accuracy"][-1] for run in small]
    evidence(name, "Arithmetic: β = 0.1, best exact match on the way", value=mean(peaks), spread=peaks, **common)
    evidence(name, "Arithmetic: β = 0.1, exact match at the end", value=mean(ends), spread=ends, **common)
    assert mean(ends) < mean([run["accuracy"][-1] for run in runs]) - 0.1
    for label, group in both.items():
        for role in ("chosen", "rejected"):
            changes = [run[role][-1] - run[role][0] for run in group]
            evidence(
                name,
                f"Arithmetic: {label}, change of log π({role})",
                value=mean(changes),
                unit="nats",
                spread=changes,
                note="Of the first 256 pairs that it was trained on.",
                curve=curve(both, role, f"log π({role}), nats"),
                **common,
            )
    for label, when, group in (("at the start", 0, runs), ("after β = 1", 1, runs), ("after β = 0.1", 1, small)):
        shares = [run["falling"][when] for run in group]
        evidence(
            name,
            f"Arithmetic: share of chosen answers that the next step lowers, {label}",
            value=mean(shares),
            spread=shares,
            note="A small step of gradient descent on 256 pairs at once.",
            **common,
        )
    assert all(run[role][-1] < run[role][0] for run in small for role in ("chosen", "rejected"))


def test_the_demo_runs_on_any_model_and_data(tiny_model, tmp_path):
    """The command line, on a tiny Hugging Face model directory and a JSONL of pairs."""
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    command = (
        f"-m snippets.preferences.dpo --model {tiny_model} --data {tmp_path}/pairs.jsonl --device cpu "
        f"--steps 20 --lr 1e-2 --eval_every 5 --batch 4 --label_smoothing 0.1 --logit_chunk 7 --out {tmp_path}/out"
    )
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "held_out" in done.stdout and "20" in done.stdout
    history = lm.load_checkpoint(tmp_path / "out" / "checkpoint.pt")["history"]
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # the policy starts as the reference
    assert history[-1]["loss"] < 0.5 and history[-1]["held_out"] == 1.0
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")
    model, _ = lm.load_model(str(tmp_path / "out" / "model"), torch.device("cpu"))
    assert model.config.hidden_size == 16
