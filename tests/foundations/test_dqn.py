"""DQN: targets and losses against loops, finite differences and Stable-Baselines3; Q-learning and value iteration as
special cases; CartPole; and broken copies."""

import dataclasses
import math
import statistics

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from snippets.foundations import dqn as original
from snippets.foundations import loop
from snippets.worlds import mdps
from snippets.worlds.classic import CARTPOLE, PENDULUM, evaluate
from tests.mutation import caught_by, load_mutant

torch.set_num_threads(1)
PATH = "snippets/foundations/dqn.py"
NAME = "foundations/dqn"
SEEDS = [0, 1, 2, 3, 4]
FRESH = list(range(100, 110))  # not those that the settings were chosen on
B, A = 40, 5


def rng(seed):
    return torch.Generator().manual_seed(seed)


def random(seed, *shape):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def a_batch():
    """rewards, terminated (B,), the q_values of two networks at s' (B, A)."""
    return random(0, B), random(1, B) > 0.5, random(2, B, A), random(3, B, A)


# The formulas. Each check takes the module, so that broken copies can be put to it.


def check_targets_in_loops(dqn):
    rewards, terminated, online, target = a_batch()
    for gamma in (1.0, 0.9, 0.0):
        plain = dqn.dqn_targets(rewards, target, terminated, gamma=gamma)
        double = dqn.double_dqn_targets(rewards, online, target, terminated, gamma=gamma)
        assert plain.shape == double.shape == (B,) and plain.dtype == double.dtype == torch.float64
        for i in range(B):
            best = max(range(A), key=lambda a: online[i, a].item())
            for found, value in ((plain, max(target[i].tolist())), (double, target[i, best].item())):
                expected = rewards[i].item() + (0.0 if terminated[i] else gamma * value)
                assert found[i].item() == pytest.approx(expected, abs=1e-12)


def check_double_with_one_network_is_dqn_and_with_two_never_more(dqn):
    rewards, terminated, online, target = a_batch()
    plain = dqn.dqn_targets(rewards, target, terminated, gamma=0.9)
    assert_close(dqn.double_dqn_targets(rewards, target, target, terminated, gamma=0.9), plain)
    double = dqn.double_dqn_targets(rewards, online, target, terminated, gamma=0.9)
    assert (double <= plain).all() and (double < plain).any()


def check_what_lies_beyond_the_end_never_matters(dqn):
    rewards, terminated, online, target = a_batch()
    for junk in (math.nan, math.inf, -math.inf):
        dirty = target.masked_fill(terminated.unsqueeze(-1), junk)
        for found in (
            dqn.dqn_targets(rewards, dirty, terminated, gamma=0.9),
            dqn.double_dqn_targets(rewards, online, dirty, terminated, gamma=0.9),
        ):
            assert torch.isfinite(found).all() and torch.equal(found[terminated], rewards[terminated])
    assert_close(
        dqn.dqn_targets(rewards, target, terminated.double(), gamma=0.9),  # 0 and 1 do as well
        dqn.dqn_targets(rewards, target, terminated, gamma=0.9),
    )


def check_targets_carry_no_gradient(dqn):
    rewards, terminated, online, target = a_batch()
    online, target = online.requires_grad_(), target.requires_grad_()
    assert not dqn.dqn_targets(rewards, target, terminated, gamma=0.9).requires_grad
    assert not dqn.double_dqn_targets(rewards, online, target, terminated, gamma=0.9).requires_grad
    loss = dqn.dqn_loss(online, torch.zeros(B, dtype=torch.long), (y := random(4, B).requires_grad_()))
    loss.backward()
    assert y.grad is None and online.grad is not None


def check_dueling(dqn):
    """The mean of Q over the actions is V; a constant in the advantages changes nothing; the order of the actions is
    that of the advantages; and without the mean V and A could not be told apart."""
    values, advantages = random(5, B), random(6, B, A)
    q = dqn.dueling(values, advantages)
    assert q.shape == (B, A)
    assert_close(q.mean(-1), values)
    assert_close(dqn.dueling(values, advantages + random(7, B, 1)), q)
    assert_close(q - q[:, :1], advantages - advantages[:, :1])
    for b in range(B):
        for a in range(A):
            expected = values[b] + advantages[b, a] - sum(advantages[b]) / A
            assert q[b, a].item() == pytest.approx(expected.item(), abs=1e-12)


