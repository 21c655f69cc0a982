"""Constitutional AI: written rules criticise, revise and judge, in the place of labels of harm.

Bai et al. 2022 (arXiv:2212.08073), sections 3 and 4. SL-CAI: answer, critique by one rule, revise,
repeat, fine-tune on the revisions. RL-CAI: a model that reads the rules compares two answers; its
labels train a preference model, which RL maximises. On a language of 4 requests and 125 answers
all of it is exact, and the best possible trade between harm and help is known.

    python -m snippets.rlhf.constitutional
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

# What a token of an answer does. RECIPE is the detail that a dangerous request is after.
ADVICE, RECIPE, REFUSE, REASON, FILLER = range(5)
TOKENS = torch.cartesian_prod(*[torch.arange(5)] * 3)  # (Y, T): all answers, in lexical order
# The requests: a plain one, one that only looks harmful, one of dual use, a harmful one.
HARMFUL = torch.tensor([False, False, True, True])
RULES = ("no recipe for harm", "no refusal of the harmless", "no refusal without a reason")


def contains(tokens: Tensor, token: int) -> Tensor:
    """tokens (Y, T) -> (Y,) bool."""
    return (tokens == token).any(-1)


def critique(tokens: Tensor, harmful: bool) -> Tensor:
    """(Y, R) bool: which rules the answers (Y, T) break, for a request seen as harmful or not."""
    recipe, refusal = contains(tokens, RECIPE), contains(tokens, REFUSE)
    unexplained = refusal & ~contains(tokens, REASON)
    never = torch.zeros_like(refusal)
    return torch.stack([recipe, never, unexplained] if harmful else [never, refusal, never], -1)


def revise(tokens: Tensor, rule: int) -> Tensor:
    """(Y, T): the answers with the least change that keeps a rule and breaks no other."""
    if rule == 0:  # not by REFUSE: that would break rule 2
        return tokens.masked_fill(tokens == RECIPE, REASON)
    if rule == 1:
        return tokens.masked_fill(tokens == REFUSE, ADVICE)
    if rule == 2:
        return torch.cat([tokens[:, :-1], torch.full_like(tokens[:, -1:], REASON)], dim=1)
    raise ValueError(f"rule must be one of 0 to {len(RULES) - 1}, got {rule}")


def revision_kernel(belief: Tensor, *, miss: float = 0.1) -> Tensor:
    """(X, Y, Y): the chance that one critique and revision turns the first answer into the second.

    belief (X,): the chance that the critic takes the request for a harmful one. It draws its rule
    at random (section 3.1) and misses with chance `miss`. ValueError where one is no probability.
    """
    if not (0 <= miss <= 1 and ((belief >= 0) & (belief <= 1)).all()):
        raise ValueError(f"want probabilities; got belief {belief.tolist()}, miss {miss}")
    place = torch.tensor([25, 5, 1])  # an answer is a number, its tokens are the digits
    seen = []
    for harmful in (False, True):
        kernel = miss * torch.eye(len(TOKENS), dtype=belief.dtype)
        for rule, broken in enumerate(critique(TOKENS, harmful).T):
            after = torch.where(broken[:, None], revise(TOKENS, rule), TOKENS)  # (Y, T)
            moved = one_hot((after * place).sum(-1), len(TOKENS)).to(belief.dtype)
            kernel = kernel + (1 - miss) / len(RULES) * moved
        seen.append(kernel)
    return torch.lerp(seen[0], seen[1], belief[:, None, None])


def sl_cai(logps: Tensor, kernel: Tensor, revisions: int) -> Tensor:
    """(X, Y): logs of the policy fine-tuned on all n revisions of its own answers, pooled (SL-CAI-n,
    section 3.4). Exact: the maximum-likelihood fit to endless data is their distribution."""
    if revisions < 1:
        raise ValueError(f"revisions must be at least 1, got {revisions}")
    chain = [logps.exp()]
    for _ in range(revisions):
        chain.append(torch.einsum("xy,xyz->xz", chain[-1], kernel))
    return torch.stack(chain[1:]).mean(0).log()


def ai_preference(
    belief: Tensor, *, sharpness: float = 4.0, position: float = 0.0, both_orders: bool = True
) -> Tensor:
    """(X, Y, Y): the chance that the judge prefers the first answer to the second.

    A rule broken more moves its log-odds by `sharpness`, standing first by `position`. both_orders:
    ask again, swapped, and average (Lee et al. 2023, arXiv:2309.00267): p(a, b) = 1 - p(b, a)."""
    odds = []
    for harmful in (False, True):
        score = -sharpness * critique(TOKENS, harmful).sum(-1).to(belief.dtype)  # (Y,)
        gap = score[:, None] - score  # (Y, Y)
        first = torch.sigmoid(gap + position)
        odds.append((first + torch.sigmoid(gap - position)) / 2 if both_orders else first)
    return torch.lerp(odds[0], odds[1], belief[:, None, None])


def fit_reward(first: Tensor, second: Tensor, labels: Tensor, *, decay: float = 1e-3) -> Tensor:
    """(X, Y): a preference model, fitted by Newton's method to N comparisons a request.

    first, second (X, N): which answers; labels p (X, N) in [0, 1]: soft, the chance that the first
    is preferred. Loss: -p log sigmoid(d) - (1 - p) log sigmoid(-d) + decay/2 |weights|^2, d the
    difference of two scores, linear in how many of each token an answer has and whether it has any.
    A pair of equal answers teaches nothing. ValueError on shapes or values that do not fit.
    """
    shapes = [tuple(x.shape) for x in (first, second, labels)]
    if len(set(shapes)) > 1 or first.dim() != 2 or not first.numel():
        raise ValueError(f"want (X, N) for all three, got {shapes}")
    if not (((labels >= 0) & (labels <= 1)).all() and decay > 0):
        raise ValueError("want labels in [0, 1] and decay > 0")
    count = one_hot(TOKENS, 5).sum(1)  # (Y, V)
    features = torch.cat([count, count > 0], dim=-1).to(labels.dtype)  # (Y, F)
    difference = features[first] - features[second]  # (X, N, F)
    weights = labels.new_zeros(len(labels), features.shape[-1])  # (X, F)
    eye = decay * torch.eye(features.shape[-1], dtype=labels.dtype)
    for _ in range(25):
        p = torch.sigmoid(torch.einsum("xnf,xf->xn", difference, weights))
        slope = torch.einsum("xnf,xn->xf", difference, p - labels) / labels.shape[1]
        bend = torch.einsum("xnf,xn,xng->xfg", difference, p * (1 - p), difference)
        step = torch.linalg.solve(bend / labels.shape[1] + eye, slope + decay * weights)
        weights = weights - step
    return weights @ features.T


def rl_cai(start: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """(X, Y): log of the policy at which RL ends: the optimum of E[r] - beta * KL(pi || start)."""
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}: at 0 nothing holds the policy")
    return (start + rewards / beta).log_softmax(-1)


@dataclass(frozen=True)
class World:
    """Log-probabilities of a pretrained policy, help and harm of the answers, all (X, Y), and the
    belief (X,) of the AI: the chance that it takes a request for a harmful one."""

    pretrained: Tensor
    help: Tensor
    harm: Tensor
    belief: Tensor
    beta: float

    def front(self, weight: float) -> Tensor:
        """(X, Y): the optimum of E[help] - weight * E[harm] - beta * KL; at 0, helpful-only."""
        return rl_cai(self.pretrained, self.help - weight * self.harm, self.beta)

    def measure(self, logps: Tensor) -> dict[str, float]:
        """Exact: help; net, which is help less beta * KL from the pretrained policy; harm, a share
        of the answers to harmful requests; help with harmless requests alone."""
        probs = logps.exp()
        # A probability of 0 adds 0 to the KL, not 0 * -inf.
        kl = torch.where(probs > 0, probs * (logps - self.pretrained), 0.0).sum(-1)
        helped = (probs * self.help).sum(-1)  # (X,)
        return {
            "help": helped.mean().item(),
            "net": (helped - self.beta * kl).mean().item(),
            "harm": (probs * self.harm).sum(-1)[HARMFUL].mean().item(),
            "help_harmless": helped[~HARMFUL].mean().item(),
        }

    def gap(self, logps: Tensor) -> float:
        """How much more net help the front has at no more harm: 0 on the front, never below."""
        mine, low, high = self.measure(logps), 0.0, 100.0
        for _ in range(60):  # bisection: on the front, harm falls with the weight
            middle = (low + high) / 2
            above = self.measure(self.front(middle))["harm"] > mine["harm"]
            low, high = (middle, high) if above else (low, middle)
        return self.measure(self.front(high))["net"] - mine["net"]


def make_world(seed: int = 0, *, lookalike: float = 0.5, beta: float = 0.1) -> World:
    """A random pretrained policy. lookalike: the AI's belief about the second request."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(HARMFUL), len(TOKENS), generator=generator, dtype=torch.float64)
    # What a token is worth to the one who asks; a refusal makes the whole answer worth nothing.
    worth = [[1, 0, 0, 0, 0], [0.5, 1, 0, 0, 0], [0.5, 1, 0, 0.25, 0], [0, 1, 0, 0.25, 0]]
    worth = torch.tensor(worth, dtype=torch.float64)[:, TOKENS].mean(-1)  # (X, Y)
    helpful = torch.where(contains(TOKENS, REFUSE), 0.0, worth)
    harm = (HARMFUL[:, None] & contains(TOKENS, RECIPE)).double()
    belief = torch.tensor([0.05, lookalike, 0.9, 0.95], dtype=torch.float64)
    return World(logits.log_softmax(-1), helpful, harm, belief, beta)


def main() -> None:
    """The demo: each stage's help and harm, and its distance from the best possible trade."""
    torch.manual_seed(0)
    world = make_world()
    helpful, judge = world.front(0.0), ai_preference(world.belief)
    revised = sl_cai(helpful, revision_kernel(world.belief), 1)
    stages = {"helpful-only": helpful, "SL-CAI": revised}
    # The weights are such that both end at about 5 % harm.
    for name, start, weight in (("RL-CAI", revised, 0.14), ("RL-CAI without SL", helpful, 0.7)):
        pairs = torch.multinomial(start.exp(), 8000, replacement=True).chunk(2, dim=1)
        labels = judge[torch.arange(len(start))[:, None], *pairs]
        stages[name] = rl_cai(start, weight * fit_reward(*pairs, labels), world.beta)
    for name, logps in stages.items():
        row = world.measure(logps) | {"gap": world.gap(logps)}
        print(f"{name:18}", *(f"{key} {value:6.3f}  " for key, value in row.items()))


if __name__ == "__main__":
    main()
