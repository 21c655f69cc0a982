"""What RL is: returns against loops, worlds against linear solves and enumeration, learners against theorems."""

import itertools
import math

import gymnasium
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from snippets.foundations import what_is_rl as original
from snippets.worlds import mdps
from tests.mutation import caught_by, load_mutant

torch.set_num_threads(1)
PATH = "snippets/foundations/what_is_rl.py"
NAME = "foundations/what_is_rl"
SEEDS = [0, 1, 2, 3, 4]
P_BEST, J_BEST = 2 - math.sqrt(2), -(6 + 4 * math.sqrt(2))  # the short corridor: derived on the page


def rng(seed):
    return torch.Generator().manual_seed(seed)


def random(seed, *shape):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def seeds_of(evidence):
    return SEEDS if evidence.full else SEEDS[:1]


def short_corridor(module, p=None):
    """Sutton and Barto's example 13.1: three states, actions left and right, switched in the second; -1 a step."""
    transitions = torch.zeros(4, 2, 4, dtype=torch.float64)
    for s, a, after in ((0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 0), (2, 0, 1), (2, 1, 3), (3, 0, 3), (3, 1, 3)):
        transitions[s, a, after] = 1.0
    rewards = torch.full_like(transitions, -1.0)
    rewards[3] = 0.0
    start = torch.eye(4, dtype=torch.float64)[0]
    world = module.World(transitions, rewards, start, start.flip(0) > 0, 1.0)
    return (
        world
        if p is None
        else module.policy_values(world, torch.tensor([[1 - p, p]] * 4, dtype=torch.float64))[0].item()
    )


def solve(transitions, rewards, terminal, gamma):
    """V of a chain of states with numpy alone: transitions (S, S), what a step from s pays (S,)."""
    live = [s for s in range(len(rewards)) if not terminal[s]]
    matrix = torch.eye(len(live), dtype=torch.float64) - gamma * transitions[live][:, live]
    values = torch.zeros(len(rewards), dtype=torch.float64)
    values[live] = torch.from_numpy(np.linalg.solve(matrix.numpy(), rewards[live].numpy()))
    return values


def best_by_enumeration(world):
    """(value of the start, the policies that reach it): every deterministic policy, by a linear solve."""
    states, actions, _ = world.transitions.shape
    found = {}
    for policy in itertools.product(range(actions), repeat=states):
        row = torch.arange(states)
        steps = world.transitions[row, list(policy)]
        paid = (steps * world.rewards[row, list(policy)]).sum(-1)
        found[policy] = (world.start * solve(steps, paid, world.terminal, world.gamma)).sum().item()
    best = max(found.values())
    return best, [policy for policy, value in found.items() if value > best - 1e-9]


# Returns.


def check_returns_in_loops(module):
    rewards = random(0, 5, 7)
    terminated = torch.rand(5, 7, generator=rng(1)) < 0.25
    paid, stops = rewards.tolist(), terminated.tolist()
    for gamma in (1.0, 0.9, 0.5, 0.0):
        for ends in (None, terminated):
            found = module.discounted_returns(rewards, gamma, ends).tolist()
            for b in range(5):
                for t in range(7):
                    total, k = 0.0, t
                    while k < 7:
                        total += gamma ** (k - t) * paid[b][k]
                        if ends is not None and stops[b][k]:
                            break
                        k += 1
                    assert abs(found[b][t] - total) < 1e-12
    assert_close(module.discounted_returns(rewards[0], 0.9), module.discounted_returns(rewards, 0.9)[0])


def check_types_of_returns(module):
    assert module.discounted_returns(torch.ones(3, dtype=torch.long), 0.5).tolist() == [1.75, 1.5, 1.0]
    for dtype in (torch.float32, torch.float64):
        assert module.discounted_returns(torch.ones(2, 3, dtype=dtype), 0.5).dtype == dtype
    assert module.discounted_returns(torch.ones(2, 0), 0.5).shape == (2, 0)


def check_returns_are_bounded(module):
    for gamma in (0.0, 0.5, 0.9, 0.99, 1.0):
        for steps in (1, 5, 50):
            rewards = 6 * torch.rand(200, steps, generator=rng(2), dtype=torch.float64) - 3
            bound = module.return_bound(gamma, steps, 3.0)
            assert module.discounted_returns(rewards, gamma)[:, 0].abs().max() <= bound
            full = module.discounted_returns(torch.full((1, steps), -3.0, dtype=torch.float64), gamma)
            assert full[0, 0].item() == pytest.approx(-bound)  # and the bound is reached
    assert module.return_bound(0.99) == pytest.approx(100) == module.return_bound(0.99, 10**5)
    assert module.return_bound(0.0) == 1


def check_what_lies_behind_the_horizon(module):
    """gamma^H is left after H = 1 / (1 - gamma) steps: about 1 / e, and never more."""
    for gamma in (0.5, 0.9, 0.99, 0.999):
        horizon = module.return_bound(gamma)
        left = 1 - module.return_bound(gamma, round(horizon)) / horizon
        assert left <= 1 / math.e and (gamma < 0.9 or abs(left - 1 / math.e) < 0.02)


