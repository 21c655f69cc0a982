"""GAE: against sums written out, Monte Carlo, Stable-Baselines3, the LLM half's, and enumeration."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from snippets.foundations import gae as original
from snippets.foundations import loop
from snippets.rlhf import ppo
from snippets.worlds import classic, mdps
from snippets.worlds.classic import CARTPOLE
from tests.foundations.test_policy_gradient import GAMMA, enumerate_world
from tests.mutation import caught_by, load_mutant

torch.set_num_threads(1)
PATH = "snippets/foundations/gae.py"
SEEDS = [0, 1, 2, 3, 4]
STEPS, COPIES = 12, 5


def steps(seed=0, *, ends=True, dtype=torch.float64):
    """rewards, values, next_values, terminated, truncated of a random rollout (T, N). Within an episode the next value
    is the value of the next step; at its end it is that of another state, which only a truncation lets count."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values, other = torch.randn(3, STEPS, COPIES, generator=generator, dtype=torch.float64).to(dtype)
    draw = torch.rand(STEPS, COPIES, generator=generator)
    terminated, truncated = (draw < 0.2) & ends, (draw > 0.8) & ends
    next_values = torch.cat([values[1:], other[-1:]])
    return rewards, values, torch.where(terminated | truncated, other, next_values), terminated, truncated


def stretch(terminated, truncated, t, i):
    """The steps from t to the end of copy i's episode, or of the rollout."""
    over = (terminated | truncated)[:, i].tolist()
    last = next((u for u in range(t, STEPS) if over[u]), STEPS - 1)
    return range(t, last + 1)


# Each check takes the module, so that broken copies can be put to it.


def check_td_errors_one_by_one(gae):
    rewards, values, after, terminated, _ = steps(1)
    for gamma in (0.0, 0.9, 1.0):
        found = gae.td_errors(rewards, values, after, terminated, gamma=gamma)
        for t in range(STEPS):
            for i in range(COPIES):
                target = rewards[t, i] + (0.0 if terminated[t, i] else gamma * after[t, i])
                assert_close(found[t, i], target - values[t, i])


def check_the_sum_written_out(gae):
    """Equation 16: sum over k of (gamma lam)^k delta_(t+k), over the steps of the episode that the rollout holds."""
    for seed, gamma, lam in ((2, 0.9, 0.8), (3, 1.0, 0.95), (4, 0.7, 1.0), (5, 0.95, 0.0), (6, 0.0, 0.5)):
        parts = steps(seed)
        deltas = original.td_errors(*parts[:4], gamma=gamma)
        advantages, returns = gae.gae(*parts, gamma=gamma, lam=lam)
        for t in range(STEPS):
            for i in range(COPIES):
                expected = sum((gamma * lam) ** (u - t) * deltas[u, i].item() for u in stretch(*parts[3:], t, i))
                assert advantages[t, i].item() == pytest.approx(expected, abs=1e-12)
        assert_close(returns, advantages + parts[1])


def check_lambda_one_is_monte_carlo(gae):
    """Rewards to the end, plus the critic's word on what the clock or the rollout cut off, minus V."""
    rewards, values, after, terminated, truncated = parts = steps(7)
    advantages, returns = gae.gae(*parts, gamma=0.9, lam=1.0)
    for t in range(STEPS):
        for i in range(COPIES):
            *_, last = path = stretch(terminated, truncated, t, i)
            total = sum(0.9 ** (u - t) * rewards[u, i].item() for u in path)
            total += 0.0 if terminated[last, i] else 0.9 ** (last + 1 - t) * after[last, i].item()
            assert returns[t, i].item() == pytest.approx(total, abs=1e-6)
            assert advantages[t, i].item() == pytest.approx(total - values[t, i].item(), abs=1e-6)


def check_lambda_zero_is_the_td_error(gae):
    rewards, values, after, terminated, truncated = steps(8)
    advantages, returns = gae.gae(rewards, values, after, terminated, truncated, gamma=0.9, lam=0.0)
    target = rewards + 0.9 * after * (~terminated)
    assert_close(advantages, target - values, rtol=0, atol=1e-6)
    assert_close(returns, target, rtol=0, atol=1e-6)


