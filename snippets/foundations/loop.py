"""The two loops that all deep agents of the foundations share.

On-policy (`train`): roll the policy out, estimate advantages, update, throw the data away. An
`Algorithm` says what REINFORCE, A2C, PPO and TRPO do differently. Off-policy (`train_off_policy`):
put each step into a replay buffer and learn from samples of it. A learner class says what DQN,
DDPG, TD3 and SAC do differently.

Both run N copies of a task at once (`snippets/worlds/classic.py`) and measure the seconds that
training takes, evaluation not counted.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from snippets.worlds.classic import Envs, Task, Transition, evaluate

# Networks.


def mlp(
    *sizes: int, activation: type[nn.Module] = nn.Tanh, last_gain: float = 1.0
) -> nn.Sequential:
    """Linear layers with activations between them, orthogonal weights and zero biases."""
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        last = i == len(sizes) - 2
        layer = nn.Linear(before, after)
        nn.init.orthogonal_(layer.weight, last_gain if last else 2**0.5)
        nn.init.zeros_(layer.bias)
        layers += [layer] if last else [layer, activation()]
    return nn.Sequential(*layers)


class Agent(nn.Module):
    """A stochastic policy and a critic, each a net of its own.

    Discrete tasks: a softmax over the policy's outputs. Continuous ones: a normal distribution
    around them, with a standard deviation for each dimension that does not depend on the state.
    """

    def __init__(self, task: Task, hidden: int):
        super().__init__()
        # A last layer near zero: the first policy is close to uniform, whatever it sees.
        self.policy = mlp(task.observations, hidden, hidden, task.actions, last_gain=0.01)
        self.critic = mlp(task.observations, hidden, hidden, 1)
        self.log_std = None if task.discrete else nn.Parameter(torch.zeros(task.actions))

    def act(self, obs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """obs (N, D) -> a sampled action (N,) or, continuous, (N, A)."""
        out = self.policy(obs)
        if self.log_std is None:
            return torch.multinomial(out.softmax(-1), 1, generator=generator).squeeze(-1)
        noise = torch.randn(out.shape, generator=generator, dtype=out.dtype)
        return out + self.log_std.exp() * noise

    def logps(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """obs (B, D), actions (B,) or (B, A) -> log pi(a|s) and the policy's entropy, (B,), nats."""
        out = self.policy(obs)
        if self.log_std is None:
            log_probs = out.log_softmax(-1)  # (B, A)
            logps = log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
            return logps, -(log_probs.exp() * log_probs).sum(-1)
        normal = torch.distributions.Normal(out, self.log_std.exp().expand_as(out))
        return normal.log_prob(actions).sum(-1), normal.entropy().sum(-1)

    def values(self, obs: Tensor) -> Tensor:
        """obs (..., D) -> V(s) (...)."""
        return self.critic(obs).squeeze(-1)


# On-policy.


@dataclass
class Settings:
    """What all on-policy methods share. A method's own settings extend it."""

    seed: int = 0
    updates: int = 200  # at most
    envs: int = 32
    horizon: int = 64  # steps of a rollout; 0: until each copy has ended one episode
    hidden: int = 64
    lr: float = 3e-3
    gamma: float = 0.99
    lam: float = 0.95
    check_every: int = 1  # updates between two evaluations


@dataclass(frozen=True)
class Rollout:
    """T steps of N copies, time first. `next_values` are of the observations that the steps led to,
    before any reset. `mask` is 0 after the end of a copy's episode if episodes are whole."""

    obs: Tensor  # (T, N, D)
    actions: Tensor  # (T, N) or (T, N, A)
    rewards: Tensor  # (T, N), as terminated, truncated, mask, logps, values, next_values
    terminated: Tensor
    truncated: Tensor
    mask: Tensor
    logps: Tensor
    values: Tensor
    next_values: Tensor


@dataclass(frozen=True)
class Batch:
    """The steps of a rollout that count, in one row: B of them."""

    obs: Tensor  # (B, D)
    actions: Tensor  # (B,) or (B, A)
    logps: Tensor  # (B,) when they were sampled, as the rest
    values: Tensor
    advantages: Tensor
    returns: Tensor  # the critic's targets

    def __len__(self) -> int:
        return len(self.obs)

    def __getitem__(self, rows: Tensor) -> "Batch":
        return Batch(**{f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)})


