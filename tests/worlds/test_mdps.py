"""Small MDPs against Gymnasium's own tables and steps, closed forms, sums over all episodes, and broken copies."""

import math

import gymnasium
import pytest
import torch
from torch.testing import assert_close

from snippets.worlds import mdps as original
from tests.mutation import caught_by, load_mutant

torch.set_num_threads(1)
PATH = "snippets/worlds/mdps.py"
TABLES = {"FrozenLake-v1": (16, 4), "CliffWalking-v1": (48, 4), "Taxi-v4": (500, 6)}


def uniform(mdp):
    states, actions, _ = mdp.transitions.shape
    return torch.full((states, actions), 1 / actions, dtype=torch.float64)


def solve(mdp, policy):
    """V of a policy by a linear solve, terminal states left out."""
    chain = torch.einsum("sa,sat->st", policy, mdp.transitions)
    pay = (policy.unsqueeze(-1) * mdp.transitions * mdp.rewards).sum((1, 2))
    live = ~mdp.terminal
    values = torch.zeros_like(pay)
    matrix = torch.eye(int(live.sum()), dtype=pay.dtype) - mdp.gamma * chain[live][:, live]
    values[live] = torch.linalg.solve(matrix, pay[live])
    return values


# Each check takes the module, so that broken copies can be put to it.


def check_gymnasium_tables(mdps):
    """Each row of P, entry by entry: chances add up, rewards are their mean, and a step that ends leads to an end."""
    for name, (states, actions) in TABLES.items():
        mdp, env = mdps.from_gymnasium(name, 0.9), gymnasium.make(name).unwrapped
        assert mdp.transitions.shape == (states, actions, states) and mdp.gamma == 0.9
        assert mdp.transitions.dtype == mdp.rewards.dtype == mdp.start.dtype == torch.float64
        ends = {after for s in env.P for a in env.P[s] for _, after, _, done in env.P[s][a] if done}
        assert set(mdp.terminal.nonzero().flatten().tolist()) == ends
        assert_close(mdp.start, torch.as_tensor(env.initial_state_distrib))
        for s in range(0, states, 1 if states < 100 else 7):
            if s in ends:
                assert (mdp.transitions[s, :, s] == 1).all() and not mdp.rewards[s].any()
                continue
            for a in range(actions):
                mean = sum(chance * reward for chance, _, reward, _ in env.P[s][a])
                assert mdp.expected_rewards[s, a].item() == pytest.approx(mean, abs=1e-12)
                for t in {after for _, after, _, _ in env.P[s][a]}:
                    chance = sum(c for c, after, _, _ in env.P[s][a] if after == t)
                    assert mdp.transitions[s, a, t].item() == pytest.approx(chance, abs=1e-12)


def check_gymnasium_steps(mdps):
    """The real environments, played at random: every step that they take is possible, pays what the table says, and
    ends where the table ends."""
    for name in TABLES:
        mdp, env = mdps.from_gymnasium(name), gymnasium.make(name, max_episode_steps=60)
        env.action_space.seed(0)
        s, _ = env.reset(seed=0)
        assert mdp.start[s] > 0
        for _ in range(300):
            a = env.action_space.sample()
            t, reward, terminated, truncated, _ = env.step(a)
            assert mdp.transitions[s, a, t] > 0 and mdp.rewards[s, a, t].item() == pytest.approx(reward)
            assert bool(mdp.terminal[t]) == terminated
            s = env.reset()[0] if terminated or truncated else t


