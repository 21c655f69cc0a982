"""The token MDP: against enumeration of whole responses, closed forms, and its own broken copies."""

import itertools
import math
from statistics import mean, median

import pytest
import torch
from torch.testing import assert_close

from snippets.foundations import from_rl_to_rlhf as original
from snippets.worlds import exact, mdps
from tests.mutation import caught_by, load_mutant

torch.set_num_threads(1)
PATH = "snippets/foundations/from_rl_to_rlhf.py"
SEEDS = [0, 1, 2, 3, 4]
LENGTHS = [1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 18, 20]
STARTS = {"uniform": 1 / 8, "60% a token": 0.6, "80% a token": 0.8}
GAMMAS = [1.0, 0.99, 0.97, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5]


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def policy_of(world, seed=7):
    """A random policy: logits (X, N, V) of the exact world, and (S, V) of the token MDP, uniform in the last state."""
    generator = torch.Generator().manual_seed(seed)
    logits = world.ref_logits + torch.randn(world.ref_logits.shape, generator=generator, dtype=torch.float64)
    return logits, table(logits)


def table(logits):
    """(X, N, V) -> log-probabilities (X * N + 1, V), with a row for the terminal state."""
    rows = logits.log_softmax(-1).flatten(0, 1)
    return torch.cat([rows, torch.full_like(rows[:1], -math.log(rows.shape[1]))])


def world_and_mdp(module, seed=0, **shape):
    world = exact.make_world(seed, **shape)
    return world, module.token_mdp(world.rewards, vocab=world.vocab, length=world.length)


def walk(mdp, state, tokens):
    """The rewards and the last state of a sequence of tokens; every step has one successor."""
    paid = []
    for token in tokens:
        after = mdp["transitions"][state, token].argmax().item()
        assert mdp["transitions"][state, token, after] == 1
        paid.append(mdp["rewards"][state, token, after].item())
        state = after
    return paid, state


# The checks. Each takes the module, so that broken copies can be put to it.


def check_the_fields_make_an_mdp(module):
    for shape in ({"prompts": 2, "vocab": 3, "length": 2}, {"prompts": 3, "vocab": 2, "length": 4}):
        world, fields = world_and_mdp(module, **shape)
        mdp = mdps.MDP(**fields)
        assert mdp.transitions.shape[0] == world.ref_logits.shape[:2].numel() + 1
        assert ((mdp.transitions == 0) | (mdp.transitions == 1)).all()
        assert mdp.terminal.tolist() == [False] * (len(mdp.start) - 1) + [True]
        empty = [x * world.ref_logits.shape[1] for x in range(len(world.rewards))]
        assert mdp.start.nonzero().flatten().tolist() == empty
        assert mdp.transitions.dtype == torch.float64


def check_every_response_pays_its_score_at_the_end(module):
    world, mdp = world_and_mdp(module, prompts=2, vocab=3, length=3)
    for x in range(2):
        for number, tokens in enumerate(itertools.product(range(3), repeat=3)):
            paid, state = walk(mdp, x * 13, tokens)
            assert paid == [0, 0, world.rewards[x, number].item()] and state == 26


def check_an_eos_ends_a_response(module):
    """The score of what is cut off there is that of the prefix filled up with eos."""
    for eos in (0, 2):
        rewards = torch.arange(27, dtype=torch.float64)[None] + 1
        mdp = module.token_mdp(rewards, vocab=3, length=3, eos=eos)
        for tokens in itertools.product(range(3), repeat=3):
            cut = list(tokens[: tokens.index(eos) + 1]) if eos in tokens else list(tokens)
            filled = cut + [eos] * (3 - len(cut))
            paid, state = walk(mdp, 0, cut)
            assert sum(paid) == paid[-1] == filled[0] * 9 + filled[1] * 3 + filled[2] + 1
            assert state == 13
        mdps.MDP(**mdp)


def check_the_smallest_cases(module):
    """Responses of one token are a bandit; batches of two have a baseline."""
    mdp = module.token_mdp(torch.arange(6).view(2, 3).double(), vocab=3, length=1)
    assert mdp["rewards"].sum(-1).tolist() == [[0, 1, 2], [3, 4, 5], [0, 0, 0]]
    chances, _ = module.reinforce(
        biased(3, 1, 0.5), steps=20, batch=2, lr=1.0, generator=torch.Generator().manual_seed(0)
    )
    assert chances.shape == (21, 3) and chances[-1].min() > 0.5


