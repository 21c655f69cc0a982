"""Reward-model over-optimisation, exactly: what happens to the true reward as a policy is bent
towards a fitted one.

Gao et al. 2022 (arXiv:2210.10760) measured it with language models; here the responses to a prompt
can be listed, so the policy that a proxy reward leads to is known without training it: the optimum
of E[proxy] - beta * KL, and best-of-n. Tables are (X, Y): X prompts, Y responses.

    python -m snippets.rlhf.overoptimisation
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot


def tilt(ref_logps: Tensor, scores: Tensor, beta: float) -> Tensor:
    """log pi (X, Y), pi proportional to ref * exp(scores / beta): the optimum of E[scores] - beta *
    KL(pi || ref). No policy has a higher mean score at the same KL. ValueError unless beta > 0."""
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}: at 0 the favourite takes all")
    return (ref_logps + scores / beta).log_softmax(-1)


def best_of_n(ref_logps: Tensor, scores: Tensor, n: int) -> Tensor:
    """log pi (X, Y) of the best by score of n draws from ref; among equal scores, any of them.

    With F(s) the chance that a draw scores at most s, the best scores s with chance F(s)**n -
    F(s-)**n, shared by the responses of that score as ref has them. ValueError unless n >= 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    rows = []
    for logps, row in zip(ref_logps, scores, strict=True):
        _, level = row.unique(sorted=True, return_inverse=True)  # (Y,), 0 for the lowest score
        mass = torch.zeros(int(level.max()) + 1, dtype=logps.dtype).index_add(0, level, logps.exp())
        above = mass.flip(0).cumsum(0).flip(0) - mass  # the chance of a higher score
        # F**n as exp(n * log1p(-above)): near 1 the digits are those of 1 - F.
        high = (n * torch.log1p(-above.clamp(max=1))).exp()
        low = (n * torch.log1p(-(above + mass).clamp(max=1))).exp()
        rows.append(logps + ((high - low) / mass).clamp(min=1e-300).log()[level])
    return torch.stack(rows).log_softmax(-1)


def frontier(ref_logps: Tensor, policies: Sequence[Tensor], proxy: Tensor, true: Tensor) -> Tensor:
    """(len(policies), 3), float64: KL(pi || ref) in nats, mean proxy score and mean true reward,
    both less what the reference has; means over prompts."""
    points = []
    for logps in policies:
        p, ref = logps.double().exp(), ref_logps.double().exp()
        nats = torch.where(p > 0, p * (logps.double() - ref_logps.double()), 0.0).sum(-1).mean()
        points.append([nats, *(((p - ref) * table).sum(-1).mean() for table in (proxy, true))])
    return torch.tensor(points, dtype=torch.float64)


def token_features(tokens: Tensor, vocab: int) -> Tensor:
    """tokens (Y, T) -> (Y, F) of 0 and 1: which token stands where, and which stand side by side.
    What a response is as a whole, these features do not see: the proxy is of a smaller class."""
    pairs = tokens[:, :-1] * vocab + tokens[:, 1:]  # (Y, T - 1)
    parts = [one_hot(tokens, vocab), one_hot(pairs, vocab**2)]
    return torch.cat([part.flatten(1) for part in parts], dim=1).double()


def fit_proxy(
    features: Tensor, rows: Tensor, chosen: Tensor, rejected: Tensor, *, ridge: float = 0.1
) -> Tensor:
    """A linear reward a prompt by Bradley-Terry -> scores (X, Y), X = rows.max() + 1.

    features (Y, F); rows, chosen, rejected (N,): the prompt of each pair and its two responses.
    Minimises sum -log sigmoid(r_w - r_l) + ridge / 2 * |weights|**2 by L-BFGS; without a ridge,
    pairs that can be separated send the weights to infinity. ValueError if ridge is not positive.
    """
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, got {ridge}")
    shape = int(rows.max()) + 1, features.shape[1]
    weights = torch.zeros(shape, dtype=features.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        scores = weights @ features.T  # (X, Y)
        margins = scores[rows, chosen] - scores[rows, rejected]  # (N,)
        loss = -logsigmoid(margins).sum() + ridge / 2 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach() @ features.T


def pair_accuracy(logps: Tensor, scores: Tensor, true: Tensor) -> float:
    """The chance that scores (X, Y) name the truly better of two different responses drawn from pi,
    logps (X, Y): exact, a mean over prompts."""
    p = logps.exp()
    weight = p.unsqueeze(2) * p.unsqueeze(1) * (1 - torch.eye(p.shape[1], dtype=p.dtype))
    side = (scores.unsqueeze(2) - scores.unsqueeze(1)).sign()
    right = 0.5 + 0.5 * side * (true.unsqueeze(2) - true.unsqueeze(1)).sign()
    return ((weight * right).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1e-300)).mean().item()


