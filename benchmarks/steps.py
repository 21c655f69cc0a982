"""One optimizer step of a method beside one of TRL's trainer, or of another method: same model, same data, same tokens,
turn by turn on one thread.

Times are CPU seconds of the thread that runs the step, and what counts is the ratio of the medians: the machine's
speed cancels. Both sides step in turn, so that whatever else the machine does falls on both alike. Peak memory is taken
in a process of its own for each side.

    python -m benchmarks.steps GRPO
    python -m benchmarks.steps RLOO --beside GRPO
"""

import argparse
import copy
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from benchmarks import memory
from benchmarks.methods import Method, method
from snippets.preferences import loop as preference_loop
from snippets.rlhf import loop as rlhf_loop
from snippets.rlhf import reward_model, sft
from snippets.worlds import arithmetic

Side = Callable[[int, int, int, Callable[[], None], str], None]  # steps, prompts, group, done, folder
ROOT = Path(__file__).resolve().parents[1]
QUIET = {
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "learning_rate": 1e-5,
    "lr_scheduler_type": "constant",
    "dataloader_pin_memory": False,
}


class Turns:
    """Two threads that step in turn. Each calls done(name) at the end of its step; the CPU time of its turn is kept."""

    def __init__(self, names: tuple[str, ...]):
        self.names, self.times = names, {name: [] for name in names}
        self.locks = {name: threading.Semaphore(int(name == names[0])) for name in names}
        self.started: dict[str, float] = {}

    def begin(self, name: str) -> None:
        self.locks[name].acquire()
        self.started[name] = time.thread_time()

    def done(self, name: str) -> None:
        self.times[name].append(time.thread_time() - self.started[name])
        self.locks[self.names[(self.names.index(name) + 1) % len(self.names)]].release()
        self.begin(name)

    def leave(self, name: str) -> None:
        """At the end: whoever still waits for a turn gets it."""
        for other in self.names:
            if other != name:
                for _ in range(10_000):
                    self.locks[other].release()


def ours(method: Method, steps: int, prompts: int, group: int, done: Callable[[], None], folder: str) -> None:
    """`steps` of a method through its shared loop: `prompts` pairs a step, or so many prompts times `group`."""
    policy, tokenizer = arithmetic.warm_start()
    algorithm, evaluate = method.algorithm(), lambda policy: done() or 0.0
    common = {"steps": steps, "lr": 1e-5, "eval_every": 1, "save_every": steps + 1, "out": folder}
    if method.family == "preferences":
        settings = algorithm.settings(**(common | {"batch": prompts} | method.changes))
        data = preference_loop.arithmetic_pairs(policy, tokenizer, settings) if settings.refresh else some_pairs(1000)
        preference_loop.train(policy, tokenizer, data, algorithm, settings, evaluate=evaluate)
        return
    sizes = {"prompts": prompts, "group": group}
    if method.changes.get("group") == 1:  # so many of its own, in proportion: ReMax has greedy responses besides
        sizes = {"prompts": method.changes["prompts"] * prompts // 16, "group": 1}
    settings = algorithm.settings(**(common | method.changes | sizes))
    records = arithmetic.problems(held_out=False)
    rlhf_loop.train(policy, tokenizer, records, arithmetic.exact_match, algorithm, settings, evaluate=evaluate)


def on_step_end(done: Callable[[], None]):
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            done()

    return Callback()


def grpo_trl(steps: int, prompts: int, group: int, done: Callable[[], None], folder: str, **options: Any) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    policy, tokenizer = arithmetic.warm_start()
    policy.config._name_or_path = folder
    GRPOTrainer(
        model=policy,
        args=GRPOConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=prompts * group,
            num_generations=group,
            max_completion_length=arithmetic.MAX_NEW_TOKENS,
            **QUIET | {"beta": 0.0} | options,
        ),
        processing_class=tokenizer,
        reward_funcs=arithmetic.exact_match,
        train_dataset=Dataset.from_list(arithmetic.problems(held_out=False)),
        callbacks=[on_step_end(done)],
    ).train()


def rloo_trl(steps: int, prompts: int, group: int, done: Callable[[], None], folder: str) -> None:
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    policy, tokenizer = arithmetic.warm_start()
    policy.save_pretrained(folder)  # it loads its reference from where the policy came from
    policy.config._name_or_path = folder
    RLOOTrainer(
        model=policy,
        args=RLOOConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=prompts * group,
            num_generations=group,
            max_completion_length=arithmetic.MAX_NEW_TOKENS,
            beta=0.01,
            **QUIET,
        ),
        processing_class=tokenizer,
        reward_funcs=arithmetic.exact_match,
        train_dataset=Dataset.from_list(arithmetic.problems(held_out=False)),
        callbacks=[on_step_end(done)],
    ).train()


