"""The classic tasks against Gymnasium itself: physics, rewards, ends, starts, resets; and broken copies."""

import math
import time

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from torch.testing import assert_close

from snippets.worlds import classic as original
from tests.mutation import caught_by, load_mutant

torch.set_num_threads(1)
PATH = "snippets/worlds/classic.py"
NAME = "worlds/classic"
SEEDS = [0, 1, 2, 3, 4]
TASKS = ["CARTPOLE", "PENDULUM"]


def rng(seed):
    return torch.Generator().manual_seed(seed)


def balance(state):
    """Keeps a pole up and the cart on its track for a whole episode."""
    return (state @ torch.tensor([0.1, 0.3, 3.0, 1.0], dtype=state.dtype) > 0).long()


def random_action(task, dice):
    """For Gymnasium: an int, or an array (1,) that is often beyond the bound, so that clipping shows."""
    return int(dice.integers(2)) if task.discrete else dice.uniform(-3, 3, size=1)


def as_row(action):
    return torch.as_tensor(action).reshape(1, -1).squeeze(-1) if isinstance(action, int) else torch.tensor(action)[None]


def some_actions(task, count, generator):
    if task.discrete:
        return torch.randint(task.actions, (count,), generator=generator)
    return 6 * torch.rand(count, task.actions, generator=generator, dtype=torch.float64) - 3


def differences(classic, name, seed, steps=1000):
    """Our state runs beside Gymnasium's own (its `unwrapped.state`, float64) with the same random actions and is set
    to it at resets only: the largest difference of a state, of a reward, and how many resets there were."""
    task = getattr(classic, name)
    env, dice = gymnasium.make(task.name, disable_env_checker=True), np.random.default_rng(seed)
    env.reset(seed=seed)
    state, age, off, off_reward, resets = torch.tensor(env.unwrapped.state)[None], 0, 0.0, 0.0, 0
    for _ in range(steps):
        action = random_action(task, dice)
        obs, reward, terminated, truncated, _ = env.step(action)
        state, rewards, over = task.step(state, as_row(action))
        age += 1
        assert state.dtype == rewards.dtype == torch.float64
        off = max(off, (state[0] - torch.tensor(env.unwrapped.state)).abs().max().item())
        off_reward = max(off_reward, abs(rewards.item() - float(reward)))
        assert over.tolist() == [terminated]
        assert truncated == (age == task.limit)
        assert_close(task.observe(state)[0].float(), torch.tensor(obs), rtol=0, atol=1e-6)
        if terminated or truncated:
            env.reset()
            state, age, resets = torch.tensor(env.unwrapped.state)[None], 0, resets + 1
    return off, off_reward, resets


# Each check takes the module, so that broken copies can be put to it.


def check_the_physics_is_gymnasiums(classic):
    for name, least in (("CARTPOLE", 5), ("PENDULUM", 1)):
        off, off_reward, resets = differences(classic, name, seed=0, steps=220)
        assert off <= 1e-12 and off_reward <= 1e-12 and resets >= least, (name, off, off_reward, resets)


def check_states_all_over_the_place(classic):
    """Far beyond what an episode visits: many turns of the angle, speeds at the clip, both sides of every limit."""
    dice = np.random.default_rng(1)
    for name, scale in (("CARTPOLE", (2.5, 4, 0.22, 4)), ("PENDULUM", (40, 8, 0, 0))):
        task = getattr(classic, name)
        env = gymnasium.make(task.name, disable_env_checker=True)
        env.reset(seed=0)
        states = dice.uniform(-1, 1, size=(120, 4)) * scale
        states = states[:, :4] if name == "CARTPOLE" else states[:, :2]
        actions = [random_action(task, dice) for _ in states]
        after, rewards, over = task.step(torch.tensor(states), torch.tensor(np.array(actions)))
        for i, action in enumerate(actions):
            env.unwrapped.state, env.unwrapped.steps_beyond_terminated = states[i].copy(), None
            obs, reward, terminated, _, _ = env.unwrapped.step(action)
            assert_close(after[i], torch.tensor(env.unwrapped.state), rtol=0, atol=1e-12)
            assert_close(task.observe(after)[i].float(), torch.tensor(obs), rtol=0, atol=1e-6)
            assert rewards[i].item() == pytest.approx(float(reward), abs=1e-11)
            assert over[i].item() == terminated
        assert over.any() == (name == "CARTPOLE") and not over.all()