def check_values_are_sums_over_responses(module):
    for seed in SEEDS[:2]:
        world, mdp = world_and_mdp(module, seed)
        logits, logps = policy_of(world, seed)
        values, q_values = module.evaluate(mdp["transitions"], mdp["rewards"], logps.exp(), horizon=3)
        probs = exact.response_logps(world, logits).exp()
        assert_close(values[:-1:31], (probs * world.rewards).sum(-1))
        for t in range(3):  # the mean over the responses that begin with a prefix and a token
            shape = (4, 5**t, 5, -1)
            weights, scores = probs.view(shape), world.rewards.view(shape)
            first = (5**t - 1) // 4
            found = q_values[:-1].view(4, 31, 5)[:, first : first + 5**t]
            assert_close(found, (weights * scores).sum(-1) / weights.sum(-1))
        assert values[-1] == 0


def check_the_optimum_is_the_best_response(module):
    world, mdp = world_and_mdp(module, 3)
    values, q_values, logps = module.optimise(mdp["transitions"], mdp["rewards"], horizon=3)
    assert_close(values[:-1:31], world.rewards.amax(-1))
    assert_close(q_values.amax(-1), values)
    probs = exact.response_logps(world, logps[:-1].exp().clamp(min=1e-300).log().view(4, 31, 5)).exp()
    assert probs.argmax(-1).tolist() == world.rewards.argmax(-1).tolist()
    assert_close(probs.amax(-1), torch.ones(4, dtype=torch.float64))


def check_the_soft_optimum_is_that_of_rlhf(module):
    for seed in SEEDS[:2]:
        world, mdp = world_and_mdp(module, seed)
        values, _, logps = module.optimise(
            mdp["transitions"], mdp["rewards"], horizon=3, ref_logps=table(world.ref_logits), beta=world.beta
        )
        goal = exact.optimal_policy(world.ref_logps, world.rewards, world.beta)
        assert_close(exact.response_logps(world, logps[:-1].view(4, 31, 5)), goal)
        assert_close(logps.exp().sum(-1), torch.ones(125, dtype=torch.float64))
        known = world.beta * (world.ref_logps + world.rewards / world.beta).logsumexp(-1)
        assert_close(values[:-1:31], known)


def check_three_ways_to_one_gradient(module):
    """Policy gradient theorem over states; one action a response; and autograd of the sum over responses."""
    for seed in SEEDS[:2]:
        world, mdp = world_and_mdp(module, seed)
        logits, logps = policy_of(world, seed)
        args = (mdp["transitions"], mdp["rewards"], logps.exp())
        _, q_values = module.evaluate(*args, horizon=3)
        found = module.policy_gradient(args[0], mdp["start"], args[2], q_values, horizon=3)
        leaf = logits.clone().requires_grad_()
        probs = exact.response_logps(world, leaf).exp()
        (truth,) = torch.autograd.grad((probs * world.rewards).sum(-1).mean(), leaf)
        assert_close(found[:-1].view(4, 31, 5), truth)
        assert found[-1].abs().max() < 1e-12
        score = probs.detach() * world.rewards * exact.response_logps(world, leaf)
        (bandit,) = torch.autograd.grad(score.sum(-1).mean(), leaf)
        assert_close(bandit, truth)


def check_a_discount_counts_the_tokens(module):
    world, mdp = world_and_mdp(module, 1)
    logits, logps = policy_of(world)
    for gamma in (0.9, 0.5, 0.0):
        values, _ = module.evaluate(mdp["transitions"], mdp["rewards"], logps.exp(), horizon=3, gamma=gamma)
        plain = (exact.response_logps(world, logits).exp() * world.rewards).sum(-1)
        assert_close(values[:-1:31], gamma**2 * plain)
        best, _, _ = module.optimise(mdp["transitions"], mdp["rewards"], horizon=3, gamma=gamma)
        assert_close(best[:-1:31], gamma**2 * world.rewards.amax(-1).clamp(min=0 if gamma == 0 else -9))


def quality(seed, most=8):
    """A score that grows with every word, from 0.1 to 1, by random steps, (most + 1,)."""
    steps = torch.rand(most, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).sort(descending=True)
    return 0.1 + 0.9 * torch.cat([tensor(0.0), steps.values.cumsum(0) / steps.values.sum()])


