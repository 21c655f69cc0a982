"""Online and iterative DPO: whose pairs they are, where they lead, and what a moving reference does to that."""

import dataclasses
import math
import statistics
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from snippets.preferences import dpo, ipo, loop
from snippets.preferences import online_dpo as original
from snippets.worlds import arithmetic, exact, exact_pairs, trials
from tests.mutation import caught_by, load_mutant

PATH = "snippets/preferences/online_dpo.py"
SNIPPET = "preferences/online_dpo"
torch.set_num_threads(1)


# The functions. Each check takes the module, so that broken copies can be put to it.


def check_best_and_worst_in_loops(online_dpo):
    generator = torch.Generator().manual_seed(0)
    for scores in (torch.randn(40, 8, generator=generator), torch.randint(0, 2, (40, 4), generator=generator).float()):
        prompts, chosen, rejected = online_dpo.best_and_worst(scores)
        wanted = []
        for p, row in enumerate(scores.tolist()):
            best, worst = 0, 0
            for g, score in enumerate(row):
                best = g if score > row[best] else best
                worst = g if score < row[worst] else worst
            if row[best] > row[worst]:
                wanted.append((p, best, worst))
        assert list(zip(prompts.tolist(), chosen.tolist(), rejected.tolist(), strict=True)) == wanted


def check_equal_rewards_make_no_pair(online_dpo):
    scores = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    prompts, chosen, rejected = online_dpo.best_and_worst(scores)
    assert (prompts.tolist(), chosen.tolist(), rejected.tolist()) == ([1], [1], [0])
    close = torch.tensor([[1.0, 1.0 + 1e-6]])  # not equal: a small difference counts as a large one
    assert [x.tolist() for x in online_dpo.best_and_worst(close)] == [[0], [1], [0]]
    prompts, chosen, rejected = online_dpo.best_and_worst(torch.ones(2, 4))
    assert prompts.shape == chosen.shape == rejected.shape == (0,)