def check_the_loss_is_hubers(dqn):
    q, actions, y = 3 * random(8, B, A), torch.arange(B) % A, random(9, B)
    chosen = torch.stack([q[i, a] for i, a in enumerate(actions.tolist())])
    for huber in (0.1, 1.0, 7.0):
        assert_close(dqn.dqn_loss(q, actions, y, huber=huber), nn.functional.huber_loss(chosen, y, delta=huber))
    assert_close(dqn.dqn_loss(q, actions, y), nn.functional.smooth_l1_loss(chosen, y))
    half = 0.5 * ((chosen - y) ** 2).mean()
    assert_close(dqn.dqn_loss(q, actions, y, huber=math.inf), half)


def check_the_gradient_of_the_loss(dqn):
    """Finite differences; zero for the actions not taken; no row pulls harder than huber / B."""
    q, actions, y = (3 * random(10, 6, 3)).requires_grad_(), torch.tensor([0, 2, 1, 1, 0, 2]), random(11, 6)
    for huber in (0.7, math.inf):
        (gradient,) = torch.autograd.grad(dqn.dqn_loss(q, actions, y, huber=huber), q)
        for i in range(6):
            for a in range(3):
                move = torch.zeros(6, 3, dtype=torch.float64)
                move[i, a] = 1e-6
                up, down = (dqn.dqn_loss(q.detach() + s * move, actions, y, huber=huber) for s in (1, -1))
                assert gradient[i, a].item() == pytest.approx(((up - down) / 2e-6).item(), abs=1e-7)
        taken = torch.nn.functional.one_hot(actions, 3).bool()
        assert not gradient[~taken].any() and (gradient[taken] != 0).all()
        errors = q.detach().gather(1, actions.unsqueeze(-1)).squeeze(-1) - y
        assert_close(gradient[taken], errors.clamp(-huber, huber) / 6)


def check_rows_do_not_touch_each_other(dqn):
    rewards, terminated, online, target = a_batch()
    order = torch.randperm(B, generator=rng(12))
    for function in (
        lambda i: dqn.dqn_targets(rewards[i], target[i], terminated[i], gamma=0.9),
        lambda i: dqn.double_dqn_targets(rewards[i], online[i], target[i], terminated[i], gamma=0.9),
        lambda i: dqn.dueling(rewards[i], online[i]),
    ):
        assert_close(function(order), function(torch.arange(B))[order])


def check_epsilon_falls_in_a_straight_line(dqn):
    go = lambda step: dqn.epsilon_at(step, first=0.9, last=0.1, decay=200)  # noqa: E731
    assert [go(s) for s in (0, 50, 100, 200, 10_000)] == pytest.approx([0.9, 0.7, 0.5, 0.1, 0.1])


def check_epsilon_greedy(dqn):
    """20,000 draws: the best action with probability 1 - epsilon + epsilon / A, each other one with epsilon / A."""
    n, q = 20_000, torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    for epsilon in (0.0, 0.3, 1.0):
        actions = dqn.epsilon_greedy(q.expand(n, 4), epsilon, rng(13))
        for a in range(4):
            p = epsilon / 4 + (1 - epsilon) * (a == 1)
            share = (actions == a).double().mean().item()
            assert abs(share - p) <= 4 * (p * (1 - p) / n) ** 0.5
    assert torch.equal(
        dqn.epsilon_greedy(q.expand(50, 4), 0.5, rng(1)), dqn.epsilon_greedy(q.expand(50, 4), 0.5, rng(1))
    )


