"""SAC: its density against integration and torch, its losses against Stable-Baselines3, its optimum exactly."""

import dataclasses
import math
import statistics

import pytest
import torch
from scipy import integrate
from torch.testing import assert_close

from snippets.foundations import loop
from snippets.foundations import sac as original
from snippets.worlds import exact, mdps
from snippets.worlds.classic import PENDULUM
from tests.foundations import continuous
from tests.foundations.continuous import (
    UNIT,
    copy_critics,
    feed,
    learned_torque,
    learned_value,
    normal,
    peer,
    rng,
    sample_of,
)
from tests.mutation import caught_by, load_mutant

torch.set_num_threads(1)
PATH = "snippets/foundations/sac.py"
NAME = "foundations/sac"
SEEDS = [0, 1, 2, 3, 4]


def agent_of(module, task=UNIT, seed=0, **options):
    nets = ("policy", "critics", "target_critics")
    agent = continuous.agent_of(module, task, seed, nets=nets, **{"alpha": 0.3} | options)
    agent.log_alpha.data = agent.log_alpha.data.double()
    return agent


# Each check takes the module, so that broken copies can be put to it.


def density(sac, a, mean, log_std, bound):
    """pi(a|s) of one dimension, by the noise that leads to a."""
    mean, log_std = torch.tensor([[mean]]).double(), torch.tensor([[log_std]]).double()
    noise = (math.atanh(a / bound) - mean) / log_std.exp()
    found, logps = sac.squashed_sample(mean, log_std, noise, bound=bound)
    assert found.item() == pytest.approx(a, abs=1e-9)
    return logps.exp().item()


def check_the_density_integrates_to_one(sac):
    for mean, log_std, bound in ((0.0, 0.0, 1.0), (0.7, -1.0, 2.0), (-1.2, 0.3, 0.5), (0.2, -0.5, 10.0)):
        edge = bound * (1 - 1e-12)
        total, _ = integrate.quad(lambda a: density(sac, a, mean, log_std, bound), -edge, edge, limit=400)  # noqa: B023
        assert total == pytest.approx(1.0, abs=1e-5), (mean, log_std, bound)


def check_the_density_of_torch(sac):
    laws = torch.distributions
    for bound in (1.0, 2.0, 0.1):
        mean, log_std, noise = normal(3, 50, 4, seed=1)
        base = laws.Normal(mean, log_std.exp())
        law = laws.TransformedDistribution(base, [laws.TanhTransform(), laws.AffineTransform(0.0, bound)])
        actions, logps = sac.squashed_sample(mean, log_std, noise, bound=bound)
        keep = (actions.abs() < bound * (1 - 1e-6)).all(-1)  # beyond, torch's atanh loses its digits
        assert keep.sum() > 25
        assert_close(logps[keep], law.log_prob(actions)[keep].sum(-1), atol=1e-6, rtol=1e-6)
        assert_close(actions, bound * torch.tanh(mean + log_std.exp() * noise))


def check_a_wide_policy_is_finite(sac):
    """Where tanh rounds to 1, log(1 - tanh^2) is -inf; the log-density is not, nor is its gradient."""
    for dtype in (torch.float32, torch.float64):
        mean = torch.tensor([[-300.0, 60.0], [9.0, -20.0]], dtype=dtype, requires_grad=True)
        log_std = torch.tensor([[-5.0, 2.0], [2.0, 0.0]], dtype=dtype, requires_grad=True)
        actions, logps = sac.squashed_sample(mean, log_std, torch.ones(2, 2, dtype=dtype), bound=2.0)
        (actions.sum() + logps.sum()).backward()
        assert logps.dtype == dtype and (actions.abs() <= 2).all()
        for x in (actions, logps, mean.grad, log_std.grad):
            assert x.isfinite().all()
        u = (mean + log_std.exp()).detach().double()
        slope = 2 * math.log(2.0) - 2 * u.abs()  # log(1 - tanh^2) far out
        expected = -0.5 - log_std.double() - 0.5 * math.log(2 * math.pi) - slope - math.log(2.0)
        assert_close(logps.double(), expected.sum(-1).detach(), rtol=1e-5, atol=1e-4)


def check_the_sample_is_differentiable(sac):
    inputs = [x.requires_grad_() for x in normal(2, 5, 2, seed=2)]
    noise = normal(5, 2, seed=3)
    assert torch.autograd.gradcheck(lambda m, s: sac.squashed_sample(m, s, noise, bound=2.0), inputs)


