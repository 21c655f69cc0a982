"""ORPO against its paper in explicit loops, TRL, the end points of its population loss, and its broken copies."""

import functools
import math
import time
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy, logsigmoid
from torch.testing import assert_close

from snippets.preferences import loop
from snippets.preferences import orpo as original
from snippets.worlds import arithmetic, exact, exact_pairs, trials
from tests.mutation import caught_by, load_mutant
from tests.preferences.losses import (
    DTYPES,
    MISTAKES_WITHOUT_REFERENCE,
    NEGATIVE,
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

PATH = "snippets/preferences/orpo.py"
NAME = "preferences/orpo"
ONE = torch.ones(1)


# The formula, its gradient and its inputs. Each check takes the module, so that broken copies can be put to it.


def check_equations_4_6_and_7_in_loops(orpo):
    for options in ({}, {"beta": 1.0}, {"beta": 0.0}):
        four = with_lengths()
        losses, chosen_rewards, rejected_rewards = orpo.orpo_loss(*four, **options)
        beta = options.get("beta", 0.1)
        for i, (chosen, rejected, chosen_length, rejected_length) in enumerate(
            zip(*(x.tolist() for x in four), strict=True)
        ):
            p, q = math.exp(chosen / chosen_length), math.exp(rejected / rejected_length)
            ratio = (p / (1 - p)) / (q / (1 - q))
            expected = -math.log(p) - beta * math.log(1 / (1 + math.exp(-math.log(ratio))))
            assert losses[i].item() == pytest.approx(expected, rel=1e-9)
            assert chosen_rewards[i].item() == pytest.approx(beta * math.log(p), rel=1e-9)
            assert rejected_rewards[i].item() == pytest.approx(beta * math.log(q), rel=1e-9)


def check_gradient_has_one_over_one_minus_p(orpo):
    """d loss / d mean log pi: -1 - beta * w / (1 - p) for the chosen, beta * w / (1 - p) for the rejected, where w is
    the chance that the odds give to the wrong order."""
    chosen, rejected, *lengths = with_lengths()
    chosen.requires_grad_(), rejected.requires_grad_()
    losses, *rewards = orpo.orpo_loss(chosen, rejected, *lengths, beta=0.7)
    losses.sum().backward()
    p, q = (logps.detach().div(length).exp() for logps, length in zip((chosen, rejected), lengths, strict=True))
    wrong = (q / (1 - q)) / (p / (1 - p) + q / (1 - q))
    assert_close(chosen.grad, (-1 - 0.7 * wrong / (1 - p)) / lengths[0])
    assert_close(rejected.grad, 0.7 * wrong / (1 - q) / lengths[1])
    assert not any(reward.requires_grad for reward in rewards)


def check_odds_of_one_token_are_its_logit_over_the_others(orpo):
    """log(p / (1 - p)) is the token's logit minus the logsumexp of the others: bounded slopes in logits, however sure
    the model is."""
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(7, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    odds = orpo.log_odds(logits.log_softmax(-1)[:, 0])
    assert_close(odds, logits[:, 0] - logits[:, 1:].logsumexp(-1))
    (gradient,) = torch.autograd.grad(odds.sum(), logits)
    assert gradient.abs().max() <= 1 + 1e-6


def check_odds_are_exact_near_certainty(orpo):
    """1 - exp(x) of a float32 near 0 is rounded to a multiple of 6e-8; the odds must not be."""
    mean = -torch.logspace(-6.9, 3, 200)  # from just below the ceiling
    assert_close(orpo.log_odds(mean), orpo.log_odds(mean.double()).float(), rtol=1e-6, atol=2e-6)
    slope = mean.clone().requires_grad_()
    orpo.log_odds(slope).sum().backward()
    assert_close(slope.grad, -1 / torch.expm1(mean.double()).float(), rtol=1e-5, atol=0)


def check_certainty_is_finite(orpo):
    """A log-probability of 0, or above it by rounding: the value of the ceiling, and its slope."""
    for pair in ((0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-1e-9, -1.0), (1e-7, -1.0), (1e4, -1e4), (-1e4, 1e4)):
        for dtype in (torch.float32, torch.float64):
            leaves = [torch.tensor([x], dtype=dtype, requires_grad=True) for x in pair]
            losses = orpo.orpo_loss(*leaves, ONE, ONE, beta=0.5)[0]
            losses.sum().backward()
            assert losses.isfinite().all() and all(leaf.grad.isfinite().all() for leaf in leaves)
            assert leaves[0].grad.item() < 0 < leaves[1].grad.item() or pair[0] > pair[1]
    sure = torch.zeros(1, requires_grad=True)
    orpo.orpo_loss(-ONE, sure, ONE, ONE, beta=1.0)[0].sum().backward()
    assert sure.grad.item() > 1e6  # 1 / (1 - p), not the zero of a clamp: this pair is as wrong as can be
    assert orpo.log_odds(torch.zeros(1)).item() == pytest.approx(-math.log(torch.finfo(torch.float32).eps), abs=1e-3)


def check_small_probabilities_stay_finite(orpo):
    def loss(*logps):
        return orpo.orpo_loss(*logps, ONE, ONE, beta=0.5)

    for dtype in DTYPES:
        for pair in ((-1e4, -1.0), (-1.0, -1e4), (-1e4, -1e4), (-100.0, -90.0)):
            _, (_, rejected) = finite_step(loss, pair, dtype)
            if pair[0] < pair[1]:
                assert rejected.item() > 0.4


def check_half_precision_is_computed_in_float32(orpo):
    computed_in_float32(orpo.orpo_loss, with_lengths(scale=1000.0))


def check_length_is_divided_out(orpo):
    chosen, rejected, chosen_lengths, rejected_lengths = with_lengths()
    longer = orpo.orpo_loss(3 * chosen, 2 * rejected, 3 * chosen_lengths, 2 * rejected_lengths)[0]
    assert_close(longer, orpo.orpo_loss(chosen, rejected, chosen_lengths, rejected_lengths)[0])


def check_without_beta_it_is_fine_tuning(orpo):
    four = with_lengths()
    rejected = four[1].clone().requires_grad_()
    losses = orpo.orpo_loss(four[0], rejected, *four[2:], beta=0.0)[0]
    losses.sum().backward()
    assert_close(losses.detach(), -four[0] / four[2])
    assert (rejected.grad == 0).all()


def check_equal_responses_teach_only_their_likelihood(orpo):
    """chosen is rejected: a finite loss, and the gradient of the odds ratio cancels; fine-tuning is left."""
    logp = torch.tensor([-7.0], dtype=torch.float64, requires_grad=True)
    losses = orpo.orpo_loss(logp, logp, 4 * ONE, 4 * ONE, beta=0.3)[0]
    losses.sum().backward()
    assert losses.item() == pytest.approx(7 / 4 + 0.3 * math.log(2))
    assert logp.grad.item() == pytest.approx(-1 / 4)


def check_a_batch_is_its_pairs_one_by_one(orpo):
    rows_are_independent(orpo.orpo_loss, with_lengths())


def check_bad_input_is_named(orpo):
    four = with_lengths(size=3)
    shapes_are_named(orpo.orpo_loss, four)
    lengths_are_checked(orpo.orpo_loss, four)
    refused(orpo.orpo_loss, four, "beta must be finite and at least 0", NEGATIVE)


def check_the_adapter_passes_what_is_set(orpo):
    four, method = with_lengths(), orpo.algorithm()
    assert not method.reference and not method.vocab_kl and not method.mismatched
    assert (method.settings().beta, method.settings().lr) == (0.1, 5e-5)
    adapter_passes(method, orpo.orpo_loss, loop.PairLogps(*four), four, beta=0.7)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]
ODDS = "return mean_logps - torch.log(-torch.expm1(mean_logps))"
LOSSES = "losses = -chosen - beta * logsigmoid(log_odds(chosen) - log_odds(rejected))"
STRAIGHT = "mean_logps = torch.where(mean_logps > CEILING, straight, mean_logps)"
MISTAKES = {
    "flipped sign": (
        LOSSES,
        LOSSES.replace("(log_odds(chosen) - log_odds(rejected))", "(log_odds(rejected) - log_odds(chosen))"),
    ),
    "odds ratio with a plus": (LOSSES, LOSSES.replace("- beta *", "+ beta *")),
    "likelihood with the wrong sign": (LOSSES, LOSSES.replace("-chosen -", "chosen -")),
    "no likelihood": (LOSSES, LOSSES.replace("-chosen - beta", "-beta")),
    "likelihood of the rejected": (LOSSES, LOSSES.replace("-chosen -", "-rejected -")),
    "a ratio of probabilities": (ODDS, "return mean_logps"),
    "odds the wrong way up": (ODDS, "return torch.log(-torch.expm1(mean_logps)) - mean_logps"),
    "log1p(-exp)": (ODDS, "return mean_logps - torch.log1p(-torch.exp(mean_logps))"),
    "no ceiling": (STRAIGHT, "pass"),
    "a clamp without slope": (STRAIGHT, "mean_logps = mean_logps.clamp(max=CEILING)"),
    "log(sigmoid)": (LOSSES, "losses = -chosen - beta * (log_odds(chosen) - log_odds(rejected)).sigmoid().log()"),
    "no beta": (LOSSES, LOSSES.replace("beta * ", "")),
    "sums, not means": (
        "chosen = chosen_logps.to(dtype) / chosen_lengths.to(dtype)",
        "chosen = chosen_logps.to(dtype)",
    ),
    "the other's length": ("rejected_logps.to(dtype) / rejected_lengths", "rejected_logps.to(dtype) / chosen_lengths"),
    "rejected without gradient": ("rejected_logps.to(dtype)", "rejected_logps.detach().to(dtype)"),
    "gradient into the rewards": ("beta * chosen.detach()", "beta * chosen"),
    "mean over the batch": ("return losses, beta", "return losses.mean().expand_as(losses), beta"),
    "beta unchecked": ("if not 0 <= beta < math.inf", "if False"),
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


def test_odds_are_satisfied_sooner_than_the_ratio():
    """Of a pair in the right order, the odds are further apart than the probabilities, so the weight of the pair is
    smaller; in the wrong order it is larger. Where both probabilities are small there is no difference."""
    p, q = torch.tensor([0.8, 0.3, 1e-4]).log(), torch.tensor([0.3, 0.8, 3e-5]).log()
    odds, ratio = original.log_odds(p) - original.log_odds(q), p - q
    assert odds[0] > ratio[0] > 0 and odds[1] < ratio[1] < 0
    assert odds[2].item() == pytest.approx(ratio[2].item(), abs=1e-4)


# TRL


def trl_odds_ratio(chosen, rejected, *, beta):
    """TRL's own ORPOTrainer.odds_ratio_loss of two means -> losses, to which the likelihood is added, and rewards."""
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(beta=beta, accelerator=SimpleNamespace(device=torch.device("cpu")))
    losses, *rewards, _, _ = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
    return -losses, *rewards


@functools.cache
def edges():
    """Random pairs, equal ones, and means between -1e4 and -1e-6 nats a token, in float32."""
    rows = [[-5.0, -5, 2, 2], [-1e4, -1, 1, 7], [-1, -1e4, 3, 1], [-1e4, -1e4, 1, 1], [-1e-5, -3, 1, 1]]
    return edges_of(with_lengths, rows)


@pytest.mark.evidence
def test_agrees_with_trl(evidence):
    worst = 0.0
    for beta in (0.1, 0.5, 3.0):

        def oracle(chosen, rejected, chosen_lengths, rejected_lengths, beta=beta):
            chosen = chosen / chosen_lengths
            losses, *rewards = trl_odds_ratio(chosen, rejected / rejected_lengths, beta=beta)
            return losses - chosen, *rewards

        worst = max(worst, losses_apart(functools.partial(original.orpo_loss, beta=beta), oracle, edges()))
    evidence(
        NAME,
        "Largest difference from TRL 1.16.0",
        value=worst,
        bar=1e-6,
        note="Losses, gradients and rewards in float32, relative where they exceed 1; means of −10,000 to −1e-6 nats a "
        "token; the likelihood over the response.",
    )


def test_trl_has_no_number_for_a_response_that_is_certain():
    """At a mean log-probability that rounds to 0, TRL 1.16 gives an infinite loss or a NaN gradient."""
    for pair in ((0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-1e-8, -1.0)):
        leaves = [torch.tensor([x], requires_grad=True) for x in pair]
        trl_odds_ratio(*leaves, beta=0.1)[0].sum().backward()
        assert any(leaf.grad.isnan().any() for leaf in leaves), pair


def token_losses(policy, tokenizer, pair):
    """-log pi of each token of the chosen sequence after its first, and how many of them are the prompt's: what a
    causal LM's own loss is a mean of."""
    prompt = tokenizer(pair["prompt"])["input_ids"]
    ids = torch.tensor([prompt + tokenizer(pair["chosen"])["input_ids"] + [tokenizer.eos_token_id]])
    logits = policy(input_ids=ids).logits[0, :-1]
    return cross_entropy(logits, ids[0, 1:], reduction="none"), len(prompt) - 1


def test_agrees_with_trl_on_a_real_model(tmp_path):
    """Tokens, masks, EOS, means and loss together: TRL's trainer, its collator and its forward pass. Its odds are the
    response's; its likelihood is that of prompt and response, a mean over all tokens of the batch."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    policy, tokenizer = tiny(1)
    config = ORPOConfig(output_dir=str(tmp_path), beta=0.3, **QUIET)
    trainer = real_trainer(ORPOTrainer, config, policy, tokenizer)
    algorithm, pairs = original.algorithm(), scored(policy, tokenizer)
    ours = algorithm.loss(pairs, algorithm.settings(beta=0.3))[0].mean()
    likelihood = -(pairs.chosen / pairs.chosen_lengths).mean()  # a mean over each response, without the prompt
    whole = torch.cat([token_losses(policy, tokenizer, pair)[0] for pair in PAIRS]).mean()
    assert (whole - likelihood).abs() > 1e-3  # the prompt's tokens do count
    same_loss_and_gradients(ours - likelihood + whole, policy, real_loss(trainer), trainer.model)


def test_the_likelihood_of_the_loop_is_the_responses():
    """The same tokens as TRL's, less the prompt's, and a mean over each response."""
    policy, tokenizer = tiny(1)
    algorithm = original.algorithm()
    losses = algorithm.loss(scored(policy, tokenizer), algorithm.settings(beta=0.0))[0]
    for loss, pair in zip(losses, PAIRS, strict=True):
        tokens, start = token_losses(policy, tokenizer, pair)
        assert_close(loss, tokens[start:].mean())


# Where the loss leads


def minimum(world, sampler, beta, *, alone=False, steps=1000):
    """log pi (X, Y) where the population loss is least; alone: of the odds ratio without the likelihood."""
    algorithm = original.algorithm()
    settings = algorithm.settings(beta=beta)

    def losses(pairs):
        likelihood = pairs.chosen / pairs.chosen_lengths if alone else 0.0
        return algorithm.loss(pairs, settings)[0] + likelihood

    return population_minimum(world, sampler, losses, steps)


def chosen_responses(world, sampler):
    """(X, Y): how often each response is the chosen one of a pair from the sampler: 2 mu(y) E[sigmoid(r - r')]."""
    wins = torch.sigmoid(world.rewards.unsqueeze(2) - world.rewards.unsqueeze(1))  # (X, Y, Y)
    return 2 * sampler * (sampler.unsqueeze(1) * wins).sum(-1)


def odds_alone(world):
    """log pi = |y| log sigmoid(r + c), with the c of each prompt that makes it sum to one: the mean token probability
    is logistic in the reward."""
    low, high = torch.full((2, len(world.rewards), 1), 100.0, dtype=torch.float64) * torch.tensor([[[-1.0]], [[1.0]]])
    for _ in range(200):
        c = (low + high) / 2
        above = (world.length * logsigmoid(world.rewards + c)).logsumexp(-1, keepdim=True) > 0
        low, high = torch.where(above, low, c), torch.where(above, c, high)
    return world.length * logsigmoid(world.rewards + c)


def residual(world, logps, sampler, beta):
    """How far the gradient in logits is from zero: a(y) = pi(y) * sum of a, a being that in log pi, times |y|."""
    mean = logps / world.length
    odds = mean - torch.log(-torch.expm1(mean))
    implied = 2 * sampler * (sampler.unsqueeze(1) * torch.sigmoid(odds.unsqueeze(2) - odds.unsqueeze(1))).sum(-1)
    chosen = chosen_responses(world, sampler)
    a = chosen + beta / -torch.expm1(mean) * (chosen - implied)
    return (a - logps.exp() * a.sum(-1, keepdim=True)).abs().max().item()


@pytest.mark.evidence
def test_end_points(evidence):
    """At beta = 0 the chosen responses as they are; the larger beta, the more the odds have their way."""
    seeds = list(range(5)) if evidence.full else [0]
    betas = (0.0, 0.1, 1.0, 10.0) if evidence.full else (0.0, 0.1)
    names = ("the reference", "all responses evenly") if evidence.full else ("all responses evenly",)
    for name in names:
        nats, rewards, drift, to_chosen, residuals = ({beta: [] for beta in betas} for _ in range(5))
        start = time.process_time()
        for seed in seeds:
            world = exact.make_world(seed)
            sampler = exact_pairs.samplers(world)[name]
            for beta in betas:
                logps = minimum(world, sampler, beta, steps=2000 if evidence.full else 100)
                nats[beta].append(exact.kl(logps, best(world)).mean().item())
                rewards[beta].append((logps.exp() * world.rewards).sum(-1).mean().item())
                drift[beta].append(exact.kl(logps, world.ref_logps).mean().item())
                to_chosen[beta].append(exact.kl(logps, chosen_responses(world, sampler).log()).mean().item())
                residuals[beta].append(residual(world, logps, sampler, beta))
        seconds = (time.process_time() - start) / len(seeds) / len(betas)
        if not evidence.full:
            assert max(to_chosen[0.0]) < 1e-4 and max(map(max, residuals.values())) < 1e-3
            return
        common = {"seeds": seeds, "note": f"L-BFGS in float64, {seconds:.0f} CPU seconds a world."}
        check = f"KL(π‖the chosen responses), β = 0, pairs from {name}"
        values = to_chosen[0.0]
        evidence(NAME, check, value=max(values), bar=1e-5, unit="nats", spread=values, **common)
        worst = max(map(max, residuals.values()))
        check = f"Largest residual of the stationarity condition, pairs from {name}"
        evidence(NAME, check, value=worst, bar=1e-5, **common)
        common = {"seeds": seeds, "unit": "nats"}
        for beta in betas:
            mean = sum(nats[beta]) / 5
            evidence(NAME, f"KL(π‖π*), β = {beta:g}, pairs from {name}", value=mean, spread=nats[beta], **common)
            mean = sum(drift[beta]) / 5
            evidence(NAME, f"KL(π‖π_ref), β = {beta:g}, pairs from {name}", value=mean, spread=drift[beta], **common)
            mean = sum(rewards[beta]) / 5
            check = f"Reward, β = {beta:g}, pairs from {name}"
            evidence(NAME, check, value=mean, spread=rewards[beta], seeds=seeds)
        mean = sum(to_chosen[0.1]) / 5
        check = f"KL(π‖the chosen responses), β = 0.1, pairs from {name}"
        evidence(NAME, check, value=mean, spread=to_chosen[0.1], **common)
    for label, policy in (("π*", best), ("π_ref", lambda world: world.ref_logps)):
        rewards = [(policy(w).exp() * w.rewards).sum(-1).mean().item() for w in map(exact.make_world, seeds)]
        evidence(NAME, f"Reward of {label}", value=sum(rewards) / 5, spread=rewards, seeds=seeds)


@pytest.mark.parametrize("seed", range(5))
def test_fine_tuning_on_the_chosen_cannot_go_far(seed):
    """A response is chosen at most twice as often as it is sampled, so its KL to the sampler is below log 2."""
    world = exact.make_world(seed)
    for sampler in exact_pairs.samplers(world).values():
        chosen = chosen_responses(world, sampler)
        assert_close(chosen.sum(-1), torch.ones(4, dtype=torch.float64))
        assert (chosen < 2 * sampler).all()
        assert exact.kl(chosen.log(), sampler.log()).max() < math.log(2)


@pytest.mark.parametrize("seed", range(5))
def test_the_worse_a_response_the_more_it_gains_against_the_optimum(seed):
    """Fine-tuned on chosen responses from the reference: log q - log pi* = log E[sigmoid(r - r')] - r / beta, up to a
    constant, whose slope in r is below 1 - 1 / beta."""
    world = exact.make_world(seed)
    gain = chosen_responses(world, world.ref_logps.exp()).log() - best(world)
    rewards, order = world.rewards.sort(-1)
    slopes = gain.gather(1, order).diff(dim=-1) / rewards.diff(dim=-1)
    assert (slopes < 1 - 1 / world.beta).all()


@pytest.mark.evidence
def test_the_odds_ratio_alone(evidence):
    """Its population loss is least where log odds = r + c(x): the mean token probability is sigmoid(r + c). There is no
    reference and no temperature: the scale of the rewards is taken as it is."""
    seeds = list(range(5)) if evidence.full else [0]
    away, nats = [], []
    for seed in seeds:
        world = exact.make_world(seed)
        even = exact_pairs.samplers(world)["all responses evenly"]
        logps = minimum(world, even, 1.0, alone=True, steps=2000 if evidence.full else 120)
        away.append(exact.kl(logps, odds_alone(world)).mean().item())
        nats.append(exact.kl(logps, best(world)).mean().item())
    if not evidence.full:
        assert away[0] < 1e-4
        return
    common = {"seeds": seeds, "unit": "nats", "note": "Pairs evenly from all responses."}
    check = "KL(π‖σ(r + c)^|y|), the odds ratio alone"
    evidence(NAME, check, value=max(away), bar=1e-6, spread=away, **common)
    evidence(NAME, "KL(π‖π*), the odds ratio alone", value=sum(nats) / 5, spread=nats, **common)


def test_pairs_with_always_the_same_winner_have_an_end():
    """Three pairs of one prompt, with the same rejected response. The odds ratio alone asks for more at every margin;
    beside the likelihood, the chosen responses keep the shares in which they were chosen."""
    one = torch.ones(3)
    chosen = torch.tensor([0, 1, 1])  # one response once, another twice
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        logps = logits.log_softmax(-1)
        loss = original.orpo_loss(logps[chosen], logps[2].expand(3), one, one, beta=0.1)[0].mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    probs = logits.detach().softmax(-1)
    assert probs[2] < 1e-3 and probs[0].item() == pytest.approx(1 / 3, abs=0.01)


@pytest.mark.evidence
def test_sampled_pairs_lead_there(evidence):
    """From its adapter, with pairs from the reference: to where the population loss is least, not to pi*."""
    seeds = list(range(5)) if evidence.full else [0]
    nats, away = [], []
    for seed in seeds:
        world = exact.make_world(seed)
        steps = 2000 if evidence.full else 200
        trial = trials.exact_preferences(original.algorithm(), world, seed, beta=0.1, steps=steps)
        target = minimum(world, world.ref_logps.exp(), 0.1, steps=2000 if evidence.full else 100)
        nats.append(trial.to_optimum)
        away.append(exact.kl(exact.response_logps(world, trial.logits), target).mean().item())
    if not evidence.full:
        assert away[0] < 0.2
        return
    note = "β = 0.1, 32 fresh pairs a step from the reference, 2,000 steps."
    common = {"unit": "nats", "seeds": seeds, "note": note}
    evidence(NAME, "Sampled pairs: KL(π‖π*)", value=sum(nats) / 5, spread=nats, **common)
    evidence(NAME, "Sampled pairs: KL(π‖the end point)", value=sum(away) / 5, spread=away, **common)


# Learning


def test_a_few_steps_in_the_shared_loop(tmp_path):
    tokenizer = arithmetic.make_tokenizer()
    policy = arithmetic.make_model(len(tokenizer), hidden=16, layers=1)
    algorithm = original.algorithm()
    assert not algorithm.reference
    settings = algorithm.settings(steps=25, lr=1e-2, batch=4, out=str(tmp_path))
    history = loop.train(policy, tokenizer, PAIRS, algorithm, settings).history
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert history[-1]["accuracy"] >= 0.75 and history[-1]["chosen_logps"] > history[0]["chosen_logps"] + 1


@pytest.mark.evidence
@pytest.mark.slow
def test_how_much_of_it_is_fine_tuning(evidence, tmp_path):
    """The same runs on arithmetic with beta = 0: what the odds ratio adds to fine-tuning on the chosen answers."""
    if not evidence.full:
        return
    seeds = list(range(5))
    runs = {
        beta: [trials.arithmetic_preferences(original.algorithm(), seed, str(tmp_path), beta=beta) for seed in seeds]
        for beta in (0.0, 0.1)
    }
    for beta, label in ((0.0, "β = 0, fine-tuning alone"), (0.1, "β = 0.1")):
        ends = [run["accuracy"][-1] for run in runs[beta]]
        evidence(NAME, f"Arithmetic: exact match, {label}", value=sum(ends) / 5, spread=ends, seeds=seeds)
        for role in ("chosen", "rejected"):
            changes = [run["history"][-1][f"{role}_logps"] - run["history"][0][f"{role}_logps"] for run in runs[beta]]
            check = f"Arithmetic: change of log π({role}), {label}"
            evidence(NAME, check, value=sum(changes) / 5, unit="nats", spread=changes, seeds=seeds)
