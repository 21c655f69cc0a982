"""Mistakes in DPO and in reward models: each `*_wrong` function is WRONG on purpose, and the right one
follows it. `measure_*` runs both and returns what each gives.

DPO: Rafailov et al. 2023 (arXiv:2305.18290); at its optimum beta * log(pi / ref) of a whole response
is the reward, up to a term of the prompt alone (equation 5).

    python -m snippets.interview.pitfalls_preferences
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def response_logps_wrong(token_logps: Tensor, mask: Tensor) -> Tensor:
    """WRONG in DPO: the mean over tokens is not log pi(y|x); a long response's reward shrinks."""
    return (token_logps * mask).sum(-1) / mask.sum(-1)


def response_logps(token_logps: Tensor, mask: Tensor) -> Tensor:
    """log pi(y|x) (B,) is the sum over the response's tokens (B, T), its EOS included."""
    return (token_logps * mask).sum(-1)


def mean_logps_wrong(token_logps: Tensor, mask: Tensor) -> Tensor:
    """WRONG where a method wants the mean: this one divides by the padded width of the batch."""
    return (token_logps * mask).mean(-1)


def mean_logps(token_logps: Tensor, mask: Tensor) -> Tensor:
    """Divided by the response's own length, for the methods that want that (SimPO, TRL's IPO)."""
    return (token_logps * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def dpo_wrong(margins: Tensor) -> Tensor:
    """WRONG: sigmoid underflows to 0 in float32, its log is -inf and the gradient NaN."""
    return -torch.log(torch.sigmoid(margins))


def dpo(margins: Tensor) -> Tensor:
    """margins (B,), already times beta -> losses (B,); the gradient tends to -1."""
    return -logsigmoid(margins)


def named_loss_wrong(h: Tensor, loss_type: str, beta: float) -> Tensor:
    """WRONG: whatever it does not know becomes DPO, also "IPO" in capitals and what was not passed on."""
    return (h - 1 / (2 * beta)) ** 2 if loss_type == "ipo" else -logsigmoid(beta * h)


def named_loss(h: Tensor, loss_type: str, beta: float) -> Tensor:
    """h (B,), the difference of log-ratios -> losses (B,). ValueError on a name that is unknown."""
    losses = {"sigmoid": lambda: -logsigmoid(beta * h), "ipo": lambda: (h - 1 / (2 * beta)) ** 2}
    if loss_type not in losses:
        raise ValueError(f"loss_type must be one of {', '.join(losses)}, got {loss_type!r}")
    return losses[loss_type]()


def last_token_wrong(attention: Tensor) -> Tensor:
    """WRONG with padding on the left: the number of real tokens less one is no position there."""
    return attention.sum(-1) - 1


def last_token(attention: Tensor) -> Tensor:
    """The last 1 of each row of attention (B, L), whatever the side of the padding. -> (B,)"""
    return (torch.arange(attention.shape[1]) * attention).argmax(-1)


def shifted_logps_wrong(logits: Tensor, ids: Tensor) -> Tensor:
    """WRONG: the logits at t predict the token at t + 1, and here they score the token at t."""
    return logits[:, 1:].log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)


def shifted_logps(logits: Tensor, ids: Tensor) -> Tensor:
    """(B, L - 1): log-probabilities of ids[:, 1:], from logits (B, L, V) one column to the left."""
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)


def measure_exact(seed: int = 0) -> dict[str, tuple[float, float, str]]:
    """{what: (wrong, right, unit)}: pairs of responses of 1 to 4 tokens, ordered by the implicit reward of
    the optimal policy. Token 0 is the EOS; what stands behind it is padding."""
    from snippets.worlds import exact

    world = exact.make_world(seed, vocab=4, length=4)
    ended = world.tokens == 0
    mask = (ended.long().cumsum(-1) - ended.long() == 0).double()  # (Y, T)
    shown = (world.tokens * mask.long() * world.vocab ** torch.arange(3, -1, -1)).sum(-1)
    rewards = world.rewards[:, shown]  # of what a reader sees: padding changes nothing
    best = exact.logits_of(world, exact.optimal_policy(world.ref_logps, rewards, world.beta))
    ratios = exact.token_logps(world, best) - exact.token_logps(world, world.ref_logits)  # (X, Y, T)
    right_order = []
    pairs = rewards.unsqueeze(-1) > rewards.unsqueeze(-2)  # (X, Y, Y): the first is the better one
    for logps in (response_logps_wrong, response_logps):
        implicit = logps(ratios, mask)  # (X, Y), without beta
        agree = implicit.unsqueeze(-1) > implicit.unsqueeze(-2)
        right_order.append(agree[pairs].double().mean().item())
    return {"share of pairs in the true order": (*right_order, "")}


def measure_warm_start(seed: int = 0) -> dict[str, tuple[float, float, str]]:
    """{what: (wrong, right, unit)} on 256 prompts of the arithmetic model, padded on the left."""
    from snippets.worlds import arithmetic, lm

    model, tokenizer = arithmetic.warm_start()
    prompts = [record["prompt"] for record in arithmetic.problems(held_out=True)[:256]]
    _, attention = lm.encode_prompts(tokenizer, prompts, torch.device("cpu"))
    end = attention.shape[1] - 1
    missed = [(f(attention) != end).double().mean().item() for f in (last_token_wrong, last_token)]
    batch = lm.generate(model, tokenizer, prompts, max_new_tokens=4, temperature=0.0)
    valid = batch.mask.bool()
    with torch.no_grad():
        places = lm.positions(batch.attention)
        logits = model(input_ids=batch.ids, attention_mask=batch.attention, position_ids=places).logits
    scored = [f(logits, batch.ids)[:, -valid.shape[1] :][valid] for f in (shifted_logps_wrong, shifted_logps)]
    return {
        "share of rows whose last token is missed": (*missed, ""),
        "mean log-probability of greedy tokens": (*(x.mean().item() for x in scored), "nats"),
    }


def measure_tensors(seed: int = 0) -> dict[str, tuple[float, float, str]]:
    """{what: (wrong, right, unit)} on made-up tensors."""
    token_logps = -torch.rand(16, 10, generator=torch.Generator().manual_seed(seed))
    wide, mask = torch.zeros(16, 80), torch.zeros(16, 80)  # as beside a response of 80 tokens
    wide[:, :10], mask[:, :10] = token_logps, 1.0
    shares = [(f(wide, mask).sum() / token_logps.mean(-1).sum()).item() for f in (mean_logps_wrong, mean_logps)]
    pulls = []  # a pair at twice IPO's target of 1 / (2 * beta)
    for f, name in ((named_loss_wrong, "IPO"), (named_loss, "ipo")):
        h = torch.tensor([10.0], requires_grad=True)
        pulls.append(torch.autograd.grad(f(h, name, 0.1).sum(), h)[0].item())
    finite = []
    for loss in (dpo_wrong, dpo):
        margins = torch.linspace(-200, 200, 401).requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(margins).sum(), margins)
        finite.append(gradient.isfinite().float().mean().item())
    return {
        "mean log-probability in a wide batch, over its value alone": (*shares, ""),
        "gradient at twice IPO's target": (*pulls, ""),
        "share of finite gradients, margins -200 to 200": (*finite, ""),
    }


def main() -> None:
    """The table of all of it."""
    torch.set_num_threads(1)
    print(f"{'':60}{'wrong':>12}{'right':>12}")
    for measure in (measure_exact, measure_warm_start, measure_tensors):
        for what, (wrong, right, unit) in measure().items():
            print(f"{what:60}{wrong:12.4g}{right:12.4g} {unit}")


if __name__ == "__main__":
    main()