def check_a_discount_is_a_chance_to_stop(module):
    """E of the undiscounted sum, if the episode survives each step with chance gamma, is the discounted return."""
    rewards, gamma = random(3, 6), 0.8
    total = 0.0
    for steps in range(1, 7):  # the episode ends after exactly `steps` steps, or was cut at the last
        chance = gamma ** (steps - 1) * ((1 - gamma) if steps < 6 else 1.0)
        total += chance * rewards[:steps].sum().item()
    assert module.discounted_returns(rewards, gamma)[0].item() == pytest.approx(total)


def check_a_discount_can_turn_a_choice(module):
    """1 now or 2 five steps later: the later one wins above gamma = 2^(-1/5)."""
    soon, late = torch.tensor([1.0, 0, 0, 0, 0, 0]).double(), torch.tensor([0, 0, 0, 0, 0, 2.0]).double()
    turn = 2 ** (-1 / 5)
    for gamma, patient in ((turn - 1e-3, False), (turn + 1e-3, True)):
        soon_return, late_return = (module.discounted_returns(x, gamma)[0] for x in (soon, late))
        assert bool(late_return > soon_return) == patient


def check_returns_of_gymnasium(module):
    """The discounted sum of one fixed walk over Gymnasium's cliff."""
    env = gymnasium.make("CliffWalking-v1").unwrapped
    env.reset(seed=0)
    rewards = [env.step(a)[1] for a in (0, 1, 2, 1, 0, 0)]  # up, right, off the cliff (-100), ...
    assert min(rewards) == -100
    total = sum(0.9**t * float(r) for t, r in enumerate(rewards))
    assert module.discounted_returns(torch.tensor(rewards).double(), 0.9)[0].item() == pytest.approx(total)


# Labels and rewards.


def check_the_reward_gradient_is_the_label_gradient_times_p(module):
    """E over actions of the reward loss's gradient is p(label) times that of the label loss."""
    logits = random(4, 1, 6).requires_grad_()
    label = torch.tensor([2])
    p = logits.detach().softmax(-1)[0]
    expected = torch.zeros(1, 6, dtype=torch.float64)
    for a in range(6):
        loss = module.reward_loss(logits, torch.tensor([a]), torch.tensor([float(a == 2)]).double())
        expected += p[a] * torch.autograd.grad(loss, logits)[0]
    supervised = torch.autograd.grad(module.label_loss(logits, label), logits)[0]
    assert_close(expected, p[2] * supervised)
    assert_close(supervised[0], p - torch.eye(6, dtype=torch.float64)[2])
    # It is the gradient of -E[r] = -p(label).
    exact = torch.autograd.grad(-logits.softmax(-1)[0, 2], logits)[0]
    assert_close(expected, exact)


def check_losses_are_means(module):
    logits, actions, rewards = random(5, 4, 3), torch.tensor([0, 2, 1, 1]), random(6, 4)
    logps = logits.log_softmax(-1)
    hand = sum(-rewards[b] * logps[b, actions[b]] for b in range(4)) / 4
    assert_close(module.reward_loss(logits, actions, rewards), hand)
    assert_close(module.label_loss(logits, actions), torch.nn.functional.cross_entropy(logits, actions))
    assert_close(module.reward_loss(logits, actions, torch.ones(4).double()), module.label_loss(logits, actions))


def check_classifier_by_hand(module):
    """Three batches again, with the gradient of softmax written out: x^T (p - one-hot), times the reward."""
    for feedback in ("label", "reward"):
        generator, curve = rng(5), []
        truth, others = torch.randn(16, 4, generator=generator), torch.randn(2000, 16, generator=generator)
        weights = torch.zeros(16, 4)
        for _ in range(3):
            curve.append((others @ weights).softmax(-1)[torch.arange(2000), (others @ truth).argmax(-1)].mean())
            x = torch.randn(32, 16, generator=generator)
            p, told = (x @ weights).softmax(-1), (x @ truth).argmax(-1)
            reward = torch.ones(32)
            if feedback == "reward":
                guess = torch.multinomial(p, 1, generator=generator)[:, 0]
                reward, told = (guess == told).float(), guess
            weights = weights - x.T @ ((p - torch.eye(4)[told]) * reward[:, None]) / 32
        assert_close(module.classify(feedback, seed=5, steps=3, classes=4), torch.stack(curve), atol=1e-5, rtol=0)


def check_both_kinds_of_feedback_teach(module):
    label, reward = (module.classify(kind, seed=0, steps=120) for kind in ("label", "reward"))
    assert label[0].item() == reward[0].item() == pytest.approx(0.1)
    assert label[-1] > 0.6 and reward[-1] > 0.45 and label[-1] > reward[-1]
    assert_close(module.classify("label", seed=0, steps=5), label[:5])


