"""Soft Actor-Critic: a stochastic actor, paid for its entropy, that learns from a replay buffer.

SAC: Haarnoja et al. 2018a (arXiv:1801.01290); without a value network and with a temperature that
adapts: Haarnoja et al. 2018b (arXiv:1812.05905). r_t is the reward for the step taken at t.

    python -m snippets.foundations.sac
"""

import copy
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus


def soft_policy_iteration(
    transitions: Tensor, rewards: Tensor, terminal: Tensor, *, alpha: float, gamma: float, rounds=99
) -> tuple[Tensor, Tensor]:
    """The maximum-entropy optimum of a small MDP: evaluate, pi <- softmax(Q / alpha), again.

    transitions (S, A, S), rewards (S, A), terminal (S,), final states of value 0 -> soft Q and pi,
    both (S, A). Soft Q falls nowhere from round to round. ValueError unless alpha > 0, rounds >= 1.
    """
    if not alpha > 0 or rounds < 1:
        raise ValueError(f"alpha and rounds must be positive, got {alpha} and {rounds}")
    policy = torch.full_like(rewards, 1 / rewards.shape[1])
    live, eye = (~terminal).to(rewards.dtype), torch.eye(len(rewards), dtype=rewards.dtype)
    for _ in range(rounds):
        entropy = -torch.special.xlogy(policy, policy).sum(-1)  # (S,)
        gain = live * ((policy * rewards).sum(-1) + alpha * entropy)  # (S,)
        walk = live[:, None] * torch.einsum("sa,sat->st", policy, transitions)
        values = torch.linalg.solve(eye - gamma * walk, gain)  # V = gain + gamma P V
        q_values = live[:, None] * (rewards + gamma * transitions @ values)
        policy = (q_values / alpha).softmax(-1)
    return q_values, policy


def squashed_sample(
    mean: Tensor, log_std: Tensor, noise: Tensor, *, bound: float = 1.0
) -> tuple[Tensor, Tensor]:
    """a = bound * tanh(u), u = mean + std * noise, and log pi(a|s) in nats, differentiable in both.

    mean, log_std, noise (B, A), noise standard normal -> actions (B, A), logps (B,). The density is
    that of a, in its own units: log N(u) - log(bound (1 - tanh(u)^2)), summed over dimensions
    (Haarnoja et al. 2018a, appendix C, which has bound = 1). ValueError unless bound > 0 and the
    shapes agree.
    """
    if not mean.shape == log_std.shape == noise.shape:
        raise ValueError(f"shapes disagree: {[tuple(x.shape) for x in (mean, log_std, noise)]}")
    if not bound > 0:
        raise ValueError(f"bound must be positive, got {bound}")
    u = mean + log_std.exp() * noise
    # log(1 - tanh(u)^2) in a form that stays finite where tanh(u) rounds to 1.
    log_slope = 2 * (math.log(2) - u - softplus(-2 * u)) + math.log(bound)
    logps = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi) - log_slope
    return bound * u.tanh(), logps.sum(-1)


def sac_targets(
    rewards: Tensor, next_q: Tensor, next_logps: Tensor, terminated: Tensor, *, alpha, gamma: float
) -> Tensor:
    """r + gamma * (min_i Q'_i(s', a') - alpha log pi(a'|s')), and r alone where s' is final.

    rewards, next_logps, terminated (B,); next_q (E, B), target critics at a' fresh from pi(.|s')
    -> (B,) without gradient. A step that the clock cut off bootstraps. ValueError on other shapes.
    """
    shapes = [tuple(x.shape) for x in (next_q, rewards, next_logps, terminated)]
    if next_q.dim() != 2 or {shapes[0][1:]} != set(shapes[1:]):
        raise ValueError(f"want (E, B) for next_q and (B,) for the rest, got {shapes}")
    soft = next_q.amin(0) - alpha * next_logps
    return (rewards + gamma * torch.where(terminated.bool(), 0.0, soft)).detach()


def critic_loss(q_values: Tensor, targets: Tensor) -> Tensor:
    """Half the mean squared error, summed over critics: q_values (E, B), targets (B,) -> scalar."""
    return 0.5 * (q_values - targets.detach()).square().mean(-1).sum()


