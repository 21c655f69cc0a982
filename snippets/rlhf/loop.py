"""One loop for RLHF: generate, score, estimate advantages, update.

The algorithm is an argument. InstructGPT's third step (Ouyang et al. 2022, arXiv:2203.02155) with
the reward function in the reward model's place, as for verifiable rewards (Shao et al. 2024,
arXiv:2402.03300). What a method changes is one `Algorithm`: its advantages, its loss, whether it
has a critic. Under torchrun each process takes its share of a step's prompts; the result is that of
one process with all of them.
"""

import copy
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from snippets.worlds import arithmetic, lm


@dataclass
class Settings(lm.Settings):
    """What every RLHF method needs."""

    reward: str = field(
        default="snippets.worlds.arithmetic:exact_match",
        metadata={"help": "module:function, in TRL's format"},
    )
    prompts: int = field(default=16, metadata={"help": "prompts a step, over all processes"})
    group: int = field(default=8, metadata={"help": "responses a prompt"})
    epochs: int = field(default=1, metadata={"help": "passes over a step's responses"})
    minibatches: int = field(default=1, metadata={"help": "optimizer steps a pass"})
    beta: float = field(
        default=0.0, metadata={"help": "KL coefficient; at 0 no reference model is held"}
    )


@dataclass
class Rollout:
    """What one step learns from.

    B responses of at most T tokens; columns before the response hold its prompt.
    """

    completions: (
        lm.Completions
    )  # ids (B, P + T), mask (B, T), logps (B, T) under the policy that sampled
    scores: Tensor  # (B,), the reward function's
    ref_logps: Tensor | None = None  # (B, T), under the reference, if there is one
    values: Tensor | None = None  # (B, T), the critic's at sampling, if there is one
    greedy_scores: Tensor | None = None  # (B,), of the greedy response to the same prompt
    greedy_kl: Tensor | None = None  # (B,), that response's log pi - log pi_ref, or zeros

    def token_kl(self) -> Tensor:
        """(B, T): log pi - log pi_ref of each sampled token, at sampling; 0 under a 0 of the mask,
        and everywhere if there is no reference."""
        if self.ref_logps is None:
            return torch.zeros_like(self.completions.logps)
        return torch.where(
            self.completions.mask.bool(), self.completions.logps - self.ref_logps, 0.0
        )


@dataclass(frozen=True)
class Algorithm:
    """All that a method changes in the loop. Each method's file makes its own: `algorithm()`."""

    settings: type[Settings]
    advantages: Callable[
        [Rollout, Any], tuple[Tensor, Tensor | None]
    ]  # -> advantages (B,) or (B, T), and the critic's targets (B, T), if it has one
    loss: Callable[
        [Tensor, Rollout, Tensor, Tensor, Any], Tensor
    ]  # logps, rollout, which rows, advantages, settings -> scalar
    over_tokens: Callable[[Any], bool] = lambda settings: (
        False
    )  # is the loss a mean over tokens? Else it is a mean over rows.
    critic_loss: Callable[[Tensor, Rollout, Tensor, Tensor, Any], Tensor] | None = (
        None  # values, rollout, which rows, targets, settings -> scalar
    )
    greedy: bool = False  # is the greedy response to each prompt scored too?


class Critic(nn.Module):
    """V(s_t) for the state before each token of a response: a copy of the policy's trunk and a
    linear head that starts at 0."""

    def __init__(self, policy: PreTrainedModel):
        super().__init__()
        self.trunk = copy.deepcopy(policy)
        self.head = nn.Linear(
            policy.config.hidden_size, 1, dtype=torch.float32, device=policy.device
        )
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.trunk.get_output_embeddings().requires_grad_(False)
        self.trunk.get_input_embeddings().requires_grad_(True)

    def forward(self, ids: Tensor, attention: Tensor, length: int) -> Tensor:
        return self.head(lm.hidden_states(self.trunk, ids, attention, length).float()).squeeze(
            -1
        )  # (B, length)