def check_targets_one_by_one(sac):
    rewards, logps = normal(2, 12, seed=4)
    next_q = normal(3, 12, seed=5).requires_grad_()
    terminated = torch.arange(12) % 3 == 0
    for alpha, gamma in ((0.2, 0.9), (torch.tensor(1.5), 1.0), (0.0, 0.99), (0.7, 0.0)):
        found = sac.sac_targets(rewards, next_q, logps, terminated, alpha=alpha, gamma=gamma)
        assert not found.requires_grad
        for i in range(12):
            low = min(next_q[e, i].item() for e in range(3))
            soft = 0.0 if terminated[i] else low - float(alpha) * logps[i].item()
            assert found[i].item() == pytest.approx(rewards[i].item() + gamma * soft)
    # What lies beyond a final state never matters.
    wild = torch.where(terminated, torch.inf, next_q.detach())
    assert_close(sac.sac_targets(rewards, wild, logps, terminated, alpha=alpha, gamma=gamma), found)


def check_losses_one_by_one(sac):
    q_values, targets = normal(2, 7, seed=6).requires_grad_(), normal(7, seed=7).requires_grad_()
    loss = sac.critic_loss(q_values, targets)
    expected = sum(0.5 * (q_values[e, i] - targets[i]) ** 2 / 7 for e in range(2) for i in range(7))
    assert loss.item() == pytest.approx(expected.item())
    loss.backward()
    assert targets.grad is None
    assert_close(q_values.grad, (q_values - targets).detach() / 7)
    logps, log_alpha = normal(7, seed=8).requires_grad_(), torch.tensor(-0.4).double().requires_grad_()
    q_values = q_values.detach().requires_grad_()
    loss = sac.actor_loss(logps, q_values, alpha=log_alpha.exp())
    low = q_values.min(0).values
    assert loss.item() == pytest.approx((math.exp(-0.4) * logps - low).mean().item())
    assert log_alpha.grad is None and not torch.autograd.grad(loss, log_alpha, allow_unused=True, retain_graph=True)[0]
    loss.backward()
    assert_close(logps.grad, torch.full_like(logps, math.exp(-0.4) / 7))
    assert_close(q_values.grad, -(q_values == low).double() / 7)


def check_too_little_entropy_raises_the_temperature(sac):
    for entropy, target in ((-3.0, -1.0), (0.5, -1.0), (-1.0, -1.0), (-2.0, 0.3)):
        logps = normal(100, seed=9)
        logps = (logps - logps.mean() - entropy).requires_grad_()  # the mean of -log pi is the entropy
        log_alpha = torch.tensor(0.75).double().requires_grad_()
        loss = sac.temperature_loss(log_alpha, logps, target_entropy=target)
        loss.backward()
        assert logps.grad is None
        assert -log_alpha.grad.item() == pytest.approx(target - entropy, abs=1e-12)  # up if entropy < target
        assert loss.item() == pytest.approx(0.75 * (entropy - target), abs=1e-12)


def soft_optimum(mdp, alpha, gamma):
    """Soft value iteration, written out: V = alpha log sum exp(Q / alpha)."""
    live = (~mdp.terminal).double()
    values = torch.zeros(len(live), dtype=torch.float64)
    for _ in range(300):
        q_values = live[:, None] * (mdp.expected_rewards + gamma * mdp.transitions @ values)
        values = live * alpha * torch.logsumexp(q_values / alpha, -1)
    return q_values, values


def grid(seed=0):
    """Five states and a final one that can be reached from all."""
    mdp = mdps.random_mdp(6, 3, seed=seed)
    transitions, rewards = mdp.transitions.clone(), mdp.rewards.clone()
    transitions[-1], rewards[-1] = 0.0, 0.0
    transitions[-1, :, -1] = 1.0
    return dataclasses.replace(mdp, transitions=transitions, rewards=rewards, terminal=torch.arange(6) == 5)


