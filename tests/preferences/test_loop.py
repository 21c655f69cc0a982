"""The preference loop: what a pair becomes, whose log-probabilities are taken, and how a broken run goes on."""

import ast
import importlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from snippets.preferences import dpo
from snippets.preferences import loop as original
from snippets.preferences.dpo import dpo_loss
from snippets.worlds import arithmetic, lm
from tests.mutation import caught_by, load_mutant

ROOT = Path(__file__).parents[2]
PATH = "snippets/preferences/loop.py"
CPU = torch.device("cpu")
DPO = dpo.algorithm()
PAIRS = [
    {"prompt": "37+48=", "chosen": "85", "rejected": "175"},
    {"prompt": "7+8=", "chosen": "15", "rejected": "1"},
    {"prompt": "99+9=", "chosen": "108", "rejected": ""},
    {"prompt": "0+0=", "chosen": "0", "rejected": "0"},
]


def tiny(seed=0):
    tokenizer = arithmetic.make_tokenizer()
    return arithmetic.make_model(len(tokenizer), hidden=32, layers=2, seed=seed).double(), tokenizer


def plainly(policy, tokenizer, pair, role):
    """log pi(response | prompt) by the definition: one unpadded sequence, its tokens one after the other."""
    prompt = tokenizer(pair["prompt"])["input_ids"]
    response = tokenizer(pair[role])["input_ids"] + [tokenizer.eos_token_id]
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor([prompt + response])).logits[0]
    total = 0.0
    for t, token in enumerate(response):
        total += logits[len(prompt) + t - 1].log_softmax(-1)[token].item()
    return total


# Each check takes the module, so that broken copies can be put to it.


def check_a_log_probability_is_the_sum_over_the_response_and_its_eos(loop):
    policy, tokenizer = tiny()
    with torch.no_grad():
        chosen, rejected = loop.response_logps(policy, loop.encode_pairs(tokenizer, PAIRS, CPU))
    for i, pair in enumerate(PAIRS):
        assert chosen[i].item() == pytest.approx(plainly(policy, tokenizer, pair, "chosen"), abs=1e-4)
        assert rejected[i].item() == pytest.approx(plainly(policy, tokenizer, pair, "rejected"), abs=1e-4)


def check_padding_and_company_change_nothing(loop):
    policy, tokenizer = tiny()
    with torch.no_grad():
        together = loop.response_logps(policy, loop.encode_pairs(tokenizer, PAIRS, CPU))
        alone = [loop.response_logps(policy, loop.encode_pairs(tokenizer, [pair], CPU)) for pair in PAIRS]
        wide = loop.encode_pairs(
            tokenizer, [*PAIRS, {"prompt": "1+1+1+1+1=", "chosen": "5", "rejected": "1234567"}], CPU
        )
        padded = loop.response_logps(policy, wide)
    for k in range(2):
        assert_close(together[k], torch.cat([pair[k] for pair in alone]), rtol=0, atol=1e-4)
        assert_close(together[k], padded[k][: len(PAIRS)], rtol=0, atol=1e-4)


def check_what_stands_under_the_mask_never_matters(loop):
    """Not even NaN: neither in the value nor in the gradient."""
    batch = loop.encode_pairs(arithmetic.make_tokenizer(), PAIRS, CPU)
    logps = torch.randn(batch.mask.shape, requires_grad=True)
    poisoned = torch.where(batch.mask.bool(), logps, math.nan)
    given, wanted = loop.lm.token_logps, torch.where(batch.mask.bool(), logps, 0.0).sum(-1)
    loop.lm.token_logps = lambda *_, **__: poisoned
    try:
        out = torch.cat(loop.response_logps(None, batch))
    finally:
        loop.lm.token_logps = given
    assert_close(out, wanted)
    (gradient,) = torch.autograd.grad(out.sum(), logps)
    assert_close(gradient, batch.mask.float())


