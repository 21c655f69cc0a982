"""PPO against explicit loops, finite differences, TRL where it has the same loss, and enumeration in the exact world.

Most tests take the module that they test as an argument with a default, so that `test_mutations` can run them on
deliberate mistakes.
"""

import importlib.util
import json
import math
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import snippets.rlhf.ppo as PPO
from snippets.rlhf import loop
from snippets.worlds import arithmetic, exact, lm
from tests.mutation import caught_by, load_mutant
from tests.rlhf.common import SEEDS, trl_grpo

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]


def make_mask(kind: str, rows: int = 6, length: int = 9) -> Tensor:
    """Rows of several lengths, one of them full; with `holes`, tokens in between that do not count (a tool's output,
    say).
    """
    lengths = torch.tensor([length, 1, 4, 5, 2, 7])[:rows].unsqueeze(-1)
    place = torch.arange(length)
    if kind == "right":
        return (place < lengths).long()
    if kind == "left":
        return (place >= length - lengths).long()
    if kind == "empty":  # rows without one valid token among the others
        return (place < lengths).long() * torch.tensor([1, 1, 0, 1, 0, 1]).unsqueeze(-1)
    assert kind == "holes"
    return (place < lengths).long() * torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 1])


KINDS = ["right", "left", "empty", "holes"]


def random(seed: int, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# --- generalised advantage estimation ---------------------------------------------------------------------------------


def loop_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Equation 16 of the GAE paper as a double sum over the valid tokens of each row; nothing is shared with the
    recursion under test.
    """
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for b in range(rewards.shape[0]):
        steps = [t for t in range(rewards.shape[1]) if mask[b, t]]
        r, v = [rewards[b, t].item() for t in steps], [values[b, t].item() for t in steps] + [0.0]
        delta = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(steps))]
        for i, t in enumerate(steps):
            advantages[b, t] = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(steps)))
            returns[b, t] = advantages[b, t] + v[i]
    return advantages, returns


def test_gae_is_the_double_sum_over_td_errors(ppo=PPO):
    for seed, kind in enumerate(KINDS):
        mask = make_mask(kind)
        rewards, values = random(seed, *mask.shape), random(seed + 100, *mask.shape)
        for gamma, lam in [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.7, 1.0), (0.0, 0.5)]:
            advantages, returns = ppo.gae(rewards, values, mask, gamma=gamma, lam=lam)
            expected = loop_gae(rewards, values, mask, gamma, lam)
            close(advantages, expected[0])
            close(returns, expected[1])


def test_gae_is_the_weighted_mean_of_n_step_estimates(ppo=PPO):
    """The definition behind equation 16: (1 - lam) sum_n lam^(n-1) A^(n), where the last estimate takes all the weight
    that is left.
    """
    rewards, values, gamma, lam = random(0, 1, 6), random(1, 1, 6), 0.9, 0.8
    advantages, _ = ppo.gae(rewards, values, torch.ones(1, 6), gamma=gamma, lam=lam)
    r, v = rewards[0].tolist(), values[0].tolist() + [0.0]
    for t in range(6):
        total = 0.0
        for n in range(1, 6 - t + 1):
            estimate = sum(gamma**k * r[t + k] for k in range(n)) + gamma**n * v[t + n] - v[t]
            total += (1 - lam if t + n < 6 else 1) * lam ** (n - 1) * estimate
        assert advantages[0, t].item() == pytest.approx(total, abs=1e-10)


def test_gae_lambda_one_is_return_minus_value(ppo=PPO):
    for kind in KINDS:
        mask = make_mask(kind)
        rewards, values = random(2, *mask.shape), random(3, *mask.shape)
        advantages, returns = ppo.gae(rewards, values, mask, gamma=1.0, lam=1.0)
        togo = (rewards * mask).flip(-1).cumsum(-1).flip(-1)
        close(advantages, (togo - values) * mask)
        close(returns, togo * mask)


def test_gae_lambda_zero_is_the_td_error(ppo=PPO):
    rewards, values = random(4, 3, 5), random(5, 3, 5)
    advantages, returns = ppo.gae(rewards, values, torch.ones(3, 5), gamma=0.9, lam=0.0)
    following = torch.cat([values[:, 1:], torch.zeros(3, 1, dtype=torch.float64)], dim=1)
    close(advantages, rewards + 0.9 * following - values)
    close(returns, rewards + 0.9 * following)


def test_gae_holes_are_cut_out(ppo=PPO):
    """A row with a tool's output in its middle has the advantages of the same row without it."""
    rewards, values, keep = random(6, 2, 9), random(7, 2, 9), make_mask("holes")[0].bool()
    whole = ppo.gae(rewards, values, keep.long().expand(2, 9), gamma=0.9, lam=0.8)
    cut = ppo.gae(rewards[:, keep], values[:, keep], torch.ones(2, int(keep.sum())), gamma=0.9, lam=0.8)
    for a, b in zip(whole, cut, strict=True):
        close(a[:, keep], b)


def test_gamma_below_one_weights_the_score_by_length(ppo=PPO):
    """With gamma < 1 a good answer is worth more if it is short: gamma changes the objective."""
    mask = make_mask("right")
    scores = ppo.kl_rewards(torch.ones(6), torch.zeros(6, 9), torch.zeros(6, 9), mask, beta=0.0)
    for gamma in (1.0, 0.9):
        _, returns = ppo.gae(scores, torch.zeros(6, 9), mask, gamma=gamma, lam=1.0)
        close(returns[:, 0].double(), torch.tensor(gamma, dtype=torch.float64) ** (mask.sum(-1) - 1), atol=1e-6)


def test_gamma_one_tokens_of_a_row_differ_in_advantage(ppo=PPO):
    """All tokens of a row have the same return, the score; the critic tells them apart, and at lam=0 the advantages add
    up to score - V(s_0).
    """
    values = random(8, 1, 5)
    rewards = torch.zeros(1, 5, dtype=torch.float64)
    rewards[0, -1] = 1.0
    full, returns = ppo.gae(rewards, values, torch.ones(1, 5), lam=1.0)
    close(returns, torch.ones(1, 5, dtype=torch.float64))
    assert full.unique().numel() == 5
    step, _ = ppo.gae(rewards, values, torch.ones(1, 5), lam=0.0)
    close(step.sum(), 1.0 - values[0, 0])


# --- the per-token reward ---------------------------------------------------------------------------------------------


def test_score_on_the_last_valid_token_and_rows_sum_to_r_minus_beta_logratio(ppo=PPO):
    for kind in KINDS:
        mask = make_mask(kind)
        scores, logps, ref_logps = random(9, 6), random(10, 6, 9), random(11, 6, 9)
        rewards = ppo.kl_rewards(scores, logps, ref_logps, mask, beta=0.3)
        expected = torch.zeros_like(rewards)
        for b in range(6):
            steps = [t for t in range(9) if mask[b, t]]
            for t in steps:
                expected[b, t] = -0.3 * (logps[b, t] - ref_logps[b, t]) + (scores[b] if t == steps[-1] else 0.0)
        close(rewards, expected)
        rows = mask.any(-1)
        close(rewards.sum(-1)[rows], (scores - 0.3 * ((logps - ref_logps) * mask).sum(-1))[rows])


def test_the_rows_mean_is_the_exact_objective(ppo=PPO):
    """Summed over every response with its probability, the rewards are E[r] - beta * KL, by enumeration."""
    world = small_world()
    logits = world.ref_logits + random(12, *world.ref_logits.shape)
    rows, weights = every_response(world, logits)
    rewards = ppo.kl_rewards(rows.rewards.flatten(), rows.old_logps, rows.ref_logps, rows.mask, beta=world.beta)
    close((weights * rewards.sum(-1)).sum(), exact.objective(world, logits))


def test_a_response_without_eos_still_gets_its_score(ppo=PPO):
    """Cut off at the limit, the last token is an ordinary one; the score stands there, and every token's return holds
    it.
    """
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])  # the first was cut off, the second ends with its EOS
    rewards = ppo.kl_rewards(torch.tensor([2.0, 3.0]), torch.zeros(2, 4), torch.zeros(2, 4), mask, beta=0.1)
    assert rewards.tolist() == [[0, 0, 0, 2], [0, 3, 0, 0]]
    _, returns = ppo.gae(rewards, torch.zeros(2, 4), mask, lam=1.0)
    assert returns.tolist() == [[2, 2, 2, 2], [3, 3, 0, 0]]


