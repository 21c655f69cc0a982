"""Constitutional AI: rules, revisions and judge by enumeration, the front as a true Pareto front, each stage measured
exactly, and broken copies that must be caught."""

import math

import pytest
import torch
from torch.testing import assert_close

from snippets.rlhf import constitutional as original
from snippets.worlds import exact
from tests.mutation import caught_by, load_mutant

PATH = "snippets/rlhf/constitutional.py"
NAME = "rlhf/constitutional"
ADVICE, RECIPE, REFUSE, REASON, FILLER = range(5)
X, Y = 4, 125


def random_policies(count, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(count, X, Y, generator=generator, dtype=torch.float64)).log_softmax(-1)


# Rules, revisions, labels, stages. Each check takes the module, so that broken copies can be put to it.


def check_rules_in_words(cai):
    for harmful in (False, True):
        broken = cai.critique(cai.TOKENS, harmful)
        assert broken.shape == (Y, 3) and broken.dtype == torch.bool
        for answer, row in zip(cai.TOKENS.tolist(), broken.tolist(), strict=True):
            gives_recipe = harmful and RECIPE in answer
            refuses_harmless = not harmful and REFUSE in answer
            refuses_without_reason = harmful and REFUSE in answer and REASON not in answer
            assert row == [gives_recipe, refuses_harmless, refuses_without_reason]


def check_a_revision_mends_its_rule_and_breaks_no_other(cai):
    """For every answer, both kinds of request, and every rule that the answer breaks."""
    for harmful in (False, True):
        before = cai.critique(cai.TOKENS, harmful)
        for rule in range(3):
            revised = cai.revise(cai.TOKENS, rule)
            after = cai.critique(revised, harmful)
            asked = before[:, rule]
            assert not after[asked, rule].any()
            assert not (after & ~before)[asked].any()
            assert (revised != cai.TOKENS).any(-1)[asked].all()


def check_no_revision_adds_a_recipe(cai):
    """Not even one by a critic who is wrong about the request."""
    for rule in range(3):
        added = (cai.revise(cai.TOKENS, rule) == RECIPE) & (cai.TOKENS != RECIPE)
        assert not added.any()


def check_a_revision_changes_no_more_than_it_must(cai):
    for rule, allowed in ((0, RECIPE), (1, REFUSE)):
        changed = cai.revise(cai.TOKENS, rule) != cai.TOKENS
        assert (changed == (cai.TOKENS == allowed)).all()
    assert ((cai.revise(cai.TOKENS, 2) != cai.TOKENS).sum(-1) <= 1).all()
    assert (cai.revise(cai.TOKENS, 2)[:, :2] == cai.TOKENS[:, :2]).all()  # a reason at the end


def check_the_kernel_in_loops(cai):
    """Each path that a critique can take, one by one: what the critic sees, its rule, whether it misses."""
    belief, miss = torch.tensor([0.0, 0.3, 1.0, 0.6], dtype=torch.float64), 0.2
    kernel = cai.revision_kernel(belief, miss=miss)
    assert kernel.shape == (X, Y, Y)
    index = {tuple(answer): i for i, answer in enumerate(cai.TOKENS.tolist())}
    for x in range(X):
        for y in (0, 1, 7, 31, 62, 63, 93, 124):
            expected = torch.zeros(Y, dtype=torch.float64)
            answer = cai.TOKENS[y : y + 1]
            for harmful, sees in ((True, belief[x]), (False, 1 - belief[x])):
                for rule in range(3):
                    new = y
                    if cai.critique(answer, harmful)[0, rule]:
                        new = index[tuple(cai.revise(answer, rule)[0].tolist())]
                    expected[y] += sees * miss / 3
                    expected[new] += sees * (1 - miss) / 3
            assert_close(kernel[x, y], expected)


def check_kernel_rows_are_distributions(cai):
    belief = torch.tensor([0.05, 0.5, 0.9, 0.95], dtype=torch.float64)
    kernel = cai.revision_kernel(belief)
    assert (kernel >= 0).all()
    assert_close(kernel.sum(-1), torch.ones(X, Y, dtype=torch.float64))
    same = cai.revision_kernel(belief, miss=1.0)
    assert_close(same, torch.eye(Y, dtype=torch.float64).expand(X, Y, Y))


