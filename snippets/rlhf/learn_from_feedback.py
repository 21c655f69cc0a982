"""Learning from the feedback that users give in passing: praise for SFT, praise and complaints for
KTO.

Don-Yehiya et al. 2024 (arXiv:2407.10944): a language model reads logged conversations, finds the
turns in which a user reacts to an answer, and names the kind of reaction. Records are in TRL's
formats; no pairs are needed. Here users and extraction are simulated, with known errors.

    python -m snippets.rlhf.learn_from_feedback
"""

import random
from collections.abc import Sequence
from typing import Any

import torch

# The paper's taxonomy. Only the middle two serve as negatives there: one rephrases, or asks, also
# where the answer was not wrong.
PRAISE, NAMED, CORRECTED = "praise", "error named", "error named and corrected"
REPHRASED, ASKED = "repeated or rephrased", "clarification asked"
CATEGORIES = (PRAISE, NAMED, CORRECTED, REPHRASED, ASKED)
# How often a user of the simulation reacts so to a right and to a wrong answer; else, not at all.
REACTIONS = {
    True: {PRAISE: 0.05, REPHRASED: 0.01, ASKED: 0.02},
    False: {PRAISE: 0.01, NAMED: 0.2, CORRECTED: 0.05, REPHRASED: 0.08, ASKED: 0.02},
}
Turn = dict[str, Any]  # {"prompt", "completion", "feedback": a category or None}


def react(right: bool, rng: random.Random) -> str | None:
    """What a user says to an answer: a category, or nothing."""
    chances = REACTIONS[right]
    rest = 1 - sum(chances.values())
    return rng.choices([*chances, None], [*chances.values(), rest])[0]


def extract(
    said: str | None, rng: random.Random, *, recall: float = 1.0, false_alarm: float = 0.0
) -> str | None:
    """What the extraction makes of a turn. It finds feedback with chance `recall`, and sees some
    where there is none with chance `false_alarm`, of a kind as wrong answers draw it. ValueError
    where one of the two is no probability, or the category is unknown."""
    if not (0 <= recall <= 1 and 0 <= false_alarm <= 1):
        raise ValueError(f"want probabilities, got recall {recall}, false_alarm {false_alarm}")
    if said is not None and said not in CATEGORIES:
        raise ValueError(f"unknown feedback {said!r}; want None or one of {CATEGORIES}")
    if said is not None:
        return said if rng.random() < recall else None
    if rng.random() >= false_alarm:
        return None
    return rng.choices(list(REACTIONS[False]), list(REACTIONS[False].values()))[0]


def precision_and_recall(said: Sequence, found: Sequence) -> tuple[float, float]:
    """Of the turns marked, the share that hold feedback; of those that do, the share marked.
    ValueError where either is a share of nothing."""
    both = sum(s is not None and f is not None for s, f in zip(said, found, strict=True))
    marked, real = (sum(x is not None for x in turns) for turns in (found, said))
    if not marked or not real:
        raise ValueError(f"{marked} turns marked and {real} with feedback: no shares of these")
    return both / marked, both / real


