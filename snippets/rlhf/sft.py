"""Supervised fine-tuning (SFT): maximum likelihood of demonstrated completions, the prompt given.

The first step of InstructGPT (Ouyang et al. 2022, arXiv:2203.02155). With q the demonstrator, the
expected loss is E_q[-log pi(y|x)] = H(q) + KL(q || pi): behaviour cloning, by forward KL. Prompts
carry no label, the EOS carries one. Packing puts several documents in a row.

    python -m snippets.rlhf.sft
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

IGNORE = -100  # the label of a token that is not learned, as in torch and transformers
Example = tuple[list[int], list[int]]  # ids and labels of a sequence


def sft_loss(
    logps: Tensor, mask: Tensor, *, normalize: str = "token", tokens: int | None = None
) -> Tensor:
    """-log pi of the demonstrated tokens, averaged: a scalar, in nats.

    logps, mask (B, T): a sequence a row; mask is 1 on the completion's tokens, its EOS included.
    normalize="token": one mean over all tokens of the batch, as in TRL: a long sequence weighs
    more. "sequence": a mean over each row's tokens, then over rows; a row without one counts as 0.
    tokens: for "token", how many the whole batch has where this is a part of it; the parts' losses
    then add up to the batch's (gradient accumulation). A batch without a token gives 0. Float32 at
    least. ValueError on shapes that disagree, an empty batch, another normalize, or bad tokens."""
    if logps.shape != mask.shape or logps.dim() != 2:
        shapes = f"{tuple(logps.shape)} against {tuple(mask.shape)}"
        raise ValueError(f"shapes disagree: {shapes}; want (B, T) for both")
    if logps.numel() == 0:
        raise ValueError(f"an empty batch: shape {tuple(logps.shape)}")
    if normalize not in ("token", "sequence"):
        raise ValueError(f'normalize must be "token" or "sequence", got {normalize!r}')
    if tokens is not None and (tokens < 1 or normalize != "token"):
        raise ValueError(f'tokens must be at least 1 and goes with "token"; got {tokens}')
    dtype = torch.float64 if logps.dtype == torch.float64 else torch.float32
    keep = mask.bool()
    losses = torch.where(keep, -logps.to(dtype), 0.0).sum(-1)  # (B,); a product: -inf * 0 is NaN
    if normalize == "sequence":
        return (losses / keep.sum(-1).clamp(min=1)).mean()
    return losses.sum() / (keep.sum().clamp(min=1) if tokens is None else tokens)


@dataclass
class Batch:
    """S sequences in R rows of L tokens, all (R, L). labels: the token itself, or IGNORE; positions
    count from a sequence's start; documents: which of the S a token belongs to, -1 on padding."""

    ids: Tensor
    labels: Tensor
    positions: Tensor
    documents: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(x.to(device) for x in vars(self).values()))


def pack(sequences: Sequence[Example], length: int | None = None, *, pad: int = 0) -> Batch:
    """(ids, labels) of S sequences -> rows of `length` tokens, the longest first, each into the
    fullest row that has room (best fit decreasing). length=None: a row each, padded on the right.
    ValueError on no sequences, an empty one, or one longer than `length`: none is cut."""
    if not sequences or not all(ids and len(ids) == len(labels) for ids, labels in sequences):
        raise ValueError("want at least one sequence, and for each at least one id and its label")
    rows, room, sizes = [], [], [len(ids) for ids, _ in sequences]
    if length is not None and max(sizes) > length:
        raise ValueError(f"a sequence of {max(sizes)} tokens does not fit a row of {length}")
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fits = [r for r in range(len(rows)) if length and room[r] >= sizes[i]]
        r = min(fits, key=lambda r: room[r]) if fits else len(rows)
        if not fits:
            rows, room = [*rows, []], [*room, length or max(sizes)]
        rows[r].append(i)
        room[r] -= sizes[i]
    table = []  # R rows of L cells (id, label, position, document)
    for row, free in zip(rows, room, strict=True):
        # Before a sequence's first token stands another sequence, which must not predict it.
        labels = {i: [IGNORE, *sequences[i][1][1:]] for i in row}
        cells = [(sequences[i][0][t], labels[i][t], t, i) for i in row for t in range(sizes[i])]
        table.append(cells + [(pad, IGNORE, 0, -1)] * free)
    return Batch(*torch.tensor(table).unbind(-1))


def block_diagonal_mask(documents: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """documents (R, L) -> (R, 1, L, L), to be added to the attention's scores: 0 where query i sees
    key j, that is j <= i in the same document; the dtype's least number elsewhere. A pad sees pads,
    so that no softmax is empty."""
    visible = (documents.unsqueeze(-1) == documents.unsqueeze(-2)).tril()  # (R, L, L)
    return torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype).unsqueeze(1)


