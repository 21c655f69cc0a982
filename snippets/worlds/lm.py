"""Language-model plumbing that every demo shares: sampling, log-probabilities, JSONL, checkpoints,
the command line.

Conventions: prompts are padded on the left and responses on the right, so that a batch is `prompt |
response` with one boundary column. `mask` (B, T) is 1 on a response's tokens, the EOS included.
Models run in eval mode even when they learn: dropout between sampling and scoring would make the
ratio differ from 1 before the first step.
"""

import json
import math
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

Reward = Callable[..., list[float]]  # TRL's format: reward(completions, prompts=..., **columns)


@dataclass
class Completions:
    """B responses: ids (B, P + T) prompt and response, attention (B, P + T), mask (B, T), logps
    (B, T) at sampling, texts without special tokens."""

    ids: Tensor
    attention: Tensor
    mask: Tensor
    logps: Tensor
    texts: list[str]


def pick_device(name: str) -> torch.device:
    """The device of that name, or ValueError if torch does not know it or this machine has
    none."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def load_model(path: str, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM and its tokenizer by Hugging Face name or path; in bf16 on CUDA, in float32
    elsewhere.

    ValueError if it cannot be loaded.
    """
    if (
        os.sep in path
        and not Path(path).is_dir()
        and (path.startswith((".", os.sep)) or not path.count("/") == 1)
    ):
        raise ValueError(f"no model at {path!r}: there is no such directory")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"no model at {path!r}: {str(error).splitlines()[0]}") from None
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path!r} has no EOS token, so no response could end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = (
            tokenizer.eos_token
        )  # safe here: masks come from where the EOS stands, never from `ids != pad`
    return model.to(device).eval(), tokenizer


