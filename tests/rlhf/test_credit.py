"""Credit for single tokens: against loops, PPO's functions, enumeration, and its own broken copies."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from snippets.rlhf import credit as original
from snippets.rlhf import ppo
from snippets.worlds import exact
from tests.mutation import caught_by, load_mutant

torch.set_num_threads(1)
PATH = "snippets/rlhf/credit.py"
LENGTHS = [9, 1, 0, 5, 2, 7]  # a row without a token and a row of one token among them
SEEDS = [0, 1, 2, 3, 4]


def make_mask(kind="right"):
    lengths, place = torch.tensor(LENGTHS).unsqueeze(-1), torch.arange(9)
    right = (place < lengths).long()
    if kind == "left":
        return (place >= 9 - lengths).long()
    if kind == "holes":  # a tool's output in the middle, say
        return right * torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 1])
    return right


def random(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def valid_places(mask, row):
    return [t for t in range(mask.shape[1]) if mask[row, t]]


# The formulas. Each check takes the module, so that broken copies can be put to it.


def check_token_rewards_in_loops(credit):
    for kind in ("right", "left", "holes"):
        mask, scores, token_kl = make_mask(kind), random(0, 6), random(1, 6, 9)
        rewards = credit.token_rewards(scores, token_kl, mask, beta=0.3)
        for b in range(6):
            places = valid_places(mask, b)
            for t in range(9):
                expected = -0.3 * token_kl[b, t].item() if t in places else 0.0
                expected += scores[b].item() if places and t == places[-1] else 0.0
                assert rewards[b, t].item() == pytest.approx(expected, abs=1e-12)
            if places:
                total = scores[b] - 0.3 * sum(token_kl[b, t] for t in places)
                assert rewards[b].sum().item() == pytest.approx(total.item(), abs=1e-12)
        logps, ref = random(2, 6, 9), random(3, 6, 9)
        found = credit.token_rewards(scores, logps - ref, mask, beta=0.3)
        assert_close(found, ppo.kl_rewards(scores, logps, ref, mask, beta=0.3))


def check_rewards_to_go_in_loops(credit):
    """The sum over the valid tokens from t on, each with gamma to the number of valid tokens in between."""
    for kind in ("right", "left", "holes"):
        mask, rewards = make_mask(kind), random(4, 6, 9)
        for gamma in (1.0, 0.9, 0.5, 0.0):
            found = credit.rewards_to_go(rewards, mask, gamma=gamma)
            start = credit.rewards_to_go(rewards, mask, gamma=gamma, from_start=True)
            assert not found[mask == 0].any() and not start[mask == 0].any()
            for b in range(6):
                places = valid_places(mask, b)
                for i, t in enumerate(places):
                    expected = sum(gamma ** (j - i) * rewards[b, places[j]].item() for j in range(i, len(places)))
                    assert found[b, t].item() == pytest.approx(expected, abs=1e-12)
                    assert start[b, t].item() == pytest.approx(gamma**i * expected, abs=1e-12)


def check_it_is_gae_with_lambda_one_and_no_critic(credit):
    """ppo.gae with values of 0 and lam = 1; and a lambda below 1 without a critic is nothing but a discount."""
    for kind in ("right", "left", "holes"):
        mask, rewards = make_mask(kind), random(5, 6, 9)
        for gamma, lam in ((1.0, 1.0), (0.9, 1.0), (0.9, 0.8), (1.0, 0.0)):
            advantages, _ = ppo.gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=lam)
            assert_close(credit.rewards_to_go(rewards, mask, gamma=gamma * lam), advantages)


def check_whole_return_in_loops(credit):
    for kind in ("right", "left", "holes"):
        mask, rewards = make_mask(kind), random(6, 6, 9)
        found = credit.whole_return(rewards, mask)
        for b in range(6):
            places = valid_places(mask, b)
            total = sum(rewards[b, t].item() for t in places)
            for t in range(9):
                assert found[b, t].item() == pytest.approx(total if t in places else 0.0, abs=1e-12)


def check_even_shares_add_up_to_the_score(credit):
    for kind in ("right", "left", "holes"):
        mask, scores = make_mask(kind), random(7, 6)
        shares = credit.spread_evenly(scores, mask)
        rows = mask.any(-1)
        assert_close(shares.sum(-1)[rows], scores[rows])
        assert not shares[mask == 0].any()
        for b in range(6):
            assert shares[b][mask[b].bool()].unique().numel() <= 1
        whole = credit.whole_return(credit.token_rewards(scores, torch.zeros(6, 9), mask, beta=0.0), mask)
        assert_close(credit.whole_return(shares, mask), whole.to(shares.dtype))


def check_with_one_score_and_gamma_one_all_tokens_weigh_the_same(credit):
    mask, scores = make_mask("holes"), random(8, 6)
    rewards = credit.token_rewards(scores, torch.zeros_like(mask).double(), mask, beta=0.1)
    assert_close(credit.rewards_to_go(rewards, mask), scores.unsqueeze(-1) * mask)
    assert_close(credit.rewards_to_go(rewards, mask), credit.whole_return(rewards, mask))
    # And with the discount that an objective would bring, they still do: gamma^(n - 1) for all of n tokens.
    last = (mask.sum(-1, keepdim=True) - 1).clamp(min=0)
    start = credit.rewards_to_go(rewards, mask, gamma=0.9, from_start=True)
    assert_close(start, 0.9 ** last.double() * scores.unsqueeze(-1) * mask)


def check_the_kl_of_earlier_tokens_drops_out(credit):
    """A penalty on token 1 reaches tokens 0 and 1 of the return-to-go, and all tokens of the whole return."""
    mask, token_kl = torch.ones(1, 4), torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    rewards = credit.token_rewards(torch.zeros(1), token_kl, mask, beta=2.0)
    assert credit.rewards_to_go(rewards, mask).tolist() == [[-2, -2, 0, 0]]
    assert credit.whole_return(rewards, mask).tolist() == [[-2, -2, -2, -2]]


def everything(credit, scores, token_kl, mask):
    rewards = credit.token_rewards(scores, token_kl, mask, beta=0.3)
    return [
        rewards,
        credit.rewards_to_go(rewards, mask, gamma=0.9),
        credit.rewards_to_go(rewards, mask, gamma=0.9, from_start=True),
        credit.whole_return(rewards, mask),
        credit.spread_evenly(scores, mask),
    ]


def check_what_stands_under_the_mask_never_matters(credit):
    for kind in ("right", "left", "holes"):
        mask, scores, token_kl = make_mask(kind), random(9, 6), random(10, 6, 9)
        clean = everything(credit, scores, token_kl, mask)
        for junk in (math.nan, math.inf, -math.inf, 1e30):
            marks = scores.clone()
            marks[2] = junk  # the row without a token
            for found, expected in zip(
                everything(credit, marks, token_kl.masked_fill(mask == 0, junk), mask), clean, strict=True
            ):
                assert_close(found, expected, rtol=0, atol=0)
        for function in (credit.rewards_to_go, credit.whole_return):
            dirty = clean[0].masked_fill(mask == 0, math.nan)
            assert_close(function(dirty, mask), function(clean[0], mask), rtol=0, atol=0)


def check_padding_changes_nothing(credit):
    mask, scores, token_kl = make_mask(), random(11, 6), random(12, 6, 9)
    clean = everything(credit, scores, token_kl, mask)

    def shift(x):  # right-padded to left-padded
        return torch.stack([row.roll(9 - n) for row, n in zip(x, LENGTHS, strict=True)])

    for move in (shift, lambda x: nn.functional.pad(x, (0, 4)), lambda x: nn.functional.pad(x, (3, 2))):
        for found, expected in zip(everything(credit, scores, move(token_kl), move(mask)), clean, strict=True):
            assert_close(found, move(expected))


def check_rows_do_not_touch_each_other(credit):
    mask, scores, token_kl = make_mask("holes"), random(13, 6), random(14, 6, 9)
    whole = everything(credit, scores, token_kl, mask)
    for rows in (slice(0, 2), slice(2, 4), slice(3, 6)):
        part = everything(credit, scores[rows], token_kl[rows], mask[rows])
        for found, expected in zip(part, whole, strict=True):
            assert_close(found, expected[rows])


def check_no_gradient_comes_out(credit):
    for dtype in (torch.float32, torch.float64):
        scores, token_kl = (random(15 + len(shape), *shape, dtype=dtype).requires_grad_() for shape in ((6,), (6, 9)))
        assert not any(x.requires_grad for x in everything(credit, scores, token_kl, make_mask()))
        for function in (credit.rewards_to_go, credit.whole_return):
            assert not function(token_kl, make_mask()).requires_grad


def check_large_numbers_and_half_precision(credit):
    mask = make_mask()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        scores, token_kl = random(18, 6, dtype=dtype), random(19, 6, 9, dtype=dtype)
        for found, full in zip(
            everything(credit, scores, token_kl, mask),
            everything(credit, scores.float(), token_kl.float(), mask),
            strict=True,
        ):
            assert found.dtype == torch.float32
            assert_close(found, full, rtol=0, atol=0)
        for size in (1e4, -1e4):
            huge = everything(credit, torch.full((6,), size).to(dtype), torch.full((6, 9), size).to(dtype), mask)
            assert all(x.isfinite().all() for x in huge)
    assert all(x.dtype == torch.float64 for x in everything(credit, random(18, 6), random(19, 6, 9), mask))


def check_bad_input_is_named(credit):
    mask, scores, x = make_mask(), random(20, 6), random(21, 6, 9)
    bad = x.clone()
    bad[0, 0] = math.nan
    cases = [
        (
            lambda: credit.token_rewards(scores[:5], x, mask, beta=0.1),
            r"scores \(5,\) against mask \(6, 9\); want \(B,\)",
        ),
        (lambda: credit.token_rewards(scores[:1], x, mask, beta=0.1), r"scores \(1,\) against mask \(6, 9\)"),
        (lambda: credit.token_rewards(scores, x[:, :8], mask, beta=0.1), r"token_kl \(6, 8\) against mask \(6, 9\)"),
        (lambda: credit.token_rewards(scores, x, 0 * mask, beta=0.1), r"no valid token: the mask of shape \(6, 9\)"),
        (lambda: credit.token_rewards(scores * math.nan, x, mask, beta=0.1), "scores must be finite, got .*nan"),
        (lambda: credit.token_rewards(scores, bad, mask, beta=0.1), "token_kl must be finite wherever"),
        (lambda: credit.token_rewards(scores, x, mask, beta=-0.1), "beta must be finite and not negative, got -0.1"),
        (lambda: credit.token_rewards(scores, x, mask, beta=math.inf), "got inf"),
        (lambda: credit.rewards_to_go(x[:5], mask), r"rewards \(5, 9\) against mask \(6, 9\)"),
        (lambda: credit.rewards_to_go(x, 0 * mask), r"no valid token: the mask of shape \(6, 9\)"),
        (lambda: credit.rewards_to_go(bad, mask), "rewards must be finite wherever"),
        (lambda: credit.rewards_to_go(x, mask, gamma=1.1), r"gamma must lie in \[0, 1\], got 1.1"),
        (lambda: credit.rewards_to_go(x, mask, gamma=math.nan), r"gamma must lie in \[0, 1\], got nan"),
        (lambda: credit.whole_return(x[:, :1], mask), r"rewards \(6, 1\) against mask \(6, 9\)"),
        (lambda: credit.whole_return(bad, mask), "rewards must be finite wherever"),
        (lambda: credit.spread_evenly(scores[:1], mask), r"scores \(1,\) against mask \(6, 9\)"),
        (lambda: credit.spread_evenly(scores * math.inf, mask), "scores must be finite"),
        (lambda: credit.spread_evenly(scores, 0 * mask), r"no valid token: the mask of shape \(6, 9\)"),
    ]
    for function, message in cases:
        with pytest.raises(ValueError, match=message):
            function()
    assert not credit.token_rewards(torch.zeros(6), x, mask, beta=0.0).any()  # beta = 0: the score alone


# The exact world: expectations by enumeration. Responses of eight tokens, so that a discount has room.


def long_world(seed):
    return exact.make_world(seed, prompts=2, vocab=2, length=8)


def some_policy(world, seed=0, scale=0.7):
    return world.ref_logits + scale * random(seed + 100, *world.ref_logits.shape)


def every_response(world, logits):
    """scores (B,), token_kl, mask (B, T), the weight of each row in an expectation (B,), and where its tokens' logits
    stand: prompts (B, 1) and prefixes (B, T); B = X * Y."""
    logps, ref = (exact.token_logps(world, table.detach()).flatten(0, 1) for table in (logits, world.ref_logits))
    prompts, responses = world.rewards.shape
    rows = torch.arange(prompts).repeat_interleave(responses).unsqueeze(-1)
    weights = logps.sum(-1).exp() / prompts
    return (
        world.rewards.flatten(),
        logps - ref,
        torch.ones_like(ref),
        weights,
        (rows, world.prefixes.repeat(prompts, 1)),
    )


def values(world, logits):
    """(X, N): what comes from each prefix on under the policy, penalty included."""
    scores, token_kl, mask, weights, place = every_response(world, logits)
    togo = original.rewards_to_go(original.token_rewards(scores, token_kl, mask, beta=world.beta), mask)
    total, weight = torch.zeros(2, *world.ref_logits.shape[:2], dtype=torch.float64)
    total.index_put_((place[0].expand_as(togo), place[1]), weights.unsqueeze(-1) * togo, accumulate=True)
    weight.index_put_((place[0].expand_as(togo), place[1]), weights.unsqueeze(-1).expand_as(togo), accumulate=True)
    return total / weight


def with_critic(gamma, lam, critic):
    """GAE's advantages as weights; critic "right": the true values, "zero": none."""

    def weights(credit, world, logits, scores, token_kl, mask, place):
        rewards = credit.token_rewards(scores, token_kl, mask, beta=world.beta)
        table = values(world, logits) if critic == "right" else torch.zeros_like(world.ref_logits[..., 0])
        return ppo.gae(rewards, table[place], mask, gamma=gamma, lam=lam)[0]

    return weights


