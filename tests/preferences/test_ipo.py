"""IPO against its paper in explicit loops, TRL, its own optimum in closed form, and its own broken copies."""

import math

import pytest
import torch
from torch.testing import assert_close

from snippets.preferences import dpo, loop
from snippets.preferences import ipo as original
from snippets.worlds import arithmetic, exact, exact_pairs, trials
from tests.mutation import caught_by, load_mutant
from tests.preferences.losses import (
    DTYPES,
    NOT_POSITIVE,
    PAIRS,
    apart,
    computed_in_float32,
    edges_of,
    finite_step,
    no_gradient_to_reference_or_rewards,
    real_loss,
    real_trainer,
    refused,
    rows_are_independent,
    shapes_are_named,
    trl_dpo,
    with_reference,
)
from tests.trainers import QUIET, same_loss_and_gradients, tiny

PATH = "snippets/preferences/ipo.py"
SNIPPET = "preferences/ipo"


# The formula, its gradient and its inputs. Each check takes the module, so that broken copies can be put to it.


def check_equation_17_in_loops(ipo):
    for options in ({}, {"beta": 0.5}, {"beta": 2.0}):
        tau, four = options.get("beta", 0.1), with_reference()
        losses, chosen_rewards, rejected_rewards = ipo.ipo_loss(*four, **options)
        for i, (chosen, rejected, ref_chosen, ref_rejected) in enumerate(zip(*(x.tolist() for x in four), strict=True)):
            h = (chosen - rejected) - (ref_chosen - ref_rejected)
            assert losses[i].item() == pytest.approx((h - 1 / (2 * tau)) ** 2, rel=1e-9)
            assert chosen_rewards[i].item() == pytest.approx(tau * (chosen - ref_chosen), rel=1e-9)
            assert rejected_rewards[i].item() == pytest.approx(tau * (rejected - ref_rejected), rel=1e-9)


def check_it_is_the_regression_on_both_orders_of_the_pair(ipo):
    """The label is I = 1 in the order (w, l) and 0 in the order (l, w). The squared errors of h on I / tau, averaged
    over both orders, are the loss and a constant."""
    four = with_reference()
    h = (four[0] - four[2]) - (four[1] - four[3])
    for tau in (0.1, 0.5):
        both = ((h - 1 / tau) ** 2 + (-h) ** 2) / 2
        assert_close(both - ipo.ipo_loss(*four, beta=tau)[0], torch.full_like(h, 1 / (4 * tau**2)))


def check_gradient_points_to_the_target_from_both_sides(ipo):
    """d loss / d log pi(chosen) = 2 (h - 1 / (2 tau)), whatever the side, and minus that for the rejected one."""
    zero = torch.zeros(5, dtype=torch.float64)
    for tau in (0.1, 1.0):
        target = 1 / (2 * tau)
        chosen = torch.tensor([-3.0, 0.0, target, target + 1, 100.0], dtype=torch.float64, requires_grad=True)
        rejected = torch.zeros(5, dtype=torch.float64, requires_grad=True)
        losses = ipo.ipo_loss(chosen, rejected, zero, zero, beta=tau)[0]
        losses.sum().backward()
        assert_close(chosen.grad, 2 * (chosen.detach() - target))
        assert_close(rejected.grad, -chosen.grad)
        assert losses[2].item() == 0.0


def check_no_gradient_reaches_the_reference_or_the_rewards(ipo):
    no_gradient_to_reference_or_rewards(ipo.ipo_loss, with_reference())


def check_large_differences_stay_finite(ipo):
    for dtype in DTYPES:
        for h in (1e4, 100.0, 0.0, -100.0, -1e4):
            losses, _ = finite_step(ipo.ipo_loss, (h, 0.0, 0.0, 0.0), dtype)
            assert losses.item() == pytest.approx((torch.tensor(h, dtype=dtype).item() - 5) ** 2, rel=1e-6)


def check_half_precision_is_computed_in_float32(ipo):
    """Near -1000 the neighbours in bf16 are 4 apart: the difference must be taken after the upcast."""
    computed_in_float32(ipo.ipo_loss, with_reference(scale=1000.0))


