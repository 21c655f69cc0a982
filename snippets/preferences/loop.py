"""One loop for preference optimisation: pairs, their log-probabilities under the policy and, once,
under the reference, then a loss.

The method is an argument, an `Algorithm`: a loss of what `PairLogps` holds, and what it needs of
it. Data are records {"prompt", "chosen", "rejected"}, TRL's format, or a function that makes fresh
ones from the policy as it learns.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from snippets.worlds import arithmetic, lm

Pair = dict[str, str]
Tokens = tuple[list[int], list[int], list[int]]  # the ids of prompt, chosen, rejected


@dataclass
class Settings(lm.Settings):
    """What a preference method needs."""

    batch: int = field(default=32, metadata={"help": "pairs a step"})
    beta: float = field(
        default=1.0, metadata={"help": "what a nat of log-ratio is worth in reward"}
    )
    samples: int = field(
        default=8, metadata={"help": "without --data: responses sampled a prompt, to make pairs of"}
    )
    sampled_prompts: int = field(
        default=2000, metadata={"help": "without --data: how many prompts are sampled from"}
    )
    refresh: int = field(
        default=0, metadata={"help": "steps between fresh pairs of the policy's own; 0: never"}
    )
    steps: int = 120
    lr: float = 2e-5
    eval_every: int = 20
    out: str = "runs/preferences"


@dataclass(frozen=True)
class PairLogps:
    """What a loss may ask for, of B pairs. Log-probabilities are sums over a response's tokens."""

    chosen: Tensor  # (B,), under the policy, with gradient
    rejected: Tensor  # (B,)
    chosen_lengths: Tensor  # (B,), in tokens, the EOS included
    rejected_lengths: Tensor  # (B,)
    ref_chosen: Tensor | None = None  # (B,), under the reference
    ref_rejected: Tensor | None = None  # (B,)
    chosen_kl: Tensor | None = None  # (B,), sum over tokens of KL(ref || policy), with gradient
    rejected_kl: Tensor | None = None  # (B,)
    mismatched: Tensor | None = None  # (2B,), of responses to other prompts, without gradient
    ref_mismatched: Tensor | None = None  # (2B,)


@dataclass(frozen=True)
class Algorithm:
    """All that a method changes in the loop. Each method's file makes its own: `algorithm()`."""

    settings: type[Settings]
    loss: Callable[
        [PairLogps, Any], tuple[Tensor, Tensor, Tensor]
    ]  # -> losses, of any number, and the rewards (B,) of chosen and rejected
    reference: bool = True  # does it need the reference's log-probabilities?
    vocab_kl: bool = False  # and its whole distributions? Then a copy of the model is held.
    mismatched: bool = False  # and those of responses that stand below another pair's prompt?


@dataclass(frozen=True)
class PairBatch:
    """Pairs as 2B rows, the chosen responses first: ids and attention (2B, L), mask (2B, T) over
    the last T columns."""

    ids: Tensor
    attention: Tensor
    mask: Tensor


def tokenize_pairs(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> list[Tokens]:
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


def collate(tokens: Sequence[Tokens], pad: int, device: torch.device) -> PairBatch:
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
    reward: lm.Reward,
    settings: Settings,
    *,
    step: int = 0,
) -> list[Pair]:
    """Pairs of the policy's own responses: for each prompt, one of the best and one of the worst
    of `samples`, where they differ. The same for the same seed and `step`; ValueError if there is
    no pair at all."""
    pairs, generator = [], lm.seeded(settings.seed, step, stream=2)
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
        scores = lm.score(reward, prompts, texts, part).tolist()
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


