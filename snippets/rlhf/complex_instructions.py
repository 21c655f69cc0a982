"""Data for instructions with several constraints: prompts that combine them, and a weak model's
drafts that a strong one mends.

He et al. 2024 (arXiv:2404.15846): training on several constraints at once carries over to fewer,
and drafts corrected by a stronger model teach better than its own answers; draft and correction are
a preference pair, too. Here a program checks the constraints. Records are in TRL's formats.

    python -m snippets.rlhf.complex_instructions
"""

import random
from collections.abc import Sequence
from typing import Any

import torch

# An answer has five letters; "2c5a=" asks for a c at the second place and an a at the last.
LETTERS, PLACES = "abcdef", "12345"
WEAK_STYLE = (8, 6, 3, 1, 1, 1)  # how often the weak model writes each letter where it is free
STRONG_STYLE = (1, 1, 1, 1, 1, 1)


def constraints(prompt: str) -> list[tuple[int, str]]:
    """ "2c5a=" -> [(1, "c"), (4, "a")]. ValueError on a prompt that is not of this form."""
    body = prompt[:-1]
    parts = [(PLACES.find(p), letter) for p, letter in zip(body[::2], body[1::2], strict=False)]
    known = all(place >= 0 and letter in LETTERS for place, letter in parts)
    if not prompt.endswith("=") or len(body) % 2 or not parts or not known:
        raise ValueError(f"{prompt!r} is not a prompt such as '2c5a='")
    if len({place for place, _ in parts}) < len(parts):
        raise ValueError(f"{prompt!r} asks twice for one place")
    return parts


def broken(prompt: str, answer: str) -> list[tuple[int, str]]:
    """The constraints that an answer does not keep; all of them unless it has five letters."""
    asked = constraints(prompt)
    if len(answer) != len(PLACES):
        return asked
    return [(place, letter) for place, letter in asked if answer[place] != letter]


def make_prompt(count: int, rng: random.Random) -> str:
    """A prompt with so many constraints, in order. ValueError for a count outside 1 to 5."""
    if not 1 <= count <= len(PLACES):
        raise ValueError(f"want 1 to {len(PLACES)} constraints, got {count}")
    places = sorted(rng.sample(PLACES, count))
    return "".join(place + rng.choice(LETTERS) for place in places) + "="


def write(prompt: str, rng: random.Random, *, skill: float, style: Sequence[float]) -> str:
    """An answer written in one go, by a model of this style that minds each constraint with chance
    `skill`."""
    letters = rng.choices(LETTERS, style, k=len(PLACES))
    for place, letter in constraints(prompt):
        if rng.random() < skill:
            letters[place] = letter
    return "".join(letters)


def correct(prompt: str, draft: str, rng: random.Random, *, skill: float) -> str:
    """The draft, each constraint that it breaks mended with chance `skill`, the rest left as it is.
    A draft of another length is written anew."""
    if len(draft) != len(PLACES):
        return write(prompt, rng, skill=skill, style=STRONG_STYLE)
    letters = list(draft)
    for place, letter in broken(prompt, draft):
        if rng.random() < skill:
            letters[place] = letter
    return "".join(letters)


def demonstrations(prompts: Sequence[str], answers: Sequence[str]) -> list[dict[str, str]]:
    """{"prompt", "completion"}, for SFT."""
    return [{"prompt": p, "completion": a} for p, a in zip(prompts, answers, strict=True)]


def pairs(prompts: Sequence[str], drafts: Sequence[str], better: Sequence[str]) -> list[dict]:
    """{"prompt", "chosen", "rejected"}: correction over draft, where it keeps more constraints."""
    return [
        {"prompt": prompt, "chosen": good, "rejected": draft}
        for prompt, draft, good in zip(prompts, drafts, better, strict=True)
        if len(broken(prompt, good)) < len(broken(prompt, draft))
    ]


def dpo_with_sft() -> Any:
    """DPO with the chosen answer's mean negative log-probability a token added to the loss."""
    import dataclasses

    from snippets.preferences import dpo

    def loss(batch: Any, settings: Any) -> tuple:
        losses, *rewards = dpo.algorithm().loss(batch, settings)
        return losses - batch.chosen / batch.chosen_lengths, *rewards

    return dataclasses.replace(dpo.algorithm(), loss=loss)


def sample(policy: Any, tokenizer: Any, prompts: Sequence[str], seed: int) -> Any:
    """One answer a prompt at temperature 1, the same for the same seed."""
    from snippets.worlds import lm

    uniforms = torch.rand(len(prompts), 6, generator=torch.Generator().manual_seed(seed))
    return lm.generate(policy, tokenizer, prompts, max_new_tokens=6, uniforms=uniforms)