# The corridor: sparse rewards, shaping, penalties.


def check_the_corridor_is_an_mdp(module):
    for length in (1, 2, 5):
        world = module.corridor(length, gamma=0.8, move_cost=0.1)
        mdps.MDP(*world)  # raises on what is no MDP
        best, policies = best_by_enumeration(world)
        optimum = module.optimal_q_values(world)
        assert optimum[0].max().item() == pytest.approx(best)
        assert optimum[0].max().item() == pytest.approx(0.8 ** (length - 1) - 0.1 * module.return_bound(0.8, length))


def check_a_coin_needs_exponentially_long(module):
    """2^(n + 1) - 2 steps to n heads in a row, by a linear solve on the table."""
    for length in (1, 3, 8, 12):
        world = module.corridor(length, gamma=1.0)
        clock = world._replace(rewards=torch.ones_like(world.rewards) * (~world.terminal).double()[:, None, None])
        values = module.policy_values(clock, torch.full((length + 1, 2), 0.5).double())
        assert values[0].item() == pytest.approx(2 ** (length + 1) - 2)


def check_values_of_a_policy(module):
    world = mdps.random_mdp(6, 3, seed=3, gamma=0.8)
    policy = random(7, 6, 3).softmax(-1)
    steps = (policy.unsqueeze(-1) * world.transitions).sum(1)
    paid = (policy * world.expected_rewards).sum(-1)
    values = module.policy_values(module.World(*vars(world).values()), policy)
    assert_close(values, solve(steps, paid, world.terminal, 0.8))
    walk = mdps.random_walk(5)
    values = module.policy_values(module.World(*vars(walk).values()), torch.ones(7, 1).double())
    assert_close(values[1:-1], 2 * torch.arange(1, 6).double() / 6 - 1)


def check_value_iteration(module):
    for seed in (0, 1, 2):
        mdp = mdps.random_mdp(4, 3, seed=seed, gamma=0.7)
        world = module.World(*vars(mdp).values())
        best, policies = best_by_enumeration(world)
        q_values = module.optimal_q_values(world)
        assert (world.start * q_values.amax(-1)).sum().item() == pytest.approx(best)
        assert tuple(q_values.argmax(-1).tolist()) in policies
    lake = module.World(*vars(mdps.from_gymnasium("FrozenLake-v1", gamma=0.9)).values())
    q_values = module.optimal_q_values(lake)
    greedy = torch.nn.functional.one_hot(q_values.argmax(-1), 4).double()
    assert_close(module.policy_values(lake, greedy), q_values.amax(-1))


def check_shaping_keeps_every_optimal_action(module):
    """Ng et al.: Q*_shaped = Q* - Phi, so all greedy actions stay, in worlds with and without an end."""
    worlds = [module.World(*vars(mdps.random_mdp(5, 3, seed=s, gamma=0.8)).values()) for s in range(5)]
    worlds += [module.corridor(5), module.World(*vars(mdps.from_gymnasium("FrozenLake-v1", gamma=0.9)).values())]
    for number, world in enumerate(worlds):
        potential = 3 * random(8 + number, len(world.start))
        bonus = module.shaping_rewards(potential, world.terminal, world.gamma)
        plain = module.optimal_q_values(world)
        shaped = module.optimal_q_values(world._replace(rewards=world.rewards + bonus))
        live = ~world.terminal
        assert_close(shaped[live], plain[live] - potential[live, None], atol=1e-8, rtol=0)
        for policy_seed in range(3):  # and of every policy, not only of the best
            policy = random(20 + policy_seed, *plain.shape).softmax(-1)
            before = module.policy_values(world, policy)
            after = module.policy_values(world._replace(rewards=world.rewards + bonus), policy)
            assert_close(after[live], before[live] - potential[live], atol=1e-8, rtol=0)


def check_shaping_is_another_start_of_q(module):
    """Wiewiora 2003: Q-learning with shaping from Q_0 takes the steps of Q-learning without it from Q_0 + Phi."""
    world = module.corridor(4)
    potential = torch.tensor([0.1, 0.4, 0.2, 0.9, 0.0]).double()
    begin = 0.01 * random(11, 40, 5, 2)  # no two actions tie
    shaped = world._replace(rewards=world.rewards + module.shaping_rewards(potential, world.terminal, world.gamma))
    one, q_shaped = module.q_learning(shaped, runs=40, steps=150, generator=rng(0), q_values=begin)
    two, q_plain = module.q_learning(world, runs=40, steps=150, generator=rng(0), q_values=begin + potential[:, None])
    assert torch.equal(one, two)
    assert_close(q_shaped + potential[:, None], q_plain, atol=1e-9, rtol=0)
    assert one.isfinite().any()


