"""DDPG: its gradient against a linear-quadratic problem solved exactly, its update against Stable-Baselines3."""

import functools
import math
import statistics

import pytest
import torch
from torch.testing import assert_close

from snippets.foundations import ddpg as original
from snippets.foundations import loop
from snippets.worlds.classic import PENDULUM
from tests.foundations import continuous
from tests.foundations.continuous import (
    feed,
    learned_torque,
    learned_value,
    linears,
    normal,
    peer,
    rng,
    sample_of,
)
from tests.mutation import caught_by, load_mutant

torch.set_num_threads(1)
PATH = "snippets/foundations/ddpg.py"
NAME = "foundations/ddpg"
SEEDS = [0, 1, 2, 3, 4]


NETS = "policy", "critic", "target_policy", "target_critic"
agent_of = functools.partial(continuous.agent_of, nets=NETS)


class Quadratic:
    """s' = A s + B a, reward -(s'Qs + a'Ra), policy a = -K s: all values are solutions of linear equations."""

    def __init__(self, seed=0, gamma=0.9):
        self.gamma = gamma
        a, b = normal(2, 2, seed=seed), normal(2, 1, seed=seed + 1)
        self.a, self.b = 0.8 * a / torch.linalg.matrix_norm(a, 2), b / (2 * b.norm())  # a stable loop
        self.q, self.r = torch.diag(torch.tensor([1.0, 0.3])).double(), 0.2
        self.gain = torch.tensor([[0.1, 0.2]]).double()
        self.start = torch.tensor([1.0, -0.5]).double()

    def values(self, gain):
        """P with V(s) = -s'Ps under the gain: P = Q + K'RK + gamma (A - BK)'P(A - BK)."""
        walk = self.a - self.b @ gain
        cost = self.q + self.r * gain.T @ gain
        eye = torch.eye(4, dtype=torch.float64)
        p = torch.linalg.solve(eye - self.gamma * torch.kron(walk.T.contiguous(), walk.T.contiguous()), cost.reshape(4))
        return p.view(2, 2)

    def objective(self, gain):
        return -self.start @ self.values(gain) @ self.start

    def critic(self, obs, actions):
        """Q under the fixed gain, exactly."""
        after = obs @ self.a.T + actions @ self.b.T
        p = self.values(self.gain)
        cost = ((obs @ self.q) * obs).sum(-1) + self.r * actions.square().sum(-1)
        return -cost - self.gamma * ((after @ p) * after).sum(-1)


# Each check takes the module, so that broken copies can be put to it.


def check_the_policy_gradient_theorem(ddpg):
    """Along the policy's own discounted states, the actor's gradient is that of the return, by finite differences."""
    for seed in range(3):
        task = Quadratic(seed)
        gain = task.gain.clone().requires_grad_()
        state, total = task.start.clone(), torch.zeros(1, 2, dtype=torch.float64)
        for t in range(400):
            loss = ddpg.actor_loss(lambda obs: -obs @ gain.T, task.critic, state[None])  # noqa: B023
            total -= task.gamma**t * torch.autograd.grad(loss, gain)[0]
            state = (task.a - task.b @ task.gain) @ state
        for i in range(2):
            step = torch.zeros(1, 2, dtype=torch.float64)
            step[0, i] = 1e-6
            slope = (task.objective(task.gain + step) - task.objective(task.gain - step)) / 2e-6
            assert total[0, i].item() == pytest.approx(slope.item(), rel=1e-5)


def check_the_chain_rule(ddpg):
    """-mean of grad_theta mu * grad_a Q, row by row."""
    obs, weight = normal(6, 3, seed=1), normal(2, 3, seed=2).requires_grad_()
    critic = lambda s, a: (a * s[:, :2]).sum(-1) - (a**2).sum(-1) * s[:, 2].exp()  # noqa: E731
    loss = ddpg.actor_loss(lambda s: (s @ weight.T).tanh(), critic, obs)
    loss.backward()
    expected = torch.zeros(2, 3).double()
    for s in obs:
        a = (s @ weight.T).tanh().detach()
        slope = s[:2] - 2 * a * s[2].exp()  # of Q in a
        expected -= torch.outer(slope * (1 - a**2), s) / 6
    assert_close(weight.grad, expected)
    assert loss.item() == pytest.approx(-critic(obs, (obs @ weight.T).tanh()).mean().item())


