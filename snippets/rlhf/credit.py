"""Credit: how one score for a whole response becomes a weight for each of its tokens.

The score is the reward of the last token, the KL penalty one for each token (Ouyang et al. 2022,
arXiv:2203.02155, equation 2), and a token's weight in the policy gradient is what comes from it on
(Sutton et al. 1999; Williams 1992). Discounts that leave out gamma^t: Nota and Thomas 2019
(arXiv:1906.07073).

A row is one response, `mask` (B, T) is 1 on its tokens, the EOS included, and 0 elsewhere; what
stands under a 0, NaN included, has no influence. Nothing here has a gradient: these are weights for
log pi, as in -(weights * logps).sum(-1).mean().

    python -m snippets.rlhf.credit
"""

import math

import torch
from torch import Tensor


def _valid(mask: Tensor, x: Tensor, name: str) -> Tensor:
    """x (B, T) without gradient, in float32 at least, 0 under a 0 of the mask; ValueError where
    shapes disagree, nothing is valid, or a valid entry is not finite."""
    if x.shape != mask.shape:
        raise ValueError(
            f"shapes disagree: {name} {tuple(x.shape)} against mask {tuple(mask.shape)}"
        )
    if not mask.any():
        raise ValueError(f"no valid token: the mask of shape {tuple(mask.shape)} is all zeros")
    x = x.detach() if x.dtype == torch.float64 else x.detach().float()
    x = torch.where(mask.bool(), x, 0.0)  # not a product: NaN * 0 is NaN
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} must be finite wherever the mask is 1")
    return x


def _scores(scores: Tensor, mask: Tensor) -> Tensor:
    """scores (B,) without gradient, in float32 at least; ValueError on another shape, and on a
    score that is not finite in a row with a token."""
    if scores.shape != mask.shape[:1]:
        raise ValueError(
            f"shapes disagree: scores {tuple(scores.shape)} against mask {tuple(mask.shape)}; "
            "want (B,)"
        )
    if not torch.isfinite(scores[mask.bool().any(-1)]).all():
        raise ValueError(f"scores must be finite, got {scores.tolist()}")
    return scores.detach() if scores.dtype == torch.float64 else scores.detach().float()


def token_rewards(scores: Tensor, token_kl: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    """The rewards of an episode whose steps are tokens: the score on the last valid token, and
    -beta * (log pi - log pi_ref) on every one.

    scores (B,), token_kl = log pi - log pi_ref of the sampled tokens (B, T) in nats, mask (B, T) ->
    (B, T), in units of the score. A row sums to r(x, y) - beta * log(pi(y|x) / pi_ref(y|x)). A row
    without a token has no step that its score could reward: zeros. Raises ValueError on shapes that
    disagree, an empty mask, a score or token_kl that is not finite, beta < 0.
    """
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be finite and not negative, got {beta}")
    rewards = -beta * _valid(mask, token_kl, "token_kl")  # (B, T)
    scores = _scores(scores, mask)
    # The last token knows the whole response. A score on an earlier one would be a reward that
    # depends on tokens still to come, and rewards_to_go would withhold it from them.
    position, valid = torch.arange(mask.shape[1], device=mask.device), mask.bool()
    last = torch.where(valid, position, -1).amax(-1, keepdim=True)  # (B, 1)
    return rewards + torch.where(valid & (position == last), scores[:, None], 0.0)


def rewards_to_go(
    rewards: Tensor, mask: Tensor, *, gamma: float = 1.0, from_start: bool = False
) -> Tensor:
    """What comes from each token on: G_t = r_t + gamma * G_(t+1).

    rewards, mask (B, T) -> (B, T), 0 under a 0 of the mask; a masked position is stepped over and
    takes no discount. gamma = 1: the weights of the exact policy gradient of E[sum of rewards], if
    each reward depends on no later token. gamma < 1 is another aim. The gradient of E[sum of
    gamma^t * r_t] has the weights gamma^t * G_t: from_start=True. Without that factor, the custom,
    the weights belong to no objective (Nota and Thomas 2019). Raises ValueError on shapes that
    disagree, an empty mask, a reward that is not finite, gamma outside [0, 1].
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
    rewards, valid = _valid(mask, rewards, "rewards"), mask.bool()
    togo = torch.zeros_like(rewards)
    after = torch.zeros_like(rewards[:, 0])  # (B,): nothing comes after the end
    for t in reversed(range(rewards.shape[1])):
        here = rewards[:, t] + gamma * after
        togo[:, t] = torch.where(valid[:, t], here, 0.0)
        after = torch.where(valid[:, t], here, after)
    if from_start:
        t = (valid.cumsum(-1) - 1).clamp(min=0)  # counts valid tokens
        togo = togo * gamma ** t.to(togo.dtype)
    return togo


def whole_return(rewards: Tensor, mask: Tensor) -> Tensor:
    """The response as one action: every token gets the sum of its row's rewards.

    rewards, mask (B, T) -> (B, T), 0 under a 0 of the mask. The same expected gradient as
    `rewards_to_go` with gamma = 1: a reward that lies before a token is known when the token is
    drawn, so it adds noise and no mean. Raises ValueError as `rewards_to_go`.
    """
    total = _valid(mask, rewards, "rewards").sum(-1, keepdim=True)  # (B, 1)
    return torch.where(mask.bool(), total, 0.0)


def spread_evenly(scores: Tensor, mask: Tensor) -> Tensor:
    """WRONG as rewards of single tokens: an equal share of the score for each, (B,) -> (B, T).

    A share on token k depends on the tokens after k, which rewards_to_go then does not credit with
    it: the last of n tokens is left with score / n. With whole_return it does no harm, and no good.
    Raises ValueError on shapes that disagree, an empty mask, a score that is not finite.
    """
    scores = _scores(scores, mask)
    shares = scores[:, None] / mask.bool().sum(-1, keepdim=True).clamp(min=1)  # (B, 1)
    return _valid(mask, shares.expand(mask.shape), "scores")


def main() -> None:
    """The demo: the weights that one response of six tokens gets, score 1 and beta 0.1."""
    mask, scores = torch.ones(1, 6), torch.ones(1)
    token_kl = torch.tensor([[0.0, 2.0, 0.0, 0.0, 1.0, 0.0]])
    rewards = token_rewards(scores, token_kl, mask, beta=0.1)
    rows = {
        "rewards": rewards,
        "whole return": whole_return(rewards, mask),
        "reward-to-go": rewards_to_go(rewards, mask),
        "gamma 0.9": rewards_to_go(rewards, mask, gamma=0.9),
        "gamma 0.9 from the start": rewards_to_go(rewards, mask, gamma=0.9, from_start=True),
        "score spread evenly": rewards_to_go(spread_evenly(scores, mask), mask),
    }
    for name, row in rows.items():
        print(f"{name:25s}", "  ".join(f"{x:6.3f}" for x in row[0].tolist()))


if __name__ == "__main__":
    main()
