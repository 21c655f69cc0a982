"""Peak memory of log-probabilities at a vocabulary of 150k: all logits at once, against a chunk of tokens at a time.

Each side runs forward and backward in a process of its own, since a peak is a property of a process.

    python -m benchmarks.logit_memory
"""

import argparse
import json

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks import memory
from snippets.worlds import lm


def measure(chunk: int | None, *, vocab: int, rows: int, length: int) -> float:
    """MB at the peak of one forward and backward pass over rows * length tokens, over what the model alone takes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config).eval()
    for parameter in model.parameters():  # the gradients' own memory is the same on both sides: take it before
        parameter.grad = torch.zeros_like(parameter)
    ids = torch.randint(vocab, (rows, length + 1))
    attention = torch.ones_like(ids)
    memory.restart()
    before = memory.status("VmHWM")
    lm.token_logps(model, ids, attention, length, chunk=chunk).sum().backward()
    return memory.status("VmHWM") - before


def compare(*, vocab: int, rows: int, length: int, chunk: int) -> dict[str, float]:
    """{"plain": MB, "chunked": MB}."""
    sizes = ["--vocab", str(vocab), "--rows", str(rows), "--length", str(length)]
    peaks = {}
    for name, extra in (("plain", []), ("chunked", ["--chunk", str(chunk)])):
        peaks[name] = memory.measured_alone("benchmarks.logit_memory", "--measure", *sizes, *extra)
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description="peak memory of log-probabilities, with all logits and with a chunk")
    parser.add_argument("--vocab", type=int, default=150_000)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=None)
    parser.add_argument("--measure", action="store_true", help="measure one side in this process and print MB")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.chunk, vocab=args.vocab, rows=args.rows, length=args.length)))
        return
    peaks = compare(vocab=args.vocab, rows=args.rows, length=args.length, chunk=args.chunk or 64)
    for name, megabytes in peaks.items():
        print(f"{name:>8}: {megabytes:.0f} MB at the peak")
    print(f"chunked / plain: {peaks['chunked'] / peaks['plain']:.2f}")


if __name__ == "__main__":
    main()
