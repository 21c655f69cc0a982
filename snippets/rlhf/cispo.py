"""Clipped IS-weight Policy Optimization: no token is dropped, only its weight is capped.

MiniMax 2025, MiniMax-M1 (arXiv:2506.13585), equations 4 and 5. PPO's clip removes the gradient of a
token whose ratio has left the range on the side that its advantage pushes to. CISPO clips the
importance weight instead, under a stop-gradient, and every token keeps its gradient of log pi.

    python -m snippets.rlhf.cispo
"""

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


def cispo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_high: float = 4.0,
    clip_low: float | None = None,
) -> Tensor:
    """-mean over all tokens of sg(clip(ratio, 1 - clip_low, 1 + clip_high)) * advantage * log pi,
    where sg stops the gradient and ratio = pi / pi_old.

    logps (B, T) under the policy that learns (with gradient), old_logps (B, T) under the one that
    sampled, advantages (B,), one a response, mask (B, T) -> scalar; only its gradient has a
    meaning, sum of weight * advantage * grad log pi over the number of tokens, negated. A row
    without a valid token adds nothing. MiniMax 2025, equations 4 and 5.

    clip_high  the largest weight is 1 + clip_high. MiniMax tuned it and gave no value; a largest
               weight of 5 is what TRL recommends for ScaleRL's eps_max (arXiv:2510.13786).
    clip_low   None: no lower bound, as in the paper's experiments. A bound above 0 would go on
               pushing a bad token down however unlikely it has become.

    Raises ValueError on shapes that disagree, a batch without a valid token, a clip that is
    negative or not finite, an advantage that is not finite.
    """
    for name, clip in (("clip_high", clip_high), ("clip_low", clip_low)):
        if clip is not None and not (clip >= 0 and math.isfinite(clip)):
            raise ValueError(f"{name} must be finite and not negative, got {clip}")
    for name, x in (("logps", logps), ("old_logps", old_logps)):
        if x.shape != mask.shape:
            raise ValueError(
                f"shapes disagree: {name} {tuple(x.shape)} against mask {tuple(mask.shape)}"
            )
    if advantages.shape != mask.shape[:1]:
        raise ValueError(
            f"shapes disagree: advantages {tuple(advantages.shape)} against mask "
            f"{tuple(mask.shape)}; want (B,)"
        )
    valid = mask.bool()
    if not valid.any():
        raise ValueError(f"no valid token: the mask of shape {tuple(mask.shape)} is all zeros")
    if not torch.isfinite(advantages[valid.any(-1)]).all():
        raise ValueError(f"advantages must be finite, got {advantages.tolist()}")

    dtype = torch.float64 if logps.dtype == torch.float64 else torch.float32
    # torch.where, not a product with the mask: NaN * 0 is NaN, in the value and in the gradient.
    logps = torch.where(valid, logps.to(dtype), 0.0)  # (B, T)
    old_logps = torch.where(valid, old_logps.to(dtype), 0.0)
    advantages = torch.where(valid.any(-1), advantages.detach().to(dtype), 0.0)[:, None]  # (B, 1)

    # Without the stop-gradient the gradient would be ratio * A * (1 + log pi) * grad log pi: below
    # a probability of 1/e, that is nearly everywhere it matters, it would have the wrong sign.
    ratio = (logps - old_logps).detach().exp()
    # The same for advantages of both signs: this is a weight, not PPO's pessimistic minimum.
    weight = ratio.clamp(0.0 if clip_low is None else 1 - clip_low, 1 + clip_high)  # (B, T)
    return -(weight * advantages * logps).sum() / valid.sum()


@functools.cache
def algorithm():
    """CISPO in the shared loop: GRPO's advantages, and several updates a batch, since in the first
    of them every weight is 1."""
    from snippets.rlhf.grpo import group_advantages
    from snippets.rlhf.loop import Algorithm, Settings

    @dataclass
    class CISPOSettings(Settings):
        """CISPO; the paper has no KL term, and with beta it stands in the reward."""

        scale: str = field(default="std", metadata={"help": "std (as in the paper) or none"})
        clip_high: float = field(default=4.0, metadata={"help": "the largest weight, less 1"})
        minibatches: int = 4
        lr: float = 2e-5
        steps: int = 150
        out: str = "runs/cispo"

    def advantages(rollout, settings):
        rewards = rollout.scores - settings.beta * rollout.token_kl().sum(-1)  # (B,)
        groups = rewards.view(-1, settings.group)  # (P, G)
        return group_advantages(groups, scale=settings.scale).flatten(), None

    def loss(logps, rollout, rows, advantages, settings):
        old_logps, mask = rollout.completions.logps[rows], rollout.completions.mask[rows]
        return cispo_loss(logps, old_logps, advantages, mask, clip_high=settings.clip_high)

    return Algorithm(CISPOSettings, advantages, loss, lambda settings: True)


def main() -> None:
    """The demo: from the arithmetic warm start, or from any causal LM and JSONL of prompts."""
    from snippets.rlhf.loop import run_demo

    run_demo(algorithm())


if __name__ == "__main__":
    main()
