"""Arena learning: verdicts, lessons and ratings against explicit counts, TRL's reading of the records, one turn of the
flywheel measured beside what tempts, and broken copies that must be caught."""

import functools
import itertools
import math
import random

import pytest
import torch

from snippets.rlhf import arena_learning as original
from snippets.worlds import arithmetic, lm
from tests.mutation import caught_by, load_mutant

PATH = "snippets/rlhf/arena_learning.py"
NAME = "rlhf/arena_learning"
SUMS = [{"prompt": "37+48=", "answer": "85"}, {"prompt": "7+8=", "answer": "15"}, {"prompt": "9+9=", "answer": "18"}]


def judge_of_length(prompt, first, second):
    """Prefers the longer answer; between equals, the first."""
    return 0.9 if len(first) >= len(second) else 0.1


# Each check takes the module, so that broken copies can be put to it.


def check_a_verdict_asks_in_both_orders(arena):
    asked = []

    def judge(prompt, first, second):
        asked.append((prompt, first, second))
        return {"a": 0.9, "b": 0.6}[first]

    assert arena.verdict(judge, "x", "a", "b") == pytest.approx((0.9 + 0.4) / 2)
    assert sorted(asked) == [("x", "a", "b"), ("x", "b", "a")]
    assert arena.verdict(judge, "x", "b", "b") == 0.5 and len(asked) == 2  # equals are not worth a call
    assert arena.verdict(judge_of_length, "x", "aa", "bb") == pytest.approx(0.5)  # its place bias is gone
    assert arena.verdict(judge_of_length, "x", "aaa", "bb") == pytest.approx(0.9)


def check_a_verdict_is_fair(arena):
    """Mine against theirs and theirs against mine add up to 1, whatever the judge does."""
    rng = random.Random(0)
    table = {(a, b): rng.random() for a in "abcd" for b in "abcd"}
    judge = lambda prompt, first, second: table[first, second]  # noqa: E731
    for a, b in itertools.product("abcd", repeat=2):
        assert arena.verdict(judge, "x", a, b) + arena.verdict(judge, "x", b, a) == pytest.approx(1.0)
    assert arena.verdict(judge, "x", "a", "a") == 0.5


def check_battles_in_order(arena):
    fought = arena.battles(["p", "q"], ["a", "bbb"], {"X": ["aa", "b"], "Y": ["a", "bbbb"]}, judge_of_length)
    assert [(b["prompt"], b["rival"], b["mine"], b["theirs"]) for b in fought] == [
        ("p", "X", "a", "aa"),
        ("p", "Y", "a", "a"),
        ("q", "X", "bbb", "b"),
        ("q", "Y", "bbb", "bbbb"),
    ]
    assert [b["score"] for b in fought] == pytest.approx([0.1, 0.5, 0.9, 0.1])


def check_lessons_are_the_clearest_losses(arena):
    rows = [("p", "X", 0.4), ("p", "Y", 0.2), ("p", "Z", 0.2), ("q", "X", 0.5), ("r", "X", 0.9), ("r", "Y", 0.45)]
    fought = [{"prompt": p, "rival": k, "mine": f"m{p}", "theirs": f"{k}{p}", "score": s} for p, k, s in rows]
    found = arena.lessons(fought)
    assert found == [
        {"prompt": "p", "completion": "Yp", "chosen": "Yp", "rejected": "mp"},
        {"prompt": "r", "completion": "Yr", "chosen": "Yr", "rejected": "mr"},
    ]
    assert [record["prompt"] for record in arena.lessons(fought, margin=0.1)] == ["p"]
    assert arena.lessons(fought, margin=0.3) == []
    assert arena.lessons([]) == []


def check_a_lesson_is_never_a_pair_of_equals(arena):
    fought = arena.battles(["p"] * 3, ["a", "b", "c"], {"X": ["a", "b", "c"]}, lambda *_: 1.0)
    assert arena.lessons(fought) == []


def log_likelihood(elo, results):
    total = 0.0
    for first, second, score in results:
        p = 1 / (1 + 10 ** ((elo[second] - elo[first]) / 400))
        total += score * math.log(p) + (1 - score) * math.log(1 - p)
    return total


def some_results(seed=0, names="ABCD", games=60):
    rng = random.Random(seed)
    return [(*rng.sample(names, 2), rng.choice([0.0, 0.5, 1.0, 1.0])) for _ in range(games)]


