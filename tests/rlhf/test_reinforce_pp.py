"""REINFORCE++ against OpenRLHF's formulas in explicit loops, PPO with a critic of zero, TRL, exact expectations over
all batches, its fixed points, and its own broken copies."""

import itertools
import math
import statistics
import threading
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from snippets.rlhf import grpo, loop, ppo
from snippets.rlhf import reinforce_pp as original
from snippets.worlds import arithmetic, exact, lm, trials
from tests.mutation import caught_by, load_mutant
from tests.rlhf.common import (
    LENGTHS,
    TWO_PASSES,
    apart,
    finite_from_bf16_logits,
    junk_changes_nothing,
    random_batch,
    train_on_arithmetic,
    trl_grpo,
    watched,
)
from tests.rlhf.common import value_and_grad as of_function

PATH = "snippets/rlhf/reinforce_pp.py"
GROUP = 4


def batch(seed=0, *, spread=0.3, **options):
    """logps, old, ref, scores, mask: ratios that are clipped on both sides."""
    old, logps, *rest = random_batch(seed, 2, spread, **options)
    return logps, old, *rest


def plain(module, old, ref, scores, mask, *, beta=0.1):
    return module.normalize(module.reward_to_go(scores, old - ref, mask, beta=beta), mask)


def with_baseline(module, scores, mask, *, group=GROUP):
    centred = module.group_baseline(scores, group)
    return module.normalize(centred[:, None].expand(mask.shape), mask)


def some_advantages(mask, seed=9):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(mask.shape, generator=generator, dtype=torch.float64)


def value_and_grad(module, *args, **options):
    return of_function(module.reinforce_pp_loss, *args, **options)


# The formulas. Each check takes the module, so that broken copies can be put to it.


