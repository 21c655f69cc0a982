"""ReMax against loops, enumeration, exact variances, the exact world's optimum, and its own broken copies."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from snippets.rlhf import loop, reinforce
from snippets.rlhf import remax as original
from snippets.worlds import arithmetic, exact, lm, trials
from tests.mutation import caught_by, load_mutant
from tests.rlhf.common import reaches_the_optimum
from tests.rlhf.test_reinforce import (
    SEEDS,
    batch,
    exact_gradient,
    expected_gradient,
    group_estimate,
    moments,
    optimum,
    projected_z,
    shaped_rewards,
    small_world,
    some_policy,
    trains_in_the_loop,
)
from tests.rlhf.test_rloo import rloo_variance

torch.set_num_threads(1)
PATH = "snippets/rlhf/remax.py"


def greedy_of(world, logits, table):
    """(X,): the entry of a table (X, Y) for the greedy response to each prompt."""
    return table.gather(1, trials.greedy_responses(world, logits)[:, None])[:, 0]


# The function. Each check takes the module, so that broken copies can be put to it.


def check_the_advantages_in_loops(module):
    rewards = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    greedy = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, flat = module.remax_advantages(rewards, greedy), module.remax_advantages(rewards[:, 0], greedy)
    for p in range(5):
        assert flat[p].item() == pytest.approx(rewards[p, 0].item() - greedy[p].item(), abs=1e-12)
        for i in range(3):
            assert found[p, i].item() == pytest.approx(rewards[p, i].item() - greedy[p].item(), abs=1e-12)
    square = torch.arange(9.0).view(3, 3)  # P = G: the baseline belongs to the row
    assert_close(module.remax_advantages(square, square[:, 1]), torch.tensor([[-1.0, 0.0, 1.0]]).expand(3, 3))
    for far in (-100.0, 100.0):  # a greedy response that is worse, or better, than all samples
        assert_close(module.remax_advantages(square, torch.full((3,), far)), square - far)


def check_a_shift_of_both_changes_nothing_and_rows_stand_alone(module):
    rewards = torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    greedy, shift = rewards[:, 0] / 3, torch.tensor([0.0, 5.0, -70.0, 1e3, 1e6], dtype=torch.float64)
    found = module.remax_advantages(rewards, greedy)
    assert_close(module.remax_advantages(rewards + shift[:, None], greedy + shift), found, rtol=0, atol=1e-8)
    for rows in (slice(0, 2), slice(2, 5)):
        assert_close(module.remax_advantages(rewards[rows], greedy[rows]), found[rows], rtol=0, atol=0)


def check_one_response_a_prompt_is_enough(module):
    assert module.remax_advantages(torch.ones(2, 1), torch.zeros(2)).tolist() == [[1.0], [1.0]]


def check_equal_rewards_count_where_the_greedy_one_differs(module):
    """No sample is better than another, yet all are pushed up, or down: against RLOO and GRPO, which give 0."""
    rewards = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.3, 0.3]])
    found = module.remax_advantages(rewards, torch.tensor([0.0, 1.0, 0.3]))
    assert found.tolist() == [[1.0, 1.0], [-1.0, -1.0], [0.0, 0.0]]


def check_no_gradient_and_float32(module):
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        found = module.remax_advantages(torch.ones(2, 2, dtype=dtype, requires_grad=True), torch.zeros(2, dtype=dtype))
        assert found.dtype == expected and not found.requires_grad
    exact_difference = module.remax_advantages(*(torch.tensor([x], dtype=torch.bfloat16) for x in (257.0, 0.5)))
    assert exact_difference.item() == 255.5  # bf16 has no 255.5, and rounds 257 to 256
    mixed = module.remax_advantages(torch.tensor([256.0], dtype=torch.bfloat16), torch.tensor([256.5]))
    assert mixed.item() == -0.5  # a greedy reward in float32 keeps its digits


def check_bad_input_is_named(module):
    rewards, greedy = torch.ones(4, 2), torch.ones(4)
    cases = [
        (lambda: module.remax_advantages(rewards, greedy[:3]), r"rewards \(4, 2\), greedy_rewards \(3,\)"),
        (lambda: module.remax_advantages(rewards, rewards), r"greedy_rewards \(4, 2\); want \(P, G\) and \(P,\)"),
        (lambda: module.remax_advantages(rewards[..., None], greedy), r"rewards \(4, 2, 1\)"),
        (lambda: module.remax_advantages(rewards[:0], greedy[:0]), r"no rewards: shape \(0, 2\)"),
        (lambda: module.remax_advantages(rewards * math.nan, greedy), "rewards must be finite, got .*nan"),
        (lambda: module.remax_advantages(rewards, greedy * math.inf), "greedy_rewards must be finite, got .*inf"),
    ]
    for function, message in cases:
        with pytest.raises(ValueError, match=message):
            function()


def check_it_leaves_the_policy_gradient(module):
    """The expected gradient over all responses, with the KL in the reward, is the exact one, whether the greedy
    response's reward holds its own KL or not."""
    world = small_world()
    logits = some_policy(world)
    rewards = shaped_rewards(world, logits)
    for greedy in (greedy_of(world, logits, world.rewards), greedy_of(world, logits, rewards)):
        advantages = module.remax_advantages(rewards, greedy)
        grad = expected_gradient(reinforce, world, logits, advantages)
        assert_close(grad, -exact_gradient(world, logits), rtol=1e-9, atol=1e-11)


