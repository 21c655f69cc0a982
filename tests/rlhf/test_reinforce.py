"""REINFORCE against loops, enumeration, exact variances, and its own broken copies.

What the tests of ReMax and RLOO share with it stands at the top: exact scores and variances, and z-tests.
"""

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch.testing import assert_close

from snippets.rlhf import grpo, loop
from snippets.rlhf import reinforce as original
from snippets.worlds import arithmetic, exact, lm, trials
from tests.mutation import caught_by, load_mutant
from tests.rlhf.common import (
    SEEDS,
    junk_changes_nothing,
    padding_changes_nothing,
    ragged,
    reaches_the_optimum,
    value_and_grad,
)

torch.set_num_threads(1)
PATH = "snippets/rlhf/reinforce.py"


# Shared: the exact world, one prompt at a time.


def small_world(prompts=2):
    return exact.make_world(3, prompts=prompts, vocab=3, length=2)


def some_policy(world, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return world.ref_logits + torch.randn(world.ref_logits.shape, generator=generator, dtype=torch.float64)


def optimum(world):
    return exact.logits_of(world, exact.optimal_policy(world.ref_logps, world.rewards, world.beta))


def scores(world, logits):
    """(X, Y, D): the gradient of log pi(y|x) in the table of prompt x. One-hot less softmax, at each prefix of y."""
    probs, y = logits.softmax(-1), torch.arange(world.vocab**world.length)
    found = torch.zeros(len(probs), len(y), *probs.shape[1:], dtype=torch.float64)
    for t in range(world.length):
        place = world.prefixes[:, t]
        found[:, y, place] = -probs[:, place]
        found[:, y, place, world.tokens[:, t]] += 1
    return found.flatten(2)


def shaped_rewards(world, logits):
    """(X, Y): the reward of each response with its KL inside, at the policy of `logits`."""
    return world.rewards - world.beta * (exact.response_logps(world, logits) - world.ref_logps)


@dataclass
class Moments:
    """What the variance of a gradient estimate is made of; one prompt a row, all exact."""

    probs: torch.Tensor  # (X, Y)
    rewards: torch.Tensor  # (X, Y), the KL inside
    squares: torch.Tensor  # (X, Y), |grad log pi|^2
    gradient: torch.Tensor  # (X,), |grad J|^2

    @property
    def mean(self):
        return (self.probs * self.rewards).sum(-1)

    def variance(self, baseline):
        """(X,): the trace of the covariance of (r - b) grad log pi, one response; baseline (X,)."""
        second = (self.probs * (self.rewards - baseline[:, None]) ** 2 * self.squares).sum(-1)
        return second - self.gradient


def moments(world, logits):
    g, probs = scores(world, logits), exact.response_logps(world, logits).exp()
    rewards = shaped_rewards(world, logits)
    gradient = ((probs * rewards)[..., None] * g).sum(1)
    return Moments(probs, rewards, g.square().sum(-1), gradient.square().sum(-1))


def projected_z(world, logits, estimate, draws, seed=0, directions=32):
    """z of `directions` random projections of the mean of `draws` gradient estimates against the exact gradient, for
    prompt 0. estimate(generator) -> (responses (G,), advantages (G,)); its estimate is the mean of A * grad log pi."""
    generator = torch.Generator().manual_seed(seed)
    g = scores(world, logits)[0]  # (Y, D)
    g = g @ torch.randn(g.shape[1], directions, generator=generator, dtype=torch.float64)
    probs = exact.response_logps(world, logits)[0].exp()
    truth = ((probs * shaped_rewards(world, logits)[0])[:, None] * g).sum(0)
    found = []
    for _ in range(draws):
        responses, advantages = estimate(generator)
        found.append((advantages[:, None] * g[responses]).mean(0))
    found = torch.stack(found)
    return (found.mean(0) - truth) / (found.std(0) / math.sqrt(draws))


def arithmetic_batches(count, seed, prompts=16, group=8):
    """Batches of the arithmetic warm start: ids, attention, mask, rewards (P, G), greedy rewards (P,)."""
    policy, tokenizer = arithmetic.warm_start()
    settings = loop.Settings(prompts=prompts, group=group, seed=seed)
    records = arithmetic.problems(held_out=False)
    for step in range(count):
        batch = loop.rollout(policy, tokenizer, records, arithmetic.exact_match, settings, step=step, greedy=True)
        yield policy, batch, batch.scores.view(prompts, group), batch.greedy_scores.view(prompts, group)[:, 0]


# The functions. Each check takes the module, so that broken copies can be put to it.


def batch(seed=0, *, dtype=torch.float64, left=False, width=6):
    """logps, advantages (B,), advantages (B, T), mask."""
    generator = torch.Generator().manual_seed(seed)
    logps, tokens = -torch.randn(2, 8, 6, generator=generator, dtype=torch.float64).abs()
    tokens = tokens * torch.tensor([1.0, -1.0]).repeat(4)[:, None]
    advantages = torch.randn(8, generator=generator, dtype=torch.float64)
    logps, tokens, mask = ragged(logps, tokens, left=left, width=width)
    return logps.to(dtype), advantages.to(dtype), tokens.to(dtype), mask


def check_the_loss_in_loops(module):
    logps, rows, tokens, mask = batch()
    by_row = by_token = 0.0
    for i in range(8):
        for t in range(6):
            if mask[i, t]:
                by_row -= rows[i].item() * logps[i, t].item() / 8
                by_token -= tokens[i, t].item() * logps[i, t].item() / 8
    assert module.reinforce_loss(logps, rows, mask).item() == pytest.approx(by_row, rel=1e-12)
    assert module.reinforce_loss(logps, tokens, mask).item() == pytest.approx(by_token, rel=1e-12)


def check_the_gradient_is_minus_the_advantage(module):
    """Of each token of a response alike: no 1/length, nothing under a 0 of the mask, and B counts the empty row."""
    logps, rows, tokens, mask = batch()
    assert_close(value_and_grad(module.reinforce_loss, logps, rows, mask)[1], -rows[:, None] * mask / 8)
    assert_close(value_and_grad(module.reinforce_loss, logps, tokens, mask)[1], -tokens * mask / 8)


def check_one_advantage_a_response_is_the_same_for_all_its_tokens(module):
    logps, rows, _, mask = batch()
    whole = module.reinforce_loss(logps, rows, mask)
    assert_close(module.reinforce_loss(logps, rows[:, None].expand(8, 6), mask), whole)
    response = torch.where(mask.bool(), logps, 0.0).sum(-1, keepdim=True)  # one action: the whole response
    assert_close(module.reinforce_loss(response, rows, torch.ones(8, 1)), whole)


def check_no_gradient_reaches_the_advantages(module):
    logps, rows, tokens, mask = batch()
    for advantages in (rows, tokens):
        advantages.requires_grad_()
        module.reinforce_loss(logps.requires_grad_(), advantages, mask).backward()
        assert advantages.grad is None


def check_padding_changes_nothing(module):
    for kind in (1, 2):  # an advantage of each row, or of each token

        def part(kind=kind, **options):
            four = batch(**options)
            return four[0], four[kind], four[3]

        padding_changes_nothing(module.reinforce_loss, part)


def check_what_stands_under_a_0_never_matters(module):
    logps, rows, tokens, mask = batch()
    for advantages in (rows, tokens):
        junk_changes_nothing(module.reinforce_loss, logps, advantages, mask)


def check_a_batch_is_the_weighted_mean_of_its_parts(module):
    logps, rows, _, mask = batch()
    parts = [module.reinforce_loss(logps[part], rows[part], mask[part]) for part in (slice(0, 2), slice(2, 8))]
    assert_close((2 * parts[0] + 6 * parts[1]) / 8, module.reinforce_loss(logps, rows, mask))


def check_half_precision_is_computed_in_float32(module):
    for dtype in (torch.bfloat16, torch.float16):
        logps, rows, _, mask = batch(dtype=dtype)
        loss = module.reinforce_loss(logps, rows, mask)
        assert loss.dtype == torch.float32
        assert_close(loss, module.reinforce_loss(logps.float(), rows.float(), mask), rtol=0, atol=0)
        assert module.batch_baseline(torch.ones(2, dtype=dtype)).dtype == torch.float32
    assert module.reinforce_loss(*(x.double() for x in batch()[:2]), batch()[3]).dtype == torch.float64
    big = torch.tensor([[-1e4, -1e4]], requires_grad=True)
    loss = module.reinforce_loss(big, torch.tensor([1e4]), torch.ones(1, 2))
    loss.backward()
    assert loss == 2e8 and (big.grad == -1e4).all()


def check_the_batch_baseline_in_loops(module):
    rewards = torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = module.batch_baseline(rewards)
    for i in range(7):
        others = [rewards[j].item() for j in range(7) if j != i]
        assert found[i].item() == pytest.approx(sum(others) / 6, abs=1e-12)
    assert_close(rewards - found, 7 / 6 * (rewards - rewards.mean()))
    assert_close(module.batch_baseline(rewards + 1e3) - 1e3, found, rtol=0, atol=1e-9)  # it follows the reward's zero


def check_a_baseline_does_not_know_its_own_response(module):
    rewards = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = module.batch_baseline(rewards)
    for i in range(5):
        changed = rewards.clone()
        changed[i] += 100.0
        after = module.batch_baseline(changed)
        assert after[i].item() == pytest.approx(before[i].item(), abs=1e-9)
        assert ((after - before)[[j for j in range(5) if j != i]] - 25).abs().max() < 1e-9


def check_equal_rewards_give_no_gradient(module):
    for value in (0.1, 0.7, -3.3, 1e6, 1 / 3):
        for size in (2, 3, 7):
            rewards = torch.full((size,), value)
            assert (rewards - module.batch_baseline(rewards)).eq(0).all()


def check_the_running_mean_is_the_mean_of_the_past(module):
    steps = torch.randn(6, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mean, count = 0.0, 0
    for s in range(6):
        assert mean == pytest.approx(steps[:s].mean().item() if s else 0.0, abs=1e-12) and count == 3 * s
        mean, count = module.running_mean(mean, count, steps[s])
    assert module.running_mean(5.0, 1, torch.tensor([1.0])) == (3.0, 2)


def check_the_optimal_baseline_is_the_bottom_of_the_parabola(module):
    """Var(b) = Var(b*) + (b - b*)^2 E|g|^2."""
    world = exact.make_world(1)
    found = moments(world, some_policy(world))
    best = module.optimal_baseline(found.rewards, found.squares, found.probs)
    weight = (found.probs * found.squares).sum(-1)
    for step in (-2.0, -0.1, 0.1, 2.0):
        assert_close(found.variance(best + step), found.variance(best) + step**2 * weight)
    same = module.optimal_baseline(found.rewards, torch.ones_like(found.squares), found.probs)
    assert_close(same, found.mean)  # scores of one length: the mean reward


def check_bad_input_is_named(module):
    logps, rows, tokens, mask = batch()
    one, pair = torch.ones(3), torch.ones(2, 2)
    cases = [
        (lambda: module.reinforce_loss(logps[:, :5], rows, mask), r"logps \(8, 5\) against mask \(8, 6\)"),
        (lambda: module.reinforce_loss(logps[0], rows, mask[0]), r"logps \(6,\) against mask \(6,\); want \(B, T\)"),
        (lambda: module.reinforce_loss(logps, rows[:7], mask), r"advantages \(7,\) against mask \(8, 6\)"),
        (lambda: module.reinforce_loss(logps, tokens[:, :1], mask), r"advantages \(8, 1\) against mask \(8, 6\)"),
        (lambda: module.reinforce_loss(logps, rows, 0 * mask), r"no valid token.*\(8, 6\)"),
        (lambda: module.reinforce_loss(logps, rows * math.nan, mask), "advantages must be finite, got .*nan"),
        (lambda: module.batch_baseline(one[:1]), r"B at least 2, got shape \(1,\)"),
        (lambda: module.batch_baseline(torch.ones(2, 2)), r"got shape \(2, 2\)"),
        (lambda: module.batch_baseline(one * math.inf), "must be finite, got .*inf"),
        (lambda: module.running_mean(0.0, -1, one), "got -1, 3"),
        (lambda: module.running_mean(0.0, 0, one[:0]), "at least one reward, got 0, 0"),
        (lambda: module.running_mean(math.nan, 0, one), "must be finite, got nan"),
        (lambda: module.running_mean(0.0, 0, one * math.nan), "must be finite, got 0.0, .*nan"),
        (lambda: module.optimal_baseline(one, one[:2], one), r"\(3,\), \(2,\), \(3,\)"),
        (lambda: module.optimal_baseline(one, 0 * one, one / 3), "every score is zero"),
        (lambda: module.optimal_baseline(pair, pair * torch.tensor([[1.0], [0.0]]), pair / 2), "every score is zero"),
    ]
    for function, message in cases:
        with pytest.raises(ValueError, match=message):
            function()


# The exact world: expectations by enumeration.


def expected_gradient(module, world, logits, advantages):
    """The gradient of the expected loss (a mean over prompts), over all responses; advantages (X, Y) or (X, Y, T)."""
    logits = logits.clone().requires_grad_()
    tokens = exact.token_logps(world, logits)
    probs = tokens.detach().sum(-1).exp()
    loss = torch.zeros((), dtype=torch.float64)
    for x, y in itertools.product(*map(range, probs.shape)):
        term = module.reinforce_loss(tokens[x, y][None], advantages[x, y][None], torch.ones(1, world.length))
        loss = loss + probs[x, y] / len(probs) * term
    loss.backward()
    return logits.grad


def exact_gradient(world, logits):
    logits = logits.clone().requires_grad_()
    exact.objective(world, logits).backward()
    return logits.grad


def check_any_constant_baseline_leaves_the_policy_gradient(module):
    """With the KL in the reward, the expected gradient is that of -(E[r] - beta * KL), whatever a prompt's baseline."""
    world = small_world()
    logits = some_policy(world)
    rewards = shaped_rewards(world, logits)
    for baseline in (0.0, -3.0, torch.tensor([[5.0], [-70.0]], dtype=torch.float64)):
        grad = expected_gradient(module, world, logits, rewards - baseline)
        assert_close(grad, -exact_gradient(world, logits), rtol=1e-9, atol=1e-11)


def check_the_batch_baseline_is_unbiased_over_all_batches(module):
    """All batches of three responses, two to prompt 0 and one to prompt 1: the mean of their gradients is the exact
    one, for each prompt."""
    world = exact.make_world(2, prompts=2, vocab=2, length=2)
    logits = some_policy(world)
    rewards, probs = shaped_rewards(world, logits), exact.response_logps(world, logits).exp()
    g = scores(world, logits)  # (2, 4, D)
    exact_parts = ((probs * rewards)[..., None] * g).sum(1)  # (2, D)
    mean = torch.zeros_like(exact_parts)
    for a, b, c in itertools.product(range(4), repeat=3):
        sampled = torch.stack([rewards[0, a], rewards[0, b], rewards[1, c]])
        advantages = sampled - module.batch_baseline(sampled)
        chance = probs[0, a] * probs[0, b] * probs[1, c]
        mean[0] += chance * (advantages[0] * g[0, a] + advantages[1] * g[0, b]) / 2
        mean[1] += chance * advantages[2] * g[1, c]
    assert_close(mean, exact_parts, rtol=1e-9, atol=1e-12)


def check_the_adapter_in_loops(module):
    """Rewards with the KL inside, less the mean of the others; the loss over the rows asked for."""
    algorithm = module.algorithm()
    settings = algorithm.settings(beta=0.5)
    logps, _, _, mask = batch(dtype=torch.float32)
    ref = batch(1, dtype=torch.float32)[0]
    reward = torch.arange(8.0)
    rollout = loop.Rollout(lm.Completions(mask, mask, mask, logps, []), reward, ref)
    advantages, targets = algorithm.advantages(rollout, settings)
    shaped = [reward[i] - 0.5 * sum(logps[i, t] - ref[i, t] for t in range(6) if mask[i, t]) for i in range(8)]
    for i in range(8):
        assert advantages[i].item() == pytest.approx(
            shaped[i].item() - sum(shaped[:i] + shaped[i + 1 :]).item() / 7, rel=1e-5
        )
    rows = torch.tensor([5, 0])
    loss = algorithm.loss(logps[rows], rollout, rows, advantages[rows], settings)
    assert_close(loss, module.reinforce_loss(logps[rows], advantages[rows], mask[rows]))
    assert targets is None and algorithm.critic_loss is None and not algorithm.greedy
    assert settings.group == 1 and not algorithm.over_tokens(settings)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_functions(check):
    check(original)


MISTAKES = {
    "flipped sign": ("return -(advantages * logps)", "return (advantages * logps)"),
    "a mean over the response's tokens": (
        ".sum(-1).mean()\n\n\ndef batch",
        ".sum(-1).div(valid.sum(-1).clamp(min=1)).mean()\n\n\ndef batch",
    ),
    "a mean over all tokens": (".sum(-1).mean()\n\n\ndef batch", ".sum() / valid.sum()\n\n\ndef batch"),
    "a mean over padding": (".sum(-1).mean()\n\n\ndef batch", ".mean()\n\n\ndef batch"),
    "empty rows left out": (".sum(-1).mean()\n\n\ndef batch", ".sum() / valid.any(-1).sum()\n\n\ndef batch"),
    "mask forgotten": ("advantages = torch.where(valid, advantages, 0.0)", "advantages = advantages * 1.0"),
    "mask as a product": ("torch.where(valid, logps.to(dtype), 0.0)", "logps.to(dtype) * valid"),
    "advantages with gradient": ("advantages.detach().to(dtype)", "advantages.to(dtype)"),
    "advantages of another row": ("advantages[:, None].expand", "advantages.roll(1)[:, None].expand"),
    "no upcast": ("advantages = advantages.detach().to(dtype)", "advantages, dtype = advantages.detach(), logps.dtype"),
    "own reward in the mean": ("(shifted.sum() - shifted) / (len(rewards) - 1)", "shifted.mean().expand_as(shifted)"),
    "divided by B": ("(shifted.sum() - shifted) / (len(rewards) - 1)", "(shifted.sum() - shifted) / len(rewards)"),
    "the best of the others": ("(shifted.sum() - shifted) / (len(rewards) - 1)", "shifted.max().expand_as(shifted)"),
    "rounding left in": ("shifted = rewards - rewards[0]", "shifted = rewards.clone(); rewards = 0 * rewards"),
    "an exponential mean": (
        "(rewards.double() - mean).sum().item() / total, total",
        "(rewards.double() - mean).mean().item() * 0.1, total",
    ),
    "count by step": ("total = count + rewards.numel()", "total = count + 1"),
    "the plain mean": ("weights = probs * squared_norms", "weights = probs + 0 * squared_norms"),
    "scores unsquared": ("weights = probs * squared_norms", "weights = probs * squared_norms.sqrt()"),
    "no KL in the reward": ("rollout.scores - settings.beta * rollout", "rollout.scores - 0.0 * rollout"),
    "a prompt without a score": ("(weights.sum(-1) <= 0).any()", "(weights.sum(-1) <= 0).all()"),
    "one response is enough": ("len(rewards) < 2", "len(rewards) < 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    """Each deliberate mistake is caught by a check. (That the original passes all of them is test_the_functions.)"""
    assert caught_by(load_mutant(PATH, *MISTAKES[mistake]), CHECKS)


# Bias


def group_estimate(world, logits, group, advantages):
    """Draws `group` responses to prompt 0; advantages: rewards (G,) -> (G,)."""
    probs, rewards = exact.response_logps(world, logits)[0].exp(), shaped_rewards(world, logits)[0]

    def estimate(generator):
        responses = torch.multinomial(probs, group, replacement=True, generator=generator)
        return responses, advantages(rewards[responses])

    return estimate


@pytest.mark.evidence
def test_sampled_gradients_have_the_exact_mean(evidence):
    """32 random projections of the mean of sampled gradients against the exact gradient. The best of the batch as
    baseline, which depends on the own response, is biased, and the same test sees it."""
    draws = 20_000 if evidence.full else 6_000
    world = exact.make_world(0, prompts=1)
    logits = some_policy(world)
    z = projected_z(world, logits, group_estimate(world, logits, 8, lambda r: r - original.batch_baseline(r)), draws)
    assert 0.6 < z.square().mean().sqrt() < 1.5
    biased = projected_z(world, logits, group_estimate(world, logits, 8, lambda r: r - r.max()), draws)
    note = f"{draws} batches of 8 responses, 32 random projections."
    evidence(
        "rlhf/reinforce", "Bias: largest |z|, mean of the others as baseline", value=z.abs().max(), bar=4.5, note=note
    )
    name = "Bias: largest |z|, the best of the batch as baseline"
    evidence("rlhf/reinforce", name, value=biased.abs().max(), bar=10, better=">=", note=note)


def test_a_mean_of_the_past_is_unbiased_and_one_that_saw_the_present_is_not():
    """Two steps of one response: over all pairs, the mean before the update leaves step 2's gradient exact; the mean
    after it has taken half of the own reward away."""
    world = small_world(prompts=1)
    logits = some_policy(world)
    rewards, probs = shaped_rewards(world, logits)[0], exact.response_logps(world, logits)[0].exp()
    g = scores(world, logits)[0]
    truth = ((probs * rewards)[:, None] * g).sum(0)
    before, after = torch.zeros_like(truth), torch.zeros_like(truth)
    for a, b in itertools.product(range(9), repeat=2):
        past = original.running_mean(0.0, 0, rewards[a][None])
        present = original.running_mean(*past, rewards[b][None])
        before += probs[a] * probs[b] * (rewards[b] - past[0]) * g[b]
        after += probs[a] * probs[b] * (rewards[b] - present[0]) * g[b]
    assert_close(before, truth)
    assert_close(after, truth / 2)


def test_a_median_or_maximum_of_the_batch_turns_the_gradient():
    """Over all batches of three responses: the mean with the own reward inside shortens the gradient, to (B - 1) / B;
    the median and the maximum, which depend on the own reward otherwise, change its direction."""
    world = exact.make_world(3, prompts=1, vocab=2, length=2)
    logits = some_policy(world)
    rewards, probs = shaped_rewards(world, logits)[0], exact.response_logps(world, logits)[0].exp()
    g = scores(world, logits)[0]
    truth = ((probs * rewards)[:, None] * g).sum(0)
    cosines = {}
    for name, baseline in (("mean", torch.mean), ("median", torch.median), ("maximum", torch.max)):
        found = torch.zeros_like(truth)
        for chosen in itertools.product(range(4), repeat=3):
            r = rewards[list(chosen)]
            found += probs[list(chosen)].prod() * ((r - baseline(r))[:, None] * g[list(chosen)]).mean(0)
        cosines[name] = torch.cosine_similarity(found, truth, dim=0).item()
        if name == "mean":
            assert_close(found, 2 / 3 * truth)
    assert cosines["median"] < 0.9995 and cosines["maximum"] < 0.9


# Variance


@pytest.mark.evidence
def test_what_a_baseline_does_to_the_variance(evidence):
    """The trace of the covariance of one response's gradient, by enumeration, the mean over the prompts of five
    worlds. Adding a constant to every reward changes no policy gradient, and only a baseline that follows it keeps the
    variance."""
    found = {}
    for seed in SEEDS:
        world = exact.make_world(seed)
        for place, logits in (("at the start", world.ref_logits), ("at π*", optimum(world))):
            here = moments(world, logits)
            best = original.optimal_baseline(here.rewards, here.squares, here.probs)
            for name, baseline in (
                ("no baseline", 0 * best),
                ("no baseline, rewards raised by 3", 0 * best - 3),  # r + 3 without baseline is r less -3
                ("mean of a large batch", here.mean.mean().expand_as(best)),
                ("mean of the prompt", here.mean),
                ("the best constant of the prompt", best),
            ):
                found.setdefault((place, name), []).append(here.variance(baseline).mean().item())
            assert (here.variance(best) <= here.variance(here.mean) + 1e-12).all()
    for (place, name), spread in found.items():
        if place == "at π*" and "raised" in name:
            continue
        note = "Exact: the trace of the covariance of (r − b) ∇log π for one response, in reward², mean over prompts."
        evidence(
            "rlhf/reinforce",
            f"Variance {place}: {name}",
            value=round(abs(sum(spread)) / 5, 12),  # zero up to rounding
            bar=1e-12 if place == "at π*" and "prompt" in name else None,
            seeds=SEEDS,
            spread=spread,
            note=note,
        )


@pytest.mark.evidence
def test_dropping_the_kl_of_earlier_tokens_can_add_noise(evidence):
    """A token cannot change the KL of the tokens before it, so its advantage may leave them out: the gradient is the
    same. With one baseline a prompt the variance at pi* is not: the whole reward is constant there, its tail is not."""
    world = small_world()
    logits = some_policy(world)
    tokens, ref = exact.token_logps(world, logits), exact.token_logps(world, world.ref_logits)
    kl = tokens - ref  # (X, Y, T)
    to_go = world.rewards[..., None] - world.beta * kl.flip(-1).cumsum(-1).flip(-1)
    assert_close(
        expected_gradient(original, world, logits, to_go), -exact_gradient(world, logits), rtol=1e-9, atol=1e-11
    )
    spread = {"the whole response's KL": [], "the KL from the token on": []}
    for seed in SEEDS:
        world = exact.make_world(seed)
        logits = optimum(world)
        here, probs = moments(world, logits), logits.softmax(-1)
        kl = exact.token_logps(world, logits) - exact.token_logps(world, world.ref_logits)
        norms = 1 - 2 * exact.token_logps(world, logits).exp() + probs.square().sum(-1)[:, world.prefixes]
        past = kl.cumsum(-1) - kl  # of the tokens before
        # Scores at different prefixes stand in different parts of the table: their squares add.
        advantages = (here.rewards - here.mean[:, None])[..., None] + world.beta * past
        second = (here.probs[..., None] * advantages.square() * norms).sum((1, 2))
        spread["the KL from the token on"].append((second - here.gradient).mean().item())
        spread["the whole response's KL"].append(abs(here.variance(here.mean).mean().item()))
        assert_close(norms.sum(-1), here.squares)
        # What is left of the tail is a number of the prefix: a perfect critic takes all of it off.
        tail = here.rewards[..., None] + world.beta * past
        for t in range(world.length):
            by_prefix = tail[..., t].view(len(tail), world.vocab**t, -1)
            assert_close(by_prefix, by_prefix[..., :1].expand_as(by_prefix))
    assert max(spread["the whole response's KL"]) < 1e-12 and min(spread["the KL from the token on"]) > 0.05
    note = "Exact, the prompt's mean as baseline, one response, mean over prompts."
    for name, values in spread.items():
        name = f"Variance at π*, an advantage with {name}"
        value = round(sum(values) / 5, 12)  # zero up to rounding
        evidence("rlhf/reinforce", name, value=value, seeds=SEEDS, spread=values, note=note)


def variance_on_arithmetic(count, seed, prompts=16, group=8):
    """{baseline: trace of the covariance of a batch's gradient}, from `count` batches of the warm start."""
    sums, squares = {}, {}
    for policy, rollout, rewards, greedy in arithmetic_batches(count, seed, prompts, group):
        out = rollout.completions
        flat = rewards.flatten()
        others = (rewards.sum(1, keepdim=True) - rewards) / (group - 1)
        baselines = {
            "none": 0 * flat,
            "others of the batch": original.batch_baseline(flat),
            "others of the prompt": others.flatten(),
            "greedy response": greedy.repeat_interleave(group),
        }
        logps = lm.token_logps(policy, out.ids, out.attention, out.mask.shape[1])
        for name, baseline in baselines.items():
            loss = original.reinforce_loss(logps, flat - baseline, out.mask)
            grads = torch.autograd.grad(loss, list(policy.parameters()), retain_graph=True)
            vector = torch.cat([g.flatten() for g in grads]).double()
            sums[name] = sums.get(name, 0) + vector
            squares[name] = squares.get(name, 0) + vector.square().sum().item()
    return {name: (squares[name] - sums[name].square().sum().item() / count) / (count - 1) for name in sums}


@pytest.mark.evidence
def test_variance_on_arithmetic(evidence):
    """The same on a language model: there the mean of the rewards is far from the best constant, since wrong answers
    have the longer scores (the next test), and subtracting it adds noise."""
    seeds, count = (SEEDS, 24) if evidence.full else (SEEDS[:1], 4)
    runs = [variance_on_arithmetic(count, seed) for seed in seeds]
    for name in ("others of the batch", "others of the prompt", "greedy response"):
        spread = [run[name] / run["none"] for run in runs]
        note = "The trace of the covariance of a batch's gradient, over that without a baseline; 16 prompts, 8 each."
        evidence(
            "rlhf/reinforce",
            f"Arithmetic: variance relative to no baseline, {name}",
            value=sum(spread) / len(spread),
            seeds=seeds,
            spread=spread,
            note=note,
        )


def score_lengths(seed, rows):
    """Rewards and |grad log pi(y|x)|^2 in all parameters, for `rows` sampled answers of the warm start."""
    policy, batch, rewards, _ = next(arithmetic_batches(1, seed, prompts=rows // 8))
    out, squares = batch.completions, []
    for i in range(rows):
        row = slice(i, i + 1)
        logps = lm.token_logps(policy, out.ids[row], out.attention[row], out.mask.shape[1])
        total = torch.where(out.mask[row].bool(), logps, 0.0).sum()
        squares.append(sum(g.square().sum().item() for g in torch.autograd.grad(total, list(policy.parameters()))))
    return rewards.flatten().double(), torch.tensor(squares, dtype=torch.float64)


@pytest.mark.evidence
def test_wrong_answers_have_the_longer_scores(evidence):
    """A confident right answer has a short score, an unlikely wrong one a long score. So the constant that makes the
    variance least lies far below the mean reward, and nearer to 0 than to it."""
    seeds, rows = (SEEDS, 256) if evidence.full else (SEEDS[:1], 64)
    means, best, ratios = [], [], []
    for seed in seeds:
        rewards, squares = score_lengths(seed, rows)
        means.append(rewards.mean().item())
        best.append(original.optimal_baseline(rewards, squares, torch.full_like(rewards, 1 / rows)).item())
        ratios.append((squares[rewards == 0].mean() / squares[rewards == 1].mean()).item())
    assert all(b < m / 2 for b, m in zip(best, means, strict=True))
    common = {"seeds": seeds, "note": f"{rows} sampled answers of the warm start a seed, all parameters."}
    for name, spread in (("mean reward", means), ("best constant baseline", best)):
        evidence("rlhf/reinforce", f"Arithmetic: {name}", value=sum(spread) / len(spread), spread=spread, **common)
    name = "Arithmetic: squared score of wrong answers over that of right ones"
    evidence("rlhf/reinforce", name, value=sum(ratios) / len(ratios), spread=ratios, unit="times", **common)


# The method


def trains_in_the_loop(algorithm, out, **changes):
    """Two steps on the warm start, the second from a policy that the first has moved; -> the history."""
    policy, tokenizer = arithmetic.warm_start()
    before = torch.cat([p.detach().flatten() for p in policy.parameters()])
    records = arithmetic.problems(held_out=False)[:64]
    settings = algorithm.settings(**({"steps": 2, "out": str(out)} | changes))
    trainer = loop.train(policy, tokenizer, records, arithmetic.exact_match, algorithm, settings)
    after = torch.cat([p.detach().flatten() for p in policy.parameters()])
    assert torch.isfinite(after).all() and (after != before).any()
    return trainer.history


def test_it_runs_in_the_shared_loop(tmp_path):
    history = trains_in_the_loop(original.algorithm(), tmp_path, prompts=16)
    assert len(history) == 2 and all(0 <= record["reward"] <= 1 for record in history)


def test_one_step_is_grpos_without_std_and_length(tmp_path):
    """With one group that is the whole batch, the gradient is B / (B - 1) of Dr. GRPO's times its divisor."""
    logps, _, _, mask = batch()
    rewards = torch.randn(8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ours = value_and_grad(original.reinforce_loss, logps, rewards - original.batch_baseline(rewards), mask)[1]
    centred = grpo.group_advantages(rewards[None], scale="none")[0]
    options = {"normalize": "constant", "max_len": 6}
    theirs = value_and_grad(grpo.grpo_loss, logps, logps, centred, mask, **options)[1]
    assert_close(ours, 8 / 7 * 6 * theirs)


@pytest.mark.evidence
def test_it_reaches_the_optimum(evidence):
    note = "The worst of the seeds, which set both the world and the samples; 2,000 steps of 16 responses a prompt."
    reaches_the_optimum(evidence, "rlhf/reinforce", original.algorithm(), "REINFORCE", note=note)


def without_baseline():
    def advantages(rollout, settings):
        return rollout.scores - settings.beta * rollout.token_kl().sum(-1), None

    return replace(original.algorithm(), advantages=advantages)


@pytest.mark.evidence
def test_without_a_baseline_it_stays_further_away(evidence):
    """The same run with b = 0: the noise does not vanish at pi*, where r - beta log(pi/ref) is beta log Z, not 0."""
    seeds = SEEDS if evidence.full else SEEDS[:1]
    bare = without_baseline()
    nats = [trials.exact_rlhf(bare, exact.make_world(seed), seed).to_optimum for seed in seeds]
    evidence(
        "rlhf/reinforce",
        "Exact world: KL to the optimum, no baseline",
        value=max(nats),
        unit="nats",
        seeds=seeds,
        spread=nats,
        note="As above without the baseline; the worst of the seeds.",
    )
    assert max(nats) > 0.01 or not evidence.full


@pytest.mark.evidence
def test_arithmetic_with_and_without_a_baseline(evidence, tmp_path):
    """On this task, whose rewards are 0 and 1, the mean as baseline is no gain over none."""
    if not evidence.full:
        pytest.skip("a result of 120 steps: in full only")
    changes = {"steps": 120, "eval_every": 30, "save_every": 10_000}
    forms = {"the mean of the batch's others as baseline": original.algorithm(), "no baseline": without_baseline()}
    for name, algorithm in forms.items():
        runs = [trials.arithmetic_rlhf(algorithm, seed, str(tmp_path / name / str(seed)), **changes) for seed in SEEDS]
        ends = [run["accuracy"][-1] for run in runs]
        evidence(
            "rlhf/reinforce",
            f"Arithmetic: greedy exact match after 120 steps, {name}",
            value=sum(ends) / len(ends),
            bar=0.8,
            better=">=",
            seeds=SEEDS,
            spread=ends,
            note=f"From {runs[0]['accuracy'][0]:.3f}; 128 prompts a step, one response each, β = 0.01.",
            curve={
                "x": runs[0]["step"],
                "y": {name: [run["accuracy"] for run in runs]},
                "xlabel": "step",
                "ylabel": "greedy held-out exact match",
            },
        )
