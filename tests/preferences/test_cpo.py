"""CPO against its paper in explicit loops, TRL, the end points of its population loss, and its broken copies."""

import functools
import math
import time
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from snippets.preferences import cpo as original
from snippets.preferences import loop
from snippets.preferences.dpo import dpo_loss
from snippets.preferences.simpo import simpo_loss
from snippets.worlds import arithmetic, exact, exact_pairs, trials
from tests.mutation import caught_by, load_mutant
from tests.preferences.losses import (
    DTYPES,
    MISTAKES_WITHOUT_REFERENCE,
    NEGATIVE,
    NOT_POSITIVE,
    PAIRS,
    adapter_passes,
    best,
    computed_in_float32,
    edges_of,
    finite_step,
    lengths_are_checked,
    losses_apart,
    population_minimum,
    real_loss,
    real_trainer,
    refused,
    rows_are_independent,
    scored,
    shapes_are_named,
    with_lengths,
)
from tests.trainers import QUIET, same_loss_and_gradients, tiny

PATH = "snippets/preferences/cpo.py"
NAME = "preferences/cpo"
ONE = torch.ones(1)
SETTINGS = [
    {},
    {"beta": 0.7, "nll": 0.0},
    {"beta": 0.3, "nll": 2.0, "gamma": 0.4},
    {"beta": 2.0, "nll": 0.5, "gamma": 0.5, "normalize": True},
]


# The formula, its gradient and its inputs. Each check takes the module, so that broken copies can be put to it.


def check_equations_3_and_5_in_loops(cpo):
    for options in SETTINGS:
        four = with_lengths()
        losses, chosen_rewards, rejected_rewards = cpo.cpo_loss(*four, **options)
        beta, nll, gamma = options.get("beta", 0.1), options.get("nll", 1.0), options.get("gamma", 0.0)
        for i, (chosen, rejected, chosen_length, rejected_length) in enumerate(
            zip(*(x.tolist() for x in four), strict=True)
        ):
            won, lost = beta * chosen, beta * rejected
            if options.get("normalize"):
                won, lost = won / chosen_length, lost / rejected_length
            expected = math.log1p(math.exp(-(won - lost - gamma))) - nll * chosen / chosen_length
            assert losses[i].item() == pytest.approx(expected, rel=1e-9)
            assert chosen_rewards[i].item() == pytest.approx(won, rel=1e-12)
            assert rejected_rewards[i].item() == pytest.approx(lost, rel=1e-12)


def check_gradient_is_dpos_and_fine_tunings(cpo):
    chosen, rejected, *lengths = with_lengths()
    chosen.requires_grad_(), rejected.requires_grad_()
    losses, won, lost = cpo.cpo_loss(chosen, rejected, *lengths, beta=0.4, nll=0.6)
    losses.sum().backward()
    weight = 0.4 * torch.sigmoid(lost - won)
    assert_close(chosen.grad, -weight - 0.6 / lengths[0])
    assert_close(rejected.grad, weight)
    assert not won.requires_grad and not lost.requires_grad


def check_without_likelihood_it_is_dpo_with_a_flat_reference(cpo):
    """Of whatever level: the same reference log-probability for all responses, long or short."""
    chosen, rejected, *lengths = with_lengths()
    for level in (0.0, -50.0):
        flat = torch.full((64,), level, dtype=torch.float64)
        ours = cpo.cpo_loss(chosen, rejected, *lengths, beta=0.3, nll=0.0)[0]
        assert_close(ours, dpo_loss(chosen, rejected, flat, flat, beta=0.3)[0])


def check_with_means_and_a_margin_it_is_simpo_and_the_likelihood(cpo):
    four = with_lengths()
    ours = cpo.cpo_loss(*four, beta=2.5, nll=0.7, gamma=1.0, normalize=True)[0]
    assert_close(ours, simpo_loss(*four, beta=2.5, gamma=1.0)[0] - 0.7 * four[0] / four[2])


