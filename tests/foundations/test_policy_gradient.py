"""Policy-gradient estimates: against autograd through the exact value, by enumeration and in z-tests."""

import functools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from snippets.foundations import loop
from snippets.foundations import policy_gradient as original
from snippets.worlds import mdps
from snippets.worlds.classic import CARTPOLE, Envs
from tests.foundations.on_policy import solves_cartpole
from tests.mutation import caught_by, load_mutant

torch.set_num_threads(1)
PATH = "snippets/foundations/policy_gradient.py"
SEEDS = [0, 1, 2, 3, 4]
GAMMA = 0.9


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The exact world: every course that an episode of H steps can take, with its probability.


@dataclass(frozen=True)
class Enumeration:
    """K courses of H steps under a table of logits. The value after H steps is 0."""

    mdp: mdps.MDP
    logits: Tensor  # (S, A)
    states: Tensor  # (K, H + 1)
    actions: Tensor  # (K, H), as rewards
    rewards: Tensor
    mask: Tensor  # (K, H): 0 on steps that stand in the terminal state
    over: Tensor  # (K, H): the episode's last step
    probs: Tensor  # (K,)
    scores: Tensor  # (K, H, S * A): grad log pi(a_t|s_t), 0 under a 0 of the mask
    values: Tensor  # (H + 1, S): the true V at each time
    q_values: Tensor  # (H, S, A)
    gradient: Tensor  # (S * A,), of E[sum_t gamma^t r_t], by autograd through the recursion of values

    def discounts(self):
        """(H, 1): gamma^t."""
        return GAMMA ** torch.arange(self.rewards.shape[1], dtype=torch.float64).unsqueeze(-1)

    def at(self, table):
        """A table (H, S) or (H, S, A) at each step's time, state and action -> (H, K), time first."""
        time = torch.arange(self.rewards.shape[1]).unsqueeze(-1)
        where = (time, self.states[:, :-1].T, self.actions.T)
        return table[where[: table.dim()]]

    def estimates(self, weights):
        """weights (H, K), time first -> the estimate of each course (K, S * A)."""
        return (weights.T.unsqueeze(-1) * self.scores).sum(1)

    def bias_and_spread(self, weights):
        """Of one episode's estimate, relative to the norm of the true gradient."""
        estimates, size = self.estimates(weights), self.gradient.norm()
        mean = self.probs @ estimates
        variance = self.probs @ (estimates - mean).square().sum(-1)
        return ((mean - self.gradient).norm() / size).item(), (variance.sqrt() / size).item()


def with_an_end(mdp):
    """The same, its last state terminal."""
    transitions, rewards, terminal = mdp.transitions.clone(), mdp.rewards.clone(), mdp.terminal.clone()
    transitions[-1], rewards[-1] = 0.0, 0.0
    transitions[-1, :, -1], terminal[-1] = 1.0, True
    return mdps.MDP(transitions, rewards, mdp.start, terminal, mdp.gamma)


def scores_of(pi, states, actions):
    """grad log pi(a_t|s_t) of each step with respect to the table of logits, (K, H, S * A)."""
    of_state = torch.nn.functional.one_hot(states[:, :-1], len(pi)).double()  # (K, H, S)
    of_action = torch.nn.functional.one_hot(actions, pi.shape[1]) - pi[states[:, :-1]]  # (K, H, A)
    return (of_state.unsqueeze(-1) * of_action.unsqueeze(-2)).flatten(-2)


