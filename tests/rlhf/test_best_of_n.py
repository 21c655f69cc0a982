"""Best-of-N against enumeration and its bounds, RAFT against SFT and the exact world, and their own broken copies."""

import copy
import functools
import itertools
import math
import time

import pytest
import torch
from torch.testing import assert_close

from snippets.rlhf import best_of_n as original
from snippets.rlhf import loop
from snippets.worlds import arithmetic, exact, lm, trials
from tests.mutation import caught_by, load_mutant

PATH = "snippets/rlhf/best_of_n.py"
NS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]


def table(seed=0, prompts=3, responses=5, ties=False, dtype=torch.float64):
    """ref_logps, rewards (X, Y); with ties, rewards are 0, 1 or 2."""
    generator = torch.Generator().manual_seed(seed)
    logps = (2 * torch.randn(prompts, responses, generator=generator, dtype=torch.float64)).log_softmax(-1)
    rewards = torch.randn(prompts, responses, generator=generator, dtype=torch.float64)
    if ties:
        rewards = torch.randint(3, (prompts, responses), generator=generator).double()
    return logps.to(dtype), rewards.to(dtype)


def law_by_enumeration(probs, rewards, n):
    """One prompt: every sequence of n samples, the first of the best wins."""
    law = [0.0] * len(probs)
    for drawn in itertools.product(range(len(probs)), repeat=n):
        winner = max(drawn, key=lambda y: rewards[y])  # max returns the first
        law[winner] += math.prod(probs[y] for y in drawn)
    return law


# The functions. Each check takes the module, so that broken copies can be put to it.


def check_the_law_is_that_of_all_samples(module):
    for ties in (False, True):
        for n in (1, 2, 3, 5):
            logps, rewards = table(n, ties=ties)
            ours = module.best_of_n_logps(logps, rewards, n).exp()
            for x in range(len(logps)):
                law = law_by_enumeration(logps[x].exp().tolist(), rewards[x].tolist(), n)
                assert ours[x].tolist() == pytest.approx(law, rel=1e-9, abs=1e-14)


def check_it_is_a_distribution_for_every_n(module):
    for ties in (False, True):
        logps, rewards = table(1, 4, 60, ties)
        for n in (*NS, 1000):
            assert_close(module.best_of_n_logps(logps, rewards, n).exp().sum(-1), torch.ones(4, dtype=torch.float64))


def check_only_the_order_of_rewards_matters(module):
    for ties in (False, True):
        logps, rewards = table(2, ties=ties)
        law = module.best_of_n_logps(logps, rewards, 4)
        for other in (rewards + 7, 3 * rewards, rewards.exp(), rewards + torch.tensor([[1.0], [-5.0], [0.0]])):
            assert_close(module.best_of_n_logps(logps, other, 4), law)
        order = torch.tensor([3, 0, 4, 1, 2])
        assert_close(module.best_of_n_logps(logps[:, order], rewards[:, order], 4), law[:, order])


def check_the_best_of_n_of_the_best_of_m_is_the_best_of_nm(module):
    for ties in (False, True):
        logps, rewards = table(3, ties=ties)
        twice = module.best_of_n_logps(module.best_of_n_logps(logps, rewards, 3), rewards, 5)
        assert_close(twice, module.best_of_n_logps(logps, rewards, 15))


def check_equal_rewards_leave_the_reference(module):
    logps, rewards = table()
    for n in (1, 2, 64):
        assert_close(module.best_of_n_logps(logps, torch.zeros_like(rewards), n), logps)
    assert_close(module.best_of_n_logps(logps, rewards, 1), logps)


def check_tied_responses_keep_their_proportions(module):
    logps, rewards = table(4, 1, 6)
    rewards[0, 2] = rewards[0, 5]
    law = module.best_of_n_logps(logps, rewards, 7)
    assert (law[0, 2] - law[0, 5]).item() == pytest.approx((logps[0, 2] - logps[0, 5]).item())


