"""Pairs in the exact world against explicit loops."""

import math

import pytest
import torch
from torch.testing import assert_close

from snippets.worlds import exact
from snippets.worlds import exact_pairs as original
from tests.mutation import caught_by, load_mutant

PATH = "snippets/worlds/exact_pairs.py"


def small():
    world = exact.make_world(3, prompts=2, vocab=3, length=2, beta=0.7)
    logits = world.ref_logits + torch.randn(world.ref_logits.shape, generator=torch.Generator().manual_seed(0))
    return world, logits


def check_every_ordered_pair_once(exact_pairs):
    world, logits = small()
    first, second = exact_pairs.all_pairs(torch.arange(18).view(2, 9))
    pairs = list(zip(first.tolist(), second.tolist(), strict=True))
    assert pairs == [(9 * x + i, 9 * x + j) for x in range(2) for i in range(9) for j in range(9)]
    p = exact_pairs.bradley_terry(world).view(2, 9, 9)
    for x in range(2):
        for i in range(9):
            for j in range(9):
                gap = (world.rewards[x, i] - world.rewards[x, j]).item()
                assert p[x, i, j].item() == pytest.approx(1 / (1 + math.exp(-gap)))


def walk_kl(world, logits, x, y):
    """KL(ref(.|s) || pi(.|s)) summed over the prefixes of one response, token by token."""
    total = 0.0
    for row in world.prefixes[y].tolist():
        p, q = world.ref_logits[x, row].softmax(-1), logits[x, row].softmax(-1)
        total += sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    return total


def check_fields_against_loops(exact_pairs):
    world, logits = small()
    logps = exact.response_logps(world, logits)
    rows, chosen, rejected = torch.tensor([0, 1, 0, 1]), torch.tensor([3, 8, 1, 0]), torch.tensor([2, 2, 7, 5])
    pairs = exact_pairs.pair_logps(world, logits, rows, chosen, rejected)
    for n in range(4):
        x, w, lost = rows[n].item(), chosen[n].item(), rejected[n].item()
        assert pairs.chosen[n] == logps[x, w] and pairs.rejected[n] == logps[x, lost]
        assert pairs.ref_chosen[n] == world.ref_logps[x, w] and pairs.ref_rejected[n] == world.ref_logps[x, lost]
        assert pairs.chosen_kl[n].item() == pytest.approx(walk_kl(world, logits, x, w))
        assert pairs.rejected_kl[n].item() == pytest.approx(walk_kl(world, logits, x, lost))
        assert pairs.mismatched[n] == logps[x, chosen[n - 1]]
        assert pairs.mismatched[4 + n] == logps[x, rejected[n - 1]]
        assert pairs.ref_mismatched[4 + n] == world.ref_logps[x, rejected[n - 1]]
    assert pairs.chosen_lengths.tolist() == [2] * 4


def check_the_expected_loss_is_the_sum_over_draws(exact_pairs):
    world, logits = small()
    sampler = world.ref_logps.exp()
    logps = exact.response_logps(world, logits)
    loss = lambda pairs: (pairs.chosen - 2 * pairs.rejected) * pairs.chosen_kl  # noqa: E731
    expected = 0.0
    for x in range(2):
        for i in range(9):
            for j in range(9):
                p = torch.sigmoid(world.rewards[x, i] - world.rewards[x, j]).item()
                drawn = (sampler[x, i] * sampler[x, j]).item()
                for chance, w, lost in ((p, i, j), (1 - p, j, i)):
                    value = (logps[x, w] - 2 * logps[x, lost]).item() * walk_kl(world, logits, x, w)
                    expected += drawn * chance * value / len(world.rewards)  # a mean over prompts
    got = exact_pairs.population_loss(world, logits, loss, sampler).item()
    assert got == pytest.approx(expected, rel=1e-9)


def check_the_minimum_is_found(exact_pairs):
    world, logits = small()
    target = logits.softmax(-1)
    found = exact_pairs.minimise(world, lambda x: -(target * x.log_softmax(-1)).sum())
    assert_close(found.softmax(-1), target, atol=1e-6, rtol=0)


def check_sampled_labels_have_their_chances(exact_pairs):
    world, _ = small()
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = exact_pairs.sample_labelled(world, 40_000, generator)
    ref = world.ref_logps.exp()
    p = torch.sigmoid(world.rewards.unsqueeze(2) - world.rewards.unsqueeze(1))
    expected = 2 * ref * (p * ref.unsqueeze(1)).sum(-1)  # the chance that a chosen response is y
    for x in range(2):
        share = torch.bincount(chosen[x], minlength=9) / 40_000
        assert (share - expected[x]).abs().max() < 0.012
    never = torch.zeros(2 * 81)  # the first one never wins: the second is always chosen
    even = torch.full_like(ref, 1 / 9)
    chosen, rejected = exact_pairs.sample_labelled(world, 5, generator, sampler=even, preference=never)
    again, _ = exact_pairs.sample_labelled(world, 5, torch.Generator().manual_seed(1), sampler=even, preference=never)
    first = torch.multinomial(even, 10, replacement=True, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again, first[:, 5:])
    better = (world.rewards.unsqueeze(2) > world.rewards.unsqueeze(1)).double().flatten()
    chosen, rejected = exact_pairs.sample_labelled(world, 500, generator, sampler=even, preference=better)
    assert (world.rewards.gather(1, chosen) >= world.rewards.gather(1, rejected)).all()


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_pairs(check):
    check(original)


MISTAKES = {
    "first and second swapped": (
        "return first.flatten(), second.flatten()",
        "return second.flatten(), first.flatten()",
    ),
    "the other winner": ("torch.sigmoid(first - second)", "torch.sigmoid(second - first)"),
    "the other KL": ("(ref_logps.exp() * (ref_logps - logps))", "(logps.exp() * (logps - ref_logps))"),
    "own response as the mismatch": ("[chosen.roll(1), rejected.roll(1)]", "[chosen, rejected]"),
    "each pair once": ("2 * first * second", "first * second"),
    "labels turned": ("return torch.where(wins, first, second)", "return torch.where(~wins, first, second)"),
    "preference of the other order": ("first * Y + second", "second * Y + first"),
    "sum over prompts": (" / len(world.rewards)", ""),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    assert caught_by(load_mutant(PATH, *MISTAKES[mistake]), CHECKS)