def check_sl_cai_pools_all_revisions(cai):
    policy = random_policies(1)[0]
    kernel = cai.revision_kernel(torch.tensor([0.05, 0.5, 0.9, 0.95], dtype=torch.float64))
    steps = [policy.exp().unsqueeze(1) @ torch.linalg.matrix_power(kernel, k) for k in (1, 2, 3)]
    for n in (1, 2, 3):
        assert_close(cai.sl_cai(policy, kernel, n).exp(), sum(steps[:n]).squeeze(1) / n)


def check_the_judge_in_words(cai):
    belief = torch.tensor([0.0, 0.25, 1.0, 0.6], dtype=torch.float64)
    counts = {harmful: cai.critique(cai.TOKENS, harmful).sum(-1).tolist() for harmful in (False, True)}
    sigmoid = lambda z: 1 / (1 + math.exp(-z))  # noqa: E731
    for options in ({}, {"sharpness": 1.5, "position": 0.7}, {"position": -1.0, "both_orders": False}):
        p = cai.ai_preference(belief, **options)
        sharp, bias = options.get("sharpness", 4.0), options.get("position", 0.0)
        for x in range(X):
            for a, b in ((0, 1), (1, 0), (31, 62), (62, 3), (7, 7), (63, 94)):
                expected = 0.0
                for harmful, sees in ((True, belief[x].item()), (False, 1 - belief[x].item())):
                    gap = -sharp * (counts[harmful][a] - counts[harmful][b])
                    one = sigmoid(gap + bias)
                    other = 1 - sigmoid(-gap + bias)  # a stands second
                    expected += sees * ((one + other) / 2 if options.get("both_orders", True) else one)
                assert p[x, a, b].item() == pytest.approx(expected, abs=1e-12)


def check_asking_in_both_orders_is_fair(cai):
    belief = torch.tensor([0.0, 0.25, 1.0, 0.6], dtype=torch.float64)
    fair = cai.ai_preference(belief, position=2.0)
    assert_close(fair + fair.transpose(1, 2), torch.ones_like(fair))
    assert_close(fair.diagonal(dim1=1, dim2=2), torch.full((X, Y), 0.5, dtype=torch.float64))
    one = cai.ai_preference(belief, position=2.0, both_orders=False)
    assert (one.diagonal(dim1=1, dim2=2) > 0.85).all()  # the same answer twice, and the first one wins


def soft_loss(cai, weights, first, second, labels, decay):
    count = torch.nn.functional.one_hot(cai.TOKENS, 5).sum(1).double()
    features = torch.cat([count, (count > 0).double()], dim=-1)
    total = 0.0
    for x in range(len(labels)):
        d = (features[first[x]] - features[second[x]]) @ weights[x]
        fit = -labels[x] * torch.nn.functional.logsigmoid(d) - (1 - labels[x]) * torch.nn.functional.logsigmoid(-d)
        total = total + fit.mean() + decay / 2 * weights[x].square().sum()
    return total


def comparisons(seed=0, size=300):
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randint(Y, (2, X, size), generator=generator)
    return first, second, torch.rand(X, size, generator=generator, dtype=torch.float64)


def check_the_preference_model_is_at_its_minimum(cai):
    """Its scores are those of the weights at which autograd's gradient of the soft cross-entropy vanishes."""
    for seed, decay in ((0, 1e-3), (1, 0.1)):
        first, second, labels = comparisons(seed)
        scores = cai.fit_reward(first, second, labels, decay=decay)
        count = torch.nn.functional.one_hot(cai.TOKENS, 5).sum(1).double()
        features = torch.cat([count, (count > 0).double()], dim=-1)
        weights = torch.linalg.lstsq(features.expand(X, Y, 10), scores.unsqueeze(-1), driver="gelsd").solution[..., 0]
        assert_close(weights @ features.T, scores, atol=1e-9, rtol=0)
        weights.requires_grad_()
        (slope,) = torch.autograd.grad(soft_loss(cai, weights, first, second, labels, decay), weights)
        # The counts of an answer add up to 3, so one direction of the weights is free but for the decay.
        assert (slope @ features.T).abs().max() < 1e-8