def check_the_likelihood_holds_the_level(cpo):
    """Both sums lowered alike: nothing to the preference part, and as much a token as they fell to the whole."""
    chosen, rejected, *lengths = with_lengths()
    for nll in (0.0, 0.5):
        before, after = (cpo.cpo_loss(chosen - x, rejected - x, *lengths, nll=nll)[0] for x in (0.0, 7.0))
        assert_close(after - before, nll * 7.0 / lengths[0].double())


def check_large_margins_stay_finite(cpo):
    for options in SETTINGS:

        def loss(*logps, options=options):
            return cpo.cpo_loss(*logps, ONE, ONE, **options)

        for dtype in DTYPES:
            for pair in ((0.0, -1e4), (-1e4, 0.0), (-1e4, -1e4), (0.0, 0.0)):
                _, (_, rejected) = finite_step(loss, pair, dtype)
                if pair == (-1e4, 0.0):
                    assert rejected.item() > 0.09  # utterly wrong: the full weight beta


def check_half_precision_is_computed_in_float32(cpo):
    computed_in_float32(cpo.cpo_loss, with_lengths(scale=1000.0))


def check_equal_responses_teach_only_their_likelihood(cpo):
    """chosen is rejected: a finite loss, and the gradient of the preference cancels; fine-tuning is left."""
    for options in SETTINGS:
        logp = torch.tensor([-7.0], dtype=torch.float64, requires_grad=True)
        losses = cpo.cpo_loss(logp, logp, 4 * ONE, 4 * ONE, **options)[0]
        losses.sum().backward()
        nll = options.get("nll", 1.0)
        assert losses.item() == pytest.approx(math.log1p(math.exp(options.get("gamma", 0.0))) + nll * 7 / 4)
        assert logp.grad.item() == pytest.approx(-nll / 4)


def check_a_batch_is_its_pairs_one_by_one(cpo):
    rows_are_independent(cpo.cpo_loss, with_lengths(), SETTINGS)


def check_bad_input_is_named(cpo):
    four = with_lengths(size=3)
    shapes_are_named(cpo.cpo_loss, four)
    lengths_are_checked(cpo.cpo_loss, four)
    refused(cpo.cpo_loss, four, "beta must be positive and finite", NOT_POSITIVE)
    refused(cpo.cpo_loss, four, "nll must be finite and at least 0", NEGATIVE)
    refused(cpo.cpo_loss, four, "gamma must be finite and at least 0", NEGATIVE)


def check_the_adapter_passes_what_is_set(cpo):
    four, method = with_lengths(), cpo.algorithm()
    assert not method.reference and not method.vocab_kl and not method.mismatched
    settings = method.settings()
    assert (settings.beta, settings.nll, settings.gamma, settings.normalize) == (0.1, 1.0, 0.0, False)
    adapter_passes(method, cpo.cpo_loss, loop.PairLogps(*four), four, beta=0.7, nll=0.4, gamma=0.9, normalize=True)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]
