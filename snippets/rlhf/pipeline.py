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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


@functools.cache
def settings_class() -> type:
    """The settings of `run` and of the command line; --data holds the prompts of the third step."""
    from snippets.worlds import lm

    @dataclass
    class PipelineSettings(lm.Settings):
        """SFT, reward model and PPO, one after the other."""

        demonstrations_data: str | None = field(default=None, metadata={"help": "JSONL, --model"})
        comparisons_data: str | None = field(default=None, metadata={"help": "JSONL, --model"})
        demonstrated: int = field(default=1300, metadata={"help": "sums that are demonstrated"})
        compared: int = field(default=3300, metadata={"help": "sums whose answers are compared"})
        prompts: int = field(default=3100, metadata={"help": "sums that PPO trains on"})
        careless: float = field(default=0.5, metadata={"help": "share shown without the carry"})
        responses: int = field(default=6, metadata={"help": "answers sampled to a compared sum"})
        error: float = field(default=0.05, metadata={"help": "how often the judge errs"})
        sft_steps: int = field(default=60, metadata={"help": "steps of 32 demonstrations"})
        sft_lr: float = field(default=5e-5, metadata={"help": "learning rate of SFT"})
        reward_steps: int = field(default=200, metadata={"help": "steps of 32 comparisons"})
        reward_lr: float = field(default=1e-4, metadata={"help": "learning rate of the reward"})
        steps: int = field(default=30, metadata={"help": "PPO steps of 128 responses"})
        lr: float = field(default=5e-5, metadata={"help": "learning rate of PPO"})
        beta: float = field(default=0.2, metadata={"help": "KL coefficient, in units of score"})
        eval_every: int = 10
        out: str = "runs/pipeline"

    return PipelineSettings


def compare(prompt: str, responses: Sequence[str], quality, *, error: float, rng) -> list[dict]:
    """The comparisons of K responses to a prompt: each pair of different texts and different
    quality(text), the better one chosen with chance 1 - error. Ties are left out: their labels
    would be coin flips. -> records {"prompt", "chosen", "rejected"}, K * (K - 1) / 2 at most.
    ValueError unless 0 <= error < 0.5: from one half on, labels say nothing, or the opposite."""
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


def collect(policy: Any, tokenizer: Any, records: Sequence[dict], settings: Any) -> list[dict]:
    """Step 2a: the policy answers each sum `settings.responses` times, the judge compares."""
    from snippets.worlds import lm

    group, length, rng = settings.responses, settings.max_new_tokens, random.Random(settings.seed)
    uniforms = torch.rand(len(records) * group, length, generator=lm.seeded(settings.seed, 0, 3))
    sampling = {"samples": group, "max_new_tokens": length, "uniforms": uniforms}
    texts = lm.generate(policy, tokenizer, [r["prompt"] for r in records], **sampling).texts
    pairs, rest = [], {"error": settings.error, "rng": rng}
    for i, record in enumerate(records):
        mine = texts[i * group : (i + 1) * group]
        pairs += compare(record["prompt"], mine, record["answer"].__eq__, **rest)
    return pairs


@torch.no_grad()
def measure(policy, reference, tokenizer, records: Sequence[dict], reward, *, length: int) -> dict:
    """One sample a prompt: the reward model's mean `score`, and `kl`, the mean log pi - log pi_ref
    in nats; where the records have an answer, `greedy` and `sampled` exact match."""
    from snippets.worlds import arithmetic, lm

    prompts = [record["prompt"] for record in records]
    uniforms = torch.rand(len(records), length, generator=lm.seeded(0, 0))  # the same each time
    out = lm.generate(policy, tokenizer, prompts, max_new_tokens=length, uniforms=uniforms)
    ref_logps = lm.token_logps(reference, out.ids, out.attention, out.mask.shape[1])
    log_ratios = torch.where(out.mask.bool(), out.logps - ref_logps, 0.0).sum(-1)  # (B,)
    scores = reward(completions=out.texts, prompts=prompts)
    found = {"score": sum(scores) / len(records), "kl": log_ratios.mean().item()}
    if "answer" in records[0]:
        right = arithmetic.exact_match(out.texts, [record["answer"] for record in records])
        found["sampled"] = sum(right) / len(records)
        found["greedy"] = arithmetic.greedy_accuracy(policy, tokenizer, records)
    return found