def check_a_term_of_the_prompt_alone_changes_nothing(ipo):
    four = with_reference()
    shift = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for shifted in ([four[0] + shift, four[1] + shift, *four[2:]], [*four[:2], four[2] + shift, four[3] + shift]):
        assert_close(ipo.ipo_loss(*shifted)[0], ipo.ipo_loss(*four)[0])


def check_equal_responses_teach_nothing(ipo):
    """h is 0 whatever the policy, and both gradients fall on the same log-probability, where they cancel."""
    same = torch.tensor([-3.0], requires_grad=True)
    losses = ipo.ipo_loss(same, same, torch.tensor([-1.0]), torch.tensor([-1.0]), beta=0.25)[0]
    losses.sum().backward()
    assert losses.item() == pytest.approx(4.0) and same.grad.item() == 0.0


def check_a_batch_is_its_pairs_one_by_one(ipo):
    rows_are_independent(ipo.ipo_loss, with_reference())


def check_bad_input_is_named(ipo):
    four = with_reference(size=3)
    shapes_are_named(ipo.ipo_loss, four)
    refused(ipo.ipo_loss, four, "beta must be positive and finite", NOT_POSITIVE)


def check_the_optimum_is_a_tilted_reference(ipo):
    generator = torch.Generator().manual_seed(0)
    ref = torch.randn(3, 7, generator=generator, dtype=torch.float64).log_softmax(-1)
    wins = torch.rand(3, 7, generator=generator, dtype=torch.float64)
    for tau in (0.1, 1.0):
        best = ipo.ipo_optimum(ref, wins, tau)
        for x in range(3):
            weights = [math.exp(ref[x, y]) * math.exp(wins[x, y] / tau) for y in range(7)]
            for y in range(7):
                assert best[x, y].exp().item() == pytest.approx(weights[y] / sum(weights), rel=1e-9)
    refused(ipo.ipo_optimum, (ref, wins), "beta must be positive and finite", NOT_POSITIVE)


def check_the_adapter_divides_by_length_only_if_told(ipo):
    """per_token is TRL's loss: log-ratios a token."""
    four = with_reference()
    generator = torch.Generator().manual_seed(5)
    lengths = [torch.randint(1, 9, (64,), generator=generator) for _ in range(2)]
    pairs = loop.PairLogps(four[0], four[1], *lengths, *four[2:])
    method = ipo.algorithm()
    assert method.reference and not method.vocab_kl and not method.mismatched
    assert method.settings().beta == 0.1 and not method.settings().per_token
    means = [x / lengths[i % 2] for i, x in enumerate(four)]
    for beta in (0.3, 0.7):
        plain = method.loss(pairs, method.settings(beta=beta))
        divided = method.loss(pairs, method.settings(beta=beta, per_token=True))
        for k in range(3):
            assert_close(plain[k], ipo.ipo_loss(*four, beta=beta)[k])
            assert_close(divided[k], ipo.ipo_loss(*means, beta=beta)[k])


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_loss(check):
    check(original)