@functools.cache
def enumerate_world(seed, horizon=4, ends=False):
    mdp = mdps.random_mdp(seed=seed, gamma=GAMMA, noise=3.0)  # an action matters for where one gets
    mdp = with_an_end(mdp) if ends else mdp
    logits = random(100 + seed, 3, 2).requires_grad_()
    pi = logits.softmax(-1)
    values, q_values = [torch.zeros(3, dtype=torch.float64)], []
    for _ in range(horizon):
        q = mdp.expected_rewards + GAMMA * mdp.transitions @ values[0]  # (S, A)
        q_values.insert(0, q)
        values.insert(0, (pi * q).sum(-1))
    (gradient,) = torch.autograd.grad(mdp.start @ values[0], logits)
    courses = mdps.all_episodes(mdp, horizon)
    states, actions = courses.states, courses.actions
    logits, pi = logits.detach(), pi.detach()
    mask = ~mdp.terminal[states[:, :-1]]
    over = mdp.terminal[states[:, 1:]]
    over[:, -1] = True
    logps = pi.log()[states[:, :-1], actions].sum(-1) + courses.world_logps
    scores = scores_of(pi, states, actions) * mask.unsqueeze(-1)
    values, q_values = torch.stack(values).detach(), torch.stack(q_values).detach()
    return Enumeration(
        mdp, logits, states, actions, courses.rewards, mask, over, logps.exp(), scores, values, q_values,
        gradient.flatten(),
    )  # fmt: skip


def test_the_exact_world_is_exact():
    """Probabilities sum to 1, the mean return is V, scores have mean zero and are the gradient of log pi."""
    for ends in (False, True):
        world = enumerate_world(0, ends=ends)
        assert world.probs.sum().item() == pytest.approx(1, abs=1e-12)
        returns = (world.rewards * world.discounts().T).sum(-1)
        assert_close(world.probs @ returns, world.mdp.start @ world.values[0])
        assert (world.probs @ world.scores.flatten(1)).abs().max() < 1e-12
        logits = world.logits.clone().requires_grad_()
        logp = logits.log_softmax(-1)[world.states[7, 0], world.actions[7, 0]]
        assert_close(torch.autograd.grad(logp, logits)[0].flatten(), world.scores[7, 0])


# The estimators: weights (H, K) of grad log pi, from the module's functions.


def togo(module, world, from_start=True):
    return module.rewards_to_go(world.rewards.T, world.over.T, gamma=GAMMA, from_start=from_start)


def groups_of(world, kind):
    time = torch.arange(world.rewards.shape[1]).expand(world.rewards.shape)
    return torch.zeros_like(time) if kind == "one" else 3 * time + world.states[:, :-1]


def optimal(module, world, kind):
    """gamma^t * (G_t - b), b of least variance: one number, or one for each time and state."""
    factor, groups = world.discounts(), groups_of(world, kind)
    if kind == "each" and world.mdp.terminal.any():
        groups = torch.where(world.mask, groups, 0)
        used, groups = groups.unique(return_inverse=True)  # no group without a score
    b = module.optimal_baselines(
        togo(module, world, False).T, factor.T.unsqueeze(-1) * world.scores, world.probs, groups
    )
    return factor * (togo(module, world, False) - b[groups].T)


def whole_return(module, world):
    return togo(module, world)[:1].expand(world.rewards.T.shape)


def td_error(module, world):
    after = torch.stack([world.values[t + 1][world.states[:, t + 1]] for t in range(world.rewards.shape[1])])
    return world.discounts() * (world.rewards.T + GAMMA * after - world.at(world.values))


UNBIASED = {
    "whole return": whole_return,
    "reward-to-go": togo,
    "less the mean return": lambda m, w: togo(m, w) - w.discounts() * (w.mdp.start @ w.values[0]),
    "less the best constant": lambda m, w: optimal(m, w, "one"),
    "less V(s)": lambda m, w: togo(m, w) - w.discounts() * w.at(w.values),
    "less the best b(t, s)": lambda m, w: optimal(m, w, "each"),
    "TD error, true V": td_error,
    "true advantage": lambda m, w: w.discounts() * (w.at(w.q_values) - w.at(w.values)),
}
BIASED = {
    "blind to the future": lambda m, w: w.discounts() * w.rewards.T,
    "baseline of the action": lambda m, w: togo(m, w) - w.discounts() * w.at(w.q_values) / 2,
    "without γ^t": lambda m, w: togo(m, w, False),
    "TD error, half of V": lambda m, w: td_error(m, Enumeration(**(vars(w) | {"values": w.values / 2}))),
    "only what came before": lambda m, w: whole_return(m, w) - togo(m, w),
}


