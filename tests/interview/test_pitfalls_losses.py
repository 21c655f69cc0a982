"""Pitfalls of rewards, KL terms and scores: the wrong one fails, the right one holds."""

import pytest
import torch
from torch.testing import assert_close

from snippets.interview import pitfalls_losses as pitfalls
from snippets.rlhf.ppo import gae, ppo_loss
from snippets.worlds import arithmetic, exact, lm
from tests.interview.pairs import check_module, check_pair

CASES = [
    ("measure_exact", "distance to the optimum, rewards or returns", (">=", 0.4), ("<=", 0.05)),
    ("measure_exact", "distance to the optimum, sign of the loss", (">=", 3), ("<=", 0.05)),
    ("measure_exact", "distance to the optimum, what is scaled", (">=", 0.08), ("<=", 0.05)),
    ("measure_exact", "KL from groups of 8, over the KL", ("<=", 0.6), (">=", 0.9)),
    ("measure_warm_start", "mean score function under top-p 0.9, L1 norm", (">=", 0.02), ("<=", 1e-6)),
    ("measure_warm_start", "mean score of answers that were cut off", (">=", 0.4), ("<=", 0)),
    ("measure_tensors", "KL term at 100 tokens, over that at 10", (">=", 9.99), ("<=", 1.001)),
    ("measure_tensors", "share of pairs with equal scores", (">=", 1), ("<=", 0)),
]

REPEATED = {what for function, what, *_ in CASES if function == "measure_exact"} | {
    "mean score of answers that were cut off"
}  # what has chance in it


@pytest.mark.evidence
@pytest.mark.parametrize("case", CASES, ids=[case[1] for case in CASES])
def test_the_wrong_one_fails_and_the_right_one_holds(evidence, case):
    check_pair(evidence, pitfalls, case, chance=case[1] in REPEATED)


def test_every_pair_is_measured_printed_and_named(capsys):
    check_module(pitfalls, CASES, capsys)


def test_the_returns_are_those_of_the_snippet():
    rewards = torch.randn(5, 7, dtype=torch.float64)
    ones = torch.ones_like(rewards)
    assert_close(pitfalls.weights(rewards), gae(rewards, torch.zeros_like(rewards), ones, lam=1.0)[0])
    assert_close(pitfalls.weights(torch.tensor([[1.0, 2.0, 4.0]])), torch.tensor([[7.0, 6.0, 4.0]]))


def test_the_surrogate_is_that_of_ppo():
    logps, old_logps, advantages = torch.randn(3, 4, 6, dtype=torch.float64)
    loss = ppo_loss(logps, old_logps, advantages, torch.ones(4, 6))
    assert_close(pitfalls.surrogate(logps, old_logps, advantages), loss)
    assert_close(pitfalls.surrogate_wrong(logps, old_logps, advantages), -loss)


def test_scaling_all_of_it_keeps_the_order_of_responses():
    scores, kl = torch.tensor([0.0, 6.0, 12.0]), torch.tensor([0.0, 5.0, 13.0])
    assert pitfalls.rewards_scaled(scores, kl, 0.5).argmax() == (scores - 0.5 * kl).argmax() == 2
    assert pitfalls.rewards_wrong(scores, kl, 0.5).argmax() == 0


def test_ten_times_the_scores_and_beta_change_nothing():
    scores, kl = torch.tensor([1.0, 4.0, 7.0]), torch.tensor([2.0, 0.0, 3.0])  # std 3
    right = pitfalls.rewards_scaled(scores, kl, 0.5)
    assert_close(right, torch.tensor([0.0, 4.0, 5.5]) / 3)
    assert_close(pitfalls.rewards_scaled(10 * scores, kl, 5.0), right)
    assert_close(pitfalls.rewards_wrong(scores, kl, 0.5), torch.tensor([-2.0, 4.0, 2.5]) / 3)
    assert pitfalls.rewards_wrong(10 * scores, kl, 5.0)[0] < -9


def test_what_was_cut_off_has_no_probability():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    kept = torch.tensor([[True, True, False, False]])
    right = pitfalls.nucleus_logps(logits, kept).exp()
    assert_close(right, torch.tensor([[0.7310586, 0.2689414, 0, 0]]))
    assert pitfalls.nucleus_logps_wrong(logits, kept).exp().sum() < 0.9
    everything = torch.ones_like(kept)
    assert_close(pitfalls.nucleus_logps_wrong(logits, everything), pitfalls.nucleus_logps(logits, everything))