def check_q_learning_finds_the_optimum(module):
    world = module.corridor(3)
    first, q_values = module.q_learning(world, runs=20, steps=700, generator=rng(1), epsilon=0.3)
    assert_close(q_values[:, :3], module.optimal_q_values(world)[:3].expand(20, 3, 2), atol=1e-3, rtol=0)
    assert first.isfinite().all() and first.min() >= 3
    assert not q_values[:, 3].any()  # nothing is learned of the end
    one, _ = module.q_learning(module.corridor(1), runs=4000, steps=60, generator=rng(2), epsilon=0.2)
    # Ties at random until the first success: a coin each step, so geometric with mean 2.
    assert abs(one.mean().item() - 2) < 4.5 * math.sqrt(2 / 4000)
    two, _ = module.q_learning(
        module.corridor(1), runs=40_000, steps=1, generator=rng(3), q_values=torch.tensor([1.0, 0.0]), epsilon=0.2
    )
    rate = two.isfinite().double().mean().item()  # the worse of two actions: epsilon / 2
    assert abs(rate - 0.1) < 4.5 * math.sqrt(0.09 / 40_000)


def check_the_dice_of_the_world(module):
    """Start in state 0 with chance 0.3, else in 1. State 0 ends; state 1 ends or leads to 0, each with chance 0.5."""
    transitions = torch.zeros(3, 2, 3, dtype=torch.float64)
    transitions[0, :, 2] = transitions[2, :, 2] = 1.0
    transitions[1, :, 0] = transitions[1, :, 2] = 0.5
    start, terminal = torch.tensor([0.3, 0.7, 0.0]).double(), torch.tensor([False, False, True])
    world = module.World(transitions, torch.ones_like(transitions), start, terminal, 0.9)
    first, q_values = module.q_learning(world, runs=20_000, steps=2, generator=rng(6))
    ended, met = (first == 1).double().mean().item(), (q_values[:, 1] > 0).any(-1).double().mean().item()
    assert abs(ended - 0.65) < 4.5 * math.sqrt(0.65 * 0.35 / 20_000)
    assert abs(met - 0.91) < 4.5 * math.sqrt(0.91 * 0.09 / 20_000)  # 0.7 at once, 0.3 * 0.7 after a new start


def check_one_update_by_hand(module):
    """From Q = 0 one success moves Q half of the way to the reward, and a second one half of what is left."""
    world, begin = module.corridor(1), torch.tensor([0.0, 1e-9]).double()
    for steps, expected in ((1, 0.5), (2, 0.75)):
        _, q_values = module.q_learning(
            world, runs=1, steps=steps, generator=rng(0), q_values=begin.expand(2, 2), epsilon=0.0
        )
        assert q_values[0, 0, 1].item() == pytest.approx(expected)
    _, q_values = module.q_learning(
        world, runs=1, steps=1, generator=rng(0), q_values=begin.expand(2, 2), epsilon=0.0, alpha=0.1
    )
    assert q_values[0, 0, 1].item() == pytest.approx(0.1)


def check_what_is_left_out_has_a_known_value(module):
    """The settings that pages and evidence rely on."""
    step = {"runs": 4000, "steps": 1, "q_values": torch.tensor([1.0, 0.0])}
    first, _ = module.q_learning(module.corridor(1), generator=rng(4), **step)
    assert abs(first.isfinite().double().mean().item() - 0.05) < 4.5 * math.sqrt(0.0475 / 4000)  # epsilon 0.1
    assert module.corridor(2).gamma == 0.9 and not (module.corridor(2).rewards < 0).any()


def check_nothing_is_worth_anything_after_the_end(module):
    """What Q says of the terminal state, garbage included, has no influence."""
    world, garbage = module.corridor(3), torch.zeros(4, 2, dtype=torch.float64)
    garbage[3] = 100.0
    clean = module.q_learning(world, runs=20, steps=100, generator=rng(5), epsilon=0.3)
    dirty = module.q_learning(world, runs=20, steps=100, generator=rng(5), epsilon=0.3, q_values=garbage)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1][:, :3], dirty[1][:, :3])
    assert clean[0].isfinite().any()
    loud = world._replace(rewards=world.rewards + torch.where(world.terminal, 9.0, 0.0)[:, None, None])
    assert_close(module.optimal_q_values(loud)[:3], module.optimal_q_values(world)[:3])


def check_an_undiscounted_world_ends(module):
    values = [short_corridor(module, p) for p in (0.05, 0.5, P_BEST, 0.95)]
    assert values == pytest.approx([-2 * (2 - p) / (p * (1 - p)) for p in (0.05, 0.5, P_BEST, 0.95)])
    assert values[2] == pytest.approx(J_BEST)
    for p in (0.0, 1.0):
        with pytest.raises(ValueError, match="need not reach an end"):
            short_corridor(module, p)
    # Four states that lead to one another and never to the end: here I - P is singular only up to rounding.
    transitions = torch.zeros(5, 1, 5, dtype=torch.float64)
    transitions[:4, 0, :4], transitions[4, 0, 4] = random(9, 4, 4).softmax(-1), 1.0
    loop = module.World(transitions, -torch.ones_like(transitions), torch.eye(5)[0], torch.arange(5) == 4, 1.0)
    with pytest.raises(ValueError, match="need not reach an end"):
        module.policy_values(loop, torch.ones(5, 1).double())