def read_jsonl(path: str | Path, columns: dict[str, type]) -> list[dict[str, Any]]:
    """The records of a JSONL file, each with these columns of these types; ValueError names the
    file and line that is wrong."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no data at {str(path)!r}: there is no such file")
    records = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not JSON: {error}") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{number}: want an object, got {type(record).__name__}")
            for column, kind in columns.items():
                if column not in record:
                    raise ValueError(
                        f"{path}:{number}: no column {column!r}; the line has {sorted(record)}"
                    )
                if not isinstance(record[column], kind):
                    raise ValueError(
                        f"{path}:{number}: {column!r} must be {kind.__name__}, "
                        f"got {type(record[column]).__name__}"
                    )
            records.append(record)
    if not records:
        raise ValueError(f"{path}: the data set is empty")
    return records


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, without special tokens; ValueError names one that cannot be encoded."""
    try:
        return tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    except (
        Exception
    ) as error:  # tokenizers raises a bare Exception for a character it does not know
        for text in texts:
            try:
                tokenizer(text)
            except Exception:
                raise ValueError(f"{text!r} cannot be encoded: {error}") from None
        raise


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], device: torch.device
) -> tuple[Tensor, Tensor]:
    """ids and attention (B, P), padded on the left; ValueError on a prompt without a token."""
    rows = tokenize(tokenizer, prompts)
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise ValueError(f"the prompt {prompt!r} has no token")
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    attention = torch.tensor(
        [[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device
    )
    return ids, attention


def positions(attention: Tensor) -> Tensor:
    """(B, L): each token's position counted from its row's first real token, so that left padding
    changes nothing."""
    return (attention.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    samples: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    uniforms: Tensor | None = None,
) -> Completions:
    """`samples` responses to each prompt, at `temperature`, or greedy at 0; those to one prompt
    stand together, so B = len(prompts) * samples. `logps` are at the temperature of sampling.

    uniforms (B, max_new_tokens) in [0, 1) decide what is sampled: a row depends on its own prompt
    and numbers alone. So a batch can be split over processes, or a run resumed, and nothing changes.
    """
    if not temperature >= 0 or not math.isfinite(temperature):
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    rows = len(prompts) * samples  # B
    if uniforms is None:
        uniforms = torch.rand(rows, max_new_tokens)
    if uniforms.shape != (rows, max_new_tokens):
        raise ValueError(
            f"shapes disagree: uniforms {tuple(uniforms.shape)} against {(rows, max_new_tokens)}"
        )
    ids, attention = encode_prompts(tokenizer, prompts, model.device)  # (B / samples, P)
    uniforms = uniforms.to(model.device).clamp(min=1e-12)
    step_ids, cache, tokens, logps, mask = ids, None, [], [], []
    alive = torch.ones(rows, dtype=torch.bool, device=model.device)
    for t in range(max_new_tokens):
        place = positions(attention)[:, -step_ids.shape[1] :]
        out = model(
            input_ids=step_ids,
            attention_mask=attention,
            position_ids=place,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache, logits = out.past_key_values, out.logits[:, -1]
        if t == 0 and samples > 1:  # a prompt is read once, however many responses it gets
            cache.batch_repeat_interleave(samples)
            ids, attention, logits = (
                x.repeat_interleave(samples, dim=0) for x in (ids, attention, logits)
            )
        logits = logits.float() / (temperature or 1.0)  # (B, V)
        log_probs = logits.log_softmax(-1)
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            cdf = log_probs.double().exp().cumsum(-1)
            height = uniforms[:, t : t + 1].double() * cdf[:, -1:]
            token = torch.searchsorted(cdf, height).squeeze(-1)
        token = torch.where(alive, token, tokenizer.pad_token_id)
        tokens.append(token)
        logps.append(torch.where(alive, log_probs.gather(-1, token.unsqueeze(-1)).squeeze(-1), 0.0))
        mask.append(alive)
        attention = torch.cat([attention, alive.long().unsqueeze(-1)], dim=-1)
        # The EOS itself was chosen by the policy, so it stays in the mask.
        alive = alive & (token != tokenizer.eos_token_id)
        step_ids = token.unsqueeze(-1)
        if not alive.any():
            break
    response = torch.stack(tokens, dim=1)  # (B, T)
    valid = torch.stack(mask, dim=1)
    texts = [
        tokenizer.decode(row[keep], skip_special_tokens=True)
        for row, keep in zip(response, valid, strict=True)
    ]
    return Completions(
        torch.cat([ids, response], dim=1), attention, valid.long(), torch.stack(logps, dim=1), texts
    )


def score(
    reward: Reward, prompts: Sequence[str], texts: list[str], records: Sequence[dict[str, Any]]
) -> Tensor:
    """The reward of each response (B,) float32; ValueError if there are not as many as responses,
    or one is not finite."""
    columns = {
        name: [record[name] for record in records] for name in records[0] if name != "prompt"
    }
    scores = reward(completions=texts, prompts=list(prompts), **columns)
    if len(scores) != len(texts):
        raise ValueError(
            f"the reward function gave {len(scores)} rewards for {len(texts)} completions"
        )
    for prompt, text, value in zip(prompts, texts, scores, strict=True):
        if value is None or not math.isfinite(value):
            raise ValueError(
                f"the reward of {text!r} for the prompt {prompt!r} is {value}; it must be finite"
            )
    return torch.tensor(scores, dtype=torch.float32)


def hidden_states(model: PreTrainedModel, ids: Tensor, attention: Tensor, length: int) -> Tensor:
    """(B, length, D): the last hidden states of the positions that predict the last `length` tokens
    of ids (B, L)."""
    ids, attention = ids[:, :-1], attention[:, :-1]  # the last token predicts nothing that is asked
    hidden = model.base_model(
        input_ids=ids,
        attention_mask=attention,
        position_ids=positions(attention),
        use_cache=False,
    )[0]
    return hidden[:, -length:]


def head_logps(head: nn.Module, hidden: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """(N,): log-probabilities of tokens (N,) under head(hidden (N, D)); the logits are computed,
    and softmaxed, in float32."""
    logits = head(hidden).float() / temperature  # (N, V)
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def token_logps(
    model: PreTrainedModel,
    ids: Tensor,
    attention: Tensor,
    length: int,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """(B, length): log-probabilities of the last `length` tokens of ids (B, L), at the temperature
    that sampled them.

    chunk: at most so many tokens' logits are held at a time; the backward pass computes them again.
    With a vocabulary of 150k the logits are most of the memory, and this halves it or better, at
    the cost of a second head matmul.
    """
    hidden = hidden_states(model, ids, attention, length).flatten(0, 1)  # (B * length, D)
    tokens = ids[:, -length:].flatten()
    head = model.get_output_embeddings()
    if chunk is None:
        logps = head_logps(head, hidden, tokens, temperature)
    else:
        parts = zip(hidden.split(chunk), tokens.split(chunk), strict=True)
        logps = torch.cat(
            [checkpoint(head_logps, head, h, t, temperature, use_reentrant=False) for h, t in parts]
        )
    return logps.view(ids.shape[0], length)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write the state whole or not at all: to a file beside it first, then renamed over the old
    one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that save_checkpoint wrote; ValueError where there is none or it cannot be
    read."""
    if not path.is_file():
        raise ValueError(f"nothing to resume: there is no checkpoint at {str(path)!r}")
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises several kinds for a damaged file
        raise ValueError(
            f"the checkpoint {str(path)!r} cannot be read: {str(error).splitlines()[0]}"
        ) from None


def seeded(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """A random generator that is a function of its arguments alone, so that a step is the same in
    a resumed run."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 16 + stream)


def batch_indices(size: int, batch: int, step: int, seed: int) -> list[int]:
    """Which records step number `step` uses: the data in an order of its own every epoch.

    A function of its arguments alone.
    """
    indices = []
    for k in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(k, size)
        indices.append(_order(size, epoch, seed)[place])
    return indices


_orders: dict[tuple[int, int, int], list[int]] = {}


def _order(size: int, epoch: int, seed: int) -> list[int]:
    if (size, epoch, seed) not in _orders:
        _orders.clear()  # one epoch at a time is enough
        order = list(range(size))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        _orders[size, epoch, seed] = order
    return _orders[size, epoch, seed]


@dataclass
class Settings:
    """What every training demo can be told; a demo's own settings extend these."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "causal LM, Hugging Face name or path; without it, the arithmetic warm start"
        },
    )
    data: str | None = field(
        default=None, metadata={"help": "JSONL file; without it, the arithmetic problems"}
    )
    eval_data: str | None = field(
        default=None,
        metadata={"help": "JSONL file to evaluate on; without it, a sample of the data"},
    )
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, cuda:1, ... (bf16 on cuda)"})
    threads: int = field(
        default=1, metadata={"help": "CPU threads; one is fastest for tiny models"}
    )
    seed: int = field(default=0, metadata={"help": "of everything random"})
    steps: int = field(default=100, metadata={"help": "optimizer steps of the whole run"})
    lr: float = field(
        default=1e-4, metadata={"help": "learning rate of AdamW, after a warm-up of ten steps"}
    )
    max_new_tokens: int = field(default=4, metadata={"help": "longest response, EOS included"})
    temperature: float = field(
        default=1.0, metadata={"help": "of sampling, and of every log-probability"}
    )
    logit_chunk: int | None = field(
        default=None,
        metadata={"help": "tokens whose logits are held at a time; less memory, more time"},
    )
    eval_every: int = field(default=25, metadata={"help": "steps between evaluations"})
    eval_size: int = field(default=500, metadata={"help": "records an evaluation uses at most"})
    save_every: int = field(default=50, metadata={"help": "steps between checkpoints"})
    out: str = field(
        default="runs/demo",
        metadata={"help": "folder for the checkpoint, the curve and the trained model"},
    )
    resume: bool = field(default=False, metadata={"help": "go on from the checkpoint in --out"})


def check_settings(settings: Settings, *at_least_one: str) -> None:
    """ValueError where a setting that counts something is below 1, or a rate is not positive."""
    for name in (
        "threads",
        "steps",
        "max_new_tokens",
        "eval_every",
        "eval_size",
        "save_every",
        *at_least_one,
    ):
        if getattr(settings, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(settings, name)}")
    if not (settings.lr > 0 and math.isfinite(settings.lr)):
        raise ValueError(f"--lr must be positive and finite, got {settings.lr}")
    if settings.model is not None and settings.data is None:
        raise ValueError(
            "--model needs --data: the arithmetic problems fit only the warm start's tokenizer"
        )


class Trainer:
    """An optimizer over named modules, its checkpoints and the history of a run.

    A step's batch is a function of the seed and the step's number, so the modules, the optimizer
    and that number are all that a resumed run needs.
    """

    def __init__(self, settings: Settings, modules: dict[str, nn.Module]):
        self.settings, self.modules = settings, modules
        parameters = [p for module in modules.values() for p in module.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0, fused=True)
        self.path = Path(settings.out) / "checkpoint.pt"
        self.step, self.history = 0, []
        if settings.resume:
            state = load_checkpoint(self.path)
            for name, value in state["settings"].items():
                now = getattr(settings, name, None)
                if name not in ("steps", "out", "resume", "threads", "save_every") and now != value:
                    raise ValueError(f"cannot resume: --{name} was {value!r} and is {now!r} now")
            for name, module in modules.items():
                module.load_state_dict(state["modules"][name])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.history = state["step"], state["history"]

    def update(self, loss: Tensor, *, share: float = 1.0) -> None:
        """One step of the optimizer.

        `share` is this process's part of the batch; the processes' gradients are added up.
        """
        rate = self.settings.lr * min(1.0, (self.step + 1) / 10)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        (loss * share).backward()
        for module in self.modules.values():
            if dist.is_initialized():
                for parameter in module.parameters():
                    if parameter.grad is not None:
                        dist.all_reduce(parameter.grad)
            nn.utils.clip_grad_norm_(module.parameters(), 1.0, foreach=True)
        self.optimizer.step()

    def finish_step(self, record: dict[str, float]) -> None:
        """Count the step, keep its record, and write a checkpoint when one is due."""
        self.step += 1
        self.history.append({"step": self.step, **record})
        if self.step % self.settings.save_every == 0 or self.step == self.settings.steps:
            self.save()

    def save(self) -> None:
        if dist.is_initialized() and dist.get_rank() != 0:
            return
        modules = {name: module.state_dict() for name, module in self.modules.items()}
        state = {"step": self.step, "modules": modules, "optimizer": self.optimizer.state_dict()}
        save_checkpoint(
            self.path, {**state, "history": self.history, "settings": asdict(self.settings)}
        )


def report(
    trainer: Trainer,
    columns: Sequence[str],
    curve: str,
    tokenizer: PreTrainedTokenizerBase,
    policy: PreTrainedModel,
) -> None:
    """Print the run as a table, draw `curve` against the steps as a PNG, and save the trained
    model beside it."""
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [record for record in trainer.history if curve in record]
    print("  ".join(f"{name:>14}" for name in ("step", *columns)))
    for record in rows:
        print(
            f"{record['step']:>14}"
            + "".join(f"  {record.get(name, math.nan):>14.4f}" for name in columns)
        )
    out = Path(trainer.settings.out)
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot([record["step"] for record in rows], [record[curve] for record in rows], marker="o")
    axes.set(xlabel="step", ylabel=curve)
    figure.savefig(out / "curve.png", dpi=150)
    plt.close(figure)
    policy.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    print(f"checkpoint.pt, curve.png and model/ are in {out}")


def run(main: Callable[[Any], None], settings: type) -> None:
    """The command line of a demo: the fields of a settings dataclass are its flags.

    Bad input: one line on stderr, exit code 2.
    """
    parser = HfArgumentParser(settings)
    (parsed,) = parser.parse_args_into_dataclasses()
    try:
        main(parsed)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
