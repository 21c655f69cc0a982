"""The two loops: what they collect and store is checked against the physics, row by row; and broken copies."""

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from snippets.foundations import loop as original
from snippets.worlds.classic import CARTPOLE, PENDULUM, Envs, Transition
from tests.mutation import caught_by, load_mutant

torch.set_num_threads(1)
PATH = "snippets/foundations/loop.py"


def rng(seed):
    return torch.Generator().manual_seed(seed)


# A task whose steps can be told from one another: the state counts, and the reward says where it stood. An episode
# terminates at 7 where it began at an odd number, and is cut off after 5 steps where it began at an even one.

START = 1000


def counting_step(state, actions):
    after = state + torch.tensor([0.0, 1.0], dtype=state.dtype)
    odd = state[:, 0].abs() * START % 2 >= 1
    return after, state[:, 1] * 10 + actions, odd & (after[:, 1] >= 3)


COUNTING = dataclasses.replace(
    CARTPOLE, observations=2, limit=5, spread=(1.0, 0.0), step=counting_step, observe=lambda state: state
)


def follows(task, obs, actions, after, rewards, terminated):
    """Asserts that each row obeys the task's physics: obs (B, D), the rest (B, ...)."""
    state = obs
    if task is PENDULUM:
        state = torch.stack([torch.atan2(obs[:, 1], obs[:, 0]), obs[:, 2]], -1)
    expected, pay, over = task.step(state, actions)
    assert_close(task.observe(expected), after, rtol=0, atol=1e-4)
    assert_close(pay, rewards, rtol=0, atol=1e-3)
    assert torch.equal(over, terminated)


# Each check takes the module, so that broken copies can be put to it.


def check_a_rollout_obeys_the_physics(loop):
    for task, copies, horizon in ((CARTPOLE, 6, 60), (PENDULUM, 3, 210), (COUNTING, 8, 30)):
        envs, agent = Envs(task, copies, seed=1), loop.Agent(task, 8)
        r = loop.collect(envs, agent, horizon, rng(2))
        assert (
            r.obs.shape == (horizon, copies, task.observations) and r.mask.shape == (horizon, copies) and r.mask.all()
        )
        assert (r.terminated | r.truncated).any() and not (r.terminated & r.truncated).any()
        over = r.terminated | r.truncated
        follows(
            task,
            r.obs.flatten(0, 1),
            r.actions.flatten(0, 1),
            *_after(task, r),
            r.rewards.flatten(),
            r.terminated.flatten(),
        )
        nxt, after = r.obs[1:], _after(task, r)[0].view_as(r.obs)[:-1]
        assert_close(nxt[~over[:-1]], after[~over[:-1]], rtol=0, atol=1e-4)  # what the agent acts on next
        again = loop.collect(Envs(task, copies, seed=1), agent, horizon, rng(2))
        assert all(torch.equal(getattr(r, f.name), getattr(again, f.name)) for f in dataclasses.fields(r))


def _after(task, r):
    """Where the steps led, from the physics: a rollout itself keeps only the values of it."""
    state = r.obs.flatten(0, 1)
    if task is PENDULUM:
        state = torch.stack([torch.atan2(state[:, 1], state[:, 0]), state[:, 2]], -1)
    return (task.observe(task.step(state, r.actions.flatten(0, 1))[0]),)


def check_log_probs_and_values_are_the_agents(loop):
    """`values` of where a step began, `next_values` of where it led, at an episode's end too; log-probs by torch's
    distributions."""
    for task in (CARTPOLE, PENDULUM):
        envs, agent = Envs(task, 4, seed=0), loop.Agent(task, 8)
        with torch.no_grad():
            for p in agent.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=rng(3)))
        r = loop.collect(envs, agent, 205, rng(4))
        (after,) = _after(task, r)
        with torch.no_grad():
            assert_close(r.values, agent.critic(r.obs).squeeze(-1))
            assert_close(r.next_values.flatten(), agent.critic(after).squeeze(-1), rtol=1e-4, atol=1e-4)
            out = agent.policy(r.obs)
            if task.discrete:
                chance = torch.distributions.Categorical(logits=out)
                logps, entropy = chance.log_prob(r.actions), chance.entropy()
            else:
                chance = torch.distributions.Normal(out, agent.log_std.exp())
                logps, entropy = chance.log_prob(r.actions).sum(-1), chance.entropy().sum(-1)
            assert_close(r.logps, logps)
            assert_close(agent.logps(r.obs.flatten(0, 1), r.actions.flatten(0, 1))[1], entropy.flatten())
        assert not r.logps.requires_grad and not r.next_values.requires_grad
    agent = loop.Agent(dataclasses.replace(PENDULUM, actions=3), 8)  # three dimensions: their log-probs add up
    obs, actions = torch.randn(5, 3, generator=rng(5)), torch.randn(5, 3, generator=rng(6))
    both = torch.distributions.Independent(torch.distributions.Normal(agent.policy(obs), torch.ones(3)), 1)
    for found, expected in zip(agent.logps(obs, actions), (both.log_prob(actions), both.entropy()), strict=True):
        assert_close(found, expected)


