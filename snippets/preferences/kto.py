"""Kahneman-Tversky Optimization (KTO): each response is judged alone, good or bad, against a
reference point, the policy's KL from the reference.

Ethayarajh et al. 2024 (arXiv:2402.01306), equation 8 of version 5, which TRL counts as equation 7.

    python -m snippets.preferences.kto
"""

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def reference_point(mismatched_logps: Tensor, ref_mismatched_logps: Tensor) -> Tensor:
    """The authors' estimate of KL(pi || pi_ref): the mean log-ratio of responses that belong to
    *other* prompts, or 0 if that is negative.

    Both inputs (N,): log-probabilities of whole responses after a prompt that is not theirs ->
    scalar in nats, without gradient. It needs no sampling, and it is biased: the responses are not
    the policy's own, and negative estimates are cut off. Raises ValueError on shapes that disagree
    or an empty batch.
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
    empty batch, beta <= 0 or not finite, a weight or a kl that is negative or not finite.
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
    weights = desirable_weight, undesirable_weight
    if not all(0 <= weight < math.inf for weight in weights):
        raise ValueError(f"the weights must be finite and not negative, got {weights}")
    kl = torch.as_tensor(kl, dtype=torch.float64).detach()
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


def kto_optimum(
    ref_logps: Tensor, good: Tensor, bad: Tensor, kl: float, *, beta: float, rounds: int = 50
) -> Tensor:
    """log pi (X, Y), where the expected loss is least for a reference point that stands still.

    ref_logps (X, Y); good, bad (X, Y): the expected weight with which each response is labelled
    desirable and undesirable: with pairs from a sampler mu, mu * w and mu * (1 - w), w its chance
    to win. -> -inf where good <= bad: such a response is pushed down whatever beta is. The others
    share all the mass, so that (good - bad) * beta * s * (1 - s) / pi, s = sigmoid(beta * (log pi -
    ref_logps - kl)), is the same for all. That falls in pi for beta <= 1, hence bisection. Raises
    ValueError for beta outside of (0, 1], where there may be several optima, and where no
    response of a prompt has good > bad.
    """
    if not 0 < beta <= 1:
        raise ValueError(f"beta must lie in (0, 1], got {beta}")
    wins = good > bad
    if not wins.any(-1).all():
        raise ValueError("a prompt without a response of good > bad has no optimum")
    pull = torch.where(wins, good - bad, 1.0)
    log_pull = torch.where(wins, pull.log(), -math.inf)

    def logps_at(rate: Tensor) -> Tensor:  # (X, 1), the log of what is the same for all
        low, high = torch.full_like(ref_logps, -1e3), torch.zeros_like(ref_logps)
        for _ in range(rounds):
            middle = (low + high) / 2
            x = beta * (middle - ref_logps - kl)
            slope = log_pull + math.log(beta) + logsigmoid(x) + logsigmoid(-x) - middle
            above = slope > rate
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return torch.where(wins, low, -math.inf)

    # s * (1 - s) is at most a quarter, so at this rate the probabilities sum to at most 1.
    high = (log_pull + math.log(beta / 4)).logsumexp(-1, keepdim=True)
    low = high - 60
    for _ in range(rounds):
        middle = (low + high) / 2
        above = logps_at(middle).exp().sum(-1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return logps_at(high).log_softmax(-1)


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