def check_bad_input_is_named(module):
    world, x = module.corridor(3), torch.zeros(2, 3)
    cases = [
        (lambda: module.discounted_returns(x, 1.1), r"gamma must lie in \[0, 1\], got 1.1"),
        (lambda: module.discounted_returns(x, math.nan), "got nan"),
        (lambda: module.discounted_returns(x, 0.9, x[:1]), r"rewards \(2, 3\), terminated \(1, 3\)"),
        (lambda: module.discounted_returns(torch.tensor(1.0), 0.9), r"rewards \(\)"),
        (lambda: module.return_bound(1.0), "no bound for gamma = 1.0 over inf steps"),
        (lambda: module.return_bound(1.5, 3), "no bound for gamma = 1.5"),
        (lambda: module.reward_loss(x, torch.zeros(2).long(), torch.zeros(3)), r"got \(2, 3\), \(2,\), \(3,\)"),
        (lambda: module.classify("both", seed=0, steps=1), "got 'both'"),
        (lambda: module.corridor(0), "length must be positive, got 0"),
        (lambda: module.shaping_rewards(torch.zeros(3), world.terminal, 0.9), r"potential \(3,\), want \(4,\)"),
        (lambda: module.policy_values(world, torch.zeros(4, 3)), r"policy \(4, 3\), want \(4, 2\)"),
        (lambda: module.optimal_q_values(short_corridor(module), sweeps=2), "no convergence within 2 sweeps"),
    ]
    for function, message in cases:
        with pytest.raises(ValueError, match=message):
            function()


CHECKS = [function for name, function in list(globals().items()) if name.startswith("check_")]
SLOW = ("value_iteration", "shaping_keeps", "another_start", "after_the_end", "finds_the", "both_kinds")  # come last
CHECKS.sort(key=lambda check: max((i for i, name in enumerate(SLOW) if name in check.__name__), default=-1))
MISTAKES = {
    "no end of an episode in the return": ("torch.where(ended[..., t], 0.0, after)", "after"),
    "the last reward is lost at the end": ("rewards[..., t] + gamma *", "(~ended[..., t]) * rewards[..., t] + gamma *"),
    "return without discount": ("rewards[..., t] + gamma * torch", "rewards[..., t] + torch"),
    "return discounted from the next step (Sutton and Barto's index shifted)": (
        "returns[..., t] = after",
        "returns[..., t] = gamma * after",
    ),
    "whole numbers stay whole": ("rewards if rewards.is_floating_point() else rewards.float()", "rewards"),
    "bound off by one step": ("(1 - gamma**steps)", "(1 - gamma ** (steps + 1))"),
    "horizon gamma / (1 - gamma)": ("/ (1 - gamma))", "* gamma / (1 - gamma))"),
    "bound without the size of the reward": ("return max_reward * (", "return 1.0 * ("),
    "sign of the label loss": ("return -logits", "return logits"),
    "sign of the reward loss": ("return -(rewards", "return (rewards"),
    "sum for a mean": (".squeeze(-1)).mean()", ".squeeze(-1)).sum()"),
    "reward ignored": ("-(rewards * logits", "-(torch.ones_like(rewards) * logits"),
    "the agent is told the label": (
        "loss = reward_loss(logits, actions, (actions == labels).float())",
        "loss = label_loss(logits, labels)",
    ),
    "reward for the wrong guess": ("(actions == labels).float()", "(actions != labels).float()"),
    "step back instead of to the start": (
        "transitions[states, 0, 0] =",
        "transitions[states, 0, (states - 1).clamp(min=0)] =",
    ),
    "moving is free": ("= -move_cost", "= 0 * move_cost"),
    "the goal pays nothing": ("rewards[length - 1, 1, length] += 1.0", "pass"),
    "potential of the end counts": ("potential = torch.where(terminal, 0.0, potential)", "potential = 1.0 * potential"),
    "shaping with the sign turned": (
        "(gamma * potential[None, :] - potential[:, None])",
        "(potential[:, None] - gamma * potential[None, :])",
    ),
    "shaping without gamma": ("(gamma * potential[None, :]", "(potential[None, :]"),
    "a bonus for arriving alone": (
        "(gamma * potential[None, :] - potential[:, None])",
        "(gamma * potential[None, :] - 0 * potential[:, None])",
    ),
    "value iteration by the mean": ("q_values.amax(-1))  # (S,)", "q_values.mean(-1))  # (S,)"),
    "value iteration without gamma": ("(world.rewards + world.gamma * after)", "(world.rewards + after)"),
    "policy without gamma": ("to(paid) - world.gamma * steps", "to(paid) - steps"),
    "the end goes on": ("torch.where(world.terminal[:, None], 0.0, steps), world.terminal", "steps, world.terminal"),
    "a loop has a value": ("if world.gamma == 1 and not ends.all():", "if False:"),
    "reward of the actions unweighted": ("paid = (policy.unsqueeze(-1) * world", "paid = (world"),
    "Q-learning by the mean": ("q_values[row, after].amax(-1))", "q_values[row, after].mean(-1))"),
    "another step size": ("alpha: float = 0.5", "alpha: float = 0.6"),
    "another rate of exploration": ("epsilon: float = 0.1", "epsilon: float = 0.2"),
    "another discount": ("gamma: float = 0.9, move", "gamma: float = 0.95, move"),
    "bootstrap behind the end": (
        "torch.where(ended, 0.0, q_values[row, after].amax(-1))",
        "q_values[row, after].amax(-1)",
    ),
    "values behind the end": ("torch.where(world.terminal, 0.0, q_values.amax(-1))", "q_values.amax(-1)"),
    "Q-learning without gamma": ("target + world.gamma *", "target +"),
    "a learner that adds": ("alpha * (target - q_values[row, s, a])", "alpha * target"),
    "ties to the first action": (
        "best / best.sum(-1, keepdim=True)",
        "torch.nn.functional.one_hot(here.argmax(-1), actions)",
    ),
    "exploration twice as strong": ("+ epsilon / actions", "+ 2 * epsilon / actions"),
    "no new start after the end": ("s = torch.where(ended, again, after)", "s = after"),
    "the last success is kept": (
        "torch.where(ended & first.isinf(), float(t), first)",
        "torch.where(ended, float(t), first)",
    ),
    "time from zero": ("for t in range(1, steps + 1):", "for t in range(steps):"),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__[6:])