def check_ratings_maximise_the_likelihood(arena):
    results = some_results()
    elo = arena.ratings(results, anchor="B")
    assert elo["B"] == pytest.approx(1000.0)
    best = log_likelihood(elo, results)
    for name in "ACD":
        for step in (-1.0, 1.0):
            assert log_likelihood(elo | {name: elo[name] + step}, results) < best
    for name in "ABCD":  # at the optimum, points won are points expected
        won = sum(s if name == a else 1 - s for a, b, s in results if name in (a, b))
        expected = sum(
            1 / (1 + 10 ** ((elo[b if name == a else a] - elo[name]) / 400)) for a, b, _ in results if name in (a, b)
        )
        assert won == pytest.approx(expected, abs=1e-6)


def check_two_models_have_the_rating_of_their_odds(arena):
    elo = arena.ratings([("A", "B", 1.0)] * 3 + [("B", "A", 1.0)], anchor="B", level=0.0)
    assert elo["A"] == pytest.approx(400 * math.log10(3), abs=1e-6)
    assert arena.ratings([("A", "B", 0.75)], anchor="B", level=0.0)["A"] == pytest.approx(elo["A"], abs=1e-6)


def check_a_chain_of_points_won_is_enough(arena):
    """A beat B, B beat C, C beat D, D beat A: ratings exist, and are equal."""
    elo = arena.ratings([("A", "B", 1.0), ("B", "C", 1.0), ("C", "D", 1.0), ("D", "A", 1.0)], anchor="A")
    assert elo == pytest.approx(dict.fromkeys("ABCD", 1000.0), abs=1e-6)


def check_a_long_chain_of_battles_converges(arena):
    """Six models, each met only by its neighbours and winning nine battles of ten: R rises by 400 log10 9 each time."""
    results = [(b, a, score) for a, b in itertools.pairwise("ABCDEF") for score in [1.0] * 9 + [0.0]]
    elo = arena.ratings(results, anchor="C")
    step = 400 * math.log10(9)
    assert [elo[name] for name in "ABCDEF"] == pytest.approx([1000 + step * i for i in range(-2, 4)], abs=1e-4)


def check_the_order_of_battles_does_not_matter(arena):
    results = some_results(1)
    elo = arena.ratings(results, anchor="A")
    turned = [(b, a, 1 - s) for a, b, s in reversed(results)]
    assert arena.ratings(turned, anchor="A") == pytest.approx(elo, abs=1e-6)
    shifted = arena.ratings(results, anchor="A", level=1500.0)
    assert {name: value - 500 for name, value in shifted.items()} == pytest.approx(elo, abs=1e-6)


def check_the_reward_is_the_mean_verdict(arena):
    reward = arena.judge_reward(judge_of_length, {"X": {"p": "aa", "q": "b"}, "Y": {"p": "aaaa", "q": "c"}})
    assert reward(completions=["bbb", "b"], prompts=["p", "q"], answer=["", ""]) == pytest.approx([0.5, 0.5])
    assert reward(completions=["a", "bb"], prompts=["p", "q"]) == pytest.approx([0.1, 0.9])


def check_the_judge_knows_the_sums(arena):
    judge = arena.make_judge(SUMS, error=0.0, bias=0.2, seed=0)
    assert judge("37+48=", "85", "75") == 1.0 and judge("37+48=", "75", "85") == 0.0
    assert judge("37+48=", "75", "86") == pytest.approx(0.7)
    assert arena.verdict(judge, "37+48=", "75", "86") == pytest.approx(0.5)


def check_the_judge_errs_on_a_share_of_the_pairs(arena):
    sums = arithmetic.problems(held_out=False)[:4000]
    judge = arena.make_judge(sums, error=0.1, bias=0.0, seed=3)
    wrong = [judge(r["prompt"], r["answer"], "no") == 0.0 for r in sums]
    assert abs(sum(wrong) / 4000 - 0.1) < 4 * (0.1 * 0.9 / 4000) ** 0.5
    for r, w in zip(sums[:200], wrong, strict=False):  # the same verdict in both orders, and when asked again
        assert judge(r["prompt"], "no", r["answer"]) == float(w)
        assert arena.verdict(judge, r["prompt"], r["answer"], "no") == float(not w)
    other = arena.make_judge(sums, error=0.1, bias=0.0, seed=4)
    assert any(judge(r["prompt"], r["answer"], "no") != other(r["prompt"], r["answer"], "no") for r in sums)