def check_soft_policy_iteration_reaches_the_softmax_of_soft_q(sac):
    for seed, alpha in ((0, 0.05), (1, 3.0)):
        mdp, gamma = grid(seed), 0.9
        parts = (mdp.transitions, mdp.expected_rewards, mdp.terminal)
        q_values, policy = sac.soft_policy_iteration(*parts, alpha=alpha, gamma=gamma, rounds=40)
        expected, values = soft_optimum(mdp, alpha, gamma)
        assert_close(q_values, expected, atol=1e-8, rtol=1e-8)
        junk = [mdp.transitions.clone(), mdp.expected_rewards.clone(), mdp.terminal]
        junk[0][-1], junk[1][-1] = mdp.transitions[0], 7.0  # what a table says beyond the end never matters
        assert_close(sac.soft_policy_iteration(*junk, alpha=alpha, gamma=gamma, rounds=40)[0], q_values)
        live = ~mdp.terminal
        assert_close(policy[live], ((expected - values[:, None]) / alpha).exp()[live], atol=1e-7, rtol=1e-7)
        last = None
        for rounds in range(1, 5):  # soft policy improvement: no action's soft Q falls
            found, _ = sac.soft_policy_iteration(*parts, alpha=alpha, gamma=gamma, rounds=rounds)
            assert last is None or (found >= last - 1e-9).all()
            last = found


def check_the_limits_of_the_temperature(sac):
    mdp, gamma = grid(3), 0.9
    parts = (mdp.transitions, mdp.expected_rewards, mdp.terminal)
    values = torch.zeros(len(mdp.terminal), dtype=torch.float64)
    for _ in range(600):  # plain value iteration
        plain = (~mdp.terminal).double()[:, None] * (mdp.expected_rewards + gamma * mdp.transitions @ values)
        values = plain.amax(-1)
    q_values, policy = sac.soft_policy_iteration(*parts, alpha=1e-4, gamma=gamma)
    # The entropy is worth at most alpha log A a step.
    assert (q_values - plain).abs().max() <= 1e-4 * math.log(3) * gamma / (1 - gamma) + 1e-9
    live = ~mdp.terminal
    assert torch.equal(policy[live].argmax(-1), plain[live].argmax(-1)) and policy[live].amax(-1).min() > 0.999
    endless = mdps.random_mdp(6, 3, seed=3)  # where nothing ends: else alpha pays for staying alive
    parts = (endless.transitions, endless.expected_rewards, endless.terminal)
    _, policy = sac.soft_policy_iteration(*parts, alpha=1e5, gamma=gamma)
    assert_close(policy, torch.full_like(policy, 1 / 3), atol=1e-3, rtol=0)


def check_alpha_is_beta_with_a_uniform_reference(sac):
    """One step, in the exact world: the soft optimum is that of E[r] - beta KL(pi || uniform), beta = alpha."""
    world = exact.make_world(0)
    count = world.rewards.shape[1]
    uniform = torch.full_like(world.rewards, -math.log(count))
    best = exact.optimal_policy(uniform, world.rewards, 0.3)
    prompts = len(world.rewards)
    transitions = torch.zeros(prompts + 1, count, prompts + 1, dtype=torch.float64)
    transitions[..., -1] = 1.0  # every response ends the episode
    rewards = torch.cat([world.rewards, torch.zeros(1, count)]).double()
    terminal = torch.arange(prompts + 1) == prompts
    _, policy = sac.soft_policy_iteration(transitions, rewards, terminal, alpha=0.3, gamma=1.0)
    assert_close(policy[:-1].log(), best.double(), atol=1e-6, rtol=1e-6)


def check_one_update(sac):
    """Towards the target, away from nothing else: the target nets move by tau, a critic's gradient is its own."""
    agent, batch = agent_of(sac), sample_of()
    before = [p.detach().clone() for p in agent.target_critics.parameters()]
    agent.update(batch, rng(1))
    for old, target, online in zip(before, agent.target_critics.parameters(), agent.critics.parameters(), strict=True):
        assert_close(target, old + agent.settings.tau * (online - old))
        assert target.grad is None
    # At the stepped critics only their own loss may have left a gradient: the actor's would have come on top.
    agent, again = agent_of(sac), agent_of(sac)
    agent.update(batch, rng(1))
    actions, logps = again.sample(batch.after, rng(1))
    soft = again.target_critics(batch.after, actions).amin(0) - 0.3 * logps
    target = (batch.rewards + 0.99 * ~batch.terminated * soft).detach()
    loss = 0.5 * (again.critics(batch.obs, batch.actions) - target).square().mean(-1).sum()
    for p, grad in zip(agent.critics.parameters(), torch.autograd.grad(loss, again.critics.parameters()), strict=True):
        assert_close(p.grad, grad, atol=1e-8, rtol=1e-5)


