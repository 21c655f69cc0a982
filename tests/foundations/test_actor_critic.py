"""Actor-critic: losses against finite differences, V-trace against sums written out, delays against replays by hand."""

import math
from copy import deepcopy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from snippets.foundations import actor_critic as original
from snippets.foundations import gae, loop
from snippets.worlds import mdps
from snippets.worlds.classic import CARTPOLE, Envs
from tests.foundations.on_policy import batch_from, solves_cartpole
from tests.mutation import caught_by, load_mutant

torch.set_num_threads(1)
PATH = "snippets/foundations/actor_critic.py"
SEEDS = [0, 1, 2, 3, 4]
GAMMA = 0.9


def random(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def steps(seed, dtype=torch.float64):
    """logps, old_logps, rewards, values, next_values, terminated, truncated of a random rollout (10, 4)."""
    logps, old, rewards, values, other = random(seed, 5, 10, 4, dtype=dtype)
    draw = torch.rand(10, 4, generator=torch.Generator().manual_seed(seed))
    terminated, truncated = draw < 0.15, draw > 0.85
    after = torch.where(terminated | truncated, other, torch.cat([values[1:], other[-1:]]))
    return logps, old, rewards, values, after, terminated, truncated


# Each check takes the module, so that broken copies can be put to it.


def check_actor_loss_by_finite_differences(module):
    """Its gradient is that of -(A log pi + c H), advantages constant."""
    actions, advantages = torch.tensor([0, 2, 1, 1]), random(1, 4)

    def loss(logits):
        log_probs = logits.log_softmax(-1)
        entropies = -(log_probs.exp() * log_probs).sum(-1)
        return module.actor_loss(log_probs[range(4), actions], advantages, entropies, entropy_coef=0.3)

    def by_hand(logits):
        pi = logits.softmax(-1)
        terms = [advantages[i] * pi[i, a].log() - 0.3 * (pi[i] * pi[i].log()).sum() for i, a in enumerate(actions)]
        return -sum(terms) / 4

    logits = random(2, 4, 3)
    assert_close(loss(logits), by_hand(logits))
    assert torch.autograd.gradcheck(loss, logits.clone().requires_grad_())
    gradient = torch.autograd.functional.jacobian(loss, logits)
    for i in range(4):
        for a in range(3):
            step = torch.zeros_like(logits)
            step[i, a] = 1e-6
            assert gradient[i, a].item() == pytest.approx(
                (by_hand(logits + step) - by_hand(logits - step)).item() / 2e-6, abs=1e-7
            )
    grad = advantages.clone().requires_grad_()
    out = module.actor_loss(logits[:, 0].requires_grad_(), grad, logits[:, 1])
    assert torch.autograd.grad(out, grad, allow_unused=True)[0] is None


def check_the_entropy_bonus_moves_the_optimum_to_a_softmax(module):
    """One state, true values: the expected gradient is zero at pi = softmax(Q / c), and nowhere before."""
    q_values = random(3, 5)
    for coef in (0.1, 1.0):
        for where, still in (((q_values / coef).softmax(-1), True), (q_values.softmax(-1) ** 1.5, False)):
            logits = (where / where.sum()).log().requires_grad_()
            log_probs = logits.log_softmax(-1)
            pi = log_probs.exp().detach()
            advantages = q_values - (pi * q_values).sum()
            entropy = -(log_probs.exp() * log_probs).sum()
            loss = 5 * module.actor_loss(
                log_probs, 1.0 * pi * advantages, entropy.expand(5) / 5, entropy_coef=coef
            )  # a sum over actions, each with its chance
            (gradient,) = torch.autograd.grad(loss, logits)
            assert (gradient.abs().max() < 1e-10) == still


def check_critic_loss_is_a_semi_gradient(module):
    """(V - target) / B, and nothing through a target that holds V."""
    weights, obs, after, rewards = random(4, 3).requires_grad_(), random(5, 8, 3), random(6, 8, 3), random(7, 8)
    loss = module.critic_loss(obs @ weights, rewards + 0.9 * (after @ weights))
    (gradient,) = torch.autograd.grad(loss, weights)
    delta = rewards + 0.9 * after @ weights - obs @ weights
    assert_close(gradient, -(delta.unsqueeze(-1) * obs).mean(0))
    assert_close(loss, 0.5 * delta.square().mean())


def check_vtrace_written_out(module):
    """Equation 1: V + sum over the episode's steps of gamma^(t-s) * prod c * rho_t * TD error."""
    for seed, rho_max, c_max in ((8, 1.0, 1.0), (9, 2.0, 0.7), (10, 1e9, 1e9)):
        logps, old, rewards, values, after, terminated, truncated = parts = steps(seed)
        advantages, targets = module.vtrace(*parts, gamma=GAMMA, rho_max=rho_max, c_max=c_max)
        ratio = (logps - old).exp()
        for i in range(4):
            for s in range(10):
                total, product = values[s, i].item(), 1.0
                for t in range(s, 10):
                    bootstrap = 0.0 if terminated[t, i] else after[t, i].item()
                    delta = rewards[t, i].item() + GAMMA * bootstrap - values[t, i].item()
                    total += GAMMA ** (t - s) * product * min(rho_max, ratio[t, i].item()) * delta
                    product *= min(c_max, ratio[t, i].item())
                    if terminated[t, i] or truncated[t, i]:
                        break
                assert targets[s, i].item() == pytest.approx(total, abs=1e-10)
                following = after[s, i] if truncated[s, i] or s == 9 else targets[min(s + 1, 9), i]
                following = 0.0 if terminated[s, i] else following.item()
                expected = rewards[s, i].item() + GAMMA * following - values[s, i].item()
                assert advantages[s, i].item() == pytest.approx(min(rho_max, ratio[s, i].item()) * expected, abs=1e-10)


def check_vtrace_on_policy_is_gae_with_lambda_one(module):
    logps, _, *rest = steps(11)
    advantages, targets = module.vtrace(logps, logps, *rest, gamma=GAMMA)
    expected = gae.gae(*rest, gamma=GAMMA, lam=1.0)
    assert_close(advantages, expected[0])
    assert_close(targets, expected[1])


def check_vtrace_is_right_for_the_policy_between(module):
    """Actions from mu, all courses of three steps: the value of pi_rho, proportional to min(rho_max * mu, pi), is
    where the expected target equals V. With no bound on rho that is the value of pi itself."""
    mdp = mdps.random_mdp(seed=0, gamma=GAMMA)
    mu, pi = random(12, 3, 2).softmax(-1), random(13, 3, 2).softmax(-1)
    courses = mdps.all_episodes(mdp, 3)
    states, actions = courses.states.T, courses.actions.T  # (4, K), (3, K)
    never = torch.zeros_like(actions, dtype=torch.bool)
    for rho_max, c_max in ((1.0, 1.0), (1.2, 0.5), (1e9, 1.0)):
        between = torch.minimum(rho_max * mu, pi)
        between = between / between.sum(-1, keepdim=True)
        moves = torch.einsum("sa,sat->st", between, mdp.transitions)
        values = torch.linalg.solve(
            torch.eye(3, dtype=torch.float64) - GAMMA * moves, (between * mdp.expected_rewards).sum(-1)
        )
        logps, old = pi.log()[states[:-1], actions], mu.log()[states[:-1], actions]
        _, targets = module.vtrace(
            logps, old, courses.rewards.T, values[states[:-1]], values[states[1:]], never, never,
            gamma=GAMMA, rho_max=rho_max, c_max=c_max,
        )  # fmt: skip
        chance = (courses.world_logps + old.sum(0)).exp()
        for s in range(3):
            here = states[0] == s
            mean = (chance * targets[0])[here].sum() / chance[here].sum()
            assert mean.item() == pytest.approx(values[s].item(), abs=1e-10)


def check_vtrace_cuts_ratios_off(module):
    """Ratios of e^50 leave finite numbers, the value of a terminal state never matters, nothing has a gradient."""
    for dtype in (torch.float32, torch.float64):
        logps, old, rewards, values, after, terminated, truncated = steps(14, dtype)
        logps, values = (logps + 50).requires_grad_(), values.requires_grad_()
        clean = module.vtrace(logps, old, rewards, values, after, terminated, truncated)
        dirty = torch.where(terminated, math.nan, after)
        for x, y in zip(clean, module.vtrace(logps, old, rewards, values, dirty, terminated, truncated), strict=True):
            assert x.isfinite().all() and not x.requires_grad and x.dtype == dtype
            assert_close(x, y, rtol=0, atol=0)
    logps, old, rewards, values, after, _, _ = steps(19)
    ends = torch.zeros_like(rewards, dtype=torch.bool)
    ends[4] = True
    junk = [torch.where(torch.arange(10).unsqueeze(-1) > 4, math.nan, x) for x in (rewards, values, after)]
    for flags in ((ends, ~ends & False), (~ends & False, ends)):  # what follows an end leaves the steps before alone
        pair = [module.vtrace(logps, old, *x, *flags) for x in ((rewards, values, after), junk)]
        assert_close(*([x[:5] for x in both] for both in pair), rtol=0, atol=0)


def check_defaults_and_edges(module):
    x, y, z = random(17, 3, 6)
    assert_close(module.actor_loss(x, y, z), module.actor_loss(x, y, z, entropy_coef=0.01))
    assert_close(module.actor_loss(x, y, z, entropy_coef=0.0), -(x * y).mean())
    plain = module.vtrace(*steps(18))
    for found, expected in zip(plain, module.vtrace(*steps(18), gamma=0.99, rho_max=1.0, c_max=1.0), strict=True):
        assert_close(found, expected, rtol=0, atol=0)
    for gamma in (0.0, 1.0):
        assert all(found.isfinite().all() for found in module.vtrace(*steps(18), gamma=gamma))
    *parts, terminated, truncated = steps(18)
    for found, expected in zip(module.vtrace(*parts, terminated.long(), truncated.long()), plain, strict=True):
        assert_close(found, expected, rtol=0, atol=0)
    one_step = module.vtrace(*steps(18), c_max=0.0)[1] - parts[3]  # no trace: each TD error stays where it is
    bootstrap = torch.where(terminated, 0.0, parts[4])
    assert_close(one_step, (parts[0] - parts[1]).exp().clamp(max=1) * (parts[2] + 0.99 * bootstrap - parts[3]))


def check_bad_input_is_named(module):
    x, parts = random(15, 6), steps(16)
    cases = [
        (lambda: module.actor_loss(x, x[:5], x), r"logps \(6,\), advantages \(5,\), entropies \(6,\)"),
        (lambda: module.actor_loss(x, x, x[:5]), r"entropies \(5,\)"),
        (lambda: module.actor_loss(x, x, x, entropy_coef=-0.1), "entropy_coef must not be negative, got -0.1"),
        (lambda: module.critic_loss(x.unsqueeze(-1), x), r"values \(6, 1\), returns \(6,\)"),
        (lambda: module.vtrace(parts[0][:9], *parts[1:]), r"logps \(9, 4\), old_logps \(10, 4\)"),
        (lambda: module.vtrace(*parts[:3], parts[3][:, :1], *parts[4:]), r"values \(10, 1\)"),
        (lambda: module.vtrace(*parts[:4], parts[4][:, :1], *parts[5:]), r"next_values \(10, 1\)"),
        (lambda: module.vtrace(*parts[:5], parts[5][:, :1], parts[6]), r"terminated \(10, 1\)"),
        (lambda: module.vtrace(*parts[:6], parts[6][:, :3]), r"truncated \(10, 3\)"),
        (lambda: module.vtrace(*parts, gamma=1.5), "bad gamma=1.5"),
        (lambda: module.vtrace(*parts, gamma=math.nan), "bad gamma=nan"),
        (lambda: module.vtrace(*parts, rho_max=0.5), "rho_max=0.5 < c_max=1.0"),
        (lambda: module.vtrace(*parts, c_max=-0.5), "c_max=-0.5"),
        (lambda: module.delayed(-1), "delay must not be negative, got -1"),
        (lambda: module.delayed(1, "weights"), "stale must be 'gradients' or 'data', got 'weights'"),
    ]  # fmt: skip
    for function, message in cases:
        with pytest.raises(ValueError, match=message):
            function()


def check_the_adapter(module):
    """lam = 1 on a rollout of five steps: the paper's targets, all rewards to the rollout's end and V there."""
    algorithm, generator = module.algorithm(), torch.Generator().manual_seed(0)
    settings = algorithm.settings(gamma=0.8)
    torch.manual_seed(0)
    agent = loop.Agent(CARTPOLE, 8)
    rollout = loop.collect(Envs(CARTPOLE, 16), agent, settings.horizon, generator)
    advantages, returns = algorithm.advantages(rollout, settings)
    parts = (rollout.rewards, rollout.values, rollout.next_values, rollout.terminated, rollout.truncated)
    expected = gae.n_step_advantages(*parts, n=5, gamma=0.8)
    assert len(advantages) == 5
    assert_close(advantages, expected)
    assert_close(returns, expected + rollout.values)


@dataclass
class Rates:
    value_coef: float = 0.5
    entropy_coef: float = 0.02
    max_norm: float = 1e9
    epochs: int = 1
    minibatch: int = 0


def batches(agent, count):
    generator = torch.Generator().manual_seed(3)
    envs = Envs(CARTPOLE, 4)
    for k in range(count):
        rollout = loop.collect(envs, agent, 3, generator)
        advantages = random(60 + k, 3, 4, dtype=torch.float32)
        yield batch_from(rollout, advantages, advantages + rollout.values)


def play(module, updates, *delay):
    """The weights after each of `updates` updates by `delayed`, and the batches, made by the weights of their time."""
    torch.manual_seed(0)
    agent = loop.Agent(CARTPOLE, 8)
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.3)
    update, states, used = module.delayed(*delay), [deepcopy(agent)], []
    for batch in batches(agent, updates):
        used.append(batch)
        update(agent, optimizer, batch, Rates(), None)
        states.append(deepcopy(agent))
    return states, used