def test_reward_at_a_pad_is_lost(ppo=PPO):
    """The wrong run: a score in column -1 of a right-padded batch never reaches a token. Right: all of it does."""
    mask = make_mask("right")
    wrong = torch.zeros(6, 9)
    wrong[:, -1] = 1.0
    _, returns = ppo.gae(wrong, torch.zeros(6, 9), mask, lam=1.0)
    assert returns[:, 0].tolist() == [1, 0, 0, 0, 0, 0]  # only the row that fills the batch
    right = ppo.kl_rewards(torch.ones(6), torch.zeros(6, 9), torch.zeros(6, 9), mask, beta=0.1)
    _, returns = ppo.gae(right, torch.zeros(6, 9), mask, lam=1.0)
    assert returns[:, 0].tolist() == [1] * 6


# --- the clipped loss -------------------------------------------------------------------------------------------------


def loop_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> float:
    """Equation 7 of the PPO paper, token by token."""
    total, count = 0.0, 0
    for b in range(mask.shape[0]):
        for t in range(mask.shape[1]):
            if mask[b, t]:
                ratio, advantage = math.exp(logps[b, t] - old_logps[b, t]), advantages[b, t].item()
                total += min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)
                count += 1
    return -total / count


def test_loss_is_equation_7_token_by_token(ppo=PPO):
    for seed, kind in enumerate(KINDS):
        mask = make_mask(kind)
        logps, advantages = random(seed, *mask.shape), random(seed + 30, *mask.shape)
        old_logps = logps + random(seed + 60, *mask.shape, scale=0.4)
        for clip in (0.2, 0.0, 1.0):
            ours = ppo.ppo_loss(logps, old_logps, advantages, mask, clip=clip).item()
            assert ours == pytest.approx(loop_loss(logps, old_logps, advantages, mask, clip), abs=1e-12)


def token_gradient(ppo, ratio: float, advantage: float) -> float:
    """d loss / d log pi of one token."""
    logps = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    old, mask = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1)
    ppo.ppo_loss(logps, old, torch.tensor([[advantage]], dtype=torch.float64), mask, clip=0.2).backward()
    return logps.grad.item()


def test_gradient_is_zero_only_where_the_step_would_go_further(ppo=PPO):
    """All four cases of the sign of A and the side of the ratio, and both in between."""
    for advantage in (2.0, -2.0):
        for ratio in (0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 3.0):
            further = ratio > 1.2 if advantage > 0 else ratio < 0.8
            expected = 0.0 if further else -ratio * advantage
            assert token_gradient(ppo, ratio, advantage) == pytest.approx(expected, abs=1e-12), (ratio, advantage)


def test_clamp_without_min_loses_the_corrective_gradient():
    """The wrong run: the clamp alone has gradient 0 where a step went the wrong way, and the min has it in full."""
    for ratio, advantage in [(0.5, 2.0), (3.0, -2.0)]:
        logps = torch.tensor(math.log(ratio), requires_grad=True)
        (-logps.exp().clamp(0.8, 1.2) * advantage).backward()
        assert logps.grad.item() == 0
        assert token_gradient(PPO, ratio, advantage) == pytest.approx(-ratio * advantage)


def test_at_ratio_one_the_gradient_is_the_policy_gradient(ppo=PPO):
    """Before any update PPO is -mean(A * grad log pi), whatever the clip."""
    mask = make_mask("holes")
    advantages = random(13, *mask.shape)
    for clip in (0.2, 0.01, 5.0):
        logps = random(14, *mask.shape).requires_grad_()
        ppo.ppo_loss(logps, logps.detach().clone(), advantages, mask, clip=clip).backward()
        close(logps.grad, -advantages * mask / mask.sum())


def test_no_gradient_through_advantages_old_logps_or_targets(ppo=PPO):
    mask = torch.ones(2, 3)
    logps, old, advantages = (random(i, 2, 3).requires_grad_() for i in range(3))
    ppo.ppo_loss(logps, old, advantages, mask).backward()
    assert logps.grad is not None and old.grad is None and advantages.grad is None
    values, old_values, returns = (random(i, 2, 3).requires_grad_() for i in range(3))
    ppo.value_loss(values, old_values, returns, mask, clip=0.1).backward()
    assert values.grad is not None and old_values.grad is None and returns.grad is None
    rewards = ppo.kl_rewards(torch.ones(2), logps, old, mask, beta=0.1)
    assert not any(x.requires_grad for x in (rewards, *ppo.gae(rewards, values, mask)))


def test_gradients_against_finite_differences(ppo=PPO):
    """Central differences in float64, away from the kinks."""
    mask = make_mask("holes")
    old, advantages = random(15, *mask.shape), random(16, *mask.shape)
    returns, old_values = random(17, *mask.shape), random(18, *mask.shape)
    losses = {
        "policy": lambda x: ppo.ppo_loss(x, old, advantages, mask, clip=0.2),
        "value": lambda x: ppo.value_loss(x, old_values, returns, mask),
        "clipped value": lambda x: ppo.value_loss(x, old_values, returns, mask, clip=0.3),
    }
    for name, loss in losses.items():
        x = ((old if name == "policy" else old_values) + random(19, *mask.shape, scale=0.5)).requires_grad_()
        loss(x).backward()
        with torch.no_grad():
            for b, t in torch.nonzero(torch.ones_like(mask)).tolist():
                step = torch.zeros_like(x)
                step[b, t] = 1e-6
                slope = (loss(x + step) - loss(x - step)).item() / 2e-6
                assert x.grad[b, t].item() == pytest.approx(slope, abs=1e-7), (name, b, t)


# --- the critic's loss and whitening ----------------------------------------------------------------------------------


def test_value_loss_against_the_formula(ppo=PPO):
    for seed, kind in enumerate(KINDS):
        mask = make_mask(kind)
        values, old, returns = (random(10 * seed + i, *mask.shape) for i in range(3))
        for clip in (None, 0.0, 0.2, 1.0):
            total = 0.0
            for b, t in torch.nonzero(mask).tolist():
                v, o, r = values[b, t].item(), old[b, t].item(), returns[b, t].item()
                errors = [(v - r) ** 2]
                if clip is not None:
                    errors.append((o + min(max(v - o, -clip), clip) - r) ** 2)
                total += 0.5 * max(errors)
            assert ppo.value_loss(values, old, returns, mask, clip=clip).item() == pytest.approx(
                total / mask.sum().item(), abs=1e-12
            )


def test_value_clip_has_the_unit_of_the_reward(ppo=PPO):
    """Rewards times c: the loss is c^2 times as large only if the clip is scaled too. With the clip left alone it is
    another loss.
    """
    mask = make_mask("right")
    values, old, returns = (random(i + 40, *mask.shape) for i in range(3))
    plain = ppo.value_loss(values, old, returns, mask, clip=0.2)
    close(ppo.value_loss(100 * values, 100 * old, 100 * returns, mask, clip=20.0), 1e4 * plain)
    assert abs(ppo.value_loss(100 * values, 100 * old, 100 * returns, mask, clip=0.2) / 1e4 - plain) > 0.01 * plain


