"""Instructions with several constraints: checker, corrector and records by enumeration, TRL's reading of the records,
what each kind of data teaches, and broken copies that must be caught."""

import copy
import itertools
import random
from unittest import mock

import pytest
import torch

from snippets.rlhf import complex_instructions as original
from tests.mutation import caught_by, load_mutant

PATH = "snippets/rlhf/complex_instructions.py"
NAME = "rlhf/complex_instructions"


def prompts_of(count, number=200, seed=0):
    rng = random.Random(seed)
    return [original.make_prompt(count, rng) for _ in range(number)]


def keeps(prompt, answer):
    """An independent reading of a prompt: a dictionary from digit to letter."""
    asked = dict(zip(prompt[:-1:2], prompt[1:-1:2], strict=True))
    return len(answer) == 5 and all(answer[int(place) - 1] == letter for place, letter in asked.items())


# Each check takes the module, so that broken copies can be put to it.


def check_prompts_are_read(ci):
    assert ci.constraints("2c5a=") == [(1, "c"), (4, "a")]
    assert ci.constraints("1a2b3c4d5e=") == [(0, "a"), (1, "b"), (2, "c"), (3, "d"), (4, "e")]


def check_what_is_broken_for_every_answer(ci):
    """All 7,776 answers of five letters, and some of other lengths."""
    for prompt in ("3b=", "1a5f=", "2c3c4c="):
        asked = ci.constraints(prompt)
        for letters in itertools.product("abcdef", repeat=5):
            answer = "".join(letters)
            found = ci.broken(prompt, answer)
            assert (found == []) == keeps(prompt, answer)
            assert found == [c for c in asked if answer[c[0]] != c[1]]
        for answer in ("", "abcd", "abcdef", "cccccc"):
            assert ci.broken(prompt, answer) == asked


def check_prompts_have_as_many_constraints_as_asked(ci):
    rng = random.Random(0)
    for count in range(1, 6):
        seen = [ci.make_prompt(count, rng) for _ in range(300)]
        for prompt in seen:
            places = [place for place, _ in ci.constraints(prompt)]
            assert len(places) == count and places == sorted(set(places))
        assert {letter for prompt in seen for _, letter in ci.constraints(prompt)} == set("abcdef")
        assert {place for prompt in seen for place, _ in ci.constraints(prompt)} == set(range(5))


def check_a_writer_minds_each_constraint_alone(ci):
    """With chance skill, and by luck of the style in the rest: for k constraints the k-th power."""
    rng, style = random.Random(0), (4, 2, 1, 1, 1, 1)
    for count in (1, 3):
        prompts = prompts_of(count, 4000)
        share = sum(not ci.broken(p, ci.write(p, rng, skill=0.7, style=style)) for p in prompts) / 4000
        assert share == pytest.approx((0.7 + 0.3 / 6) ** count, abs=0.03)
    for prompt in prompts_of(5):
        assert not ci.broken(prompt, ci.write(prompt, rng, skill=1.0, style=style))
    letters = "".join(ci.write("1a=", rng, skill=0.0, style=style) for _ in range(2000))
    assert letters.count("a") / len(letters) == pytest.approx(0.4, abs=0.03)


def check_correction_changes_only_what_is_broken(ci):
    rng = random.Random(0)
    for count in range(1, 6):
        for prompt in prompts_of(count):
            draft = "".join(rng.choices("abcdef", k=5))
            wrong = {place for place, _ in ci.broken(prompt, draft)}
            for skill in (0.0, 0.5, 1.0):
                better = ci.correct(prompt, draft, rng, skill=skill)
                changed = {i for i in range(5) if better[i] != draft[i]}
                assert changed <= wrong
                assert len(ci.broken(prompt, better)) == len(wrong) - len(changed)
                assert {0.0: changed == set(), 1.0: changed == wrong}.get(skill, True)


def check_correction_mends_with_its_skill(ci):
    rng = random.Random(1)
    prompts = prompts_of(5, 2000)
    left = [len(ci.broken(p, ci.correct(p, "zzzzz", rng, skill=0.8))) for p in prompts]
    assert sum(left) / (5 * 2000) == pytest.approx(0.2, abs=0.015)
    for draft in ("", "ab", "abcdef"):
        assert not ci.broken("1a3b=", ci.correct("1a3b=", draft, rng, skill=1.0))


