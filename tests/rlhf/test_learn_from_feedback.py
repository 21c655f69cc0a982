"""Feedback in passing: users, extraction and records by counts, unpaired KTO against explicit loops, TRL's reading of
the records, the gain measured with noise, and broken copies that must be caught."""

import copy
import dataclasses
import functools
import math
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from snippets.rlhf import learn_from_feedback as original
from snippets.worlds import arithmetic, lm
from tests.mutation import caught_by, load_mutant

PATH = "snippets/rlhf/learn_from_feedback.py"
NAME = "rlhf/learn_from_feedback"
PRAISE, NAMED, CORRECTED = "praise", "error named", "error named and corrected"
REPHRASED, ASKED = "repeated or rephrased", "clarification asked"


def turn(i, feedback):
    return {"prompt": f"{i}+1=", "completion": str(i), "right": False, "said": None, "feedback": feedback}


TURNS = [turn(i, f) for i, f in enumerate([PRAISE, None, NAMED, CORRECTED, REPHRASED, ASKED, PRAISE, NAMED, NAMED])]


# Each check takes the module, so that broken copies can be put to it.


def check_users_react_as_often_as_the_table_says(feedback):
    rng = random.Random(0)
    for right in (True, False):
        seen = Counter(feedback.react(right, rng) for _ in range(20000))
        chances = feedback.REACTIONS[right]
        for category in (*feedback.CATEGORIES, None):
            p = chances.get(category, 0.0) if category else 1 - sum(chances.values())
            assert abs(seen[category] / 20000 - p) <= 4.5 * (p * (1 - p) / 20000) ** 0.5
    for chances in feedback.REACTIONS.values():
        assert set(chances) <= set(feedback.CATEGORIES) and sum(chances.values()) < 1


def check_extraction_errs_as_often_as_it_is_told(feedback):
    rng = random.Random(0)
    found = [feedback.extract(PRAISE, rng, recall=0.6) for _ in range(20000)]
    assert set(found) == {PRAISE, None}
    assert found.count(PRAISE) / 20000 == pytest.approx(0.6, abs=0.016)
    alarms = Counter(feedback.extract(None, rng, false_alarm=0.2) for _ in range(40000))
    assert 1 - alarms[None] / 40000 == pytest.approx(0.2, abs=0.01)
    weights = feedback.REACTIONS[False]
    for category, weight in weights.items():  # false alarms look like complaints
        assert alarms[category] / (40000 - alarms[None]) == pytest.approx(weight / sum(weights.values()), abs=0.025)
    assert all(feedback.extract(c, rng) == c for c in (*feedback.CATEGORIES, None) for _ in range(50))


def check_precision_and_recall_by_hand(feedback):
    said = [PRAISE, NAMED, None, None, ASKED, None]
    found = [PRAISE, None, NAMED, None, NAMED, None]  # the fifth is found, as another kind
    assert feedback.precision_and_recall(said, found) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert feedback.precision_and_recall(said, [*found[:5], PRAISE]) == (pytest.approx(2 / 4), pytest.approx(2 / 3))
    assert feedback.precision_and_recall([*said[:5], NAMED], found) == (pytest.approx(2 / 3), pytest.approx(2 / 4))


def check_praise_is_for_sft(feedback):
    assert feedback.praised(TURNS) == [{"prompt": "0+1=", "completion": "0"}, {"prompt": "6+1=", "completion": "6"}]


def check_labels_are_praise_and_errors_named(feedback):
    """Who repeats the question or asks back has not called the answer wrong."""
    records = feedback.labelled(TURNS)
    assert [(r["prompt"], r["label"]) for r in records] == [
        ("0+1=", True),
        ("6+1=", True),
        ("2+1=", False),
        ("3+1=", False),
        ("7+1=", False),
        ("8+1=", False),
    ]
    assert all(set(r) == {"prompt", "completion", "label"} for r in records)