# Each check takes the module, so that broken copies can be put to it.


def check_estimators_are_unbiased(module):
    for seed in (0, 1):
        for ends in (False, True):
            world = enumerate_world(seed, 3, ends)
            for name, weights in UNBIASED.items():
                mean = world.probs @ world.estimates(weights(module, world))
                assert_close(mean, world.gradient, rtol=0, atol=1e-10, msg=lambda text: f"{name}: {text}")  # noqa: B023


def check_rewards_to_go_in_loops(module):
    rewards, over = random(1, 9, 4), random(2, 9, 4) > 0.6
    for gamma in (1.0, 0.9, 0.0):
        found = module.rewards_to_go(rewards, over, gamma=gamma)
        start = module.rewards_to_go(rewards, over, gamma=gamma, from_start=True)
        for i in range(4):
            age = 0
            for t in range(9):
                last = next((u for u in range(t, 9) if over[u, i]), 8)
                expected = sum(gamma ** (u - t) * rewards[u, i].item() for u in range(t, last + 1))
                assert found[t, i].item() == pytest.approx(expected, abs=1e-12)
                assert start[t, i].item() == pytest.approx(gamma**age * expected, abs=1e-12)
                age = 0 if over[t, i] else age + 1


def check_the_theorem(module):
    """d(s) pi(a|s) A(s, a) against autograd through the linear system of an infinite horizon."""
    for seed in SEEDS:
        mdp = (
            with_an_end(mdps.random_mdp(seed=seed, gamma=GAMMA))
            if seed % 2
            else mdps.random_mdp(seed=seed, gamma=GAMMA)
        )
        logits, eye = random(3 + seed, 3, 2).requires_grad_(), torch.eye(3, dtype=torch.float64)
        pi = logits.softmax(-1)
        moves = torch.einsum("sa,sat->st", pi, mdp.transitions)
        values = torch.linalg.solve(eye - GAMMA * moves, (pi * mdp.expected_rewards).sum(-1))
        (expected,) = torch.autograd.grad(mdp.start @ values, logits)
        moves, values = moves.detach(), values.detach()
        visits = torch.linalg.solve(eye - GAMMA * moves.T, mdp.start)
        q_values = mdp.expected_rewards + GAMMA * mdp.transitions @ values
        assert_close(module.policy_gradient(visits, pi.detach(), q_values), expected, rtol=0, atol=1e-10)


def check_the_loss_has_the_gradient(module):
    """Minus the gradient of the loss is the mean over episodes of sum_t w_t grad log pi; shapes do not matter."""
    world = enumerate_world(1, horizon=2)
    weights, count = togo(module, world), len(world.probs)
    for shape in ((2, count), (2 * count,)):
        logits = world.logits.clone().requires_grad_()
        logps = logits.log_softmax(-1)[world.states[:, :-1].T, world.actions.T].reshape(shape)
        loss = module.reinforce_loss(logps, weights.reshape(shape), episodes=count)
        (gradient,) = torch.autograd.grad(-loss, logits)
        assert_close(gradient.flatten(), world.estimates(weights).mean(0))
    weights.requires_grad_()  # a weight is a constant, even where a critic made it
    assert (
        torch.autograd.grad(module.reinforce_loss(logps, weights.reshape(-1), episodes=3), weights, allow_unused=True)[
            0
        ]
        is None
    )


def check_others_mean_by_hand(module):
    togo = torch.tensor([[3.0, 1.0, 5.0], [2.0, math.nan, 4.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 1]])
    assert module.others_mean(togo, mask).tolist() == [[3.0, 4.0, 2.0], [2.0, 3.0, 1.0]]


