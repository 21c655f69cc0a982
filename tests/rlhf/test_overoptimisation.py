"""Over-optimisation: the policies by enumeration and sampling, the proxy against its own optimum, then true reward
against proxy reward in the exact world and for a reward model of the arithmetic warm start; broken copies."""

import functools
import math

import pytest
import torch
from torch.testing import assert_close

from snippets.preferences import loop
from snippets.rlhf import overoptimisation as original
from snippets.rlhf import reward_model
from snippets.worlds import arithmetic, exact, lm
from tests.mutation import caught_by, load_mutant

PATH = "snippets/rlhf/overoptimisation.py"


def tables(seed=0, prompts=3, responses=5, ties=False):
    generator = torch.Generator().manual_seed(seed)
    ref = torch.randn(prompts, responses, generator=generator, dtype=torch.float64).log_softmax(-1)
    scores = torch.randn(prompts, responses, generator=generator, dtype=torch.float64)
    true = torch.randn(prompts, responses, generator=generator, dtype=torch.float64)
    return ref, scores.round() if ties else scores, true


# The pieces. Each check takes the module, so that broken copies can be put to it.


def check_the_tilt_in_loops(over):
    ref, scores, _ = tables()
    for beta in (0.1, 1.0, 7.0):
        logps = over.tilt(ref, scores, beta)
        for x in range(3):
            weights = [math.exp(r + s / beta) for r, s in zip(ref[x].tolist(), scores[x].tolist(), strict=True)]
            for y in range(5):
                assert logps[x, y].exp().item() == pytest.approx(weights[y] / sum(weights), rel=1e-9)
    for beta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"beta must be positive, got {beta}"):
            over.tilt(ref, scores, beta)


def check_no_policy_has_a_higher_score_at_the_same_kl(over):
    """So at the KL of best-of-n the tilt has at least its score."""
    ref, scores, true = tables(responses=40)
    betas = [2.0 ** (3 - k / 8) for k in range(80)]
    tilted = over.frontier(ref, [over.tilt(ref, scores, beta) for beta in betas], scores, true)
    for n in (2, 4, 16):
        # The same beta for each prompt: the comparison is prompt by prompt.
        for x in range(3):
            one = [table[x : x + 1] for table in (ref, scores, true)]
            nats, score, _ = over.frontier(one[0], [over.best_of_n(one[0], one[1], n)], *one[1:])[0].tolist()
            points = over.frontier(one[0], [over.tilt(one[0], one[1], beta) for beta in betas], *one[1:])
            above = points[points[:, 0] >= nats]
            assert len(above) and above[0, 1] >= score - 1e-9
    assert (tilted.diff(dim=0)[:, :2] > 0).all()


def check_best_of_n_by_listing_all_draws(over):
    """With ties, too: of the draws that have the best score, the first is taken, which is any of them."""
    for ties in (False, True):
        ref, scores, _ = tables(ties=ties, responses=4)
        for n in (1, 2, 3):
            logps = over.best_of_n(ref, scores, n)
            for x in range(3):
                expected = [0.0] * 4
                for draws in torch.cartesian_prod(*[torch.arange(4)] * n).view(-1, n).tolist():
                    chance = math.exp(sum(ref[x, y].item() for y in draws))
                    best = max(scores[x, y].item() for y in draws)
                    top = [y for y in draws if scores[x, y].item() == best]
                    for y in top:
                        expected[y] += chance / len(top)
                assert_close(logps[x].exp(), torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-9)
    for n in (0, -3):
        with pytest.raises(ValueError, match=f"n must be at least 1, got {n}"):
            over.best_of_n(ref, scores, n)


