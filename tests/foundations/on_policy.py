"""What the tests of the on-policy methods share: a rollout with ends of both kinds, and solving CartPole."""

import statistics
import time
import types
from dataclasses import replace

import pytest
import torch

from snippets.foundations import loop
from snippets.worlds.classic import CARTPOLE, Envs


def rollout_of(task, seed=0, horizon=40, envs=8):
    torch.manual_seed(seed)
    agent = loop.Agent(task, 16)
    agent.policy[-1].weight.data *= 50.0  # no longer close to uniform
    generator = torch.Generator().manual_seed(seed)
    world = Envs(task, envs, seed=seed)
    world.age[:2] = task.limit - 5  # two clocks run out soon
    return agent, loop.collect(world, agent, horizon, generator), generator


def batch_from(rollout, advantages, returns):
    """All steps of a rollout without mask, in one row."""
    rows = (rollout.obs, rollout.actions, rollout.logps, rollout.values, advantages, returns)
    return loop.Batch(*(x.flatten(0, 1) for x in rows))


def adapter_knows_truncation_from_termination(module):
    """Advantages in a loop over steps: V of the last state counts where the clock ran out, not where the pole fell."""
    algorithm = module.algorithm()
    settings = algorithm.settings(gamma=0.9, lam=0.7)
    _, rollout, _ = rollout_of(CARTPOLE)
    assert rollout.terminated.any() and rollout.truncated.any()
    advantages, returns = algorithm.advantages(rollout, settings)
    for n in range(8):
        after = 0.0
        for t in reversed(range(40)):
            value, end = rollout.values[t, n].item(), bool(rollout.terminated[t, n])
            future = 0.0 if end else rollout.next_values[t, n].item()
            delta = rollout.rewards[t, n].item() + 0.9 * future - value
            after = delta + (0.0 if end or rollout.truncated[t, n] else 0.9 * 0.7 * after)
            assert advantages[t, n].item() == pytest.approx(after, abs=1e-4)
            assert returns[t, n].item() == pytest.approx(after + value, abs=1e-4)


def reaches_475(evidence, monkeypatch, snippet, method, seeds, **options):
    """Until the sampled policy scores 475 over 100 fresh episodes of the real environment. The clock shows CPU seconds,
    so that a busy machine does not count; nothing asserts them."""
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=time.process_time))
    runs = [loop.train(CARTPOLE, method, method.settings(seed=seed, **options)) for seed in seeds]
    evidence(
        snippet,
        "CartPole-v1: runs that reach 475 over 100 fresh episodes of Gymnasium's",
        value=100 * sum(run.solved for run in runs) / len(runs),
        bar=100.0,
        better=">=",
        unit="%",
        seeds=seeds,
        spread=[run.curve[-1][2] for run in runs],
        note="The policy samples its actions. The spread is the mean return at the end of each run.",
    )
    for what, spread, unit in (
        ("CPU seconds of training until then, median", [run.seconds for run in runs], "s"),
        ("environment steps until then, median", [run.curve[-1][0] for run in runs], "steps"),
    ):
        value = statistics.median(spread)
        evidence(snippet, f"CartPole-v1: {what}", value=value, unit=unit, seeds=seeds, spread=spread)


def solves_cartpole(evidence, snippet, name, algorithm, seeds):
    """100 fresh episodes of the stochastic policy in Gymnasium's CartPole-v1; the clock counts training only."""
    task = CARTPOLE if evidence.full else replace(CARTPOLE, solved=150.0, episodes=20)  # the short form: on the way
    runs = [loop.train(task, algorithm, algorithm.settings(seed=seed)) for seed in seeds]
    assert all(run.solved for run in runs)
    means = [run.curve[-1][2] for run in runs]
    evidence(
        snippet,
        f"CartPole, {name}: mean return of 100 fresh episodes",
        value=min(means),
        bar=task.solved,
        better=">=",
        unit="steps",
        seeds=seeds,
        spread=means,
        note="The worst seed; the policy samples its actions.",
    )
    for what, unit, numbers in (
        ("seconds of training", "s", [run.seconds for run in runs]),
        ("environment steps", "steps", [run.curve[-1][0] for run in runs]),
    ):
        evidence(
            snippet,
            f"CartPole, {name}: {what} until solved",
            value=sorted(numbers)[len(seeds) // 2],
            unit=unit,
            seeds=seeds,
            spread=numbers,
            note="Median of the seeds.",
        )