def check_balance_draws_as_many_of_each(feedback):
    drawn = [feedback.labelled(TURNS, random.Random(seed)) for seed in range(60)]
    for records in drawn:
        assert Counter(r["label"] for r in records) == {True: 2, False: 2}
        assert len({r["prompt"] for r in records}) == 4
    counts = Counter(r["prompt"] for records in drawn for r in records if not r["label"])
    assert set(counts) == {"2+1=", "3+1=", "7+1=", "8+1="} and min(counts.values()) > 10
    only_praise = [t for t in TURNS if t["feedback"] in (None, PRAISE)]
    assert feedback.labelled(only_praise, random.Random(0)) == []
    assert len(feedback.labelled(only_praise)) == 2
    flipped = [t | {"feedback": {PRAISE: NAMED, NAMED: PRAISE}.get(t["feedback"], t["feedback"])} for t in TURNS]
    assert Counter(r["label"] for r in feedback.labelled(flipped, random.Random(0))) == {True: 3, False: 3}
    more = [t for t in flipped if t["feedback"] != CORRECTED]  # three of praise, two errors named
    drawn = {r["prompt"] for seed in range(30) for r in feedback.labelled(more, random.Random(seed)) if r["label"]}
    assert drawn == {"2+1=", "7+1=", "8+1="}


@functools.cache
def tiny():
    tokenizer = arithmetic.make_tokenizer()
    return arithmetic.make_model(len(tokenizer), hidden=32, layers=1, seed=0), tokenizer


SUMS = arithmetic.problems(held_out=False)[:300]
RECORDS = [
    {"prompt": "37+48=", "completion": "85", "label": True},
    {"prompt": "7+8=", "completion": "5", "label": False},
    {"prompt": "9+9=", "completion": "18", "label": True},
    {"prompt": "99+9=", "completion": "98", "label": False},
    {"prompt": "1+1=", "completion": "2", "label": True},
]


def settings(steps, tmp="/nowhere", **changes):
    from snippets.preferences import kto

    return kto.algorithm().settings(steps=steps, batch=5, beta=0.5, lr=1e-2, save_every=10**6, out=tmp, **changes)


def response_logps(model, tokenizer, prompt, completion):
    ids = tokenizer(prompt)["input_ids"] + tokenizer(completion)["input_ids"] + [tokenizer.eos_token_id]
    start = len(tokenizer(prompt)["input_ids"])
    logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logps[t - 1, ids[t]] for t in range(start, len(ids)))


def loss_in_loops(model, reference, tokenizer, records, beta):
    """KTO's loss, written out; the completion of the record before stands after each prompt for the KL."""
    ratio = lambda p, c: response_logps(model, tokenizer, p, c) - response_logps(reference, tokenizer, p, c)  # noqa: E731
    drift = sum(ratio(r["prompt"], records[i - 1]["completion"]).item() for i, r in enumerate(records)) / len(records)
    point = max(drift, 0.0)
    total = 0.0
    for r in records:
        z = beta * (ratio(r["prompt"], r["completion"]) - point)
        total = total + torch.sigmoid(-z if r["label"] else z)
    return total / len(records), point


def check_kto_on_single_answers(feedback):
    """Two steps of the loop: the losses and the reference points are those of explicit loops."""
    import tempfile

    reference, tokenizer = tiny()
    policy = copy.deepcopy(reference)
    with tempfile.TemporaryDirectory() as out:
        trainer = feedback.train_kto(policy, tokenizer, RECORDS, settings(1, out))
        assert trainer.history[0]["loss"] == pytest.approx(0.5, abs=1e-6)  # the policy is the reference
        assert trainer.history[0]["reference_point"] == pytest.approx(0.0, abs=1e-5)
        expected, point = loss_in_loops(policy, reference, tokenizer, RECORDS, 0.5)
        again = copy.deepcopy(reference)
        trainer = feedback.train_kto(again, tokenizer, RECORDS, settings(2, out))
        assert trainer.history[1]["loss"] == pytest.approx(expected.item(), abs=1e-5)
        assert trainer.history[1]["reference_point"] == pytest.approx(point, abs=1e-5)
        trainer = feedback.train_kto(again, tokenizer, RECORDS, settings(30, out, seed=1))
        assert trainer.history[-1]["loss"] < 0.35
    base = {r["prompt"]: response_logps(reference, tokenizer, r["prompt"], r["completion"]).item() for r in RECORDS}
    for r in RECORDS:
        now = response_logps(again, tokenizer, r["prompt"], r["completion"]).item()
        assert (now > base[r["prompt"]]) == r["label"]