def test_the_functions(check):
    check(original)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    """Each deliberate mistake makes at least one check fail."""
    mutant = load_mutant(PATH, *MISTAKES[mistake])
    assert any(caught_by(mutant, [check]) for check in CHECKS)


# What the page shows.


def z_score(samples, expected):
    samples = torch.as_tensor(samples, dtype=torch.float64)
    return ((samples.mean() - expected) / (samples.std() / math.sqrt(len(samples)))).item()


def test_rewards_teach_more_slowly_than_labels(evidence):
    seeds, level, steps = seeds_of(evidence), 0.5, 300 if evidence.full else 110
    runs = {kind: [original.classify(kind, seed=s, steps=steps) for s in seeds] for kind in ("label", "reward")}
    needed = {kind: [(run >= level).nonzero()[0].item() for run in found] for kind, found in runs.items()}
    names = {"label": "labels", "reward": "rewards for its own guess"}
    for kind, found in runs.items():
        curve = {
            "x": list(range(0, steps, 5)),
            "y": {names[kind]: [[round(x, 4) for x in run[::5].tolist()] for run in found]},
        }
        evidence(
            NAME,
            f"Batches until half of the answers are right: {names[kind]}",
            value=sum(needed[kind]) / len(seeds),
            unit="batches",
            seeds=seeds,
            spread=needed[kind],
            curve=curve,
        )
    ratio = [b / a for a, b in zip(needed["label"], needed["reward"], strict=True)]
    evidence(
        NAME,
        "Times as many batches with rewards as with labels",
        value=min(ratio),
        bar=2,
        better=">=",
        unit="×",
        seeds=seeds,
        spread=ratio,
        note="the least of the seeds",
    )
    # A larger step helps both, and does not close the gap: labels need fewer than 10 batches, rewards thrice as many.
    for seed in seeds:
        fast, slow = (original.classify(kind, seed=seed, steps=60, lr=8.0) for kind in ("label", "reward"))
        assert 3 * (fast >= level).nonzero()[0].item() <= (slow >= level).nonzero()[0].item()
        assert (fast >= level).nonzero()[0].item() < 10
    # At the start the expected step is 1/10 of the supervised one: the theorem, on a sample of 200,000 guesses.
    logits = torch.zeros(200_000, 10, dtype=torch.float64)
    labels = torch.zeros(200_000, dtype=torch.long)
    actions = torch.randint(10, labels.shape, generator=rng(0))
    hits = (actions == labels).double()
    assert abs(z_score(hits, 0.1)) < 4
    pull = torch.zeros(1, 10, dtype=torch.float64, requires_grad=True)
    slow = torch.autograd.grad(original.reward_loss(pull.expand_as(logits), actions, hits), pull)[0]
    fast = torch.autograd.grad(original.label_loss(pull, labels[:1]), pull)[0]
    assert_close(slow, hits.mean() * fast)


def first_success(length, seed, shaped, runs, steps):
    world = original.corridor(length)
    if shaped:
        progress = torch.arange(length + 1, dtype=torch.float64) / length
        bonus = original.shaping_rewards(progress, world.terminal, world.gamma)
        world = world._replace(rewards=world.rewards + bonus)
    return original.q_learning(world, runs=runs, steps=steps, generator=rng(seed))[0]


