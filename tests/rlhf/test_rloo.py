"""RLOO against loops, enumeration over all groups, TRL, the exact world's optimum, and its own broken copies."""

import itertools
import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from snippets.rlhf import grpo, loop, reinforce
from snippets.rlhf import rloo as original
from snippets.worlds import arithmetic, exact, lm
from tests.mutation import caught_by, load_mutant
from tests.rlhf.common import (
    TWO_PASSES,
    apart,
    junk_changes_nothing,
    padding_changes_nothing,
    random_batch,
    reaches_the_optimum,
    saved_warm_start,
    train_on_arithmetic,
    value_and_grad,
    watched,
)
from tests.rlhf.test_reinforce import (
    SEEDS,
    exact_gradient,
    group_estimate,
    moments,
    optimum,
    projected_z,
    scores,
    shaped_rewards,
    small_world,
    some_policy,
    trains_in_the_loop,
)

torch.set_num_threads(1)
PATH = "snippets/rlhf/rloo.py"
CLIPS = [{}, {"clip_low": 0.1, "clip_high": 0.28}, {"clip_low": 0.0, "clip_high": 0.0}]


def batch(seed=0, *, spread=0.1, **options):
    """logps, old_logps, advantages, mask: ratios of whole responses on both sides of the clips."""
    old, logps, *rest = random_batch(seed, 1, spread, **options)
    return logps, old, *rest


def groups(seed=0, shape=(5, 4)):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The functions. Each check takes the module, so that broken copies can be put to it.


def check_the_advantages_in_loops(module):
    rewards = groups()
    found, scaled = module.rloo_advantages(rewards), module.rloo_advantages(rewards, normalize=True)
    values = []
    for p, group in enumerate(rewards.tolist()):
        for i, reward in enumerate(group):
            others = [other for j, other in enumerate(group) if j != i]
            values.append(reward - sum(others) / 3)
            assert found[p, i].item() == pytest.approx(values[-1], abs=1e-12)
    mean = sum(values) / 20
    std = math.sqrt(sum((x - mean) ** 2 for x in values) / 19)
    assert_close(scaled.flatten(), torch.tensor([x / (std + 1e-4) for x in values], dtype=torch.float64))


def check_they_are_g_over_g_minus_1_times_the_centred_rewards(module):
    for group in (2, 3, 8):
        rewards = groups(1, (4, group))
        centred = grpo.group_advantages(rewards, scale="none")
        assert_close(module.rloo_advantages(rewards), group / (group - 1) * centred)
    assert_close(
        module.rloo_advantages(groups(2, (3, 2)))[:, 0], groups(2, (3, 2)) @ torch.tensor([1.0, -1.0]).double()
    )


def check_equal_rewards_give_exact_zeros(module):
    rewards = torch.tensor([0.1, 0.7, -3.3, 1e6, 1 / 3])[:, None].expand(5, 7)
    assert module.rloo_advantages(rewards).eq(0).all()
    assert module.rloo_advantages(rewards, normalize=True).eq(0).all()


def check_a_reward_of_the_prompt_alone_changes_nothing(module):
    shift = torch.tensor([[0.0], [5.0], [-70.0], [1000.0], [1e6]], dtype=torch.float64)
    assert_close(module.rloo_advantages(groups() + shift), module.rloo_advantages(groups()), rtol=0, atol=1e-8)
    assert module.rloo_advantages(groups().requires_grad_()).requires_grad is False


def check_a_prompt_is_on_its_own(module):
    rewards = groups()
    assert_close(module.rloo_advantages(rewards)[1:3], module.rloo_advantages(rewards[1:3]))


def check_the_loss_in_loops(module):
    logps, old, advantages, mask = batch()
    for clips in CLIPS:
        low, high = clips.get("clip_low", 0.2), clips.get("clip_high", 0.2)
        total, cut = 0.0, 0
        for i in range(8):
            log_ratio = sum((logps[i, t] - old[i, t]).item() for t in range(6) if mask[i, t])
            ratio, advantage = math.exp(log_ratio), advantages[i].item()
            clipped = max(1 - low, min(1 + high, ratio))
            total -= min(ratio * advantage, clipped * advantage)
            cut += clipped * advantage < ratio * advantage
        assert 0 < cut < 8
        assert module.rloo_loss(logps, old, advantages, mask, **clips).item() == pytest.approx(total / 8, rel=1e-12)


