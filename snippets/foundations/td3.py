"""Twin Delayed Deep Deterministic policy gradient: DDPG with three remedies for a flattering critic.

TD3: Fujimoto et al. 2018 (arXiv:1802.09477). Each remedy has a setting that switches it off: all
three off is DDPG. r_t is the reward for the step taken at t.

    python -m snippets.foundations.td3
"""

import copy
import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def smoothed_actions(
    actions: Tensor, noise: Tensor, *, sigma: float, clip: float, bound: float
) -> Tensor:
    """Target policy smoothing: mu'(s') plus clipped noise, kept within the bound.

    actions, noise (B, A), noise standard normal; sigma and clip in units of the bound -> (B, A).
    ValueError on shapes that disagree, a negative sigma or clip, or bound <= 0.
    """
    if actions.shape != noise.shape:
        raise ValueError(f"shapes disagree: {tuple(actions.shape)} and {tuple(noise.shape)}")
    if sigma < 0 or clip < 0 or not bound > 0:
        raise ValueError(f"need sigma, clip >= 0 and bound > 0, got {sigma}, {clip} and {bound}")
    return (actions + bound * (sigma * noise).clamp(-clip, clip)).clamp(-bound, bound)


def td3_targets(rewards: Tensor, next_q: Tensor, terminated: Tensor, *, gamma: float) -> Tensor:
    """r + gamma * min_i Q'_i(s', a~), and r alone where s' is final: one target for all critics.

    rewards, terminated (B,); next_q (E, B), E target critics at the smoothed action -> (B,) without
    gradient. A step that the clock cut off (truncated) bootstraps. ValueError on other shapes.
    """
    if next_q.dim() != 2 or not rewards.shape == terminated.shape == next_q.shape[1:]:
        shapes = [tuple(x.shape) for x in (rewards, next_q, terminated)]
        raise ValueError(f"want (B,), (E, B) and (B,), got {shapes}")
    return (rewards + gamma * torch.where(terminated.bool(), 0.0, next_q.amin(0))).detach()


def critic_loss(q_values: Tensor, targets: Tensor) -> Tensor:
    """The sum over critics of the mean squared TD error: q_values (E, B), targets (B,) -> scalar."""
    return (q_values - targets.detach()).square().mean(-1).sum()


class Critics(nn.Module):
    """E Q-functions of one shape, evaluated together: one batched product a layer."""

    def __init__(self, inputs: int, hidden: int, count: int):
        super().__init__()
        sizes = [(inputs, hidden), (hidden, hidden), (hidden, 1)]
        draw = lambda *shape, n: torch.empty(shape).uniform_(-(n**-0.5), n**-0.5)  # noqa: E731
        self.weights = nn.ParameterList([draw(count, n, m, n=n) for n, m in sizes])
        self.biases = nn.ParameterList([draw(count, 1, m, n=n) for n, m in sizes])

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """obs (B, D), actions (B, A) -> (E, B)."""
        (w0, w1, w2), (b0, b1, b2) = self.weights, self.biases
        x = torch.cat([obs, actions], -1).expand(len(w0), -1, -1)
        x = torch.baddbmm(b0, x, w0).relu_()
        x = torch.baddbmm(b1, x, w1).relu_()
        return torch.baddbmm(b2, x, w2).squeeze(-1)


@functools.cache
def learner():
    """TD3 for the off-policy loop: a class, its settings as `Settings`."""
    from snippets.foundations.loop import ReplaySettings, track

    @dataclass
    class TD3Settings(ReplaySettings):
        """Noise in units of the action bound. critics=1, smoothing=0, delay=1: DDPG."""

        warmup: int = 50
        sigma: float = 0.1  # of exploration
        critics: int = 2
        smoothing: float = 0.2
        clip: float = 0.5
        delay: int = 2  # critic updates for one of the actor and the targets

    class TD3:
        Settings = TD3Settings

        def __init__(self, task, settings):
            if settings.critics < 1 or settings.delay < 1:
                given = f"{settings.critics} and {settings.delay}"
                raise ValueError(f"critics and delay must be positive, got {given}")
            self.task, self.settings, self.updates = task, settings, 0
            h = settings.hidden
            sizes = ((task.observations, h), (h, h), (h, task.actions))
            layers = [layer for size in sizes for layer in (nn.Linear(*size), nn.ReLU())]
            self.net = nn.Sequential(*layers[:-1])
            self.critics = Critics(task.observations + task.actions, h, settings.critics)
            self.target_net, self.target_critics = copy.deepcopy((self.net, self.critics))
            self.weights = list(self.net.parameters())
            fit = functools.partial(torch.optim.Adam, lr=settings.lr, fused=True)
            self.policy_optimizer = fit(self.weights)
            self.critic_optimizer = fit(self.critics.parameters())
            both = ((self.target_net, self.target_critics), (self.net, self.critics))
            self.nets = [[p for net in nets for p in net.parameters()] for nets in both]

        def greedy(self, obs):
            return self.net(obs).tanh() * self.task.bound

        def act(self, obs, generator):
            actions, bound = self.greedy(obs), self.task.bound
            noise = torch.randn(actions.shape, generator=generator)
            return (actions + bound * self.settings.sigma * noise).clamp(-bound, bound)

        def targets(self, sample, generator):
            s, k, bound = sample, self.settings, self.task.bound
            with torch.no_grad():
                after = self.target_net(s.after).tanh() * bound
                noise = torch.randn(after.shape, generator=generator)
                after = smoothed_actions(after, noise, sigma=k.smoothing, clip=k.clip, bound=bound)
                next_q = self.target_critics(s.after, after)  # (E, B)
                return td3_targets(s.rewards, next_q, s.terminated, gamma=k.gamma)

        def update(self, sample, generator):
            self.updates += 1
            q_values = self.critics(sample.obs, sample.actions)  # (E, B)
            loss = critic_loss(q_values, self.targets(sample, generator))
            self.critic_optimizer.zero_grad()
            loss.backward()
            self.critic_optimizer.step()
            if self.updates % self.settings.delay == 0:
                # The first critic alone; the actor may not choose which of the two flatters it.
                loss = -self.critics(sample.obs, self.greedy(sample.obs))[0].mean()
                self.policy_optimizer.zero_grad()
                loss.backward(inputs=self.weights)
                self.policy_optimizer.step()
                track(*self.nets, self.settings.tau)

    return TD3


def main() -> None:
    """The demo: five seeds on Pendulum."""
    from snippets.foundations.loop import run_demo
    from snippets.worlds.classic import PENDULUM

    run_demo(learner(), learner().Settings, PENDULUM)


if __name__ == "__main__":
    main()