def test_value_clip_stops_a_step_only_towards_the_target(ppo=PPO):
    """From old value 0 with target 1: beyond +clip the gradient is 0; a value that moved away from its target keeps its
    gradient.
    """
    for value, expected in [(0.1, 0.1 - 1), (0.5, 0.0), (-0.5, -0.5 - 1)]:
        values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
        zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
        ppo.value_loss(values, zero, one, one, clip=0.2).backward()
        assert values.grad.item() == pytest.approx(expected, abs=1e-12)


def test_whiten_ignores_padding(ppo=PPO):
    for kind in KINDS:
        mask = make_mask(kind)
        x = 3 + 5 * random(20, *mask.shape)
        white = ppo.whiten(x.masked_fill(mask == 0, math.nan), mask)
        valid = x[mask.bool()]
        close(white[mask.bool()], (valid - valid.mean()) / valid.std(), atol=1e-8)
        assert (white[mask == 0] == 0).all()


def test_whiten_frees_the_loss_from_the_scale_of_the_reward(ppo=PPO):
    """Rewards and values times 100: whitened advantages are the same, so the policy's step is the same."""
    mask = make_mask("right")
    rewards, values = random(21, *mask.shape), random(22, *mask.shape)
    small, large = (ppo.whiten(ppo.gae(c * rewards, c * values, mask)[0], mask) for c in (1, 100))
    close(small, large, atol=1e-6)


def test_whiten_depends_on_the_batch(ppo=PPO):
    """Two processes that whiten their own halves do not get what one process gets, so their updates differ."""
    mask = make_mask("right")
    x = random(23, *mask.shape)
    halves = torch.cat([ppo.whiten(x[:3], mask[:3]), ppo.whiten(x[3:], mask[3:])])
    assert (halves - ppo.whiten(x, mask)).abs().max() > 0.1


def test_one_valid_token_whitens_to_zero(ppo=PPO):
    white = ppo.whiten(torch.tensor([[5.0, 7.0]]), torch.tensor([[1, 0]]))
    assert white.tolist() == [[0.0, 0.0]]


# --- invariances and numerics -----------------------------------------------------------------------------------------


def outputs(ppo, scores: Tensor, columns: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    """All that the module computes from one batch: advantages, targets, losses, and the losses' gradients."""
    rewards = ppo.kl_rewards(scores, columns["old"], columns["ref"], mask, beta=0.3)
    advantages, returns = ppo.gae(rewards, columns["old_values"], mask, gamma=0.9, lam=0.8)
    logps, values = (columns[name].clone().requires_grad_() for name in ("logps", "values"))
    policy = ppo.ppo_loss(logps, columns["old"], ppo.whiten(advantages, mask), mask, clip=0.2)
    value = ppo.value_loss(values, columns["old_values"], returns, mask, clip=0.3)
    (policy + value).backward()
    return {
        "rewards": rewards,
        "advantages": advantages,
        "returns": returns,
        "policy": policy.detach(),
        "value": value.detach(),
        "logps.grad": logps.grad,
        "values.grad": values.grad,
    }


def make_columns(mask: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, dict[str, Tensor]]:
    names = ("logps", "old", "ref", "values", "old_values")
    return random(50, mask.shape[0]), {name: random(51 + i, *mask.shape, dtype=dtype) for i, name in enumerate(names)}


def test_what_stands_under_a_zero_never_matters(ppo=PPO):
    """NaN and inf under the mask change no value and no gradient."""
    for kind in KINDS:
        mask = make_mask(kind)
        scores, columns = make_columns(mask)
        clean = outputs(ppo, scores, columns, mask)
        for junk in (math.nan, math.inf, -math.inf, 1e30):
            dirty = outputs(ppo, scores, {k: v.masked_fill(mask == 0, junk) for k, v in columns.items()}, mask)
            for name, value in clean.items():
                assert torch.isfinite(dirty[name]).all(), (kind, junk, name)
                close(dirty[name], value)


def test_padding_left_or_right_and_more_of_it_changes_nothing(ppo=PPO):
    mask = make_mask("right")
    scores, columns = make_columns(mask)
    clean = outputs(ppo, scores, columns, mask)

    def pad(x: Tensor, left: int, right: int) -> Tensor:
        return nn.functional.pad(x, (left, right))

    def shift(x: Tensor) -> Tensor:  # right-padded to left-padded
        return torch.stack([row.roll(x.shape[1] - n) for row, n in zip(x, mask.sum(-1).tolist(), strict=True)])

    for move in (lambda x: pad(x, 0, 5), lambda x: pad(x, 3, 2), shift):
        moved = outputs(ppo, scores, {k: move(v) for k, v in columns.items()}, move(mask))
        for name, value in clean.items():
            close(moved[name], move(value) if value.dim() == 2 else value)


def test_rows_do_not_touch_each_other_and_a_split_batch_adds_up(ppo=PPO):
    """Parts of a batch, weighted by their tokens, give the loss of the whole; by their rows they would not."""
    mask = make_mask("right")
    logps, old, advantages = (random(i, *mask.shape) for i in range(3))
    whole = ppo.ppo_loss(logps, old, advantages, mask)
    parts = [(slice(0, 1), 9), (slice(1, 3), 5), (slice(3, 6), 14)]
    total = sum(n * ppo.ppo_loss(logps[rows], old[rows], advantages[rows], mask[rows]) for rows, n in parts) / 28
    close(total, whole)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    close(ppo.ppo_loss(logps[order], old[order], advantages[order], mask[order]), whole)


def test_a_shift_of_all_values_by_a_constant_reward(ppo=PPO):
    """The same constant added to every score and to every value leaves the advantages alone at gamma 1, and moves the
    targets by it.
    """
    mask = make_mask("right")
    scores, columns = make_columns(mask)
    rewards = [ppo.kl_rewards(scores + c, columns["old"], columns["ref"], mask, beta=0.3) for c in (0.0, 7.0)]
    plain = ppo.gae(rewards[0], columns["old_values"], mask, lam=0.8)
    moved = ppo.gae(rewards[1], columns["old_values"] + 7.0, mask, lam=0.8)
    close(moved[0], plain[0])
    close(moved[1], plain[1] + 7.0 * mask)


def test_log_ratios_of_ten_thousand_stay_finite_and_keep_their_sign(ppo=PPO):
    mask = torch.ones(1, 1)
    for dtype in (torch.float32, torch.float64):
        for log_ratio, advantage in [(1e4, -2.0), (-1e4, 2.0), (1e4, 2.0), (-1e4, -2.0), (30.0, -2.0), (100.0, -2.0)]:
            logps = torch.full((1, 1), log_ratio, dtype=dtype, requires_grad=True)
            loss = ppo.ppo_loss(logps, torch.zeros(1, 1, dtype=dtype), torch.full((1, 1), advantage, dtype=dtype), mask)
            loss.backward()
            assert loss.dtype == dtype and torch.isfinite(loss) and torch.isfinite(logps.grad)
            if log_ratio > 0 and advantage < 0:  # went far the wrong way: the step must still go back
                assert logps.grad.item() > 1.0
            else:
                assert logps.grad.item() == 0.0  # clipped, or a ratio of exp(-10000), which is 0 in either precision


def test_half_precision_is_computed_in_float32(ppo=PPO):
    mask = make_mask("right")
    scores, columns = make_columns(mask, dtype=torch.bfloat16)
    half = outputs(ppo, scores.float(), columns, mask)
    full = outputs(ppo, scores.float(), {k: v.float() for k, v in columns.items()}, mask)
    for name in ("rewards", "advantages", "returns", "policy", "value"):
        assert half[name].dtype == torch.float32
        close(half[name], full[name])
    # The clip is 0.2: in bf16, 1.2 is 1.203125, and a ratio of 1.201 would not be told from it.
    assert half["logps.grad"].dtype == torch.bfloat16


def test_huge_bf16_logits_give_finite_losses(ppo=PPO):
    """Logits of +-1e4 in bf16, through the head that the loop uses."""
    head = nn.Linear(2, 4, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1e4, 0], [-1e4, 0], [0, 1e4], [0, -1e4]]))
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.bfloat16, requires_grad=True)
    for tokens in ([0, 2, 0], [1, 3, 1]):
        logps = lm.head_logps(head, hidden, torch.tensor(tokens)).view(1, 3)
        for old in (logps.detach(), logps.detach() - 1e4, logps.detach() + 1e4):
            hidden.grad = None
            loss = ppo.ppo_loss(logps, old, torch.tensor([[1.0, -1.0, 0.5]]), torch.ones(1, 3))
            loss.backward(retain_graph=True)
            assert torch.isfinite(loss) and torch.isfinite(hidden.grad).all()