def check_extremes_stay_finite(module):
    """A response of probability e^-10000 is possible and the best: it wins n times as often as it is drawn."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        logits = torch.tensor([[0.0, -1e4, 1.0, -60.0], [1e4, 0.0, -1e4, 2.0]])
        rewards = torch.tensor([[0.0, 1e4, -1e4, 0.0], [-1e4, 1e4, 0.0, 1.0]], dtype=dtype)
        logps = logits.double().log_softmax(-1).to(torch.float64 if dtype == torch.float64 else torch.float32)
        for n in (1, 2, 64, 10**6):
            law = module.best_of_n_logps(logps.to(dtype), rewards, n)
            assert law.isfinite().all() and law.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert law[0, 1].item() == pytest.approx(logps.to(dtype)[0, 1].item() + math.log(n), rel=1e-6)
    logps, rewards = torch.tensor([[-1e-9, -40.0]]).double().log_softmax(-1), torch.tensor([[0.0, 1.0]]).double()
    assert module.best_of_n_logps(logps, rewards, 8)[0, 1].item() == pytest.approx(logps[0, 1].item() + math.log(8))


def check_bad_tables_are_named(module):
    logps, rewards = table(dtype=torch.float32)
    for args, message in [
        ((logps, rewards[:, :4], 2), r"shapes disagree: ref_logps \(3, 5\) against rewards \(3, 4\)"),
        ((logps[0], rewards[0], 2), r"shapes disagree: ref_logps \(5,\)"),
        ((logps, rewards, 0), "n must be at least 1, got 0"),
        ((logps, rewards * math.nan, 2), "must be finite"),
        ((logps - math.inf, rewards, 2), "must be finite"),
        ((logps + 1.0, rewards, 2), "a row must sum to 1, got"),
    ]:
        with pytest.raises(ValueError, match=message):
            module.best_of_n_logps(*args)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        module.kl_bound(0)


def check_the_bound_is_an_upper_bound(module):
    """Beirami et al., theorem 3.1; nearly reached by many responses of little weight, not by a coin."""
    assert module.kl_bound(1) == 0 and module.kl_bound(2) == pytest.approx(math.log(2) - 0.5)
    even = torch.full((1, 400), -math.log(400), dtype=torch.float64)
    for n in (2, 4, 16):
        law = module.best_of_n_logps(even, torch.arange(400.0)[None], n)
        kl = exact.kl(law, even).item()
        assert module.kl_bound(n) - n / 400 < kl < module.kl_bound(n)
    coin = torch.full((1, 2), -math.log(2), dtype=torch.float64)
    for n in (2, 64):  # example 1 of the paper: log 2 - h(2^-n), never above log 2
        kl = exact.kl(module.best_of_n_logps(coin, torch.tensor([[0.0, 1.0]]), n), coin).item()
        low = 2.0**-n
        entropy = -low * math.log(low) - (1 - low) * math.log1p(-low)
        assert kl == pytest.approx(math.log(2) - entropy) and kl < module.kl_bound(n) + 1e-12


def check_the_win_rate_counts_pairs(module):
    for ties in (False, True):
        logps, rewards = table(5, ties=ties)
        law = module.best_of_n_logps(logps, rewards, 4)
        ours = module.win_rate(law, logps, rewards)
        for x in range(3):
            expected = sum(
                law[x, i].exp() * logps[x, j].exp() * (1.0 if rewards[x, i] > rewards[x, j] else 0.5)
                for i in range(5)
                for j in range(5)
                if rewards[x, i] >= rewards[x, j]
            )
            assert ours[x].item() == pytest.approx(expected.item())
        assert_close(module.win_rate(logps, logps, rewards), torch.full((3,), 0.5, dtype=torch.float64))


def check_the_first_of_the_best_wins(module):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(3, (200, 4), generator=generator).float()
    weights, skipped = module.best_of_group(rewards), module.best_of_group(rewards, skip_equal=True)
    for row, ours, without in zip(rewards.tolist(), weights.tolist(), skipped.tolist(), strict=True):
        winner = row.index(max(row))
        assert ours == [float(i == winner) for i in range(4)]
        assert without == ([0.0] * 4 if min(row) == max(row) else ours)
    assert (weights.sum(-1) == 1).all() and (skipped.sum(-1) < 1).any()
    assert module.best_of_group(torch.tensor([[0.3]])).tolist() == [[1.0]]
    assert module.best_of_group(torch.tensor([[0.3]]), skip_equal=True).tolist() == [[0.0]]
    assert module.best_of_group(torch.tensor([[-1e4, 1e4, 0.0]], dtype=torch.bfloat16)).tolist() == [[0.0, 1.0, 0.0]]


def check_bad_groups_are_named(module):
    for rewards in (torch.zeros(3), torch.zeros(0, 4), torch.zeros(2, 0)):
        with pytest.raises(ValueError, match=r"want rewards \(P, G\), got"):
            module.best_of_group(rewards)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="rewards must be finite, got"):
            module.best_of_group(torch.tensor([[0.0, bad]]))


def batch(seed=0, rows=6, tokens=5):
    generator = torch.Generator().manual_seed(seed)
    logps = -3 * torch.rand(rows, tokens, generator=generator)
    mask = (torch.arange(tokens) < torch.tensor([5, 3, 1, 4, 2, 0])[:rows, None]).long()
    return logps, torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0])[:rows], mask


def check_the_loss_is_the_winners_likelihood(module):
    logps, weights, mask = batch()
    total = 0.0
    for b in range(6):
        for t in range(5):
            if mask[b, t]:
                total -= weights[b].item() * logps[b, t].item()
    assert module.raft_loss(logps, weights, mask).item() == pytest.approx(total / 6)
    assert_close(module.raft_loss(logps.double(), 3 * weights, mask).item(), 3 * total / 6, rtol=1e-6, atol=1e-6)
    leaf = logps.clone().requires_grad_()
    module.raft_loss(leaf, weights, mask).backward()
    assert_close(leaf.grad, -weights[:, None] * mask / 6)


def check_what_does_not_count_is_not_seen(module):
    """Pads and losers may hold anything; no gradient flows to the weights; padding on either side changes nothing."""
    logps, weights, mask = batch()
    expected = module.raft_loss(logps, weights, mask)
    hidden = torch.where((mask * weights[:, None]).bool(), logps, math.nan).requires_grad_()
    leaf = weights.clone().requires_grad_()
    loss = module.raft_loss(hidden, leaf, mask)
    loss.backward()
    assert_close(loss.detach(), expected)
    assert hidden.grad.isfinite().all() and leaf.grad is None
    for pad in ((3, 0), (0, 3)):
        padded = [torch.nn.functional.pad(x, pad) for x in (logps, mask)]
        assert_close(module.raft_loss(padded[0], weights, padded[1]), expected)


def check_parts_of_a_batch_add_up(module):
    logps, weights, mask = batch()
    parts = [module.raft_loss(logps[s], weights[s], mask[s]) * 3 for s in (slice(0, 3), slice(3, 6))]
    assert_close(sum(parts) / 6, module.raft_loss(logps, weights, mask))


def check_no_winner_no_loss(module):
    logps, weights, mask = batch()
    leaf = logps.requires_grad_()
    loss = module.raft_loss(leaf, 0 * weights, mask)
    loss.backward()
    assert loss.item() == 0 and (leaf.grad == 0).all()
    assert module.raft_loss(logps, weights, 0 * mask).item() == 0


def check_half_precision_is_summed_in_float32(module):
    logps = torch.full((1, 511), -1.0078125, dtype=torch.bfloat16)
    loss = module.raft_loss(logps, torch.ones(1), torch.ones(1, 511))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(511 * 1.0078125)
    assert module.raft_loss(torch.full((2, 3), -1e4), torch.ones(2), torch.ones(2, 3)).item() == 3e4


def check_bad_batches_are_named(module):
    logps, weights, mask = batch()
    for args, message in [
        ((logps, weights[:5], mask), r"shapes disagree: logps \(6, 5\), weights \(5,\), mask \(6, 5\)"),
        ((logps, weights, mask[:, :4]), r"mask \(6, 4\); want \(B, T\), \(B,\), \(B, T\)"),
        ((logps[0], weights, mask[0]), r"shapes disagree: logps \(5,\)"),
        ((logps[:0], weights[:0], mask[:0]), r"an empty batch: shape \(0, 5\)"),
        ((logps, -weights, mask), "weights must not be negative"),
    ]:
        with pytest.raises(ValueError, match=message):
            module.raft_loss(*args)


def check_kept_samples_follow_the_tilted_reference(module):
    """Proposal times chance of being kept, normalised, is pi_ref * exp(r / beta) / Z, exactly."""
    logps, rewards = table(6)
    for beta in (0.1, 0.5, 3.0):
        chance = module.acceptance(rewards, beta)
        assert ((chance > 0) & (chance <= 1)).all() and (chance.amax(-1) == 1).all()
        kept = logps + chance.log()
        assert_close(kept.log_softmax(-1), exact.optimal_policy(logps, rewards, beta))
        assert_close(module.acceptance(rewards + 5, beta), chance)
        loops = [[math.exp((r - max(row)) / beta) for r in row] for row in rewards.tolist()]
        assert_close(chance, torch.tensor(loops, dtype=torch.float64))
    assert_close(module.acceptance(rewards, 1e-6), module.best_of_group(rewards).double())
    assert_close(module.acceptance(rewards, 1e9), torch.ones_like(rewards))
    assert module.acceptance(torch.tensor([[1e4, -1e4]]), 0.01).tolist() == [[1.0, 0.0]]
    for beta in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"beta must be positive and finite, got {beta}"):
            module.acceptance(rewards, beta)
    for bad in (rewards[0], rewards[:0], rewards * math.nan):
        with pytest.raises(ValueError, match=r"want finite rewards \(P, G\), got"):
            module.acceptance(bad, 1.0)


def check_the_kl_is_that_of_the_levels_of_reward(module):
    """Tied responses count as one: F^N - (F - p)^N against p for each level, whose KL is below the bound. That is what
    the page's proof uses; with tied responses in a row the largest number would not give this law."""
    for seed in range(20):
        logps, rewards = table(seed, 1, 8, ties=True)
        law, probs = module.best_of_n_logps(logps, rewards, 6), logps[0].exp()
        total = 0.0
        for level in rewards[0].unique():
            f, p = probs[rewards[0] <= level].sum().item(), probs[rewards[0] == level].sum().item()
            won = f**6 - (f - p) ** 6
            total += won * math.log(won / p)
        assert exact.kl(law, logps).item() == pytest.approx(total, abs=1e-12)
        assert total <= module.kl_bound(6)