def check_an_agent_samples_its_policy(loop):
    """20,000 actions at one state: frequencies, mean and spread within four standard errors."""
    agent, obs, n = loop.Agent(CARTPOLE, 8), torch.ones(1, 4), 20_000
    with torch.no_grad():
        agent.policy[-1].bias.copy_(torch.tensor([0.0, 0.7]))
        p = agent.policy(obs).softmax(-1)[0, 1].item()
        share = agent.act(obs.expand(n, 4), rng(0)).float().mean().item()
        assert abs(share - p) < 4 * (p * (1 - p) / n) ** 0.5
        agent, obs = loop.Agent(PENDULUM, 8), torch.ones(1, 3)
        agent.log_std.fill_(math.log(0.4))
        actions = agent.act(obs.expand(n, 3), rng(1))
        assert abs((actions - agent.policy(obs)).mean().item()) < 4 * 0.4 / n**0.5
        assert abs(actions.std().item() - 0.4) < 4 * 0.4 / (2 * n) ** 0.5


def check_whole_episodes_are_masked(loop):
    """horizon = 0: each copy's first episode, its last step included, and nothing after it counts."""
    envs = Envs(COUNTING, 40, seed=5)
    r = loop.collect(envs, loop.Agent(COUNTING, 8), 0, rng(6))
    over = (r.terminated | r.truncated).long()
    before = over.cumsum(0) - over  # ends before this step
    assert torch.equal(r.mask, before == 0)
    assert r.mask.sum(0).unique().tolist() == [3, 5] and len(r.mask) == 5
    assert ((over * r.mask).sum(0) == 1).all()


def check_networks_start_near_nothing(loop):
    """Orthogonal weights, zero biases, and a first policy that is nearly uniform."""
    net = loop.mlp(6, 10, 3, last_gain=0.5)
    first, last = net[0].weight, net[2].weight
    assert_close(first.T @ first, 2 * torch.eye(6), rtol=0, atol=1e-5)
    assert_close(last @ last.T, 0.25 * torch.eye(3), rtol=0, atol=1e-5)
    assert len(net) == 3 and not net[0].bias.any() and not net[2].bias.any()
    agent = loop.Agent(CARTPOLE, 64)
    assert len(agent.policy) == len(agent.critic) == 5  # two hidden layers each
    assert (agent.policy(torch.randn(50, 4, generator=rng(0))).softmax(-1) - 0.5).abs().max() < 0.02


@dataclass
class Toy:
    epochs: int = 3
    minibatch: int = 4
    max_norm: float = 1e9


def a_batch(loop, size):
    x = torch.arange(float(size))
    return loop.Batch(x.unsqueeze(-1).expand(size, 4).clone(), *(x + 100 * i for i in range(1, 6)))


def check_descent_covers_each_row_once_an_epoch(loop):
    for size, minibatch, parts in ((12, 4, 3), (10, 4, 3), (10, 0, 1), (10, 99, 1)):
        seen, weight = [], nn.Parameter(torch.zeros(1))

        def loss(agent, batch, settings, seen=seen, weight=weight):
            seen.append(batch.obs[:, 0].tolist())
            for i, f in enumerate(dataclasses.fields(batch)[1:], 1):
                assert torch.equal(getattr(batch, f.name), batch.obs[:, 0] + 100 * i)  # rows stay together
            return (weight * 1).sum()

        optimizer = torch.optim.SGD([weight], lr=1.0)
        loop.descend(loss)(None, optimizer, a_batch(loop, size), Toy(minibatch=minibatch), rng(0))
        assert len(seen) == 3 * parts
        epochs = [sum(seen[i * parts : (i + 1) * parts], []) for i in range(3)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        if parts > 1:
            assert epochs[0] != epochs[1] != sorted(epochs[1])
        assert weight.item() == -3 * parts  # a gradient of 1 a step: none is kept from the step before


def check_the_gradient_is_clipped(loop):
    weights = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:]}], lr=1.0)
    loss = lambda agent, batch, settings: (3 * weights[0] + 4 * weights[1]).sum()  # noqa: E731
    loop.descend(loss)(None, optimizer, a_batch(loop, 4), Toy(epochs=1, max_norm=0.5), rng(0))
    assert_close(torch.cat([*weights]).detach(), torch.tensor([-0.3, -0.4]), rtol=1e-4, atol=0)
    loop.descend(loss)(None, optimizer, a_batch(loop, 4), Toy(epochs=1, max_norm=50.0), rng(0))
    assert_close(torch.cat([*weights]).detach(), torch.tensor([-3.3, -4.4]), rtol=1e-4, atol=0)