def check_the_preference_model_recovers_scores_that_it_can_express(cai):
    generator = torch.Generator().manual_seed(2)
    truth = torch.randn(X, 5, generator=generator, dtype=torch.float64)
    scores = torch.nn.functional.one_hot(cai.TOKENS, 5).sum(1).double() @ truth.T
    first, second, _ = comparisons(3, 2000)
    labels = torch.sigmoid(scores.T.gather(1, first) - scores.T.gather(1, second))
    found = cai.fit_reward(first, second, labels, decay=1e-9)
    assert_close(found - found[:, :1], scores.T - scores.T[:, :1], atol=1e-5, rtol=0)


def check_pairs_of_equal_answers_teach_nothing(cai):
    first, _, labels = comparisons()
    assert_close(cai.fit_reward(first, first, labels), torch.zeros(X, Y, dtype=torch.float64))
    some, other, labels = comparisons(1)
    assert_close(cai.fit_reward(some, other, torch.full_like(labels, 0.5)), torch.zeros(X, Y, dtype=torch.float64))


def check_rl_ends_at_the_optimum(cai):
    generator = torch.Generator().manual_seed(0)
    start, beta = random_policies(1)[0], 0.3
    rewards = torch.randn(X, Y, generator=generator, dtype=torch.float64)

    def value(logps):
        probs = logps.exp()
        return (probs * (rewards - beta * (logps - start))).sum(-1)

    best = cai.rl_cai(start, rewards, beta)
    assert_close(best.exp().sum(-1), torch.ones(X, dtype=torch.float64))
    for other in [start, *random_policies(20, seed=1), *(best + 0.01 * random_policies(5, seed=2)).log_softmax(-1)]:
        assert (value(best) > value(other)).all()


def check_measures_in_loops(cai):
    world, policy = cai.make_world(1), random_policies(1, seed=3)[0]
    worth = {0: [1, 0, 0, 0, 0], 1: [0.5, 1, 0, 0, 0], 2: [0.5, 1, 0, 0.25, 0], 3: [0, 1, 0, 0.25, 0]}
    totals = {"help": [], "net": [], "harm": [], "help_harmless": []}
    for x in range(X):
        helped = kl = harm = 0.0
        for y, answer in enumerate(cai.TOKENS.tolist()):
            p = policy[x, y].exp().item()
            if REFUSE not in answer:
                helped += p * sum(worth[x][token] for token in answer) / 3
            harm += p * (RECIPE in answer)
            kl += p * (policy[x, y] - world.pretrained[x, y]).item()
        totals["help"].append(helped)
        totals["net"].append(helped - 0.1 * kl)
        totals["harm" if x >= 2 else "help_harmless"].append(harm if x >= 2 else helped)
    measured = world.measure(policy)
    for name, values in totals.items():
        assert measured[name] == pytest.approx(sum(values) / len(values), rel=1e-9)


def check_worlds_differ_by_seed_and_belief(cai):
    one, other, blind = cai.make_world(0), cai.make_world(1), cai.make_world(0, lookalike=0.95, beta=0.2)
    assert not torch.equal(one.pretrained, other.pretrained) and torch.equal(one.pretrained, blind.pretrained)
    assert torch.equal(one.help, other.help) and torch.equal(one.harm, other.harm)
    assert one.belief.tolist() == [0.05, 0.5, 0.9, 0.95] and blind.belief.tolist() == [0.05, 0.95, 0.9, 0.95]
    assert (one.beta, blind.beta) == (0.1, 0.2)
    assert_close(one.pretrained.exp().sum(-1), torch.ones(X, dtype=torch.float64))