def check_the_adapter_ranks_and_marks(module):
    """Ranked is r - beta * (the sum over tokens of log pi - log pi_ref); the winner gets 1; settings reach it."""
    from types import SimpleNamespace

    algorithm = module.algorithm()
    kl = torch.tensor([[3.0, 1.0], [0.0, 0.0], [0.5, 0.5], [0.0, 0.5]])  # means over tokens would rank otherwise
    mask = torch.tensor([[1, 1], [1, 1], [1, 1], [1, 0]])
    rollout = SimpleNamespace(scores=torch.tensor([1.5, 0.2, 1.0, 1.0]), token_kl=lambda: kl)
    rollout.completions = SimpleNamespace(mask=mask)
    for beta, winners in ((0.0, [1.0, 0.0, 1.0, 0.0]), (0.4, [0.0, 1.0, 0.0, 1.0])):
        settings = algorithm.settings(group=2, beta=beta, skip_equal=False)
        weights, critic = algorithm.advantages(rollout, settings)
        assert weights.tolist() == winners and critic is None
        assert algorithm.advantages(rollout, algorithm.settings(group=2, beta=0.0))[0].tolist() == [1.0, 0.0, 0.0, 0.0]
    logps, rows = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]), torch.tensor([3, 1])
    settings = algorithm.settings(group=2)
    assert algorithm.loss(logps, rollout, rows, torch.tensor([1.0, 0.0]), settings).item() == 0.5  # one token of row 3


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_functions(check):
    check(original)


