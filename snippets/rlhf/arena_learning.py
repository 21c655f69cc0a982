"""Arena learning: battles with stronger models show where a model loses, and that is its data.

Luo et al. 2024 (arXiv:2407.10627): a judge compares the model's answers with those of several
others. What it lost is data: the winner's answer for SFT, then, after new battles, pairs for DPO,
then RL. Ratings of all models come from the same battles. Records are in TRL's formats.

    python -m snippets.rlhf.arena_learning
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

Judge = Callable[
    [str, str, str], float
]  # (prompt, first, second) -> chance that the first is better


def verdict(judge: Judge, prompt: str, mine: str, theirs: str) -> float:
    """The chance that `mine` is better, asked in both orders, since judges favour a place, and
    averaged. 0.5, unasked, for equal answers. ValueError on a verdict outside [0, 1]."""
    if mine == theirs:
        return 0.5
    scores = judge(prompt, mine, theirs), judge(prompt, theirs, mine)
    if not all(0 <= score <= 1 for score in scores):
        raise ValueError(f"the judge's verdict must lie in [0, 1], got {scores} for {prompt!r}")
    return (scores[0] + 1 - scores[1]) / 2


def battles(
    prompts: Sequence[str], mine: Sequence[str], rivals: dict[str, Sequence[str]], judge: Judge
) -> list[dict[str, Any]]:
    """One battle a prompt and rival: {"prompt", "rival", "mine", "theirs", "score"}, the verdict on
    mine. ValueError where there are not as many answers as prompts."""
    for name, answers in {"mine": mine, **rivals}.items():
        if len(answers) != len(prompts):
            raise ValueError(f"{name}: {len(answers)} answers to {len(prompts)} prompts")
    fought = []
    for i, prompt in enumerate(prompts):
        for name, answers in rivals.items():
            pair = {"mine": mine[i], "theirs": answers[i]}
            score = verdict(judge, prompt, mine[i], answers[i])
            fought.append({"prompt": prompt, "rival": name, **pair, "score": score})
    return fought


def lessons(fought: Sequence[dict[str, Any]], *, margin: float = 0.0) -> list[dict[str, str]]:
    """What was lost by more than `margin`, one record a prompt, the clearest loss (the first of
    equals): {"prompt", "completion"} for SFT, and "chosen", "rejected" for preferences."""
    worst: dict[str, dict[str, Any]] = {}
    for battle in fought:
        known = worst.get(battle["prompt"], {"score": 0.5 - margin})
        if battle["score"] < known["score"]:
            worst[battle["prompt"]] = battle
    return [
        {"prompt": prompt, "completion": b["theirs"], "chosen": b["theirs"], "rejected": b["mine"]}
        for prompt, b in worst.items()
    ]


def ratings(
    results: Sequence[tuple[str, str, float]], *, anchor: str, level: float = 1000.0
) -> dict[str, float]:
    """Elo-scale ratings of the models in results (first, second, score of the first), by maximum
    likelihood: P(i beats j) = 1 / (1 + 10^((R_j - R_i) / 400)), the anchor at `level`.

    Unlike Elo's running update, this does not depend on the order. A tie is half a win for each.
    ValueError where no finite ratings exist, as for a model that lost every battle."""
    names = sorted({name for first, second, _ in results for name in (first, second)})
    if anchor not in names:
        raise ValueError(f"the anchor {anchor!r} is in no battle")
    won = torch.zeros(len(names), len(names), dtype=torch.float64)
    for first, second, score in results:
        i, j = names.index(first), names.index(second)
        won[i, j] += score
        won[j, i] += 1 - score
    reach = (won + torch.eye(len(names))).double()  # who takes a point from whom, in how many steps
    for _ in names:
        reach = ((reach @ reach) > 0).double()
    if not reach.all():
        raise ValueError(f"no finite ratings: not all of {names} take points from all others")
    strength, games = won.new_ones(len(names)), won + won.T
    for _ in range(10_000):  # Zermelo's iteration, which raises the likelihood each time
        strength = won.sum(1) / (games / (strength[:, None] + strength)).sum(1)
        strength = strength / strength[names.index(anchor)]
    return dict(zip(names, (level + 400 * strength.log10()).tolist(), strict=True))


def judge_reward(judge: Judge, rivals: dict[str, dict[str, str]]) -> Callable[..., list[float]]:
    """A reward in TRL's format: the mean verdict on a completion against the rivals' answers,
    {rival: {prompt: answer}}."""

    def reward(completions: list[str], prompts: list[str], **columns: Any) -> list[float]:
        return [
            sum(verdict(judge, prompt, text, told[prompt]) for told in rivals.values())
            / len(rivals)
            for text, prompt in zip(completions, prompts, strict=True)
        ]

    return reward


def make_judge(records: Sequence[dict[str, str]], *, error: float, bias: float, seed: int) -> Judge:
    """It knows the sums, and misjudges a share `error` of the pairs, the same ones each time;
    between equals it takes the first with chance 0.5 + bias."""
    right = {record["prompt"]: record["answer"] for record in records}

    def judge(prompt: str, first: str, second: str) -> float:
        better = (first == right[prompt]) - (second == right[prompt])
        if better == 0:
            return 0.5 + bias
        pair = "|".join([prompt, *sorted((first, second))])
        wrong = random.Random(f"{seed}|{pair}").random() < error
        return float((better > 0) != wrong)

    return judge


def flywheel(seed: int, out: str, *, size: int = 1000, ppo_steps: int = 20) -> dict[str, Any]:
    """One turn on three parts of the sums, `size` each: SFT, DPO and PPO, each on new battles, and
    beside them what tempts. -> {stage: policy}, and lost (on how many prompts, each time), told
    (the rivals' answers), judge."""
    import copy

    from snippets.preferences import dpo
    from snippets.preferences import loop as preferences
    from snippets.rlhf import loop, ppo, sft
    from snippets.worlds import arithmetic, lm

    rng, records = random.Random(seed), arithmetic.problems(held_out=False)
    everything = records + arithmetic.problems(held_out=True)
    drawn = rng.sample(records, 3 * size)
    parts = [drawn[i * size : (i + 1) * size] for i in range(3)]
    start, tokenizer = arithmetic.warm_start()
    accuracies = {"rival A": 0.95, "rival B": 0.9, "rival C": 0.8}

    def answer(record: dict[str, str], accuracy: float) -> str:
        wrong = int(record["answer"]) + rng.choice([1, 10])
        return record["answer"] if rng.random() < accuracy else str(wrong)

    told = {k: {r["prompt"]: answer(r, a) for r in everything} for k, a in accuracies.items()}
    judge = make_judge(everything, error=0.05, bias=0.2, seed=seed)

    def fight(policy: Any, part: Sequence[dict[str, str]]) -> list[dict[str, str]]:
        prompts = [record["prompt"] for record in part]
        mine = lm.generate(policy, tokenizer, prompts, max_new_tokens=4, temperature=0.0).texts
        rivals = {name: [answers[prompt] for prompt in prompts] for name, answers in told.items()}
        return lessons(battles(prompts, mine, rivals, judge))

    def learn(family: Any, policy: Any, data: Any, *more: Any, settings: type, **options: Any):
        policy = copy.deepcopy(policy)
        chosen = settings(seed=seed, out=out, save_every=10**6, **options)
        family.train(policy, tokenizer, data, *more, chosen)
        return policy

    made, lost = {"warm start": start}, [fight(start, parts[0])]
    answers = [told[rng.choice(list(told))][record["prompt"]] for record in parts[0]]
    every = [r | {"completion": a} for r, a in zip(parts[0], answers, strict=True)]
    for name, data in (
        ("lost battles", lost[0]),
        ("as many at random", every[: len(lost[0])]),
        ("all answers", every),
    ):
        options = {"steps": 3 * len(data) // 32, "batch": 32, "lr": 5e-5}
        made[f"SFT on {name}"] = learn(sft, start, data, settings=sft.settings_class(), **options)
    lost.append(fight(made["SFT on lost battles"], parts[1]))
    pairs = {"settings": dpo.algorithm().settings, "steps": 4 * len(lost[1]) // 32, "beta": 1.0}
    for name, data in (("new", lost[1]), ("old", fight(start, parts[1]))):
        policy = made["SFT on lost battles"]
        made[f"DPO on {name} battles"] = learn(preferences, policy, data, dpo.algorithm(), **pairs)
    lost.append(fight(made["DPO on new battles"], parts[2]))
    reward, method = judge_reward(judge, told), ppo.algorithm()
    options = {"settings": method.settings, "steps": ppo_steps}
    made["PPO"] = learn(loop, made["DPO on new battles"], parts[2], reward, method, **options)
    return made | {"lost": [len(part) for part in lost], "told": told, "judge": judge}


def main() -> None:
    """The demo: held-out accuracy after each stage, for all sums and for those with a carry."""
    import tempfile

    from snippets.worlds import arithmetic

    torch.set_num_threads(1)
    sums = arithmetic.problems(held_out=True)
    carry = [r for r in sums if arithmetic.without_carry(r["prompt"]) != r["answer"]]
    _, tokenizer = arithmetic.warm_start()
    with tempfile.TemporaryDirectory() as out:
        made = flywheel(0, out)
    print(f"{'stage':26} all sums   with a carry   (lost: {made['lost']})")
    for name, policy in list(made.items())[:-3]:
        both = [arithmetic.greedy_accuracy(policy, tokenizer, part) for part in (sums, carry)]
        print(f"{name:26} {both[0]:8.3f} {both[1]:14.3f}")


if __name__ == "__main__":
    main()
