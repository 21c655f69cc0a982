"""Contrastive Preference Optimization (CPO): DPO with a uniform reference, and the likelihood of the
chosen response beside it; with means and a margin, CPO-SimPO.

Xu et al. 2024 (arXiv:2401.08417), equations 3 and 5. CPO-SimPO: the authors' code at
github.com/fe1ixxu/CPO_SIMPO.

    python -m snippets.preferences.cpo
"""

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def cpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 0.1,
    nll: float = 1.0,
    gamma: float = 0.0,
    normalize: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """-log sigmoid(beta * (log pi(y_w) - log pi(y_l)) - gamma) - nll * log pi(y_w) / |y_w|
    (equations 3 and 5).

    chosen_logps, rejected_logps (B,): sums over the tokens of a response, the EOS included and the
    prompt left out; lengths (B,): how many tokens that is. The sigmoid takes sums, or, with
    normalize=True, means: with a gamma, that is CPO-SimPO. The last term is a mean over the tokens
    of a response in either case, as in code it always is; the paper's formula has a sum.
    -> losses, chosen_rewards, rejected_rewards, all (B,); rewards are what the sigmoid compares,
    without gradient. A pair of equal responses is finite, and its sigmoid has no gradient in all.
    Half precision is computed in float32. Raises ValueError on shapes that disagree, an empty
    batch, lengths below 1, beta <= 0 or not finite, nll or gamma negative or not finite.
    """
    for x in (rejected_logps, chosen_lengths, rejected_lengths):
        if x.shape != chosen_logps.shape or x.dim() != 1:
            raise ValueError(
                f"shapes disagree: {tuple(x.shape)} against {tuple(chosen_logps.shape)}; "
                "want (B,) for all four"
            )
    if chosen_logps.numel() == 0:
        raise ValueError("an empty batch: shape (0,)")
    shortest = min(chosen_lengths.min().item(), rejected_lengths.min().item())
    if not shortest >= 1:
        raise ValueError(
            f"a response of {shortest:g} tokens has no mean: lengths must be at least 1"
        )
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, got {beta}: at 0 this is plain SFT")
    for name, weight in (("nll", nll), ("gamma", gamma)):
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be finite and at least 0, got {weight}")

    dtype = torch.float64 if chosen_logps.dtype == torch.float64 else torch.float32
    chosen, rejected = chosen_logps.to(dtype), rejected_logps.to(dtype)  # (B,), sums
    chosen_mean = chosen / chosen_lengths.to(dtype)  # (B,), nats a token
    if normalize:
        chosen, rejected = chosen_mean, rejected / rejected_lengths.to(dtype)
    losses = -logsigmoid(beta * (chosen - rejected) - gamma) - nll * chosen_mean
    return losses, beta * chosen.detach(), beta * rejected.detach()


@functools.cache
def algorithm():
    """CPO in the shared loop; CPO-SimPO by the settings."""
    from snippets.preferences.loop import Algorithm, Settings

    @dataclass
    class CPOSettings(Settings):
        """CPO: no reference, and the likelihood of the chosen response."""

        beta: float = field(default=0.1, metadata={"help": "reward of a nat"})
        nll: float = field(default=1.0, metadata={"help": "weight of the likelihood term"})
        gamma: float = field(default=0.0, metadata={"help": "target margin, in reward"})
        normalize: bool = field(default=False, metadata={"help": "means, not sums: CPO-SimPO"})
        out: str = "runs/cpo"

    def loss(pairs, settings):
        return cpo_loss(
            pairs.chosen,
            pairs.rejected,
            pairs.chosen_lengths,
            pairs.rejected_lengths,
            beta=settings.beta,
            nll=settings.nll,
            gamma=settings.gamma,
            normalize=settings.normalize,
        )

    return Algorithm(CPOSettings, loss, reference=False)


def main() -> None:
    """The demo: pairs sampled from the arithmetic warm start and judged by its verifier, or any
    causal LM and JSONL of pairs."""
    from snippets.preferences.loop import run_demo

    run_demo(algorithm())


if __name__ == "__main__":
    main()