MISTAKES = {
    "n * log pi as if there were no F": ("+ n * log_f +", "+ log_f +"),
    "ties split by mass alone": ("logps - log_p + n", "logps + n"),
    "worst of n": ("others <= mine, logps", "others >= mine, logps"),
    "strictly below": ("torch.where(others <= mine", "torch.where((others < mine) | (others == mine.amax(1, True))"),
    "difference without the tiny case": ("tiny = share + math.log(n) < -36", "tiny = share < -math.inf"),
    "tiny case without n": ("torch.where(tiny, share + math.log(n), bracket", "torch.where(tiny, share, bracket"),
    "half precision": ("logps = ref_logps.double().log_softmax(-1)", "logps = ref_logps.log_softmax(-1)"),
    "not normalised": ("logps = ref_logps.double().log_softmax(-1)", "logps = ref_logps.double()"),
    "rows unchecked": ("(totals - 1).abs().max() > max", "0 > max"),
    "tables unchecked": ("ref_logps.shape != rewards.shape or ref_logps.dim() != 2", "False"),
    "bound of n - 1": ("return math.log(n) - (n - 1) / n", "return math.log(n) - (n - 1) / (n + 1)"),
    "bound without its second term": ("return math.log(n) - (n - 1) / n", "return math.log(n)"),
    "ties win": ("+ 0.5 * (mine == others)", "+ 1.0 * (mine == others)"),
    "ties lose": ("+ 0.5 * (mine == others)", "+ 0.0 * (mine == others)"),
    "all of a tie win": ("(best & (best.cumsum(-1) == 1))", "best"),
    "the last of a tie wins": ("best.cumsum(-1) == 1", "best.cumsum(-1) == best.sum(-1, keepdim=True)"),
    "equal groups always skipped": ("    if skip_equal:\n", "    if True:\n"),
    "groups with two best skipped": ("best.all(-1", "(best.sum(-1) > 1).unsqueeze(-1).all(-1"),
    "the worst wins": ("rewards.amax(-1, keepdim=True)  # (P", "rewards.amin(-1, keepdim=True)  # (P"),
    "sign of the loss": ("return -(weights", "return (weights"),
    "mean over winners": (".sum(-1)).mean()", ".sum(-1)).sum() / weights.sum()"),
    "mean over tokens": ("torch.where(keep, logps, 0.0).sum(-1)", "torch.where(keep, logps, 0.0).mean(-1)"),
    "mask by product": ("torch.where(keep, logps, 0.0)", "(keep * logps)"),
    "mask forgotten": ("mask.bool() & (weights > 0)", "(mask == mask) & (weights > 0)"),
    "weights forgotten": ("(weights.detach() * torch", "((weights > 0).detach() * torch"),
    "weights learn": ("weights.detach() * torch", "weights * torch"),
    "sum in half precision": ("else logps.float()\n    # Losers", "else logps\n    # Losers"),
    "negative weights pass": ("(weights < 0).any()", "False"),
    "acceptance not below 1": ("(rewards - rewards.amax(-1, keepdim=True)) / beta", "rewards / beta"),
    "acceptance multiplied by beta": ("keepdim=True)) / beta).exp()", "keepdim=True)) * beta).exp()"),
    "beta may be 0": ("if not 0 < beta", "if not 0 <= beta"),
    "ranked by the reward alone": ("rollout.scores - settings.beta * rollout.token_kl().sum(-1)", "rollout.scores"),
    "ranked by reward plus KL": ("rollout.scores - settings.beta", "rollout.scores + settings.beta"),
    "KL a token in the ranking": ("rollout.token_kl().sum(-1)", "rollout.token_kl().mean(-1)"),
    "skip_equal not passed on": ("skip_equal=settings.skip_equal", "skip_equal=True"),
    "masks of other rows": ("rollout.completions.mask[rows]", "rollout.completions.mask[: len(rows)]"),
}


def test_no_check_fails_on_the_original():
    assert caught_by(original, CHECKS) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    """Each deliberate mistake makes at least one check fail."""
    assert caught_by(load_mutant(PATH, *MISTAKES[mistake]), CHECKS)


# TRL