def greedy_completions(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: list[dict[str, Any]],
    reward: lm.Reward,
    settings: Settings,
) -> tuple[lm.Completions, Tensor]:
    """The greedy response to each record's prompt, and its reward (N,)."""
    prompts = [record["prompt"] for record in records]
    completions = lm.generate(
        policy, tokenizer, prompts, max_new_tokens=settings.max_new_tokens, temperature=0.0
    )
    return completions, lm.score(reward, prompts, completions.texts, records)


@torch.no_grad()
def rollout(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: list[dict[str, Any]],
    reward: lm.Reward,
    settings: Settings,
    *,
    step: int,
    reference: PreTrainedModel | None = None,
    critic: Critic | None = None,
    greedy: bool = False,
) -> Rollout:
    """Sample `group` responses to each of this process's prompts of this step, and score them; with
    `greedy`, one more to each prompt, which is only scored."""
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    chosen = lm.batch_indices(len(records), settings.prompts, step, settings.seed)
    # One random number a token for the whole step, drawn alike in every process; each takes the
    # rows of its own prompts.
    generator = lm.seeded(settings.seed, step)
    uniforms = torch.rand(
        settings.prompts * settings.group, settings.max_new_tokens, generator=generator
    )
    share = settings.prompts // processes
    mine = slice(rank * share, (rank + 1) * share)
    records = [records[i] for i in chosen[mine]]
    rows = slice(mine.start * settings.group, mine.stop * settings.group)
    completions = lm.generate(
        policy,
        tokenizer,
        [record["prompt"] for record in records],
        samples=settings.group,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        uniforms=uniforms[rows],
    )
    # A group's responses stand together.
    batch_records = [record for record in records for _ in range(settings.group)]
    prompts = [record["prompt"] for record in batch_records]
    length = completions.mask.shape[1]
    device = completions.ids.device

    def score_under(model: PreTrainedModel, texts: lm.Completions) -> Tensor:
        return lm.token_logps(
            model,
            texts.ids,
            texts.attention,
            texts.mask.shape[1],
            temperature=settings.temperature,
            chunk=settings.logit_chunk,
        )

    scores = lm.score(reward, prompts, completions.texts, batch_records).to(device)
    values = greedy_scores = greedy_kl = None
    ref_logps = None if reference is None else score_under(reference, completions)
    if critic is not None:
        values = critic(completions.ids, completions.attention, length)
    if greedy:
        best, greedy_scores = greedy_completions(policy, tokenizer, records, reward, settings)
        greedy_kl = torch.zeros(len(records), device=device)
        if reference is not None:
            best.logps = score_under(policy, best)  # as sampled ones have it, at the temperature
            shift = Rollout(best, greedy_scores, score_under(reference, best)).token_kl()  # (P, T)
            greedy_kl = shift.sum(-1)
        greedy_scores, greedy_kl = (
            x.to(device).repeat_interleave(settings.group) for x in (greedy_scores, greedy_kl)
        )
    return Rollout(completions, scores, ref_logps, values, greedy_scores, greedy_kl)


