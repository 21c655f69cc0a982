"""REINFORCE++: PPO without the critic, its advantages normalised over the whole batch.

Hu et al. 2025 (arXiv:2501.03262, version 9 of November 2025), equations 1 and 4 to 8. Two variants:

    plain      r less the KL still to come, a token; the batch's mean off, over its std   eq. 4, 5
    baseline   r less the mean of its group; the same normalisation; k2 in the loss     eq. 6 to 8

The paper's equation 1 averages each response, then the responses; here, as by default in the
authors' OpenRLHF, all tokens of the batch are averaged at once.

    python -m snippets.rlhf.reinforce_pp
    python -m snippets.rlhf.reinforce_pp --variant baseline
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

# exp continues linearly above this: e^20 is far outside any clip range, and never overflows.
EXP_CAP = 20.0


def _valid(mask: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in float32 or float64, 0 wherever the mask is; ValueError if shapes disagree or
    nothing is valid. Not a product with the mask: NaN * 0 is NaN, in the gradient too."""
    for x in tensors:
        if x.shape != mask.shape:
            raise ValueError(f"shapes disagree: {tuple(x.shape)} against mask {tuple(mask.shape)}")
    if not mask.any():
        raise ValueError(f"no valid token: the mask of shape {tuple(mask.shape)} is all zeros")
    tensors = [x if x.dtype == torch.float64 else x.float() for x in tensors]
    return tuple(torch.where(mask.bool(), x, 0.0) for x in tensors)


def reward_to_go(scores: Tensor, token_kl: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    """What is still to come at each token: the score, less beta times the KL of this token and of
    all after it. Equation 4.

    scores (B,), token_kl (B, T) = log pi - log pi_ref of the sampled tokens at sampling (k1), mask
    (B, T) -> (B, T), in units of the score, 0 under a 0 of the mask. The discount is 1: the KL paid
    before a token is no consequence of it. ValueError on shapes that disagree, no valid token, a
    score or a KL that is not finite (where the mask is 1), a negative or infinite beta.
    """
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be finite and not negative, got {beta}")
    if scores.shape != mask.shape[:1]:
        raise ValueError(
            f"shapes disagree: scores {tuple(scores.shape)} against mask {tuple(mask.shape)}"
        )
    (token_kl,) = _valid(mask, token_kl)
    scores = torch.where(mask.bool().any(-1), scores.detach().to(token_kl.dtype), 0.0)  # (B,)
    if not (torch.isfinite(scores).all() and torch.isfinite(token_kl).all()):
        raise ValueError(f"scores and token_kl must be finite, got scores {scores.tolist()}")
    to_come = token_kl.detach().flip(-1).cumsum(-1).flip(-1)  # (B, T)
    return torch.where(mask.bool(), scores[:, None] - beta * to_come, 0.0)


def group_baseline(scores: Tensor, group: int) -> Tensor:
    """scores (B,) in groups of `group` that stand together -> (B,), each less its group's mean; a
    group of equal scores gives zeros. Equation 6. ValueError on a group below 2 or one that does
    not divide B, and on a score that is not finite."""
    if group < 2 or scores.dim() != 1 or len(scores) % group:
        raise ValueError(
            f"want scores (B,) and a group of at least 2 that divides B; got "
            f"{tuple(scores.shape)} and {group}"
        )
    if not torch.isfinite(scores).all():
        raise ValueError(f"scores must be finite, got {scores.tolist()}")
    groups = scores.view(-1, group).double()  # the float64 mean of equal float32 numbers is exact
    centred = (groups - groups.mean(-1, keepdim=True)).flatten()
    return centred if scores.dtype == torch.float64 else centred.float()


def normalize(
    x: Tensor, mask: Tensor, *, total: Callable[[Tensor], Tensor] = lambda sums: sums
) -> Tensor:
    """x (B, T) with mean 0 and variance 1 over the valid tokens of the batch, 0 elsewhere.
    Equations 5 and 7.

    One shift and one factor for all prompts. The std is the population's, and at least 1e-4, as in
    OpenRLHF: where all are equal, all become 0. `total` adds sums up over processes, so that the
    batch is that of all of them. ValueError on shapes that disagree and on no valid token.
    """
    (x,) = _valid(mask, x)
    valid, wide = mask.bool(), x.double()  # float64: the mean of equal numbers is that number
    count, sums = total(torch.stack([valid.sum().double(), wide.sum()])).unbind()
    centred = torch.where(valid, wide - sums / count, 0.0)
    variance = total((centred**2).sum()) / count
    return (centred * torch.rsqrt(variance.clamp(min=1e-8))).to(x.dtype)


def reinforce_pp_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    ref_logps: Tensor | None = None,
    beta: float = 0.0,
) -> Tensor:
    """PPO's clipped surrogate, negated, plus beta * k2, as a mean over all tokens of the batch.
    Equations 1 and 8.

    logps (B, T) with gradient, old_logps, ref_logps, mask (B, T), advantages (B, T) -> scalar.
    Above a log-ratio of 20 the ratio goes on along its tangent, so that nothing overflows.
    k2 = (log pi - log pi_ref)^2 / 2: for samples of pi its gradient is, at each prefix, that of
    KL(pi || pi_ref). ValueError on shapes that disagree, no valid token, a negative clip, an
    advantage that is not finite, a negative or infinite beta, beta without ref_logps.
    """
    if clip < 0:
        raise ValueError(f"clip must not be negative, got {clip}")
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be finite and not negative, got {beta}")
    if beta and ref_logps is None:
        raise ValueError(f"beta={beta} needs ref_logps")
    logps, old_logps, advantages = _valid(mask, logps, old_logps.detach(), advantages.detach())
    if not torch.isfinite(advantages).all():
        raise ValueError("advantages must be finite wherever the mask is 1")
    log_ratio = logps - old_logps
    # e^x, continued by its tangent: the gradient keeps its sign and never becomes inf or 0.
    ratio = torch.exp(log_ratio.clamp(max=EXP_CAP)) * (1 + (log_ratio - EXP_CAP).relu())
    # Positions under a 0 hold advantage 0, so they add nothing to the sum.
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    if beta:
        loss = loss + beta * 0.5 * (logps - _valid(mask, ref_logps.detach())[0]) ** 2
    return loss.sum() / mask.sum()