def check_the_walk_has_its_closed_form(mdps):
    for states in (1, 5, 19):
        walk = mdps.random_walk(states)
        truth = 2 * torch.arange(1, states + 1, dtype=torch.float64) / (states + 1) - 1
        values = solve(walk, uniform(walk))
        assert_close(values[1:-1], truth, rtol=0, atol=1e-12)
        assert walk.start[(states + 1) // 2] == 1 and walk.gamma == 1 and walk.terminal.sum() == 2
        assert values[0] == values[-1] == 0
    assert mdps.random_walk().transitions.shape == (21, 1, 21)


def check_the_frozen_lake_options_arrive(mdps):
    """is_slippery=False makes it deterministic, and the cliff's fall leads back to the start for -100."""
    lake = mdps.from_gymnasium("FrozenLake-v1", is_slippery=False)
    assert ((lake.transitions == 0) | (lake.transitions == 1)).all()
    cliff = mdps.from_gymnasium("CliffWalking-v1")
    assert cliff.transitions[36, 1, 36] == 1 and cliff.rewards[36, 1, 36] == -100


def check_all_episodes_sum_to_one(mdps):
    """Under any policy; and expectations over them are those of the linear system, ends included."""
    walk, world = mdps.random_walk(3), mdps.random_mdp(3, 2, seed=1, gamma=0.8)
    even = mdps.random_mdp(2, 2, seed=2, gamma=0.8)  # as many actions as states
    for mdp, horizon in ((walk, 6), (world, 4), (even, 4)):
        generator = torch.Generator().manual_seed(0)
        policy = torch.randn(*mdp.transitions.shape[:2], generator=generator, dtype=torch.float64).softmax(-1)
        episodes = mdps.all_episodes(mdp, horizon)
        assert episodes.states.shape == (len(episodes.actions), horizon + 1)
        assert episodes.actions.shape == episodes.rewards.shape == (len(episodes.world_logps), horizon)
        logps = policy.log()[episodes.states[:, :-1], episodes.actions].sum(-1)
        chances = (episodes.world_logps + logps).exp()
        assert chances.sum().item() == pytest.approx(1, abs=1e-12)
        assert len({tuple(x) for x in torch.cat([episodes.states, episodes.actions], -1).tolist()}) == len(chances)
        discount = mdp.gamma ** torch.arange(horizon + 1, dtype=torch.float64)
        values = solve(mdp, policy)
        returns = (discount[:-1] * episodes.rewards).sum(-1) + discount[-1] * values[episodes.states[:, -1]]
        assert (chances * returns).sum().item() == pytest.approx((mdp.start * values).sum().item(), abs=1e-10)
        for t in range(horizon):  # every reward is that of its step
            s, a, after = episodes.states[:, t], episodes.actions[:, t], episodes.states[:, t + 1]
            assert_close(episodes.rewards[:, t], mdp.rewards[s, a, after])


def check_an_episode_that_ended_stays_there(mdps):
    """A walk of one state: after one step it stands at an end, and no later step pays."""
    episodes = mdps.all_episodes(mdps.random_walk(1), 3)
    assert sorted(episodes.states.tolist()) == [[1, 0, 0, 0], [1, 2, 2, 2]]
    assert sorted(episodes.rewards.tolist()) == [[-1, 0, 0], [1, 0, 0]]
    assert_close(episodes.world_logps.exp(), torch.tensor([0.5, 0.5]).double())


def check_samples_have_the_chances_of_the_table(mdps):
    """40,000 steps from each of two pairs: next states within five standard errors, and rewards of their steps."""
    mdp, generator = mdps.random_mdp(4, 2, seed=3, noise=2.0), torch.Generator().manual_seed(0)
    for s, a in ((0, 1), (2, 0)):
        n = 40_000
        states, actions = torch.full((n,), s), torch.full((n,), a)
        after, rewards = mdps.sample(mdp, states, actions, generator)
        assert after.shape == rewards.shape == (n,)
        assert_close(rewards, mdp.rewards[s, a, after])
        chance = mdp.transitions[s, a]
        z = (torch.bincount(after, minlength=4) / n - chance) / (chance * (1 - chance) / n).sqrt()
        assert z.abs().max() < 5
    again = [mdps.sample(mdp, states, actions, torch.Generator().manual_seed(1))[0] for _ in range(2)]
    assert (again[0] == again[1]).all()


def check_random_worlds(mdps):
    mdp = mdps.random_mdp(5, 3, seed=4, gamma=0.7)
    assert mdp.transitions.shape == mdp.rewards.shape == (5, 3, 5) and mdp.gamma == 0.7
    assert (mdp.transitions > 0).all() and not mdp.terminal.any()
    assert_close(mdp.transitions, mdps.random_mdp(5, 3, seed=4).transitions)
    assert (mdp.transitions != mdps.random_mdp(5, 3, seed=5).transitions).all()
    sharp = mdps.random_mdp(5, 3, seed=4, noise=20.0).transitions
    assert sharp.amax(-1).mean() > 0.9 > mdp.transitions.amax(-1).mean()
    assert mdp.start.unique().numel() == 5 and mdps.random_mdp(gamma=0.0).gamma == 0


def check_episodes_of_no_steps_are_the_starts(mdps):
    found = mdps.all_episodes(mdps.random_walk(3), 0)
    assert found.states.tolist() == [[2]] and found.world_logps.tolist() == [0.0]
    assert found.actions.shape == found.rewards.shape == (1, 0)


def check_bad_input_is_named(mdps):
    base = mdps.random_walk(3)
    fields = {name: getattr(base, name) for name in ("transitions", "rewards", "start", "terminal")}

    def changed(**new):
        return lambda: mdps.MDP(**(fields | new))

    def at(name, *place, value):
        x = fields[name].clone()
        x[place] = value
        return {name: x}

    leaves = fields["transitions"].clone()
    leaves[0, 0] = torch.eye(5, dtype=torch.float64)[2]
    two = {name: x.repeat(1, 2, 1) if x.ndim == 3 else x for name, x in fields.items()}  # only one of two actions errs
    away, pays = two["transitions"].clone(), two["rewards"].clone()
    away[0, 1], pays[0, 1, 0] = away[2, 0], 1.0
    cases = [
        (changed(**two | {"transitions": away}), "the terminal state 0 is left"),
        (changed(**two | {"rewards": pays}), "the terminal state 0 is left, or pays"),
        (changed(**at("transitions", 2, 0, 3, value=0.501)), "transitions: not probabilities"),
        (changed(rewards=fields["rewards"][:, :, :4]), r"transitions \(5, 1, 5\) and rewards \(5, 1, 4\) disagree"),
        (changed(transitions=fields["transitions"][:4]), r"transitions \(4, 1, 5\)"),
        (changed(start=fields["start"][:4]), r"start \(4,\), terminal \(5,\): not one entry for each of the 5 states"),
        (changed(terminal=fields["terminal"][:4]), r"terminal \(4,\)"),
        (changed(gamma=1.1), r"gamma must lie in \[0, 1\], got 1.1"),
        (changed(gamma=-0.1), "got -0.1"),
        (changed(gamma=math.nan), "got nan"),
        (changed(**at("transitions", 2, 0, 3, value=0.6)), "transitions: not probabilities, they sum to"),
        (changed(**at("transitions", 2, 0, slice(1, 4), value=torch.tensor([1.5, 0, -0.5]))), "transitions: not prob"),
        (changed(start=fields["start"] * 2), "start: not probabilities"),
        (changed(**at("rewards", 0, 0, 0, value=1.0)), "the terminal state 0 is left, or pays a reward"),
        (changed(transitions=leaves), "the terminal state 0 is left"),
        (changed(**{name: fields[name][:, 0] for name in ("transitions", "rewards")}), r"transitions \(5, 5\) and"),
        (changed(**at("transitions", 2, 0, 3, value=math.nan)), "transitions: not probabilities"),
        (changed(**at("rewards", 2, 0, 3, value=math.nan)), "rewards must be finite"),
        (lambda: mdps.random_walk(4), "states must be odd and positive, got 4"),
        (lambda: mdps.random_walk(-1), "got -1"),
        (lambda: mdps.all_episodes(mdps.random_mdp(6, 4), 4), "more than a million episodes of 4 steps"),
        (lambda: mdps.from_gymnasium("Blackjack-v1"), "Blackjack-v1 has no table of transitions P"),
    ]
    for function, message in cases:
        with pytest.raises(ValueError, match=message):
            function()


CHECKS = [function for name, function in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_functions(check):
    check(original)


MISTAKES = {
    "last of equal steps": ("transitions[s, a, after] += chance", "transitions[s, a, after] = chance"),
    "last of equal rewards": ("rewards[s, a, after] += chance * float(reward)", "rewards[s, a, after] = float(reward)"),
    "reward not averaged": ("rewards / transitions, 0.0)", "rewards, 0.0)"),
    "ends unseen": ("terminal[after] |= bool(done)", "terminal[after] |= False"),
    "last word on an end": ("terminal[after] |= bool(done)", "terminal[after] = bool(done)"),
    "the state before the end": ("terminal[after] |= bool(done)", "terminal[s] |= bool(done)"),
    "options dropped": ("gymnasium.make(name, **options)", "gymnasium.make(name)"),
    "gamma dropped": ("initial_state_distrib), terminal, gamma)", "initial_state_distrib), terminal)"),
    "no table unseen": ('if not hasattr(env, "P")', "if False"),
    "rewards summed": ("(self.transitions * self.rewards).sum(-1)", "self.rewards.sum(-1)"),
    "reward of another step": ("mdp.rewards[states, actions, after]", "mdp.rewards[after, actions, states]"),
    "uniform steps": (
        "chances = mdp.transitions[states, actions]",
        "chances = torch.ones_like(mdp.transitions[states, actions])",
    ),
    "drift": (
        "transitions[s, 0, s - 1] = transitions[s, 0, s + 1] = 0.5",
        "transitions[s, 0, s - 1], transitions[s, 0, s + 1] = 0.4, 0.6",
    ),
    "left pays too": ("= -1.0, 1.0", "= 1.0, 1.0"),
    "starts aside": ("start[count // 2] = 1.0", "start[1] = 1.0"),
    "even walks": ("if states < 1 or states % 2 == 0", "if states < 1"),
    "start forgotten": ("logps = mdp.start[path[:, 0]].log()", "logps = torch.zeros_like(paid.sum(-1))"),
    "impossible ones kept": ("possible = logps > -torch.inf", "possible = logps == logps"),
    "steps forgotten": ("logps = logps + mdp.transitions[s, a, after].log()", "logps = logps + 0.0"),
    "same action for all": (
        "torch.arange(actions).repeat_interleave(states)",
        "torch.zeros(actions).long().repeat_interleave(states)",
    ),
    "reward a step late": (
        "paid = torch.cat([paid, mdp.rewards[s, a, after].unsqueeze(-1)], -1)",
        "paid = torch.cat([mdp.rewards[s, a, after].unsqueeze(-1), paid], -1)",
    ),
    "no limit": ("** horizon > 10**6", "** horizon > 10**7"),
    "shapes unchecked": ("if len(shape) != 3 or shape[2] != states or", "if False and"),
    "starts unchecked": ("if self.start.shape != (states,) or", "if False and"),
    "chances unchecked": ("if not ((chances >= 0).all() and", "if False and ((chances >= 0).all() and"),
    "negative chances": ("(chances >= 0).all() and ", ""),
    "starts of no chance": ("path = mdp.start.nonzero()", "path = torch.arange(states).unsqueeze(-1)"),
    "rewards unchecked": ("if not self.rewards.isfinite().all()", "if False"),
    "ends unchecked": ("for s in self.terminal.nonzero().flatten().tolist()", "for s in []"),
    "ends may pay": ("or (self.rewards[s, :, s] != 0).any()", ""),
    "gamma unchecked": ("if not 0 <= self.gamma <= 1", "if False"),
    "seed ignored": ("manual_seed(seed)", "manual_seed(0)"),
    "noise ignored": ("(noise * torch.randn", "(1.0 * torch.randn"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_caught(mistake):
    broken = load_mutant(PATH, *MISTAKES[mistake])
    assert any(caught_by(broken, [check]) for check in reversed(CHECKS))  # until the first, the quick ones first


def test_almost_a_million_episodes_are_listed():
    assert len(original.all_episodes(original.random_mdp(7, 7), 3).world_logps) == 7 * 49**3  # 823,543


def test_evidence(evidence):
    """What the page says of the tables, as numbers."""
    walk = original.random_walk()
    truth = torch.arange(1, 20, dtype=torch.float64) / 10 - 1
    evidence(
        "worlds/mdps",
        "Random walk of 19 states against its closed form",
        value=(solve(walk, uniform(walk))[1:-1] - truth).abs().max().item(),
        bar=1e-12,
        unit="reward",
        note="largest difference of a linear solve from V(s) = 2s/20 − 1",
    )
    mdp = original.random_mdp(3, 2, seed=1)
    episodes = original.all_episodes(mdp, 4)
    logps = uniform(mdp).log()[episodes.states[:, :-1], episodes.actions].sum(-1)
    evidence(
        "worlds/mdps",
        "Probability of all episodes of 4 steps together, less 1",
        value=abs((episodes.world_logps + logps).exp().sum().item() - 1),
        bar=1e-12,
        note=f"{len(logps)} episodes of a random world with 3 states and 2 actions",
    )
    wrong, count = 0, 0
    for name in TABLES:
        mdp, env = original.from_gymnasium(name), gymnasium.make(name)
        env.action_space.seed(1)
        s, _ = env.reset(seed=1)
        for _ in range(2000 if evidence.full else 200):
            a = env.action_space.sample()
            t, reward, terminated, truncated, _ = env.step(a)
            right = mdp.transitions[s, a, t] > 0 and abs(mdp.rewards[s, a, t] - reward) < 1e-9
            wrong += not (right and bool(mdp.terminal[t]) == terminated)
            count += 1
            s = env.reset()[0] if terminated or truncated else t
    evidence(
        "worlds/mdps",
        "Steps of FrozenLake, CliffWalking and Taxi that the tables do not explain",
        value=wrong,
        bar=0,
        unit="steps",
        note=f"of {count}, in Gymnasium itself under random actions: next state, reward and termination",
    )