def check_nothing_lies_beyond_the_front(cai):
    """Net help is concave and harm linear, so each point of the front is the best for its weight: for all policies
    net - w * harm is at most the front's. Then none has more net help at no more harm."""
    world = cai.make_world(0)
    weights = [0.0, 0.1, 0.3, 0.5, 0.7, 1.0, 2.0, 10.0]
    front = [world.measure(world.front(weight)) for weight in weights]
    near = [(world.front(w) + 0.1 * noise).log_softmax(-1) for w in weights for noise in random_policies(3, seed=4)]
    for policy in [world.pretrained, *random_policies(20, seed=5), *near]:
        point = world.measure(policy)
        for weight, best in zip(weights, front, strict=True):
            # The weight counts harm per request, and measure() averages over the harmful half.
            assert point["net"] - weight * point["harm"] / 2 <= best["net"] - weight * best["harm"] / 2 + 1e-12
        assert world.gap(policy) > 0
    for better, worse in zip(front, front[1:], strict=False):
        assert better["net"] > worse["net"] and better["harm"] > worse["harm"]
    for weight in weights[1:]:
        assert world.gap(world.front(weight)) == pytest.approx(0.0, abs=1e-7)
    assert world.gap(world.front(0.0)) == pytest.approx(0.0, abs=1e-7)


def check_bad_input_is_named(cai):
    belief = torch.full((X,), 0.5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"want probabilities; got belief \[1.5"):
        cai.revision_kernel(torch.full((X,), 1.5, dtype=torch.float64))
    for miss in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"miss {miss}"):
            cai.revision_kernel(belief, miss=miss)
    with pytest.raises(ValueError, match="rule must be one of 0 to 2, got 3"):
        cai.revise(cai.TOKENS, 3)
    with pytest.raises(ValueError, match="revisions must be at least 1, got 0"):
        cai.sl_cai(random_policies(1)[0], cai.revision_kernel(belief), 0)
    with pytest.raises(ValueError, match=r"beta must be positive, got 0"):
        cai.rl_cai(random_policies(1)[0], torch.zeros(X, Y), 0.0)
    first, second, labels = comparisons()
    for bad in ((first, second[:, :5], labels), (first[0], second[0], labels[0]), [x[:, :0] for x in comparisons()]):
        with pytest.raises(ValueError, match=r"want \(X, N\) for all three, got"):
            cai.fit_reward(*bad)
    for bad in ((labels + 1, 1e-3), (labels * math.nan, 1e-3), (labels, 0.0)):
        with pytest.raises(ValueError, match=r"want labels in \[0, 1\] and decay > 0"):
            cai.fit_reward(first, second, bad[0], decay=bad[1])


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_functions(check):
    check(original)


MISTAKES = {
    "mend harm by refusing": (
        "tokens.masked_fill(tokens == RECIPE, REASON)",
        "tokens.masked_fill(tokens == RECIPE, REFUSE)",
    ),
    "mend harm by advice": ("(tokens == REFUSE, ADVICE)", "(tokens == REFUSE, RECIPE)"),
    "explain by replacing the whole answer": (
        "torch.cat([tokens[:, :-1], torch.full_like(tokens[:, -1:], REASON)], dim=1)",
        "torch.full_like(tokens, REASON)",
    ),
    "a refusal is never excused": ("refusal & ~contains(tokens, REASON)", "refusal"),
    "rules for the wrong requests": ("if harmful else [never, refusal", "if not harmful else [never, refusal"),
    "revise what breaks no rule": ("torch.where(broken[:, None], revise", "torch.where(~broken[:, None], revise"),
    "digits in reverse": ("[25, 5, 1]", "[1, 5, 25]"),
    "a critic that never misses": ("kernel = miss * torch", "kernel = 0 * torch"),
    "belief the wrong way": ("torch.lerp(seen[0], seen[1]", "torch.lerp(seen[1], seen[0]"),
    "the answers before revision pooled in": ("chain[1:]", "chain"),
    "only the last revision": ("torch.stack(chain[1:]).mean(0)", "chain[-1]"),
    "revise the first answer each time": ("chain[-1], kernel", "chain[0], kernel"),
    "the judge prefers broken rules": ("score = -sharpness", "score = sharpness"),
    "the bias is not swapped": ("torch.sigmoid(gap - position)", "torch.sigmoid(gap + position)"),
    "one order after all": ("/ 2 if both_orders", "/ 2 if not both_orders"),
    "hard labels": ("p - labels)", "p - labels.round())"),
    "counts only": ("torch.cat([count, count > 0], dim=-1)", "torch.cat([count, count], dim=-1)"),
    "no decay": ("slope + decay * weights", "slope"),
    "second minus first": ("features[first] - features[second]", "features[second] - features[first]"),
    "too few steps": ("range(25)", "range(1)"),
    "beta on the wrong side": ("rewards / beta", "rewards * beta"),
    "harm is rewarded": ("self.help - weight * self.harm", "self.help + weight * self.harm"),
    "no KL in net help": ("helped - self.beta * kl", "helped"),
    "KL from nowhere": ("probs * (logps - self.pretrained)", "probs * logps"),
    "harm of all requests": ("self.harm).sum(-1)[HARMFUL]", "self.harm).sum(-1)"),
    "bisection upside down": ('["harm"] > mine["harm"]', '["harm"] < mine["harm"]'),
    "any miss": ("0 <= miss <= 1 and", "0 <= miss and"),
    "a reason in the first place": (
        "torch.cat([tokens[:, :-1], torch.full_like(tokens[:, -1:], REASON)], dim=1)",
        "torch.cat([torch.full_like(tokens[:, -1:], REASON), tokens[:, 1:]], dim=1)",
    ),
    "one world for all seeds": ("manual_seed(seed)", "manual_seed(0)"),
    "one belief about the look-alike": ("lookalike, 0.9, 0.95", "0.5, 0.9, 0.95"),
    "refusals help": ("torch.where(contains(TOKENS, REFUSE), 0.0, worth)", "worth + 0 * contains(TOKENS, REFUSE)"),
}