def check_no_baseline_is_better_than_the_optimal(module):
    """The variance is a parabola in the baselines: any other choice lies higher, and least squares finds the same."""
    for kind in ("one", "each"):
        for seed in (0, 3):
            world = enumerate_world(seed, horizon=3)
            weights, groups = togo(module, world), groups_of(world, kind)
            best = module.optimal_baselines(weights.T, world.scores, world.probs, groups)
            # Columns: what a unit of each baseline takes from the estimate, all coordinates one below the other.
            columns = torch.stack([world.estimates((groups == j).T.double()).flatten() for j in range(len(best))], -1)
            root = world.probs.sqrt().repeat_interleave(6)
            target = root * world.estimates(weights).flatten()
            solution = torch.linalg.lstsq(root.unsqueeze(-1) * columns, target.unsqueeze(-1)).solution.squeeze(-1)
            assert_close(best, solution, rtol=0, atol=1e-9)
            least = world.bias_and_spread(weights - best[groups].T)[1]
            for draw in range(5):
                other = best + 0.3 * random(50 + draw, *best.shape)
                assert world.bias_and_spread(weights - other[groups].T)[1] > least


def check_large_numbers_and_types(module):
    rewards, over = random(5, 6, 3), torch.zeros(6, 3, dtype=torch.bool)
    for dtype in (torch.float32, torch.float64):
        out = module.rewards_to_go(rewards.to(dtype).requires_grad_(), over, from_start=True)
        assert out.dtype == dtype and not out.requires_grad
        logps = (1e4 * rewards).to(dtype).detach().requires_grad_()
        loss = module.reinforce_loss(logps, rewards.to(dtype), episodes=1)
        loss.backward()
        assert loss.isfinite() and logps.grad.isfinite().all() and loss.dtype == dtype


def check_defaults_and_flags(module):
    rewards, over = random(6, 9, 4), random(7, 9, 4) > 0.6
    plain = module.rewards_to_go(rewards, over)
    for flags in (over, over.long(), over.double()):
        assert_close(module.rewards_to_go(rewards, flags, gamma=0.99, from_start=False), plain, rtol=0, atol=0)


def check_the_adapter(module):
    """Whole episodes that pay 1 a step: weights counted by hand, and a step of SGD along the mean over episodes."""
    algorithm, task = module.algorithm(), replace(CARTPOLE, limit=12)
    settings = algorithm.settings(envs=3, gamma=0.5)
    torch.manual_seed(0)
    agent = loop.Agent(task, 8)
    rollout = loop.collect(Envs(task, 3), agent, settings.horizon, torch.Generator().manual_seed(2))
    advantages, _ = algorithm.advantages(rollout, settings)
    lengths = rollout.mask.sum(0).tolist()
    assert len(rollout.mask) == max(lengths) <= 12 and len(set(lengths)) > 1
    for t in range(max(lengths)):
        left = [2 * (1 - 0.5 ** max(length - t, 0)) for length in lengths]  # 1 + 1/2 + 1/4 + ...
        for i in range(3):
            if rollout.mask[t, i]:
                assert advantages[t, i].item() == pytest.approx(left[i] - (sum(left) - left[i]) / 2, abs=1e-5)
    kept = rollout.mask.bool()
    rows = (rollout.obs, rollout.actions, rollout.logps, rollout.values, advantages, advantages)
    batch = loop.Batch(*(x[kept] for x in rows))
    wanted = (advantages[kept] * agent.logps(batch.obs, batch.actions)[0]).sum() / 3
    gradient = torch.autograd.grad(wanted, list(agent.policy.parameters()))
    before = [x.detach().clone() for x in agent.policy.parameters()]
    algorithm.update(agent, torch.optim.SGD(agent.parameters(), lr=1.0), batch, settings, torch.Generator())
    for x, y, step in zip(before, agent.policy.parameters(), gradient, strict=True):
        assert_close(y.detach(), x + step)


