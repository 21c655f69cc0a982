"""KTO against its paper in explicit loops, TRL, its own optimum in closed form, and its own broken copies."""

import copy
import dataclasses
import math
import statistics
from collections import defaultdict
from types import MethodType, SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from snippets.preferences import kto as original
from snippets.preferences import loop
from snippets.worlds import arithmetic, exact, exact_pairs, lm, trials
from tests.mutation import caught_by, load_mutant
from tests.preferences.losses import (
    NOT_POSITIVE,
    PAIRS,
    adapter_passes,
    apart,
    computed_in_float32,
    edges_of,
    no_gradient_to_reference_or_rewards,
    real_loss,
    real_trainer,
    refused,
)
from tests.trainers import QUIET, same_loss_and_gradients, tiny

PATH = "snippets/preferences/kto.py"
SNIPPET = "preferences/kto"
OPTIONS = [{}, {"beta": 0.5}, {"beta": 2.0, "desirable_weight": 1.5}, {"undesirable_weight": 0.3}]
torch.set_num_threads(1)


def numbers(seed=0, sizes=(40, 24), scale=10.0, dtype=torch.float64):
    """Policy desirable, policy undesirable, reference desirable, reference undesirable."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (-scale * torch.rand(size, generator=generator, dtype=torch.float64)).to(dtype) for size in (*sizes, *sizes)
    ]


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


# The formula, its gradient and its inputs. Each check takes the module, so that broken copies can be put to it.


def check_the_loss_of_the_paper_in_loops(kto):
    """lambda_y - v(x, y), with v = lambda_D * sigmoid(beta * (r - z)) or lambda_U * sigmoid(beta * (z - r))."""
    for options in OPTIONS:
        beta = options.get("beta", 0.1)
        weights = (options.get("desirable_weight", 1.0), options.get("undesirable_weight", 1.0))
        good, bad, ref_good, ref_bad = numbers()
        for z in (0.0, 1.7):
            losses, good_rewards, bad_rewards = kto.kto_loss(good, bad, ref_good, ref_bad, z, **options)
            assert losses.shape == (64,) and good_rewards.shape == (40,) and bad_rewards.shape == (24,)
            for i in range(40):
                r = good[i].item() - ref_good[i].item()
                value = weights[0] * sigmoid(beta * (r - z))
                assert losses[i].item() == pytest.approx(weights[0] - value, rel=1e-9, abs=1e-12)
                assert good_rewards[i].item() == pytest.approx(beta * r, rel=1e-9)
            for i in range(24):
                r = bad[i].item() - ref_bad[i].item()
                value = weights[1] * sigmoid(beta * (z - r))
                assert losses[40 + i].item() == pytest.approx(weights[1] - value, rel=1e-9, abs=1e-12)
                assert bad_rewards[i].item() == pytest.approx(beta * r, rel=1e-9)


def check_the_reference_point_in_loops(kto):
    generator = torch.Generator().manual_seed(3)
    for shift in (0.4, 2.0, -2.0):
        ref = torch.randn(9, generator=generator, dtype=torch.float64)
        own = ref + shift + torch.randn(9, generator=generator, dtype=torch.float64)
        mean = sum(a - b for a, b in zip(own.tolist(), ref.tolist(), strict=True)) / 9
        assert kto.reference_point(own, ref).item() == pytest.approx(max(mean, 0.0), rel=1e-9)
    assert mean < 0  # the second one was cut off


def check_no_gradient_passes_through_the_reference_point(kto):
    own = torch.tensor([-1.0, -2.0], requires_grad=True)
    kl = kto.reference_point(own, torch.tensor([-2.0, -3.0], requires_grad=True))
    assert kl.item() == pytest.approx(1.0) and not kl.requires_grad
    four, z = [x.requires_grad_() for x in numbers()], torch.tensor(1.0, requires_grad=True, dtype=torch.float64)
    kto.kto_loss(*four, z)[0].sum().backward()
    assert z.grad is None


def check_the_gradient_is_largest_at_the_reference_point_and_dies_on_both_sides(kto):
    """d loss / d log pi = -+ weight * beta * s * (1 - s): a bell around log-ratio = kl, its peak weight * beta / 4."""
    z, beta = 3.0, 0.7
    ratios = torch.tensor([z, z + 2, z - 2, z + 60, z - 60], dtype=torch.float64)
    zero = torch.zeros(5, dtype=torch.float64)
    good, bad = ratios.clone().requires_grad_(), ratios.clone().requires_grad_()
    options = {"beta": beta, "desirable_weight": 1.0, "undesirable_weight": 2.0}
    kto.kto_loss(good, bad, zero, zero, z, **options)[0].sum().backward()
    s = torch.sigmoid(beta * (ratios - z))
    assert_close(good.grad, -beta * s * (1 - s))
    assert_close(bad.grad, 2 * beta * s * (1 - s))
    assert good.grad[0].item() == pytest.approx(-beta / 4)
    assert good.grad.abs().argmax() == 0 and (good.grad[3:].abs() < 1e-15).all()


def check_no_gradient_reaches_the_reference_or_the_rewards(kto):
    no_gradient_to_reference_or_rewards(lambda *four: kto.kto_loss(*four, 0.5), numbers())


def check_extremes_stay_finite_and_bounded(kto):
    """Each loss lies between 0 and its weight. Near 0 it keeps its digits: 1 - sigmoid would round them off."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for ratio in (1e4, 100.0, 0.0, -100.0, -1e4):
            good, bad = (torch.tensor([ratio], dtype=dtype, requires_grad=True) for _ in range(2))
            zero = torch.zeros(1, dtype=dtype)
            losses = kto.kto_loss(good, bad, zero, zero, 0.0, beta=1.0, undesirable_weight=3.0)[0]
            losses.sum().backward()
            assert losses.dtype == torch.float32 and losses.isfinite().all()
            assert 0 <= losses[0] <= 1 and 0 <= losses[1] <= 3
            assert good.grad.isfinite() and bad.grad.isfinite()
    far = torch.tensor([-1e4])  # both: the log-ratio is 0, however unlikely the response
    assert kto.kto_loss(far, far, far, far, 0.0)[0].tolist() == [0.5, 0.5]
    small = kto.kto_loss(torch.tensor([20.0]), torch.zeros(0), torch.zeros(1), torch.zeros(0), 0.0, beta=1.0)[0]
    assert small.item() == pytest.approx(math.exp(-20), rel=1e-4)
    assert kto.reference_point(torch.full((3,), 1e4), torch.full((3,), -1e4)).item() == pytest.approx(2e4)