def check_best_of_many_is_finite_and_takes_the_favourite(over):
    ref, scores, true = tables(responses=60)
    logps = over.best_of_n(ref, scores, 2**30)
    assert logps.isfinite().all()
    assert_close(logps.exp().gather(1, scores.argmax(-1, keepdim=True)), torch.ones(3, 1, dtype=torch.float64))
    nats = over.frontier(ref, [logps], scores, true)[0, 0]
    assert_close(nats, -ref.gather(1, scores.argmax(-1, keepdim=True)).mean())
    even = torch.full((1, 4000), -math.log(4000), dtype=torch.float64)
    many = torch.arange(4000.0, dtype=torch.float64)[None]
    for n in (4, 64):  # without ties KL = log n - (n - 1) / n
        nats = over.frontier(even, [over.best_of_n(even, many, n)], many, many)[0, 0].item()
        assert nats == pytest.approx(math.log(n) - (n - 1) / n, rel=0.02)


def check_the_frontier_in_loops(over):
    ref, scores, true = tables()
    policy = over.tilt(ref, scores, 0.5)
    nats, score, reward = over.frontier(ref, [ref, policy], scores, true)[1].tolist()
    expected = [0.0, 0.0, 0.0]
    for x in range(3):
        for y in range(5):
            p, q = policy[x, y].exp().item(), ref[x, y].exp().item()
            expected[0] += p * math.log(p / q) / 3
            expected[1] += (p - q) * scores[x, y].item() / 3
            expected[2] += (p - q) * true[x, y].item() / 3
    assert [nats, score, reward] == pytest.approx(expected, rel=1e-9)
    assert over.frontier(ref, [ref, policy], scores, true)[0].abs().max() < 1e-12
    zero = torch.tensor([[0.0, -math.inf, -math.inf, -math.inf, -math.inf]], dtype=torch.float64).expand(3, 5)
    assert over.frontier(ref, [zero], scores, true).isfinite().all()


def check_features_say_which_tokens_stand_where(over):
    tokens = torch.tensor([[0, 1, 2], [2, 2, 0]])
    features = over.token_features(tokens, 3)
    assert features.shape == (2, 3 * 3 + 2 * 9) and features.dtype == torch.float64
    for row, wanted in enumerate(tokens.tolist()):
        ones = {t * 3 + token for t, token in enumerate(wanted)}
        ones |= {9 + t * 9 + wanted[t] * 3 + wanted[t + 1] for t in range(2)}
        assert set(features[row].nonzero().flatten().tolist()) == ones


