"""A language small enough to enumerate, so that every algorithm can be scored against the truth.

4 prompts, 5 tokens, responses of 3 tokens: 125 responses a prompt. The policy is autoregressive, a
table of logits for every prefix, so token-level terms mean what they mean in a language model.
Every expectation over responses is a finite sum. The optimum of E[r] - beta * KL(pi || pi_ref) is
known: pi*(y|x) is proportional to pi_ref(y|x) * exp(r(x, y) / beta) (Rafailov et al. 2023,
arXiv:2305.18290, equation 4), so a run is scored by KL(pi || pi*) in nats.

    python -m snippets.worlds.exact
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class World:
    """rewards (X, Y) and the reference's logits (X, N, V); X prompts, V tokens, responses of T
    tokens, Y = V**T, N prefixes; beta in reward a nat.
    """

    ref_logits: Tensor
    rewards: Tensor
    beta: float
    vocab: int
    length: int

    @property
    def tokens(self) -> Tensor:
        """(Y, T): the tokens of every response, in lexical order."""
        tokens = torch.cartesian_prod(*[torch.arange(self.vocab)] * self.length)
        return tokens.view(-1, self.length)  # a product of one is a vector

    @property
    def prefixes(self) -> Tensor:
        """(Y, T): the row of the logit table that each token of each response is drawn from."""
        place = self.vocab ** torch.arange(self.length - 1, -1, -1)
        number = torch.arange(self.vocab**self.length).unsqueeze(-1) // (
            place * self.vocab
        )  # the prefix, read as a number
        first = torch.tensor([(self.vocab**t - 1) // (self.vocab - 1) for t in range(self.length)])
        return first + number

    @property
    def ref_logps(self) -> Tensor:
        return response_logps(self, self.ref_logits)


def make_world(
    seed: int = 0, *, prompts: int = 4, vocab: int = 5, length: int = 3, beta: float = 0.5
) -> World:
    """A random world in float64: reference logits and rewards are standard normal."""
    if prompts < 1 or vocab < 2 or length < 1 or not beta > 0:
        raise ValueError(
            f"want prompts >= 1, vocab >= 2, length >= 1, beta > 0; "
            f"got {prompts}, {vocab}, {length}, {beta}"
        )
    generator = torch.Generator().manual_seed(seed)
    prefixes = (vocab**length - 1) // (vocab - 1)
    ref_logits = torch.randn(prompts, prefixes, vocab, generator=generator, dtype=torch.float64)
    rewards = torch.randn(prompts, vocab**length, generator=generator, dtype=torch.float64)
    return World(ref_logits, rewards, beta, vocab, length)


def token_logps(world: World, logits: Tensor) -> Tensor:
    """Logits (X, N, V) -> (X, Y, T): the log-probability of each token of each response, given the
    tokens before it."""
    return logits.log_softmax(-1)[:, world.prefixes, world.tokens]


def response_logps(world: World, logits: Tensor) -> Tensor:
    """Logits (X, N, V) -> (X, Y): the log-probability of each whole response."""
    return token_logps(world, logits).sum(-1)


def optimal_policy(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log pi*(y|x) (X, Y), the optimum of E[r] - beta * KL(pi || pi_ref); ref_logps, rewards (X,
    Y). The normaliser is the partition function.
    """
    return (ref_logps + rewards / beta).log_softmax(-1)


def kl(logps: Tensor, other: Tensor) -> Tensor:
    """Exact KL(pi || other) in nats a prompt: logps, other (X, Y) -> (X,)."""
    return (logps.exp() * (logps - other)).sum(-1)


def objective(world: World, logits: Tensor) -> Tensor:
    """E[r] - beta * KL(pi || pi_ref), exact, as a mean over prompts; its autograd gradient is the
    exact policy gradient.
    """
    logps = response_logps(world, logits)
    return ((logps.exp() * world.rewards).sum(-1) - world.beta * kl(logps, world.ref_logps)).mean()


def distance(world: World, logits: Tensor) -> float:
    """KL(pi || pi*) in nats, exact, as a mean over prompts: how far a policy is from the optimum
    of the world."""
    optimum = optimal_policy(world.ref_logps, world.rewards, world.beta)
    return kl(response_logps(world, logits.detach()), optimum).mean().item()