def check_bad_input_is_named(module):
    x, flags = random(6, 5, 3), torch.zeros(5, 3, dtype=torch.bool)
    pi = torch.full((4, 2), 0.5)
    scores, probs, groups = random(7, 8, 3, 6), torch.full((8,), 1 / 8), torch.zeros(8, 3, dtype=torch.long)
    assert module.rewards_to_go(x[:0], flags[:0], from_start=True).shape == (0, 3)
    cases = [
        (lambda: module.policy_gradient(pi[:, 0], pi, pi[:3]), r"probs \(4, 2\), q_values \(3, 2\)"),
        (lambda: module.policy_gradient(pi[:2, 0], pi, pi), r"visits \(2,\), states \(4,\)"),
        (lambda: module.rewards_to_go(x, flags[:4]), r"rewards \(5, 3\), over \(4, 3\)"),
        (lambda: module.rewards_to_go(x, flags, gamma=1.1), r"gamma must lie in \[0, 1\], got 1.1"),
        (lambda: module.rewards_to_go(x, flags, gamma=math.nan), "got nan"),
        (lambda: module.others_mean(x, flags[:, :1]), r"togo \(5, 3\), mask \(5, 1\)"),
        (lambda: module.others_mean(x[:, :1], flags[:, :1]), r"one episode has no others: shape \(5, 1\)"),
        (lambda: module.reinforce_loss(x, x[0], episodes=3), r"logps \(5, 3\), advantages \(3,\)"),
        (lambda: module.reinforce_loss(x, x, episodes=0), "episodes must be positive, got 0"),
        (lambda: module.optimal_baselines(scores[..., 0], scores, probs, groups[:4]), r"groups \(4, 3\)"),
        (lambda: module.optimal_baselines(scores[..., 0], scores, probs[:4], groups), r"probs \(4,\), courses \(8,\)"),
        (lambda: module.optimal_baselines(scores[..., 0], 0 * scores, probs.double(), groups), "no score in a group"),
    ]  # fmt: skip
    for function, message in cases:
        with pytest.raises(ValueError, match=message):
            function()


def check_the_mean_of_the_others_is_unbiased(module):
    """Over all pairs of episodes, one the baseline of the other. A mean that holds both halves the gradient."""
    for world in (enumerate_world(2, 1), enumerate_world(2, 2, True)):
        count = len(world.probs)
        first, second = torch.arange(count).repeat_interleave(count), torch.arange(count).repeat(count)
        chance = world.probs[first] * world.probs[second]
        weights, mask = togo(module, world), world.mask.T
        for with_itself, factor in ((False, 1.0), (True, 0.5)):
            mean = torch.zeros_like(world.gradient)
            pair_togo = torch.stack([weights[:, first], weights[:, second]], -1)  # (H, pairs, 2)
            pair_mask = torch.stack([mask[:, first], mask[:, second]], -1)
            # A column of its own for each pair, so that one call makes all baselines of two episodes.
            b = torch.stack(
                [module.others_mean(w, m) for w, m in zip(pair_togo.unbind(1), pair_mask.unbind(1), strict=True)], 1
            )
            b = torch.where(pair_mask, pair_togo, 0.0).mean(-1, keepdim=True).expand_as(b) if with_itself else b
            for k, rows in enumerate((first, second)):
                pull = (pair_togo - b)[..., k].T.unsqueeze(-1) * world.scores[rows]
                mean += chance @ pull.sum(1) / 2
            assert_close(mean, factor * world.gradient, rtol=0, atol=1e-10)


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_functions(check):
    check(original)


