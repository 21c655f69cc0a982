"""More mistakes of RLHF code, in rewards, KL terms and scores: each `*_wrong` function is WRONG on
purpose, and the right one follows it. `measure_*` runs both and returns what each gives.

The KL per token and its k3: Shao et al. 2024 (arXiv:2402.03300), equations 3 and 4.

    python -m snippets.interview.pitfalls_losses
"""

import torch
from torch import Tensor


def weights_wrong(rewards: Tensor) -> Tensor:
    """WRONG as the weight of a token's log-probability: what came at that token, nothing later."""
    return rewards


def weights(rewards: Tensor) -> Tensor:
    """The return of each token: rewards (B, T) from there on, undiscounted. -> (B, T)"""
    return rewards.flip(-1).cumsum(-1).flip(-1)


def surrogate_wrong(logps: Tensor, old_logps: Tensor, advantages: Tensor) -> Tensor:
    """WRONG as a loss: this is PPO's objective, to be made large, and optimisers make it small."""
    ratio = (logps - old_logps).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


def surrogate(logps: Tensor, old_logps: Tensor, advantages: Tensor) -> Tensor:
    """The loss is minus the objective. All (B, T), no padding here."""
    ratio = (logps - old_logps).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


def rewards_wrong(scores: Tensor, kl: Tensor, beta: float) -> Tensor:
    """WRONG: dividing the score alone by its std divides beta's worth by it, too. -> (B,)"""
    return scores / scores.std() - beta * kl


def rewards_scaled(scores: Tensor, kl: Tensor, beta: float) -> Tensor:
    """Score (B,) and KL (B,) divided alike: another step size, and the same optimum."""
    return (scores - beta * kl) / scores.std()


def nucleus_logps_wrong(logits: Tensor, kept: Tensor) -> Tensor:
    """WRONG for tokens drawn by top-p or top-k: the normaliser counts tokens that were cut off."""
    return logits.log_softmax(-1).masked_fill(~kept, -torch.inf)


def nucleus_logps(logits: Tensor, kept: Tensor) -> Tensor:
    """The distribution drawn from, over the `kept` tokens of sampling: logits (B, V) -> (B, V)."""
    return logits.masked_fill(~kept, -torch.inf).log_softmax(-1)