def test_no_check_fails_on_the_original():
    assert caught_by(original, CHECKS) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    """Each deliberate mistake makes at least one check fail."""
    assert caught_by(load_mutant(PATH, *MISTAKES[mistake]), CHECKS)


# The procedure itself, sampled


def test_sampled_critiques_and_revisions_follow_the_kernel():
    """Answer, draw a rule, see the request, perhaps miss, revise; twice. Frequencies within 4.5 standard errors."""
    world = original.make_world(0)
    generator = torch.Generator().manual_seed(0)
    size, policy = 20000, world.front(0.0)
    kernel = original.revision_kernel(world.belief)
    draw = lambda: torch.rand(X, size, generator=generator, dtype=torch.float64)  # noqa: E731
    answers = original.TOKENS[torch.multinomial(policy.exp(), size, replacement=True, generator=generator)]  # (X, N, T)
    pooled = []
    for _ in range(2):
        harmful = draw() < world.belief[:, None]
        rule = (3 * draw()).long()
        misses = draw() < 0.1
        for x in range(X):
            for sees in (False, True):
                for r in range(3):
                    rows = (harmful[x] == sees) & (rule[x] == r) & ~misses[x]
                    rows &= original.critique(answers[x], sees)[:, r]
                    answers[x] = torch.where(rows[:, None], original.revise(answers[x], r), answers[x])
        pooled.append((answers * torch.tensor([25, 5, 1])).sum(-1))  # (X, N)
    for n in (1, 2):
        expected = original.sl_cai(policy, kernel, n).exp()
        drawn = torch.cat(pooled[:n], dim=1)
        seen = torch.stack([row.bincount(minlength=Y) for row in drawn]) / drawn.shape[1]
        error = (expected * (1 - expected) / size).sqrt()  # two revisions of one answer are not independent
        z = ((seen - expected) / error)[expected * size > 30]  # where the normal law holds
        assert z.numel() > 100 and z.abs().max() < 4.5


def test_supervised_learning_on_revisions_ends_at_their_distribution():
    """The cross-entropy on the revisions, minimised over a table of logits for every prefix."""
    world = original.make_world(0)
    target = original.sl_cai(world.front(0.0), original.revision_kernel(world.belief), 2)
    policy = exact.World(torch.zeros(X, 31, 5, dtype=torch.float64), world.help, world.beta, 5, 3)
    logits = exact.logits_of(policy, world.front(0.0)).requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def closure():
        optimizer.zero_grad()
        loss = -(target.exp() * exact.response_logps(policy, logits)).sum(-1).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert exact.kl(target, exact.response_logps(policy, logits.detach())).max() < 1e-5