def check_half_precision_is_computed_in_float32(kto):
    """Near -1000 the neighbours in bf16 are 4 apart: the difference must be taken after the upcast."""
    computed_in_float32(lambda *four: kto.kto_loss(*four, 2.0), numbers(scale=1000.0))
    four = [x.to(torch.bfloat16) for x in numbers(scale=1000.0)]
    own, ref = four[0] + 2000, four[2]
    assert_close(kto.reference_point(own, ref), kto.reference_point(own.float(), ref.float()), rtol=0, atol=0)
    assert kto.reference_point(own.double(), ref.double()).dtype == torch.float64


def check_one_kind_alone_will_do(kto):
    """No pairs are needed: only good responses, only bad ones, or any numbers of both."""
    good, bad, ref_good, ref_bad = numbers()
    none = good[:0]
    both = kto.kto_loss(good, bad, ref_good, ref_bad, 0.4)
    only_good = kto.kto_loss(good, none, ref_good, none, 0.4)
    only_bad = kto.kto_loss(none, bad, none, ref_bad, 0.4)
    assert_close(torch.cat([only_good[0], only_bad[0]]), both[0])
    assert only_good[2].shape == only_bad[1].shape == (0,)


def check_a_response_is_judged_alone(kto):
    """The same response labelled both ways pulls nowhere if the weights are equal, and its losses add up to 1."""
    x = torch.tensor([-3.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.0], dtype=torch.float64)
    losses = kto.kto_loss(x, x, ref, ref, 0.2)[0]
    losses.sum().backward()
    assert losses.sum().item() == pytest.approx(1.0) and abs(x.grad.item()) < 1e-15
    four = numbers(sizes=(8, 8))
    whole = kto.kto_loss(*four, 0.3)[0]
    rows = [kto.kto_loss(*(y[i : i + 1] for y in four), 0.3)[0] for i in range(8)]
    assert_close(whole, torch.stack(rows, 1).flatten())


def check_bad_input_is_named(kto):
    good, bad, ref_good, ref_bad = numbers(sizes=(3, 2))
    for changed, message in [
        ([good, bad, ref_good[:2], ref_bad], r"shapes disagree: policy \(3,\) against reference \(2,\)"),
        ([good, bad[:1], ref_good, ref_bad], r"shapes disagree: policy \(1,\) against reference \(2,\)"),
        ([good[:, None], bad, ref_good[:, None], ref_bad], r"policy \(3, 1\) against reference \(3, 1\); want \(N,\)"),
        ([x[:0] for x in (good, bad, ref_good, ref_bad)], "an empty batch: no response at all"),
    ]:
        with pytest.raises(ValueError, match=message):
            kto.kto_loss(*changed, 0.0)
    four = [good, bad, ref_good, ref_bad]
    refused(kto.kto_loss, (*four, 0.0), "beta must be positive and finite", NOT_POSITIVE)
    for options in ({"desirable_weight": -1.0}, {"undesirable_weight": math.nan}, {"desirable_weight": math.inf}):
        with pytest.raises(ValueError, match="the weights must be finite and not negative, got"):
            kto.kto_loss(*four, 0.0, **options)
    for z in (-0.1, math.nan, math.inf, torch.zeros(2)):
        with pytest.raises(ValueError, match="kl must be one number, finite and at least 0, got"):
            kto.kto_loss(*four, z)
    with pytest.raises(ValueError, match=r"shapes disagree: \(3,\) against \(2,\); want \(N,\) for both"):
        kto.reference_point(good, bad)
    with pytest.raises(ValueError, match=r"an empty batch: shape \(0,\)"):
        kto.reference_point(good[:0], bad[:0])
    inputs = (good[None], -good[None], bad.sum() * 0 + good[None], 0.0)
    refused(kto.kto_optimum, inputs, r"beta must lie in \(0, 1\]", (0.0, 1.1, -1.0, math.nan))
    with pytest.raises(ValueError, match="a prompt without a response of good > bad"):
        kto.kto_optimum(ref_good[None], good[None], good[None], 0.0, beta=0.5)
    two = torch.stack([good, good])  # of the second prompt nothing wins
    with pytest.raises(ValueError, match="a prompt without a response of good > bad"):
        kto.kto_optimum(torch.stack([ref_good, ref_good]), two, torch.stack([good - 1, good]), 0.0, beta=0.5)


