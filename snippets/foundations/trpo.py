"""Trust Region Policy Optimization: a natural gradient step as long as a bound on the KL allows.
Schulman et al. 2015 (arXiv:1502.05477); the natural policy gradient: Kakade 2001.

    python -m snippets.foundations.trpo
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters


def _same(**tensors: Tensor) -> None:
    """ValueError, with all shapes, unless they are the same."""
    if len({tuple(x.shape) for x in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"shapes disagree: {shapes}")


def surrogate(logps: Tensor, old_logps: Tensor, advantages: Tensor) -> Tensor:
    """E[pi(a|s) / pi_old(a|s) * A(s, a)] over steps that pi_old took: what TRPO maximises.

    logps (B,) with gradient, old_logps and advantages (B,), constants -> scalar, in units of reward.
    At pi = pi_old its gradient is the policy gradient. ValueError on shapes that disagree."""
    _same(logps=logps, old_logps=old_logps, advantages=advantages)
    return ((logps - old_logps.detach()).exp() * advantages.detach()).mean()


def guaranteed_gain(gain: Tensor, max_kl: Tensor, max_advantage: Tensor, *, gamma: float) -> Tensor:
    """What the return rises by at least: gain - 4 * eps * gamma / (1 - gamma)^2 * max_kl.

    gain: E_(s ~ d_old, a ~ pi)[A_old] / (1 - gamma), d_old the discounted visits, of sum 1; max_kl:
    the largest KL(pi_old || pi) of a state; max_advantage: eps, the largest |A_old|. All scalars.
    ValueError unless 0 <= gamma < 1. Schulman et al. 2015, theorem 1 and equation 9."""
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma must lie in [0, 1), got {gamma}")
    return gain - 4 * max_advantage * gamma / (1 - gamma) ** 2 * max_kl


def categorical_kl(old_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(pi_old || pi) of each state, in nats: logits (B, A) -> (B,), gradient into the new ones.
    ValueError on shapes that disagree."""
    _same(old_logits=old_logits, logits=logits)
    old, new = old_logits.detach().log_softmax(-1), logits.log_softmax(-1)
    return (old.exp() * (old - new)).sum(-1)


def gaussian_kl(old_mean: Tensor, old_log_std: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """KL(pi_old || pi) of independent normal actions, in nats: all (B, A) -> (B,), gradient into
    mean and log_std alone. ValueError on shapes that disagree."""
    _same(old_mean=old_mean, old_log_std=old_log_std, mean=mean, log_std=log_std)
    old_mean, old_log_std = old_mean.detach(), old_log_std.detach()
    square = (2 * old_log_std).exp() + (old_mean - mean) ** 2
    return (log_std - old_log_std + 0.5 * square * (-2 * log_std).exp() - 0.5).sum(-1)


def fisher_product(
    kl: Tensor, parameters: Sequence[Tensor], *, damping: float = 0.0
) -> Callable[[Tensor], Tensor]:
    """v -> (F + damping * I) v for the Fisher matrix F, which is never built.

    kl is the mean KL(pi_old || pi), a scalar with its graph, taken where pi is pi_old: there its
    gradient is 0 and its Hessian F = E[score score^T]. v (P,), as many as parameters -> (P,).
    ValueError on a kl that is no scalar and on a negative damping."""
    if kl.dim() or damping < 0:
        raise ValueError(f"kl must be a scalar, got {tuple(kl.shape)}; damping >= 0, got {damping}")
    first = parameters_to_vector(torch.autograd.grad(kl, parameters, create_graph=True))

    def product(v: Tensor) -> Tensor:
        second = torch.autograd.grad(first @ v, parameters, retain_graph=True)
        return torch.cat([x.reshape(-1) for x in second]) + damping * v

    return product


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], b: Tensor, *, steps: int = 10, tolerance: float = 1e-10
) -> Tensor:
    """x with A x = b, for a symmetric positive definite A that is known by its products alone.

    b (P,) -> x (P,), exact after P steps but for rounding. Stops where the squared residual is at
    most `tolerance` times that of x = 0. ValueError on steps < 1."""
    if steps < 1:
        raise ValueError(f"steps must be positive, got {steps}")
    x, residual = torch.zeros_like(b), b.clone()
    search, size = residual.clone(), b @ b
    enough = tolerance * size
    for _ in range(steps):
        if size <= enough:
            break
        image = product(search)
        rate = size / (search @ image)
        x, residual = x + rate * search, residual - rate * image
        before, size = size, residual @ residual
        search = residual + size / before * search
    return x


