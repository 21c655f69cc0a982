"""Monte Carlo tree search over reasoning steps: UCT.

A node is a partial solution, its children are the next steps that a proposer (a language model) writes, and the reward
comes from a verifier at the end. Selection is UCT: Kocsis and Szepesvari, "Bandit Based Monte-Carlo Planning" (2006),
with c_uct = 2 C_p; C_p = 1/sqrt(2) is UCB1's sqrt(2) (Auer, Cesa-Bianchi and Fischer, 2002). Two things differ from
their algorithm, since a path's reward is fixed and only the best path is wanted: each path is rewarded once, and a
subtree that is evaluated whole is closed, so that no simulation is spent where nothing is left to learn.
"""

import math
import random
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

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
    """The best terminal path that was evaluated, the first of equals: a tuple of states from the root to the terminal.

    root: any hashable state. propose(state): the next states, the likeliest first; asked once a state; none means a
    dead end, which counts as reward 0. is_terminal(state). reward(path): finite, best within [0, 1]; called at most
    once a path, with the tuple. simulations: each visits a node that is new or closes a dead end, so twice as many as
    the tree has nodes evaluate all of it. c_uct: weight of exploration. rng: decides the rollouts; the same seed gives
    the same result. value(state): if given, replaces the rollout from a state that is not terminal. stop_at: end at a
    reward this high. max_depth: steps of a path at most. tree: a Node(root) to grow, to look at it afterwards.
    Raises ValueError if simulations < 1, if c_uct is negative, if a reward or value is not finite, or if no terminal
    path was found (NoTerminalPath).
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
        alive = nodes[-1].children is None  # a node whose expansion gave nothing is a dead end
        while value is None and alive and not is_terminal(path[-1]):  # 3. rollout
            options = next_states(path)
            path, alive = (*path, rng.choice(options)) if options else path, bool(options)
        if is_terminal(path[-1]):
            if path not in rewards:
                rewards[path] = finite(reward(path), "reward", path)
            result = rewards[path]
        elif alive:
            result = finite(value(path[-1]), "value", path[-1])
        else:
            result = 0.0  # a dead end
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


if __name__ == "__main__":
    from snippets.reasoning.loop import Settings, main
    from snippets.worlds.lm import run

    run(main, Settings)
