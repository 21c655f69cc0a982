"""IPO, Identity Preference Optimization: a regression of log-ratio differences on a finite target.

Azar et al. 2023, A General Theoretical Paradigm to Understand Learning from Human Preferences
(arXiv:2310.12036), equation 17; tau there is beta here.

    python -m snippets.preferences.ipo
"""

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


def ipo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """(h - 1 / (2 * beta))^2, where h is how much more than the reference the policy prefers the
    chosen response to the rejected one, in nats (equation 17, whose tau is beta; 0.1 is TRL's).

    All inputs (B,): the log-probability of a whole response, a *sum* over its tokens, its EOS
    included. TRL divides each by its response's length before it comes here: another objective,
    whose target is 1 / (2 * beta) nats *a token*. No gradient reaches the reference's.
    -> losses, chosen_rewards, rejected_rewards, all (B,). The rewards are beta * (log pi - log
    pi_ref), without gradient: at the optimum, a response's chance of winning against a random
    response of the data, up to a term of the prompt alone.

    The loss is 0 at the finite h = 1 / (2 * beta) and grows on *both* sides of it: a pair that is
    ranked too well is pulled back. Chosen equal to rejected is finite: h = 0, the loss 1 / (4 *
    beta^2), no gradient on the shared response. Half precision is computed in float32. Raises
    ValueError on shapes that disagree, an empty batch, beta <= 0 or not finite.
    """
    for x in (policy_rejected_logps, ref_chosen_logps, ref_rejected_logps):
        if x.shape != policy_chosen_logps.shape or x.dim() != 1:
            raise ValueError(
                f"shapes disagree: {tuple(x.shape)} against {tuple(policy_chosen_logps.shape)}; "
                "want (B,) for all four"
            )
    if policy_chosen_logps.numel() == 0:
        raise ValueError("an empty batch: shape (0,)")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, got {beta}: the target is 1/(2 beta)")

    dtype = torch.float64 if policy_chosen_logps.dtype == torch.float64 else torch.float32
    chosen_logratios = policy_chosen_logps.to(dtype) - ref_chosen_logps.detach().to(dtype)  # (B,)
    rejected_logratios = policy_rejected_logps.to(dtype) - ref_rejected_logps.detach().to(dtype)
    h = chosen_logratios - rejected_logratios  # (B,)
    losses = (h - 1 / (2 * beta)) ** 2
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def ipo_optimum(ref_logps: Tensor, wins: Tensor, beta: float) -> Tensor:
    """log pi_IPO(y|x) (X, Y), where the expected loss is least: pi_ref * exp(wins / beta) / Z.

    ref_logps (X, Y); wins (X, Y) is each response's chance of winning against a response from the
    sampler of the data, a draw counting as a half. Exact if the two responses of a pair are
    independent draws from one sampler that reaches all of them, whatever the preferences are (no
    Bradley-Terry is needed). No log-ratio of two responses exceeds 1 / beta. Raises ValueError on
    beta <= 0 or not finite.
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, got {beta}")
    return (ref_logps + wins / beta).log_softmax(-1)


@functools.cache
def algorithm():
    """IPO in the shared loop: DPO's four numbers a pair, another function of their difference."""
    from snippets.preferences.loop import Algorithm, Settings

    @dataclass
    class IPOSettings(Settings):
        """IPO: a squared loss with a finite target."""

        beta: float = field(
            default=0.1, metadata={"help": "tau: the target is 1 / (2 * beta) nats a pair"}
        )
        per_token: bool = field(
            default=False, metadata={"help": "divide by the response's length first, as TRL does"}
        )
        out: str = "runs/ipo"

    def loss(pairs, settings):
        chosen, rejected = [pairs.chosen, pairs.ref_chosen], [pairs.rejected, pairs.ref_rejected]
        if settings.per_token:
            chosen = [x / pairs.chosen_lengths for x in chosen]
            rejected = [x / pairs.rejected_lengths for x in rejected]
        return ipo_loss(chosen[0], rejected[0], chosen[1], rejected[1], beta=settings.beta)

    return Algorithm(IPOSettings, loss)


def main() -> None:
    """The demo: pairs sampled from the arithmetic warm start and judged by its verifier, or any
    causal LM and JSONL of pairs."""
    from snippets.preferences.loop import run_demo

    run_demo(algorithm())


if __name__ == "__main__":
    main()