def from_rewards(function):
    """Weights that need the rewards and the mask only."""

    def weights(credit, world, logits, scores, token_kl, mask, place):
        return function(credit, credit.token_rewards(scores, token_kl, mask, beta=world.beta), mask)

    return weights


def spread_score(credit, world, logits, scores, token_kl, mask, place):
    penalty = credit.token_rewards(torch.zeros_like(scores), token_kl, mask, beta=world.beta)
    return credit.rewards_to_go(credit.spread_evenly(scores, mask) + penalty, mask)


def score_on_every_token(credit, world, logits, scores, token_kl, mask, place):
    return credit.rewards_to_go(scores.unsqueeze(-1) - world.beta * token_kl, mask)


def own_penalty_only(credit, world, logits, scores, token_kl, mask, place):
    return scores.unsqueeze(-1) - world.beta * token_kl


SCHEMES = {
    "whole return": from_rewards(lambda credit, rewards, mask: credit.whole_return(rewards, mask)),
    "reward-to-go": from_rewards(lambda credit, rewards, mask: credit.rewards_to_go(rewards, mask)),
    "reward-to-go, true values as baseline": with_critic(1.0, 1.0, "right"),
    "GAE, λ = 0.95, true values": with_critic(1.0, 0.95, "right"),
    "GAE, λ = 0, true values": with_critic(1.0, 0.0, "right"),
    "GAE, λ = 0.95, a critic of zeros": with_critic(1.0, 0.95, "zero"),
    "γ = 0.99": from_rewards(lambda credit, rewards, mask: credit.rewards_to_go(rewards, mask, gamma=0.99)),
    "γ = 0.9": from_rewards(lambda credit, rewards, mask: credit.rewards_to_go(rewards, mask, gamma=0.9)),
    "score spread evenly": spread_score,
    "score on every token": score_on_every_token,
    "own penalty only": own_penalty_only,
}
UNBIASED = [
    "whole return",
    "reward-to-go",
    "reward-to-go, true values as baseline",
    "GAE, λ = 0.95, true values",
    "GAE, λ = 0, true values",
]