Update = Callable[[Agent, torch.optim.Optimizer, Batch, Any, torch.Generator], None]


@dataclass(frozen=True)
class Algorithm:
    """What one method does differently: settings, advantages (rollout, settings) -> (advantages,
    critic's targets), both (T, N); update (agent, optimizer, batch, settings, generator)."""

    settings: type[Settings]
    advantages: Callable[[Rollout, Any], tuple[Tensor, Tensor]]
    update: Update


def descend(
    loss: Callable[[Agent, Batch, Any], Tensor],
) -> Update:
    """An update by gradient descent: `settings.epochs` times over the batch in random minibatches of
    `settings.minibatch` rows (0: the whole batch), gradients clipped to norm `settings.max_norm`."""

    def update(agent, optimizer, batch, settings, generator):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for _ in range(settings.epochs):
            size = settings.minibatch or len(batch)
            for rows in torch.randperm(len(batch), generator=generator).split(size):
                optimizer.zero_grad()
                loss(agent, batch if len(rows) == len(batch) else batch[rows], settings).backward()
                nn.utils.clip_grad_norm_(parameters, settings.max_norm)
                optimizer.step()

    return update


@torch.no_grad()
def collect(envs: Envs, agent: Agent, horizon: int, generator: torch.Generator) -> Rollout:
    """`horizon` steps of all copies, or, with 0, until each has ended one episode (they must then
    all be at a start). Log-probs and values come afterwards, in one pass over all steps."""
    obs, actions, steps = [], [], []
    mask, alive = [], torch.ones(envs.count, dtype=torch.bool)
    while len(steps) < horizon if horizon else alive.any():
        obs.append(envs.obs)
        actions.append(agent.act(obs[-1], generator))
        steps.append(step := envs.step(actions[-1]))
        mask.append(alive)
        if horizon == 0:
            alive = alive & ~(step.terminated | step.truncated)
    obs, actions, mask = torch.stack(obs), torch.stack(actions), torch.stack(mask)
    after, rewards, terminated, truncated = (
        torch.stack([getattr(step, f.name) for step in steps])
        for f in dataclasses.fields(Transition)
    )
    logps, _ = agent.logps(obs.flatten(0, 1), actions.flatten(0, 1))
    values, next_values = agent.values(obs), agent.values(after)
    logps = logps.view(mask.shape)
    return Rollout(obs, actions, rewards, terminated, truncated, mask, logps, values, next_values)


@dataclass
class Run:
    """What a training run gives: the agent, a point (environment steps, seconds of training, mean
    return of the evaluation) for each evaluation, and whether the task was solved."""

    agent: Any
    curve: list[tuple[int, float, float]]
    solved: bool

    @property
    def seconds(self) -> float:
        return self.curve[-1][1]