def run(policy, tokenizer, demonstrations, label, prompts, settings, watch=None, progress=False):
    """The three steps; -> sft, reward_model, policy (`policy`, trained in place) and history.

    demonstrations: records {"prompt", "completion"}; label(SFT policy) -> records {"prompt",
    "chosen", "rejected"}; prompts: records {"prompt"}; no label of theirs is used. watch(policy,
    SFT policy, reward) -> dict fills the history, before and during step 3. After step 2 nobody is
    asked anything: the reward model is the judge. ValueError on empty data."""
    from snippets.rlhf import loop, ppo, reward_model, sft

    if not demonstrations or not prompts:
        raise ValueError(f"got {len(demonstrations)} demonstrations and {len(prompts)} prompts")
    names = "seed threads max_new_tokens temperature logit_chunk eval_every save_every".split()
    shared = {name: getattr(settings, name) for name in names}

    def options(kind: type, folder: str, steps: int, lr: float, **own: Any) -> Any:
        return kind(out=str(Path(settings.out) / folder), steps=steps, lr=lr, **shared, **own)

    # 1. imitate the demonstrations
    own = options(sft.settings_class(), "sft", settings.sft_steps, settings.sft_lr, batch=32)
    sft.train(policy, tokenizer, demonstrations, own)
    imitator = copy.deepcopy(policy).requires_grad_(False)
    # 2. learn what is preferred, from comparisons of the imitator's own answers
    judge, kind = reward_model.RewardModel(policy), reward_model.settings_class()
    own = options(kind, "reward_model", settings.reward_steps, settings.reward_lr, batch=32)
    reward_model.train_reward_model(judge, tokenizer, label(policy), own)
    reward = reward_model.reward_function(judge, tokenizer)
    # 3. raise the score, and pay for leaving the imitator
    algorithm, history = ppo.algorithm(), []

    def evaluate(current: Any) -> float:
        step = min(len(history) * settings.eval_every, settings.steps)
        history.append({"step": step, **(watch(current, imitator, reward) if watch else {})})
        return history[-1].get("score", 0.0)

    evaluate(policy)
    own = {"prompts": min(128, len(prompts)), "beta": settings.beta}
    own = options(algorithm.settings, "", settings.steps, settings.lr, **own)
    rest = {"evaluate": evaluate, "progress": progress}
    loop.train(policy, tokenizer, prompts, reward, algorithm, own, **rest)
    return SimpleNamespace(sft=imitator, reward_model=judge, policy=policy, history=history)


def arithmetic_data(settings: Any) -> list[list[dict]]:
    """Disjoint sums of this seed, none held out: demonstrations (a `careless` share of them without
    the carry), sums to compare answers to, and PPO's prompts. ValueError on bad sizes or shares."""
    from snippets.worlds import arithmetic

    sizes = [settings.demonstrated, settings.compared, settings.prompts]
    sums, rng = arithmetic.problems(held_out=False), random.Random(settings.seed)
    if min(sizes) < 1 or sum(sizes) > len(sums) or not 0 <= settings.careless <= 1:
        got = f"got sizes {sizes} of {len(sums)} sums, and careless {settings.careless}"
        raise ValueError(f"want at least one sum a step, and careless in [0, 1]; {got}")
    rng.shuffle(sums)
    for record in sums[: sizes[0]]:
        wrong = arithmetic.without_carry(record["prompt"])
        record["completion"] = wrong if rng.random() < settings.careless else record["answer"]
    return [sums[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(3)]


def demo(settings: Any) -> None:
    """Arithmetic from the warm start, or --model with three files of your own."""
    from snippets.worlds import arithmetic, lm

    lm.check_settings(settings, "responses", "sft_steps", "reward_steps")
    needed = "model", "demonstrations_data", "comparisons_data", "data"
    path, *files = (getattr(settings, name) for name in needed)
    if settings.resume or any((path, *files)) != all((path, *files)):
        raise ValueError(f"want all of --{' --'.join(needed)} or none, and no --resume")
    torch.set_num_threads(settings.threads)
    device = lm.pick_device(settings.device)
    policy, tokenizer = lm.load_model(path, device) if path else arithmetic.warm_start()
    if path:
        columns = ["prompt", "completion"], ["prompt", "chosen", "rejected"], ["prompt"]
        wanted = zip(files, (dict.fromkeys(names, str) for names in columns), strict=True)
        shown, pairs, prompts = (lm.read_jsonl(*file) for file in wanted)
        held = lm.read_jsonl(settings.eval_data or settings.data, {"prompt": str})
    else:
        (shown, sums, prompts), held = arithmetic_data(settings), arithmetic.problems(held_out=True)

    def label(imitator: Any) -> list[dict]:
        return pairs if path else collect(imitator, tokenizer, sums, settings)

    def watch(*models: Any) -> dict:
        some, length = held[: settings.eval_size], settings.max_new_tokens
        return measure(*models[:2], tokenizer, some, models[2], length=length)

    result = run(policy.to(device), tokenizer, shown, label, prompts, settings, watch, True)
    trainer, names = SimpleNamespace(history=result.history, settings=settings), result.history[0]
    lm.report(trainer, [*names][1:], "score", tokenizer, policy)


if __name__ == "__main__":
    from snippets.worlds import lm

    lm.run(demo, settings_class())
