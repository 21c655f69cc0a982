"""Deep Q-networks: Q-learning with a network, a replay buffer and a target network.

The target: Mnih et al. 2013 (arXiv:1312.5602), equation 2. The target network: Mnih et al. 2015
(Nature 518). Double: van Hasselt et al. 2015 (1509.06461). Dueling: Wang et al. 2015 (1511.06581).

A batch has B stored steps; q_values (B, A) are those of all A actions. `terminated` (B,) means that
nothing can be earned beyond the step; a step that a time limit ended is not terminated.

    python -m snippets.foundations.dqn
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def _disagree(want: str, **tensors: Tensor) -> None:
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
    raise ValueError(f"shapes disagree: {shapes}; want {want}")


def dqn_targets(
    rewards: Tensor, next_q_values: Tensor, terminated: Tensor, *, gamma: float
) -> Tensor:
    """y = r + gamma * max_a Q(s', a), and r alone where the episode terminated.

    rewards, terminated (B,), next_q_values (B, A) of the target network at s' -> (B,), without
    gradient. Raises ValueError on shapes that disagree and gamma outside [0, 1].
    """
    if next_q_values.dim() != 2:
        _disagree("(B,) and (B, A)", rewards=rewards, next_q_values=next_q_values)
    return _bootstrap(rewards, next_q_values.detach().amax(-1), terminated, gamma)


def double_dqn_targets(
    rewards: Tensor, online_q: Tensor, next_q_values: Tensor, terminated: Tensor, *, gamma: float
) -> Tensor:
    """y = r + gamma * Q(s', argmax_a Q_online(s', a)): one net chooses, the other one evaluates.

    As `dqn_targets`; online_q (B, A) are of the network in training, also at s'.
    """
    if online_q.shape != next_q_values.shape or next_q_values.dim() != 2:
        _disagree("(B, A)", online=online_q, target=next_q_values)
    best = online_q.argmax(-1, keepdim=True)  # (B, 1)
    return _bootstrap(
        rewards, next_q_values.detach().gather(-1, best).squeeze(-1), terminated, gamma
    )


def _bootstrap(rewards: Tensor, values: Tensor, terminated: Tensor, gamma: float) -> Tensor:
    """r + gamma * V(s') where there is an s', all (B,)."""
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
    if not rewards.shape == values.shape == terminated.shape:
        _disagree("(B,)", rewards=rewards, values_ahead=values, terminated=terminated)
    # Not a product: beyond the end a network may say anything, NaN included.
    return rewards + gamma * torch.where(terminated.bool(), 0.0, values)


def dueling(values: Tensor, advantages: Tensor) -> Tensor:
    """Q(s, a) = V(s) + A(s, a) - mean_a A(s, a): values (B,), advantages (B, A) -> (B, A).

    Without the mean a constant could move between V and A unseen. With it V is the mean of Q over
    the actions, not its maximum. Raises ValueError on shapes that disagree.
    """
    if advantages.dim() != 2 or values.shape != advantages.shape[:1]:
        _disagree("(B,) and (B, A)", values=values, advantages=advantages)
    return values.unsqueeze(-1) + advantages - advantages.mean(-1, keepdim=True)


def dqn_loss(q_values: Tensor, actions: Tensor, targets: Tensor, *, huber: float = 1.0) -> Tensor:
    """The mean of Huber's loss of y - Q(s, a): half the square up to `huber`, then straight lines
    of that slope, so that no error pulls harder than `huber`.

    q_values (B, A), actions (B,), targets (B,), which get no gradient -> scalar. huber = inf: half
    the mean square. Raises ValueError on shapes that disagree and huber <= 0.
    """
    if not huber > 0:
        raise ValueError(f"huber must be positive, got {huber}")
    if q_values.dim() != 2 or not q_values.shape[:1] == actions.shape == targets.shape:
        _disagree("(B, A), (B,), (B,)", q_values=q_values, actions=actions, targets=targets)
    errors = targets.detach() - q_values.gather(-1, actions.unsqueeze(-1)).squeeze(-1)  # (B,)
    inside = errors.abs().clamp(max=huber)
    return (inside * (errors.abs() - 0.5 * inside)).mean()


def epsilon_at(step: int, *, first: float, last: float, decay: int) -> float:
    """The share of random actions: from `first` to `last` in a straight line over `decay` steps.
    Raises ValueError unless 0 <= last <= first <= 1 <= decay."""
    if not 0 <= last <= first <= 1 or decay < 1:
        raise ValueError(f"want 0 <= last <= first <= 1 <= decay, got {first=}, {last=}, {decay=}")
    return first + (last - first) * min(step / decay, 1.0)


def epsilon_greedy(q_values: Tensor, epsilon: float, generator=None) -> Tensor:
    """q_values (B, A) -> actions (B,): any of the A with probability epsilon, else the best."""
    size, choices = q_values.shape
    anything = torch.randint(choices, (size,), generator=generator)
    explore = torch.rand(size, generator=generator) < epsilon
    return torch.where(explore, anything, q_values.argmax(-1))


class QNetwork(nn.Module):
    """Two hidden layers; observations (B, D) -> q_values (B, A). `units` (D,) divide the input."""

    def __init__(self, observations: int, actions: int, hidden: int, *, duel: bool = False):
        super().__init__()
        self.duel = duel
        self.register_buffer("units", torch.ones(observations))  # saved and moved with the weights
        self.body = nn.Sequential(
            nn.Linear(observations, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )
        self.head = nn.Linear(hidden, actions + duel)  # the last column is V

    def forward(self, obs: Tensor) -> Tensor:
        out = self.head(self.body(obs / self.units))
        return dueling(out[:, -1], out[:, :-1]) if self.duel else out


class DQN:
    """The learner of the off-policy loop: `act` explores, `greedy` is judged, `update` learns."""

    def __init__(self, task, settings):
        if not task.discrete:
            raise ValueError(f"{task.name} has no finite set of actions to take a maximum over")
        self.settings, self.acted, self.units = settings, 0, None
        shape = (task.observations, task.actions, settings.hidden)
        self.online = QNetwork(*shape, duel=settings.duel)
        self.target = QNetwork(*shape, duel=settings.duel).requires_grad_(False)
        self.target.load_state_dict(self.online.state_dict())
        self.weights = [[p.data for p in net.parameters()] for net in (self.target, self.online)]
        self.optimizer = torch.optim.Adam(self.online.parameters(), lr=settings.lr, fused=True)
        self.dice = torch.Generator().manual_seed(settings.seed)

    def act(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        s, self.acted = self.settings, self.acted + 1
        epsilon = epsilon_at(self.acted, first=1.0, last=s.epsilon, decay=s.decay)
        return epsilon_greedy(self.online(obs), epsilon, generator)

    def greedy(self, obs: Tensor) -> Tensor:
        """The policy that training ends with: greedy but for the last epsilon."""
        return epsilon_greedy(self.online(obs), self.settings.epsilon, self.dice)

    def update(self, sample, generator: torch.Generator) -> None:
        s = self.settings
        if self.units is None:  # the first batch, drawn from the warm-up: its spread is the unit
            spread = sample.obs.std(0)
            spread = torch.where(spread > 1e-6, spread, 1.0)
            self.units = self.online.units = self.target.units = spread
        with torch.no_grad():
            args = (self.target(sample.after), sample.terminated)
            if s.double:
                online = self.online(sample.after)  # (B, A)
                targets = double_dqn_targets(sample.rewards, online, *args, gamma=s.gamma)
            else:
                targets = dqn_targets(sample.rewards, *args, gamma=s.gamma)
        self.optimizer.zero_grad()
        dqn_loss(self.online(sample.obs), sample.actions, targets, huber=s.huber).backward()
        self.optimizer.step()
        torch._foreach_lerp_(*self.weights, s.tau)  # target <- (1 - tau) target + tau online


@functools.cache
def learner() -> type[DQN]:
    """The class for `train_off_policy`, with its settings as `learner().Settings`."""
    from snippets.foundations.loop import ReplaySettings

    @dataclass
    class Settings(ReplaySettings):
        steps: int = 8000
        envs: int = 32
        warmup: int = 40
        batch: int = 128
        lr: float = 1e-3
        gamma: float = 0.98
        tau: float = 0.05
        check_every: int = 25
        epsilon: float = 0.05  # the last one
        decay: int = 200  # steps until then
        double: bool = True
        duel: bool = False
        huber: float = math.inf

    DQN.Settings = Settings
    return DQN


def main() -> None:
    """The demo: CartPole."""
    from snippets.foundations.loop import run_demo
    from snippets.worlds.classic import CARTPOLE

    run_demo(learner(), learner().Settings, CARTPOLE)


if __name__ == "__main__":
    main()
