"""Reward model: the losses in explicit loops, TRL's trainer, what its scores mean in the exact world, broken copies."""

import copy
import json
import math
import tempfile
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from snippets.preferences import loop
from snippets.rlhf import reward_model as original
from snippets.worlds import arithmetic, exact, lm
from tests.mutation import caught_by, load_mutant
from tests.trainers import QUIET, tiny

PATH = "snippets/rlhf/reward_model.py"
OPTIONS = [{}, {"margin": 0.7}, {"centering": 0.01}, {"margin": 1.0, "centering": 0.3}]


def numbers(seed=0, size=32, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(size, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(2)]


PAIRS = [
    {"prompt": "37+48=", "chosen": "85", "rejected": "75", "margin": 1.0},
    {"prompt": "7+8=", "chosen": "15", "rejected": "1", "margin": 0.0},
    {"prompt": "99+9=", "chosen": "108", "rejected": "18", "margin": 0.5},
    {"prompt": "0+0=", "chosen": "0", "rejected": "100", "margin": 2.0},
]


# The losses. Each check takes the module, so that broken copies can be put to it.


def check_the_loss_in_loops(rm):
    chosen, rejected = numbers()
    margins = torch.rand(32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for options in [*OPTIONS, {"margin": margins}, {"margin": margins, "centering": 0.1}]:
        losses = rm.bradley_terry_loss(chosen, rejected, **options)
        assert losses.shape == (32,)
        for i in range(32):
            margin = options.get("margin", 0.0)
            margin = margin[i].item() if isinstance(margin, torch.Tensor) else margin
            good, bad = chosen[i].item(), rejected[i].item()
            expected = -math.log(1 / (1 + math.exp(-(good - bad - margin))))
            expected += options.get("centering", 0.0) * (good + bad) ** 2
            assert losses[i].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def check_gradient_is_the_chance_of_being_wrong(rm):
    """d / d r_w = -sigmoid(margin - (r_w - r_l)) + 2 * centering * (r_w + r_l)."""
    for options in OPTIONS:
        chosen, rejected = (x.requires_grad_() for x in numbers())
        grads = torch.autograd.grad(rm.bradley_terry_loss(chosen, rejected, **options).sum(), (chosen, rejected))
        wrong = torch.sigmoid(options.get("margin", 0.0) - (chosen - rejected)).detach()
        centre = 2 * options.get("centering", 0.0) * (chosen + rejected).detach()
        assert_close(grads[0], -wrong + centre)
        assert_close(grads[1], wrong + centre)


def check_a_term_of_the_prompt_changes_nothing_but_the_centring(rm):
    chosen, rejected = numbers()
    shift = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert_close(
        rm.bradley_terry_loss(chosen + shift, rejected + shift, margin=0.5),
        rm.bradley_terry_loss(chosen, rejected, margin=0.5),
    )
    middle = -(chosen + rejected) / 2  # with centring, the shift that makes their sum 0 is the best
    best = rm.bradley_terry_loss(chosen + middle, rejected + middle, centering=0.1)
    for other in (middle - 0.1, middle + 0.1, middle * 0):
        assert (rm.bradley_terry_loss(chosen + other, rejected + other, centering=0.1) > best).all()
    assert_close(best, rm.bradley_terry_loss(chosen, rejected))


def check_large_scores_stay_finite(rm):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for difference in (1e4, 100.0, 0.0, -100.0, -1e4):
            chosen, rejected = (torch.tensor([x], dtype=dtype, requires_grad=True) for x in (difference, 0.0))
            for options in OPTIONS:
                loss = rm.bradley_terry_loss(chosen, rejected, **options)
                assert loss.dtype == torch.float32 and loss.isfinite().all()
                grads = torch.autograd.grad(loss.sum(), (chosen, rejected))
                assert all(grad.isfinite().all() for grad in grads)
    chosen = torch.tensor([-1e4], requires_grad=True)
    rm.bradley_terry_loss(chosen, torch.zeros(1)).sum().backward()
    assert chosen.grad.item() == pytest.approx(-1.0)


def check_half_precision_is_computed_in_float32(rm):
    chosen, rejected = (x.to(torch.bfloat16) + 1000 for x in numbers())
    assert_close(
        rm.bradley_terry_loss(chosen, rejected),
        rm.bradley_terry_loss(chosen.float(), rejected.float()),
        rtol=0,
        atol=0,
    )
    assert rm.bradley_terry_loss(*numbers()).dtype == torch.float64


def check_equal_scores_cost_log_2(rm):
    scores = numbers()[0]
    assert_close(rm.bradley_terry_loss(scores, scores), torch.full_like(scores, math.log(2)))


def check_a_batch_is_its_pairs_one_by_one(rm):
    chosen, rejected = numbers()
    for options in OPTIONS:
        whole = rm.bradley_terry_loss(chosen, rejected, **options)
        rows = [rm.bradley_terry_loss(chosen[i : i + 1], rejected[i : i + 1], **options) for i in range(32)]
        assert_close(whole, torch.cat(rows))


def check_k_responses_are_all_their_pairs(rm):
    """Equation 1 of InstructGPT: minus the sum of log sigmoid over K choose 2 pairs, divided by their number."""
    scores = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    losses = rm.kwise_loss(scores)
    for i, row in enumerate(scores.tolist()):
        total, pairs = 0.0, 0
        for better in range(4):
            for worse in range(better + 1, 4):
                total += math.log1p(math.exp(-(row[better] - row[worse])))
                pairs += 1
        assert pairs == math.comb(4, 2)
        assert losses[i].item() == pytest.approx(total / pairs, rel=1e-9)
    assert_close(rm.kwise_loss(scores[:, :2]), rm.bradley_terry_loss(scores[:, 0], scores[:, 1]))
    for wrong in (scores[:, :1], scores[0]):
        with pytest.raises(ValueError, match=r"want \(P, K\) with K of at least 2, got \("):
            rm.kwise_loss(wrong)


def check_bad_pairs_are_named(rm):
    chosen, rejected = numbers(size=3)
    for left, right, message in [
        (chosen, rejected[:2], r"\(3,\) against \(2,\)"),
        (chosen[:, None], rejected[:, None], r"\(3, 1\) against \(3, 1\); want \(B,\)"),
        (chosen[:0], rejected[:0], r"or are empty: \(0,\) against \(0,\)"),
    ]:
        for function in (rm.bradley_terry_loss, rm.accuracy, rm.calibration_error):
            with pytest.raises(ValueError, match=message):
                function(left, right)
    with pytest.raises(ValueError, match=r"shapes disagree: margin \(2,\), \(3,\)"):
        rm.bradley_terry_loss(chosen, rejected, margin=torch.zeros(2))
    for centering in (-0.1, math.nan):
        with pytest.raises(ValueError, match=f"centering must be at least 0, got {centering}"):
            rm.bradley_terry_loss(chosen, rejected, centering=centering)


# Accuracy and calibration.


def check_accuracy_counts_a_tie_as_half(rm):
    chosen, rejected = torch.tensor([2.0, 1.0, 0.0, -1.0]), torch.tensor([1.0, 1.0, 1.0, -2.0])
    assert rm.accuracy(chosen, rejected) == pytest.approx((1 + 0.5 + 0 + 1) / 4)


def check_calibration_error_in_loops(rm):
    chosen, rejected = numbers(size=200, scale=1.0)
    for count in (10, 4):
        bins = [[] for _ in range(count)]
        for good, bad in zip(chosen.tolist(), rejected.tolist(), strict=True):
            confidence = 1 / (1 + math.exp(-abs(good - bad)))
            bins[min(int((confidence - 0.5) / 0.5 * count), count - 1)].append((confidence, float(good > bad)))
        expected = 0.0
        for part in bins:
            if part:
                gap = abs(sum(c for c, _ in part) / len(part) - sum(r for _, r in part) / len(part))
                expected += len(part) / 200 * gap
        options = {} if count == 10 else {"bins": count}
        assert rm.calibration_error(chosen, rejected, **options) == pytest.approx(expected, rel=1e-9)
        assert rm.calibration_error(chosen.float(), rejected.float(), **options) == pytest.approx(expected, rel=1e-4)


def check_true_scores_are_calibrated_and_doubled_ones_are_not(rm):
    """Labels drawn by Bradley-Terry from the scores themselves: the accuracy of doubled scores is the same."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 20_000, dtype=torch.float64, generator=generator)
    wins = torch.rand(20_000, generator=generator) < torch.sigmoid(scores[0] - scores[1])
    chosen, rejected = torch.where(wins, scores[0], scores[1]), torch.where(wins, scores[1], scores[0])
    assert rm.calibration_error(chosen, rejected) < 0.02
    assert rm.calibration_error(2 * chosen, 2 * rejected) > 0.08
    assert rm.calibration_error(0.3 * chosen, 0.3 * rejected) > 0.08
    assert rm.accuracy(2 * chosen, 2 * rejected) == rm.accuracy(chosen, rejected)
    assert rm.calibration_error(1e4 * chosen, 1e4 * rejected) == pytest.approx(
        1 - rm.accuracy(chosen, rejected), abs=1e-3
    )
    assert rm.calibration_error(chosen * 0, chosen * 0) == 0.0


# The model.


def scoring(rm, seed=0):
    """A model whose head is not 0."""
    policy, tokenizer = tiny(seed)
    model = rm.RewardModel(policy)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(seed))
    return model, tokenizer, policy


def check_the_last_token_is_found_on_either_side(rm):
    attention = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    assert rm.last_token(attention).tolist() == [2, 4, 3, 0, 4]
    assert rm.last_token(attention.bool()).tolist() == [2, 4, 3, 0, 4]
    with pytest.raises(ValueError, match="all zeros"):
        rm.last_token(torch.tensor([[1, 1], [0, 0]]))


def check_a_score_is_the_head_on_the_eos_whatever_the_padding(rm):
    model, tokenizer, policy = scoring(rm)
    rows = [tokenizer(text)["input_ids"] + [1] for text in ("37+48=85", "1+1=2", "99+9=108")]
    expected = []
    with torch.no_grad():
        for row in rows:
            hidden = policy.model(torch.tensor([row])).last_hidden_state
            expected.append((hidden[0, -1] @ model.head.weight[0]).item())
        for more in (0, 3):
            width = max(map(len, rows)) + more
            for side in ("left", "right"):
                ids, attention = [], []
                for row in rows:
                    pads = [0] * (width - len(row))
                    ids.append(pads + row if side == "left" else row + pads)
                    ones = [1] * len(row)
                    attention.append(pads + ones if side == "left" else ones + pads)
                scores = model(torch.tensor(ids), torch.tensor(attention))
                assert scores.dtype == torch.float32
                assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def check_positions_start_at_the_first_token_for_a_model_that_counts_them(rm):
    """Rotary embeddings see distances alone, so that nothing would show. GPT-2 counts from 0."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = rm.RewardModel(GPT2LMHeadModel(GPT2Config(vocab_size=16, initializer_range=0.5, **sizes))).eval()
    torch.nn.init.normal_(model.head.weight)
    row, ones, pads = [3, 4, 5, 1], [1] * 4, [0] * 3
    with torch.no_grad():
        alone = model(torch.tensor([row]), torch.tensor([ones]))
        assert_close(model(torch.tensor([pads + row]), torch.tensor([pads + ones])), alone, rtol=1e-4, atol=1e-5)
        assert_close(model(torch.tensor([row + pads]), torch.tensor([ones + pads])), alone, rtol=1e-4, atol=1e-5)


def check_a_model_in_half_precision_scores_in_float32(rm):
    policy, tokenizer = tiny()
    model = rm.RewardModel(policy.to(torch.bfloat16))
    assert rm.score(model, tokenizer, ["1+1="], ["2"]).dtype == torch.float32
    assert model.head.weight.dtype == torch.bfloat16


def check_margin_and_centring_reach_the_training(rm):
    """The first loss of a run, of a model whose scores are not 0."""
    model, tokenizer, _ = scoring(rm)
    columns = ([pair[name] for pair in PAIRS] for name in ("prompt", "chosen", "rejected"))
    prompts, chosen, rejected = columns
    both = [rm.score(model, tokenizer, prompts, texts) for texts in (chosen, rejected)]
    margin = torch.tensor([pair["margin"] for pair in PAIRS])
    plain = [{key: pair[key] for key in ("prompt", "chosen", "rejected")} for pair in PAIRS]
    with tempfile.TemporaryDirectory() as folder:
        for pairs, options in ((PAIRS, {"margin": margin}), (plain, {})):
            settings = rm.settings_class()(out=folder, steps=1, batch=4, lr=1e-9, save_every=1000, centering=0.3)
            history = rm.train_reward_model(copy.deepcopy(model), tokenizer, pairs, settings).history
            expected = rm.bradley_terry_loss(*both, centering=0.3, **options).mean().item()
            assert history[0]["loss"] == pytest.approx(expected, rel=1e-4)
            assert history[0]["accuracy"] == rm.accuracy(*both)
    found = rm.evaluate(model, tokenizer, PAIRS)
    expected = {"held_out": rm.accuracy(*both), "calibration_error": rm.calibration_error(*both)}
    assert found == pytest.approx(expected, rel=1e-4) and expected["held_out"] != 0.5
    for pairs in ([], [*plain, {"prompt": "1+1=", "chosen": "2", "rejected": "2"}]):
        with pytest.raises(ValueError, match="want pairs, and none whose chosen and rejected are equal"):
            rm.train_reward_model(model, tokenizer, pairs, settings)


def check_it_starts_at_log_2_and_leaves_the_policy_alone(rm):
    policy, tokenizer = tiny()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    model = rm.RewardModel(policy)
    scores = rm.score(model, tokenizer, ["1+1=", "2+2="], ["2", "5"])
    assert (scores == 0).all()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


def check_texts_are_scored_with_their_eos(rm):
    model, tokenizer, _ = scoring(rm)
    prompts, completions = ["37+48=", "1+1="], ["85", "2"]
    rows = [tokenizer(p + c)["input_ids"] + [1] for p, c in zip(prompts, completions, strict=True)]
    alone = torch.cat([model(torch.tensor([row]), torch.ones(1, len(row)).long()) for row in rows])
    assert_close(rm.score(model, tokenizer, prompts, completions), alone.detach(), rtol=1e-4, atol=1e-5)
    reward = rm.reward_function(model, tokenizer)
    values = reward(completions=completions, prompts=prompts, answer=["85", "2"])
    assert isinstance(values, list) and values == pytest.approx(alone.tolist(), rel=1e-4)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_code(check):
    check(original)


MISTAKES = {
    "the sign": ("-logsigmoid(chosen - rejected", "-logsigmoid(rejected - chosen"),
    "log(sigmoid)": (
        "-logsigmoid(chosen - rejected - (0.0 if margin is None else margin))",
        "-(chosen - rejected - (0.0 if margin is None else margin)).sigmoid().log()",
    ),
    "the margin added": ("rejected - (0.0 if", "rejected + (0.0 if"),
    "no margin": ("(0.0 if margin is None else margin)", "0.0"),
    "centring of the difference": ("(chosen + rejected).square()", "(chosen - rejected).square()"),
    "centring by the absolute sum": ("(chosen + rejected).square()", "(chosen + rejected).abs()"),
    "centring without its weight": ("losses + centering * (", "losses + (centering > 0) * ("),
    "a difference in half precision": ("if chosen.dtype == torch.float64 else torch.float32", "if 0 else chosen.dtype"),
    "shapes unchecked": ("chosen.shape != rejected.shape or chosen.dim() != 1 or not chosen.numel()", "False"),
    "a mean over the batch": (
        "losses + centering * (chosen + rejected).square() if centering else losses",
        "(losses + centering * (chosen + rejected).square()).mean().expand_as(losses)",
    ),
    "pairs with themselves": ("offset=1", "offset=0"),
    "a sum over pairs": (".view(len(scores), -1).mean(-1)", ".view(len(scores), -1).sum(-1)"),
    "the worst first": ("better, worse = torch", "worse, better = torch"),
    "ties are wins": (
        "(chosen > rejected).double() + 0.5 * (chosen == rejected).double()).mean()",
        "(chosen >= rejected).double()).mean()",
    ),
    "confidence in the chosen one": ("torch.sigmoid((chosen - rejected).abs())", "torch.sigmoid(chosen - rejected)"),
    "bins over all of [0, 1]": ("((confidence - 0.5) * 2 * bins)", "(confidence * bins)"),
    "a signed gap": ("gaps.abs().sum()", "gaps.sum().abs()"),
    "the last column": ("hidden[rows, last_token(attention)]", "hidden[rows, -1]"),
    "the number of tokens": ("attention.shape[-1] - 1 - attention.long().flip(-1).argmax(-1)", "attention.sum(-1) - 1"),
    "the token before": ("attention.shape[-1] - 1 - attention", "attention.shape[-1] - 2 - attention"),
    "positions that count pads": ('"position_ids": positions', '"position_ids": positions * 0 + 1'),
    "positions from the first column": (
        "(attention.cumsum(-1) - 1).clamp(min=0)",
        "torch.arange(attention.shape[1]).expand_as(attention)",
    ),
    "scores in half precision": (".squeeze(-1).float()", ".squeeze(-1)"),
    "ten bins whatever was asked": ("* 2 * bins)", "* 2 * 10)"),
    "centring left out of the training": (", centering=settings.centering)", ")"),
    "a margin left out of the training": ("margin=margin, centering=settings", "centering=settings"),
    "chosen and rejected exchanged": (
        'for name in ("prompt", "chosen", "rejected"))',
        'for name in ("prompt", "rejected", "chosen"))',
    ),
    "pairs of equal responses": ('pair["chosen"] == pair["rejected"]', "False"),
    "no attention mask": ('"attention_mask": attention', '"attention_mask": attention * 0 + 1'),
    "the policy's own trunk": ("copy.deepcopy(policy.base_model)", "policy.base_model"),
    "a head that is not 0": ("nn.init.zeros_(self.head", "nn.init.ones_(self.head"),
}


def test_no_check_fails_on_the_original():
    assert caught_by(original, CHECKS) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    """Each deliberate mistake makes at least one check fail."""
    assert caught_by(load_mutant(PATH, *MISTAKES[mistake]), CHECKS)


# TRL


def trl_loss(chosen, rejected, margin=None, centering=None):
    """TRL's own RewardTrainer.compute_loss on given scores: the model and the trainer are stand-ins."""
    from collections import defaultdict

    from trl import RewardTrainer

    same = lambda x: x  # noqa: E731
    scores = torch.cat([chosen, rejected])[:, None]
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(gather=same, gather_for_metrics=same),
        args=SimpleNamespace(center_rewards_coefficient=centering),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(len(scores), 1)} | ({} if margin is None else {"margin": margin})
    return RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=scores), inputs)