def test_agrees_with_trls_sft_on_the_winners(evidence, tmp_path):
    """Tokens, EOS, masks, gradients: RAFT's loss is TRL's SFT loss on the winners, times their tokens over the rows."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    records, (policy, tokenizer) = arithmetic.problems(held_out=False)[:6], arithmetic.warm_start()
    settings = original.algorithm().settings(prompts=6, group=4)
    batch = loop.rollout(policy, tokenizer, records, arithmetic.exact_match, settings, step=0)
    advantages, _ = original.algorithm().advantages(batch, settings)
    out, rows = batch.completions, torch.arange(24)
    assert 2 <= advantages.sum() <= 6
    logps = lm.token_logps(policy, out.ids, out.attention, out.mask.shape[1])
    loss = original.algorithm().loss(logps, batch, rows, advantages, settings)
    loss.backward()

    winners = [int(i) for i in advantages.nonzero()]
    boundary = out.ids.shape[1] - out.mask.shape[1]
    pairs = [
        {"prompt": tokenizer.decode(out.ids[i, :boundary], skip_special_tokens=True), "completion": out.texts[i]}
        for i in winners
    ]
    options = SFTConfig(
        output_dir=str(tmp_path),
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
    )
    theirs = copy.deepcopy(policy)
    theirs.zero_grad()
    trainer = SFTTrainer(model=theirs, args=options, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
    trainer.model.eval()
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(len(pairs))])
    tokens = int((inputs["labels"] != -100).sum())
    assert tokens == int(out.mask[winners].sum())
    expected = trainer.compute_loss(trainer.model, inputs) * tokens / 24
    expected.backward()
    gradients = dict(trainer.model.named_parameters())
    differences = [(p.grad - gradients[name].grad).abs().max().item() for name, p in policy.named_parameters()]
    evidence(
        "rlhf/best_of_n",
        "Largest difference from TRL 1.16.0's SFT on the winners",
        value=max(abs(loss.item() - expected.item()), *differences),
        bar=1e-6,
        note="Loss and gradients in float32 on a real model, with TRL's tokens, masks and EOS.",
    )


def test_trl_has_no_best_of_n_sampler():
    """Deprecated on 2025-10-15 and removed five days later; at inference it is a loop and an argmax."""
    import trl

    assert not hasattr(trl, "BestOfNSampler")


# The exact law in the exact world


@functools.cache
def exact_curves(seed, scale=1.0):
    """For each n of NS: KL to the reference, reward and win rate, means over prompts; scale sharpens the reference."""
    world = exact.make_world(seed)
    ref = exact.response_logps(world, scale * world.ref_logits)
    laws = [original.best_of_n_logps(ref, world.rewards, n) for n in NS]
    return {
        "kl": [exact.kl(law, ref).mean().item() for law in laws],
        "reward": [(law.exp() * world.rewards).sum(-1).mean().item() for law in laws],
        "win": [original.win_rate(law, ref, world.rewards).mean().item() for law in laws],
    }


SEEDS = list(range(5))


def curve(y, xlabel, ylabel, x=NS):
    return {"x": list(x), "y": y, "xlabel": xlabel, "ylabel": ylabel}


@pytest.mark.evidence
def test_the_kl_lies_below_the_bound(evidence):
    """Exact for N = 1 to 64: 125 responses with a reference of middling weights, and the same sharpened threefold."""
    bound = [original.kl_bound(n) for n in NS]
    runs, sharp = ([exact_curves(seed, scale)["kl"] for seed in SEEDS] for scale in (1.0, 3.0))
    excess = [max(kl - b for kl, b in zip(run, bound, strict=True)) for run in runs + sharp]
    evidence(
        "rlhf/best_of_n",
        "Exact KL of best-of-N minus the bound log N − (N−1)/N, largest of N = 1…64",
        value=max(excess),
        bar=1e-9,
        unit="nats",
        seeds=SEEDS,
        note="Theorem 3.1 of Beirami et al.: never above 0. Two references for each of the worlds.",
        curve=curve({"exact": runs, "sharpened reference": sharp, "bound": [bound]}, "N", "KL(π_N‖π_ref), nats"),
    )
    for name, curves in (("", runs), (", sharpened reference", sharp)):
        ends = [run[-1] for run in curves]
        evidence(
            "rlhf/best_of_n",
            f"Exact KL of best-of-64{name}",
            value=sum(ends) / 5,
            bar=bound[-1],
            better="<",
            unit="nats",
            seeds=SEEDS,
            spread=ends,
            note=f"The bound is {bound[-1]:.3f} nats.",
        )


@pytest.mark.evidence
def test_the_win_rate_lies_below_n_over_n_plus_1(evidence):
    bound = [n / (n + 1) for n in NS]
    runs = [exact_curves(seed)["win"] for seed in SEEDS]
    excess = [max(w - b for w, b in zip(run, bound, strict=True)) for run in runs]
    evidence(
        "rlhf/best_of_n",
        "Exact win rate of best-of-N minus N/(N+1), largest of N = 1…64",
        value=max(excess),
        bar=1e-9,
        seeds=SEEDS,
        spread=excess,
        note="A tie counts half.",
        curve=curve({"exact": runs, "N/(N+1)": [bound]}, "N", "win rate against the reference"),
    )
    fours = [run[NS.index(4)] for run in runs]
    evidence(
        "rlhf/best_of_n",
        "Win rate of best-of-4 against its reference",
        value=sum(fours) / 5,
        bar=0.8,
        better="<=",
        seeds=SEEDS,
        spread=fours,
    )


def tilt_at(ref, scores, kl):
    """log of ref * exp(scores / beta), with the beta whose mean KL to ref is `kl`: the best E[scores] at that KL."""
    low, high = -12.0, 12.0  # log (1 / beta)
    for _ in range(80):
        middle = (low + high) / 2
        if exact.kl(exact.optimal_policy(ref, scores, math.exp(-middle)), ref).mean() < kl:
            low = middle
        else:
            high = middle
    return exact.optimal_policy(ref, scores, math.exp(-high))


@pytest.mark.evidence
def test_best_of_n_lies_near_the_frontier(evidence):
    """Reward, and win rate, against the best that any policy has at the same KL."""
    ours, frontier, shortfalls, wins = [], [], [], []
    for seed in SEEDS:
        world, curves = exact.make_world(seed), exact_curves(seed)
        ref = world.ref_logps
        start = curves["reward"][0]
        best = [curves["reward"][0]]
        for kl, reward in zip(curves["kl"][1:], curves["reward"][1:], strict=True):
            best.append((tilt_at(ref, world.rewards, kl).exp() * world.rewards).sum(-1).mean().item())
            assert best[-1] >= reward
        ours.append(curves["reward"])
        frontier.append(best)
        shortfalls.append(max((b - r) / (b - start) for b, r in zip(best[1:], ours[-1][1:], strict=True)))
        mine, others = world.rewards.unsqueeze(2), world.rewards.unsqueeze(1)
        percentile = ((mine > others).double() + 0.5 * (mine == others)) @ ref.exp().unsqueeze(-1)  # win rate of each y
        for kl, win in zip(curves["kl"][1:], curves["win"][1:], strict=True):
            top = original.win_rate(tilt_at(ref, percentile.squeeze(-1), kl), ref, world.rewards).mean().item()
            assert top >= win
            wins.append(top - win)
    evidence(
        "rlhf/best_of_n",
        "Share of the reachable gain in reward that best-of-N misses at equal KL, largest of N = 2…64",
        value=sum(shortfalls) / 5,
        bar=0.1,
        seeds=SEEDS,
        spread=shortfalls,
        note="The best policy at that KL is π_ref·exp(r/β), with the β that has the same KL.",
        curve=curve(
            {
                "best-of-N": ours,
                "optimum at the same KL": frontier,
                "KL of best-of-N": [exact_curves(seed)["kl"] for seed in SEEDS],
            },
            "N",
            "reward; KL in nats",
        ),
    )
    evidence(
        "rlhf/best_of_n",
        "Win rate that best-of-N misses at equal KL, largest of N = 2…64",
        value=max(wins),
        bar=0.01,
        seeds=SEEDS,
        note="Against the policy with the highest win rate at that KL, π_ref·exp(c·F), F the percentile of the reward.",
    )


@pytest.mark.evidence
def test_distilling_again_and_again_leads_to_the_argmax(evidence):
    """Each round replaces the policy by its best-of-4: k rounds are best-of-4^k, and entropy goes to 0."""
    entropies, kls, objectives = [], [], []
    for seed in SEEDS:
        world = exact.make_world(seed)
        logps, runs = world.ref_logps, [[], [], []]
        for k in range(11):
            if k:
                logps = original.best_of_n_logps(logps, world.rewards, 4)
            assert_close(logps, original.best_of_n_logps(world.ref_logps, world.rewards, 4**k), rtol=1e-6, atol=1e-6)
            kl = exact.kl(logps, world.ref_logps)
            runs[0].append(-(logps.exp() * logps).sum(-1).mean().item())
            runs[1].append(kl.mean().item())
            runs[2].append(((logps.exp() * world.rewards).sum(-1) - world.beta * kl).mean().item())
        top = world.rewards.argmax(-1, keepdim=True)
        assert (logps.gather(1, top).exp() > 0.99).all()
        entropies.append(runs[0])
        kls.append(runs[1])
        objectives.append(runs[2])
    for name, value, bar in (
        ("Entropy of the reference", [run[0] for run in entropies], None),
        ("Entropy after ten rounds of best-of-4", [run[-1] for run in entropies], 0.05),
        ("KL to the reference after ten rounds of best-of-4", [run[-1] for run in kls], None),
    ):
        extra = {}
        if name == "Entropy after ten rounds of best-of-4":
            y = {"entropy": entropies, "KL to the reference": kls, "E[r] − β·KL": objectives}
            extra = {"curve": curve(y, "round", "nats; reward", range(11))}
        evidence("rlhf/best_of_n", name, value=sum(value) / 5, bar=bar, unit="nats", seeds=SEEDS, spread=value, **extra)
    assert all(run[0] < max(run) > run[-1] for run in objectives)  # the regularised objective rises, then falls


@pytest.mark.evidence
def test_how_many_samples_rejection_sampling_keeps(evidence):
    """The expected acceptance of RSO's theorem 1, E[exp((r - max r) / beta)] = Z * exp(-max r / beta)."""
    rates = []
    for seed in SEEDS:
        world = exact.make_world(seed)
        rate = (world.ref_logps.exp() * original.acceptance(world.rewards, world.beta)).sum(-1)
        log_z = (world.ref_logps + world.rewards / world.beta).logsumexp(-1)
        assert_close(rate, (log_z - world.rewards.amax(-1) / world.beta).exp())
        rates.append(rate.mean().item())
    evidence(
        "rlhf/best_of_n",
        "Share of samples that rejection sampling keeps at β = 0.5",
        value=sum(rates) / 5,
        seeds=SEEDS,
        spread=rates,
        note="The kept ones follow π* exactly.",
    )