def check_bad_input_is_named(dqn):
    rewards, terminated, online, target = a_batch()
    one = torch.zeros(B, dtype=torch.long)
    cases = [
        (lambda: dqn.dqn_targets(rewards[:3], target, terminated, gamma=0.9), r"rewards \(3,\).*\(40,\)"),
        (lambda: dqn.dqn_targets(rewards, target, terminated[:1], gamma=0.9), r"terminated \(1,\)"),
        (lambda: dqn.dqn_targets(rewards, target[None], terminated, gamma=0.9), r"want \(B,\)"),
        (
            lambda: dqn.dqn_targets(rewards, target[:, 0], terminated, gamma=0.9),
            r"rewards \(40,\), next_q_values \(40,\); want \(B,\) and \(B, A\)",
        ),
        (lambda: dqn.dqn_targets(rewards[:, None], target, terminated[:, None], gamma=0.9), r"rewards \(40, 1\)"),
        (lambda: dqn.dqn_targets(rewards, target, terminated, gamma=1.1), "gamma must lie in .*got 1.1"),
        (lambda: dqn.dqn_targets(rewards, target, terminated, gamma=math.nan), "got nan"),
        (
            lambda: dqn.double_dqn_targets(rewards, online[:, :2], target, terminated, gamma=0.9),
            r"online \(40, 2\), target \(40, 5\)",
        ),
        (
            lambda: dqn.double_dqn_targets(rewards, online[:, 0], target[:, 0], terminated, gamma=0.9),
            r"online \(40,\), target \(40,\)",
        ),
        (lambda: dqn.dqn_loss(online, one, rewards, huber=math.nan), "got nan"),
        (lambda: dqn.dqn_loss(online[:, 0], one, rewards), r"q_values \(40,\)"),
        (lambda: dqn.dqn_loss(online, one[:3], rewards[:3]), r"q_values \(40, 5\), actions \(3,\)"),
        (lambda: dqn.epsilon_at(1, first=1.5, last=0.9, decay=5), "first=1.5"),
        (lambda: dqn.epsilon_at(1, first=0.5, last=-0.1, decay=5), "last=-0.1"),
        (lambda: dqn.dueling(rewards[:2], online), r"values \(2,\), advantages \(40, 5\)"),
        (lambda: dqn.dueling(rewards, rewards), r"want \(B,\) and \(B, A\)"),
        (lambda: dqn.dqn_loss(online, one[:4], rewards), r"q_values \(40, 5\), actions \(4,\), targets \(40,\)"),
        (lambda: dqn.dqn_loss(online, one, rewards[:, None]), r"targets \(40, 1\); want"),
        (lambda: dqn.dqn_loss(online, one, rewards, huber=0.0), "huber must be positive, got 0.0"),
        (lambda: dqn.epsilon_at(1, first=0.1, last=0.9, decay=5), "first=0.1, last=0.9, decay=5"),
        (lambda: dqn.epsilon_at(1, first=0.9, last=0.1, decay=0), "decay=0"),
        (lambda: dqn.DQN(PENDULUM, dqn.learner().Settings()), "Pendulum-v1 has no finite set of actions"),
    ]
    for function, message in cases:
        with pytest.raises(ValueError, match=message):
            function()


# The learner.


def a_sample(seed=0, size=32):
    g = rng(seed)
    obs, after = torch.randn(size, 4, generator=g), torch.randn(size, 4, generator=g)
    actions, rewards = torch.randint(2, (size,), generator=g), torch.randn(size, generator=g)
    return loop.Sample(obs, actions, rewards, after, torch.rand(size, generator=g) < 0.3)


def a_learner(dqn, **options):
    settings = dqn.learner().Settings(**dict(hidden=16, tau=0.25) | options)
    torch.manual_seed(5)
    agent = dqn.learner()(CARTPOLE, settings)
    g = rng(6)
    with torch.no_grad():  # so that target and online network differ
        for p in agent.online.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=g))
    return agent


def weights_of(net):
    return torch.cat([p.detach().flatten().clone() for p in net.parameters()])


def check_an_update_is_one_step_on_the_loss(dqn):
    """Against the method's equations written with torch.nn only: targets by the target network, double and dueling
    where set, one step of Adam on the online network; then the target moves by tau."""
    for double in (False, True):
        for duel in (False, True):
            agent = a_learner(dqn, double=double, duel=duel, gamma=0.8, huber=0.5, lr=1e-2)
            start = weights_of(agent.target)
            sample = a_sample()
            units = sample.obs.std(0)  # of the first sample, the warm-up's

            def q(net, obs, duel=duel, units=units):
                out = net.head(net.body(obs / units))
                return out[:, 2:] + out[:, :2] - out[:, :2].mean(-1, keepdim=True) if duel else out

            target, online = q(agent.target, sample.after).detach(), q(agent.online, sample.after).detach()
            assert not torch.equal(target.argmax(-1), online.argmax(-1))
            best = (online if double else target).argmax(-1)
            y = sample.rewards + 0.8 * (1 - sample.terminated.float()) * target[torch.arange(32), best]
            chosen = q(agent.online, sample.obs)[torch.arange(32), sample.actions]
            loss = nn.functional.huber_loss(chosen, y, delta=0.5)
            gradients = torch.autograd.grad(loss, list(agent.online.parameters()))
            expected = []
            for p, g in zip(agent.online.parameters(), gradients, strict=True):  # Adam's first step
                expected.append((p.detach() - 1e-2 * g / (g.abs() + 1e-8)).flatten())
            agent.update(sample, rng(0))
            assert_close(weights_of(agent.online), torch.cat(expected), rtol=0, atol=2e-5)
            assert_close(weights_of(agent.target), 0.75 * start + 0.25 * weights_of(agent.online))
            assert all(not p.requires_grad for p in agent.target.parameters())
            later = dataclasses.replace(a_sample(1), obs=10 * a_sample(1).obs)
            agent.update(later, rng(0))
            assert_close(agent.online(sample.obs), q(agent.online, sample.obs))  # the units stay
            copy = dqn.QNetwork(4, 2, 16, duel=duel)  # a saved network holds its units
            copy.load_state_dict(agent.online.state_dict())
            assert torch.equal(copy(sample.obs), agent.online(sample.obs))


