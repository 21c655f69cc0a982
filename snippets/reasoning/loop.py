"""Ways to spend the same number of tokens on a puzzle: one greedy solution, a vote, a verifier's pick, a tree search.

Every token that the model writes is counted, the EOS, illegal steps and failed branches included; what it reads is not.
The tree searches of many puzzles run side by side, so that the model answers all of them in one batch.
"""

import math
import queue
import random
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import mean, pstdev
from typing import NamedTuple, TypeVar

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from snippets.reasoning.mcts import NoTerminalPath, search
from snippets.worlds import lm
from snippets.worlds.countdown import (
    STEP,
    State,
    chance_of_yes,
    make_puzzle,
    reachable,
    read_puzzles,
    shipped_model,
    verify,
    verify_step,
    write_steps,
)

T = TypeVar("T")


def best_of_n(candidates: Sequence[T], reward: Callable[[T], float]) -> T:
    """The candidate with the highest reward, the first of equals: what a verifier picks from independent samples."""
    return max(candidates, key=reward)


def majority_vote(answers: Iterable[Hashable]) -> Hashable:
    """Self-consistency (Wang et al. 2022): the most common answer, the first of equals. None is no vote."""
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


class Chain(NamedTuple):
    """A solution written from start to end: the text of each step and how many tokens it took."""

    steps: list[str]
    tokens: list[int]


def write_chains(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    puzzles: Sequence[State],
    rngs: Sequence[random.Random],
    *,
    temperature: float = 1.0,
) -> list[Chain]:
    """One solution a puzzle, unverified: a step starts from what the one before says is left, right or wrong."""
    chains, states = [Chain([], []) for _ in puzzles], dict(enumerate(puzzles))
    while states:
        prompts = [state.prompt for state in states.values()]
        written = write_steps(model, tokenizer, prompts, [rngs[i] for i in states], temperature=temperature)
        for (i, state), (text, tokens) in zip(list(states.items()), written, strict=True):
            chains[i].steps.append(text)
            chains[i].tokens.append(tokens)
            match = STEP.fullmatch(text)
            left = tuple(sorted(map(int, match[5].split()))) if match else ()
            states[i] = State(left, state.target)
            if len(left) < 2 or len(chains[i].steps) == len(puzzles[i].numbers) - 1:
                del states[i]
    return chains


def solution(chain: Chain) -> tuple[str, ...] | None:
    """What self-consistency votes on: the operations, in any order. None if the chain does not come to one number."""
    match = STEP.fullmatch(chain.steps[-1]) if chain.steps else None
    return tuple(sorted(step.split("=")[0] for step in chain.steps)) if match and " " not in match[5] else None


def first_error(puzzle: State, chain: Chain) -> int:
    """How many tokens a verifier of each step lets the chain write: up to its first illegal step, that one included."""
    numbers = puzzle.numbers
    for k, step in enumerate(chain.steps):
        try:
            numbers = verify_step(numbers, step)
        except ValueError:
            return sum(chain.tokens[: k + 1])
    return sum(chain.tokens)


class BudgetSpent(Exception):
    """A proposer may not write any more."""


class Proposer:
    """The model as a tree search sees it, every token counted. It samples one step fewer than numbers are left.

    ask: as in `lockstep`, answered by `server`. A proposer that has spent its budget raises BudgetSpent.
    """

    def __init__(self, ask: Callable, rng: random.Random, *, budget: float):
        self.ask, self.rng, self.budget = ask, rng, budget
        self.tokens, self.values = 0, {}

    def pay(self) -> None:
        if self.tokens >= self.budget:
            raise BudgetSpent(f"{self.tokens} tokens are written, {self.budget} were allowed")

    def propose(self, state: State) -> list[State]:
        """The distinct states that legal steps among the samples lead to, the most frequent first."""
        self.pay()
        written = self.ask((state, len(state.numbers) - 1, self.rng))
        self.tokens += sum(tokens for _, tokens in written)
        following: Counter[State] = Counter()
        for text, _ in written:
            try:
                following[State(verify_step(state.numbers, text), state.target, text)] += 1
            except ValueError:
                continue  # illegal; its tokens are spent all the same
        return [following_state for following_state, _ in following.most_common()]

    def value(self, state: State) -> float:
        """The model's belief that the target can still be reached, for one token a state."""
        if state not in self.values:
            self.pay()
            self.tokens += 1
            self.values[state] = self.ask((state, 0, self.rng))
        return self.values[state]


def server(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, temperature: float = 1.0) -> Callable:
    """Answers the questions of many Proposers in one batch: (state, samples, rng), or the value where samples is 0."""

    def answer(questions: list[tuple[State, int, random.Random]]) -> list:
        prompts = [state.prompt for state, samples, _ in questions for _ in range(samples)]
        rngs = [rng for _, samples, rng in questions for _ in range(samples)]
        texts = iter(write_steps(model, tokenizer, prompts, rngs, temperature=temperature) if prompts else [])
        asked = [state for state, samples, _ in questions if samples == 0]
        values = iter(chance_of_yes(model, tokenizer, asked) if asked else [])
        return [[next(texts) for _ in range(n)] if n else next(values) for _, n, _ in questions]

    return answer