def check_the_proxy_is_the_minimum_of_its_loss(over):
    """Its weights' gradient is 0: sum of sigmoid(-m) * (f_w - f_l) = ridge * weights, for each prompt apart."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    rows = torch.arange(3).repeat_interleave(10)
    chosen, rejected = (torch.randint(6, (30,), generator=generator) for _ in range(2))
    for ridge in (0.1, 2.0):
        scores = over.fit_proxy(features, rows, chosen, rejected, ridge=ridge)
        assert scores.shape == (3, 6)
        weights = torch.linalg.lstsq(features, scores.T).solution.T  # (3, 4)
        for x in range(3):
            pull = torch.zeros(4, dtype=torch.float64)
            for row, good, bad in zip(rows.tolist(), chosen.tolist(), rejected.tolist(), strict=True):
                if row == x:
                    margin = scores[x, good] - scores[x, bad]
                    pull += torch.sigmoid(-margin) * (features[good] - features[bad])
            assert_close(pull, ridge * weights[x], rtol=1e-3, atol=1e-3)
    gap = over.fit_proxy(features, rows[rows != 1], chosen[rows != 1], rejected[rows != 1], ridge=ridge)
    assert (gap[1] == 0).all()  # a prompt without a comparison
    assert_close(gap[[0, 2]], scores[[0, 2]], rtol=1e-3, atol=1e-3)
    for ridge in (0.0, -1.0):
        with pytest.raises(ValueError, match=f"ridge must be positive, got {ridge}"):
            over.fit_proxy(features, rows, chosen, rejected, ridge=ridge)


def check_pair_accuracy_in_loops(over):
    ref, scores, true = tables(seed=1, ties=True)
    assert any(len(row.unique()) < 5 for row in scores)
    right, total = 0.0, 0.0
    for x in range(3):
        hit, mass = 0.0, 0.0
        for a in range(5):
            for b in range(5):
                if a == b:
                    continue
                weight = math.exp(ref[x, a].item() + ref[x, b].item())
                mine, truth = (scores[x, a] - scores[x, b]).item(), (true[x, a] - true[x, b]).item()
                hit += weight * (0.5 if mine == 0 else float((mine > 0) == (truth > 0)))
                mass += weight
        right, total = right + hit / mass, total + 1
    assert over.pair_accuracy(ref, scores, true) == pytest.approx(right / total, rel=1e-9)
    assert over.pair_accuracy(ref, true, true) == pytest.approx(1.0)


def check_the_worst_case_is_centred_first(over):
    ref, scores, other = tables()
    shift = torch.tensor([[5.0], [-7.0], [100.0]], dtype=torch.float64)
    worst = over.worst_case(torch.stack([scores, other]), ref)
    assert_close(over.worst_case(torch.stack([scores + shift, other]), ref), worst)
    for x in range(3):
        means = [(ref[x].exp() * table[x]).sum().item() for table in (scores, other)]
        for y in range(5):
            expected = min(scores[x, y].item() - means[0], other[x, y].item() - means[1])
            assert worst[x, y].item() == pytest.approx(expected, abs=1e-9)


def check_fitted_forms_find_their_coefficients(over):
    nats = torch.linspace(0.05, 9, 20, dtype=torch.float64)
    d = nats.sqrt()
    for form, curve in (("bon", d * (0.8 - 0.3 * d)), ("rl", d * (0.8 - 0.3 * d.log()))):
        alpha, beta, error = over.fit_form(nats, curve, form)
        assert (alpha, beta) == pytest.approx((0.8, 0.3), abs=1e-6) and error < 1e-9
        assert over.fit_form(nats, curve, "rl" if form == "bon" else "bon")[2] > 0.01
    off = over.fit_form(nats, d * (0.8 - 0.3 * d) + 0.1 * (-1.0) ** torch.arange(20), "bon")
    assert off[2] == pytest.approx(0.1, rel=0.1)
    for bad, form in ((nats, "ppo"), (nats - 0.05, "rl")):
        with pytest.raises(ValueError, match='want "bon" or "rl" and positive KL'):
            over.fit_form(bad, nats, form)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_code(check):
    check(original)


MISTAKES = {
    "the reference left out": ("(ref_logps + scores / beta)", "(scores / beta)"),
    "times beta": ("(ref_logps + scores / beta)", "(ref_logps + scores * beta)"),
    "beta may be 0": ("if not beta > 0", "if not beta >= 0"),
    "the worst of n": ("row.unique(", "(-row).unique("),
    "n - 1 draws": ("high = (n * torch", "high = ((n - 1) * torch"),
    "ties unshared": ("(high - low) / mass)", "(high - low))"),
    "n may be 0": ("if n < 1", "if n < 0"),
    "KL the other way": ("p * (logps.double() - ref_logps.double())", "ref * (ref_logps.double() - logps.double())"),
    "0 times infinity": ("torch.where(p > 0, p * (", "torch.where(p >= 0, p * ("),
    "means not relative to the reference": ("((p - ref) * table)", "(p * table)"),
    "no pairs of tokens": ("tokens[:, :-1] * vocab + tokens[:, 1:]", "tokens[:, :-1] * vocab + tokens[:, :-1]"),
    "no ridge": ("+ ridge / 2 * weights", "+ 0 * weights"),
    "ridge without its half": ("ridge / 2 * weights", "ridge * weights"),
    "labels the wrong way": (
        "scores[rows, chosen] - scores[rows, rejected]",
        "scores[rows, rejected] - scores[rows, chosen]",
    ),
    "rows for the prompts that have comparisons": ("int(rows.max()) + 1, features", "len(rows.unique()), features"),
    "one reward for all prompts": (
        "weights @ features.T  # (X, Y)",
        "weights.mean(0, keepdim=True).expand_as(weights) @ features.T",
    ),
    "a response against itself": ("(1 - torch.eye(p.shape[1], dtype=p.dtype))", "1"),
    "ties are wrong": ("right = 0.5 + 0.5 * side", "right = (side != 0) * 0.5 + 0.5 * side"),
    "scores uncentred": ("(ensemble - means).min(0)", "ensemble.min(0)"),
    "the best case": (".min(0).values", ".max(0).values"),
    "the forms swapped": ('d if form == "bon" else d.log()', 'd if form == "rl" else d.log()'),
    "a mean for the root": (".mean().sqrt().item()", ".mean().item()"),
    "KL itself for its root": ("d = nats.sqrt()", "d = nats"),
}


def test_no_check_fails_on_the_original():
    assert caught_by(original, CHECKS) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    """Each deliberate mistake makes at least one check fail."""
    assert caught_by(load_mutant(PATH, *MISTAKES[mistake]), CHECKS)


# The exact world.

BETAS = [2.0 ** (4 - k / 2) for k in range(17)]  # 16 to 0.06
COUNTS = [2**k for k in range(15)]
SIZES = [16, 64, 256, 1024]


@functools.cache
def proxy_of(size, seed):
    return original.exact_proxy(original.Settings(pairs=size, seed=seed))


@functools.cache
def curves(kind, size, seed):
    """(N, 3): KL, proxy, true. kind: "tilt" or "best of n"."""
    ref, proxy, true = proxy_of(size, seed)
    if kind == "tilt":
        policies = [original.tilt(ref, proxy, beta) for beta in BETAS]
    else:
        policies = [original.best_of_n(ref, proxy, n) for n in COUNTS]
    return original.frontier(ref, policies, proxy, true)


def mean(values):
    return sum(values) / len(values)


@pytest.mark.evidence
@pytest.mark.parametrize("kind", ["tilt", "best of n"])
def test_the_true_reward_rises_and_falls_while_the_proxy_rises(kind, evidence):
    seeds = list(range(5)) if evidence.full else [0]
    sizes = SIZES if evidence.full else [64, 256]
    setting = "strength" if kind == "tilt" else "n"
    heights = []
    for size in sizes:
        runs = [curves(kind, size, seed) for seed in seeds]
        for run in runs:
            assert (run[:, 1].diff() > 0).all()  # the proxy never falls
        tops = [run[:, 2].max().item() for run in runs]
        places = [run[run[:, 2].argmax(), 0].item() for run in runs]
        ends = [run[-1, 2].item() for run in runs]
        heights.append(mean(tops))
        assert all(end < 0.98 * top for end, top in zip(ends, tops, strict=True)) or size == 16
        name = f"{size:,} comparisons a prompt, {kind}"
        common = {"seeds": seeds}
        evidence("rlhf/overoptimisation", f"Highest true reward, {name}", value=mean(tops), spread=tops, **common)
        evidence(
            "rlhf/overoptimisation",
            f"KL at the highest true reward, {name}",
            value=mean(places),
            spread=places,
            unit="nats",
            **common,
        )
        evidence(
            "rlhf/overoptimisation",
            f"True reward at the end, {name}",
            value=mean(ends),
            spread=ends,
            bar=(0.98 if size == 16 else 0.7) * mean(tops),
            note=f"64 prompts of 125 responses. The proxy rises to {mean([r[-1, 1].item() for r in runs]):.2f}.",
            curve={
                "x": BETAS if kind == "tilt" else COUNTS,
                "y": {
                    "KL": [run[:, 0].tolist() for run in runs],
                    "proxy reward": [run[:, 1].tolist() for run in runs],
                    "true reward": [run[:, 2].tolist() for run in runs],
                },
                "xlabel": setting,
                "ylabel": "reward above the reference's",
            },
            **common,
        )
    assert heights == sorted(heights)  # more comparisons, a higher peak


@pytest.mark.evidence
def test_the_proxy_is_right_where_it_was_fitted_and_not_where_it_leads(evidence):
    """The share of pairs that it ranks as the true reward does: pairs of the reference's, and pairs of the policy that
    was bent towards it."""
    seeds = list(range(5)) if evidence.full else [0]
    before, after = [], []
    for seed in seeds:
        ref, proxy, true = proxy_of(256, seed)
        before.append(original.pair_accuracy(ref, proxy, true))
        after.append(original.pair_accuracy(original.tilt(ref, proxy, 0.5), proxy, true))
    evidence(
        "rlhf/overoptimisation",
        "Pairs ranked right, of the reference",
        value=mean(before),
        bar=0.6,
        better=">",
        seeds=seeds,
        spread=before,
        note="256 comparisons a prompt; exact over all pairs of different responses.",
    )
    evidence(
        "rlhf/overoptimisation",
        "Pairs ranked right, of the tilted policy, β = 0.5",
        value=mean(after),
        bar=mean(before) - 0.03,
        better="<",
        seeds=seeds,
        spread=after,
    )


@pytest.mark.evidence
def test_the_lowest_of_five_proxies_raises_the_peak(evidence):
    """Five proxies fitted to bootstrap samples of the same comparisons; the policy is bent towards the lowest."""
    from snippets.worlds.exact_pairs import sample_labelled

    seeds = list(range(5)) if evidence.full else [0]
    single, lowest, ends = [], [], []
    for seed in seeds:
        world = exact.make_world(seed, prompts=64)
        ref, _, true = proxy_of(64, seed)
        chosen, rejected = sample_labelled(world, 64, torch.Generator().manual_seed(seed))
        rows = torch.arange(64).repeat_interleave(64)
        features = original.token_features(world.tokens, world.vocab)
        generator = torch.Generator().manual_seed(seed + 1000)
        members = []
        for _ in range(5):
            again = torch.randint(64, (64, 64), generator=generator)
            pairs = chosen.gather(1, again).flatten(), rejected.gather(1, again).flatten()
            members.append(original.fit_proxy(features, rows, *pairs))
        worst = original.worst_case(torch.stack(members), ref)
        points = original.frontier(ref, [original.tilt(ref, worst, beta) for beta in BETAS], worst, true)
        single.append(curves("tilt", 64, seed)[:, 2].max().item())
        lowest.append(points[:, 2].max().item())
        ends.append(points[-1, 2].item())
    evidence(
        "rlhf/overoptimisation",
        "Highest true reward, lowest of five proxies, 64 comparisons a prompt, tilt",
        value=mean(lowest),
        bar=mean(single),
        better=">",
        seeds=seeds,
        spread=lowest,
    )
    evidence(
        "rlhf/overoptimisation",
        "True reward at the end, lowest of five proxies, 64 comparisons a prompt, tilt",
        value=mean(ends),
        bar=mean(lowest),
        better="<",
        seeds=seeds,
        spread=ends,
        note="Less of a fall than with one proxy, and still a fall.",
    )


@pytest.mark.evidence
def test_which_form_fits(evidence):
    """Gao et al. fit d (alpha - beta d) to best-of-n and d (alpha - beta log d) to PPO. Here the first fits both."""
    seeds = list(range(5)) if evidence.full else [0]
    for kind in ("tilt", "best of n"):
        errors = {"bon": [], "rl": []}
        for seed in seeds:
            points = curves(kind, 256, seed)
            points = points[points[:, 0] > 0.05]
            for form, list_ in errors.items():
                list_.append(original.fit_form(points[:, 0], points[:, 2], form)[2])
        for form, name in (("bon", "d (α − β d)"), ("rl", "d (α − β log d)")):
            evidence(
                "rlhf/overoptimisation",
                f"Root mean square error of {name}, {kind}",
                value=mean(errors[form]),
                seeds=seeds,
                spread=errors[form],
                note="256 comparisons a prompt; a least-squares fit of the true reward over d = √KL for each world.",
            )
        assert mean(errors["bon"]) < mean(errors["rl"])


def test_a_smaller_class_falls_whatever_it_sees():
    """The proxy fitted to all pairs of the reference with their exact chances: no comparison is missing, and the true
    reward still falls, because the features cannot represent it."""
    world = exact.make_world(0, prompts=8)
    ref, true = world.ref_logps, world.rewards
    features = original.token_features(world.tokens, world.vocab)
    chance = ref.exp().unsqueeze(2) * ref.exp().unsqueeze(1) * torch.sigmoid(true.unsqueeze(2) - true.unsqueeze(1))
    weights = torch.zeros(8, features.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        scores = weights @ features.T
        losses = reward_model.bradley_terry_loss(
            *(s.expand_as(chance).flatten() for s in (scores.unsqueeze(2), scores.unsqueeze(1)))
        )
        loss = (chance.flatten() * losses).sum() + 1e-6 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    proxy = weights.detach() @ features.T
    for policies in (
        [original.tilt(ref, proxy, beta) for beta in BETAS],
        [original.best_of_n(ref, proxy, n) for n in COUNTS],
    ):
        points = original.frontier(ref, policies, proxy, true)
        assert (points[:, 1].diff() > 0).all()
        assert points[-1, 2] < 0.9 * points[:, 2].max()


def test_a_perfect_proxy_is_never_over_optimised():
    world = exact.make_world(0, prompts=16)
    ref, true = world.ref_logps, world.rewards
    for policies in (
        [original.tilt(ref, true, beta) for beta in BETAS],
        [original.best_of_n(ref, true, n) for n in COUNTS],
    ):
        points = original.frontier(ref, policies, true, true)
        assert (points[:, 2].diff() > -1e-12).all()


def test_gaussian_errors_that_are_alike_everywhere_do_not_turn_the_curve():
    """Proxy = true + noise of one size for every response: the best guess of the true reward is the proxy, shrunk, so
    the true reward rises with it. It is errors that are larger where the reference seldom goes that turn it."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(400, 200, generator=generator, dtype=torch.float64)
    ref = torch.randn(400, 200, generator=generator, dtype=torch.float64).log_softmax(-1)
    noise = torch.randn(400, 200, generator=generator, dtype=torch.float64)
    alike = original.frontier(ref, [original.tilt(ref, true + noise, b) for b in BETAS], true + noise, true)[:, 2]
    assert alike[-1] > 0.97 * alike.max()
    size = (-ref - (-ref).mean()).clamp(min=0) * 3  # no error on likely responses, a large one on rare ones
    scores = true + size * noise
    rare = original.frontier(ref, [original.tilt(ref, scores, b) for b in BETAS], scores, true)[:, 2]
    assert rare[-1] < 0.7 * rare.max()


