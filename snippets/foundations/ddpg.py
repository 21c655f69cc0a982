"""Deep Deterministic Policy Gradient: an actor that climbs its critic.

DDPG: Lillicrap et al. 2015 (arXiv:1509.02971). The deterministic policy gradient: Silver et al. 2014.
r_t is the reward for the step taken at t.

    python -m snippets.foundations.ddpg
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def ddpg_targets(rewards: Tensor, next_q: Tensor, terminated: Tensor, *, gamma: float) -> Tensor:
    """r + gamma * Q'(s', mu'(s')), and r alone where s' is final: what the critic regresses on.

    rewards, terminated (B,); next_q (B,), from the *target* networks -> (B,) without gradient. A step
    that the clock cut off (truncated) bootstraps like any other. ValueError on shapes that disagree.
    """
    if not rewards.shape == next_q.shape == terminated.shape:
        shapes = [tuple(x.shape) for x in (rewards, next_q, terminated)]
        raise ValueError(f"rewards, next_q and terminated must agree, got {shapes}")
    return (rewards + gamma * torch.where(terminated.bool(), 0.0, next_q)).detach()


def actor_loss(
    policy: Callable[[Tensor], Tensor], critic: Callable[[Tensor, Tensor], Tensor], obs: Tensor
) -> Tensor:
    """-mean Q(s, mu(s)), whose gradient is minus the deterministic policy gradient: by the chain rule
    mean of grad_theta mu(s) * grad_a Q(s, a) at a = mu(s).

    obs (B, D); policy (B, D) -> (B, A), differentiable; critic (B, D), (B, A) -> (B,) -> scalar. It
    has a gradient for the critic's weights too, which must not be used: they would learn to flatter.
    """
    return -critic(obs, policy(obs)).mean()


def ou_noise(noise: Tensor, fresh: Tensor, *, theta: float, sigma: float) -> Tensor:
    """One step of an Ornstein-Uhlenbeck process with mean 0: x <- (1 - theta) x + sigma n.

    noise, fresh (N, A), fresh standard normal -> (N, A). Steps k apart correlate by (1 - theta)^k;
    the standard deviation settles at sigma / sqrt(theta (2 - theta)). theta = 1: independent Gaussian
    noise. ValueError unless 0 < theta <= 1 and sigma >= 0.
    """
    if not 0 < theta <= 1 or sigma < 0:
        raise ValueError(f"theta must lie in (0, 1] and sigma be >= 0, got {theta} and {sigma}")
    return (1 - theta) * noise + sigma * fresh


class Critic(nn.Module):
    """Q(s, a): a net on both, side by side."""

    def __init__(self, observations: int, actions: int, hidden: int):
        super().__init__()
        self.net = mlp(observations + actions, hidden, hidden, 1)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """obs (B, D), actions (B, A) -> (B,)."""
        return self.net(torch.cat([obs, actions], -1)).squeeze(-1)


class Actor(nn.Module):
    """mu(s), within [-bound, bound] by a tanh."""

    def __init__(self, observations: int, actions: int, hidden: int, bound: float):
        super().__init__()
        self.net, self.bound = mlp(observations, hidden, hidden, actions), bound

    def forward(self, obs: Tensor) -> Tensor:
        """obs (B, D) -> (B, A)."""
        return self.net(obs).tanh() * self.bound


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLUs between them."""
    layers: list[nn.Module] = []
    for before, after in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@functools.cache
def learner():
    """DDPG for the off-policy loop: a class, its settings as `Settings`."""
    from snippets.foundations.loop import ReplaySettings, track

    @dataclass
    class DDPGSettings(ReplaySettings):
        """Noise in units of the action bound. theta = 1: Gaussian; Lillicrap et al.: 0.15 and 0.2."""

        warmup: int = 50
        sigma: float = 0.1
        theta: float = 1.0

    class DDPG:
        Settings = DDPGSettings

        def __init__(self, task, settings):
            self.task, self.settings = task, settings
            self.policy = Actor(task.observations, task.actions, settings.hidden, task.bound)
            self.critic = Critic(task.observations, task.actions, settings.hidden)
            self.target_policy, self.target_critic = copy.deepcopy((self.policy, self.critic))
            self.weights = list(self.policy.parameters())
            fit = functools.partial(torch.optim.Adam, lr=settings.lr, fused=True)
            self.policy_optimizer, self.critic_optimizer = (
                fit(self.weights),
                fit(self.critic.parameters()),
            )
            self.noise = torch.zeros(settings.envs, task.actions)
            both = ((self.target_policy, self.target_critic), (self.policy, self.critic))
            self.nets = [[p for net in nets for p in net.parameters()] for nets in both]

        def act(self, obs, generator):
            fresh = torch.randn(self.noise.shape, generator=generator)
            theta, sigma = self.settings.theta, self.settings.sigma
            self.noise = ou_noise(self.noise, fresh, theta=theta, sigma=sigma)
            bound = self.task.bound
            return (self.policy(obs) + bound * self.noise).clamp(-bound, bound)

        def greedy(self, obs):
            return self.policy(obs)

        def update(self, sample, generator):
            s = sample
            with torch.no_grad():
                next_q = self.target_critic(s.after, self.target_policy(s.after))  # (B,)
                targets = ddpg_targets(s.rewards, next_q, s.terminated, gamma=self.settings.gamma)
            loss = (self.critic(s.obs, s.actions) - targets).square().mean()
            self.critic_optimizer.zero_grad()
            loss.backward()
            self.critic_optimizer.step()

            self.policy_optimizer.zero_grad()
            actor_loss(self.policy, self.critic, s.obs).backward(inputs=self.weights)
            self.policy_optimizer.step()
            track(*self.nets, self.settings.tau)

    return DDPG


def main() -> None:
    """The demo: five seeds on Pendulum."""
    from snippets.foundations.loop import run_demo
    from snippets.worlds.classic import PENDULUM

    run_demo(learner(), learner().Settings, PENDULUM)


if __name__ == "__main__":
    main()