def lockstep(jobs: Sequence[Callable], answer: Callable[[list], list]) -> list:
    """Run jobs side by side; whenever all that still run wait in ask(x), answer([x, ...]) serves them as one batch.

    A tree search asks for one thing at a time, and a model is fastest with many: so many searches, each written plainly
    as job(ask), share a batch. The order within a batch is that of the jobs, so results do not depend on the threads.
    """
    inbox: queue.Queue = queue.Queue()
    replies: list[queue.Queue] = [queue.Queue() for _ in jobs]

    def work(i: int) -> None:
        def ask(question):
            inbox.put((i, "ask", question))
            reply = replies[i].get()
            if isinstance(reply, BaseException):
                raise reply
            return reply

        try:
            inbox.put((i, "done", jobs[i](ask)))
        except BaseException as error:  # raised again in the caller's thread
            inbox.put((i, "failed", error))

    for i in range(len(jobs)):
        threading.Thread(target=work, args=(i,), daemon=True).start()
    results, waiting, running, failure = [None] * len(jobs), {}, len(jobs), None
    while running:
        i, kind, what = inbox.get()
        if kind == "ask":
            waiting[i] = what
        else:
            running -= 1
            results[i], failure = (what, failure) if kind == "done" else (None, failure or what)
        if waiting and len(waiting) == running:
            order = sorted(waiting)
            try:
                given = [failure] * len(order) if failure else answer([waiting[k] for k in order])
            except Exception as error:
                given = [error] * len(order)
            waiting = {}
            for k, reply in zip(order, given, strict=True):
                replies[k].put(reply)
    if failure:
        raise failure
    return results


def tokens_to_solve(puzzle: State, proposer: Proposer, value: Callable[[State], float] | None, c_uct: float) -> float:
    """How many tokens are written until MCTS evaluates a path that solves the puzzle; infinite beyond the budget.

    A tree of few samples a state is soon searched whole. Then a new one is grown, from new samples.
    """
    while True:
        try:
            path = search(
                puzzle,
                propose=proposer.propose,
                is_terminal=lambda state: len(state.numbers) == 1,
                reward=lambda path: float(path[-1].numbers == (puzzle.target,)),  # illegal steps never get this far
                simulations=1000,  # more than such a tree has nodes
                c_uct=c_uct,
                rng=proposer.rng,
                value=value,
                stop_at=1.0,
            )
        except NoTerminalPath:
            continue
        except BudgetSpent:
            return math.inf
        if path[-1].numbers == (puzzle.target,):
            return proposer.tokens


def sample_chains(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    puzzles: Sequence[State],
    budget: int,
    *,
    seed: int,
    temperature: float,
) -> list[list[Chain]]:
    """For each puzzle, independent solutions until even best-of-N, which stops at errors, has spent the budget."""
    rngs = [random.Random(f"{seed}/{i}/chains") for i in range(len(puzzles))]
    chains: list[list[Chain]] = [[] for _ in puzzles]
    spent = [0] * len(puzzles)
    while todo := [i for i, tokens in enumerate(spent) if tokens < budget for _ in range(4)]:
        mine = [puzzles[i] for i in todo]
        written = write_chains(model, tokenizer, mine, [rngs[i] for i in todo], temperature=temperature)
        for i, chain in zip(todo, written, strict=True):
            chains[i].append(chain)
            spent[i] += first_error(puzzles[i], chain)
    return chains


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    puzzles: Sequence[State],
    budgets: Sequence[int],
    *,
    seed: int,
    temperature: float = 0.6,
    c_uct: float = 0.5,
) -> dict[str, list[float]]:
    """The share of puzzles that each method solves, for each budget of tokens written for a puzzle.

    The exact value is no rival: there the solver judges unfinished work, for nothing. It shows what a perfect judge
    adds to the same proposals.
    """
    everyone, most = range(len(puzzles)), max(budgets)
    greedy = write_chains(model, tokenizer, puzzles, [random.Random(0)] * len(puzzles), temperature=0.0)
    chains = sample_chains(model, tokenizer, puzzles, most, seed=seed, temperature=temperature)

    def solves(i: int, chain: Chain) -> bool:
        return verify(puzzles[i].numbers, puzzles[i].target, chain.steps)

    def affordable(i: int, budget: int, cost: Callable[[Chain], int]) -> list[Chain]:
        ends = accumulate(map(cost, chains[i]))
        return [chain for chain, end in zip(chains[i], ends, strict=True) if end <= budget]

    def by_vote(i: int, budget: int) -> bool:  # nobody checks, so each chain is written to its end
        voters = affordable(i, budget, lambda chain: sum(chain.tokens))
        winner = majority_vote(map(solution, voters))
        return winner is not None and solves(i, next(chain for chain in voters if solution(chain) == winner))

    def by_verifier(i: int, budget: int) -> bool:  # a chain ends at its first illegal step
        candidates = affordable(i, budget, lambda chain: first_error(puzzles[i], chain))
        return bool(candidates) and solves(i, best_of_n(candidates, lambda chain: solves(i, chain)))

    def by_tree(judge: Callable[[Proposer], Callable | None]) -> list[float]:
        def job(i: int, ask: Callable) -> float:
            proposer = Proposer(ask, random.Random(f"{seed}/{i}/tree"), budget=most)
            return tokens_to_solve(puzzles[i], proposer, judge(proposer), c_uct)

        return lockstep([partial(job, i) for i in everyone], server(model, tokenizer, temperature))

    rollouts, value = by_tree(lambda proposer: None), by_tree(lambda proposer: proposer.value)
    exact = by_tree(lambda proposer: lambda state: float(state.target in reachable(state.numbers)))
    methods = {
        "greedy": lambda i, budget: sum(greedy[i].tokens) <= budget and solves(i, greedy[i]),
        "self-consistency": by_vote,
        "best-of-N": by_verifier,
        "MCTS, rollouts": lambda i, budget: rollouts[i] <= budget,
        "MCTS, value": lambda i, budget: value[i] <= budget,
        "MCTS, exact value": lambda i, budget: exact[i] <= budget,
    }
    return {name: [sum(f(i, b) for i in everyone) / len(puzzles) for b in budgets] for name, f in methods.items()}