def check_on_policy_it_is_reinforce(module):
    """At ratio 1: the gradient of -A log pi(response), the value -mean(A)."""
    logps, _, advantages, mask = batch()
    loss, grad = value_and_grad(module.rloo_loss, logps, logps, advantages, mask)
    expected = value_and_grad(reinforce.reinforce_loss, logps, advantages, mask)[1]
    assert_close(grad, expected)
    assert_close(loss, -advantages.mean())


def check_the_clip_cuts_whole_responses(module):
    """A ratio that would be pushed further has no gradient in any token; one that would be pulled back keeps it."""
    log_ratios = torch.tensor([-1.0, -0.23, 0.0, 0.18, 0.19, 1.0], dtype=torch.float64)  # e^0.1823 = 1.2
    free = {1.0: [1, 1, 1, 1, 0, 0], -1.0: [0, 0, 1, 1, 1, 1]}
    for sign, keeps in free.items():
        for log_ratio, keep in zip(log_ratios, keeps, strict=True):
            logps = torch.tensor([[0.7, 0.0, 0.3]]).double() * log_ratio  # no single token need leave the range
            advantage, old = torch.tensor([sign], dtype=torch.float64), torch.zeros(1, 3).double()
            grad = value_and_grad(module.rloo_loss, logps, old, advantage, torch.ones(1, 3))[1]
            expected = -sign * log_ratio.exp() * keep
            assert_close(grad, expected.expand(1, 3))


def check_no_gradient_reaches_what_is_fixed(module):
    logps, old, advantages, mask = (x.requires_grad_() if x.is_floating_point() else x for x in batch())
    module.rloo_loss(logps, old, advantages, mask).backward()
    assert old.grad is None and advantages.grad is None and logps.grad is not None


def check_padding_changes_nothing(module):
    padding_changes_nothing(module.rloo_loss, batch)


def check_what_stands_under_a_0_never_matters(module):
    logps, old, advantages, mask = batch()
    junk_changes_nothing(lambda x, y, mask: module.rloo_loss(x, y, advantages, mask), logps, old, mask)


def check_a_batch_is_the_weighted_mean_of_its_parts(module):
    parts = [module.rloo_loss(*(x[part] for x in batch())) for part in (slice(0, 2), slice(2, 8))]
    assert_close((2 * parts[0] + 6 * parts[1]) / 8, module.rloo_loss(*batch()))


def check_large_log_ratios_stay_finite(module):
    for size in (25.0, 1e4):
        for signs in ([1.0, -1.0], [-1.0, 1.0]):
            logps = torch.tensor([[size, 0.0], [-size, 0.0]])
            rest = torch.zeros(2, 2), torch.tensor(signs), torch.ones(2, 2)
            loss, grad = value_and_grad(module.rloo_loss, logps, *rest)
            assert torch.isfinite(loss) and torch.isfinite(grad).all()
            if signs[0] < 0:
                assert (grad[0] > 0).all()  # far too likely and bad: still pushed down


def check_the_ratio_is_exponential_up_to_20_and_its_tangent_beyond(module):
    """Where the clip holds nothing, a bad response that has become likelier: e^x up to a log-ratio of 20, which no
    useful ratio reaches, and the tangent there from then on."""
    for size in (2.0, 10.0, 19.0, 21.0, 25.0, 1e4):
        logps = torch.tensor([[size, 0.0]], dtype=torch.float64)
        rest = torch.zeros(1, 2, dtype=torch.float64), -torch.ones(1, dtype=torch.float64), torch.ones(1, 2)
        loss, grad = value_and_grad(module.rloo_loss, logps, *rest)
        slope = math.exp(min(size, 20.0))
        assert loss.item() == pytest.approx(slope * (1 + max(size - 20.0, 0.0)), rel=1e-12)
        assert_close(grad, torch.full((1, 2), slope, dtype=torch.float64))


def check_half_precision_is_computed_in_float32(module):
    for dtype in (torch.bfloat16, torch.float16):
        four = batch(dtype=dtype)
        loss = module.rloo_loss(*four)
        assert loss.dtype == torch.float32
        assert_close(loss, module.rloo_loss(*(x.float() for x in four[:3]), four[3]), rtol=0, atol=0)
        assert module.rloo_advantages(torch.ones(1, 2, dtype=dtype)).dtype == torch.float32