def check_the_optimum_balances_all_winners(kto):
    """By its definition, and better than any distribution near it."""
    generator = torch.Generator().manual_seed(0)
    ref = torch.randn(3, 9, generator=generator, dtype=torch.float64).log_softmax(-1)
    good, bad = torch.rand(2, 3, 9, generator=generator, dtype=torch.float64)
    for beta, z, rounds in ((0.5, 1.3, {}), (1.0, 0.2, {"rounds": 32})):
        best = kto.kto_optimum(ref, good, bad, z, beta=beta, **rounds)
        assert_close(best.exp().sum(-1), torch.ones(3, dtype=torch.float64))
        assert torch.equal(best.isinf(), bad >= good)
        for x in range(3):
            rates = []
            for y in range(9):
                if bad[x, y] >= good[x, y]:
                    assert best[x, y].exp() == 0
                elif best[x, y] > -50:
                    s = sigmoid(beta * (best[x, y] - ref[x, y] - z).item())
                    rates.append((good - bad)[x, y].item() * beta * s * (1 - s) / best[x, y].exp().item())
            assert max(rates) == pytest.approx(min(rates), rel=1e-5)

        def expected(logps, beta=beta, z=z):
            s = torch.sigmoid(beta * (logps - ref - z))
            return (good * (1 - s) + bad * s).sum(-1)

        for _ in range(20):
            other = (best.exp() + 0.05 * torch.rand(3, 9, generator=generator, dtype=torch.float64)).log()
            assert (expected(other.log_softmax(-1)) > expected(best)).all()


def check_the_adapter_takes_pairs_apart(kto):
    four = numbers(sizes=(6, 6))
    lengths, generator = torch.ones(6), torch.Generator().manual_seed(1)
    own, ref = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    method = kto.algorithm()
    assert method.mismatched and method.reference and not method.vocab_kl
    assert (method.settings().desirable_weight, method.settings().undesirable_weight) == (1.0, 1.0)
    pairs = loop.PairLogps(*four[:2], lengths, lengths, *four[2:], mismatched=own + 1, ref_mismatched=ref)
    z = kto.reference_point(own + 1, ref)
    assert z > 0
    options = {"beta": 0.3, "desirable_weight": 2.0, "undesirable_weight": 0.5}
    adapter_passes(method, kto.kto_loss, pairs, (*four, z), **options)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_loss(check):
    check(original)


GOOD = "desirable_weight * torch.sigmoid(-beta * (good - kl)),  # (N,)"
BAD = "undesirable_weight * torch.sigmoid(-beta * (kl - bad)),  # (M,)"
RATIOS = "(policy.to(dtype) - ref.detach().to(dtype) for policy, ref in pairs)"
MISTAKES = {
    "1 - sigmoid": (GOOD, "desirable_weight * (1 - torch.sigmoid(beta * (good - kl))),"),
    "log sigmoid, as in DPO": (GOOD, "-desirable_weight * logsigmoid(beta * (good - kl)),"),
    "desirable flipped": (GOOD, "desirable_weight * torch.sigmoid(beta * (good - kl)),"),
    "undesirable flipped": (BAD, "undesirable_weight * torch.sigmoid(beta * (kl - bad)),"),
    "no reference point": (BAD, "undesirable_weight * torch.sigmoid(beta * bad),"),
    "kl outside of beta": (GOOD, "desirable_weight * torch.sigmoid(-beta * good + kl),"),
    "kl added": (BAD, "undesirable_weight * torch.sigmoid(beta * (kl + bad)),"),
    "weights swapped": (GOOD, "undesirable_weight * torch.sigmoid(-beta * (good - kl)),"),
    "no reference": (RATIOS, "(policy.to(dtype) for policy, ref in pairs)"),
    "difference before the upcast": (RATIOS, "((policy - ref.detach()).to(dtype) for policy, ref in pairs)"),
    "gradient into the reference": ("ref.detach().to(dtype) for", "ref.to(dtype) for"),
    "gradient into the reference point": (
        "kl = torch.as_tensor(kl, dtype=torch.float64).detach()",
        "kl = torch.as_tensor(kl)",
    ),
    "reference point in float32": ("torch.as_tensor(kl, dtype=torch.float64)", "torch.as_tensor(kl)"),
    "gradient into the rewards": ("beta * good.detach(), beta", "beta * good, beta"),
    "rewards without beta": ("beta * good.detach(), beta", "good.detach(), beta"),
    "rewards above the reference point": ("beta * bad.detach()", "beta * (bad - kl).detach()"),
    "estimate not cut off": ("return ratios.mean().clamp(min=0)", "return ratios.mean()"),
    "each ratio cut off": ("return ratios.mean().clamp(min=0)", "return ratios.clamp(min=0).mean()"),
    "estimate with gradient": ("mismatched_logps.detach().to(dtype) - ref", "mismatched_logps.to(dtype) - ref"),
    "estimate turned around": ("return ratios.mean()", "return (-ratios).mean()"),
    "estimate before the upcast": (
        "mismatched_logps.detach().to(dtype) - ref_mismatched_logps.detach().to(dtype)",
        "(mismatched_logps.detach() - ref_mismatched_logps.detach()).to(dtype)",
    ),
    "pairs wanted": (
        "policy_desirable_logps.numel() + policy_undesirable_logps.numel() == 0",
        "policy_desirable_logps.numel() * policy_undesirable_logps.numel() == 0",
    ),
    "beta may be 0": ("if not 0 < beta < math.inf", "if not 0 <= beta < math.inf"),
    "negative weights": ("if not all(0 <= weight < math.inf for weight in weights)", "if False"),
    "infinite weights": ("0 <= weight < math.inf for", "0 <= weight for"),
    "any reference point": ("kl.numel() != 1 or not 0 <= kl.item() < math.inf", "False"),
    "shapes unchecked": ("policy.shape != ref.shape or policy.dim() != 1", "False"),
    "losers kept": ("wins = good > bad", "wins = good > 0"),
    "optimum without the reference": ("x = beta * (middle - ref_logps - kl)", "x = beta * (middle - kl)"),
    "optimum without the slope of the log": ("logsigmoid(-x) - middle", "logsigmoid(-x)"),
    "optimum for any beta": ("if not 0 < beta <= 1", "if not beta > 0"),
    "optimum though all lose at one prompt": ("if not wins.any(-1).all():", "if not wins.any():"),
    "adapter with loss aversion as default": (
        "undesirable_weight: float = field(default=1.0",
        "undesirable_weight: float = field(default=2.0",
    ),
    "adapter without its weights": ("desirable_weight=settings.desirable_weight,\n            un", "un"),
    "adapter without the reference point": ("reference_point(pairs.mismatched, pairs.ref_mismatched)", "0.0"),
}


