"""Kahneman-Tversky Optimization (KTO): each response is judged alone, good or bad, against a reference
point, the policy's KL from the reference.

Ethayarajh et al. 2024 (arXiv:2402.01306), section 4.

    python -m snippets.preferences.kto
"""

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


def reference_point(mismatched_logps: Tensor, ref_mismatched_logps: Tensor) -> Tensor:
    """The authors' estimate of KL(pi || pi_ref): the mean log-ratio of responses that belong to
    *other* prompts, or 0 if that is negative.

    Both inputs (N,): log-probabilities of whole responses after a prompt that is not theirs ->
    scalar in nats, without gradient. It costs no sampling, and is biased: the responses are not
    the policy's own. Raises ValueError on shapes that disagree or an empty batch.
    """
    if mismatched_logps.shape != ref_mismatched_logps.shape or mismatched_logps.dim() != 1:
        raise ValueError(
            f"shapes disagree: {tuple(mismatched_logps.shape)} against "
            f"{tuple(ref_mismatched_logps.shape)}; want (N,) for both"
        )
    if mismatched_logps.numel() == 0:
        raise ValueError("an empty batch: shape (0,)")
    dtype = torch.float64 if mismatched_logps.dtype == torch.float64 else torch.float32
    ratios = mismatched_logps.detach().to(dtype) - ref_mismatched_logps.detach().to(dtype)
    return ratios.mean().clamp(min=0)


def kto_loss(
    policy_desirable_logps: Tensor,
    policy_undesirable_logps: Tensor,
    ref_desirable_logps: Tensor,
    ref_undesirable_logps: Tensor,
    kl: Tensor | float,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """weight * (1 - sigmoid(beta * (log-ratio - kl))) for a desirable response, weight * (1 -
    sigmoid(beta * (kl - log-ratio))) for an undesirable one.

    Desirable inputs (N,), undesirable ones (M,), each the log-probability of a whole response, a
    *sum* over its tokens; one of N and M may be 0, no pairs are needed. kl: the reference point, a
    scalar in nats, at least 0, taken as a constant.
    -> losses (N + M,), the desirable first, each between 0 and its weight; rewards (N,) and (M,),
    beta * log-ratio, without gradient. The gradient is largest at log-ratio = kl and dies on both
    sides. Half precision is computed in float32. Raises ValueError on shapes that disagree, an
    empty batch, beta <= 0 or not finite, a negative weight, a kl that is negative or not finite.
    """
    pairs = (
        (policy_desirable_logps, ref_desirable_logps),
        (policy_undesirable_logps, ref_undesirable_logps),
    )
    for policy, ref in pairs:
        if policy.shape != ref.shape or policy.dim() != 1:
            raise ValueError(
                f"shapes disagree: policy {tuple(policy.shape)} against reference "
                f"{tuple(ref.shape)}; want (N,) for both"
            )
    if policy_desirable_logps.numel() + policy_undesirable_logps.numel() == 0:
        raise ValueError("an empty batch: no response at all")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, got {beta}: at 0 the loss is constant")
    if not (desirable_weight >= 0 and undesirable_weight >= 0):
        raise ValueError(
            f"the weights must not be negative, got {desirable_weight}, {undesirable_weight}"
        )
    kl = torch.as_tensor(kl).detach()
    if kl.numel() != 1 or not 0 <= kl.item() < math.inf:
        raise ValueError(f"kl must be one number, finite and at least 0, got {kl.tolist()}")

    dtype = torch.float64 if policy_desirable_logps.dtype == torch.float64 else torch.float32
    good, bad = (policy.to(dtype) - ref.detach().to(dtype) for policy, ref in pairs)
    kl = kl.to(good)
    # sigmoid(-x), not 1 - sigmoid(x): near 1 the difference would round to 0.
    losses = torch.cat(
        [
            desirable_weight * torch.sigmoid(-beta * (good - kl)),  # (N,)
            undesirable_weight * torch.sigmoid(-beta * (kl - bad)),  # (M,)
        ]
    )
    return losses, beta * good.detach(), beta * bad.detach()


@functools.cache
def algorithm():
    """KTO in the shared loop: a pair is taken apart into a desirable and an undesirable response,
    and responses of the pair before give the reference point."""
    from snippets.preferences.loop import Algorithm, Settings

    @dataclass
    class KTOSettings(Settings):
        """KTO: single responses, good or bad."""

        desirable_weight: float = field(default=1.0, metadata={"help": "of good responses"})
        undesirable_weight: float = field(default=1.0, metadata={"help": "of bad responses"})
        out: str = "runs/kto"

    def loss(pairs, settings):
        return kto_loss(
            pairs.chosen,
            pairs.rejected,
            pairs.ref_chosen,
            pairs.ref_rejected,
            reference_point(pairs.mismatched, pairs.ref_mismatched),
            beta=settings.beta,
            desirable_weight=settings.desirable_weight,
            undesirable_weight=settings.undesirable_weight,
        )

    return Algorithm(KTOSettings, loss, mismatched=True)


def main() -> None:
    """The demo: pairs sampled from the arithmetic warm start and judged by its verifier, or any
    causal LM and JSONL of pairs."""
    from snippets.preferences.loop import run_demo

    run_demo(algorithm())


if __name__ == "__main__":
    main()