def label_logps(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """-> logps, mask (S, T), a sequence a row whether packed or not; T is the longest sequence. The
    logits are computed at labels alone, and softmaxed in float32."""
    hidden = model.base_model(
        input_ids=batch.ids,
        attention_mask=block_diagonal_mask(batch.documents, model.dtype),
        position_ids=batch.positions,
        use_cache=False,
    )[0]  # (R, L, D)
    labels = batch.labels[:, 1:]  # the token at i is predicted at i - 1
    keep = labels != IGNORE
    logits = model.get_output_embeddings()(hidden[:, :-1][keep]).float()  # (N, V)
    logps = logits.log_softmax(-1).gather(-1, labels[keep].unsqueeze(-1)).squeeze(-1)  # (N,)
    place = batch.documents[:, 1:][keep], batch.positions[:, 1:][keep]
    zeros = logps.new_zeros(int(batch.documents.max()) + 1, int(batch.positions.max()) + 1)
    return zeros.index_put(place, logps), zeros.index_put(place, torch.ones_like(logps))


def encode(tokenizer: Any, records: Sequence[dict[str, str]]) -> list[Example]:
    """Records {"prompt", "completion"} -> examples: no label on the prompt, one on the EOS that
    ends the completion, or the model never learns to stop. ValueError names an empty record."""
    from snippets.worlds import lm

    prompts = lm.tokenize(tokenizer, [record["prompt"] for record in records])
    completions = lm.tokenize(tokenizer, [record["completion"] for record in records])
    for record, prompt, completion in zip(records, prompts, completions, strict=True):
        if not prompt or not completion:
            raise ValueError(f"a prompt or a completion without a token: {record!r}")
    completions = [completion + [tokenizer.eos_token_id] for completion in completions]
    return [(p + c, [IGNORE] * len(p) + c) for p, c in zip(prompts, completions, strict=True)]


@functools.cache
def settings_class() -> type:
    from snippets.worlds import lm

    @dataclass
    class SFTSettings(lm.Settings):
        """Supervised fine-tuning."""

        batch: int = field(default=64, metadata={"help": "records a step"})
        pack: int | None = field(default=None, metadata={"help": "pack rows of so many tokens"})
        normalize: str = field(default="token", metadata={"help": "token or sequence"})
        lr: float = 1e-4
        steps: int = 200
        out: str = "runs/sft"

    return SFTSettings


def train(policy: Any, tokenizer: Any, records: Sequence, settings: Any, *, evaluate=None) -> Any:
    """Fine-tune `policy` in place on records {"prompt", "completion"}; -> the trainer, whose
    history has each step's loss, and `held_out` where evaluate(policy) -> float was called."""
    from snippets.worlds import lm

    lm.check_settings(settings, "batch")
    if not records:
        raise ValueError("there are no records")
    examples, trainer = encode(tokenizer, records), lm.Trainer(settings, {"policy": policy})
    for step in range(trainer.step, settings.steps):
        rows = lm.batch_indices(len(examples), settings.batch, step, settings.seed)
        batch = pack([examples[i] for i in rows], settings.pack, pad=tokenizer.pad_token_id)
        loss = sft_loss(*label_logps(policy, batch.to(policy.device)), normalize=settings.normalize)
        trainer.update(loss)
        record = {"loss": loss.item(), "rows": len(batch.ids)}
        if evaluate and (step + 1 == settings.steps or (step + 1) % settings.eval_every == 0):
            record["held_out"] = evaluate(policy)
        trainer.finish_step(record)
    return trainer


def demo(settings: Any) -> None:
    """The arithmetic warm start on right sums, scored by greedy exact match; or any causal LM and
    JSONL, scored by the loss on --eval_data."""
    from snippets.worlds import arithmetic, lm

    torch.set_num_threads(settings.threads)
    device = lm.pick_device(settings.device)
    path, files = settings.model, (settings.data, settings.eval_data or settings.data)
    policy, tokenizer = lm.load_model(path, device) if path else arithmetic.warm_start()
    records = [r | {"completion": r["answer"]} for r in arithmetic.problems(held_out=False)]
    held = arithmetic.problems(held_out=True)
    if settings.data:
        records, held = (lm.read_jsonl(f, {"prompt": str, "completion": str}) for f in files)
    held = held[: settings.eval_size]

    @torch.no_grad()
    def evaluate(policy: Any) -> float:
        if not settings.data:
            return arithmetic.greedy_accuracy(policy, tokenizer, held)
        batch = pack(encode(tokenizer, held), pad=tokenizer.pad_token_id).to(device)
        return sft_loss(*label_logps(policy, batch)).item()

    print(f"held_out before: {evaluate(policy.to(device)):.4f}")
    trainer = train(policy, tokenizer, records, settings, evaluate=evaluate)
    lm.report(trainer, ["loss", "held_out"], "held_out", tokenizer, policy)


if __name__ == "__main__":
    from snippets.worlds import lm

    lm.run(demo, settings_class())