def check_the_target_starts_as_a_copy(dqn):
    agent = dqn.learner()(CARTPOLE, dqn.learner().Settings(hidden=8))
    assert torch.equal(weights_of(agent.online), weights_of(agent.target))
    obs = torch.randn(3, 4, generator=rng(0))
    assert torch.equal(agent.online(obs), agent.target(obs)) and agent.online(obs).shape == (3, 2)
    first, second = agent.online.body[0], agent.online.body[2]
    assert_close(agent.online(obs), agent.online.head(second(first(obs).relu()).relu()))


def check_the_units_are_the_spread_of_the_first_batch(dqn):
    """And 1 for an observation that never changes."""
    agent, sample = a_learner(dqn), a_sample()
    obs = sample.obs * torch.tensor([0.0, 1e-3, 1.0, 50.0])
    agent.update(dataclasses.replace(sample, obs=obs), rng(0))
    assert_close(agent.online.units, torch.where(torch.arange(4) == 0, 1.0, obs.std(0)))


def check_acting_explores_less_and_less(dqn):
    """And judged actions keep the last epsilon, from dice of their own."""
    agent, obs = a_learner(dqn, epsilon=0.2, decay=50), torch.randn(1, 4, generator=rng(1)).expand(8000, 4)
    best = agent.online(obs[:1]).argmax(-1)

    def others(actions):
        return (actions != best).double().mean().item()

    g, shares = rng(2), []
    for _ in range(80):
        shares.append(others(agent.act(obs, g)))
    for step, expected in ((1, 0.5), (25, 0.3), (50, 0.1), (80, 0.1)):
        assert abs(shares[step - 1] - expected) < 0.03
    state = g.get_state()
    assert abs(others(agent.greedy(obs)) - 0.1) < 0.02 and torch.equal(state, g.get_state())
    assert not torch.equal(agent.greedy(obs), agent.greedy(obs))
    agent = a_learner(dqn, epsilon=0.0, decay=2)
    assert abs(others(agent.act(obs, g)) - 0.25) < 0.03 and others(agent.act(obs, g)) == 0
    judged = [a_learner(dqn, epsilon=1.0, seed=seed).greedy(obs) for seed in (0, 1, 1)]
    assert torch.equal(judged[1], judged[2]) and not torch.equal(judged[0], judged[1])


# Special cases with exact answers.


class Table(nn.Module):
    """One-hot features: a network that is a table."""

    def __init__(self, states, actions):
        super().__init__()
        self.q = nn.Parameter(torch.zeros(states, actions, dtype=torch.float64))


def every_step(mdp):
    """Each state that is no end with each action and each outcome: s, a, r, s', terminated, chance."""
    s, a, t = (mdp.transitions > 0).nonzero().T
    kept = ~mdp.terminal[s]
    s, a, t = s[kept], a[kept], t[kept]
    return s, a, mdp.rewards[s, a, t], t, mdp.terminal[t], mdp.transitions[s, a, t]


def optimal_q(mdp):
    """Q* by policy iteration: linear solves, no max over samples."""
    S, actions = mdp.transitions.shape[:2]
    policy, rows = torch.zeros(S, dtype=torch.long), torch.arange(S)
    for _ in range(100):
        keep = (~mdp.terminal).double().unsqueeze(-1)
        system = torch.eye(S, dtype=torch.float64) - mdp.gamma * keep * mdp.transitions[rows, policy].double()
        values = torch.linalg.solve(system, mdp.expected_rewards[rows, policy].double() * keep.squeeze(-1))
        q = mdp.expected_rewards + mdp.gamma * mdp.transitions @ (values * keep.squeeze(-1))
        if torch.equal(q.argmax(-1), policy):
            return q * keep
        policy = q.argmax(-1)
    raise AssertionError("policy iteration did not end")