def openrlhf(variant, old, ref, scores, mask, beta):
    """compute_reward, get_cumulative_returns and the normalisation of OpenRLHF's experience maker, written as loops."""
    baseline = [statistics.fmean(scores.tolist()[i // GROUP * GROUP :][:GROUP]) for i in range(len(mask))]
    found = {}
    for i in range(len(mask)):
        here = [t for t in range(mask.shape[1]) if mask[i, t]]
        rewards = {t: -beta * (old[i, t] - ref[i, t]).item() if variant == "plain" else 0.0 for t in here}
        if here:
            rewards[here[-1]] += scores[i].item() - (0.0 if variant == "plain" else baseline[i])
        to_come = 0.0
        for t in reversed(here):
            to_come += rewards[t]
            found[i, t] = to_come
    mean = statistics.fmean(found.values())
    deviation = max(statistics.pvariance(found.values()), 1e-8) ** 0.5
    return {place: (value - mean) / deviation for place, value in found.items()}


def check_advantages_in_loops(module):
    _, old, ref, scores, mask = batch()
    for variant in ("plain", "baseline"):
        mine = plain(module, old, ref, scores, mask) if variant == "plain" else with_baseline(module, scores, mask)
        expected = openrlhf(variant, old, ref, scores, mask, 0.1)
        for i, t in itertools.product(range(8), range(6)):
            assert mine[i, t].item() == pytest.approx(expected.get((i, t), 0.0), abs=1e-12), (variant, i, t)


def check_the_groups_mean_in_loops(module):
    scores = batch()[3]
    found = module.group_baseline(scores, GROUP).tolist()
    for i, value in enumerate(scores.tolist()):
        group = scores.tolist()[i // GROUP * GROUP :][:GROUP]
        assert found[i] == pytest.approx(value - statistics.fmean(group), abs=1e-12)


def check_the_first_token_gets_the_whole_return(module):
    """Score less beta * log(pi / ref) of the response at its first token, and the score less its own KL at the last."""
    _, old, ref, scores, mask = batch()
    to_go = module.reward_to_go(scores, old - ref, mask, beta=0.7)
    for i, length in enumerate(LENGTHS):
        if length:
            assert_close(to_go[i, 0], scores[i] - 0.7 * (old - ref)[i, :length].sum())
            assert_close(to_go[i, length - 1], scores[i] - 0.7 * (old - ref)[i, length - 1])


def check_it_is_ppo_with_a_critic_of_zero(module):
    """GAE with gamma = lambda = 1 and V = 0 over PPO's rewards; PPO whitens with n - 1 where this has n."""
    logps, old, ref, scores, mask = batch()
    rewards = ppo.kl_rewards(scores, old, ref, mask, beta=0.1)
    advantages, _ = ppo.gae(rewards, torch.zeros_like(old), mask, gamma=1.0, lam=1.0)
    assert_close(module.reward_to_go(scores, old - ref, mask, beta=0.1), advantages)
    count = mask.sum()
    white = ppo.whiten(advantages, mask) * (count / (count - 1)).sqrt()
    assert_close(plain(module, old, ref, scores, mask), white, rtol=1e-6, atol=1e-6)
    marks = some_advantages(mask)
    assert_close(module.reinforce_pp_loss(logps, old, marks, mask), ppo.ppo_loss(logps, old, marks, mask))


def check_the_loss_in_loops(module):
    """Equation 1 over all tokens, and equation 8's k2."""
    logps, old, ref, _, mask = batch()
    marks = some_advantages(mask)
    for clip, beta in ((0.2, 0.0), (0.2, 0.3), (0.05, 1.0)):
        total = 0.0
        for i, t in itertools.product(range(8), range(6)):
            if mask[i, t]:
                ratio, mark = math.exp(logps[i, t] - old[i, t]), marks[i, t].item()
                total -= min(ratio * mark, max(1 - clip, min(1 + clip, ratio)) * mark)
                total += beta * 0.5 * (logps[i, t] - ref[i, t]).item() ** 2
        loss = module.reinforce_pp_loss(logps, old, marks, mask, clip=clip, ref_logps=ref, beta=beta)
        assert loss.item() == pytest.approx(total / sum(LENGTHS), rel=1e-12)


def check_against_finite_differences(module):
    logps, old, ref, _, mask = batch(seed=5)
    marks = some_advantages(mask)
    for options in ({}, {"ref_logps": ref, "beta": 0.5}):
        torch.autograd.gradcheck(
            lambda x, o=options: module.reinforce_pp_loss(x, old, marks, mask, **o), (logps.clone().requires_grad_(),)
        )


def check_every_valid_token_has_mean_zero_and_variance_one(module):
    _, old, ref, scores, mask = batch()
    for mine in (plain(module, old, ref, scores, mask), with_baseline(module, scores, mask)):
        values = mine[mask.bool()]
        assert values.mean().abs() < 1e-12 and values.var(correction=0).item() == pytest.approx(1.0)
        assert mine[~mask.bool()].eq(0).all()


def check_what_a_shift_of_the_rewards_does(module):
    """One constant for all rewards changes nothing. A constant for each prompt is gone with the group's mean and not
    without: there it pushes a whole group up or down."""
    _, old, ref, scores, mask = batch()
    shift = torch.tensor([5.0] * GROUP + [-1.0] * GROUP, dtype=torch.float64)
    assert_close(with_baseline(module, scores + shift, mask), with_baseline(module, scores, mask))
    before = plain(module, old, ref, scores, mask)
    assert_close(plain(module, old, ref, scores + 7.0, mask), before)
    assert (plain(module, old, ref, scores + shift, mask) - before).abs().max() > 0.5
    easy = torch.tensor([1.0] * GROUP + [0.0] * GROUP, dtype=torch.float64)
    pushed = plain(module, old, ref, easy, mask, beta=0.0)
    assert (pushed[:GROUP][mask[:GROUP].bool()] > 0).all() and (pushed[GROUP:][mask[GROUP:].bool()] < 0).all()
    assert with_baseline(module, easy, mask).eq(0).all()


def check_the_scale_of_the_reward_is_forgotten(module):
    """Inside the division reward and beta are scaled alike, so that nothing changes; one factor for all prompts."""
    _, old, ref, scores, mask = batch()
    before = plain(module, old, ref, scores, mask, beta=0.1)
    assert_close(plain(module, old, ref, 50 * scores, mask, beta=5.0), before)
    assert_close(with_baseline(module, 50 * scores, mask), with_baseline(module, scores, mask))
    spread, mine = module.group_baseline(scores, GROUP), with_baseline(module, scores, mask)[:, 0]
    slope = (mine[0] - mine[1]) / (spread[0] - spread[1])
    here = torch.tensor(LENGTHS) > 0
    assert_close((mine - mine[0])[here], slope * (spread - spread[0])[here])


def check_equal_rewards_give_exact_zeros(module):
    for value in (0.1, 0.7, -3.3, 1e6, 1 / 3):
        scores, mask = torch.full((21,), value), torch.ones(21, 5)
        assert with_baseline(module, scores, mask, group=7).eq(0).all()
        assert plain(module, mask, mask, scores, mask).eq(0).all()
        groups = torch.tensor([value, 0.3, -7e5]).repeat_interleave(7)
        assert with_baseline(module, groups, mask, group=7).eq(0).all()


def check_processes_share_one_batch(module):
    """Two halves, in threads that add their sums up, are normalised as the whole is."""
    _, old, ref, scores, mask = batch()
    whole = module.reward_to_go(scores, old - ref, mask, beta=0.1)
    barrier, sums, found = threading.Barrier(2, timeout=20), {}, {}

    def half(k):
        def total(value):
            sums[k] = value
            barrier.wait()
            both = sums[0] + sums[1]
            barrier.wait()
            return both

        rows = slice(4 * k, 4 * k + 4)
        try:
            found[k] = module.normalize(whole[rows], mask[rows], total=total)
        except threading.BrokenBarrierError:
            pass

    threads = [threading.Thread(target=half, args=(k,)) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_close(torch.cat([found[0], found[1]]), module.normalize(whole, mask))


def check_no_gradient_reaches_the_constants(module):
    logps, old, ref, scores, mask = batch()
    leaves = [x.clone().requires_grad_() for x in (logps, old, ref, some_advantages(mask))]
    module.reinforce_pp_loss(leaves[0], leaves[1], leaves[3], mask, ref_logps=leaves[2], beta=0.1).backward()
    assert leaves[0].grad.abs().sum() > 0
    assert all(leaf.grad is None for leaf in leaves[1:])
    kl = (old - ref).requires_grad_()
    assert not module.reward_to_go(scores, kl, mask, beta=0.1).requires_grad


# What must not matter.


def check_what_stands_under_the_mask_never_matters(module):
    logps, old, ref, scores, mask = batch()
    marks = some_advantages(mask)

    def loss(logps, old, marks, ref, mask):
        return module.reinforce_pp_loss(logps, old, marks, mask, ref_logps=ref, beta=0.1)

    junk_changes_nothing(loss, logps, old, marks, ref, mask)
    advantages = plain(module, old, ref, scores, mask)
    for junk in (float("nan"), float("inf"), -float("inf"), 1e30):
        stained = scores.clone()
        stained[2] = junk  # the row without a token
        kl = torch.where(mask.bool(), old - ref, junk)
        to_go = module.reward_to_go(stained, kl, mask, beta=0.1)
        assert_close(module.normalize(torch.where(mask.bool(), to_go, junk), mask), advantages, rtol=0, atol=0)


def check_padding_changes_nothing(module):
    logps, old, ref, scores, mask = batch()
    options = {"ref_logps": ref, "beta": 0.1}
    advantages = plain(module, old, ref, scores, mask)
    loss, grad = value_and_grad(module, logps, old, advantages, mask, **options)
    for left, width in ((False, 11), (True, 6), (True, 11)):
        x, o, r, s, m = batch(left=left, width=width)
        padded = plain(module, o, r, s, m)
        assert_close(padded[m.bool()], advantages[mask.bool()])
        value, slope = value_and_grad(module, x, o, padded, m, ref_logps=r, beta=0.1)
        assert_close(value, loss)
        assert_close(slope[m.bool()], grad[mask.bool()])


def check_a_batch_is_the_token_weighted_sum_of_its_parts(module):
    logps, old, ref, _, mask = batch()
    five = (logps, old, some_advantages(mask), mask, ref)
    parts = [tuple(x[rows] for x in five) for rows in (slice(0, 2), slice(2, 8))]

    def loss(x, o, a, m, r):
        return module.reinforce_pp_loss(x, o, a, m, ref_logps=r, beta=0.1)

    counts = [part[3].sum().item() for part in parts]
    total = sum(n * loss(*part) for n, part in zip(counts, parts, strict=True)) / sum(counts)
    assert_close(total, loss(*five))


# Numbers that are large, small or of few bits.


def check_large_numbers_stay_finite(module):
    mask, zeros = torch.ones(2, 1), torch.zeros(2, 1)
    for size in (25.0, 1e4):
        for marks in ([[1.0], [-1.0]], [[-1.0], [1.0]]):
            logps, marks = torch.tensor([[size], [-size]]), torch.tensor(marks)
            for options in ({}, {"ref_logps": zeros, "beta": 0.1}):
                loss, grad = value_and_grad(module, logps, zeros, marks, mask, **options)
                assert torch.isfinite(loss) and torch.isfinite(grad).all()
                if marks[0] < 0:
                    assert grad[0] > 0  # a token that is far too likely and bad is still pushed down
            scores = torch.tensor([1.0, 0.0])
            assert torch.isfinite(plain(module, logps, zeros, scores, mask)).all()
    for size in (2.0, 19.0, 25.0):  # e^x, and from a log-ratio of 20 on its tangent
        logps, marks = torch.full((1, 1), size, dtype=torch.float64), -torch.ones(1, 1, dtype=torch.float64)
        loss, grad = value_and_grad(module, logps, 0 * logps, marks, torch.ones(1, 1))
        assert loss.item() == pytest.approx(math.exp(min(size, 20.0)) * (1 + max(size - 20.0, 0.0)), rel=1e-12)
        assert grad.item() == pytest.approx(math.exp(min(size, 20.0)), rel=1e-12)
    small = with_baseline(module, torch.tensor([0.0, 0.002], dtype=torch.float64), torch.ones(2, 3), group=2)
    assert_close(small[:, 0], torch.tensor([-1.0, 1.0], dtype=torch.float64))  # a std of 0.001 is one
    tiny = with_baseline(module, torch.tensor([0.0, 1e-7]), torch.ones(2, 3), group=2)
    assert tiny.abs().max() < 1e-2  # differences far below any reward's are not blown up


def check_half_precision_is_computed_in_float32(module):
    for dtype in (torch.bfloat16, torch.float16):
        logps, old, ref, scores, mask = batch(dtype=dtype)
        wide = [x.float() for x in (logps, old, ref, scores)]
        marks = plain(module, old, ref, scores, mask)
        loss = module.reinforce_pp_loss(logps, old, marks.to(dtype), mask, ref_logps=ref, beta=0.1)
        assert marks.dtype == loss.dtype == with_baseline(module, scores, mask).dtype == torch.float32
        again = module.reinforce_pp_loss(*wide[:2], marks.to(dtype).float(), mask, ref_logps=wide[2], beta=0.1)
        assert_close(loss, again, rtol=0, atol=0)


def check_bad_input_is_named(module):
    logps, old, ref, scores, mask = batch()
    marks, loss = some_advantages(mask), module.reinforce_pp_loss
    cases = [
        (lambda: module.reward_to_go(scores[:7], old, mask, beta=0.1), r"scores \(7,\) against mask \(8, 6\)"),
        (lambda: module.reward_to_go(scores, old[:, :5], mask, beta=0.1), r"\(8, 5\) against mask \(8, 6\)"),
        (lambda: module.reward_to_go(scores, old, 0 * mask, beta=0.1), r"no valid token.*\(8, 6\)"),
        (lambda: module.reward_to_go(scores * math.nan, old, mask, beta=0.1), "must be finite.*nan"),
        (lambda: module.reward_to_go(scores, old, mask, beta=-0.1), "finite and not negative, got -0.1"),
        (lambda: module.reward_to_go(scores, old, mask, beta=math.inf), "finite and not negative, got inf"),
        (lambda: module.reward_to_go(scores, old * math.inf, mask, beta=0.1), "must be finite"),
        (lambda: module.group_baseline(scores, 1), r"at least 2 .*\(8,\) and 1"),
        (lambda: module.group_baseline(scores, 3), r"divides B; got \(8,\) and 3"),
        (lambda: module.group_baseline(old, 2), r"got \(8, 6\) and 2"),
        (lambda: module.group_baseline(scores * math.nan, 2), "must be finite, got .*nan"),
        (lambda: module.normalize(old[:7], mask), r"\(7, 6\) against mask \(8, 6\)"),
        (lambda: module.normalize(old, 0 * mask), "no valid token"),
        (lambda: loss(logps[:, :5], old, marks, mask), r"\(8, 5\) against mask \(8, 6\)"),
        (lambda: loss(logps, old, marks[:, 0], mask), r"\(8,\) against mask \(8, 6\)"),
        (lambda: loss(logps, old, marks, 0 * mask), r"no valid token.*\(8, 6\)"),
        (lambda: loss(logps, old, marks * math.nan, mask), "advantages must be finite"),
        (lambda: loss(logps, old, marks, mask, clip=-0.1), "clip must not be negative, got -0.1"),
        (lambda: loss(logps, old, marks, mask, beta=0.1), "beta=0.1 needs ref_logps"),
        (lambda: loss(logps, old, marks, mask, beta=-0.1, ref_logps=ref), "finite and not negative, got -0.1"),
        (lambda: loss(logps, old, marks, mask, beta=0.1, ref_logps=ref[:1]), r"\(1, 6\) against mask \(8, 6\)"),
    ]
    for function, message in cases:
        with pytest.raises(ValueError, match=message):
            function()


# Exact expectations: all responses, and all batches, by enumeration.


def small_world():
    return exact.make_world(3, prompts=2, vocab=3, length=2)


def some_policy(world, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return world.ref_logits + torch.randn(world.ref_logits.shape, generator=generator, dtype=torch.float64)


def expected_gradient(module, world, logits, advantages, **options):
    """The gradient of the expected loss, a sum over tokens and a mean over prompts, where a response's advantage is a
    function of it alone: advantages (X, Y) or (X, Y, T)."""
    logits = logits.clone().requires_grad_()
    tokens = exact.token_logps(world, logits)  # (X, Y, T)
    ref = exact.token_logps(world, world.ref_logits)
    probs, one = tokens.detach().sum(-1).exp(), torch.ones(1, world.length)
    advantages = advantages if advantages.dim() == 3 else advantages[..., None].expand_as(tokens)
    loss = torch.zeros((), dtype=torch.float64)
    for x, y in itertools.product(range(probs.shape[0]), range(probs.shape[1])):
        row = tokens[x, y][None]
        term = module.reinforce_pp_loss(
            row, row.detach(), advantages[x, y][None], one, ref_logps=ref[x, y][None], **options
        )
        loss = loss + probs[x, y] / len(probs) * term * world.length
    loss.backward()
    return logits.grad


def check_reward_to_go_gives_the_policy_gradient(module):
    """Of E[r] - beta * KL(pi || pi_ref): what was paid before a token is a constant to it."""
    world = small_world()
    logits = some_policy(world).requires_grad_()
    exact.objective(world, logits).backward()
    tokens = exact.token_logps(world, logits.detach())
    kl = (tokens - exact.token_logps(world, world.ref_logits)).flatten(0, 1)
    to_go = module.reward_to_go(world.rewards.flatten(), kl, torch.ones_like(kl), beta=world.beta)
    grad = expected_gradient(module, world, logits.detach(), to_go.view_as(tokens))
    assert_close(grad, -logits.grad, rtol=1e-9, atol=1e-12)


def check_k2_is_the_kl_at_each_prefix(module):
    """Its expected gradient is that of KL(pi(.|s) || ref(.|s)) at each prefix s, weighted by how often pi visits s."""
    world = small_world()
    logits = some_policy(world).requires_grad_()
    logps, ref = logits.log_softmax(-1), world.ref_logits.log_softmax(-1)  # (X, N, V)
    visits = torch.cat([torch.ones(2, 1), logps[:, 0].detach().exp()], dim=1)  # the empty prefix, then one token
    reverse = (logps.exp() * (logps - ref)).sum(-1)
    (0.7 * (visits * reverse).sum(-1).mean()).backward()
    grad = expected_gradient(module, world, logits.detach(), torch.zeros_like(world.rewards), beta=0.7)
    assert_close(grad, logits.grad, rtol=1e-9, atol=1e-12)


def all_batches(world, group):
    """Every batch of `group` responses to each prompt from the reference: which prompt (N,), responses (M, N), their
    chances (M,)."""
    logps = world.ref_logps
    prompts = torch.arange(len(logps)).repeat_interleave(group)
    responses = torch.cartesian_prod(*[torch.arange(logps.shape[1])] * len(prompts)).view(-1, len(prompts))
    return prompts, responses, logps[prompts, responses].sum(-1).exp()


def mean_update(world, group, advantages):
    """The expected update of the logits (X, Y) of one-token responses, over all batches; `advantages` maps rewards
    (M, N) to (M, N)."""
    probs = world.ref_logps.exp()
    prompts, responses, chances = all_batches(world, group)
    pulls = chances[:, None] * advantages(world.rewards[prompts, responses]) / len(prompts)
    weights = torch.zeros_like(probs)
    weights.index_put_((prompts.expand_as(responses), responses), pulls, accumulate=True)
    return weights - probs * weights.sum(-1, keepdim=True)


def two_prompts(seed):
    """One token, three responses to each of two prompts; the rewards' std is 1 for one prompt and 3 for the other."""
    world = exact.make_world(seed, prompts=2, vocab=3, length=1)
    probs = world.ref_logps.exp()
    centred = world.rewards - (probs * world.rewards).sum(-1, keepdim=True)
    rewards = centred / (probs * centred**2).sum(-1, keepdim=True).sqrt() * torch.tensor([[1.0], [3.0]])
    return exact.World(world.ref_logits, rewards + torch.tensor([[0.5], [-0.5]]), world.beta, 3, 1)


def true_update(world):
    probs = world.ref_logps.exp()
    return probs * (world.rewards - (probs * world.rewards).sum(-1, keepdim=True)) / len(probs)


def check_the_batchs_mean_is_a_baseline(module):
    """It holds a response's own reward, but only as a factor: (N - 1) / N of the true gradient, for all prompts."""
    world = two_prompts(0)
    for group in (1, 2):
        count = 2 * group

        def centred(rewards, count=count):
            mask = torch.ones(count, 1)
            rows = [module.normalize(row[:, None], mask).squeeze(-1) * row.std(correction=0) for row in rewards]
            return torch.stack(rows)

        assert_close(mean_update(world, group, centred), (count - 1) / count * true_update(world))


def check_the_adapter_in_loops(module):
    """Plain: the KL in the reward, no group. Baseline: the group's mean, no KL in the reward, k2 in the loss."""
    algorithm = module.algorithm()
    logps, old, ref, scores, mask = batch(dtype=torch.float32)
    rollout = loop.Rollout(lm.Completions(mask, mask, mask, old, []), scores, ref)
    rows = torch.tensor([5, 0, 3])
    for variant in ("plain", "baseline"):
        settings = algorithm.settings(variant=variant, beta=0.5, group=GROUP, clip=0.1)
        advantages, targets = algorithm.advantages(rollout, settings)
        expected = openrlhf(variant, old, ref, scores, mask, 0.5)
        for i, t in itertools.product(range(8), range(6)):
            assert advantages[i, t].item() == pytest.approx(expected.get((i, t), 0.0), abs=1e-4)
        loss = algorithm.loss(logps[rows], rollout, rows, advantages[rows], settings)
        k2 = {"ref_logps": ref[rows], "beta": 0.5} if variant == "baseline" else {}
        mine = module.reinforce_pp_loss(logps[rows], old[rows], advantages[rows], mask[rows], clip=0.1, **k2)
        assert_close(loss, mine)
        assert targets is None and algorithm.critic_loss is None and algorithm.over_tokens(settings)
    bare = loop.Rollout(rollout.completions, scores)  # beta = 0: no reference is held
    for variant in ("plain", "baseline"):
        settings = algorithm.settings(variant=variant, beta=0.0, group=GROUP)
        advantages, _ = algorithm.advantages(bare, settings)
        assert torch.isfinite(algorithm.loss(logps[rows], bare, rows, advantages[rows], settings))


CHECKS = [function for name, function in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_functions(check):
    check(original)


MISTAKES = {
    "flipped sign": ("loss = -torch.minimum(", "loss = torch.minimum("),
    "the larger of the two": ("-torch.minimum(", "-torch.maximum("),
    "no clip": ("ratio.clamp(1 - clip, 1 + clip) * advantages", "ratio * advantages"),
    "shifted by one": ("log_ratio = logps - old_logps", "log_ratio = logps - old_logps.roll(1, -1)"),
    "KL with the wrong sign": ("scores[:, None] - beta * to_come", "scores[:, None] + beta * to_come"),
    "the KL that was paid": ("token_kl.detach().flip(-1).cumsum(-1).flip(-1)", "token_kl.detach().cumsum(-1)"),
    "this token's KL alone": ("token_kl.detach().flip(-1).cumsum(-1).flip(-1)", "token_kl.detach()"),
    "KL not detached": ("token_kl.detach().flip", "token_kl.flip"),
    "no baseline": ("(groups - groups.mean(-1, keepdim=True)).flatten()", "groups.flatten()"),
    "the batch's mean as the group's": ("groups.mean(-1, keepdim=True)", "groups.mean()"),
    "rounding blown up": ("scores.view(-1, group).double()", "scores.view(-1, group)"),
    "a mean over padding": ("valid.sum().double(), wide.sum()", "torch.tensor(valid.numel()).double(), wide.sum()"),
    "padding in the variance": ("torch.where(valid, wide - sums / count, 0.0)", "wide - sums / count"),
    "the sample's std": (
        "variance = total((centred**2).sum()) / count",
        "variance = total((centred**2).sum()) / (count - 1)",
    ),
    "a variance of its own": ("total((centred**2).sum())", "(centred**2).sum() * count / valid.sum()"),
    "no floor": ("variance.clamp(min=1e-8)", "variance.clamp(min=1e-30)"),
    "k1 in the loss": ("beta * 0.5 * (logps - _valid(mask, ref_logps.detach())[0]) ** 2", "beta * (logps - ref_logps)"),
    "k2 without its half": ("beta * 0.5 *", "beta *"),
    "a mean over rows": ("return loss.sum() / mask.sum()", "return loss.sum() / len(mask)"),
    "a mean over padding, too": ("return loss.sum() / mask.sum()", "return loss.mean()"),
    "reference not detached": ("ref_logps.detach()", "ref_logps"),
    "mask as a product": ("torch.where(mask.bool(), x, 0.0) for x in tensors", "x * mask.bool() for x in tensors"),
    "no cap": ("EXP_CAP = 20.0", "EXP_CAP = 1e9"),
    "a cap within reach": ("EXP_CAP = 20.0", "EXP_CAP = 3.0"),
    "a high floor": ("variance.clamp(min=1e-8)", "variance.clamp(min=1e-4)"),
    "the others' mean": (
        "(groups - groups.mean(-1, keepdim=True)).flatten()",
        "(groups - groups.mean(-1, keepdim=True)).flatten() * group / (group - 1)",
    ),
    "the KL twice": ('if settings.variant == "plain" or not settings.beta', "if not settings.beta"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    """Each deliberate mistake is caught by a check. (That the original passes all of them is test_the_functions.)"""
    assert caught_by(load_mutant(PATH, *MISTAKES[mistake]), CHECKS)


def test_bf16_logits_of_any_size():
    """Logits of +-1e4 in bf16, through the log-probabilities that the loop computes."""
    zeros, marks = torch.zeros(2, 3), torch.tensor([[1.0], [-1.0]]).expand(2, 3)
    options = {"ref_logps": zeros, "beta": 0.1}
    finite_from_bf16_logits(lambda x: original.reinforce_pp_loss(x, zeros - 1.0, marks, torch.ones(2, 3), **options))


# TRL 1.16.0 has no REINFORCE++; its GRPOTrainer takes advantages of a token, and scales by the std of the batch.


def trl_loss(logps, old, advantages, mask):
    """Of GRPOTrainer with loss_type="dapo"."""
    return trl_grpo(logps, mask, {"advantages": advantages, "old_per_token_logps": old}, loss_type="dapo")


@pytest.mark.evidence
def test_the_loss_agrees_with_trl(evidence):
    """With one advantage a token, as the KL in the reward gives it."""
    worst = 0.0
    cases = [{"seed": seed} for seed in range(4)] + [{"left": True, "width": 9}, {"seed": 5, "spread": 4.0}]
    for case in cases:
        logps, old, ref, scores, mask = batch(dtype=torch.float32, **case)
        advantages = plain(original, old, ref, scores, mask)
        four = (logps, old, advantages, mask)
        worst = max(worst, apart(value_and_grad(original, *four), of_function(trl_loss, *four)))
    evidence(
        "rlhf/reinforce_pp",
        "Largest difference from TRL 1.16.0, clipped loss and gradient",
        value=worst,
        bar=1e-6,
        note="float32; GRPOTrainer with loss_type='dapo' is handed the advantages (B, T): TRL has no REINFORCE++. "
        "Random batches, all-zero rows, one-token rows, left and right padding, log-ratios to about 12.",
    )


@pytest.mark.evidence
def test_trls_batch_scaling_is_the_baseline_variant_up_to_one_factor(evidence, tmp_path):
    """TRL's own loop on the warm start with scale_rewards="batch": it takes the group's mean off and divides by the std
    of the raw rewards, the spread between prompts included. So its advantages are smaller, all by the same factor."""
    from trl import GRPOConfig, GRPOTrainer

    seen = []

    class Listened(watched(GRPOTrainer)):
        def _compute_loss(self, model, inputs):
            seen.append(inputs["advantages"])
            return super()._compute_loss(model, inputs)

    one_pass = TWO_PASSES | {"num_iterations": 1, "per_device_train_batch_size": 64, "max_steps": 1}
    config = GRPOConfig(str(tmp_path), scale_rewards="batch", **one_pass)
    rewards = train_on_arithmetic(Listened, config, *arithmetic.warm_start()).rewards
    centred = original.group_baseline(rewards, 8)
    mine = original.normalize(centred[:, None], torch.ones(64, 1))[:, 0]
    factor = centred.std(correction=0) / (rewards.std() + 1e-4)
    assert 0.3 < factor < 0.95  # prompts differ in difficulty
    # TRL shuffles the batch after scoring it.
    worst = (seen[0].sort().values - (factor * mine).sort().values).abs().max().item()
    evidence(
        "rlhf/reinforce_pp",
        "Baseline variant: largest difference from TRL's scale_rewards='batch', after one factor for the batch",
        value=worst,
        bar=1e-6,
        note=f"Advantages of 8 groups of 8 in TRL's own loop on the warm start; there the factor is {factor:.2f}.",
    )


# What the batch's std does


def angle(update, truth):
    cosine = torch.cosine_similarity(update.flatten(), truth.flatten(), dim=0).clamp(max=1.0)
    return math.degrees(math.acos(cosine))


def sampled_update(world, count, draws=500):
    """The expected update (X, Y) with batches of `count`, half of them of each prompt: E[advantage | response], the
    other responses drawn at random, the same for all responses to a prompt."""
    generator, probs, mask = torch.Generator().manual_seed(count), world.ref_logps.exp(), torch.ones(count, 1)
    advantages = torch.zeros_like(probs)
    for _ in range(draws):
        drawn = torch.multinomial(probs, count // 2, replacement=True, generator=generator)  # (X, N / 2)
        rewards = world.rewards.gather(1, drawn)
        for x, y in itertools.product(*map(range, probs.shape)):
            batch = rewards.clone()
            batch[x, 0] = world.rewards[x, y]
            advantages[x, y] += original.normalize(batch.view(-1, 1), mask)[x * count // 2, 0] / draws
    return probs * (advantages - (probs * advantages).sum(-1, keepdim=True))


@pytest.mark.evidence
def test_the_bias_falls_with_the_batch(evidence):
    """The mean is a baseline and the std one factor, but each batch has its own, and it depends on the rewards in it.
    The angle between the expected and the true update falls about as 1 / N. That of GRPO has another limit: with a
    large group it weighs each prompt by 1 / std."""
    seeds = list(range(5)) if evidence.full else [0]
    angles = {count: [] for count in (16, 64, 256)}
    limit = []
    for seed in seeds:
        world = two_prompts(seed)
        truth = true_update(world)
        for count, into in angles.items():
            into.append(angle(sampled_update(world, count, draws=500 if evidence.full else 200), truth))
        limit.append(angle(truth / torch.tensor([[1.0], [3.0]]), truth))
    mean = {count: statistics.mean(values) for count, values in angles.items()}
    assert mean[64] < mean[16] / 3 and mean[256] < mean[64] / 3 and mean[256] < statistics.mean(limit) / 20
    note = "Two prompts, the rewards of one with three times the std of the other's, three responses each."
    common = {"unit": "degrees", "seeds": seeds, "note": note}
    name = "Angle of the expected update to the policy gradient"
    for count, values in angles.items():
        check = f"{name}, a batch of {count}"
        evidence("rlhf/reinforce_pp", check, value=mean[count], spread=values, **common)
    check = f"{name}, GRPO in the limit of a large group"
    evidence("rlhf/reinforce_pp", check, value=statistics.mean(limit), spread=limit, **common)


@pytest.mark.evidence
def test_the_largest_advantage_grows_with_the_batch(evidence):
    """One right response among N: root of N - 1. Within a group of G it is (G - 1) / root of G at most, whatever the
    rewards: the std of a group never lets an advantage explode."""
    for count in (8, 128, 1024):
        alone = torch.zeros(count, 1)
        alone[0] = 1.0
        top = original.normalize(alone, torch.ones(count, 1)).max().item()
        assert top == pytest.approx(math.sqrt(count - 1), rel=1e-5)
    note = "One right response in the batch."
    evidence("rlhf/reinforce_pp", "Largest advantage in a batch of 1,024", value=top, note=note)
    tiny = torch.tensor([[1e-6, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.float64)
    group = grpo.group_advantages(tiny, eps=0.0).max().item()
    assert group == pytest.approx(7 / math.sqrt(8))
    note = "Rewards that differ by a millionth, without epsilon."
    evidence("rlhf/reinforce_pp", "Largest advantage in a group of 8, GRPO", value=group, note=note)


@pytest.mark.evidence
def test_an_advantage_on_the_last_token_alone_teaches_the_last_token_alone(evidence):
    """Appendix B.2 of the paper sets it to 0 on all others, against its equation 4: no earlier choice is learnt."""
    world = small_world()
    logits = some_policy(world)
    everywhere = world.rewards[..., None].expand(-1, -1, world.length)
    last = torch.zeros_like(everywhere)
    last[..., -1] = world.rewards
    true = expected_gradient(original, world, logits, everywhere)
    found = expected_gradient(original, world, logits, last)
    assert found[:, 0].abs().max() < 1e-12 < 1e-2 < true[:, 0].abs().max()
    assert_close(found[:, 1:], true[:, 1:])
    share = (found.norm() / true.norm()).item() ** 2
    name = "Share of the squared gradient left by an advantage on the last token alone"
    evidence("rlhf/reinforce_pp", name, value=share, note="Exact; responses of two tokens.")


# Where it comes to rest


def rest(world, beta):
    """log pi (X, Y) where pi(a|s) is ref(a|s) exp(Q(s, a) / beta), normalised, with Q of the reward alone under pi:
    there the policy gradient and beta times the gradient of KL(pi(.|s) || ref(.|s)) balance at every prefix."""
    value, ref, levels = world.rewards, world.ref_logits.log_softmax(-1), []
    for t in reversed(range(world.length)):
        q = value.view(len(value), -1, world.vocab)
        first = (world.vocab**t - 1) // (world.vocab - 1)
        levels.insert(0, (ref[:, first : first + world.vocab**t] + q / beta).log_softmax(-1))
        value = (levels[0].exp() * q).sum(-1)
    return exact.response_logps(world, torch.cat(levels, dim=1))


def deviation(world, logps):
    """The std within prompts, over all of them."""
    mean = (logps.exp() * world.rewards).sum(-1, keepdim=True)
    return (logps.exp() * (world.rewards - mean) ** 2).sum(-1).mean().sqrt().item()


def baseline_optimum(world, group, rounds=400):
    """Where the baseline variant rests: the reward is divided by the batch's std and the k2 beside it is not, so that
    beta acts as beta * std, and the std is that of the policy that this beta makes. A group's mean holds a response's
    own reward: (G - 1) / G of the advantage, the root of it in the std."""
    own = math.sqrt((group - 1) / group)
    sigma = deviation(world, world.ref_logps)
    for _ in range(rounds):
        sigma = (sigma + deviation(world, rest(world, world.beta * sigma / own))) / 2
    return rest(world, world.beta * sigma / own)


def to_optimum(world, logps):
    return exact.kl(logps, exact.optimal_policy(world.ref_logps, world.rewards, world.beta)).mean().item()


def test_the_predicted_rest_is_where_the_gradient_vanishes():
    """The expected gradient of the loss by enumeration, with the advantages of a large group and a large batch."""
    world = small_world()
    world = exact.World(world.ref_logits, world.rewards, 2.0, world.vocab, world.length)
    logps = baseline_optimum(world, 10**9)
    mean = (logps.exp() * world.rewards).sum(-1, keepdim=True)
    advantages = (world.rewards - mean) / deviation(world, logps)
    grad = expected_gradient(original, world, exact.logits_of(world, logps), advantages, beta=world.beta)
    assert grad.abs().max() < 1e-8
    star = exact.optimal_policy(world.ref_logps, world.rewards, world.beta)
    there = expected_gradient(original, world, exact.logits_of(world, star), advantages, beta=world.beta)
    assert there.abs().max() > 1e-3


def test_at_the_optimum_the_plain_advantage_knows_only_the_prefix():
    """r - beta * (the KL still to come) = beta * log Z + beta * (the KL paid): the same for all tokens that can follow
    a prefix, so the expected gradient is zero there. For a sample it is not: nothing takes a prompt's log Z off."""
    world = exact.make_world(0)
    star = exact.optimal_policy(world.ref_logps, world.rewards, world.beta)
    tokens = exact.token_logps(world, exact.logits_of(world, star))
    kl = (tokens - exact.token_logps(world, world.ref_logits)).flatten(0, 1)
    to_go = original.reward_to_go(world.rewards.flatten(), kl, torch.ones_like(kl), beta=world.beta).view_as(tokens)
    for t in range(world.length):
        by_prefix = to_go[..., t].view(len(star), world.vocab**t, -1)
        assert_close(by_prefix, by_prefix[..., :1].expand_as(by_prefix))
    assert to_go[..., 0].std() > 0.05


@pytest.mark.parametrize("seed", range(5))
def test_at_a_small_beta_nothing_holds_the_baseline_variant(seed):
    """beta = 0.5: the policy that beta * sigma calls for always has a smaller sigma still, down to the greedy one."""
    world = exact.make_world(seed)
    start = deviation(world, world.ref_logps)
    for share in torch.linspace(0.02, 1.0, 50).tolist():
        assert deviation(world, rest(world, world.beta * share * start)) < share * start
    assert (baseline_optimum(world, 64).exp().amax(-1) > 0.999).all()


def run(variant, seed, beta=0.5, steps=2000):
    world = exact.make_world(seed, beta=beta)
    return world, trials.exact_rlhf(original.algorithm(), world, seed, variant=variant, steps=steps)


@pytest.mark.evidence
def test_plain_reaches_the_optimum(evidence):
    if not evidence.full:
        assert run("plain", 0, steps=300)[1].to_optimum < 0.1  # from 1.9
        return
    seeds = list(range(5))
    nats = [run("plain", seed)[1].to_optimum for seed in seeds]
    evidence(
        "rlhf/reinforce_pp",
        "Exact world: KL to the optimum, plain",
        value=max(nats),
        bar=0.02,
        unit="nats",
        seeds=seeds,
        spread=nats,
        note="The worst of the seeds, which set both the world and the samples; 2,000 steps of 16 responses a prompt.",
    )


@pytest.mark.evidence
def test_the_baseline_variant_runs_away_at_a_small_beta(evidence):
    if not evidence.full:
        assert run("baseline", 0, steps=300)[1].to_optimum > 0.3
        return
    seeds = list(range(5))
    runs = [run("baseline", seed) for seed in seeds]
    nats = [trial.to_optimum for _, trial in runs]
    sure = [exact.response_logps(world, trial.logits).exp().amax(-1).mean().item() for world, trial in runs]
    assert min(nats) > 0.5 and min(sure) > 0.9
    note = "k2 beside the division, beta = 0.5; 2,000 steps of 16 responses a prompt."
    common = {"seeds": seeds, "note": note}
    name = "Exact world: KL to the optimum, baseline, beta 0.5"
    evidence("rlhf/reinforce_pp", name, value=statistics.mean(nats), unit="nats", spread=nats, **common)
    name = "Exact world: probability of the likeliest response in the end, baseline, beta 0.5"
    evidence("rlhf/reinforce_pp", name, value=statistics.mean(sure), spread=sure, **common)


@pytest.mark.evidence
def test_the_baseline_variant_rests_where_predicted(evidence):
    seeds, steps = (list(range(5)), 2000) if evidence.full else ([0], 400)
    away, off = [], []
    for seed in seeds:
        world, trial = run("baseline", seed, beta=1.0, steps=steps)
        predicted = baseline_optimum(world, 16)
        away.append(to_optimum(world, predicted))
        off.append(exact.kl(exact.response_logps(world, trial.logits), predicted).mean().item())
    common = {"unit": "nats", "seeds": seeds}
    name = "Exact world: KL to the predicted policy, baseline, beta 1"
    evidence("rlhf/reinforce_pp", name, value=max(off), bar=0.02 if evidence.full else 0.05, spread=off, **common)
    name = "Exact world: KL of the predicted policy to the optimum, baseline, beta 1"
    note = "Exact, for groups of 16 and a large batch."
    evidence("rlhf/reinforce_pp", name, value=statistics.mean(away), spread=away, note=note, **common)


# In the shared loop


def test_variants_in_the_loop(tmp_path):
    """A few steps on a tiny model, with the start as reference."""
    for changes in ({"variant": "plain", "group": 1, "prompts": 8}, {"variant": "baseline", "group": 4, "prompts": 2}):
        tokenizer = arithmetic.make_tokenizer()
        policy = arithmetic.make_model(len(tokenizer), hidden=32, layers=1, seed=1)
        before = {name: p.clone() for name, p in policy.named_parameters()}
        settings = original.algorithm().settings(steps=3, minibatches=2, out=str(tmp_path), lr=1e-3, **changes)
        records = arithmetic.problems(held_out=False)[:32]

        def shortest(completions, **columns):
            return [-float(len(text)) for text in completions]

        trainer = loop.train(policy, tokenizer, records, shortest, original.algorithm(), settings)
        assert len(trainer.history) == 3
        assert all(torch.isfinite(p).all() for p in policy.parameters())
        assert any(not torch.equal(p, before[name]) for name, p in policy.named_parameters())


def test_the_adapter_names_what_it_cannot_do():
    rollout = SimpleNamespace(
        scores=torch.zeros(4), token_kl=lambda: torch.zeros(4, 2), completions=SimpleNamespace(mask=torch.ones(4, 2))
    )
    algorithm = original.algorithm()
    with pytest.raises(ValueError, match="'plain' or 'baseline', got 'global'"):
        algorithm.advantages(rollout, algorithm.settings(variant="global"))
    with pytest.raises(ValueError, match=r"at least 2 .* \(4,\) and 1"):
        algorithm.advantages(rollout, algorithm.settings(variant="baseline", group=1))