def response_logps_and_kl(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    batch: PairBatch,
    *,
    chunk: int | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """response_logps, and (chosen (B,), rejected (B,)) of KL(ref(.|s) || policy(.|s)) over the whole
    vocabulary, summed over the prefixes s of each response; the gradients are the policy's."""
    length, tokens = batch.mask.shape[1], batch.ids[:, -batch.mask.shape[1] :].flatten()
    hidden = lm.hidden_states(policy, batch.ids, batch.attention, length).flatten(0, 1)  # (N, D)
    with torch.no_grad():
        ref_hidden = lm.hidden_states(reference, batch.ids, batch.attention, length).flatten(0, 1)

    def part(hidden: Tensor, ref_hidden: Tensor, tokens: Tensor) -> Tensor:
        logps = policy.get_output_embeddings()(hidden).float().log_softmax(-1)  # (n, V)
        with torch.no_grad():
            ref_logps = reference.get_output_embeddings()(ref_hidden).float().log_softmax(-1)
        kl = (ref_logps.exp() * (ref_logps - logps)).sum(-1)
        return torch.stack([logps.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), kl])  # (2, n)

    inputs = (hidden, ref_hidden, tokens)
    if chunk is None:
        both = part(*inputs)
    else:
        parts = zip(*(x.split(chunk) for x in inputs), strict=True)
        both = torch.cat([checkpoint(part, *x, use_reentrant=False) for x in parts], dim=1)
    both = torch.where(batch.mask.bool(), both.view(2, *batch.mask.shape), 0.0).sum(-1)  # (2, 2B)
    logps, kl = (tuple(x.chunk(2)) for x in both)
    return logps, kl


def mismatch(tokens: Sequence[Tokens]) -> list[Tokens]:
    """Each prompt with the responses of the pair before it; ValueError for a single pair."""
    if len(tokens) < 2:
        raise ValueError(f"responses to other prompts need at least 2 pairs, got {len(tokens)}")
    before = [*tokens[-1:], *tokens[:-1]]
    return [(prompt, *other[1:]) for (prompt, *_), other in zip(tokens, before, strict=True)]


def score_pairs(
    policy: PreTrainedModel,
    tokens: Sequence[Tokens],
    pad: int,
    algorithm: Algorithm,
    *,
    ref_logps: tuple[Tensor, Tensor] | None = None,
    reference: PreTrainedModel | None = None,
    chunk: int | None = None,
) -> PairLogps:
    """What the algorithm needs of these pairs. `ref_logps` of chosen and rejected (B,), if it needs
    them, were computed before; `reference` is there if it needs more."""
    batch = collate(tokens, pad, policy.device)
    more: dict[str, Tensor] = {}
    if ref_logps is not None:
        more["ref_chosen"], more["ref_rejected"] = ref_logps
    if algorithm.mismatched:
        others = collate(mismatch(tokens), pad, policy.device)
        with torch.no_grad():
            for name, model in (("mismatched", policy), ("ref_mismatched", reference)):
                more[name] = torch.cat(response_logps(model, others, chunk=chunk))  # (2B,)
    if algorithm.vocab_kl:
        logps, kl = response_logps_and_kl(policy, reference, batch, chunk=chunk)
        more["chosen_kl"], more["rejected_kl"] = kl
    else:
        logps = response_logps(policy, batch, chunk=chunk)
    return PairLogps(*logps, *batch.mask.sum(-1).chunk(2), **more)