def lake():
    return mdps.from_gymnasium("FrozenLake-v1", gamma=0.9, is_slippery=False)


def check_one_sample_and_one_hot_features_are_q_learning(dqn):
    """The step of gradient descent on half the squared error is Q(s, a) += alpha * (y - Q(s, a)), for 500 random steps
    through FrozenLake, ends included."""
    mdp = lake()
    s, a, r, t, over, _ = every_step(mdp)
    net, table = Table(*mdp.transitions.shape[:2]), {}
    optimizer, g = torch.optim.SGD(net.parameters(), lr=0.3), rng(3)
    for i in torch.randint(len(s), (500,), generator=g):
        row = slice(i, i + 1)
        y = dqn.dqn_targets(r[row].double(), net.q[t[row]], over[row], gamma=0.9)
        optimizer.zero_grad()
        dqn.dqn_loss(net.q[s[row]], a[row], y, huber=math.inf).backward()
        optimizer.step()
        key, next_state = (s[i].item(), a[i].item()), t[i].item()
        ahead = 0.0 if over[i] else max(table.get((next_state, b), 0.0) for b in range(4))
        table[key] = table.get(key, 0.0) + 0.3 * (r[i].item() + 0.9 * ahead - table.get(key, 0.0))
    for (state, action), value in table.items():
        assert net.q[state, action].item() == pytest.approx(value, abs=1e-12)
    assert net.q.abs().max() > 0.1


def fitted(dqn, mdp, rounds, double=False):
    """Fitted Q iteration: targets by a frozen copy, an exact fit, the next copy."""
    s, a, r, t, over, chance = every_step(mdp)
    target = torch.zeros(mdp.transitions.shape[:2], dtype=torch.float64)
    for _ in range(rounds):
        if double:
            y = dqn.double_dqn_targets(r.double(), target[t], target[t], over, gamma=mdp.gamma)
        else:
            y = dqn.dqn_targets(r.double(), target[t], over, gamma=mdp.gamma)
        fit = torch.zeros_like(target)
        fit.index_put_((s, a), chance.double() * y, accumulate=True)  # least squares with one-hot features
        target = fit
    return target


def check_with_a_table_dqn_finds_the_optimal_values(dqn):
    for mdp in (lake(), mdps.from_gymnasium("FrozenLake-v1", gamma=0.95), mdps.random_mdp(12, 3, seed=1, gamma=0.8)):
        for double in (False, True):
            assert_close(fitted(dqn, mdp, 600, double), optimal_q(mdp).double(), rtol=0, atol=1e-9)


