"""What the tests of the preference losses share: random inputs, what each loss must satisfy, and TRL beside it.

A loss here is a function of tensors (B,) that returns losses (B,) and two rewards; further options are bound to it.
"""

import copy
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from snippets.preferences import loop
from snippets.worlds import exact, exact_pairs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NEGATIVE = (-0.1, math.nan, math.inf)
NOT_POSITIVE = (0.0, -1.0, math.nan, math.inf)
PAIRS = [
    {"prompt": "37+48=", "chosen": "85", "rejected": "175"},
    {"prompt": "7+8=", "chosen": "15", "rejected": "1"},
    {"prompt": "99+9=", "chosen": "108", "rejected": "18"},
    {"prompt": "0+0=", "chosen": "0", "rejected": "100"},
]

MISTAKES_WITHOUT_REFERENCE = {  # which SimPO, CPO and ORPO could all make
    "computed in half precision": (
        "dtype = torch.float64 if chosen_logps.dtype == torch.float64 else torch.float32",
        "dtype = chosen_logps.dtype",
    ),
    "lengths of the rejected unchecked": (
        "min(chosen_lengths.min().item(), rejected_lengths.min().item())",
        "chosen_lengths.min().item()",
    ),
    "empty responses allowed": ("if not shortest >= 1", "if False"),
    "shapes unchecked": ("x.shape != chosen_logps.shape or x.dim() != 1", "False"),
    "adapter without beta": ("beta=settings.beta,", ""),
    "adapter exchanges the lengths": (
        "pairs.chosen_lengths,\n            pairs.rejected_lengths",
        "pairs.rejected_lengths,\n            pairs.chosen_lengths",
    ),
    "adapter exchanges the responses": (
        "pairs.chosen,\n            pairs.rejected,",
        "pairs.rejected,\n            pairs.chosen,",
    ),
    "adapter asks for a reference": ("reference=False", "reference=True"),
}


# Inputs


