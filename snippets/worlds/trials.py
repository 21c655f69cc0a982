"""Any method of the two families on trial, from its own adapter: in the exact world and on
arithmetic, with the same budget for all.

The loops' `Algorithm` is all that is passed, so that what is measured is what a reader runs. Each
trial is a function of its arguments and its seed alone.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from snippets.preferences import loop as preferences
from snippets.rlhf import loop as rlhf
from snippets.worlds import arithmetic, exact, exact_pairs, lm


@dataclass(frozen=True)
class Trial:
    """Where a run in the exact world ended: `logits` (X, N, V), and (step, KL(pi || pi*) in nats)
    on the way. The rest are exact means over prompts."""

    logits: Tensor
    curve: list[tuple[int, float]]
    to_optimum: float  # KL(pi || pi*), nats
    from_optimum: float  # KL(pi* || pi), nats
    share: float  # of the gain in E[r] - beta * KL that the optimum has over the reference
    reward: float  # E[r]
    from_reference: float  # KL(pi || pi_ref), nats


def judge(world: exact.World, logits: Tensor, curve: list[tuple[int, float]]) -> Trial:
    """What the exact world knows about a policy."""
    logps, ref = exact.response_logps(world, logits), world.ref_logps
    best = exact.optimal_policy(ref, world.rewards, world.beta)
    reached, start, top = (
        exact.objective(world, table).item()
        for table in (logits, world.ref_logits, exact.logits_of(world, best))
    )
    return Trial(
        logits,
        curve,
        exact.kl(logps, best).mean().item(),
        exact.kl(best, logps).mean().item(),
        (reached - start) / (top - start),
        (logps.exp() * world.rewards).sum(-1).mean().item(),
        exact.kl(logps, ref).mean().item(),
    )


def descend(
    world: exact.World,
    step_losses: Callable[[int, Tensor], Any],
    *,
    steps: int,
    lr: float,
    every: int,
    extra: tuple[Tensor, ...] = (),
) -> Trial:
    """Adam from the reference, the rate falling linearly to 0: step_losses(step, logits) yields the
    losses of a step's updates, one after the other."""
    logits = world.ref_logits.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits, *extra], lr=lr)
    curve = [(0, exact.distance(world, logits))]
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = lr * (1 - (step - 1) / steps)
        for loss in step_losses(step, logits):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if step % every == 0 or step == steps:
            curve.append((step, exact.distance(world, logits)))
    return judge(world, logits.detach(), curve)


def greedy_responses(world: exact.World, logits: Tensor) -> Tensor:
    """(X,): the response that takes the likeliest token each time."""
    number = torch.zeros(len(logits), dtype=torch.long)
    for t in range(world.length):
        first = (world.vocab**t - 1) // (world.vocab - 1)
        rows = torch.arange(len(logits))
        number = number * world.vocab + logits[rows, first + number].argmax(-1)
    return number


def exact_rlhf(
    algorithm: rlhf.Algorithm,
    world: exact.World,
    seed: int,
    *,
    steps: int = 2000,
    lr: float = 0.05,
    group: int = 16,
    every: int = 50,
    **changes: Any,
) -> Trial:
    """An RLHF method in the exact world, `group` responses to each prompt a step; beta is the
    world's unless `changes` to the method's settings say otherwise. A critic is a table."""
    changes = {"beta": world.beta} | changes
    settings = algorithm.settings(
        prompts=len(world.rewards), group=group, max_new_tokens=world.length, **changes
    )
    generator = torch.Generator().manual_seed(seed)
    critic = torch.zeros(world.ref_logits.shape[:2], dtype=torch.float64, requires_grad=True)

    def step_losses(step: int, logits: Tensor):
        drawn = exact.sample(world, logits.detach(), group, generator)
        mask, greedy = drawn.mask.long(), [None, None]
        if algorithm.greedy:
            best = greedy_responses(world, logits.detach())
            shift = exact.response_logps(world, logits.detach()) - world.ref_logps
            greedy = [
                table.gather(1, best.unsqueeze(1)).expand(-1, group).flatten()
                for table in (world.rewards, shift)
            ]
        rollout = rlhf.Rollout(
            lm.Completions(drawn.responses.view(-1, 1), mask, mask, drawn.old_logps, []),
            drawn.rewards.flatten(),
            drawn.ref_logps if settings.beta else None,
            critic.detach()[drawn.rows, drawn.prefixes] if algorithm.critic_loss else None,
            *greedy,
        )
        advantages, returns = algorithm.advantages(rollout, settings)
        for _ in range(settings.epochs):
            order = torch.randperm(len(mask), generator=generator)
            for rows in order.tensor_split(settings.minibatches):
                logps = drawn.logps(world, logits)[rows]
                loss = algorithm.loss(logps, rollout, rows, advantages[rows], settings)
                if algorithm.critic_loss:
                    values = critic[drawn.rows[rows], drawn.prefixes[rows]]
                    loss = loss + algorithm.critic_loss(
                        values, rollout, rows, returns[rows], settings
                    )
                yield loss

    extra = (critic,) if algorithm.critic_loss else ()
    return descend(world, step_losses, steps=steps, lr=lr, every=every, extra=extra)


