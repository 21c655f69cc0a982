"""ReMax: REINFORCE with the reward of the greedy response to the same prompt as baseline.

Li et al. 2023 (arXiv:2310.10505), algorithm 1; their code is github.com/liziniu/ReMax. The greedy
response is only scored: no gradient passes through it. One more generation a prompt, no critic.

    python -m snippets.rlhf.remax
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


def remax_advantages(rewards: Tensor, greedy_rewards: Tensor) -> Tensor:
    """How much better each sampled response is than the greedy one to its prompt.

    rewards (P, G), G sampled responses a prompt, or (B,), one a row; greedy_rewards (P,) or (B,):
    of the greedy response to the prompt -> the shape of rewards, in float32 or float64, in units
    of reward. G may be 1. The greedy response depends on the prompt and the policy, not on the
    sample, so the gradient is unbiased. Nothing makes these advantages average to 0: where the
    greedy response is better than all samples, all of them are pushed down.

    Raises ValueError on shapes that disagree, no rewards, or a reward that is not finite.
    """
    if rewards.dim() not in (1, 2) or greedy_rewards.shape != rewards.shape[:1]:
        raise ValueError(
            f"shapes disagree: rewards {tuple(rewards.shape)}, greedy_rewards "
            f"{tuple(greedy_rewards.shape)}; want (P, G) and (P,), or (B,) and (B,)"
        )
    if rewards.numel() == 0:
        raise ValueError(f"no rewards: shape {tuple(rewards.shape)}")
    for name, x in (("rewards", rewards), ("greedy_rewards", greedy_rewards)):
        if not torch.isfinite(x).all():
            raise ValueError(f"{name} must be finite, got {x.tolist()}")
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    baseline = greedy_rewards.to(dtype).view(-1, *[1] * (rewards.dim() - 1))  # (P, 1) or (B,)
    return (rewards.to(dtype) - baseline).detach()


@functools.cache
def algorithm():
    """ReMax in the shared loop: the KL in the reward of both, the sampled response and the greedy
    one."""
    from snippets.rlhf.loop import Algorithm, Settings
    from snippets.rlhf.reinforce import reinforce_loss

    @dataclass
    class ReMaxSettings(Settings):
        """ReMax: one sampled response a prompt, and a greedy one that is only scored."""

        prompts: int = 128
        group: int = 1
        beta: float = 0.01
        lr: float = 5e-5
        steps: int = 120
        out: str = "runs/remax"

    def advantages(rollout, settings):
        rewards = rollout.scores - settings.beta * rollout.token_kl().sum(-1)  # (B,)
        greedy_rewards = rollout.greedy_scores - settings.beta * rollout.greedy_kl  # (B,)
        return remax_advantages(rewards, greedy_rewards), None

    def loss(logps, rollout, rows, advantages, settings):
        return reinforce_loss(logps, advantages, rollout.completions.mask[rows])

    return Algorithm(ReMaxSettings, advantages, loss, greedy=True)


def main() -> None:
    """The demo: from the arithmetic warm start, or from any causal LM and JSONL of prompts."""
    from snippets.rlhf.loop import run_demo

    run_demo(algorithm())


if __name__ == "__main__":
    main()