MISTAKES = {
    "no value subtracted, a sign": ("(q_values - values)", "(q_values + values)"),
    "no policy in the theorem": ("* probs * (q_values", "* (q_values"),
    "no visits in the theorem": ("visits.unsqueeze(-1) * probs", "probs"),
    "a mean over actions as V": ("(probs * q_values).sum(-1, keepdim=True)", "q_values.mean(-1, keepdim=True)"),
    "no discount": ("rewards[t] + gamma * torch", "rewards[t] + torch"),
    "wrong discount": ("rewards[t] + gamma * torch", "rewards[t] + gamma**2 * torch"),
    "blind to the future": ("rewards[t] + gamma * torch.where(over[t], 0.0, after)", "rewards[t]"),
    "the own reward is missing": ("togo[t] = after", "togo[t] = after - rewards[t]"),
    "forward": ("for t in reversed(range(len(rewards)))", "for t in range(len(rewards))"),
    "through the end": ("gamma * torch.where(over[t], 0.0, after)", "gamma * after"),
    "the end shifted by one": (
        "gamma * torch.where(over[t], 0.0, after)",
        "gamma * torch.where(over[t - 1], 0.0, after)",
    ),
    "gamma^t forgotten": ("return discount * togo", "return togo"),
    "gamma^(t + 1)": ("discount[t] = factor", "discount[t] = gamma * factor"),
    "gamma^t runs on": ("torch.where(over[t], 1.0, gamma * factor)", "gamma * factor"),
    "start ignored": ("if not from_start", "if True"),
    "gradient kept": ("rewards, over = rewards.detach(), over.bool()", "over = over.bool()"),
    "the own return in the baseline": (
        "(togo.sum(1, keepdim=True) - togo) / (togo.shape[1] - 1)",
        "togo.mean(1, keepdim=True).expand_as(togo)",
    ),
    "divided by all": ("(togo.shape[1] - 1)", "togo.shape[1]"),
    "a product with the mask": ("torch.where(mask.bool(), togo, 0.0)", "togo * mask"),
    "a single episode": ("if togo.shape[1] < 2", "if False"),
    "wrong sign": ("return -(advantages.detach() * logps)", "return (advantages.detach() * logps)"),
    "advantage with gradient": ("advantages.detach() * logps", "advantages * logps"),
    "a mean over steps": ("logps).sum() / episodes", "logps).mean()"),
    "own squares only": ("(scores * total).sum(-1)", "(weights.unsqueeze(-1) * scores.square()).sum(-1)"),
    "the mean return": ("scores.square().sum(-1)", "scores.square().sum(-1) * 0 + probs[:, None]"),
    "unweighted": ("products = probs[:, None] *", "products = "),
    "empty groups": ("if (below <= 0).any()", "if False"),
    "gamma unchecked": ("if not 0 <= gamma <= 1", "if False"),
    "episodes unchecked": ("if episodes < 1", "if False"),
    "shapes unchecked": ("_same(logps=logps, advantages=advantages)", ""),
    "over unchecked": ("_same(rewards=rewards, over=over)", ""),
    "another default of gamma": ("gamma: float = 0.99", "gamma: float = 1.0"),
    "flags must be bool": ("rewards.detach(), over.bool()", "rewards.detach(), over"),
    "the adapter has no baseline": ("return togo - others_mean(togo, rollout.mask), togo", "return togo, togo"),
    "the adapter takes a mean over steps": ("episodes=settings.envs", "episodes=len(batch)"),
    "the adapter knows no gamma": ("over, gamma=settings.gamma)", "over, gamma=1.0)"),
    "the adapter cuts episodes off": ("horizon: int = 0", "horizon: int = 500"),
}  # fmt: skip


def test_no_check_fails_on_the_original():
    assert caught_by(original, CHECKS) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    mutant = load_mutant(PATH, *MISTAKES[mistake])
    assert any(caught_by(mutant, [check]) for check in CHECKS)


# Estimates from samples, their bias and their noise.


def draw_episodes(world, count, seed):
    """The same world with `count` sampled episodes in place of all courses."""
    generator = torch.Generator().manual_seed(seed)
    states, actions, rewards = (
        [torch.multinomial(world.mdp.start.expand(count, -1), 1, generator=generator).squeeze(-1)],
        [],
        [],
    )
    pi = world.logits.softmax(-1)
    for _ in range(world.rewards.shape[1]):
        actions.append(torch.multinomial(pi[states[-1]], 1, generator=generator).squeeze(-1))
        after, paid = mdps.sample(world.mdp, states[-1], actions[-1], generator)
        states.append(after)
        rewards.append(paid)
    states, actions, rewards = (torch.stack(x, 1) for x in (states, actions, rewards))
    over = torch.zeros_like(rewards, dtype=torch.bool)
    over[:, -1] = True
    sampled = {
        "states": states,
        "actions": actions,
        "rewards": rewards,
        "mask": torch.ones_like(over),
        "over": over,
        "probs": torch.full((count,), 1 / count, dtype=torch.float64),
        "scores": scores_of(pi, states, actions),
    }
    return Enumeration(**(vars(world) | sampled))


