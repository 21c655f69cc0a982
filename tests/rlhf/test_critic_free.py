"""The critic-free family on one batch of rollouts: what each method makes of the same responses."""

import functools
import itertools
import statistics

import pytest
import torch
from torch.testing import assert_close

from snippets.rlhf import cispo, grpo, loop, reinforce, reinforce_pp, remax, rloo
from snippets.worlds import arithmetic, lm

METHODS = {
    "REINFORCE": (reinforce, {}),
    "ReMax": (remax, {}),
    "RLOO": (rloo, {}),
    "GRPO": (grpo, {}),
    "Dr. GRPO": (grpo, {"scale": "none", "normalize": "constant"}),
    "DAPO": (grpo, {"normalize": "token", "clip_high": 0.28}),
    "GSPO": (grpo, {"level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}),
    "CISPO": (cispo, {}),
    "REINFORCE++": (reinforce_pp, {}),
    "REINFORCE++-baseline": (reinforce_pp, {"variant": "baseline"}),
}
FILES = [f"snippets/rlhf/{name}.py" for name in ("reinforce", "remax", "rloo", "grpo", "cispo", "reinforce_pp")]
GROUP = 8
torch.set_num_threads(1)


def settings_of(name, seed=0):
    module, changes = METHODS[name]
    common = {"prompts": 16, "group": GROUP, "beta": 0.0, "seed": seed}
    return module.algorithm(), module.algorithm().settings(**common, **changes)


def sample(policy, tokenizer, seed, step=0):
    """The loop's own rollout: 16 prompts, 8 responses each, and the greedy one for ReMax."""
    records = arithmetic.problems(held_out=False)
    settings = settings_of("GRPO", seed)[1]
    return loop.rollout(policy, tokenizer, records, arithmetic.exact_match, settings, step=step, greedy=True)


def logps_of(policy, batch):
    return lm.token_logps(policy, batch.ids, batch.attention, batch.mask.shape[1])


def weights(name, logps, rollout):
    """(B, T): how hard each token is pushed up, minus the gradient of the loss with respect to its log-probability."""
    algorithm, settings = settings_of(name)
    advantages, _ = algorithm.advantages(rollout, settings)
    logps = logps.detach().requires_grad_()
    loss = algorithm.loss(logps, rollout, torch.arange(len(logps)), advantages, settings)
    return -torch.autograd.grad(loss, logps)[0]


def gradients(policy, rollout):
    """{method: its gradient with respect to all weights}, at the policy as it stands."""
    logps = logps_of(policy, rollout.completions)
    found = {}
    for name in METHODS:
        pulls = weights(name, logps, rollout)
        parts = torch.autograd.grad(logps, list(policy.parameters()), -pulls, retain_graph=True, allow_unused=True)
        found[name] = torch.cat([part.flatten() for part in parts if part is not None]).double()
    return found


def update(policy, rollout, passes, *, minibatches=4, lr=5e-5, seed=0):
    """CISPO's updates on one batch, so that the ratios leave 1: the same policy for all methods."""
    algorithm, settings = settings_of("CISPO")
    advantages, _ = algorithm.advantages(rollout, settings)
    batch, generator = rollout.completions, torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)
    for _ in range(passes):
        for rows in torch.randperm(len(batch.ids), generator=generator).tensor_split(minibatches):
            part = lm.token_logps(policy, batch.ids[rows], batch.attention[rows], batch.mask.shape[1])
            loss = algorithm.loss(part, rollout, rows, advantages[rows], settings)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()


@functools.cache
def moved(seed):
    """The warm start after two passes over one batch, and that batch."""
    policy, tokenizer = arithmetic.warm_start()
    rollout = sample(policy, tokenizer, seed)
    update(policy, rollout, passes=2, seed=seed)
    return policy, rollout


@functools.cache
def fresh(seed, step=0):
    policy, tokenizer = arithmetic.warm_start()
    return policy, sample(policy, tokenizer, seed, step)


def test_the_table_of_the_page():
    """In the first update, each token's weight by the page's table: its advantage over what it is divided by."""
    policy, rollout = fresh(0)
    mask = rollout.completions.mask
    scores, valid = rollout.scores, mask.bool()
    rows, tokens, lengths = len(mask), mask.sum(), mask.sum(-1)
    groups = scores.view(-1, GROUP)
    centred = (groups - groups.mean(-1, keepdim=True)).flatten()
    scaled = ((groups - groups.mean(-1, keepdim=True)) / (groups.std(-1, keepdim=True) + 1e-4)).flatten()
    flat = scores[:, None].expand(mask.shape)[valid]
    shared = centred[:, None].expand(mask.shape)[valid]
    expected = {
        "REINFORCE": (scores - (scores.sum() - scores) / (rows - 1)) / rows,
        "ReMax": (scores - rollout.greedy_scores) / rows,
        "RLOO": (scores - ((groups.sum(-1, keepdim=True) - groups) / (GROUP - 1)).flatten()) / rows,
        "GRPO": scaled / lengths / rows,
        "Dr. GRPO": centred / (rows * arithmetic.MAX_NEW_TOKENS),
        "DAPO": scaled / tokens,
        "GSPO": scaled / lengths / rows,
        "CISPO": scaled / tokens,
        "REINFORCE++": (scores - flat.mean()) / flat.std(correction=0) / tokens,
        "REINFORCE++-baseline": (centred - shared.mean()) / shared.std(correction=0) / tokens,
    }
    assert list(expected) == list(METHODS)
    with torch.no_grad():
        logps = logps_of(policy, rollout.completions)
    for name, pulls in expected.items():
        found = weights(name, rollout.completions.logps, rollout)
        assert_close(found, torch.where(valid, pulls[:, None], 0.0), rtol=1e-4, atol=1e-8)
        assert_close(weights(name, logps, rollout), found, rtol=0.02, atol=1e-6)  # the loop's second forward pass


@pytest.mark.evidence("benchmarks/critic_free")
def test_what_the_clips_drop(evidence):
    """After two passes over a batch: the share of tokens with an advantage that a method no longer moves, and how
    likely those were that it would still have to raise. CISPO, REINFORCE and ReMax drop none."""
    seeds = list(range(5)) if evidence.full else [0]
    dropped, rare, common = {name: [] for name in METHODS}, [], []
    for seed in seeds:
        policy, rollout = moved(seed)
        batch = rollout.completions
        with torch.no_grad():
            logps = logps_of(policy, batch)
        ratio, old = (logps - batch.logps).exp(), batch.logps.exp()
        for name in METHODS:
            algorithm, settings = settings_of(name)
            advantages, _ = algorithm.advantages(rollout, settings)
            advantages = (advantages if advantages.dim() == 2 else advantages[:, None]).expand(batch.mask.shape)
            alive = batch.mask.bool() & (advantages.abs() > 1e-6)
            gone = alive & (weights(name, logps, rollout) == 0)
            dropped[name].append((gone.sum() / alive.sum()).item())
            if name == "GRPO":
                assert torch.equal(gone, alive & torch.where(advantages > 0, ratio > 1.2, ratio < 0.8))
                rare.append(old[gone & (advantages > 0)].mean().item())
                common.append(old[alive & ~gone & (advantages > 0)].mean().item())
    for name in ("REINFORCE", "ReMax", "CISPO"):
        assert max(dropped[name]) == 0
    assert all(a < b for a, b in zip(dropped["DAPO"], dropped["GSPO"], strict=True))
    assert max(rare) < min(common) - 0.2
    told = {"seeds": seeds, "files": FILES, "note": "After eight updates, two passes, on one batch of 128 responses."}
    for name, values in dropped.items():
        check = f"{name}: share of tokens that the clip drops"
        evidence("benchmarks/critic_free", check, value=statistics.mean(values), spread=values, **told)
    for label, values in (("drops", rare), ("keeps", common)):
        check = f"Probability at sampling of the rising tokens that GRPO {label}"
        evidence("benchmarks/critic_free", check, value=statistics.mean(values), spread=values, **told)


@pytest.mark.evidence("benchmarks/critic_free")
def test_how_alike_the_gradients_are(evidence):
    """Cosines between the methods' gradients for the same batch, in its first update and after two passes."""
    seeds = list(range(5)) if evidence.full else [0]
    names = list(METHODS)
    for stage, make in (("first update", fresh), ("two passes later", moved)):
        tables = []
        for seed in seeds:
            found = gradients(*make(seed))
            unit = torch.stack([found[name] / found[name].norm().clamp(min=1e-30) for name in names])
            tables.append(unit @ unit.T)
        mean = torch.stack(tables).mean(0)
        told = {"seeds": seeds, "files": FILES}

        def cosines(a, b, tables=tables):
            return [table[names.index(a), names.index(b)].item() for table in tables]

        if stage == "first update":
            same = [("GRPO", "GSPO"), ("DAPO", "CISPO"), ("RLOO", "Dr. GRPO")]
            assert min(x for pair in same for x in cosines(*pair)) > 0.999
            rest = [mean[i, j].item() for i, j in itertools.combinations(range(3, 8), 2)]
            check = "First update: smallest cosine among GRPO, Dr. GRPO, DAPO, GSPO and CISPO"
            evidence("benchmarks/critic_free", check, value=min(rest), note="Of the means over the seeds.", **told)
        else:
            assert statistics.mean(cosines("GRPO", "CISPO")) < 0.95
        table = {"x": names, "y": {"cosine": mean.tolist()}, "xlabel": "", "ylabel": "cosine"}
        told_of = ["CISPO", "DAPO", "GSPO", "RLOO", "ReMax", "REINFORCE++", "REINFORCE++-baseline"]
        pairs = [*(("GRPO", other) for other in told_of), ("CISPO", "REINFORCE"), ("REINFORCE", "REINFORCE++")]
        for k, pair in enumerate(pairs):
            values = cosines(*pair)
            check = f"Cosine of {pair[0]} and {pair[1]}, {stage}"
            drawn = {"curve": table} if k == 0 else {}
            evidence("benchmarks/critic_free", check, value=statistics.mean(values), spread=values, **drawn, **told)


@pytest.mark.evidence("benchmarks/critic_free")
def test_who_goes_on_in_the_first_direction(evidence):
    """The cosine between a method's gradient after two passes and its own in the first update, for the same batch.
    Without a clip the direction stays; what a clip leaves over has lost it."""
    seeds = list(range(5)) if evidence.full else [1]
    kept = {name: [] for name in METHODS}
    for seed in seeds:
        first, later = gradients(*fresh(seed)), gradients(*moved(seed))
        for name in METHODS:
            kept[name].append(torch.cosine_similarity(first[name], later[name], dim=0).item())
    assert min(kept["CISPO"] + kept["REINFORCE"]) > 0.5
    assert all(g < c - 0.2 for g, c in zip(kept["GRPO"], kept["CISPO"], strict=True))
    for name, values in kept.items():
        check = f"{name}: cosine of its gradient two passes later with its first"
        told = {"seeds": seeds, "spread": values, "files": FILES}
        evidence("benchmarks/critic_free", check, value=statistics.mean(values), **told)


@pytest.mark.evidence("benchmarks/critic_free")
def test_how_well_two_batches_agree(evidence):
    """The mean cosine between a method's gradients for batches of other prompts, at the warm start: what is noise in
    one batch is not in the other."""
    seeds, draws = (list(range(5)), 6) if evidence.full else ([0], 2)
    agree = {name: [] for name in METHODS}
    for seed in seeds:
        found = [gradients(*fresh(seed, step)) for step in range(draws)]
        for name in METHODS:
            pairs = itertools.combinations([one[name] for one in found], 2)
            agree[name].append(statistics.mean(torch.cosine_similarity(a, b, dim=0).item() for a, b in pairs))
    assert statistics.mean(agree["REINFORCE++"]) < statistics.mean(agree["RLOO"])
    for name, values in agree.items():
        check = f"{name}: cosine between two batches' gradients"
        note = "At the warm start, 15 pairs a seed of batches of 16 prompts and 8 responses."
        told = {"seeds": seeds, "spread": values, "files": FILES, "note": note}
        evidence("benchmarks/critic_free", check, value=statistics.mean(values), **told)


# What stands around the loss: dynamic sampling and overlong filtering, exactly


@pytest.mark.parametrize("scale", ["none", "std"])
def test_dynamic_sampling_keeps_the_direction(scale):
    """A group of equal rewards has no gradient. So drawing again until a group is mixed leaves each prompt's expected
    update in proportion: all of them grow by one factor, 1 / the chance that a group is mixed."""
    group, chances = 4, [0.05, 0.3, 0.5, 0.9]  # the prompts are drawn alike
    outcomes = torch.tensor(list(itertools.product([0.0, 1.0], repeat=group)), dtype=torch.float64)
    mixed = (outcomes.sum(-1) > 0) & (outcomes.sum(-1) < group)
    plain, shares, kept = [], [], []
    for p in chances:
        chance = (p**outcomes * (1 - p) ** (1 - outcomes)).prod(-1)
        score = (outcomes - p) / (p * (1 - p))  # of one response, in units of grad p
        pull = (grpo.group_advantages(outcomes, scale=scale) * score).mean(-1)
        plain.append((chance * pull).sum().item() / len(chances))
        shares.append(chance[mixed].sum().item())
        kept.append((chance * pull)[mixed].sum().item() / shares[-1])  # of a group that was kept
    accepted = [share / sum(shares) for share in shares]  # which prompts the batch then holds
    factor = len(chances) / sum(shares)
    for before, share, pull in zip(plain, accepted, kept, strict=True):
        assert share * pull == pytest.approx(factor * before)
    assert accepted[0] < 0.5 * accepted[2]  # and yet the batch holds fewer prompts of the hard kind


def test_a_filtered_response_still_counts_in_its_group():
    """Overlong filtering masks the cut-off response. As one of a group it still lowers the others' baseline, so it
    loses probability to them: its own share of what it would lose if it were not masked."""
    probs = torch.tensor([0.4, 0.3, 0.3], dtype=torch.float64)  # right, wrong, cut off
    rewards = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    advantages = rewards - (probs * rewards).sum()  # those of a large group
    pushes = {}
    for kind, mask in (("counted", [1, 1, 1]), ("masked", [1, 1, 0])):
        logits = probs.log().requires_grad_()
        logps = logits.log_softmax(-1)[:, None]
        loss = grpo.grpo_loss(logps, logps.detach(), 3 * probs * advantages, torch.tensor(mask)[:, None])
        pushes[kind] = torch.autograd.grad(loss, logits)[0][2].item()
    assert pushes["counted"] > pushes["masked"] > 0  # gradient descent lowers it in both cases
    assert pushes["masked"] == pytest.approx(probs[2].item() * pushes["counted"])
