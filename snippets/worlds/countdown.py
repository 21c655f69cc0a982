"""Countdown: reach a target from given numbers, one arithmetic step at a time.

A step takes two of the numbers on the table, joins them by + - * or /, and puts the result back: from 4 7 12 37 the
step ``37-12=25 left: 25 4 7`` leaves three numbers. The puzzle is solved when one number is left and it is the
target, so that every number is used exactly once. Results must be positive integers.

The file holds the rules (exact solver, puzzles, a verifier of each step) and the tiny language model that proposes
steps in ``snippets.reasoning.mcts``: a Qwen2-style decoder on characters, whose weights stand beside this file.
``python -m snippets.worlds.countdown`` trains them again (about five CPU minutes on one thread).
"""

import hashlib
import math
import random
import re
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
)

from snippets.worlds import arithmetic, lm
from snippets.worlds.arithmetic import make_tokenizer

CHECKPOINT = Path(__file__).with_suffix(".safetensors")
CHECKPOINT_SHA256 = "1eb47e7107ede401f996519c142821193af32427d99c7d1b8c306cc09eb6efac"
ALPHABET = "0123456789+-*/=>:? leftyn"
MAX_STEP = 40  # characters of a step at most, its EOS included
STEP = re.compile(r"(\d{1,6})([-+*/])(\d{1,6})=(\d{1,6}) left: (\d{1,6}(?: \d{1,6})*)")


@dataclass(frozen=True)
class State:
    """What is on the table. ``numbers`` ascend; ``step`` is the text that led here, so a path of states can be read.

    Two states are equal if the same is on the table: how it came about does not matter for what can be done with it.
    """

    numbers: tuple[int, ...]
    target: int
    step: str = field(default="", compare=False)

    @property
    def question(self) -> str:
        """Asks whether the target can still be reached; the model answers y or n."""
        return f"{' '.join(map(str, self.numbers))}>{self.target}?"

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
    useful = [(step, left) for step, left in legal_steps(numbers) if target in reachable(left)]
    return [[step, *rest] for step, left in useful for rest in solve(left, target)]


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


def make_puzzle(rng: random.Random, *, split: str = "held-out") -> tuple[State, list[str]]:
    """A puzzle with one of its solutions, both from a random play: numbers from 1 to 12, a target from 10 to 99."""
    while True:
        numbers = tuple(sorted(rng.randint(1, 12) for _ in range(4)))
        if held_out(numbers) != (split == "held-out"):
            continue
        path = play(numbers, rng)
        if 10 <= path[-1][0][0] <= 99:
            return State(numbers, path[-1][0][0]), [step for _, step in path[:-1]]


# --------------------------------------------------------------------------------------------------------- the model


def make_model(vocab: int, *, hidden: int = 96, layers: int = 3, seed: int = 0) -> Qwen2ForCausalLM:
    """A Qwen2-style model of 0.28 million parameters, from its config alone; in eval mode."""
    return arithmetic.make_model(vocab, hidden=hidden, layers=layers, width=2, positions=128, seed=seed)


def shipped_model(
    device: torch.device | str = "cpu", path: Path = CHECKPOINT
) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """The shipped model and its tokenizer; ValueError if the file is not the one whose hash is recorded here."""
    if not path.is_file():
        raise ValueError(f"no weights at {str(path)!r}; python -m snippets.worlds.countdown makes them")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != CHECKPOINT_SHA256:
        raise ValueError(f"{str(path)!r} has the hash {digest}, not {CHECKPOINT_SHA256}")
    tokenizer = make_tokenizer(ALPHABET)
    model = make_model(len(tokenizer))
    weights = {name: value.float() for name, value in load_file(path).items()}  # stored in half precision
    missing = model.load_state_dict(weights, strict=False).missing_keys
    if set(missing) - {"lm_head.weight"}:  # tied to the embedding, so not stored
        raise ValueError(f"{str(path)!r} lacks {missing}")
    model.tie_weights()
    return model.to(device, torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32), tokenizer


def write_steps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    rngs: Sequence[random.Random],
    *,
    temperature: float = 1.0,
) -> list[tuple[str, int]]:
    """One step a prompt: (text, tokens written, the EOS included). A prompt's samples depend on its rng alone."""
    written = []
    for start in range(0, len(prompts), 512):
        part = prompts[start : start + 512]
        uniforms = torch.tensor([[rng.random() for _ in range(MAX_STEP)] for rng in rngs[start : start + 512]])
        out = lm.generate(model, tokenizer, part, max_new_tokens=MAX_STEP, temperature=temperature, uniforms=uniforms)
        written += zip(out.texts, out.mask.sum(1).tolist(), strict=True)
    return written


@torch.no_grad()
def chance_of_yes(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, states: Sequence[State]) -> list[float]:
    """The model as a value: P(y) / (P(y) + P(n)) after `4 7 12 37>80?`, its belief that there is a way. One token."""
    yes, no = (tokenizer(answer, add_special_tokens=False)["input_ids"][0] for answer in "yn")
    ids, attention = lm.encode_prompts(tokenizer, [state.question for state in states], model.device)
    places = lm.positions(attention)
    logits = model(input_ids=ids, attention_mask=attention, position_ids=places, logits_to_keep=1).logits
    return (logits[:, -1, yes] - logits[:, -1, no]).float().sigmoid().tolist()  # (B,)


