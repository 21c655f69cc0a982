"""Preference pairs in the exact world: every expectation over pairs is a finite sum.

A loss is a function of `PairLogps`, as in the loop for language models, so a method's own adapter
is what is measured here. Labels are Bradley and Terry's unless others are given: the first of two
responses wins with chance sigmoid(r_1 - r_2).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from snippets.preferences.loop import PairLogps
from snippets.worlds.exact import World, response_logps

Loss = Callable[[PairLogps], Tensor]  # -> losses (N,), one a pair


def all_pairs(table: Tensor) -> tuple[Tensor, Tensor]:
    """(X, Y) -> two (X * Y * Y,): the first and the second response of every ordered pair."""
    X, Y = table.shape
    first, second = table.unsqueeze(2).expand(X, Y, Y), table.unsqueeze(1).expand(X, Y, Y)
    return first.flatten(), second.flatten()


def bradley_terry(world: World) -> Tensor:
    """(X * Y * Y,): the chance that the first response of each ordered pair is preferred."""
    first, second = all_pairs(world.rewards)
    return torch.sigmoid(first - second)


def samplers(world: World) -> dict[str, Tensor]:
    """Who draws the pairs, as probabilities (X, Y): the reference, or all responses evenly."""
    even = torch.full_like(world.rewards, 1 / world.rewards.shape[1])
    return {"the reference": world.ref_logps.exp(), "all responses evenly": even}


def vocab_kl(world: World, logits: Tensor) -> Tensor:
    """(X, Y): KL(ref(.|s) || pi(.|s)) summed over the prefixes s of each response."""
    ref_logps, logps = world.ref_logits.log_softmax(-1), logits.log_softmax(-1)  # (X, N, V)
    return (ref_logps.exp() * (ref_logps - logps)).sum(-1)[:, world.prefixes].sum(-1)


def pair_logps(
    world: World, logits: Tensor, rows: Tensor, chosen: Tensor, rejected: Tensor
) -> PairLogps:
    """Pairs as a loss sees them; rows, chosen, rejected (N,): prompts and responses, by number.

    All fields are there. The mismatched responses are those of the pair before.
    """
    logps, ref, kl = response_logps(world, logits), world.ref_logps, vocab_kl(world, logits)
    lengths = torch.full_like(rows, world.length)
    others = torch.cat([chosen.roll(1), rejected.roll(1)])  # (2N,)
    twice = torch.cat([rows, rows])
    return PairLogps(
        logps[rows, chosen],
        logps[rows, rejected],
        lengths,
        lengths,
        ref[rows, chosen],
        ref[rows, rejected],
        kl[rows, chosen],
        kl[rows, rejected],
        logps.detach()[twice, others],
        ref[twice, others],
    )


def every_pair(world: World, logits: Tensor) -> PairLogps:
    """All ordered pairs (X * Y * Y,); without mismatched responses, which a population has not."""
    tables = (response_logps(world, logits), world.ref_logps, vocab_kl(world, logits))
    (chosen, rejected), (ref_chosen, ref_rejected), kl = (all_pairs(table) for table in tables)
    lengths = torch.full(chosen.shape, world.length)
    return PairLogps(chosen, rejected, lengths, lengths, ref_chosen, ref_rejected, *kl)


def population_loss(
    world: World, logits: Tensor, loss: Loss, sampler: Tensor, preference: Tensor | None = None
) -> Tensor:
    """The expected loss of a pair, exact, as a mean over prompts: both responses from `sampler` (X,
    Y), the first one preferred with chance `preference` (X * Y * Y,)."""
    preference = bradley_terry(world) if preference is None else preference
    first, second = all_pairs(sampler)
    weights = 2 * first * second * preference  # each pair stands there in both orders
    return (weights * loss(every_pair(world, logits))).sum() / len(world.rewards)


def minimise(world: World, objective: Callable[[Tensor], Tensor], steps: int = 500) -> Tensor:
    """The table of logits (X, N, V) where objective(logits) is least, by L-BFGS from the
    reference."""
    logits = world.ref_logits.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=steps,
        tolerance_grad=1e-13,
        tolerance_change=0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(logits)
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach()


def sample_labelled(
    world: World,
    size: int,
    generator: torch.Generator,
    *,
    sampler: Tensor | None = None,
    preference: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`size` pairs a prompt, labelled: chosen and rejected, both (X, size).

    sampler (X, Y): the reference, if none is given. preference (X * Y * Y,) as above.
    """
    probs = world.ref_logps.exp() if sampler is None else sampler
    drawn = torch.multinomial(probs, 2 * size, replacement=True, generator=generator)
    first, second = drawn.chunk(2, 1)
    if preference is None:
        p = torch.sigmoid(world.rewards.gather(1, first) - world.rewards.gather(1, second))
    else:
        Y = probs.shape[1]
        p = preference.view(len(probs), Y * Y).gather(1, first * Y + second)
    wins = torch.rand(p.shape, generator=generator, dtype=p.dtype) < p
    return torch.where(wins, first, second), torch.where(wins, second, first)