# RAFT in the exact world


def test_the_mean_gradient_is_that_of_cross_entropy_with_best_of_n():
    """One round: samples from the reference, winners, loss; z-test of the gradient over all parameters, elsewhere."""
    world, group = exact.make_world(0), 4
    generator = torch.Generator().manual_seed(0)
    logits = (world.ref_logits + 0.5 * torch.randn(world.ref_logits.shape, generator=generator)).requires_grad_()
    law = original.best_of_n_logps(world.ref_logps, world.rewards, group)
    truth = -(law.exp() * exact.response_logps(world, logits)).sum(-1).mean() / group
    (truth,) = torch.autograd.grad(truth, logits)
    samples, generator = [], torch.Generator().manual_seed(2)
    for _ in range(2000):
        drawn = exact.sample(world, world.ref_logits, group, generator)
        loss = original.raft_loss(
            drawn.logps(world, logits), original.best_of_group(drawn.rewards).flatten(), drawn.mask
        )
        samples.append(torch.autograd.grad(loss, logits)[0])
    samples = torch.stack(samples)
    seen = (samples != 0).sum(0) > 400  # where the normal law holds
    z = ((samples.mean(0) - truth) / (samples.std(0) / len(samples) ** 0.5))[seen]
    assert z.numel() > 40
    assert z.square().mean().item() == pytest.approx(1.0, abs=0.5) and z.abs().max() < 4.5


