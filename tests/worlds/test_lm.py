"""The plumbing under every demo, against Hugging Face's own generate and forward, and against bad input."""

import json
import math
import sys

import pytest
import torch

from snippets.worlds import arithmetic, lm

PROMPTS = ["7+8=", "37+48=", "0+99=", "5+5=", "90+9="]


@pytest.fixture(scope="module")
def warm():
    model, tokenizer = arithmetic.warm_start()
    return model.double(), tokenizer  # float64: what differs is a mistake, not rounding


def uniforms(rows, length=6, seed=0):
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_greedy_agrees_with_hugging_face(warm):
    model, tokenizer = warm
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    theirs = model.generate(**batch, max_new_tokens=6, do_sample=False)
    ours = lm.generate(model, tokenizer, PROMPTS, max_new_tokens=6, temperature=0.0)
    assert torch.equal(ours.ids, theirs)
    assert ours.texts == tokenizer.batch_decode(theirs[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_eos_is_in_the_mask_and_nothing_after_it(warm):
    model, tokenizer = warm
    out = lm.generate(model, tokenizer, PROMPTS * 40, max_new_tokens=6, uniforms=uniforms(200))
    width = out.mask.shape[1]
    for ids, mask, text in zip(out.ids[:, -width:], out.mask, out.texts, strict=True):
        length = int(mask.sum())
        assert mask.tolist() == [1] * length + [0] * (width - length)
        assert tokenizer.eos_token_id not in ids[: length - 1]
        assert (ids[length:] == tokenizer.pad_token_id).all()
        if length < width:
            assert ids[length - 1] == tokenizer.eos_token_id
        assert len(text) == length - int(ids[length - 1] == tokenizer.eos_token_id)


def test_a_row_depends_on_its_own_prompt_and_numbers_alone(warm):
    """Batch split, order and more padding change neither samples nor log-probabilities."""
    model, tokenizer = warm
    numbers = uniforms(5)
    together = lm.generate(model, tokenizer, PROMPTS, max_new_tokens=6, uniforms=numbers)
    for i, prompt in enumerate(PROMPTS):
        alone = lm.generate(model, tokenizer, [prompt], max_new_tokens=6, uniforms=numbers[i : i + 1])
        length = int(alone.mask.sum())
        assert together.texts[i] == alone.texts[0]
        assert int(together.mask[i].sum()) == length
        assert torch.allclose(together.logps[i, :length], alone.logps[0, :length], atol=1e-6)


def test_a_prompt_is_read_once_however_many_responses_it_gets(warm):
    model, tokenizer = warm
    numbers = uniforms(15)
    once = lm.generate(model, tokenizer, PROMPTS, samples=3, max_new_tokens=6, uniforms=numbers)
    each = lm.generate(model, tokenizer, [p for p in PROMPTS for _ in range(3)], max_new_tokens=6, uniforms=numbers)
    assert once.texts == each.texts
    assert torch.equal(once.ids, each.ids)
    assert torch.equal(once.attention, each.attention)
    assert torch.allclose(once.logps, each.logps, atol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_follow_the_model_at_the_temperature_that_scores_them(warm, temperature):
    model, tokenizer = warm
    n = 3000
    out = lm.generate(
        model, tokenizer, ["37+48="] * n, max_new_tokens=1, temperature=temperature, uniforms=uniforms(n, 1)
    )
    ids = tokenizer("37+48=", return_tensors="pt")["input_ids"]
    log_probs = (model(input_ids=ids).logits[0, -1] / temperature).log_softmax(-1)
    counts = torch.bincount(out.ids[:, -1], minlength=len(log_probs)).double()
    expected = n * log_probs.exp()
    common = expected > 5
    statistic = ((counts - expected) ** 2 / expected)[common].sum()
    degrees = int(common.sum())
    assert degrees >= 2
    assert statistic < degrees + 5 * math.sqrt(2 * degrees)
    assert torch.allclose(out.logps[:, 0].double(), log_probs[out.ids[:, -1]], atol=1e-5)


def test_a_token_of_probability_zero_is_never_drawn():
    """Also with the extreme uniforms 0 and almost 1, which hit the ends of the cumulative sum."""

    class Fixed(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids, **kwargs):
            logits = torch.tensor([-torch.inf, -torch.inf, 0.0, 1.0, -torch.inf]).expand(len(input_ids), 1, 5)
            return type("Out", (), {"logits": logits, "past_key_values": None})

    tokenizer = arithmetic.make_tokenizer()
    ends = torch.tensor([[0.0], [1 - 2**-24], [0.5]])
    out = lm.generate(Fixed(), tokenizer, ["1"] * 3, max_new_tokens=1, uniforms=ends)
    assert set(out.ids[:, -1].tolist()) <= {2, 3}


@pytest.mark.parametrize("chunk", [None, 1, 3, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_against_a_plain_forward(warm, chunk, temperature):
    model, tokenizer = warm
    out = lm.generate(model, tokenizer, PROMPTS, max_new_tokens=6, temperature=temperature, uniforms=uniforms(5))
    length = out.mask.shape[1]
    ours = lm.token_logps(model, out.ids, out.attention, length, temperature=temperature, chunk=chunk)
    for i in range(len(PROMPTS)):  # each row alone, its padding cut off
        keep = out.attention[i].bool()
        ids = out.ids[i, keep].unsqueeze(0)
        log_probs = (model(input_ids=ids).logits / temperature).log_softmax(-1)
        plain = log_probs[0, :-1].gather(-1, ids[0, 1:, None]).squeeze(-1)
        n = int(out.mask[i].sum())
        assert torch.allclose(ours[i, :n], plain[-n:].to(ours.dtype), atol=1e-5)
        assert torch.allclose(ours[i, :n], out.logps[i, :n].to(ours.dtype), atol=1e-5)  # sampling and scoring agree


def test_chunks_have_the_gradient_of_the_whole(warm):
    model, tokenizer = warm
    out = lm.generate(model, tokenizer, PROMPTS, max_new_tokens=4, uniforms=uniforms(5, 4))
    gradients = []
    for chunk in (None, 3):
        model.zero_grad()
        lm.token_logps(model, out.ids, out.attention, 4, chunk=chunk).sin().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[0].abs().max() > 0
    assert torch.allclose(*gradients, atol=1e-4 * gradients[0].abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_huge_logits_stay_finite(dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True)
    logps = lm.head_logps(torch.nn.Identity(), logits, torch.tensor([1, 0]))
    logps.sum().backward()
    assert torch.isfinite(logps).all()
    assert torch.isfinite(logits.grad).all()
    assert (logps < -1e4).all()


def test_bad_sampling_settings(warm):
    model, tokenizer = warm
    with pytest.raises(ValueError, match="temperature must be finite and at least 0, got -1"):
        lm.generate(model, tokenizer, PROMPTS, max_new_tokens=4, temperature=-1)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        lm.generate(model, tokenizer, PROMPTS, max_new_tokens=0)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        lm.generate(model, tokenizer, PROMPTS, samples=0, max_new_tokens=4)
    with pytest.raises(ValueError, match=r"uniforms \(2, 4\) against \(5, 4\)"):
        lm.generate(model, tokenizer, PROMPTS, max_new_tokens=4, uniforms=torch.rand(2, 4))
    with pytest.raises(ValueError, match="'' has no token"):
        lm.generate(model, tokenizer, [""], max_new_tokens=4)
    with pytest.raises(ValueError, match="'abc' cannot be encoded"):
        lm.generate(model, tokenizer, ["abc"], max_new_tokens=4)


def test_a_model_directory_comes_back_as_it_went(warm, tmp_path):
    model, tokenizer = arithmetic.warm_start()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, tokenizer_again = lm.load_model(str(tmp_path), torch.device("cpu"))
    assert not again.training
    first = lm.generate(model, tokenizer, PROMPTS, max_new_tokens=4, temperature=0.0)
    second = lm.generate(again, tokenizer_again, PROMPTS, max_new_tokens=4, temperature=0.0)
    assert first.texts == second.texts
    assert torch.equal(first.logps, second.logps)


@pytest.mark.parametrize("path", ["/no/such/model", "./no-such-model", "a/b/c"])
def test_a_model_that_is_not_there(path):
    with pytest.raises(ValueError, match="no model at"):
        lm.load_model(path, torch.device("cpu"))


def test_a_directory_that_is_no_model(tmp_path):
    with pytest.raises(ValueError, match="no model at"):
        lm.load_model(str(tmp_path), torch.device("cpu"))


def test_unknown_devices():
    with pytest.raises(ValueError, match="device 'abacus' cannot be used"):
        lm.pick_device("abacus")
    assert lm.pick_device("cpu") == torch.device("cpu")


GOOD = json.dumps({"prompt": "1+1=", "answer": "2"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the data set is empty"),
        ("\n\n", "the data set is empty"),
        (f"{GOOD}\nnot json", r":2: not JSON"),
        (f"{GOOD}\n\n[1]", r":3: want an object, got list"),
        (f'{GOOD}\n{{"prompt": "1+1="}}', r":2: no column 'answer'"),
        (f'{GOOD}\n{{"prompt": "1+1=", "answer": 2}}', r":2: 'answer' must be str, got int"),
        (f'{GOOD}\n{{"prompt": null, "answer": "2"}}', r":2: 'prompt' must be str, got NoneType"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path, text, message):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        lm.read_jsonl(path, {"prompt": str, "answer": str})


def test_good_jsonl_keeps_every_column(tmp_path):
    path = tmp_path / "data.jsonl"
    record = {"prompt": "1+1=", "answer": "2", "source": "é", "n": 3}
    path.write_text(json.dumps(record) + "\n\n" + json.dumps(record))
    assert lm.read_jsonl(path, {"prompt": str}) == [record, record]
    with pytest.raises(ValueError, match="no such file"):
        lm.read_jsonl(tmp_path / "none", {})


def test_every_epoch_uses_every_record_once():
    seen = [i for step in range(15) for i in lm.batch_indices(10, 4, step, seed=1)]
    for epoch in range(6):
        assert sorted(seen[epoch * 10 : (epoch + 1) * 10]) == list(range(10))
    assert seen[:10] != seen[10:20]
    assert lm.batch_indices(10, 4, 7, seed=1) == seen[28:32]  # a function of its arguments alone
    assert lm.batch_indices(10, 4, 0, seed=1) != lm.batch_indices(10, 4, 0, seed=2)


def test_a_write_that_fails_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    lm.save_checkpoint(path, {"step": 1})

    def torn(state, file):
        file.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="disk full"):
        lm.save_checkpoint(path, {"step": 2})
    monkeypatch.undo()
    assert lm.load_checkpoint(path) == {"step": 1}


def test_bad_checkpoints(tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint at"):
        lm.load_checkpoint(tmp_path / "checkpoint.pt")
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="cannot be read"):
        lm.load_checkpoint(tmp_path / "checkpoint.pt")


def test_the_command_line_reports_bad_input_in_one_line(monkeypatch, capsys):
    def main(settings):
        raise ValueError(f"steps\nis {settings.steps}")

    monkeypatch.setattr(sys, "argv", ["demo", "--steps", "7"])
    with pytest.raises(SystemExit) as stop:
        lm.run(main, lm.Settings)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: steps is 7\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"lr": 0.0}, "--lr must be positive and finite, got 0"),
        ({"lr": math.nan}, "--lr must be positive and finite, got nan"),
        ({"model": "x"}, "--model needs --data"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        lm.check_settings(lm.Settings(**change))
