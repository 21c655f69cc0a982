"""One loop for preference optimisation: pairs, the reference's log-probabilities once, then a loss
of four numbers a pair.

The loss is an argument: a function of (policy_chosen, policy_rejected, ref_chosen, ref_rejected)
log-probabilities, all (B,), as in Rafailov et al. 2023 (arXiv:2305.18290). Data are records
{"prompt", "chosen", "rejected"}, TRL's format.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from snippets.worlds import arithmetic, lm

Pair = dict[str, str]


@dataclass
class Settings(lm.Settings):
    """What a preference method needs."""

    batch: int = field(default=32, metadata={"help": "pairs a step"})
    beta: float = field(default=1.0, metadata={"help": "what a nat of log-ratio is worth in reward"})
    label_smoothing: float = field(
        default=0.0, metadata={"help": "the chance that a label is flipped (cDPO)"}
    )
    samples: int = field(
        default=8, metadata={"help": "without --data: responses sampled a prompt, to make pairs of"}
    )
    sampled_prompts: int = field(
        default=2000, metadata={"help": "without --data: how many prompts are sampled from"}
    )
    steps: int = 120
    lr: float = 2e-5
    eval_every: int = 20
    out: str = "runs/dpo"


@dataclass(frozen=True)
class PairBatch:
    """Pairs as 2B rows, the chosen responses first: ids and attention (2B, L), mask (2B, T) over
    the last T columns."""

    ids: Tensor
    attention: Tensor
    mask: Tensor


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]
) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) ids of each pair. Prompt and response are encoded apart, so that
    both responses have the very same prompt; an EOS ends each. ValueError names a text that the
    tokenizer cannot encode, and a prompt without a token."""
    prompts, chosen, rejected = (
        lm.tokenize(tokenizer, [pair[column] for pair in pairs])
        for column in ("prompt", "chosen", "rejected")
    )
    eos = [tokenizer.eos_token_id]
    for pair, prompt in zip(pairs, prompts, strict=True):
        if not prompt:
            raise ValueError(f"the prompt {pair['prompt']!r} has no token")
    columns = zip(prompts, chosen, rejected, strict=True)
    return [(prompt, good + eos, bad + eos) for prompt, good, bad in columns]


def collate(
    tokens: Sequence[tuple[list[int], list[int], list[int]]], pad: int, device: torch.device
) -> PairBatch:
    """Prompts padded on the left, responses on the right; the rejected stand below the chosen."""
    prompts = [prompt for prompt, _, _ in tokens] * 2
    responses = [chosen for _, chosen, _ in tokens] + [rejected for _, _, rejected in tokens]
    left, right = max(map(len, prompts)), max(map(len, responses))
    rows, valid, mask = [], [], []
    for prompt, response in zip(prompts, responses, strict=True):
        before, after = left - len(prompt), right - len(response)
        rows.append([pad] * before + prompt + response + [pad] * after)
        mask.append([1] * len(response) + [0] * after)
        valid.append([0] * before + [1] * len(prompt) + mask[-1])
    ids, attention, mask = (torch.tensor(x, device=device) for x in (rows, valid, mask))
    return PairBatch(ids, attention, mask)


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], device: torch.device
) -> PairBatch:
    """A batch of pairs, from text."""
    return collate(tokenize_pairs(tokenizer, pairs), tokenizer.pad_token_id, device)


