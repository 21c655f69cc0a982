"""The Countdown world against oracles that share no code with it, and the model that proposes steps."""

import itertools
import json
import random
import re
from collections import Counter
from fractions import Fraction

import pytest
import torch

from snippets.reasoning import loop
from snippets.worlds import countdown as cd
from snippets.worlds import lm
from tests.mutation import caught_by, load_mutant

# ------------------------------------------------------------------------------------------------- rules and solver


def values(numbers, memo=None):
    """First oracle: values of all expression trees over exactly these numbers, splitting them in two; in fractions."""
    memo = {} if memo is None else memo
    if len(numbers) == 1:
        return {Fraction(numbers[0])}
    if numbers not in memo:
        memo[numbers] = out = set()
        for size in range(1, len(numbers)):
            for chosen in itertools.combinations(range(len(numbers)), size):
                left = tuple(numbers[i] for i in chosen)
                right = tuple(numbers[i] for i in range(len(numbers)) if i not in chosen)
                for a, b in itertools.product(values(left, memo), values(right, memo)):
                    results = [a + b, a - b, a * b, *([a / b] if b else [])]
                    out |= {x for x in results if x > 0 and x.denominator == 1}
    return memo[numbers]


def is_legal(numbers, step):
    """Second oracle: Python's own arithmetic on the text of a step."""
    form = re.fullmatch(r"([0-9]+)([-+*/])([0-9]+)=([0-9]+) left: ([0-9]+(?: [0-9]+)*)", step)
    if not form:
        return False
    a, op, b, result, rest = form.groups()
    table = list(numbers)
    for used in (int(a), int(b)):
        if used not in table:
            return False
        table.remove(used)
    try:
        exact = eval(f"Fraction({a}){op}Fraction({b})", {"Fraction": Fraction})
    except ZeroDivisionError:
        return False
    if exact != int(result) or exact <= 0:
        return False
    return sorted([*table, int(result)]) == sorted(map(int, rest.split()))


def some_numbers(seed, size):
    rng = random.Random(seed)
    return tuple(sorted(rng.randint(1, 12) for _ in range(size)))


def check_solver_agrees_with_brute_force(m):
    for seed in range(25):
        numbers = some_numbers(seed, 2 + seed % 3)
        assert m.reachable(numbers) == values(numbers), numbers


def check_solutions(m):
    """A solution for each reachable target and none for the others; each is accepted, and no two are the same."""
    for seed in range(6):
        numbers = some_numbers(seed, 3)
        for target in range(1, 60):
            solutions = m.solve(numbers, target)
            assert bool(solutions) == (target in values(numbers))
            assert all(m.verify(numbers, target, steps) for steps in solutions)
            assert len({tuple(steps) for steps in solutions}) == len(solutions)


def check_legal_steps_are_all_of_them(m):
    for seed in range(15):
        numbers = some_numbers(seed, 3)
        steps = m.legal_steps(numbers)
        assert all(is_legal(numbers, text) and m.verify_step(numbers, text) == left for text, left in steps)
        found = {(*sorted(re.split(r"\D", text.split("=")[0])), text.split("=")[1]) for text, _ in steps}
        for a, b in itertools.permutations(numbers, 2):
            exact = [Fraction(a) + b, Fraction(a) - b, Fraction(a) * b, Fraction(a) / b]
            for result in exact:
                if result > 0 and result.denominator == 1:
                    assert any(key[:2] == tuple(sorted((str(a), str(b)))) for key in found)
                    assert any(key[2].startswith(f"{result} left") for key in found)


def check_verifier_agrees_with_python(m):
    """On legal steps and on thousands of near misses: one character changed, dropped or doubled."""
    rng, verdicts = random.Random(0), Counter()
    for seed in range(40):
        numbers = some_numbers(seed, 3 + seed % 2)
        for text, _ in rng.sample(m.legal_steps(numbers), 5):
            steps = [text]
            for _ in range(25):
                k = rng.randrange(len(text))
                steps.append(text[:k] + rng.choice(["", text[k] * 2, rng.choice("0123456789+-*/= ")]) + text[k + 1 :])
            for step in steps:
                try:
                    m.verify_step(numbers, step)
                    accepted = True
                except ValueError:
                    accepted = False
                assert accepted == is_legal(numbers, step), (numbers, step)
                verdicts[accepted] += 1
    assert verdicts[True] > 200 and verdicts[False] > 2000