def check_targets_one_by_one(ddpg):
    rewards, next_q = normal(2, 9, seed=3)
    next_q.requires_grad_()
    terminated = torch.arange(9) % 3 == 0
    for gamma in (0.0, 0.9, 1.0):
        found = ddpg.ddpg_targets(rewards, next_q, terminated, gamma=gamma)
        assert not found.requires_grad
        for i in range(9):
            expected = rewards[i] + (0.0 if terminated[i] else gamma * next_q[i])
            assert found[i].item() == pytest.approx(expected.item())
    wild = torch.where(terminated, torch.nan, next_q)  # what lies beyond a final state never matters
    assert ddpg.ddpg_targets(rewards, wild, terminated, gamma=0.9).isfinite().all()


def check_the_noise_of_a_process(ddpg):
    """Its stationary deviation and its correlation over time, z-tests over independent copies."""
    for theta, sigma in ((0.15, 0.2), (1.0, 0.1), (0.6, 1.0)):
        noise, first, g = torch.zeros(20_000, 1), None, rng(4)
        for t in range(63):
            noise = ddpg.ou_noise(noise, torch.randn(noise.shape, generator=g), theta=theta, sigma=sigma)
            first = noise if t == 59 else first
        deviation = sigma / math.sqrt(theta * (2 - theta))
        n = len(noise)
        assert abs(noise.mean().item()) < 4.5 * deviation / math.sqrt(n)
        assert abs(noise.std().item() / deviation - 1) < 4.5 / math.sqrt(2 * n)
        correlation = torch.corrcoef(torch.cat([first, noise], 1).T)[0, 1].item()
        assert abs(correlation - (1 - theta) ** 3) < 4.5 / math.sqrt(n)
    once = ddpg.ou_noise(torch.tensor([[2.0]]), torch.tensor([[-1.0]]), theta=0.25, sigma=0.5)
    assert once.item() == pytest.approx(1.0)


def check_one_update(ddpg):
    """The targets move by tau; a critic's gradient is that of its own loss; both nets descend their losses."""
    agent, again, batch = agent_of(ddpg), agent_of(ddpg), sample_of()
    before = [p.detach().clone() for net in (agent.target_policy, agent.target_critic) for p in net.parameters()]
    agent.update(batch, rng(1))
    targets = [p for net in (agent.target_policy, agent.target_critic) for p in net.parameters()]
    nets = [p for net in (agent.policy, agent.critic) for p in net.parameters()]
    for old, target, online in zip(before, targets, nets, strict=True):
        assert_close(target, old + agent.settings.tau * (online - old))
        assert target.grad is None
    next_q = again.target_critic(batch.after, again.target_policy(batch.after))
    target = (batch.rewards + 0.99 * ~batch.terminated * next_q).detach()
    loss = (again.critic(batch.obs, batch.actions) - target).square().mean()
    for p, grad in zip(agent.critic.parameters(), torch.autograd.grad(loss, again.critic.parameters()), strict=True):
        assert_close(p.grad, grad)


