"""Odds Ratio Preference Optimization (ORPO): fine-tuning on the chosen response and, in the same
step, a logistic loss on the odds of chosen against rejected. No reference model.

Hong et al. 2024 (arXiv:2403.07691), equations 4, 6 and 7.

    python -m snippets.preferences.orpo
"""

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

# The nearest to 0 that a mean log-probability counts as: rounding in float32 reaches no further.
CEILING = -torch.finfo(torch.float32).eps


def log_odds(mean_logps: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean_logps), any shape: the odds of equation 4.

    p is the geometric mean of a response's token probabilities. At mean_logps = 0 the odds are
    infinite; there, and above by rounding, the value is that of CEILING, about 16, and so is the
    slope 1 / (1 - p), so that a rejected response of probability 1 still learns.
    """
    straight = CEILING + (mean_logps - mean_logps.detach())  # the ceiling, with a slope of 1
    mean_logps = torch.where(mean_logps > CEILING, straight, mean_logps)
    # 1 - exp(x) is rounded to 0 or to a multiple of 6e-8 for x near 0; -expm1(x) is exact.
    return mean_logps - torch.log(-torch.expm1(mean_logps))


def orpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """-log p_w - beta * log sigmoid(log odds_w - log odds_l) (equations 6 and 7), where log p is the
    mean log-probability of a response's tokens.

    chosen_logps, rejected_logps (B,): sums over the tokens of a response, the EOS included and the
    prompt left out; lengths (B,): how many tokens that is. beta is the paper's lambda, TRL's beta;
    at 0 this is supervised fine-tuning on the chosen responses.
    -> losses, chosen_rewards, rejected_rewards, all (B,); rewards are beta * log p, as TRL logs
    them, without gradient. A pair of equal responses is finite: beta * log 2 beside its first
    term, and the gradient of the odds ratio is zero. Half precision is computed in float32. Raises
    ValueError on shapes that disagree, an empty batch, lengths below 1, beta negative or not finite.
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
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be finite and at least 0, got {beta}")

    dtype = torch.float64 if chosen_logps.dtype == torch.float64 else torch.float32
    chosen = chosen_logps.to(dtype) / chosen_lengths.to(dtype)  # (B,), nats a token
    rejected = rejected_logps.to(dtype) / rejected_lengths.to(dtype)
    losses = -chosen - beta * logsigmoid(log_odds(chosen) - log_odds(rejected))
    return losses, beta * chosen.detach(), beta * rejected.detach()


@functools.cache
def algorithm():
    """ORPO in the shared loop."""
    from snippets.preferences.loop import Algorithm, Settings

    @dataclass
    class ORPOSettings(Settings):
        """ORPO: no reference."""

        beta: float = field(default=0.1, metadata={"help": "weight of the odds ratio: lambda"})
        lr: float = 5e-5
        out: str = "runs/orpo"

    def loss(pairs, settings):
        return orpo_loss(
            pairs.chosen,
            pairs.rejected,
            pairs.chosen_lengths,
            pairs.rejected_lengths,
            beta=settings.beta,
        )

    return Algorithm(ORPOSettings, loss, reference=False)


def main() -> None:
    """The demo: pairs sampled from the arithmetic warm start and judged by its verifier, or any
    causal LM and JSONL of pairs."""
    from snippets.preferences.loop import run_demo

    run_demo(algorithm())


if __name__ == "__main__":
    main()