def test_no_check_fails_on_the_original():
    assert caught_by(original, CHECKS) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    """Each deliberate mistake makes at least one check fail."""
    assert caught_by(load_mutant(PATH, *MISTAKES[mistake]), CHECKS)


# TRL


def trl_kto(
    good, bad, ref_good, ref_bad, own, ref, *, loss_type="kto", beta=0.1, desirable_weight=1.0, undesirable_weight=1.0
):
    """TRL's own KTOTrainer._compute_loss on given log-probabilities; own, ref (K,) are those of the mismatched
    responses. The model and the trainer are stand-ins."""
    from trl import KTOTrainer

    def model(input_ids, **_):
        logps = own if input_ids[0, 0] == 1 else torch.cat([good, bad])
        zeros = torch.zeros(len(logps), 1)
        return SimpleNamespace(log_probs=logps[:, None], entropy=zeros, mean_logits=zeros)

    same = lambda x: x  # noqa: E731
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=same),
        precompute_ref_logps=True,
        calculate_KL=loss_type == "kto",
        loss_type=loss_type,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer._compute_kl_logps = MethodType(KTOTrainer._compute_kl_logps, trainer)
    rows, others = len(good) + len(bad), len(own)
    mask, kl_mask = torch.tensor([[0, 1]]).expand(rows, 2), torch.tensor([[0, 1]]).expand(others, 2)
    inputs = {
        "input_ids": torch.zeros(rows, 2, dtype=torch.long),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "KL_input_ids": torch.ones(others, 2, dtype=torch.long),
        "KL_attention_mask": torch.ones_like(kl_mask),
        "KL_completion_mask": kl_mask,
        "label": torch.tensor([True] * len(good) + [False] * len(bad)),
        "ref_logps": torch.cat([ref_good, ref_bad]),
        "ref_KL_logps": ref,
    }
    loss = KTOTrainer._compute_loss(trainer, model, inputs, False)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


def edges():
    """Random responses and log-ratios up to 1e4 nats, in float32."""
    rows = [[0.0, 0, 0, 0], [-5, -5, -5, -5], [-1e4, 0, 0, 0], [0, -1e4, 0, 0], [-1, -2, -1e4, -1e4]]
    return edges_of(numbers, rows)