def check_the_judge_is_bradley_and_terrys(online_dpo):
    rewards = torch.tensor([2.0, 0.0, -1.0, 1e4, -1e4], dtype=torch.float64)
    zero, size = torch.zeros(5, dtype=torch.float64), 20_000
    uniforms = torch.rand(size, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wins = online_dpo.label(rewards.expand(size, 5), zero.expand(size, 5), uniforms)
    assert wins.dtype == torch.bool
    for i, reward in enumerate(rewards.tolist()):
        chance = 1 / (1 + math.exp(-max(reward, -700.0)))
        assert wins[:, i].double().mean().item() == pytest.approx(chance, abs=4 * 0.5 / math.sqrt(size))
    assert online_dpo.label(zero, zero, torch.full((5,), 0.4999)).all()
    assert not online_dpo.label(zero, zero, torch.full((5,), 0.5)).any()


def check_the_restarted_optimum_is_rounds_of_tilting(online_dpo):
    generator = torch.Generator().manual_seed(0)
    ref = torch.randn(3, 7, generator=generator, dtype=torch.float64).log_softmax(-1)
    rewards = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    logps = ref
    for rounds in (1, 2, 3):
        for x in range(3):  # the optimum of RLHF for the reference of this round, in loops
            weights = [math.exp(logps[x, y] + rewards[x, y] / 0.5) for y in range(7)]
            total = sum(weights)
            found = online_dpo.restarted_optimum(ref, rewards, 0.5, rounds)[x].exp()
            assert_close(found, torch.tensor([w / total for w in weights], dtype=torch.float64))
        logps = online_dpo.restarted_optimum(ref, rewards, 0.5, rounds)
        assert_close(logps, exact.optimal_policy(ref, rewards, 0.5 / rounds))  # that of beta / rounds


def check_bad_input_is_named(online_dpo):
    for scores, message in [
        (torch.zeros(4, 1), r"a group G of at least 2, got shape \(4, 1\)"),
        (torch.zeros(4), r"a group G of at least 2, got shape \(4,\)"),
        (torch.tensor([[0.0, math.nan]]), r"scores must be finite, got \[\[0.0, nan\]\]"),
        (torch.tensor([[0.0, math.inf]]), "scores must be finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            online_dpo.best_and_worst(scores)
    with pytest.raises(ValueError, match=r"shapes disagree: \[\(3,\), \(3,\), \(2,\)\]"):
        online_dpo.label(torch.zeros(3), torch.zeros(3), torch.zeros(2))
    for beta, rounds in ((0.0, 1), (-1.0, 1), (math.nan, 1), (1.0, 0)):
        with pytest.raises(ValueError, match=f"want rounds >= 1 and beta > 0, got {rounds} and {beta}"):
            online_dpo.restarted_optimum(torch.zeros(1, 2), torch.zeros(1, 2), beta, rounds)


def check_the_loss_is_dpos_and_the_pairs_are_fresh(online_dpo):
    method = online_dpo.algorithm()
    assert method.reference and not method.vocab_kl and not method.mismatched
    assert (method.settings().refresh, method.settings().sampled_prompts) == (1, 16)
    generator = torch.Generator().manual_seed(0)
    four = [-torch.rand(5, generator=generator) for _ in range(4)]
    pairs = loop.PairLogps(four[0], four[1], torch.ones(5), torch.ones(5), *four[2:])
    for ours, wanted in zip(method.loss(pairs, method.settings(beta=0.3)), dpo.dpo_loss(*four, beta=0.3), strict=True):
        assert_close(ours, wanted)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_functions(check):
    check(original)


SEPARATE = "(scores.amax(-1) > scores.amin(-1))"
MISTAKES = {
    "best and worst exchanged": ("scores.argmax(-1), scores.argmin(-1)", "scores.argmin(-1), scores.argmax(-1)"),
    "second best": ("scores.argmax(-1), scores", "scores.topk(2).indices[:, 1], scores"),
    "ties make pairs": (SEPARATE, "(scores.amax(-1) >= scores.amin(-1))"),
    "only clear differences": (SEPARATE, "(scores.amax(-1) - scores.amin(-1) > 0.01)"),
    "all prompts at each step": ("default=16, metadata", "default=2000, metadata"),
    "only perfect groups": (SEPARATE, "(scores.amax(-1) > 0.5)"),
    "columns of all prompts": (
        "return prompts, chosen[prompts], rejected[prompts]",
        "return prompts, chosen, rejected",
    ),
    "group of one": ("scores.dim() != 2 or scores.shape[1] < 2", "scores.dim() != 2"),
    "scores unchecked": ("if not torch.isfinite(scores).all():", "if False:"),
    "judge turned around": ("torch.sigmoid(first - second)", "torch.sigmoid(second - first)"),
    "judge without chance": ("uniforms < torch.sigmoid(first - second)", "first > second"),
    "judge at another temperature": ("torch.sigmoid(first - second)", "torch.sigmoid(2 * (first - second))"),
    "judge with unchecked shapes": ("if not first.shape == second.shape == uniforms.shape:", "if False:"),
    "restart once": ("rounds * rewards / beta", "rewards / beta"),
    "restart with beta on the wrong side": ("rounds * rewards / beta", "rounds * rewards * beta"),
    "restart not normalised": ("beta).log_softmax(-1)", "beta)"),
    "restart without the reference": ("(ref_logps + rounds * rewards / beta)", "(rounds * rewards / beta)"),
    "beta may be 0": ("rounds < 1 or not beta > 0", "rounds < 1"),
    "offline": ("refresh: int = field(default=1", "refresh: int = field(default=0"),
    "roles exchanged": (
        "(pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected)",
        "(pairs.rejected, pairs.chosen, pairs.ref_rejected, pairs.ref_chosen)",
    ),
    "no beta": ("beta=settings.beta", "beta=1.0"),
}


def test_no_check_fails_on_the_original():
    assert caught_by(original, CHECKS) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    """Each deliberate mistake makes at least one check fail."""
    assert caught_by(load_mutant(PATH, *MISTAKES[mistake]), CHECKS)


# TRL


def trl_step(logps, ref_logps, rewards, *, beta, loss_type="sigmoid"):
    """TRL's experimental OnlineDPOTrainer.training_step on two given responses to each prompt, the first ones (P, T)
    before the second ones: what generates, scores and steps is a stand-in. -> its loss; the gradient is in logps."""
    from trl.experimental.online_dpo import OnlineDPOTrainer

    rows, model, ref_model = len(rewards), SimpleNamespace(train=lambda: None), object()
    mask, same = torch.ones(rows, logps.shape[1], dtype=torch.long), lambda x: x
    trainer = SimpleNamespace(
        args=SimpleNamespace(
            use_vllm=False,
            missing_eos_penalty=None,
            loss_type=loss_type,
            torch_empty_cache_steps=None,
            optim="adamw_torch",
            n_gpu=1,
            gradient_accumulation_steps=1,
        ),
        ref_model=ref_model,
        eos_token_ids=[0],
        processing_class=SimpleNamespace(batch_decode=lambda ids, **_: [""] * rows),
        reward_funcs=[None],
        accelerator=SimpleNamespace(gather_for_metrics=same, backward=lambda loss, **_: loss.backward()),
        stats=defaultdict(list),
        beta=beta,
        _generate=lambda *_: (mask, mask, mask, mask, None),
        _forward=lambda used, *_: ref_logps if used is ref_model else logps,
        _calculate_rewards_from_functions=lambda **_: rewards.clone(),
    )
    return OnlineDPOTrainer.training_step(trainer, model, {"prompt": ["1+1="] * (rows // 2)})


@pytest.mark.evidence
def test_agrees_with_trl(evidence):
    """Two responses a prompt, the better one chosen: its loss and gradient are DPO's on the pairs of best_and_worst."""
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for beta in (0.1, 1.0):
        logps, ref_logps = (-3 * torch.rand(16, 5, generator=generator) for _ in range(2))
        rewards = torch.randn(16, generator=generator)
        theirs, ours = logps.clone().requires_grad_(), logps.clone().requires_grad_()
        expected = trl_step(theirs, ref_logps, rewards, beta=beta)
        prompts, chosen, rejected = original.best_and_worst(rewards.view(2, 8).T)
        sums, ref_sums = ours.sum(-1).view(2, 8), ref_logps.sum(-1).view(2, 8)
        four = [x[side, prompts] for x in (sums, ref_sums) for side in (chosen, rejected)]
        loss = dpo.dpo_loss(*four, beta=beta)[0].mean()
        loss.backward()
        worst = max(worst, (loss - expected).abs().item(), (ours.grad - theirs.grad).abs().max().item())
    evidence(
        SNIPPET,
        "Largest difference from TRL 1.16.0",
        value=worst,
        bar=1e-6,
        note="Loss and gradient of trl.experimental.online_dpo, 8 prompts of two responses, float32.",
    )


def test_trls_ipo_takes_sums_here():
    """loss_type="ipo" is the paper's, on whole responses; DPOTrainer divides by their lengths first (test_ipo.py)."""
    generator = torch.Generator().manual_seed(0)
    logps, ref_logps = (-3 * torch.rand(16, 5, generator=generator) for _ in range(2))
    rewards = torch.randn(16, generator=generator)
    _, chosen, rejected = original.best_and_worst(rewards.view(2, 8).T)
    for divisor, agrees in ((1, True), (5, False)):
        four = [
            x.sum(-1).view(2, 8)[side, range(8)] / divisor for x in (logps, ref_logps) for side in (chosen, rejected)
        ]
        ours = ipo.ipo_loss(*four, beta=0.3)[0].mean()
        theirs = trl_step(logps.clone().requires_grad_(), ref_logps, rewards, beta=0.3, loss_type="ipo")
        assert torch.isclose(ours, theirs.cpu(), rtol=1e-6) == agrees


def test_trl_trains_on_ties():
    """Equal rewards: TRL calls the first response chosen. As the two are exchangeable that is a coin, and on average it
    pulls their implicit rewards together. Ours makes no pair of them."""
    logps = torch.tensor([[-1.0], [-2.0]], requires_grad=True)  # two responses to one prompt
    ref_logps = torch.tensor([[-1.5], [-1.5]])
    total = torch.zeros(2, 1)
    for order in ([0, 1], [1, 0]):
        leaf = logps.detach()[order].requires_grad_()
        loss = trl_step(leaf, ref_logps[order], torch.ones(2), beta=1.0)
        assert loss > 0
        total += leaf.grad[order]
    assert total[0] > 0 > total[1]  # a descent lowers the first, whose log-ratio is higher
    assert len(original.best_and_worst(torch.ones(1, 2))[0]) == 0


def test_trl_samples_at_another_temperature_than_it_scores():
    """0.9 by default, and the logits are not divided by it. No bias follows: pairs may come from any sampler."""
    import inspect

    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    assert OnlineDPOConfig.__dataclass_fields__["temperature"].default == 0.9
    assert "temperature" not in inspect.getsource(OnlineDPOTrainer._forward)


# Where it leads: the exact world


def four(pairs):
    return (pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected)


def expected_gradient(world, logits, sampler):
    """Of DPO's loss with respect to the logits, the sampler of pairs taken as a constant."""
    leaf = logits.clone().requires_grad_()
    value = exact_pairs.population_loss(world, leaf, lambda p: dpo.dpo_loss(*four(p), beta=world.beta)[0], sampler)
    value.backward()
    return leaf.grad


@pytest.mark.evidence
def test_the_fixed_point_of_online_dpo_is_the_optimum(evidence):
    """With pairs of the current policy the expected step is zero at pi*, and not elsewhere."""
    world = exact.make_world(0, prompts=2)
    best = exact.logits_of(world, exact.optimal_policy(world.ref_logps, world.rewards, world.beta))
    generator = torch.Generator().manual_seed(0)
    at_best = expected_gradient(world, best, exact.response_logps(world, best).exp())
    elsewhere = [world.ref_logits]
    for scale in (0.1, 1.0):
        elsewhere.append(best + scale * torch.randn(best.shape, generator=generator, dtype=torch.float64))
    for logits in elsewhere:
        assert expected_gradient(world, logits, exact.response_logps(world, logits).exp()).abs().max() > 1e-3
    evidence(
        SNIPPET,
        "Largest entry of the expected gradient at π*, pairs of the policy",
        value=at_best.abs().max().item(),
        bar=1e-12,
        note="Exact, the sampler taken as a constant; at π_ref and near π* it is above 0.001.",
    )


def implicit_error(world, logps, weights):
    """Root mean square of the implicit reward's error, weighted by `weights` (X, Y), up to a term of the prompt."""
    best = exact.optimal_policy(world.ref_logps, world.rewards, world.beta)
    error = world.beta * (logps - best)
    error = error - (weights * error).sum(-1, keepdim=True)
    return (weights * error**2).sum(-1).mean().sqrt().item()


@pytest.mark.evidence
def test_the_policys_own_pairs_reach_the_optimum_closer(evidence):
    """The same number of fresh pairs. From the reference, the error of the implicit reward is small where the reference
    has its mass; from the policy, where the optimum has it. From pi* itself it is smallest there, and the policy is the
    worst: what it still says, and pi* does not, is never compared."""
    seeds, steps = (list(range(5)), 2000) if evidence.full else ([0], 300)
    found = {name: defaultdict(list) for name in ("the policy", "the reference", "π*")}
    for seed in seeds:
        world = exact.make_world(seed)
        best = exact.optimal_policy(world.ref_logps, world.rewards, world.beta)
        for name, result in found.items():
            if name == "π*":
                trial = trained_on(world, seed, steps, best.exp())
            else:
                online = name == "the policy"
                trial = trials.exact_preferences(original.algorithm(), world, seed, steps=steps, online=online)
            logps = exact.response_logps(world, trial.logits)
            result["to the optimum"].append(trial.to_optimum)
            result["share"].append(trial.share)
            result["under π*"].append(implicit_error(world, logps, best.exp()))
            result["under π_ref"].append(implicit_error(world, logps, world.ref_logps.exp()))
    own, ref = found["the policy"], found["the reference"]
    assert all(a < b for a, b in zip(own["to the optimum"], ref["to the optimum"], strict=True))
    assert all(a < b for a, b in zip(own["under π*"], ref["under π*"], strict=True))
    assert all(a > b for a, b in zip(own["under π_ref"], ref["under π_ref"], strict=True))
    told = found["π*"]
    assert all(a < b for a, b in zip(told["under π*"], own["under π*"], strict=True))
    assert all(a > b for a, b in zip(told["to the optimum"], ref["to the optimum"], strict=True))
    common = {"seeds": seeds, "note": f"{steps} steps of 8 fresh pairs to each of 4 prompts, Bradley–Terry labels."}
    for name, result in found.items():
        for what, key, unit in (
            ("KL(π‖π*)", "to the optimum", "nats"),
            ("share of the optimal gain", "share", ""),
            ("error of the implicit reward under π*", "under π*", ""),
            ("error of the implicit reward under π_ref", "under π_ref", ""),
        ):
            value = statistics.mean(result[key])
            evidence(SNIPPET, f"Pairs from {name}: {what}", value=value, unit=unit, spread=result[key], **common)


def trained_on(world, seed, steps, sampler):
    """DPO on fresh pairs of any sampler, otherwise as in trials.exact_preferences."""
    generator, rows = torch.Generator().manual_seed(seed), torch.arange(len(world.rewards)).repeat(8)

    def step_losses(step, logits):
        drawn = exact_pairs.sample_labelled(world, 8, generator, sampler=sampler)
        batch = exact_pairs.pair_logps(world, logits, rows, *(x.T.flatten() for x in drawn))
        yield dpo.dpo_loss(*four(batch), beta=world.beta)[0].mean()

    return trials.descend(world, step_losses, steps=steps, lr=0.05, every=steps)


@pytest.mark.evidence
def test_best_against_worst_is_not_a_bradley_terry_label(evidence):
    """The best of a group always beats the worst: such labels are certain, so DPO's margins have no end and beta no
    longer sets the distance. It is the label that does it, not the choice of the pair."""
    seeds, steps = ([0, 1, 2], 1000) if evidence.full else ([0], 300)
    results = {
        "random pairs, judged by chance": [],
        "best against worst": [],
        "best against worst, judged by chance": [],
    }
    for seed in seeds:
        world = exact.make_world(seed)
        for name, result in results.items():
            trial = judged(world, seed, steps, selected="best" in name, chance="chance" in name)
            result.append((trial.to_optimum, trial.from_reference))
    for name, values in results.items():
        for k, what in enumerate(("KL(π‖π*)", "KL(π‖π_ref)")):
            spread = [value[k] for value in values]
            evidence(
                SNIPPET,
                f"Of 8 responses: {name}: {what}",
                value=statistics.mean(spread),
                unit="nats",
                seeds=seeds,
                spread=spread,
                note=f"{steps} steps, 8 responses of the policy to each of 4 prompts: 4 random pairs, or 1.",
            )
    for plain, certain, chance in zip(*results.values(), strict=True):
        assert plain[1] < certain[1] > chance[1]
        assert not evidence.full or plain[0] < certain[0] > 2 * chance[0]


def judged(world, seed, steps, *, selected, chance):
    """Online DPO on 8 responses a prompt: 4 random pairs, or (selected) the best and the worst; the judge is
    `label`, or certain."""
    generator, X = torch.Generator().manual_seed(seed), len(world.rewards)

    def step_losses(step, logits):
        probs = exact.response_logps(world, logits.detach()).exp()
        drawn = torch.multinomial(probs, 8, replacement=True, generator=generator)  # (X, 8)
        if selected:
            rows, best, worst = original.best_and_worst(world.rewards.gather(1, drawn))
            chosen, rejected = drawn[rows, best], drawn[rows, worst]
        else:
            rows = torch.arange(X).repeat(4)
            chosen, rejected = (x.T.flatten() for x in drawn.chunk(2, 1))
        if chance and len(rows):
            uniforms = torch.rand(len(rows), generator=generator, dtype=torch.float64)
            wins = original.label(world.rewards[rows, chosen], world.rewards[rows, rejected], uniforms)
            chosen, rejected = torch.where(wins, chosen, rejected), torch.where(wins, rejected, chosen)
        if len(rows):
            batch = exact_pairs.pair_logps(world, logits, rows, chosen, rejected)
            yield dpo.dpo_loss(*four(batch), beta=world.beta)[0].mean()

    return trials.descend(world, step_losses, steps=steps, lr=0.05, every=steps)


# A reference that moves


def solved(world, sampler):
    """DPO's exact expected loss on pairs of `sampler`, minimised."""

    def objective(logits):
        return exact_pairs.population_loss(world, logits, lambda p: dpo.dpo_loss(*four(p), beta=world.beta)[0], sampler)

    return exact_pairs.minimise(world, objective)


@pytest.mark.evidence
def test_a_reset_reference_divides_beta_by_the_number_of_rounds(evidence):
    """Each round is solved exactly, from pairs of the policy of the round before; a reference that stays gives the same
    policy every round."""
    seeds, worst = list(range(3)) if evidence.full else [0], 0.0
    for seed in seeds:
        world = exact.make_world(seed, prompts=2, vocab=3, length=2)
        reset, kept = world, world.ref_logits
        once = original.restarted_optimum(world.ref_logps, world.rewards, world.beta, 1)
        for rounds in (1, 2, 3):
            logits = solved(reset, reset.ref_logps.exp())
            closed = original.restarted_optimum(world.ref_logps, world.rewards, world.beta, rounds)
            worst = max(worst, exact.kl(exact.response_logps(world, logits), closed).max().item())
            reset = dataclasses.replace(world, ref_logits=logits)
            kept = solved(world, exact.response_logps(world, kept).exp())
            worst = max(worst, exact.kl(exact.response_logps(world, kept), once).max().item())
    evidence(
        SNIPPET,
        "KL from π_ref·exp(k r / β) after k exact rounds, reference reset or kept (k = 1)",
        value=worst,
        bar=1e-5,
        unit="nats",
        seeds=seeds,
        note="The largest of three rounds, worlds of 9 responses, L-BFGS in float64.",
    )


@pytest.mark.evidence
def test_how_far_a_reset_reference_drifts(evidence):
    worlds, seeds = [exact.make_world(seed) for seed in range(5)], list(range(5))
    for rounds in (1, 4):
        drift, reward = [], []
        for world in worlds:
            logps = original.restarted_optimum(world.ref_logps, world.rewards, world.beta, rounds)
            drift.append(exact.kl(logps, world.ref_logps).mean().item())
            reward.append((logps.exp() * world.rewards).sum(-1).mean().item())
        common = {"seeds": seeds, "note": "In closed form, β = 0.5."}
        check = f"Reference reset, {rounds} round{'s' * (rounds > 1)}"
        evidence(
            SNIPPET, f"{check}: KL from the first", value=statistics.mean(drift), unit="nats", spread=drift, **common
        )
        evidence(SNIPPET, f"{check}: E[r]", value=statistics.mean(reward), spread=reward, **common)


# A language model


def test_the_pairs_of_a_step_are_the_policys_of_that_step(tmp_path):
    """refresh=1: asked before each step, with the policy as it is then; the reference stays the policy as it came."""
    tokenizer, asked, references = arithmetic.make_tokenizer(), [], []
    method = original.algorithm()

    def loss(pairs, settings):
        references.append(pairs.ref_chosen.item())
        return method.loss(pairs, settings)

    for refresh, wanted in ((1, [0, 1, 2, 3]), (2, [0, 2])):
        policy = arithmetic.make_model(len(tokenizer), hidden=32, layers=2, seed=0)
        first = next(policy.parameters()).detach().clone()
        asked.clear()

        def fresh(model, step, first=first):
            asked.append((step, (next(model.parameters()) - first).abs().max().item()))
            return [{"prompt": "1+1=", "chosen": "2", "rejected": "3"}]

        settings = method.settings(steps=4, refresh=refresh, lr=1e-3, save_every=100, out=str(tmp_path / str(refresh)))
        loop.train(policy, tokenizer, fresh, dataclasses.replace(method, loss=loss), settings)
        assert [step for step, _ in asked] == wanted
        moved = [distance for _, distance in asked]
        assert moved[0] == 0 and all(a < b for a, b in zip(moved, moved[1:], strict=False))
    assert max(references) - min(references) < 1e-4


@pytest.mark.evidence
def test_iterative_dpo_on_arithmetic(evidence, tmp_path):
    """Four rounds of 480 prompts, 30 steps each: as many sampled responses as online DPO takes in 120 steps."""
    seeds, changes = [0, 1], {"steps": 120, "refresh": 30, "sampled_prompts": 480}
    if not evidence.full:
        seeds, changes = [0], {"steps": 2, "refresh": 1, "sampled_prompts": 32}
    ends = []
    for seed in seeds:
        out = str(tmp_path / str(seed))
        changes |= {"eval_every": changes["steps"], "save_every": 10_000}
        run = trials.arithmetic_preferences(original.algorithm(), seed, out, **changes)
        assert run["accuracy"][0] == pytest.approx(0.452, abs=0.001)
        ends.append(run["accuracy"][-1])
    evidence(
        SNIPPET,
        "Iterative, four rounds on arithmetic: greedy exact match",
        value=statistics.mean(ends),
        seeds=seeds,
        spread=ends,
        note="From 0.452; refresh=30, sampled_prompts=480, otherwise the adapter's defaults.",
    )