def check_bad_input_is_named(arena):
    with pytest.raises(ValueError, match=r"X: 1 answers to 2 prompts"):
        arena.battles(["p", "q"], ["a", "b"], {"X": ["a"]}, judge_of_length)
    with pytest.raises(ValueError, match=r"mine: 3 answers to 2 prompts"):
        arena.battles(["p", "q"], ["a", "b", "c"], {"X": ["a", "b"]}, judge_of_length)
    for verdict in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got .* for 'p'"):
            arena.verdict(lambda *_, v=verdict: v, "p", "a", "b")
    with pytest.raises(ValueError, match="the anchor 'Z' is in no battle"):
        arena.ratings(some_results(), anchor="Z")
    with pytest.raises(ValueError, match="no finite ratings"):
        arena.ratings([("A", "B", 1.0)] * 5, anchor="A")
    two_worlds = [("A", "B", 0.5), ("C", "D", 0.5), ("A", "C", 1.0)]
    with pytest.raises(ValueError, match="no finite ratings"):
        arena.ratings(two_worlds, anchor="A")


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_functions(check):
    check(original)


MISTAKES = {
    "one order": ("judge(prompt, theirs, mine)", "1 - judge(prompt, mine, theirs)"),
    "the second verdict not turned": ("(scores[0] + 1 - scores[1]) / 2", "(scores[0] + scores[1]) / 2"),
    "equals are judged": ("if mine == theirs:", "if False:"),
    "verdicts unchecked": ("if not all(0 <= score <= 1 for score in scores):", "if False:"),
    "ties are lessons": ('battle["score"] < known["score"]', 'battle["score"] <= known["score"]'),
    "margin the wrong way": ("0.5 - margin", "0.5 + margin"),
    "the last loss instead of the clearest": (
        'worst.get(battle["prompt"], {"score": 0.5 - margin})',
        '{"score": 0.5 - margin}',
    ),
    "learns its own answer": ('"completion": b["theirs"]', '"completion": b["mine"]'),
    "the loser is chosen": (
        '"chosen": b["theirs"], "rejected": b["mine"]',
        '"chosen": b["mine"], "rejected": b["theirs"]',
    ),
    "wins counted for the loser": ("won[i, j] += score", "won[j, i] += score"),
    "only the first one scores": ("won[j, i] += 1 - score", "won[j, i] += 0"),
    "no reachability": ("if not reach.all():", "if False:"),
    "reach of one step": ("for _ in names:\n        reach", "for _ in ():\n        reach"),
    "one iteration": ("range(10_000)", "range(1)"),
    "stops too early": ("range(10_000)", "range(100)"),
    "base e": ("strength.log10()", "strength.log()"),
    "anchor adrift": ("strength = strength / strength[names.index(anchor)]", "strength = strength / strength.mean()"),
    "sum of verdicts": ("/ len(rivals)", "/ 1"),
    "the judge errs anew each time": ('random.Random(f"{seed}|{pair}")', "random"),
    "the judge errs by order": ("*sorted((first, second))", "first, second"),
    "the judge prefers what is wrong": ("float((better > 0) != wrong)", "float((better > 0) == wrong)"),
}


def test_no_check_fails_on_the_original():
    assert caught_by(original, CHECKS) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    """Each deliberate mistake makes at least one check fail."""
    assert caught_by(load_mutant(PATH, *MISTAKES[mistake]), CHECKS)


def test_elo_updates_depend_on_the_order_and_scatter_around_these_ratings():
    """The running update, K = 4, over shuffled battles: its mean is near, single runs are not."""
    truth = {"A": 1000.0, "B": 1100.0, "C": 1300.0}
    rng = random.Random(0)
    results = []
    for _ in range(3000):
        a, b = rng.sample("ABC", 2)
        results.append((a, b, float(rng.random() < 1 / (1 + 10 ** ((truth[b] - truth[a]) / 400)))))
    fitted = original.ratings(results, anchor="A")
    assert fitted == pytest.approx(truth, abs=30)
    ends = []
    for _ in range(20):
        rng.shuffle(results)
        elo = dict.fromkeys("ABC", 1000.0)
        for a, b, score in results:
            change = 4 * (score - 1 / (1 + 10 ** ((elo[b] - elo[a]) / 400)))
            elo[a], elo[b] = elo[a] + change, elo[b] - change
        ends.append(elo["C"] - elo["A"])
    assert max(ends) - min(ends) > 20
    assert sum(ends) / 20 == pytest.approx(fitted["C"] - fitted["A"], abs=15)