def test_a_neighbour_changes_the_kl_of_a_group_only_if_it_is_scaled():
    """The KL of a group that moved as one: probabilities of samples scaled to sum to 1 do not see it."""
    ref_logps = torch.log(torch.tensor([[0.1, 0.2, 0.3]]))
    assert_close(pitfalls.group_kl_wrong(ref_logps + 0.5, ref_logps), torch.zeros(1), atol=1e-6, rtol=0)
    expected = torch.tensor([-0.5]).exp() - 1 + 0.5
    assert_close(pitfalls.group_kl(ref_logps + 0.5, ref_logps), expected)


def test_the_expectation_of_the_groups_is_the_kl():
    world = exact.make_world()
    best = exact.optimal_policy(world.ref_logps, world.rewards, world.beta)
    mean = (best.exp() * pitfalls.group_kl(best.unsqueeze(-1), world.ref_logps.unsqueeze(-1))).sum(-1)
    assert_close(mean, exact.kl(best, world.ref_logps))


def test_the_mean_of_a_short_and_a_long_row():
    token_kl, mask = torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    assert pitfalls.kl_term(token_kl, mask) == 2 and pitfalls.kl_term_wrong(token_kl, mask) == 4
    rows = torch.tensor([[1.0, 3.0, 9.0], [2.0, 2.0, 8.0]]), torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    assert pitfalls.kl_term(*rows).tolist() == [2, 4]  # each row by its own length, whatever its neighbour's


def test_the_score_of_a_truncated_sampler_has_mean_zero():
    """Equal rewards and no baseline: the mean gradient is 0, or else what was drawn from less the policy."""
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    kept = torch.arange(6) < torch.tensor([[2], [4], [6]])
    drawn = pitfalls.nucleus_logps(logits, kept).exp().detach()
    means = []
    for score in (pitfalls.nucleus_logps, pitfalls.nucleus_logps_wrong):
        expected = torch.where(kept, drawn * score(logits, kept), 0.0).sum()
        means.append(torch.autograd.grad(expected, logits)[0])
    assert_close(means[0], torch.zeros_like(logits).detach(), atol=1e-12, rtol=0)
    assert_close(means[1], drawn - logits.softmax(-1).detach())


def test_the_minimum_bounds_no_loss():
    """A token with a negative advantage that has become likelier: the wrong sign goes on raising it, however far."""
    for shift in (0.5, 2.0):
        logps = torch.full((1, 1), shift, requires_grad=True)
        pitfalls.surrogate_wrong(logps, torch.zeros(1, 1), torch.tensor([[-1.0]])).backward()
        assert logps.grad < 0  # descent raises logps
        logps.grad = None
        pitfalls.surrogate(logps, torch.zeros(1, 1), torch.tensor([[-1.0]])).backward()
        assert logps.grad > 0


def test_the_end_by_the_mask():
    ids = torch.tensor([[5, 0, 6, 7, 0, 0], [5, 0, 6, 0, 0, 0]])  # 0: EOS of the user, of the answer, and the pad
    attention = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]])
    assert pitfalls.end(ids, attention, 0).tolist() == [4, 3]
    assert pitfalls.end_wrong(ids, attention, 0).tolist() == [0, 0]
    left, left_attention = ids.flip(-1), attention.flip(-1)
    assert pitfalls.end(left, left_attention, 0).tolist() == [5, 5]


def test_a_cut_answer_earns_nothing():
    texts, answers = ["12", "12", "13"], ["12", "12", "12"]
    ended = torch.tensor([True, False, True])
    assert pitfalls.scores_ended(texts, answers, ended).tolist() == [1, 0, 0]
    assert pitfalls.scores_wrong(texts, answers, ended).tolist() == [1, 1, 0]


def test_the_warm_start_is_cut_off_at_three_tokens_and_not_at_four():
    model, tokenizer = arithmetic.warm_start()
    prompts = [record["prompt"] for record in arithmetic.problems(held_out=True)[:64]]
    ended = []
    for length in (3, 4):
        out = lm.generate(model, tokenizer, prompts, max_new_tokens=length, temperature=0.0)
        ended.append((out.ids[:, -out.mask.shape[1] :] == tokenizer.eos_token_id).any(-1).float().mean())
    assert ended[0] < 0.9 and ended[1] == 1
