"""Direct Preference Optimization, with label smoothing (cDPO) and its debiased form (robust DPO).

DPO: Rafailov et al. 2023 (arXiv:2305.18290), equation 7. cDPO: Mitchell, A Note on DPO with Noisy
Preferences and Relationship to IPO (2023), equation 3. Robust DPO: Chowdhury et al. 2024
(arXiv:2403.00409).

    python -m snippets.preferences.dpo
"""

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    robust: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """-log sigmoid(beta * margin), where the margin is how much more than the reference the policy
    prefers the chosen response to the rejected one, in nats (equation 7).

    All inputs (B,): the log-probability of a whole response, a *sum* over its tokens (not a mean),
    its EOS included and the prompt's tokens left out. No gradient reaches the reference's.
    -> losses, chosen_rewards, rejected_rewards, all (B,). The rewards are implicit, beta * (log pi
    - log pi_ref), without gradient; they are known up to a term of the prompt alone, so only their
    difference means anything.

    label_smoothing is the chance e in [0, 0.5) that a label is flipped. cDPO: (1 - e) * loss(m) + e
    * loss(-m), whose minimum lies at the finite margin log((1 - e) / e) / beta. robust=True: ((1 -
    e) * loss(m) - e * loss(-m)) / (1 - 2e), an unbiased estimate of the loss without flips, which
    has no minimum. Half precision is computed in float32. Raises ValueError on shapes that
    disagree, an empty batch, beta <= 0 or not finite, label_smoothing outside [0, 0.5).
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
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")

    dtype = torch.float64 if policy_chosen_logps.dtype == torch.float64 else torch.float32
    chosen_logratios = policy_chosen_logps.to(dtype) - ref_chosen_logps.detach().to(dtype)  # (B,)
    rejected_logratios = policy_rejected_logps.to(dtype) - ref_rejected_logps.detach().to(dtype)
    margins = beta * (chosen_logratios - rejected_logratios)  # (B,)
    # logsigmoid, not log(sigmoid(x)): sigmoid(-90) is 0 in float32, and its log -inf.
    right, flipped = -logsigmoid(margins), -logsigmoid(-margins)
    if robust:
        losses = (1 - label_smoothing) * right - label_smoothing * flipped
        losses = losses / (1 - 2 * label_smoothing)
    else:
        losses = (1 - label_smoothing) * right + label_smoothing * flipped
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


@functools.cache
def algorithm():
    """DPO in the shared loop; cDPO and robust DPO by the settings."""
    from snippets.preferences.loop import Algorithm, Settings

    @dataclass
    class DPOSettings(Settings):
        """DPO, and what noisy labels ask for."""

        label_smoothing: float = field(
            default=0.0, metadata={"help": "the chance that a label is flipped (cDPO)"}
        )
        robust: bool = field(default=False, metadata={"help": "unbiased under such flips"})
        out: str = "runs/dpo"

    def loss(pairs, settings):
        return dpo_loss(
            pairs.chosen,
            pairs.rejected,
            pairs.ref_chosen,
            pairs.ref_rejected,
            beta=settings.beta,
            label_smoothing=settings.label_smoothing,
            robust=settings.robust,
        )

    return Algorithm(DPOSettings, loss)


def main() -> None:
    """The demo: pairs sampled from the arithmetic warm start and judged by its verifier, or any
    causal LM and JSONL of pairs."""
    from snippets.preferences.loop import run_demo

    run_demo(algorithm())


if __name__ == "__main__":
    main()