def judge(policy: Any, weak: Any, tokenizer: Any, size: int = 400) -> dict[str, Any]:
    """kept: for 1 to 5 constraints, the share of sampled answers that keep all; drift: an estimate
    of KL(policy || weak) in nats an answer."""
    from snippets.worlds import lm

    kept, drift = [], []
    for count in range(1, len(PLACES) + 1):
        rng = random.Random(1000 + count)  # no seed of a trial
        prompts = [make_prompt(count, rng) for _ in range(size)]
        out = sample(policy, tokenizer, prompts, 1000 + count)
        kept.append(sum(not broken(p, a) for p, a in zip(prompts, out.texts, strict=True)) / size)
        with torch.no_grad():
            logps = lm.token_logps(weak, out.ids, out.attention, out.mask.shape[1])
        ratio = torch.where(out.mask.bool(), out.logps - logps, 0.0).sum(-1)  # (B,)
        drift.append(ratio.mean().item())
    return {"kept": kept, "drift": sum(drift) / len(drift)}


def trial(seed: int, out: str, *, size: int = 1024, weak_steps: int = 500) -> dict[str, Any]:
    """A weak model made from scratch, and what `size` records of each kind make of it. -> {name:
    policy}, and tokenizer, and right: {source: the share of its answers that keep all}."""
    import copy

    from snippets.preferences import dpo, loop
    from snippets.rlhf import sft
    from snippets.worlds import arithmetic

    rng, tokenizer = random.Random(seed), arithmetic.make_tokenizer(LETTERS + PLACES + "=")

    def some(counts: Sequence[int], number: int) -> list[str]:
        return [make_prompt(rng.choice(counts), rng) for _ in range(number)]

    def learn(policy: Any, data: Sequence[dict], steps: int, **options: Any) -> Any:
        policy, own = copy.deepcopy(policy), {"seed": seed, "out": out, "save_every": 10**6}
        options = {"lr": 3e-4, "batch": 32, "steps": steps} | options
        if "chosen" in data[0]:
            method = dpo_with_sft() if options.pop("supervised") else dpo.algorithm()
            loop.train(policy, tokenizer, data, method, method.settings(beta=1.0, **options, **own))
        else:
            sft.train(policy, tokenizer, data, sft.settings_class()(**options, **own))
        return policy

    def texts(prompts: Sequence[str], skill: float, style: Sequence[float]) -> list[str]:
        return [write(prompt, rng, skill=skill, style=style) for prompt in prompts]

    early = some(range(1, 6), 6000)
    weak = arithmetic.make_model(len(tokenizer), hidden=64, layers=2, seed=seed)
    data = demonstrations(early, texts(early, 0.5, WEAK_STYLE))
    weak = learn(weak, data, weak_steps, lr=2e-3, batch=64)
    made = {"weak model": weak}
    for name, counts, number in (
        ("1 constraint", [1], size),
        ("3 to 5", [3, 4, 5], size),
        ("3 to 5, a quarter", [3, 4, 5], size // 4),
    ):
        prompts = some(counts, number)
        data = demonstrations(prompts, texts(prompts, 1.0, WEAK_STYLE))
        made[name] = learn(weak, data, 3 * number // 32)
    prompts = some([3, 4, 5], size)
    drafts = sample(weak, tokenizer, prompts, seed).texts
    sources, right = {}, {}
    for skill, name in ((0.9, ""), (1.0, ", all right")):
        mended = [correct(*x, rng, skill=skill) for x in zip(prompts, drafts, strict=True)]
        sources[f"the strong model's answers{name}"] = texts(prompts, skill, STRONG_STYLE)
        sources[f"corrected drafts{name}"] = mended
    for name, answers in ({"drafts": drafts} | sources).items():
        right[name] = sum(not broken(*x) for x in zip(prompts, answers, strict=True)) / size
        if name in sources:
            made[name] = learn(weak, demonstrations(prompts, answers), 3 * size // 32)
    both = pairs(prompts, drafts, sources["corrected drafts"])
    for name, supervised in (("pairs", False), ("pairs, with a supervised loss", True)):
        made[name] = learn(weak, both, 3 * len(both) // 32, supervised=supervised)
    return made | {"tokenizer": tokenizer, "right": right}


def main() -> None:
    """The demo: who keeps all constraints, by their number, and how far each has drifted."""
    import tempfile

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as out:
        made = trial(0, out)
    tokenizer, right = made.pop("tokenizer"), made.pop("right")
    print("answers that keep all:", {name: round(share, 2) for name, share in right.items()})
    for name, policy in made.items():
        found = judge(policy, made["weak model"], tokenizer)
        kept = "  ".join(f"{share:.2f}" for share in found["kept"])
        print(f"{name:38} {kept}   drift {found['drift']:.2f} nats")


if __name__ == "__main__":
    main()