class Judge:
    """Decides whether a policy solves its task: a mean return of at least `task.solved` over
    `task.episodes` in the real Gymnasium environment. A tenth of them goes first, so that a poor
    policy is dismissed quickly. No episode is seen twice."""

    def __init__(self, task: Task, act: Callable[[Tensor], Tensor], *, seed: int):
        self.task, self.act = task, act
        self.seed = 1_000_000 * (seed + 1)

    def look(self, count: int) -> float:
        seed, self.seed = self.seed, self.seed + count
        return evaluate(self.task, self.act, episodes=count, seed=seed).mean().item()

    def __call__(self) -> tuple[float, bool]:
        """(mean return, solved)."""
        mean = self.look(max(self.task.episodes // 10, 2))
        if mean < self.task.solved - 0.25 * abs(self.task.solved):
            return mean, False
        mean = self.look(self.task.episodes)
        return mean, mean >= self.task.solved


def check(settings: "Settings | ReplaySettings") -> None:
    """ValueError, naming setting and value, where training would make no sense."""
    for name in ("updates", "envs", "hidden", "check_every", "steps", "batch", "capacity"):
        if getattr(settings, name, 1) < 1:
            raise ValueError(f"{name} must be positive, got {getattr(settings, name)}")
    for name in ("horizon", "warmup"):
        if getattr(settings, name, 0) < 0:
            raise ValueError(f"{name} must not be negative, got {getattr(settings, name)}")
    for name in ("gamma", "lam", "tau"):
        if not 0 <= getattr(settings, name, 0) <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {getattr(settings, name)}")
    if not settings.lr > 0:
        raise ValueError(f"lr must be positive, got {settings.lr}")
    if getattr(settings, "capacity", settings.envs) < settings.envs:
        raise ValueError(
            f"capacity {settings.capacity} holds no step of all {settings.envs} copies"
        )


def train(
    task: Task, algorithm: Algorithm, settings: Settings, *, judge: bool = True, stop: bool = True
) -> Run:
    """On-policy training until the stochastic policy solves the task, or for `settings.updates`.

    Evaluation takes no time off the clock and no random number off the training; with judge=False
    it does not happen, with stop=False it ends nothing. A function of its arguments alone, the
    seconds apart. ValueError: `check`.
    """
    check(settings)
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        agent = Agent(task, settings.hidden)
    optimizer = torch.optim.Adam(agent.parameters(), lr=settings.lr, eps=1e-5, fused=True)
    envs = Envs(task, settings.envs, seed=settings.seed)
    dice = torch.Generator().manual_seed(settings.seed)
    act = lambda obs: agent.act(obs, dice)  # noqa: E731
    examine = Judge(task, act, seed=settings.seed)
    seconds, steps, curve, solved = 0.0, 0, [], False
    for update in range(1, settings.updates + 1):
        start = time.perf_counter()
        if settings.horizon == 0:
            envs = Envs(task, settings.envs, seed=settings.seed * 100_003 + update)
        rollout = collect(envs, agent, settings.horizon, generator)
        advantages, returns = algorithm.advantages(rollout, settings)
        kept = rollout.mask.bool()
        rows = (rollout.obs, rollout.actions, rollout.logps, rollout.values, advantages, returns)
        batch = Batch(*(x[kept] for x in rows))
        algorithm.update(agent, optimizer, batch, settings, generator)
        seconds, steps = seconds + time.perf_counter() - start, steps + len(batch)
        if judge and (update % settings.check_every == 0 or update == settings.updates):
            mean, solved = examine()
            curve.append((steps, seconds, mean))
            if solved and stop:
                break
    return Run(agent, curve or [(steps, seconds, float("nan"))], solved)


# Off-policy.


@dataclass
class ReplaySettings:
    """What all off-policy methods share. A method's own settings extend it."""

    seed: int = 0
    steps: int = 4000  # of all copies together: steps x envs environment steps, at most
    envs: int = 8
    warmup: int = 100  # steps of random actions before the first update
    capacity: int = 100_000
    batch: int = 256
    updates: int = 8  # gradient updates a step
    hidden: int = 64
    lr: float = 3e-3
    gamma: float = 0.99
    tau: float = 0.02  # of the way that the target network moves an update
    check_every: int = 50  # steps between two evaluations


@dataclass(frozen=True)
class Sample:
    """B stored steps. `terminated` alone cuts the bootstrap; a truncated step bootstraps."""

    obs: Tensor  # (B, D)
    actions: Tensor  # (B,) or (B, A)
    rewards: Tensor  # (B,)
    after: Tensor  # (B, D): where the step led, never the first observation of the next episode
    terminated: Tensor  # (B,)


class Replay:
    """The last `capacity` steps, the oldest overwritten first."""

    def __init__(self, task: Task, capacity: int, dtype: torch.dtype = torch.float32):
        choice = ((), torch.long) if task.discrete else ((task.actions,), dtype)
        self.capacity, self.count, self.next = capacity, 0, 0
        shapes = {
            "obs": ((task.observations,), dtype),
            "actions": choice,
            "rewards": ((), dtype),
            "after": ((task.observations,), dtype),
            "terminated": ((), torch.bool),
        }
        self.store = {k: torch.zeros(capacity, *s, dtype=d) for k, (s, d) in shapes.items()}

    def add(self, obs: Tensor, actions: Tensor, step: Transition) -> None:
        rows = (self.next + torch.arange(len(obs))) % self.capacity
        for name, new in zip(
            self.store, (obs, actions, step.rewards, step.after, step.terminated), strict=True
        ):
            self.store[name][rows] = new
        self.next = (self.next + len(obs)) % self.capacity
        self.count = min(self.count + len(obs), self.capacity)

    def sample(self, times: int, size: int, generator: torch.Generator) -> Iterator[Sample]:
        """`times` independent samples of `size` steps each, with replacement."""
        rows = torch.randint(self.count, (times * size,), generator=generator)
        parts = (self.store[name][rows].split(size) for name in self.store)
        for part in zip(*parts, strict=True):
            yield Sample(*part)


class Learner(Protocol):
    """What an off-policy method provides."""

    def act(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        """Actions to explore with."""

    def greedy(self, obs: Tensor) -> Tensor:
        """Actions to be judged by."""

    def update(self, sample: Sample, generator: torch.Generator) -> None:
        """One gradient update."""


@torch.no_grad()
def track(target: list[Tensor], online: list[Tensor], tau: float) -> None:
    """target <- (1 - tau) target + tau online, in place: the target network follows slowly."""
    torch._foreach_lerp_(target, online, tau)


def random_actions(task: Task, count: int, generator: torch.Generator) -> Tensor:
    """Uniform over the choices, or over [-bound, bound]."""
    if task.discrete:
        return torch.randint(task.actions, (count,), generator=generator)
    return (2 * torch.rand(count, task.actions, generator=generator) - 1) * task.bound


def train_off_policy(
    task: Task,
    learner: Callable[[Task, Any], Learner],
    settings: ReplaySettings,
    *,
    judge: bool = True,
    stop: bool = True,
) -> Run:
    """Off-policy training until the greedy policy solves the task, or for `settings.steps`. As
    `train` in all else; ValueError: `check`, or fewer steps than the warm-up."""
    check(settings)
    if settings.steps <= settings.warmup:
        raise ValueError(f"{settings.steps} steps, all of them warm-up ({settings.warmup})")
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        agent = learner(task, settings)
    envs = Envs(task, settings.envs, seed=settings.seed)
    replay = Replay(task, settings.capacity)
    examine = Judge(task, agent.greedy, seed=settings.seed)
    seconds, curve, solved = 0.0, [], False
    for step in range(1, settings.steps + 1):
        start = time.perf_counter()
        obs = envs.obs
        if step <= settings.warmup:
            actions = random_actions(task, envs.count, generator)
        else:
            with torch.no_grad():
                actions = agent.act(obs, generator)
        replay.add(obs, actions, envs.step(actions))
        if step > settings.warmup:
            for sample in replay.sample(settings.updates, settings.batch, generator):
                agent.update(sample, generator)
        seconds += time.perf_counter() - start
        due = step > settings.warmup and step % settings.check_every == 0
        if judge and (due or step == settings.steps):
            mean, solved = examine()
            curve.append((step * envs.count, seconds, mean))
            if solved and stop:
                break
    return Run(agent, curve or [(step * envs.count, seconds, float("nan"))], solved)


# The demo.


def run_demo(method: Algorithm | type, settings: type, task: Task) -> None:
    """`python -m snippets.foundations.<name>`: five seeds of training on the task, or `--seeds`, and a
    table. Each setting is an option of the same name."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs")
    for f in dataclasses.fields(settings):
        # bool("False") is True: a switch gets a --no- form instead of a value.
        kind = {"type": type(f.default)}
        if isinstance(f.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, **kind)
    options = vars(parser.parse_args())
    seeds = range(options["seed"], options["seed"] + options.pop("seeds"))
    torch.set_num_threads(1)  # nets this small are fastest on one
    run = train if isinstance(method, Algorithm) else train_off_policy
    print(f"{task.name}, solved at a mean of {task.solved:g} over {task.episodes} episodes")
    print(f"{'seed':>4} {'solved':>6} {'mean':>8} {'steps':>8} {'seconds':>8}")
    for seed in seeds:
        result = run(task, method, settings(**options | {"seed": seed}))
        steps, seconds, mean = result.curve[-1]
        print(f"{seed:4} {result.solved!s:>6} {mean:8.1f} {steps:8} {seconds:8.2f}", flush=True)