def z_scores(world, weights):
    """Of the mean of independent estimates against the exact gradient, one a coordinate."""
    estimates = world.estimates(weights)
    error = estimates.mean(0) - world.gradient
    return (error / (estimates.std(0) / math.sqrt(len(estimates)))).abs()


SAMPLED = {name: weights for name, weights in UNBIASED.items() if "best" not in name}  # those would see their sample


def seeds_of(evidence):
    return SEEDS if evidence.full else SEEDS[:1]


def test_sampled_estimates_are_unbiased(evidence):
    """A z-test with 20,000 episodes each; 6 coordinates, 6 estimators, 5 worlds. By chance the largest of 180 exceeds
    4.5 once in 800 such tests. The wrong estimators exceed it by far, each in most worlds."""
    seeds, count = seeds_of(evidence), 20_000
    right, wrong = [], {name: [] for name in BIASED}
    for seed in seeds:
        world = draw_episodes(enumerate_world(seed), count, 1000 + seed)
        right.append(max(z_scores(world, weights(original, world)).max().item() for weights in SAMPLED.values()))
        for name, weights in BIASED.items():
            wrong[name].append(z_scores(world, weights(original, world)).max().item())
    evidence(
        "foundations/policy_gradient",
        "Unbiased estimators: largest z-score against the exact gradient",
        value=max(right),
        bar=4.5,
        unit="",
        seeds=seeds,
        spread=right,
        note=f"{count} episodes a world, {len(SAMPLED)} estimators, 6 coordinates.",
    )
    medians = [sorted(scores)[len(seeds) // 2] for scores in wrong.values()]
    evidence(
        "foundations/policy_gradient",
        "Wrong estimators: z-score in the median world, smallest of the five",
        value=min(medians),
        bar=4.5,
        better=">",
        unit="",
        seeds=seeds,
        note="The same episodes. " + "; ".join(f"{name}: {z:.0f}" for name, z in zip(BIASED, medians, strict=True)),
    )


def test_bias_and_spread(evidence):
    """By enumeration: the bias of all estimators, and how far one episode's estimate lies from its mean."""
    seeds, horizon = seeds_of(evidence), 5 if evidence.full else 4
    found = {name: [] for name in UNBIASED | BIASED}
    for seed in seeds:
        world = enumerate_world(seed, horizon)
        for name, weights in (UNBIASED | BIASED).items():
            found[name].append(world.bias_and_spread(weights(original, world)))
    worst = [max(found[name][i][0] for name in UNBIASED) for i in range(len(seeds))]
    evidence(
        "foundations/policy_gradient",
        "Unbiased estimators: largest bias by enumeration",
        value=max(worst),
        bar=1e-10,
        unit="‖∇J‖",
        seeds=seeds,
        spread=worst,
        note=f"Eight estimators, all courses of {horizon} steps.",
    )
    spread = {}
    for name, pairs in found.items():
        biases, spreads = zip(*pairs, strict=True)
        spread[name] = spreads
        mean = sum(spreads) / len(seeds)
        if name in BIASED:
            evidence(
                "foundations/policy_gradient",
                f"Bias: {name}",
                value=sum(biases) / len(seeds),
                bar=0.02,
                better=">",
                unit="‖∇J‖",
                seeds=seeds,
                spread=biases,
            )
        else:
            evidence(
                "foundations/policy_gradient",
                f"Spread of one episode's estimate: {name}",
                value=mean,
                unit="‖∇J‖",
                seeds=seeds,
                spread=spreads,
            )
    assert spread["less V(s)"][0] > spread["reward-to-go"][0]  # and what it does not: V may be worse than no baseline
    for i in range(len(seeds)):  # what theory orders, but for the last line, which these worlds order
        assert spread["less the best constant"][i] <= spread["reward-to-go"][i]
        assert spread["less the best constant"][i] <= spread["less the mean return"][i]
        assert spread["less the best b(t, s)"][i] <= spread["less V(s)"][i] + 1e-12
        assert spread["true advantage"][i] <= spread["TD error, true V"][i] <= spread["less V(s)"][i]


def aliased_world(gamma):
    """One parameter for all states. Action 0 in the start pays 1 a step later; in that next step action 0 costs 0.75.
    So with probability p of action 0 the return is gamma * (p - 0.75 p): the best policy is p = 1, with any gamma."""
    transitions, rewards = torch.zeros(2, 4, 2, 4, dtype=torch.float64)
    transitions[0, 0, 1] = transitions[0, 1, 2] = 1.0
    transitions[1:, :, 3] = 1.0
    rewards[1, :, 3] = 1.0
    rewards[1:3, 0, 3] -= 0.75
    start = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    return mdps.MDP(transitions, rewards, start, torch.tensor([False, False, False, True]), gamma)


def climb(gamma, from_start):
    """Ascent along the exact expected update, from p = 1/2: p at the end."""
    mdp = aliased_world(gamma)
    courses, theta = mdps.all_episodes(mdp, 2), torch.zeros((), dtype=torch.float64, requires_grad=True)
    over = torch.tensor([[False], [True]]).expand(2, len(courses.rewards))
    weights = original.rewards_to_go(courses.rewards.T, over, gamma=gamma, from_start=from_start)  # (2, K)
    for _ in range(400):
        logps = torch.stack([torch.nn.functional.logsigmoid(theta), torch.nn.functional.logsigmoid(-theta)])
        logps = logps[courses.actions.T]  # (2, K)
        chance = (logps.sum(0) + courses.world_logps).exp().detach()
        (step,) = torch.autograd.grad((chance * weights * logps).sum(), theta)
        theta = (theta + 5 * step).detach().requires_grad_()
    return theta.sigmoid().item()


def test_without_gamma_t_the_worst_policy_can_be_the_goal(evidence):
    """Nota and Thomas 2019 prove that such examples exist; this one has two steps."""
    found = {"with": climb(0.5, True), "without": climb(0.5, False)}
    for name, p in found.items():
        evidence(
            "foundations/policy_gradient",
            f"Chance of the better action where ascent {name} γ^t ends",
            value=p,
            bar=0.95 if name == "with" else 0.05,
            better=">" if name == "with" else "<",
            seeds=[0],
            note="The exact expected update, γ = 0.5, from 1/2. The action is better discounted or not.",
        )
    assert climb(1.0, False) > 0.95


# CartPole.

WEIGHTS = {
    "whole return": lambda togo, mask: (togo[:1] * mask, togo),
    "reward-to-go": lambda togo, mask: (togo, togo),
    "less the others' mean": lambda togo, mask: (togo - original.others_mean(togo, mask), togo),
}


def curve_of(name, seed, updates):
    """Mean return of each update's episodes."""
    algorithm, returns = original.algorithm(), []

    def advantages(rollout, settings):
        returns.append((rollout.rewards * rollout.mask).sum(0).mean().item())
        over = rollout.terminated | rollout.truncated
        return WEIGHTS[name](original.rewards_to_go(rollout.rewards, over, gamma=settings.gamma), rollout.mask)

    settings = algorithm.settings(seed=seed, updates=updates)
    loop.train(CARTPOLE, replace(algorithm, advantages=advantages), settings, judge=False)
    return returns


def test_weights_on_cartpole(evidence):
    """The same network, step size and seeds; only the weights differ."""
    seeds, updates = seeds_of(evidence), 40 if evidence.full else 3
    last = {}
    for name in WEIGHTS:
        curves = [curve_of(name, seed, updates) for seed in seeds]
        last[name] = [sum(curve[-5:]) / 5 for curve in curves]
        evidence(
            "foundations/policy_gradient",
            f"CartPole, mean return of the last 5 of {updates} updates: {name}",
            value=sum(last[name]) / len(seeds),
            unit="steps",
            seeds=seeds,
            spread=last[name],
            curve={"x": list(range(1, updates + 1)), "y": curves},
        )
    if evidence.full:
        assert min(last["less the others' mean"]) > max(last["whole return"])


def test_it_solves_cartpole(evidence):
    solves_cartpole(evidence, "foundations/policy_gradient", "REINFORCE", original.algorithm(), seeds_of(evidence))