def test_the_records_train_in_trl(tmp_path):
    """The same lessons go into TRL's SFTTrainer and DPOTrainer, and the reward into its GRPOTrainer, unchanged."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    tokenizer = arithmetic.make_tokenizer()
    model = arithmetic.make_model(len(tokenizer), hidden=32, layers=1, seed=0)
    judge = original.make_judge(SUMS, error=0.0, bias=0.1, seed=0)
    told = {"X": {record["prompt"]: record["answer"] for record in SUMS}}
    prompts = [record["prompt"] for record in SUMS]
    found = original.lessons(original.battles(prompts, ["75", "15", "8"], {"X": list(told["X"].values())}, judge))
    assert [record["prompt"] for record in found] == ["37+48=", "9+9="]
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
    columns = {"sft": ("prompt", "completion"), "dpo": ("prompt", "chosen", "rejected")}
    data = {k: Dataset.from_list([{c: r[c] for c in names} for r in found]) for k, names in columns.items()}
    SFTTrainer(model, SFTConfig(**common), train_dataset=data["sft"], processing_class=tokenizer).train()
    reference = arithmetic.make_model(len(tokenizer), hidden=32, layers=1, seed=0)
    options = {"train_dataset": data["dpo"], "processing_class": tokenizer, "ref_model": reference}
    DPOTrainer(model, args=DPOConfig(**common), **options).train()
    options = GRPOConfig(**common, num_generations=2, max_completion_length=3, beta=0.0)
    reward = original.judge_reward(judge, told)
    GRPOTrainer(
        model, args=options, reward_funcs=reward, train_dataset=Dataset.from_list(SUMS), processing_class=tokenizer
    ).train()


# One turn of the flywheel


@functools.cache
def held_out():
    sums = arithmetic.problems(held_out=True)
    carry = [r for r in sums if arithmetic.without_carry(r["prompt"]) != r["answer"]]
    plain = [r for r in sums if arithmetic.without_carry(r["prompt"]) == r["answer"]]
    return {"all": sums, "with a carry": carry, "without a carry": plain}


def test_lost_battles_teach_to_carry_too_often(tmp_path):
    """What the warm start loses are nearly all sums with a carry; after SFT on these, most mistakes on sums without one
    are ten too much. One seed, one rival who is always right, a judge who never errs."""
    from snippets.rlhf import sft

    policy, tokenizer = arithmetic.warm_start()
    sums = random.Random(0).sample(arithmetic.problems(held_out=False), 1000)
    prompts, answers = ([record[key] for record in sums] for key in ("prompt", "answer"))
    greedy = {"max_new_tokens": 4, "temperature": 0.0}
    mine = lm.generate(policy, tokenizer, prompts, **greedy).texts
    judge = original.make_judge(sums, error=0.0, bias=0.2, seed=0)
    lost = original.lessons(original.battles(prompts, mine, {"X": answers}, judge))
    plain = [r for r in lost if arithmetic.without_carry(r["prompt"]) == r["completion"]]
    assert len(lost) > 400 and len(plain) < 0.05 * len(lost)
    options = {"steps": 3 * len(lost) // 32, "batch": 32, "lr": 5e-5, "save_every": 10**6, "out": str(tmp_path)}
    test, mistakes = held_out()["without a carry"], []
    for trained in (False, True):
        if trained:
            sft.train(policy, tokenizer, lost, sft.settings_class()(seed=0, **options))
        texts = lm.generate(policy, tokenizer, [r["prompt"] for r in test], **greedy).texts
        mistakes.append([(text, r["answer"]) for text, r in zip(texts, test, strict=True) if text != r["answer"]])
    before, after = mistakes
    assert len(after) > 5 * len(before)
    ten = sum(text.isdigit() and int(text) == int(answer) + 10 for text, answer in after)
    assert ten > 0.7 * len(after)


def turn(seed, out, **options):
    made = original.flywheel(seed, str(out), **options)
    told, judge, lost = (made.pop(name) for name in ("told", "judge", "lost"))
    _, tokenizer = arithmetic.warm_start()
    accuracy = {
        name: {part: arithmetic.greedy_accuracy(policy, tokenizer, sums) for part, sums in held_out().items()}
        for name, policy in made.items()
    }
    stages = ["warm start", "SFT on lost battles", "DPO on new battles", "PPO"]
    prompts = [record["prompt"] for record in held_out()["all"][:500]]
    answers = {name: [rival[prompt] for prompt in prompts] for name, rival in told.items()}
    for name in stages:
        answers[name] = lm.generate(made[name], tokenizer, prompts, max_new_tokens=4, temperature=0.0).texts
    results = [
        (a, b, original.verdict(judge, prompt, answers[a][i], answers[b][i]))
        for a, b in itertools.combinations(answers, 2)
        for i, prompt in enumerate(prompts)
    ]
    return accuracy, lost, original.ratings(results, anchor="warm start")


@pytest.mark.evidence
def test_one_turn_of_the_flywheel(evidence, tmp_path):
    if not evidence.full:  # half a CPU minute a seed; here only that a small turn runs and trains
        made = original.flywheel(0, str(tmp_path), size=64, ppo_steps=1)
        assert list(made)[:4] == ["warm start", "SFT on lost battles", "SFT on as many at random", "SFT on all answers"]
        assert list(made)[4:7] == ["DPO on new battles", "DPO on old battles", "PPO"]
        assert len(made["lost"]) == 3 and 20 < made["lost"][0] < 50
        start, moved = (next(made[name].parameters()) for name in ("warm start", "PPO"))
        assert not torch.equal(start, moved)
        return
    seeds = list(range(5))
    turns = [turn(seed, tmp_path / str(seed)) for seed in seeds]

    def spread(stage, part="all"):
        return [accuracy[stage][part] for accuracy, _, _ in turns]

    def mean(values):
        return sum(values) / len(values)

    bars = {
        "SFT on lost battles": (0.7, ">="),
        "DPO on new battles": (0.85, ">="),
        "DPO on old battles": (0.75, "<="),
        "PPO": (0.85, ">="),
    }
    for stage in turns[0][0]:
        bar, better = bars.get(stage, (None, ">="))
        evidence(
            NAME,
            f"Held-out accuracy, {stage}",
            value=mean(spread(stage)),
            bar=bar,
            better=better,
            seeds=seeds,
            spread=spread(stage),
        )
    for stage in ("warm start", "SFT on lost battles", "SFT on as many at random"):
        for part in ("with a carry", "without a carry"):
            evidence(
                NAME,
                f"Held-out accuracy on sums {part}, {stage}",
                value=mean(spread(stage, part)),
                seeds=seeds,
                spread=spread(stage, part),
            )
    for i, name in enumerate(("warm start", "model after SFT", "model after DPO")):
        values = [lost[i] for _, lost, _ in turns]
        evidence(NAME, f"Prompts of 1,000 lost by the {name}", value=mean(values), seeds=seeds, spread=values)
    for stage in ("SFT on lost battles", "DPO on new battles", "PPO"):
        values = [elo[stage] - elo["warm start"] for _, _, elo in turns]
        evidence(
            NAME,
            f"Elo gained since the warm start, {stage}",
            value=mean(values),
            seeds=seeds,
            spread=values,
            note="Maximum likelihood over all battles of the four stages and three rivals on 500 held-out sums.",
        )
    for new, old, lost, some in zip(
        *map(spread, ("DPO on new battles", "DPO on old battles", "SFT on lost battles", "SFT on as many at random")),
        strict=True,
    ):
        assert new > lost > old
        assert some > lost  # what tempts is better here, and the page says why


def test_the_demo_prints_each_stage(monkeypatch, capsys):
    policy, _ = arithmetic.warm_start()
    made = {"warm start": policy, "lost": 3, "last": 0, "but one": 0}
    monkeypatch.setattr(original, "flywheel", lambda seed, out: made)
    original.main()
    printed = capsys.readouterr().out
    assert "lost: 3" in printed and "warm start" in printed and " 0.452 " in printed