def praised(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """{"prompt", "completion"}, for SFT: the answers that were praised."""
    kept = [turn for turn in turns if turn["feedback"] == PRAISE]
    return [{"prompt": turn["prompt"], "completion": turn["completion"]} for turn in kept]


def labelled(turns: Sequence[Turn], rng: random.Random | None = None) -> list[dict[str, Any]]:
    """{"prompt", "completion", "label"}, for KTO: True for praise, False for an error named. With
    `rng`, only as many of the more frequent label as there are of the other, drawn at random."""
    label = {PRAISE: True, NAMED: False, CORRECTED: False}
    good, bad = (
        [
            {"prompt": turn["prompt"], "completion": turn["completion"], "label": wanted}
            for turn in turns
            if label.get(turn["feedback"]) is wanted
        ]
        for wanted in (True, False)
    )
    if rng is not None:
        size = min(len(good), len(bad))
        good, bad = rng.sample(good, size), rng.sample(bad, size)
    return good + bad


def train_kto(policy: Any, tokenizer: Any, records: Sequence[dict], settings: Any) -> Any:
    """KTO in place on unpaired records {"prompt", "completion", "label"}; -> the trainer.

    The reference point comes from the completions of the records before, each after a prompt that
    is not its own. The reference is the policy as it came. ValueError with fewer than 2 records.
    """
    from snippets.preferences import kto
    from snippets.rlhf import sft
    from snippets.worlds import lm

    lm.check_settings(settings, "batch")
    if len(records) < 2:
        raise ValueError(f"a reference point needs at least 2 records, got {len(records)}")
    before = [*records[-1:], *records[:-1]]
    others = [r | {"completion": b["completion"]} for r, b in zip(records, before, strict=True)]
    examples, mismatched = sft.encode(tokenizer, records), sft.encode(tokenizer, others)

    def logps(some: Sequence) -> torch.Tensor:  # (N,), of whole completions
        values, mask = sft.label_logps(policy, sft.pack(some, pad=tokenizer.pad_token_id))
        return torch.where(mask.bool(), values, 0.0).sum(-1)

    @torch.no_grad()
    def before_training(some: Sequence) -> torch.Tensor:
        return torch.cat([logps(some[i : i + 256]) for i in range(0, len(some), 256)])

    ref, ref_mismatched = before_training(examples), before_training(mismatched)
    good = torch.tensor([record["label"] for record in records])
    trainer = lm.Trainer(settings, {"policy": policy})
    for step in range(trainer.step, settings.steps):
        rows = torch.as_tensor(lm.batch_indices(len(records), settings.batch, step, settings.seed))
        with torch.no_grad():
            drift = logps([mismatched[i] for i in rows])
        now = logps([examples[i] for i in rows])
        yes, no = good[rows], ~good[rows]
        point = kto.reference_point(drift, ref_mismatched[rows])
        four = now[yes], now[no], ref[rows][yes], ref[rows][no]
        losses, *_ = kto.kto_loss(*four, point, beta=settings.beta)
        trainer.update(losses.mean())
        trainer.finish_step({"loss": losses.mean().item(), "reference_point": point.item()})
    return trainer


def converse(
    policy: Any, tokenizer: Any, records: Sequence[dict[str, str]], seed: int
) -> list[Turn]:
    """A log of sampled answers: {"prompt", "completion", "right", "said"}; empty ones left out."""
    from snippets.worlds import lm

    rng, generator, turns = random.Random(seed), torch.Generator().manual_seed(seed), []
    for start in range(0, len(records), 500):
        part = records[start : start + 500]
        prompts, draws = [r["prompt"] for r in part], torch.rand(len(part), 4, generator=generator)
        texts = lm.generate(policy, tokenizer, prompts, max_new_tokens=4, uniforms=draws).texts
        for record, text in zip(part, texts, strict=True):
            turn = {"prompt": record["prompt"], "completion": text}
            right = text == record["answer"]
            turns.append(turn | {"right": right, "said": react(right, rng)})
    return [turn for turn in turns if turn["completion"]]


def trial(
    seed: int, out: str, *, recall: float, false_alarm: float, size: int = 16000, epochs: int = 3
) -> dict[str, Any]:
    """The arithmetic warm start after it learnt in four ways from what users said to it. -> {name:
    policy}, and turns: the log with "feedback", what was extracted."""
    import copy

    from snippets.preferences import kto
    from snippets.rlhf import sft
    from snippets.worlds import arithmetic

    rng = random.Random(seed)
    start, tokenizer = arithmetic.warm_start()
    log = converse(start, tokenizer, (arithmetic.problems(held_out=False) * 2)[:size], seed)
    found = [extract(t["said"], rng, recall=recall, false_alarm=false_alarm) for t in log]
    turns = [turn | {"feedback": seen} for turn, seen in zip(log, found, strict=True)]
    praise, even = praised(turns), labelled(turns, rng)
    supervised, preferring = sft.settings_class(), kto.algorithm().settings
    made = {"turns": turns, "warm start": start}
    for name, train, settings, data in (
        ("SFT on any turns", sft.train, supervised, rng.sample(log, len(praise))),
        ("SFT on praise", sft.train, supervised, praise),
        ("KTO, as many complaints as praise", train_kto, preferring, even),
        ("KTO, all complaints", train_kto, preferring, labelled(turns)),
    ):
        policy = copy.deepcopy(start)
        # The last two take as many steps: what differs is what they see.
        steps = epochs * (len(even) if train is train_kto else len(praise)) // 32
        options = settings(seed=seed, out=out, steps=steps, batch=32, lr=5e-5, save_every=10**6)
        train(policy, tokenizer, data, options)
        made[name] = policy
    return made


def main() -> None:
    """The demo: held-out accuracy, with an extraction as good as the paper's."""
    import tempfile

    from snippets.worlds import arithmetic

    torch.set_num_threads(1)
    _, tokenizer = arithmetic.warm_start()
    with tempfile.TemporaryDirectory() as out:
        made = trial(0, out, recall=0.58, false_alarm=0.22)
    turns, held_out = made.pop("turns"), arithmetic.problems(held_out=True)
    shares = precision_and_recall(*([turn[x] for turn in turns] for x in ("said", "feedback")))
    print("extraction: precision {:.2f}, recall {:.2f}".format(*shares))
    for name, policy in made.items():
        print(f"{name:36} {arithmetic.greedy_accuracy(policy, tokenizer, held_out):.3f}")


if __name__ == "__main__":
    main()