def check_refusals(m):
    for step, reason in REFUSED.items():
        with pytest.raises(ValueError, match=reason):
            m.verify_step((4, 7, 12, 37), step)
    assert m.verify_step((4, 7, 12, 37), "37-12=25 left: 25 4 7") == (4, 7, 25)
    assert m.verify_step((4, 4, 5), "4*4=16 left: 5 16") == (5, 16)


def check_verify(m):
    steps = ["37-12=25 left: 25 4 7", "25*4=100 left: 100 7", "100-7=93 left: 93"]
    assert m.verify((4, 7, 12, 37), 93, steps)
    assert not m.verify((4, 7, 12, 37), 92, steps)  # another target
    assert not m.verify((4, 7, 12, 37), 7, steps[:2])  # two numbers are left, the target among them
    assert not m.verify((4, 7, 12, 37), 93, [steps[0], steps[2]])  # a step that does not follow
    assert not m.verify((4, 7, 12, 37), 93, [])


REFUSED = {
    "37-12=24 left: 24 4 7": "37-12 is not 24",
    "7-12=5 left: 4 5 37": "7-12 is not 5",
    "12-12=0 left: 0 4 7": "not among",
    "37/12=3 left: 3 4 7": "37/12 is not 3",
    "37+36=73 left: 73 4 7": "not among",
    "37-12=25 left: 25 4": "leaves",
    "37-12=25 left: 25 4 7 7": "leaves",
    "37-12=25 left: 4 7 12": "leaves",
    "37-12=25": "not of the form",
    "37-12=25 left: ": "not of the form",
    "37^12=25 left: 25 4 7": "not of the form",
    "": "not of the form",
}
CHECKS = [check for name, check in sorted(globals().items()) if name.startswith("check_")]
MUTATIONS = {
    "a number may be used that is not there": ("if min(table.values()) < 0:", "if False:"),
    "the arithmetic is believed": ("if combine(a, op, b) != result:", "if False:"),
    "the rest is believed": ("if sorted(map(int, match[5].split())) != list(left):", "if False:"),
    "zero is allowed": ("return result if result > 0", "return result if result >= 0"),
    "remainders are dropped": ("if b and a % b == 0", "if b"),
    "subtraction turned round": ('a - b if op == "-"', 'b - a if op == "-"'),
    "any one number left will do": ("return tuple(numbers) == (target,)", "return len(numbers) == 1"),
    "the target may be anywhere": ("return tuple(numbers) == (target,)", "return target in numbers"),
    "a number stays on the table": ("if k not in (i, j)]", "if k != i]"),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_rules(check):
    check(cd)


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations(name):
    """Each deliberate mistake fails a check that the world passes (test_rules)."""
    assert caught_by(load_mutant("snippets/worlds/countdown.py", *MUTATIONS[name]), CHECKS)


@pytest.mark.evidence
def test_solver_against_brute_force_on_many_puzzles(evidence):
    seeds = range(60 if not evidence.full else 1000)
    wrong = sum(cd.reachable(some_numbers(s, 4)) != values(some_numbers(s, 4)) for s in seeds)
    name = "Sets of four numbers where the solver and a brute force on fractions disagree"
    evidence("worlds/countdown", name, value=wrong, bar=0, unit=f"of {len(seeds)}")


@pytest.mark.parametrize("numbers", [(), (0, 3), (-1, 2)])
def test_solve_refuses(numbers):
    with pytest.raises(ValueError, match=re.escape(str(tuple(sorted(numbers))))):
        cd.solve(numbers, 5)


def test_puzzles_are_solvable_and_split():
    rng = random.Random(0)
    for split in ("held-out", "train"):
        for _ in range(100):
            puzzle, steps = cd.make_puzzle(rng, split=split)
            assert cd.verify(puzzle.numbers, puzzle.target, steps)
            assert cd.held_out(puzzle.numbers) == (split == "held-out")
            assert 10 <= puzzle.target <= 99 and len(puzzle.numbers) == 4
    sets = list(itertools.combinations_with_replacement(range(1, 13), 4))
    assert 0.1 < sum(map(cd.held_out, sets)) / len(sets) < 0.15


def test_training_never_sees_held_out_numbers():
    rng = random.Random(1)
    examples = [cd.step_example(rng, 0.1) for _ in range(2000)] + [cd.value_example(rng) for _ in range(500)]
    numbers = [tuple(map(int, prompt.split(">")[0].split())) for prompt, _ in examples]
    assert sum(len(n) == 4 for n in numbers) > 300
    assert not any(cd.held_out(n) for n in numbers)


def test_training_data_says_the_truth():
    rng, yes = random.Random(2), 0
    for _ in range(300):
        prompt, answer = cd.value_example(rng)
        numbers, target = prompt[:-1].split(">")
        assert (answer == "y") == (int(target) in values(tuple(map(int, numbers.split()))))
        yes += answer == "y"
        prompt, step = cd.step_example(rng, 0.0)
        numbers, target = prompt[:-1].split(">")
        left = cd.verify_step(tuple(map(int, numbers.split())), step)
        assert int(target) in values(left)
    assert 30 < yes < 120


# ---------------------------------------------------------------------------------------------------------- the model


@pytest.fixture(scope="module")
def shipped():
    return cd.shipped_model()


def test_the_checkpoint(shipped, tmp_path):
    model, tokenizer = shipped
    assert cd.CHECKPOINT.stat().st_size < 3_000_000
    assert sum(p.numel() for p in model.parameters()) <= 700_000
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    text = "4 7 12 37>80:37-12=25 left: 25 4 7"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("80?y n*/+")["input_ids"]) == 9
    data = bytearray(cd.CHECKPOINT.read_bytes())
    data[-1] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="has the hash"):
        cd.shipped_model(path=tmp_path / "damaged.safetensors")
    with pytest.raises(ValueError, match="no weights at"):
        cd.shipped_model(path=tmp_path / "none.safetensors")