@pytest.mark.evidence
def test_agrees_with_trl(evidence):
    """Each loss alone, the mean of a batch, its gradient, the rewards, and the reference point, which TRL takes too."""
    worst, four = 0.0, edges()

    def compare(ours, theirs):
        nonlocal worst
        worst = max(worst, apart(ours, theirs))

    generator, points = torch.Generator().manual_seed(5), []
    for options in OPTIONS:
        for shift in (0.0, 2.0, -2.0):
            ref = torch.randn(9, generator=generator)
            own = ref + shift + torch.randn(9, generator=generator)
            leaves, others = ([x.clone().requires_grad_() for x in four] for _ in range(2))
            kl = original.reference_point(own, ref)
            points.append(kl.item())
            losses, good_rewards, bad_rewards = original.kto_loss(*leaves, kl, **options)
            losses.mean().backward()
            loss, logged = trl_kto(*others, own, ref, **options)
            loss.backward()
            compare(losses.mean(), loss)
            compare(kl, logged["kl"])
            compare(good_rewards.mean(), logged["rewards/chosen"])
            compare(bad_rewards.mean(), logged["rewards/rejected"])
            for x, other in zip(leaves[:2], others[:2], strict=True):
                compare(x.grad * len(losses), other.grad * len(losses))
            none = four[0][:0]
            for i in range(0, len(four[0]), 7):
                one = [four[0][i : i + 1], none, four[2][i : i + 1], none]
                compare(losses[i], trl_kto(*one, own, ref, **options)[0])
            for i in range(0, len(four[1]), 7):
                one = [none, four[1][i : i + 1], none, four[3][i : i + 1]]
                compare(losses[len(four[0]) + i], trl_kto(*one, own, ref, **options)[0])
    assert min(points) == 0 < max(points)
    evidence(
        SNIPPET,
        "Largest difference from TRL 1.16.0",
        value=worst,
        bar=1e-6,
        note="Losses, gradients, rewards and the reference point in float32, log-ratios up to 10,000 nats.",
    )


def test_without_a_reference_point_it_is_trls_apo_zero_unpaired():
    four, none = edges(), torch.zeros(0)
    for options in OPTIONS:
        loss, logged = trl_kto(*four, none, none, loss_type="apo_zero_unpaired", **options)
        assert logged["kl"] == 0
        assert_close(original.kto_loss(*four, 0.0, **options)[0].mean(), loss, rtol=1e-6, atol=1e-6)


def unpaired(pairs):
    """TRL's records of single responses: all the good ones, then all the bad ones."""
    return [
        {"prompt": pair["prompt"], "completion": pair[kind], "label": kind == "chosen"}
        for kind in ("chosen", "rejected")
        for pair in pairs
    ]


def real_trl(tmp_path, records, seeds=(0, 1), **options):
    """TRL's trainer with a tiny policy and reference, of the two seeds."""
    from trl import KTOConfig, KTOTrainer

    (policy, tokenizer), (reference, _) = map(tiny, seeds)
    config = KTOConfig(str(tmp_path), **QUIET, **options)
    return policy, reference, tokenizer, real_trainer(KTOTrainer, config, policy, tokenizer, records, reference)


def test_agrees_with_trl_on_a_real_model(tmp_path):
    """Tokens, masks, EOS, mismatched responses, reference and loss together: TRL's trainer, its collator and its
    forward pass. TRL moves responses on by one within a batch of the data, so the good ones are one batch and the bad
    ones another: then its mismatched responses are those of our loop."""
    policy, reference, tokenizer, trainer = real_trl(
        tmp_path, unpaired(PAIRS), (4, 5), beta=0.5, undesirable_weight=1.2, per_device_train_batch_size=4
    )
    method = original.algorithm()
    ref = loop.reference_logps(reference, tokenizer, PAIRS, batch=2)
    tokens = loop.tokenize_pairs(tokenizer, PAIRS)
    pairs = loop.score_pairs(policy, tokens, tokenizer.pad_token_id, method, ref_logps=ref, reference=reference)
    kl = original.reference_point(pairs.mismatched, pairs.ref_mismatched)
    loss = method.loss(pairs, method.settings(beta=0.5, undesirable_weight=1.2))[0].mean()
    same_loss_and_gradients(loss, policy, real_loss(trainer), trainer.model)
    assert kl > 0 and trainer._metrics["eval"]["kl"][0] == pytest.approx(kl.item(), rel=1e-4)


def test_what_trl_asks_of_the_data(tmp_path, monkeypatch):
    """Sequential batches of at least two, since its mismatched responses are laid out in the data; and a hint where
    desirable_weight * n_D / (undesirable_weight * n_U) is not between 1 and 1.33."""
    from trl.trainer import kto_trainer

    warnings, records = [], unpaired(PAIRS)[:6]  # 4 good ones, 2 bad ones
    monkeypatch.setattr(kto_trainer.logger, "warning", lambda message, *_: warnings.append(message))
    real_trl(tmp_path, records)
    assert any("undesirable_weight in [1.5, 2.0] (but NOT BOTH)" in message for message in warnings)
    warnings.clear()
    *_, trainer = real_trl(tmp_path, records, undesirable_weight=2.0, per_device_train_batch_size=2)
    assert not any("NOT BOTH" in message for message in warnings)
    rows = [trainer.train_dataset[i] for i in range(6)]  # each response moved on by one, two by two
    for i in range(6):
        assert rows[i]["KL_completion_ids"] == rows[i ^ 1]["completion_ids"]
    with pytest.raises(ValueError, match="requires `train_sampling_strategy='sequential'`"):
        real_trl(tmp_path, records, train_sampling_strategy="random")
    with pytest.raises(ValueError, match="batch size must be > 1"):
        real_trl(tmp_path, records, per_device_train_batch_size=1)


# Where the loss leads: the exact world


def win_rates(world, sampler):
    """(X, Y): the chance to win against a response of the sampler."""
    X, Y = sampler.shape
    return (exact_pairs.bradley_terry(world).view(X, Y, Y) * sampler.unsqueeze(1)).sum(-1)