def direction(world, logits, token_weights, weights, place):
    """The sum over all responses of their probability times sum_t weight_t * grad log pi_t, at the logits (X, N, V);
    and the mean square of one response's."""
    tokens = nn.functional.one_hot(world.tokens.repeat(len(world.rewards), 1), world.vocab)
    score = tokens - logits.softmax(-1)[place]  # (B, T, V): grad log pi_t at its prefix's logits
    found = torch.zeros_like(logits)
    each = token_weights.unsqueeze(-1) * score
    found.index_put_((place[0].expand_as(place[1]), place[1]), weights[:, None, None] * each, accumulate=True)
    return found, (weights * (each**2).sum((-1, -2))).sum()


def bias_and_spread(credit, world, logits, scheme, truth=None):
    """Of the gradient from one response to each prompt, relative to the norm of the true one: the norm of its bias and
    the root of its total variance."""
    scores, token_kl, mask, weights, place = every_response(world, logits)
    token_weights = SCHEMES[scheme](credit, world, logits, scores, token_kl, mask, place)
    found, square = direction(world, logits, token_weights, weights, place)
    truth = true_gradient(world, logits) if truth is None else truth
    variance = square / len(world.rewards) - (found**2).sum()
    return ((found - truth).norm() / truth.norm()).item(), (variance.sqrt() / truth.norm()).item()