# --- bad input --------------------------------------------------------------------------------------------------------


def test_shapes_that_disagree_are_named():
    a, b, mask = torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2, 3)
    calls = [
        lambda: PPO.gae(a, b, mask),
        lambda: PPO.gae(b, a, mask),
        lambda: PPO.ppo_loss(b, a, a, mask),
        lambda: PPO.ppo_loss(a, b, a, mask),
        lambda: PPO.ppo_loss(a, a, b, mask),
        lambda: PPO.value_loss(b, a, a, mask),
        lambda: PPO.value_loss(a, a, b, mask),
        lambda: PPO.whiten(b, mask),
        lambda: PPO.kl_rewards(torch.zeros(2), a, b, mask, beta=0.1),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"\(2, 4\).*\(2, 3\)"):
            call()
    with pytest.raises(ValueError, match=r"scores \(3,\) against mask \(2, 3\)"):
        PPO.kl_rewards(torch.zeros(3), a, a, mask, beta=0.1)


def test_a_batch_without_a_valid_token_is_refused():
    a, mask = torch.zeros(2, 3), torch.zeros(2, 3)
    for call in (
        lambda: PPO.gae(a, a, mask),
        lambda: PPO.ppo_loss(a, a, a, mask),
        lambda: PPO.value_loss(a, a, a, mask),
        lambda: PPO.whiten(a, mask),
        lambda: PPO.kl_rewards(torch.zeros(2), a, a, mask, beta=0.1),
    ):
        with pytest.raises(ValueError, match=r"no valid token: the mask of shape \(2, 3\)"):
            call()


def test_rewards_that_are_not_finite_are_refused_only_where_they_count():
    a, mask = torch.zeros(2, 3), torch.tensor([[1, 1, 0], [0, 0, 0]])
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="scores must be finite"):
            PPO.kl_rewards(torch.tensor([bad, 0.0]), a, a, mask, beta=0.1)
        PPO.kl_rewards(torch.tensor([0.0, bad]), a, a, mask, beta=0.1)  # a row without a token has no reward
        rewards = a.clone()
        rewards[0, 1] = bad
        for r, v in ((rewards, a), (a, rewards)):
            with pytest.raises(ValueError, match="must be finite wherever the mask is 1"):
                PPO.gae(r, v, mask)


def test_settings_out_of_range_are_refused():
    a, mask = torch.zeros(1, 1), torch.ones(1, 1)
    for kwargs in ({"gamma": 1.1}, {"lam": -0.1}, {"lam": math.nan}):
        with pytest.raises(ValueError, match=r"gamma and lam must lie in \[0, 1\]"):
            PPO.gae(a, a, mask, **kwargs)
    with pytest.raises(ValueError, match="clip must not be negative, got -0.1"):
        PPO.ppo_loss(a, a, a, mask, clip=-0.1)
    with pytest.raises(ValueError, match="clip must not be negative, got -0.1"):
        PPO.value_loss(a, a, a, mask, clip=-0.1)


# --- TRL --------------------------------------------------------------------------------------------------------------


def trl_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, tool_mask: Tensor, clip: float
) -> Tensor:
    """TRL's GRPO loss with loss_type="bnpo" (one mean over the batch's tokens) and token-level advantages, on given
    log-probabilities.
    """
    inputs = {"tool_mask": tool_mask, "advantages": advantages, "old_per_token_logps": old_logps}
    return trl_grpo(logps, mask, inputs, loss_type="bnpo", epsilon_low=clip, epsilon_high=clip)