def some_pairs(count: int) -> list[dict[str, str]]:
    """The right answer against the careless one, wherever they differ."""
    pairs = [
        {"prompt": r["prompt"], "chosen": r["answer"], "rejected": arithmetic.without_carry(r["prompt"])}
        for r in arithmetic.problems(held_out=False)
    ]
    return [pair for pair in pairs if pair["chosen"] != pair["rejected"]][:count]


def pairs_trl(kind: str, steps: int, prompts: int, _: int, done: Callable[[], None], folder: str, **options) -> None:
    """TRL's DPO, CPO, ORPO and reward trainers, on the pairs that our side has."""
    import trl
    from datasets import Dataset
    from trl.experimental import cpo, orpo

    homes = {"DPO": trl, "Reward": trl, "CPO": cpo, "ORPO": orpo}
    config, trainer = (getattr(homes[kind], f"{kind}{part}") for part in ("Config", "Trainer"))
    policy, tokenizer = arithmetic.warm_start()
    if kind == "DPO":
        options["precompute_ref_log_probs"] = True  # as here: neither side runs the reference in a step
    if kind == "Reward":
        policy = AutoModelForSequenceClassification.from_config(sized(policy.config))
    trainer(
        model=policy,
        args=config(output_dir=folder, max_steps=steps, per_device_train_batch_size=prompts, **QUIET | options),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(some_pairs(1000)),
        callbacks=[on_step_end(done)],
    ).train()


def sized(config: Any) -> Any:
    """The same model with a head of one number."""
    config = copy.deepcopy(config)
    config.num_labels = 1
    return config


def kto_trl(steps: int, prompts: int, group: int, done: Callable[[], None], folder: str) -> None:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    policy, tokenizer = arithmetic.warm_start()
    records = []
    for pair in some_pairs(1000):
        for role in ("chosen", "rejected"):
            records.append({"prompt": pair["prompt"], "completion": pair[role], "label": role == "chosen"})
    KTOTrainer(
        model=policy,
        ref_model=copy.deepcopy(policy),
        args=KTOConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=2 * prompts,  # a pair is two examples
            **QUIET,
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(records),
        callbacks=[on_step_end(done)],
    ).train()


def sft_trl(steps: int, prompts: int, group: int, done: Callable[[], None], folder: str) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    policy, tokenizer = arithmetic.warm_start()
    SFTTrainer(
        model=policy,
        args=SFTConfig(output_dir=folder, max_steps=steps, per_device_train_batch_size=prompts, **QUIET),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(demonstrations()),
        callbacks=[on_step_end(done)],
    ).train()


def demonstrations() -> list[dict[str, str]]:
    return [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in some_pairs(1000)]


def sft_ours(steps: int, prompts: int, group: int, done: Callable[[], None], folder: str) -> None:
    policy, tokenizer = arithmetic.warm_start()
    evaluate = lambda policy: done() or 0.0  # noqa: E731
    common = {"steps": steps, "lr": 1e-5, "eval_every": 1, "save_every": steps + 1, "out": folder}
    settings = sft.settings_class()(batch=prompts, **common)
    sft.train(policy, tokenizer, demonstrations(), settings, evaluate=evaluate)


def reward_ours(steps: int, prompts: int, group: int, done: Callable[[], None], folder: str) -> None:
    policy, tokenizer = arithmetic.warm_start()
    evaluate = lambda model: done() or {}  # noqa: E731
    common = {"steps": steps, "lr": 1e-5, "eval_every": 1, "save_every": steps + 1, "out": folder}
    settings = reward_model.settings_class()(batch=prompts, **common)
    model = reward_model.RewardModel(policy)
    reward_model.train_reward_model(model, tokenizer, some_pairs(1000), settings, evaluate=evaluate)


def no_ties(seed: int) -> Any:
    """A reward that is never equal for two responses, so that both sides make a pair of each prompt."""
    draw = random.Random(seed)
    return lambda completions, **_: [draw.random() for _ in completions]


def online_ours(steps: int, prompts: int, group: int, done: Callable[[], None], folder: str) -> None:
    policy, tokenizer = arithmetic.warm_start()
    evaluate = lambda policy: done() or 0.0  # noqa: E731
    algorithm, records, reward = method("Online DPO").algorithm(), arithmetic.problems(held_out=False), no_ties(0)
    common = {"steps": steps, "lr": 1e-5, "eval_every": 1, "save_every": steps + 1, "out": folder}
    settings = algorithm.settings(**common, batch=prompts, samples=2)

    def fresh(model: Any, step: int) -> list[preference_loop.Pair]:
        some = [records[(step * prompts + i) % len(records)] for i in range(prompts)]
        return preference_loop.sample_pairs(model, tokenizer, some, reward, settings, step=step)

    preference_loop.train(policy, tokenizer, fresh, algorithm, settings, evaluate=evaluate)