def test_a_step_depends_on_its_own_stream(shipped):
    """The same prompt and generator give the same text, alone or in a batch; tokens are the characters and the EOS."""
    rng = random.Random(3)
    prompts = [cd.make_puzzle(rng)[0].prompt for _ in range(12)]
    together = cd.write_steps(*shipped, prompts, [random.Random(i) for i in range(12)])
    alone = [cd.write_steps(*shipped, [p], [random.Random(i)])[0] for i, p in enumerate(prompts)]
    assert together == alone
    for text, tokens in together:
        assert tokens == min(len(text) + 1, cd.MAX_STEP)


def held_out_states(count, left):
    rng = random.Random(4)
    states = []
    while len(states) < count:
        puzzle, _ = cd.make_puzzle(rng)
        states.append(cd.State(cd.play(puzzle.numbers, rng)[4 - left][0], puzzle.target))
    return states


def area_under_curve(scores, labels):
    positive = [s for s, label in zip(scores, labels, strict=True) if label]
    negative = [s for s, label in zip(scores, labels, strict=True) if not label]
    better = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return better / len(positive) / len(negative)


@pytest.mark.evidence
@pytest.mark.parametrize(("left", "bar"), [(3, 0.6), (2, 0.8)])
def test_the_models_value_ranks_states(shipped, evidence, left, bar):
    states = held_out_states(1500 if evidence.full else 300, left)
    labels = [state.target in cd.reachable(state.numbers) for state in states]
    auc = area_under_curve(cd.chance_of_yes(*shipped, states), labels)
    name = f"Value of states with {left} numbers left: chance that it ranks a solvable one above a hopeless one"
    evidence("worlds/countdown", name, value=auc, bar=bar, better=">=", unit="AUC", note=f"{len(states)} states")


@pytest.mark.evidence
def test_the_models_steps(shipped, evidence):
    """It knows the rules well enough to be searched."""
    rng = random.Random(5)
    puzzles = [cd.make_puzzle(rng)[0] for _ in range(400 if evidence.full else 100)]
    sampled = cd.write_steps(*shipped, [p.prompt for p in puzzles], [random.Random(i) for i in range(len(puzzles))])
    legal = sum(is_legal(p.numbers, text) for p, (text, _) in zip(puzzles, sampled, strict=True)) / len(puzzles)
    evidence("worlds/countdown", "Sampled first steps that are legal", value=legal, bar=0.5, better=">=", unit="share")