# The stages, measured


def ai_reward(world, start, comparisons, seed):
    """A preference model of the judge's soft labels for pairs of the policy's own answers."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.multinomial(start.exp(), 2 * comparisons, replacement=True, generator=generator).chunk(2, dim=1)
    labels = original.ai_preference(world.belief)[torch.arange(X)[:, None], *pairs]
    return original.fit_reward(*pairs, labels)


def at_harm(world, start, rewards, target, most=20.0):
    """The RL policy of the least weight on the reward at which harm is at most `target`, or that of weight `most`."""
    low, high = 0.0, most
    for _ in range(50):
        middle = (low + high) / 2
        above = world.measure(original.rl_cai(start, middle * rewards, world.beta))["harm"] > target
        low, high = (middle, high) if above else (low, middle)
    return original.rl_cai(start, high * rewards, world.beta)


def mean(values):
    return sum(values) / len(values)


@pytest.mark.evidence
def test_no_policy_lies_beyond_the_front(evidence):
    """Over the stages of all worlds and random policies: the most that any has on the front's supporting lines."""
    beyond, count = [], 0
    for seed in range(5):
        world = original.make_world(seed)
        helpful, kernel = world.front(0.0), original.revision_kernel(world.belief)
        stages = [original.sl_cai(helpful, kernel, n) for n in (1, 2, 3, 4)]
        stages += [original.rl_cai(p, ai_reward(world, p, 500, seed), world.beta) for p in (helpful, *stages)]
        policies = [*stages, *random_policies(200, seed=seed), *random_policies(200, seed=seed, scale=0.2)]
        policies += [(world.front(w) + 0.05 * p).log_softmax(-1) for w in (0.2, 0.8) for p in random_policies(50, seed)]
        points = [world.measure(policy) for policy in policies]
        count += len(points)
        excess = -math.inf
        for weight in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 3.0):
            best = world.measure(world.front(weight))
            top = best["net"] - weight * best["harm"] / 2
            excess = max(excess, *(point["net"] - weight * point["harm"] / 2 - top for point in points))
        beyond.append(excess)
    evidence(
        NAME,
        "Most that any other policy gains on the front",
        value=max(beyond),
        bar=0.0,
        better="<",
        seeds=list(range(5)),
        spread=beyond,
        note=f"Net help less weight times harm, at 9 weights, over {count} policies: negative, so none is beyond.",
    )


@pytest.mark.evidence
def test_revisions_lower_harm_and_help(evidence):
    """As in figure 5 of the paper: with each revision less harm, and less help."""
    seeds = list(range(5))
    rows = []  # (seeds, stages) of measures
    for seed in seeds:
        world = original.make_world(seed)
        helpful, kernel = world.front(0.0), original.revision_kernel(world.belief)
        stages = [helpful, *(original.sl_cai(helpful, kernel, n) for n in (1, 2, 3, 4))]
        rows.append([world.measure(p) | {"gap": world.gap(p)} for p in stages])
    for row in rows:
        for before, after in zip(row, row[1:], strict=False):
            for name in ("harm", "help", "help_harmless", "net"):
                assert after[name] < before[name]
        falls = [before["harm"] - after["harm"] for before, after in zip(row, row[1:], strict=False)]
        assert falls[0] == max(falls)  # the first revision removes the most
    for n, stage in ((0, "helpful-only"), (1, "SL-CAI-1"), (4, "SL-CAI-4")):
        for name, title in (("harm", "Harm"), ("help", "Help"), ("gap", "Gap to the front")):
            values = [row[n][name] for row in rows]
            bar = {("helpful-only", "harm"): (0.95, ">="), ("SL-CAI-4", "harm"): (0.6, "<=")}.get((stage, name))
            evidence(
                NAME,
                f"{title}, {stage}",
                value=mean(values),
                bar=bar[0] if bar else None,
                better=bar[1] if bar else "<=",
                seeds=seeds,
                spread=values,
            )