def by_hand(agent, batch):
    """The gradient of A2C's loss, written out."""
    log_probs = agent.policy(batch.obs).log_softmax(-1)
    logps, entropy = log_probs[range(len(batch)), batch.actions], -(log_probs.exp() * log_probs).sum(-1)
    error = agent.critic(batch.obs).squeeze(-1) - batch.returns
    loss = (-batch.advantages * logps - 0.02 * entropy + 0.25 * error**2).mean()
    return torch.autograd.grad(loss, list(agent.parameters()))


def check_a_delay_applies_the_gradient_of_the_weights_of_then(module):
    """Replayed: update k applies the gradient that batch k - delay had at the weights which made it."""
    for delay in (0, 1, 3):
        states, used = play(module, 6, delay)
        for k in range(6):
            gradient = by_hand(states[k - delay], used[k - delay]) if k >= delay else None
            for i, (before, after) in enumerate(zip(states[k].parameters(), states[k + 1].parameters(), strict=True)):
                assert_close(after, before - 0.3 * gradient[i] if k >= delay else before)


def check_stale_data_take_the_gradient_of_now(module):
    """The batch is as old, the gradient is that of the weights of now; with the ratio, bounded, or without."""
    for rho_max in (None, 1.0, 1.1):
        states, used = play(module, 5, 2, "data", rho_max)
        for k in range(2, 5):
            agent, batch = states[k], used[k - 2]
            if rho_max is not None:
                ratio = (agent.logps(batch.obs, batch.actions)[0] - batch.logps).exp().detach()
                batch = replace(batch, advantages=batch.advantages * ratio.clamp(max=rho_max))
            gradient = by_hand(agent, batch)
            for i, (before, after) in enumerate(zip(agent.parameters(), states[k + 1].parameters(), strict=True)):
                assert_close(after, before - 0.3 * gradient[i])


