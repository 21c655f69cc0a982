"""Proximal Policy Optimization on a language model: per-token KL reward, GAE, clipped policy and
value losses.

Schulman et al. 2017 (arXiv:1707.06347), equation 7; GAE: Schulman et al. 2015 (arXiv:1506.02438),
equations 11 and 16; the per-token KL reward: Ouyang et al. 2022 (arXiv:2203.02155), equation 2, and
Ziegler et al. 2019 (arXiv:1909.08593).

A row is one response; its tokens are the steps of one episode. `mask` is 1 on the response's
tokens, the EOS included, and 0 elsewhere; whatever stands under a 0, NaN included, changes neither
a value nor a gradient.

    python -m snippets.rlhf.ppo
"""

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

EXP_CAP = 20.0  # exp continues linearly above: far outside any clip range, and no overflow


def _valid(mask: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, 0 wherever the mask is; ValueError if shapes disagree or nothing is valid."""
    for x in tensors:
        if x.shape != mask.shape:
            raise ValueError(f"shapes disagree: {tuple(x.shape)} against mask {tuple(mask.shape)}")
    if not mask.any():
        raise ValueError(f"no valid token: the mask of shape {tuple(mask.shape)} is all zeros")
    tensors = [x if x.dtype == torch.float64 else x.float() for x in tensors]
    # Not a product with the mask: NaN * 0 is NaN, in the value and in the gradient.
    return tuple(torch.where(mask.bool(), x, 0.0) for x in tensors)


def _exp(x: Tensor) -> Tensor:
    """exp(x), continued by its tangent above EXP_CAP: the gradient keeps its sign."""
    return torch.exp(x.clamp(max=EXP_CAP)) * (1 + (x - EXP_CAP).clamp(min=0))


def kl_rewards(
    scores: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, *, beta: float
) -> Tensor:
    """Rewards per token: -beta * (log pi - log pi_ref), plus the score on the last valid token.

    scores (B,), logps and ref_logps (B, T) of the sampled tokens, mask (B, T) -> rewards (B, T), in
    units of the score. A row sums to r(x, y) - beta * log(pi(y|x) / pi_ref(y|x)), whose mean over
    samples from pi is E[r] - beta * KL(pi || pi_ref). ValueError on shapes that disagree, no valid
    token, a score that is not finite (in a row with a valid token). Ouyang et al. 2022, equation 2.
    """
    logps, ref_logps = _valid(mask, logps, ref_logps)
    shapes = f"scores {tuple(scores.shape)} against mask {tuple(mask.shape)}"
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"shapes disagree: {shapes}")
    valid = mask.bool()
    if not torch.isfinite(scores[valid.any(-1)]).all():
        raise ValueError(f"scores must be finite, got {scores.tolist()}")
    # The last valid token is the EOS, or the last token of a response cut off at the limit. Never a
    # fixed column: with right padding, column -1 is a pad, and a reward there would be lost.
    position = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(valid, position, -1).amax(-1, keepdim=True)  # (B, 1)
    at_last = valid & (position == last)  # (B, T)
    rewards = -beta * (logps - ref_logps).detach()
    return rewards + torch.where(at_last, scores.to(rewards.dtype).unsqueeze(-1), 0.0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the critic's targets.

    rewards, values, mask (B, T) -> advantages (B, T), returns (B, T) = advantages + values; both 0
    under a 0 of the mask. values[:, t] is V(s_t) of the state before token t. The episode ends
    after a row's last valid token, where the value is 0. Positions under a 0 are stepped over (tool
    output, say): a token's successor is the next *valid* token. lam = 0 is the TD error, lam = 1
    the return minus V. ValueError on shapes that disagree, no valid token, a reward or value that
    is not finite, gamma or lam outside [0, 1]. Schulman et al. 2015, equation 16.
    """
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma and lam must lie in [0, 1], got gamma={gamma}, lam={lam}")
    rewards, values = _valid(mask, rewards, values)
    if not (torch.isfinite(rewards).all() and torch.isfinite(values).all()):
        raise ValueError("rewards and values must be finite wherever the mask is 1")
    rewards, values, valid = rewards.detach(), values.detach(), mask.bool()
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])  # (B,): nothing beyond the end
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(valid[:, t], advantage, 0.0)
        next_value = torch.where(valid[:, t], values[:, t], next_value)
        next_advantage = torch.where(valid[:, t], advantage, next_advantage)
    return advantages, torch.where(valid, advantages + values, 0.0)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """x (B, T) with mean 0 and variance 1 over the valid tokens of the batch, 0 elsewhere.

    The variance is the unbiased one. ValueError on shapes that disagree and on no valid token. One
    of the details that Huang et al. 2024 (arXiv:2403.17031) list; it is not in the PPO paper.
    """
    (x,) = _valid(mask, x)
    count = mask.sum()
    mean = x.sum() / count
    variance = torch.where(mask.bool(), (x - mean) ** 2, 0.0).sum() / (count - 1).clamp(min=1)
    return torch.where(mask.bool(), (x - mean) * torch.rsqrt(variance + 1e-8), 0.0)