def check_a_draft_of_another_length_is_written_anew(ci):
    """In one go and in the strong style: each constraint kept with chance skill, or by luck of one in six."""
    rng = random.Random(2)
    for draft in ("", "aaaaaa"):
        answers = [ci.correct("2c5a=", draft, rng, skill=0.5) for _ in range(6000)]
        left = sum(len(ci.broken("2c5a=", answer)) for answer in answers) / 12000
        assert left == pytest.approx(0.5 * 5 / 6, abs=0.02)
        free = "".join(answer[0] + answer[2] + answer[3] for answer in answers)
        assert all(free.count(letter) / len(free) == pytest.approx(1 / 6, abs=0.015) for letter in "abcdef")


def check_the_judge_counts_and_sums(ci):
    """Against loops over its own samples: the share that keep all, and log pi - log pi_weak over valid tokens."""
    from snippets.worlds import arithmetic, lm

    tokenizer = arithmetic.make_tokenizer(original.LETTERS + original.PLACES + "=")
    policy, weak = (arithmetic.make_model(len(tokenizer), hidden=32, layers=1, seed=seed) for seed in (0, 1))
    answers = ["abcde", "cccc", "fffff", "abcdef"]
    sample = lambda policy, tokenizer, prompts, seed: lm.generate(  # noqa: E731
        policy, tokenizer, prompts, max_new_tokens=6, uniforms=uniforms(len(prompts), seed)
    )
    uniforms = lambda rows, seed: torch.rand(rows, 6, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    found, drift = ci.judge(policy, weak, tokenizer, size=40), 0.0
    for count in range(1, 6):
        prompts = prompts_of(count, 40, 1000 + count)
        out = sample(policy, tokenizer, prompts, 1000 + count)
        logps = lm.token_logps(weak, out.ids, out.attention, out.mask.shape[1])
        for b, t in itertools.product(range(40), range(out.mask.shape[1])):
            drift += (out.logps[b, t] - logps[b, t]).item() / 200 if out.mask[b, t] else 0.0
    assert found["drift"] == pytest.approx(drift, abs=1e-4) and drift > 0
    with mock.patch.object(lm, "generate", lambda *a, **k: copy.copy(out)):
        out.texts = answers * 10
        kept = ci.judge(policy, weak, tokenizer, size=40)["kept"]
    for count, share in enumerate(kept, 1):
        prompts = prompts_of(count, 40, 1000 + count)
        assert share == sum(keeps(p, a) for p, a in zip(prompts, answers * 10, strict=True)) / 40
    assert 0 < kept[0] < 1


def check_pairs_are_improvements(ci):
    found = ci.pairs(["1a2b="] * 4, ["cccab", "cbcab", "abccc", "zz"], ["acccc", "cbcab", "abccc", "abccc"])
    assert found == [
        {"prompt": "1a2b=", "chosen": "acccc", "rejected": "cccab"},
        {"prompt": "1a2b=", "chosen": "abccc", "rejected": "zz"},
    ]
    assert ci.demonstrations(["1a="], ["abcde"]) == [{"prompt": "1a=", "completion": "abcde"}]


def check_the_mixed_loss_is_dpo_and_likelihood(ci):
    from snippets.preferences import dpo
    from snippets.preferences.loop import PairLogps

    chosen, rejected = torch.tensor([-3.0, -8.0], requires_grad=True), torch.tensor([-4.0, -2.0], requires_grad=True)
    lengths, ref = torch.tensor([6, 3]), torch.tensor([-3.5, -5.0])
    batch = PairLogps(chosen, rejected, lengths, torch.tensor([2, 7]), ref, ref)
    settings = dpo.algorithm().settings(beta=0.7)
    losses, good, bad = ci.dpo_with_sft().loss(batch, settings)
    plain, *rewards = dpo.algorithm().loss(batch, settings)
    torch.testing.assert_close(losses, plain + torch.tensor([3.0 / 6, 8.0 / 3]))
    torch.testing.assert_close((good, bad), tuple(rewards))
    (slope,) = torch.autograd.grad(losses.sum() - plain.sum(), chosen)
    torch.testing.assert_close(slope, -1 / lengths)


def check_bad_input_is_named(ci):
    for prompt in ("", "=", "2c5a", "2c5=", "6a=", "2x=", "c2="):
        with pytest.raises(ValueError, match="is not a prompt such as"):
            ci.constraints(prompt)
    with pytest.raises(ValueError, match="'2c2a=' asks twice for one place"):
        ci.constraints("2c2a=")
    for count in (0, 6):
        with pytest.raises(ValueError, match=f"want 1 to 5 constraints, got {count}"):
            ci.make_prompt(count, random.Random(0))
    with pytest.raises(ValueError):
        ci.pairs(["1a="], ["a"], ["a", "b"])
    with pytest.raises(ValueError):
        ci.demonstrations(["1a="], ["a", "b"])


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_functions(check):
    check(original)


MISTAKES = {
    "places from one": ("(PLACES.find(p), letter)", "(int(p) if p.isdigit() else -1, letter)"),
    "a letter that is not one": ("place >= 0 and letter in LETTERS", "place >= 0"),
    "one place twice": ("if len({place for place, _ in parts}) < len(parts):", "if False:"),
    "a short answer keeps all": ("        return asked\n", "        return []\n"),
    "what is kept": ("answer[place] != letter]", "answer[place] == letter]"),
    "one constraint too many": ("rng.sample(PLACES, count)", "rng.sample(PLACES, min(count + 1, 5))"),
    "unsorted": ("sorted(rng.sample(PLACES, count))", "rng.sample(PLACES, count)"),
    "no style": ("rng.choices(LETTERS, style, k=len(PLACES))", "rng.choices(LETTERS, k=len(PLACES))"),
    "minds all": (
        "    for place, letter in constraints(prompt):\n        if rng.random() < skill:",
        "    for place, letter in constraints(prompt):\n        if True:",
    ),
    "rewrites the draft": ("letters = list(draft)", "letters = rng.choices(LETTERS, k=5)"),
    "mends all": (
        "    for place, letter in broken(prompt, draft):\n        if rng.random() < skill:",
        "    for place, letter in broken(prompt, draft):\n        if True:",
    ),
    "pairs of equals": ("len(broken(prompt, good)) < len(broken(prompt, draft))", "True"),
    "the draft is chosen": ('"chosen": good, "rejected": draft', '"chosen": draft, "rejected": good'),
    "likelihood the wrong way": ("losses - batch.chosen /", "losses + batch.chosen /"),
    "likelihood of the rejected": ("losses - batch.chosen /", "losses - batch.rejected /"),
    "length of the rejected": ("batch.chosen / batch.chosen_lengths", "batch.chosen / batch.rejected_lengths"),
    "written anew without a fault": (
        "return write(prompt, rng, skill=skill, style=STRONG_STYLE)",
        "return write(prompt, rng, skill=1.0, style=STRONG_STYLE)",
    ),
    "written anew in the weak style": (
        "return write(prompt, rng, skill=skill, style=STRONG_STYLE)",
        "return write(prompt, rng, skill=skill, style=WEAK_STYLE)",
    ),
    "sign of the drift": ("out.logps - logps, 0.0", "logps - out.logps, 0.0"),
    "drift over pads": ("torch.where(out.mask.bool(), out.logps - logps, 0.0)", "(out.logps - logps)"),
    "one may be broken": ("sum(not broken(p, a) for", "sum(len(broken(p, a)) < 2 for"),
    "answers without a prompt": (
        "zip(prompts, answers, strict=True)]\n\n\ndef pairs",
        "zip(prompts, answers, strict=False)]\n\n\ndef pairs",
    ),
    "a sum in place of a mean": ("batch.chosen / batch.chosen_lengths", "batch.chosen"),
}


def test_no_check_fails_on_the_original():
    assert caught_by(original, CHECKS) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    """Each deliberate mistake makes at least one check fail."""
    assert caught_by(load_mutant(PATH, *MISTAKES[mistake]), CHECKS)


def test_the_records_train_in_trl(tmp_path):
    """Corrections go into TRL's SFTTrainer, and pairs into its DPOTrainer with a supervised loss beside DPO's."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from snippets.worlds import arithmetic

    rng = random.Random(0)
    tokenizer = arithmetic.make_tokenizer(original.LETTERS + original.PLACES + "=")
    model = arithmetic.make_model(len(tokenizer), hidden=32, layers=1, seed=0)
    prompts = prompts_of(3, 8)
    drafts = [original.write(p, rng, skill=0.2, style=original.WEAK_STYLE) for p in prompts]
    better = [original.correct(p, d, rng, skill=1.0) for p, d in zip(prompts, drafts, strict=True)]
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
    demonstrations = Dataset.from_list(original.demonstrations(prompts, better))
    SFTTrainer(model, SFTConfig(**common), train_dataset=demonstrations, processing_class=tokenizer).train()
    reference = copy.deepcopy(model)
    pairs = Dataset.from_list(original.pairs(prompts, drafts, better))
    options = {"train_dataset": pairs, "processing_class": tokenizer, "ref_model": reference}
    mixed = DPOConfig(**common, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 1.0])
    DPOTrainer(model, args=mixed, **options).train()
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


# What the data teach


def test_the_judge_knows_a_weak_model_from_itself(tmp_path):
    """No drift from itself, and the share kept is that of a count of its own."""
    from snippets.worlds import arithmetic

    tokenizer = arithmetic.make_tokenizer(original.LETTERS + original.PLACES + "=")
    one, other = (arithmetic.make_model(len(tokenizer), hidden=32, layers=1, seed=seed) for seed in (0, 1))
    found = original.judge(one, one, tokenizer, size=100)
    assert found["drift"] == pytest.approx(0.0, abs=1e-4) and len(found["kept"]) == 5
    assert original.judge(one, other, tokenizer, size=100)["drift"] > 0.01
    prompts = prompts_of(1, 100)
    out = original.sample(one, tokenizer, prompts, 3)
    assert out.texts == original.sample(one, tokenizer, prompts, 3).texts
    assert out.texts != original.sample(one, tokenizer, prompts, 4).texts


@pytest.mark.evidence
def test_what_the_data_teach(evidence, tmp_path):
    if not evidence.full:  # half a CPU minute a seed; here only that a small trial trains all policies
        made = original.trial(0, str(tmp_path), size=64, weak_steps=5)
        assert len(made) == 12 and made["right"]["corrected drafts, all right"] == 1.0
        weights = [next(made[name].parameters()) for name in list(made)[:-2]]
        assert all(not torch.equal(weights[0], other) for other in weights[1:])
        return
    seeds, rows = list(range(5)), []
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    for seed in seeds:
        made = original.trial(seed, str(tmp_path / str(seed)))
        tokenizer, right = made.pop("tokenizer"), made.pop("right")
        rows.append({name: original.judge(policy, made["weak model"], tokenizer) for name, policy in made.items()})
        rows[-1]["right"] = right

    def record(title, values, **options):
        evidence(NAME, title, value=mean(values), seeds=seeds, spread=values, **options)

    for name in ("drafts", "the strong model's answers", "corrected drafts"):
        record(f"Data that keep all constraints: {name}", [row["right"][name] for row in rows])
    names = [name for name in rows[0] if name != "right"]
    for name in names:
        kept = [row[name]["kept"] for row in rows]
        bar = {"3 to 5": 0.5, "corrected drafts": 0.5, "pairs, with a supervised loss": 0.5}.get(name)
        curve = {
            "x": [1, 2, 3, 4, 5],
            "y": {name: kept},
            "xlabel": "constraints in the prompt",
            "ylabel": "answers that keep all",
        }
        record(
            f"Answers that keep all, 1 to 5 constraints: {name}",
            [mean(k) for k in kept],
            bar=bar,
            better=">=",
            curve=curve,
        )
        if name != "weak model":
            record(f"KL from the weak model: {name}", [row[name]["drift"] for row in rows], unit="nats")
    for name in ("weak model", "1 constraint", "3 to 5", "3 to 5, a quarter"):
        for count in (1, 5):
            values = [row[name]["kept"][count - 1] for row in rows]
            record(f"Answers that keep all, {count} in the prompt: {name}", values)
    for row in rows:
        assert mean(row["3 to 5"]["kept"][2:]) > mean(row["1 constraint"]["kept"][2:])
        for direct, mended in (("the strong model's answers", "corrected drafts"),):
            assert row[mended]["drift"] < row[direct]["drift"]


def test_the_demo_prints_each_model(monkeypatch, capsys):
    made = {"tokenizer": None, "right": {"the weak model's answers": 0.123}, "weak model": "weak"}
    monkeypatch.setattr(original, "trial", lambda seed, out: dict(made))
    monkeypatch.setattr(original, "judge", lambda policy, weak, tokenizer: {"kept": [0.5, 0.25], "drift": 1.5})
    original.main()
    printed = capsys.readouterr().out
    assert "0.12" in printed and "0.50  0.25   drift 1.50 nats" in printed