def check_truncation_is_not_termination(gae):
    """A step of reward 1 for ever is worth 1 / (1 - gamma). The right critic says so, and then a clock that cuts the
    episode off changes no advantage, while an end that is one takes the value of what would have come."""
    ones, never = torch.ones(6, 1, dtype=torch.float64), torch.zeros(6, 1, dtype=torch.bool)
    values, cut = 10 * ones, never.clone()
    cut[3] = True
    for lam in (0.0, 0.5, 1.0):
        running, _ = gae.gae(ones, values, values, never, never, gamma=0.9, lam=lam)
        truncated, _ = gae.gae(ones, values, values, never, cut, gamma=0.9, lam=lam)
        terminated, _ = gae.gae(ones, values, values, cut, never, gamma=0.9, lam=lam)
        assert_close(running, torch.zeros_like(ones))
        assert_close(truncated, torch.zeros_like(ones))
        assert_close(terminated[3], torch.full((1,), -9.0, dtype=torch.float64))
        assert_close(terminated[4:], torch.zeros_like(ones[4:]))
        assert_close(terminated[0], torch.full((1,), -9.0 * (0.9 * lam) ** 3, dtype=torch.float64))


def check_an_episode_knows_nothing_of_the_next(gae):
    """Whatever follows an end of either kind leaves the advantages before it as they were."""
    rewards, values, after, terminated, truncated = steps(9, ends=False)
    for ends in (terminated, truncated):
        ends[5] = True
        first = gae.gae(rewards, values, after, terminated, truncated, gamma=0.9, lam=0.9)[0][:6]
        junk = [torch.cat([x[:6], math.nan * x[6:]]) for x in (rewards, values, after)]
        second = gae.gae(*junk, terminated, truncated, gamma=0.9, lam=0.9)[0][:6]
        assert_close(first, second, rtol=0, atol=0)
        alone = gae.gae(*(x[:6] for x in (rewards, values, after, terminated, truncated)), gamma=0.9, lam=0.9)[0]
        assert_close(first, alone, rtol=0, atol=0)
        steps_of = [gae.n_step_advantages(*x, terminated, truncated, n=9)[:6] for x in ((rewards, values, after), junk)]
        assert_close(*steps_of, rtol=0, atol=0)
        ends[5] = False


def check_the_value_of_a_terminal_state_never_matters(gae):
    rewards, values, after, terminated, truncated = parts = steps(10)
    for junk in (math.nan, math.inf, 1e30):
        dirty = torch.where(terminated, junk, after)
        for function in (gae.gae, lambda *x, **y: [gae.n_step_advantages(*x, n=3, **y)]):
            for found, clean in zip(
                function(rewards, values, dirty, terminated, truncated, gamma=0.9),
                function(*parts, gamma=0.9),
                strict=True,
            ):
                assert_close(found, clean, rtol=0, atol=0)


def check_n_steps_written_out(gae):
    for seed, n in ((11, 1), (12, 2), (13, 5), (14, 12), (15, 40)):
        rewards, values, after, terminated, truncated = parts = steps(seed)
        found = gae.n_step_advantages(*parts, n=n, gamma=0.9)
        for t in range(STEPS):
            for i in range(COPIES):
                path = list(stretch(terminated, truncated, t, i))[:n]
                total = sum(0.9 ** (u - t) * rewards[u, i].item() for u in path)
                total += 0.0 if terminated[path[-1], i] else 0.9 ** len(path) * after[path[-1], i].item()
                assert found[t, i].item() == pytest.approx(total - values[t, i].item(), abs=1e-12)


def check_gae_is_the_mean_over_n(gae):
    """(1 - lam) * sum of lam^(n-1) * A^(n); all n beyond the end are the same number and share the rest."""
    parts = steps(16)
    for lam in (0.3, 0.95):
        mean = sum((1 - lam) * lam ** (n - 1) * gae.n_step_advantages(*parts, n=n, gamma=0.9) for n in range(1, STEPS))
        mean = mean + lam ** (STEPS - 1) * gae.n_step_advantages(*parts, n=STEPS, gamma=0.9)
        assert_close(mean, gae.gae(*parts, gamma=0.9, lam=lam)[0])


