"""Monte Carlo tree search over reasoning steps (UCT), beside the ways to spend tokens without a tree.

A node is a partial solution, its children are the next steps that a proposer (a language model) writes, and the reward
comes from a verifier at the end. Selection is UCT: Kocsis and Szepesvari, "Bandit Based Monte-Carlo Planning" (2006),
with c_uct = 2 C_p; C_p = 1/sqrt(2) is UCB1's sqrt(2) (Auer, Cesa-Bianchi and Fischer, 2002). Two things differ from
their algorithm, since a path's reward is fixed and only the best path is wanted: a path is rewarded once and remembered,
and a subtree that is evaluated whole is closed, so that no simulation is spent where nothing is left to learn.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from statistics import mean, pstdev
from typing import TypeVar

T = TypeVar("T")
State = Hashable
Path = tuple[State, ...]  # the states from the root to the last one, both included


@dataclass(eq=False)
class Node:
    """A path in the tree. Q = total / visits is the mean of what was backed up through it."""

    state: State
    children: list["Node"] | None = None  # None: not expanded; []: a dead end
    visits: int = 0
    total: float = 0.0
    closed: bool = False  # all paths through it are evaluated


def uct_score(total: float, visits: int, parent_visits: int, c_uct: float) -> float:
    """Q + c_uct * sqrt(ln N_parent / N): what a child is worth, optimistically. Infinite for a child never visited."""
    if visits == 0:
        return math.inf
    return total / visits + c_uct * math.sqrt(math.log(parent_visits) / visits)


class NoTerminalPath(ValueError):
    """The search found no way from the root to a terminal state."""


def search(
    root: State,
    *,
    propose: Callable[[State], Iterable[State]],
    is_terminal: Callable[[State], bool],
    reward: Callable[[Path], float],
    simulations: int,
    c_uct: float = 1.4,
    rng: random.Random,
    value: Callable[[State], float] | None = None,
    stop_at: float = math.inf,
    max_depth: int = 1000,
    tree: Node | None = None,
) -> Path:
    """The best terminal path that was evaluated, the first of equals: the tuple of its states, root and terminal included.

    root: any hashable state. propose(state): the next states, the likeliest first; asked once a state; none means a dead
    end, which counts as reward 0. is_terminal(state). reward(path): finite, best within [0, 1]; called at most once a
    path, with the tuple. simulations: each visits a node that is new or closes a dead end, so twice as many as the tree
    has nodes evaluate all of it. c_uct: weight of exploration. rng: decides the rollouts; the same seed gives the same result.
    value(state): if given, replaces the rollout from a state that is not terminal. stop_at: end at a reward this high.
    max_depth: steps of a path at most. tree: a Node(root) to grow, for those who want to look at it afterwards.
    Raises ValueError if simulations < 1, if c_uct is negative, if a reward or value is not finite, or if no terminal path
    was found (NoTerminalPath).
    """
    if simulations < 1:
        raise ValueError(f"simulations must be at least 1, got {simulations}")
    if not 0 <= c_uct < math.inf:
        raise ValueError(f"c_uct must be finite and at least 0, got {c_uct}")
    tree, rewards, proposals = tree or Node(root), {}, {}

    def finite(number: float, what: str, where: object) -> float:
        if not math.isfinite(number):
            raise ValueError(f"the {what} of {where!r} must be finite, got {number}")
        return float(number)

    def next_states(path: Path) -> list[State]:
        if len(path) > max_depth:
            return []
        if path[-1] not in proposals:  # a proposer may be random, and costs tokens
            proposals[path[-1]] = list(dict.fromkeys(propose(path[-1])))
        return [state for state in proposals[path[-1]] if state not in path]  # going in circles is no progress

    for _ in range(simulations):
        nodes = [tree]
        while nodes[-1].children:  # 1. selection
            parent = nodes[-1]
            candidates = [child for child in parent.children if not child.closed]
            nodes.append(max(candidates, key=lambda c: uct_score(c.total, c.visits, parent.visits, c_uct)))  # noqa: B023
        path = tuple(node.state for node in nodes)
        if (nodes[-1].visits or len(path) == 1) and not is_terminal(path[-1]):  # 2. expansion, on the second visit
            nodes[-1].children = [Node(state) for state in next_states(path)]
            nodes += nodes[-1].children[:1]
            path = tuple(node.state for node in nodes)
        options = nodes[-1].children is None  # False at a dead end
        while value is None and options and not is_terminal(path[-1]):  # 3. rollout
            if options := next_states(path):
                path += (rng.choice(options),)
        if is_terminal(path[-1]):
            if path not in rewards:
                rewards[path] = finite(reward(path), "reward", path)
            result = rewards[path]
        elif not options:
            result = 0.0  # a dead end
        else:
            result = finite(value(path[-1]), "value", path[-1])
        for node in reversed(nodes):  # 4. backup, the leaf first, since a parent is closed by its children
            node.visits += 1
            node.total += result
            node.closed = is_terminal(node.state) if node.children is None else all(c.closed for c in node.children)
        if tree.closed or rewards.get(path, -math.inf) >= stop_at:
            break
    if not rewards:
        why = "there is none" if tree.closed else f"{simulations} simulations found none"
        raise NoTerminalPath(f"no path from {root!r} to a terminal state: {why}")
    return max(rewards, key=rewards.get)


def best_of_n(candidates: Sequence[T], reward: Callable[[T], float]) -> T:
    """The candidate with the highest reward, the first of equals: what a verifier picks from independent samples."""
    return max(candidates, key=reward)


def majority_vote(answers: Iterable[Hashable]) -> Hashable:
    """Self-consistency (Wang et al. 2022): the most common answer, the first of equals. None is no vote."""
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


def tokens_to_solve(puzzle, proposer, *, use_value: bool) -> float:
    """How many tokens MCTS lets a Countdown proposer write until the verifier accepts a path; infinite if it never does."""
    try:
        path = search(
            puzzle,
            propose=proposer.propose,
            is_terminal=lambda state: len(state.numbers) == 1,
            reward=lambda path: float(path[-1].numbers == (puzzle.target,)),  # illegal steps never get this far
            simulations=100_000,  # the proposer's budget ends the search: without new states the tree is soon closed
            rng=proposer.rng,
            value=proposer.value if use_value else None,
            stop_at=1.0,
        )
    except NoTerminalPath:
        return math.inf
    return proposer.tokens if path[-1].numbers == (puzzle.target,) else math.inf


def compare(model, tokenizer, puzzles, budgets: Sequence[int], *, seed: int, width=lambda n: n) -> dict[str, list[float]]:
    """The share of Countdown puzzles that each method solves, for each budget of tokens written for a puzzle."""
    from snippets.worlds import countdown as cd

    everyone, most = range(len(puzzles)), max(budgets)
    rngs = [random.Random(f"{seed}/{i}/chains") for i in everyone]
    greedy = cd.write_chains(model, tokenizer, puzzles, rngs, temperature=0.0)
    chains: list[list] = [[] for _ in everyone]  # the same samples serve the vote and the verifier
    while todo := [i for i in everyone if sum(sum(chain.tokens) for chain in chains[i]) < most for _ in range(4)]:
        written = cd.write_chains(model, tokenizer, [puzzles[i] for i in todo], [rngs[i] for i in todo])
        for i, chain in zip(todo, written, strict=True):
            chains[i].append(chain)

    def solves(i: int, chain) -> bool:
        return chain is not None and cd.verify(puzzles[i].numbers, puzzles[i].target, chain.steps)

    def within(i: int, budget: int, cost: Callable) -> list:
        ends = accumulate(cost(chain) for chain in chains[i])
        return [chain for chain, end in zip(chains[i], ends, strict=False) if end <= budget]

    def vote(i: int, budget: int) -> bool:  # without a verifier: every chain is written to its end
        voters = {cd.solution(chain): chain for chain in reversed(within(i, budget, lambda chain: sum(chain.tokens)))}
        winner = majority_vote(map(cd.solution, within(i, budget, lambda chain: sum(chain.tokens))))
        return solves(i, voters.get(winner))

    def best(i: int, budget: int) -> bool:  # the verifier stops a chain at its first illegal step
        candidates = within(i, budget, lambda chain: cd.first_error(puzzles[i], chain))
        return bool(candidates) and solves(i, best_of_n(candidates, lambda chain: solves(i, chain)))

    def tree(use_value: bool) -> list[float]:
        def job(i: int, ask: Callable) -> float:
            proposer = cd.Proposer(ask, random.Random(f"{seed}/{i}/tree"), width=width, budget=most)
            return tokens_to_solve(puzzles[i], proposer, use_value=use_value)

        return cd.lockstep([partial(job, i) for i in everyone], cd.server(model, tokenizer))

    rollouts, value = tree(use_value=False), tree(use_value=True)
    methods = {
        "greedy": lambda i, budget: sum(greedy[i].tokens) <= budget and solves(i, greedy[i]),
        "self-consistency": vote,
        "best-of-N": best,
        "MCTS, rollouts": lambda i, budget: rollouts[i] <= budget,
        "MCTS, value": lambda i, budget: value[i] <= budget,
    }
    return {name: [sum(f(i, b) for i in everyone) / len(puzzles) for b in budgets] for name, f in methods.items()}


@dataclass
class Settings:
    """The comparison on Countdown, at equal numbers of tokens."""

    model: str | None = field(default=None, metadata={"help": "causal LM, name or path; else the shipped one"})
    data: str | None = field(default=None, metadata={"help": 'JSONL of {"numbers": [...], "target": n}; else held out'})
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, ... (bf16 on cuda)"})
    puzzles: int = field(default=40, metadata={"help": "how many held-out puzzles, without --data"})
    budgets: str = field(default="50,100,200,400,800", metadata={"help": "tokens a puzzle"})
    seeds: int = field(default=3, metadata={"help": "how often it is repeated"})
    out: str = field(default="runs/mcts.png", metadata={"help": "where the curve goes"})


def main(settings: Settings) -> None:
    """Print accuracy by tokens for each method, and draw it."""
    import torch
    from tqdm import tqdm

    from snippets.worlds import countdown as cd
    from snippets.worlds import lm

    torch.set_num_threads(1)  # fastest for tiny models
    budgets = [int(budget) for budget in settings.budgets.split(",")]
    if min(budgets) < 1 or settings.puzzles < 1 or settings.seeds < 1:
        raise ValueError("budgets, puzzles and seeds must be at least 1")
    device, rng = lm.pick_device(settings.device), random.Random(2)
    model, tokenizer = lm.load_model(settings.model, device) if settings.model else cd.shipped_model(device)
    made = [cd.make_puzzle(rng)[0] for _ in range(settings.puzzles)]
    puzzles = cd.read_puzzles(settings.data) if settings.data else made
    runs = [compare(model, tokenizer, puzzles, budgets, seed=seed) for seed in tqdm(range(settings.seeds), unit="seed")]
    rows = {name: list(zip(*(run[name] for run in runs), strict=True)) for name in runs[0]}  # method -> budget -> seeds
    print("\n" + "tokens".ljust(18) + "".join(f"{budget:>14}" for budget in budgets))
    for name, row in rows.items():
        print(name.ljust(18) + "".join(f"{mean(x):>8.3f} ±{pstdev(x):.3f}" for x in row))
    cd.draw_curves(rows, budgets, settings.out)
    print(f"mean and standard deviation over {settings.seeds} seeds; curve in {settings.out}")


if __name__ == "__main__":
    from snippets.worlds.lm import run

    run(main, Settings)