LOSS = "losses = (h - 1 / (2 * beta)) ** 2"
CHOSEN = "policy_chosen_logps.to(dtype) - ref_chosen_logps.detach().to(dtype)"
MISTAKES = {
    "target 1 / beta": (LOSS, "losses = (h - 1 / beta) ** 2"),
    "target beta / 2": (LOSS, "losses = (h - beta / 2) ** 2"),
    "beta times h": (LOSS, "losses = (beta * h - 1 / (2 * beta)) ** 2"),
    "one-sided, a hinge": (LOSS, "losses = torch.relu(1 / (2 * beta) - h) ** 2"),
    "absolute value": (LOSS, "losses = (h - 1 / (2 * beta)).abs()"),
    "half the square": (LOSS, "losses = (h - 1 / (2 * beta)) ** 2 / 2"),
    "flipped sign": ("h = chosen_logratios - rejected_logratios", "h = rejected_logratios - chosen_logratios"),
    "no reference": (CHOSEN, "policy_chosen_logps.to(dtype)"),
    "difference before the upcast": (CHOSEN, "(policy_chosen_logps - ref_chosen_logps.detach()).to(dtype)"),
    "gradient into the reference": ("ref_rejected_logps.detach()", "ref_rejected_logps"),
    "gradient into the rewards": ("beta * chosen_logratios.detach()", "beta * chosen_logratios"),
    "references swapped": ("- ref_rejected_logps", "- ref_chosen_logps"),
    "rewards without beta": ("losses, beta * chosen_logratios", "losses, chosen_logratios"),
    "mean over the batch": ("return losses, beta", "return losses.mean().expand_as(losses), beta"),
    "beta may be 0": (
        'if not 0 < beta < math.inf:\n        raise ValueError(f"beta must be positive and finite, got {beta}: ',
        'if not 0 <= beta < math.inf:\n        raise ValueError(f"beta must be positive and finite, got {beta}: ',
    ),
    "beta of the optimum unchecked": (
        'if not 0 < beta < math.inf:\n        raise ValueError(f"beta must be positive and finite, got {beta}")',
        "pass",
    ),
    "shapes unchecked": ("x.shape != policy_chosen_logps.shape or x.dim() != 1", "False"),
    "optimum not normalised": ("(ref_logps + wins / beta).log_softmax(-1)", "ref_logps + wins / beta"),
    "optimum with beta on the wrong side": ("ref_logps + wins / beta)", "ref_logps + wins * beta)"),
    "always by length": ("if settings.per_token:", "if True:"),
    "never by length": ("if settings.per_token:", "if False:"),
    "adapter with a fixed beta": ("beta=settings.beta)", "beta=0.3)"),
    "adapter with another default": (
        "beta: float = field(\n            default=0.1",
        "beta: float = field(\n            default=0.5",
    ),
    "one length for both": ("x / pairs.rejected_lengths", "x / pairs.chosen_lengths"),
}


def test_no_check_fails_on_the_original():
    assert caught_by(original, CHECKS) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    """Each deliberate mistake makes at least one check fail."""
    assert caught_by(load_mutant(PATH, *MISTAKES[mistake]), CHECKS)


# TRL


def trl_ipo(chosen, rejected, ref_chosen, ref_rejected, lengths, *, beta):
    """Of TRL, on sums of log-probabilities of responses of given lengths (B,), (B,). The sum stands on the first token
    of each response, zeros on the others."""
    rows, size = torch.cat([chosen, rejected]), int(torch.cat(lengths).max())
    mask = torch.arange(size + 1) > 0
    mask = (mask & (torch.arange(size + 1) <= torch.cat(lengths).unsqueeze(1))).long()  # a prompt of one token
    logps = torch.cat([rows.unsqueeze(1), torch.zeros(len(rows), size - 1, dtype=rows.dtype)], 1)
    return trl_dpo(logps, mask, ref_chosen, ref_rejected, loss_types=["ipo"], beta=beta)[0]


def edges():
    """Random pairs, equal ones, and differences up to 1e4 nats, in float32; and lengths."""
    rows = [[0.0, 0, 0, 0], [-5, -5, -5, -5], [-1e4, 0, 0, 0], [0, -1e4, 0, 0], [-1, -2, -1e4, -3]]
    four, generator = edges_of(with_reference, rows), torch.Generator().manual_seed(3)
    return four, [torch.randint(1, 12, four[0].shape, generator=generator) for _ in range(2)]


@pytest.mark.evidence
def test_agrees_with_trl_on_means(evidence):
    """TRL divides by the number of tokens; ours agrees if it is given means."""
    four, lengths = edges()
    worst = 0.0
    for beta in (0.1, 0.5, 3.0):
        leaves, others = ([x.clone().requires_grad_() for x in four] for _ in range(2))
        means = [(leaves[i] - leaves[i + 2].detach()) / lengths[i] for i in range(2)]
        losses = original.ipo_loss(*means, *[torch.zeros_like(x) for x in means], beta=beta)[0]
        losses.sum().backward()
        for i in range(len(losses)):  # one at a time: TRL gives the mean of a batch
            loss = trl_ipo(*(x[i : i + 1] for x in others), [n[i : i + 1] for n in lengths], beta=beta)
            loss.backward()
            worst = max(worst, apart(losses[i], loss))
        for x, other in zip(leaves[:2], others[:2], strict=True):
            worst = max(worst, apart(x.grad, other.grad))
        summed = original.ipo_loss(*four, beta=beta)[0]
        assert ((summed - losses).abs() > 1).float().mean() > 0.5  # on sums it is another loss
    evidence(
        SNIPPET,
        "Largest difference from TRL 1.16.0",
        value=worst,
        bar=1e-6,
        note='Losses and gradients of loss_type "ipo" in float32, differences up to 10,000 nats; ours given means.',
    )