def check_bad_input_is_named(module):
    logps, old, advantages, mask = batch()
    call = module.rloo_loss
    cases = [
        (lambda: module.rloo_advantages(torch.ones(4)), r"\(P, G\).*got shape \(4,\)"),
        (lambda: module.rloo_advantages(torch.ones(4, 1)), r"at least 2, got shape \(4, 1\)"),
        (lambda: module.rloo_advantages(torch.tensor([[1.0, math.nan]])), "must be finite, got .*nan"),
        (lambda: call(logps[:, :5], old, advantages, mask), r"logps \(8, 5\) against mask \(8, 6\)"),
        (lambda: call(logps, old[:7], advantages, mask), r"old_logps \(7, 6\) against mask \(8, 6\)"),
        (lambda: call(logps, old, advantages[:7], mask), r"advantages \(7,\) against mask \(8, 6\)"),
        (lambda: call(logps, old, logps, mask), r"advantages \(8, 6\) against mask \(8, 6\); want \(B,\)"),
        (lambda: call(logps[0], old[0], advantages[:6], mask[0]), r"logps \(6,\).*want \(B, T\)"),
        (lambda: call(logps, old, advantages, 0 * mask), r"no valid token.*\(8, 6\)"),
        (lambda: call(logps, old, advantages * math.nan, mask), "advantages must be finite"),
        (lambda: call(logps, old, advantages, mask, clip_low=-0.1), "clip_low=-0.1"),
        (lambda: call(logps, old, advantages, mask, clip_high=-0.1), "clip_high=-0.1"),
    ]
    for function, message in cases:
        with pytest.raises(ValueError, match=message):
            function()


# The exact world: expectations by enumeration.


def over_all_groups(world, logits, group, weigh):
    """The mean over all groups of `group` responses to prompt 0 of weigh(estimate (D,)), where the estimate is the mean
    of A * grad log pi and weigh(advantages (G,), scores (G, D)) makes of it what is averaged."""
    rewards, probs = shaped_rewards(world, logits)[0], exact.response_logps(world, logits)[0].exp()
    g, total = scores(world, logits)[0], 0.0
    for chosen in itertools.product(range(len(probs)), repeat=group):
        rows = list(chosen)
        total = total + probs[rows].prod() * weigh(rewards[rows], g[rows])
    return total


def check_it_is_unbiased_over_all_groups(module):
    """With the KL in the reward the mean gradient over all groups is exactly that of E[r] - beta * KL; the group's own
    mean as baseline gives (G - 1) / G of it."""
    world = exact.make_world(3, prompts=1, vocab=2, length=2)
    logits = some_policy(world)
    truth = exact_gradient(world, logits).flatten()
    for group in (2, 3):
        mean = over_all_groups(
            world, logits, group, lambda r, g: (module.rloo_advantages(r[None])[0][:, None] * g).mean(0)
        )
        assert_close(mean, truth, rtol=1e-9, atol=1e-12)
        own = over_all_groups(world, logits, group, lambda r, g: ((r - r.mean())[:, None] * g).mean(0))
        assert_close(own, (group - 1) / group * truth, rtol=1e-9, atol=1e-12)


def check_the_whole_ratio_corrects_an_old_policy(module):
    """Samples of another policy, no clip: the mean gradient is that of the policy that learns, since the product of
    the tokens' ratios is the weight of the response. REINFORCE without the ratio, a ratio for each token, and the
    geometric mean of them have others."""
    world = small_world(prompts=1)
    old, logits = some_policy(world, 1), some_policy(world, 2).requires_grad_()
    probs = exact.response_logps(world, old)[0].exp()
    advantages = world.rewards[0] - 0.3
    grads = {}
    wide = {"clip_low": 1.0, "clip_high": 1e9}
    for kind in ("ratio", "none", "token", "sequence"):
        tokens, old_tokens = exact.token_logps(world, logits)[0], exact.token_logps(world, old)[0]
        loss = 0.0
        for y in range(9):
            row, one = (tokens[y][None], advantages[y][None]), torch.ones(1, 2)
            if kind == "ratio":
                loss = loss + probs[y] * module.rloo_loss(row[0], old_tokens[y][None], row[1], one, **wide)
            elif kind in ("token", "sequence"):  # PPO's and GSPO's weights, summed over the tokens
                loss = loss + probs[y] * 2 * grpo.grpo_loss(
                    row[0], old_tokens[y][None], row[1], one, level=kind, **wide
                )
            else:
                loss = loss + probs[y] * reinforce.reinforce_loss(*row, one)
        (grads[kind],) = torch.autograd.grad(loss, logits)
    (truth,) = torch.autograd.grad(-(exact.response_logps(world, logits).exp() * world.rewards).sum(), logits)
    assert_close(grads["ratio"], truth, rtol=1e-9, atol=1e-12)
    for kind in ("none", "token", "sequence"):
        assert (grads[kind] - truth).abs().max() > 0.01, kind