def check_the_adapter_in_loops(module):
    algorithm = module.algorithm()
    settings = algorithm.settings(beta=0.5)
    logps, _, _, mask = batch(dtype=torch.float32)
    ref = batch(1, dtype=torch.float32)[0]
    reward, greedy = torch.arange(8.0), torch.tensor([3.0, 0, 1, 1, 0, 9, 9, 2])
    greedy_kl = torch.linspace(-2.0, 3.0, 8)
    rollout = loop.Rollout(lm.Completions(mask, mask, mask, logps, []), reward, ref, None, greedy, greedy_kl)
    advantages, targets = algorithm.advantages(rollout, settings)
    for i in range(8):
        kl = sum((logps[i, t] - ref[i, t]).item() for t in range(6) if mask[i, t])
        expected = (reward[i].item() - 0.5 * kl) - (greedy[i].item() - 0.5 * greedy_kl[i].item())
        assert advantages[i].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    rows = torch.tensor([5, 0])
    loss = algorithm.loss(logps[rows], rollout, rows, advantages[rows], settings)
    assert_close(loss, reinforce.reinforce_loss(logps[rows], advantages[rows], mask[rows]))
    assert targets is None and algorithm.critic_loss is None and algorithm.greedy
    assert settings.group == 1 and not algorithm.over_tokens(settings)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_function(check):
    check(original)