@functools.cache
def algorithm():
    """REINFORCE++ in the shared loop: PPO's loss, and no critic."""
    from torch import distributed

    from snippets.rlhf.loop import Algorithm, Settings

    @dataclass
    class ReinforcePPSettings(Settings):
        """REINFORCE++; with --prompts 128 --group 1, the paper's Algorithm 1."""

        variant: str = field(default="plain", metadata={"help": "plain or baseline"})
        clip: float = field(default=0.2, metadata={"help": "of the ratio"})
        beta: float = 0.01
        lr: float = 5e-5
        steps: int = 150
        out: str = "runs/reinforce-pp"

    def total(sums):
        if distributed.is_initialized():
            distributed.all_reduce(sums)
        return sums

    def advantages(rollout, settings):
        if settings.variant not in ("plain", "baseline"):
            raise ValueError(f"variant must be 'plain' or 'baseline', got {settings.variant!r}")
        scores, token_kl, mask = rollout.scores, rollout.token_kl(), rollout.completions.mask
        if settings.variant == "plain":
            returns = reward_to_go(scores, token_kl, mask, beta=settings.beta)
        else:  # no KL in the reward: it stands in the loss
            returns = group_baseline(scores, settings.group)[:, None].expand_as(mask)
        return normalize(returns, mask, total=total), None

    def loss(logps, rollout, rows, advantages, settings):
        old_logps, mask = rollout.completions.logps[rows], rollout.completions.mask[rows]
        if settings.variant == "plain" or not settings.beta:
            return reinforce_pp_loss(logps, old_logps, advantages, mask, clip=settings.clip)
        k2 = {"ref_logps": rollout.ref_logps[rows], "beta": settings.beta}
        return reinforce_pp_loss(logps, old_logps, advantages, mask, clip=settings.clip, **k2)

    return Algorithm(ReinforcePPSettings, advantages, loss, lambda settings: True)


def main() -> None:
    """The demo: from the arithmetic warm start, or from any causal LM and JSONL of prompts."""
    from snippets.rlhf.loop import run_demo

    run_demo(algorithm())


if __name__ == "__main__":
    main()
