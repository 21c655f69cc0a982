"""Countdown: reach a target from given numbers, one arithmetic step at a time.

A step takes two of the numbers on the table, joins them by + - * or /, and puts the result back: from 4 7 12 37 the
step ``37-12=25 left: 25 4 7`` leaves three numbers. The puzzle is solved when one number is left and it is the
target, so that every number is used exactly once. Results must be positive integers.

The file holds the rules (exact solver, puzzles, a verifier of each step) and the tiny language model that proposes
steps in ``snippets.reasoning.mcts``: a Qwen2-style decoder on characters, whose weights stand beside this file.
``python -m snippets.worlds.countdown`` trains them again (about five CPU minutes on one thread).
"""

import hashlib
import json
import queue
import random
import re
import threading
import time
import zlib
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CHECKPOINT = Path(__file__).with_suffix(".safetensors")
CHECKPOINT_SHA256 = "0000000000000000000000000000000000000000000000000000000000000000"
ALPHABET = "0123456789+-*/=>:? left:yn"  # "left:" is written by letters too; duplicates are dropped below
STEP = re.compile(r"(\d{1,6})([-+*/])(\d{1,6})=(\d{1,6}) left: (\d{1,6}(?: \d{1,6})*)")


class State(NamedTuple):
    """What is on the table. ``numbers`` ascend; ``step`` is the text that led here, so a path of states can be read."""

    numbers: tuple[int, ...]
    target: int
    step: str = ""

    @property
    def prompt(self) -> str:
        """What the model sees: a state is enough, since what was done before does not change what is left."""
        return f"{' '.join(map(str, self.numbers))}>{self.target}:"


# ---------------------------------------------------------------------------------------------------------- the rules


def combine(a: int, op: str, b: int) -> int | None:
    """The result of one operation, or None where the rules forbid it (zero, negative, or a remainder)."""
    if op == "/":
        return a // b if b and a % b == 0 else None
    result = a + b if op == "+" else a - b if op == "-" else a * b
    return result if result > 0 else None


def legal_steps(numbers: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Every legal step from here, as (text, numbers left); one text for each distinct operation on values."""
    found = {}
    for i, a in enumerate(numbers):
        for j, b in enumerate(numbers):
            rest = [x for k, x in enumerate(numbers) if k not in (i, j)]
            for op in "+-*/":
                # + and * do not care about order: keep the one with the larger number first
                if i == j or (op in "+*" and (a, i) < (b, j)) or (result := combine(a, op, b)) is None:
                    continue
                left = (result, *sorted(rest))
                found[f"{a}{op}{b}={result} left: {' '.join(map(str, left))}"] = tuple(sorted(left))
    return list(found.items())


@lru_cache(maxsize=200_000)
def reachable(numbers: tuple[int, ...]) -> frozenset[int]:
    """All values that can be the last number left: the exact solver, by enumeration. ``numbers`` ascend."""
    if len(numbers) == 1:
        return frozenset(numbers)
    return frozenset().union(*(reachable(left) for left in {left for _, left in legal_steps(numbers)}))


def solve(numbers: tuple[int, ...], target: int) -> list[list[str]]:
    """All solutions, each a list of steps; empty where there is none. Four numbers take milliseconds."""
    numbers = tuple(sorted(numbers))
    if not numbers or min(numbers) < 1:
        raise ValueError(f"numbers must be positive integers, got {numbers}")
    if len(numbers) == 1:
        return [[]] if numbers[0] == target else []
    return [[step, *rest] for step, left in legal_steps(numbers) if target in reachable(left) for rest in solve(left, target)]


def verify_step(numbers: tuple[int, ...], step: str) -> tuple[int, ...]:
    """The numbers left after a legal step, in ascending order. Raises ValueError saying what is wrong with the step."""
    match = STEP.fullmatch(step)
    if match is None:
        raise ValueError(f"not of the form 'a+b=c left: ...': {step!r}")
    a, op, b, result = int(match[1]), match[2], int(match[3]), int(match[4])
    table = Counter(numbers)
    table.subtract([a, b])
    if min(table.values()) < 0:
        raise ValueError(f"{step!r} uses a number that is not among {numbers}")
    if combine(a, op, b) != result:
        raise ValueError(f"{a}{op}{b} is not {result} in positive integers")
    table[result] += 1
    left = tuple(sorted(table.elements()))
    if sorted(map(int, match[5].split())) != list(left):
        raise ValueError(f"{step!r} leaves {left}")
    return left


def verify(numbers: tuple[int, ...], target: int, steps: list[str]) -> bool:
    """True if every step is legal and one number is left, the target: the outcome verifier of the whole solution."""
    try:
        for step in steps:
            numbers = verify_step(numbers, step)
    except ValueError:
        return False
    return tuple(numbers) == (target,)


def held_out(numbers: tuple[int, ...]) -> bool:
    """One set of four numbers in eight is never trained on, whatever the target (crc32: the same on every machine)."""
    return len(numbers) == 4 and zlib.crc32(repr(tuple(sorted(numbers))).encode()) % 8 == 0


def play(numbers: tuple[int, ...], rng: random.Random) -> list[tuple[tuple[int, ...], str]]:
    """Random legal steps to the end: [(numbers, step), ..., ((last,), "")]."""
    path = []
    while len(numbers) > 1:
        step, left = rng.choice(legal_steps(numbers))
        path.append((numbers, step))
        numbers = left
    return [*path, (numbers, "")]


def make_puzzle(rng: random.Random, *, size: int = 4, split: str = "held-out", largest: int = 20) -> tuple[State, list[str]]:
    """A puzzle with its (random) solution: numbers from 1 to ``largest``, target from 10 to 99. Always solvable."""
    while True:
        numbers = tuple(sorted(rng.randint(1, largest) for _ in range(size)))
        if held_out(numbers) != (split == "held-out") and size == 4:
            continue
        path = play(numbers, rng)
        if 10 <= path[-1][0][0] <= 99:
            return State(numbers, path[-1][0][0]), [step for _, step in path[:-1]]
