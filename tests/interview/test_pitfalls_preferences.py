"""Pitfalls of DPO and reward models: the wrong one fails, the right one holds."""

import pytest
import torch
from torch.testing import assert_close

from snippets.interview import pitfalls_preferences as pitfalls
from snippets.preferences.dpo import dpo_loss
from snippets.worlds import arithmetic, lm
from tests.interview.pairs import check_module, check_pair

CASES = [
    ("measure_exact", "share of pairs in the true order", ("<=", 0.98), (">=", 1)),
    ("measure_warm_start", "share of rows whose last token is missed", (">=", 0.1), ("<=", 0)),
    ("measure_warm_start", "mean log-probability of greedy tokens", ("<=", -5), (">=", -1)),
    ("measure_tensors", "mean log-probability in a wide batch, over its value alone", ("<=", 0.126), (">=", 0.999)),
    ("measure_tensors", "gradient at twice IPO's target", ("<=", -0.01), (">=", 9.99)),
    ("measure_tensors", "share of finite gradients, margins -200 to 200", ("<=", 0.75), (">=", 1)),
]

REPEATED = {"share of pairs in the true order"}  # what has chance in it


@pytest.mark.evidence
@pytest.mark.parametrize("case", CASES, ids=[case[1] for case in CASES])
def test_the_wrong_one_fails_and_the_right_one_holds(evidence, case):
    check_pair(evidence, pitfalls, case, chance=case[1] in REPEATED)


def test_every_pair_is_measured_printed_and_named(capsys):
    check_module(pitfalls, CASES, capsys)


def test_the_loss_is_that_of_the_snippet():
    margins = torch.linspace(-300, 300, 61)
    zeros = torch.zeros_like(margins)
    assert_close(pitfalls.dpo(margins), dpo_loss(margins, zeros, zeros, zeros, beta=1.0)[0])
    moderate = torch.linspace(-10, 10, 41, dtype=torch.float64)
    assert_close(pitfalls.dpo_wrong(moderate), pitfalls.dpo(moderate))  # it is the numerics alone
    assert pitfalls.dpo_wrong(torch.tensor(-120.0)).isinf() and pitfalls.dpo(torch.tensor(-120.0)) == 120


def test_the_last_token_on_either_side():
    left, right = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    assert pitfalls.last_token(left).tolist() == [3, 3] and pitfalls.last_token(right).tolist() == [1, 3]
    assert pitfalls.last_token_wrong(right).tolist() == [1, 3]  # why right padding hides it
    assert pitfalls.last_token_wrong(left).tolist() == [1, 3]


def test_the_shift_is_that_of_the_plumbing():
    model, tokenizer = arithmetic.warm_start()
    ids, attention = lm.encode_prompts(tokenizer, ["12+34=", "56+78="], torch.device("cpu"))
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=attention).logits
        assert_close(pitfalls.shifted_logps(logits, ids)[:, -3:], lm.token_logps(model, ids, attention, 3))


def test_the_mean_of_a_row_does_not_know_its_batch():
    token_logps, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2)
    wide, wide_mask = torch.tensor([[-1.0, -2.0, 9.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    assert pitfalls.mean_logps(wide, wide_mask) == pitfalls.mean_logps(token_logps, mask) == -1.5
    assert pitfalls.mean_logps_wrong(wide, wide_mask) == -1.0
    assert pitfalls.response_logps(wide, wide_mask) == pitfalls.response_logps(token_logps, mask) == -3


def test_a_loss_by_name_is_that_one_or_an_error():
    h = torch.linspace(-20, 20, 41)
    assert_close(pitfalls.named_loss(h, "ipo", 0.1), (h - 5) ** 2)
    assert_close(pitfalls.named_loss(h, "sigmoid", 0.1), pitfalls.dpo(0.1 * h))
    for name in ("IPO", "hinge", ""):
        with pytest.raises(ValueError, match="loss_type must be one of sigmoid, ipo, got"):
            pitfalls.named_loss(h, name, 0.1)
        assert_close(pitfalls.named_loss_wrong(h, name, 0.1), pitfalls.dpo(0.1 * h))
