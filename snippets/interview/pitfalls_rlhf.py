"""Mistakes seen in PPO and GRPO on language models: each `*_wrong` function is WRONG on purpose, and
the right one follows it. `measure_*` runs both and returns what each gives.

k1, k2, k3: Schulman, Approximating KL Divergence (2020), with samples from pi. Tokens stand in (B, T).
Rollouts (padding, EOS, temperature, dropout) and preferences have their own files.

    python -m snippets.interview.pitfalls_rlhf
"""

import math

import torch
from torch import Tensor


def k3_wrong(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """WRONG: the ratio is pi / ref. Under pi its mean is chi2(pi || ref) - KL(pi || ref)."""
    return torch.expm1(logps - ref_logps) - (logps - ref_logps)


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """The ratio is ref / pi. Under pi its mean is KL(pi || ref); any shape, in nats."""
    return torch.expm1(ref_logps - logps) - (ref_logps - logps)


def kl_reward_wrong(scores: Tensor, logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """WRONG: k1 with its sign flipped pays the policy for leaving the reference. -> (B,)"""
    return scores - beta * (ref_logps - logps).sum(-1)


def kl_reward(scores: Tensor, logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """scores (B,) less beta * log(pi / ref) of the response: the mean is E[r] - beta * KL(pi || ref)."""
    return scores - beta * (logps - ref_logps).sum(-1)


def kl_loss_wrong(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """WRONG as a loss: k1's gradient is grad log pi, whose mean under pi is 0, whatever ref is."""
    return logps - ref_logps


def kl_loss(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """k2: on samples from pi its gradient is log(pi / ref) * grad log pi, in the mean grad KL(pi || ref)."""
    return 0.5 * (logps - ref_logps) ** 2


def dr_grpo_wrong(per_token: Tensor, mask: Tensor) -> Tensor:
    """WRONG as Dr. GRPO: the mean over each response's own tokens keeps the factor 1 / |o|."""
    return ((per_token * mask).sum(-1) / mask.sum(-1)).mean()


def dr_grpo(per_token: Tensor, mask: Tensor, max_len: int) -> Tensor:
    """A constant divisor (Liu et al. 2025, listing 1): a token weighs the same in every response."""
    return (per_token * mask).sum() / (len(mask) * max_len)


def no_ratio_wrong(logps: Tensor, old_logps: Tensor, advantages: Tensor) -> Tensor:
    """WRONG as GRPO: right for one step on fresh samples, and unbounded in every further epoch."""
    return -(advantages.unsqueeze(-1) * logps).mean()


def clipped_ratio(logps: Tensor, old_logps: Tensor, advantages: Tensor) -> Tensor:
    """PPO's surrogate, advantages (B,): what has moved by 20 % gets no further push (no padding here)."""
    ratio, advantages = (logps - old_logps).exp(), advantages.unsqueeze(-1)  # (B, T), (B, 1)
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


def scale_wrong(rewards: Tensor) -> Tensor:
    """WRONG: a group of equal rewards (P, G) has the std 0, and 0 / 0 is NaN."""
    return (rewards - rewards.mean(-1, keepdim=True)) / rewards.std(-1, keepdim=True)


def scale(rewards: Tensor, unbiased: bool = True) -> Tensor:
    """Equal rewards give 0. The unbiased std (G - 1) is TRL's; say which one you use."""
    centred = rewards - rewards.mean(-1, keepdim=True)
    return centred / (rewards.std(-1, correction=int(unbiased), keepdim=True) + 1e-4)


def k3_float_wrong(log_r: Tensor) -> Tensor:
    """WRONG in float32: cancels near 0, overflows at 89. log_r = log(ref / pi)."""
    return torch.exp(log_r) - log_r - 1


def k3_float(log_r: Tensor) -> Tensor:
    """expm1 keeps the small values; above 20 the exponential goes on along its tangent."""
    beyond = math.exp(20) * (log_r - 20).clamp(min=0)
    return torch.expm1(log_r.clamp(max=20)) + beyond - log_r


def value_clip_wrong(values: Tensor, old_values: Tensor, returns: Tensor) -> Tensor:
    """WRONG: 0.2 is in units of reward, and does another thing to rewards of another scale."""
    clipped = old_values + (values - old_values).clamp(-0.2, 0.2)
    return torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def value_clip(values: Tensor, old_values: Tensor, returns: Tensor) -> Tensor:
    """The range in units of the returns' own std, (N,) -> (N,). No clip at all is a choice, too."""
    clip = 0.2 * returns.std()
    clipped = old_values + torch.minimum(torch.maximum(values - old_values, -clip), clip)
    return torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def clipped_values_wrong(values: Tensor, old_values: Tensor, clip: float) -> Tensor:
    """WRONG: the old values are asked of the network that learns, and nothing is ever clipped."""
    old_values = values.detach()
    return old_values + (values - old_values).clamp(-clip, clip)


def clipped_values(values: Tensor, old_values: Tensor, clip: float) -> Tensor:
    """old_values (N,) were kept when the responses were sampled, as PPO's old_logps are."""
    return old_values + (values - old_values).clamp(-clip, clip)


def measure_exact(seed: int = 0) -> dict[str, tuple[float, float, str]]:
    """{what: (wrong, right, unit)} in the exact world: expectations by enumeration, and short runs."""
    from snippets.worlds import exact

    world = exact.make_world()
    best = exact.optimal_policy(world.ref_logps, world.rewards, world.beta)  # (X, Y)
    means = [(best.exp() * k(best, world.ref_logps)).sum(-1).mean().item() for k in (k3_wrong, k3)]
    table = exact.logits_of(world, best).requires_grad_(True)
    logps = exact.response_logps(world, table)
    (truth,) = torch.autograd.grad(exact.kl(logps, world.ref_logps).mean(), table, retain_graph=True)
    shares = []
    for loss in (kl_loss_wrong, kl_loss):
        mean = (best.exp() * loss(logps, world.ref_logps)).sum(-1).mean()
        (gradient,) = torch.autograd.grad(mean, table, retain_graph=True)
        shares.append(round(((gradient * truth).sum() / (truth**2).sum()).item(), 9))

    def run(reward, surrogate, **options) -> float:
        def loss(logps: Tensor, s) -> Tensor:
            scores = reward(s.rewards.flatten(), s.old_logps, s.ref_logps, world.beta).view_as(s.rewards)
            return surrogate(logps, s.old_logps, (scores - scores.mean(-1, keepdim=True)).flatten())

        return exact.distance(world, exact.optimise(world, loss, seed=seed, **options)[0])

    signs = [run(r, clipped_ratio, steps=400) for r in (kl_reward_wrong, kl_reward)]
    ratios = [run(kl_reward, s, steps=20, epochs=50) for s in (no_ratio_wrong, clipped_ratio)]
    return {
        "mean of k3": (*means, "nats"),
        "distance to the optimum, k1 in the reward": (*signs, "nats"),
        "share of the KL's gradient": (*shares, ""),
        "distance to the optimum, 50 epochs a batch": (*ratios, "nats"),
    }


def measure_tensors(seed: int = 0) -> dict[str, tuple[float, float, str]]:
    """{what: (wrong, right, unit)} on made-up tensors."""
    generator = torch.Generator().manual_seed(seed)
    per_token = torch.zeros(2, 100, requires_grad=True)
    mask = (torch.arange(100) < torch.tensor([[10], [100]])).float()
    weights = []
    for loss in (dr_grpo_wrong(per_token, mask), dr_grpo(per_token, mask, 100)):
        (gradient,) = torch.autograd.grad(loss, per_token)
        weights.append((gradient[0, 0] / gradient[1, 0]).item())
    solved = (torch.rand(256, 8, generator=generator) < 0.9).float()
    nans = [f(solved).isnan().float().mean().item() for f in (scale_wrong, scale)]
    wins = [scale(torch.tensor([[0.0, 1.0]]), u)[0, 1].item() for u in (False, True)]
    small = [abs(f(torch.tensor(1e-4)).item() / 5.00016667e-9 - 1) for f in (k3_float_wrong, k3_float)]
    large = [f(torch.linspace(0, 200, 201)).isfinite().float().mean().item() for f in (k3_float_wrong, k3_float)]
    moved = torch.linspace(-1, 1, 201)
    after = [f(moved, 0 * moved, 0.2).abs() for f in (clipped_values_wrong, clipped_values)]
    kept = [(x <= 0.2 + 1e-6).float().mean().item() for x in after]
    returns = 100 * torch.randn(4096, generator=generator)
    frozen = []
    for loss in (value_clip_wrong, value_clip):
        values = (0.1 * returns).requires_grad_(True)  # a tenth of the way from 0 to the returns
        (gradient,) = torch.autograd.grad(loss(values, torch.zeros(4096), returns).sum(), values)
        frozen.append((gradient == 0).float().mean().item())
    return {
        "weight of a token, 10 against 100 tokens": (*weights, ""),
        "share of NaN advantages": (*nans, ""),
        "advantage of a win of two, population against unbiased std": (*wins, ""),
        "relative error of k3 at 1e-4": (*small, ""),
        "share of finite k3, log-ratios 0 to 200": (*large, ""),
        "share of values kept within the clip, moved by up to 1": (*kept, ""),
        "share of values without gradient, rewards of scale 100": (*frozen, ""),
    }


def main() -> None:
    """The table of all of it."""
    torch.set_num_threads(1)
    print(f"{'':56}{'wrong':>12}{'right':>12}")
    for measure in (measure_exact, measure_tensors):
        for what, (wrong, right, unit) in measure().items():
            print(f"{what:56}{wrong:12.4g}{right:12.4g} {unit}")


if __name__ == "__main__":
    main()