def response_logps(
    policy: PreTrainedModel, batch: PairBatch, *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """(chosen (B,), rejected (B,)): the log-probability of each whole response, a sum over its
    tokens, in one forward pass for both."""
    logps = lm.token_logps(
        policy, batch.ids, batch.attention, batch.mask.shape[1], chunk=chunk
    )  # (2B, T)
    sums = torch.where(batch.mask.bool(), logps, 0.0).sum(-1)  # (2B,)
    chosen, rejected = sums.chunk(2)
    return chosen, rejected


@torch.no_grad()
def reference_logps(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    *,
    batch: int,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Both (N,) for all pairs, before training begins: no second model has to stay in memory."""
    parts = [
        response_logps(
            policy,
            encode_pairs(tokenizer, pairs[start : start + batch], policy.device),
            chunk=chunk,
        )
        for start in range(0, len(pairs), batch)
    ]
    chosen, rejected = zip(*parts, strict=True)
    return torch.cat(chosen), torch.cat(rejected)


def sample_pairs(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[dict[str, Any]],
    reward: Callable[..., list[float]],
    settings: Settings,
) -> list[Pair]:
    """Pairs of the policy's own responses: for each prompt, one of the best and one of the worst
    of `samples`, where they differ."""
    pairs, generator = [], lm.seeded(settings.seed, 0, stream=2)
    for start in range(0, len(records), 64):
        part = records[start : start + 64]
        rows = len(part) * settings.samples
        texts = lm.generate(
            policy,
            tokenizer,
            [record["prompt"] for record in part],
            samples=settings.samples,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            uniforms=torch.rand(rows, settings.max_new_tokens, generator=generator),
        ).texts
        part = [record for record in part for _ in range(settings.samples)]
        prompts = [record["prompt"] for record in part]
        columns = {name: [record[name] for record in part] for name in part[0] if name != "prompt"}
        scores = reward(completions=texts, prompts=prompts, **columns)
        for i in range(0, len(part), settings.samples):
            group = sorted(
                range(i, i + settings.samples), key=lambda k: scores[k]
            )  # stable: ties keep the order of sampling
            worst, best = group[0], group[-1]
            if scores[best] > scores[worst]:
                pairs.append(
                    {"prompt": prompts[i], "chosen": texts[best], "rejected": texts[worst]}
                )
    if not pairs:
        raise ValueError(
            f"no pairs: none of {len(records)} prompts has responses of different rewards "
            f"among {settings.samples}"
        )
    return pairs


def train(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    loss_function: Callable[..., tuple[Tensor, Tensor, Tensor]],
    settings: Settings,
    *,
    evaluate: Callable[[PreTrainedModel], float] | None = None,
    progress: bool = False,
    ref_logps: tuple[Tensor, Tensor] | None = None,
) -> lm.Trainer:
    """Train `policy` in place; -> the trainer, whose history has each step's loss, implicit
    rewards and log-probabilities."""
    lm.check_settings(settings, "batch")
    if not pairs:
        raise ValueError("there are no pairs")
    if ref_logps is None:
        ref_logps = reference_logps(
            policy, tokenizer, pairs, batch=settings.batch, chunk=settings.logit_chunk
        )
    ref_chosen, ref_rejected = ref_logps
    tokens = tokenize_pairs(tokenizer, pairs)
    trainer = lm.Trainer(settings, {"policy": policy})
    steps = range(trainer.step, settings.steps)
    for step in tqdm(steps, initial=trainer.step, total=settings.steps, disable=not progress):
        rows = lm.batch_indices(len(pairs), settings.batch, step, settings.seed)
        batch = collate([tokens[i] for i in rows], tokenizer.pad_token_id, policy.device)
        chosen, rejected = response_logps(policy, batch, chunk=settings.logit_chunk)
        losses, chosen_rewards, rejected_rewards = loss_function(
            chosen,
            rejected,
            ref_chosen[rows],
            ref_rejected[rows],
            beta=settings.beta,
            label_smoothing=settings.label_smoothing,
        )
        trainer.update(losses.mean())
        record = {
            "loss": losses.mean().item(),
            "margin": (chosen_rewards - rejected_rewards).mean().item(),
            "accuracy": (chosen_rewards > rejected_rewards).float().mean().item(),
            "chosen_logps": chosen.mean().item(),
            "rejected_logps": rejected.mean().item(),
        }
        if evaluate is not None and (
            step + 1 == settings.steps or (step + 1) % settings.eval_every == 0
        ):
            record["held_out"] = evaluate(policy)
        trainer.finish_step(record)
    return trainer


def preference_accuracy(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    ref_logps: tuple[Tensor, Tensor],
    batch: int,
) -> float:
    """The share of pairs whose implicit reward is higher for the chosen response."""
    chosen, rejected = reference_logps(policy, tokenizer, pairs, batch=batch)
    return ((chosen - ref_logps[0]) > (rejected - ref_logps[1])).float().mean().item()


def demo(loss_function: Callable[..., tuple[Tensor, Tensor, Tensor]], settings: Settings) -> None:
    """Load or sample pairs, train, and report: a progress bar, a table, a curve, and the trained
    model in --out."""
    lm.check_settings(settings, "batch", "samples", "sampled_prompts")
    options = {"beta": settings.beta, "label_smoothing": settings.label_smoothing}
    loss_function(*[torch.zeros(1)] * 4, **options)  # bad settings: refused before all the work
    torch.set_num_threads(settings.threads)
    device = lm.pick_device(settings.device)
    columns = {"prompt": str, "chosen": str, "rejected": str}
    pairs = lm.read_jsonl(settings.data, columns) if settings.data else None
    held_out = lm.read_jsonl(settings.eval_data, columns) if settings.eval_data else pairs
    if settings.model is None:
        policy, tokenizer = arithmetic.warm_start()
        policy.to(device)
    else:
        policy, tokenizer = lm.load_model(settings.model, device)
    if pairs is None:
        problems = arithmetic.problems(held_out=False)[: settings.sampled_prompts]
        pairs = sample_pairs(policy, tokenizer, problems, arithmetic.exact_match, settings)
        print(f"{len(pairs)} pairs from {len(problems)} prompts")
    if held_out is None:
        records = arithmetic.problems(held_out=True)[: settings.eval_size]
        evaluate = partial(arithmetic.greedy_accuracy, tokenizer=tokenizer, records=records)
        print(f"greedy held-out exact match before: {evaluate(policy):.4f}")
    else:
        held_out = held_out[: settings.eval_size]
        ref_logps = reference_logps(policy, tokenizer, held_out, batch=settings.batch)
        evaluate = partial(
            preference_accuracy,
            tokenizer=tokenizer,
            pairs=held_out,
            ref_logps=ref_logps,
            batch=settings.batch,
        )
    trainer = train(
        policy, tokenizer, pairs, loss_function, settings, evaluate=evaluate, progress=True
    )
    lm.report(
        trainer,
        ["loss", "margin", "accuracy", "chosen_logps", "rejected_logps", "held_out"],
        "held_out",
        tokenizer,
        policy,
    )


def run_demo(loss_function: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    """The command line of a method."""
    lm.run(partial(demo, loss_function), Settings)