# The replay buffer.


def fill(loop, capacity, adds, copies=3):
    """A buffer in which each number stands for one step of one copy."""
    replay = loop.Replay(CARTPOLE, capacity)
    for i in range(adds):
        x = torch.arange(i * copies, (i + 1) * copies).float()
        obs = x.unsqueeze(-1).expand(copies, 4)
        replay.add(obs, x.long(), Transition(obs + 0.5, -x, x % 2 == 0, x % 2 == 1))
    return replay


def check_the_oldest_go_first(loop):
    for capacity, adds in ((10, 2), (10, 3), (10, 4), (10, 7), (9, 5), (3, 4)):
        replay = fill(loop, capacity, adds)
        kept = list(range(3 * adds))[-capacity:]
        assert replay.count == len(kept)
        rows = torch.cat([s.obs[:, 0] for s in replay.sample(20, 50, rng(0))])
        assert rows.unique().tolist() == kept


def check_what_comes_out_is_what_went_in(loop):
    replay = fill(loop, 50, 9)
    for s in replay.sample(3, 40, rng(1)):
        x = s.obs[:, 0]
        assert torch.equal(s.obs, x.unsqueeze(-1).expand(40, 4)) and torch.equal(s.after, s.obs + 0.5)
        assert torch.equal(s.rewards, -x) and torch.equal(s.terminated, x % 2 == 0)
        assert torch.equal(s.actions, x.long()) and s.actions.dtype == torch.long
    names = [f.name for f in dataclasses.fields(s)]
    assert "truncated" not in names and "terminated" in names  # the clock must not cut a bootstrap
    replay = loop.Replay(PENDULUM, 5, torch.float64)
    obs = torch.randn(2, 3, generator=rng(0), dtype=torch.float64)
    no = torch.zeros(2, dtype=torch.bool)
    replay.add(obs, obs[:, :1], Transition(obs, obs[:, 0], no, no))
    (s,) = replay.sample(1, 8, rng(0))
    assert s.actions.shape == (8, 1) and s.obs.dtype == s.actions.dtype == torch.float64
    assert all(row in obs.tolist() for row in s.obs.tolist())


def check_samples_are_uniform(loop):
    """Chi-square over 30 rows: below the quantile that one sample in 10,000 exceeds. And `times` samples differ."""
    replay = fill(loop, 30, 14)
    samples = list(replay.sample(100, 60, rng(2)))
    assert len(samples) == 100 and all(len(s.obs) == 60 for s in samples)
    counts = torch.bincount(torch.cat([s.actions for s in samples]) - 12, minlength=30).double()
    assert len(counts) == 30
    assert ((counts - 200) ** 2 / 200).sum() < 65.2  # 29 degrees of freedom
    assert not torch.equal(samples[0].obs, samples[1].obs)


def check_the_target_follows(loop):
    target, online = [torch.zeros(2)], [torch.ones(2)]
    loop.track(target, online, 0.25)
    loop.track(target, online, 0.25)
    assert torch.equal(target[0], torch.full((2,), 0.4375)) and torch.equal(online[0], torch.ones(2))


def check_random_actions(loop):
    """Uniform: mean and variance within four standard errors, and nothing beyond the bound."""
    n = 20_000
    choice = loop.random_actions(CARTPOLE, n, rng(0))
    assert (
        choice.shape == (n,) and set(choice.tolist()) == {0, 1} and abs(choice.float().mean() - 0.5) < 4 * 0.5 / n**0.5
    )
    torque = loop.random_actions(PENDULUM, n, rng(0))
    assert torque.shape == (n, 1) and torque.abs().max() <= 2 and torque.abs().max() > 1.99
    assert abs(torque.mean()) < 4 * (4 / 3 / n) ** 0.5 and abs(torque.var() - 4 / 3) < 0.05


# Both loops as a whole, with learners that only watch.