def logits_of(world: World, logps: Tensor) -> Tensor:
    """The table of logits (X, N, V) of any distribution over responses, logps (X, Y): a prefix
    weighs what its responses weigh together."""
    levels = []
    for t in range(world.length):
        shape = (logps.shape[0], world.vocab**t, world.vocab, -1)
        levels.append(logps.reshape(shape).logsumexp(-1))  # (X, V**t, V)
    return torch.cat(levels, dim=1)


@dataclass(frozen=True)
class Samples:
    """G responses a prompt as a batch of B = X * G rows of T tokens, as a language model's rollout
    would have them.
    """

    responses: Tensor  # (X, G), which of the Y
    old_logps: Tensor  # (B, T), under the policy that sampled
    ref_logps: Tensor  # (B, T)
    rewards: Tensor  # (X, G)
    prefixes: (
        Tensor  # (B, T), for a critic that is a table (X, N); index it as values[rows, prefixes]
    )
    rows: Tensor  # (B, 1), the prompt of each row
    mask: Tensor  # (B, T), all ones

    def logps(self, world: World, logits: Tensor) -> Tensor:
        """(B, T), with gradient, of the sampled tokens under `logits`."""
        return logits.log_softmax(-1)[
            self.rows, self.prefixes, world.tokens[self.responses.flatten()]
        ]


def sample(world: World, logits: Tensor, group: int, generator: torch.Generator) -> Samples:
    """`group` responses a prompt from the policy of `logits` (X, N, V)."""
    with torch.no_grad():
        probs = response_logps(world, logits).exp()  # (X, Y)
        responses = torch.multinomial(probs, group, replacement=True, generator=generator)  # (X, G)
        rows = torch.arange(probs.shape[0]).repeat_interleave(group).unsqueeze(-1)  # (B, 1)
        prefixes, tokens = (
            world.prefixes[responses.flatten()],
            world.tokens[responses.flatten()],
        )  # (B, T)
        old, ref = (
            table.log_softmax(-1)[rows, prefixes, tokens] for table in (logits, world.ref_logits)
        )
        rewards = world.rewards.gather(1, responses)
    return Samples(responses, old, ref, rewards, prefixes, rows, torch.ones_like(old))