def test_agrees_with_trl(ppo=PPO):
    """TRL 1.16 has no PPO, but its GRPO loss with token-level advantages and loss_type="bnpo" is PPO's: values and
    gradients in float32.
    """
    for seed in range(20):
        for kind in ("right", "left", "empty"):
            mask, tool = (
                make_mask(kind),
                make_mask("holes") | (1 - make_mask("right")) if seed % 2 else torch.ones(6, 9).long(),
            )
            old = random(seed, 6, 9, dtype=torch.float32)
            advantages = random(seed + 1, 6, 9, dtype=torch.float32) * (0.0 if seed == 3 else 1.0)
            spread = 8.0 if seed >= 15 else 0.3  # ratios up to e^16, where TRL is still finite
            values = []
            for loss in (
                lambda x, o=old, a=advantages, m=mask, t=tool: ppo.ppo_loss(x, o, a, m * t, clip=0.2),
                lambda x, o=old, a=advantages, m=mask, t=tool: trl_loss(x, o, a, m, t, 0.2),
            ):
                logps = (old + (random(seed + 2, 6, 9, dtype=torch.float32) * spread).clamp(-16, 16)).requires_grad_()
                value = loss(logps)
                value.backward()
                values.append((value.detach(), logps.grad))
            for ours, theirs in zip(*values, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_trl_has_no_ppo():
    """What the page says of TRL: the tested version has no PPO trainer, stable or experimental."""
    import trl

    assert trl.__version__ == "1.16.0"
    assert not hasattr(trl, "PPOTrainer") and hasattr(trl, "RLOOTrainer") and hasattr(trl, "GRPOTrainer")
    assert importlib.util.find_spec("trl.experimental.ppo") is None
    defaults = trl.RLOOConfig.__dataclass_fields__
    assert (defaults["beta"].default, defaults["epsilon"].default) == (0.05, 0.2)
    assert {"num_generations", "num_iterations", "normalize_advantages", "mask_truncated_completions"} <= set(defaults)


# --- the exact world --------------------------------------------------------------------------------------------------


def small_world() -> exact.World:
    return exact.make_world(1, prompts=2, vocab=3, length=3, beta=0.7)


def every_response(world: exact.World, logits: Tensor) -> tuple[exact.Samples, Tensor]:
    """All responses of all prompts as one batch, and the probability of each row: the samples of a run that misses
    nothing.
    """
    prompts, responses = world.rewards.shape
    rows = torch.arange(prompts).repeat_interleave(responses).unsqueeze(-1)  # (X * Y, 1)
    which = torch.arange(responses).expand(prompts, -1)
    old, ref = (exact.token_logps(world, table.detach()).flatten(0, 1) for table in (logits, world.ref_logits))
    prefixes = world.prefixes.repeat(prompts, 1)
    samples = exact.Samples(which, old, ref, world.rewards, prefixes, rows, torch.ones_like(old))
    return samples, old.sum(-1).exp() / prompts


def exact_values(world: exact.World, logits: Tensor) -> Tensor:
    """(X, N): the true value of every prefix under the policy, KL penalty included, by enumeration."""
    logps, ref = exact.token_logps(world, logits), exact.token_logps(world, world.ref_logits)  # (X, Y, T)
    probs = logps.sum(-1).exp()
    togo = world.rewards.unsqueeze(-1) - world.beta * (logps - ref).flip(-1).cumsum(-1).flip(-1)  # (X, Y, T)
    values = torch.zeros(world.ref_logits.shape[:2], dtype=torch.float64)
    for x in range(len(probs)):
        total, weight = torch.zeros(2, values.shape[1], dtype=torch.float64)
        total.index_add_(0, world.prefixes.flatten(), (probs[x].unsqueeze(-1) * togo[x]).flatten())
        weight.index_add_(0, world.prefixes.flatten(), probs[x].repeat_interleave(world.length))
        values[x] = total / weight
    return values


def expected_gradient(ppo, world: exact.World, logits: Tensor, values: Tensor, lam: float) -> Tensor:
    """PPO's gradient on average, exactly: every response, its probability a weight on its advantages."""
    logits = logits.detach().requires_grad_()
    rows, weights = every_response(world, logits)
    rewards = ppo.kl_rewards(rows.rewards.flatten(), rows.old_logps, rows.ref_logps, rows.mask, beta=world.beta)
    advantages, _ = ppo.gae(rewards, values[rows.rows, rows.prefixes], rows.mask, lam=lam)
    loss = ppo.ppo_loss(rows.logps(world, logits), rows.old_logps, advantages * weights.unsqueeze(-1), rows.mask)
    (gradient,) = torch.autograd.grad(
        -loss * rows.mask.sum(), logits
    )  # a sum over tokens, not a mean: weights are probabilities
    return gradient


def true_gradient(world: exact.World, logits: Tensor) -> Tensor:
    logits = logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(exact.objective(world, logits), logits)
    return gradient


def test_expected_gradient_is_the_gradient_of_the_objective(ppo=PPO):
    """By enumeration: at lam=1 with any critic at all, and at any lam with the true values. With lam < 1 a wrong critic
    is bias.
    """
    world = small_world()
    logits = world.ref_logits + random(24, *world.ref_logits.shape)
    truth, right = true_gradient(world, logits), exact_values(world, logits)
    wrong = right + random(25, *right.shape)
    for values, lam in [(wrong, 1.0), (torch.zeros_like(right), 1.0), (right, 0.0), (right, 0.5), (right, 1.0)]:
        close(expected_gradient(ppo, world, logits, values, lam), truth, atol=1e-12)
    assert (expected_gradient(ppo, world, logits, wrong, 0.5) - truth).norm() > 0.05 * truth.norm()


@pytest.mark.evidence
def test_sampled_gradients_average_to_the_exact_one(evidence):
    """A z-test of the sampler too: 1,000 batches at ratio 1, a critic of noise, lam=1; and the control, lam=0.5, which
    must fail.
    """
    world = small_world()
    logits = 0.5 * random(24, *world.ref_logits.shape)  # no prefix so rare that its mean is not yet normal
    truth, values = true_gradient(world, logits), random(25, *world.ref_logits.shape[:2])
    generator = torch.Generator().manual_seed(0)
    gradients = {1.0: [], 0.5: []}
    table = logits.clone().requires_grad_()
    for _ in range(1000):
        samples = exact.sample(world, logits, 16, generator)
        rewards = PPO.kl_rewards(
            samples.rewards.flatten(), samples.old_logps, samples.ref_logps, samples.mask, beta=world.beta
        )
        for lam, found in gradients.items():
            advantages, _ = PPO.gae(rewards, values[samples.rows, samples.prefixes], samples.mask, lam=lam)
            loss = PPO.ppo_loss(samples.logps(world, table), samples.old_logps, advantages, samples.mask)
            found.append(torch.autograd.grad(-loss * world.length, table)[0])
    largest = {}
    for lam, found in gradients.items():
        stack = torch.stack(found)
        z = (stack.mean(0) - truth) / (stack.std(0) / len(found) ** 0.5)
        largest[lam] = z.abs().max().item()
    note = f"over {truth.numel()} entries; a critic of noise at λ = 0.5, which is biased, gives {largest[0.5]:.0f}"
    evidence(
        "rlhf/ppo",
        "Sampled gradient against the exact one, λ = 1: largest |z|",
        value=largest[1.0],
        bar=4.5,
        seeds=[0],
        note=note,
    )
    assert largest[0.5] > 10


def test_at_the_optimum_every_advantage_is_zero(ppo=PPO):
    """r - beta * log(pi*/pi_ref) is beta * log Z for every response: with the KL in the reward nothing is left to learn
    from, and no noise.
    """
    for seed in SEEDS:
        world = exact.make_world(seed)
        optimum = exact.logits_of(world, exact.optimal_policy(world.ref_logps, world.rewards, world.beta))
        rows, _ = every_response(world, optimum)
        rewards = ppo.kl_rewards(rows.rewards.flatten(), rows.old_logps, rows.ref_logps, rows.mask, beta=world.beta)
        log_z = torch.logsumexp(world.ref_logps + world.rewards / world.beta, -1)  # (X,)
        close(rewards.sum(-1).view(4, 125), world.beta * log_z.unsqueeze(-1).expand(4, 125))
        values = exact_values(world, optimum)
        close(values[:, 0], world.beta * log_z)
        for lam in (0.0, 0.95, 1.0):
            advantages, _ = ppo.gae(rewards, values[rows.rows, rows.prefixes], rows.mask, lam=lam)
            assert advantages.abs().max() < 1e-10


def exact_ppo(world: exact.World, *, lam=0.95, clip=0.2, value_clip=None, whiten=False):
    """PPO for `exact.optimise`: a critic that is a table of all prefixes; advantages are estimated once a batch, before
    its first epoch.
    """
    table = torch.zeros_like(world.ref_logits[..., 0]).requires_grad_()
    batch: dict = {}

    def loss(logps: Tensor, samples: exact.Samples) -> Tensor:
        values = table[samples.rows, samples.prefixes]  # (B, T)
        if batch.get("samples") is not samples:
            rewards = PPO.kl_rewards(
                samples.rewards.flatten(), samples.old_logps, samples.ref_logps, samples.mask, beta=world.beta
            )
            advantages, returns = PPO.gae(rewards, values, samples.mask, lam=lam)
            advantages = PPO.whiten(advantages, samples.mask) if whiten else advantages
            batch.update(samples=samples, advantages=advantages, returns=returns, values=values.detach())
        policy = PPO.ppo_loss(logps, samples.old_logps, batch["advantages"], samples.mask, clip=clip)
        return policy + PPO.value_loss(values, batch["values"], batch["returns"], samples.mask, clip=value_clip)

    return loss, (table,)


def run_exact(seed: int, *, epochs: int = 2, steps: int = 2000, **settings):
    """-> the curve, and CPU seconds."""
    world = exact.make_world(seed)
    loss, extra = exact_ppo(world, **settings)
    start = time.process_time()
    _, curve = exact.optimise(world, loss, extra=extra, epochs=epochs, steps=steps, lr=0.05, group=16, seed=seed)
    return curve, time.process_time() - start


@pytest.mark.evidence
def test_reaches_the_optimum_in_the_exact_world(evidence):
    seeds = SEEDS if evidence.full else SEEDS[:1]
    curves, seconds = zip(*(run_exact(seed) for seed in seeds), strict=True)
    ends = [curve[-1][1] for curve in curves]
    starts = [curve[0][1] for curve in curves]
    drawn = {
        "x": [step for step, _ in curves[0]],
        "y": {"PPO": [[nats for _, nats in curve] for curve in curves]},
        "xlabel": "step",
        "ylabel": "KL(π‖π*), nats",
    }
    evidence(
        "rlhf/ppo",
        "KL(π‖π*) in the exact world after 2,000 steps, mean",
        value=sum(ends) / len(ends),
        bar=0.01,
        unit="nats",
        seeds=seeds,
        spread=ends,
        note=f"at the start {sum(starts) / len(starts):.2f} nats; 64 responses a step, 2 epochs, λ 0.95, a table as V",
        curve=drawn,
    )
    evidence("rlhf/ppo", "KL(π‖π*) in the exact world, worst seed", value=max(ends), bar=0.01, unit="nats", seeds=seeds)
    evidence(
        "rlhf/ppo", "CPU time of such a run, slowest", value=max(seconds), bar=20, unit="s", seeds=seeds, spread=seconds
    )


@pytest.mark.evidence
def test_what_the_choices_change_in_the_exact_world(evidence):
    """Measured, with no bar: value clipping, whitening, and more epochs on a batch."""
    seeds = SEEDS if evidence.full else SEEDS[:1]
    steps = 2000 if evidence.full else 200
    ends = {}
    for name, settings in {
        "value clip 0.2": {"value_clip": 0.2},
        "value clip 0.02": {"value_clip": 0.02},
        "whitened advantages": {"whiten": True},
        "4 epochs": {"epochs": 4},
        "1 epoch": {"epochs": 1},
    }.items():
        ends[name] = [run_exact(seed, steps=steps, **settings)[0][-1][1] for seed in seeds]
        mean = sum(ends[name]) / len(seeds)
        assert mean < 1.0, name  # all of them learn: the start is 1.5 nats or more
        evidence(
            "rlhf/ppo", f"KL(π‖π*) after 2,000 steps: {name}", value=mean, unit="nats", seeds=seeds, spread=ends[name]
        )


def reuse_one_batch(seed: int, clip: float, steps: int) -> list[dict[str, float]]:
    """Adam on one batch of 64 responses, again and again: the ratios of its tokens and the exact KL from the policy
    that sampled.
    """
    world = exact.make_world(seed)
    samples = exact.sample(world, world.ref_logits, 16, torch.Generator().manual_seed(seed))
    rewards = PPO.kl_rewards(
        samples.rewards.flatten(), samples.old_logps, samples.ref_logps, samples.mask, beta=world.beta
    )
    values = exact_values(world, world.ref_logits)[samples.rows, samples.prefixes]
    advantages, _ = PPO.gae(rewards, values, samples.mask)
    logits = world.ref_logits.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    history = []
    for _ in range(steps):
        optimizer.zero_grad()
        PPO.ppo_loss(samples.logps(world, logits), samples.old_logps, advantages, samples.mask, clip=clip).backward()
        optimizer.step()
        ratio = (samples.logps(world, logits).detach() - samples.old_logps).exp()
        drift = exact.kl(exact.response_logps(world, logits.detach()), world.ref_logps).mean().item()
        history.append(
            {"outside": ((ratio - 1).abs() > 0.2).double().mean().item(), "largest": ratio.max().item(), "kl": drift}
        )
    return history


@pytest.mark.evidence
def test_the_clip_is_no_trust_region(evidence):
    """20 steps on one batch: ratios leave [0.8, 1.2] although every token is clipped at 0.2. The clip slows the drift,
    and that is all.
    """
    seeds = SEEDS if evidence.full else SEEDS[:1]
    clipped, free = ([reuse_one_batch(seed, clip, 20)[-1] for seed in seeds] for clip in (0.2, 1e9))
    for clipped_seed, free_seed in zip(clipped, free, strict=True):
        assert clipped_seed["outside"] > 0.05 and clipped_seed["largest"] > 1.2
        assert clipped_seed["kl"] < free_seed["kl"]
    for name, key, unit in [
        ("share of tokens outside [0.8, 1.2]", "outside", ""),
        ("largest ratio", "largest", ""),
        ("KL(π‖π_old)", "kl", "nats"),
    ]:
        for label, runs in [("clip 0.2", clipped), ("no clip", free)]:
            spread = [run[key] for run in runs]
            value = sum(spread) / len(spread)
            evidence(
                "rlhf/ppo",
                f"20 steps on one batch, {label}: {name}",
                value=value,
                unit=unit,
                seeds=seeds,
                spread=spread,
            )


def gae_bias_and_deviation(world: exact.World, values: Tensor, lam: float) -> tuple[float, float]:
    """Of the gradient estimate from one response a prompt at the reference, exactly: the norm of its bias, and the root
    of its total variance.
    """
    logits = world.ref_logits
    mean = expected_gradient(PPO, world, logits, values, lam)
    rows, weights = every_response(world, logits)
    rewards = PPO.kl_rewards(rows.rewards.flatten(), rows.old_logps, rows.ref_logps, rows.mask, beta=world.beta)
    advantages, _ = PPO.gae(rewards, values[rows.rows, rows.prefixes], rows.mask, lam=lam)
    # A token touches one line of the table, by A * (one-hot - pi), so a row's squared norm is a sum over its tokens.
    pi = logits.softmax(-1)[rows.rows, rows.prefixes]  # (B, T, V)
    hot = nn.functional.one_hot(world.tokens.repeat(len(logits), 1), world.vocab)
    second = (advantages**2 * ((hot - pi) ** 2).sum(-1)).sum(-1)  # (B,): squared norm of each response's gradient
    prompts = len(logits)
    variance = (weights * second).sum() / prompts - (
        mean**2
    ).sum()  # prompts' gradients do not overlap: 1/X^2 each, X * weights
    return (mean - true_gradient(world, logits)).norm().item(), variance.sqrt().item()


@pytest.mark.evidence
def test_lambda_trades_bias_for_variance(evidence):
    """With a critic that errs, lam=0 has the most bias and the least variance, lam=1 no bias and the most variance; all
    by enumeration.
    """
    grid = [0.0, 0.5, 0.8, 0.95, 1.0]
    found = {lam: [] for lam in grid}
    for seed in SEEDS:
        world = exact.make_world(seed, prompts=2, vocab=2, length=8)
        values = exact_values(world, world.ref_logits)
        wrong = values + 0.5 * random(seed, *values.shape)
        for lam in grid:
            found[lam].append(gae_bias_and_deviation(world, wrong, lam))
            assert gae_bias_and_deviation(world, values, lam)[0] < 1e-12
    mean = {lam: [sum(pair[i] for pair in pairs) / 5 for i in (0, 1)] for lam, pairs in found.items()}
    bias, deviation = ([mean[lam][i] for lam in grid] for i in (0, 1))
    assert bias == sorted(bias, reverse=True) and bias[-1] < 1e-12 < bias[-2]
    assert deviation[-1] == max(deviation)
    for lam in (0.0, 0.95, 1.0):
        for i, name, bar in [(0, "bias", 1e-10 if lam == 1.0 else None), (1, "standard deviation", None)]:
            check = f"Gradient from one response a prompt, critic off by 0.5, λ = {lam:g}: {name}"
            evidence(
                "rlhf/ppo", check, value=mean[lam][i], bar=bar, seeds=SEEDS, spread=[pair[i] for pair in found[lam]]
            )


# --- the language model -----------------------------------------------------------------------------------------------


@cache
def start_rollout() -> SimpleNamespace:
    """One rollout of the warm start under the demo's settings, with its reference and its critic."""
    policy, tokenizer = arithmetic.warm_start()
    settings = PPO.algorithm().settings(prompts=256, group=1)
    critic = loop.Critic(policy)
    batch = loop.rollout(
        policy,
        tokenizer,
        arithmetic.problems(held_out=False),
        arithmetic.exact_match,
        settings,
        step=0,
        reference=policy,
        critic=critic,
    )
    return SimpleNamespace(policy=policy, tokenizer=tokenizer, settings=settings, critic=critic, batch=batch)


def log_ratios(sampled: lm.Completions, model: nn.Module, temperature: float = 1.0) -> Tensor:
    """(N,) of the valid tokens, before any update."""
    with torch.no_grad():
        logps = lm.token_logps(model, sampled.ids, sampled.attention, sampled.mask.shape[1], temperature=temperature)
    return (logps - sampled.logps)[sampled.mask.bool()]


@pytest.mark.evidence
def test_ratio_is_one_at_the_first_step_and_what_breaks_it(evidence):
    """Right: the loop's own rollout. Wrong: dropout between sampling and scoring, and a temperature used only for
    sampling.
    """
    start = start_rollout()
    sampled = start.batch.completions
    right = (log_ratios(sampled, start.policy).exp() - 1).abs().max().item()
    evidence("rlhf/ppo", "Ratio before the first update: largest |ratio - 1|", value=right, bar=1e-4, seeds=[0])

    dropped, _ = arithmetic.warm_start()
    torch.manual_seed(0)
    for layer in dropped.model.layers:
        for block in (layer.self_attn.o_proj, layer.mlp):
            block.register_forward_hook(lambda module, args, out: nn.functional.dropout(out, 0.1))
    dropout = log_ratios(sampled, dropped)

    prompts = [record["prompt"] for record in arithmetic.problems(held_out=False)[:256]]
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(256, 4, generator=generator)
    cool = lm.generate(start.policy, start.tokenizer, prompts, max_new_tokens=4, temperature=0.6, uniforms=uniforms)
    assert log_ratios(cool, start.policy, temperature=0.6).abs().max() < 1e-4
    mismatch = log_ratios(cool, start.policy, temperature=1.0)
    for name, wrong in [
        ("dropout 0.1 after every attention and MLP block", dropout),
        ("sampled at temperature 0.6, scored at 1", mismatch),
    ]:
        outside = ((wrong.exp() - 1).abs() > 0.2).double().mean().item()
        assert outside > 0.02, name
        evidence(
            "rlhf/ppo",
            f"Tokens outside the clip before the first update: {name}",
            value=100 * outside,
            unit="%",
            seeds=[0],
        )


@pytest.mark.evidence
def test_a_fixed_column_loses_most_scores(evidence):
    """The wrong run on real rollouts: a score in the last column counts only for the responses that fill the batch."""
    batch = start_rollout().batch
    mask, scores = batch.completions.mask, batch.scores
    rewards = PPO.kl_rewards(scores, batch.completions.logps, batch.completions.logps, mask, beta=0.0)
    assert torch.equal((rewards * mask).sum(-1), scores)
    wrong = torch.zeros_like(rewards)
    wrong[:, -1] = scores
    lost = 1 - (wrong * mask).sum() / scores.sum()
    assert lost > 0.5
    evidence(
        "rlhf/ppo",
        "Reward lost when it is placed in column -1 of a rollout",
        value=100 * lost.item(),
        unit="%",
        seeds=[0],
    )


def test_the_eos_is_in_the_mask_and_carries_the_score():
    start = start_rollout()
    sampled = start.batch.completions
    response = sampled.ids[:, -sampled.mask.shape[1] :]
    eos = response == start.tokenizer.eos_token_id
    ended = (eos & sampled.mask.bool()).any(-1)
    assert ended.float().mean() > 0.9
    scores = torch.arange(1.0, len(response) + 1)
    rewards = PPO.kl_rewards(scores, sampled.logps, sampled.logps, sampled.mask, beta=0.1)
    assert torch.equal((rewards * eos).sum(-1)[ended], scores[ended])
    assert torch.equal(rewards.sum(-1), scores)  # cut off or not


def test_the_critic_starts_at_zero_and_sees_the_state_before_the_token():
    start = start_rollout()
    sampled = start.batch.completions
    assert (start.batch.values == 0).all()
    critic = loop.Critic(start.policy)
    nn.init.normal_(critic.head.weight)
    length = sampled.mask.shape[1]
    values = critic(sampled.ids, sampled.attention, length)
    changed = sampled.ids.clone()
    changed[:, -length + 1] = 3  # the second token of the response
    moved = (critic(changed, sampled.attention, length) - values).abs() > 1e-6
    assert not moved[:, :2].any() and moved[:, 2].any()  # V(s_t) knows the tokens before t only


def test_the_loops_advantages_are_those_of_the_paper():
    """The whole step of the loop, against the explicit loops: reward, advantage, whitening, targets."""
    start = start_rollout()
    batch, settings = start.batch, PPO.algorithm().settings(beta=0.1, lam=0.9, gamma=0.99)
    mask = batch.completions.mask
    batch = loop.Rollout(
        batch.completions, batch.scores, batch.completions.logps - 0.1, random(30, *mask.shape, dtype=torch.float32)
    )
    advantages, returns = PPO.algorithm().advantages(batch, settings)
    rewards = torch.full(mask.shape, -0.01)
    for b, t in enumerate((mask.sum(-1) - 1).tolist()):
        rewards[b, t] += batch.scores[b]
    expected, targets = loop_gae(rewards, batch.values, mask, 0.99, 0.9)
    valid = expected[mask.bool()]
    if settings.whiten:
        expected = (expected - valid.mean()) / valid.std()
    close(advantages, expected * mask, atol=1e-4)
    close(returns, targets, atol=1e-5)


@pytest.mark.evidence
def test_what_the_models_cost(evidence):
    """Parameters of the demo's models, and bytes a trained parameter: weights, gradients and Adam's two moments, after
    one step.
    """
    start = start_rollout()
    policy, _ = arithmetic.warm_start()
    critic = loop.Critic(policy)
    trainer = lm.Trainer(start.settings, {"policy": policy, "critic": critic})
    sampled = start.batch.completions
    length = sampled.mask.shape[1]
    logps = lm.token_logps(policy, sampled.ids, sampled.attention, length)
    values = critic(sampled.ids, sampled.attention, length)
    mask, zero = sampled.mask, torch.zeros_like(values)
    trainer.update(PPO.ppo_loss(logps, sampled.logps, zero + 1, mask) + PPO.value_loss(values, zero, zero + 1, mask))
    for name, module in [("actor", policy), ("critic", critic)]:
        parameters = [p for p in module.parameters() if p.requires_grad]
        count = sum(p.numel() for p in parameters)
        states = [s for p in parameters for s in trainer.optimizer.state[p].values() if torch.is_tensor(s) and s.dim()]
        size = sum(x.numel() * x.element_size() for x in [*parameters, *(p.grad for p in parameters), *states])
        assert all(p.grad is not None for p in parameters)
        evidence("rlhf/ppo", f"Parameters of the demo's {name}", value=count / 1e6, unit="million")
        check = f"Memory of the {name} a trained parameter, float32: weight, gradient, Adam"
        evidence("rlhf/ppo", check, value=size / count, bar=16, better="==", unit="bytes")
    reference = sum(p.numel() * p.element_size() for p in start.policy.parameters()) / sum(
        p.numel() for p in start.policy.parameters()
    )
    evidence(
        "rlhf/ppo", "Memory of the reference a parameter, float32", value=reference, bar=4, better="==", unit="bytes"
    )


def learn(seed: int, out: Path, **changes) -> dict:
    """One run of the demo from the warm start: greedy accuracy on all held-out sums on the way, and CPU seconds without
    evaluation.
    """
    policy, tokenizer = arithmetic.warm_start()
    settings = PPO.algorithm().settings(seed=seed, out=str(out), **changes)
    held_out, training = arithmetic.problems(held_out=True), arithmetic.problems(held_out=False)
    spent = 0.0

    def evaluate(model) -> float:
        nonlocal spent
        start = time.process_time()
        accuracy = arithmetic.greedy_accuracy(model, tokenizer, held_out)
        spent += time.process_time() - start
        return accuracy

    before, spent = evaluate(policy), 0.0
    start = time.process_time()
    ppo = PPO.algorithm()
    trainer = loop.train(policy, tokenizer, training, arithmetic.exact_match, ppo, settings, evaluate=evaluate)
    seconds = time.process_time() - start - spent
    curve = [(0, before)] + [(record["step"], record["greedy"]) for record in trainer.history if "greedy" in record]
    return {"before": before, "after": curve[-1][1], "seconds": seconds, "curve": curve}


@pytest.mark.evidence
@pytest.mark.slow
def test_learns_arithmetic(evidence, tmp_path):
    if not evidence.full:
        run = learn(0, tmp_path, steps=20, eval_every=20)
        assert run["after"] > run["before"] + 0.1, run
        return
    runs = [learn(seed, tmp_path / str(seed), eval_every=10) for seed in SEEDS]
    default, gains = PPO.algorithm().settings(), [run["after"] - run["before"] for run in runs]
    seconds = [run["seconds"] for run in runs]
    curve = {
        "x": [step for step, _ in runs[0]["curve"]],
        "y": {"PPO": [[value for _, value in run["curve"]] for run in runs]},
        "xlabel": "step",
        "ylabel": "greedy exact match, held-out sums",
    }
    evidence(
        "rlhf/ppo",
        "Arithmetic: gain in greedy exact match on held-out sums, mean",
        value=sum(gains) / len(gains),
        bar=0.15,
        better=">=",
        unit="exact match",
        seeds=SEEDS,
        spread=gains,
        note=f"from {runs[0]['before']:.3f}; {default.steps} steps of {default.prompts} sums",
        curve=curve,
    )
    evidence(
        "rlhf/ppo",
        "Arithmetic: smallest gain of a seed",
        value=min(gains),
        bar=0,
        better=">=",
        unit="exact match",
        seeds=SEEDS,
    )
    evidence(
        "rlhf/ppo",
        "Arithmetic: CPU time of a run, slowest",
        value=max(seconds),
        bar=90,
        unit="s",
        seeds=SEEDS,
        spread=seconds,
    )


# --- the command line -------------------------------------------------------------------------------------------------


def test_demo_on_a_model_and_a_file(tiny_model, tmp_path):
    """--model takes a Hugging Face folder, --data JSONL; a curve, a checkpoint and the trained model come out."""
    lines = [json.dumps({"prompt": f"{a}+1=", "answer": str(a + 1)}) for a in range(8)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines) + "\n")
    command = (
        f"-m snippets.rlhf.ppo --model {tiny_model} --data {tmp_path}/sums.jsonl --device cpu "
        f"--steps 2 --prompts 4 --eval_every 1 --out {tmp_path}/out"
    )
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "greedy reward on training prompts before" in done.stdout
    assert (tmp_path / "out/curve.png").read_bytes().startswith(b"\x89PNG")
    lm.load_model(str(tmp_path / "out/model"), torch.device("cpu"))
    state = lm.load_checkpoint(tmp_path / "out/checkpoint.pt")
    assert state["step"] == 2 and set(state["modules"]) == {"policy", "critic"}