def random_logps(count, generator, size, scale, dtype):
    rows = [-scale * torch.rand(size, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [x.to(dtype) for x in rows]


def with_reference(seed=0, size=64, scale=10.0, dtype=torch.float64):
    """Log-probabilities: policy chosen, policy rejected, reference chosen, reference rejected."""
    return random_logps(4, torch.Generator().manual_seed(seed), size, scale, dtype)


def with_lengths(seed=0, size=64, scale=10.0, dtype=torch.float64):
    """Log-probabilities of chosen and rejected, sums, and the lengths of both."""
    generator = torch.Generator().manual_seed(seed)
    logps = random_logps(2, generator, size, scale, dtype)
    return [*logps, *(torch.randint(1, 12, (size,), generator=generator) for _ in range(2))]


def edges_of(numbers, rows):
    """Random inputs of three scales, in float32, and behind them the given rows."""
    parts = [numbers(seed, scale=scale, dtype=torch.float32) for seed, scale in enumerate((10.0, 1.0, 300.0))]
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return [torch.cat([x, y.to(x.dtype)]) for x, y in zip(columns, torch.tensor(rows).T, strict=True)]


# What each loss must satisfy


def rows_are_independent(loss, inputs, settings=({},)):
    """A batch gives what its pairs give one by one."""
    for options in settings:
        whole = loss(*inputs, **options)
        rows = [loss(*(x[i : i + 1] for x in inputs), **options) for i in range(len(inputs[0]))]
        for k in range(3):
            assert_close(whole[k], torch.cat([row[k] for row in rows]))


def computed_in_float32(loss, inputs):
    """Numbers in bf16 give what the same numbers give in float32, to the bit; float64 stays float64. Lengths are left
    alone."""

    def cast(dtype):
        return [x.to(torch.bfloat16).to(dtype) if x.is_floating_point() else x for x in inputs]

    assert_close(loss(*cast(torch.bfloat16))[0], loss(*cast(torch.float32))[0], rtol=0, atol=0)
    assert loss(*cast(torch.float64))[0].dtype == torch.float64


def finite_step(loss, values, dtype):
    """Loss and gradients of one pair, from these numbers in this precision: all finite, the loss in float32."""
    leaves = [torch.tensor([x], dtype=dtype, requires_grad=True) for x in values]
    losses = loss(*leaves)[0]
    losses.sum().backward()
    assert losses.dtype == torch.float32 and losses.isfinite().all()
    gradients = [leaf.grad for leaf in leaves]
    assert all(x is None or x.isfinite().all() for x in gradients)
    return losses, gradients


def no_gradient_to_reference_or_rewards(loss, inputs):
    """The reference are the third and the fourth of the inputs."""
    inputs = [x.requires_grad_() for x in inputs]
    losses, *rewards = loss(*inputs)
    losses.sum().backward()
    assert inputs[2].grad is None and inputs[3].grad is None
    assert not any(reward.requires_grad for reward in rewards)


def shapes_are_named(loss, inputs):
    """Of inputs (3,), four or six, if one is of another shape, if all are (3, 1), and if all are empty."""
    count = {4: "four", 6: "six"}[len(inputs)]
    for changed, message in [
        ([inputs[0], inputs[1][:2], *inputs[2:]], r"shapes disagree: \(2,\) against \(3,\)"),
        ([*inputs[:-1], inputs[-1][:, None]], r"shapes disagree: \(3, 1\) against \(3,\)"),
        ([x[:, None] for x in inputs], rf"shapes disagree: \(3, 1\) against \(3, 1\); want \(B,\) for all {count}"),
        ([x[:0] for x in inputs], r"an empty batch: shape \(0,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            loss(*changed)


def lengths_are_checked(loss, four):
    for changed, message in [
        ([*four[:2], 0 * four[2], four[3]], "a response of 0 tokens has no mean: lengths must be at least 1"),
        ([*four[:3], -four[3]], "tokens has no mean: lengths must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            loss(*changed)


def refused(function, inputs, message, values):
    """Each value of the option that the message (a pattern) begins with is named in an error."""
    name = message.split()[0]
    for value in values:
        with pytest.raises(ValueError, match=f"{message}, got {value}"):
            function(*inputs, **{name: value})


def adapter_passes(method, loss, pairs, inputs, **options):
    """By its defaults and with these options set, the adapter gives the loss of the function."""
    for settings in (method.settings(), method.settings(**options)):
        wanted = loss(*inputs, **{name: getattr(settings, name) for name in options})
        assert_close(list(method.loss(pairs, settings)), list(wanted))


# TRL


def apart(ours, theirs):
    """The largest difference, relative where theirs exceeds 1."""
    theirs = torch.as_tensor(theirs)
    return ((ours - theirs).abs() / theirs.abs().clamp(min=1.0)).max().item()


def losses_apart(loss, oracle, four):
    """The largest difference of losses, rewards and gradients of two functions of chosen, rejected and lengths."""
    results = []
    for function in (loss, oracle):
        chosen, rejected = (x.clone().requires_grad_() for x in four[:2])
        losses, *rewards = function(chosen, rejected, *four[2:])
        losses.sum().backward()
        results.append([losses.detach(), *rewards, chosen.grad, rejected.grad])
    return max(apart(ours, theirs) for ours, theirs in zip(*results, strict=True))


def trl_dpo(logps, mask, ref_chosen, ref_rejected, **settings):
    """TRL's own DPOTrainer._compute_loss, and what it logs; the model and the trainer are stand-ins.

    logps (2B, T), the chosen ones first, of the tokens after the first; mask (2B, T + 1) marks the response.
    """
    from trl import DPOTrainer

    zeros = torch.zeros_like(logps)
    out = SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    same = lambda x: x  # noqa: E731
    defaults = {"loss_weights": [1.0], "beta": 0.1, "label_smoothing": 0.0}
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same),
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **defaults | settings,
    )
    inputs = {
        "input_ids": mask,
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **_: out, inputs, False)
    return loss, trainer._metrics["train"]


def real_trainer(trainer, config, policy, tokenizer, records=PAIRS, reference=None):
    """TRL's trainer of a copy of the policy, its dropout off."""
    from datasets import Dataset

    made = trainer(
        model=copy.deepcopy(policy),
        args=config,
        train_dataset=Dataset.from_list(records),
        processing_class=tokenizer,
        **({} if reference is None else {"ref_model": copy.deepcopy(reference)}),
    )
    made.model.eval()
    return made


def real_loss(trainer):
    """Of all its records as one batch."""
    return trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))


def scored(policy, tokenizer, pairs=PAIRS):
    """What a loss without a reference is given of these pairs."""
    batch = loop.encode_pairs(tokenizer, pairs, policy.device)
    return loop.PairLogps(*loop.response_logps(policy, batch), *batch.mask.sum(-1).chunk(2))


# Where a loss leads in the exact world


def population_minimum(world, sampler, losses, steps=1000):
    """log pi (X, Y) where the population loss is least."""

    def objective(logits):
        return exact_pairs.population_loss(world, logits, losses, sampler)

    return exact.response_logps(world, exact_pairs.minimise(world, objective, steps=steps))


def best(world):
    """log pi* (X, Y)."""
    return exact.optimal_policy(world.ref_logps, world.rewards, world.beta)