def check_both_responses_have_the_same_prompt_and_end(loop):
    tokenizer = arithmetic.make_tokenizer()
    batch = loop.encode_pairs(tokenizer, PAIRS, CPU)
    boundary = batch.ids.shape[1] - batch.mask.shape[1]
    assert torch.equal(batch.ids[:4, :boundary], batch.ids[4:, :boundary])
    for row in range(8):
        pair, role = PAIRS[row % 4], "chosen" if row < 4 else "rejected"
        ids = batch.ids[row, boundary:][batch.mask[row].bool()]
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1]) == pair[role]
        assert tokenizer.decode(batch.ids[row][batch.attention[row].bool()][: -len(ids)]) == pair["prompt"]
    assert torch.equal(batch.attention[:, boundary:], batch.mask)


def check_the_reference_is_taken_once_for_all_pairs_in_their_order(loop):
    policy, tokenizer = tiny()
    for batch in (1, 3, 100):
        chosen, rejected = loop.reference_logps(policy, tokenizer, PAIRS, batch=batch)
        assert not chosen.requires_grad
        for i, pair in enumerate(PAIRS):
            assert chosen[i].item() == pytest.approx(plainly(policy, tokenizer, pair, "chosen"), abs=1e-4)
            assert rejected[i].item() == pytest.approx(plainly(policy, tokenizer, pair, "rejected"), abs=1e-4)


def check_sampled_pairs_are_the_verifiers(loop):
    """Chosen: right; rejected: wrong; both sampled for that prompt; none where all are alike."""
    policy, tokenizer = arithmetic.warm_start()
    records = arithmetic.problems(held_out=False)[:70]
    answers = {record["prompt"]: record["answer"] for record in records}
    scored = []

    def reward(completions, answer, **columns):
        scored.append((columns["prompts"], completions))
        return arithmetic.exact_match(completions, answer)

    pairs = loop.sample_pairs(policy, tokenizer, records, reward, original.Settings(samples=4))
    assert 20 < len(pairs) < 70
    sampled = {(p, c) for prompts, completions in scored for p, c in zip(prompts, completions, strict=True)}
    for pair in pairs:
        assert pair["chosen"] == answers[pair["prompt"]] != pair["rejected"]
        assert (pair["prompt"], pair["rejected"]) in sampled and (pair["prompt"], pair["chosen"]) in sampled
    mixed = {p for p, c in sampled if c == answers[p]} & {p for p, c in sampled if c != answers[p]}
    assert {pair["prompt"] for pair in pairs} == mixed


def check_lengths_count_the_eos(loop):
    policy, tokenizer = tiny()
    tokens = loop.tokenize_pairs(tokenizer, PAIRS)
    scored = loop.score_pairs(policy, tokens, tokenizer.pad_token_id, DPO)
    assert scored.chosen_lengths.tolist() == [3, 3, 4, 2]
    assert scored.rejected_lengths.tolist() == [4, 2, 1, 2]