def trust_region_step(
    parameters: Sequence[Tensor],
    measure: Callable[[], tuple[Tensor, Tensor]],
    *,
    max_kl: float = 0.01,
    damping: float = 0.1,
    cg_steps: int = 10,
    backtracks: int = 10,
    shrink: float = 0.8,
) -> float:
    """Moves the parameters in place; returns the fraction of the full step that was taken, or 0.

    measure() gives surrogate and mean KL(pi_old || pi), with gradient. The full step is x = F^-1 g times
    sqrt(2 * max_kl / x^T F x). It is shortened until KL <= max_kl and the surrogate has risen, or else
    not taken. ValueError unless max_kl > 0 and 0 < shrink < 1. Schulman et al. 2015, appendix C."""
    if not max_kl > 0 or not 0 < shrink < 1:
        raise ValueError(f"max_kl > 0 and 0 < shrink < 1, got {max_kl} and {shrink}")
    before, kl = measure()
    gradient = torch.autograd.grad(before, parameters, retain_graph=True)
    gradient = torch.cat([x.reshape(-1) for x in gradient])
    product = fisher_product(kl, parameters, damping=damping)
    direction = conjugate_gradient(product, gradient, steps=cg_steps)
    curvature = direction @ product(direction)
    old = parameters_to_vector(parameters).detach().clone()
    if curvature > 0:
        full = (2 * max_kl / curvature).sqrt() * direction
        with torch.no_grad():
            for k in range(backtracks):
                vector_to_parameters(old + shrink**k * full, parameters)
                after, kl = measure()
                if after > before and kl <= max_kl:  # false where either is NaN
                    return shrink**k
    vector_to_parameters(old, parameters)
    return 0.0


@functools.cache
def algorithm():
    """TRPO in the shared loop: one step of the policy, then the critic by gradient descent."""
    from snippets.foundations.gae import gae
    from snippets.foundations.loop import Algorithm, Settings, descend
    from snippets.foundations.ppo import normalise

    @dataclass
    class TRPOSettings(Settings):
        """TRPO: `lr`, `epochs` and `minibatch` are the critic's."""

        horizon: int = 32
        lr: float = 8e-3
        lam: float = 0.9
        max_kl: float = 0.05
        damping: float = 0.1
        cg_steps: int = 6
        epochs: int = 4
        minibatch: int = 512
        max_norm: float = 1e9

    def advantages(rollout, settings):
        parts = (rollout.rewards, rollout.values, rollout.next_values)
        ends = (rollout.terminated, rollout.truncated)
        return gae(*parts, *ends, gamma=settings.gamma, lam=settings.lam)

    def critic_loss(agent, batch, settings):
        return nn.functional.mse_loss(agent.values(batch.obs), batch.returns)

    def update(agent, optimizer, batch, settings, generator):
        weights = normalise(batch.advantages)
        parameters = [p for p in (*agent.policy.parameters(), agent.log_std) if p is not None]
        with torch.no_grad():
            old = agent.policy(batch.obs)
            old_std = None if agent.log_std is None else agent.log_std.expand_as(old).clone()

        def measure():
            logps, _ = agent.logps(batch.obs, batch.actions)
            out = agent.policy(batch.obs)
            if old_std is None:
                kl = categorical_kl(old, out)
            else:
                kl = gaussian_kl(old, old_std, out, agent.log_std.expand_as(out))
            return surrogate(logps, batch.logps, weights), kl.mean()

        trust = {"max_kl": settings.max_kl, "damping": settings.damping}
        trust_region_step(parameters, measure, cg_steps=settings.cg_steps, **trust)
        fit(agent, optimizer, batch, settings, generator)

    fit = descend(critic_loss)
    return Algorithm(TRPOSettings, advantages, update)


def main() -> None:
    """The demo: CartPole."""
    from snippets.foundations.loop import run_demo
    from snippets.worlds.classic import CARTPOLE

    run_demo(algorithm(), algorithm().settings, CARTPOLE)


if __name__ == "__main__":
    main()
