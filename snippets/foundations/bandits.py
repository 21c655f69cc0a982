"""Bandits: arms that pay 0 or 1 with unknown chances, and three ways to choose among them.

epsilon-greedy with a constant or a decaying epsilon and UCB1 (Auer, Cesa-Bianchi and Fischer 2002),
Thompson sampling with Beta posteriors (Thompson 1933), and the bounds on their regret: the lower
one of Lai and Robbins (1985), the upper one of UCB1, the exact slope of a constant epsilon.

All runs go in step: `counts` and `wins` (N, K) say how often each run pulled an arm, and how often
it was paid; a rule maps them, and the number t = 1, 2, ... of the pull, to actions (N,).

    python -m snippets.foundations.bandits
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def random_argmax(scores: Tensor, generator: torch.Generator) -> Tensor:
    """The best arm, ties at random: scores (N, K) -> (N,). argmax would favour the first arm."""
    best = scores == scores.amax(-1, keepdim=True)
    return torch.multinomial(best.float(), 1, generator=generator).squeeze(-1)


def _check(counts: Tensor, wins: Tensor) -> None:
    """ValueError unless counts and wins are (N, K) and 0 <= wins <= counts."""
    if counts.dim() != 2 or counts.shape != wins.shape:
        raise ValueError(f"counts {tuple(counts.shape)} and wins {tuple(wins.shape)}: want (N, K)")
    if (wins < 0).any() or (wins > counts).any():
        raise ValueError("wins must lie between 0 and counts")


def means_of(counts: Tensor, wins: Tensor) -> Tensor:
    """The mean reward of each arm; +inf for an arm that was never pulled, so that it comes first."""
    _check(counts, wins)
    return torch.where(counts > 0, wins / counts, math.inf)


def epsilon_greedy(
    counts: Tensor,
    wins: Tensor,
    t: int,
    generator: torch.Generator,
    *,
    epsilon: float | Callable[[int], float] = 0.1,
) -> Tensor:
    """With chance epsilon an arm drawn from all K, the best included; else the best mean.

    epsilon: a number, or a function of t such as `decaying`. -> actions (N,). ValueError on an
    epsilon outside [0, 1]."""
    rate = epsilon(t) if callable(epsilon) else epsilon
    if not 0 <= rate <= 1:
        raise ValueError(f"epsilon must lie in [0, 1], got {rate}")
    greedy = random_argmax(means_of(counts, wins), generator)
    any_arm = torch.randint(counts.shape[1], greedy.shape, generator=generator)
    return torch.where(torch.rand(greedy.shape, generator=generator) < rate, any_arm, greedy)


def decaying(arms: int, gap: float, c: float = 5.0) -> Callable[[int], float]:
    """epsilon_t = min(1, c K / (d^2 t)), d at most the smallest gap, which one must know (Auer et
    al. 2002): exploration falls as 1 / t, so the regret grows as ln t. Too small a c: it need not."""
    return lambda t: min(1.0, c * arms / (gap**2 * t))


def ucb1(
    counts: Tensor, wins: Tensor, t: int, generator: torch.Generator, *, scale: float = 2.0
) -> Tensor:
    """The largest mean + sqrt(scale * ln(t - 1) / n), n the arm's count; UCB1 has scale 2, and t - 1
    pulls were made before pull t. Arms never pulled come first. -> actions (N,)."""
    bonus = (scale * math.log(max(t - 1, 1)) / counts.clamp(min=1)).sqrt()
    return random_argmax(means_of(counts, wins) + bonus, generator)


def thompson(counts: Tensor, wins: Tensor, t: int, generator: torch.Generator) -> Tensor:
    """One draw of each arm's chance from its posterior Beta(1 + wins, 1 + losses), a uniform prior;
    the arm whose draw is the largest. -> actions (N,): each arm with the posterior probability that
    it is the best one."""
    _check(counts, wins)
    shapes = torch.stack([1 + wins, 1 + counts - wins]).double()  # (2, N, K)
    first, second = torch._standard_gamma(shapes, generator=generator)  # Beta = G / (G + G')
    return random_argmax(first / (first + second), generator)


def play(
    rule: Callable, chances: Tensor, *, steps: int, runs: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`runs` independent runs of a rule on arms that pay 1 with the given chances (K,).

    -> regret (N, T): the sum over pulls of max(chances) - the chance of the arm pulled, so without
    the noise of the rewards; and counts (N, K). ValueError on chances outside [0, 1]."""
    if chances.dim() != 1 or not ((chances >= 0) & (chances <= 1)).all():
        raise ValueError(f"chances must be (K,) within [0, 1], got {chances.tolist()}")
    counts, wins = torch.zeros(2, runs, len(chances))
    gaps, row = chances.max() - chances, torch.arange(runs)
    regret = torch.zeros(runs, steps, dtype=torch.float64)
    for t in range(1, steps + 1):
        a = rule(counts, wins, t, generator)  # (N,)
        paid = torch.rand(runs, generator=generator) < chances[a]
        counts[row, a] += 1
        wins[row, a] += paid
        regret[:, t - 1] = gaps[a]
    return regret.cumsum(-1), counts


def bernoulli_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(Bernoulli(p) || Bernoulli(q)) in nats, p in [0, 1], q in (0, 1)."""
    return torch.xlogy(p, p / q) + torch.xlogy(1 - p, (1 - p) / (1 - q))


def lai_robbins(chances: Tensor) -> float:
    """C = sum of gap / KL(arm || best arm): the regret of every rule that does well on all bandits
    is at least C ln T as T grows (Lai and Robbins 1985). ValueError on chances outside
    [0, 1): beside an arm that always pays, one failure gives the others away."""
    best = chances.max()
    if not ((chances >= 0) & (chances < 1)).all():
        raise ValueError(f"want chances in [0, 1), got {chances.tolist()}")
    worse = chances[chances < best]
    return ((best - worse) / bernoulli_kl(worse, best)).sum().item()


def ucb1_bound(chances: Tensor, t: float) -> float:
    """Auer et al. (2002), theorem 1: regret <= sum of 8 ln(t) / gap + (1 + pi^2 / 3) * sum of gaps,
    after every number t of pulls, for rewards within [0, 1]."""
    gaps = chances.max() - chances
    gaps = gaps[gaps > 0]
    return (8 * math.log(t) / gaps).sum().item() + (1 + math.pi**2 / 3) * gaps.sum().item()


def epsilon_slope(chances: Tensor, epsilon: float) -> float:
    """What constant exploration costs a pull for ever: epsilon times the mean gap, over all K arms."""
    return epsilon * (chances.max() - chances).mean().item()


RULES = {
    "epsilon 0.1": epsilon_greedy,
    "greedy": lambda *state: epsilon_greedy(*state, epsilon=0.0),
    "UCB1": ucb1,
    "Thompson": thompson,
}


def main() -> None:
    """The demo, a few seconds: the mean regret of 200 runs of 1,000 pulls."""
    torch.set_num_threads(1)
    chances = torch.tensor([0.8, 0.6, 0.5, 0.4, 0.2], dtype=torch.float64)
    print(f"arms {chances.tolist()}; Lai and Robbins: {lai_robbins(chances):.1f} ln T")
    for name, rule in RULES.items():
        options = {"steps": 1000, "runs": 200, "generator": torch.Generator().manual_seed(0)}
        regret, counts = play(rule, chances, **options)
        best = counts[:, 0].mean() / 1000
        print(
            f"  {name:12s} regret {regret[:, -1].mean():6.1f}, best arm in {best:.0%} of the pulls"
        )


if __name__ == "__main__":
    main()