def test_agrees_with_trl_on_a_real_model(tmp_path):
    """Tokens, masks, EOS, lengths, reference and loss together: TRL's trainer, its collator and its forward pass."""
    from trl import DPOConfig, DPOTrainer

    (policy, tokenizer), (reference, _) = tiny(1), tiny(0)
    config = DPOConfig(str(tmp_path), beta=0.5, loss_type=["ipo"], **QUIET)
    trainer = real_trainer(DPOTrainer, config, policy, tokenizer, reference=reference)
    method = original.algorithm()
    ref = loop.reference_logps(reference, tokenizer, PAIRS, batch=2)
    tokens = loop.tokenize_pairs(tokenizer, PAIRS)
    pairs = loop.score_pairs(policy, tokens, tokenizer.pad_token_id, method, ref_logps=ref)
    loss = method.loss(pairs, method.settings(beta=0.5, per_token=True))[0].mean()
    same_loss_and_gradients(loss, policy, real_loss(trainer), trainer.model)


# Where the loss leads: the exact world


def expected_loss(beta):
    def loss(pairs):
        return original.ipo_loss(pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected, beta=beta)[0]

    return loss


def minimise(world, sampler, preference, beta, steps=500):
    def objective(logits):
        return exact_pairs.population_loss(world, logits, expected_loss(beta), sampler, preference)

    return exact_pairs.minimise(world, objective, steps)


def win_rates(sampler, preference):
    """(X, Y): the chance to win against a response of the sampler."""
    X, Y = sampler.shape
    return (preference.view(X, Y, Y) * sampler.unsqueeze(1)).sum(-1)


def nats(world, logits, other):
    return exact.kl(exact.response_logps(world, logits), other).mean().item()


@pytest.mark.evidence
def test_population_loss_reaches_its_own_optimum(evidence):
    """pi_ref * exp(win rate / beta): where exact gradients lead, for either sampler and a wide and a narrow beta."""
    seeds = list(range(5)) if evidence.full else [0]
    for beta in (0.5, 0.1):
        reached, to_best, drift = [], [], []
        for seed in seeds:
            world = exact.make_world(seed, **({} if evidence.full else {"prompts": 1}))
            preference = exact_pairs.bradley_terry(world)
            for name, sampler in exact_pairs.samplers(world).items():
                closed = original.ipo_optimum(world.ref_logps, win_rates(sampler, preference), beta)
                logits = minimise(world, sampler, preference, beta)
                reached.append(nats(world, logits, closed))
                if name == "the reference":
                    to_best.append(exact.distance(world, logits))
                    drift.append(nats(world, logits, world.ref_logps))
        common = {"unit": "nats", "seeds": seeds}
        evidence(
            SNIPPET,
            f"KL to IPO's own optimum, exact population loss, β = {beta}",
            value=max(reached),
            bar=0.01,
            spread=reached,
            note="The largest of the worlds and of two samplers of pairs. L-BFGS in float64.",
            **common,
        )
        evidence(
            SNIPPET,
            f"KL(π‖π*) at IPO's optimum, β = {beta}",
            value=sum(to_best) / len(seeds),
            spread=to_best,
            note="π* is the optimum of E[r] − 0.5 KL. Pairs from the reference.",
            **common,
        )
        evidence(
            SNIPPET, f"KL(π‖π_ref) at IPO's optimum, β = {beta}", value=sum(drift) / len(seeds), spread=drift, **common
        )


