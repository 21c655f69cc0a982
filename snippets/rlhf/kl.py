"""The KL penalty of RLHF: estimates from samples, as a reward or as a loss, with a fixed or an
adaptive coefficient.

k1, k2, k3: Schulman, Approximating KL Divergence (2020). Which gradient each gives: Tang and Munos
2025 (arXiv:2506.09477), Liu et al. 2025 (arXiv:2510.01555), Shah et al. 2025 (arXiv:2512.21852).
The estimate times the ratio: DeepSeek-V3.2 (arXiv:2512.02556), and TRL's use_bias_correction_kl.
The adaptive coefficient: Ziegler et al. 2019 (arXiv:1909.08593), section 2.2.

Everything is in nats. A row is one response, `mask` (B, T) is 1 on its tokens; what stands under a
0, NaN included, changes neither a value nor a gradient. No gradient ever reaches the reference.

    python -m snippets.rlhf.kl
"""

import math

import torch
from torch import Tensor

EXP_CAP = 20.0  # exp continues linearly above: far outside any useful ratio, and no overflow
ESTIMATORS = ("k1", "k2", "k3")


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _exp(x: Tensor) -> Tensor:
    """e^x, continued by its tangent above EXP_CAP: the gradient never becomes inf or 0."""
    return torch.exp(x.clamp(max=EXP_CAP)) * (1 + (x - EXP_CAP).relu())


def _exp_less_line(x: Tensor) -> Tensor:
    """e^x - 1 - x, with all its digits near 0, and continued by its tangent above EXP_CAP."""
    # expm1 keeps the digits of e^x - 1, but less x they cancel once more: near 0, the series.
    near = x.clamp(-0.03, 0.03)
    series = near**2 / 2 * (1 + near / 3 * (1 + near / 4 * (1 + near / 5 * (1 + near / 6))))
    beyond = math.exp(EXP_CAP) * (x - EXP_CAP).relu()
    return torch.where(x.abs() < 0.03, series, torch.expm1(x.clamp(max=EXP_CAP)) + beyond - x)


def kl_estimates(logps: Tensor, ref_logps: Tensor) -> dict[str, Tensor]:
    """Three estimates of KL(pi || ref) from samples of pi, one for each sample.

    logps, ref_logps: log-probabilities of what was sampled, of any one shape: tokens (B, T), or
    whole responses (B,) -> {"k1", "k2", "k3"}, tensors of that shape, float32 at least. With r =
    ref / pi: k1 = -log r, k2 = (log r)^2 / 2, k3 = r - 1 - log r. The mean of k1 and of k3 is the
    KL, that of k2 is near it while the KL is small; k2 and k3 are never negative. Above log r = 20
    k3 goes on along its tangent, so log-ratios of 1e4 stay finite. As a loss they have other
    gradients than the KL: see `kl_loss`. Raises ValueError on shapes that disagree.
    """
    if logps.shape != ref_logps.shape:
        raise ValueError(
            f"shapes disagree: logps {tuple(logps.shape)} against "
            f"ref_logps {tuple(ref_logps.shape)}"
        )
    log_r = _float(ref_logps.detach()) - _float(logps)
    return {"k1": -log_r, "k2": log_r**2 / 2, "k3": _exp_less_line(log_r)}