def check_the_target_entropy_is_of_actions_in_one(sac):
    """Actions twice as large have log 2 more nats; the same nets get the same push on alpha."""
    moves = []
    for bound in (1.0, 2.0, 50.0):
        agent = agent_of(sac, dataclasses.replace(PENDULUM, bound=bound))
        _, logps = agent.sample(sample_of().obs, rng(2))
        moves.append((logps.mean() + agent.target_entropy).item())
    assert moves == pytest.approx([moves[0]] * 3, abs=1e-6)
    assert agent_of(sac).target_entropy == -1.0
    two = agent_of(sac, dataclasses.replace(UNIT, actions=3), entropy=-0.5)
    assert two.target_entropy == pytest.approx(-1.5)


def check_actions_are_within_the_bound(sac):
    agent, obs = agent_of(sac, PENDULUM), 10 * normal(500, 3, seed=10)
    for actions in (agent.act(obs, rng(0)), agent.greedy(obs)):
        assert actions.shape == (500, 1) and (actions.abs() <= 2).all() and actions.abs().max() > 1
    assert torch.equal(agent.greedy(obs), agent.greedy(obs))


def check_the_learner_samples_its_policy(sac):
    """The first half of the net's outputs is the mean, the second the log of the deviation, within [-5, 2]."""
    agent, obs = agent_of(sac, PENDULUM), sample_of().obs
    noise = torch.randn(64, 1, generator=rng(4))
    for raw, log_std in ((-100.0, -5.0), (-1.0, -1.0), (100.0, 2.0)):
        with torch.no_grad():
            agent.policy[-1].weight.zero_()
            agent.policy[-1].bias.copy_(torch.tensor([0.3, raw]))
            u = 0.3 + math.exp(log_std) * noise
            assert_close(agent.act(obs, rng(4)), 2 * u.double().tanh(), atol=1e-6, rtol=1e-6)
            assert_close(agent.greedy(obs), torch.full((64, 1), 2 * math.tanh(0.3)).double())
    weights = agent.critics.weights
    assert all((layer[0] != layer[1]).all() for layer in [*weights, *agent.critics.biases])  # twins start apart
    assert weights[1].abs().max() <= 0.25 and weights[1].mean().abs() < 0.03  # as torch draws a layer of 16 inputs
    assert weights[1].std().item() == pytest.approx(48**-0.5, rel=0.1)


def check_the_clock_does_not_end_the_future(sac):
    """-1 / (1 - gamma) = -5 where only the clock cuts episodes off, -1 where they end."""
    assert learned_value(sac, False, steps=35, alpha=1e-4) == pytest.approx(-5.0, abs=0.8)
    assert learned_value(sac, True, steps=35, alpha=1e-4) == pytest.approx(-1.0, abs=0.3)


def check_it_learns_to_push_where_it_pays(sac):
    for sign in (-1, 1):
        assert sign * learned_torque(sac, sign, alpha=0.1) > 1.5


def check_bad_input_is_named(sac):
    x, one = torch.zeros(3, 2), torch.zeros(3)
    with pytest.raises(ValueError, match=r"\(3, 2\), \(3, 2\), \(3, 1\)"):
        sac.squashed_sample(x, x, x[:, :1])
    for bound in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="bound must be positive"):
            sac.squashed_sample(x, x, x, bound=bound)
    for wrong in ((one, one, one, one), (one, x, one, one), (one[:2], x.T, one, one), (one, x.T, one, one[:1])):
        with pytest.raises(ValueError, match=r"want \(E, B\)"):
            sac.sac_targets(*wrong, alpha=0.1, gamma=0.9)
    mdp = grid()
    for options in ({"alpha": 0.0}, {"alpha": math.nan}, {"alpha": 0.1, "rounds": 0}):
        with pytest.raises(ValueError, match="alpha and rounds must be positive"):
            sac.soft_policy_iteration(mdp.transitions, mdp.expected_rewards, mdp.terminal, gamma=0.9, **options)
    with pytest.raises(ValueError, match="alpha must be positive"):
        agent_of(sac, alpha=-0.1)


# Stable-Baselines3