def check_the_adapter_in_loops(module):
    """Rewards with the KL inside, a group's responses side by side, and the ratio to the policy that sampled."""
    algorithm = module.algorithm()
    settings = algorithm.settings(beta=0.5, group=4, clip=0.1)
    logps, ref, _, mask = batch(dtype=torch.float32)
    reward = torch.arange(8.0) ** 2
    rollout = loop.Rollout(lm.Completions(mask, mask, mask, logps, []), reward, ref)
    advantages, targets = algorithm.advantages(rollout, settings)
    shaped = [(reward[i] - 0.5 * sum(logps[i, t] - ref[i, t] for t in range(6) if mask[i, t])).item() for i in range(8)]
    for i in range(8):
        others = [shaped[j] for j in range(8) if j // 4 == i // 4 and j != i]
        assert advantages[i].item() == pytest.approx(shaped[i] - sum(others) / 3, rel=1e-4)
    rows = torch.tensor([5, 0, 3])
    moved = logps + 0.1
    loss = algorithm.loss(moved[rows], rollout, rows, advantages[rows], settings)
    clips = {"clip_low": 0.1, "clip_high": 0.1}
    assert_close(loss, module.rloo_loss(moved[rows], logps[rows], advantages[rows], mask[rows], **clips))
    assert targets is None and algorithm.critic_loss is None and not algorithm.over_tokens(settings)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_functions(check):
    check(original)


OTHERS = "(shifted.sum(1, keepdim=True) - shifted) / (rewards.shape[1] - 1)"
MISTAKES = {
    "own reward in the mean": (OTHERS, "shifted.mean(1, keepdim=True)"),
    "divided by G": (OTHERS, "(shifted.sum(1, keepdim=True) - shifted) / rewards.shape[1]"),
    "mean of the batch": (OTHERS, "(shifted.sum() - shifted) / (shifted.numel() - 1)"),
    "mean over prompts": (OTHERS, "(shifted.sum(0, keepdim=True) - shifted) / (rewards.shape[1] - 1)"),
    "the best of the group": (OTHERS, "shifted.max(1, keepdim=True).values"),
    "flipped advantage": ("advantages = shifted - others", "advantages = others - shifted"),
    "rounding left in": ("shifted = rewards - rewards[:, :1]", "shifted = rewards - 0.3"),
    "std of the group": ("advantages.std()", "advantages.std(1, keepdim=True)"),
    "population std": ("advantages.std()", "advantages.std(correction=0)"),
    "no eps": ("+ 1e-4)", "+ 0.0)"),
    "always normalized": ("if normalize else advantages", "if True else advantages"),
    "advantages with gradient": ("rewards.float()).detach()", "rewards.float())"),
    "flipped sign": ("return -torch.minimum(", "return torch.minimum("),
    "the larger of the two": ("torch.minimum(ratio * advantages, clipped", "torch.maximum(ratio * advantages, clipped"),
    "clips exchanged": ("ratio.clamp(1 - clip_low, 1 + clip_high)", "ratio.clamp(1 - clip_high, 1 + clip_low)"),
    "no clip": ("ratio.clamp(1 - clip_low, 1 + clip_high)", "ratio"),
    "GSPO's root": ("log_ratios.sum(-1)", "log_ratios.sum(-1) / valid.sum(-1).clamp(min=1)"),
    "mask forgotten": ("torch.where(valid, logps.to(dtype) - old", "torch.where(valid | True, logps.to(dtype) - old"),
    "old policy not detached": ("old_logps.detach()", "old_logps"),
    "a sum over responses": ("clipped * advantages).mean()", "clipped * advantages).sum()"),
    "no cap": ("EXP_CAP = 20.0", "EXP_CAP = 1e9"),
    "a cap within reach": ("EXP_CAP = 20.0", "EXP_CAP = 5.0"),
    "a ratio a token": (
        "ratio = log_ratio.clamp(max=EXP_CAP).exp() * (1 + (log_ratio - EXP_CAP).clamp(min=0))",
        "ratio = torch.where(valid, log_ratios.exp(), 0.0).sum(-1) / valid.sum(-1).clamp(min=1)",
    ),
    "difference before the upcast": (
        "logps.to(dtype) - old_logps.detach().to(dtype)",
        "(logps - old_logps.detach()).to(dtype)",
    ),
    "groups across prompts": ("rewards.view(-1, settings.group)", "rewards.view(settings.group, -1).T"),
    "the new policy as the old": ("rollout.completions.logps[rows], rollout", "logps.detach(), rollout"),
    "one response is enough": ("rewards.shape[1] < 2", "rewards.shape[1] < 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    """Each deliberate mistake is caught by a check. (That the original passes all of them is test_the_functions.)"""
    assert caught_by(load_mutant(PATH, *MISTAKES[mistake]), CHECKS)


# TRL 1.16.0


def trl_loss(logps, old_logps, advantages, mask, *, clip_low=0.2, clip_high=0.2):
    """RLOOTrainer._compute_loss with a model that gives these log-probabilities."""
    from trl import RLOOTrainer

    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logps, torch.zeros_like(logps), None),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        epsilon_low=clip_low,
        epsilon_high=clip_high,
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.zeros_like(mask)
    inputs = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask}
    inputs |= {"advantages": advantages, "old_logps": (old_logps * mask).sum(1)}
    return RLOOTrainer._compute_loss(trainer, None, inputs)


def trl_batches():
    """Random batches and edge cases in float32."""
    yield from (batch(seed, dtype=torch.float32) for seed in range(4))
    yield batch(4, dtype=torch.float32, left=True, width=9)
    yield batch(5, dtype=torch.float32, spread=1.5)
    logps, old, advantages, mask = batch(6, dtype=torch.float32)
    yield logps, old, torch.zeros(8), mask  # groups of equal rewards
    yield logps, logps, advantages, mask  # before the first step
    yield old - 1e4, old, advantages, mask  # TRL is finite on this side


def difference_from_trl(module):
    """In value and in gradient, relative where it is large."""
    worst = 0.0
    for four in trl_batches():
        for clips in CLIPS:
            ours = value_and_grad(module.rloo_loss, *four, **clips)
            worst = max(worst, apart(ours, value_and_grad(trl_loss, *four, **clips)))
    return worst


@pytest.mark.evidence
def test_agrees_with_trl(evidence):
    evidence(
        "rlhf/rloo",
        "Largest difference from TRL 1.16.0, loss and gradient",
        value=difference_from_trl(original),
        bar=1e-6,
        note="float32; three pairs of clips; random batches, rows of no and of one token, left and right padding, "
        "equal rewards, ratio 1, log-ratios of a response to about 10 and of −10,000 a token.",
    )


@pytest.mark.evidence
@pytest.mark.parametrize("normalize", [False, True])
def test_the_whole_method_in_trls_trainer(tmp_path, normalize, evidence):
    """TRL's own loop on the warm start, with its KL in the reward: exact_match unchanged as its reward function, and at
    each step its advantages and its loss are those of this snippet. Two passes over a batch, so that the second meets
    ratios other than 1."""
    from trl import RLOOConfig, RLOOTrainer

    model, tokenizer = saved_warm_start(tmp_path)
    with torch.no_grad():  # a policy that has left its reference
        for p in model.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    seen, scoring = [], []

    class Compared(watched(RLOOTrainer)):
        def _get_per_token_logps_and_entropies(self, model, ids, attention, length, *args, **kwargs):
            out = super()._get_per_token_logps_and_entropies(model, ids, attention, length, *args, **kwargs)
            scoring.append((out[0].detach(), attention[:, -length:]))
            return out

        def _generate_and_score_completions(self, inputs):
            scoring.clear()
            out = super()._generate_and_score_completions(inputs)
            (old, mask), (ref, _) = scoring
            kl = torch.where(mask.bool(), old - ref, 0.0).sum(-1)
            seen.append({"kl": kl, "advantages": out["advantages"]})
            return out

        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            logps, mask = self.latest, inputs["completion_mask"]
            old = (inputs["old_logps"] / mask.sum(-1))[:, None].expand_as(logps)  # its sum is what counts
            mine = original.rloo_loss(logps, old, inputs["advantages"], mask)
            ratios = ((logps * mask).sum(-1) - inputs["old_logps"]).exp()
            seen.append({"trl": loss.item(), "mine": mine.item(), "ratio": ratios.max().item()})
            return loss

    config = RLOOConfig(str(tmp_path), beta=0.05, normalize_advantages=normalize, **TWO_PASSES)
    scores = train_on_arithmetic(Compared, config, model, tokenizer).rewards
    (estimated, first, second) = seen
    assert 0 < scores.mean() < 1 and estimated["kl"].abs().max() > 0.1
    rewards = scores - 0.05 * estimated["kl"]
    expected = original.rloo_advantages(rewards.view(-1, 8), normalize=normalize).flatten()
    assert first["ratio"] == pytest.approx(1.0, abs=1e-4) and second["ratio"] > 1.01
    apart = [(estimated["advantages"] - expected).abs().max().item()]
    apart += [abs(step["mine"] - step["trl"]) for step in (first, second)]
    name = f"Largest difference from TRL's trainer on a real model, normalize={normalize}"
    note = "Advantages and two losses, the second at ratios other than 1; beta = 0.05, a group of 8."
    evidence("rlhf/rloo", name, value=max(apart), bar=1e-6, note=note)


# Bias and variance


def rloo_variance(here, group):
    """(X,): the trace of the covariance of RLOO's estimate from one group, in closed form; `here` are Moments."""
    around_mean = here.variance(here.mean) + here.gradient  # E[(r - V)^2 |g|^2]
    spread = (here.probs * (here.rewards - here.mean[:, None]) ** 2).sum(-1)  # Var(r)
    squares = (here.probs * here.squares).sum(-1)  # E|g|^2
    return around_mean / group + (spread * squares - (group - 2) * here.gradient) / (group * (group - 1))


def test_the_variance_in_closed_form_is_that_of_all_groups():
    """Var = (Var with the exact mean as baseline) / G + (Var(r) E|g|^2 + |grad J|^2) / (G (G - 1))."""
    world = exact.make_world(3, prompts=1, vocab=2, length=2)
    logits = some_policy(world)
    here = moments(world, logits)
    for group in (2, 3, 4):
        second = over_all_groups(
            world,
            logits,
            group,
            lambda r, g: (original.rloo_advantages(r[None])[0][:, None] * g).mean(0).square().sum(),
        )
        assert_close(second - here.gradient[0], rloo_variance(here, group)[0])
        ideal = here.variance(here.mean) / group
        spread, squares = (here.probs * (here.rewards - here.mean[:, None]) ** 2).sum(-1), here.probs * here.squares
        excess = (spread * squares.sum(-1) + here.gradient) / (group * (group - 1))
        assert_close(rloo_variance(here, group), ideal + excess)


@pytest.mark.evidence
def test_what_the_noise_of_the_baseline_costs(evidence):
    """The variance of an estimate from G responses against the same with the prompt's exact mean as baseline."""
    for group in (2, 4, 8, 16):
        spread = []
        for seed in SEEDS:
            world = exact.make_world(seed)
            here = moments(world, world.ref_logits)
            spread.append((rloo_variance(here, group).mean() / (here.variance(here.mean).mean() / group)).item())
        assert max(spread) < 1 + 1.2 / (group - 1)
        evidence(
            "rlhf/rloo",
            f"Variance over that with the exact mean as baseline, G = {group}",
            value=sum(spread) / 5,
            seeds=SEEDS,
            spread=spread,
            unit="times",
            note="At the start of the exact world, in closed form, the mean over prompts.",
        )
    for seed in SEEDS:  # at pi* all shaped rewards of a prompt are equal, and nothing is left
        world = exact.make_world(seed)
        assert rloo_variance(moments(world, optimum(world)), 2).abs().max() < 1e-12


@pytest.mark.evidence
def test_sampled_gradients_have_the_exact_mean(evidence):
    """32 random projections; the best of the group as baseline, which depends on the own response, is biased."""
    draws = 20_000 if evidence.full else 6_000
    world = exact.make_world(0, prompts=1)
    logits = some_policy(world)
    z = projected_z(
        world, logits, group_estimate(world, logits, 4, lambda r: original.rloo_advantages(r[None])[0]), draws
    )
    assert 0.6 < z.square().mean().sqrt() < 1.5
    biased = projected_z(world, logits, group_estimate(world, logits, 4, lambda r: r - r.max()), draws)
    note = f"{draws} groups of 4, 32 random projections."
    evidence("rlhf/rloo", "Bias: largest |z|", value=z.abs().max(), bar=4.5, note=note)
    name = "Bias: largest |z|, the best of the group as baseline"
    evidence("rlhf/rloo", name, value=biased.abs().max(), bar=10, better=">=", note=note)


def test_a_group_of_two_is_the_difference_of_a_pair():
    """RLOO with G = 2: half of (r1 - r2) (grad log pi(y1) - grad log pi(y2)), the form that DPO's gradient has, with
    the reward's difference in the place of the sigmoid."""
    world = small_world(prompts=1)
    logits = some_policy(world)
    r, g = shaped_rewards(world, logits)[0], scores(world, logits)[0]
    for a, b in itertools.product(range(9), repeat=2):
        advantages = original.rloo_advantages(torch.stack([r[a], r[b]])[None])[0]
        estimate = (advantages[:, None] * torch.stack([g[a], g[b]])).mean(0)
        assert_close(estimate, 0.5 * (r[a] - r[b]) * (g[a] - g[b]))


# The method


def test_it_runs_in_the_shared_loop(tmp_path):
    history = trains_in_the_loop(original.algorithm(), tmp_path, prompts=4, group=4, epochs=2, minibatches=2)
    assert len(history) == 2


def test_its_step_is_the_paper_s_reinforce(tmp_path):
    """One pass over a batch: the same update as with -A log pi(response), to rounding."""
    algorithm = original.algorithm()

    def plain(logps, rollout, rows, advantages, settings):
        return reinforce.reinforce_loss(logps, advantages, rollout.completions.mask[rows])

    moved = []
    for kind in (algorithm, replace(algorithm, loss=plain)):
        policy, tokenizer = arithmetic.warm_start()
        settings = kind.settings(prompts=4, group=4, steps=1, out=str(tmp_path / str(len(moved))))
        records = arithmetic.problems(held_out=False)[:64]
        loop.train(policy, tokenizer, records, arithmetic.exact_match, kind, settings)
        moved.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    start = torch.cat([p.detach().flatten() for p in arithmetic.warm_start()[0].parameters()])
    assert (moved[0] - start).abs().max() > 1e-6
    # Adam's first step is the sign of the gradient: only where that is almost 0 may the two differ.
    assert ((moved[0] - moved[1]).abs() > 1e-7).float().mean() < 1e-3


@pytest.mark.evidence
def test_how_often_the_clip_is_active(evidence, tmp_path):
    """The share of responses whose ratio the clip cuts, pass by pass over the same batch, on the warm start."""
    steps, seeds = (20, SEEDS) if evidence.full else (3, SEEDS[:1])
    algorithm, shares = original.algorithm(), defaultdict(list)
    for seed in seeds:
        calls = []

        def watched(logps, rollout, rows, advantages, settings, calls=calls):
            mask = rollout.completions.mask[rows].bool()
            ratio = torch.where(mask, logps.detach() - rollout.completions.logps[rows], 0.0).sum(-1).exp()
            cut = ((ratio > 1.2) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
            calls.append(cut.float().mean().item())
            return algorithm.loss(logps, rollout, rows, advantages, settings)

        trains_in_the_loop(
            replace(algorithm, loss=watched), tmp_path / str(seed), steps=steps, epochs=4, seed=seed, save_every=1000
        )
        for i in range(4):
            shares[i].append(sum(calls[i::4]) / steps)
    assert max(shares[0]) == 0.0
    for i in range(4):
        evidence(
            "rlhf/rloo",
            f"Arithmetic: share of responses that the clip cuts, pass {i + 1} of 4",
            value=sum(shares[i]) / len(seeds),
            bar=0.0 if i == 0 else None,
            seeds=seeds,
            spread=shares[i],
            note=f"{steps} steps, 16 prompts, 8 responses each, clip 0.2 on the whole response's ratio, lr 5e-5.",
        )


@pytest.mark.evidence
def test_it_reaches_the_optimum(evidence):
    note = "The worst of the seeds, which set both the world and the samples; 2,000 steps of 16 responses a prompt."
    reaches_the_optimum(evidence, "rlhf/rloo", original.algorithm(), "RLOO", note=note)