def _check(estimator: str, mask: Tensor, **tensors: Tensor) -> list[Tensor]:
    """The tensors with zeros under the mask's zeros."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {ESTIMATORS}, got {estimator!r}")
    for name, x in tensors.items():
        if x.shape != mask.shape:
            raise ValueError(
                f"shapes disagree: {name} {tuple(x.shape)} against mask {tuple(mask.shape)}"
            )
    if not mask.any():
        raise ValueError(f"no valid token: the mask of shape {tuple(mask.shape)} is all zeros")
    # Before any arithmetic, and not a product with the mask: NaN * 0 is NaN, also as a gradient.
    return [torch.where(mask.bool(), _float(x), 0.0) for x in tensors.values()]


def kl_reward(
    logps: Tensor, ref_logps: Tensor, mask: Tensor, *, beta: float, estimator: str = "k1"
) -> Tensor:
    """The penalty as a reward for each token, -beta * estimate, without gradient.

    logps, ref_logps, mask (B, T) -> (B, T), 0 under a 0 of the mask; beta in reward a nat. Only k1
    is right here: E[k1 * grad log pi] = grad KL(pi || ref). With k2 or k3 the policy gradient is
    another one, and k3 drives a policy to abandon what the reference writes. beta = 0 gives zeros.
    Raises ValueError on shapes that disagree, an empty mask, an unknown estimator, beta < 0.
    """
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be finite and not negative, got {beta}: it is a price")
    logps, ref_logps = _check(estimator, mask, logps=logps.detach(), ref_logps=ref_logps)
    return -beta * kl_estimates(logps, ref_logps)[estimator]


def kl_loss(
    logps: Tensor,
    ref_logps: Tensor,
    mask: Tensor,
    *,
    estimator: str = "k2",
    level: str = "sequence",
    old_logps: Tensor | None = None,
) -> Tensor:
    """The penalty as a term of the loss, for each response; its mean over samples times beta is
    added to the loss.

    logps (with gradient), ref_logps, mask (B, T) -> (B,) in nats, 0 for a row without a token.

    level      "sequence": the estimate of the whole response, from the sum of its log-ratios.
               "token": the sum of the tokens' estimates.
    estimator  its mean gradient over samples of pi, for whole responses: k1: 0. k2: grad KL(pi ||
               ref). k3: grad KL(ref || pi). By tokens: the same at each prefix, with the prefixes
               held fixed, so what a token does to later ones is left out.
    old_logps  (B, T), of the policy that sampled: each estimate is multiplied by the ratio pi / old
               with its gradient, and then the mean gradient is that of the estimate's own mean. For
               k1 and k3 that is grad KL(pi || ref), whoever sampled; by tokens it still holds the
               prefixes fixed. token, k3: DeepSeek-V3.2's term, TRL's use_bias_correction_kl.

    Raises ValueError on shapes that disagree, an empty mask, an unknown estimator or level.
    """
    if level not in ("token", "sequence"):
        raise ValueError(f"level must be 'token' or 'sequence', got {level!r}")
    sampled = logps.detach() if old_logps is None else old_logps.detach()
    logps, ref_logps, sampled = _check(
        estimator, mask, logps=logps, ref_logps=ref_logps, old_logps=sampled
    )
    if level == "sequence":
        logps, ref_logps, sampled = (x.sum(-1, keepdim=True) for x in (logps, ref_logps, sampled))
    estimates = kl_estimates(logps, ref_logps)[estimator]  # (B, T), or (B, 1)
    if old_logps is not None:
        estimates = estimates * _exp(logps - sampled)  # 1 where pi sampled; its gradient is not 0
    return estimates.sum(-1)  # tokens under a 0 have two log-probabilities of 0, so they add 0


def exact_kl(logits: Tensor, ref_logits: Tensor, *, forward: bool = False) -> Tensor:
    """The KL between next-token distributions, over the whole vocabulary; no sampling noise.

    logits (with gradient), ref_logits (..., V) -> (...), in nats. KL(pi || ref), or, with
    forward=True, KL(ref || pi). A token that has probability 0 under the first adds 0. Summed over
    the tokens of responses from pi it is an unbiased estimate of KL(pi || ref) of whole responses
    whose variance is at most that of k1 (Amini et al. 2025, arXiv:2504.10637). As a loss it holds
    the prefixes fixed. Raises ValueError on shapes that disagree.
    """
    if logits.shape != ref_logits.shape:
        raise ValueError(
            f"shapes disagree: logits {tuple(logits.shape)} against "
            f"ref_logits {tuple(ref_logits.shape)}"
        )
    p, q = (_float(x).log_softmax(-1) for x in (logits, ref_logits.detach()))  # (..., V)
    if forward:
        p, q = q, p
    probs = p.exp()
    # A masked logit of -inf in both would make 0 * (-inf + inf).
    return (probs * torch.where(probs > 0, p - q, 0.0)).sum(-1)


def adaptive_beta(
    beta: float, kl: float, *, target: float, gain: float = 0.1, clip: float = 0.2
) -> float:
    """The coefficient for the next step: larger where the measured KL is above its target.

    kl and target: KL(pi || ref) of whole responses in nats, a batch's mean of the summed k1, say.
    beta * (1 + gain * error), with error = kl / target - 1 held within +-clip: a step changes beta
    by at most gain * clip, 2 %. Ziegler et al. 2019, section 2.2; in their code the gain is the
    batch's number of episodes over a horizon of 10,000. Raises ValueError where beta, target, gain
    or clip is not positive and finite, where gain * clip >= 1, and on a kl that is not finite.
    """
    for name, x in (("beta", beta), ("target", target), ("gain", gain), ("clip", clip)):
        if not 0 < x < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {x}")
    if gain * clip >= 1:
        raise ValueError(f"gain * clip must be below 1, got {gain} * {clip}: beta would reach 0")
    if not math.isfinite(kl):
        raise ValueError(f"kl must be finite, got {kl}")
    return beta * (1 + gain * min(max(kl / target - 1, -clip), clip))


def main() -> None:
    """The demo: Schulman's experiment, two normal distributions of variance 1."""
    generator = torch.Generator().manual_seed(0)
    print("   KL   estimator   mean / KL   standard deviation / KL")
    for distance in (0.1, 1.0, 3.0):
        x = torch.randn(1_000_000, generator=generator, dtype=torch.float64)
        kl = distance**2 / 2
        for name, k in kl_estimates(-(x**2) / 2, -((x - distance) ** 2) / 2).items():
            print(f"{kl:5.3f}   {name:9s}   {k.mean() / kl:9.3f}   {k.std() / kl:23.2f}")


if __name__ == "__main__":
    main()