@pytest.mark.evidence
def test_agrees_with_trl(evidence):
    """Loss and gradient, with and without margin and centring, for scores up to 10,000."""
    worst = 0.0
    for scale in (1.0, 30.0, 1e4):
        for margin in (None, torch.rand(64, generator=torch.Generator().manual_seed(1))):
            for centering in (None, 0.01, 0.5):
                ours, theirs = ([x.clone().requires_grad_() for x in numbers(size=64, scale=scale)] for _ in range(2))
                ours, theirs = ([x.detach().float().requires_grad_() for x in four] for four in (ours, theirs))
                loss = original.bradley_terry_loss(*ours, margin=margin, centering=centering or 0.0).mean()
                other = trl_loss(*theirs, margin=margin, centering=centering)
                worst = max(worst, ((loss - other).abs() / other.abs().clamp(min=1)).item())
                loss.backward()
                other.backward()
                for mine, yours in zip(ours, theirs, strict=True):
                    gap = (mine.grad - yours.grad).abs() / yours.grad.abs().clamp(min=1)
                    worst = max(worst, gap.max().item())
    evidence(
        "rlhf/reward_model",
        "Largest difference from TRL 1.16.0",
        value=worst,
        bar=1e-6,
        note="Losses and gradients in float32, relative above 1; margins, centring, scores up to 10,000.",
    )


