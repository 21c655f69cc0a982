"""The arithmetic world: its tokenizer loses nothing, its split leaks nothing, its warm start is the measured one."""

import shutil

import pytest
import torch

from snippets.worlds import arithmetic, lm


@pytest.fixture(scope="module")
def warm():
    return arithmetic.warm_start()


def test_the_tokenizer_loses_nothing():
    tokenizer = arithmetic.make_tokenizer()
    for text in ("37+48=", "0+0=", "198", "99+99=198"):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.pad_token_id == 0
    assert tokenizer.eos_token_id == 1
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_split_is_whole_and_disjoint():
    train, held_out = arithmetic.problems(held_out=False), arithmetic.problems(held_out=True)
    prompts = {record["prompt"] for record in train}
    assert not prompts & {record["prompt"] for record in held_out}
    assert len(train) + len(held_out) == 10_000
    assert 1800 < len(held_out) < 2200
    for record in train + held_out:
        a, b = record["prompt"].rstrip("=").split("+")
        assert int(a) + int(b) == int(record["answer"])


def test_the_reward_is_exact_match():
    answers = ["85", "85", "85", "85", "5"]
    assert arithmetic.exact_match(["85", "085", "8", "", "85"], answer=answers) == [1.0, 0.0, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError):
        arithmetic.exact_match(["85"], answer=["85", "86"])


@pytest.mark.evidence
def test_the_warm_start_leaves_room_to_learn(warm, evidence):
    model, tokenizer = warm
    parameters = sum(p.numel() for p in model.parameters())
    accuracy = arithmetic.greedy_accuracy(model, tokenizer, arithmetic.problems(held_out=True))
    assert 0.3 < accuracy < 0.5
    careless = [
        record | {"answer": arithmetic.without_carry(record["prompt"])} for record in arithmetic.problems(held_out=True)
    ]
    evidence(
        "worlds/arithmetic",
        "Warm start: greedy answers that are the sum without carries",
        value=arithmetic.greedy_accuracy(model, tokenizer, careless),
        bar=0.6,
        better=">=",
        unit="share",
    )
    evidence("worlds/arithmetic", "Warm start: greedy held-out exact match", value=accuracy, unit="exact match")
    evidence("worlds/arithmetic", "Parameters of the model", value=parameters, bar=1.2e6, unit="parameters")
    evidence(
        "worlds/arithmetic",
        "Size of the shipped checkpoint",
        value=arithmetic.WARM_START.stat().st_size / 1e6,
        bar=5,
        better="<=",
        unit="MB",
    )


def test_another_warm_start_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no warm start at"):
        arithmetic.warm_start(tmp_path / "none.safetensors")
    changed = tmp_path / "changed.safetensors"
    shutil.copy(arithmetic.WARM_START, changed)
    data = bytearray(changed.read_bytes())
    data[-1] ^= 1
    changed.write_bytes(data)
    with pytest.raises(ValueError, match="has the hash"):
        arithmetic.warm_start(changed)


def test_greedy_accuracy_counts_by_hand(warm):
    model, tokenizer = warm
    records = arithmetic.problems(held_out=True)[:12]
    right = 0
    for record in records:  # one by one, without padding or a cache
        ids = tokenizer(record["prompt"], return_tensors="pt")["input_ids"]
        for _ in range(arithmetic.MAX_NEW_TOKENS):
            token = model(input_ids=ids).logits[0, -1].argmax()
            if token == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, token.view(1, 1)], dim=1)
        right += tokenizer.decode(ids[0]) == record["prompt"] + record["answer"]
    assert arithmetic.greedy_accuracy(model, tokenizer, records, batch=5) == right / 12


def test_supervised_labels_are_the_answer_and_its_eos():
    tokenizer = arithmetic.make_tokenizer()
    ids, attention, labels = arithmetic.supervised_batch(
        tokenizer, [{"prompt": "1+2=", "answer": "3"}, {"prompt": "60+60=", "answer": "120"}]
    )
    for row, expected in zip(range(2), ("3", "120"), strict=True):
        kept = labels[row][labels[row] != -100]
        assert kept.tolist() == tokenizer(expected)["input_ids"] + [tokenizer.eos_token_id]
        assert torch.equal(ids[row][labels[row] != -100], kept)
        assert (ids[row][attention[row] == 0] == tokenizer.pad_token_id).all()
    assert lm.positions(attention)[0].tolist()[2:6] == [0, 1, 2, 3]


def test_training_makes_a_warm_start(tmp_path):
    out = tmp_path / "w.safetensors"
    arithmetic.main(arithmetic.Settings(steps=3, batch=8, out=str(out)))
    assert out.stat().st_size < 5e6