def baseline(agent, **options):
    """SB3's SAC with the agent's weights, in float64; what it samples is decided by `noise`."""
    k = agent.settings
    model = peer("SAC", agent, ent_coef=f"auto_{k.alpha}", **options)
    model.actor.action_dist.epsilon = 0.0  # 1e-6 inside its logarithm of 1 - tanh^2
    model.log_ent_coef.data = agent.log_alpha.data.clone().reshape(1)
    actor = model.actor
    layers = [agent.policy[0], agent.policy[2]]
    for ours, theirs in zip(layers, [actor.latent_pi[0], actor.latent_pi[2]], strict=True):
        theirs.load_state_dict(ours.state_dict())
    head = agent.policy[4]
    for part, (theirs, rows) in enumerate(((actor.mu, head.weight[:1]), (actor.log_std, head.weight[1:]))):
        theirs.weight.data, theirs.bias.data = rows.data.clone(), head.bias.data[part : part + 1].clone()
    copy_critics(agent.critics, model.critic)
    copy_critics(agent.target_critics, model.critic_target)
    return model


def critics_differ(ours, theirs):
    worst = 0.0
    for e, net in enumerate(theirs.q_networks):
        for i, layer in enumerate((net[0], net[2], net[4])):
            worst = max(worst, (layer.weight.T - ours.weights[i][e]).abs().max().item())
            worst = max(worst, (layer.bias - ours.biases[i][e, 0]).abs().max().item())
    return worst


def difference_from_sb3(module, updates=3):
    """The largest difference of any weight, or log alpha, after some updates on the same samples and noise."""
    agent = agent_of(module)
    model = baseline(agent)
    queue = []

    def action_log_prob(obs):
        mean, log_std, _ = model.actor.get_action_dist_params(obs)
        law = model.actor.action_dist.proba_distribution(mean, log_std)
        u = mean + log_std.exp() * queue.pop(0)
        return torch.tanh(u), law.log_prob(torch.tanh(u), u)

    model.actor.action_log_prob = action_log_prob
    for step in range(updates):
        batch, g = sample_of(seed=step), rng(step)
        after, now = torch.randn(64, 1, generator=g), torch.randn(64, 1, generator=g)
        queue[:] = [now, after]
        feed(model, batch)
        model.train(1, 64)
        agent.update(batch, rng(step))
    worst = [critics_differ(agent.critics, model.critic), critics_differ(agent.target_critics, model.critic_target)]
    worst.append((agent.log_alpha - model.log_ent_coef).abs().item())
    pairs = [(agent.policy[0], model.actor.latent_pi[0]), (agent.policy[2], model.actor.latent_pi[2])]
    worst += [(a.weight - b.weight).abs().max().item() for a, b in pairs]
    worst.append((agent.policy[4].weight[0] - model.actor.mu.weight[0]).abs().max().item())
    worst.append((agent.policy[4].weight[1] - model.actor.log_std.weight[0]).abs().max().item())
    return max(worst)


def check_the_updates_of_stable_baselines3(sac):
    assert difference_from_sb3(sac) < 1e-9


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]
SLOW = ("check_the_density", "check_the_updates", "check_the_limits", "check_soft")
LAST = ("check_the_clock", "check_it_learns")  # they train
CHECKS.sort(key=lambda check: (check.__name__.startswith(LAST), check.__name__.startswith(SLOW)))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_functions(check):
    check(original)