def train(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: list[dict[str, Any]],
    reward: lm.Reward,
    algorithm: Algorithm,
    settings: Any,
    *,
    evaluate: Callable[[PreTrainedModel], float] | None = None,
    progress: bool = False,
) -> lm.Trainer:
    """Train `policy` in place; -> the trainer, whose history has each step's mean reward, response
    length and, where due, evaluation."""
    lm.check_settings(settings, "prompts", "group", "epochs", "minibatches")
    processes = dist.get_world_size() if dist.is_initialized() else 1
    if settings.prompts % processes:
        raise ValueError(
            f"{settings.prompts} prompts a step cannot be shared by {processes} processes"
        )
    reference = copy.deepcopy(policy).requires_grad_(False) if settings.beta else None
    critic = Critic(policy) if algorithm.critic_loss else None
    trainer = lm.Trainer(settings, {"policy": policy} | ({"critic": critic} if critic else {}))
    steps = range(trainer.step, settings.steps)
    for step in tqdm(steps, initial=trainer.step, total=settings.steps, disable=not progress):
        # 1. generate and score
        batch = rollout(
            policy,
            tokenizer,
            records,
            reward,
            settings,
            step=step,
            reference=reference,
            critic=critic,
            greedy=algorithm.greedy,
        )
        ids, attention, mask = (
            batch.completions.ids,
            batch.completions.attention,
            batch.completions.mask,
        )
        # 2. estimate advantages
        advantages, returns = algorithm.advantages(batch, settings)
        # 3. update
        generator = lm.seeded(settings.seed, step, stream=1)
        for _ in range(settings.epochs):
            order = (
                torch.randperm(len(ids), generator=generator)
                if settings.minibatches > 1
                else torch.arange(len(ids))
            )
            for rows in order.to(ids.device).tensor_split(settings.minibatches):
                logps = lm.token_logps(
                    policy,
                    ids[rows],
                    attention[rows],
                    mask.shape[1],
                    temperature=settings.temperature,
                    chunk=settings.logit_chunk,
                )
                loss = algorithm.loss(logps, batch, rows, advantages[rows], settings)
                if critic is not None:
                    values = critic(ids[rows], attention[rows], mask.shape[1])
                    loss = loss + algorithm.critic_loss(
                        values, batch, rows, returns[rows], settings
                    )
                count = (
                    mask[rows].sum().double()
                    if algorithm.over_tokens(settings)
                    else torch.tensor(float(len(rows)))
                )
                total = count.clone()
                if processes > 1:
                    dist.all_reduce(total)
                trainer.update(loss, share=(count / total).item())
        record = {
            "reward": batch.scores.mean().item(),
            "length": mask.sum(-1).float().mean().item(),
        }
        if evaluate is not None and (
            step + 1 == settings.steps or (step + 1) % settings.eval_every == 0
        ):
            record["greedy"] = evaluate(policy)
        trainer.finish_step(record)
    return trainer


def greedy_reward(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: list[dict[str, Any]],
    reward: lm.Reward,
    settings: Settings,
) -> float:
    """The mean reward of the greedy responses to these records."""
    total = 0.0
    for start in range(0, len(records), 250):
        part = records[start : start + 250]
        total += greedy_completions(policy, tokenizer, part, reward, settings)[1].sum().item()
    return total / len(records)


def demo(algorithm: Algorithm, settings: Any) -> None:
    """Load, train, and report: a progress bar, a table, a curve, and the trained model in
    --out."""
    lm.check_settings(settings)
    torch.set_num_threads(settings.threads)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if settings.device.startswith("cuda") else "gloo")
    device = lm.pick_device(settings.device)
    module, _, function = settings.reward.partition(":")
    try:
        reward = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--reward {settings.reward!r} cannot be loaded: {error}") from None
    columns = {"prompt": str} | ({"answer": str} if reward is arithmetic.exact_match else {})
    if settings.model is None:
        policy, tokenizer = arithmetic.warm_start()
        policy.to(device)
    else:
        policy, tokenizer = lm.load_model(settings.model, device)
    records = (
        lm.read_jsonl(settings.data, columns)
        if settings.data
        else arithmetic.problems(held_out=False)
    )
    if settings.eval_data:
        held_out = lm.read_jsonl(settings.eval_data, columns)
    else:
        held_out = records if settings.data else arithmetic.problems(held_out=True)
    evaluate = partial(
        greedy_reward,
        tokenizer=tokenizer,
        records=held_out[: settings.eval_size],
        reward=reward,
        settings=settings,
    )
    main = not dist.is_initialized() or dist.get_rank() == 0
    if main:
        kind = "training" if held_out is records else "held-out"
        print(f"greedy reward on {kind} prompts before: {evaluate(policy):.4f}")
    trainer = train(
        policy, tokenizer, records, reward, algorithm, settings, evaluate=evaluate, progress=main
    )
    lm.report(trainer, ["reward", "length", "greedy"], "greedy", tokenizer, policy)
    if dist.is_initialized():
        dist.destroy_process_group()


def run_demo(algorithm: Algorithm) -> None:
    """The command line of a method."""
    lm.run(partial(demo, algorithm), algorithm.settings)