def check_actions(ddpg):
    """Within the bound, with noise of the chosen size around the greedy one; greedy has none."""
    agent = agent_of(ddpg, PENDULUM, sigma=0.1, envs=4000)
    obs = normal(1, 3, seed=5).expand(4000, 3)
    noise = agent.act(obs, rng(0)) - agent.greedy(obs)
    assert noise.std().item() == pytest.approx(0.2, rel=0.06)  # a tenth of the bound
    assert torch.equal(agent.act(obs, rng(1)), agent.act(obs, rng(1)))  # a function of the generator
    assert torch.equal(agent.greedy(obs), agent.greedy(obs))
    assert agent.greedy(1e3 * normal(4000, 3, seed=6)).abs().max() > 1.9
    for scale in (1.0, 1e3):
        agent = agent_of(ddpg, PENDULUM, sigma=2.0, envs=4000)
        actions = agent.act(scale * normal(4000, 3, seed=6), rng(0))
        assert actions.shape == (4000, 1) and actions.abs().max() == 2.0
        assert (agent.greedy(scale * normal(4000, 3, seed=6)).abs() <= 2.0).all()
    slow = agent_of(ddpg, PENDULUM, theta=0.15, sigma=0.05, envs=4000)
    steps = [slow.act(obs, rng(t)) - slow.greedy(obs) for t in range(30)]
    correlation = torch.corrcoef(torch.cat(steps[-2:], 1).T)[0, 1]
    assert correlation.item() == pytest.approx(0.85, abs=0.04)


def check_the_clock_does_not_end_the_future(ddpg):
    """-1 / (1 - gamma) = -5 where only the clock cuts episodes off, -1 where they end."""
    assert learned_value(ddpg, False) == pytest.approx(-5.0, abs=0.8)
    assert learned_value(ddpg, True) == pytest.approx(-1.0, abs=0.3)


def check_it_learns_to_push_where_it_pays(ddpg):
    for sign in (-1, 1):
        assert sign * learned_torque(ddpg, sign) > 1.5


def check_bad_input_is_named(ddpg):
    one = torch.zeros(3)
    for wrong in ((one[:2], one, one), (one, one[:, None], one), (one, one, one[:1])):
        with pytest.raises(ValueError, match="must agree, got"):
            ddpg.ddpg_targets(*wrong, gamma=0.9)
    assert ddpg.ou_noise(one[:, None], one[:, None] + 1, theta=1.0, sigma=0.0).eq(0).all()  # allowed
    for theta, sigma in ((0.0, 0.2), (1.1, 0.2), (0.15, -0.1), (math.nan, 0.1)):
        with pytest.raises(ValueError, match=r"theta must lie in \(0, 1\]"):
            ddpg.ou_noise(one[:, None], one[:, None], theta=theta, sigma=sigma)


# Stable-Baselines3, whose DDPG is its TD3 with one critic, no delay and no smoothing


def difference_from_sb3(module, updates=3):
    """The largest difference of any weight after some updates on the same samples."""
    agent = agent_of(module)
    model = peer("DDPG", agent)
    pairs = [
        (agent.policy.net, model.actor.mu),
        (agent.target_policy.net, model.actor_target.mu),
        (agent.critic.net, model.critic.q_networks[0]),
        (agent.target_critic.net, model.critic_target.q_networks[0]),
    ]
    for ours, theirs in pairs:
        for a, b in zip(linears(ours), linears(theirs), strict=True):
            b.load_state_dict(a.state_dict())
    for step in range(updates):
        batch = sample_of(seed=step)
        feed(model, batch)
        model.train(1, 64)
        agent.update(batch, rng(step))
    differences = []
    for ours, theirs in pairs:
        for a, b in zip(linears(ours), linears(theirs), strict=True):
            differences += [(a.weight - b.weight).abs().max().item(), (a.bias - b.bias).abs().max().item()]
    return max(differences)


def check_the_updates_of_stable_baselines3(ddpg):
    assert difference_from_sb3(ddpg) < 1e-9


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]
SLOW = ("check_the_policy", "check_the_updates", "check_the_noise")
LAST = ("check_the_clock", "check_it_learns")  # they train
CHECKS.sort(key=lambda check: (check.__name__.startswith(LAST), check.__name__.startswith(SLOW)))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_functions(check):
    check(original)