RESULT = "(rewards.to(dtype) - baseline).detach()"
MISTAKES = {
    "flipped sign": (RESULT, "(baseline - rewards.to(dtype)).detach()"),
    "no baseline": (RESULT, "rewards.to(dtype).detach()"),
    "the better of the two": (RESULT, "(rewards.to(dtype) - torch.maximum(baseline, rewards.to(dtype))).detach()"),
    "negative ones dropped": (RESULT, "(rewards.to(dtype) - baseline).clamp(min=0).detach()"),
    "another prompt's": ("greedy_rewards.to(dtype).view(", "greedy_rewards.roll(1).to(dtype).view("),
    "by column": ("view(-1, *[1] * (rewards.dim() - 1))", "view(*[1] * (rewards.dim() - 1), -1)"),
    "one for all": ("greedy_rewards.to(dtype).view(", "greedy_rewards.mean().expand(len(rewards)).to(dtype).view("),
    "with gradient": (RESULT, "(rewards.to(dtype) - baseline)"),
    "difference before the upcast": (RESULT, "(rewards - baseline.to(rewards.dtype)).to(dtype).detach()"),
    "normalized": (RESULT, "((rewards.to(dtype) - baseline) / (1 + rewards.to(dtype).abs().max())).detach()"),
    "greedy shape unchecked": ("greedy_rewards.shape != rewards.shape[:1]", "False"),
    "capped by the best sample": (
        RESULT,
        "(rewards.to(dtype) - torch.minimum(baseline, rewards.to(dtype).amax())).detach()",
    ),
    "the greedy KL left out": ("rollout.greedy_scores - settings.beta * rollout.greedy_kl", "rollout.greedy_scores"),
    "greedy unchecked": ('(("rewards", rewards), ("greedy_rewards", greedy_rewards))', '(("rewards", rewards),)'),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    """Each deliberate mistake is caught by a check. (That the original passes all of them is test_the_function.)"""
    assert caught_by(load_mutant(PATH, *MISTAKES[mistake]), CHECKS)


# Bias and variance


@pytest.mark.evidence
def test_sampled_gradients_have_the_exact_mean(evidence):
    draws = 20_000 if evidence.full else 6_000
    world = exact.make_world(0, prompts=1)
    logits = some_policy(world)
    greedy = greedy_of(world, logits, world.rewards)
    estimate = group_estimate(world, logits, 8, lambda r: original.remax_advantages(r[None], greedy)[0])
    z = projected_z(world, logits, estimate, draws)
    assert 0.6 < z.square().mean().sqrt() < 1.5
    note = f"{draws} batches of 8 responses, 32 random projections."
    evidence("rlhf/remax", "Bias: largest |z|", value=z.abs().max(), bar=4.5, note=note)


def test_when_the_greedy_baseline_hurts():
    """Prompt by prompt the variance is above that without a baseline exactly where the greedy response's reward is
    further from the best constant than 0 is."""
    found = []
    for seed in SEEDS:
        world = exact.make_world(seed)
        for logits in (world.ref_logits, some_policy(world), optimum(world)):
            here = moments(world, logits)
            best = reinforce.optimal_baseline(here.rewards, here.squares, here.probs)
            for table in (world.rewards, here.rewards):  # the score alone, and with its KL
                greedy = greedy_of(world, logits, table)
                worse = here.variance(greedy) > here.variance(0 * greedy)
                assert (worse == ((greedy - best).abs() > best.abs())).all()
                found += worse.tolist()
    assert 0 < sum(found) < len(found)


@pytest.mark.evidence
def test_variance_in_the_exact_world(evidence):
    """Rewards there are independent draws, so the greedy response's says nothing about the others': at the start the
    baseline adds its own spread, and helps only where all rewards lie far from 0. At pi* the shaped reward is constant,
    and what the baseline holds decides."""
    found = {}
    for seed in SEEDS:
        world = exact.make_world(seed)
        for place, logits in (("at the start", world.ref_logits), ("at π*", optimum(world))):
            here = moments(world, logits)
            shaped = shaped_rewards(world, logits)
            rows = {"greedy response's score": greedy_of(world, logits, world.rewards)}
            if place == "at π*":
                rows["greedy response's score and KL"] = greedy_of(world, logits, shaped)
            else:
                rows["no baseline, rewards raised by 3"] = 0 * here.mean - 3  # r + 3 without baseline is r less -3
            for name, baseline in (rows | {"no baseline": 0 * here.mean, "exact mean": here.mean}).items():
                found.setdefault((place, name), []).append(here.variance(baseline).mean().item())
    assert max(found["at π*", "greedy response's score and KL"]) < 1e-12
    for (place, name), spread in found.items():
        note = "Exact: the trace of the covariance of (r − b) ∇log π for one response, in reward², mean over prompts."
        value = round(sum(spread) / 5, 12)  # zero up to rounding
        evidence("rlhf/remax", f"Variance {place}: {name}", value=value, seeds=SEEDS, spread=spread, note=note)


def one_token_world(p, vocab=2):
    """One decision; the first token is right with reward 1 and has the chance p, the others are wrong, reward 0."""
    probs = torch.tensor([p, *[(1 - p) / (vocab - 1)] * (vocab - 1)], dtype=torch.float64)
    rewards = torch.zeros(1, vocab, dtype=torch.float64)
    rewards[0, 0] = 1.0
    return exact.World(probs.log().view(1, 1, vocab), rewards, 0.5, vocab, 1)


@pytest.mark.evidence
def test_one_right_or_wrong_decision(evidence):
    """With two answers the best constant is 1 - p, not the mean p, since the likely answer has the short score. The
    greedy reward is 1 if p > 1/2, and 0 if not: never on the better side of 0. The variances are 2p(1-p) times (1-p)^2
    without a baseline, (1-2p)^2 with the mean, p^2 with 1."""
    for p in (0.1, 0.3, 0.6, 0.9):
        here = moments(one_token_world(p), one_token_world(p).ref_logits)
        best = reinforce.optimal_baseline(here.rewards, here.squares, here.probs)
        assert best.item() == pytest.approx(1 - p)
        for baseline, closed in ((0.0, (1 - p) ** 2), (p, (1 - 2 * p) ** 2), (1.0, p**2)):
            assert here.variance(0 * best + baseline).item() == pytest.approx(2 * p * (1 - p) * closed)
        world = one_token_world(p)
        greedy = greedy_of(world, world.ref_logits, world.rewards)
        assert greedy.item() == float(p > 0.5) and here.variance(greedy) >= here.variance(0 * greedy)
    none = here.variance(0 * greedy)
    note = "Exact: two answers, reward 1 for the likely one, 0 for the other."
    for name, baseline in (("greedy reward", greedy), ("mean", here.mean)):
        name = f"One decision, right 9 times in 10: variance with the {name} over that without a baseline"
        evidence("rlhf/remax", name, value=here.variance(baseline) / none, unit="times", note=note)
    # Right but seldom sampled: the greedy answer of five tokens has the chance 0.3.
    world = one_token_world(0.3, vocab=5)
    here = moments(world, world.ref_logits)
    greedy = greedy_of(world, world.ref_logits, world.rewards)
    ratio = here.variance(greedy) / here.variance(0 * greedy)
    assert greedy.item() == 1.0 and ratio > 3
    name = "One decision, greedy right, sampled right 3 times in 10: variance over that without a baseline"
    evidence("rlhf/remax", name, value=ratio, unit="times", note="Exact: five answers, reward 1 for the likeliest.")


@pytest.mark.evidence
def test_two_generations_a_prompt(evidence):
    """One sampled and one greedy response (ReMax), or two sampled (RLOO): even a greedy response whose reward were the
    exact mean would only draw level."""
    found = {"ReMax": [], "RLOO": [], "ReMax with the exact mean for the greedy reward": []}
    for seed in SEEDS:
        world = exact.make_world(seed)
        here = moments(world, world.ref_logits)
        greedy = greedy_of(world, world.ref_logits, world.rewards)
        found["ReMax"].append(here.variance(greedy).mean().item())
        found["RLOO"].append(rloo_variance(here, 2).mean().item())
        found["ReMax with the exact mean for the greedy reward"].append(here.variance(here.mean).mean().item())
    for name, spread in found.items():
        note = "At the start of the exact world, of one prompt's gradient; in reward²."
        name = f"Variance from two generations a prompt: {name}"
        evidence("rlhf/remax", name, value=sum(spread) / 5, seeds=SEEDS, spread=spread, note=note)


# Where the authors' code puts the KL


def own_kl_rest(world):
    """The table of logits where each token is charged its own KL only: pi(a|s) proportional to ref(a|s) exp(Q(s, a) /
    beta), Q of the reward alone, from the last token to the first."""
    value, ref, levels = world.rewards, world.ref_logits.log_softmax(-1), []
    for t in reversed(range(world.length)):
        q = value.view(len(value), -1, world.vocab)
        first = (world.vocab**t - 1) // (world.vocab - 1)
        levels.insert(0, (ref[:, first : first + world.vocab**t] + q / world.beta).log_softmax(-1))
        value = (levels[0].exp() * q).sum(-1)
    return torch.cat(levels, dim=1)


def own_kl_advantages(world, logits):
    """(X, Y, T): r - r_greedy - beta * (log pi - log ref) of the token itself."""
    kl = exact.token_logps(world, logits) - exact.token_logps(world, world.ref_logits)
    greedy = greedy_of(world, logits, world.rewards)
    return (world.rewards - greedy[:, None])[..., None] - world.beta * kl


@pytest.mark.evidence
def test_a_token_s_own_kl_alone_rests_elsewhere(evidence):
    """The authors' code gives each token the response's advantage less beta times its *own* log-ratio. That leaves out
    that a token leads to later ones, and rests at another policy, the one where TRL's GRPO rests by default."""
    world = small_world()
    logits = own_kl_rest(world)
    assert expected_gradient(reinforce, world, logits, own_kl_advantages(world, logits)).abs().max() < 1e-12
    best = optimum(world)
    assert expected_gradient(reinforce, world, best, own_kl_advantages(world, best)).abs().max() > 1e-3
    away = [exact.distance(exact.make_world(seed), own_kl_rest(exact.make_world(seed))) for seed in SEEDS]
    assert min(away) > 0.1
    evidence(
        "rlhf/remax",
        "Exact world: KL to the optimum where each token is charged its own KL alone",
        value=sum(away) / 5,
        unit="nats",
        seeds=SEEDS,
        spread=away,
        note="Of the fixed point, exact.",
    )


# The method


def test_it_runs_in_the_shared_loop(tmp_path):
    history = trains_in_the_loop(original.algorithm(), tmp_path, prompts=16)
    assert len(history) == 2


def test_the_baseline_is_the_greedy_response_to_the_same_prompt():
    policy, tokenizer = arithmetic.warm_start()
    settings = original.algorithm().settings(prompts=8, group=2)
    records = arithmetic.problems(held_out=False)[:64]
    rollout = loop.rollout(policy, tokenizer, records, arithmetic.exact_match, settings, step=0, greedy=True)
    chosen = [records[i] for i in lm.batch_indices(64, 8, 0, 0)]
    prompts = [record["prompt"] for record in chosen]
    texts = lm.generate(policy, tokenizer, prompts, max_new_tokens=settings.max_new_tokens, temperature=0.0).texts
    right = [float(text == record["answer"]) for text, record in zip(texts, chosen, strict=True)]
    assert rollout.greedy_scores.tolist() == [score for score in right for _ in range(2)]
    assert 0 < sum(right) < 8


def the_score_alone():
    """The adapter with the greedy response's score as baseline, without its KL, as veRL has it."""

    def advantages(rollout, settings):
        rewards = rollout.scores - settings.beta * rollout.token_kl().sum(-1)
        return original.remax_advantages(rewards, rollout.greedy_scores), None

    return replace(original.algorithm(), advantages=advantages)


@pytest.mark.evidence
def test_it_reaches_the_optimum(evidence):
    """Without the greedy response's KL the noise does not vanish at pi*, and it ends further away."""
    forms = {"": (original.algorithm(), 0.01), ", the greedy score alone as baseline": (the_score_alone(), None)}
    if not evidence.full:
        del forms[", the greedy score alone as baseline"]
    note = "The worst of the seeds, which set world and samples; 2,000 steps of 16 responses a prompt."
    for name, (algorithm, bar) in forms.items():
        reaches_the_optimum(evidence, "rlhf/remax", algorithm, f"ReMax{name}", check=name, bar=bar, note=note)