SOFT = "soft = next_q.amin(0) - alpha * next_logps"
MISTAKES = {
    "maximum of the critics": (SOFT, "soft = next_q.amax(0) - alpha * next_logps"),
    "mean of the critics": (SOFT, "soft = next_q.mean(0) - alpha * next_logps"),
    "entropy is punished": (SOFT, "soft = next_q.amin(0) + alpha * next_logps"),
    "no entropy in the target": (SOFT, "soft = next_q.amin(0)"),
    "terminated ignored": ("torch.where(terminated.bool(), 0.0, soft)", "soft"),
    "only terminated bootstraps": ("terminated.bool(), 0.0, soft", "terminated.bool(), soft, 0.0"),
    "no discount": ("return (rewards + gamma * torch.where", "return (rewards + torch.where"),
    "gradient into the target": ("soft)).detach()", "soft))"),
    "alpha's gradient in the actor": ("torch.as_tensor(alpha).detach()", "torch.as_tensor(alpha)"),
    "actor minimises Q": ("(alpha * logps - q_values.amin(0))", "(alpha * logps + q_values.amin(0))"),
    "actor avoids entropy": ("(alpha * logps - q_values.amin(0))", "(-alpha * logps - q_values.amin(0))"),
    "actor takes the larger critic": ("logps - q_values.amin(0)).mean()", "logps - q_values.amax(0)).mean()"),
    "alpha the wrong way": ("return -log_alpha * (logps", "return log_alpha * (logps"),
    "target entropy's sign": ("logps.detach().mean() + target_entropy", "logps.detach().mean() - target_entropy"),
    "alpha's loss trains the policy": ("(logps.detach().mean()", "(logps.mean()"),
    "no correction for tanh": ("* math.log(2 * math.pi) - log_slope", "* math.log(2 * math.pi)"),
    "correction added": ("* math.log(2 * math.pi) - log_slope", "* math.log(2 * math.pi) + log_slope"),
    "bound left out": (" + math.log(bound)\n    logps", "\n    logps"),
    "softplus's sign": ("softplus(-2 * u)", "softplus(2 * u)"),
    "naive log": ("2 * (math.log(2) - u - softplus(-2 * u))", "(1 - u.tanh().square()).log()"),
    "std for its log": ("- log_std - 0.5", "- log_std.exp() - 0.5"),
    "no 2 pi": ("- 0.5 * math.log(2 * math.pi)", ""),
    "no reparametrisation": ("u = mean + log_std.exp() * noise", "u = (mean + log_std.exp() * noise).detach()"),
    "critics' mean for their sum": (".square().mean(-1).sum()", ".square().mean()"),
    "no half": ("return 0.5 * (q_values", "return (q_values"),
    "target entropy without the bound": ("settings.entropy + math.log(task.bound)", "settings.entropy"),
    "target entropy of one dimension": ("= task.actions * (settings.entropy", "= (settings.entropy"),
    "tau reversed": ("track(*self.nets, self.settings.tau)", "track(*self.nets, 1 - self.settings.tau)"),
    "critics track the target": ("track(*self.nets,", "track(*self.nets[::-1],"),
    "actor trains the critics": ("loss.backward(inputs=self.weights)", "loss.backward()"),
    "online critics in the target": ("rewards, self.target_critics(", "rewards, self.critics("),
    "target at the old state": ("self.sample(sample.after, generator)", "self.sample(sample.obs, generator)"),
    "actor on stored actions": ("self.critics(sample.obs, actions)  #", "self.critics(sample.obs, sample.actions)  #"),
    "soft iteration without entropy": ("(policy * rewards).sum(-1) + alpha * entropy", "(policy * rewards).sum(-1)"),
    "soft iteration with alpha for 1 / alpha": ("(q_values / alpha).softmax", "(q_values * alpha).softmax"),
    "entropy earned past the end": ("gain = live * (", "gain = ("),
    "shapes unchecked": ("if next_q.dim() != 2 or", "if False and"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    """Each deliberate mistake makes at least one check fail."""
    module = load_mutant(PATH, *MISTAKES[mistake])
    assert any(caught_by(module, [check]) for check in CHECKS)  # the first that fails will do


@pytest.mark.evidence
def test_agrees_with_stable_baselines3(evidence):
    evidence(
        NAME,
        "Largest difference from Stable-Baselines3 after 3 updates",
        value=difference_from_sb3(original),
        bar=1e-9,
        note="Weights of actor, critics and targets, and log α, in float64, on the same samples and noise. "
        "The 1e-6 inside Stable-Baselines3's logarithm is set to 0.",
    )


# What it does.


def test_the_entropy_bonus_moves_a_terminating_task():
    """Stay for 0 a step or leave for +0.5: alpha's pay for every further choice makes staying the better end."""
    transitions = torch.zeros(2, 2, 2, dtype=torch.float64)
    transitions[0, 0, 0] = transitions[0, 1, 1] = transitions[1, :, 1] = 1.0
    rewards = torch.tensor([[0.0, 0.5], [0.0, 0.0]]).double()
    terminal = torch.tensor([False, True])
    for alpha, stays in ((0.01, False), (0.5, True)):
        _, policy = original.soft_policy_iteration(transitions, rewards, terminal, alpha=alpha, gamma=0.95)
        assert (policy[0, 0] > 0.5).item() == stays
    _, policy = original.soft_policy_iteration(transitions, rewards, terminal, alpha=1e4, gamma=0.95)
    assert policy[0, 0] > 0.85  # and not the half of a uniform policy


def test_log_alpha_and_alpha_rest_at_the_same_place():
    """The two losses have gradients of one sign, alpha apart; only the speed differs."""
    logps = normal(100, seed=11) + 0.7
    for start in (1e-3, 0.5, 20.0):
        log_alpha = torch.tensor(start).double().log().requires_grad_()
        original.temperature_loss(log_alpha, logps, target_entropy=-1.0).backward()
        other = torch.tensor(start).double().log().requires_grad_()
        (-other.exp() * (logps.mean() - 1.0)).backward()  # equation 18 of Haarnoja et al. 2018b
        assert other.grad.item() == pytest.approx(start * log_alpha.grad.item())


@torch.no_grad()
def mean_return(policy, seed, episodes=64):
    """Of fresh episodes in the tensor environment, which costs little; what a run ends with is judged in Gymnasium."""
    state = (2 * torch.rand(episodes, 2, generator=rng(seed)) - 1) * torch.tensor(PENDULUM.spread)
    total = torch.zeros(episodes)
    for _ in range(PENDULUM.limit):
        state, rewards, _ = PENDULUM.step(state, policy(PENDULUM.observe(state)))
        total += rewards
    return total.mean().item()


def watched():
    """SAC that keeps, for each update, alpha and the mean of -log pi, and its mean return every 400."""

    class Watched(original.learner()):
        def __init__(self, task, settings):
            super().__init__(task, settings)
            self.log, self.curve = [], []

        def update(self, sample, generator):
            super().update(sample, generator)
            self.log.append((self.log_alpha.exp().item(), self.entropy))
            if len(self.log) % 400 == 0:
                steps = len(self.log) + self.settings.warmup * self.settings.envs  # one update for a step
                self.curve.append((steps, mean_return(self.greedy, 10_000 * self.settings.seed + len(self.log))))

        def sample(self, obs, generator):
            actions, logps = super().sample(obs, generator)
            self.entropy = -logps.mean().item()  # an update draws last at the states of its batch
            return actions, logps

    return Watched


@pytest.mark.evidence
def test_learns_pendulum(evidence):
    """A mean return of -200 or more, the entropy at its target."""
    made, seeds = watched(), SEEDS
    if not evidence.full:  # no more than that it runs: that it learns, `check_it_learns_to_push_where_it_pays` sees
        settings = made.Settings(steps=9, warmup=1, updates=50, batch=16)
        agent = loop.train_off_policy(PENDULUM, made, settings, judge=False).agent
        assert len(agent.log) == 400 and agent.curve[0][0] == 408 and -2000 < agent.curve[0][1] < 0
        return
    runs = [loop.train_off_policy(PENDULUM, made, made.Settings(seed=seed, steps=500), judge=False) for seed in seeds]
    ends = [loop.evaluate(PENDULUM, run.agent.greedy, episodes=20, seed=9_000).mean().item() for run in runs]
    evidence(
        NAME,
        "Pendulum: mean return after 4,000 environment steps",
        value=statistics.mean(ends),
        bar=-200.0,
        better=">=",
        seeds=seeds,
        spread=ends,
        note="The greedy policy in Gymnasium, the same 20 episodes for each run.",
        curve={
            "x": [x for x, _ in runs[0].agent.curve],
            "y": {"SAC": [[mean for _, mean in run.agent.curve] for run in runs]},
            "xlabel": "environment steps",
            "ylabel": "mean return",
        },
    )
    solved = [next((x for x, mean in run.agent.curve if mean >= -200), 10**6) for run in runs]
    evidence(
        NAME,
        "Pendulum: environment steps to -200, median",
        value=statistics.median(solved),
        seeds=seeds,
        spread=solved,
        note="Seen every 400 steps, over 64 episodes of the tensor environment.",
    )
    target = runs[0].agent.target_entropy
    gaps = [statistics.mean(entropy for _, entropy in run.agent.log[-400:]) - target for run in runs]
    thin = slice(None, None, 40)
    evidence(
        NAME,
        "Distance of the entropy from its target, mean of the last 400 updates",
        value=max(abs(gap) for gap in gaps),
        bar=0.15,
        unit="nats",
        seeds=seeds,
        spread=gaps,
        note="The furthest run; the mean of -log π over the batches. The target is log 2 - 1 nats, of torques up to 2.",
        curve={
            "x": list(range(len(runs[0].agent.log)))[thin],
            "y": {
                "α": [[a for a, _ in run.agent.log][thin] for run in runs],
                "entropy": [[h for _, h in run.agent.log][thin] for run in runs],
            },
            "xlabel": "updates",
            "ylabel": "nats",
        },
    )
