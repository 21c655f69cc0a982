"""Pitfalls of PPO and GRPO: the wrong one fails, the right one holds, and is what the algorithms' own files compute."""

import pytest
import torch
from torch.testing import assert_close

from snippets.interview import pitfalls_rlhf as pitfalls
from snippets.rlhf import grpo, ppo
from snippets.worlds import exact
from tests.interview.pairs import check_module, check_pair, measured

SNIPPET = "interview/pitfalls_rlhf"
UNBARRED = {("measure_tensors", "advantage of a win of two, population against unbiased std")}
CASES = [
    ("measure_exact", "mean of k3", (">=", 5), ("<=", 1.5512)),
    ("measure_exact", "distance to the optimum, k1 in the reward", (">=", 1), ("<=", 0.2)),
    ("measure_exact", "share of the KL's gradient", ("<=", 1e-9), (">=", 1 - 1e-9)),
    ("measure_exact", "distance to the optimum, 50 epochs a batch", (">=", 1.5), ("<=", 1)),
    ("measure_tensors", "weight of a token, 10 against 100 tokens", (">=", 9.99), ("<=", 1.001)),
    ("measure_tensors", "share of NaN advantages", (">=", 0.3), ("<=", 0)),
    ("measure_tensors", "relative error of k3 at 1e-4", (">=", 0.5), ("<=", 1e-3)),
    ("measure_tensors", "share of finite k3, log-ratios 0 to 200", ("<=", 0.5), (">=", 1)),
    ("measure_tensors", "share of values kept within the clip, moved by up to 1", ("<=", 0.25), (">=", 1)),
    ("measure_tensors", "share of values without gradient, rewards of scale 100", (">=", 0.9), ("<=", 0.1)),
]

REPEATED = {
    "distance to the optimum, k1 in the reward",
    "distance to the optimum, 50 epochs a batch",
}  # what has chance in it


@pytest.mark.evidence
@pytest.mark.parametrize("case", CASES, ids=[case[1] for case in CASES])
def test_the_wrong_one_fails_and_the_right_one_holds(evidence, case):
    check_pair(evidence, pitfalls, case, chance=case[1] in REPEATED)


def test_every_pair_is_measured_printed_and_named(capsys):
    check_module(pitfalls, CASES, capsys, without_bar=frozenset(UNBARRED))


@pytest.mark.evidence
def test_the_std_is_a_choice_that_changes_the_size(evidence):
    what = "advantage of a win of two, population against unbiased std"
    population, unbiased = measured(pitfalls, "measure_tensors", 0)[what][:2]
    evidence(SNIPPET, f"{what}: population", value=population)
    evidence(SNIPPET, f"{what}: unbiased", value=unbiased)
    assert population / unbiased == pytest.approx(2**0.5, rel=1e-3)  # sqrt(G / (G - 1)), but for the eps


def policies():
    world = exact.make_world(3)
    return world, exact.optimal_policy(world.ref_logps, world.rewards, world.beta)


def test_the_flipped_k3_is_chi2_minus_the_kl():
    world, logps = policies()
    kl = exact.kl(logps, world.ref_logps)
    chi2 = (2 * logps - world.ref_logps).exp().sum(-1) - 1  # sum of pi^2 / ref, less 1
    assert_close((logps.exp() * pitfalls.k3(logps, world.ref_logps)).sum(-1), kl)
    assert_close((logps.exp() * pitfalls.k3_wrong(logps, world.ref_logps)).sum(-1), chi2 - kl)


def test_near_the_reference_the_flip_does_not_show():
    """Why a test with small log-ratios passes on the flipped form: both are half the square there."""
    small = torch.linspace(-1e-3, 1e-3, 21, dtype=torch.float64)
    assert_close(pitfalls.k3_wrong(small, 0 * small), pitfalls.k3(small, 0 * small), atol=1e-9, rtol=0)
    large = torch.tensor(2.0)
    assert pitfalls.k3_wrong(large, 0 * large) > 3 * pitfalls.k3(large, 0 * large)


def test_k3_as_a_loss_has_the_gradient_of_the_other_kl():
    world, best = policies()
    table = exact.logits_of(world, best).requires_grad_(True)
    logps = exact.response_logps(world, table)
    mean = (best.exp() * pitfalls.k3(logps, world.ref_logps)).sum(-1).mean()
    assert_close(
        torch.autograd.grad(mean, table, retain_graph=True),
        torch.autograd.grad(exact.kl(world.ref_logps, logps).mean(), table),
    )


def test_the_right_ones_are_what_the_snippets_compute():
    generator = torch.Generator().manual_seed(0)
    logps, old, ref, per_token = torch.randn(4, 6, 5, generator=generator, dtype=torch.float64)
    mask = (torch.arange(5) < torch.tensor([[5], [1], [3], [4], [2], [5]])).double()
    ones, advantages = torch.ones_like(mask), torch.randn(6, generator=generator, dtype=torch.float64)
    clipped = pitfalls.clipped_ratio(logps, old, advantages)
    assert_close(clipped, ppo.ppo_loss(logps, old, advantages.unsqueeze(-1).expand(6, 5), ones))
    # At ratio 1 a token's loss is -advantage, so grpo_loss shows how it averages.
    surrogate = -advantages.unsqueeze(-1).expand(6, 5)
    constant = grpo.grpo_loss(old, old, advantages, mask, normalize="constant", max_len=9)
    assert_close(pitfalls.dr_grpo(surrogate, mask, 9), constant)
    assert_close(pitfalls.dr_grpo_wrong(surrogate, mask), grpo.grpo_loss(old, old, advantages, mask))
    rewards = per_token.view(5, 6)
    assert_close(pitfalls.scale(rewards), grpo.group_advantages(rewards))
    scores = ppo.kl_rewards(advantages, logps, ref, ones, beta=0.3).sum(-1)
    assert_close(pitfalls.kl_reward(advantages, logps, ref, 0.3), scores)
    by_hand = pitfalls.value_clip_wrong(logps, old, ref).mean() / 2
    assert_close(by_hand, ppo.value_loss(logps, old, ref, ones, clip=0.2))
    penalty = grpo.grpo_loss(logps, logps, 0 * advantages, ones, ref_logps=ref, beta=1.0, normalize="token")
    assert_close(pitfalls.k3_float(ref - logps).mean(), penalty)
    assert_close(pitfalls.k3(logps, ref).mean(), penalty)


def test_k3_keeps_its_gradient_where_exp_overflows():
    log_r = torch.tensor([1e-4, 5.0, 100.0, 1e4], requires_grad=True)
    pitfalls.k3_float(log_r).sum().backward()
    assert log_r.grad.isfinite().all() and (log_r.grad > 0).all()


def test_the_clip_means_the_same_at_every_scale():
    values, old, returns = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    for scale in (0.01, 100.0):
        scaled = pitfalls.value_clip(scale * values, scale * old, scale * returns) / scale**2
        assert_close(scaled, pitfalls.value_clip(values, old, returns), rtol=1e-4, atol=1e-4)


def test_the_clip_is_around_what_was_kept():
    values, old_values = torch.tensor([1.0, 5.0, -9.0]), torch.tensor([1.1, 0.0, 0.0])
    assert torch.allclose(pitfalls.clipped_values(values, old_values, 0.2), torch.tensor([1.0, 0.2, -0.2]))
    assert torch.equal(pitfalls.clipped_values_wrong(values, old_values, 0.2), values)
