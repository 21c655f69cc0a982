"""The trials: what they hand to a method is what the loops would, and what they say of a policy is exact."""

import pytest
import torch
from torch.testing import assert_close

from snippets.preferences import dpo
from snippets.preferences import loop as preferences
from snippets.rlhf import loop as rlhf
from snippets.rlhf import ppo
from snippets.worlds import exact, trials


def policy_gradient(seen, **more):
    """REINFORCE with the mean of the group as baseline and the KL in the reward, and a record of what it was given."""

    def advantages(rollout, settings):
        seen.append(rollout)
        rewards = rollout.scores - settings.beta * rollout.token_kl().sum(-1)
        groups = rewards.view(-1, settings.group)
        return (groups - groups.mean(-1, keepdim=True)).flatten(), None

    def loss(logps, rollout, rows, advantages, settings):
        return -(advantages * logps.sum(-1)).mean()

    return rlhf.Algorithm(rlhf.Settings, advantages, loss, **more)


def test_the_verdict_on_known_policies():
    world = exact.make_world(0)
    best = exact.logits_of(world, exact.optimal_policy(world.ref_logps, world.rewards, world.beta))
    top, start = trials.judge(world, best, []), trials.judge(world, world.ref_logits, [])
    assert top.to_optimum == pytest.approx(0, abs=1e-9) and top.from_optimum == pytest.approx(0, abs=1e-9)
    assert top.share == pytest.approx(1) and start.share == pytest.approx(0) and start.from_reference == 0
    mean = (world.ref_logps.exp() * world.rewards).sum(-1).mean().item()
    assert start.reward == pytest.approx(mean)
    gap = exact.objective(world, best).item() - exact.objective(world, world.ref_logits).item()
    assert start.to_optimum * world.beta == pytest.approx(gap)  # J(pi*) - J(pi) = beta * KL(pi || pi*)


def test_a_rollout_is_dressed_as_a_language_models():
    world, seen = exact.make_world(0), []
    trials.exact_rlhf(policy_gradient(seen, greedy=True), world, 0, steps=1, group=6)
    (rollout,) = seen
    which = rollout.completions.ids.flatten()
    rows = torch.arange(4).repeat_interleave(6)
    assert_close(rollout.scores, world.rewards[rows, which])
    assert_close(rollout.completions.logps, exact.token_logps(world, world.ref_logits)[rows, which])
    assert_close(rollout.token_kl(), torch.zeros(24, 3, dtype=torch.float64))  # it starts at the reference
    best = exact.token_logps(world, world.ref_logits).detach()
    for x, number in enumerate(trials.greedy_responses(world, world.ref_logits).tolist()):
        prefix, y = 0, 0
        for t in range(3):  # walk: the likeliest token of each prefix
            token = world.ref_logits[x, prefix].argmax().item()
            y = y * 5 + token
            prefix = sum(5**k for k in range(t + 1)) + y
        assert number == y
        assert (rollout.greedy_scores[6 * x : 6 * x + 6] == world.rewards[x, y]).all()
        assert best[x, y, 0] == best[x, :, 0].max()


def test_the_budget_counts_and_the_seed_decides():
    world, seen = exact.make_world(0), []
    algorithm = policy_gradient(seen)
    runs = [trials.exact_rlhf(algorithm, world, seed, steps=20, every=10) for seed in (1, 1, 2)]
    assert sum(len(rollout.scores) for rollout in seen) == 3 * 20 * 64
    assert [step for step, _ in runs[0].curve] == [0, 10, 20]
    assert torch.equal(runs[0].logits, runs[1].logits) and not torch.equal(runs[0].logits, runs[2].logits)


def test_epochs_and_minibatches_reuse_a_rollout():
    world, seen = exact.make_world(0), []
    calls = []
    base = policy_gradient(seen)

    def loss(logps, rollout, rows, advantages, settings):
        calls.append(rows)
        return base.loss(logps, rollout, rows, advantages, settings)

    algorithm = rlhf.Algorithm(rlhf.Settings, base.advantages, loss)
    trials.exact_rlhf(algorithm, world, 0, steps=2, group=4, epochs=3, minibatches=2)
    assert len(seen) == 2 and len(calls) == 12
    assert sorted(torch.cat(calls[:2]).tolist()) == list(range(16))


def test_a_critic_is_a_table_that_learns():
    world = exact.make_world(0)
    trial = trials.exact_rlhf(ppo.algorithm(), world, 0, steps=300)
    assert trial.to_optimum < 0.3 * trial.curve[0][1]


def test_pairs_come_from_whom_they_should():
    """Offline from the reference, online from the policy; labels by Bradley and Terry unless others are given."""
    world, seen = exact.make_world(0), []

    def loss(pairs, settings):
        seen.append(pairs)
        return dpo.algorithm().loss(pairs, settings)

    method = preferences.Algorithm(dpo.algorithm().settings, loss)
    trials.exact_preferences(method, world, 0, steps=3, pairs=5)
    assert all(pairs.chosen.shape == (20,) for pairs in seen)
    assert_close(seen[0].chosen, seen[0].ref_chosen)  # the first step: the policy is the reference
    always = (world.rewards.unsqueeze(2) > world.rewards.unsqueeze(1)).double().flatten()
    seen.clear()
    trial = trials.exact_preferences(method, world, 0, steps=300, pairs=5, preference=always)
    clean = trials.exact_preferences(method, world, 0, steps=300, pairs=5)
    assert trial.from_reference > clean.from_reference  # deterministic labels drive it further
    online = trials.exact_preferences(method, world, 0, steps=300, pairs=5, online=True)
    assert online.reward > clean.reward - 0.3 and not torch.equal(online.logits, clean.logits)
