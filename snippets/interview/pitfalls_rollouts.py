"""Mistakes between sampling and the loss (padding, EOS, temperature, dropout): each `*_wrong` function is
WRONG on purpose, and the right one follows it. `measure_*` runs both and returns what each gives.

mask (B, T) is 1 on a response's tokens, the EOS included, and 0 on the padding to its right.

    python -m snippets.interview.pitfalls_rollouts
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel


def response_mask_wrong(response: Tensor, eos: int, pad: int) -> Tensor:
    """WRONG where pad == eos: the EOS is masked with the padding, so nothing ever trains it."""
    return (response != pad).float()


def response_mask(response: Tensor, eos: int, pad: int) -> Tensor:
    """1 up to the first EOS, which counts, by position and not by id. response (B, T) -> (B, T)."""
    is_eos = (response == eos).long()
    return (is_eos.cumsum(-1) - is_eos == 0).float()  # no EOS *before* this token


def place_wrong(scores: Tensor, mask: Tensor) -> Tensor:
    """WRONG: the last column is a pad in every response but the longest, and the mask drops it."""
    rewards = torch.zeros(mask.shape)
    rewards[:, -1] = scores
    return rewards * mask


def place(scores: Tensor, mask: Tensor) -> Tensor:
    """scores (B,) on the last valid token of each row of mask (B, T), the EOS or the cut. -> (B, T)"""
    last = (mask.cumsum(-1) * mask).argmax(-1, keepdim=True)  # (B, 1)
    return torch.zeros(mask.shape).scatter(1, last, scores.unsqueeze(-1)) * mask


def _gae(rewards: Tensor, values: Tensor, lam: float = 0.95) -> Tensor:
    """Equation 16 of GAE with gamma = 1 along the columns, V = 0 after the last of them."""
    advantages, tail = torch.zeros_like(rewards), torch.zeros(len(rewards))
    following = torch.cat([values[:, 1:], torch.zeros(len(values), 1)], dim=1)  # V(s_{t+1})
    for t in reversed(range(rewards.shape[1])):
        tail = rewards[:, t] + following[:, t] - values[:, t] + lam * tail
        advantages[:, t] = tail
    return advantages


def gae_wrong(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """WRONG: the last token bootstraps from V of the first pad, and errors on pads flow back."""
    return _gae(rewards, values) * mask


def gae_right(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Padding on the right, (B, T): nothing is to be had after the last valid token."""
    return _gae(rewards.masked_fill(mask == 0, 0.0), values.masked_fill(mask == 0, 0.0)) * mask