def check_no_delay_is_the_plain_update(module):
    states, used = play(module, 4, 0)
    agent = deepcopy(states[0])
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.3)
    for k, batch in enumerate(used):
        loop.descend(module.a2c_loss)(agent, optimizer, batch, Rates(), torch.Generator())
        for mine, theirs in zip(agent.parameters(), states[k + 1].parameters(), strict=True):
            assert_close(mine, theirs)


def check_gradients_are_clipped(module):
    torch.manual_seed(0)
    agent = loop.Agent(CARTPOLE, 8)
    before = nn.utils.parameters_to_vector(agent.parameters()).clone()
    update, (batch,) = module.delayed(0), batches(agent, 1)
    update(agent, torch.optim.SGD(agent.parameters(), lr=1.0), batch, Rates(max_norm=1e-3), None)
    after = nn.utils.parameters_to_vector(agent.parameters())
    assert (after - before).norm().item() == pytest.approx(1e-3, rel=1e-2)


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_functions(check):
    check(original)


MISTAKES = {
    "the actor descends": ("return -(advantages.detach()", "return (advantages.detach()"),
    "entropy is punished": ("* logps + entropy_coef * entropies", "* logps - entropy_coef * entropies"),
    "no entropy": ("* logps + entropy_coef * entropies", "* logps"),
    "a gradient through the advantage": ("advantages.detach() * logps", "advantages * logps"),
    "a sum over steps": ("entropies).mean()", "entropies).sum()"),
    "a gradient through the target": ("(values - returns.detach())", "(values - returns)"),
    "no half": ("return 0.5 * (values", "return (values"),
    "a column against a row": ("_same(values=values, returns=returns)", ""),
    "the ratio turned round": ("ratios = (logps - old_logps)", "ratios = (old_logps - logps)"),
    "rho without a bound": ("ratios.clamp(max=rho_max), ", "ratios, "),
    "c without a bound": (", ratios.clamp(max=c_max)", ", ratios"),
    "rho and c swapped": ("deltas[t] + c[t] * gamma", "deltas[t] + rho[t] * gamma"),
    "no rho in the TD error": ("deltas = rho * (rewards", "deltas = (rewards"),
    "no rho in the advantage": ("deltas[t] + rho[t] * gamma * after", "deltas[t] + gamma * after"),
    "no discount": ("rewards + gamma * next_values - values)", "rewards + next_values - values)"),
    "no discount in the trace": ("deltas[t] + c[t] * gamma * after", "deltas[t] + c[t] * after"),
    "a terminal state has a value": ("torch.where(terminated.bool(), 0.0, next_values)", "next_values"),
    "a product with the flag": (
        "torch.where(terminated.bool(), 0.0, next_values)",
        "next_values * (~terminated)",
    ),
    "the trace runs through ends": ("torch.where(over[t], 0.0, after)", "after"),
    "the trace runs through truncations": ("over = terminated.bool() | truncated.bool()", "over = terminated.bool()"),
    "the end shifted by one": ("torch.where(over[t], 0.0, after)", "torch.where(over[t - 1], 0.0, after)"),
    "targets without V": ("targets[t] = values[t] + after", "targets[t] = after"),
    "forward": ("for t in reversed(range(len(values)))", "for t in range(len(values))"),
    "gradient kept": ("values, next_values = values.detach(), next_values.detach()", "pass"),
    "gradient of the ratio kept": ("(logps - old_logps).detach().exp()", "(logps - old_logps).exp()"),
    "one update less": ("if len(queue) <= delay", "if len(queue) < delay"),
    "the youngest first": ("queue.popleft()", "queue.pop()"),
    "gradients of now": ('gradients(batch) if stale == "gradients" else batch', "batch if True else batch"),
    "no ratio": ("advantages=weighted", "advantages=oldest.advantages"),
    "a ratio without bound": ("ratios.clamp(max=rho_max)\n                oldest", "ratios\n                oldest"),
    "no clipping": ("torch.nn.utils.clip_grad_norm_(parameters, settings.max_norm)", "pass"),
    "no critic": ("settings.value_coef *", "0.0 *"),
    "critic at full weight": ("settings.value_coef *", "1.0 *"),
    "another default of the coefficient": ("*, entropy_coef: float = 0.01", "*, entropy_coef: float = 0.1"),
    "another default of rho": ("rho_max: float = 1.0", "rho_max: float = 2.0"),
    "coefficient unchecked": ("if entropy_coef < 0", "if False"),
    "bounds unchecked": ("not rho_max >= c_max >= 0", "False"),
    "gamma unchecked": ("if not 0 <= gamma <= 1 or", "if False or"),
    "a negative bound": ("not rho_max >= c_max >= 0", "not rho_max >= c_max"),
    "a product at ends": ("torch.where(over[t], 0.0, after)", "(~over[t]) * after"),
    "values unchecked": ("rewards=rewards, values=values)", "rewards=rewards)"),
    "terminated unchecked": ("_same(next_values=next_values, terminated=terminated, ", "_same("),
    "the adapter knows no gamma": ("*ends, gamma=settings.gamma", "*ends, gamma=0.99"),
    "the adapter has lambda below 1": ("lam: float = 1.0", "lam: float = 0.95"),
    "the adapter rolls out longer": ("horizon: int = 5", "horizon: int = 8"),
}  # fmt: skip