def labelled(world, sampler, *, desirable_weight=1.0, undesirable_weight=1.0, kept=1.0):
    """(X, Y), (X, Y): the weight with which each response is called good and bad, if pairs are taken apart and only a
    share of the bad ones is kept."""
    wins = win_rates(world, sampler)
    return desirable_weight * sampler * wins, undesirable_weight * kept * sampler * (1 - wins)


def expected_loss(world, logps, good, bad, kl, beta=None):
    s = torch.sigmoid((beta or world.beta) * (logps - world.ref_logps - kl))
    return (good * (1 - s) + bad * s).sum(-1).mean()


def true_kl(world, logps):
    """KL(pi || pi_ref), a mean over prompts; probabilities of 0 count for nothing."""
    return torch.where(logps.isinf(), 0.0, logps.exp() * (logps - world.ref_logps)).sum(-1).mean()


def descend(world, good, bad, steps, *, moving, beta=None, marks=()):
    """Adam on the exact expected loss, the reference point the true KL (moving) or 0; -> {step: log pi (X, Y)}."""
    logits, found = world.ref_logits.clone().requires_grad_(), {}
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for step in range(steps + 1):
        logps = exact.response_logps(world, logits)
        if step in (*marks, steps):
            found[step] = logps.detach()
        kl = true_kl(world, logps.detach()) if moving else 0.0
        optimizer.zero_grad()
        expected_loss(world, logps, good, bad, kl, beta).backward()
        optimizer.step()
    return found


def optimum(world, good, bad, *, moving, beta=None, rounds=50):
    """The closed form, for a reference point of 0 or for one that is the KL of the optimum itself."""
    kl, beta = 0.0, beta or world.beta
    for _ in range(5 if moving else 1):
        best = original.kto_optimum(world.ref_logps, good, bad, kl, beta=beta, rounds=rounds)
        kl = true_kl(world, best).item()
    return best


def mass(world, logps, wins):
    """The probability of what wins less than half of the time."""
    return torch.where(wins < 0.5, logps.exp(), 0.0).sum(-1).mean().item()


def test_the_expected_loss_is_that_of_responses_judged_one_by_one():
    """Pairs or not: the mean over all labelled pairs is sum mu * (w * (1 - s) + (1 - w) * s), and its gradient with
    respect to a log-ratio is mu * (1 - 2 * w) * beta * s * (1 - s), whose sign is that of 1/2 - w alone."""
    world, kl = exact.make_world(0, prompts=2), 0.7
    for sampler in exact_pairs.samplers(world).values():
        wins = win_rates(world, sampler)
        logits = world.ref_logits + 0.5 * torch.randn(
            world.ref_logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64
        )

        def loss(pairs):
            four = (pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected)
            return original.kto_loss(*four, kl, beta=0.5)[0].view(2, -1).mean(0)

        leaf = logits.clone().requires_grad_()
        value = exact_pairs.population_loss(world, leaf, loss, sampler)
        value.backward()
        other = logits.clone().requires_grad_()
        logps = exact.response_logps(world, other)
        logps.retain_grad()
        good, bad = labelled(world, sampler)
        expected = expected_loss(world, logps, good, bad, kl)
        expected.backward()
        assert_close(value, expected)
        assert_close(leaf.grad, other.grad)
        s = torch.sigmoid(0.5 * (logps.detach() - world.ref_logps - kl))
        assert_close(logps.grad, sampler * (1 - 2 * wins) * 0.5 * s * (1 - s) / len(sampler))
        assert torch.equal(logps.grad > 0, wins < 0.5)


@pytest.mark.evidence
def test_where_it_ends_up(evidence):
    """Exact gradients lead to the closed form, not to the optimum of RLHF: nothing is left of what wins less than half
    of the time, and KL(pi* || pi) grows for as long as it trains."""
    seeds, steps, marks = (list(range(5)), 1000, (200,)) if evidence.full else ([0], 350, (200,))
    for moving, name in ((True, "the true KL"), (False, "0")):
        to_own, to_best, under_best, left, early, late, at_start = ([] for _ in range(7))
        for seed in seeds:
            world = exact.make_world(seed)
            sampler = world.ref_logps.exp()
            wins, (good, bad) = win_rates(world, sampler), labelled(world, sampler)
            best = exact.optimal_policy(world.ref_logps, world.rewards, world.beta)
            own = optimum(world, good, bad, moving=moving)
            path = descend(world, good, bad, steps, moving=moving, marks=marks)
            end = path[steps]
            finite = torch.where(own.isinf(), -1e4, own)
            to_own.append(exact.kl(finite, end).mean().item())
            to_best.append(exact.kl(finite, best).mean().item())
            under_best.append(mass(world, best, wins))
            at_start.append(mass(world, world.ref_logps, wins))
            left.append(mass(world, end, wins))
            early.append(exact.kl(best, path[marks[0]]).mean().item())
            late.append(exact.kl(best, end).mean().item())
            assert early[-1] < late[-1] and left[-1] < 0.01 * under_best[-1]
        common = {"seeds": seeds, "note": f"Exact expected loss, pairs from the reference, {steps} steps of Adam."}

        def record(what, values, unit="nats", common=common, **bar):
            value = max(values) if bar else statistics.mean(values)
            evidence(SNIPPET, what, value=value, unit=unit, spread=values, **common, **bar)

        record(f"KL from KTO's own optimum, reference point {name}", to_own, bar=0.02)
        record(f"KL(π‖π*) at KTO's own optimum, reference point {name}", to_best)
        record(f"Mass on responses that win less than half the time, reference point {name}", left, "")
        record(f"KL(π*‖π) after {marks[0]} steps, reference point {name}", early)
        record(f"KL(π*‖π) after {steps} steps, reference point {name}", late)
        if moving:
            record("Mass on responses that win less than half the time, π*", under_best, "")
            record("Mass on responses that win less than half the time, π_ref", at_start, "")