def test_a_winner_of_equals_has_no_expected_gradient():
    """With all rewards equal the winner is a plain sample of the policy: the mean of its score function is 0."""
    world = exact.make_world(0)
    logits = world.ref_logits.clone().requires_grad_()
    law = original.best_of_n_logps(world.ref_logps, torch.zeros_like(world.rewards), 8)
    loss = -(law.exp() * exact.response_logps(world, logits)).sum(-1).mean()
    loss.backward()
    assert logits.grad.abs().max() < 1e-12


def test_with_a_verifier_skipping_decides_what_a_round_aims_at():
    """Rewards 0 or 1, right with chance p: every group's winner is right 1 - (1 - p)^G of the time, and those of groups
    that disagree always."""
    generator = torch.Generator().manual_seed(0)
    rewards = (torch.rand(200_000, 4, generator=generator) < 0.3).float()
    kept, skipped = original.best_of_group(rewards), original.best_of_group(rewards, skip_equal=True)
    right = (kept * rewards).sum(-1).mean().item()
    assert right == pytest.approx(1 - 0.7**4, abs=0.005)
    assert (skipped * rewards).sum() == skipped.sum()


@functools.cache
def raft(seed, beta, group, steps):
    world = exact.make_world(seed)
    return trials.exact_rlhf(original.algorithm(), world, seed, beta=beta, group=group, steps=steps)