def test_no_check_fails_on_the_original():
    assert caught_by(original, CHECKS) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    mutant = load_mutant(PATH, *MISTAKES[mistake])
    assert any(caught_by(mutant, [check]) for check in CHECKS)


# CartPole.


def mean(numbers):
    return sum(numbers) / len(numbers)


def seeds_of(evidence):
    return SEEDS if evidence.full else SEEDS[:1]


def test_the_adapter_is_n_step_returns_of_the_rollout():
    check_the_adapter(original)


def test_it_solves_cartpole(evidence):
    solves_cartpole(evidence, "foundations/actor_critic", "A2C", original.algorithm(), seeds_of(evidence))


# Workers that do not wait for each other.


def mean_return(agent, seed, episodes=20):
    rollout = loop.collect(Envs(CARTPOLE, episodes, seed=seed), agent, 0, torch.Generator().manual_seed(seed))
    return (rollout.rewards * rollout.mask).sum(0).mean().item()


def learn_with(delay, seed, updates, every, *how):
    """Mean returns after every `every` updates that were applied; the first `delay` rounds only fill the pipeline."""
    algorithm, update, curve, rounds = original.algorithm(), original.delayed(delay, *how), [], []

    def counted(agent, *rest):
        update(agent, *rest)
        rounds.append(1)
        applied = len(rounds) - delay
        if applied > 0 and applied % every == 0:
            curve.append(mean_return(agent, 10_000 * (seed + 1) + applied))

    settings = algorithm.settings(seed=seed, updates=updates + delay)
    loop.train(CARTPOLE, replace(algorithm, update=counted), settings, judge=False)
    return curve