def train(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair] | Callable[[PreTrainedModel, int], Sequence[Pair]],
    algorithm: Algorithm,
    settings: Any,
    *,
    evaluate: Callable[[PreTrainedModel], float] | None = None,
    progress: bool = False,
    ref_logps: tuple[Tensor, Tensor] | None = None,
) -> lm.Trainer:
    """Train `policy` in place; -> the trainer, whose history has each step's loss, implicit
    rewards and log-probabilities.

    `pairs` are records, or a function (policy, step) -> records that is asked every
    `settings.refresh` steps: 1 is online, more is iterative. The reference is the policy as it
    came; `ref_logps`, of all records, spare computing it. ValueError where there is no pair, or
    where a run is resumed between two questions.
    """
    lm.check_settings(settings, "batch")
    online = callable(pairs)
    if online and settings.refresh < 1:
        raise ValueError(f"fresh pairs need --refresh of at least 1, got {settings.refresh}")
    if not online and not pairs:
        raise ValueError("there are no pairs")
    needs_model = algorithm.vocab_kl or algorithm.mismatched or (online and algorithm.reference)
    reference = copy.deepcopy(policy).requires_grad_(False) if needs_model else None
    start = policy if reference is None else reference  # before training they are the same

    def prepare(pairs: Sequence[Pair]) -> tuple[list[Tokens], tuple[Tensor, Tensor] | None]:
        ref = ref_logps
        if algorithm.reference and ref is None:
            sizes = {"batch": settings.batch, "chunk": settings.logit_chunk}
            ref = reference_logps(start, tokenizer, pairs, **sizes)
        return tokenize_pairs(tokenizer, pairs), ref

    if not online:
        tokens, ref = prepare(pairs)
    trainer = lm.Trainer(settings, {"policy": policy})
    if online and trainer.step % settings.refresh:
        raise ValueError(
            f"cannot resume at step {trainer.step}: the pairs of step "
            f"{trainer.step - trainer.step % settings.refresh} are gone; "
            f"let --save_every be a multiple of --refresh {settings.refresh}"
        )
    steps = range(trainer.step, settings.steps)
    for step in tqdm(steps, initial=trainer.step, total=settings.steps, disable=not progress):
        if online and step % settings.refresh == 0:
            tokens, ref = prepare(pairs(policy, step))
        place = step % settings.refresh if online else step
        size = min(settings.batch, len(tokens)) if online else settings.batch
        rows = lm.batch_indices(len(tokens), size, place, settings.seed)
        batch = score_pairs(
            policy,
            [tokens[i] for i in rows],
            tokenizer.pad_token_id,
            algorithm,
            ref_logps=(ref[0][rows], ref[1][rows]) if ref else None,
            reference=reference,
            chunk=settings.logit_chunk,
        )
        losses, chosen_rewards, rejected_rewards = algorithm.loss(batch, settings)
        trainer.update(losses.mean())
        record = {
            "loss": losses.mean().item(),
            "margin": (chosen_rewards - rejected_rewards).mean().item(),
            "accuracy": (chosen_rewards > rejected_rewards).float().mean().item(),
            "chosen_logps": batch.chosen.mean().item(),
            "rejected_logps": batch.rejected.mean().item(),
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


def demo(algorithm: Algorithm, settings: Any) -> None:
    """Load or sample pairs, train, and report: a progress bar, a table, a curve, and the trained
    model in --out."""
    lm.check_settings(settings, "batch", "samples", "sampled_prompts")
    logps, lengths, kl = -torch.ones(2), torch.ones(2, dtype=torch.long), torch.ones(2)
    some = PairLogps(
        logps, logps, lengths, lengths, logps, logps, kl, kl, -torch.ones(4), -torch.ones(4)
    )
    algorithm.loss(some, settings)  # bad settings are refused before all the work
    torch.set_num_threads(settings.threads)
    device = lm.pick_device(settings.device)
    columns = {"prompt": str, "chosen": str, "rejected": str}
    pairs = lm.read_jsonl(settings.data, columns) if settings.data else None
    held_out = lm.read_jsonl(settings.eval_data, columns) if settings.eval_data else pairs
    if pairs is not None and settings.refresh:
        raise ValueError("--refresh samples pairs of its own; it does not go with --data")
    if settings.model is None:
        policy, tokenizer = arithmetic.warm_start()
        policy.to(device)
    else:
        policy, tokenizer = lm.load_model(settings.model, device)
    if pairs is None:
        pairs = arithmetic_pairs(policy, tokenizer, settings)
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
    trainer = train(policy, tokenizer, pairs, algorithm, settings, evaluate=evaluate, progress=True)
    lm.report(
        trainer,
        ["loss", "margin", "accuracy", "chosen_logps", "rejected_logps", "held_out"],
        "held_out",
        tokenizer,
        policy,
    )


def arithmetic_pairs(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> list[Pair] | Callable[[PreTrainedModel, int], list[Pair]]:
    """Sums answered by the policy and judged by the verifier: sampled once, or, with
    `settings.refresh`, from the policy as it is then, `sampled_prompts` of them each time."""
    records = arithmetic.problems(held_out=False)

    def fresh(policy: PreTrainedModel, step: int) -> list[Pair]:
        round = step // settings.refresh
        rows = lm.batch_indices(len(records), settings.sampled_prompts, round, settings.seed)
        part = [records[i] for i in rows]
        return sample_pairs(policy, tokenizer, part, arithmetic.exact_match, settings, step=step)

    if settings.refresh:
        return fresh
    return sample_pairs(
        policy,
        tokenizer,
        records[: settings.sampled_prompts],
        arithmetic.exact_match,
        settings,
    )


def run_demo(algorithm: Algorithm) -> None:
    """The command line of a method."""
    lm.run(partial(demo, algorithm), algorithm.settings)
