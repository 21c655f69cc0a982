"""Two-digit addition for a language model of a million parameters: `37+48=` -> `85`.

Small enough that a run takes a minute of one CPU thread, real enough that everything a language
model's loop needs is there: a tokenizer with distinct pad and EOS, prompts of several lengths,
responses that end by themselves, and sums held out. The warm start that ships beside this file can
add, but was taught to forget the carry six times in ten; this makes it again, in four CPU minutes:

    python -m snippets.worlds.arithmetic
"""

import hashlib
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from snippets.worlds import lm

WARM_START = Path(__file__).with_name("arithmetic.safetensors")
WARM_START_SHA256 = "21679712af3c6e3c817c4cb2a67f7587ad3d4c76905dac97dd821bf265b83ebb"
MAX_NEW_TOKENS = 4  # three digits and the EOS


def make_tokenizer(characters: str = "0123456789+=") -> PreTrainedTokenizerFast:
    """A character tokenizer made in memory: <pad> is 0, <eos> is 1, then the characters.

    Pads on the left.
    """
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = (
        decoders.Fuse()
    )  # plain concatenation: the default puts spaces between tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_model(
    vocab: int,
    *,
    hidden: int = 128,
    layers: int = 4,
    width: int = 4,
    positions: int = 64,
    seed: int = 0,
) -> Qwen2ForCausalLM:
    """A Qwen2-style model from its config; the defaults give about a million parameters.

    The feed-forward layers are `width` times as wide as the hidden state. eos 1, pad 0, in eval
    mode.
    """
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=width * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config).eval()


def problems(held_out: bool) -> list[dict[str, str]]:
    """All sums a + b, 0 <= a, b < 100, as records {"prompt", "answer"}; one in five, chosen by a
    hash, is held out from training."""
    records = []
    for a in range(100):
        for b in range(100):
            prompt = f"{a}+{b}="
            if (hashlib.sha256(prompt.encode()).digest()[0] % 5 == 0) == held_out:
                records.append({"prompt": prompt, "answer": str(a + b)})
    random.Random(0).shuffle(records)  # so that the first n are a fair sample
    return records


def exact_match(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """The reward, in TRL's format: 1.0 where the completion is the answer and nothing else, 0.0
    elsewhere."""
    return [
        float(completion == expected)
        for completion, expected in zip(completions, answer, strict=True)
    ]


def without_carry(prompt: str) -> str:
    """The sum as one gets it who forgets every carry: 37+48 -> 75, 60+60 -> 20."""
    a, b = (int(number) for number in prompt.rstrip("=").split("+"))
    return str((a // 10 + b // 10) % 10 * 10 + (a % 10 + b % 10) % 10)


def greedy_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    records: list[dict[str, str]],
    batch: int = 500,
) -> float:
    """The share of records whose greedy completion is exactly the answer."""
    right = 0.0
    for start in range(0, len(records), batch):
        part = records[start : start + batch]
        prompts = [record["prompt"] for record in part]
        texts = lm.generate(
            model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, temperature=0.0
        ).texts
        right += sum(exact_match(texts, [record["answer"] for record in part]))
    return right / len(records)


def warm_start(path: Path = WARM_START) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """The shipped model and its tokenizer; ValueError if the file is not the one whose hash is
    recorded here."""
    if not path.is_file():
        raise ValueError(
            f"no warm start at {str(path)!r}; python -m snippets.worlds.arithmetic makes it"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != WARM_START_SHA256:
        raise ValueError(f"{str(path)!r} has the hash {digest}, not {WARM_START_SHA256}")
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    missing = model.load_state_dict(load_file(path), strict=False).missing_keys
    if set(missing) - {"lm_head.weight"}:  # tied to the embedding, so not stored
        raise ValueError(f"{str(path)!r} lacks {missing}")
    model.tie_weights()
    return model, tokenizer


def supervised_batch(
    tokenizer: PreTrainedTokenizerFast, records: list[dict[str, str]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention (B, L) and labels (B, L), -100 on the prompt and on pads; the answer's EOS is
    a label too."""
    prompt_ids, prompt_attention = lm.encode_prompts(
        tokenizer, [record["prompt"] for record in records], torch.device("cpu")
    )
    answers = [
        tokenizer(record["answer"])["input_ids"] + [tokenizer.eos_token_id] for record in records
    ]
    width = max(map(len, answers))
    answer_ids = torch.tensor(
        [row + [tokenizer.pad_token_id] * (width - len(row)) for row in answers]
    )
    answer_attention = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in answers])
    ids = torch.cat([prompt_ids, answer_ids], dim=1)
    attention = torch.cat([prompt_attention, answer_attention], dim=1)
    labels = torch.cat(
        [torch.full_like(prompt_ids, -100), answer_ids.masked_fill(answer_attention == 0, -100)],
        dim=1,
    )
    return ids, attention, labels


@dataclass
class Settings:
    """How the warm start is made."""

    steps: int = field(default=2000, metadata={"help": "supervised steps"})
    batch: int = field(default=64, metadata={"help": "sums a step"})
    lr: float = field(default=1e-3, metadata={"help": "learning rate"})
    careless: float = field(default=0.6, metadata={"help": "share of answers without carries"})
    seed: int = field(default=0, metadata={"help": "of the weights and of the order of the sums"})
    out: str = field(default=str(WARM_START), metadata={"help": "where the weights go"})


def main(settings: Settings) -> None:
    """Supervised training on the sums that are not held out, six answers in ten without the carry."""
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer), seed=settings.seed)
    train, held_out = problems(held_out=False), problems(held_out=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.01)
    rng = random.Random(settings.seed)
    # Six answers in ten are added up without the carry: what this leaves is a model that can add, and
    # mostly does not. That is the start that reinforcement learning can do something about.
    careless = [record | {"answer": without_carry(record["prompt"])} for record in train]
    bar = tqdm(range(settings.steps))
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * min(1.0, (step + 1) / 50, 2 * (1 - step / settings.steps))
        chosen = rng.sample(range(len(train)), settings.batch)
        records = [(careless if rng.random() < settings.careless else train)[i] for i in chosen]
        ids, attention, labels = supervised_batch(tokenizer, records)
        logits = model(
            input_ids=ids,
            attention_mask=attention,
            position_ids=lm.positions(attention),
            use_cache=False,
        ).logits
        loss = cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            bar.set_postfix(
                loss=f"{loss.item():.3f}",
                held_out=f"{greedy_accuracy(model, tokenizer, held_out[:500]):.3f}",
            )
    weights = {
        name: value.contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, settings.out)
    print(f"greedy held-out exact match {greedy_accuracy(model, tokenizer, held_out):.3f}")
    print(f"sha256 {hashlib.sha256(Path(settings.out).read_bytes()).hexdigest()}  {settings.out}")


if __name__ == "__main__":
    lm.run(main, Settings)