def test_demo_refuses_bad_input_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ppo", "--device", "toaster"])
    with pytest.raises(SystemExit) as exit:
        PPO.main()
    assert exit.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "toaster" in error and len(error.splitlines()) == 1


# --- deliberate mistakes ----------------------------------------------------------------------------------------------

CHECKS = [
    test_gae_is_the_double_sum_over_td_errors,
    test_gae_lambda_one_is_return_minus_value,
    test_gae_holes_are_cut_out,
    test_score_on_the_last_valid_token_and_rows_sum_to_r_minus_beta_logratio,
    test_the_rows_mean_is_the_exact_objective,
    test_loss_is_equation_7_token_by_token,
    test_gradient_is_zero_only_where_the_step_would_go_further,
    test_at_ratio_one_the_gradient_is_the_policy_gradient,
    test_no_gradient_through_advantages_old_logps_or_targets,
    test_value_loss_against_the_formula,
    test_value_clip_has_the_unit_of_the_reward,
    test_whiten_ignores_padding,
    test_what_stands_under_a_zero_never_matters,
    test_log_ratios_of_ten_thousand_stay_finite_and_keep_their_sign,
    test_half_precision_is_computed_in_float32,
    test_expected_gradient_is_the_gradient_of_the_objective,
]
MUTATIONS = {
    "the loss with its sign flipped": ("return -surrogate.sum() / mask.sum()", "return surrogate.sum() / mask.sum()"),
    "the mean over padding too": ("return -surrogate.sum() / mask.sum()", "return -surrogate.mean()"),
    "max for min": ("surrogate = torch.minimum(", "surrogate = torch.maximum("),
    "the clamp alone, without min": (
        "torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)",
        "(ratio.clamp(1 - clip, 1 + clip) * advantages)",
    ),
    "the ratio upside down": ("_exp(logps - old_logps.detach())", "_exp(old_logps.detach() - logps)"),
    "old log-probabilities not detached": ("_exp(logps - old_logps.detach())", "_exp(logps - old_logps)"),
    "advantages not detached": ("    advantages = advantages.detach()\n", ""),
    "no cap on exp": (
        "return torch.exp(x.clamp(max=EXP_CAP)) * (1 + (x - EXP_CAP).clamp(min=0))",
        "return torch.exp(x)",
    ),
    "a cap that kills the gradient": ("* (1 + (x - EXP_CAP).clamp(min=0))", ""),
    "the mask as a factor": ("torch.where(mask.bool(), x, 0.0) for x in tensors", "x * mask for x in tensors"),
    "half precision kept": ("x if x.dtype == torch.float64 else x.float() for x in tensors", "x for x in tensors"),
    "KL with its sign flipped": ("-beta * (logps - ref_logps)", "-beta * (ref_logps - logps)"),
    "the score in the last column": ("at_last = valid & (position == last)", "at_last = position == mask.shape[1] - 1"),
    "the score one token early": ("valid & (position == last)", "valid & (position == last - 1)"),
    "the score on every token": ("at_last = valid & (position == last)", "at_last = valid"),
    "the next value shifted by one": ("gamma * next_value - values[:, t]", "gamma * next_value - next_value"),
    "no stepping over holes": ("torch.where(valid[:, t], values[:, t], next_value)", "values[:, t]"),
    "lambda forgotten": (
        "advantage = delta + gamma * lam * next_advantage",
        "advantage = delta + gamma * next_advantage",
    ),
    "targets without the value": ("torch.where(valid, advantages + values, 0.0)", "advantages"),
    "the smaller of the value errors": ("error = torch.maximum(", "error = torch.minimum("),
    "the value clip relative": (
        "clamp(-clip, clip)",
        "clamp(-clip * old_values.abs().max(), clip * old_values.abs().max())",
    ),
    "the critic's loss without its half": ("return 0.5 * error.sum()", "return error.sum()"),
    "whitening with the padding's zeros": ("count = mask.sum()", "count = mask.numel()"),
}


def test_mutations():
    assert caught_by(PPO, CHECKS) == []
    for name, (old, new) in MUTATIONS.items():
        assert caught_by(load_mutant("snippets/rlhf/ppo.py", old, new), CHECKS), f"no check noticed: {name}"