def worst_case(ensemble: Tensor, ref_logps: Tensor) -> Tensor:
    """(E, X, Y) scores of E proxies -> (X, Y): the lowest (Coste et al. 2023, arXiv:2310.02743),
    after each is centred on the reference, since a score is known up to a term of its prompt."""
    means = (ref_logps.exp() * ensemble).sum(-1, keepdim=True)  # (E, X, 1)
    return (ensemble - means).min(0).values


def fit_form(nats: Tensor, reward: Tensor, form: str) -> tuple[float, float, float]:
    """Gao et al.'s curves of the true reward over d = sqrt(KL), by least squares -> alpha, beta and
    the root mean square error. "bon": d * (alpha - beta * d); "rl": d * (alpha - beta * log d).
    nats, reward (N,). ValueError for another form, or a KL of 0, which has no logarithm."""
    if form not in ("bon", "rl") or not (nats > 0).all():
        raise ValueError(f'want "bon" or "rl" and positive KL, got {form!r}, {nats.min()}')
    d = nats.sqrt()
    basis = torch.stack([d, -d * (d if form == "bon" else d.log())], dim=1)  # (N, 2)
    alpha, beta = torch.linalg.lstsq(basis, reward).solution
    return (
        alpha.item(),
        beta.item(),
        (basis @ torch.stack([alpha, beta]) - reward).square().mean().sqrt().item(),
    )


@dataclass
class Settings:
    """Over-optimisation in the exact world."""

    pairs: int = field(default=64, metadata={"help": "comparisons a prompt"})
    prompts: int = field(default=64, metadata={"help": "prompts"})
    seed: int = field(default=0, metadata={"help": "of the world and of the comparisons"})


def exact_proxy(settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """-> ref_logps, proxy, true, all (X, Y): an exact world, and a proxy fitted to comparisons of
    the reference's responses, which Bradley-Terry labels by the true reward."""
    from snippets.worlds import exact
    from snippets.worlds.exact_pairs import sample_labelled

    world = exact.make_world(settings.seed, prompts=settings.prompts)
    generator = torch.Generator().manual_seed(settings.seed)
    chosen, rejected = sample_labelled(world, settings.pairs, generator)  # (X, pairs)
    rows = torch.arange(settings.prompts).repeat_interleave(settings.pairs)
    features = token_features(world.tokens, world.vocab)
    proxy = fit_proxy(features, rows, chosen.flatten(), rejected.flatten())
    return world.ref_logps, proxy, world.rewards


def main(settings: Settings) -> None:
    """Proxy and true reward as the policy is bent further, by the tilt and by best-of-n."""
    torch.set_num_threads(1)
    ref, proxy, true = exact_proxy(settings)
    betas = [2.0 ** (4 - k / 2) for k in range(17)]
    counts = [2**k for k in range(13)]
    for name, policies in (
        ("beta", {beta: tilt(ref, proxy, beta) for beta in betas}),
        ("n", {n: best_of_n(ref, proxy, n) for n in counts}),
    ):
        print(f"{name:>10} {'KL, nats':>10} {'proxy':>10} {'true':>10}")
        points = frontier(ref, list(policies.values()), proxy, true).tolist()
        for value, (nats, score, reward) in zip(policies, points, strict=True):
            print(f"{value:>10.4g} {nats:>10.3f} {score:>10.3f} {reward:>10.3f}")


if __name__ == "__main__":
    from snippets.worlds import lm

    lm.run(main, Settings)
