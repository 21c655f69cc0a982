"""DPO-Positive (DPOP): DPO with a penalty on a chosen response that has fallen below the reference.

Pal et al. 2024, Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive
(arXiv:2402.13228), equation 3.

    python -m snippets.preferences.dpop
"""

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu


def dpop_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.3,
    lam: float = 50.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """-log sigmoid(beta * (chosen - rejected - lam * max(0, -chosen))), where chosen and rejected
    are log-ratios log(pi / pi_ref) in nats (equation 3; 0.3 and 50 are the paper's settings).

    The penalty stands inside the sigmoid and is scaled by beta too: below the reference a nat of
    the chosen log-ratio counts 1 + lam times, above it once. lam = 0 is DPO.
    All inputs (B,): the log-probability of a whole response, a *sum* over its tokens, its EOS
    included. No gradient reaches the reference's.
    -> losses, chosen_rewards, rejected_rewards, all (B,). The rewards are DPO's, beta * (log pi -
    log pi_ref), without the penalty and without gradient.

    At the reference itself, where every run starts, max has a kink; its gradient there is taken as
    0, so the first step is DPO's. Chosen equal to rejected is finite: the penalty alone remains.
    Half precision is computed in float32. Raises ValueError on shapes that disagree, an empty
    batch, beta <= 0 or not finite, lam < 0 or not finite.
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
        raise ValueError(f"beta must be positive and finite, got {beta}: at 0 the loss is constant")
    if not 0 <= lam < math.inf:
        raise ValueError(f"lam must be at least 0 and finite, got {lam}")

    dtype = torch.float64 if policy_chosen_logps.dtype == torch.float64 else torch.float32
    chosen_logratios = policy_chosen_logps.to(dtype) - ref_chosen_logps.detach().to(dtype)  # (B,)
    rejected_logratios = policy_rejected_logps.to(dtype) - ref_rejected_logps.detach().to(dtype)
    fallen = relu(-chosen_logratios)  # (B,), nats below the reference
    losses = -logsigmoid(beta * (chosen_logratios - rejected_logratios - lam * fallen))
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def standstill(wins: Tensor) -> Tensor:
    """The lam (X,) from which on the expected loss is least at the reference itself, so that
    nothing is learned: 2 * (max / min - 1) of wins (X, Y), each response's chance of winning
    against a response of the reference.

    For pairs of two independent responses of the reference, and a policy that can be any
    distribution. It is infinite where a response never wins.
    """
    return 2 * (wins.amax(-1) / wins.amin(-1) - 1)


@functools.cache
def algorithm():
    """DPOP in the shared loop: DPO with one more term, of the chosen response alone."""
    from snippets.preferences.loop import Algorithm, Settings

    @dataclass
    class DPOPSettings(Settings):
        """DPOP: DPO that holds the chosen response at the reference or above."""

        beta: float = 0.1
        lam: float = field(
            default=5.0,
            metadata={
                "help": "what a nat of the chosen response below the reference costs, in nats"
            },
        )
        out: str = "runs/dpop"

    def loss(pairs, settings):
        four = (pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected)
        return dpop_loss(*four, beta=settings.beta, lam=settings.lam)

    return Algorithm(DPOPSettings, loss)


def main() -> None:
    """The demo: pairs sampled from the arithmetic warm start and judged by its verifier, or any
    causal LM and JSONL of pairs."""
    from snippets.preferences.loop import run_demo

    run_demo(algorithm())


if __name__ == "__main__":
    main()