def test_the_time_to_the_first_success(evidence):
    """Sparse: Q is 0 until the goal is met, so the agent is a coin and needs 2^(n + 1) - 2 steps. Shaped: far fewer."""
    seeds, lengths, runs = seeds_of(evidence), ([2, 4, 6, 8] if evidence.full else [2, 5]), 200
    sparse = {n: [first_success(n, s, False, runs, 10 * 2 ** (n + 1)) for s in seeds] for n in lengths}
    shaped = {n: [first_success(n, s, True, runs, 60 * n) for s in seeds] for n in lengths}
    assert all(x.isfinite().all() for found in shaped.values() for x in found)
    z = []
    for n in lengths:
        samples = torch.cat(sparse[n])
        assert samples.isfinite().all()
        z.append(abs(z_score(samples, 2 ** (n + 1) - 2)))
    evidence(
        NAME,
        "Sparse reward: largest |z| of the mean time against 2^(n+1) − 2",
        value=max(z),
        bar=4,
        unit="σ",
        seeds=seeds,
    )
    last = lengths[-1]
    means = {name: [x.mean().item() for x in found[last]] for name, found in (("sparse", sparse), ("shaped", shaped))}
    for name, found in means.items():
        table = {"sparse": sparse, "shaped": shaped}[name]
        curve = {"x": lengths, "y": {name: [[table[n][i].mean().item() for n in lengths] for i in range(len(seeds))]}}
        evidence(
            NAME,
            f"Steps to the first success: {name} reward",
            value=sum(found) / len(found),
            unit="steps",
            seeds=seeds,
            spread=found,
            curve=curve,
            note=f"corridor of {last}, a mean over {runs} agents a seed",
        )
    faster = [a / b for a, b in zip(means["sparse"], means["shaped"], strict=True)]
    bar = 8 if evidence.full else 2
    evidence(
        NAME,
        "Shaping shortens the time to the first success by a factor",
        value=min(faster),
        bar=bar,
        better=">=",
        unit="×",
        seeds=seeds,
        spread=faster,
        note="the least of the seeds",
    )


def ends(world, policy):
    """The chance that a deterministic policy reaches a terminal state, from the start."""
    here = world.start
    steps = world.transitions[torch.arange(len(policy)), policy]
    for _ in range(len(policy) + 1):
        here = here @ steps
    return here[world.terminal].sum().item()


def test_a_bonus_that_is_no_potential_changes_the_optimum(evidence):
    """Ng et al.'s cyclist: paid for each step ahead and not charged for the way back, the best agent turns round."""
    world, n = original.corridor(8), 8
    progress = torch.arange(n + 1, dtype=torch.float64) / n
    plain = original.optimal_q_values(world)
    potential = original.shaping_rewards(progress, world.terminal, world.gamma)
    shaped = original.optimal_q_values(world._replace(rewards=world.rewards + potential))
    gap = (shaped - plain + progress[:, None])[:n].abs().max().item()
    evidence(NAME, "Potential-based shaping: largest |Q*shaped − (Q* − Φ)|", value=gap, bar=1e-9)
    ahead = 3 * (progress[None, :] - progress[:, None]).clamp(min=0).unsqueeze(1)
    naive = original.optimal_q_values(world._replace(rewards=world.rewards + ahead))
    found = {"none": plain, "potential": shaped, "naive": naive}
    reached = {name: ends(world, q_values.argmax(-1)) for name, q_values in found.items()}
    assert reached["none"] == reached["potential"] == 1
    evidence(NAME, "Naive bonus: chance that its optimal policy reaches the goal", value=reached["naive"], bar=0)
    # It turns round in the last state before the goal, and the loop is worth more than the end, in closed form.
    gamma, b = world.gamma, 3 / n
    loop = b * original.return_bound(gamma, n - 1) / (1 - gamma**n)
    assert naive[0, 1].item() == pytest.approx(loop) and naive[n - 1].argmax() == 0
    assert loop > b * original.return_bound(gamma, n) + gamma ** (n - 1)
    # A smaller bonus of the same form does no harm here: nothing says so in advance.
    small = original.optimal_q_values(world._replace(rewards=world.rewards + ahead / 30))
    assert ends(world, small.argmax(-1)) == 1


def test_a_potential_at_the_end_changes_the_optimum():
    """Phi of a terminal state must be 0: with -2 at the goal the agent would rather not arrive."""
    world = original.corridor(4)
    potential = torch.zeros(5, dtype=torch.float64)
    potential[4] = -2.0
    kept = original.shaping_rewards(potential, world.terminal, world.gamma)
    assert not kept.any()
    wrong = original.shaping_rewards(potential, torch.zeros_like(world.terminal), world.gamma)
    q_values = original.optimal_q_values(world._replace(rewards=world.rewards + wrong))
    assert ends(world, original.optimal_q_values(world).argmax(-1)) == 1
    assert ends(world, q_values.argmax(-1)) == 0