def read_puzzles(path: str | Path) -> list[State]:
    """Puzzles of a JSONL file, lines like {"numbers": [4, 7, 12, 37], "target": 80}; ValueError names a wrong line."""
    records = lm.read_jsonl(path, {"numbers": list, "target": int})
    with open(path, encoding="utf-8") as file:
        lines = [number for number, line in enumerate(file, 1) if line.strip()]
    puzzles = []
    for number, record in zip(lines, records, strict=True):
        numbers = record["numbers"]
        if len(numbers) < 2 or not all(type(x) is int and x > 0 for x in [*numbers, record["target"]]):
            raise ValueError(f"{path}:{number}: want two or more positive integers and a positive target, got {record}")
        puzzles.append(State(tuple(sorted(numbers)), record["target"]))
    return puzzles


# ------------------------------------------------------------------------------------------------------- its training


def step_example(rng: random.Random, noise: float) -> tuple[str, str]:
    """A state on the way of a random play and the step taken there: the play's end is the target, so it is a solution.

    With probability `noise` the step is any legal one instead, so that the model is not too good to need a search.
    """
    while True:
        state, steps = make_puzzle(rng, split="train")
        numbers, k = state.numbers, rng.randrange(len(steps))
        for step in steps[:k]:
            numbers = verify_step(numbers, step)
        if max(numbers) < 1000:
            step = steps[k] if rng.random() >= noise else rng.choice(legal_steps(numbers))[0]
            return State(numbers, state.target).prompt, step


def value_example(rng: random.Random) -> tuple[str, str]:
    """`4 7 25>80?` and y or n, as the solver says, for a state where one or two random steps have led."""
    while True:
        puzzle, _ = make_puzzle(rng, split="train")
        numbers = play(puzzle.numbers, rng)[rng.randint(1, 2)][0]
        if max(numbers) < 1000:
            return State(numbers, puzzle.target).question, "y" if puzzle.target in reachable(numbers) else "n"


def supervised_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, examples: list[tuple[str, str]]
) -> Tensor:
    """Mean cross-entropy of the answers' tokens, the EOS included, given their prompts; padded on the right."""
    rows = [(tokenizer(prompt)["input_ids"], tokenizer(text)["input_ids"] + [1]) for prompt, text in examples]
    width = max(len(prompt) + len(text) for prompt, text in rows)
    ids = torch.tensor([p + t + [0] * (width - len(p + t)) for p, t in rows])  # (B, L)
    counts = torch.tensor([[0] * len(p) + [1] * len(t) + [0] * (width - len(p + t)) for p, t in rows]).bool()
    hidden = model.base_model(input_ids=ids, use_cache=False)[0][:, :-1]  # (B, L - 1, D); causal: pads come last
    return cross_entropy(model.lm_head(hidden[counts[:, 1:]]), ids[:, 1:][counts[:, 1:]])


@dataclass
class Settings:
    """How the weights are made."""

    updates: int = field(default=1450, metadata={"help": "optimizer steps; all of them take under five CPU minutes"})
    batch: int = field(default=64, metadata={"help": "steps an update, and half as many as the questions"})
    lr: float = field(default=3e-3, metadata={"help": "learning rate at its peak"})
    noise: float = field(default=0.1, metadata={"help": "share of random legal steps among the training steps"})
    seed: int = field(default=0, metadata={"help": "of the weights and the puzzles"})
    out: str = field(default=str(CHECKPOINT), metadata={"help": "where the weights go"})


def main(settings: Settings) -> None:
    """Supervised training on solutions of puzzles that are not held out."""
    torch.set_num_threads(1)
    tokenizer = make_tokenizer(ALPHABET)
    model = make_model(len(tokenizer), seed=settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01)
    rng, start, mean = random.Random(settings.seed), time.process_time(), [0.0, 0.0]
    bar = tqdm(range(settings.updates), mininterval=1.0)
    for update in bar:
        cosine = 0.5 + 0.5 * math.cos(math.pi * update / settings.updates)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * min(1.0, (update + 1) / 50) * max(0.02, cosine)
        steps = [step_example(rng, settings.noise) for _ in range(settings.batch)]
        questions = [value_example(rng) for _ in range(2 * settings.batch)]
        losses = [supervised_loss(model, tokenizer, examples) for examples in (steps, questions)]
        optimizer.zero_grad()
        (losses[0] + losses[1]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = [m + max(0.02, 1 / (update + 1)) * (loss.item() - m) for m, loss in zip(mean, losses, strict=True)]
        bar.set_postfix(step=f"{mean[0]:.3f}", question=f"{mean[1]:.3f}", refresh=False)
    weights = {k: v.half().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(weights, settings.out)
    digest = hashlib.sha256(Path(settings.out).read_bytes()).hexdigest()
    print(f"{time.process_time() - start:.0f} CPU seconds; sha256 {digest}  {settings.out}")


if __name__ == "__main__":
    lm.run(main, Settings)