def check_the_kl_over_the_vocabulary_is_that_of_the_definition(loop):
    """Each prefix of each response, one unpadded sequence at a time; its gradient is the policy's alone."""
    policy, tokenizer = tiny()
    reference, _ = tiny(seed=1)
    batch = loop.encode_pairs(tokenizer, PAIRS, CPU)
    for chunk in (None, 3):
        logps, kls = loop.response_logps_and_kl(policy, reference, batch, chunk=chunk)
        for ours, plain in zip(logps, loop.response_logps(policy, batch), strict=True):
            assert_close(ours, plain, rtol=0, atol=1e-5)
        for role, kl in zip(("chosen", "rejected"), kls, strict=True):
            for i, pair in enumerate(PAIRS):
                prompt = tokenizer(pair["prompt"])["input_ids"]
                response = tokenizer(pair[role])["input_ids"] + [tokenizer.eos_token_id]
                ids = torch.tensor([prompt + response])
                p, q = (m(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (reference, policy))
                assert kl[i].item() == pytest.approx((p.exp() * (p - q)).sum().item(), abs=1e-4)
        kls[0].sum().backward()
    assert all(p.grad is None for p in reference.parameters())
    assert any(p.grad is not None for p in policy.parameters())


def check_mismatched_responses_are_those_of_the_pair_before(loop):
    policy, tokenizer = tiny()
    reference, _ = tiny(seed=1)
    tokens = loop.tokenize_pairs(tokenizer, PAIRS)
    asks = original.Algorithm(original.Settings, lambda *_: None, mismatched=True)
    scored = loop.score_pairs(policy, tokens, tokenizer.pad_token_id, asks, reference=reference)
    assert not scored.mismatched.requires_grad
    for k, role in enumerate(("chosen", "rejected")):
        for i, pair in enumerate(PAIRS):
            other = pair | {role: PAIRS[i - 1][role]}
            for model, values in ((policy, scored.mismatched), (reference, scored.ref_mismatched)):
                assert values[4 * k + i].item() == pytest.approx(plainly(model, tokenizer, other, role), abs=1e-4)
    with pytest.raises(ValueError, match="need at least 2 pairs, got 1"):
        loop.mismatch(tokens[:1])


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_loop(check):
    check(original)


SUM = "logps, 0.0).sum(-1)"
ENDS = "(prompt, good + eos, bad + eos)"
MASK = "mask.append([1] * len(response) + [0] * after)"
VALID = "valid.append([0] * before + [1] * len(prompt) + mask[-1])"
HALVES = " = sums.chunk(2)\n    return chosen, rejected"
MISTAKES = {
    "dropped mask": (f"torch.where(batch.mask.bool(), {SUM}", "logps.sum(-1)"),
    "mask by multiplication": ("torch.where(batch.mask.bool(), logps, 0.0)", "(logps * batch.mask)"),
    "mean over the padding": (SUM, "logps, 0.0).mean(-1)"),
    "mean over the tokens": (SUM, SUM + " / batch.mask.sum(-1)"),
    "shifted by one": (
        "policy, batch.ids, batch.attention, batch.mask",
        "policy, batch.ids.roll(1, 1), batch.attention, batch.mask",
    ),
    "chosen and rejected swapped": ("chosen, rejected" + HALVES, "rejected, chosen" + HALVES),
    "no EOS": (ENDS, "(prompt, good, bad)"),
    "EOS masked": (MASK, "mask.append([1] * (len(response) - 1) + [0] * (after + 1))"),
    "pads counted": (MASK, "mask.append([1] * right)"),
    "prompt padded on the right": ("[pad] * before + prompt + response", "prompt + [pad] * before + response"),
    "pads attended to": (VALID, "valid.append([1] * (left + right))"),
    "reference only for the first batch": ("range(0, len(pairs), batch)", "range(0, batch, batch)"),
    "best and worst swapped": ("worst, best = group[0], group[-1]", "best, worst = group[0], group[-1]"),
    "ties become pairs": ("if scores[best] > scores[worst]:", "if True:"),
    "the other KL": ("ref_logps.exp() * (ref_logps - logps)", "logps.exp() * (logps - ref_logps)"),
    "KL of the pads": (
        "torch.where(batch.mask.bool(), both.view(2, *batch.mask.shape), 0.0)",
        "both.view(2, *batch.mask.shape)",
    ),
    "a pair is its own mismatch": ("[*tokens[-1:], *tokens[:-1]]", "[*tokens]"),
    "lengths without the EOS": ("*batch.mask.sum(-1).chunk(2)", "*(batch.mask.sum(-1) - 1).chunk(2)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    assert caught_by(load_mutant(PATH, *MISTAKES[mistake]), CHECKS)


# Training


def settings(tmp_path, **changes):
    return DPO.settings(**({"out": str(tmp_path), "steps": 4, "batch": 3, "lr": 1e-3, "save_every": 100} | changes))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_step_is_the_loss_of_its_pairs(tmp_path):
    """The first step, by hand: these pairs, their reference's log-probabilities, the mean loss, AdamW's first step."""
    policy, tokenizer = tiny()
    by_hand, _ = tiny()
    chosen = settings(tmp_path, steps=1)
    reference, _ = tiny(seed=1)
    ref = original.reference_logps(reference, tokenizer, PAIRS, batch=2)
    trainer = original.train(policy, tokenizer, PAIRS, DPO, chosen, ref_logps=ref)
    rows = lm.batch_indices(4, 3, 0, 0)
    batch = original.encode_pairs(tokenizer, [PAIRS[i] for i in rows], CPU)
    losses, *_ = dpo_loss(*original.response_logps(by_hand, batch), ref[0][rows], ref[1][rows], beta=chosen.beta)
    assert trainer.history[0]["loss"] == pytest.approx(losses.mean().item(), abs=1e-6)
    losses.mean().backward()
    torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
    torch.optim.AdamW(by_hand.parameters(), lr=1e-3 / 10, weight_decay=0.0).step()  # the warm-up's first tenth
    assert_close(weights(policy), weights(by_hand), rtol=0, atol=1e-9)


def test_the_reference_is_the_policy_before_training(tmp_path):
    policy, tokenizer = tiny()
    trainer = original.train(policy, tokenizer, PAIRS, DPO, settings(tmp_path))
    assert trainer.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert trainer.history[0]["margin"] == pytest.approx(0.0, abs=1e-6)
    assert trainer.history[-1]["margin"] > 0


def test_the_loss_is_an_argument(tmp_path):
    """Another method is another function: here a hinge without a reference, which gets what it asks for and no more."""
    seen = []

    def hinge(pairs, settings):
        seen.append(pairs)
        margins = settings.beta * (pairs.chosen - pairs.rejected)
        return (1 - margins).relu(), margins.detach(), -margins.detach()

    policy, tokenizer = tiny()
    method = original.Algorithm(original.Settings, hinge, reference=False)
    original.train(policy, tokenizer, PAIRS, method, original.Settings(out=str(tmp_path), steps=4, batch=3, beta=0.3))
    assert len(seen) == 4 and all(pairs.chosen.shape == (3,) for pairs in seen)
    for name in ("ref_chosen", "ref_rejected", "chosen_kl", "rejected_kl", "mismatched", "ref_mismatched"):
        assert all(getattr(pairs, name) is None for pairs in seen)


METHODS = sorted(
    path.stem for path in (ROOT / "snippets/preferences").glob("*.py") if "def algorithm()" in path.read_text()
)


@pytest.mark.parametrize("method", METHODS)
def test_swapping_the_method_changes_one_argument(method, tmp_path):
    """The same call, word for word, trains with each method of the family."""
    algorithm = importlib.import_module(f"snippets.preferences.{method}").algorithm()
    policy, tokenizer = tiny()
    before = weights(policy)
    chosen = algorithm.settings(out=str(tmp_path), steps=4, batch=3, lr=1e-3)
    trainer = original.train(policy, tokenizer, PAIRS, algorithm, chosen)
    assert len(trainer.history) == 4 and all(math.isfinite(record["loss"]) for record in trainer.history)
    assert not torch.equal(weights(policy), before)


def test_the_loop_knows_no_method():
    """Nothing in it asks which method it runs: it imports none."""
    tree = ast.parse((ROOT / PATH).read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "dpo" in METHODS
    assert not {module for module in modules if module.startswith("snippets.preferences")}


def test_fresh_pairs_are_asked_for_every_refresh_steps(tmp_path):
    """From the policy as it is then; the reference stays what the policy was at first."""
    policy, tokenizer = tiny()
    start, asked = weights(policy), []

    def pairs(policy, step):
        asked.append((step, torch.equal(weights(policy), start)))
        return PAIRS

    trainer = original.train(policy, tokenizer, pairs, DPO, settings(tmp_path, refresh=2))
    assert asked == [(0, True), (2, False)]
    assert trainer.history[0]["margin"] == pytest.approx(0, abs=1e-6) and trainer.history[2]["margin"] > 0
    with pytest.raises(ValueError, match="fresh pairs need --refresh of at least 1, got 0"):
        original.train(policy, tokenizer, pairs, DPO, settings(tmp_path))
    original.train(policy, tokenizer, pairs, DPO, settings(tmp_path, refresh=3, steps=4))
    with pytest.raises(ValueError, match="cannot resume at step 4: the pairs of step 3 are gone"):
        original.train(policy, tokenizer, pairs, DPO, settings(tmp_path, refresh=3, steps=6, resume=True))


def test_fewer_logits_at_a_time_change_nothing(tmp_path):
    ends = []
    for chunk in (None, 5):
        policy, tokenizer = tiny()
        original.train(policy, tokenizer, PAIRS, DPO, settings(tmp_path, logit_chunk=chunk))
        ends.append(weights(policy))
    assert_close(*ends, rtol=0, atol=1e-9)


def test_the_seed_decides_everything(tmp_path):
    ends = []
    for seed in (1, 1, 2):
        policy, tokenizer = arithmetic.warm_start()
        chosen = settings(tmp_path, seed=seed, samples=4)
        records = arithmetic.problems(held_out=False)[:16]
        pairs = original.sample_pairs(policy, tokenizer, records, arithmetic.exact_match, chosen)
        original.train(policy, tokenizer, pairs, DPO, chosen)
        ends.append(weights(policy))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_large_logits_in_bf16_give_finite_losses():
    """Logits of 1e4 in bf16, through the head that all log-probabilities come from."""
    head = torch.nn.Linear(4, 6, bias=False, dtype=torch.bfloat16)
    torch.nn.init.normal_(head.weight, std=1e4)
    hidden = torch.randn(8, 4, dtype=torch.bfloat16, requires_grad=True)
    logps = lm.head_logps(head, hidden, torch.arange(8) % 6)
    losses, *_ = dpo_loss(*logps.view(4, 2))
    losses.sum().backward()
    assert losses.isfinite().all() and hidden.grad.isfinite().all() and head.weight.grad.isfinite().all()


def test_equal_responses_teach_nothing(tmp_path):
    policy, tokenizer = tiny()
    start = weights(policy)
    original.train(policy, tokenizer, [PAIRS[3]], DPO, settings(tmp_path))
    assert_close(weights(policy), start, rtol=0, atol=1e-9)


# A broken run


DIES = """
import os, signal
from snippets.preferences import dpo
from snippets.worlds import lm

finish_step = lm.Trainer.finish_step

def finish_and_die(trainer, record):
    finish_step(trainer, record)
    if trainer.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)

lm.Trainer.finish_step = finish_and_die
dpo.main()
"""


def test_a_killed_run_resumes_as_if_unbroken(tmp_path):
    """Killed at step 5, with a checkpoint of step 4: the pairs are sampled again, the reference is the start's."""
    flags = "--steps 8 --batch 4 --save_every 2 --eval_every 4 --eval_size 8 --sampled_prompts 64 --samples 4".split()

    def run(*command):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)

    whole = run("-m", "snippets.preferences.dpo", *flags, "--out", str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    broken = run("-c", DIES, *flags, "--out", str(tmp_path / "broken"))
    assert broken.returncode == -signal.SIGKILL, broken.stderr
    assert lm.load_checkpoint(tmp_path / "broken" / "checkpoint.pt")["step"] == 4
    resumed = run("-m", "snippets.preferences.dpo", *flags, "--out", str(tmp_path / "broken"), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    one, two = (lm.load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "broken"))
    assert one["step"] == 8 and one["history"] == two["history"]
    for name, value in one["modules"]["policy"].items():
        assert torch.equal(value, two["modules"]["policy"][name]), name


def test_a_run_is_resumed_only_with_its_own_settings(tmp_path):
    policy, tokenizer = tiny()
    original.train(policy, tokenizer, PAIRS, DPO, settings(tmp_path))
    with pytest.raises(ValueError, match="cannot resume: --beta was 1.0 and is 0.1 now"):
        original.train(policy, tokenizer, PAIRS, DPO, settings(tmp_path, resume=True, beta=0.1))


# Bad input


def test_bad_pairs_are_named(tmp_path):
    policy, tokenizer = tiny()
    with pytest.raises(ValueError, match="there are no pairs"):
        original.train(policy, tokenizer, [], DPO, settings(tmp_path))
    with pytest.raises(ValueError, match="the prompt '' has no token"):
        original.encode_pairs(tokenizer, [PAIRS[0] | {"prompt": ""}], CPU)
    with pytest.raises(ValueError, match="'four' cannot be encoded"):
        original.encode_pairs(tokenizer, [PAIRS[0] | {"chosen": "four"}], CPU)


def test_no_difference_no_pairs():
    policy, tokenizer = arithmetic.warm_start()
    records = arithmetic.problems(held_out=False)[:4]
    with pytest.raises(ValueError, match="no pairs: none of 4 prompts has responses of different rewards among 2"):
        always = lambda completions, **_: [1.0] * len(completions)  # noqa: E731
        original.sample_pairs(policy, tokenizer, records, always, original.Settings(samples=2))


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_model):
    """The tiny model, and a good and several bad data files."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "model").symlink_to(tiny_model)
    good = json.dumps(PAIRS[0])
    (folder / "good.jsonl").write_text("\n".join([good] * 8))
    (folder / "missing.jsonl").write_text(f'{good}\n{{"prompt": "1+1=", "chosen": "2"}}\n')
    (folder / "type.jsonl").write_text(f'{good}\n{good}\n{{"prompt": "1+1=", "chosen": "2", "rejected": 3}}\n')
    (folder / "broken.jsonl").write_text(f"{good}\n{good[:-3]}\n")
    (folder / "list.jsonl").write_text("[1, 2]\n")
    (folder / "empty.jsonl").write_text("\n")
    return folder


MODEL = "--model {0}/model --data "
BAD = {
    "no model": ("--model {0}/none --data {0}/good.jsonl", "no model at"),
    "not a model": ("--model {0} --data {0}/good.jsonl", "no model at"),
    "no data": (MODEL + "{0}/none.jsonl", "no such file"),
    "no evaluation data": (MODEL + "{0}/good.jsonl --eval_data {0}/none.jsonl", "no such file"),
    "missing column": (MODEL + "{0}/missing.jsonl", "missing.jsonl:2: no column 'rejected'"),
    "wrong type": (MODEL + "{0}/type.jsonl", "type.jsonl:3: 'rejected' must be str, got int"),
    "not JSON": (MODEL + "{0}/broken.jsonl", "broken.jsonl:2: not JSON"),
    "not an object": (MODEL + "{0}/list.jsonl", "list.jsonl:1: want an object, got list"),
    "empty": (MODEL + "{0}/empty.jsonl", "the data set is empty"),
    "device": ("--device abacus", "device 'abacus' cannot be used"),
    "model without data": ("--model {0}/model", "--model needs --data"),
    "nothing to resume": (MODEL + "{0}/good.jsonl --resume --out {0}/fresh", "there is no checkpoint at"),
    "steps": ("--steps 0", "--steps must be at least 1, got 0"),
    "batch": ("--batch 0", "--batch must be at least 1, got 0"),
    "lr": ("--lr nan", "--lr must be positive and finite, got nan"),
    "beta": (MODEL + "{0}/good.jsonl --beta 0 --steps 1", "beta must be positive and finite, got 0.0"),
    "label smoothing": (MODEL + "{0}/good.jsonl --label_smoothing 0.5 --steps 1", "must lie in [0, 0.5), got 0.5"),
    "one sample": ("--samples 1 --sampled_prompts 4", "no pairs: none of 4 prompts"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(files, case, monkeypatch, capsys):
    flags, message = BAD[case]
    monkeypatch.setattr(sys, "argv", ["dpo", "--eval_size", "4", *flags.format(files).split()])
    with pytest.raises(SystemExit) as stop:
        original.run_demo(DPO)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]


def test_bad_input_end_to_end(files):
    command = [
        sys.executable,
        "-m",
        "snippets.preferences.dpo",
        "--model",
        f"{files}/model",
        "--data",
        f"{files}/type.jsonl",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: {files}/type.jsonl:3: 'rejected' must be str, got int\n"
    assert done.stdout == ""