def group_kl_wrong(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """WRONG: a group of samples is not a distribution; scaled to sum to 1 it is another one."""
    p, q = logps.softmax(-1), ref_logps.softmax(-1)  # (B, G): exp, then divided by the sum
    return (p * (p / q).log()).sum(-1)


def group_kl(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """The mean of k3 over G responses drawn from pi: (B, G) -> (B,), in nats."""
    return (torch.expm1(ref_logps - logps) - (ref_logps - logps)).mean(-1)


def kl_term_wrong(token_kl: Tensor, mask: Tensor) -> Tensor:
    """WRONG beside a policy term that is a mean over tokens: a sum, so it grows with the length."""
    return (token_kl * mask).sum(-1)


def kl_term(token_kl: Tensor, mask: Tensor) -> Tensor:
    """GRPO's KL stands inside the same mean over a response's tokens: (B, T) -> (B,)."""
    return (token_kl * mask).sum(-1) / mask.sum(-1)


def end_wrong(ids: Tensor, attention: Tensor, pad: int) -> Tensor:
    """WRONG where pad == eos: the first pad may be the EOS behind the user's turn."""
    return (ids == pad).long().argmax(-1) - 1


def end(ids: Tensor, attention: Tensor, pad: int) -> Tensor:
    """The last real token by the attention mask (B, L), not by an id. -> (B,)"""
    return (torch.arange(ids.shape[1]) * attention).argmax(-1)


def scores_wrong(texts: list[str], answers: list[str], ended: Tensor) -> Tensor:
    """WRONG: the text is right, but it was cut off, and nothing teaches the model to stop."""
    return torch.tensor([float(text == answer) for text, answer in zip(texts, answers, strict=True)])


def scores_ended(texts: list[str], answers: list[str], ended: Tensor) -> Tensor:
    """No reward without an EOS, ended (B,). In TRL's online DPO: missing_eos_penalty, subtracted."""
    return torch.where(ended, scores_wrong(texts, answers, ended), 0.0)


def measure_exact(seed: int = 0) -> dict[str, tuple[float, float, str]]:
    """{what: (wrong, right, unit)} in the exact world: 600 short steps, and expectations."""
    from snippets.worlds import exact

    world = exact.make_world(seed)

    def run(weigh=None, reward=rewards_scaled, loss=surrogate) -> float:
        def step(logps: Tensor, s) -> Tensor:
            scores, log_ratios = s.rewards.flatten(), s.old_logps - s.ref_logps  # (B,), (B, T)
            if weigh:  # token by token: the KL at each, the score at the last
                per_token = -world.beta * log_ratios
                per_token = weigh(torch.cat([per_token[:, :-1], per_token[:, -1:] + scores.unsqueeze(-1)], 1))
            else:
                per_token = reward(scores, log_ratios.sum(-1), world.beta).unsqueeze(-1).expand_as(logps)
            grouped = per_token.unflatten(0, s.rewards.shape)  # (X, G, T)
            return loss(logps, s.old_logps, (grouped - grouped.mean(1, keepdim=True)).flatten(0, 1))

        return exact.distance(world, exact.optimise(world, step, seed=seed, steps=600)[0])

    best = exact.optimal_policy(world.ref_logps, world.rewards, world.beta)  # (X, Y)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(best.exp(), 8 * 2000, replacement=True, generator=generator)
    logps, ref_logps = (x.gather(1, drawn).view(-1, 8) for x in (best, world.ref_logps))
    truth = exact.kl(best, world.ref_logps).mean()
    shares = [(f(logps, ref_logps).mean() / truth).item() for f in (group_kl_wrong, group_kl)]
    returns, right = [run(weigh=f) for f in (weights_wrong, weights)], run()
    return {
        "distance to the optimum, rewards or returns": (*returns, "nats"),
        "distance to the optimum, sign of the loss": (run(loss=surrogate_wrong), right, "nats"),
        "distance to the optimum, what is scaled": (run(reward=rewards_wrong), right, "nats"),
        "KL from groups of 8, over the KL": (*shares, ""),
    }


def measure_warm_start(seed: int = 0) -> dict[str, tuple[float, float, str]]:
    """{what: (wrong, right, unit)} on 256 prompts of the arithmetic model."""
    from snippets.worlds import arithmetic, lm

    model, tokenizer = arithmetic.warm_start()
    records = arithmetic.problems(held_out=True)[:256]
    prompts, answers = ([record[name] for record in records] for name in ("prompt", "answer"))
    ids, attention = lm.encode_prompts(tokenizer, prompts, torch.device("cpu"))
    with torch.no_grad():
        places = lm.positions(attention)
        logits = model(input_ids=ids, attention_mask=attention, position_ids=places).logits[:, -1]
    probs, order = logits.softmax(-1).sort(-1, descending=True)
    kept = torch.zeros_like(probs, dtype=torch.bool).scatter(1, order, probs.cumsum(-1) - probs < 0.9)
    logits.requires_grad_(True)
    drawn = nucleus_logps(logits, kept).exp().detach()
    biases = []
    for score in (nucleus_logps_wrong, nucleus_logps):
        expected = torch.where(kept, drawn * score(logits, kept), 0.0).sum()
        (gradient,) = torch.autograd.grad(expected, logits)
        biases.append(gradient.abs().sum(-1).mean().item())
    uniforms = torch.rand(256, 3, generator=torch.Generator().manual_seed(seed))
    out = lm.generate(model, tokenizer, prompts, max_new_tokens=3, uniforms=uniforms)
    ended = (out.ids[:, -out.mask.shape[1] :] == tokenizer.eos_token_id).any(-1)
    paid = [f(out.texts, answers, ended)[~ended].mean().item() for f in (scores_wrong, scores_ended)]
    return {
        "mean score function under top-p 0.9, L1 norm": (*biases, ""),
        "mean score of answers that were cut off": (*paid, ""),
    }


def measure_tensors(seed: int = 0) -> dict[str, tuple[float, float, str]]:
    """{what: (wrong, right, unit)} on made-up tensors."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(100) < torch.tensor([[10], [100]])).float()
    grown = []
    for f in (kl_term_wrong, kl_term):
        short, long = f(torch.full((2, 100), 0.02), mask).tolist()
        grown.append(long / short)
    ids = torch.randint(1, 50, (512, 24), generator=generator)  # 256 pairs; 0 is the EOS and the pad
    ids[256:, :9] = ids[:256, :9]  # one prompt, its last token an EOS, and two responses
    ids[:, 8] = 0
    length = torch.randint(12, 24, (512, 1), generator=generator)
    attention = (torch.arange(24) <= length).long()
    ids[torch.arange(24) >= length] = 0  # the EOS of the response, and padding
    states = torch.randn(50, generator=generator)[ids].cumsum(-1)  # of a causal model: the past only
    equal = []
    for f in (end_wrong, end):
        first, second = states.gather(1, f(ids, attention, 0).unsqueeze(-1)).view(2, 256)
        equal.append((first == second).float().mean().item())
    return {
        "KL term at 100 tokens, over that at 10": (*grown, ""),
        "share of pairs with equal scores": (*equal, ""),
    }


def main() -> None:
    """The table of all of it."""
    torch.set_num_threads(1)
    print(f"{'':50}{'wrong':>12}{'right':>12}")
    for measure in (measure_exact, measure_warm_start, measure_tensors):
        for what, (wrong, right, unit) in measure().items():
            print(f"{what:50}{wrong:12.4g}{right:12.4g} {unit}")


if __name__ == "__main__":
    main()
