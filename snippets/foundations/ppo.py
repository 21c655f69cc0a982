"""Proximal Policy Optimization with discrete or continuous actions.

Schulman et al. 2017 (arXiv:1707.06347), equation 7. What is not in the paper (the clip of the values,
the normalised advantages, the stop by KL) is marked so, and is a setting. On a language model:
snippets/rlhf/ppo.py.

    python -m snippets.foundations.ppo
"""

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

EXP_CAP = 20.0  # exp continues linearly above: far outside any clip, and no overflow


def _same(**tensors: Tensor) -> None:
    """ValueError, with all shapes, unless they are the same and something is in them."""
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
    if len({tuple(x.shape) for x in tensors.values()}) > 1:
        raise ValueError(f"shapes disagree: {shapes}")
    if not next(iter(tensors.values())).numel():
        raise ValueError(f"no steps: {shapes}")


def probability_ratio(logps: Tensor, old_logps: Tensor) -> Tensor:
    """rho = pi(a|s) / pi_old(a|s) of the actions taken: (B,), (B,) -> (B,), gradient into logps.

    Above exp(EXP_CAP) it continues along its tangent, so that gradients stay finite and keep their
    sign. Raises ValueError on shapes that disagree and on no steps.
    """
    _same(logps=logps, old_logps=old_logps)
    x = logps - old_logps.detach()
    return x.clamp(max=EXP_CAP).exp() * (1 + (x - EXP_CAP).clamp(min=0))


def ppo_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, *, clip: float = 0.2) -> Tensor:
    """-min(rho * A, clip(rho, 1 - clip, 1 + clip) * A), a mean over steps.

    logps (B,) with gradient, old_logps of the policy that acted and advantages (B,), both taken as
    constants -> scalar. A step has no gradient where A > 0 and rho > 1 + clip, or A < 0 and
    rho < 1 - clip, and the full one everywhere else. clip = math.inf: no clip. Raises ValueError on
    shapes that disagree, no steps, clip < 0. Schulman et al. 2017, equation 7.
    """
    if not clip >= 0:
        raise ValueError(f"clip must not be negative, got {clip}")
    _same(logps=logps, old_logps=old_logps, advantages=advantages)
    ratio, advantages = probability_ratio(logps, old_logps), advantages.detach()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float = math.inf
) -> Tensor:
    """Half the squared error of V(s); with a clip, the larger of this and that of V held within
    `clip` of its old value. A mean over steps.

    values (B,) with gradient, old_values and returns (B,), taken as constants -> scalar, in units of
    reward squared; `clip` is in units of reward. Raises ValueError on shapes that disagree, no
    steps, clip < 0. The clip is OpenAI Baselines' and not in the paper.
    """
    if not clip >= 0:
        raise ValueError(f"clip must not be negative, got {clip}")
    _same(values=values, old_values=old_values, returns=returns)
    returns, old_values = returns.detach(), old_values.detach()
    error = (values - returns).square()
    if clip < math.inf:
        held = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (held - returns).square())
    return 0.5 * error.mean()


def normalise(advantages: Tensor) -> Tensor:
    """(B,) -> (B,) with mean 0 and (unbiased) standard deviation 1: the step no longer depends on
    the scale of the reward. A single step becomes 0, and so do steps that are all alike. ValueError
    on no steps. Not in the paper."""
    if not len(advantages):
        raise ValueError("no steps: advantages (0,)")
    # From the first one on: the mean of equal numbers is rounded, and 1e-8 would blow that up.
    centred = advantages - advantages[0]
    centred = centred - centred.mean()
    return centred / (centred.std() + 1e-8) if len(centred) > 1 else centred


def approximate_kl(logps: Tensor, old_logps: Tensor) -> Tensor:
    """KL(pi_old || pi), estimated from actions that pi_old took: the mean of rho - 1 - log rho.

    (B,), (B,) -> scalar, in nats: unbiased, and no term is negative. Raises ValueError on shapes
    that disagree and on no steps. Schulman 2020 (k3).
    """
    return (probability_ratio(logps, old_logps) - 1 - (logps - old_logps)).mean()


@functools.cache
def algorithm():
    """PPO in the shared loop: several epochs of minibatches on each rollout."""
    from snippets.foundations.gae import gae
    from snippets.foundations.loop import Algorithm, Settings, descend

    @dataclass
    class PPOSettings(Settings):
        """PPO. inf turns a clip or the stop by KL off; `normalise` and `anneal` are 0 or 1."""

        lr: float = 8e-3
        clip: float = 0.2
        value_clip: float = math.inf
        epochs: int = 4
        minibatch: int = 512
        normalise: int = 1
        value_coef: float = 0.5
        entropy_coef: float = 0.0
        max_norm: float = 0.5
        anneal: int = 0  # the learning rate falls to 0 over `updates`
        target_kl: float = math.inf  # no further epoch beyond it

    def advantages(rollout, settings):
        parts = (rollout.rewards, rollout.values, rollout.next_values)
        ends = (rollout.terminated, rollout.truncated)
        return gae(*parts, *ends, gamma=settings.gamma, lam=settings.lam)

    def loss(agent, batch, settings):
        logps, entropies = agent.logps(batch.obs, batch.actions)
        weights = normalise(batch.advantages) if settings.normalise else batch.advantages
        policy = ppo_loss(logps, batch.logps, weights, clip=settings.clip)
        values = agent.values(batch.obs)
        value = value_loss(values, batch.values, batch.returns, clip=settings.value_clip)
        bonus = settings.entropy_coef * entropies.mean() if settings.entropy_coef else 0.0
        return policy + settings.value_coef * value - bonus

    epoch = descend(loss)

    def update(agent, optimizer, batch, settings, generator):
        group = optimizer.param_groups[0]
        done = group["updates_done"] = group.get("updates_done", -1) + 1
        if settings.anneal:
            group["lr"] = settings.lr * (1 - done / settings.updates)
        for _ in range(settings.epochs):
            epoch(agent, optimizer, batch, replace(settings, epochs=1), generator)
            if settings.target_kl < math.inf:
                with torch.no_grad():
                    logps, _ = agent.logps(batch.obs, batch.actions)
                if approximate_kl(logps, batch.logps) > settings.target_kl:
                    break

    return Algorithm(PPOSettings, advantages, update)


def main() -> None:
    """The demo: CartPole."""
    from snippets.foundations.loop import run_demo
    from snippets.worlds.classic import CARTPOLE

    run_demo(algorithm(), algorithm().settings, CARTPOLE)


if __name__ == "__main__":
    main()