@pytest.mark.evidence
@pytest.mark.parametrize("margin", [False, True], ids=["plain", "margin and centring"])
def test_agrees_with_trl_on_a_real_model(margin, tmp_path, evidence):
    """Tokens, EOS, padding, the token that is scored, loss and gradients, through the files that save_pretrained wrote
    and TRL's trainer, its collator and its forward pass."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    model, tokenizer, _ = scoring(original)
    model.save_pretrained(tmp_path / "reward")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    records = PAIRS if margin else [{k: v for k, v in pair.items() if k != "margin"} for pair in PAIRS]
    options = RewardConfig(str(tmp_path), center_rewards_coefficient=0.01 if margin else None, **QUIET)
    dataset = Dataset.from_list(records)
    trainer = RewardTrainer(model=classifier, args=options, train_dataset=dataset, processing_class=tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(PAIRS))])
    assert ("margin" in batch) == margin
    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()

    mine = loop.encode_pairs(tokenizer, records, torch.device("cpu"))
    chosen, rejected = model(mine.ids, mine.attention).chunk(2)
    margins = torch.tensor([pair["margin"] for pair in PAIRS]) if margin else None
    loss = original.bradley_terry_loss(chosen, rejected, margin=margins, centering=0.01 if margin else 0.0).mean()
    loss.backward()
    worst = (loss - expected).abs().item()
    ours = {f"model.{name.removeprefix('trunk.')}": p for name, p in model.named_parameters()}
    ours["score.weight"] = ours.pop("model.head.weight")
    theirs = dict(trainer.model.named_parameters())
    assert set(ours) == set(theirs)
    for name, parameter in theirs.items():
        gap = (ours[name].grad - parameter.grad).abs() / parameter.grad.abs().clamp(min=1)
        worst = max(worst, gap.max().item())
    evidence(
        "rlhf/reward_model",
        f"Largest difference from TRL 1.16.0 through its trainer, {'margin and centring' if margin else 'plain'}",
        value=worst,
        bar=1e-6,
        note="A model of 17 thousand parameters: loss and all gradients, relative above 1.",
    )


def test_transformers_skips_an_eos_that_is_the_pad(tmp_path):
    """Its classifier takes the last id that is not the pad's. With pad = EOS that is the token before: the score no
    longer sees whether the response ended, and "8" with an EOS and "8" cut off are one. The mask tells them apart."""
    from transformers import AutoModelForSequenceClassification

    model, tokenizer, _ = scoring(original)
    model.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = torch.tensor([tokenizer("37+48=85")["input_ids"] + [1]])
    ones, cut = torch.ones_like(ids), torch.tensor([[1] * 8 + [0]])
    with torch.no_grad():
        assert_close(classifier(ids, attention_mask=ones).logits[0], model(ids, ones), rtol=1e-4, atol=1e-5)
        classifier.config.pad_token_id = 1  # as after tokenizer.pad_token = tokenizer.eos_token
        assert_close(classifier(ids, attention_mask=ones).logits[0], model(ids[:, :-1], ones[:, :-1]))
        assert (model(ids, ones) - model(ids, cut)).abs() > 1e-3


# What the scores mean: population losses over all pairs of a table, minimised exactly.


def fit(world, preference, **options):
    """Scores (X, Y) that minimise the expected loss over all pairs of different responses."""
    scores = torch.zeros_like(world.rewards).requires_grad_()
    X, Y = scores.shape
    preference = preference * (1 - torch.eye(Y, dtype=preference.dtype))
    optimizer = torch.optim.LBFGS(
        [scores], max_iter=1000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        first, second = (s.expand(X, Y, Y).flatten() for s in (scores.unsqueeze(2), scores.unsqueeze(1)))
        losses = original.bradley_terry_loss(first, second, **options).view(X, Y, Y)
        loss = (preference * losses).sum() * 2 / (X * Y * Y)
        loss.backward()
        return loss

    optimizer.step(closure)
    return scores.detach()


def chances(rewards):
    return torch.sigmoid(rewards.unsqueeze(2) - rewards.unsqueeze(1))  # (X, Y, Y): the first wins


def centred(scores):
    return scores - scores.mean(-1, keepdim=True)


def slope(scores, rewards):
    """By which factor the differences of the scores are those of the rewards, least squares."""
    x, y = centred(rewards), centred(scores)
    return ((x * y).sum() / (x * x).sum()).item()


@pytest.mark.evidence
def test_the_population_fit_is_the_true_reward_up_to_a_term_of_the_prompt(evidence):
    seeds = list(range(5)) if evidence.full else [0]
    gaps = []
    for seed in seeds:
        world = exact.make_world(seed, vocab=4, length=2)
        scores = fit(world, chances(world.rewards))
        gaps.append((centred(scores) - centred(world.rewards)).abs().max().item())
    evidence(
        "rlhf/reward_model",
        "Largest error of a score difference, exact loss",
        value=max(gaps),
        bar=1e-5,
        seeds=seeds,
        spread=gaps,
        note="All pairs of 16 responses to 4 prompts with their true Bradley-Terry chances; L-BFGS in float64.",
    )


@pytest.mark.evidence
def test_centring_fixes_the_shift_and_shrinks_the_scores(evidence):
    """Its minimum is unique, with a mean of 0 a prompt. But over pairs of many responses the squared sum is not
    the shift alone: sum_i!=j (r_i + r_j)^2 = 2 (Y - 2) sum r_i^2 + 2 (sum r_i)^2, so it pulls differences in, too.
    With two responses a prompt, Y = 2, it does not."""
    world = exact.make_world(0, vocab=4, length=2)
    chance = chances(world.rewards)
    for weight, low, high in ((0.001, 0.9, 1.0), (0.01, 0.8, 0.97), (0.1, 0.2, 0.8)):
        scores = fit(world, chance, centering=weight)
        assert scores.mean(-1).abs().max() < 1e-5
        left = slope(scores, world.rewards)
        assert low < left < high
        if weight in (0.01, 0.1):
            evidence(
                "rlhf/reward_model",
                f"Share of the true differences that centring with {weight:g} leaves",
                value=left,
                bar=1.0,
                better="<",
                seeds=[0],
                note="Exact loss over all pairs of 16 responses; without centring it is 1.",
            )
    pair = exact.World(world.ref_logits, world.rewards[:, :2], 0.5, 2, 1)  # with two responses sum and difference part
    scores = fit(pair, chances(pair.rewards), centering=0.1)
    assert slope(scores, pair.rewards) == pytest.approx(1.0, abs=1e-5)


def margin_optimum(p, margin):
    """The difference d where p * sigmoid(m - d) = (1 - p) * sigmoid(m + d), for u = exp(d), k = exp(-m):
    (1 - p) k u^2 + (1 - 2p) u - p k = 0."""
    k, b = math.exp(-margin), 1 - 2 * p
    return math.log((-b + math.sqrt(b * b + 4 * p * (1 - p) * k * k)) / (2 * (1 - p) * k))


def test_a_margin_exaggerates_differences():
    """At margin 0 the difference is the log-odds of the label; a margin makes it larger, so sigmoid of it is no longer
    the chance that the label goes this way."""
    for p in (0.55, 0.75, 0.95):
        assert margin_optimum(p, 0.0) == pytest.approx(math.log(p / (1 - p)))
        for margin in (1 / 3, 1.0, 3.0):
            d = torch.tensor([margin_optimum(p, margin)], dtype=torch.float64, requires_grad=True)
            zero = torch.zeros(1, dtype=torch.float64)
            loss = p * original.bradley_terry_loss(d, zero, margin=margin)
            loss = (loss + (1 - p) * original.bradley_terry_loss(zero, d, margin=margin)).sum()
            assert torch.autograd.grad(loss, d)[0].item() == pytest.approx(0.0, abs=1e-9)
            assert d.item() > 1.1 * math.log(p / (1 - p))
    assert torch.sigmoid(torch.tensor(margin_optimum(0.75, 1.0))) > 0.85


def test_flipped_labels_shrink_the_scores_and_keep_their_order():
    """A share e of flips turns p into (1 - e) p + e (1 - p), whose log-odds are never beyond log((1 - e) / e). Two
    responses to a prompt have these log-odds. Of more, the fit is a compromise, since the noisy chances are not those
    of any scores; but it ranks by the mean chance to win, which the noise only shrinks."""
    world = exact.make_world(0, vocab=2, length=1)  # two responses: the fit is the log-odds itself
    for e in (0.1, 0.3):
        noisy = (1 - e) * chances(world.rewards) + e * (1 - chances(world.rewards))
        scores = fit(world, noisy)
        found, true = (x[:, 0] - x[:, 1] for x in (scores, world.rewards))
        assert_close(found, torch.logit(noisy[:, 0, 1]), rtol=0, atol=1e-5)
        assert (found.sign() == true.sign()).all() and (found.abs() < true.abs()).all()
        assert found.abs().max() < math.log((1 - e) / e)
    large = exact.make_world(0, vocab=4, length=2)
    noisy = 0.7 * chances(large.rewards) + 0.3 * (1 - chances(large.rewards))
    scores = fit(large, noisy)
    assert torch.equal(scores.argsort(-1), large.rewards.argsort(-1))
    assert 0.2 < slope(scores, large.rewards) < 0.5
    won = torch.sigmoid(scores.unsqueeze(2) - scores.unsqueeze(1)).sum(-1)  # the fit wins as often as the labels say
    assert_close(won, noisy.sum(-1), rtol=0, atol=1e-5)
    sure = exact.World(world.ref_logits, torch.tensor([[9.0, 0.0, -9.0]], dtype=torch.float64), 0.5, 2, 1)
    scores = fit(sure, 0.7 * chances(sure.rewards) + 0.3 * (1 - chances(sure.rewards)))
    assert (scores[0, 0] - scores[0, 2]).item() > 1.3 * math.log(0.7 / 0.3)  # beyond what any pair's labels say


def test_one_winner_always_sends_the_scores_to_infinity():
    """Without noise the likelihood has no maximum: the loss falls as the difference grows, for ever."""
    difference = torch.tensor([1.0, 10.0, 100.0, 700.0], dtype=torch.float64)
    losses = original.bradley_terry_loss(difference, torch.zeros_like(difference))
    assert (losses.diff() < 0).all() and losses[-1] > 0


def test_agreement_of_two_labellers_bounds_accuracy_on_one():
    """Labels of chance p: two labellers agree with chance p^2 + (1 - p)^2, and the best predictor is right on one of
    them with chance max(p, 1 - p). Over pairs the best accuracy is from the agreement A to half of 1 + sqrt(2A - 1)."""
    generator = torch.Generator().manual_seed(0)
    for scale in (0.3, 1.0, 3.0):
        rewards = scale * torch.randn(2, 4000, dtype=torch.float64, generator=generator)
        p = torch.sigmoid(rewards[0] - rewards[1])
        agree, best = (p**2 + (1 - p) ** 2).mean(), torch.maximum(p, 1 - p).mean()
        assert agree < best < (1 + torch.sqrt(2 * agree - 1)) / 2
    assert (1 + math.sqrt(2 * 0.73 - 1)) / 2 == pytest.approx(0.839, abs=1e-3)  # InstructGPT's labellers: 0.73


def test_k_responses_of_one_prompt_share_their_forward_pass():
    """K choose 2 pairs from K scores: the gradient of a response's score is the sum over the pairs it is in."""
    scores = torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    (grad,) = torch.autograd.grad(original.kwise_loss(scores).sum(), scores)
    for i in range(5):
        expected = 0.0
        for j in range(5):
            if i != j:
                sign = 1.0 if i < j else -1.0
                expected -= sign * torch.sigmoid(-sign * (scores[0, i] - scores[0, j])).item() / math.comb(5, 2)
        assert grad[0, i].item() == pytest.approx(expected, rel=1e-9)