CHECKS = [function for name, function in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_functions(check):
    check(original)


MISTAKES = {
    "a mean for the maximum": ("next_q_values.detach().amax(-1)", "next_q_values.detach().mean(-1)"),
    "a minimum": ("next_q_values.detach().amax(-1)", "next_q_values.detach().amin(-1)"),
    "gradient through the target": ("next_q_values.detach().amax(-1)", "next_q_values.amax(-1)"),
    "gradient through double's target": ("next_q_values.detach().gather", "next_q_values.gather"),
    "double: the target network chooses": ("best = online_q.argmax", "best = next_q_values.argmax"),
    "double: the online network evaluates": ("next_q_values.detach().gather", "online_q.detach().gather"),
    "no end": ("torch.where(terminated.bool(), 0.0, values)", "values"),
    "the end upside down": (
        "torch.where(terminated.bool(), 0.0, values)",
        "torch.where(terminated.bool(), values, 0.0)",
    ),
    "the end as a product": (
        "torch.where(terminated.bool(), 0.0, values)",
        "(1 - terminated.to(values.dtype)) * values",
    ),
    "the reward of the end lost": ("return rewards + gamma *", "return rewards * (1 - terminated.double()) + gamma *"),
    "no discount": ("return rewards + gamma *", "return rewards +"),
    "a negative reward": ("return rewards + gamma *", "return -rewards + gamma *"),
    "gamma unchecked": ("if not 0 <= gamma <= 1", "if False"),
    "shapes unchecked": ("if not rewards.shape == values.shape == terminated.shape", "if False"),
    "dueling without the mean": (" - advantages.mean(-1, keepdim=True)", ""),
    "dueling with the maximum": ("advantages.mean(-1, keepdim=True)", "advantages.amax(-1, keepdim=True)"),
    "dueling's mean over the batch": ("advantages.mean(-1, keepdim=True)", "advantages.mean(0, keepdim=True)"),
    "targets learn": ("errors = targets.detach()", "errors = targets"),
    "a sum over the batch": ("0.5 * inside)).mean()", "0.5 * inside)).sum()"),
    "the whole square": ("(errors.abs() - 0.5 * inside)", "(2 * errors.abs() - inside)"),
    "the square all the way": ("errors.abs().clamp(max=huber)", "errors.abs()"),
    "clipped errors": ("(inside * (errors.abs() - 0.5 * inside)).mean()", "(0.5 * inside**2).mean()"),
    "epsilon never falls": ("(last - first) * min(step / decay, 1.0)", "0"),
    "epsilon falls on": ("min(step / decay, 1.0)", "step / decay"),
    "epsilon upside down": ("generator=generator) < epsilon", "generator=generator) > epsilon"),
    "the worst action": (
        "torch.where(explore, anything, q_values.argmax(-1))",
        "torch.where(explore, anything, q_values.argmin(-1))",
    ),
    "never the last action": ("torch.randint(choices, (size,)", "torch.randint(choices - 1, (size,)"),
    "one draw for the batch": (
        "torch.rand(size, generator=generator) < epsilon",
        "torch.rand(1, generator=generator) < epsilon",
    ),
    "the target untouched": ("torch._foreach_lerp_(*self.weights, s.tau)", "pass"),
    "the online network dragged": ("(self.target, self.online)]", "(self.online, self.target)]"),
    "no copy at the start": ("self.target.load_state_dict(self.online.state_dict())", "pass"),
    "the online network as target": ("args = (self.target(sample.after)", "args = (self.online(sample.after)"),
    "values of where the step began": ("args = (self.target(sample.after)", "args = (self.target(sample.obs)"),
    "loss where the step led": ("self.online(sample.obs), sample.actions", "self.online(sample.after), sample.actions"),
    "gradients pile up": (
        "self.optimizer.zero_grad()",
        "self.online.head.bias.grad = torch.ones_like(self.online.head.bias)",
    ),
    "double always": ("if s.double:", "if True:"),
    "double never": ("if s.double:", "if False:"),
    "dueling never": ("if self.duel else out", "if False else out[:, : out.shape[1] - self.duel]"),
    "huber not handed on": ("targets, huber=s.huber)", "targets)"),
    "judged without epsilon": (
        "epsilon_greedy(self.online(obs), self.settings.epsilon, self.dice)",
        "self.online(obs).argmax(-1)",
    ),
    "the caller's dice": (
        "self.settings.epsilon, self.dice)",
        "self.settings.epsilon, torch.Generator().manual_seed(0))",
    ),
    "values for q_values": ("if next_q_values.dim() != 2", "if False"),
    "units not saved": (
        'self.register_buffer("units", torch.ones(observations))',
        "self.units = torch.ones(observations)",
    ),
    "raw units": ("obs / self.units", "obs"),
    "units of the latest sample": ("if self.units is None:", "if True:"),
    "units of the target forgotten": ("self.online.units = self.target.units", "self.online.units"),
    "continuous tasks let in": ("if not task.discrete", "if False"),
}


def test_no_check_fails_on_the_original():
    assert caught_by(original, CHECKS) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    """Each deliberate mistake makes at least one check fail."""
    mutant = load_mutant(PATH, *MISTAKES[mistake])
    assert any(caught_by(mutant, [check]) for check in CHECKS)


# Stable-Baselines3.


def test_stable_baselines3_has_the_same_loss():
    """Its DQN (single network, Huber, a mean over the batch) on 64 stored steps, falls and time limits among them: what
    its own `train` logs as the loss is ours, and the time limit cuts nothing in either."""
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    model = stable_baselines3.DQN("MlpPolicy", "CartPole-v1", gamma=0.9, policy_kwargs={"net_arch": [16]}, seed=0)
    model.set_logger(stable_baselines3.common.logger.Logger(None, []))
    with torch.no_grad():
        for p in model.q_net_target.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=rng(0)))
    s = a_sample(1, 64)
    cut = (torch.rand(64, generator=rng(2)) < 0.3) & ~s.terminated
    buffer = stable_baselines3.common.buffers.ReplayBuffer(
        64, model.observation_space, model.action_space, handle_timeout_termination=True
    )
    for i in range(64):
        buffer.add(
            s.obs[i : i + 1].numpy(),
            s.after[i : i + 1].numpy(),
            s.actions[i : i + 1].numpy(),
            s.rewards[i : i + 1].numpy(),
            (s.terminated | cut)[i : i + 1].numpy(),
            [{"TimeLimit.truncated": bool(cut[i])}],
        )
    buffer.sample = lambda *_, **__: buffer._get_samples(np.arange(64))
    model.replay_buffer = buffer
    with torch.no_grad():
        y = original.dqn_targets(s.rewards, model.q_net_target(s.after), s.terminated, gamma=0.9)
        ours = original.dqn_loss(model.q_net(s.obs), s.actions, y)
        wrong = original.dqn_targets(s.rewards, model.q_net_target(s.after), s.terminated | cut, gamma=0.9)
        assert abs(original.dqn_loss(model.q_net(s.obs), s.actions, wrong) - ours) > 1e-3
    model.train(gradient_steps=1, batch_size=64)
    assert model.logger.name_to_value["train/loss"] == pytest.approx(ours.item(), rel=1e-5)


