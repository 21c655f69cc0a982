"""Group Relative Policy Optimization; Dr. GRPO, DAPO and GSPO are settings of the same functions.

GRPO: Shao et al. 2024, DeepSeekMath (arXiv:2402.03300), equations 3 and 4.
Dr. GRPO: Liu et al. 2025 (arXiv:2503.20783), section 3.2 and listing 1.
DAPO: Yu et al. 2025 (arXiv:2503.14476), equations 8 and 9 (clip-higher and the token mean).
GSPO: Zheng et al. 2025 (arXiv:2507.18071), equations 5 to 7.

    GRPO      group_advantages(r)                grpo_loss(...)
    Dr. GRPO  group_advantages(r, scale="none")  grpo_loss(..., normalize="constant", max_len=T)
    DAPO      group_advantages(r)                grpo_loss(..., normalize="token", clip_high=0.28)
    GSPO      group_advantages(r)                grpo_loss(..., level="sequence",
                                                           clip_low=3e-4, clip_high=4e-4)

    python -m snippets.rlhf.grpo
"""

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

# exp continues linearly above this: e^20 is far outside any clip range, and never overflows.
EXP_CAP = 20.0


def _exp(x: Tensor) -> Tensor:
    """e^x, continued by its tangent above EXP_CAP: the gradient keeps its sign and never becomes
    inf or 0."""
    return torch.exp(x.clamp(max=EXP_CAP)) * (1 + (x - EXP_CAP).clamp(min=0))


