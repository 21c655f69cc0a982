"""RLOO, REINFORCE leave-one-out: the mean of the other responses to the prompt as baseline.

Ahmadian et al. 2024 (arXiv:2402.14740), section on RLOO; the estimator is from Kool et al. 2019,
Buy 4 REINFORCE Samples, Get a Baseline for Free! A whole response is one action.

    python -m snippets.rlhf.rloo
"""

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

# exp continues linearly above this: e^20 is far outside any clip range, and never overflows.
EXP_CAP = 20.0


def rloo_advantages(rewards: Tensor, *, normalize: bool = False) -> Tensor:
    """How much better each response is than the mean of the *others* to the same prompt.

    rewards (P, G): P prompts, G responses each, the KL penalty already inside -> advantages (P, G),
    in float32 or float64, in units of reward. They are G / (G - 1) times r - mean(r), and exactly 0
    where a group's rewards are equal. normalize=True divides by the standard deviation over the
    whole batch (the unbiased one) plus 1e-4, as TRL's normalize_advantages: one factor for all
    prompts of a batch, so it rescales the step. With the KL in the reward the optimum, where all
    advantages are 0, stays a fixed point; a KL term in the loss would not be scaled with them.

    Raises ValueError where rewards are not (P, G), not finite, or G < 2: one response has no
    others.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards must be (P, G) with a group G of at least 2, got shape {tuple(rewards.shape)}"
        )
    if not torch.isfinite(rewards).all():
        raise ValueError(f"rewards must be finite, got {rewards.tolist()}")
    rewards = (rewards if rewards.dtype == torch.float64 else rewards.float()).detach()
    shifted = rewards - rewards[:, :1]  # equal rewards become zeros, so that rounding adds nothing
    others = (shifted.sum(1, keepdim=True) - shifted) / (rewards.shape[1] - 1)  # (P, G)
    advantages = shifted - others
    return advantages / (advantages.std() + 1e-4) if normalize else advantages


def rloo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """-min(ratio * A, clip(ratio) * A), averaged over responses, where the ratio is that of the
    *whole* response: the product of its tokens' ratios, with no root 1/length as in GSPO.

    logps (B, T) with gradient, old_logps (B, T) under the policy that sampled, advantages (B,),
    mask (B, T) -> scalar. On-policy every ratio is 1, no clip is active, and the gradient is that
    of -A * log pi(response): the paper's REINFORCE. The ratio serves further passes over a batch;
    it is TRL 1.16's form. Above a log-ratio of 20 it goes on along its tangent, so that no value
    and no gradient overflows. A row without a valid token adds -A, without gradient.

    Raises ValueError on shapes that disagree, a batch without a valid token, a negative clip, an
    advantage that is not finite.
    """
    if clip_low < 0 or clip_high < 0:
        raise ValueError(
            f"the clips must not be negative, got clip_low={clip_low}, clip_high={clip_high}"
        )
    for name, x in (("logps", logps), ("old_logps", old_logps)):
        if x.shape != mask.shape or mask.dim() != 2:
            raise ValueError(
                f"shapes disagree: {name} {tuple(x.shape)} against mask {tuple(mask.shape)}; "
                "want (B, T)"
            )
    if advantages.shape != mask.shape[:1]:
        raise ValueError(
            f"shapes disagree: advantages {tuple(advantages.shape)} against mask "
            f"{tuple(mask.shape)}; want (B,)"
        )
    valid = mask.bool()
    if not valid.any():
        raise ValueError(f"no valid token: the mask of shape {tuple(mask.shape)} is all zeros")
    if not torch.isfinite(advantages).all():
        raise ValueError(f"advantages must be finite, got {advantages.tolist()}")

    dtype = torch.float64 if logps.dtype == torch.float64 else torch.float32
    advantages = advantages.detach().to(dtype)  # (B,)
    # torch.where, not a product with the mask: NaN * 0 is NaN, in the value and in the gradient.
    log_ratios = torch.where(valid, logps.to(dtype) - old_logps.detach().to(dtype), 0.0)  # (B, T)
    log_ratio = log_ratios.sum(-1)  # (B,), of the whole response
    ratio = log_ratio.clamp(max=EXP_CAP).exp() * (1 + (log_ratio - EXP_CAP).clamp(min=0))
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


@functools.cache
def algorithm():
    """RLOO in the shared loop: the KL in the response's reward, the mean of the others as
    baseline."""
    from snippets.rlhf.loop import Algorithm, Settings

    @dataclass
    class RLOOSettings(Settings):
        """RLOO: a group of responses a prompt, each against the mean of the others."""

        clip: float = field(default=0.2, metadata={"help": "of the response's ratio"})
        beta: float = 0.01
        lr: float = 5e-5
        steps: int = 120
        out: str = "runs/rloo"

    def advantages(rollout, settings):
        rewards = rollout.scores - settings.beta * rollout.token_kl().sum(-1)  # (B,)
        return rloo_advantages(rewards.view(-1, settings.group)).flatten(), None

    def loss(logps, rollout, rows, advantages, settings):
        old_logps, mask = rollout.completions.logps[rows], rollout.completions.mask[rows]
        clips = {"clip_low": settings.clip, "clip_high": settings.clip}
        return rloo_loss(logps, old_logps, advantages, mask, **clips)

    return Algorithm(RLOOSettings, advantages, loss)


def main() -> None:
    """The demo: from the arithmetic warm start, or from any causal LM and JSONL of prompts."""
    from snippets.rlhf.loop import run_demo

    run_demo(algorithm())


if __name__ == "__main__":
    main()