def check_stable_baselines3(gae):
    """Its rollout buffer knows one flag of the start of episodes; what a truncation leaves is put into the reward, as
    its `collect_rollouts` does."""
    from gymnasium import spaces
    from stable_baselines3.common.buffers import RolloutBuffer

    for seed, gamma, lam in ((17, 0.99, 0.95), (18, 0.9, 1.0), (19, 0.9, 0.0)):
        rewards, values, after, terminated, truncated = parts = steps(seed, dtype=torch.float32)
        over = terminated | truncated
        box = spaces.Box(-1, 1, (1,), np.float32)
        buffer = RolloutBuffer(STEPS, box, spaces.Discrete(2), gae_lambda=lam, gamma=gamma, n_envs=COPIES)
        paid = (rewards + gamma * after * truncated).numpy()
        start = np.ones(COPIES, dtype=bool)
        for t in range(STEPS):
            nothing = np.zeros((COPIES, 1), dtype=np.float32)
            buffer.add(nothing, np.zeros(COPIES), paid[t], start, values[t], torch.zeros(COPIES))
            start = over[t].numpy()
        buffer.compute_returns_and_advantage(after[-1], start)
        advantages, returns = gae.gae(*parts, gamma=gamma, lam=lam)
        assert_close(advantages, torch.as_tensor(buffer.advantages), rtol=1e-5, atol=1e-6)
        assert_close(returns, torch.as_tensor(buffer.returns), rtol=1e-5, atol=1e-6)