class Watcher:
    """A learner that keeps all it is shown. Its actions are 1, so that warm-up steps show."""

    def __init__(self, task, settings):
        self.seen, self.acted, self.noise = [], 0, torch.rand(1)

    def act(self, obs, generator):
        assert not torch.is_grad_enabled()
        self.acted += 1
        return torch.ones(len(obs), dtype=torch.long)

    def greedy(self, obs):
        return (obs[:, 2] > 0).long()

    def update(self, sample, generator):
        self.seen.append(sample)


def watch(loop, **options):
    judge = options.pop("judge", False)
    settings = loop.ReplaySettings(**dict(steps=45, envs=5, warmup=10, batch=17, updates=3, check_every=10) | options)
    return loop.train_off_policy(CARTPOLE, Watcher, settings, judge=judge)


def check_the_replay_buffer_obeys_the_physics(loop):
    """All that a learner of 40 steps sees, ends of episodes among it: no step is a reset."""
    run = watch(loop, steps=150)
    w = run.agent
    assert len(w.seen) == 3 * 140 and w.acted == 140
    rows = [torch.cat([getattr(s, f.name) for s in w.seen]) for f in dataclasses.fields(original.Sample)]
    obs, actions, rewards, after, terminated = rows
    follows(CARTPOLE, obs, actions, after, rewards, terminated)
    assert terminated.any() and len(obs) == 3 * 140 * 17
    assert len(torch.cat([s.obs for s in w.seen[-3:]]).unique(dim=0)) > 40  # of the whole past, 51 draws
    first = torch.cat([s.actions for s in w.seen[:6]])
    assert (first == 0).any()  # what the warm-up stored
    assert [point[0] for point in run.curve] == [750]
    assert math.isnan(run.curve[0][2]) and not run.solved and run.seconds == run.curve[-1][1] > 0


def check_off_policy_training_is_a_function_of_its_seed(loop):
    a, b, c = watch(loop), watch(loop), watch(loop, seed=1)
    for name in ("obs", "actions", "rewards", "after"):
        assert all(
            torch.equal(getattr(x, name), getattr(y, name)) for x, y in zip(a.agent.seen, b.agent.seen, strict=True)
        )
    assert torch.equal(a.agent.noise, b.agent.noise) and not torch.equal(a.agent.noise, c.agent.noise)
    assert not torch.equal(a.agent.seen[0].obs, c.agent.seen[0].obs)
    rows = [{tuple(row) for s in run.agent.seen for row in s.obs.tolist()} for run in (a, c)]
    assert not rows[0] & rows[1]  # starts of its own for each seed
    d = watch(loop, judge=True)  # evaluation takes nothing from the training's random numbers
    assert torch.equal(a.agent.seen[-1].obs, d.agent.seen[-1].obs)
    assert [p[0] for p in d.curve] == [100, 150, 200, 225] and all(10 < p[2] < 100 for p in d.curve)
    torch.manual_seed(77)
    state = torch.get_rng_state()
    watch(loop)
    assert torch.equal(state, torch.get_rng_state())  # nor from the caller's


def reinforce(loop, lr=1e-2):
    """A toy: REINFORCE on whole returns less their mean."""

    @dataclass
    class ToySettings(loop.Settings):
        epochs: int = 1
        minibatch: int = 0
        max_norm: float = 1e9

    def advantages(r, settings):
        over = r.terminated | r.truncated
        togo, tail = torch.zeros_like(r.rewards), torch.zeros_like(r.rewards[0])
        for t in reversed(range(len(togo))):
            tail = r.rewards[t] + settings.gamma * tail * ~over[t]
            togo[t] = tail
        return togo - togo[r.mask.bool()].mean(), togo

    def loss(agent, batch, settings):
        return -(agent.logps(batch.obs, batch.actions)[0] * batch.advantages).mean()

    return loop.Algorithm(ToySettings, advantages, loop.descend(loss))


def check_on_policy_training_is_a_function_of_its_seed(loop):
    method = reinforce(loop)

    def go(judge, seed=0, **options):
        torch.manual_seed(77)
        before = torch.get_rng_state()
        settings = method.settings(**dict(seed=seed, updates=5, envs=4, horizon=16, hidden=8, check_every=2) | options)
        task = dataclasses.replace(CARTPOLE, episodes=20)  # the judge looks at two
        run = loop.train(task, method, settings, judge=judge, stop=False)
        assert torch.equal(before, torch.get_rng_state())
        return run, torch.cat([p.detach().flatten() for p in run.agent.parameters()])

    (a, wa), (_, wb), (c, wc), (_, wd) = go(False), go(False), go(True), go(False, seed=1)
    assert torch.equal(wa, wb) and torch.equal(wa, wc) and not torch.allclose(wa, wd)
    assert [p[0] for p in c.curve] == [128, 256, 320] and [p[0] for p in a.curve] == [320] and math.isnan(a.curve[0][2])
    again, _ = go(True)
    assert [(p[0], p[2]) for p in again.curve] == [(p[0], p[2]) for p in c.curve]
    assert [p[1] for p in c.curve] == sorted(p[1] for p in c.curve) and c.curve[0][1] > 0
    whole, _ = go(False, horizon=0)
    assert 5 * 4 * 8 < whole.curve[0][0] < 5 * 4 * 60  # steps of whole episodes: only those that count
    _, w0 = go(False, updates=1, horizon=0)
    _, w1 = go(False, updates=1, horizon=0, seed=1)
    assert not torch.allclose(w0, w1)