LOSSES = "losses = -logsigmoid(beta * (chosen - rejected) - gamma) - nll * chosen_mean"
MEANS = "chosen, rejected = chosen_mean, rejected / rejected_lengths.to(dtype)"
MISTAKES = {
    "flipped sign": (LOSSES, LOSSES.replace("(chosen - rejected)", "(rejected - chosen)")),
    "log(sigmoid)": (LOSSES, "losses = -(beta * (chosen - rejected) - gamma).sigmoid().log() - nll * chosen_mean"),
    "likelihood with the wrong sign": (LOSSES, LOSSES.replace("- nll *", "+ nll *")),
    "no likelihood": (LOSSES, LOSSES.replace(" - nll * chosen_mean", "")),
    "likelihood as a sum": (LOSSES, LOSSES.replace("nll * chosen_mean", "nll * chosen_logps.to(dtype)")),
    "likelihood of both": (LOSSES, LOSSES.replace("nll * chosen_mean", "nll * (chosen_mean + rejected)")),
    "likelihood without gradient": (LOSSES, LOSSES.replace("nll * chosen_mean", "nll * chosen_mean.detach()")),
    "beta on all": (LOSSES, LOSSES.replace("nll *", "beta * nll *")),
    "no beta": (LOSSES, LOSSES.replace("beta * (chosen", "(chosen")),
    "margin added": (LOSSES, LOSSES.replace("- gamma)", "+ gamma)")),
    "margin in nats": (LOSSES, LOSSES.replace("- gamma)", "- beta * gamma)")),
    "always means": ("if normalize:", "if True:"),
    "never means": ("if normalize:", "if False:"),
    "the other's length": (MEANS, MEANS.replace("rejected_lengths", "chosen_lengths")),
    "gradient into the rewards": ("beta * chosen.detach()", "beta * chosen"),
    "mean over the batch": ("return losses, beta", "return losses.mean().expand_as(losses), beta"),
    "beta may be 0": ("if not 0 < beta", "if not 0 <= beta"),
    "weights unchecked": ("if not 0 <= weight < math.inf", "if False"),
    "adapter without nll": ("nll=settings.nll,", ""),
    "adapter without gamma": ("gamma=settings.gamma,", ""),
    "adapter without its means": ("normalize=settings.normalize,", ""),
    "adapter without likelihood as default": ("nll: float = field(default=1.0", "nll: float = field(default=0.0"),
} | MISTAKES_WITHOUT_REFERENCE


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_loss(check):
    check(original)


def test_no_check_fails_on_the_original():
    assert caught_by(original, CHECKS) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    """Each deliberate mistake makes at least one check fail."""
    assert caught_by(load_mutant(PATH, *MISTAKES[mistake]), CHECKS)


def test_the_papers_bound_and_how_loose_it_is():
    """DPO's loss with an ideal reference, which gives the chosen response probability 1 and the rejected one q, plus
    beta * log q, is at most CPO's without likelihood; the smaller q, the wider the gap, up to beta times the margin."""
    chosen, rejected, *lengths = with_lengths()
    uniform, zero = original.cpo_loss(chosen, rejected, *lengths, beta=0.5, nll=0.0)[0], torch.zeros(64).double()
    gaps = []
    for log_q in (0.0, -1.0, -10.0, -1000.0):
        ideal = dpo_loss(chosen, rejected, zero, zero + log_q, beta=0.5)[0]
        gaps.append(uniform - (ideal + 0.5 * log_q))
        assert (gaps[-1] >= -1e-12).all()
    assert_close(gaps[0], zero)
    assert all((wide > narrow).all() for narrow, wide in zip(gaps, gaps[1:], strict=False))
    margin = 0.5 * (chosen - rejected)
    assert_close(gaps[-1], torch.nn.functional.softplus(-margin) + margin)  # the limit, which is softplus(margin)
    leaf = chosen.clone().requires_grad_()
    dpo_loss(leaf, rejected, zero, zero - 1000.0, beta=0.5)[0].sum().backward()
    assert_close(leaf.grad, torch.full((64,), -0.5, dtype=torch.float64))  # it pushes for ever, CPO's saturates


# TRL


def trl_preference(chosen, rejected, chosen_lengths, rejected_lengths, *, beta, gamma=0.0, normalize=False):
    """TRL's own CPOTrainer.cpo_loss, to which its trainer adds the likelihood."""
    from trl.experimental.cpo import CPOTrainer

    trainer = SimpleNamespace(
        alpha=0.0,
        accelerator=SimpleNamespace(device=torch.device("cpu")),
        loss_type="simpo" if normalize else "sigmoid",
        beta=beta,
        simpo_gamma=gamma,
        label_smoothing=0.0,
    )
    if normalize:
        chosen, rejected = chosen / chosen_lengths, rejected / rejected_lengths
    return CPOTrainer.cpo_loss(trainer, chosen, rejected)


@functools.cache
def edges():
    """Random pairs, equal ones, and margins up to 1e4 nats, in float32."""
    rows = [[0.0, 0, 1, 1], [-5, -5, 2, 2], [-1e4, 0, 1, 7], [0, -1e4, 3, 1], [-1e4, -1e4, 1, 2]]
    return edges_of(with_lengths, rows)