def group_advantages(rewards: Tensor, *, scale: str = "std", eps: float = 1e-4) -> Tensor:
    """How much better each response is than the mean of its group.

    rewards (P, G): P prompts, G responses each -> advantages (P, G), in float32 or float64.
    scale="std" divides by the group's standard deviation (the unbiased one, G - 1, as in torch and
    TRL) plus eps; scale="none" does not (Dr. GRPO). A group whose rewards are all equal gets exact
    zeros. Shao et al. 2024, section 4.1.2.

    Raises ValueError where rewards are not (P, G), not finite, or G < 2, and on an unknown scale.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards must be (P, G) with a group G of at least 2, got shape {tuple(rewards.shape)}"
        )
    if scale not in ("std", "none"):
        raise ValueError(f"scale must be 'std' or 'none', got {scale!r}")
    if not torch.isfinite(rewards).all():
        raise ValueError(f"rewards must be finite, got {rewards.tolist()}")
    rewards = rewards if rewards.dtype == torch.float64 else rewards.float()
    advantages = rewards - rewards.mean(dim=1, keepdim=True)  # (P, G)
    if scale == "std":
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + eps)
    # The mean of equal rewards may miss them by a rounding error, which the division blows up.
    same = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)  # (P, 1)
    return torch.where(same, 0.0, advantages)


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ref_logps: Tensor | None = None,
    beta: float = 0.0,
    level: str = "token",
    normalize: str = "sequence",
    max_len: int | None = None,
) -> Tensor:
    """The clipped surrogate of a batch of responses, negated, with beta * k3 added per token where
    beta is not 0. Shao et al. 2024, equations 3 and 4.

    logps, old_logps, ref_logps, mask (B, T); advantages (B,), one a response -> scalar.

    level      "token": one ratio a token (GRPO). "sequence": the geometric mean of a response's
               ratios (GSPO).
    normalize  "sequence": mean over a response's tokens, then over responses (GRPO). "token": one
               mean over all tokens of the batch (DAPO). "constant": sum / (B * max_len) (Dr. GRPO).
               A row without a valid token adds 0 and still counts in B.
    clip_low, clip_high  a ratio gains nothing by leaving [1 - clip_low, 1 + clip_high]; DAPO's
               clip-higher sets 0.2 and 0.28, GSPO 3e-4 and 4e-4.

    Raises ValueError on shapes that disagree, a batch without a valid token, an unknown level or
    normalize, "constant" without max_len, beta without ref_logps, a negative clip, an advantage
    that is not finite.
    """
    if level not in ("token", "sequence"):
        raise ValueError(f"level must be 'token' or 'sequence', got {level!r}")
    if normalize not in ("sequence", "token", "constant"):
        raise ValueError(f"normalize must be 'sequence', 'token' or 'constant', got {normalize!r}")
    if normalize == "constant" and (max_len is None or max_len < 1):
        raise ValueError(
            f"normalize='constant' needs max_len, the longest response allowed; got {max_len}"
        )
    if clip_low < 0 or clip_high < 0:
        raise ValueError(
            f"the clips must not be negative, got clip_low={clip_low}, clip_high={clip_high}"
        )
    if beta and ref_logps is None:
        raise ValueError(f"beta={beta} needs ref_logps")
    for name, x in (("logps", logps), ("old_logps", old_logps), ("ref_logps", ref_logps)):
        if x is not None and x.shape != mask.shape:
            raise ValueError(
                f"shapes disagree: {name} {tuple(x.shape)} against mask {tuple(mask.shape)}"
            )
    if advantages.shape != mask.shape[:1]:
        raise ValueError(
            f"shapes disagree: advantages {tuple(advantages.shape)} against mask {tuple(mask.shape)}; "
            "want (B,)"
        )
    valid = mask.bool()
    if not valid.any():
        raise ValueError(f"no valid token: the mask of shape {tuple(mask.shape)} is all zeros")
    if not torch.isfinite(advantages[valid.any(-1)]).all():
        raise ValueError(f"advantages must be finite, got {advantages.tolist()}")

    dtype = torch.float64 if logps.dtype == torch.float64 else torch.float32
    # torch.where, not a product with the mask: NaN * 0 is NaN, in the value and in the gradient.
    logps = torch.where(valid, logps.to(dtype), 0.0)  # (B, T)
    old_logps = torch.where(valid, old_logps.detach().to(dtype), 0.0)
    advantages = torch.where(valid.any(-1), advantages.detach().to(dtype), 0.0)[:, None]  # (B, 1)
    lengths = valid.sum(-1, keepdim=True).clamp(min=1)  # (B, 1)

    log_ratio = logps - old_logps
    if level == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True) / lengths  # (B, 1)
    ratio = _exp(log_ratio)
    per_token = -torch.minimum(
        ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    )
    if beta:
        # k3 >= 0 estimates KL(pi || ref) from samples of pi: the ratio is ref / pi, not pi / ref.
        log_r = torch.where(valid, ref_logps.detach().to(dtype), 0.0) - logps
        per_token = per_token + beta * (_exp(log_r) - log_r - 1)
    # A sequence's one ratio is spread over its tokens here.
    per_token = torch.where(valid, per_token, 0.0)  # (B, T)

    if normalize == "sequence":
        return (per_token.sum(-1) / lengths.squeeze(-1)).mean()
    if normalize == "token":
        return per_token.sum() / valid.sum()
    return per_token.sum() / (mask.shape[0] * max_len)


@functools.cache
def algorithm():
    """GRPO in the shared loop; Dr. GRPO, DAPO and GSPO by the settings."""
    from snippets.rlhf.loop import Algorithm, Settings

    @dataclass
    class GRPOSettings(Settings):
        """Two functions, and what GRPO, Dr. GRPO, DAPO and GSPO set in them."""

        scale: str = field(default="std", metadata={"help": "std (GRPO) or none (Dr. GRPO)"})
        level: str = field(default="token", metadata={"help": "token, or sequence (GSPO)"})
        normalize: str = field(default="sequence", metadata={"help": "or token, or constant"})
        clip_low: float = field(default=0.2, metadata={"help": "a ratio stays above 1 - clip_low"})
        clip_high: float = field(default=0.2, metadata={"help": "and below 1 + clip_high"})
        lr: float = 5e-5
        steps: int = 150
        out: str = "runs/grpo"

    def advantages(rollout, settings):
        groups = rollout.scores.view(-1, settings.group)  # (P, G)
        return group_advantages(groups, scale=settings.scale).flatten(), None

    def loss(logps, rollout, rows, advantages, settings):
        return grpo_loss(
            logps,
            rollout.completions.logps[rows],
            advantages,
            rollout.completions.mask[rows],
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            ref_logps=rollout.ref_logps[rows] if settings.beta else None,
            beta=settings.beta,
            level=settings.level,
            normalize=settings.normalize,
            max_len=settings.max_new_tokens,
        )

    return Algorithm(GRPOSettings, advantages, loss, lambda settings: settings.normalize == "token")


def main() -> None:
    """The demo: from the arithmetic warm start, or from any causal LM and JSONL of prompts."""
    from snippets.rlhf.loop import run_demo

    run_demo(algorithm())


if __name__ == "__main__":
    main()