def actor_loss(logps: Tensor, q_values: Tensor, *, alpha: float | Tensor) -> Tensor:
    """mean(alpha log pi(a|s) - min_i Q_i(s, a)), a reparametrised: logps (B,), q_values (E, B)."""
    alpha = torch.as_tensor(alpha).detach()  # a gradient here would move alpha to please the actor
    return (alpha * logps - q_values.amin(0)).mean()


def temperature_loss(log_alpha: Tensor, logps: Tensor, *, target_entropy: float) -> Tensor:
    """-log_alpha * mean(log pi + target): an entropy below the target raises alpha. No gradient into
    the policy. logps (B,) -> scalar. The paper has alpha where most code has log_alpha: same sign
    and same rest, and steps that do not shrink with alpha."""
    return -log_alpha * (logps.detach().mean() + target_entropy)


class Critics(nn.Module):
    """E Q-functions of one shape, evaluated together: one batched product a layer."""

    def __init__(self, inputs: int, hidden: int, count: int = 2):
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
    """SAC for the off-policy loop: a class, its settings as `Settings`."""
    from snippets.foundations.loop import ReplaySettings, track

    @dataclass
    class SACSettings(ReplaySettings):
        """`entropy` is the target for each dimension of an action scaled to [-1, 1], in nats."""

        warmup: int = 50
        lr: float = 5e-3
        tau: float = 0.05
        alpha: float = 1.0  # at the start
        entropy: float = -1.0

    class SAC:
        Settings = SACSettings

        def __init__(self, task, settings):
            if not settings.alpha > 0:
                raise ValueError(f"alpha must be positive, got {settings.alpha}")
            self.task, self.settings = task, settings
            h = settings.hidden
            sizes = ((task.observations, h), (h, h), (h, 2 * task.actions))
            layers = [layer for size in sizes for layer in (nn.Linear(*size), nn.ReLU())]
            self.policy = nn.Sequential(*layers[:-1])
            self.critics = Critics(task.observations + task.actions, h)
            self.target_critics = copy.deepcopy(self.critics)
            self.log_alpha = torch.tensor(settings.alpha).log().requires_grad_()
            # Actions `bound` times as large have log(bound) more nats a dimension.
            self.target_entropy = task.actions * (settings.entropy + math.log(task.bound))
            self.weights = [*self.policy.parameters(), self.log_alpha]
            self.nets = [list(self.target_critics.parameters()), list(self.critics.parameters())]
            self.policy_optimizer = torch.optim.Adam(self.weights, lr=settings.lr, fused=True)
            self.critic_optimizer = torch.optim.Adam(self.nets[1], lr=settings.lr, fused=True)

        def sample(self, obs, generator):
            mean, log_std = self.policy(obs).chunk(2, -1)  # (B, A) each
            noise = torch.randn(mean.shape, generator=generator)
            return squashed_sample(mean, log_std.clamp(-5, 2), noise, bound=self.task.bound)

        def act(self, obs, generator):
            return self.sample(obs, generator)[0]

        def greedy(self, obs):  # the mode before the tanh
            return self.policy(obs).chunk(2, -1)[0].tanh() * self.task.bound

        def targets(self, sample, generator):
            actions, logps = self.sample(sample.after, generator)
            step = sample.rewards, self.target_critics(sample.after, actions), logps
            alpha, gamma = self.log_alpha.exp(), self.settings.gamma
            return sac_targets(*step, sample.terminated, alpha=alpha, gamma=gamma)

        def update(self, sample, generator):
            with torch.no_grad():
                targets = self.targets(sample, generator)
            self.critic_optimizer.zero_grad()
            critic_loss(self.critics(sample.obs, sample.actions), targets).backward()
            self.critic_optimizer.step()

            actions, logps = self.sample(sample.obs, generator)
            q_values = self.critics(sample.obs, actions)  # (E, B)
            loss = actor_loss(logps, q_values, alpha=self.log_alpha.exp())
            loss += temperature_loss(self.log_alpha, logps, target_entropy=self.target_entropy)
            self.policy_optimizer.zero_grad()
            loss.backward(inputs=self.weights)  # and not into the critics
            self.policy_optimizer.step()
            track(*self.nets, self.settings.tau)

    return SAC


def main() -> None:
    """The demo: five seeds on Pendulum."""
    from snippets.foundations.loop import run_demo
    from snippets.worlds.classic import PENDULUM

    run_demo(learner(), learner().Settings, PENDULUM)


if __name__ == "__main__":
    main()
