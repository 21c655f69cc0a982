"""Pitfalls of DPO and reward models: the wrong one fails, the right one holds."""

import ast
import functools
import statistics
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from snippets.interview import pitfalls_preferences as pitfalls
from snippets.preferences.dpo import dpo_loss
from snippets.worlds import arithmetic, lm

SNIPPET = "interview/pitfalls_preferences"
UNBARRED = set()
CASES = [
    ("measure_exact", "share of pairs in the true order", ("<=", 0.98), (">=", 1)),
    ("measure_warm_start", "share of rows whose last token is missed", (">=", 0.1), ("<=", 0)),
    ("measure_warm_start", "mean log-probability of greedy tokens", ("<=", -5), (">=", -1)),
    ("measure_tensors", "mean log-probability in a wide batch, over its value alone", ("<=", 0.126), (">=", 0.999)),
    ("measure_tensors", "share of finite gradients, margins -200 to 200", ("<=", 0.75), (">=", 1)),
]

REPEATED = {"share of pairs in the true order"}  # what has chance in it
SEEDS = [0, 1, 2, 3, 4]
measured = functools.cache(lambda function, seed: getattr(pitfalls, function)(seed))


@pytest.mark.evidence
@pytest.mark.parametrize(("function", "what", "wrong_bar", "right_bar"), CASES, ids=[case[1] for case in CASES])
def test_the_wrong_one_fails_and_the_right_one_holds(evidence, function, what, wrong_bar, right_bar):
    seeds = SEEDS if evidence.full and what in REPEATED else SEEDS[:1]
    wrong, right = (
        list(values) for values in zip(*(measured(function, seed)[what][:2] for seed in seeds), strict=True)
    )
    unit = measured(function, 0)[what][2]
    for label, values, (better, bar) in (("wrong", wrong, wrong_bar), ("right", right, right_bar)):
        evidence(
            SNIPPET,
            f"{what}: {label}",
            value=statistics.mean(values) + 0.0,  # no -0
            bar=bar,
            better=better,
            unit=unit,
            seeds=seeds,
            spread=values if len(values) > 1 else None,
        )
    worse = max if statistics.mean(wrong) > statistics.mean(right) else min  # and not one seed the other way round
    assert all(worse(w, r) == w and w != r for w, r in zip(wrong, right, strict=True))


def test_every_measurement_is_tested():
    found = {(name, what) for name in dir(pitfalls) if name.startswith("measure_") for what in measured(name, 0)}
    assert found - UNBARRED == {(function, what) for function, what, *_ in CASES}


def test_what_is_wrong_says_so():
    source = Path(pitfalls.__file__).read_text(encoding="utf-8")
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    wrong = [node for node in functions if node.name.endswith("_wrong")]
    assert wrong
    for node in wrong:
        assert ast.get_docstring(node).startswith("WRONG"), node.name
        after = functions[functions.index(node) + 1]
        assert not ast.get_docstring(after).startswith("WRONG"), f"{node.name} has no right one behind it"


def test_the_table_is_printed(capsys):
    pitfalls.main()
    printed = capsys.readouterr().out
    for function in (name for name in dir(pitfalls) if name.startswith("measure_")):
        for what in measured(function, 0):
            assert what in printed


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
