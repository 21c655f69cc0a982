"""What reinforcement learning is, in four small experiments that have exact answers.

Returns and the discount; rewards for the taken action against labels; sparse, shaped and penalised
rewards (Ng, Harada and Russell 1999); a stochastic policy where states look alike (Sutton and Barto
2018, example 13.1). Here `rewards[t]` is what step t pays, which Sutton and Barto call R_(t+1).

A world has the fields of `snippets.worlds.mdps.MDP`: transitions and rewards (S, A, S), start (S,),
terminal (S,), gamma. A terminal state leads to itself and pays nothing.

    python -m snippets.foundations.what_is_rl
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class World(NamedTuple):
    """transitions and rewards (S, A, S), start (S,) probabilities, terminal (S,) bool, gamma."""

    transitions: Tensor
    rewards: Tensor
    start: Tensor
    terminal: Tensor
    gamma: float = 1.0


def discounted_returns(rewards: Tensor, gamma: float, terminated: Tensor | None = None) -> Tensor:
    """G_t = r_t + gamma * (1 - terminated_t) * G_(t+1), and 0 after the last column.

    rewards (..., T), terminated (..., T) bool: the episode ended with step t, and what stands behind
    belongs to the next one -> (..., T), in units of reward. ValueError on shapes that disagree, on
    gamma outside [0, 1]."""
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
    ended = torch.zeros_like(rewards, dtype=torch.bool) if terminated is None else terminated.bool()
    if rewards.dim() == 0 or ended.shape != rewards.shape:
        raise ValueError(f"rewards {tuple(rewards.shape)}, terminated {tuple(ended.shape)}")
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    returns, after = torch.zeros_like(rewards), torch.zeros(rewards.shape[:-1]).to(rewards)
    for t in reversed(range(rewards.shape[-1])):
        after = rewards[..., t] + gamma * torch.where(ended[..., t], 0.0, after)
        returns[..., t] = after
    return returns


def return_bound(gamma: float, steps: float = math.inf, max_reward: float = 1.0) -> float:
    """The largest |G| of `steps` rewards within [-max_reward, max_reward]. With steps = inf and
    max_reward = 1 it is 1 / (1 - gamma), the effective horizon in steps. ValueError on gamma
    outside [0, 1], and on gamma = 1 without an end."""
    if not 0 <= gamma <= 1 or (gamma == 1 and math.isinf(steps)):
        raise ValueError(f"no bound for gamma = {gamma} over {steps} steps")
    return max_reward * (steps if gamma == 1 else (1 - gamma**steps) / (1 - gamma))


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Supervised: -log pi(label | x), a mean. logits (B, A), labels (B,). Speaks of every class."""
    return -logits.log_softmax(-1).gather(-1, labels[:, None]).mean()


def reward_loss(logits: Tensor, actions: Tensor, rewards: Tensor) -> Tensor:
    """Bandit feedback: -r * log pi(action | x), a mean. Its gradient is an unbiased estimate of that
    of -E[r] (Williams 1992) if the actions are samples of softmax(logits). logits (B, A), actions
    and rewards (B,). ValueError on shapes that disagree."""
    if not actions.shape == rewards.shape == logits.shape[:1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (logits, actions, rewards))
        raise ValueError(f"want logits (B, A), actions (B,), rewards (B,), got {shapes}")
    return -(rewards * logits.log_softmax(-1).gather(-1, actions[:, None]).squeeze(-1)).mean()


def classify(feedback: str, *, seed: int, steps: int, classes: int = 10, lr: float = 1.0) -> Tensor:
    """A linear softmax on 16 features, 32 new examples a step -> (steps,) chance of the right class
    on 2,000 others, before each step. feedback: "label", or "reward", 1 if the guess is right."""
    if feedback not in ("label", "reward"):
        raise ValueError(f'feedback must be "label" or "reward", got {feedback!r}')
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(16, classes, generator=generator)
    held_out = torch.randn(2000, 16, generator=generator)
    weights, curve = torch.zeros(16, classes, requires_grad=True), []
    for _ in range(steps):
        with torch.no_grad():
            right = (held_out @ weights).softmax(-1).gather(-1, (held_out @ truth).argmax(-1, True))
            curve.append(right.mean())
        x = torch.randn(32, 16, generator=generator)  # (B, F)
        logits, labels = x @ weights, (x @ truth).argmax(-1)
        if feedback == "label":
            loss = label_loss(logits, labels)
        else:  # the agent acts, and hears of its own action only
            actions = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            loss = reward_loss(logits, actions, (actions == labels).float())
        weights.data -= lr * torch.autograd.grad(loss, weights)[0]
    return torch.stack(curve)


def corridor(length: int, *, gamma: float = 0.9, move_cost: float = 0.0) -> World:
    """Action 1 goes a step ahead and costs `move_cost`; action 0 goes back to the start, for free.
    The goal, state `length`, pays 1 and ends. A fair coin needs 2^(length + 1) - 2 steps to it.
    ValueError on length < 1."""
    if length < 1:
        raise ValueError(f"length must be positive, got {length}")
    transitions = torch.zeros(length + 1, 2, length + 1, dtype=torch.float64)
    rewards, states = torch.zeros_like(transitions), torch.arange(length)
    transitions[states, 0, 0] = transitions[states, 1, states + 1] = 1.0
    transitions[length, :, length] = 1.0
    rewards[states, 1, states + 1] = -move_cost
    rewards[length - 1, 1, length] += 1.0
    start = torch.eye(length + 1, dtype=torch.float64)[0]
    return World(transitions, rewards, start, start.flip(0) > 0, gamma)


