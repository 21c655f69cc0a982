"""Reward heads: ridge regression, rank correlation, penalties and gate against their definitions; a gate that finds
known weights; broken copies."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from snippets.rlhf import reward_heads as original
from snippets.worlds import arithmetic, lm
from tests.mutation import caught_by, load_mutant

PATH = "snippets/rlhf/reward_heads.py"


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The pieces. Each check takes the module, so that broken copies can be put to it.


def check_each_objective_is_its_own_ridge_regression(heads):
    """The gradient of sum (w h - y)^2 + ridge |w|^2 is 0, over the rows that are rated."""
    features, ratings = normal(40, 6), normal(40, 3, seed=1)
    ratings[torch.rand(40, 3, generator=torch.Generator().manual_seed(2)) < 0.4] = math.nan
    for ridge in (0.1, 5.0):
        weights = heads.fit_objectives(features, ratings, ridge=ridge)
        assert weights.shape == (3, 6)
        for k in range(3):
            gradient = ridge * weights[k]
            for h, y in zip(features, ratings[:, k].tolist(), strict=True):
                if not math.isnan(y):
                    gradient = gradient + (h @ weights[k] - y) * h
            assert_close(gradient, torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-9)
    exact = heads.fit_objectives(features, features @ normal(3, 6, seed=3).T, ridge=1e-9)
    assert_close(exact, normal(3, 6, seed=3), rtol=1e-6, atol=1e-6)


def check_bad_ratings_are_named(heads):
    features, ratings = normal(5, 2), normal(5, 3)
    with pytest.raises(ValueError, match=r"features \(5, 2\) against ratings \(4, 3\); want \(N, D\) and \(N, K\)"):
        heads.fit_objectives(features, ratings[:4])
    with pytest.raises(ValueError, match="ridge must be positive, got 0"):
        heads.fit_objectives(features, ratings, ridge=0.0)
    ratings[:, 1] = math.nan
    with pytest.raises(ValueError, match="objective 1 has no rating"):
        heads.fit_objectives(features, ratings)


def ranks(values):
    """Mean ranks from 1, by counting."""
    return [sum(b < a for b in values) + (sum(b == a for b in values) + 1) / 2 for a in values]


def check_rank_correlation_by_counting(heads):
    for seed, round_ in ((0, False), (1, True)):
        x, y = normal(30, seed=seed), normal(30, seed=seed + 10)
        y = y + x
        x, y = (x.round(), y.round()) if round_ else (x, y)
        a, b = ranks(x.tolist()), ranks(y.tolist())
        mean = sum(a) / 30
        cov = sum((p - mean) * (q - mean) for p, q in zip(a, b, strict=True))
        norm = math.sqrt(sum((p - mean) ** 2 for p in a) * sum((q - mean) ** 2 for q in b))
        assert heads.spearman(x, y) == pytest.approx(cov / norm, rel=1e-9)
    assert heads.spearman(x, x.exp()) == pytest.approx(1.0)
    assert heads.spearman(x, -x) == pytest.approx(-1.0)
    assert heads.spearman(x, x * 0) == 0.0


def check_a_penalty_takes_the_rank_correlation_to_zero_and_no_further(heads):
    verbosity = normal(200)
    others = [normal(200, seed=1) + verbosity, normal(200, seed=2) + 0.2 * verbosity, normal(200, seed=3) - verbosity]
    rewards = torch.stack([others[0], verbosity, others[1], others[2]], dim=1)
    penalties = heads.verbosity_penalties(rewards, 1)
    assert penalties[1] == 0 and penalties[3] == 0  # itself, and one that verbosity does not help
    assert penalties[0] > penalties[2] > 0
    for k in (0, 2):
        after = heads.spearman(rewards[:, k] - penalties[k] * verbosity, verbosity)
        before = heads.spearman(rewards[:, k] - (penalties[k] - 1e-3) * verbosity, verbosity)
        assert -0.01 < after <= 0 < before + 1e-9
    for low, high in ((0.0, 0.3), (0.3, 1.0), (1.0, 4.0)):  # it falls as the penalty grows
        falls = [heads.spearman(others[0] - lam * verbosity, verbosity) for lam in (low, high)]
        assert falls[0] > falls[1]
    with pytest.raises(ValueError, match="constant"):
        heads.verbosity_penalties(torch.cat([rewards, rewards[:, :1] * 0], dim=1), 4)
    with pytest.raises(ValueError, match="objective 0 needs a penalty above 0.1"):
        heads.verbosity_penalties(rewards, 1, most=0.1)


def check_the_gate_weighs_and_sums_to_one(heads):
    torch.manual_seed(0)
    gate = heads.Gate(5, 3)
    weights = gate(normal(7, 5).float())
    assert weights.shape == (7, 3) and (weights > 0).all()
    assert_close(weights.sum(-1), torch.ones(7))
    assert gate(torch.full((2, 5), 1e6)).isfinite().all()
    gate = heads.Gate(5, 3, hidden=4)
    assert [tuple(p.shape) for p in gate.layers.parameters()] == [(4, 5), (4,), (3, 4), (3,)]
    with torch.no_grad():
        there, back, middle = (gate(sign * torch.ones(1, 5)).log() for sign in (3.0, -3.0, 0.0))
    odds = (there + back - 2 * middle).diff()  # 0 for weights whose log-odds are linear in the prompt
    assert odds.abs().max() > 1e-3


def check_the_gate_loss_in_loops(heads):
    weights, chosen, rejected = normal(6, 3).softmax(-1).float(), normal(6, 3, seed=1), normal(6, 3, seed=2)
    for scale in (1.0, 2.5):
        losses = heads.gate_loss(weights, chosen, rejected, scale)
        for i in range(6):
            margin = scale * sum(weights[i, k].item() * (chosen[i, k] - rejected[i, k]).item() for k in range(3))
            assert losses[i].item() == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-5)
    wide = heads.gate_loss(weights, chosen * 0 - 1e4, rejected * 0)
    assert wide.isfinite().all() and wide[0].item() == pytest.approx(1e4, rel=1e-4)
    with pytest.raises(ValueError, match=r"\(6, 2\) against \(6, 3\); want \(B, K\)"):
        heads.gate_loss(weights, chosen[:, :2], rejected)


def check_features_are_read_at_the_prompts_end_and_at_the_eos(heads):
    tokenizer = arithmetic.make_tokenizer()
    model = arithmetic.make_model(len(tokenizer), hidden=32, layers=2)
    texts = [("37+48=", "85"), ("1+1=", "2"), ("99+9=", "108")]
    ids, attention = lm.encode_prompts(tokenizer, [p for p, _ in texts], torch.device("cpu"))
    for extra in (0, 2):
        width = 4 + extra
        rows = [tokenizer(r)["input_ids"] + [1] for _, r in texts]
        responses = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        valid = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        both = torch.cat([ids, responses], 1), torch.cat([attention, valid], 1)
        prompts, ends = heads.trunk_features(model.base_model, *both, width)
        assert not prompts.requires_grad and not ends.requires_grad
        for i, (prompt, response) in enumerate(texts):
            row = torch.tensor([tokenizer(prompt + response)["input_ids"] + [1]])
            with torch.no_grad():
                hidden = model.base_model(row)[0][0]
            assert_close(ends[i], hidden[-1], rtol=1e-4, atol=1e-4)
            assert_close(prompts[i], hidden[len(prompt) - 1], rtol=1e-4, atol=1e-4)


def check_training_leaves_the_rewards_alone_and_learns_the_scale(heads):
    torch.manual_seed(0)
    chosen, rejected = (normal(200, 2, seed=s).float().requires_grad_() for s in (0, 1))
    gate = heads.Gate(4, 2)
    before = gate.log_scale.item()
    heads.train_gate(gate, normal(200, 4, seed=2).float(), chosen, rejected, steps=5)
    assert chosen.grad is None and rejected.grad is None
    assert gate.log_scale.item() != before


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_code(check):
    check(original)


MISTAKES = {
    "missing ratings are 0": ("rated = ~column.isnan()", "column = column.nan_to_num(); rated = ~column.isnan()"),
    "no ridge": ("x.T @ x + ridge * torch", "x.T @ x + 1e-9 * torch"),
    "one ridge a row": ("x.T @ x + ridge *", "x.T @ x + ridge * len(x) *"),
    "ridge may be 0": ("if not ridge > 0", "if not ridge >= 0"),
    "values for ranks": ("middle.double()[place] - (len(values) + 1) / 2", "values.double() - values.double().mean()"),
    "ties by their last rank": ("counts.cumsum(0) - (counts - 1) / 2", "counts.cumsum(0)"),
    "ranks uncentred": (" - (len(values) + 1) / 2)", " - 0 * len(values))"),
    "verbosity added": ("rewards[:, k] - middle * verbosity", "rewards[:, k] + middle * verbosity"),
    "a penalty for all": ("if k == verbose or spearman(rewards[:, k], verbosity) <= 0:", "if k == verbose:"),
    "a penalty on itself": ("if k == verbose or spearman", "if spearman"),
    "the most": ("penalties[k] = high", "penalties[k] = most"),
    "a linear gate": ("nn.Sequential(first, nn.ReLU(), last)", "nn.Sequential(first, last)"),
    "no softmax": (".softmax(-1)", ".sigmoid()"),
    "a softmax over the batch": (".softmax(-1)", ".softmax(0)"),
    "the sign": ("(chosen_rewards.float() - rejected_rewards.float())", "(rejected_rewards - chosen_rewards).float()"),
    "weights left out": ("difference = (weights * (", "difference = (1 / 3 * ("),
    "no scale": ("-logsigmoid(scale * difference)", "-logsigmoid(difference)"),
    "the prompt's state one too far": ("hidden[:, -length - 1]", "hidden[:, -length]"),
    "the last column": ("hidden[rows, last]", "hidden[rows, -1]"),
    "no positions": ("positions = (attention.cumsum(-1) - 1)", "positions = (attention * 0)"),
    "gradients to the rewards": ("chosen[rows].detach(), rejected[rows].detach()", "chosen[rows], rejected[rows]"),
    "a scale that is fixed": ("gate.log_scale.exp()).mean()", "gate.log_scale.exp().detach()).mean()"),
}


def test_no_check_fails_on_the_original():
    assert caught_by(original, CHECKS) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    """Each deliberate mistake makes at least one check fail."""
    assert caught_by(load_mutant(PATH, *MISTAKES[mistake]), CHECKS)


# Known weights.


@functools.cache
def trial(seed, pairs=8000):
    """-> (accuracy, error of a weight) of the gate and of one weighting for all, the scale, and the accuracies of the
    truth and of one network on prompt and response together; all on pairs held out."""
    data = original.make_data(original.Settings(seed=seed, pairs=pairs))
    fitted = original.fit_objectives(data["rated"], data["ratings"])
    chosen, rejected = (data[name] @ fitted.T for name in ("chosen", "rejected"))
    half, results = pairs // 2, {}
    for name, prompts in (("gate", data["prompts"]), ("one weighting", data["prompts"] * 0)):
        torch.manual_seed(seed)
        gate = original.train_gate(original.Gate(16, 3), prompts[:half], chosen[:half], rejected[:half])
        weights = gate(prompts[half:]).detach()
        right = ((weights * (chosen - rejected)[half:]).sum(-1) > 0).double().mean().item()
        error = (weights - original.KINDS[data["kind"][half:]]).abs().mean().item()
        results[name] = (right, error)
        results["scale"] = results.get("scale", gate.log_scale.exp().item())
    results["truth"] = (data["margin"][half:] > 0).double().mean().item()
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    both = [torch.cat([data["prompts"], data[name]], 1) for name in ("chosen", "rejected")]
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    best = 0.0
    for step in range(300):
        rows = torch.randint(half, (256,))
        loss = -logsigmoid(net(both[0][rows]) - net(both[1][rows])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 49:  # its best moment on the held-out pairs, which flatters it
            with torch.no_grad():
                wins = net(both[0][half:]) > net(both[1][half:])
            best = max(best, wins.double().mean().item())
    results["network"] = best
    return results


@pytest.mark.evidence
def test_the_gate_finds_the_weights_and_one_weighting_cannot(evidence):
    torch.set_num_threads(1)
    seeds = list(range(5)) if evidence.full else [0]
    runs = [trial(seed) for seed in seeds]
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    truth = [run["truth"] for run in runs]
    common = {"seeds": seeds}
    evidence(
        "rlhf/reward_heads",
        "Accuracy on held-out pairs, the true reward",
        value=mean(truth),
        spread=truth,
        note="Labels are drawn by Bradley-Terry, so nothing can be right on all of them.",
        **common,
    )
    for name, bar, better in (("gate", mean(truth) - 0.02, ">="), ("one weighting", mean(truth) - 0.1, "<=")):
        rights, errors = ([run[name][i] for run in runs] for i in (0, 1))
        title = "one weighting for all prompts" if name != "gate" else name
        evidence(
            "rlhf/reward_heads",
            f"Accuracy on held-out pairs, {title}",
            value=mean(rights),
            bar=bar,
            better=better,
            spread=rights,
            note="4,000 pairs, prompts of three kinds, three objectives.",
            **common,
        )
        evidence(
            "rlhf/reward_heads",
            f"Mean error of a weight, {title}",
            value=mean(errors),
            bar=0.07 if name == "gate" else 0.2,
            better="<=" if name == "gate" else ">=",
            spread=errors,
            **common,
        )
    network = [run["network"] for run in runs]
    evidence(
        "rlhf/reward_heads",
        "Accuracy on held-out pairs, one network on prompt and response",
        value=mean(network),
        spread=network,
        note="A scalar reward by Bradley-Terry alone, without ratings, at its best moment.",
        **common,
    )
    scales = [run["scale"] for run in runs]
    evidence(
        "rlhf/reward_heads",
        "Scale that the gate learned; the true one is 4",
        value=mean(scales),
        spread=scales,
        **common,
    )
    assert all(3 < scale < 5 for scale in scales)


def test_without_a_scale_the_gate_exaggerates():
    """The labels are four times as sure as rewards of this size with weights that sum to 1 can say. A gate without a
    scale makes up for what it can by extreme weights, and its errors grow, while accuracy hardly falls. So does one
    whose scale learns at the rate of the layers and lags behind."""
    torch.set_num_threads(1)
    data = original.make_data(original.Settings(pairs=8000))
    fitted = original.fit_objectives(data["rated"], data["ratings"])
    chosen, rejected = (data[name] @ fitted.T for name in ("chosen", "rejected"))
    right, error = trial(0)["gate"]
    for module, learns in ((original, False), (load_mutant(PATH, "10 * lr", "lr"), True)):
        torch.manual_seed(0)
        gate = module.Gate(16, 3)
        gate.log_scale.requires_grad_(learns)
        module.train_gate(gate, data["prompts"][:4000], chosen[:4000], rejected[:4000])
        assert gate.log_scale.exp() < 2.5
        weights = gate(data["prompts"][4000:]).detach()
        assert (weights - original.KINDS[data["kind"][4000:]]).abs().mean().item() > 2 * error
        found = ((weights * (chosen - rejected)[4000:]).sum(-1) > 0).double().mean().item()
        assert right - 0.03 < found < right
        assert weights.max(-1).values.mean() > 0.85 > original.KINDS.max(-1).values.mean()


def test_taking_the_verbosity_out_leaves_quality_in():
    """Quality, and verbosity that the rating of helpfulness likes as such: the penalty removes the liking, and what is
    left ranks with quality better than before."""
    quality, length, noise = normal(500), normal(500, seed=1), normal(500, seed=2)
    helpful, verbose = quality + 0.8 * length + 0.3 * noise, length
    rewards = torch.stack([helpful, verbose], dim=1)
    penalty = original.verbosity_penalties(rewards, 1)[0]
    assert penalty.item() == pytest.approx(0.8, abs=0.15)
    clean = helpful - penalty * verbose
    assert original.spearman(clean, quality) > original.spearman(helpful, quality) + 0.1


def test_the_command_line_prints_a_table(capsys):
    original.main(original.Settings(pairs=2000, rated=500))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["best", "gate", "one"]