def online_trl(steps: int, prompts: int, group: int, done: Callable[[], None], folder: str) -> None:
    from datasets import Dataset
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    policy, tokenizer = arithmetic.warm_start()
    OnlineDPOTrainer(
        model=policy,
        ref_model=copy.deepcopy(policy),
        args=OnlineDPOConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=prompts,
            max_new_tokens=arithmetic.MAX_NEW_TOKENS,
            temperature=1.0,
            beta=1.0,
            **QUIET,
        ),
        processing_class=tokenizer,
        reward_funcs=no_ties(0),
        train_dataset=Dataset.from_list([{"prompt": r["prompt"]} for r in arithmetic.problems(held_out=False)]),
        callbacks=[on_step_end(done)],
    ).train()


# What is no method of a shared loop, or runs here in the way of TRL's.
OURS: dict[str, Side] = {"SFT": sft_ours, "Reward model": reward_ours, "Online DPO of two responses": online_ours}
TRL: dict[str, Side] = {  # what TRL has a trainer for, with the settings of the method here
    "RLOO": rloo_trl,
    "GRPO": partial(grpo_trl, loss_type="grpo"),
    "Dr. GRPO": partial(grpo_trl, loss_type="dr_grpo", scale_rewards="none"),
    "DAPO": partial(grpo_trl, loss_type="dapo", epsilon_high=0.28),
    "GSPO": partial(grpo_trl, loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4),
    "CISPO": partial(grpo_trl, loss_type="cispo", epsilon_high=5.0),
    "DPO": partial(pairs_trl, "DPO", beta=1.0),
    "Robust DPO": partial(pairs_trl, "DPO", beta=1.0, loss_type=["robust"], label_smoothing=0.1),
    "IPO": partial(pairs_trl, "DPO", loss_type=["ipo"]),
    "KTO": kto_trl,
    "ORPO": partial(pairs_trl, "ORPO"),
    "SimPO": partial(pairs_trl, "CPO", loss_type="simpo", cpo_alpha=0.0),
    "CPO": partial(pairs_trl, "CPO"),
    "Online DPO of two responses": online_trl,
    "SFT": sft_trl,
    "Reward model": partial(pairs_trl, "Reward"),
}


def side_of(name: str) -> Side:
    """The side of this name: a method's, or TRL's of that method as "TRL GRPO"."""
    if name.startswith("TRL "):
        return TRL[name.removeprefix("TRL ")]
    return OURS.get(name) or partial(ours, method(name))


def compare(first: str, second: str, *, steps: int, prompts: int, group: int = 8, skip: int = 3) -> dict[str, list]:
    """CPU seconds a step for two sides that step in turn, the first `skip` steps left out."""
    torch.set_num_threads(1)
    turns = Turns((first, second))
    errors: list[BaseException] = []

    def run(name: str) -> None:
        try:
            with tempfile.TemporaryDirectory() as folder:
                turns.begin(name)
                side_of(name)(steps, prompts, group, lambda: turns.done(name), folder)
        except BaseException as error:
            errors.append(error)
        finally:
            turns.leave(name)

    threads = [threading.Thread(target=run, args=(name,)) for name in turns.names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return {name: times[skip:] for name, times in turns.times.items()}


def peak_memory(name: str, *, steps: int, prompts: int, group: int = 8) -> float:
    """MB that the steps take at their peak, over what the process held when the first of them had ended."""
    sizes = ["--steps", str(steps), "--prompts", str(prompts), "--group", str(group)]
    return memory.measured_alone("benchmarks.steps", name, "--peak", *sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description="one step of a method beside one of another, or of TRL's")
    parser.add_argument("method", help="GRPO, say, or TRL GRPO")
    parser.add_argument("--beside", help="what it is compared with; TRL's own, if nothing else is said")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=16, help="prompts a step, or pairs")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--peak", action="store_true", help="only print the peak memory in MB")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {"prompts": args.prompts, "group": args.group}
    if args.peak:
        peaks: list[float] = []

        def done() -> None:
            peaks.append(memory.status("VmHWM"))
            memory.restart()
            peaks.append(memory.status("VmRSS"))

        with tempfile.TemporaryDirectory() as folder:
            side_of(args.method)(args.steps, args.prompts, args.group, done, folder)
        print(json.dumps(max(peaks[2::2]) - min(peaks[1::2])))
        return
    times = compare(args.method, args.beside or f"TRL {args.method}", steps=args.steps, **sizes)
    for name, values in times.items():
        print(f"{name:>24}: median {statistics.median(values):.4f} CPU s a step over {len(values)} steps")
    first, second = (statistics.median(values) for values in times.values())
    print(f"the second takes {second / first:.2f} times as long as the first")


if __name__ == "__main__":
    main()