def check_it_is_the_gae_of_the_language_models(gae):
    """A response is an episode that terminates with its last token; there rows are (B, T) under a mask."""
    lengths = torch.tensor([9, 1, 5, 2, 7])
    place = torch.arange(9)
    mask = (place < lengths[:, None]).long()  # (B, T)
    rewards, values = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(20), dtype=torch.float64)
    for gamma, lam in ((1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (1.0, 0.0)):
        expected, targets = ppo.gae(rewards, values, mask, gamma=gamma, lam=lam)
        after = torch.cat([values[:, 1:], torch.full_like(values[:, :1], 7.0)], -1)
        last = place == lengths[:, None] - 1
        parts = [x.T for x in (rewards, values, after, last, torch.zeros_like(last))]
        advantages, returns = gae.gae(*parts, gamma=gamma, lam=lam)
        assert_close(advantages.T * mask, expected)
        assert_close(returns.T * mask, targets)


def check_copies_do_not_touch_each_other(gae):
    parts = steps(21)
    whole = gae.gae(*parts)
    for i in range(COPIES):
        for found, expected in zip(gae.gae(*(x[:, i : i + 1] for x in parts)), whole, strict=True):
            assert_close(found, expected[:, i : i + 1], rtol=0, atol=0)


def check_the_defaults(gae):
    rewards, values, after, terminated, truncated = parts = steps(24)
    for flags in ((terminated.long(), truncated.long()), (terminated.double(), truncated.double())):
        for function in (gae.gae, lambda *x: [gae.n_step_advantages(*x, n=3)], lambda *x: [gae.td_errors(*x[:4])]):
            for found, expected in zip(function(rewards, values, after, *flags), function(*parts), strict=True):
                assert_close(found, expected, rtol=0, atol=0)
    assert_close(gae.td_errors(*parts[:4]), gae.td_errors(*parts[:4], gamma=0.99), rtol=0, atol=0)
    assert_close(gae.n_step_advantages(*parts, n=4), gae.n_step_advantages(*parts, n=4, gamma=0.99), rtol=0, atol=0)
    for found, expected in zip(gae.gae(*steps(24)), gae.gae(*steps(24), gamma=0.99, lam=0.95), strict=True):
        assert_close(found, expected, rtol=0, atol=0)


def check_no_gradient_and_the_type_kept(gae):
    for dtype in (torch.float32, torch.float64):
        rewards, values, after, *ends = steps(22, dtype=dtype)
        values.requires_grad_()
        after.requires_grad_()
        out = [*gae.gae(rewards, values, after, *ends), gae.td_errors(rewards, values, after, ends[0])]
        out.append(gae.n_step_advantages(rewards, values, after, *ends, n=3))
        assert all(x.dtype == dtype and not x.requires_grad for x in out)


def check_bad_input_is_named(gae):
    rewards, values, after, terminated, truncated = parts = steps(23)
    cases = [
        (
            lambda: gae.gae(rewards, values[:-1], after, terminated, truncated),
            r"values \(11, 5\) against rewards \(12, 5\)",
        ),
        (lambda: gae.gae(rewards, values, after[:, :1], terminated, truncated), r"next_values \(12, 1\) against"),
        (lambda: gae.gae(rewards, values, after, terminated[0], truncated), r"terminated \(5,\) against"),
        (lambda: gae.gae(rewards, values, after, terminated, truncated[:3]), r"truncated \(3, 5\) against"),
        (lambda: gae.gae(*(x[0] for x in parts)), r"want \(T, N\) for all"),
        (lambda: gae.gae(*parts, lam=1.01), r"lam must lie in \[0, 1\], got 1.01"),
        (lambda: gae.gae(*parts, gamma=-0.1), r"gamma must lie in \[0, 1\], got -0.1"),
        (lambda: gae.gae(*parts, gamma=math.nan), r"gamma must lie in \[0, 1\], got nan"),
        (lambda: gae.td_errors(rewards, values, after, terminated, gamma=2.0), "gamma must lie"),
        (lambda: gae.n_step_advantages(*parts, n=0), "n must be at least 1, got 0"),
        (lambda: gae.n_step_advantages(*parts[:4], truncated[:3], n=2), r"truncated \(3, 5\)"),
    ]
    for function, message in cases:
        with pytest.raises(ValueError, match=message):
            function()


def check_a_rollout_of_no_steps_has_no_advantages(gae):
    parts = [x[:0] for x in steps(23)]
    assert all(x.shape == (0, 5) for x in (*gae.gae(*parts), gae.n_step_advantages(*parts, n=2)))


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_functions(check):
    check(original)


MISTAKES = {
    "a truncation is a termination": (
        "after = torch.where(terminated.bool(), 0.0, next_values)\n    return",
        "cut = next_values != torch.cat([values[1:], next_values[-1:]])\n"
        "    after = torch.where(terminated.bool() | cut, 0.0, next_values)\n    return",
    ),
    "a termination is a truncation": ("torch.where(terminated.bool(), 0.0, next_values)", "next_values"),
    "a product with the flag": ("torch.where(terminated.bool(), 0.0, next_values)", "next_values * (~terminated)"),
    "the flag turned round": (
        "torch.where(terminated.bool(), 0.0, next_values)",
        "torch.where(terminated.bool(), next_values, 0.0)",
    ),
    "no discount in the TD error": ("(rewards + gamma * after - values)", "(rewards + after - values)"),
    "wrong sign of V": ("gamma * after - values)", "gamma * after + values)"),
    "gradient kept": ("- values).detach()", "- values)"),
    "gradient of the targets kept": ("advantages + values.detach()", "advantages + values"),
    "the sum runs through ends": ("torch.where(over[t], 0.0, after)", "after"),
    "the sum runs through truncations": (
        "over = terminated.bool() | truncated.bool()\n    advantages = torch.zeros_like(deltas)\n    after",
        "over = terminated.bool()\n    advantages = torch.zeros_like(deltas)\n    after",
    ),
    "the sum runs through terminations": (
        "over = terminated.bool() | truncated.bool()\n    advantages = torch.zeros_like(deltas)\n    after",
        "over = truncated.bool()\n    advantages = torch.zeros_like(deltas)\n    after",
    ),
    "the end shifted by one": ("torch.where(over[t], 0.0, after)", "torch.where(over[t - 1], 0.0, after)"),
    "no lambda": ("deltas[t] + gamma * lam *", "deltas[t] + gamma *"),
    "no gamma in the sum": ("deltas[t] + gamma * lam *", "deltas[t] + lam *"),
    "forward": ("for t in reversed(range(len(deltas)))", "for t in range(len(deltas))"),
    "targets without V": ("return advantages, advantages + values.detach()", "return advantages, advantages"),
    "another default of lambda": ("lam: float = 0.95", "lam: float = 1.0"),
    "another default of gamma": ("gamma: float = 0.99,\n    lam", "gamma: float = 1.0,\n    lam"),
    "one step too many": ("range(min(n, len(deltas)))", "range(min(n + 1, len(deltas)))"),
    "n steps without discount": ("discount * gamma", "discount"),
    "n steps through ends": ("going & ~over[k:]", "going"),
    "n steps stop a step early": (
        "torch.where(going, deltas[k:], 0.0)",
        "torch.where(going & ~over[k:], deltas[k:], 0.0)",
    ),
    "n unchecked": ("if n < 1", "if False"),
    "another default of gamma in TD errors": ("Tensor, *, gamma: float = 0.99", "Tensor, *, gamma: float = 1.0"),
    "another default of gamma in n steps": ("n: int,\n    gamma: float = 0.99", "n: int,\n    gamma: float = 1.0"),
    "flags must be bool": ("torch.where(terminated.bool(), 0.0,", "torch.where(terminated, 0.0,"),
    "a product at ends": ("gamma * lam * torch.where(over[t], 0.0, after)", "gamma * lam * (~over[t]) * after"),
    "rates unchecked": ("if not 0 <= rate <= 1", "if False"),
    "shapes unchecked": ("if x.shape != rewards.shape or rewards.dim() != 2", "if False"),
    "truncated unchecked": ('_check(rewards, {"truncated": truncated}, lam=lam)', "_check(rewards, {}, lam=lam)"),
}  # fmt: skip


def test_no_check_fails_on_the_original():
    assert caught_by(original, CHECKS) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    mutant = load_mutant(PATH, *MISTAKES[mistake])
    assert any(caught_by(mutant, [check]) for check in CHECKS)


# What a rollout holds: steps of episodes and nothing else.


def check_rollouts(loop):
    """Every step of a batch replayed in Gymnasium's own CartPole, copy by copy, from the state that it started in: no
    step only resets, each pays 1, leads where it says, and ends for the reason that it says."""
    import gymnasium

    torch.manual_seed(0)
    task = replace(CARTPOLE, limit=12)  # so that clocks run out as well as poles fall
    agent, envs = loop.Agent(task, 8), classic.Envs(task, 6, dtype=torch.float64)
    agent = agent.double()
    rollout = loop.collect(envs, agent, 60, torch.Generator().manual_seed(1))
    env = gymnasium.make("CartPole-v1").unwrapped
    env.reset(seed=0)
    ends = {"terminated": 0, "truncated": 0}
    for i in range(6):
        age = 0
        for t in range(60):
            env.state = rollout.obs[t, i].numpy().copy()
            env.steps_beyond_terminated = None
            after, reward, terminated, _, _ = env.step(int(rollout.actions[t, i]))
            age += 1
            assert (reward, terminated) == (rollout.rewards[t, i], rollout.terminated[t, i])
            assert bool(rollout.truncated[t, i]) == (age == 12 and not terminated)
            value = agent.values(torch.as_tensor(env.state, dtype=torch.float64))
            assert rollout.next_values[t, i].item() == pytest.approx(value.item(), abs=1e-9)
            over = terminated or age == 12
            if t < 59:  # the next step starts where this one led, or at a fresh start
                there = torch.as_tensor(env.state)
                assert torch.allclose(rollout.obs[t + 1, i], there, atol=1e-12) != over
                assert not over or rollout.obs[t + 1, i].abs().max() <= 0.05
            age = 0 if over else age
            ends["terminated"] += int(terminated)
            ends["truncated"] += int(rollout.truncated[t, i])
    assert min(ends.values()) > 5 and rollout.mask.all()


def test_autoreset_steps_never_enter_a_batch():
    check_rollouts(loop)


ROLLOUT_MISTAKES = {
    "V of the next episode's start": (
        "agent.values(obs), agent.values(after)",
        "agent.values(obs), agent.values(torch.cat([obs[1:], after[-1:]]))",
    ),
    "V of the state before": ("agent.values(obs), agent.values(after)", "agent.values(obs), agent.values(obs)"),
    "observations of the step after": (
        "obs.append(envs.obs)\n        actions.append(agent.act(obs[-1], generator))\n        "
        "steps.append(step := envs.step(actions[-1]))", "actions.append(agent.act(envs.obs, generator))\n        "
        "steps.append(step := envs.step(actions[-1]))\n        obs.append(envs.obs)"),
    "ends mixed up": (
        "Rollout(obs, actions, rewards, terminated, truncated,",
        "Rollout(obs, actions, rewards, truncated, terminated,",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", ROLLOUT_MISTAKES)
def test_a_wrong_rollout_is_caught(mistake):
    assert caught_by(load_mutant("snippets/foundations/loop.py", *ROLLOUT_MISTAKES[mistake]), [check_rollouts])


def test_gymnasium_has_steps_that_only_reset():
    """Its vector environments, as they come: the step after an end ignores the action, pays 0 and returns a start."""
    import gymnasium

    envs = gymnasium.make_vec("CartPole-v1", num_envs=1, vectorization_mode="sync")
    envs.reset(seed=0)
    over = False
    while not over:
        _, reward, terminated, truncated, _ = envs.step(np.array([1]))
        over = bool(terminated[0] or truncated[0])
        assert reward[0] == 1.0
    obs, reward, terminated, truncated, _ = envs.step(np.array([1]))
    assert reward[0] == 0.0 and not terminated[0] and not truncated[0] and np.abs(obs).max() <= 0.05


def balanced(bootstrap):
    """The critic's targets, lambda = 1, of an episode in which a pole stands for 500 steps, gamma = 0.99, and V is
    right: 100 everywhere. `bootstrap`: the clock counts as a truncation, or else as a termination."""
    ones, never = torch.ones(500, 1, dtype=torch.float64), torch.zeros(500, 1, dtype=torch.bool)
    last = never.clone()
    last[-1] = True
    ends = (never, last) if bootstrap else (last, never)
    return original.gae(ones, 100 * ones, 100 * ones, *ends, gamma=0.99, lam=1.0)[1]


def test_a_clock_taken_for_an_end_misleads_the_critic(evidence):
    right, wrong = balanced(True), balanced(False)
    assert_close(right, torch.full_like(right, 100.0))
    for t in range(500):
        assert wrong[t, 0].item() == pytest.approx(100 * (1 - 0.99 ** (500 - t)), abs=1e-9)
    for name, targets in (("truncation", right), ("termination", wrong)):
        evidence(
            "foundations/gae",
            f"Mean target of a right critic, the clock a {name}",
            value=targets.mean(),
            unit="",
            seeds=[0],
            note="A pole that stands for all 500 steps, γ = 0.99, λ = 1: exact.",
        )


# Bias and noise, by enumeration: all courses of five steps.

LAMBDAS = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0]
CRITICS = {"true": 0.0, "off by half": 0.5, "noise": None}


def critic_of(world, kind, seed):
    """(H + 1, S): the true values, those plus errors half their size, or numbers of their size without sense."""
    values, error = (
        world.values,
        torch.randn(world.values.shape, generator=torch.Generator().manual_seed(seed)).double(),
    )
    size = values[:-1].square().mean().sqrt()
    table = size * error if CRITICS[kind] is None else values + CRITICS[kind] * size * error
    table[-1] = 0.0  # after the last step nothing is to come, and the critic is not asked
    return table


def weights_of(module, world, table, lam):
    """gamma^t * GAE (H, K) with the critic `table`."""
    values = world.at(table[:-1])
    after = torch.stack([table[t + 1][world.states[:, t + 1]] for t in range(len(values))])
    terminated = world.over.T
    parts = (world.rewards.T, values, after, terminated, torch.zeros_like(terminated))
    return world.discounts() * module.gae(*parts, gamma=GAMMA, lam=lam)[0]


def test_bias_and_noise_over_lambda(evidence):
    seeds, horizon = (SEEDS, 5) if evidence.full else (SEEDS[:1], 4)
    found = {kind: {"bias": [], "spread": []} for kind in CRITICS}
    for seed in seeds:
        world = enumerate_world(seed, horizon)
        for kind in CRITICS:
            table = critic_of(world, kind, 300 + seed)
            pairs = [world.bias_and_spread(weights_of(original, world, table, lam)) for lam in LAMBDAS]
            bias, spread = zip(*pairs, strict=True)
            found[kind]["bias"].append(bias)
            found[kind]["spread"].append(spread)
            assert bias[-1] < 1e-10  # lambda = 1 asks no critic for what is to come
            assert CRITICS[kind] == 0.0 or bias[0] > 0.01
        parts = (world.rewards.T, *2 * [world.at(world.values[:-1])], world.over.T, torch.zeros_like(world.over.T))
        short = world.discounts() * original.gae(*parts, gamma=GAMMA / 2, lam=1.0)[0]
        assert world.bias_and_spread(short)[0] > 0.02  # a lower gamma is bias, with no critic asked for the future
    worst = [max(max(bias) for bias in found["true"]["bias"])]
    evidence(
        "foundations/gae",
        "Largest bias with the true V, over all λ",
        value=max(worst),
        bar=1e-10,
        unit="‖∇J‖",
        seeds=seeds,
        note=f"By enumeration of {horizon} steps.",
    )
    for kind in CRITICS:
        for what in ("bias", "spread"):
            for lam in (0.0, 0.95, 1.0):
                numbers = [run[LAMBDAS.index(lam)] for run in found[kind][what]]
                evidence(
                    "foundations/gae",
                    f"λ = {lam:g}, critic {kind}: {what}",
                    value=sum(numbers) / len(seeds),
                    unit="‖∇J‖",
                    seeds=seeds,
                    spread=numbers,
                    curve={"x": LAMBDAS, "y": found[kind][what]} if lam == 0.0 else None,
                )


def test_what_the_critic_says_of_the_state_itself_does_no_harm():
    """A wrong V(s_t) alone is a baseline. The bias comes from V(s_(t+1)): with it right, lambda = 0 is unbiased."""
    world = enumerate_world(0, 4)
    wrong = critic_of(world, "noise", 5)
    after = torch.stack([world.values[t + 1][world.states[:, t + 1]] for t in range(4)])
    deltas = original.td_errors(world.rewards.T, world.at(wrong[:-1]), after, world.over.T, gamma=GAMMA)
    assert world.bias_and_spread(world.discounts() * deltas)[0] < 1e-10
    after = torch.stack([wrong[t + 1][world.states[:, t + 1]] for t in range(4)])
    deltas = original.td_errors(world.rewards.T, world.at(world.values[:-1]), after, world.over.T, gamma=GAMMA)
    assert world.bias_and_spread(world.discounts() * deltas)[0] > 0.05


def test_a_td_error_is_an_estimate_of_the_advantage(evidence):
    """E[delta | s, a] = Q(s, a) - V(s) with the true V, a sum over next states; with a wrong one it is off."""
    right, wrong = [], []
    for seed in SEEDS:
        mdp = mdps.random_mdp(seed=seed, gamma=GAMMA)
        pi = torch.randn(3, 2, generator=torch.Generator().manual_seed(seed)).double().softmax(-1)
        moves = torch.einsum("sa,sat->st", pi, mdp.transitions)
        values = torch.linalg.solve(
            torch.eye(3, dtype=torch.float64) - GAMMA * moves, (pi * mdp.expected_rewards).sum(-1)
        )
        q_values = mdp.expected_rewards + GAMMA * mdp.transitions @ values
        for table, errors in ((values, right), (values * torch.tensor([0.5, 1.0, 1.5]), wrong)):
            # One row a next state, one column a pair of state and action.
            rewards, chances = mdp.rewards.flatten(0, 1).T, mdp.transitions.flatten(0, 1).T  # (S', S A)
            before = table.repeat_interleave(2).expand_as(rewards)
            after = table.unsqueeze(-1).expand_as(rewards)
            deltas = original.td_errors(rewards, before, after, torch.zeros_like(rewards), gamma=GAMMA)
            mean = (chances * deltas).sum(0).view(3, 2)
            errors.append((mean - (q_values - values.unsqueeze(-1))).abs().max().item())
    evidence(
        "foundations/gae",
        "Largest error of E[δ | s, a] as an advantage: true V",
        value=max(right),
        bar=1e-10,
        unit="",
        seeds=SEEDS,
        spread=right,
    )
    evidence(
        "foundations/gae",
        "Largest error of E[δ | s, a] as an advantage: V off by up to half",
        value=min(wrong),
        bar=0.05,
        better=">",
        seeds=SEEDS,
        spread=wrong,
        note="Smallest of the seeds: no critic that is off gets away with it.",
    )