def true_gradient(world, logits):
    leaf = logits.detach().requires_grad_()
    return torch.autograd.grad(exact.objective(world, leaf), leaf)[0]


def check_unbiased_schemes_have_the_exact_gradient(credit):
    world = exact.make_world(1, prompts=2, vocab=3, length=3, beta=0.7)
    logits = some_policy(world)
    for scheme in SCHEMES:
        bias, _ = bias_and_spread(credit, world, logits, scheme)
        assert (bias < 1e-12) == (scheme in UNBIASED), (scheme, bias)


def discounted_objective(world, logits, gamma):
    """E[sum of gamma^t * r_t] with the penalties in it, by enumeration; with gradient."""
    logps, ref = exact.token_logps(world, logits), exact.token_logps(world, world.ref_logits)
    discount = gamma ** torch.arange(world.length, dtype=torch.float64)
    returns = -world.beta * ((logps - ref) * discount).sum(-1) + discount[-1] * world.rewards
    return (logps.sum(-1).exp() * returns).sum(-1).mean()


def check_the_discount_from_the_start_has_an_objective(credit):
    world = exact.make_world(1, prompts=2, vocab=3, length=3, beta=0.7)
    logits = some_policy(world)
    scores, token_kl, mask, weights, place = every_response(world, logits)
    rewards = credit.token_rewards(scores, token_kl, mask, beta=world.beta)
    leaf = logits.clone().requires_grad_()
    (truth,) = torch.autograd.grad(discounted_objective(world, leaf, 0.8), leaf)
    for from_start, agrees in ((True, True), (False, False)):
        togo = credit.rewards_to_go(rewards, mask, gamma=0.8, from_start=from_start)
        found, _ = direction(world, logits, togo, weights, place)
        assert ((found - truth).abs().max() < 1e-12) == agrees