TARGET = "torch.where(terminated.bool(), 0.0, next_q)"
MISTAKES = {
    "terminated ignored": (TARGET, "next_q"),
    "terminated times an infinite value": (TARGET, "(~terminated.bool() * next_q)"),
    "only terminated bootstraps": (TARGET, "torch.where(terminated.bool(), next_q, 0.0)"),
    "no discount": ("return (rewards + gamma * torch", "return (rewards + torch"),
    "gradient into the target": ("next_q)).detach()", "next_q))"),
    "actor descends Q": ("return -critic(obs, policy(obs)).mean()", "return critic(obs, policy(obs)).mean()"),
    "sum for the mean": ("policy(obs)).mean()", "policy(obs)).sum()"),
    "no gradient through the action": ("-critic(obs, policy(obs))", "-critic(obs, policy(obs).detach())"),
    "noise that grows": ("(1 - theta) * noise", "(1 + theta) * noise"),
    "noise that forgets too slowly": ("(1 - theta) * noise", "(1 - theta**2) * noise"),
    "noise without its scale": ("+ sigma * fresh", "+ fresh"),
    "actions unbounded": (".tanh() * self.bound", " * self.bound"),
    "noise not clipped": ("bound * self.noise).clamp(-bound, bound)", "bound * self.noise)"),
    "noise in the wrong units": ("+ bound * self.noise", "+ self.noise"),
    "noise not kept": ("self.noise = ou_noise(self.noise, ", "self.noise = ou_noise(0 * self.noise, "),
    "online critic in the target": ("self.target_critic(s.after, ", "self.critic(s.after, "),
    "online actor in the target": ("self.target_policy(s.after))", "self.policy(s.after))"),
    "target at the old state": ("self.target_critic(s.after, ", "self.target_critic(s.obs, "),
    "tau reversed": ("track(*self.nets, self.settings.tau)", "track(*self.nets, 1 - self.settings.tau)"),
    "nets track the targets": ("track(*self.nets,", "track(*self.nets[::-1],"),
    "actor trains the critic": (".backward(inputs=self.weights)", ".backward()"),
    "actor's target not tracked": ("in nets for p in net", "in nets[1:] for p in net"),
    "theta unchecked": ("if not 0 < theta <= 1 or sigma < 0:", "if False:"),
    "actor within [-1, 1]": (".tanh() * self.bound", ".tanh()"),
    "shapes unchecked": ("if not rewards.shape == next_q.shape == terminated.shape:", "if False:"),
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
        note="Weights of actor, critic and their targets, in float64, on the same samples.",
    )


# The theorem.


def gaussian_gradient(critic, mean, sigma, nodes=80):
    """d/dm E[Q(a)], a ~ N(m, sigma^2), as a score-function gradient: E[Q(a) (a - m) / sigma^2], by quadrature."""
    import numpy as np

    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    x, w = torch.as_tensor(x), torch.as_tensor(w) / math.sqrt(2 * math.pi)
    return (w * critic(mean + sigma * x) * x / sigma).sum().item()


@pytest.mark.evidence
def test_the_deterministic_gradient_is_the_limit_of_the_stochastic_one(evidence):
    """For Q quadratic in a they agree at any variance; otherwise the gap falls with its square."""
    quadratic = lambda a: -3 * (a - 0.4) ** 2  # noqa: E731
    for sigma in (0.01, 0.5, 2.0):
        assert gaussian_gradient(quadratic, 0.1, sigma) == pytest.approx(-6 * (0.1 - 0.4))
    wavy = lambda a: torch.as_tensor(2 * a).sin() + 0.3 * a**3  # noqa: E731
    mean = torch.tensor(0.3).double().requires_grad_()
    loss = original.actor_loss(lambda _: mean[None], lambda _, a: wavy(a), torch.zeros(1, 1))
    loss.backward()
    sigmas = [0.4, 0.2, 0.1, 0.05, 0.025]
    gaps = [abs(gaussian_gradient(wavy, 0.3, sigma) + mean.grad.item()) for sigma in sigmas]
    orders = [math.log2(a / b) for a, b in zip(gaps, gaps[1:], strict=False)]
    assert gaps[-1] < 2e-3 and gaps == sorted(gaps, reverse=True)
    evidence(
        NAME,
        "Order at which the stochastic gradient approaches the deterministic one",
        value=orders[-1],
        bar=1.9,
        better=">=",
        note="The gap falls like σ to this power; σ halved from 0.05 to 0.025. Quadrature, no sampling.",
        spread=orders,
    )