def check_each_batch_has_its_own_rows(feedback):
    """Two of five records a step: the second step's loss and reference point are those of its rows, in loops."""
    import tempfile

    reference, tokenizer = tiny()
    with tempfile.TemporaryDirectory() as out:
        policies = [copy.deepcopy(reference) for _ in range(2)]
        options = dataclasses.replace(settings(1, out), batch=2)
        feedback.train_kto(policies[0], tokenizer, RECORDS, options)
        trainer = feedback.train_kto(policies[1], tokenizer, RECORDS, dataclasses.replace(options, steps=2))
    ratio = lambda p, c: (  # noqa: E731
        response_logps(policies[0], tokenizer, p, c) - response_logps(reference, tokenizer, p, c)
    ).item()
    rows = [int(i) for i in lm.batch_indices(5, 2, 1, options.seed)]
    drift = sum(ratio(RECORDS[i]["prompt"], RECORDS[i - 1]["completion"]) for i in rows) / 2
    own = [(0.5 * (ratio(RECORDS[i]["prompt"], RECORDS[i]["completion"]) - max(drift, 0.0)), i) for i in rows]
    losses = [1 / (1 + math.exp(z if RECORDS[i]["label"] else -z)) for z, i in own]
    assert trainer.history[1]["loss"] == pytest.approx(sum(losses) / 2, abs=1e-5)
    assert trainer.history[1]["reference_point"] == pytest.approx(max(drift, 0.0), abs=1e-5)


def check_the_reference_of_many_records_is_in_order(feedback):
    """More records than the reference takes at a time: at the first step all ratios are 1, so the loss is 0.5."""
    import tempfile

    model, tokenizer = tiny()
    records = [{"prompt": r["prompt"], "completion": r["answer"], "label": i % 2 == 0} for i, r in enumerate(SUMS)]
    with tempfile.TemporaryDirectory() as out:
        options = dataclasses.replace(settings(1, out), batch=len(records))
        trainer = feedback.train_kto(copy.deepcopy(model), tokenizer, records, options)
    assert trainer.history[0]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert trainer.history[0]["reference_point"] == pytest.approx(0.0, abs=1e-5)


def check_empty_answers_are_no_turns(feedback):
    model, tokenizer = tiny()
    texts = ["", "12", "85", ""]
    with mock.patch.object(lm, "generate", lambda *args, **options: SimpleNamespace(texts=texts)):
        log = feedback.converse(model, tokenizer, [{"prompt": f"{i}+84=", "answer": "85"} for i in range(4)], 0)
    assert [(turn["prompt"], turn["completion"], turn["right"]) for turn in log] == [
        ("1+84=", "12", False),
        ("2+84=", "85", True),
    ]


def check_bad_input_is_named(feedback):
    rng = random.Random(0)
    with pytest.raises(ValueError, match=r"want probabilities, got recall 1.5"):
        feedback.extract(None, rng, recall=1.5)
    with pytest.raises(ValueError, match=r"false_alarm -0.1"):
        feedback.extract(None, rng, false_alarm=-0.1)
    with pytest.raises(ValueError, match="unknown feedback 'thanks'"):
        feedback.extract("thanks", rng)
    for said, found in (([None, None], [PRAISE, None]), ([PRAISE, None], [None, None])):
        with pytest.raises(ValueError, match="no shares of these"):
            feedback.precision_and_recall(said, found)
    model, tokenizer = tiny()
    with pytest.raises(ValueError, match="at least 2 records, got 1"):
        feedback.train_kto(model, tokenizer, RECORDS[:1], settings(1))
    with pytest.raises(ValueError, match="without a token"):
        feedback.train_kto(model, tokenizer, [*RECORDS, RECORDS[0] | {"completion": ""}], settings(1))


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_functions(check):
    check(original)


