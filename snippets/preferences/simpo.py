"""Simple Preference Optimization (SimPO): the mean log-probability of a response's tokens as its
reward, a target margin, and no reference model.

Meng et al. 2024 (arXiv:2405.14734), equations 4 to 6.

    python -m snippets.preferences.simpo
"""

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
) -> tuple[Tensor, Tensor, Tensor]:
    """-log sigmoid(beta * (mean log pi(y_w) - mean log pi(y_l)) - gamma) (equation 6).

    chosen_logps, rejected_logps (B,): sums over the tokens of a response, the EOS included and the
    prompt left out; lengths (B,): how many tokens that is. beta in reward a nat a token, gamma in
    reward. The defaults are those of the authors' code, which sets gamma / beta = 0.25.
    -> losses, chosen_rewards, rejected_rewards, all (B,); rewards are beta * mean log pi (equation
    4), without gradient. A pair of equal responses is finite: log(1 + exp(gamma)), and no gradient
    in all. Half precision is computed in float32. Raises ValueError on shapes that disagree, an
    empty batch, lengths below 1, beta <= 0 or not finite, gamma negative or not finite.
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
        raise ValueError(f"beta must be positive and finite, got {beta}: at 0 the loss is constant")
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma must be finite and at least 0, got {gamma}")

    dtype = torch.float64 if chosen_logps.dtype == torch.float64 else torch.float32
    chosen = beta * chosen_logps.to(dtype) / chosen_lengths.to(dtype)  # (B,), equation 4
    rejected = beta * rejected_logps.to(dtype) / rejected_lengths.to(dtype)
    losses = -logsigmoid(chosen - rejected - gamma)
    return losses, chosen.detach(), rejected.detach()


@functools.cache
def algorithm():
    """SimPO in the shared loop."""
    from snippets.preferences.loop import Algorithm, Settings

    @dataclass
    class SimPOSettings(Settings):
        """SimPO: no reference, means, a margin."""

        beta: float = field(default=10.0, metadata={"help": "reward of a nat a token"})
        gamma: float = field(default=3.0, metadata={"help": "target margin, in reward"})
        out: str = "runs/simpo"

    def loss(pairs, settings):
        return simpo_loss(
            pairs.chosen,
            pairs.rejected,
            pairs.chosen_lengths,
            pairs.rejected_lengths,
            beta=settings.beta,
            gamma=settings.gamma,
        )

    return Algorithm(SimPOSettings, loss, reference=False)


def main() -> None:
    """The demo: pairs sampled from the arithmetic warm start and judged by its verifier, or any
    causal LM and JSONL of pairs."""
    from snippets.preferences.loop import run_demo

    run_demo(algorithm())


if __name__ == "__main__":
    main()
