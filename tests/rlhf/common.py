"""What the tests of the policy-gradient losses share: ragged batches, TRL's loss and trainers, and the exact world."""

import math
from collections import defaultdict
from types import SimpleNamespace

import torch
from torch.testing import assert_close

from snippets.worlds import arithmetic, exact, lm, trials
from tests.trainers import QUIET

SEEDS = [0, 1, 2, 3, 4]
LENGTHS = [6, 1, 0, 4, 5, 2, 6, 3]  # a row without a token and a row of one token among them


# Batches


def ragged(*rows, left=False, width=6):
    """Rows (8, 6) and their mask, padded to `width`: LENGTHS tokens count, which stand at one end."""
    mask = (torch.arange(6) < torch.tensor(LENGTHS)[:, None]).long()
    rows = [torch.nn.functional.pad(x, (0, width - 6)) for x in (*rows, mask)]
    if left:
        shifts = (width - torch.tensor(LENGTHS)).tolist()
        rows = [torch.stack([row.roll(s) for row, s in zip(x, shifts, strict=True)]) for x in rows]
    return rows


def random_batch(seed, policies, spread, *, dtype=torch.float64, **padding):
    """old_logps, those of as many other policies, advantages (8,), and mask."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = -normal(8, 6).abs()
    others = [old + spread * normal(8, 6) for _ in range(policies)]
    *rows, mask = ragged(old, *others, **padding)
    return *(x.to(dtype) for x in rows), normal(8).to(dtype), mask


def value_and_grad(function, logps, *rest, **options):
    logps = logps.detach().clone().requires_grad_()
    loss = function(logps, *rest, **options)
    loss.backward()
    return loss.detach(), logps.grad


def padding_changes_nothing(function, batch, **options):
    """Of the batch(left=..., width=...) of a file, whose last part is the mask: neither more of it nor its side."""
    mask = batch()[-1].bool()
    loss, grad = value_and_grad(function, *batch(), **options)
    for left, width in ((False, 11), (True, 6), (True, 11)):
        other = batch(left=left, width=width)
        padded, padded_grad = value_and_grad(function, *other, **options)
        assert_close(padded, loss)
        assert_close(padded_grad[other[-1].bool()], grad[mask])


def junk_changes_nothing(function, *inputs, **options):
    """What stands under the zeros of the mask, the last input, never matters; in a number for each row, the row without
    a token."""
    *rows, mask = inputs
    expected = value_and_grad(function, *inputs, **options)
    for junk in (math.nan, math.inf, -math.inf, 1e30, -1e30):
        dirty = [torch.where(mask.bool() if x.dim() == 2 else mask.any(-1), x, junk) for x in rows]
        found = value_and_grad(function, *dirty, mask, **options)
        for mine, other in zip(found, expected, strict=True):
            assert_close(mine, other, rtol=0, atol=0)


def finite_from_bf16_logits(loss):
    """A loss of log-probabilities (2, 3), from logits of +-1e4 in bf16 through the head that the loop uses."""
    logits = 2e4 * torch.rand(6, 50, generator=torch.Generator().manual_seed(0)) - 1e4
    logits = logits.to(torch.bfloat16).requires_grad_()
    value = loss(lm.head_logps(torch.nn.Identity(), logits, torch.arange(6)).view(2, 3))
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(logits.grad).all() and logits.grad.abs().sum() > 0


# TRL 1.16.0


def apart(ours, theirs):
    """The largest difference of several tensors, all finite, relative where theirs is large."""
    worst = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.isfinite(mine).all() and torch.isfinite(other).all()
        worst = max(worst, ((mine - other).abs() / other.abs().max().clamp(min=1)).max().item())
    return worst


def trl_grpo(logps, mask, inputs, *, accumulate=1, correct=False, **settings):
    """GRPOTrainer._compute_loss with a model that gives these log-probabilities; the trainer is a stand-in.

    inputs: advantages, old_per_token_logps and what else it needs beside the mask. accumulate: micro-batches a step;
    correct: use_bias_correction_kl.
    """
    from trl import GRPOTrainer

    defaults = {"importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0}
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logps, torch.zeros_like(logps), None),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        args=SimpleNamespace(use_bias_correction_kl=correct, delta=None, steps_per_generation=accumulate),
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=accumulate,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        **defaults | settings,
    )
    ids = torch.zeros_like(mask)
    given = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask}
    return GRPOTrainer._compute_loss(trainer, None, given | {"num_items_in_batch": mask.sum()} | inputs)


TWO_PASSES = {
    "num_generations": 8,
    "num_iterations": 2,  # the second pass over a batch meets ratios other than 1
    "per_device_train_batch_size": 32,
    "max_completion_length": arithmetic.MAX_NEW_TOKENS,
    "learning_rate": 1e-3,
    "max_steps": 2,
} | QUIET


def watched(trainer):
    """One of TRL's trainers that keeps `rewards` (N,) and the log-probabilities that it took last, `latest`."""

    class Watched(trainer):
        def _calculate_rewards(self, *args):
            rewards = super()._calculate_rewards(*args)
            self.rewards = rewards[:, 0]
            return rewards

        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            out = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            self.latest = out[0]
            return out

    return Watched


def saved_warm_start(folder):
    """The warm start, as TRL wants it to load its reference from a folder, and its tokenizer."""
    model, tokenizer = arithmetic.warm_start()
    model.save_pretrained(folder / "model")
    model.config._name_or_path = str(folder / "model")
    return model, tokenizer


def train_on_arithmetic(trainer, config, model, tokenizer, *, prompts=64, reward=arithmetic.exact_match):
    """-> the trainer, after TRL's own loop on these problems."""
    from datasets import Dataset

    made = trainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward,
        train_dataset=Dataset.from_list(arithmetic.problems(held_out=False)[:prompts]),
        args=config,
    )
    made.train()
    return made


# The exact world


def reaches_the_optimum(evidence, snippet, algorithm, label, *, check="", bar=0.01, note):
    """The worst KL to the optimum over the seeds, with the curves of all of them, is recorded."""
    seeds = SEEDS if evidence.full else SEEDS[:1]
    runs = [trials.exact_rlhf(algorithm, exact.make_world(seed), seed) for seed in seeds]
    nats = [run.to_optimum for run in runs]
    evidence(
        snippet,
        f"Exact world: KL to the optimum{check}",
        value=max(nats),
        bar=bar,
        unit="nats",
        seeds=seeds,
        spread=nats,
        note=note,
        curve={
            "x": [step for step, _ in runs[0].curve],
            "y": {label: [[value for _, value in run.curve] for run in runs]},
            "xlabel": "step",
            "ylabel": "KL to π*, nats",
        },
    )