def optimise(
    world: World,
    loss: Callable[[Tensor, Samples], Tensor],
    *,
    steps: int = 2000,
    lr: float = 0.05,
    group: int = 16,
    epochs: int = 1,
    seed: int = 0,
    extra: tuple[Tensor, ...] = (),
    every: int = 50,
) -> tuple[Tensor, list[tuple[int, float]]]:
    """Train the table by sampling: loss(logps (B, T), samples) -> scalar; the rate falls linearly
    to 0; starts at the reference.

    -> logits (X, N, V), and the curve [(step, KL(pi || pi*) in nats)]. `extra` are further tensors
    to train, a critic's say.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = world.ref_logits.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([logits, *extra], lr=lr)
    curve = [(0, distance(world, logits))]
    for step in range(1, steps + 1):
        for parameters in optimizer.param_groups:
            parameters["lr"] = lr * (1 - (step - 1) / steps)
        samples = sample(world, logits, group, generator)
        for _ in range(epochs):
            optimizer.zero_grad()
            loss(samples.logps(world, logits), samples).backward()
            optimizer.step()
        if step % every == 0 or step == steps:
            curve.append((step, distance(world, logits)))
    return logits.detach(), curve


def k3_optimum(ref_logits: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """The table of logits (X, N, V) where policy gradient with k3 in the loss comes to rest;
    ref_logits (X, N, V), rewards (X, Y).

    On-policy, the gradient of beta * k3 at a prefix s is that of beta * KL(ref(.|s) ||
    pi(.|s)), and none of it passes through the choice of s. So a fixed point balances, at each
    prefix, reward against KL: pi(a|s) * (Q(s, a) - V(s)) = beta * (pi(a|s) - ref(a|s)), which
    is pi(a|s) = beta * ref(a|s) / (lam - Q(s, a)) with lam = V(s) + beta. Q of the last token
    is the reward, V(s) the mean of Q under pi, and lam the one number above max Q that makes pi
    sum to 1.
    """
    weights = beta * ref_logits.softmax(-1)  # (X, N, V)
    value, levels = rewards, []
    while value.shape[1] > 1:  # from the last token to the first
        q = value.view(len(value), -1, weights.shape[-1])  # (X, prefixes of this length, V)
        weights, weight = weights[:, : -q.shape[1]], weights[:, -q.shape[1] :]
        low, high = (q + weight).amax(-1, keepdim=True), q.amax(-1, keepdim=True) + beta
        for _ in range(60):  # bisection: the sum falls from at least 1 at low to at most 1 at high
            lam = (low + high) / 2
            above = (weight / (lam - q)).sum(-1, keepdim=True) > 1
            low, high = torch.where(above, lam, low), torch.where(above, high, lam)
        levels.insert(0, (weight / (high - q)).log())
        value = high.squeeze(-1) - beta  # V(s), which is Q of the token that led to s
    return torch.cat(levels, dim=1)


def std_advantages(
    world: World, logps: Tensor, group: int, *, draws: int = 1024, seed: int = 0
) -> Tensor:
    """E[advantage | response] (X, Y): the mean of (r - mean) / std over groups of which this
    response is one and `group` - 1 others come from pi, logps (X, Y).

    The expected gradient of group-scaled rewards is that of these numbers in the rewards'
    place. They never exceed (G - 1) / sqrt(G), whatever the rewards. The others are `draws`
    Monte Carlo samples, the same for the same seed.
    """
    generator = torch.Generator().manual_seed(seed)
    cdf = logps.exp().cumsum(-1)
    uniforms = torch.rand(draws * (group - 1), generator=generator, dtype=cdf.dtype) * cdf[:, -1:]
    others = world.rewards.gather(1, torch.searchsorted(cdf, uniforms))  # (X, draws * (G - 1))
    others = others.view(len(cdf), draws, 1, group - 1)
    mine = world.rewards[:, None]  # (X, 1, Y)
    mean = (others.sum(-1) + mine) / group  # (X, draws, Y)
    squares = (others**2).sum(-1) + mine**2 - group * mean**2
    return ((mine - mean) / ((squares.clamp(min=0) / (group - 1)).sqrt() + 1e-4)).mean(1)


def std_optimum(world: World, group: int | None, *, k3: bool, rounds: int = 60) -> Tensor:
    """log pi(y|x) (X, Y) where rewards divided by their group's std come to rest, the KL being
    outside of the division.

    k3=True: k3 in the loss. k3=False: the exact policy gradient of KL(pi || pi_ref). group=None
    is the limit of a large group, r / std_pi(r). The advantages depend on the policy, so this
    iterates to a fixed point from the reference, half a step at a time; there may be several.
    """
    logps = world.ref_logps
    for _ in range(rounds):
        if group is None:
            mean = (logps.exp() * world.rewards).sum(-1, keepdim=True)
            variance = (logps.exp() * (world.rewards - mean) ** 2).sum(-1, keepdim=True)
            advantages = (world.rewards - mean) / (variance.sqrt() + 1e-4)
        else:
            advantages = std_advantages(world, logps, group)
        target = optimal_policy(world.ref_logps, advantages, world.beta)
        if k3:
            target = response_logps(world, k3_optimum(world.ref_logits, advantages, world.beta))
        logps = ((logps + target) / 2).log_softmax(-1)
    return logps


def main() -> None:
    """The demo: REINFORCE with the mean of the others as baseline (RLOO) finds pi*."""
    torch.set_num_threads(1)
    world = make_world()

    def rloo(logps: Tensor, samples: Samples) -> Tensor:
        kl_term = (samples.old_logps - samples.ref_logps).sum(-1).view_as(samples.rewards)  # (X, G)
        rewards = samples.rewards - world.beta * kl_term
        baseline = (rewards.sum(-1, keepdim=True) - rewards) / (rewards.shape[-1] - 1)
        return -((rewards - baseline).flatten() * logps.sum(-1)).mean()

    start = time.process_time()
    _, curve = optimise(world, rloo)
    for step, nats in curve[:: len(curve) // 10]:
        print(f"step {step:5d}   KL(pi || pi*) {nats:.6f} nats")
    print(f"{time.process_time() - start:.1f} CPU seconds")


if __name__ == "__main__":
    main()