def check_the_batch_is_what_counts(loop):
    """The update gets the masked steps in one row each, and the advantages that the algorithm made of the rollout."""
    seen = []
    method = reinforce(loop)

    def advantages(rollout, settings):
        seen.append(rollout)
        return rollout.rewards * 2, rollout.rewards * 3

    def update(agent, optimizer, batch, settings, generator):
        r, kept = seen[-1], seen[-1].mask.bool()
        assert len(batch) == kept.sum() and (horizon > 0 or not kept.all())
        for name in ("obs", "actions", "logps", "values"):
            assert torch.equal(getattr(batch, name), getattr(r, name)[kept])
        assert torch.equal(batch.advantages, 2 * r.rewards[kept]) and torch.equal(batch.returns, 3 * r.rewards[kept])
        assert len(optimizer.param_groups[0]["params"]) == len(list(agent.parameters()))
        assert optimizer.defaults["lr"] == settings.lr == 2e-3 and optimizer.defaults["eps"] == 1e-5

    for horizon in (0, 12):
        settings = method.settings(updates=2, envs=6, horizon=horizon, hidden=8, lr=2e-3)
        run = loop.train(CARTPOLE, loop.Algorithm(method.settings, advantages, update), settings, judge=False)
        assert run.curve[0][0] == sum(int(r.mask.sum()) for r in seen[-2:])  # steps that count
    assert not torch.equal(seen[0].obs[0], seen[1].obs[0])  # each whole-episode rollout has starts of its own
    for horizon in (0, 12):
        settings = method.settings(seed=1, updates=1, envs=6, horizon=horizon, hidden=8, lr=2e-3)
        loop.train(CARTPOLE, loop.Algorithm(method.settings, advantages, update), settings, judge=False)
    starts = [{tuple(row) for row in r.obs[0].tolist()} for r in seen]
    assert not starts[4] & (starts[0] | starts[1]) and not starts[5] & starts[2]  # nor those of another seed
    assert_close(seen[3].obs[0][~(seen[2].terminated | seen[2].truncated)[-1]], _end(seen[2]), rtol=0, atol=1e-5)


def _end(r):
    (after,) = _after(CARTPOLE, r)
    return after.view_as(r.obs)[-1][~(r.terminated | r.truncated)[-1]]


def check_the_judge_never_sees_an_episode_twice(loop):
    """Ten episodes first, then all hundred where these promise something; every one with a seed of its own, and other
    ones for another training seed."""
    asked = []
    quality = [100.0]

    def evaluate(task, act, *, episodes, seed):
        asked.append(list(range(seed, seed + episodes)))
        return torch.full((episodes,), quality[0])

    kept, loop.evaluate = loop.evaluate, evaluate
    try:
        judge = loop.Judge(CARTPOLE, None, seed=0)
        assert judge() == (100.0, False) and [len(x) for x in asked] == [10]
        quality[0] = 400.0
        assert judge() == (400.0, False) and [len(x) for x in asked] == [10, 10, 100]
        quality[0] = 475.0
        assert judge() == (475.0, True)
        low = loop.Judge(PENDULUM, None, seed=0)
        quality[0] = -260.0
        assert low() == (-260.0, False)
        assert len(asked[-1]) == 2
        quality[0] = -200.0
        assert low() == (-200.0, True)
        loop.Judge(dataclasses.replace(CARTPOLE, episodes=5), None, seed=9)()
        assert len(asked[-1]) == 2  # at least
        quality[0] = 356.25
        loop.Judge(CARTPOLE, None, seed=8)()
        assert len(asked[-1]) == 100  # a quarter short of the bar is near enough for a second look
        quality[0] = 0.0
        cart = sum(asked[:5], [])
        assert len(set(cart)) == len(cart)
        loop.Judge(CARTPOLE, None, seed=1)()
        assert not set(asked[-1]) & set(cart)
    finally:
        loop.evaluate = kept