def test_the_proposer_counts_every_token_and_pays_once():
    puzzle = cd.State((4, 7, 12), 40)
    texts = ["7*4=28 left: 28 12", "7*4=28 left: 12 28", "7-4=2 left: 2 12", "12+7=19 left: 19 4", "nonsense"]
    asked = []

    def ask(question):
        asked.append(question)
        return [(text, len(text) + 1) for text in texts] if question[1] else 0.25

    proposer = loop.Proposer(ask, random.Random(0), budget=100)
    states = proposer.propose(puzzle)
    assert [(s.numbers, s.step) for s in states] == [((12, 28), texts[0]), ((4, 19), texts[3])]  # without the wrong
    assert proposer.tokens == sum(len(text) + 1 for text in texts)  # and paid for
    assert asked[0][1] == 2
    assert proposer.value(puzzle) == proposer.value(puzzle) == 0.25
    assert proposer.tokens == sum(len(text) + 1 for text in texts) + 1 and len(asked) == 2
    proposer.budget = 0
    with pytest.raises(loop.BudgetSpent):
        proposer.propose(puzzle)
    with pytest.raises(loop.BudgetSpent):
        proposer.value(states[0])
    assert proposer.value(puzzle) == 0.25 and len(asked) == 2  # what is known is free


def test_states_are_equal_however_they_came_about():
    one, two = cd.State((4, 6), 24, "3*2=6 left: 6 4"), cd.State((4, 6), 24, "5+1=6 left: 6 4")
    assert one == two and hash(one) == hash(two) and one != cd.State((4, 6), 25)


def test_training_learns_and_writes_what_is_loaded(tmp_path, monkeypatch, capsys):
    out = tmp_path / "weights.safetensors"
    cd.main(cd.Settings(updates=25, batch=16, out=str(out)))
    printed = capsys.readouterr().out
    monkeypatch.setattr(cd, "CHECKPOINT_SHA256", re.search(r"sha256 (\w{64})", printed)[1])
    model, tokenizer = cd.shipped_model(path=out)
    rng = random.Random(0)
    examples = [cd.step_example(rng, 0.0) for _ in range(32)]
    with torch.no_grad():
        trained = cd.supervised_loss(model, tokenizer, examples)
        fresh = cd.supervised_loss(cd.make_model(len(tokenizer)), tokenizer, examples)
    assert trained < fresh - 0.2


# -------------------------------------------------------------------------------------------------------------- files


def test_read_puzzles(tmp_path):
    path = tmp_path / "puzzles.jsonl"
    path.write_text('{"numbers": [37, 4, 7, 12], "target": 80}\n\n{"numbers": [2, 1], "target": 3, "note": "x"}\n')
    assert cd.read_puzzles(path) == [cd.State((4, 7, 12, 37), 80), cd.State((1, 2), 3)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"numbers": [1, 2]}, "puzzles.jsonl:3: no column 'target'"),
        ({"numbers": "1 2", "target": 3}, "puzzles.jsonl:3: 'numbers' must be list"),
        ({"numbers": [1, 2], "target": "3"}, "puzzles.jsonl:3: 'target' must be int"),
        ({"numbers": [1, "2"], "target": 3}, "puzzles.jsonl:3: want two or more positive integers"),
        ({"numbers": [1, 2.5], "target": 3}, "puzzles.jsonl:3: want"),
        ({"numbers": [1, True], "target": 3}, "puzzles.jsonl:3: want"),
        ({"numbers": [1], "target": 3}, "puzzles.jsonl:3: want"),
        ({"numbers": [1, 0], "target": 3}, "puzzles.jsonl:3: want"),
        ({"numbers": [1, 2], "target": -3}, "puzzles.jsonl:3: want"),
    ],
)
def test_read_puzzles_names_the_line(tmp_path, line, message):
    path = tmp_path / "puzzles.jsonl"
    path.write_text('{"numbers": [1, 2], "target": 3}\n\n' + json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        cd.read_puzzles(path)


def test_read_puzzles_wants_a_file_with_puzzles(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        cd.read_puzzles(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="empty"):
        cd.read_puzzles(tmp_path / "empty.jsonl")


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match="nonsense"):
        lm.pick_device("nonsense")