@pytest.mark.evidence
def test_no_beta_makes_it_the_optimum_of_rlhf(evidence):
    """The win rate is a bounded, bent function of the reward, so the best beta still leaves a distance, and it is not
    the beta of the KL penalty."""
    closest, at = [], []
    for seed in range(5):
        world = exact.make_world(seed)
        best = exact.optimal_policy(world.ref_logps, world.rewards, world.beta)
        wins = win_rates(world.ref_logps.exp(), exact_pairs.bradley_terry(world))
        betas = torch.logspace(-2, 0, 201, dtype=torch.float64).tolist()
        found = [exact.kl(original.ipo_optimum(world.ref_logps, wins, b), best).mean().item() for b in betas]
        closest.append(min(found))
        at.append(betas[found.index(min(found))])
    seeds = list(range(5))
    evidence(
        SNIPPET,
        "KL(π‖π*), the closest of all β",
        value=sum(closest) / 5,
        bar=0.0,
        better=">",
        unit="nats",
        seeds=seeds,
        spread=closest,
        note="In closed form, 201 values of β from 0.01 to 1.",
    )
    evidence(SNIPPET, "The β that is closest to π*", value=sum(at) / 5, bar=0.25, better="<", seeds=seeds, spread=at)


def test_the_preferences_need_not_be_bradley_terry():
    """Rock, paper, scissors and all: any antisymmetric table of preferences has the same closed form."""
    world = exact.make_world(0, prompts=1)
    table = torch.rand(1, 125, 125, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    preference = ((table + 1 - table.transpose(1, 2)) / 2).flatten()
    sampler = world.ref_logps.exp()
    closed = original.ipo_optimum(world.ref_logps, win_rates(sampler, preference), 0.2)
    assert nats(world, minimise(world, sampler, preference, 0.2), closed) < 1e-6


def test_the_sampler_of_the_pairs_decides():
    """DPO's optimum does not depend on who sampled the pairs; IPO's does, since the win rate is against the sampler."""
    world = exact.make_world(0)
    preference = exact_pairs.bradley_terry(world)
    best = [
        original.ipo_optimum(world.ref_logps, win_rates(sampler, preference), 0.1)
        for sampler in exact_pairs.samplers(world).values()
    ]
    assert exact.kl(*best).mean() > 1e-3


def test_dependent_pairs_lead_elsewhere():
    """Pairs of a sampler that is no product (here: each response meets its neighbours only). The optimum solves the
    normal equations of a least-squares fit on the graph of the pairs, and is not the tilt by the win rate."""
    world, beta = exact.make_world(0, prompts=1), 0.2
    preference = exact_pairs.bradley_terry(world).view(125, 125)
    ring = torch.zeros(125, 125, dtype=torch.float64)
    for step in (1, 2, 7):
        ring += torch.eye(125, dtype=torch.float64).roll(step, 1)
    weights = ring + ring.T
    weights /= weights.sum()

    def objective(logits):
        losses = expected_loss(beta)(exact_pairs.every_pair(world, logits))
        return (2 * weights * preference * losses.view(125, 125)).sum()

    reached = exact_pairs.minimise(world, objective)
    laplacian = torch.diag(weights.sum(1)) - weights
    pull = (weights * (preference - 0.5)).sum(1, keepdim=True) / beta
    ratios = torch.linalg.lstsq(laplacian, pull, driver="gelsd").solution.T  # up to a constant
    assert nats(world, reached, (world.ref_logps + ratios).log_softmax(-1)) < 1e-6
    rates = (weights * preference).sum(1) / weights.sum(1)
    assert nats(world, reached, original.ipo_optimum(world.ref_logps, rates.unsqueeze(0), beta)) > 0.01


@pytest.mark.evidence
def test_deterministic_labels_stay_finite(evidence):
    """The better response always wins. DPO runs away (test_dpo.py); here the win rate is the rank among the sampler's
    responses, at most 1, so no two log-ratios differ by more than 1 / beta: the reference keeps its say."""
    beta, seeds = 0.1, list(range(5)) if evidence.full else [0]
    differences, widest, drift = [], [], []
    for seed in seeds:
        world = exact.make_world(seed, **({} if evidence.full else {"prompts": 1}))
        sampler = world.ref_logps.exp()
        first, second = exact_pairs.all_pairs(world.rewards)
        always = (first > second).double() + 0.5 * (first == second).double()
        logits = minimise(world, sampler, always, beta)
        differences.append(nats(world, logits, original.ipo_optimum(world.ref_logps, win_rates(sampler, always), beta)))
        ratios = exact.response_logps(world, logits) - world.ref_logps
        widest.append(beta * (ratios.amax(-1) - ratios.amin(-1)).max().item())
        drift.append(nats(world, logits, world.ref_logps))
        four = [x.flatten() for x in (*exact_pairs.all_pairs(ratios), *exact_pairs.all_pairs(torch.zeros_like(ratios)))]
        with torch.enable_grad():
            margins = [x.clone().requires_grad_() for x in four]
            dpo.dpo_loss(*margins, beta=beta)[0].mul(always).sum().backward()
            assert margins[0].grad[always == 1].max() < 0  # DPO would push every one of these pairs on
    evidence(
        SNIPPET,
        "Deterministic labels: KL to IPO's own optimum",
        value=max(differences),
        bar=0.01,
        unit="nats",
        seeds=seeds,
        spread=differences,
        note="Exact population loss, β = 0.1, pairs from the reference.",
    )
    evidence(
        SNIPPET,
        "Deterministic labels: the widest margin, as a share of 1 / β",
        value=max(widest),
        bar=1.0,
        seeds=seeds,
        spread=widest,
    )
    evidence(
        SNIPPET,
        "Deterministic labels: KL(π‖π_ref)",
        value=sum(drift) / len(drift),
        unit="nats",
        seeds=seeds,
        spread=drift,
        note="β = 0.1.",
    )


def test_flipped_labels_act_like_a_larger_beta():
    """A share e of the labels is flipped: every win rate is pulled to 1/2 by 1 - 2e, so the optimum is that of
    beta / (1 - 2e) on clean labels. The ranking stays, the step is shorter."""
    world, beta, e = exact.make_world(0, prompts=1), 0.2, 0.2
    clean, sampler = exact_pairs.bradley_terry(world), world.ref_logps.exp()
    noisy = (1 - e) * clean + e * (1 - clean)
    longer = original.ipo_optimum(world.ref_logps, win_rates(sampler, clean), beta / (1 - 2 * e))
    assert nats(world, minimise(world, sampler, noisy, beta), longer) < 1e-6


@pytest.mark.evidence
def test_sampled_pairs_reach_it(evidence):
    """Fresh labelled pairs, one noisy regression target each."""
    seeds = list(range(5)) if evidence.full else [0]
    method, ends, curves = original.algorithm(), [], []
    for seed in seeds:
        world = exact.make_world(seed)
        wins = win_rates(world.ref_logps.exp(), exact_pairs.bradley_terry(world))
        trial = trials.exact_preferences(method, world, seed, steps=2000 if evidence.full else 400)
        ends.append(nats(world, trial.logits, original.ipo_optimum(world.ref_logps, wins, world.beta)))
        curves.append(trial.curve)
    evidence(
        SNIPPET,
        "KL to IPO's own optimum, sampled pairs",
        value=sum(ends) / len(ends),
        bar=0.05,
        unit="nats",
        seeds=seeds,
        spread=ends,
        note="Eight fresh pairs of each prompt a step from the reference, 2,000 steps, β = 0.5.",
    )


# What dividing by length changes


def test_with_equal_lengths_the_mean_only_rescales_beta():
    """All responses have 3 tokens: TRL's loss at beta has the optimum of the paper's at beta / 3, and a ninth of its
    size."""
    four = with_reference()
    means = [x / 3 for x in four]
    assert_close(original.ipo_loss(*means, beta=0.3)[0] * 9, original.ipo_loss(*four, beta=0.1)[0])


def length_tilt(ref, wins, lengths, beta):
    """log pi (Y,), the optimum of the loss on means: log-ratio = length * (wins / beta + c), with the c that makes it a
    distribution. The constant, harmless in a sum, is multiplied by the length."""
    low, high = -1 / beta - 50.0, 50.0
    for _ in range(200):
        c = (low + high) / 2
        low, high = (low, c) if (ref + lengths * (wins / beta + c)).logsumexp(-1) > 0 else (c, high)
    return ref + lengths * (wins / beta + c)


@pytest.mark.evidence
def test_dividing_by_length_pushes_long_responses_apart(evidence):
    """40 responses of lengths 1 to 20, whose quality has nothing to do with their length: each quality stands there
    once with every length. The sum leaves the mean length alone; the mean pushes down what is long and only average,
    and lets a long response go beyond the limit of 1 / beta."""
    lengths = torch.tensor([1.0, 5.0, 10.0, 20.0], dtype=torch.float64).repeat_interleave(10)
    rewards = torch.linspace(-1, 1, 10, dtype=torch.float64).repeat(4)
    ref = torch.full((40,), -math.log(40), dtype=torch.float64)
    preference = torch.sigmoid(rewards.unsqueeze(1) - rewards)
    wins, beta = preference.mean(-1), 0.5
    results = {}
    for name, divide in (("sum", torch.ones_like(lengths)), ("mean", lengths)):
        logits = ref.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [logits],
            max_iter=2000,
            tolerance_grad=1e-14,
            tolerance_change=0,
            history_size=50,
            line_search_fn="strong_wolfe",
        )

        def closure(optimizer=optimizer, logits=logits, divide=divide):
            optimizer.zero_grad()
            ratios = (logits.log_softmax(-1) - ref) / divide
            first, second = exact_pairs.all_pairs(ratios.unsqueeze(0))
            losses = original.ipo_loss(first, second, torch.zeros_like(first), torch.zeros_like(first), beta=beta)[0]
            loss = (preference.flatten() * losses).mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        results[name] = logits.detach().log_softmax(-1)
    assert_close(results["sum"], original.ipo_optimum(ref[None], wins[None], beta)[0], rtol=0, atol=1e-5)
    assert_close(results["mean"], length_tilt(ref, wins, lengths, beta), rtol=0, atol=1e-3)
    means = {name: (logps.exp() * lengths).sum().item() for name, logps in results.items()}
    assert means["sum"] == pytest.approx(9.0, abs=1e-3)
    middle = (rewards.abs() < 0.12) & (lengths == 20)  # long, of average quality
    evidence(
        SNIPPET,
        "A long response of average quality: log(π/π_ref), paper's sums",
        value=(results["sum"] - ref)[middle].mean().item(),
        unit="nats",
        note="β = 0.5; 40 responses, 1 to 20 tokens, length independent of quality.",
    )
    evidence(
        SNIPPET,
        "A long response of average quality: log(π/π_ref), TRL's means",
        value=(results["mean"] - ref)[middle].mean().item(),
        unit="nats",
    )
    assert (results["mean"] - results["sum"])[middle].max() < -1
    worst = (results["mean"] - ref)[lengths == 20].max() - (results["mean"] - ref)[lengths == 20].min()
    evidence(
        SNIPPET,
        "Widest margin between responses of 20 tokens, as a share of the paper's limit 1 / β, TRL's means",
        value=(beta * worst).item(),
        bar=1.0,
        better=">",
    )


# In the shared loop


def test_a_few_steps_in_the_loop_bring_the_pairs_to_their_target(tmp_path):
    tokenizer = arithmetic.make_tokenizer()
    policy = arithmetic.make_model(len(tokenizer), hidden=32, layers=2, seed=0)
    method = original.algorithm()
    settings = method.settings(steps=60, lr=1e-2, batch=4, beta=0.25, out=str(tmp_path))
    history = loop.train(policy, tokenizer, PAIRS, method, settings).history
    assert history[0]["loss"] == pytest.approx(4.0, abs=1e-4)  # h = 0, and 1 / (2 beta) is 2 nats
    assert history[-1]["loss"] < 0.05
    assert history[-1]["margin"] == pytest.approx(0.5, abs=0.05)  # beta * 1 / (2 beta), whatever beta is