CHECKS = [function for name, function in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_functions(check):
    check(original)


MISTAKES = {
    "a penalty that pays for drift": ("rewards = -beta *", "rewards = beta *"),
    "no penalty": ("rewards = -beta *", "rewards = -0.0 *"),
    "score on the first token": (
        "torch.where(valid, position, -1).amax(-1, keepdim=True)",
        "torch.where(valid, position, 99).amin(-1, keepdim=True)",
    ),
    "score in the last column": (
        "torch.where(valid, position, -1).amax(-1, keepdim=True)",
        "position[-1:].expand(len(mask), 1)",
    ),
    "score on every token": ("torch.where(valid & (position == last)", "torch.where(valid"),
    "mask as a product": ("torch.where(mask.bool(), x, 0.0)", "x * mask"),
    "dropped mask": ("torch.where(mask.bool(), x, 0.0)", "x + 0.0"),
    "gradient kept": ("else x.detach().float()", "else x.float()"),
    "gradient of the scores kept": ("return scores.detach() if", "return scores if"),
    "half precision kept": ("else x.detach().float()", "else x.detach()"),
    "no discount": ("+ gamma * after", "+ after"),
    "forward instead of backward": ("for t in reversed(range(", "for t in (range("),
    "padding is a step": ("after = torch.where(valid[:, t], here, after)", "after = here"),
    "returns under the mask": ("togo[:, t] = torch.where(valid[:, t], here, 0.0)", "togo[:, t] = here"),
    "start ignored": ("if from_start:", "if False:"),
    "columns counted": ("valid.cumsum(-1) - 1", "torch.ones_like(valid).cumsum(-1) - 1"),
    "one discount too many": ("valid.cumsum(-1) - 1)", "valid.cumsum(-1))"),
    "a mean in place of the return": ('"rewards").sum(-1, keepdim=True)', '"rewards").mean(-1, keepdim=True)'),
    "return under the mask": ("return torch.where(mask.bool(), total, 0.0)", "return total.expand_as(mask)"),
    "shares by columns": ("mask.bool().sum(-1, keepdim=True).clamp(min=1)", "mask.shape[1]"),
    "scores unchecked": ("if scores.shape != mask.shape[:1]", "if False"),
    "gamma unchecked": ("if not 0 <= gamma <= 1", "if False"),
}


def test_no_check_fails_on_the_original():
    assert caught_by(original, CHECKS) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    """Each deliberate mistake makes at least one check fail."""
    mutant = load_mutant(PATH, *MISTAKES[mistake])
    assert any(caught_by(mutant, [check]) for check in CHECKS)


# What each scheme costs and where it leads.


def mean(numbers):
    return sum(numbers) / len(numbers)


def seeds_of(evidence):
    return SEEDS if evidence.full else SEEDS[:1]


@pytest.mark.evidence
def test_bias_and_spread_of_each_scheme(evidence):
    """Responses of eight tokens, away from the reference; all 256 a prompt are enumerated."""
    seeds = seeds_of(evidence)
    found = {scheme: [] for scheme in SCHEMES}
    for seed in seeds:
        world = long_world(seed)
        for scheme in SCHEMES:
            found[scheme].append(bias_and_spread(original, world, some_policy(world, seed), scheme))
    for scheme, pairs in found.items():
        biases, spreads = ([100 * pair[i] for pair in pairs] for i in range(2))
        unbiased = scheme in UNBIASED
        evidence(
            "rlhf/credit",
            f"Bias of the gradient: {scheme}",
            value=mean(biases),
            bar=1e-6 if unbiased else 1.0,
            better="<=" if unbiased else ">",
            unit="% of its norm",
            seeds=seeds,
            spread=biases,
            note="Exact, by enumeration; responses of 8 tokens, β = 0.5.",
        )
        evidence(
            "rlhf/credit",
            f"Spread of one response's gradient: {scheme}",
            value=mean(spreads),
            unit="% of its norm",
            seeds=seeds,
            spread=spreads,
        )
    spread = {scheme: mean([pair[1] for pair in pairs]) for scheme, pairs in found.items()}
    assert spread["GAE, λ = 0, true values"] < spread["reward-to-go, true values as baseline"] < spread["reward-to-go"]


def test_one_action_or_many_is_the_same_in_expectation():
    """REINFORCE on whole responses, with r - beta * log(pi / ref) as the reward of one action, against tokens that each
    get what comes after them: the expected gradients agree, and both are the objective's."""
    for seed in SEEDS:
        world = exact.make_world(seed)
        logits = some_policy(world, seed)
        leaf = logits.clone().requires_grad_()
        logps = exact.response_logps(world, leaf)  # (X, Y): one action each
        returns = (world.rewards - world.beta * (logps - world.ref_logps)).detach()
        (bandit,) = torch.autograd.grad((logps.detach().exp() * returns * logps).sum(-1).mean(), leaf)
        scores, token_kl, mask, weights, place = every_response(world, logits)
        togo = original.rewards_to_go(original.token_rewards(scores, token_kl, mask, beta=world.beta), mask)
        tokens, _ = direction(world, logits, togo, weights, place)
        assert_close(tokens, bandit, rtol=0, atol=1e-12)
        assert_close(tokens, true_gradient(world, logits), rtol=0, atol=1e-12)


def rest(world, *, score, penalty):
    """The policy at which a scheme's expected gradient vanishes, as logits (X, N, V), from the last token backwards. At
    position t of T the score counts score(t, T) times, and the penalty k tokens later penalty(k) times: pi(a|s) ~
    ref(a|s) * exp((score(t, T) * R(s, a) - beta * K(s, a)) / beta), R the expected score, K the penalties to come."""
    ref, T = world.ref_logits.log_softmax(-1), world.length
    reward, levels = world.rewards, []
    later = [torch.zeros_like(world.rewards)]  # [k]: the expected penalty k + 1 tokens after this one, (X, prefixes)

    def by_token(x):
        return x.view(len(x), -1, world.vocab)

    for t in reversed(range(T)):
        first = (world.vocab**t - 1) // (world.vocab - 1)
        to_come = sum(penalty(k + 1) * by_token(nats) for k, nats in enumerate(later))
        prior = ref[:, first : first + world.vocab**t]
        logps = (prior + score(t, T) * by_token(reward) / world.beta - to_come).log_softmax(-1)
        levels.insert(0, logps)
        own = (logps.exp() * (logps - prior)).sum(-1)
        reward, *later = ((logps.exp() * by_token(x)).sum(-1) for x in (reward, *later))
        later.insert(0, own)
    return torch.cat(levels, dim=1)


RESTS = {
    "reward-to-go": {"score": lambda t, T: 1.0, "penalty": lambda k: 1.0},
    "γ = 0.99": {"score": lambda t, T: 0.99 ** (T - 1 - t), "penalty": lambda k: 0.99**k},
    "γ = 0.9": {"score": lambda t, T: 0.9 ** (T - 1 - t), "penalty": lambda k: 0.9**k},
    "score spread evenly": {"score": lambda t, T: (T - t) / T, "penalty": lambda k: 1.0},
    "score on every token": {"score": lambda t, T: T - t, "penalty": lambda k: 1.0},
    "own penalty only": {"score": lambda t, T: 1.0, "penalty": lambda k: 0.0},
}


@pytest.mark.evidence
def test_where_each_scheme_comes_to_rest(evidence):
    """Its expected gradient vanishes at the predicted policy; KL(pi || pi*) there, in five worlds of three tokens."""
    for scheme, how in RESTS.items():
        for seed in seeds_of(evidence):
            world = exact.make_world(seed)
            logits = rest(world, **how)
            scores, token_kl, mask, weights, place = every_response(world, logits)
            token_weights = SCHEMES[scheme](original, world, logits, scores, token_kl, mask, place)
            assert direction(world, logits, token_weights, weights, place)[0].abs().max() < 1e-9, scheme
        away = [abs(exact.distance(exact.make_world(seed), rest(exact.make_world(seed), **how))) for seed in SEEDS]
        right = scheme == "reward-to-go"
        evidence(
            "rlhf/credit",
            f"KL(π‖π*) at rest: {scheme}",
            value=mean(away),
            bar=1e-9 if right else 1e-5,
            better="<=" if right else ">",
            unit="nats",
            seeds=SEEDS,
            spread=away,
            note="The policy where the exact expected gradient is zero; responses of 3 tokens, β = 0.5.",
        )


def learn(scheme, seed, steps, group=16):
    """exact.optimise with a scheme's weights, less their mean over the other responses of the prompt at each place."""
    world = exact.make_world(seed)

    def loss(logps, samples):
        scores = samples.rewards.flatten()
        token_kl, mask, place = samples.old_logps - samples.ref_logps, samples.mask, (samples.rows, samples.prefixes)
        weights = SCHEMES[scheme](original, world, None, scores, token_kl, mask, place)
        grouped = weights.view(-1, group, weights.shape[-1])
        advantages = (grouped - grouped.mean(1, keepdim=True)) * group / (group - 1)
        return -(advantages.flatten(0, 1) * logps).sum(-1).mean()

    return world, *exact.optimise(world, loss, steps=steps, group=group, seed=seed)


@pytest.mark.evidence
@pytest.mark.parametrize("scheme", ["whole return", "reward-to-go", "γ = 0.9", "score spread evenly"])
def test_sampled_runs_go_there(evidence, scheme):
    """16 responses a prompt, 2,000 steps of Adam."""
    seeds, ends = seeds_of(evidence), []
    for seed in seeds:
        world, logits, _ = learn(scheme, seed, 2000 if evidence.full else 800)
        goal = exact.response_logps(world, rest(world, **RESTS.get(scheme, RESTS["reward-to-go"])))
        ends.append(exact.kl(exact.response_logps(world, logits), goal).mean().item())
    evidence(
        "rlhf/credit",
        f"KL from a sampled run to its predicted rest: {scheme}",
        value=mean(ends),
        bar=0.05,
        unit="nats",
        seeds=seeds,
        spread=ends,
        note="16 responses a prompt, 2,000 steps, the mean of the others at each place as baseline.",
    )


def spread_at_optimum(world, scheme, baseline):
    """The root mean square of what is left of a scheme's weights at pi* after a baseline: the best one that knows the
    prompt alone, the prompt and the place, or the prefix."""
    logits = exact.logits_of(world, exact.optimal_policy(world.ref_logps, world.rewards, world.beta))
    scores, token_kl, mask, weights, place = every_response(world, logits)
    token_weights = SCHEMES[scheme](original, world, logits, scores, token_kl, mask, place).view(4, 125, 3)
    probs = weights.view(4, 125, 1) * 4
    if baseline == "prompt and place":
        left = token_weights - (probs * token_weights).sum(1, keepdim=True)
    elif baseline == "prompt":
        left = token_weights - (probs * token_weights).sum((1, 2), keepdim=True) / 3
    else:
        left = token_weights - values(world, logits)[place].view(4, 125, 3)
    return (probs * left**2).sum((1, 2)).mean().div(3).sqrt().item()


@pytest.mark.evidence
def test_at_the_optimum_the_whole_return_has_no_noise(evidence):
    """There every response has the return beta * log Z(x). With one baseline a prompt nothing is left of it, while the
    return-to-go still differs from prefix to prefix and wants a baseline that knows the prefix."""
    for scheme, baseline, bar in (
        ("whole return", "prompt", 1e-9),
        ("reward-to-go", "prompt and place", None),
        ("reward-to-go", "prefix", 1e-9),
    ):
        spread = [spread_at_optimum(exact.make_world(seed), scheme, baseline) for seed in SEEDS]
        evidence(
            "rlhf/credit",
            f"Noise left at π*: {scheme}, a baseline for each {baseline}",
            value=mean(spread),
            bar=bar,
            unit="reward",
            seeds=SEEDS,
            spread=spread,
            note="Root mean square of a token's weight after the baseline, by enumeration.",
        )
    assert mean([spread_at_optimum(exact.make_world(s), "reward-to-go", "prompt and place") for s in SEEDS]) > 0.1


# What a discount does.


def with_ends(seed, reward):
    """Responses of up to eight tokens over {0, 1}, of which 0 is the EOS and rare; every response has the same reward.
    -> the world, and the mask (Y, T) of the tokens up to the first EOS."""
    world = exact.make_world(seed, prompts=2, vocab=2, length=8, beta=0.1)
    ref_logits = world.ref_logits.clone()
    ref_logits[..., 0] -= 2.0
    ended = (world.tokens == 0).cumsum(-1)
    mask = ((ended == 0) | ((ended == 1) & (world.tokens == 0))).long()
    return exact.World(ref_logits, torch.full_like(world.rewards, reward), world.beta, 2, 8), mask


def length_rest(world, gamma):
    """The resting policy where the score comes at the first 0 or at the last column: soft values, discounted a step."""
    ref, levels = world.ref_logits.log_softmax(-1), []
    score = world.rewards[0, 0].item()
    value = torch.full((len(ref), 2**world.length), score, dtype=torch.float64)  # after the last column
    for t in reversed(range(world.length)):
        q = value.view(len(ref), -1, 2) * (gamma if t < world.length - 1 else 1.0)
        q = torch.stack([torch.full_like(q[..., 0], score), q[..., 1]], -1)  # 0 ends the response, and is scored
        prior = ref[:, 2**t - 1 : 2 ** (t + 1) - 1]
        levels.insert(0, (prior + q / world.beta).log_softmax(-1))
        value = world.beta * (prior + q / world.beta).logsumexp(-1)
    return torch.cat(levels, dim=1)


def mean_length(world, mask, logits):
    probs = exact.response_logps(world, logits).exp()
    return (probs * mask.sum(-1)).sum(-1).mean().item()


@pytest.mark.evidence
@pytest.mark.parametrize("reward", [1.0, -1.0])
def test_a_discount_buys_short_answers_where_the_score_is_positive(evidence, reward):
    """All responses have the same score, so there is nothing to learn, and with gamma = 1 nothing is. A discount makes
    a positive score come sooner and a negative one later."""
    found = {"the reference": [], "1": [], "0.9": []}
    for seed in SEEDS:
        world, mask = with_ends(seed, reward)
        found["the reference"].append(mean_length(world, mask, world.ref_logits))
        for gamma in (1.0, 0.9):
            logits = length_rest(world, gamma)
            found[f"{gamma:g}"].append(mean_length(world, mask, logits))
            scores, token_kl, _, weights, place = every_response(world, logits)
            rows = mask.repeat(2, 1)
            rewards = original.token_rewards(scores, token_kl, rows, beta=world.beta)
            togo = original.rewards_to_go(rewards, rows, gamma=gamma)
            assert direction(world, logits, togo, weights, place)[0].abs().max() < 1e-9
    for name, lengths in found.items():
        evidence(
            "rlhf/credit",
            f"Mean length where every response scores {reward:+g}, "
            + (name if name == "the reference" else f"trained with γ = {name}"),
            value=mean(lengths),
            unit="tokens",
            seeds=SEEDS,
            spread=lengths,
            note="At most 8 tokens; the policy where the exact expected gradient is zero, β = 0.1.",
        )
    assert found["1"] == pytest.approx(found["the reference"], abs=1e-9)
    for short, long in zip(found["0.9"], found["1"], strict=True):
        assert (short < long - 0.3) == (reward > 0) and (short > long + 0.3) == (reward < 0)


def jacobian_asymmetry(gamma, from_start):
    """|J - J^T| / |J| of the expected update as a function of the logits; 0 for the gradient of anything."""
    world = exact.make_world(2, prompts=1, vocab=3, length=2)
    mask = torch.ones(9, 2)
    rewards = original.token_rewards(world.rewards.flatten(), torch.zeros(9, 2).double(), mask, beta=0.0)
    togo = original.rewards_to_go(rewards, mask, gamma=gamma, from_start=from_start)

    def update(flat):
        logits = flat.view_as(world.ref_logits)
        probs = exact.response_logps(world, logits).exp().flatten()
        score = nn.functional.one_hot(world.tokens, 3) - logits.softmax(-1)[0, world.prefixes]
        each = (probs[:, None] * togo).unsqueeze(-1) * score  # (Y, T, V)
        return torch.zeros(4, 3, dtype=flat.dtype).index_put((world.prefixes,), each, accumulate=True).flatten()

    jacobian = torch.autograd.functional.jacobian(update, some_policy(world).flatten())
    return ((jacobian - jacobian.T).norm() / jacobian.norm()).item()


@pytest.mark.evidence
def test_the_customary_discount_is_the_gradient_of_nothing(evidence):
    """A gradient's Jacobian is symmetric. That of the update with gamma < 1 and without gamma^t is not."""
    assert jacobian_asymmetry(1.0, False) < 1e-12
    assert jacobian_asymmetry(0.5, True) < 1e-12
    value = jacobian_asymmetry(0.5, False)
    evidence(
        "rlhf/credit",
        "Asymmetry of the update's Jacobian, γ = 0.5 without the factor γ^t",
        value=100 * value,
        bar=1.0,
        better=">",
        unit="% of its norm",
        seeds=[2],
        note="0 with γ = 1, and with the factor: those are gradients. Responses of two tokens, the score alone.",
    )


def test_equal_returns_are_not_equal_credit():
    """With gamma = 1 two tokens of one response have the same return and another advantage: what a token changed. In a
    world where the last token alone decides the score, earlier ones get the advantage 0."""
    world = exact.make_world(0)
    last = world.tokens[:, -1].double()
    world = exact.World(world.ref_logits, last.expand_as(world.rewards).contiguous(), world.beta, 5, 3)
    even = torch.zeros_like(world.ref_logits)  # uniform, so that no token tells what the last will be
    scores, token_kl, mask, _, place = every_response(world, even)
    rewards = original.token_rewards(scores, 0 * token_kl, mask, beta=0.0)
    returns = original.rewards_to_go(rewards, mask)
    assert_close(returns, scores.unsqueeze(-1).expand_as(returns))
    advantages, _ = ppo.gae(rewards, torch.full_like(rewards, 2.0), mask, lam=0.0)  # 2: the mean of 0 to 4
    assert advantages[:, :2].abs().max() < 1e-12
    assert_close(advantages[:, 2], scores - 2.0)