@pytest.mark.evidence
def test_where_raft_ends_in_the_exact_world(evidence):
    """Ranked by reward alone: the argmax. Ranked by r - beta * log(pi / pi_ref), which is constant at pi*: pi*."""
    seeds, steps = (SEEDS, 2000) if evidence.full else ([0], 500)
    start = time.process_time()
    runs = {
        "ranked by r − β·log(π/π_ref), groups of 16": [raft(seed, 0.5, 16, steps) for seed in seeds],
        "ranked by r − β·log(π/π_ref), groups of 4": [raft(seed, 0.5, 4, steps) for seed in seeds],
        "ranked by r, groups of 16": [raft(seed, 0.0, 16, steps) for seed in seeds],
    }
    seconds = (time.process_time() - start) / (3 * len(seeds))
    curves = {name: [[nats for _, nats in t.curve] for t in ts] for name, ts in runs.items()}
    bars = [0.02, 0.3, None] if evidence.full else [0.1, 0.4, None]
    for (name, ts), bar in zip(runs.items(), bars, strict=True):
        ends = [t.to_optimum for t in ts]
        evidence(
            "rlhf/best_of_n",
            f"RAFT, {name}: KL(π‖π*)",
            value=sum(ends) / len(ends),
            bar=bar,
            unit="nats",
            seeds=seeds,
            spread=ends,
            note=f"2,000 steps from the reference, about {seconds:.0f} CPU seconds a run.",
            curve=curve(curves, "step", "KL(π‖π*), nats", [s for s, _ in ts[0].curve]) if bar == bars[0] else None,
        )
    free, held = runs["ranked by r, groups of 16"], runs["ranked by r − β·log(π/π_ref), groups of 16"]
    for name, values, unit in (
        ("RAFT, ranked by r, groups of 16: KL(π‖π_ref)", [t.from_reference for t in free], "nats"),
        ("RAFT, ranked by r − β·log(π/π_ref), groups of 16: KL(π‖π_ref)", [t.from_reference for t in held], "nats"),
        ("RAFT, ranked by r, groups of 16: share of the optimal objective", [t.share for t in free], ""),
        (
            "RAFT, ranked by r − β·log(π/π_ref), groups of 16: share of the optimal objective",
            [t.share for t in held],
            "",
        ),
    ):
        evidence("rlhf/best_of_n", name, value=sum(values) / len(values), unit=unit, seeds=seeds, spread=values)
    # Ranked by r it ends on one response a prompt. That is not always the best one: a response that no group has held
    # before the policy narrows is never held afterwards.
    tops, missed = [], []
    for seed, trial in zip(seeds, free, strict=True):
        world, law = exact.make_world(seed), exact.response_logps(exact.make_world(seed), trial.logits).exp()
        assert trial.to_optimum > 0.5
        tops.append(law.amax(-1).mean().item())
        missed.append((law.argmax(-1) != world.rewards.argmax(-1)).sum().item())
    evidence(
        "rlhf/best_of_n",
        "RAFT, ranked by r, groups of 16: probability of the likeliest response",
        value=sum(tops) / len(tops),
        bar=0.9 if evidence.full else 0.5,
        better=">=",
        seeds=seeds,
        spread=tops,
    )
    evidence(
        "rlhf/best_of_n",
        "RAFT, ranked by r, groups of 16: prompts of 20 whose likeliest response is not the best",
        value=sum(missed),
        seeds=seeds,
        spread=missed,
    )


# Arithmetic


@pytest.mark.evidence
def test_best_of_n_with_a_verifier_on_arithmetic(evidence):
    """From the warm start, temperature 1: with a perfect judge best-of-N is right whenever a sample is (pass@N)."""
    policy, tokenizer = arithmetic.warm_start()
    seeds, group = (SEEDS, 32) if evidence.full else ([0], 8)
    records = arithmetic.problems(held_out=True)[: 250 if evidence.full else 60]
    prompts, answers = ([record[key] for record in records] for key in ("prompt", "answer"))
    ns, runs = [n for n in (1, 2, 4, 8, 16, 32) if n <= group], []
    for seed in seeds:
        uniforms = torch.rand(len(prompts) * group, 4, generator=torch.Generator().manual_seed(seed))
        texts = lm.generate(policy, tokenizer, prompts, samples=group, max_new_tokens=4, uniforms=uniforms).texts
        repeated = [answer for answer in answers for _ in range(group)]
        rewards = torch.tensor(arithmetic.exact_match(texts, repeated)).view(-1, group)
        # The first n of a group, in every rotation: their best is right if any is.
        run = []
        for n in ns:
            parts = [rewards.roll(-k, dims=1)[:, :n] for k in range(0, group, n)]
            picked = [(original.best_of_group(part) * part).sum(-1).mean().item() for part in parts]
            run.append(sum(picked) / len(picked))
        assert run == sorted(run)
        right = rewards.sum(-1)  # the closed form: 1 - C(G - c, n) / C(G, n)
        for n, share in zip(ns, run, strict=True):
            closed = [1 - math.comb(group - int(c), n) / math.comb(group, n) for c in right]
            assert share == pytest.approx(sum(closed) / len(closed), abs=0.05)
        runs.append(run)
    for n in (1, 8):
        values = [run[ns.index(n)] for run in runs]
        evidence(
            "rlhf/best_of_n",
            f"Arithmetic: held-out exact match of best-of-{n} from the warm start, judged by the verifier",
            value=sum(values) / len(values),
            seeds=seeds,
            spread=values,
            note=f"{len(records)} sums, temperature 1.",
            curve=curve({"best-of-N": runs}, "N", "held-out exact match", ns) if n == 8 else None,
        )
        assert n == 1 or min(values) > 0.7


def test_the_loop_raises_the_winners(tmp_path):
    """On a tiny model: the adapter's pieces fit the loop, and every group of differing scores has one winner."""
    tokenizer = arithmetic.make_tokenizer()
    policy = arithmetic.make_model(len(tokenizer), hidden=32, layers=1, seed=0)
    records = arithmetic.problems(held_out=False)[:32]
    shorter = lambda completions, **_: [-float(len(text)) for text in completions]  # noqa: E731
    algorithm = original.algorithm()
    settings = algorithm.settings(prompts=16, group=4, steps=15, lr=5e-3, beta=0.0, out=str(tmp_path), save_every=100)
    batch = loop.rollout(policy, tokenizer, records, shorter, settings, step=0)
    weights, critic = algorithm.advantages(batch, settings)
    scores = batch.scores.view(-1, 4)
    assert critic is None and (weights.view(-1, 4).sum(-1) == (scores.amax(-1) > scores.amin(-1)).float()).all()
    history = loop.train(policy, tokenizer, records, shorter, algorithm, settings).history
    assert history[-1]["reward"] > history[0]["reward"] + 0.5