# Learning.


def quick(tmp_path, **options):
    return original.settings_class()(out=str(tmp_path / "run"), save_every=1000, **options)


def flip(pairs, share, seed):
    """That share of the labels turned round."""
    turned = torch.rand(len(pairs), generator=torch.Generator().manual_seed(seed)) < share
    swap = [("rejected", "chosen") if bad else ("chosen", "rejected") for bad in turned.tolist()]
    return [
        {"prompt": p["prompt"], "chosen": p[good], "rejected": p[bad]}
        for p, (good, bad) in zip(pairs, swap, strict=True)
    ]


def reliability(pairs):
    """(chosen, rejected) scores of all seeds -> the mean confidence and the share right in ten equal parts."""
    confidence = torch.cat([torch.sigmoid((a - b).abs()) for a, b in pairs])
    right = torch.cat([(a > b).float() for a, b in pairs])
    part = ((confidence - 0.5) * 20).long().clamp(max=9)
    filled = [k for k in range(10) if (part == k).sum() >= 10]
    return [confidence[part == k].mean().item() for k in filled], [right[part == k].mean().item() for k in filled]


@pytest.mark.evidence
def test_it_learns_which_sum_is_right(evidence, tmp_path):
    """Pairs of the warm start's own answers, right against wrong; scored on sums it has not seen. With a fifth of the
    training labels flipped the ranking suffers less than the confidence."""
    torch.set_num_threads(1)
    seeds = list(range(5)) if evidence.full else [0]
    steps, prompts, size = (200, 2000, 2000) if evidence.full else (40, 256, 200)
    results = {"": [], ", a fifth of the labels flipped": []}
    scores = {name: [] for name in results}
    for seed in seeds:
        policy, tokenizer = arithmetic.warm_start()
        settings = quick(tmp_path, steps=steps, seed=seed, eval_every=40)
        sums = arithmetic.problems(held_out=False)[:prompts], arithmetic.problems(held_out=True)[:size]
        pairs, held = (loop.sample_pairs(policy, tokenizer, part, arithmetic.exact_match, settings) for part in sums)
        for name, data in ((list(results)[0], pairs), (list(results)[1], flip(pairs, 0.2, seed))):
            if name and not evidence.full:
                continue
            model = original.RewardModel(policy)
            test = partial(original.evaluate, tokenizer=tokenizer, pairs=held)
            trainer = original.train_reward_model(model, tokenizer, data, settings, evaluate=test)
            assert trainer.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
            results[name].append([x for x in trainer.history if "held_out" in x])
            texts = [pair["prompt"] for pair in held]
            columns = ([pair[column] for pair in held] for column in ("chosen", "rejected"))
            scores[name].append([original.score(model, tokenizer, texts, column) for column in columns])
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    for name, runs in results.items():
        if not runs:
            continue
        ends = [run[-1]["held_out"] for run in runs]
        errors = [run[-1]["calibration_error"] for run in runs]
        evidence(
            "rlhf/reward_model",
            f"Arithmetic: accuracy on held-out pairs{name}",
            value=mean(ends),
            bar=0.75 if evidence.full else 0.6,
            better=">=",
            seeds=seeds,
            spread=ends,
            note=f"{steps} steps of 32 pairs. The held-out labels are clean.",
            curve={
                "x": [x["step"] for x in runs[0]],
                "y": {"held-out pairs": [[x["held_out"] for x in run] for run in runs]},
                "xlabel": "step",
                "ylabel": "accuracy on held-out pairs",
            },
        )
        evidence(
            "rlhf/reward_model",
            f"Arithmetic: calibration error on held-out pairs{name}",
            value=mean(errors),
            bar=0.3,
            seeds=seeds,
            spread=errors,
            note="The curve is over the pairs of all seeds together.",
            curve={
                "x": reliability(scores[name])[0],
                "y": {"share right": [reliability(scores[name])[1]]},
                "xlabel": "predicted chance of the favourite",
                "ylabel": "share right",
            },
        )


def test_the_command_line_takes_a_model_and_a_file(tmp_path, capsys):
    policy, tokenizer = tiny(hidden=16)
    policy.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    paths = {"model": str(tmp_path / "model"), "data": str(tmp_path / "data.jsonl")}
    original.demo(quick(tmp_path, steps=20, batch=4, lr=1e-2, eval_every=10, **paths))
    assert "calibration_error" in capsys.readouterr().out
    history = lm.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["history"]
    assert history[-1]["held_out"] == 1.0
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