# A reward model of a language model: every number that a sum can be, scored.

ANSWERS = [str(n) for n in range(199)]


@torch.no_grad()
def answer_logps(policy, tokenizer, prompts):
    """(X, Y) in float64: log-probabilities of each answer, its EOS included, renormalised over the answers."""
    rows = []
    for prompt in prompts:
        pairs = [{"prompt": prompt, "chosen": answer, "rejected": "0"} for answer in ANSWERS]
        batch = loop.encode_pairs(tokenizer, pairs, policy.device)
        size = len(ANSWERS)
        logps = lm.token_logps(policy, batch.ids[:size], batch.attention[:size], batch.mask.shape[1])
        rows.append(torch.where(batch.mask[:size].bool(), logps, 0.0).sum(-1).double())
    logps = torch.stack(rows)
    assert logps.exp().sum(-1).mean() > 0.95  # little is left for anything else
    return logps.log_softmax(-1)


@pytest.mark.evidence
def test_a_reward_model_of_sums_is_over_optimised(evidence, tmp_path):
    """A reward model that is right on most pairs of the policy's own answers: best-of-n by it first gains, then loses,
    and its favourite among all numbers is hardly ever the sum."""
    torch.set_num_threads(1)
    seeds = list(range(5)) if evidence.full else [0]
    steps, prompts, size = (200, 2000, 100) if evidence.full else (40, 256, 8)
    counts = [2**k for k in range(13)]
    held_out = arithmetic.problems(held_out=True)
    policy, tokenizer = arithmetic.warm_start()
    texts = [r["prompt"] for r in held_out[:size]]
    true = torch.tensor([[float(a == r["answer"]) for a in ANSWERS] for r in held_out[:size]], dtype=torch.float64)
    ref = answer_logps(policy, tokenizer, texts)
    start = (ref.exp() * true).sum(-1).mean().item()
    accuracies, runs, favourites = [], [], []
    for seed in seeds:
        settings = reward_model.settings_class()(out=str(tmp_path), steps=steps, seed=seed, save_every=1000)
        sums = arithmetic.problems(held_out=False)[:prompts], held_out[: 4 * size]
        pairs, held = (loop.sample_pairs(policy, tokenizer, part, arithmetic.exact_match, settings) for part in sums)
        model = reward_model.RewardModel(policy)
        reward_model.train_reward_model(model, tokenizer, pairs, settings)
        accuracies.append(reward_model.evaluate(model, tokenizer, held)["held_out"])
        rows = [reward_model.score(model, tokenizer, [text] * len(ANSWERS), ANSWERS) for text in texts]
        proxy = torch.stack(rows).double()
        policies = [original.best_of_n(ref, proxy, n) for n in counts]
        points = original.frontier(ref, policies, proxy, true)
        points[:, 2] += start
        runs.append(points)
        favourites.append(true.gather(1, proxy.argmax(-1, keepdim=True)).mean().item())
    tops = [run[:, 2].max().item() for run in runs]
    ends = [run[-1, 2].item() for run in runs]
    common = {"seeds": seeds}
    evidence(
        "rlhf/overoptimisation",
        "Arithmetic: pairs of its own answers that the reward model ranks right",
        value=mean(accuracies),
        bar=0.75 if evidence.full else 0.55,
        better=">",
        spread=accuracies,
        **common,
    )
    evidence("rlhf/overoptimisation", "Arithmetic: exact match of the warm start's samples", value=start, seeds=[0])
    evidence(
        "rlhf/overoptimisation",
        "Arithmetic: highest exact match of best-of-n by the reward model",
        value=mean(tops),
        bar=start,
        better=">",
        spread=tops,
        curve={
            "x": counts,
            "y": {
                "KL": [run[:, 0].tolist() for run in runs],
                "score": [run[:, 1].tolist() for run in runs],
                "exact match": [run[:, 2].tolist() for run in runs],
            },
            "xlabel": "n",
            "ylabel": "exact match",
        },
        note="Exact: the policy's chance of each number from 0 to 198, and the reward model's score of each.",
        **common,
    )
    evidence(
        "rlhf/overoptimisation",
        f"Arithmetic: exact match of best of {counts[-1]:,}",
        value=mean(ends),
        bar=mean(tops) - 0.1 if evidence.full else 1.0,
        better="<=",
        spread=ends,
        **common,
    )
    evidence(
        "rlhf/overoptimisation",
        "Arithmetic: sums that are the reward model's favourite of 199 numbers",
        value=mean(favourites),
        bar=0.2 if evidence.full else 1.0,
        spread=favourites,
        **common,
    )


def test_the_command_line_prints_both_tables(capsys):
    original.main(original.Settings(pairs=32, prompts=8))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "KL" in line] == ["beta", "n"]
    assert len(lines) == 2 + 17 + 13