def shaping_rewards(potential: Tensor, terminal: Tensor, gamma: float) -> Tensor:
    """F(s, s') = gamma * Phi(s') - Phi(s) (Ng et al. 1999), with Phi = 0 where the episode ends.

    potential and terminal (S,) -> (S, 1, S), to be added to rewards (S, A, S). Its discounted
    sum from s to the end is -Phi(s), whatever the policy. ValueError on shapes that disagree."""
    if potential.dim() != 1 or potential.shape != terminal.shape:
        raise ValueError(f"potential {tuple(potential.shape)}, want {tuple(terminal.shape)}")
    potential = torch.where(terminal, 0.0, potential)
    return (gamma * potential[None, :] - potential[:, None]).unsqueeze(1)


def optimal_q_values(world: World, sweeps: int = 10_000, tolerance: float = 1e-12) -> Tensor:
    """Value iteration: Q(s, a) = sum_s' P(s' | s, a) * (r + gamma * max_b Q(s', b)) -> (S, A).
    ValueError if `sweeps` do not bring the change below `tolerance`."""
    q_values = torch.zeros(world.rewards.shape[:2], dtype=world.rewards.dtype)
    for _ in range(sweeps):
        after = torch.where(world.terminal, 0.0, q_values.amax(-1))  # (S,): no value after the end
        new = (world.transitions * (world.rewards + world.gamma * after)).sum(-1)
        if (new - q_values).abs().max() < tolerance:
            return new
        q_values = new
    raise ValueError(f"no convergence within {sweeps} sweeps, gamma = {world.gamma}")


def policy_values(world: World, policy: Tensor) -> Tensor:
    """V of a policy pi(a | s) (S, A): solves V = r_pi + gamma * P_pi V -> (S,). ValueError on a wrong
    shape, and where no V exists: gamma = 1 and an episode that need not end."""
    if policy.shape != world.rewards.shape[:2]:
        raise ValueError(f"policy {tuple(policy.shape)}, want {tuple(world.rewards.shape[:2])}")
    steps = (policy.unsqueeze(-1) * world.transitions).sum(1)  # (S, S)
    steps, ends = torch.where(world.terminal[:, None], 0.0, steps), world.terminal
    for _ in ends:  # the states that can reach an end; a singular matrix may pass for a regular one
        ends = ends | (steps[:, ends] > 0).any(-1)
    if world.gamma == 1 and not ends.all():
        raise ValueError("the policy has no finite value: it need not reach an end, and gamma is 1")
    paid = (policy.unsqueeze(-1) * world.transitions * world.rewards).sum((1, 2))  # (S,)
    return torch.linalg.solve(torch.eye(len(paid)).to(paid) - world.gamma * steps, paid)


def q_learning(
    world: World, *, runs: int, steps: int, generator: torch.Generator, q_values: Tensor | float = 0.0,
    alpha: float = 0.5, epsilon: float = 0.1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`runs` agents, each with its own copy of the world: look, act, get paid, learn.

    Acts epsilon-greedily, ties at random. q_values: where Q starts. -> the step of the first episode
    that ended (N,), inf if none did, and Q (N, S, A)."""
    count, actions, _ = world.transitions.shape
    q_values = torch.zeros(runs, count, actions, dtype=world.rewards.dtype) + q_values
    row, first = torch.arange(runs), torch.full((runs,), math.inf)
    s = torch.multinomial(world.start.expand(runs, -1), 1, generator=generator)[:, 0]  # (N,)
    for t in range(1, steps + 1):
        here = q_values[row, s]  # (N, A)
        best = (here == here.amax(-1, keepdim=True)).to(here.dtype)
        policy = (1 - epsilon) * best / best.sum(-1, keepdim=True) + epsilon / actions
        a = torch.multinomial(policy, 1, generator=generator)[:, 0]  # the agent acts ...
        after = torch.multinomial(world.transitions[s, a], 1, generator=generator)[:, 0]
        ended = world.terminal[after]  # ... the world answers ...
        target = world.rewards[s, a, after]
        target = target + world.gamma * torch.where(ended, 0.0, q_values[row, after].amax(-1))
        q_values[row, s, a] += alpha * (target - q_values[row, s, a])  # ... and the agent learns
        first = torch.where(ended & first.isinf(), float(t), first)
        again = torch.multinomial(world.start.expand(runs, -1), 1, generator=generator)[:, 0]
        s = torch.where(ended, again, after)
    return first, q_values


def main() -> None:
    """The demo, a few seconds: the time to the first success, and labels against rewards."""
    torch.set_num_threads(1)
    print("corridor of 8, median step of the first success of 100 agents:")
    world, progress = corridor(8), torch.arange(9, dtype=torch.float64) / 8
    shaped = world.rewards + shaping_rewards(progress, world.terminal, world.gamma)
    for name, rewards, steps in (("sparse", world.rewards, 3000), ("shaped", shaped, 500)):
        generator = torch.Generator().manual_seed(0)
        first, _ = q_learning(
            world._replace(rewards=rewards), runs=100, steps=steps, generator=generator
        )
        print(f"  {name:8s}{first.median().item():6.0f}")
    print("10 classes, chance of the right one after 100 batches of 32:")
    for feedback in ("label", "reward"):
        print(f"  {feedback:8s}{classify(feedback, seed=0, steps=101)[-1].item():6.2f}")


if __name__ == "__main__":
    main()
