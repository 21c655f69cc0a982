"""A2C: an actor that follows the advantages of a critic which learns beside it.

Mnih et al. 2016 (arXiv:1602.01783), section 4 and algorithm S3, in the synchronous form of OpenAI
Baselines (2017). The correction for actions of an older policy: V-trace, Espeholt et al. 2018
(arXiv:1802.01561), equation 1. Steps are (T, N), time first, or (B,) where they are of one batch.

    python -m snippets.foundations.actor_critic
"""

import functools
from collections import deque
from dataclasses import dataclass, replace

import torch
from torch import Tensor


def _same(**tensors: Tensor) -> None:
    """ValueError, with all shapes, unless they are the same."""
    if len({tuple(x.shape) for x in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"shapes disagree: {shapes}")


def actor_loss(
    logps: Tensor, advantages: Tensor, entropies: Tensor, *, entropy_coef: float = 0.01
) -> Tensor:
    """-advantage * log pi(a|s) - entropy_coef * H(pi(.|s)), a mean over steps.

    logps and entropies (B,) with gradient, in nats, advantages (B,), taken as constants -> scalar.
    entropy_coef is in units of reward a nat: scale the reward and it must be scaled too. Raises
    ValueError on shapes that disagree and a negative entropy_coef. Mnih et al. 2016, section 4.
    """
    _same(logps=logps, advantages=advantages, entropies=entropies)
    if entropy_coef < 0:
        raise ValueError(f"entropy_coef must not be negative, got {entropy_coef}")
    return -(advantages.detach() * logps + entropy_coef * entropies).mean()


def critic_loss(values: Tensor, returns: Tensor) -> Tensor:
    """Half the squared error of V(s) against its target, a mean over steps.

    values (B,) with gradient, returns (B,), taken as constants though they hold values themselves:
    the gradient is that of a prediction, not of a target -> scalar, in units of reward squared.
    Raises ValueError on shapes that disagree.
    """
    _same(values=values, returns=returns)
    return 0.5 * (values - returns.detach()).square().mean()


def vtrace(
    logps: Tensor,
    old_logps: Tensor,
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float = 0.99,
    rho_max: float = 1.0,
    c_max: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Advantages and critic's targets for steps that an older policy took.

    logps under the policy that learns, old_logps under the one that acted, the rest as for `gae`,
    all (T, N) -> advantages rho_t * (r_t + gamma * v_(t+1) - V(s_t)) and targets v_t, (T, N),
    without gradient. With equal policies, and neither bound below 1, they are GAE's with lam = 1.
    At rest the values are those of a policy between the two, proportional to min(rho_max * mu, pi).
    Raises ValueError on shapes that disagree, gamma outside [0, 1] and unless rho_max >= c_max >= 0.
    Espeholt et al. 2018, equations 1 and 3 and section 4.2.
    """
    _same(logps=logps, old_logps=old_logps, rewards=rewards, values=values)
    _same(next_values=next_values, terminated=terminated, truncated=truncated, rewards=rewards)
    if not 0 <= gamma <= 1 or not rho_max >= c_max >= 0:
        raise ValueError(f"bad gamma={gamma} or bounds rho_max={rho_max} < c_max={c_max}")
    ratios = (logps - old_logps).detach().exp()
    rho, c = ratios.clamp(max=rho_max), ratios.clamp(max=c_max)
    values, next_values = values.detach(), next_values.detach()
    next_values = torch.where(terminated.bool(), 0.0, next_values)
    over = terminated.bool() | truncated.bool()
    deltas = rho * (rewards + gamma * next_values - values)
    targets, advantages = torch.zeros_like(values), torch.zeros_like(values)
    after = values.new_zeros(values.shape[1:])  # v - V of the next state, 0 beyond an end
    for t in reversed(range(len(values))):
        after = torch.where(over[t], 0.0, after)
        advantages[t] = deltas[t] + rho[t] * gamma * after
        after = deltas[t] + c[t] * gamma * after
        targets[t] = values[t] + after
    return advantages, targets


def a2c_loss(agent, batch, settings) -> Tensor:
    """Actor and critic in one loss, for a batch of B steps in the shared loop."""
    logps, entropies = agent.logps(batch.obs, batch.actions)
    coef = settings.entropy_coef
    actor = actor_loss(logps, batch.advantages, entropies, entropy_coef=coef)
    return actor + settings.value_coef * critic_loss(agent.values(batch.obs), batch.returns)


def delayed(delay: int, stale: str = "gradients", rho_max: float | None = None):
    """An update as workers make it that do not wait for each other, each round `delay` updates old.

    stale="gradients" is A3C: a worker copies the weights, acts, takes its gradient at that copy, and
    by the time it is applied `delay` others have been. stale="data": the actions are as old, but the
    learner takes the gradient at its weights of now, the advantage times the ratio of policies,
    cut off at rho_max (None: no ratio). A function of the seed alone, as no threads race here.
    """
    if delay < 0 or stale not in ("gradients", "data"):
        wrong = f"delay must not be negative, got {delay}; " if delay < 0 else ""
        raise ValueError(f"{wrong}stale must be 'gradients' or 'data', got {stale!r}")
    queue = deque()

    def update(agent, optimizer, batch, settings, generator):
        parameters = list(agent.parameters())

        def gradients(batch):
            loss = a2c_loss(agent, batch, settings)
            return torch.autograd.grad(loss, parameters, allow_unused=True)

        queue.append(gradients(batch) if stale == "gradients" else batch)
        if len(queue) <= delay:
            return  # the first worker has not reported yet
        oldest = queue.popleft()
        if stale == "data":
            if rho_max is not None:
                with torch.no_grad():
                    ratios = (agent.logps(oldest.obs, oldest.actions)[0] - oldest.logps).exp()
                weighted = oldest.advantages * ratios.clamp(max=rho_max)
                oldest = replace(oldest, advantages=weighted)
            oldest = gradients(oldest)
        for parameter, gradient in zip(parameters, oldest, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_norm)
        optimizer.step()

    return update


@functools.cache
def algorithm():
    """A2C in the shared loop: short rollouts, the rewards in them and the critic's word on the rest."""
    from snippets.foundations.gae import gae
    from snippets.foundations.loop import Algorithm, Settings, descend

    @dataclass
    class A2CSettings(Settings):
        """A2C: one step of the optimizer on each short rollout of all copies."""

        updates: int = 3000
        envs: int = 16
        horizon: int = 5
        hidden: int = 32
        lr: float = 2e-3
        lam: float = 1.0
        value_coef: float = 0.5
        entropy_coef: float = 0.01
        epochs: int = 1
        minibatch: int = 0
        max_norm: float = 0.5
        check_every: int = 100

    def advantages(rollout, settings):
        parts = (rollout.rewards, rollout.values, rollout.next_values)
        ends = (rollout.terminated, rollout.truncated)
        return gae(*parts, *ends, gamma=settings.gamma, lam=settings.lam)

    return Algorithm(A2CSettings, advantages, descend(a2c_loss))


def main() -> None:
    """The demo: CartPole, until the stochastic policy solves it."""
    from snippets.foundations.loop import run_demo
    from snippets.worlds.classic import CARTPOLE

    run_demo(algorithm(), algorithm().settings, CARTPOLE)


if __name__ == "__main__":
    main()
