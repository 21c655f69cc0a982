"""Online and iterative DPO: DPO on pairs of the policy's own, sampled afresh as it learns.

Online: Guo et al. 2024, Direct Language Model Alignment from Online AI Feedback (arXiv:2402.04792).
Iterative: Xiong et al. 2023 (arXiv:2312.11456); Dong et al. 2024, RLHF Workflow (arXiv:2405.07863).

    python -m snippets.preferences.online_dpo                                    # fresh pairs every step
    python -m snippets.preferences.online_dpo --refresh 30 --sampled_prompts 480  # four rounds
"""

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor


def best_and_worst(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each prompt's responses, one of the best and one of the worst make its pair.

    scores (P, G): P prompts, G responses each -> (prompts, chosen, rejected), all (N,): the rows
    whose scores differ, and the columns of the two. Among equals the first one is taken. A group
    whose scores are all equal gives no pair. Raises ValueError where scores are not (P, G), G < 2,
    or a score is not finite.
    """
    if scores.dim() != 2 or scores.shape[1] < 2:
        raise ValueError(
            f"scores must be (P, G) with a group G of at least 2, got shape {tuple(scores.shape)}"
        )
    if not torch.isfinite(scores).all():
        raise ValueError(f"scores must be finite, got {scores.tolist()}")
    chosen, rejected = scores.argmax(-1), scores.argmin(-1)  # (P,)
    prompts = (scores.amax(-1) > scores.amin(-1)).nonzero().squeeze(-1)  # (N,)
    return prompts, chosen[prompts], rejected[prompts]


def label(first: Tensor, second: Tensor, uniforms: Tensor) -> Tensor:
    """Whether the first response of each pair wins: a Bradley-Terry judge of rewards (N,), decided
    by uniforms (N,) in [0, 1). -> bool (N,). Raises ValueError on shapes that disagree."""
    if not first.shape == second.shape == uniforms.shape:
        shapes = [tuple(x.shape) for x in (first, second, uniforms)]
        raise ValueError(f"shapes disagree: {shapes}; want the same for all three")
    return uniforms < torch.sigmoid(first - second)


def restarted_optimum(ref_logps: Tensor, rewards: Tensor, beta: float, rounds: int) -> Tensor:
    """log pi (X, Y) after `rounds` of DPO, each solved exactly, if the reference is set to the
    policy after each of them; ref_logps, rewards (X, Y).

    pi_k is proportional to pi_{k-1} * exp(r / beta), so pi_k = pi_ref * exp(k * r / beta): the
    optimum of beta / k. With a reference that stays, every round has the same optimum, that of k =
    1. Raises ValueError for rounds < 1 or beta <= 0.
    """
    if rounds < 1 or not beta > 0:
        raise ValueError(f"want rounds >= 1 and beta > 0, got {rounds} and {beta}")
    return (ref_logps + rounds * rewards / beta).log_softmax(-1)


@functools.cache
def algorithm():
    """Online DPO in the shared loop: DPO's loss, and fresh pairs every `refresh` steps."""
    from snippets.preferences.dpo import dpo_loss
    from snippets.preferences.loop import Algorithm, Settings

    @dataclass
    class OnlineDPOSettings(Settings):
        """DPO on fresh pairs."""

        refresh: int = field(default=1, metadata={"help": "steps between fresh pairs of its own"})
        sampled_prompts: int = field(
            default=16, metadata={"help": "prompts sampled from each time"}
        )
        out: str = "runs/online-dpo"

    def loss(pairs, settings):
        four = (pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected)
        return dpo_loss(*four, beta=settings.beta)

    return Algorithm(OnlineDPOSettings, loss)


def main() -> None:
    """The demo: pairs sampled from the policy as it learns, judged by arithmetic's verifier."""
    from snippets.preferences.loop import run_demo

    run_demo(algorithm())


if __name__ == "__main__":
    main()
