"""REINFORCE for language models: the score-function gradient, with a baseline.

Williams 1992 (doi:10.1007/BF00992696). A whole response as one action, with the KL in its reward
and the mean of past rewards as baseline: Ahmadian et al. 2024 (arXiv:2402.14740), equations 6 to 8.

    python -m snippets.rlhf.reinforce
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor


def reinforce_loss(logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """-advantage * log pi, summed over the tokens of a response, then averaged over responses. Its
    gradient, not its value, is what counts: it is minus the policy gradient.

    logps (B, T) with gradient, under the policy that sampled; advantages (B,), one a response, or
    (B, T), one a token, in units of reward and taken as constants; mask (B, T) -> scalar. The sum
    over tokens is log pi of the whole response; a mean over them would weigh a response by
    1/length. A row without a valid token adds 0 and still counts in B.

    Raises ValueError on shapes that disagree, a batch without a valid token, an advantage that is
    not finite. Ahmadian et al. 2024, equation 7.
    """
    if logps.shape != mask.shape or mask.dim() != 2:
        raise ValueError(
            f"shapes disagree: logps {tuple(logps.shape)} against mask {tuple(mask.shape)}; "
            "want (B, T) for both"
        )
    if advantages.shape not in (mask.shape, mask.shape[:1]):
        raise ValueError(
            f"shapes disagree: advantages {tuple(advantages.shape)} against mask "
            f"{tuple(mask.shape)}; want (B,) or (B, T)"
        )
    valid = mask.bool()
    if not valid.any():
        raise ValueError(f"no valid token: the mask of shape {tuple(mask.shape)} is all zeros")

    dtype = torch.float64 if logps.dtype == torch.float64 else torch.float32
    advantages = advantages.detach().to(dtype)
    if advantages.dim() == 1:
        advantages = advantages[:, None].expand(mask.shape)
    # torch.where, not a product with the mask: NaN * 0 is NaN, in the value and in the gradient.
    advantages = torch.where(valid, advantages, 0.0)  # (B, T)
    if not torch.isfinite(advantages).all():
        raise ValueError(f"advantages must be finite, got {advantages.tolist()}")
    logps = torch.where(valid, logps.to(dtype), 0.0)  # (B, T)
    return -(advantages * logps).sum(-1).mean()


def batch_baseline(rewards: Tensor) -> Tensor:
    """The mean reward of all *other* responses of the batch, whatever their prompt.

    rewards (B,) -> baselines (B,), in float32 or float64. A response does not enter its own
    baseline, so the gradient stays unbiased; it needs no state and no second response to a prompt.
    With one reward for all, rewards - baselines is exactly 0. ValueError unless rewards are (B,)
    with B >= 2 and finite.
    """
    if rewards.dim() != 1 or len(rewards) < 2:
        raise ValueError(
            f"rewards must be (B,) with B at least 2, got shape {tuple(rewards.shape)}: "
            "one response has no others"
        )
    if not torch.isfinite(rewards).all():
        raise ValueError(f"rewards must be finite, got {rewards.tolist()}")
    rewards = rewards if rewards.dtype == torch.float64 else rewards.float()
    shifted = rewards - rewards[0]  # equal rewards become zeros, so that rounding adds nothing
    return rewards[0] + (shifted.sum() - shifted) / (len(rewards) - 1)


def running_mean(mean: float, count: int, rewards: Tensor) -> tuple[float, int]:
    """The mean of all rewards so far: (mean, count) of the past and the rewards (B,) of this step
    -> (mean, count) for the *next* step.

    Subtract `mean` first and update afterwards: a mean of the past does not depend on this step's
    responses, a mean that has seen them does. Start with (0.0, 0). Ahmadian et al. 2024, equation
    8. ValueError on a negative count, no rewards, or a number that is not finite.
    """
    if count < 0 or rewards.numel() == 0:
        raise ValueError(
            f"want count >= 0 and at least one reward, got {count}, {rewards.numel()}"
        )
    if not math.isfinite(mean) or not torch.isfinite(rewards).all():
        raise ValueError(f"mean and rewards must be finite, got {mean}, {rewards.tolist()}")
    total = count + rewards.numel()
    return mean + (rewards.double() - mean).sum().item() / total, total


def optimal_baseline(rewards: Tensor, squared_norms: Tensor, probs: Tensor) -> Tensor:
    """The constant that makes the variance of (r - b) * grad log pi least: the mean reward,
    weighted by the squared length of the score, E[r |g|^2] / E[|g|^2].

    rewards, squared_norms, probs (..., Y): for all Y responses to a prompt, r, |grad log pi|^2 and
    pi -> (...). With 1/N as probs it is estimated from N samples, which then need a baseline from
    other samples. Raises ValueError on shapes that disagree and where every score is zero, since
    then no baseline matters. Greensmith et al. 2004 derive it for partially observable Markov
    decision processes.
    """
    if not rewards.shape == squared_norms.shape == probs.shape:
        raise ValueError(
            f"shapes disagree: {tuple(rewards.shape)}, {tuple(squared_norms.shape)}, "
            f"{tuple(probs.shape)}"
        )
    weights = probs * squared_norms
    if (weights.sum(-1) <= 0).any():
        raise ValueError(f"every score is zero: squared_norms {squared_norms.tolist()}")
    return (weights * rewards).sum(-1) / weights.sum(-1)


@functools.cache
def algorithm():
    """REINFORCE in the shared loop: the KL in the response's reward, the rest of the batch as
    baseline."""
    from snippets.rlhf.loop import Algorithm, Settings

    @dataclass
    class REINFORCESettings(Settings):
        """REINFORCE, the mean of the batch's other rewards as baseline: one response a prompt."""

        prompts: int = 128
        group: int = 1
        beta: float = 0.01
        lr: float = 5e-5
        steps: int = 120
        out: str = "runs/reinforce"

    def advantages(rollout, settings):
        rewards = rollout.scores - settings.beta * rollout.token_kl().sum(-1)  # (B,)
        return rewards - batch_baseline(rewards), None

    def loss(logps, rollout, rows, advantages, settings):
        return reinforce_loss(logps, advantages, rollout.completions.mask[rows])

    return Algorithm(REINFORCESettings, advantages, loss)


def main() -> None:
    """The demo: from the arithmetic warm start, or from any causal LM and JSONL of prompts."""
    from snippets.rlhf.loop import run_demo

    run_demo(algorithm())


if __name__ == "__main__":
    main()