def check_training_stops_when_the_task_is_solved(loop):
    settings = loop.ReplaySettings(steps=60, envs=2, warmup=5, batch=4, updates=1, check_every=20)
    easy = dataclasses.replace(CARTPOLE, solved=15.0, episodes=2)
    run = loop.train_off_policy(easy, Watcher, settings)
    assert run.solved and [p[0] for p in run.curve] == [40] and run.curve[-1][2] >= 15
    run = loop.train_off_policy(easy, Watcher, settings, stop=False)
    assert run.solved and [p[0] for p in run.curve] == [40, 80, 120]
    method = reinforce(loop)
    settings = method.settings(updates=2, envs=2, horizon=8, hidden=8)
    for stop, points in ((True, [16]), (False, [16, 32])):
        run = loop.train(dataclasses.replace(easy, solved=5.0), method, settings, stop=stop)
        assert run.solved and [p[0] for p in run.curve] == points


def check_the_judge_is_seeded_by_the_run(loop):
    asked = []

    def judge(task, act, *, seed):
        asked.append(seed)
        return lambda: (0.0, False)

    kept, loop.Judge = loop.Judge, judge
    try:
        watch(loop, seed=7, steps=11)
        method = reinforce(loop)
        loop.train(CARTPOLE, method, method.settings(seed=8, updates=1, envs=1, horizon=4, hidden=8))
        assert asked == [7, 8]
    finally:
        loop.Judge = kept


def check_settings_are_refused(loop):
    method = reinforce(loop)
    on = [
        ("updates", 0),
        ("envs", 0),
        ("hidden", 0),
        ("check_every", 0),
        ("horizon", -1),
        ("gamma", 1.1),
        ("lam", -0.1),
    ]
    on += [("lr", 0.0), ("lr", math.nan), ("gamma", math.nan)]
    for name, value in on:
        with pytest.raises(ValueError, match=f"^{name} must .*{value}"):
            loop.train(
                CARTPOLE, method, method.settings(**dict(updates=1, envs=2, horizon=2) | {name: value}), judge=False
            )
    off = [("steps", 0), ("batch", 0), ("capacity", 0), ("warmup", -1), ("tau", 1.5), ("updates", 0)]
    for name, value in off:
        with pytest.raises(ValueError, match=f"^{name} must .*{value}"):
            loop.train_off_policy(
                CARTPOLE,
                Watcher,
                loop.ReplaySettings(**dict(steps=3, envs=2, warmup=1, updates=1) | {name: value}),
                judge=False,
            )
    few = dict(steps=3, envs=3, warmup=1, batch=2, updates=1)
    with pytest.raises(ValueError, match="capacity 2 holds no step of all 3 copies"):
        loop.train_off_policy(CARTPOLE, Watcher, loop.ReplaySettings(**few, capacity=2), judge=False)
    loop.train_off_policy(CARTPOLE, Watcher, loop.ReplaySettings(**few, capacity=3), judge=False)
    with pytest.raises(ValueError, match=r"100 steps, all of them warm-up \(100\)"):
        loop.train_off_policy(CARTPOLE, Watcher, loop.ReplaySettings(steps=100, warmup=100), judge=False)


SLOW = [  # last, so that a broken copy is caught by a quick check where one can
    check_the_replay_buffer_obeys_the_physics,
    check_log_probs_and_values_are_the_agents,
    check_training_stops_when_the_task_is_solved,
    check_off_policy_training_is_a_function_of_its_seed,
    check_the_batch_is_what_counts,
    check_on_policy_training_is_a_function_of_its_seed,
    check_a_rollout_obeys_the_physics,
]
CHECKS = [f for name, f in list(globals().items()) if name.startswith("check_") and f not in SLOW] + SLOW


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_loops(check):
    check(original)


