"""TD3: its update against Stable-Baselines3, and what its three remedies do to the critic's estimates."""

import dataclasses
import functools
import math
import statistics

import pytest
import torch
from torch.testing import assert_close

from snippets.foundations import ddpg, loop
from snippets.foundations import td3 as original
from snippets.worlds.classic import PENDULUM, pendulum_step
from tests.foundations import continuous
from tests.foundations.continuous import (
    UNIT,
    copy_critics,
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
PATH = "snippets/foundations/td3.py"
NAME = "foundations/td3"
SEEDS = [0, 1, 2, 3, 4]
OFF = {"critics": 1, "smoothing": 0.0, "delay": 1}  # DDPG


NETS = "net", "critics", "target_net", "target_critics"
agent_of = functools.partial(continuous.agent_of, nets=NETS)


# Each check takes the module, so that broken copies can be put to it.


def check_targets_one_by_one(td3):
    rewards, next_q = normal(9, seed=1), normal(3, 9, seed=2).requires_grad_()
    terminated = torch.arange(9) % 3 == 0
    for gamma in (0.0, 0.9, 1.0):
        found = td3.td3_targets(rewards, next_q, terminated, gamma=gamma)
        assert not found.requires_grad
        for i in range(9):
            low = min(next_q[e, i].item() for e in range(3))
            assert found[i].item() == pytest.approx(rewards[i].item() + (0.0 if terminated[i] else gamma * low))
    wild = torch.where(terminated, torch.nan, next_q)  # what lies beyond a final state never matters
    assert td3.td3_targets(rewards, wild, terminated, gamma=0.9).isfinite().all()


def check_smoothing_one_by_one(td3):
    actions, noise = 2 * normal(50, 2, seed=3).tanh(), 3 * normal(50, 2, seed=4)
    for sigma, clip, bound in ((0.2, 0.5, 2.0), (0.0, 0.5, 2.0), (1.0, 0.1, 2.0), (0.5, 9.0, 2.0)):
        found = td3.smoothed_actions(actions, noise, sigma=sigma, clip=clip, bound=bound)
        for a, n, b in zip(actions.flatten().tolist(), noise.flatten().tolist(), found.flatten().tolist(), strict=True):
            moved = a + bound * max(-clip, min(clip, sigma * n))
            assert b == pytest.approx(max(-bound, min(bound, moved)))
    # In units of the bound: the same policy on actions ten times as large is the same policy.
    small = td3.smoothed_actions(actions / 2, noise, sigma=0.2, clip=0.5, bound=1.0)
    assert_close(td3.smoothed_actions(actions * 5, noise, sigma=0.2, clip=0.5, bound=10.0), 10 * small)


def check_the_critics_loss(td3):
    q_values, targets = normal(2, 7, seed=5).requires_grad_(), normal(7, seed=6).requires_grad_()
    loss = td3.critic_loss(q_values, targets)
    expected = sum((q_values[e, i] - targets[i]) ** 2 / 7 for e in range(2) for i in range(7))
    assert loss.item() == pytest.approx(expected.item())
    loss.backward()
    assert targets.grad is None
    assert_close(q_values.grad, 2 * (q_values - targets).detach() / 7)


def check_the_critics_are_nets_of_their_own(td3):
    """A batched product is E nets one by one; they start apart; none hears of another's loss."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        critics = td3.Critics(4, 16, 3).double()
    obs, actions = normal(10, 3, seed=7), normal(10, 1, seed=8)
    found = critics(obs, actions)
    for e in range(3):
        x = torch.cat([obs, actions], -1)
        for i in range(3):
            x = x @ critics.weights[i][e] + critics.biases[i][e]
            x = x.relu() if i < 2 else x
        assert_close(found[e], x.squeeze(-1))
    assert (found[0] - found[1]).abs().min() > 0
    for layers, fans in ((critics.weights, (4, 16, 16)), (critics.biases, (4, 16, 16))):
        for layer, fan in zip(layers, fans, strict=True):  # drawn as torch draws a linear layer, each net afresh
            assert (layer[0] != layer[1]).all() and layer.abs().max() <= fan**-0.5
    assert critics.weights[1].std().item() == pytest.approx((3 * 16) ** -0.5, rel=0.1)
    assert critics.weights[1].mean().abs() < 0.03
    grads = torch.autograd.grad(found[0].sum(), critics.parameters())
    assert all((grad[1:] == 0).all() for grad in grads) and all((grad[0] != 0).any() for grad in grads)


def check_one_update(td3):
    """Critics each time, actor and targets every second; the actor climbs the first critic alone."""
    agent, batch = agent_of(td3), sample_of()
    parts = (agent.net, agent.critics, agent.target_net, agent.target_critics)
    before = [[p.detach().clone() for p in part.parameters()] for part in parts]
    moved = lambda k: any((a != b).any() for a, b in zip(before[k], parts[k].parameters(), strict=True))  # noqa: E731
    agent.update(batch, rng(0))
    assert [moved(k) for k in range(4)] == [False, True, False, False]
    critics = [p.detach().clone() for p in agent.critics.parameters()]
    agent.update(batch, rng(1))
    assert all(moved(k) for k in range(4))
    for old, target, online in zip(
        before[3], agent.target_critics.parameters(), agent.critics.parameters(), strict=True
    ):
        assert_close(target, old + agent.settings.tau * (online - old))
    for old, target, online in zip(before[2], agent.target_net.parameters(), agent.net.parameters(), strict=True):
        assert_close(target, old + agent.settings.tau * (online - old))
    # The gradient that the critics keep is that of their own loss, before their second step.
    again = agent_of(td3)
    for p, value in zip(again.critics.parameters(), critics, strict=True):
        p.data = value
    loss = original.critic_loss(again.critics(batch.obs, batch.actions), again.targets(batch, rng(1)))
    for p, grad in zip(agent.critics.parameters(), torch.autograd.grad(loss, again.critics.parameters()), strict=True):
        assert_close(p.grad, grad)


def check_the_learners_target(td3):
    """Bound, noise, clip and discount of the settings, where none of them is 1 or a default."""
    agent, s = agent_of(td3, PENDULUM, smoothing=0.4, clip=0.3, gamma=0.8), sample_of()
    noise = (0.4 * torch.randn(64, 1, generator=rng(3))).clamp(-0.3, 0.3)
    after = (2 * agent.target_net(s.after).tanh() + 2 * noise).clamp(-2, 2)
    expected = s.rewards + 0.8 * ~s.terminated * agent.target_critics(s.after, after).amin(0)
    assert_close(agent.targets(s, rng(3)), expected.detach())


def check_all_three_off_is_ddpg(td3):
    """One critic, no smoothing, no delay: the update of DDPG, weight by weight."""
    agent = agent_of(td3, **OFF)
    made = ddpg.learner()
    other = made(UNIT, made.Settings(hidden=16))
    nets = ((other.policy.net, agent.net), (other.target_policy.net, agent.target_net))
    critics = ((other.critic.net, agent.critics), (other.target_critic.net, agent.target_critics))
    for theirs, ours in nets:
        theirs.double().load_state_dict(ours.state_dict())
    for theirs, ours in critics:
        for i, layer in enumerate((theirs[0], theirs[2], theirs[4])):
            layer.double()
            layer.weight.data, layer.bias.data = ours.weights[i][0].data.T.clone(), ours.biases[i][0, 0].data.clone()
    for step in range(3):
        agent.update(sample_of(seed=step), rng(step))
        other.update(sample_of(seed=step), rng(step))
    for theirs, ours in nets:
        for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
            assert_close(a, b, atol=1e-9, rtol=0)
    for theirs, ours in critics:
        for i, layer in enumerate((theirs[0], theirs[2], theirs[4])):
            assert_close(layer.weight.T, ours.weights[i][0], atol=1e-9, rtol=0)


def check_actions(td3):
    agent = agent_of(td3, PENDULUM)
    obs = normal(1, 3, seed=9).expand(4000, 3)
    noise = agent.act(obs, rng(0)) - agent.greedy(obs)
    assert noise.std().item() == pytest.approx(0.2, rel=0.06)  # a tenth of the bound
    assert torch.equal(agent.act(obs, rng(1)), agent.act(obs, rng(1)))  # a function of the generator
    agent = agent_of(td3, PENDULUM, sigma=2.0)
    actions = agent.act(100 * normal(4000, 3, seed=10), rng(0))
    assert actions.shape == (4000, 1) and actions.abs().max() == 2.0
    greedy = agent.greedy(100 * normal(4000, 3, seed=10)).abs()
    assert (greedy <= 2.0).all() and greedy.max() > 1.9


def check_the_clock_does_not_end_the_future(td3):
    """-1 / (1 - gamma) = -5 where only the clock cuts episodes off, -1 where they end."""
    assert learned_value(td3, False, delay=1) == pytest.approx(-5.0, abs=0.9)
    assert learned_value(td3, True, delay=1) == pytest.approx(-1.0, abs=0.3)


def check_it_learns_to_push_where_it_pays(td3):
    for sign in (-1, 1):
        assert sign * learned_torque(td3, sign, delay=1) > 1.5


def check_bad_input_is_named(td3):
    one, two = torch.zeros(3), torch.zeros(2, 3)
    for wrong in ((one, one, one), (one[:2], two, one), (one, two, one[:, None])):
        with pytest.raises(ValueError, match=r"want \(B,\), \(E, B\) and \(B,\)"):
            td3.td3_targets(*wrong, gamma=0.9)
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3,\)"):
        td3.smoothed_actions(two, one, sigma=0.2, clip=0.5, bound=1.0)
    for sigma, clip, bound in ((-0.1, 0.5, 1.0), (0.2, -0.5, 1.0), (0.2, 0.5, 0.0), (0.2, 0.5, math.nan)):
        with pytest.raises(ValueError, match="need sigma, clip >= 0"):
            td3.smoothed_actions(two, two, sigma=sigma, clip=clip, bound=bound)
    assert td3.smoothed_actions(two, two + 1, sigma=0.2, clip=0.0, bound=1.0).eq(0).all()  # allowed
    for options in ({"critics": 0}, {"delay": 0}):
        with pytest.raises(ValueError, match="critics and delay must be positive"):
            agent_of(td3, **options)


# Stable-Baselines3


def difference_from_sb3(module, updates=4):
    """The largest difference of any weight after some updates on the same samples and smoothing noise."""
    agent = agent_of(module, smoothing=0.4)
    agent.critics.biases[2].data[0] += 5.0  # the minimum is the second critic; the actor climbs the first
    k = agent.settings
    remedies = {"policy_delay": k.delay, "target_policy_noise": k.smoothing, "target_noise_clip": k.clip}
    model = peer("TD3", agent, **remedies)
    actors = ((agent.net, model.actor.mu), (agent.target_net, model.actor_target.mu))
    critics = ((agent.critics, model.critic), (agent.target_critics, model.critic_target))
    for ours, theirs in actors:
        for a, b in zip(linears(ours), linears(theirs), strict=True):
            b.load_state_dict(a.state_dict())
    for ours, theirs in critics:
        copy_critics(ours, theirs)
    fill = torch.Tensor.normal_
    for step in range(updates):
        batch, noise = sample_of(seed=step), torch.randn(64, 1, generator=rng(step))
        feed(model, batch)
        try:
            torch.Tensor.normal_ = lambda x, mean, std, noise=noise: x.copy_(mean + std * noise)
            model.train(1, 64)
        finally:
            torch.Tensor.normal_ = fill
        agent.update(batch, rng(step))
    differences = []
    for ours, theirs in actors:
        for a, b in zip(linears(ours), linears(theirs), strict=True):
            differences += [(a.weight - b.weight).abs().max().item(), (a.bias - b.bias).abs().max().item()]
    for ours, theirs in critics:
        for e, net in enumerate(theirs.q_networks):
            for i, layer in enumerate(linears(net)):
                differences.append((layer.weight.T - ours.weights[i][e]).abs().max().item())
    return max(differences)


def check_the_updates_of_stable_baselines3(td3):
    assert difference_from_sb3(td3) < 1e-9


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]
SLOW = ("check_the_updates", "check_all_three")
LAST = ("check_the_clock", "check_it_learns")  # they train
CHECKS.sort(key=lambda check: (check.__name__.startswith(LAST), check.__name__.startswith(SLOW)))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_functions(check):
    check(original)


TARGET = "torch.where(terminated.bool(), 0.0, next_q.amin(0))"
SMOOTH = "(actions + bound * (sigma * noise).clamp(-clip, clip)).clamp(-bound, bound)"
MISTAKES = {
    "maximum of the critics": (TARGET, TARGET.replace("amin", "amax")),
    "mean of the critics": (TARGET, TARGET.replace("amin", "mean")),
    "minimum over the batch": (TARGET, TARGET.replace("amin(0)", "amin(-1, keepdim=True)[0]")),
    "terminated ignored": (TARGET, "next_q.amin(0)"),
    "only terminated bootstraps": (TARGET, "torch.where(terminated.bool(), next_q.amin(0), 0.0)"),
    "no discount": ("return (rewards + gamma * torch", "return (rewards + torch"),
    "gradient into the target": ("amin(0))).detach()", "amin(0)))"),
    "noise not clipped": (SMOOTH, "(actions + bound * sigma * noise).clamp(-bound, bound)"),
    "clipped before its scale": (SMOOTH, "(actions + bound * sigma * noise.clamp(-clip, clip)).clamp(-bound, bound)"),
    "actions not clipped": (SMOOTH, "actions + bound * (sigma * noise).clamp(-clip, clip)"),
    "noise in the wrong units": (SMOOTH, "(actions + (sigma * noise).clamp(-clip, clip)).clamp(-bound, bound)"),
    "mean over critics": (".square().mean(-1).sum()", ".square().mean()"),
    "one net twice": ("baddbmm(b2, x, w2)", "baddbmm(b2, x, w2)[:1].expand(len(w0), -1, -1)"),
    "no delay": ("if self.updates % self.settings.delay == 0:", "if True:"),
    "delay off by one": ("if self.updates % self.settings.delay == 0:", "if self.updates % self.settings.delay == 1:"),
    "actor on the second critic": ("self.greedy(sample.obs))[0].mean()", "self.greedy(sample.obs))[-1].mean()"),
    "actor on the minimum": ("self.greedy(sample.obs))[0].mean()", "self.greedy(sample.obs)).amin(0).mean()"),
    "actor descends": ("loss = -self.critics(", "loss = self.critics("),
    "actor trains the critics": ("loss.backward(inputs=self.weights)", "loss.backward()"),
    "tau reversed": ("track(*self.nets, self.settings.tau)", "track(*self.nets, 1 - self.settings.tau)"),
    "nets track the targets": ("track(*self.nets,", "track(*self.nets[::-1],"),
    "online critics in the target": ("self.target_critics(s.after, after)", "self.critics(s.after, after)"),
    "online actor in the target": ("self.target_net(s.after)", "self.net(s.after)"),
    "target at the old state": ("self.target_critics(s.after, after)", "self.target_critics(s.obs, after)"),
    "no smoothing": ("sigma=k.smoothing, clip", "sigma=0.0, clip"),
    "exploration unbounded": ("self.settings.sigma * noise).clamp(-bound, bound)", "self.settings.sigma * noise)"),
    "exploration in the wrong units": ("(actions + bound * self.settings.sigma", "(actions + self.settings.sigma"),
    "no bound in the target": ("self.target_net(s.after).tanh() * bound", "self.target_net(s.after).tanh()"),
    "twins that start alike": (
        "nn.ParameterList([draw(count, n, m, n=n)",
        "nn.ParameterList([draw(1, n, m, n=n).repeat(count, 1, 1)",
    ),
    "shapes unchecked": ("if next_q.dim() != 2 or not", "if False and not"),
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
        "Largest difference from Stable-Baselines3 after 4 updates",
        value=difference_from_sb3(original),
        bar=1e-9,
        note="Weights of actor, critics and their targets, in float64, on the same samples and smoothing noise.",
    )


# What the remedies do to the critic's estimates.

NOISE = 8.0  # standard deviation of what is added to each reward: no policy is any better for it
VARIANTS = {
    "DDPG": OFF,
    "TD3": {},
    "twin minimum alone": {**OFF, "critics": 2},
    "smoothing alone": {**OFF, "smoothing": 0.2},
    "delay alone": {**OFF, "delay": 2},
}


@torch.no_grad()
def true_returns(policy, obs, gamma, steps=150):
    """Discounted returns (B,) of the deterministic policy from states that look like obs, the reward without noise."""
    state = torch.stack([torch.atan2(obs[:, 1], obs[:, 0]), obs[:, 2]], -1)
    total = torch.zeros(len(obs))
    for t in range(steps):  # 0.9^150 = 1e-7 of what is left
        state, rewards, _ = pendulum_step(state, policy(PENDULUM.observe(state)))
        total += gamma**t * rewards
    return total


def biases(seed, steps, every=200, **options):
    """[(update, mean over a batch of Q(s, mu(s)) less the true return of mu from s)] with noisy rewards."""
    made = original.learner()
    log, noise = [], rng(seed + 77)

    class Watched(made):
        def update(self, sample, generator):
            super().update(sample, generator)
            if self.updates % every == 0:
                with torch.no_grad():
                    q_values = self.critics(sample.obs, self.greedy(sample.obs))[0]
                gap = q_values - true_returns(self.greedy, sample.obs, self.settings.gamma)
                log.append((self.updates, gap.mean().item()))

    def step(state, action):
        after, rewards, terminated = pendulum_step(state, action)
        return after, rewards + NOISE * torch.randn(rewards.shape, generator=noise), terminated

    settings = made.Settings(seed=seed, steps=steps, gamma=0.9, tau=0.05, batch=64, capacity=2000, **options)
    loop.train_off_policy(dataclasses.replace(PENDULUM, step=step), Watched, settings, judge=False)
    return log


def test_returns_are_those_of_the_task():
    """From the hanging rest without torque nothing moves: -pi^2 a step."""
    obs = PENDULUM.observe(torch.tensor([[math.pi, 0.0]]))
    found = true_returns(lambda o: torch.zeros(len(o), 1), obs, 0.9)
    assert found.item() == pytest.approx(-(math.pi**2) / 0.1, rel=1e-3)


@pytest.mark.evidence
def test_overestimation(evidence):
    """The critic's estimate against rollouts of the same policy. The twin minimum lowers it."""
    if not evidence.full:
        log = biases(0, 76)  # no more than that it can be measured
        assert len(log) == 1 and math.isfinite(log[0][1])
        return
    runs = {name: [biases(seed, 270, **options) for seed in SEEDS] for name, options in VARIANTS.items()}
    rest = {name: [statistics.mean(b for _, b in log[-3:]) for log in found] for name, found in runs.items()}
    curve = {
        "x": [update for update, _ in runs["TD3"][0]],
        "y": {name: [[b for _, b in log] for log in found] for name, found in runs.items()},
        "xlabel": "critic updates",
        "ylabel": "estimate less true return",
    }
    for name, found in rest.items():
        evidence(
            NAME,
            f"Estimate less true return: {name}",
            value=statistics.mean(found),
            seeds=SEEDS,
            spread=found,
            note="Mean of the last 3 of 8 measurements, at the states of a batch. Pendulum with noise of deviation 8 "
            "on its rewards, γ = 0.9; true returns without noise.",
            curve=curve if name == "DDPG" else None,
        )
    # Delay alone is late: at equal numbers of target updates (half of the critic's) it lies where DDPG lies.
    late = [
        b - runs["DDPG"][i][j][1] for i, log in enumerate(runs["delay alone"]) for j, (_, b) in enumerate(log[1::2])
    ]
    assert abs(statistics.mean(late)) < 3
    lower = [a - b for a, b in zip(rest["DDPG"], rest["twin minimum alone"], strict=True)]
    evidence(
        NAME,
        "By how much the twin minimum alone lowers the estimate",
        value=statistics.mean(lower),
        bar=1.0,
        better=">=",
        seeds=SEEDS,
        spread=lower,
    )


@pytest.mark.evidence
def test_learns_pendulum(evidence):
    """A mean return of -200 or more over 20 episodes in Gymnasium, by each seed."""
    made = original.learner()
    if not evidence.full:  # no more than that it runs: that it learns, `check_it_learns_to_push_where_it_pays` sees
        run = loop.train_off_policy(PENDULUM, made, made.Settings(steps=5, warmup=2, batch=16))
        assert run.curve[-1][0] == 40 and -2000 < run.curve[-1][2] < 0
        return
    runs = [loop.train_off_policy(PENDULUM, made, made.Settings(seed=seed, steps=1000)) for seed in SEEDS]
    means = [run.curve[-1][2] for run in runs]
    evidence(
        NAME,
        "Pendulum: the lowest mean return at which a run ended",
        value=min(means),
        bar=-200.0,
        better=">=",
        seeds=SEEDS,
        spread=means,
        note="A run ends when it has -200 over 20 episodes in Gymnasium, or after 8,000 environment steps.",
    )
    steps = [run.curve[-1][0] for run in runs]
    evidence(
        NAME, "Pendulum: environment steps to -200, median", value=statistics.median(steps), seeds=SEEDS, spread=steps
    )