def best_length(module, scores, gamma):
    """The words of the best answer, from the optimal policy of the token MDP with an EOS (token 0)."""
    most = len(scores) - 1
    rewards = torch.full((1, 2**most), -1.0, dtype=torch.float64)
    for words in range(most + 1):
        rewards[0, 2**most - 2 ** (most - words)] = scores[words]
    mdp = module.token_mdp(rewards, vocab=2, length=most, eos=0)
    _, _, logps = module.optimise(mdp["transitions"], mdp["rewards"], horizon=most, gamma=gamma)
    words, state = 0, 0
    while words < most and logps[state, 1] == 0:
        words, state = words + 1, 2 * state + 2
    return words


def check_a_discount_shortens_the_best_answer(module):
    """Against the maximum of gamma^(tokens - 1) * score; the EOS is a token, and a full answer needs none."""
    for gamma in (1.0, 0.95, 0.8, 0.5):
        scores = quality(0, most=5)
        worth = [gamma ** min(words, 4) * scores[words].item() for words in range(6)]
        assert best_length(module, scores, gamma) == max(range(6), key=lambda n: worth[n])


def check_the_chance_of_a_hit(module):
    assert module.expected_tries(8.0**-5) == 8**5 and module.expected_tries(1.0) == 1
    assert module.chance_of_any(0.5, 3) == pytest.approx(0.875)
    assert module.chance_of_any(0.3, 0) == 0 and module.chance_of_any(0.0, 10) == 0
    assert module.chance_of_any(1e-20, 1000) == pytest.approx(1e-17, rel=1e-9, abs=0)
    assert module.chance_of_any(2.0**-20, 2**20) == pytest.approx(1 - math.exp(-1), rel=1e-6)


def biased(runs, length, right, vocab=8):
    """Logits (R, T, V) at which each right token, 0, has the chance `right` and the others share the rest."""
    logits = torch.zeros(runs, length, vocab, dtype=torch.float64)
    logits[..., 0] = math.log(right * (vocab - 1) / (1 - right))
    return logits


def check_one_step_of_reinforce_is_the_gradient(module):
    """The mean of 4,000 runs' first step against p * (one-hot - pi), by a z-test on each logit."""
    logits = biased(4000, 2, 0.4, vocab=3)
    seen = {}
    for lr in (1.0, 2.0):
        generator = torch.Generator().manual_seed(0)
        chances, _ = module.reinforce(logits, steps=1, batch=4, lr=lr, generator=generator)
        assert_close(chances[0], torch.full((4000,), 0.16, dtype=torch.float64))
        seen[lr] = chances[1]
    # The step moves log pi(right) by lr * |g|^2 to first order; |g|^2 = p^2 * 2 * (0.6^2 + 2 * 0.3^2).
    small = module.reinforce(logits, steps=1, batch=4, lr=0.001, generator=torch.Generator().manual_seed(1))[0]
    moved = (small[1].log() - small[0].log()) / 0.001
    expected = 0.16 * 2 * (0.6**2 + 2 * 0.3**2)
    z = (moved.mean() - expected) / (moved.std() / math.sqrt(4000))
    assert abs(z) < 4
    assert (seen[2.0] >= seen[1.0] - 1e-12).double().mean() > 0.9


def check_one_step_of_reinforce_by_loops(module):
    """Three runs of different logits, the same draws: run by run and token by token, with the others' mean."""
    logits = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    logits[..., 0] += 1.0
    flat = logits.softmax(-1).flatten(0, 1)
    drawn = torch.multinomial(flat, 8, replacement=True, generator=torch.Generator().manual_seed(3))
    expected = logits.clone()
    for run in range(3):
        scores = [float((drawn[2 * run : 2 * run + 2, b] == 0).all()) for b in range(8)]
        for b in range(8):
            advantage = scores[b] - (sum(scores) - scores[b]) / 7
            for t in range(2):
                one_hot = torch.nn.functional.one_hot(drawn[2 * run + t, b], 4)
                expected[run, t] += 0.5 / 8 * advantage * (one_hot - flat[2 * run + t])
    chances, _ = module.reinforce(logits, steps=1, batch=8, lr=0.5, generator=torch.Generator().manual_seed(3))
    assert_close(chances, torch.stack([x.softmax(-1)[..., 0].prod(-1) for x in (logits, expected)]))
    assert (chances[1] != chances[0]).any()