MISTAKES = {
    "zero gain": ("last_gain if last else 2**0.5", "2**0.5"),
    "biases kept": ("nn.init.zeros_(layer.bias)", "pass"),
    "greedy where it should sample": (
        "torch.multinomial(out.softmax(-1), 1, generator=generator).squeeze(-1)",
        "out.argmax(-1)",
    ),
    "variance for deviation": (
        "return out + self.log_std.exp() * noise",
        "return out + (2 * self.log_std).exp() * noise",
    ),
    "logits as log-probs": ("log_probs = out.log_softmax(-1)", "log_probs = out"),
    "dimensions not summed": ("normal.log_prob(actions).sum(-1), normal", "normal.log_prob(actions).mean(-1), normal"),
    "entropy with the wrong sign": ("-(log_probs.exp() * log_probs).sum(-1)", "(log_probs.exp() * log_probs).sum(-1)"),
    "values of the next start": (
        "agent.values(obs), agent.values(after)",
        "agent.values(obs), agent.values(obs.roll(-1, 0))",
    ),
    "values of the old state": ("agent.values(obs), agent.values(after)", "agent.values(obs), agent.values(obs)"),
    "the last step masked": (
        "mask.append(alive)\n        if horizon == 0:\n            alive = alive & ~(step.terminated | step.truncated)",
        "alive = alive & ~(step.terminated | step.truncated)\n        mask.append(alive)",
    ),
    "a cut-off episode goes on": ("alive & ~(step.terminated | step.truncated)", "alive & ~step.terminated"),
    "until the first copy has ended": ("if horizon else alive.any()", "if horizon else alive.all()"),
    "mask ignored": ("kept = rollout.mask.bool()", "kept = torch.ones_like(rollout.mask).bool()"),
    "one pass": ("for _ in range(settings.epochs)", "for _ in range(1)"),
    "rows in order": (
        "torch.randperm(len(batch), generator=generator).split(size)",
        "torch.arange(len(batch)).split(size)",
    ),
    "rows with replacement": (
        "torch.randperm(len(batch), generator=generator)",
        "torch.randint(len(batch), (len(batch),), generator=generator)",
    ),
    "whole batch each time": ("batch if len(rows) == len(batch) else batch[rows]", "batch"),
    "gradients pile up": (
        "                optimizer.zero_grad()\n                loss(agent",
        "                loss(agent",
    ),
    "no clip": ("nn.utils.clip_grad_norm_(parameters, settings.max_norm)", "pass"),
    "each tensor clipped alone": (
        "nn.utils.clip_grad_norm_(parameters, settings.max_norm)",
        "[nn.utils.clip_grad_norm_(p, settings.max_norm) for p in parameters]",
    ),
    "the same starts each update": ("seed=settings.seed * 100_003 + update", "seed=settings.seed * 100_003"),
    "new environments for every rollout": ("if settings.horizon == 0:\n            envs", "if True:\n            envs"),
    "the caller's dice": (
        "with torch.random.fork_rng():\n        torch.manual_seed(settings.seed)\n        agent = Agent",
        "if True:\n        agent = Agent",
    ),
    "the caller's dice, off-policy": (
        "with torch.random.fork_rng():\n        torch.manual_seed(settings.seed)\n        agent = learner",
        "if True:\n        torch.manual_seed(settings.seed)\n        agent = learner",
    ),
    "evaluation throws the training's dice": (
        "act = lambda obs: agent.act(obs, dice)",
        "act = lambda obs: agent.act(obs, generator)",
    ),
    "steps that do not count": ("steps + len(batch)", "steps + rollout.mask.numel()"),
    "an episode twice": ("seed, self.seed = self.seed, self.seed + count", "seed = self.seed"),
    "one seed for all judges": ("1_000_000 * (seed + 1)", "1_000_000"),
    "the first look decides": ("mean = self.look(self.task.episodes)\n", "pass\n"),
    "a poor policy is looked at": ("self.task.solved - 0.25 * abs(self.task.solved)", "-1e9"),
    "negative returns dismissed": ("0.25 * abs(self.task.solved)", "0.25 * self.task.solved"),
    "solved a little early": ("return mean, mean >= self.task.solved", "return mean, mean >= 0.8 * self.task.solved"),
    "never stops": (
        "            if solved and stop:\n                break\n    return Run(agent, curve or [(step *",
        "    return Run(agent, curve or [(step *",
    ),
    "gamma unchecked": ('for name in ("gamma", "lam", "tau"):', 'for name in ("lam", "tau"):'),
    "lr unchecked": ("if not settings.lr > 0", "if settings.lr < 0"),
    "horizon unchecked": ('for name in ("horizon", "warmup"):', 'for name in ("warmup",):'),
    "capacity unchecked": ('"steps", "batch", "capacity"):', '"steps", "batch"):'),
    "more copies than the buffer holds": (
        'getattr(settings, "capacity", settings.envs) < settings.envs',
        'getattr(settings, "capacity", settings.envs) < settings.envs - 1',
    ),
    "a buffer for one step of all refused": (
        'getattr(settings, "capacity", settings.envs) < settings.envs',
        'getattr(settings, "capacity", settings.envs + 1) <= settings.envs',
    ),
    "nothing but warm-up": ("if settings.steps <= settings.warmup", "if settings.steps < settings.warmup"),
    "no wrap": (
        "(self.next + torch.arange(len(obs))) % self.capacity",
        "(self.next + torch.arange(len(obs))).clamp(max=self.capacity - 1)",
    ),
    "never the last row": ("torch.randint(self.count,", "torch.randint(self.count - 1,"),
    "rows not yet written": ("torch.randint(self.count,", "torch.randint(self.capacity,"),
    "the newest half": ("torch.randint(self.count,", "torch.randint((self.count + 1) // 2,"),
    "one sample many times": ("yield Sample(*part)", "yield (first := locals().get('first') or Sample(*part))"),
    "truncation stored as an end": (
        "step.rewards, step.after, step.terminated)",
        "step.rewards, step.after, step.terminated | step.truncated)",
    ),
    "the next start stored": ("step.rewards, step.after, step.terminated)", "step.rewards, obs, step.terminated)"),
    "the target runs off": ("torch._foreach_lerp_(target, online, tau)", "torch._foreach_lerp_(online, target, tau)"),
    "half the actions": (
        "(2 * torch.rand(count, task.actions, generator=generator) - 1)",
        "torch.rand(count, task.actions, generator=generator)",
    ),
    "no warm-up": (
        "if step <= settings.warmup:\n            actions = random",
        "if False:\n            actions = random",
    ),
    "updates from the start": (
        "if step > settings.warmup:\n            for sample",
        "if True:\n            for sample",
    ),
    "one update": ("replay.sample(settings.updates, settings", "replay.sample(1, settings"),
    "obs after the step": ("obs = envs.obs\n        if step <=", "obs = envs.obs * 1.001\n        if step <="),
    "steps of one copy": ("curve.append((step * envs.count, seconds, mean))", "curve.append((step, seconds, mean))"),
    "a gradient through acting": (
        "with torch.no_grad():\n                actions = agent.act",
        "if True:\n                actions = agent.act",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    """Each deliberate mistake makes at least one check fail."""
    mutant = load_mutant(PATH, *MISTAKES[mistake])
    assert any(caught_by(mutant, [check]) for check in CHECKS)


def test_one_argument_changes_the_method():
    """Both loops run with a method of each kind, and the method is all that differs between two runs."""
    from snippets.foundations import dqn

    method = reinforce(original)
    still = original.Algorithm(method.settings, method.advantages, lambda *_: None)
    settings = method.settings(updates=2, envs=4, horizon=16, hidden=8)
    weights = []
    for algorithm in (method, still):
        run = original.train(CARTPOLE, algorithm, settings, judge=False)
        weights.append(torch.cat([p.detach().flatten() for p in run.agent.parameters()]))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = torch.cat([p.detach().flatten() for p in original.Agent(CARTPOLE, 8).parameters()])
    assert torch.equal(weights[1], start) and not torch.equal(weights[0], start)
    small = dict(steps=20, envs=2, warmup=5, batch=8, updates=1, hidden=8)
    for learner, options in ((Watcher, original.ReplaySettings), (dqn.learner(), dqn.learner().Settings)):
        run = original.train_off_policy(CARTPOLE, learner, options(**small), judge=False)
        assert isinstance(run.agent, learner) and run.curve[-1][0] == 40


@pytest.mark.evidence
def test_no_row_breaks_the_physics(evidence):
    """Rows of the replay buffer and of a rollout, ends of episodes among them, whose next observation, or the value of
    it, is not where CartPole's physics leads."""
    seeds = [0, 1, 2, 3, 4] if evidence.full else [0]
    stored, rolled = [], []
    for seed in seeds:
        w = watch(original, steps=150, seed=seed).agent
        rows = [torch.cat([getattr(s, name) for s in w.seen]) for name in ("obs", "actions", "after")]
        wrong = (CARTPOLE.step(rows[0], rows[1])[0] - rows[2]).abs() > 1e-5
        stored.append(100 * wrong.any(-1).double().mean().item())
        agent = original.Agent(CARTPOLE, 16)
        r = original.collect(Envs(CARTPOLE, 16, seed=seed), agent, 400, rng(seed))
        with torch.no_grad():
            values = agent.values(_after(CARTPOLE, r)[0]).view_as(r.values)
        rolled.append(100 * ((values - r.next_values).abs() > 1e-5).double().mean().item())
    for what, found in (("replay buffer", stored), ("rollout", rolled)):
        evidence(
            "foundations/loop",
            f"Rows of a {what} that do not lead where CartPole's physics leads",
            value=max(found),
            bar=0.0,
            unit="%",
            seeds=seeds,
            spread=found,
        )