WORKERS = {f"gradients {delay} updates old": (delay,) for delay in (0, 4, 16, 64)} | {
    "data 64 updates old": (64, "data"),
    "data 64 updates old, ratio cut at 1": (64, "data", 1.0),
}


def test_what_staleness_costs(evidence):
    """A2C, each round of it so many updates old; the mean over the run of the mean return. A finding, no bar."""
    seeds = seeds_of(evidence)
    updates, every = (400, 50) if evidence.full else (10, 5)
    for name, (delay, *how) in WORKERS.items():
        if not evidence.full and delay > 4:
            continue
        curves = [learn_with(delay, seed, updates, every, *how) for seed in seeds]
        evidence(
            "foundations/actor_critic",
            f"CartPole, mean return over the first {updates} updates: {name}",
            value=mean([mean(curve) for curve in curves]),
            unit="steps",
            seeds=seeds,
            spread=[mean(curve) for curve in curves],
            curve={"x": list(range(every, updates + 1, every)), "y": curves},
        )


def actor_gradient(agent, seed):
    """The gradient that A2C follows on average: of 128 copies' 200 steps the later half, in rollouts of five."""
    algorithm, generator = original.algorithm(), torch.Generator().manual_seed(seed)
    rollout = loop.collect(Envs(CARTPOLE, 128, seed=seed), agent, 200, generator)
    settings = algorithm.settings()

    def cut(x):  # (200, N, ...) -> (5, 20 N, ...)
        return x[100:].unflatten(0, (-1, settings.horizon)).transpose(0, 1).flatten(1, 2)

    short = loop.Rollout(**{name: cut(x) for name, x in vars(rollout).items()})
    advantages, _ = algorithm.advantages(short, settings)
    logps, entropies = agent.logps(short.obs.flatten(0, 1), short.actions.flatten())
    loss = original.actor_loss(logps, advantages.flatten(), entropies, entropy_coef=settings.entropy_coef)
    return nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(agent.policy.parameters())))