def check_one_degree_beyond_upright_is_one_degree_short_of_it(classic):
    """The reward knows the angle modulo a turn: worst hanging down, best upright, symmetric about both."""
    turns, degree = 2 * math.pi * torch.arange(-3.0, 4.0, dtype=torch.float64), math.pi / 180
    for angle in (0.0, degree, 1.0, math.pi - degree):
        states = torch.stack([turns + angle, torch.zeros(7, dtype=torch.float64)], -1)
        torque = torch.zeros(7, 1, dtype=torch.float64)
        rewards = torch.cat([classic.pendulum_step(s, torque)[1] for s in (states, -states)])
        assert_close(rewards, torch.full_like(rewards, -(angle**2)), rtol=0, atol=1e-11)


def check_the_constants_of_the_tasks(classic):
    for name in TASKS:
        task = getattr(classic, name)
        spec = gymnasium.spec(task.name)
        env = gymnasium.make(task.name)
        assert task.limit == spec.max_episode_steps
        assert env.observation_space.shape == (task.observations,)
        if task.discrete:
            assert env.action_space.n == task.actions and task.bound is None
            assert task.solved == spec.reward_threshold and task.episodes == 100
        else:
            assert env.action_space.shape == (task.actions,)
            assert (env.action_space.low, env.action_space.high) == (-task.bound, task.bound)
            assert spec.reward_threshold is None  # Gymnasium has no bar for Pendulum: -200 is ours
            assert task.solved == -200 and task.episodes == 20


def check_starts_are_uniform(classic):
    """Kolmogorov and Smirnov's distance of 4,000 starts to the uniform distribution, and Gymnasium's own starts within
    the same box."""
    for name in TASKS:
        task = getattr(classic, name)
        starts = classic.Envs(task, 4000, seed=3, dtype=torch.float64).state
        assert starts.shape == (4000, len(task.spread))
        for column, half in zip(starts.T, task.spread, strict=True):
            p = (column.sort().values + half) / (2 * half)
            grid = torch.arange(4000, dtype=torch.float64) / 4000
            distance = torch.maximum((p - grid).abs().max(), (p - grid - 1 / 4000).abs().max())
            assert distance < 1.95 / 4000**0.5  # exceeded by one sample in a thousand
        env = gymnasium.make(task.name).unwrapped
        theirs = np.array([[*env.reset(seed=i)] and env.state for i in range(200)])
        edge = np.abs(theirs).max(0) / np.array(task.spread)
        assert (edge <= 1).all() and (edge > 0.93).all()