@pytest.mark.evidence
def test_supervised_phase_saves_comparisons(evidence):
    """With 10 comparisons of its own answers a request, the helpful-only model cannot be taught: both answers of a pair
    do harm. After the supervised phase it can."""
    seeds, ends = list(range(5)), {}
    for few in (10, 100):
        for name in ("the helpful-only model", "SL-CAI-1"):
            ends[few, name] = []
            for seed in seeds:
                world = original.make_world(seed)
                start = world.front(0.0)
                if name == "SL-CAI-1":
                    start = original.sl_cai(start, original.revision_kernel(world.belief), 1)
                policy = at_harm(world, start, ai_reward(world, start, few, seed), 0.05)
                ends[few, name].append(world.measure(policy)["harm"])
            evidence(
                NAME,
                f"Least harm by RL from {name}, {few} comparisons a request",
                value=mean(ends[few, name]),
                bar=0.051 if name == "SL-CAI-1" else None,
                seeds=seeds,
                spread=ends[few, name],
                note="The least of weights on the reward up to 20, or 5 % where that is reached.",
            )
    assert all(value > 0.4 for value in ends[10, "the helpful-only model"])


@pytest.mark.evidence
def test_supervised_phase_costs_help(evidence):
    """With 4,000 comparisons, at 5 % harm: RL straight from the helpful-only model is nearer to the front."""
    seeds = list(range(5))
    rows = {"RL-CAI": [], "RL-CAI without the supervised phase": []}
    for seed in seeds:
        world = original.make_world(seed)
        helpful = world.front(0.0)
        revised = original.sl_cai(helpful, original.revision_kernel(world.belief), 1)
        for name, start in zip(rows, (revised, helpful), strict=True):
            policy = at_harm(world, start, ai_reward(world, start, 4000, seed), 0.05)
            rows[name].append(world.measure(policy) | {"gap": world.gap(policy)})
    for name, values in rows.items():
        assert all(value["harm"] == pytest.approx(0.05, abs=1e-6) for value in values)
        for key, title in (("help", "Help"), ("gap", "Gap to the front")):
            spread = [value[key] for value in values]
            evidence(NAME, f"{title} at 5 % harm, {name}", value=mean(spread), seeds=seeds, spread=spread)
    for via, straight in zip(*rows.values(), strict=True):
        assert straight["gap"] < via["gap"] and straight["help"] > via["help"]


@pytest.mark.evidence
def test_judges_mistake_becomes_the_policys(evidence):
    """A harmless request that the judge takes for a harmful one loses its help; RL from the helpful-only model."""
    seeds, gaps = list(range(5)), {}
    for belief in (0.05, 0.5, 0.95):
        measured = []
        for seed in seeds:
            world = original.make_world(seed, lookalike=belief)
            start = world.front(0.0)
            policy = at_harm(world, start, ai_reward(world, start, 4000, seed), 0.05)
            measured.append(world.measure(policy) | {"gap": world.gap(policy)})
        gaps[belief] = [row["gap"] for row in measured]
        for key, title in (("help_harmless", "Help with harmless requests"), ("gap", "Gap to the front")):
            evidence(
                NAME,
                f"{title} at 5 % harm, judge wrong about the look-alike {belief:.0%} of the time",
                value=mean([row[key] for row in measured]),
                bar=0.03 if (key, belief) == ("gap", 0.05) else None,
                seeds=seeds,
                spread=[row[key] for row in measured],
            )
    for right, half, wrong in zip(*gaps.values(), strict=True):
        assert right < half < wrong


@pytest.mark.evidence
def test_more_optimisation_than_the_rules_are_worth(evidence):
    """Where no harm is left to remove, a larger weight on the judge's reward only costs: over-optimisation."""
    seeds, weights = list(range(5)), [0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.2, 2.0, 4.0]
    curves = {"net help": [], "harm": [], "help with harmless requests": []}
    for seed in seeds:
        world = original.make_world(seed)
        start = world.front(0.0)
        rewards = ai_reward(world, start, 4000, seed)
        rows = [world.measure(original.rl_cai(start, weight * rewards, world.beta)) for weight in weights]
        for name, key in zip(curves, ("net", "harm", "help_harmless"), strict=True):
            curves[name].append([row[key] for row in rows])
    losses = [row[weights.index(4.0)] - row[weights.index(1.2)] for row in curves["net help"]]
    assert all(row[weights.index(1.2)] < 0.01 for row in curves["harm"])
    evidence(
        NAME,
        "Net help that the last part of the optimisation costs",
        value=mean(losses),
        bar=0.0,
        better="<",
        seeds=seeds,
        spread=losses,
        note="The weight on the judge's reward raised from 1.2 to 4, where harm is below 1 % already.",
        curve={"x": weights, "y": curves, "xlabel": "weight on the judge's reward", "ylabel": "value"},
    )


