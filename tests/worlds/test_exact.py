"""The exact world against brute force: everything that other tests measure with is itself measured here."""

import itertools
import math

import pytest
import torch

from snippets.worlds import exact


@pytest.fixture(scope="module")
def world():
    return exact.make_world(3, prompts=2, vocab=3, length=3, beta=0.7)


def brute_force_logps(world, logits):
    """Walk every response token by token, with the prefix looked up by counting, not by the formula under test."""
    prefixes = {(): 0}
    for t in range(1, world.length):
        for prefix in itertools.product(range(world.vocab), repeat=t):
            prefixes[prefix] = len(prefixes)
    rows = []
    for x in range(len(logits)):
        row = []
        for response in itertools.product(range(world.vocab), repeat=world.length):
            total = 0.0
            for t, token in enumerate(response):
                table = logits[x, prefixes[response[:t]]]
                total += (table[token] - torch.log(torch.exp(table).sum())).item()
            row.append(total)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def test_log_probabilities_against_a_walk_over_every_response(world):
    logits = torch.randn_like(world.ref_logits)
    ours = exact.response_logps(world, logits)
    assert torch.allclose(ours, brute_force_logps(world, logits), atol=1e-12)
    assert torch.allclose(ours.exp().sum(-1), torch.ones(2, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(exact.token_logps(world, logits).sum(-1), ours, atol=1e-12)


def test_the_design_size():
    world = exact.make_world()
    assert world.rewards.shape == (4, 125)
    assert world.ref_logits.shape == (4, 31, 5)
    assert world.tokens.shape == (125, 3)


def test_no_policy_beats_the_optimum(world):
    """The optimum is worth beta * log Z; random policies, and small steps away from it, are worth less."""
    optimum = exact.optimal_policy(world.ref_logps, world.rewards, world.beta)
    best = exact.objective(world, exact.logits_of(world, optimum))
    log_z = torch.logsumexp(world.ref_logps + world.rewards / world.beta, -1)
    assert torch.allclose(best, world.beta * log_z.mean(), atol=1e-12)
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-3, 1e-1, 1.0):
        for _ in range(20):
            noise = torch.randn(world.ref_logits.shape, generator=generator, dtype=torch.float64)
            logits = exact.logits_of(world, optimum) + scale * noise
            # The gap is exactly beta * KL(pi || pi*): the identity that makes the distance a fair score.
            gap = best - exact.objective(world, logits)
            assert gap > 0
            assert math.isclose(gap.item(), world.beta * exact.distance(world, logits), rel_tol=1e-6)


def test_the_gradient_vanishes_at_the_optimum_only(world):
    optimum = exact.logits_of(world, exact.optimal_policy(world.ref_logps, world.rewards, world.beta))
    optimum.requires_grad_(True)
    (gradient,) = torch.autograd.grad(exact.objective(world, optimum), optimum)
    assert gradient.abs().max() < 1e-12
    start = world.ref_logits.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(exact.objective(world, start), start)
    assert gradient.abs().max() > 1e-2


def test_the_gradient_against_finite_differences(world):
    logits = torch.randn(world.ref_logits.shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda table: exact.objective(world, table), logits)


def test_any_distribution_over_responses_is_a_table_of_logits(world):
    logps = torch.randn(world.rewards.shape, dtype=torch.float64).log_softmax(-1)
    assert torch.allclose(exact.response_logps(world, exact.logits_of(world, logps)), logps, atol=1e-12)


def test_kl_is_a_sum_by_hand(world):
    p = torch.tensor([[0.5, 0.5]]).log()
    q = torch.tensor([[0.25, 0.75]]).log()
    assert math.isclose(exact.kl(p, q).item(), 0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel_tol=1e-6)
    assert exact.kl(p, p).item() == 0


def test_a_shifted_reward_changes_nothing(world):
    shifted = exact.optimal_policy(world.ref_logps, world.rewards + torch.tensor([[5.0], [-3.0]]), world.beta)
    assert torch.allclose(shifted, exact.optimal_policy(world.ref_logps, world.rewards, world.beta), atol=1e-12)


def test_samples_are_what_they_say(world):
    logits = torch.randn(world.ref_logits.shape, dtype=torch.float64)
    samples = exact.sample(world, logits, 4000, torch.Generator().manual_seed(1))
    counts = torch.stack([torch.bincount(row, minlength=27) for row in samples.responses]).double()
    probs = exact.response_logps(world, logits).exp()
    chi_square = ((counts - 4000 * probs) ** 2 / (4000 * probs)).sum(-1)
    assert (chi_square < 26 + 5 * math.sqrt(52)).all()  # 26 degrees of freedom, 5 standard deviations
    flat = samples.responses.flatten()
    by_prompt = torch.arange(2).repeat_interleave(4000)
    assert torch.equal(samples.old_logps, exact.token_logps(world, logits)[by_prompt, flat])
    assert torch.equal(samples.ref_logps, exact.token_logps(world, world.ref_logits)[by_prompt, flat])
    assert torch.equal(samples.rewards.flatten(), world.rewards[by_prompt, flat])
    assert torch.allclose(samples.logps(world, logits), samples.old_logps)


def test_the_sampled_gradient_is_unbiased(world):
    """REINFORCE's estimate, averaged over many samples, is the exact gradient: |z| stays below 5 for every entry."""
    logits = torch.randn(world.ref_logits.shape, dtype=torch.float64, requires_grad=True)
    (truth,) = torch.autograd.grad(exact.objective(world, logits), logits)
    estimates = []
    generator = torch.Generator().manual_seed(2)
    for _ in range(400):
        samples = exact.sample(world, logits, 16, generator)
        score = samples.rewards.flatten() - world.beta * (samples.old_logps - samples.ref_logps).sum(-1)
        surrogate = (score * samples.logps(world, logits).sum(-1)).mean()
        estimates.append(torch.autograd.grad(surrogate, logits)[0])
    stack = torch.stack(estimates)
    error = stack.std(0) / math.sqrt(len(stack))
    z = ((stack.mean(0) - truth) / error)[error > 0]
    assert z.abs().max() < 5
    assert z.abs().mean() > 0.3  # were the errors overestimated, nothing could fail


@pytest.mark.evidence
def test_rloo_reaches_the_optimum(evidence):
    seeds = [0, 1, 2, 3, 4] if evidence.full else [0]
    distances = []
    for seed in seeds:
        world = exact.make_world(seed)

        def rloo(logps, samples, world=world):
            kl_term = (samples.old_logps - samples.ref_logps).sum(-1).view_as(samples.rewards)
            rewards = samples.rewards - world.beta * kl_term
            baseline = (rewards.sum(-1, keepdim=True) - rewards) / (rewards.shape[-1] - 1)
            return -((rewards - baseline).flatten() * logps.sum(-1)).mean()

        _, curve = exact.optimise(world, rloo, seed=seed)
        assert curve[0][1] > 1
        distances.append(curve[-1][1])
    evidence(
        "worlds/exact",
        "RLOO, KL in the reward: KL(π‖π*), worst seed",
        value=max(distances),
        bar=0.01,
        better="<=",
        unit="nats",
        seeds=seeds,
        spread=distances,
    )


@pytest.mark.parametrize("bad", [{"prompts": 0}, {"vocab": 1}, {"length": 0}, {"beta": 0.0}])
def test_worlds_that_cannot_be(bad):
    with pytest.raises(ValueError, match="want prompts >= 1"):
        exact.make_world(**bad)