@pytest.mark.evidence
def test_a_replay_buffer_changes_the_gradient(evidence):
    """Actor gradients averaged over other states than the policy's own are not the gradient of its return."""
    angles = []
    for seed in SEEDS:
        task = Quadratic(seed)
        gain = task.gain.clone().requires_grad_()
        policy = lambda obs: -obs @ gain.T  # noqa: B023, E731
        (true,) = torch.autograd.grad(task.objective(gain), gain)
        (other,) = torch.autograd.grad(-original.actor_loss(policy, task.critic, normal(4000, 2, seed=9)), gain)
        angles.append(math.degrees(torch.acos(torch.cosine_similarity(true, other).clamp(-1, 1)).item()))
    evidence(
        NAME,
        "Angle between the actor's gradient over a buffer and that of the return",
        value=statistics.median(angles),
        unit="degrees",
        seeds=SEEDS,
        spread=angles,
        note="Median of five linear-quadratic problems with the exact Q; the buffer holds normal states.",
    )
    assert statistics.median(angles) > 10


# Learning.


@torch.no_grad()
def mean_return(policy, seed, episodes=64):
    """Of fresh episodes in the tensor environment, which costs little; what a run ends with is judged in Gymnasium."""
    state = (2 * torch.rand(episodes, 2, generator=rng(seed)) - 1) * torch.tensor(PENDULUM.spread)
    total = torch.zeros(episodes)
    for _ in range(PENDULUM.limit):
        state, rewards, _ = PENDULUM.step(state, policy(PENDULUM.observe(state)))
        total += rewards
    return total.mean().item()


def train(seed, steps=500, **options):
    """-> the learner, and [(environment steps, mean return)] every 400."""
    curve, made = [], original.learner()

    class Watched(made):
        count = 0

        def update(self, sample, generator):
            super().update(sample, generator)
            self.count += 1
            if self.count % 400 == 0:
                steps = self.count + self.settings.warmup * self.settings.envs  # one update for a step
                curve.append((steps, mean_return(self.greedy, 10_000 * self.settings.seed + self.count)))

    settings = made.Settings(seed=seed, steps=steps, **options)
    return loop.train_off_policy(PENDULUM, Watched, settings, judge=False).agent, curve


@pytest.mark.evidence
def test_learns_pendulum(evidence):
    """A mean return of -200 or more, with Gaussian noise and with an Ornstein-Uhlenbeck process."""
    if not evidence.full:  # no more than that it runs: that it learns, `check_it_learns_to_push_where_it_pays` sees
        _, curve = train(1, 9, warmup=1, updates=50, batch=16)
        assert [x for x, _ in curve] == [408] and -2000 < curve[0][1] < 0
        return
    kinds = {"Gaussian noise": {}, "Ornstein–Uhlenbeck noise": {"theta": 0.15, "sigma": 0.05}}
    for name, options in kinds.items():
        runs = [train(seed, **options) for seed in SEEDS]
        ends = [loop.evaluate(PENDULUM, agent.greedy, episodes=20, seed=9_000).mean().item() for agent, _ in runs]
        evidence(
            NAME,
            f"Pendulum: mean return after 4,000 environment steps, {name}",
            value=statistics.mean(ends),
            bar=-200.0 if name == "Gaussian noise" else None,
            better=">=",
            seeds=SEEDS,
            spread=ends,
            note="The greedy policy in Gymnasium, the same 20 episodes for each run.",
            curve={
                "x": [x for x, _ in runs[0][1]],
                "y": {name: [[mean for _, mean in curve] for _, curve in runs]},
                "xlabel": "environment steps",
                "ylabel": "mean return",
            },
        )
        solved = [next((x for x, mean in curve if mean >= -200), 10**6) for _, curve in runs]
        evidence(
            NAME,
            f"Pendulum: environment steps to -200, median, {name}",
            value=statistics.median(solved),
            seeds=SEEDS,
            spread=solved,
            note="Seen every 400 steps, over 64 episodes of the tensor environment.",
        )
