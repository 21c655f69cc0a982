"""Small Markov decision processes as tensors: every value is a linear system, every expectation a
finite sum.

States and actions are numbered; `transitions[s, a, t]` is the chance of t after a in s and
`rewards[s, a, t]` what that step pays, in units of reward. A terminal state leads to itself and
pays nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MDP:
    """transitions and rewards (S, A, S), start (S,) probabilities, terminal (S,) bool, gamma.

    ValueError on shapes that disagree, probabilities that are negative or do not sum to 1, a
    terminal state that is left or pays, rewards that are not finite, gamma outside [0, 1].
    """

    transitions: Tensor
    rewards: Tensor
    start: Tensor
    terminal: Tensor
    gamma: float = 1.0

    def __post_init__(self):
        shape = tuple(self.transitions.shape)
        states = shape[0] if shape else 0
        if len(shape) != 3 or shape[2] != states or tuple(self.rewards.shape) != shape:
            raise ValueError(
                f"transitions {shape} and rewards {tuple(self.rewards.shape)} disagree"
            )
        if self.start.shape != (states,) or self.terminal.shape != (states,):
            shapes = f"start {tuple(self.start.shape)}, terminal {tuple(self.terminal.shape)}"
            raise ValueError(f"{shapes}: not one entry for each of the {states} states")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1], got {self.gamma}")
        for name, chances in (("transitions", self.transitions), ("start", self.start)):
            total = chances.sum(-1)
            if not ((chances >= 0).all() and ((total - 1).abs() <= 1e-6).all()):  # NaN is neither
                raise ValueError(f"{name}: not probabilities, they sum to {total.tolist()}")
        if not self.rewards.isfinite().all():
            raise ValueError("rewards must be finite")
        for s in self.terminal.nonzero().flatten().tolist():
            if (self.transitions[s, :, s] != 1).any() or (self.rewards[s, :, s] != 0).any():
                raise ValueError(f"the terminal state {s} is left, or pays a reward")

    @property
    def expected_rewards(self) -> Tensor:
        """(S, A): the mean reward of an action, over the states that it leads to."""
        return (self.transitions * self.rewards).sum(-1)


def sample(
    mdp: MDP, states: Tensor, actions: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One step of N copies: states and actions (N,) -> next states (N,), rewards (N,)."""
    chances = mdp.transitions[states, actions]  # (N, S)
    after = torch.multinomial(chances, 1, generator=generator).squeeze(-1)  # (N,)
    return after, mdp.rewards[states, actions, after]


def from_gymnasium(name: str, gamma: float = 1.0, **options) -> MDP:
    """The table of one of Gymnasium's toy-text environments: CliffWalking-v1, FrozenLake-v1, Taxi-v4.

    Its `P[s][a]` lists (chance, next state, reward, terminated). A step that terminates leads to a
    terminal state; Gymnasium leaves the rows of those states as they are, here they lead to
    themselves. float64. ValueError where the environment has no table.
    """
    import gymnasium

    env = gymnasium.make(name, **options).unwrapped
    if not hasattr(env, "P"):
        raise ValueError(f"{name} has no table of transitions P")
    states, actions = env.observation_space.n, env.action_space.n
    transitions = torch.zeros(states, actions, states, dtype=torch.float64)
    rewards, terminal = torch.zeros_like(transitions), torch.zeros(states, dtype=torch.bool)
    for s in range(states):
        for a in range(actions):
            for chance, after, reward, done in env.P[s][a]:
                transitions[s, a, after] += chance
                rewards[s, a, after] += chance * float(reward)
                terminal[after] |= bool(done)
    rewards = torch.where(transitions > 0, rewards / transitions, 0.0)  # mean of what a pair pays
    transitions[terminal], rewards[terminal] = 0.0, 0.0
    transitions[terminal, :, terminal] = 1.0
    return MDP(transitions, rewards, torch.as_tensor(env.initial_state_distrib), terminal, gamma)


def random_walk(states: int = 19) -> MDP:
    """A walk on a line with one action: a step left or right with equal chance from the middle.

    States 0 and states + 1 are terminal. The right one pays 1, the left one -1, all else 0, so that
    V(s) = 2s / (states + 1) - 1 with gamma 1 (Sutton and Barto 2018, example 7.1).
    """
    if states < 1 or states % 2 == 0:
        raise ValueError(f"states must be odd and positive, got {states}")
    count = states + 2
    transitions = torch.zeros(count, 1, count, dtype=torch.float64)
    rewards, terminal = torch.zeros_like(transitions), torch.zeros(count, dtype=torch.bool)
    for s in range(1, count - 1):
        transitions[s, 0, s - 1] = transitions[s, 0, s + 1] = 0.5
    terminal[[0, -1]] = True
    transitions[0, 0, 0] = transitions[-1, 0, -1] = 1.0
    rewards[1, 0, 0], rewards[-2, 0, -1] = -1.0, 1.0
    start = torch.zeros(count, dtype=torch.float64)
    start[count // 2] = 1.0
    return MDP(transitions, rewards, start, terminal)


def random_mdp(
    states: int = 3, actions: int = 2, *, seed: int = 0, gamma: float = 0.9, noise: float = 1.0
) -> MDP:
    """Random chances (a softmax of `noise` times normal logits) and normal rewards; nothing ends."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    transitions = (noise * torch.randn(states, actions, states, **options)).softmax(-1)
    rewards = torch.randn(states, actions, states, **options)
    start = torch.randn(states, **options).softmax(-1)
    return MDP(transitions, rewards, start, torch.zeros(states, dtype=torch.bool), gamma)


@dataclass(frozen=True)
class Episodes:
    """All K courses that an episode of H steps can take: states (K, H + 1), actions and rewards
    (K, H), and the log-chance (K,) that the world plays its part."""

    states: Tensor
    actions: Tensor
    rewards: Tensor
    world_logps: Tensor


def all_episodes(mdp: MDP, horizon: int) -> Episodes:
    """Every sequence of states and actions of `horizon` steps that has a chance above 0.

    An episode's probability under a policy is exp(world_logps + the sum of its actions' log-probs),
    so that every expectation over episodes is a finite sum. Steps after a terminal state stand in
    it and pay nothing. S (A S)^H courses at most: ValueError above a million.
    """
    states, actions, _ = mdp.transitions.shape
    if states * (states * actions) ** horizon > 10**6:
        raise ValueError(f"more than a million episodes of {horizon} steps")
    path = mdp.start.nonzero()  # (K, 1), grows by a state a step
    chosen = torch.zeros(len(path), 0, dtype=torch.long)
    paid = torch.zeros(len(path), 0, dtype=mdp.rewards.dtype)
    logps = mdp.start[path[:, 0]].log()
    for _ in range(horizon):
        count = len(path)
        a = torch.arange(actions).repeat_interleave(states).repeat(count)  # (K A S,)
        after = torch.arange(states).repeat(actions * count)
        path, chosen, paid, logps = (
            x.repeat_interleave(actions * states, 0) for x in (path, chosen, paid, logps)
        )
        s = path[:, -1]
        logps = logps + mdp.transitions[s, a, after].log()
        path = torch.cat([path, after.unsqueeze(-1)], -1)
        chosen = torch.cat([chosen, a.unsqueeze(-1)], -1)
        paid = torch.cat([paid, mdp.rewards[s, a, after].unsqueeze(-1)], -1)
        possible = logps > -torch.inf
        path, chosen, paid, logps = (x[possible] for x in (path, chosen, paid, logps))
    return Episodes(path, chosen, paid, logps)