MISTAKES = {
    "users praise what is wrong": ("chances = REACTIONS[right]", "chances = REACTIONS[not right]"),
    "no user is silent": ("[*chances.values(), rest]", "[*chances.values(), 0.0]"),
    "recall as its complement": ("rng.random() < recall", "rng.random() >= recall"),
    "no false alarms": ("rng.random() >= false_alarm", "True"),
    "false alarms praise": ("rng.choices(list(REACTIONS[False])", "rng.choices([PRAISE] * 5"),
    "precision and recall swapped": ("both / marked, both / real", "both / real, both / marked"),
    "only equal kinds count as found": ("s is not None and f is not None", "s is not None and f == s"),
    "complaints are praised": ('turn["feedback"] == PRAISE', 'turn["feedback"] != PRAISE'),
    "who rephrases complains": ("CORRECTED: False}", "CORRECTED: False, REPHRASED: False}"),
    "corrections left out": ("NAMED: False, CORRECTED: False}", "NAMED: False}"),
    "labels flipped": (
        "{PRAISE: True, NAMED: False, CORRECTED: False}",
        "{PRAISE: False, NAMED: True, CORRECTED: True}",
    ),
    "the first ones instead of a draw": ("rng.sample(good, size), rng.sample(bad, size)", "good[:size], bad[:size]"),
    "balance to the larger": ("size = min(", "size = max("),
    "own completions for the reference point": ('{"completion": b["completion"]}', '{"completion": r["completion"]}'),
    "the moving policy as reference": ("now[yes], now[no], ref[rows][yes]", "now[yes], now[no], now.detach()[yes]"),
    "labels crossed": ("yes, no = good[rows], ~good[rows]", "yes, no = ~good[rows], good[rows]"),
    "no reference point": ("*four, point, beta", "*four, 0.0, beta"),
    "beta of the default": ("point, beta=settings.beta", "point"),
    "praise not drawn": ("rng.sample(good, size), rng", "good[:size], rng"),
    "drift of other rows": ("mismatched[i] for i in rows", "mismatched[i] for i in range(len(rows))"),
    "reference pass with a gap": ("some[i : i + 256]", "some[i : i + 255]"),
    "empty answers kept": ('return [turn for turn in turns if turn["completion"]]', "return turns"),
    "pads counted": ("torch.where(mask.bool(), values, 0.0).sum(-1)", "values.mean(-1)"),
}


def test_no_check_fails_on_the_original():
    assert caught_by(original, CHECKS) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    """Each deliberate mistake makes at least one check fail."""
    assert caught_by(load_mutant(PATH, *MISTAKES[mistake]), CHECKS)