def check_steps_lead_where_the_physics_leads(classic):
    """Over many episodes: `after` follows from the observation and the action, also where the episode ends; the next
    observation is `after` or, after an end, a start. The two ends exclude each other."""
    for name, copies, steps in (("CARTPOLE", 8, 510), ("PENDULUM", 2, 210)):
        task = getattr(classic, name)
        envs, generator = classic.Envs(task, copies, seed=0, dtype=torch.float64), rng(1)
        spread, age = torch.tensor(task.spread, dtype=torch.float64), torch.zeros(copies, dtype=torch.long)
        falls = cuts = 0
        for _ in range(steps):
            state, obs = envs.state.clone(), envs.obs.clone()
            actions = some_actions(task, copies, generator)
            if task.discrete:  # a good hand keeps half of the poles up, so that the clock ends episodes too
                actions[: copies // 2] = balance(state[: copies // 2])
            step = envs.step(actions)
            expected, rewards, terminated = getattr(original, name).step(state, actions)
            assert_close(step.after, task.observe(expected), rtol=0, atol=0)
            assert_close(step.rewards, rewards, rtol=0, atol=0)
            assert torch.equal(obs, task.observe(state))
            age += 1
            assert torch.equal(step.terminated, terminated)
            assert torch.equal(step.truncated, (age >= task.limit) & ~terminated)
            over = step.terminated | step.truncated
            age[over] = 0
            assert torch.equal(envs.state[~over], expected[~over])
            assert (envs.state[over].abs() <= spread).all()
            assert len(envs.state[over].unique(dim=0)) == over.sum()  # a start of its own for each copy
            assert torch.equal(envs.age, age)
            falls, cuts = falls + int(step.terminated.sum()), cuts + int(step.truncated.sum())
        assert (falls > 0) == (name == "CARTPOLE") and cuts > 0


def check_a_fall_at_the_limit_is_a_termination(classic):
    envs = classic.Envs(classic.CARTPOLE, 2, dtype=torch.float64)
    envs.state = torch.tensor([[2.399, 5.0, 0, 0], [0.0, 0, 0, 0]], dtype=torch.float64)
    envs.age = torch.full((2,), 499)
    step = envs.step(torch.tensor([1, 1]))
    assert step.terminated.tolist() == [True, False] and step.truncated.tolist() == [False, True]
    assert envs.age.tolist() == [0, 0]


def check_copies_do_not_touch_each_other(classic):
    """N copies do what each of them does alone, and a seed gives one history."""
    for name in TASKS:
        task = getattr(classic, name)
        many = classic.Envs(task, 5, seed=0, dtype=torch.float64)
        alone = [classic.Envs(task, 1, seed=9, dtype=torch.float64) for _ in range(5)]
        again = classic.Envs(task, 5, seed=0, dtype=torch.float64)
        for i, env in enumerate(alone):
            env.state = many.state[i : i + 1].clone()
        generator = rng(2)
        for _ in range(30):
            actions = some_actions(task, 5, generator)
            step, same = many.step(actions), again.step(actions)
            for i, env in enumerate(alone):
                mine = env.step(actions[i : i + 1])
                for field in ("after", "rewards", "terminated", "truncated"):
                    assert torch.equal(getattr(step, field)[i : i + 1], getattr(mine, field))
                env.state = many.state[i : i + 1].clone()  # the starts are drawn by other dice
            assert torch.equal(step.after, same.after) and torch.equal(many.state, again.state)
        other = classic.Envs(task, 5, seed=1, dtype=torch.float64)
        assert not torch.equal(other.state, classic.Envs(task, 5, seed=0, dtype=torch.float64).state)


def check_a_history_is_not_written_over(classic):
    """Observations and transitions that were handed out keep their values: rollouts store them."""
    envs = classic.Envs(classic.CARTPOLE, 3)
    kept, copies = [], []
    for _ in range(60):
        obs = envs.obs
        step = envs.step(torch.ones(3, dtype=torch.long))
        kept += [obs, step.after, envs.age]
        copies += [x.clone() for x in kept[-3:]]
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def check_bad_input_is_named(classic):
    with pytest.raises(ValueError, match="count must be positive, got 0"):
        classic.Envs(classic.CARTPOLE, 0)
    with pytest.raises(ValueError, match="episodes must be positive, got 0"):
        classic.evaluate(classic.CARTPOLE, None, episodes=0)
    cases = [
        ("CARTPOLE", torch.zeros(2, dtype=torch.long), r"\(3,\), got \(2,\)"),
        ("CARTPOLE", torch.zeros(3, 1, dtype=torch.long), r"\(3,\), got \(3, 1\)"),
        ("PENDULUM", torch.zeros(3), r"\(3, 1\), got \(3,\)"),
        ("PENDULUM", torch.zeros(1, 1), r"\(3, 1\), got \(1, 1\)"),
    ]
    for name, actions, message in cases:
        with pytest.raises(ValueError, match=message):
            classic.Envs(getattr(classic, name), 3).step(actions)


def hand(obs):
    """Keeps a pole up for a little while."""
    return (obs[:, 2] > 0).long()


def swing(obs):
    return (2 * obs[:, 2]).clamp(-2, 2).unsqueeze(-1)


def check_evaluation_is_a_loop_over_gymnasium(classic):
    """Seeded, one episode for each seed, returns undiscounted."""
    for name, act in (("CARTPOLE", hand), ("PENDULUM", swing)):
        task = getattr(classic, name)
        found = classic.evaluate(task, act, episodes=4, seed=123)
        for i in range(4):
            env = gymnasium.make(task.name)
            obs, total, over = env.reset(seed=123 + i)[0], 0.0, False
            while not over:
                action = act(torch.as_tensor(obs)[None])[0].numpy()
                obs, reward, terminated, truncated, _ = env.step(action.item() if task.discrete else action)
                total, over = total + float(reward), terminated or truncated
            assert found[i].item() == pytest.approx(total, abs=1e-6)
        assert len(set(found.tolist())) > 1
        assert torch.equal(classic.evaluate(task, act, episodes=2, seed=125), found[2:])


def check_evaluation_asks_for_running_episodes_only(classic):
    """Each episode is run once: the batches shrink as episodes end, and no gradient is kept."""
    sizes = []

    def act(obs):
        assert not torch.is_grad_enabled() and obs.dtype == torch.float32
        sizes.append(len(obs))
        return hand(obs)

    returns = classic.evaluate(classic.CARTPOLE, act, episodes=5, seed=7)
    assert sizes == sorted(sizes, reverse=True) and sum(sizes) == returns.sum() and sizes[0] == 5


SLOW = [
    check_evaluation_is_a_loop_over_gymnasium,
    check_steps_lead_where_the_physics_leads,
    check_the_physics_is_gymnasiums,
]
CHECKS = [f for name, f in list(globals().items()) if name.startswith("check_") and f not in SLOW] + SLOW


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_tasks(check):
    check(original)


MISTAKES = {
    "pole upside down": ("9.8 * sin - cos * push", "-9.8 * sin - cos * push"),
    "full length": ("(0.5 * (4.0 / 3.0", "(1.0 * (4.0 / 3.0"),
    "massless pole in the push": ("+ 0.05 * theta_dot**2 * sin) / 1.1", "+ 0.05 * theta_dot**2 * sin) / 1.0"),
    "cart unmoved by the pole": ("x_acc = push - 0.05", "x_acc = push - 0.0"),
    "left and right": ("action == 1, 10.0, -10.0", "action == 1, -10.0, 10.0"),
    "another clock": ("0.02 * speeds", "0.021 * speeds"),
    "new velocities move the cart": (
        "torch.stack([x_dot, x_acc,",
        "torch.stack([x_dot + 0.02 * x_acc, x_acc,",
    ),
    "degrees": ("12 * 2 * math.pi / 360, 2.4", "12 * math.pi / 360, 2.4"),
    "a shorter track": ("math.pi / 360, 2.4", "math.pi / 360, 2.3"),
    "one side of the track": ("after[:, 0].abs() > POSITION", "after[:, 0] > POSITION"),
    "one side of the pole": ("after[:, 2].abs() > ANGLE", "after[:, 2] > ANGLE"),
    "the end seen a step late": ("(after[:, 0].abs() > POSITION_LIMIT)", "(x.abs() > POSITION_LIMIT)"),
    "no reward for the last step": ("torch.ones_like(x), over", "(~over).to(x.dtype), over"),
    "torque not clipped": ("action.squeeze(-1).clamp(-MAX_TORQUE, MAX_TORQUE)", "action.squeeze(-1)"),
    "speed not clipped": (".clamp(-MAX_SPEED, MAX_SPEED)", ""),
    "angle not wrapped": ("(angle + math.pi) % (2 * math.pi) - math.pi", "angle"),
    "angle from hanging": ("(angle + math.pi) % (2 * math.pi) - math.pi", "angle % (2 * math.pi) - math.pi"),
    "angle wrapped to one side": ("(angle + math.pi) % (2 * math.pi) - math.pi", "angle % (2 * math.pi)"),
    "old speed moves the angle": (
        "torch.stack([angle + 0.05 * speed, speed]",
        "torch.stack([angle + 0.05 * state[:, 1], speed]",
    ),
    "gravity pulls up": ("(15.0 * angle.sin()", "(-15.0 * angle.sin()"),
    "weak motor": ("3.0 * torque)", "1.0 * torque)"),
    "a cost as a reward": ("return after, -cost,", "return after, cost,"),
    "speed costs more": ("0.1 * speed**2 + 0.001", "1.0 * speed**2 + 0.001"),
    "torque is free": ("+ 0.001 * torque**2", "+ 0.0 * torque**2"),
    "sine first": ("[state[:, 0].cos(), state[:, 0].sin(),", "[state[:, 0].sin(), state[:, 0].cos(),"),
    "a longer episode": ("None, 500, 475.0", "None, 501, 475.0"),
    "starts on one side": ("(2 * uniform - 1) * self.spread", "uniform * self.spread"),
    "starts too narrow": ("(0.05,) * 4", "(0.04,) * 4"),
    "starts of every copy alike": ("size = (self.count, len(self.spread))", "size = (1, len(self.spread))"),
    "seed ignored": ("manual_seed(seed)", "manual_seed(0)"),
    "both ends at once": ("(self.age >= self.task.limit) & ~terminated", "self.age >= self.task.limit"),
    "a step too many": ("self.age >= self.task.limit", "self.age > self.task.limit"),
    "after is the next start": ("return Transition(after,", "return Transition(self.obs,"),
    "no reset": ("state = torch.where(over.unsqueeze(-1), self._starts(), state)", "pass"),
    "one start for all that end": (
        "over.unsqueeze(-1), self._starts(), state",
        "over.unsqueeze(-1), self._starts()[:1], state",
    ),
    "reset of all": ("state = torch.where(over.unsqueeze(-1), self._starts(), state)", "state = self._starts()"),
    "age runs on": ("self.age = torch.where(over, 0, self.age)", "pass"),
    "only a fall resets": ("over = terminated | truncated", "over = terminated"),
    "history written over": ("self.age = self.age + 1", "self.age += 1"),
    "shapes unchecked": ("if actions.shape != expected", "if False"),
    "count unchecked": ("if count < 1", "if False"),
    "seeds of episodes": ("env.reset(seed=seed + i)", "env.reset(seed=seed)"),
    "the last reward lost": ("returns[i] += float(reward)", "returns[i] += float(reward) * (not terminated)"),
    "ended early": ("if terminated or truncated:", "if terminated or truncated or returns[i] >= 30:"),
}  # fmt: skip


def test_no_check_fails_on_the_original():
    assert caught_by(original, CHECKS) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    """Each deliberate mistake makes at least one check fail."""
    mutant = load_mutant(PATH, *MISTAKES[mistake])
    assert any(caught_by(mutant, [check]) for check in CHECKS)  # the quick ones first


# What is recorded.


@pytest.mark.evidence
@pytest.mark.parametrize("name", TASKS)
def test_a_thousand_random_steps(evidence, name):
    seeds = SEEDS if evidence.full else SEEDS[:1]
    found = [differences(original, name, seed) for seed in seeds]
    task = getattr(original, name)
    for what, i in (("state", 0), ("reward", 1)):
        evidence(
            NAME,
            f"{task.name}: largest difference of a {what} from Gymnasium's over 1,000 random steps",
            value=max(f[i] for f in found),
            bar=1e-12,
            seeds=seeds,
            spread=[f[i] for f in found],
            note="Both run on freely in float64 from each reset to the next one.",
        )


def follows(obs, actions, after):
    """Whether each row obeys CartPole's physics, float32 observations as they are: (T, N, 4), (T, N)."""
    expected, _, _ = original.cartpole_step(obs.double().flatten(0, -2), actions.flatten())
    return ((expected - after.double().flatten(0, -2)).abs() < 1e-5).all(-1).view(actions.shape)


def gymnasiums_batch(mode, steps, copies=8):
    """What a careless loop stores: obs, action, the next obs, with random actions."""
    envs = gymnasium.make_vec(
        "CartPole-v1",
        num_envs=copies,
        vectorization_mode="sync",
        vector_kwargs=dict(autoreset_mode=mode) if mode else {},
    )
    obs, dice, rows, ends = envs.reset(seed=0)[0], np.random.default_rng(0), [], 0
    for _ in range(steps):
        actions = dice.integers(2, size=copies)
        after, rewards, terminated, truncated, info = envs.step(actions)
        true = np.stack([f if f is not None else a for f, a in zip(info.get("final_obs", after), after, strict=True)])
        rows.append([torch.as_tensor(x.copy()) for x in (obs, actions, after, rewards, true.astype(np.float32))])
        obs, ends = after, ends + int((terminated | truncated).sum())
    return [torch.stack(x) for x in zip(*rows, strict=True)], ends, envs


@pytest.mark.evidence
def test_no_step_of_ours_only_resets_and_gymnasiums_vector_environments_have_some(evidence):
    """By default they spend a step on a reset: its action does nothing, its reward is 0, and it leads from one episode
    into the next. With AutoresetMode.SAME_STEP no such step exists, but the next observation of the last step is
    a start, and where the step led stands in info["final_obs"]."""
    (obs, actions, after, rewards, _), ends, envs = gymnasiums_batch(None, 200)
    assert envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    wrong = ~follows(obs, actions, after)
    assert abs(int(wrong.sum()) - ends) <= 8 and int(wrong.sum()) > 20  # one for each end, but those of the last step
    assert (rewards[wrong] == 0).all() and (rewards[~wrong] == 1).all()
    assert (after[wrong].abs() <= 0.05).all()
    (obs, actions, after, rewards, true), ends, _ = gymnasiums_batch(AutoresetMode.SAME_STEP, 200)
    careless = ~follows(obs, actions, after)
    assert int(careless.sum()) == ends and follows(obs, actions, true).all() and (rewards == 1).all()

    mine, generator, rows = original.Envs(original.CARTPOLE, 8, seed=0), rng(0), []
    for _ in range(200):
        before, acted = mine.obs, torch.randint(2, (8,), generator=generator)
        rows.append((before, acted, mine.step(acted).after))
    ours = ~follows(*(torch.stack(x) for x in zip(*rows, strict=True)))
    for what, share in (
        ("Envs", ours),
        ("gymnasium.make_vec by default", wrong),
        ("SAME_STEP, final_obs not looked at", careless),
    ):
        evidence(
            NAME,
            f"Random CartPole, 1,600 steps that do not follow from state and action: {what}",
            value=100 * share.double().mean().item(),
            unit="%",
            bar=0.0 if what == "Envs" else 1.0,
            better="<=" if what == "Envs" else ">=",
            seeds=[0],
        )


@pytest.mark.evidence
def test_what_the_tensors_are_for(evidence):
    """CPU time of one step of one copy, Gymnasium's in a loop and ours with 1,024 copies at once. No bar: a time."""
    env, copies = gymnasium.make("CartPole-v1", disable_env_checker=True), 1024
    steps = 4000 if evidence.full else 200
    env.reset(seed=0)
    start = time.process_time()
    for i in range(steps):
        _, _, terminated, truncated, _ = env.step(i % 2)
        if terminated or truncated:
            env.reset()
    theirs = (time.process_time() - start) / steps
    envs, actions = original.Envs(original.CARTPOLE, copies), torch.arange(copies) % 2
    start = time.process_time()
    for _ in range(steps // 10):
        envs.step(actions)
    ours = (time.process_time() - start) / (steps // 10) / copies
    for who, value in (("Gymnasium, one environment", theirs), ("Envs, 1,024 copies", ours)):
        evidence(NAME, f"CPU time of a step of one copy: {who}", value=1e6 * value, unit="µs")
