"""The methods at equal numbers of tokens: what is counted, what is compared, and what comes of it on Countdown."""

import json
import math
import random
import subprocess
import sys

import pytest

from snippets.reasoning import loop
from snippets.worlds import countdown as cd
from snippets.worlds import lm


@pytest.fixture(scope="module")
def shipped():
    return cd.shipped_model()


def test_majority_vote_and_best_of_n():
    assert loop.majority_vote(["b", "a", None, None, None, "a"]) == "a"
    assert loop.majority_vote(["b", "a"]) == "b"  # the first of equals
    assert loop.majority_vote([None]) is None
    assert loop.best_of_n(["x", "yyy", "zzz"], len) == "yyy"


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


def test_the_proposer_counts_every_token_and_pays_once():
    puzzle = cd.State((4, 7, 12), 40)
    texts = ["7*4=28 left: 28 12", "7*4=28 left: 12 28", "7-4=2 left: 2 12", "12+7=19 left: 19 4", "nonsense"]
    asked = []

    def ask(question):
        asked.append(question)
        return [(text, len(text) + 1) for text in texts] if question[1] else 0.25

    proposer = loop.Proposer(ask, random.Random(0), width=lambda n: n + 2, budget=100)
    states = proposer.propose(puzzle)
    assert [(s.numbers, s.step) for s in states] == [((12, 28), texts[0]), ((4, 19), texts[3])]  # without the wrong
    assert proposer.tokens == sum(len(text) + 1 for text in texts)  # and paid for
    assert proposer.propose(puzzle._replace(step="came another way")) == states and len(asked) == 1
    assert asked[0][1] == 5
    assert proposer.value(puzzle) == proposer.value(puzzle) == 0.25
    assert proposer.tokens == sum(len(text) + 1 for text in texts) + 1 and len(asked) == 2
    proposer.budget = 0
    assert proposer.propose(states[0]) == [] and proposer.value(states[0]) == 0.0 and len(asked) == 2


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
    """Three samples at the root and two below: 50 tokens if the search is lucky at once, 70 if it has to come back."""
    Script(
        monkeypatch,
        {
            "2 3 4>24:": ["3+2=5 left: 5 4", "3*2=6 left: 6 4"],
            "4 5>24:": ["5+4=9 left: 9"],
            "4 6>24:": ["6*4=24 left: 24"],
        },
    )
    puzzle, patterns = cd.State((2, 3, 4), 24), set()
    for seed in range(30):
        results = loop.compare(None, None, [puzzle], [49, 50, 69, 70, 1000], seed=seed)
        patterns.add(tuple(results["MCTS, rollouts"]))
        assert results["greedy"] == [0] * 5  # it adds
    assert patterns == {(0, 1, 1, 1, 1), (0, 0, 0, 1, 1), (0, 0, 0, 0, 0)}  # the last: nobody proposed to multiply


def test_a_chain_that_does_not_fit_does_not_count(monkeypatch):
    Script(monkeypatch, {"2 3 4>24:": ["3*2=6 left: 6 4"], "4 6>24:": ["6*4=24 left: 24"]})
    results = loop.compare(None, None, [cd.State((2, 3, 4), 24)], [19, 20], seed=0)
    assert all(results[name] == [0, 1] for name in ("greedy", "self-consistency", "best-of-N"))
    # one step at each of two states, 3 and 2 samples: 50 tokens
    results = loop.compare(None, None, [cd.State((2, 3, 4), 24)], [49, 50], seed=0)
    assert results["MCTS, rollouts"] == [0, 1]


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
        check = f"Held-out puzzles solved with 800 tokens each: {name}"
        details = {"unit": "share", "seeds": seeds, "spread": spread[name], "note": f"{len(puzzles)} puzzles"}
        evidence("reasoning/loop", check, value=value, curve=None if k else curve, **details)
    assert mean["MCTS, value"] > mean["greedy"] + 0.1
    assert mean["best-of-N"] > mean["self-consistency"]
