"""Pitfalls between sampling and the loss: the wrong one fails, the right one holds."""

import pytest
import torch
from torch.testing import assert_close

from snippets.interview import pitfalls_rollouts as pitfalls
from snippets.rlhf import ppo
from snippets.worlds import arithmetic, lm
from tests.interview.pairs import check_module, check_pair

CASES = [
    ("measure_warm_start", "temperature: log-ratio before any update", (">=", 0.02), ("<=", 1e-5)),
    ("measure_warm_start", "dropout: log-ratio before any update", (">=", 0.5), ("<=", 1e-5)),
    ("measure_warm_start", "share of the EOS tokens that are trained", ("<=", 0), (">=", 1)),
    ("measure_warm_start", "share of the scores that reach the loss", ("<=", 0.5), (">=", 1)),
    ("measure_stopping", "share of the answers that end", ("<=", 0), (">=", 1)),
    ("measure_tensors", "change of the advantages by a tool's output", (">=", 0.1), ("<=", 1e-6)),
    ("measure_tensors", "change of the advantages by three pads", (">=", 0.5), ("<=", 1e-6)),
    ("measure_tensors", "loss at twice the width, over the loss", ("<=", 0.501), (">=", 0.999)),
]

REPEATED = {case[1] for case in CASES if case[0] != "measure_tensors"}  # what has chance in it


@pytest.mark.evidence
@pytest.mark.parametrize("case", CASES, ids=[case[1] for case in CASES])
def test_the_wrong_one_fails_and_the_right_one_holds(evidence, case):
    check_pair(evidence, pitfalls, case, chance=case[1] in REPEATED)


def test_every_pair_is_measured_printed_and_named(capsys):
    check_module(pitfalls, CASES, capsys)


def test_the_mask_is_that_of_the_sampler():
    model, tokenizer = arithmetic.warm_start()
    batch = lm.generate(model, tokenizer, ["1+2=", "60+70=", "5+9="], max_new_tokens=4, temperature=0.0)
    response, eos = batch.ids[:, -batch.mask.shape[1] :], tokenizer.eos_token_id
    assert_close(pitfalls.response_mask(response, eos, tokenizer.pad_token_id), batch.mask.float())
    padded = response.masked_fill(batch.mask == 0, eos)
    assert_close(pitfalls.response_mask(padded, eos, eos), batch.mask.float())
    unended = torch.tensor([[5, 6, 7]])  # cut off at the limit: all of it counts
    assert_close(pitfalls.response_mask(unended, eos, eos), torch.ones(1, 3))


def test_with_a_pad_of_its_own_both_masks_agree():
    response = torch.tensor([[5, 1, 0, 0], [5, 6, 7, 1], [1, 0, 0, 0]])
    assert_close(pitfalls.response_mask_wrong(response, 1, 0), pitfalls.response_mask(response, 1, 0))


def test_the_right_ones_are_what_the_snippets_compute():
    generator = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, 6, 5, generator=generator)
    mask = (torch.arange(5) < torch.tensor([[5], [1], [3], [4], [2], [5]])).float()
    scores = torch.randn(6, generator=generator)
    assert_close(pitfalls.gae_right(rewards, values, mask), ppo.gae(rewards, values, mask)[0])
    assert_close(pitfalls.place(scores, mask), ppo.kl_rewards(scores, values, values, mask, beta=0.0))
    loss = ppo.ppo_loss(values, values, -rewards, mask)  # at ratio 1: the mean of the rewards
    assert_close(pitfalls.batch_mean(rewards, mask), loss)
    logits = torch.randn(2, 3, 7, generator=generator)
    tokens = torch.tensor([[0, 3, 6], [1, 1, 2]])
    weights = (logits / 0.6).softmax(-1)
    by_hand = torch.stack([torch.stack([weights[b, t, tokens[b, t]] for t in range(3)]) for b in range(2)]).log()
    assert_close(pitfalls.rescore(logits, tokens, 0.6), by_hand)


def test_a_nan_under_a_pad_does_not_reach_the_mean():
    per_token = torch.tensor([[1.0, float("nan")]], requires_grad=True)
    mask = torch.tensor([[1.0, 0.0]])
    assert pitfalls.batch_mean_wrong(per_token, mask).isnan()
    loss = pitfalls.batch_mean(per_token, mask)
    loss.backward()
    assert loss == 1 and per_token.grad.tolist() == [[1.0, 0.0]]


def test_tool_output_is_stepped_over():
    """As PPO's own GAE does; and a score that stands behind the last own token is not lost."""
    generator = torch.Generator().manual_seed(2)
    rewards, values = torch.randn(2, 3, 7, generator=generator)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 0], [1, 0, 1, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1, 1]]).float()
    own = torch.where(mask.bool(), rewards, 0.0)
    assert_close(pitfalls.gae_tools(own, values, mask), ppo.gae(own, values, mask)[0])
    late = torch.tensor([[0.0, 0, 0, 0, 0, 0, 5], [0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]])
    on_time = torch.tensor([[0.0, 0, 0, 0, 0, 5, 0], [0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]])
    assert_close(pitfalls.gae_tools(late, values, mask), ppo.gae(on_time, values, mask)[0])
    assert_close(pitfalls.gae_tools_wrong(late, values, mask), pitfalls.gae_right(0 * late, values, mask))  # lost