@pytest.mark.evidence
def test_no_beta_makes_it_the_optimum_of_rlhf(evidence):
    closest, seeds = [], list(range(5)) if evidence.full else [0]
    betas = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0) if evidence.full else (0.2, 0.5)
    for seed in seeds:
        world = exact.make_world(seed)
        good, bad = labelled(world, world.ref_logps.exp())
        best = exact.optimal_policy(world.ref_logps, world.rewards, world.beta)
        found = []
        for beta in betas:
            own = optimum(world, good, bad, moving=False, beta=beta, rounds=34)
            found.append(exact.kl(torch.where(own.isinf(), -1e4, own), best).mean().item())
        closest.append(min(found))
    evidence(
        SNIPPET,
        "KL(π‖π*), the closest of seven β",
        value=statistics.mean(closest),
        bar=0.1,
        better=">",
        unit="nats",
        seeds=seeds,
        spread=closest,
        note="In closed form, β from 0.05 to 1, reference point 0.",
    )


def test_losers_die_out_whatever_beta_is():
    world = exact.make_world(0)
    sampler = world.ref_logps.exp()
    wins, (good, bad) = win_rates(world, sampler), labelled(world, sampler)
    for beta in (0.1, 1.0):
        path = descend(world, good, bad, 350, moving=False, beta=beta, marks=(200,))
        start, early, late = (mass(world, logps, wins) for logps in (world.ref_logps, path[200], path[350]))
        assert start > 0.3 > 0.05 > early > 1.3 * late


# The reference point, as it is estimated


def with_points(algorithm):
    """The algorithm, and a list that fills with its reference points."""
    points = []

    def loss(pairs, settings):
        points.append(original.reference_point(pairs.mismatched, pairs.ref_mismatched).item())
        return algorithm.loss(pairs, settings)

    return dataclasses.replace(algorithm, loss=loss), points


@pytest.mark.evidence
def test_the_estimate_is_cut_off_while_the_true_kl_grows(evidence):
    """The data's responses are ones that the policy now makes less likely, other prompts' even more: the mean
    log-ratio of mismatched responses is far below 0, and the KL above it."""
    seeds, steps = (list(range(5)), 500) if evidence.full else ([0], 120)
    zeros, drift, uncut = [], [], []
    for seed in seeds:
        world = exact.make_world(seed)
        method, points = with_points(original.algorithm())
        trial = trials.exact_preferences(method, world, seed, steps=steps)
        zeros.append(sum(point == 0 for point in points) / steps)
        drift.append(trial.from_reference)
        ratios = exact.response_logps(world, trial.logits) - world.ref_logps
        uncut.append((world.ref_logps.exp().roll(1, 0) * ratios).sum(-1).mean().item())
    common = {"seeds": seeds, "note": f"Exact world, {steps} steps of 8 pairs a prompt through the adapter."}
    evidence(
        SNIPPET,
        "Share of steps whose estimate of the KL is 0",
        value=statistics.mean(zeros),
        bar=0.8,
        better=">=",
        spread=zeros,
        **common,
    )
    evidence(
        SNIPPET,
        "True KL(π‖π_ref) at the end of these steps",
        value=statistics.mean(drift),
        bar=0.3,
        better=">=",
        unit="nats",
        spread=drift,
        **common,
    )
    evidence(
        SNIPPET,
        "The estimate at the end, in expectation and before it is cut off",
        value=statistics.mean(uncut),
        bar=0.0,
        better="<",
        unit="nats",
        spread=uncut,
        **common,
    )