def draw_curves(rows: dict[str, list[Sequence[float]]], tokens: Sequence[int], out: str | Path) -> None:
    """rows: method -> budget -> one accuracy a seed. Mean and range over seeds as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4))
    for name, row in rows.items():
        (line,) = axes.plot(tokens, [sum(x) / len(x) for x in row], marker="o", label=name)
        axes.fill_between(tokens, [min(x) for x in row], [max(x) for x in row], color=line.get_color(), alpha=0.2)
    axes.set(xscale="log", xlabel="tokens written for a puzzle", ylabel="puzzles solved", ylim=(0, 1))
    axes.legend()
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150, bbox_inches="tight")
    plt.close(figure)


@dataclass
class Settings:
    """The comparison on Countdown, at equal numbers of tokens."""

    model: str | None = field(default=None, metadata={"help": "causal LM, name or path; else the shipped one"})
    data: str | None = field(default=None, metadata={"help": 'JSONL of {"numbers": [...], "target": n}; else held out'})
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, ... (bf16 on cuda)"})
    puzzles: int = field(default=40, metadata={"help": "how many held-out puzzles, without --data"})
    temperature: float = field(default=0.6, metadata={"help": "of sampling; the greedy solution is at 0"})
    c_uct: float = field(default=0.5, metadata={"help": "weight of exploration"})
    budgets: str = field(default="50,100,200,400,800", metadata={"help": "tokens a puzzle"})
    seeds: int = field(default=3, metadata={"help": "how often it is repeated"})
    out: str = field(default="runs/mcts.png", metadata={"help": "where the curve goes"})


def main(settings: Settings) -> None:
    """Print accuracy by tokens for each method, and draw it."""
    torch.set_num_threads(1)  # fastest for tiny models
    if not all(part.strip().isdecimal() and int(part) > 0 for part in settings.budgets.split(",")):
        raise ValueError(f"budgets must be positive integers, separated by commas, got {settings.budgets!r}")
    if settings.puzzles < 1 or settings.seeds < 1:
        raise ValueError(f"puzzles and seeds must be at least 1, got {settings.puzzles} and {settings.seeds}")
    budgets = sorted(map(int, settings.budgets.split(",")))
    device, rng = lm.pick_device(settings.device), random.Random(2)
    made = [make_puzzle(rng)[0] for _ in range(settings.puzzles)]
    puzzles = read_puzzles(settings.data) if settings.data else made
    model, tokenizer = lm.load_model(settings.model, device) if settings.model else shipped_model(device)
    options = {"temperature": settings.temperature, "c_uct": settings.c_uct}
    seeds = tqdm(range(settings.seeds), unit="seed")
    runs = [compare(model, tokenizer, puzzles, budgets, seed=seed, **options) for seed in seeds]
    rows = {name: list(zip(*(run[name] for run in runs), strict=True)) for name in runs[0]}  # method -> budget -> seeds
    print("\n" + "tokens".ljust(18) + "".join(f"{budget:>14}" for budget in budgets))
    for name, row in rows.items():
        print(name.ljust(18) + "".join(f"{mean(x):>8.3f} ±{pstdev(x):.3f}" for x in row))
    draw_curves(rows, budgets, settings.out)
    print(f"mean and standard deviation over {settings.seeds} seeds; curve in {settings.out}")
