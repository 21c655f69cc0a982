"""Best-of-N sampling, and RAFT: fine-tuning on the best of N (rejection-sampling fine-tuning).

The distribution and its KL: Beirami et al. 2024 (arXiv:2401.01879), theorem 3.1. RAFT: Dong et al.
2023 (arXiv:2304.06767); Llama 2 (arXiv:2307.09288), section 3.2.3, does the same. Statistical
rejection sampling: Liu et al. 2023 (RSO, arXiv:2309.06657), section 3.2 and theorem 1.

    python -m snippets.rlhf.best_of_n
"""

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


def best_of_n_logps(ref_logps: Tensor, rewards: Tensor, n: int) -> Tensor:
    """log pi_n (X, Y): the exact law of the response with the highest reward among n samples.

    ref_logps (X, Y): the sampler's log-probabilities of every response, each row a distribution;
    rewards (X, Y). With F the chance that a sample's reward is at most r(y), and p that it equals
    r(y), pi_n(y) = pi_ref(y) / p * (F^n - (F - p)^n). Among equal rewards the first sample wins, so
    tied responses keep their proportions, and if all rewards are equal pi_n is pi_ref. Computed in
    float64, returned in float32 unless ref_logps is float64; memory is X * Y * Y. Raises ValueError on shapes that
    disagree, n < 1, numbers that are not finite, or a row that does not sum to 1.
    """
    if ref_logps.shape != rewards.shape or ref_logps.dim() != 2:
        raise ValueError(
            f"shapes disagree: ref_logps {tuple(ref_logps.shape)} against rewards "
            f"{tuple(rewards.shape)}; want (X, Y) for both"
        )
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if not (ref_logps.isfinite().all() and rewards.isfinite().all()):
        raise ValueError("ref_logps and rewards must be finite")
    totals = ref_logps.double().exp().sum(-1)
    if (totals - 1).abs().max() > max(1e-3, 8 * torch.finfo(ref_logps.dtype).eps):
        raise ValueError(f"the probabilities of a row must sum to 1, got {totals.tolist()}")
    logps = ref_logps.double().log_softmax(-1)  # n multiplies any error of F, so it is made exact
    mine, others = rewards.unsqueeze(2), rewards.unsqueeze(1)  # (X, Y, 1), (X, 1, Y)
    log_f = torch.where(others <= mine, logps.unsqueeze(1), -math.inf).logsumexp(-1)  # (X, Y)
    log_p = torch.where(others == mine, logps.unsqueeze(1), -math.inf).logsumexp(-1)
    share = (log_p - log_f).clamp(max=0.0)  # log(p / F); 0 at the lowest reward
    # F^n - (F - p)^n = F^n * (1 - (1 - p/F)^n), and the bracket is n * p/F where that is tiny:
    # computed as a difference it would be 0, and its log -inf.
    tiny = share + math.log(n) < -36
    bracket = -torch.expm1(n * torch.log1p(-torch.where(tiny, 0.5, share.exp())))
    bracket = torch.where(tiny, share + math.log(n), bracket.log())
    result = logps - log_p + n * log_f + bracket
    return result if ref_logps.dtype == torch.float64 else result.float()


def kl_bound(n: int) -> float:
    """log n - (n - 1) / n, in nats: KL(pi_n || pi_ref) is at most this (Beirami et al., theorem
    3.1), and equals it in the limit where no response has any weight of its own. ValueError if n < 1."""
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return math.log(n) - (n - 1) / n


def win_rate(logps: Tensor, ref_logps: Tensor, rewards: Tensor) -> Tensor:
    """(X,): the chance that a sample of pi has a higher reward than one of pi_ref, a tie counting
    half. All (X, Y). For pi_n it is at most n / (n + 1)."""
    mine, others = rewards.unsqueeze(2), rewards.unsqueeze(1)
    wins = (mine > others).to(logps.dtype) + 0.5 * (mine == others).to(logps.dtype)  # (X, Y, Y)
    return torch.einsum("xi,xij,xj->x", logps.exp(), wins, ref_logps.exp())