def test_a_penalty_makes_the_agent_stand_still(evidence):
    """It stays where it is as soon as a step costs more than gamma^(n-1) (1 - gamma) / (1 - gamma^n)."""
    gap = []
    for n, gamma in ((3, 0.9), (8, 0.9), (8, 0.99), (5, 0.5)):
        low, high = 0.0, 1.0
        for _ in range(40 if evidence.full else 24):
            cost = (low + high) / 2
            q_values = original.optimal_q_values(original.corridor(n, gamma=gamma, move_cost=cost))
            low, high = (cost, high) if q_values[0, 1] > q_values[0, 0] + 1e-9 else (low, cost)
        gap.append(abs(low - gamma ** (n - 1) / original.return_bound(gamma, n)))
    evidence(
        NAME,
        "Penalty at which standing still becomes optimal: measured less predicted",
        value=max(gap),
        bar=1e-6,
        note="by bisection over value iteration, for four corridors",
    )
    value = original.optimal_q_values(original.corridor(8, move_cost=0.1)).amax(-1)
    assert value[0] == 0 and value[7] == pytest.approx(0.9)  # it would finish, if it stood before the goal
    # A learner gives up sooner: at 0.05, below the threshold of 0.084, going pays, and hardly one agent finds out.
    costly = original.corridor(8, move_cost=0.05)
    assert original.optimal_q_values(costly)[0].argmax() == 1
    for seed in seeds_of(evidence):
        options = {"runs": 50, "steps": 2500 if evidence.full else 1500}
        first, _ = original.q_learning(costly, generator=rng(seed), **options)
        cheap, _ = original.q_learning(original.corridor(8), generator=rng(seed), **options)
        assert first.isfinite().double().mean() < 0.1 < 0.7 < cheap.isfinite().double().mean()


def test_a_penalty_for_time_can_make_the_agent_give_up():
    """A step costs 0.2; the goal, 8 steps ahead, pays 1; a pit beside the way ends the episode and costs 1."""
    road = original.corridor(8, gamma=1.0)
    transitions = torch.zeros(10, 2, 10, dtype=torch.float64)
    transitions[:9, :, :9] = road.transitions
    transitions[:8, 0] = 0.0
    transitions[:8, 0, 9] = transitions[9, :, 9] = 1.0  # action 0: into the pit
    rewards = torch.zeros_like(transitions)
    for cost, goes in ((0.2, True), (0.3, False)):  # 1 - 8 cost against -1 - cost: they meet at 2 / 7
        rewards[:8] = -cost
        rewards[7, 1, 8], rewards[:8, 0, 9] = 1.0 - cost, -1.0 - cost
        start, terminal = torch.eye(10, dtype=torch.float64)[0], torch.arange(10) >= 8
        world = original.World(transitions, rewards, start, terminal, 1.0)
        mdps.MDP(*world)
        assert bool(original.optimal_q_values(world)[0].argmax()) == goes


def test_the_short_corridor(evidence):
    """Where states look alike, a coin beats every rule without memory (Sutton and Barto 2018, example 13.1)."""
    grid = torch.linspace(0.01, 0.99, 981, dtype=torch.float64)
    values = torch.tensor([short_corridor(original, p.item()) for p in grid], dtype=torch.float64)
    closed = -2 * (2 - grid) / (grid * (1 - grid))
    evidence(
        NAME, "Short corridor: closed form less linear solve, at most", value=(values - closed).abs().max(), bar=1e-8
    )
    best = values.argmax()
    assert abs(grid[best] - P_BEST) < 1e-3 and values[best] <= J_BEST + 1e-12
    evidence(NAME, "Short corridor: best chance to go right", value=P_BEST)
    evidence(
        NAME,
        "Short corridor: value of the best stochastic policy",
        value=short_corridor(original, P_BEST),
        bar=J_BEST - 1e-9,
        better=">=",
        unit="reward",
    )
    for name, p in (("right, ε = 0.1", 0.95), ("left, ε = 0.1", 0.05)):
        evidence(NAME, f"Short corridor: value of always {name}", value=short_corridor(original, p), unit="reward")
    assert short_corridor(original, 0.95) == pytest.approx(-44.2, abs=0.05)  # the book's figures: -44, -82, -11.6, 0.59
    assert short_corridor(original, 0.05) == pytest.approx(-82.1, abs=0.05)
    # One deterministic rule is enough if it sees the state, or remembers its own steps: right, left, right.
    world = short_corridor(original)
    seen = torch.nn.functional.one_hot(torch.tensor([1, 0, 1, 0]), 2).double()
    assert original.policy_values(world, seen)[0] == original.optimal_q_values(world)[0].max() == -3
    s = 0
    for a in (1, 0, 1):
        s = world.transitions[s, a].argmax().item()
    assert s == 3


def test_the_demo_prints_its_tables(capsys):
    original.main()
    printed = capsys.readouterr().out
    assert "sparse" in printed and "shaped" in printed and "reward" in printed
