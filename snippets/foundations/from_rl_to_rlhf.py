"""From classic RL to RLHF: a language model as a policy, its tokens as the actions of an MDP.

State: the prompt and the tokens so far. Action: the next token. Transition: append it, which is
deterministic and known. Reward: 0 until the end, then the score (Ouyang et al. 2022). Backups on
this MDP give what a sum over responses gives, also under a KL penalty (Rafailov et al. 2024,
arXiv:2404.12358).

    python -m snippets.foundations.from_rl_to_rlhf
"""

import math

import torch
from torch import Tensor


def token_mdp(rewards: Tensor, *, vocab: int, length: int, eos: int | None = None) -> dict:
    """The responses to X prompts as a table of states, actions and transitions.

    rewards (X, V**T): the score of every response of T tokens, in lexical order. -> transitions and
    rewards (S, V, S), start (S,), terminal (S,): the fields of snippets.worlds.mdps.MDP. A prompt
    has N = (V**T - 1) / (V - 1) prefixes, shorter ones first; S = X * N + 1, the last one terminal.
    An `eos` ends the response wherever it comes, with the score of the prefix filled up with eos.
    ValueError on a shape that does not fit, integers, vocab < 2, length < 1, eos not in 0 to V - 1.
    """
    if vocab < 2 or length < 1 or (eos is not None and not 0 <= eos < vocab):
        raise ValueError(f"want vocab >= 2, length >= 1, eos in it; got {vocab}, {length}, {eos}")
    shape, kind = tuple(rewards.shape), rewards.dtype  # integers would round the start's 1 / X to 0
    if len(shape) != 2 or shape[1] != vocab**length or not kind.is_floating_point:
        raise ValueError(f"rewards {shape} of {kind}, want (X, {vocab**length}) of floats")
    prefixes = (vocab**length - 1) // (vocab - 1)  # N
    end = len(rewards) * prefixes
    transitions, paid = rewards.new_zeros(2, end + 1, vocab, end + 1)  # (S, V, S) each
    for x in range(len(rewards)):
        for t in range(length):
            first = (vocab**t - 1) // (vocab - 1)  # of the prefixes of t tokens
            for number in range(vocab**t):  # the prefix read as a number in base V
                for token in range(vocab):
                    after = number * vocab + token
                    state = x * prefixes + first + number
                    if t == length - 1 or token == eos:
                        for _ in range(length - 1 - t):
                            after = after * vocab + token  # filled up with eos
                        transitions[state, token, end] = 1.0
                        paid[state, token, end] = rewards[x, after]
                    else:
                        transitions[state, token, x * prefixes + first + vocab**t + after] = 1.0
    transitions[end, :, end] = 1.0
    start = rewards.new_zeros(end + 1)
    start[:end:prefixes] = 1 / len(rewards)  # the empty prefix of each prompt
    terminal = torch.arange(end + 1, device=rewards.device) == end
    return {"transitions": transitions, "rewards": paid, "start": start, "terminal": terminal}


def evaluate(
    transitions: Tensor, rewards: Tensor, policy: Tensor, *, horizon: int, gamma: float = 1.0
) -> tuple[Tensor, Tensor]:
    """V (S,) and Q (S, A) of a policy (S, A), by `horizon` backups; transitions, rewards (S, A, S).

    Exact if no episode has more than `horizon` steps. ValueError on other shapes, or horizon < 1.
    """
    if horizon < 1 or policy.shape != transitions.shape[:2] or rewards.shape != transitions.shape:
        shapes = f"{tuple(transitions.shape)}, {tuple(rewards.shape)}, {tuple(policy.shape)}"
        raise ValueError(f"transitions, rewards and policy disagree: {shapes}; horizon {horizon}")
    values = torch.zeros_like(policy[:, 0])
    for _ in range(horizon):
        q_values = (transitions * (rewards + gamma * values)).sum(-1)  # (S, A)
        values = (policy * q_values).sum(-1)
    return values, q_values


