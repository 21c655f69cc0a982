"""The RLHF pipeline: demonstrations, then comparisons, then PPO on the learned reward.

InstructGPT (Ouyang et al. 2022, arXiv:2203.02155, sections 3.1 to 3.5), after Ziegler et al. 2019
(arXiv:1909.08593) and Stiennon et al. 2020 (arXiv:2009.01325). Its sizes, 13k, 33k and 31k prompts,
are the defaults here at a tenth. On arithmetic the people are simulated: who demonstrates forgets
the carry half of the time, who judges errs one time in twenty. To judge is easier than to do.

    python -m snippets.rlhf.pipeline
"""

import copy
import functools
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@functools.cache
def settings_class() -> type:
    """The settings of `run` and of the command line; --data holds the prompts of the third step."""
    from snippets.worlds import lm

    @dataclass
    class PipelineSettings(lm.Settings):
        """SFT, reward model and PPO, one after the other."""

        demonstrations_data: str | None = field(
            default=None, metadata={"help": "JSONL with prompt and completion, for --model"}
        )
        comparisons_data: str | None = field(
            default=None, metadata={"help": "JSONL with prompt, chosen and rejected, for --model"}
        )
        demonstrated: int = field(default=1300, metadata={"help": "sums that are demonstrated"})
        compared: int = field(default=3300, metadata={"help": "sums whose answers are compared"})
        prompts: int = field(default=3100, metadata={"help": "sums that PPO trains on"})
        careless: float = field(default=0.5, metadata={"help": "wrong share of demonstrations"})
        responses: int = field(default=8, metadata={"help": "answers sampled to a compared sum"})
        error: float = field(default=0.05, metadata={"help": "how often the judge errs"})
        sft_steps: int = field(default=60, metadata={"help": "steps of 32 demonstrations"})
        sft_lr: float = field(default=5e-5, metadata={"help": "learning rate of SFT"})
        reward_steps: int = field(default=800, metadata={"help": "steps of 32 comparisons"})
        reward_lr: float = field(default=1e-4, metadata={"help": "learning rate of the reward"})
        steps: int = field(default=60, metadata={"help": "PPO steps of 128 responses"})
        lr: float = field(default=5e-5, metadata={"help": "learning rate of PPO"})
        beta: float = field(default=0.1, metadata={"help": "KL coefficient, in units of score"})
        eval_every: int = 10
        save_every: int = 1_000_000
        out: str = "runs/pipeline"

    return PipelineSettings


def compare(
    prompt: str,
    responses: Sequence[str],
    quality: Callable[[str], float],
    *,
    error: float,
    rng: random.Random,
) -> list[dict[str, str]]:
    """The comparisons of K responses to a prompt: each pair of different texts and different
    quality, the better one chosen with chance 1 - error. Ties are left out: their labels would be
    coin flips. -> records {"prompt", "chosen", "rejected"}, K * (K - 1) / 2 at most. ValueError
    unless 0 <= error < 0.5: from one half on the labels hold no information, or the opposite.
    """
    if not 0 <= error < 0.5:
        raise ValueError(f"error must lie in [0, 0.5), got {error}")
    pairs = []
    for pair in itertools.combinations(dict.fromkeys(responses), 2):
        worse, better = sorted(pair, key=quality)
        if quality(worse) < quality(better):
            if rng.random() < error:
                worse, better = better, worse
            pairs.append({"prompt": prompt, "chosen": better, "rejected": worse})
    return pairs


def collect(
    policy: Any, tokenizer: Any, records: Sequence[dict], settings: Any, *, error: float, seed: int
) -> list[dict[str, str]]:
    """Step 2a: the policy answers each sum `settings.responses` times, the judge compares."""
    from snippets.worlds import lm

    group, length, rng = settings.responses, settings.max_new_tokens, random.Random(seed)
    uniforms = torch.rand(len(records) * group, length, generator=lm.seeded(seed, 0, stream=3))
    prompts, pairs = [record["prompt"] for record in records], []
    texts = lm.generate(
        policy, tokenizer, prompts, samples=group, max_new_tokens=length, uniforms=uniforms
    ).texts
    for i, record in enumerate(records):
        right = functools.partial(lambda text, answer: float(text == answer), answer=record["answer"])
        mine = texts[i * group : (i + 1) * group]
        pairs += compare(record["prompt"], mine, right, error=error, rng=rng)
    return pairs