def ppo_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, *, clip: float = 0.2
) -> Tensor:
    """The clipped surrogate, negated, as a mean over the valid tokens of the batch.

    logps (B, T) under the policy that learns (with gradient), old_logps (B, T) under the one that
    sampled, advantages and mask (B, T) -> scalar. ValueError on shapes that disagree, no valid
    token, clip < 0. Schulman et al. 2017, equation 7.
    """
    if clip < 0:
        raise ValueError(f"clip must not be negative, got {clip}")
    logps, old_logps, advantages = _valid(mask, logps, old_logps, advantages)
    ratio = _exp(logps - old_logps.detach())  # (B, T)
    advantages = advantages.detach()
    # min of the two: the clip only ever removes an incentive to go further; it never hides a step
    # that made things worse.
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    # Positions under a 0 hold advantage 0, so they add nothing to the sum.
    return -surrogate.sum() / mask.sum()


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None = None
) -> Tensor:
    """Half the squared error of the critic, as a mean over the valid tokens; with `clip`, the
    larger of the plain and the clipped error.

    values (B, T) with gradient, old_values (B, T) as at sampling, returns and mask (B, T) ->
    scalar, in units of reward squared. `clip` is in units of reward: scale the reward and it must
    be scaled too. ValueError on shapes that disagree, no valid token, clip < 0. The clipped form is
    OpenAI baselines' (Huang et al. 2024, arXiv:2403.17031); it is not in the PPO paper.
    """
    values, old_values, returns = _valid(mask, values, old_values, returns)
    old_values, returns = old_values.detach(), returns.detach()
    error = (values - returns) ** 2
    if clip is not None:
        if clip < 0:
            raise ValueError(f"clip must not be negative, got {clip}")
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (clipped - returns) ** 2)
    return 0.5 * error.sum() / mask.sum()


@functools.cache
def algorithm():
    """PPO in the shared loop: the KL in the reward of each token, GAE, and a critic of its own."""
    from snippets.rlhf.loop import Algorithm, Settings

    @dataclass
    class PPOSettings(Settings):
        """PPO with a critic of its own: a copy of the policy's trunk and a linear head."""

        gamma: float = field(default=1.0, metadata={"help": "discount a token"})
        lam: float = field(default=0.95, metadata={"help": "GAE's lambda"})
        clip: float = field(default=0.2, metadata={"help": "of the ratio"})
        value_clip: float | None = field(default=None, metadata={"help": "in units of reward"})
        whiten: bool = field(default=True, metadata={"help": "a process's advantages"})
        prompts: int = 128
        group: int = 1
        beta: float = 0.01
        lr: float = 5e-5
        steps: int = 100
        out: str = "runs/ppo"

    def advantages(rollout, settings):
        batch = rollout.completions
        mask, ref_logps = batch.mask, rollout.ref_logps if settings.beta else batch.logps
        rewards = kl_rewards(rollout.scores, batch.logps, ref_logps, mask, beta=settings.beta)
        steps = {"gamma": settings.gamma, "lam": settings.lam}
        advantages, returns = gae(rewards, rollout.values, mask, **steps)
        return (whiten(advantages, mask) if settings.whiten else advantages), returns

    def loss(logps, rollout, rows, advantages, settings):
        old_logps, mask = rollout.completions.logps[rows], rollout.completions.mask[rows]
        return ppo_loss(logps, old_logps, advantages, mask, clip=settings.clip)

    def critic_loss(values, rollout, rows, returns, settings):
        old_values, mask = rollout.values[rows], rollout.completions.mask[rows]
        return value_loss(values, old_values, returns, mask, clip=settings.value_clip)

    return Algorithm(PPOSettings, advantages, loss, lambda settings: True, critic_loss)


def main() -> None:
    """The demo: from the arithmetic warm start, or from any causal LM and JSONL of prompts."""
    from snippets.rlhf.loop import run_demo

    run_demo(algorithm())


if __name__ == "__main__":
    main()
