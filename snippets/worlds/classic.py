"""CartPole and Pendulum as tensors: Gymnasium's physics for N copies at a time.

The equations and constants are those of Gymnasium's CartPole-v1 and Pendulum-v1; in float64 they
agree with it to 1e-12. Angles in radians, lengths in metres, seconds, newtons (CartPole) and
newton metres (Pendulum).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ANGLE_LIMIT, POSITION_LIMIT = 12 * 2 * math.pi / 360, 2.4  # CartPole ends beyond either
MAX_SPEED, MAX_TORQUE = 8.0, 2.0  # Pendulum clips to them


def cartpole_step(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """0.02 s of CartPole: state (N, 4) and action (N,), 0 left or 1 right -> next state (N, 4),
    reward (N,) which is always 1, terminated (N,): the cart is off the track or the pole too low.

    A state holds position, velocity, angle and angular velocity. Euler's rule, as in Gymnasium:
    positions move with the old velocities.
    """
    x, x_dot, theta, theta_dot = state.unbind(-1)
    force = torch.where(action == 1, 10.0, -10.0).to(state.dtype)
    cos, sin = theta.cos(), theta.sin()
    push = (force + 0.05 * theta_dot**2 * sin) / 1.1  # 0.05 = pole mass 0.1 x half length 0.5
    theta_acc = (9.8 * sin - cos * push) / (0.5 * (4.0 / 3.0 - 0.1 * cos**2 / 1.1))
    x_acc = push - 0.05 * theta_acc * cos / 1.1
    speeds = torch.stack([x_dot, x_acc, theta_dot, theta_acc], -1)
    after = state + 0.02 * speeds  # (N, 4)
    over = (after[:, 0].abs() > POSITION_LIMIT) | (after[:, 2].abs() > ANGLE_LIMIT)
    return after, torch.ones_like(x), over


def pendulum_step(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """0.05 s of Pendulum: state (N, 2) and torque (N, 1), clipped to 2 -> next state (N, 2),
    reward (N,), terminated (N,) which is never true.

    A state holds the angle from upright and the angular velocity. The reward is that of the state
    before the step: minus (angle^2 + 0.1 speed^2 + 0.001 torque^2), the angle within [-pi, pi).
    """
    angle, speed = state.unbind(-1)
    torque = action.squeeze(-1).clamp(-MAX_TORQUE, MAX_TORQUE)
    off = (angle + math.pi) % (2 * math.pi) - math.pi  # the angle counts from the nearest upright
    cost = off**2 + 0.1 * speed**2 + 0.001 * torque**2
    speed = (speed + (15.0 * angle.sin() + 3.0 * torque) * 0.05).clamp(-MAX_SPEED, MAX_SPEED)
    after = torch.stack([angle + 0.05 * speed, speed], -1)  # the new speed moves the angle
    return after, -cost, torch.zeros_like(cost, dtype=torch.bool)


@dataclass(frozen=True)
class Task:
    """What an agent needs to know of an environment, and its physics.

    `actions` counts the choices where they are discrete, and the dimensions where not; `bound` is
    the largest action of a continuous task. An episode is cut off after `limit` steps. A policy
    solves the task when its mean return over `episodes` fresh ones is at least `solved`.
    """

    name: str  # of Gymnasium's environment
    observations: int
    actions: int
    bound: float | None
    limit: int
    solved: float
    episodes: int
    spread: tuple[float, ...]  # a start is uniform within plus and minus these
    step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    observe: Callable[[Tensor], Tensor]

    @property
    def discrete(self) -> bool:
        return self.bound is None


CARTPOLE = Task(
    "CartPole-v1", 4, 2, None, 500, 475.0, 100, (0.05,) * 4, cartpole_step, lambda state: state
)
PENDULUM = Task(
    "Pendulum-v1",
    3,
    1,
    MAX_TORQUE,
    200,
    -200.0,
    20,
    (math.pi, 1.0),
    pendulum_step,
    lambda state: torch.stack([state[:, 0].cos(), state[:, 0].sin(), state[:, 1]], -1),
)


@dataclass(frozen=True)
class Transition:
    """What one step gives, for N copies: the observation that the step *led to* (never one of the
    episode after), the reward, and why the episode ended, if it did."""

    after: Tensor  # (N, observations)
    rewards: Tensor  # (N,)
    terminated: Tensor  # (N,) the state is final: nothing can be earned beyond it
    truncated: Tensor  # (N,) the clock ran out: more could have been earned


class Envs:
    """N copies of a task. `obs` (N, observations) is what the agent acts on next.

    A copy whose episode ends starts anew within the same step: `obs` is then its first observation
    while the transition keeps its last one. So no step that only resets exists (Gymnasium's vector
    environments have one by default), and V of a truncated episode's end can still be asked for.
    """

    def __init__(self, task: Task, count: int, *, seed: int = 0, dtype=torch.float32):
        if count < 1:
            raise ValueError(f"count must be positive, got {count}")
        self.task, self.count, self.dtype = task, count, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.spread = torch.tensor(task.spread, dtype=dtype)
        self.state = self._starts()
        self.age = torch.zeros(count, dtype=torch.long)  # steps since the start

    @property
    def obs(self) -> Tensor:
        return self.task.observe(self.state)

    def _starts(self) -> Tensor:
        size = (self.count, len(self.spread))
        uniform = torch.rand(size, generator=self.generator, dtype=self.dtype)
        return (2 * uniform - 1) * self.spread

    def step(self, actions: Tensor) -> Transition:
        """actions (N,) or, continuous, (N, actions). ValueError on any other shape."""
        expected = (self.count,) if self.task.discrete else (self.count, self.task.actions)
        if actions.shape != expected:
            raise ValueError(f"actions must have the shape {expected}, got {tuple(actions.shape)}")
        state, rewards, terminated = self.task.step(self.state, actions)
        self.age = self.age + 1
        # Both at once is a termination: what the clock says no longer matters.
        truncated = (self.age >= self.task.limit) & ~terminated
        over = terminated | truncated
        after = self.task.observe(state)
        if over.any():
            state = torch.where(over.unsqueeze(-1), self._starts(), state)
            self.age = torch.where(over, 0, self.age)
        self.state = state
        return Transition(after, rewards, terminated, truncated)


@torch.no_grad()
def evaluate(
    task: Task, act: Callable[[Tensor], Tensor], *, episodes: int = 100, seed: int = 10_000
) -> Tensor:
    """Returns (episodes,), undiscounted, of fresh episodes in the *real* Gymnasium environment.

    `act` maps observations (N, observations) to actions, greedy or sampled as it likes. Each episode
    runs in an environment of its own, seeded seed, seed + 1, ... ValueError on episodes < 1.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be positive, got {episodes}")
    import gymnasium
    import numpy as np

    envs = [gymnasium.make(task.name, disable_env_checker=True) for _ in range(episodes)]
    obs = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])
    returns, running = np.zeros(episodes), list(range(episodes))
    while running:
        actions = act(torch.as_tensor(obs[running], dtype=torch.float32)).numpy()
        for i, action in zip(list(running), actions, strict=True):
            obs[i], reward, terminated, truncated, _ = envs[i].step(action)
            returns[i] += float(reward)
            if terminated or truncated:
                envs[i].close()
                running.remove(i)
    return torch.as_tensor(returns)