# Overestimation.


def largest_of_normals(n):
    """E[max of n standard normals]: the integral of x times the density of the maximum."""
    x, normal = torch.linspace(-12, 12, 240_001, dtype=torch.float64), torch.distributions.Normal(0.0, 1.0)
    return torch.trapezoid(x * n * normal.cdf(x) ** (n - 1) * normal.log_prob(x).exp(), x).item()


@pytest.mark.evidence
def test_the_maximum_overestimates_and_double_does_not(evidence):
    """All actions are worth 0; the two networks' errors are independent standard normals. The mean of 100,000 targets
    (10,000 in the short form) lies within four standard errors of E[max] for DQN and of 0 for double DQN."""
    size = 100_000 if evidence.full else 10_000
    assert largest_of_normals(2) == pytest.approx(1 / math.pi**0.5, abs=1e-6)
    for actions in (2, 5, 18):
        for kind in ("DQN", "double DQN"):
            means = []
            for seed in SEEDS:
                online, target = random(seed, size, actions), random(seed + 50, size, actions)
                zero, no = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.bool)
                if kind == "DQN":
                    y = original.dqn_targets(zero, target, no, gamma=1.0)
                else:
                    y = original.double_dqn_targets(zero, online, target, no, gamma=1.0)
                expected = largest_of_normals(actions) if kind == "DQN" else 0.0
                assert abs(y.mean().item() - expected) < 4 * y.std().item() / size**0.5
                means.append(y.mean().item())
            evidence(
                NAME,
                f"Overestimation with {actions} equal actions and errors of unit variance: {kind}",
                value=sum(means) / 5,
                unit="standard deviations",
                seeds=SEEDS,
                spread=means,
                note=f"By integration: {expected:.4f}.",
            )


# Truncation is no termination.


def lab(limit):
    """One state, two actions: 0 pays 1 and stays, 1 pays 5 and ends the episode."""

    def step(state, actions):
        return state, torch.where(actions == 1, 5.0, 1.0), actions == 1

    return dataclasses.replace(CARTPOLE, observations=1, limit=limit, spread=(0.0,), step=step, observe=lambda s: s + 1)


def learn_the_lab(seed, cut_at_the_limit, limit=2):
    """Q(stay) and Q(end) after training with gamma = 0.9 in the loop."""
    DQN = original.learner()
    settings = DQN.Settings(
        seed=seed, steps=290, envs=8, warmup=40, hidden=16, batch=64, updates=2, lr=5e-3, tau=0.3, epsilon=1.0,
        huber=math.inf, gamma=0.9, double=False,
    )  # fmt: skip
    task = lab(limit)
    if cut_at_the_limit:  # the mistake: an environment that calls both ends "done"
        cut = torch.full((settings.envs,), 0)

        def step(state, actions, inner=task.step):
            after, rewards, over = inner(state, actions)
            cut.add_(1)
            over = over | (cut >= limit)
            cut[over] = 0
            return after, rewards, over

        task = dataclasses.replace(task, step=step)
    agent = loop.train_off_policy(task, DQN, settings, judge=False).agent
    return agent.online(torch.ones(1, 1))[0].tolist()