def test_what_staleness_does_to_the_direction(evidence):
    """Cosine between the gradient of now and that of the weights k updates ago, each from 12,800 steps of its own
    policy, early in training. With k = 0 only noise is between them; after 200 updates there is little else."""
    seeds, delays = seeds_of(evidence), [0, 4, 16, 64] if evidence.full else [4]
    points = [80, 100, 120] if evidence.full else [5]
    found = {delay: [] for delay in delays}
    algorithm = original.algorithm()
    for seed in seeds:
        agents = []

        def keep(agent, *rest):
            agents.append(deepcopy(agent))  # noqa: B023
            algorithm.update(agent, *rest)

        settings = algorithm.settings(seed=seed, updates=max(points) + 1)
        loop.train(CARTPOLE, replace(algorithm, update=keep), settings, judge=False)
        for delay in delays:
            cosines = []
            for point in points:
                draw = 10_000 * seed + 10 * point
                now = actor_gradient(agents[point], draw)
                then = actor_gradient(agents[point - delay], draw + delay + 1)
                cosines.append(torch.cosine_similarity(now, then, dim=0).item())
            found[delay].append(mean(cosines))
    for delay in delays:
        evidence(
            "foundations/actor_critic",
            f"Cosine between the gradient of now and that of {delay} updates ago",
            value=mean(found[delay]),
            seeds=seeds,
            spread=found[delay],
            note=f"Mean over updates {points} of A2C on CartPole.",
        )
