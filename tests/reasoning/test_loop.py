"""The methods at equal numbers of tokens: what is counted, what is compared, and what comes of it on Countdown."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from snippets.reasoning import loop
from snippets.worlds import countdown as cd
from snippets.worlds import lm

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def shipped():
    return cd.shipped_model()


def test_chains(shipped):
    """Tokens up to the first illegal step, against a walk of its own; what is verified is complete."""
    rng = random.Random(6)
    puzzles = [cd.make_puzzle(rng)[0] for _ in range(40)]
    chains = loop.write_chains(*shipped, puzzles, [random.Random(i) for i in range(40)])
    complete = 0
    for puzzle, chain in zip(puzzles, chains, strict=True):
        assert len(chain.steps) == len(chain.tokens) <= 3
        legal = 0
        numbers = puzzle.numbers
        options = dict(cd.legal_steps(numbers))
        while legal < len(chain.steps) and chain.steps[legal] in options:
            options = dict(cd.legal_steps(options[chain.steps[legal]]))
            legal += 1
        assert loop.first_error(puzzle, chain) == sum(chain.tokens[: legal + 1])
        complete += loop.solution(chain) is not None
        assert cd.verify(puzzle.numbers, puzzle.target, chain.steps) <= (loop.solution(chain) is not None)
    assert complete > 10


def test_solutions_are_compared_without_order():
    one = loop.Chain(["7-3=4 left: 4 2 5", "5*2=10 left: 4 10", "10-4=6 left: 6"], [1, 1, 1])
    two = loop.Chain(["5*2=10 left: 10 3 7", "7-3=4 left: 4 10", "10-4=6 left: 6"], [1, 1, 1])
    assert loop.solution(one) == loop.solution(two) != loop.solution(loop.Chain(["7+3=10 left: 10"], [1]))
    assert loop.solution(loop.Chain(["7-3=4 left: 4 2"], [1])) is None  # two numbers are left
    assert loop.solution(loop.Chain(["7-3=4"], [1])) is None


def test_lockstep_makes_full_batches_in_order():
    batches = []

    def job(i, ask):
        return [ask((i, k)) for k in range(i)]

    def answer(questions):
        batches.append(questions)
        return [10 * i + k for i, k in questions]

    results = loop.lockstep([lambda ask, i=i: job(i, ask) for i in (3, 0, 2, 1)], answer)
    assert results == [[30, 31, 32], [], [20, 21], [10]]
    assert batches == [[(3, 0), (2, 0), (1, 0)], [(3, 1), (2, 1)], [(3, 2)]]


@pytest.mark.parametrize("where", ["job", "answer"])
def test_lockstep_passes_errors_on(where):
    def job(ask):
        if ask(1) and where == "job":
            raise ZeroDivisionError("in the job")

    def answer(questions):
        if where == "answer":
            raise ZeroDivisionError("in the answer")
        return questions

    with pytest.raises(ZeroDivisionError, match=where):
        loop.lockstep([job, job], answer)


class Script:
    """A model that writes given texts, 10 tokens each, in place of the real one; its value is always 0.5."""

    def __init__(self, monkeypatch, texts):
        self.texts = texts
        monkeypatch.setattr(loop, "write_steps", self.write)
        monkeypatch.setattr(loop, "chance_of_yes", lambda model, tokenizer, states: [0.5] * len(states))

    def write(self, model, tokenizer, prompts, rngs, *, temperature=1.0):
        texts = [self.texts[prompt] for prompt in prompts]
        return [(rng.choice(t) if temperature else t[0], 10) for t, rng in zip(texts, rngs, strict=True)]


def test_what_a_search_pays(monkeypatch):
    """Two samples at the root and one below: 30 tokens a tree, and 10 more if the first of two children was wrong."""
    right = "3*2=6 left: 6 4"
    texts = {
        "2 3 4>24:": ["3+2=5 left: 5 4", right],
        "4 5>24:": ["5+4=9 left: 9"],
        "4 6>24:": ["6*4=24 left: 24"],
    }
    Script(monkeypatch, texts)
    server, costs = loop.server(None, None), []
    for seed in range(40):
        roots = []  # the two samples at the root, of each tree

        def ask(question, roots=roots):
            (reply,) = server([question])
            roots.extend([[text for text, _ in reply]] * (question[0].numbers == (2, 3, 4)))
            return reply

        proposer = loop.Proposer(ask, random.Random(seed), budget=1000)
        costs.append(loop.tokens_to_solve(cd.State((2, 3, 4), 24), proposer, None, 1.4))
        assert [right in samples for samples in roots] == [False] * (len(roots) - 1) + [True]
        assert costs[-1] == 30 * len(roots) + 10 * (roots[-1][0] != right)
    assert {30, 40, 60, 70} <= set(costs)
    proposer = loop.Proposer(proposer.ask, random.Random(0), budget=20)
    assert loop.tokens_to_solve(cd.State((2, 3, 4), 24), proposer, None, 1.4) == float("inf")


def test_a_chain_that_does_not_fit_does_not_count(monkeypatch):
    Script(monkeypatch, {"2 3 4>24:": ["3*2=6 left: 6 4"], "4 6>24:": ["6*4=24 left: 24"]})
    results = loop.compare(None, None, [cd.State((2, 3, 4), 24)], [19, 20], seed=0)
    assert all(results[name] == [0, 1] for name in ("greedy", "self-consistency", "best-of-N"))
    # two samples at the root, one below; the value is asked of the child, for one token
    results = loop.compare(None, None, [cd.State((2, 3, 4), 24)], [29, 30, 31], seed=0)
    assert results["MCTS, rollouts"] == [0, 1, 1] and results["MCTS, value"] == [0, 0, 1]


def test_the_vote_goes_to_the_most_common_solution_right_or_wrong(monkeypatch):
    """Two wrong solutions outvote a right one; the verifier is not asked."""
    Script(
        monkeypatch,
        {
            "2 3 4>24:": ["3+2=5 left: 5 4"] * 2 + ["3*2=6 left: 6 4"],
            "4 5>24:": ["5+4=9 left: 9"],
            "4 6>24:": ["6*4=24 left: 24"],
        },
    )
    results = loop.compare(None, None, [cd.State((2, 3, 4), 24)] * 20, [2000], seed=0)
    assert results["self-consistency"] == [0] and results["best-of-N"] == [1]


def test_the_same_seed_gives_the_same_comparison(shipped):
    rng = random.Random(8)
    puzzles = [cd.make_puzzle(rng)[0] for _ in range(6)]
    runs = [loop.compare(*shipped, puzzles, [60, 200], seed=seed) for seed in (0, 0)]
    assert runs[0] == runs[1]
    for name, row in runs[0].items():
        assert all(0 <= x <= 1 for x in row)
        assert name == "self-consistency" or row == sorted(row)  # a vote can turn, what is verified stays


BUDGETS = [50, 100, 200, 400, 800, 1600]


@pytest.mark.evidence
def test_accuracy_at_equal_tokens(shipped, evidence):
    """Held-out puzzles; one seed, few puzzles and small budgets in the short form."""
    rng = random.Random(2)
    seeds = range(5) if evidence.full else range(1)
    puzzles = [cd.make_puzzle(rng)[0] for _ in range(200 if evidence.full else 40)]
    budgets = BUDGETS if evidence.full else BUDGETS[:5]
    runs = [loop.compare(*shipped, puzzles, budgets, seed=seed) for seed in seeds]
    at = budgets.index(800)
    spread = {name: [run[name][at] for run in runs] for name in runs[0]}
    mean = {name: sum(values) / len(values) for name, values in spread.items()}
    curve = {
        "x": budgets,
        "y": {name: [run[name] for run in runs] for name in runs[0]},
        "xlabel": "tokens written for a puzzle",
        "ylabel": "share of puzzles solved",
    }
    for k, (name, value) in enumerate(mean.items()):
        check = f"Share of held-out puzzles solved with 800 tokens each: {name}"
        details = { "seeds": seeds, "spread": spread[name], "note": f"{len(puzzles)} puzzles"}
        evidence("reasoning/loop", check, value=value, curve=None if k else curve, **details)
    for name in ("best-of-N", "MCTS, rollouts", "MCTS, value"):
        gain = [s - g for s, g in zip(spread[name], spread["greedy"], strict=True)]
        check = f"Share that {name} solves beyond greedy, with 800 tokens"
        evidence("reasoning/loop", check, value=sum(gain) / len(gain), bar=0.2, better=">=", seeds=seeds, spread=gain)
    edge = [m - b for m, b in zip(spread["MCTS, rollouts"], spread["best-of-N"], strict=True)]
    check = "Share that MCTS with rollouts solves beyond best-of-N, with 800 tokens"
    evidence("reasoning/loop", check, value=sum(edge) / len(edge), seeds=seeds, spread=edge)


# ----------------------------------------------------------------------------------------------------------- the demo


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, shipped):
    """A Hugging Face model directory, as --model takes it."""
    folder = tmp_path_factory.mktemp("model")
    cd.make_model(len(shipped[1]), hidden=16, layers=1).save_pretrained(folder)
    shipped[1].save_pretrained(folder)
    return folder


def test_demo_with_a_model_and_data(tiny, tmp_path):
    data, out = tmp_path / "puzzles.jsonl", tmp_path / "curve.png"
    data.write_text('{"numbers": [2, 3, 4], "target": 24}\n{"numbers": [12, 7, 4, 37], "target": 80}\n')
    command = [sys.executable, "-m", "snippets.reasoning.mcts", "--model", tiny, "--data", data, "--device", "cpu"]
    command += ["--budgets", "60,120", "--seeds", "2", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(b"\x89PNG")
    table = [line.split() for line in done.stdout.splitlines()]
    assert ["tokens", "60", "120"] in table
    for name in ("greedy", "self-consistency", "best-of-N", "MCTS, rollouts", "MCTS, value", "MCTS, exact value"):
        assert any(line.startswith(name) for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("flags", "content", "message"),
    [
        (["--model", "./none"], None, "no model at './none'"),
        (["--data", "none.jsonl"], None, "no data at 'none.jsonl'"),
        ([], '{"numbers": [1, 2]}', "puzzles.jsonl:1: no column 'target'"),
        ([], '{"numbers": [1, 2], "target": 3}\n{"numbers": [1, "2"], "target": 3}', "puzzles.jsonl:2: want two"),
        ([], '{"numbers": [1, 2], "target": "3"}', "puzzles.jsonl:1: 'target' must be int"),
        ([], "{", "puzzles.jsonl:1: not JSON"),
        ([], "", "empty"),
        (["--device", "abacus"], None, "device 'abacus' cannot be used"),
        (["--budgets", "100,x"], None, "budgets must be positive integers"),
        (["--budgets", "0"], None, "budgets must be positive integers"),
        (["--seeds", "0"], None, "puzzles and seeds must be at least 1"),
    ],
)
def test_demo_refuses_bad_input(flags, content, message, tmp_path, monkeypatch, capsys):
    """One line on stderr and exit code 2."""
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "puzzles.jsonl").write_text(content)
        flags = [*flags, "--data", "puzzles.jsonl"]
    monkeypatch.setattr(sys, "argv", ["mcts", *flags])
    with pytest.raises(SystemExit) as stop:
        lm.run(loop.main, loop.Settings)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("runs/*"))