def check_the_first_reward_is_geometric(module):
    """Batches of 16 at p = 1 / 64, with no learning until the first hit: the mean step, by a z-test."""
    generator = torch.Generator().manual_seed(2)
    _, first = module.reinforce(biased(2000, 2, 1 / 8), steps=60, batch=16, lr=0.0, generator=generator)
    hit = module.chance_of_any(1 / 64, 16)
    truncated = sum((1 - hit) ** k for k in range(1, 61))  # E[min(geometric, 60)]
    z = (first.double().mean() - truncated) / (first.double().std() / math.sqrt(2000))
    assert abs(z) < 4
    none = torch.full((3, 2, 4), 0.0, dtype=torch.float64)
    none[..., 0] = -1e9
    chances, first = module.reinforce(none, steps=5, batch=8, lr=1.0, generator=generator)
    assert first.tolist() == [5, 5, 5] and not chances.any()


def check_bad_input_is_named(module):
    rewards, mdp = torch.zeros(2, 9), module.token_mdp(torch.zeros(2, 9), vocab=3, length=2)
    cases = [
        (lambda: module.token_mdp(rewards, vocab=3, length=3), r"\(2, 9\) of torch.float32, want \(X, 27\)"),
        (lambda: module.token_mdp(rewards[0], vocab=3, length=2), r"\(9,\)"),
        (lambda: module.token_mdp(rewards, vocab=1, length=2), "vocab >= 2"),
        (lambda: module.token_mdp(rewards, vocab=3, length=0), "length >= 1"),
        (lambda: module.token_mdp(rewards, vocab=3, length=2, eos=3), "eos in it"),
        (lambda: module.evaluate(mdp["transitions"], mdp["rewards"], torch.ones(9, 2), horizon=2), r"\(9, 2\)"),
        (lambda: module.evaluate(mdp["transitions"], rewards, torch.ones(9, 3), horizon=2), r"\(2, 9\)"),
        (lambda: module.evaluate(mdp["transitions"], mdp["rewards"], torch.ones(9, 3), horizon=0), "horizon 0"),
        (lambda: module.optimise(mdp["transitions"], mdp["rewards"], horizon=0), "horizon 0"),
        (
            lambda: module.optimise(
                mdp["transitions"], mdp["rewards"], horizon=2, beta=1.0, ref_logps=torch.zeros(9, 2)
            ),
            "want horizon >= 1",
        ),
        (lambda: module.token_mdp(rewards.long(), vocab=3, length=2), "torch.int64, want"),
        (lambda: module.optimise(mdp["transitions"], mdp["rewards"], horizon=2, beta=-1.0), "beta -1.0"),
        (lambda: module.optimise(mdp["transitions"], mdp["rewards"], horizon=2, beta=1.0), "ref_logps"),
        (
            lambda: module.policy_gradient(
                mdp["transitions"], mdp["start"], torch.ones(9, 3), torch.ones(9, 2), horizon=2
            ),
            r"\(9, 2\)",
        ),
        (lambda: module.expected_tries(0.0), "got 0.0"),
        (lambda: module.expected_tries(1.5), "got 1.5"),
        (lambda: module.chance_of_any(1.0, 3), "got 1.0, 3"),
        (lambda: module.chance_of_any(0.5, -1), "got 0.5, -1"),
        (lambda: module.reinforce(rewards, steps=1, batch=2, lr=1.0, generator=None), r"\(2, 9\), 2"),
        (lambda: module.reinforce(torch.zeros(1, 1, 2), steps=1, batch=1, lr=1.0, generator=None), "batch >= 2"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]

MISTAKES = {
    "the score on the first token": ("if t == length - 1 or token == eos:", "if t == 0 or token == eos:"),
    "the eos is a word": ("if t == length - 1 or token == eos:", "if t == length - 1:"),
    "after an eos filled with zeros": ("after = after * vocab + token  # filled", "after = after * vocab  # filled"),
    "all prompts read the first one's scores": ("= rewards[x, after]", "= rewards[0, after]"),
    "the start not divided by the prompts": ("= 1 / len(rewards)  # the empty", "= 1.0  # the empty"),
    "prompts share their prefixes": ("state = x * prefixes + first + number", "state = first + number"),
    "the next prefix one too far": ("first + vocab**t + after] = 1.0", "first + vocab**t + after + 1] = 1.0"),
    "no max": ("else q_values.amax(-1)", "else q_values.mean(-1)"),
    "the discount on the reward too": (
        "        q_values = (transitions * (rewards + gamma * values)).sum(-1)  # (S, A)\n        values = (policy",
        "        q_values = (transitions * gamma * (rewards + values)).sum(-1)  # (S, A)\n        values = (policy",
    ),
    "no discount in the optimum": (
        "        q_values = (transitions * (rewards + gamma * values)).sum(-1)  # (S, A)\n        values = beta",
        "        q_values = (transitions * (rewards + values)).sum(-1)  # (S, A)\n        values = beta",
    ),
    "no reference": ("beta * (ref_logps + q_values / beta).logsumexp(-1)", "beta * (q_values / beta).logsumexp(-1)"),
    "beta upside down": ("(q_values - values[:, None]) / beta", "(q_values - values[:, None]) * beta"),
    "values not subtracted": ("(q_values - values[:, None]) / beta", "q_values / beta"),
    "no visits": ("return visits[:, None] * policy * advantages", "return policy * advantages"),
    "Q in the place of the advantage": ("= q_values - (policy * q_values).sum(-1, keepdim=True)", "= q_values"),
    "visits one step late": (
        "        visits = visits + here\n        here = torch.einsum(\"s,sa,sat->t\", here, policy, transitions)",
        "        here = torch.einsum(\"s,sa,sat->t\", here, policy, transitions)\n        visits = visits + here",
    ),
    "1 / p twice": ("return 1 / chance", "return 1 / chance**2"),
    "the chance by powers": ("-math.expm1(samples * math.log1p(-chance))", "1 - (1 - chance) ** samples"),
    "n times p": ("-math.expm1(samples * math.log1p(-chance))", "samples * chance"),
    "any right token is enough": ("(tokens == 0).all(1)", "(tokens == 0).any(1)"),
    "descent": ("logits = logits + lr", "logits = logits - lr"),
    "runs and tokens mixed up": (
        "tokens.view(*probs.shape[:2], batch)", "tokens.view(probs.shape[1], len(probs), batch).transpose(0, 1)"
    ),
    "no baseline": ("(rewards - rewards.mean(-1, keepdim=True)) * batch / (batch - 1)", "rewards"),
    "a reference of any shape": ("ref_logps.shape != shape", "False"),
    "a baseline with itself, scaled wrong": ("* batch / (batch - 1)", "/ batch"),
    "first counts the last hit": ("rewards.any(-1) & (first == steps)", "rewards.any(-1)"),
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__.removeprefix("check_"))
def test_the_functions(check):
    check(original)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_caught(name):
    mutant = load_mutant(PATH, *MISTAKES[name])
    assert any(caught_by(mutant, [check]) for check in CHECKS)  # stops at the first


def seeds_of(evidence):
    return SEEDS if evidence.full else SEEDS[:2]


@pytest.mark.evidence
def test_backups_agree_with_enumeration(evidence):
    """Five worlds of 4 prompts and 125 responses each."""
    worst = {"V* under the KL penalty": [], "log π* of a response": [], "the policy gradient": []}
    for seed in SEEDS:
        world, mdp = world_and_mdp(original, seed)
        args = (mdp["transitions"], mdp["rewards"])
        values, _, logps = original.optimise(*args, horizon=3, ref_logps=table(world.ref_logits), beta=world.beta)
        known = world.beta * (world.ref_logps + world.rewards / world.beta).logsumexp(-1)
        worst["V* under the KL penalty"].append((values[:-1:31] - known).abs().max().item())
        goal = exact.optimal_policy(world.ref_logps, world.rewards, world.beta)
        found = exact.response_logps(world, logps[:-1].view(4, 31, 5))
        worst["log π* of a response"].append((found - goal).abs().max().item())
        logits, policy = policy_of(world, seed)
        _, q_values = original.evaluate(*args, policy.exp(), horizon=3)
        found = original.policy_gradient(args[0], mdp["start"], policy.exp(), q_values, horizon=3)
        leaf = logits.clone().requires_grad_()
        score = exact.response_logps(world, leaf)
        (bandit,) = torch.autograd.grad((score.detach().exp() * world.rewards * score).sum(-1).mean(), leaf)
        worst["the policy gradient"].append((found[:-1].view(4, 31, 5) - bandit).abs().max().item())
    for name, found in worst.items():
        evidence(
            "foundations/from_rl_to_rlhf",
            f"Tokens against whole responses: {name}, largest difference",
            value=max(found),
            bar=1e-12,
            seeds=SEEDS,
            spread=found,
            note="Backups over the 125 states of the token MDP, and sums over the 125 responses to each prompt.",
        )


@pytest.mark.evidence
def test_the_best_answer_shrinks_with_gamma(evidence):
    """Five random scores that grow with every word and flatten; the exact optimum of the token MDP with an EOS."""
    lengths = {gamma: [best_length(original, quality(seed), gamma) for seed in SEEDS] for gamma in GAMMAS}
    curve = {"x": GAMMAS, "y": {"words": [[lengths[gamma][i] for gamma in GAMMAS] for i in range(5)]}}
    for gamma in (1.0, 0.95, 0.8):
        evidence(
            "foundations/from_rl_to_rlhf",
            f"Words in the best answer, γ = {gamma:g}",
            value=mean(lengths[gamma]),
            bar=8 if gamma == 1 else 7.99,
            better=">=" if gamma == 1 else "<=",
            unit="words",
            seeds=SEEDS,
            spread=lengths[gamma],
            note="Of at most 8; every further word raises the score.",
            curve=curve if gamma == 1 else None,
        )
    for shorter, longer in itertools.pairwise(sorted(GAMMAS)):
        assert all(a <= b for a, b in zip(lengths[shorter], lengths[longer], strict=True))


@pytest.mark.evidence
def test_the_first_reward_takes_the_tries_that_chance_says(evidence):
    """A uniform policy over 8 tokens, one right answer of two tokens: 64 tries; 400 runs a seed."""
    seeds, means, first = seeds_of(evidence), [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(100 + seed)
        logits = torch.zeros(400, 2, 8, dtype=torch.float64)
        # Batches of two, no learning: the step of the first reward is geometric with 1 - (1 - p)^2.
        _, steps = original.reinforce(logits, steps=500, batch=2, lr=0.0, generator=generator)
        first.append(steps.double() + 1)
        means.append(steps.double().add(1).mean().item())
    every = torch.cat(first)
    expected = original.expected_tries(original.chance_of_any(1 / 64, 2))
    z = (every.mean() - expected).abs() / (every.std() / math.sqrt(len(every)))
    evidence(
        "foundations/from_rl_to_rlhf",
        "Tries until the first reward, against 1/p: distance",
        value=z.item(),
        bar=4,
        unit="standard errors",
        seeds=seeds,
        note=f"Mean {every.mean():.2f} batches of two, expected {expected:.2f}; {len(every)} runs.",
    )


@pytest.mark.evidence
def test_where_exploration_ends(evidence):
    """REINFORCE on one right answer of T tokens out of 8^T, 200 steps of 64 samples."""
    seeds = seeds_of(evidence)
    lengths = LENGTHS if evidence.full else [2, 6, 12, 18]
    ends = {name: [[] for _ in seeds] for name in STARTS}
    for name, right in STARTS.items():
        for length in lengths:
            for i, seed in enumerate(seeds):
                generator = torch.Generator().manual_seed(1000 * length + seed)
                chances, _ = original.reinforce(
                    biased(1, length, right), steps=200, batch=64, lr=5.0, generator=generator
                )
                ends[name][i].append(chances[-1].item())
    for name, right in STARTS.items():
        longest = [max([n for n, end in zip(lengths, run, strict=True) if end > 0.5], default=0) for run in ends[name]]
        evidence(
            "foundations/from_rl_to_rlhf",
            f"Longest answer that REINFORCE learns, start: {name}",
            value=median(longest),
            bar=4 if right < 0.2 else 8,
            better="<=" if right < 0.2 else ">=",
            unit="tokens",
            seeds=seeds,
            spread=longest,
            note="Of 1 to 20 tokens, 8 in the vocabulary; learned: chance above 1/2 after 200 steps of 64.",
            curve={"x": lengths, "y": {"chance of the right answer": ends[name]}},
        )
    if evidence.full:  # four tokens: most runs see a reward or two; whether they learn is a matter of the step size
        for lr in (5.0, 20.0):
            generator = torch.Generator().manual_seed(4)
            chances, first = original.reinforce(biased(100, 4, 1 / 8), steps=200, batch=64, lr=lr, generator=generator)
            seen, learned = (first < 200).sum().item(), (chances[-1] > 0.5).sum().item()
            evidence(
                "foundations/from_rl_to_rlhf",
                f"Four tokens from a uniform start: runs that learn, step size {lr:g}",
                value=learned,
                bar=50,
                better="<=" if lr == 5 else ">=",
                unit="runs of 100",
                note=f"{seen} of 100 runs saw a reward among their 12,800 samples; learned: chance above 1/2.",
            )
            assert learned <= seen and abs(seen - 95.6) < 9
    at = lengths.index(6)
    assert max(run[at] for run in ends["uniform"]) < 0.1 < 0.9 < min(run[at] for run in ends["60% a token"])


def test_the_demo_runs(capsys):
    original.main()
    assert "backups over prefixes" in capsys.readouterr().out