def exact_preferences(
    algorithm: preferences.Algorithm,
    world: exact.World,
    seed: int,
    *,
    steps: int = 2000,
    lr: float = 0.05,
    pairs: int = 8,
    every: int = 50,
    preference: Tensor | None = None,
    online: bool = False,
    **changes: Any,
) -> Trial:
    """A preference method in the exact world, `pairs` fresh pairs of each prompt a step: 8 of them
    are as many responses as a group of 16.

    Pairs are drawn from the reference (online: from the policy) and labelled by Bradley and Terry,
    or with chance `preference`; beta is the world's unless `changes` say otherwise."""
    settings = algorithm.settings(**({"beta": world.beta} | changes))
    generator = torch.Generator().manual_seed(seed)
    # A prompt's pairs stand apart, so that the pair before is one of another prompt.
    rows = torch.arange(len(world.rewards)).repeat(pairs)

    def step_losses(step: int, logits: Tensor):
        sampler = exact.response_logps(world, logits.detach()).exp() if online else None
        chosen, rejected = exact_pairs.sample_labelled(
            world, pairs, generator, sampler=sampler, preference=preference
        )
        batch = exact_pairs.pair_logps(
            world, logits, rows, chosen.T.flatten(), rejected.T.flatten()
        )
        yield algorithm.loss(batch, settings)[0].mean()

    return descend(world, step_losses, steps=steps, lr=lr, every=every)


def train_and_time(
    train: Callable[..., lm.Trainer], policy: Any, tokenizer: Any, *arguments: Any
) -> dict[str, Any]:
    """Train, and evaluate greedy held-out exact match before and on the way; -> `step`, `accuracy`
    (lists of the same length), `history`, and `seconds` of CPU without the evaluations."""
    run: dict[str, Any] = {"step": [], "accuracy": []}
    settings, held_out, evaluating = arguments[-1], arithmetic.problems(held_out=True), 0.0

    def evaluate(model: Any) -> float:
        nonlocal evaluating
        start = time.process_time()
        run["step"].append(min(settings.eval_every * len(run["step"]), settings.steps))
        run["accuracy"].append(arithmetic.greedy_accuracy(model, tokenizer, held_out))
        evaluating += time.process_time() - start
        return run["accuracy"][-1]

    evaluate(policy)
    start, evaluating = time.process_time(), 0.0
    trainer = train(policy, tokenizer, *arguments, evaluate=evaluate)
    run["seconds"] = time.process_time() - start - evaluating
    return run | {"history": trainer.history, "policy": policy}


def arithmetic_rlhf(algorithm: rlhf.Algorithm, seed: int, out: str, **changes: Any) -> dict:
    """An RLHF method from the warm start; see `train_and_time`."""
    policy, tokenizer = arithmetic.warm_start()
    settings = algorithm.settings(seed=seed, out=out, **changes)
    records = arithmetic.problems(held_out=False)
    return train_and_time(
        rlhf.train, policy, tokenizer, records, arithmetic.exact_match, algorithm, settings
    )


def arithmetic_preferences(
    algorithm: preferences.Algorithm, seed: int, out: str, **changes: Any
) -> dict:
    """A preference method from the warm start and pairs of its own, the same for every method and
    one seed; with `refresh`, from fresh pairs. See `train_and_time`."""
    policy, tokenizer = arithmetic.warm_start()
    settings = algorithm.settings(seed=seed, out=out, **changes)
    pairs = preferences.arithmetic_pairs(policy, tokenizer, settings)
    return train_and_time(preferences.train, policy, tokenizer, pairs, algorithm, settings)