@pytest.mark.evidence
def test_agrees_with_trl(evidence):
    worst = 0.0
    for options in ({"beta": 0.1}, {"beta": 3.0}, {"beta": 2.0, "gamma": 0.5, "normalize": True}):
        ours = functools.partial(original.cpo_loss, nll=0.0, **options)
        worst = max(worst, losses_apart(ours, functools.partial(trl_preference, **options), edges()))
    evidence(
        NAME,
        "Largest difference from TRL 1.16.0",
        value=worst,
        bar=1e-6,
        note="Losses, gradients and rewards of the preference part in float32, relative where they exceed 1; CPO and "
        "CPO-SimPO; margins up to 10,000 nats.",
    )


@pytest.mark.parametrize("normalize", [False, True], ids=["CPO", "CPO-SimPO"])
def test_agrees_with_trl_on_a_real_model(normalize, tmp_path):
    """Tokens, masks, EOS, sums, likelihood and loss together, one pair at a time: TRL's trainer, its collator and its
    forward pass. In a batch, TRL's likelihood is a mean over all tokens of all chosen responses."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    policy, tokenizer = tiny(1)
    options = {"loss_type": "simpo", "simpo_gamma": 0.5} if normalize else {}
    config = CPOConfig(output_dir=str(tmp_path), beta=0.4, cpo_alpha=0.7, **options, **QUIET)
    trainer = real_trainer(CPOTrainer, config, policy, tokenizer)
    algorithm = original.algorithm()
    settings = algorithm.settings(beta=0.4, nll=0.7, gamma=0.5 if normalize else 0.0, normalize=normalize)
    for i, pair in enumerate(PAIRS):
        expected = trainer.compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[i]]))
        trainer.model.zero_grad(), policy.zero_grad()
        loss = algorithm.loss(scored(policy, tokenizer, [pair]), settings)[0].mean()
        same_loss_and_gradients(loss, policy, expected, trainer.model)
    logps = scored(policy, tokenizer)
    preference = algorithm.loss(logps, algorithm.settings(**(vars(settings) | {"nll": 0.0})))[0].mean()
    pooled = -logps.chosen.sum() / logps.chosen_lengths.sum()
    assert_close(preference + 0.7 * pooled, real_loss(trainer), rtol=1e-6, atol=1e-6)
    each = -(logps.chosen / logps.chosen_lengths).mean()
    assert (pooled - each).abs() > 1e-4


# Where the loss leads


def minimum(world, sampler, *, beta, nll, steps=1000):
    """log pi (X, Y) where the population loss is least."""
    algorithm = original.algorithm()
    settings = algorithm.settings(beta=beta, nll=nll)

    return population_minimum(world, sampler, lambda pairs: algorithm.loss(pairs, settings)[0], steps)


def chosen_responses(world, sampler):
    """(X, Y): how often each response is the chosen one of a pair from the sampler: 2 mu(y) E[sigmoid(r - r')]."""
    return implied(sampler, world.rewards)


def implied(sampler, scores):
    """(X, Y): how often each response would be chosen, if Bradley and Terry's scores were these."""
    return 2 * sampler * (sampler.unsqueeze(1) * torch.sigmoid(scores.unsqueeze(2) - scores.unsqueeze(1))).sum(-1)


def flat(world, beta):
    return (world.rewards / beta).log_softmax(-1)


@pytest.mark.evidence
def test_the_likelihood_alone_and_the_preference_alone(evidence):
    """nll = 0: a uniform reference, exp(r / beta). beta towards 0: the chosen responses as they are."""
    seeds = list(range(5)) if evidence.full else [0]
    to_flat, to_chosen, nats = [], [], []
    for seed in seeds:
        world = exact.make_world(seed)
        even = exact_pairs.samplers(world)["all responses evenly"]
        steps = 2500 if evidence.full else 150
        without = minimum(world, even, beta=world.beta, nll=0.0, steps=steps)
        to_flat.append(exact.kl(without, flat(world, world.beta)).mean().item())
        nats.append(exact.kl(flat(world, world.beta), best(world)).mean().item())
        only = minimum(world, even, beta=1e-9, nll=1.0, steps=steps)
        to_chosen.append(exact.kl(only, chosen_responses(world, even).log()).mean().item())
    if not evidence.full:
        assert max(to_flat + to_chosen) < 1e-3
        return
    common = {"unit": "nats", "seeds": seeds, "note": "L-BFGS in float64 on the exact population loss."}
    evidence(NAME, "KL(π‖exp(r/β)/Z), nll = 0", value=max(to_flat), bar=1e-6, spread=to_flat, **common)
    evidence(NAME, "KL(π‖the chosen responses), β → 0", value=max(to_chosen), bar=1e-6, spread=to_chosen, **common)
    evidence(NAME, "KL(π‖π*), nll = 0, β = 0.5", value=sum(nats) / 5, spread=nats, unit="nats", seeds=seeds)


@pytest.mark.evidence
def test_the_end_point_is_a_mixture_that_matches_the_chosen_responses(evidence):
    """The stationarity condition: with v = nll / |y|, (v * pi + beta * g) / (v + beta) is the distribution of the
    chosen responses, where g is what pi would choose from the sampler's pairs."""
    seeds = list(range(5)) if evidence.full else [0]
    names = ("the reference", "all responses evenly") if evidence.full else ("all responses evenly",)
    betas = (0.1, 0.5) if evidence.full else (0.5,)
    for name in names:
        residual, found = [], {beta: {"π*": [], "π_ref": [], "chosen": [], "reward": []} for beta in betas}
        start = time.process_time()
        for seed in seeds:
            world = exact.make_world(seed)
            sampler = exact_pairs.samplers(world)[name]
            chosen, v = chosen_responses(world, sampler), 1.0 / world.length
            for beta in betas:
                logps = minimum(world, sampler, beta=beta, nll=1.0, steps=2500 if evidence.full else 150)
                mixture = (v * logps.exp() + beta * implied(sampler, beta * logps)) / (v + beta)
                residual.append((mixture - chosen).abs().max().item())
                found[beta]["π*"].append(exact.kl(logps, best(world)).mean().item())
                found[beta]["π_ref"].append(exact.kl(logps, world.ref_logps).mean().item())
                found[beta]["chosen"].append(exact.kl(logps, chosen.log()).mean().item())
                found[beta]["reward"].append((logps.exp() * world.rewards).sum(-1).mean().item())
        if not evidence.full:
            assert max(residual) < 1e-3
            return
        seconds = (time.process_time() - start) / len(seeds) / len(betas)
        check = f"Largest residual of the stationarity condition, pairs from {name}"
        note = f"L-BFGS in float64, {seconds:.0f} CPU seconds a world."
        evidence(NAME, check, value=max(residual), bar=1e-5, seeds=seeds, note=note)
        for beta in betas:
            for label, values in found[beta].items():
                title = {"reward": "Reward", "chosen": "KL(π‖the chosen responses)"}.get(label, f"KL(π‖{label})")
                check = f"{title}, β = {beta:g}, pairs from {name}"
                unit = "" if label == "reward" else "nats"
                evidence(NAME, check, value=sum(values) / 5, unit=unit, seeds=seeds, spread=values)
    for label, policy in (("π*", best), ("π_ref", lambda world: world.ref_logps)):
        rewards = [(policy(w).exp() * w.rewards).sum(-1).mean().item() for w in map(exact.make_world, seeds)]
        evidence(NAME, f"Reward of {label}", value=sum(rewards) / 5, spread=rewards, seeds=seeds)


@pytest.mark.evidence
def test_length_decides_which_term_wins(evidence):
    """The preference is a sum over tokens, the likelihood a mean: its weight against beta is nll / |y|. With 3 tokens
    the end point is near the chosen responses; as if they had 30 or 300, it nears the uniform reference's."""
    seeds = list(range(5)) if evidence.full else [0]
    found = {}
    for tokens in (3, 30, 300):
        to_chosen, to_flat = [], []
        for seed in seeds:
            world = exact.make_world(seed)
            even = exact_pairs.samplers(world)["all responses evenly"]
            nll = world.length / tokens  # over 3 tokens, the weight of 1 over so many
            logps = minimum(world, even, beta=world.beta, nll=nll, steps=2500 if evidence.full else 80)
            to_chosen.append(exact.kl(logps, chosen_responses(world, even).log()).mean().item())
            to_flat.append(exact.kl(logps, flat(world, world.beta)).mean().item())
        found[tokens] = to_chosen, to_flat
        if evidence.full:
            common = {"unit": "nats", "seeds": seeds, "note": "β = 0.5, nll = 1, pairs evenly from all responses."}
            check = f"KL(π‖the chosen responses), {tokens} tokens"
            evidence(NAME, check, value=sum(to_chosen) / 5, spread=to_chosen, **common)
            evidence(NAME, f"KL(π‖exp(r/β)/Z), {tokens} tokens", value=sum(to_flat) / 5, spread=to_flat, **common)
    assert max(found[3][0]) < 0.2 < min(found[300][0]) and max(found[300][1]) < 0.2 < min(found[3][1])


@pytest.mark.evidence
def test_sampled_pairs_lead_there(evidence):
    """From its adapter, with pairs from the reference: to where the population loss is least, not to pi*."""
    seeds = list(range(5)) if evidence.full else [0]
    nats, away = [], []
    for seed in seeds:
        world = exact.make_world(seed)
        trial = trials.exact_preferences(original.algorithm(), world, seed, steps=2000 if evidence.full else 200)
        sampler = world.ref_logps.exp()
        target = minimum(world, sampler, beta=world.beta, nll=1.0, steps=2500 if evidence.full else 100)
        nats.append(trial.to_optimum)
        away.append(exact.kl(exact.response_logps(world, trial.logits), target).mean().item())
    if not evidence.full:
        assert away[0] < 0.2
        return
    note = "β = 0.5, 32 fresh pairs a step from the reference, 2,000 steps."
    common = {"unit": "nats", "seeds": seeds, "note": note}
    evidence(NAME, "Sampled pairs: KL(π‖π*)", value=sum(nats) / 5, spread=nats, **common)
    evidence(NAME, "Sampled pairs: KL(π‖the end point)", value=sum(away) / 5, spread=away, **common)


# Learning


def test_a_few_steps_in_the_shared_loop(tmp_path):
    tokenizer = arithmetic.make_tokenizer()
    policy = arithmetic.make_model(len(tokenizer), hidden=16, layers=1)
    algorithm = original.algorithm()
    assert not algorithm.reference
    settings = algorithm.settings(steps=60, lr=1e-2, batch=4, out=str(tmp_path))
    history = loop.train(policy, tokenizer, PAIRS, algorithm, settings).history
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert history[-1]["accuracy"] == 1.0 and history[-1]["chosen_logps"] > history[0]["chosen_logps"] + 1


@pytest.mark.evidence
@pytest.mark.slow
def test_without_the_likelihood_both_fall_on_arithmetic(evidence, tmp_path):
    """Pairs that a verifier labelled, the same runs with and without the second term."""
    if not evidence.full:
        return
    seeds = list(range(5))
    for nll, label in ((1.0, "nll = 1"), (0.0, "nll = 0")):
        runs = [trials.arithmetic_preferences(original.algorithm(), seed, str(tmp_path), nll=nll) for seed in seeds]
        ends, peaks = ([f(run["accuracy"]) for run in runs] for f in (lambda x: x[-1], max))
        changes = [run["history"][-1]["chosen_logps"] - run["history"][0]["chosen_logps"] for run in runs]
        common = {"seeds": seeds, "note": "β = 0.1; the rest as in the defaults."}
        evidence(NAME, f"Arithmetic: exact match, {label}", value=sum(ends) / 5, spread=ends, **common)
        check = f"Arithmetic: best exact match on the way, {label}"
        evidence(NAME, check, value=sum(peaks) / 5, spread=peaks, **common)
        check = f"Arithmetic: change of log π(chosen), {label}"
        evidence(NAME, check, value=sum(changes) / 5, unit="nats", spread=changes, **common)