@pytest.mark.evidence
def test_a_time_limit_is_no_end(evidence):
    """Staying pays 1 a step for ever, worth 10 at gamma = 0.9, and ending pays 5. A clock stops the episode after two
    steps. Bootstrapped through, the limit changes nothing; taken for an end, it makes the agent end: a random hand
    stays twice as often at the first step as at the second, so that Q = 1 + 0.9 * 2 / 3 * 5 = 4."""
    seeds = SEEDS if evidence.full else SEEDS[:1]
    for name, wrong in (("bootstrapped", False), ("taken for an end", True)):
        found = [learn_the_lab(seed, wrong) for seed in seeds]
        stay = [q[0] for q in found]
        evidence(
            NAME,
            f"Value of staying, worth 10, with a time limit {name}",
            value=sum(stay) / len(stay),
            bar=4.5 if wrong else 9.5,
            better="<=" if wrong else ">=",
            seeds=seeds,
            spread=stay,
            note="γ = 0.9; ending the episode pays 5 and is chosen where staying is worth less.",
        )
        assert all((q[0] < q[1]) == wrong for q in found)
        assert all(abs(q[1] - 5) < 0.2 for q in found)


# CartPole.


@pytest.mark.evidence
def test_cartpole_is_solved(evidence):
    """Trained until the epsilon-greedy policy passes the judge; then 100 episodes more, none of which decided
    anything, with it and with the greedy policy. No bar on the seconds: they depend on the machine."""
    DQN, seeds = original.learner(), FRESH if evidence.full else [4]
    runs = [loop.train_off_policy(CARTPOLE, DQN, DQN.Settings(seed=seed)) for seed in seeds]
    assert all(run.solved for run in runs)
    mixed, greedy, more = [], [], 100 if evidence.full else 20
    for seed, run in zip(seeds, runs, strict=True):
        mixed.append(evaluate(CARTPOLE, run.agent.greedy, episodes=100, seed=5 * 10**8 + 1000 * seed).mean().item())
        run.agent.settings.epsilon = 0.0
        greedy.append(evaluate(CARTPOLE, run.agent.greedy, episodes=more, seed=6 * 10**8 + 1000 * seed).mean().item())
    for what, found, bar in (
        ("Mean return over 100 fresh episodes of CartPole-v1, ε = 0.05, median of the seeds", mixed, 475),
        ("The same, greedy", greedy, None),
        ("Environment steps until CartPole-v1 was solved", [run.curve[-1][0] for run in runs], None),
        ("Seconds of training until CartPole-v1 was solved", [run.seconds for run in runs], None),
    ):
        unit = "s" if "Seconds" in what else "steps" if "steps" in what else ""
        evidence(
            NAME, what, value=statistics.median(found), bar=bar, better=">=", unit=unit, seeds=seeds, spread=found,
            note="One thread of a machine that other work shared." if unit == "s" else "",
            curve={"runs": [run.curve for run in runs], "ylabel": "mean return"} if bar else None,
        )  # fmt: skip


VARIANTS = {
    "as it is": {},
    "no target network": {"tau": 1.0},
    "no replay": {"capacity": 32, "batch": 32},
    "not double": {"double": False},
    "dueling": {"duel": True},
    "Huber, δ = 1": {"huber": 1.0},
    "raw observations": {},
}


@pytest.mark.evidence
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_each_part_does_on_cartpole(evidence, variant):
    """A fixed budget of 7,040 environment steps; the mean of the returns at 3,520, 5,280 and 7,040. No replay: the
    newest step of each of the 32 copies is all that is learned from, with as many updates."""
    seeds, DQN, found = SEEDS if evidence.full else SEEDS[:1], original.learner(), []
    curve = {"x": [], "y": {variant: []}, "xlabel": "environment steps", "ylabel": "mean return"}
    for seed in seeds:

        class Raw(DQN):
            def __init__(self, task, settings):
                super().__init__(task, settings)
                self.units = self.online.units

        settings = DQN.Settings(
            seed=seed, steps=220 if evidence.full else 60, check_every=55 if evidence.full else 60, **VARIANTS[variant]
        )
        method = Raw if variant == "raw observations" else DQN
        run = loop.train_off_policy(CARTPOLE, method, settings, stop=False)
        points = [mean for steps, _, mean in run.curve if steps >= 1500]
        found.append(sum(points[-3:]) / len(points[-3:]))
        curve["x"] = [steps for steps, _, _ in run.curve]
        curve["y"][variant].append([mean for _, _, mean in run.curve])
    evidence(
        NAME,
        f"Return on CartPole-v1 with 7,040 steps: {variant}",
        value=statistics.median(found),
        seeds=seeds,
        spread=found,
        curve=curve,
        note="The median of the seeds; a tenth of the episodes where the policy is far from 475.",
    )