def optimise(
    transitions: Tensor,
    rewards: Tensor,
    *,
    horizon: int,
    gamma: float = 1.0,
    ref_logps: Tensor | None = None,
    beta: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The optimum: values (S,), q_values (S, A), log-policy (S, A), by `horizon` backups.

    beta = 0: V = max Q. beta > 0, a penalty of beta * log(pi / pi_ref) in every step, ref_logps (S,
    A): V = beta * log sum_a pi_ref exp(Q / beta), and pi = pi_ref * exp((Q - V) / beta). The chances
    of a terminal state must sum to 1 as well, or it gains value. ValueError on horizon < 1, beta <
    0, or beta > 0 without a reference of that shape.
    """
    soft, shape = beta > 0, transitions.shape[:2]
    if horizon < 1 or beta < 0 or (soft and (ref_logps is None or ref_logps.shape != shape)):
        got = f"horizon {horizon}, beta {beta}"
        raise ValueError(f"want horizon >= 1, beta >= 0, ref_logps (S, A) if beta > 0; got {got}")
    values = torch.zeros_like(transitions[:, 0, 0])
    for _ in range(horizon):
        q_values = (transitions * (rewards + gamma * values)).sum(-1)  # (S, A)
        values = beta * (ref_logps + q_values / beta).logsumexp(-1) if soft else q_values.amax(-1)
    if beta == 0:  # the first of the best actions has all the chance
        best = torch.nn.functional.one_hot(q_values.argmax(-1), q_values.shape[1])
        return values, q_values, best.to(q_values).log()
    return values, q_values, ref_logps + (q_values - values[:, None]) / beta


def policy_gradient(
    transitions: Tensor, start: Tensor, policy: Tensor, q_values: Tensor, *, horizon: int
) -> Tensor:
    """dJ / dlogits (S, A) of a softmax policy, gamma 1, by the policy gradient theorem.

    d(s) * pi(a|s) * (Q(s, a) - V(s)), d(s) the expected visits; start (S,), policy, q_values (S,
    A). ValueError on shapes that disagree.
    """
    if policy.shape != q_values.shape or start.shape != policy.shape[:1]:
        shapes = f"{tuple(start.shape)}, {tuple(policy.shape)}, {tuple(q_values.shape)}"
        raise ValueError(f"start, policy and q_values disagree: {shapes}")
    here, visits = start, torch.zeros_like(start)
    for _ in range(horizon):
        visits = visits + here
        here = torch.einsum("s,sa,sat->t", here, policy, transitions)
    advantages = q_values - (policy * q_values).sum(-1, keepdim=True)
    return visits[:, None] * policy * advantages


def expected_tries(chance: float) -> float:
    """Mean number of samples until the first success, 1 / p. ValueError on p outside (0, 1]."""
    if not 0 < chance <= 1:
        raise ValueError(f"a chance in (0, 1] is wanted, got {chance}")
    return 1 / chance


def chance_of_any(chance: float, samples: int) -> float:
    """1 - (1 - p)^n, that n samples hold a success. ValueError on p outside [0, 1), or n < 0."""
    if not 0 <= chance < 1 or samples < 0:
        raise ValueError(f"want a chance in [0, 1) and samples >= 0; got {chance}, {samples}")
    return -math.expm1(samples * math.log1p(-chance))


def reinforce(
    logits: Tensor, *, steps: int, batch: int, lr: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """REINFORCE where one response alone scores 1, that of zeros only; all others score 0.

    logits (R, T, V): R runs. -> the chance of the right response (steps + 1, R), and the step of
    the first reward (R,), `steps` if none. ValueError on logits of another shape, or batch < 2.
    """
    if logits.dim() != 3 or batch < 2:
        raise ValueError(f"want logits (R, T, V), batch >= 2; got {tuple(logits.shape)}, {batch}")
    chances, first = [], torch.full((len(logits),), steps, device=logits.device)
    for step in range(steps + 1):
        probs = logits.softmax(-1)  # (R, T, V)
        chances.append(probs[..., 0].prod(-1))
        if step == steps:
            break
        flat = probs.flatten(0, 1)  # (R * T, V)
        tokens = torch.multinomial(flat, batch, replacement=True, generator=generator)
        tokens = tokens.view(*probs.shape[:2], batch)  # (R, T, B)
        rewards = (tokens == 0).all(1).to(logits)  # (R, B)
        first = torch.where(rewards.any(-1) & (first == steps), step, first)
        # Less the mean of the others, as in RLOO.
        advantages = (rewards - rewards.mean(-1, keepdim=True)) * batch / (batch - 1)
        score = torch.nn.functional.one_hot(tokens, probs.shape[-1]) - probs[:, :, None]
        logits = logits + lr * (advantages[:, None, :, None] * score).mean(2)
    return torch.stack(chances), first


def main() -> None:
    """The demo: one optimum by two ways, what a discount does, and where exploration ends."""
    from snippets.worlds import exact

    torch.set_num_threads(1)
    world = exact.make_world()
    mdp = token_mdp(world.rewards, vocab=5, length=3)
    ref = world.ref_logits.log_softmax(-1).flatten(0, 1)
    ref = torch.cat([ref, torch.zeros_like(ref[:1]).log_softmax(-1)])  # and the terminal state
    table, paid = mdp["transitions"], mdp["rewards"]
    values, _, _ = optimise(table, paid, horizon=3, ref_logps=ref, beta=world.beta)
    known = world.beta * (world.ref_logps + world.rewards / world.beta).logsumexp(-1)
    for how, row in (("backups over prefixes", values[:-1:31]), ("sum over responses", known)):
        print(f"V* of the prompts, {how:21s}", "  ".join(f"{v:.6f}" for v in row.tolist()))
    scores = torch.zeros(1, 2**8, dtype=torch.float64)
    for words in range(9):  # words, then an EOS: a longer answer scores more
        scores[0, 2**8 - 2 ** (8 - words)] = 1 - 0.5 ** (words + 1)
    mdp = token_mdp(scores, vocab=2, length=8, eos=0)
    for gamma in (1.0, 0.95, 0.9, 0.8, 0.6):
        _, _, logps = optimise(mdp["transitions"], mdp["rewards"], horizon=8, gamma=gamma)
        words, state = 0, 0
        while words < 8 and logps[state, 1] == 0:
            words, state = words + 1, 2 * state + 2
        print(f"gamma {gamma:4}: words in the best answer: {words}")
    print("REINFORCE, 8 tokens, 200 steps of 64: median chance of the right answer over 5 seeds")
    for length in (2, 4, 6, 8, 10):
        row = []
        for right in (1 / 8, 0.6):  # of each token, before training
            logits = torch.zeros(5, length, 8, dtype=torch.float64)
            logits[..., 0] = math.log(right / ((1 - right) / 7))
            generator = torch.Generator().manual_seed(0)
            chances, _ = reinforce(logits, steps=200, batch=64, lr=5.0, generator=generator)
            row.append(f"{right:.3f}^{length}: {chances[-1].median():.3f}")
        print(f"  {length:2d} tokens, started at", ", at ".join(row))


if __name__ == "__main__":
    main()