def gae_tools_wrong(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """WRONG where the 0s of the mask stand inside a response (tool output): each costs a factor of
    lambda, the token before them is told that nothing follows, and a score behind them is lost."""
    return gae_right(rewards, values, mask)


def gae_tools(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Over the policy's own tokens (B, T) alone, a score behind them moved to the last of them."""
    order = (mask == 0).long().argsort(dim=-1, stable=True)  # own tokens first, in their order
    scores = (rewards * (mask == 0)).sum(-1)
    own, theirs, valid = (x.gather(1, order) for x in (rewards, values, mask))
    packed = gae_right(own + place(scores, valid), theirs, valid)
    return torch.zeros_like(packed).scatter(1, order, packed)


def batch_mean_wrong(per_token: Tensor, mask: Tensor) -> Tensor:
    """WRONG: divides by all B * T positions, so padding shrinks the loss and its gradient."""
    return (per_token * mask).mean()


def batch_mean(per_token: Tensor, mask: Tensor) -> Tensor:
    """The mean over valid tokens. torch.where, since NaN * 0 under a pad would be NaN."""
    return torch.where(mask.bool(), per_token, 0.0).sum() / mask.sum()


def rescore_wrong(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """WRONG: the tokens were drawn at `temperature`, and this is not the policy that drew them."""
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def rescore(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """(B, T) from logits (B, T, V), at the temperature that the tokens (B, T) were drawn at."""
    return (logits / temperature).log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def rescoring_logits_wrong(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    """WRONG before the ratio: in train mode each pass draws its own dropout, as if another policy."""
    return model.train()(**inputs).logits


def rescoring_logits(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    """(B, L, V), without dropout, as at sampling. Eval mode does not stop the gradient."""
    return model.eval()(**inputs).logits


def measure_warm_start(seed: int = 0) -> dict[str, tuple[float, float, str]]:
    """{what: (wrong, right, unit)} on 256 responses of the arithmetic model."""
    from snippets.worlds import arithmetic, lm

    model, tokenizer = arithmetic.warm_start()
    prompts = [record["prompt"] for record in arithmetic.problems(held_out=True)[:256]]
    uniforms = torch.rand(256, 4, generator=torch.Generator().manual_seed(seed))
    batch = lm.generate(model, tokenizer, prompts, max_new_tokens=4, temperature=0.6, uniforms=uniforms)
    response, valid, eos = batch.ids[:, -batch.mask.shape[1] :], batch.mask.bool(), tokenizer.eos_token_id
    for layer in model.base_model.layers:
        layer.self_attn.attention_dropout = 0.1  # this model was made without

    @torch.no_grad()
    def away(logits_of, score) -> float:
        """Mean |log ratio| to the log-probabilities at sampling, nats a token: 0 if the policy is the same."""
        torch.manual_seed(seed)
        places = lm.positions(batch.attention)
        logits = logits_of(model, input_ids=batch.ids, attention_mask=batch.attention, position_ids=places)
        logps = score(logits[:, -response.shape[1] - 1 : -1], response, 0.6)
        return (logps - batch.logps)[valid].abs().mean().item()

    right = away(rescoring_logits, rescore)
    padded = response.masked_fill(~valid, eos)  # as a tokenizer with pad = eos leaves it
    ends = (padded == eos) & valid
    trained = [f(padded, eos, eos)[ends].mean().item() for f in (response_mask_wrong, response_mask)]
    kept = [(f(torch.ones(256), valid.float()).sum() / 256).item() for f in (place_wrong, place)]
    return {
        "temperature: log-ratio before any update": (away(rescoring_logits, rescore_wrong), right, "nats"),
        "dropout: log-ratio before any update": (away(rescoring_logits_wrong, rescore), right, "nats"),
        "share of the EOS tokens that are trained": (*trained, ""),
        "share of the scores that reach the loss": (*kept, ""),
    }


def measure_stopping(seed: int = 0) -> dict[str, tuple[float, float, str]]:
    """{what: (wrong, right, unit)}: teach a small new model to copy a digit and stop, pad = eos."""
    from snippets.worlds import arithmetic, lm

    tokenizer = arithmetic.make_tokenizer()
    eos, stops = tokenizer.eos_token_id, []
    prompts = [f"{digit}=" for digit in range(10)]
    for mask_of in (response_mask_wrong, response_mask):
        model = arithmetic.make_model(len(tokenizer), hidden=32, layers=1, seed=seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(80):
            ids = torch.tensor([tokenizer(p + p[0])["input_ids"] + [eos, eos] for p in prompts])
            mask = mask_of(ids[:, 2:], eos, eos)
            logits = model(input_ids=ids).logits[:, 1:-1]  # those that predict the response
            loss = batch_mean(cross_entropy(logits.mT, ids[:, 2:], reduction="none"), mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        out = lm.generate(model, tokenizer, prompts, max_new_tokens=16, temperature=0.0)
        stops.append((out.ids == eos).any(-1).float().mean().item())
    return {"share of the answers that end": (*stops, "")}


def measure_tensors(seed: int = 0) -> dict[str, tuple[float, float, str]]:
    """{what: (wrong, right, unit)}: the same rows with three pads more, and with twice the width."""
    rewards, values = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(seed))
    valid = (torch.arange(8) < torch.full((64, 1), 5)).float()
    leaks, shares = [], []
    for f in (gae_wrong, gae_right):
        short = f(rewards[:, :5], values[:, :5], valid[:, :5])
        leaks.append((f(rewards, values, valid)[:, :5] - short).abs().mean().item())
    tools = (torch.arange(14) < 5) | (torch.arange(14) >= 11)  # six tokens of a tool behind the fifth
    some = torch.zeros(64, 14), torch.zeros(64, 14)
    for x, y in zip(some, (rewards, values), strict=True):
        x[:, tools] = y
    inside = tools.float().expand(64, -1)
    alone = gae_right(rewards, values, torch.ones(64, 8))
    calls = [(f(*some, inside)[:, tools] - alone).abs().mean().item() for f in (gae_tools_wrong, gae_tools)]
    for f in (batch_mean_wrong, batch_mean):
        wide = torch.cat([rewards, rewards], dim=1), torch.cat([valid, torch.zeros(64, 8)], dim=1)
        shares.append((f(*wide) / f(rewards, valid)).item())
    return {
        "change of the advantages by three pads": (*leaks, "reward"),
        "change of the advantages by a tool's output": (*calls, "reward"),
        "loss at twice the width, over the loss": (*shares, ""),
    }


def main() -> None:
    """The table of all of it."""
    torch.set_num_threads(1)
    print(f"{'':56}{'wrong':>12}{'right':>12}")
    for measure in (measure_warm_start, measure_stopping, measure_tensors):
        for what, (wrong, right, unit) in measure().items():
            print(f"{what:56}{wrong:12.4g}{right:12.4g} {unit}")


if __name__ == "__main__":
    main()