def test_the_records_train_in_trl(tmp_path):
    """Praise goes into TRL's SFTTrainer and the labelled answers into its KTOTrainer, unchanged."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

    model, tokenizer = tiny()
    model = copy.deepcopy(model)
    common = {
        "output_dir": str(tmp_path),
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "disable_tqdm": True,
    }
    praise, both = Dataset.from_list(original.praised(TURNS)), Dataset.from_list(original.labelled(TURNS))
    SFTTrainer(model, SFTConfig(**common), train_dataset=praise, processing_class=tokenizer).train()
    reference = copy.deepcopy(model)
    options = {"train_dataset": both, "processing_class": tokenizer, "ref_model": reference}
    trainer = KTOTrainer(model, args=KTOConfig(**common), **options)
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


# What it gains


EXTRACTIONS = {"perfect": (1.0, 0.0), "as in the paper": (0.58, 0.22)}


def test_the_log_is_the_models(tmp_path):
    """Answers at temperature 1, right where they are, the same for the same seed."""
    policy, tokenizer = arithmetic.warm_start()
    sums = arithmetic.problems(held_out=False)[:600]
    log = original.converse(policy, tokenizer, sums, 0)
    assert len(log) > 590 and log == original.converse(policy, tokenizer, sums, 0)
    assert log != original.converse(policy, tokenizer, sums, 1)
    answer = {r["prompt"]: r["answer"] for r in sums}
    for entry in log:
        assert entry["right"] == (entry["completion"] == answer[entry["prompt"]])
    greedy = lm.generate(policy, tokenizer, [r["prompt"] for r in sums], max_new_tokens=4, temperature=0.0).texts
    assert 0.3 < sum(entry["right"] for entry in log) / len(log) < 0.7
    assert [entry["completion"] for entry in log[:600]] != greedy


def test_the_page_shows_the_chances_of_the_simulation():
    page = (Path(__file__).parents[2] / "docs/rlhf/learn-from-feedback.md").read_text(encoding="utf-8")
    kinds = (PRAISE, NAMED, CORRECTED, REPHRASED, ASKED)
    for name, chances in (("right", original.REACTIONS[True]), ("wrong", original.REACTIONS[False])):
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {name} |")]
        shown = [float(cell) for cell in row.strip("|").split("|")[1:]]
        assert shown == pytest.approx([*(chances.get(kind, 0.0) for kind in kinds), 1 - sum(chances.values())])


def test_balance_decides_which_answers_kto_raises():
    """With the paper's extraction right answers are criticised four times as often as praised, on record. KTO, which
    weighs the two, lowers them, unless praise has the weight that balances the data."""
    recall, false_alarm = EXTRACTIONS["as in the paper"]
    wrong = original.REACTIONS[False]
    seen = {}  # right or wrong: chances on record of praise and of an error named
    for right, said in original.REACTIONS.items():
        alarm = false_alarm * (1 - sum(said.values())) / sum(wrong.values())
        kinds = ((PRAISE,), (NAMED, CORRECTED))
        seen[right] = [sum(recall * said.get(k, 0.0) + alarm * wrong[k] for k in kind) for kind in kinds]
    assert [round(x, 3) for x in seen[True] + seen[False]] == [0.035, 0.141, 0.01, 0.243]
    share = 0.51  # of the warm start's samples that are right
    praise, complaints = (share * a + (1 - share) * b for a, b in zip(seen[True], seen[False], strict=True))
    weight = complaints / praise
    assert weight == pytest.approx(8.3, abs=0.3)
    assert seen[True][0] < seen[True][1] and weight * seen[True][0] > seen[True][1]
    assert weight * seen[False][0] < seen[False][1]


@pytest.mark.evidence
def test_gain_from_feedback(evidence, tmp_path):
    if not evidence.full:  # half a CPU minute a seed; here only that a small trial trains four policies
        made = original.trial(0, str(tmp_path), recall=1.0, false_alarm=0.0, size=2000, epochs=1)
        assert len(made) == 6 and 1900 < len(made["turns"]) <= 2000
        weights = [next(made[name].parameters()) for name in list(made)[1:]]
        assert all(not torch.equal(weights[0], other) for other in weights[1:])
        return
    seeds, held_out = list(range(5)), arithmetic.problems(held_out=True)
    _, tokenizer = arithmetic.warm_start()
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    results = {}
    for extraction, (recall, false_alarm) in EXTRACTIONS.items():
        rows, facts = [], []
        for seed in seeds:
            made = original.trial(seed, str(tmp_path / f"{extraction}{seed}"), recall=recall, false_alarm=false_alarm)
            turns = made.pop("turns")
            rows.append(
                {name: arithmetic.greedy_accuracy(policy, tokenizer, held_out) for name, policy in made.items()}
            )
            marked = (
                [t for t in turns if t["feedback"] == PRAISE],
                [t for t in turns if t["feedback"] in (NAMED, CORRECTED)],
            )
            shares = original.precision_and_recall([t["said"] for t in turns], [t["feedback"] for t in turns])
            facts.append(
                {
                    "precision": shares[0],
                    "recall": shares[1],
                    "praised answers that are right": mean([t["right"] for t in marked[0]]),
                    "answers called wrong that are wrong": mean([not t["right"] for t in marked[1]]),
                    "complaints to a praise": len(marked[1]) / len(marked[0]),
                }
            )
        results[extraction] = rows
        for name in facts[0]:
            spread = [fact[name] for fact in facts]
            title = f"Extraction {extraction}: {name}"
            evidence(NAME, title, value=mean(spread), seeds=seeds, spread=spread)
        for name in rows[0]:
            if (name, extraction) == ("warm start", "as in the paper"):
                continue
            spread = [row[name] for row in rows]
            bar = {"SFT on praise": 0.55, "KTO, as many complaints as praise": 0.55}.get(name)
            title = "Held-out accuracy, warm start" if name == "warm start" else f"Extraction {extraction}: {name}"
            evidence(NAME, title, value=mean(spread), bar=bar, better=">=", seeds=seeds, spread=spread)
    for rows in results.values():
        for row in rows:
            assert row["SFT on praise"] > row["SFT on any turns"]
            assert row["KTO, as many complaints as praise"] > row["KTO, all complaints"]


def test_the_demo_prints_each_policy(monkeypatch, capsys):
    policy, _ = arithmetic.warm_start()
    turns = [{"said": "praise", "feedback": "praise"}]
    monkeypatch.setattr(original, "trial", lambda seed, out, **rates: {"warm start": policy, "turns": turns})
    monkeypatch.setattr(original, "precision_and_recall", lambda said, feedback: (0.5, 0.25))
    original.main()
    printed = capsys.readouterr().out
    assert "precision 0.50, recall 0.25" in printed and "warm start" in printed and "0.452" in printed