@pytest.mark.evidence
def test_the_estimate_on_a_language_model(evidence, tmp_path):
    """There it is not cut off, since what is learnt carries over to other prompts; nor is it the KL: above it early on,
    below it later."""
    seeds, changes, marks = [0, 1], {"steps": 120, "sampled_prompts": 1000}, (40, 120)
    if not evidence.full:
        seeds, changes, marks = [0], {"steps": 4, "sampled_prompts": 64}, (2, 4)
    estimate, drift = ({mark: [] for mark in marks} for _ in range(2))
    for seed in seeds:
        policy, tokenizer = arithmetic.warm_start()
        reference = copy.deepcopy(policy)
        method, points = with_points(original.algorithm())
        out = str(tmp_path / str(seed))
        settings = method.settings(seed=seed, out=out, save_every=10_000, eval_every=marks[0], **changes)
        prompts = [record["prompt"] for record in arithmetic.problems(held_out=True)[:256]]
        sizes = {"samples": 1, "max_new_tokens": settings.max_new_tokens, "temperature": 1.0}
        uniforms = torch.rand(256, settings.max_new_tokens, generator=torch.Generator().manual_seed(seed))

        def look(
            model,
            reference=reference,
            tokenizer=tokenizer,
            prompts=prompts,
            sizes=sizes,
            uniforms=uniforms,
            points=points,
        ):
            if len(points) in marks:
                drawn = lm.generate(model, tokenizer, prompts, **sizes, uniforms=uniforms)
                rows = (drawn.ids, drawn.attention, drawn.mask.shape[1])
                with torch.no_grad():
                    own, ref = (lm.token_logps(x, *rows) for x in (model, reference))
                drift[len(points)].append(torch.where(drawn.mask.bool(), own - ref, 0.0).sum(-1).mean().item())
                estimate[len(points)].append(statistics.mean(points[-10:]))
            return 0.0

        pairs = loop.arithmetic_pairs(policy, tokenizer, settings)
        history = loop.train(policy, tokenizer, pairs, method, settings, evaluate=look).history
        assert len(points) == settings.steps and all(math.isfinite(record["loss"]) for record in history)
    for mark in marks:
        for what, values in (("estimate, mean of the last 10 steps", estimate), ("KL from 256 samples", drift)):
            evidence(
                SNIPPET,
                f"Arithmetic after {mark} steps: {what}",
                value=statistics.mean(values[mark]),
                unit="nats",
                seeds=seeds,
                spread=values[mark],
                note="The adapter's defaults, from the warm start; the KL is that of the policy's own responses.",
            )
    if evidence.full:
        for k in range(len(seeds)):
            assert estimate[40][k] > drift[40][k] and estimate[120][k] < drift[120][k]


# Data that are not balanced


def test_dropping_half_of_the_bad_ones_moves_the_bar_to_a_third():
    """Pull upwards where lambda_D * w > lambda_U * kept * (1 - w): the bar is 1 / (1 + rho), with
    rho = lambda_D * n_D / (lambda_U * n_U). A weight of 2 on the bad ones that are left gives the old gradient back."""
    world = exact.make_world(1)
    sampler = world.ref_logps.exp()
    wins = win_rates(world, sampler)
    cases = [
        ({"kept": 0.5}, 2.0),
        ({"kept": 0.5, "undesirable_weight": 2.0}, 1.0),
        ({"desirable_weight": 4 / 3}, 4 / 3),
    ]
    for options, rho in cases:
        good, bad = labelled(world, sampler, **options)
        assert rho == pytest.approx((good.sum() / bad.sum()).item())  # the counts of a balanced sampler are equal
        assert torch.equal(good > bad, wins > 1 / (1 + rho))
    whole, mended = labelled(world, sampler), labelled(world, sampler, kept=0.5, undesirable_weight=2.0)
    assert_close(whole, mended)
    raised = (wins > 1 / 3) & (wins < 1 / 2)
    assert raised.any()
    good, bad = labelled(world, sampler, kept=0.5)
    own = original.kto_optimum(world.ref_logps, good, bad, 0.0, beta=world.beta, rounds=34)
    assert (own.exp()[raised] > 0).all()


@pytest.mark.evidence
def test_unpaired_data(evidence):
    """Single responses, half of the bad ones dropped at random: with equal weights more mass stays on responses that
    lose, with twice the weight on the bad ones that are left it is as if nothing was dropped."""
    seeds, steps = (list(range(5)), 500) if evidence.full else ([0], 150)
    settings = {"all": (1.0, 1.0), "half of the bad ones": (0.5, 1.0), "half, at twice the weight": (0.5, 2.0)}
    left = {name: [] for name in settings}
    for seed in seeds:
        world = exact.make_world(seed)
        wins, rows = win_rates(world, world.ref_logps.exp()), torch.arange(len(world.rewards)).repeat_interleave(8)
        for name, (kept, weight) in settings.items():
            generator = torch.Generator().manual_seed(seed)
            logits = world.ref_logits.clone().requires_grad_()
            optimizer = torch.optim.Adam([logits], lr=0.05)
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
                chosen, rejected = (x.flatten() for x in exact_pairs.sample_labelled(world, 8, generator))
                stays = torch.rand(len(rejected), generator=generator) < kept
                logps, ref = exact.response_logps(world, logits), world.ref_logps
                bad = (rows[stays], rejected[stays])
                losses = original.kto_loss(
                    *(logps[rows, chosen], logps[bad], ref[rows, chosen], ref[bad], 0.0),
                    beta=world.beta,
                    undesirable_weight=weight,
                )[0]
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
            left[name].append(mass(world, exact.response_logps(world, logits.detach()), wins))
    mean = {name: statistics.mean(values) for name, values in left.items()}
    assert mean["half of the bad ones"] > 1.5 * mean["all"]
    assert mean["half, at twice the weight"] < 0.75 * mean["half of the bad ones"]
    for name, values in left.items():
        evidence(
            SNIPPET,
            f"Mass on responses that win less than half the time, trained on {name}",
            value=mean[name],
            seeds=seeds,
            spread=values,
            note=f"{steps} steps of 32 pairs taken apart; β = 0.5, reference point 0.",
        )
