"""Token-level Direct Preference Optimization (TDPO), both variants.

Zeng et al. 2024 (arXiv:2404.11999) and the authors' code, Vance0124/Token-level-Direct-Preference-
Optimization. DPO's log-ratio of a response gains the sum, over its prefixes, of the KL of the next
token's distribution from the reference to the policy.

    python -m snippets.preferences.tdpo
"""

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def sequential_kl(ref_logps: Tensor, policy_logps: Tensor, mask: Tensor) -> Tensor:
    """sum_t KL(pi_ref(.|s_t) || pi(.|s_t)) in nats, over the whole vocabulary, along a response.

    ref_logps, policy_logps (B, T, V): log-probabilities, normalised over V, at the position that
    predicts token t; mask (B, T), 1 for the response's tokens, its EOS included -> (B,). The
    expectation is under the *reference*, and s_t are the prefixes of the given response. No
    gradient reaches the reference. What stands under a 0 of the mask never matters; a row without a
    1 gives 0. A token that the reference excludes (-inf) adds 0. Raises ValueError on shapes that
    disagree.
    """
    if ref_logps.dim() != 3 or ref_logps.shape != policy_logps.shape:
        raise ValueError(
            f"shapes disagree: {tuple(ref_logps.shape)} against {tuple(policy_logps.shape)}; "
            "want (B, T, V) for both"
        )
    if mask.shape != ref_logps.shape[:2]:
        raise ValueError(
            f"shapes disagree: mask {tuple(mask.shape)} against {tuple(ref_logps.shape)}; "
            "want (B, T)"
        )
    dtype = torch.float64 if policy_logps.dtype == torch.float64 else torch.float32
    valid = mask.bool().unsqueeze(-1)  # (B, T, 1)
    # Zeros in both under the mask, before anything is computed: a NaN there would pass through the
    # gradient of a where that comes after.
    ref = torch.where(valid, ref_logps.detach().to(dtype), 0.0)  # (B, T, V)
    policy = torch.where(valid, policy_logps.to(dtype), 0.0)
    probs = ref.exp()
    return torch.where(probs > 0, probs * (ref - policy), 0.0).sum((-2, -1))  # (B,)


def tdpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_kl: Tensor,
    rejected_kl: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
    variant: int = 2,
) -> tuple[Tensor, Tensor, Tensor]:
    """-log sigmoid(beta * (chosen - rejected - delta)), where chosen and rejected are log-ratios
    log(pi / pi_ref) in nats and delta compares the `sequential_kl` of the two responses:

        variant 1:  rejected_kl - chosen_kl
        variant 2:  alpha * (rejected_kl - sg(chosen_kl)), where sg lets no gradient through

    Both variants pull the policy back to the reference along the rejected response. Variant 1 also
    pushes it away along the chosen one; the sg of variant 2 leaves that out.
    All inputs (B,): the log-probability of a whole response, a *sum* over its tokens, its EOS
    included, and the KLs, with the policy's gradient. No gradient reaches the reference's.
    -> losses, chosen_rewards, rejected_rewards, all (B,). The rewards, without gradient, are beta *
    (log pi - log pi_ref + kl), as in the authors' code for both variants. In variant 1 their
    difference is the loss's argument.

    The defaults are those of the authors' code for TDPO2; alpha belongs to variant 2 alone, and
    alpha = 0 is DPO. Chosen equal to rejected is finite: log 2. Half precision is computed in
    float32. Raises ValueError on shapes that disagree, an empty batch, beta <= 0 or not finite,
    alpha < 0 or not finite, another variant.
    """
    others = (policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_kl, rejected_kl)
    for x in others:
        if x.shape != policy_chosen_logps.shape or x.dim() != 1:
            raise ValueError(
                f"shapes disagree: {tuple(x.shape)} against {tuple(policy_chosen_logps.shape)}; "
                "want (B,) for all six"
            )
    if policy_chosen_logps.numel() == 0:
        raise ValueError("an empty batch: shape (0,)")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, got {beta}: at 0 the loss is constant")
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha must be at least 0 and finite, got {alpha}")
    if variant not in (1, 2):
        raise ValueError(f"variant must be 1 or 2, got {variant}")

    dtype = torch.float64 if policy_chosen_logps.dtype == torch.float64 else torch.float32
    chosen_logratios = policy_chosen_logps.to(dtype) - ref_chosen_logps.detach().to(dtype)  # (B,)
    rejected_logratios = policy_rejected_logps.to(dtype) - ref_rejected_logps.detach().to(dtype)
    chosen_kl, rejected_kl = chosen_kl.to(dtype), rejected_kl.to(dtype)
    if variant == 1:
        delta = rejected_kl - chosen_kl
    else:
        delta = alpha * (rejected_kl - chosen_kl.detach())
    losses = -logsigmoid(beta * (chosen_logratios - rejected_logratios - delta))
    chosen_rewards = beta * (chosen_logratios + chosen_kl).detach()
    return losses, chosen_rewards, beta * (rejected_logratios + rejected_kl).detach()


def tdpo1_optimum(ref_logits: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """The table of logits (X, N, V) where the expected loss of variant 1 is least, for
    Bradley-Terry labels of the rewards (X, Y); ref_logits (X, N, V), as in `worlds/exact.py`.

    At each prefix pi(a|s) is pi_ref(a|s) * exp(Q(s, a) / beta), normalised, where Q is the mean
    reward if the *reference* finishes the response after a. (DPO's optimum has beta * log of the
    mean of exp(reward / beta) in the place of that mean.) Raises ValueError on beta <= 0 or not
    finite.
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, got {beta}")
    ref_logps = ref_logits.log_softmax(-1)  # (X, N, V)
    value, levels = rewards, []
    while value.shape[1] > 1:  # from the last token to the first
        q = value.view(len(value), -1, ref_logps.shape[-1])  # (X, prefixes of this length, V)
        ref_logps, last = ref_logps[:, : -q.shape[1]], ref_logps[:, -q.shape[1] :]
        levels.insert(0, last + q / beta)
        value = (last.exp() * q).sum(-1)  # of the prefixes one token shorter
    return torch.cat(levels, dim=1).log_softmax(-1)


@functools.cache
def algorithm():
    """TDPO in the shared loop: DPO's four numbers a pair, and the sequential KL of both responses,
    for which the loop needs the reference's distribution over the vocabulary at every token."""
    from snippets.preferences.loop import Algorithm, Settings

    @dataclass
    class TDPOSettings(Settings):
        """TDPO: DPO with the sequential KL of both responses in the margin."""

        alpha: float = field(default=0.5, metadata={"help": "the weight of the KLs in variant 2"})
        variant: int = field(default=2, metadata={"help": "1: TDPO1, 2: TDPO2"})
        out: str = "runs/tdpo"

    def loss(pairs, settings):
        four = (pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected)
        options = {"alpha": settings.alpha, "variant": settings.variant, "beta": settings.beta}
        return tdpo_loss(*four, pairs.chosen_kl, pairs.rejected_kl, **options)

    return Algorithm(TDPOSettings, loss, vocab_kl=True)


def main() -> None:
    """The demo: pairs sampled from the arithmetic warm start and judged by its verifier, or any
    causal LM and JSONL of pairs."""
    from snippets.preferences.loop import run_demo

    run_demo(algorithm())


if __name__ == "__main__":
    main()