@torch.no_grad()
def measure(policy: Any, reference: Any, tokenizer: Any, records: Sequence[dict], reward: Any) -> dict:
    """What the policy does on held-out sums: `greedy` and `sampled` exact match, the reward model's
    `score` of the same samples, and `kl`, the mean of log pi - log pi_ref over them, in nats."""
    from snippets.worlds import arithmetic, lm

    prompts, answers = ([record[name] for record in records] for name in ("prompt", "answer"))
    length = arithmetic.MAX_NEW_TOKENS
    uniforms = torch.rand(len(records), length, generator=lm.seeded(0, 0))  # the same each time
    out = lm.generate(policy, tokenizer, prompts, max_new_tokens=length, uniforms=uniforms)
    ref_logps = lm.token_logps(reference, out.ids, out.attention, out.mask.shape[1])
    log_ratios = torch.where(out.mask.bool(), out.logps - ref_logps, 0.0).sum(-1)  # (B,)
    scores = reward(completions=out.texts, prompts=prompts)
    return {
        "greedy": arithmetic.greedy_accuracy(policy, tokenizer, list(records)),
        "sampled": sum(arithmetic.exact_match(out.texts, answers)) / len(records),
        "score": sum(scores) / len(records),
        "kl": log_ratios.mean().item(),
    }


@dataclass
class Result:
    """The three models, and what was measured on the way: a record each time `watch` was called."""

    sft: Any
    reward_model: Any
    policy: Any
    history: list[dict]


def run(
    policy: Any,
    tokenizer: Any,
    demonstrations: Sequence[dict],
    label: Callable[[Any], list[dict]],
    prompts: Sequence[dict],
    settings: Any,
    *,
    watch: Callable[[Any, Any, Any], dict] | None = None,
    progress: bool = False,
) -> Result:
    """The three steps. demonstrations: records {"prompt", "completion"}; label(the SFT policy) ->
    comparisons {"prompt", "chosen", "rejected"}; prompts: records {"prompt"}, without any label.
    watch(policy, sft policy, reward) is asked before and during the third step. `policy` is trained
    in place; nobody is asked anything after step 2: from there on the reward model is the judge.
    """
    from snippets.rlhf import loop, ppo, reward_model, sft

    names = ("seed", "threads", "max_new_tokens", "temperature", "logit_chunk", "eval_every")
    shared = {name: getattr(settings, name) for name in (*names, "save_every")}

    def options(kind: type, name: str, **own: Any) -> Any:
        return kind(out=str(Path(settings.out) / name), **shared, **own)

    # 1. imitate the demonstrations
    own = {"steps": settings.sft_steps, "lr": settings.sft_lr, "batch": 32}
    sft.train(policy, tokenizer, demonstrations, options(sft.settings_class(), "sft", **own))
    imitator = copy.deepcopy(policy).requires_grad_(False)
    # 2. learn what is preferred, from comparisons of the imitator's own answers
    judge = reward_model.RewardModel(policy)
    own = {"steps": settings.reward_steps, "lr": settings.reward_lr, "batch": 32}
    own = options(reward_model.settings_class(), "reward_model", **own)
    reward_model.train_reward_model(judge, tokenizer, label(policy), own)
    reward = reward_model.reward_function(judge, tokenizer)
    # 3. raise the score, and pay for leaving the imitator
    algorithm, history = ppo.algorithm(), []

    def evaluate(current: Any) -> float:
        step = min(len(history) * settings.eval_every, settings.steps)
        history.append({"step": step, **(watch(current, imitator, reward) if watch else {})})
        return history[-1].get("score", 0.0)

    evaluate(policy)
    own = {"steps": settings.steps, "lr": settings.lr, "beta": settings.beta}
    own = options(algorithm.settings, "ppo", prompts=min(128, len(prompts)), **own)
    rest = {"evaluate": evaluate, "progress": progress}
    loop.train(policy, tokenizer, list(prompts), reward, algorithm, own, **rest)
    return Result(imitator, judge, policy, history)


def demo(settings: Any) -> None:
    """Arithmetic from the warm start, or --model with three files of your own."""
    raise NotImplementedError


if __name__ == "__main__":
    from snippets.worlds import lm

    lm.run(demo, settings_class())