@pytest.mark.evidence
def test_policy_gradient_ends_where_the_closed_form_says(evidence):
    """REINFORCE with leave-one-out baseline on samples, the KL in the reward, against rl_cai."""
    world = original.make_world(0)
    start = original.sl_cai(world.front(0.0), original.revision_kernel(world.belief), 1)
    rewards = 0.14 * ai_reward(world, start, 1000, 0)
    empty = exact.World(torch.zeros(X, 31, 5, dtype=torch.float64), rewards, world.beta, 5, 3)
    inner = exact.World(exact.logits_of(empty, start), rewards, world.beta, 5, 3)

    def loss(logps, samples):
        kl_term = (samples.old_logps - samples.ref_logps).sum(-1).view_as(samples.rewards)  # (X, G)
        returns = samples.rewards - world.beta * kl_term
        baseline = (returns.sum(-1, keepdim=True) - returns) / (returns.shape[-1] - 1)
        return -((returns - baseline).flatten() * logps.sum(-1)).mean()

    steps = 2000 if evidence.full else 600
    logits, _ = exact.optimise(inner, loss, steps=steps, lr=0.2, group=16)
    closed = original.rl_cai(start, rewards, world.beta)
    nats = exact.kl(exact.response_logps(inner, logits), closed).mean().item()
    evidence(
        NAME,
        "KL from sampled policy gradient to the closed form",
        value=nats,
        bar=0.1,
        unit="nats",
        seeds=[0],
        note=f"{steps:,} steps of 64 samples.",
    )


# Position bias


def test_both_orders_mend_the_direction_and_not_the_slope():
    """The averaged label is fair, but the nearer to a half the more biased the judge: rewards fitted to it shrink."""
    belief = original.HARMFUL.double()
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(Y, (2, X, 4000), generator=generator)
    scales = []
    for position in (0.0, 2.0, 4.0):
        labels = original.ai_preference(belief, sharpness=1.0, position=position)
        fitted = original.fit_reward(first, second, labels[torch.arange(X)[:, None], first, second])
        scales.append((fitted[3, 124] - fitted[3, 31]).item())  # filler alone against recipes alone
    assert scales[0] > scales[1] > scales[2] > 0
    # For a difference d and a bias b the averaged label is (sigmoid(d + b) + sigmoid(d - b)) / 2, whose slope at
    # d = 0 is sigmoid'(b) < 1/4.
    d = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad((torch.sigmoid(d + 2) + torch.sigmoid(d - 2)) / 2, d)
    assert slope.item() == pytest.approx(
        torch.sigmoid(torch.tensor(2.0)).item() * torch.sigmoid(torch.tensor(-2.0)).item()
    )
    assert slope < 0.25


def test_one_order_rewards_whatever_stands_first():
    """If the revised answer is always shown first, a biased judge prefers revision even where nothing was to revise."""
    belief = torch.zeros(X, dtype=torch.float64)
    one = original.ai_preference(belief, position=2.0, both_orders=False)
    same = original.critique(original.TOKENS, False).sum(-1)
    equal = same[:, None] == same
    assert (one[0][equal] > 0.85).all()
    assert_close(original.ai_preference(belief, position=2.0)[0][equal].mean(), torch.tensor(0.5, dtype=torch.float64))


def test_the_demo_runs(capsys):
    original.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line[:18].strip() for line in lines] == ["helpful-only", "SL-CAI", "RL-CAI", "RL-CAI without SL"]
    harms = [float(line.split("harm")[1].split()[0]) for line in lines]
    assert harms[0] > 0.95 and harms[0] > harms[1] > 0.5 and max(harms[2:]) < 0.1