def best_of_group(rewards: Tensor, *, skip_equal: bool = False) -> Tensor:
    """Weights (P, G), float32: 1 for the best response of each of P prompts, 0 for the others.

    Ties go to the first. In a group whose rewards are all equal that is a random choice, so the
    winner teaches nothing that the reward knows; skip_equal=True gives such a group no winner. A
    group of one is its own best, or is skipped. Raises ValueError if rewards are not (P, G), or one
    is not finite.
    """
    if rewards.dim() != 2 or rewards.numel() == 0:
        raise ValueError(f"want rewards (P, G), got {tuple(rewards.shape)}")
    if not rewards.isfinite().all():
        raise ValueError(f"rewards must be finite, got {rewards.tolist()}")
    best = rewards == rewards.amax(-1, keepdim=True)  # (P, G)
    weights = (best & (best.cumsum(-1) == 1)).float()  # argmax does not promise the first of a tie
    if skip_equal:
        weights = torch.where(best.all(-1, keepdim=True), 0.0, weights)
    return weights


def raft_loss(logps: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """Maximum likelihood of the winners: -weights * log pi(y|x), as a mean over all B rows.

    logps (B, T) with gradient, weights (B,), mask (B, T), 1 on the response's tokens -> scalar. It
    is REINFORCE with the weight as advantage. It is the SFT loss too, up to a factor: divided by
    rows and not by the winners' tokens, so a batch without a winner gives 0. Raises ValueError on
    shapes that disagree, an empty batch, or a negative weight.
    """
    if logps.shape != mask.shape or logps.dim() != 2 or weights.shape != logps.shape[:1]:
        raise ValueError(
            f"shapes disagree: logps {tuple(logps.shape)}, weights {tuple(weights.shape)}, "
            f"mask {tuple(mask.shape)}; want (B, T), (B,), (B, T)"
        )
    if logps.numel() == 0:
        raise ValueError(f"an empty batch: shape {tuple(logps.shape)}")
    if (weights < 0).any():
        raise ValueError("weights must not be negative: RAFT knows no bad examples")
    logps = logps if logps.dtype == torch.float64 else logps.float()
    # Losers are left out by where, not by a product with 0: their logps may be -inf or NaN.
    keep = mask.bool() & (weights > 0).unsqueeze(-1)
    return -(weights.detach() * torch.where(keep, logps, 0.0).sum(-1)).mean()


def acceptance(rewards: Tensor, beta: float) -> Tensor:
    """(P, G): with which chance each sample is kept, exp((r - the largest r of its row) / beta).

    Rejection sampling proper: the kept samples follow pi* ~ pi_ref * exp(r / beta), if the row's
    largest reward is that of all responses (RSO takes it from 64 samples). As beta goes to 0 only
    the best is kept, as beta grows all are. ValueError on beta <= 0 or rewards that are not finite.
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, got {beta}")
    if rewards.dim() != 2 or rewards.numel() == 0 or not rewards.isfinite().all():
        raise ValueError(f"want finite rewards (P, G), got {tuple(rewards.shape)}")
    return ((rewards - rewards.amax(-1, keepdim=True)) / beta).exp()


@functools.cache
def algorithm():
    """RAFT in the shared loop: the advantage is 1 for the best of a group and 0 for the others."""
    from snippets.rlhf.loop import Algorithm, Settings

    @dataclass
    class RAFTSettings(Settings):
        """RAFT: fine-tuning on the best of each group."""

        skip_equal: bool = field(
            default=True, metadata={"help": "learn nothing from a group of equal rewards"}
        )
        lr: float = 5e-5
        steps: int = 150
        out: str = "runs/raft"

    def advantages(rollout, settings):
        rewards = rollout.scores - settings.beta * rollout.token_kl().sum(-1)  # (B,)
        rewards = rewards.view(-1, settings.group)
        return best_of_group(rewards, skip_equal=settings.skip_equal).flatten(), None

    def loss(logps, rollout, rows, advantages, settings):
        return raft_loss(logps, advantages, rollout.completions.mask[rows])

    return Algorithm(RAFTSettings, advantages, loss)


def main() -> None:
    """The demo: RAFT from the arithmetic warm start, or from any causal LM and JSONL of prompts."""
    from snippets.rlhf.loop import run_demo

    run_demo(algorithm())


if __name__ == "__main__":
    main()
