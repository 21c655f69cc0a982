"""SFT against explicit loops, TRL's trainer and the demonstrators of the exact world; and its broken copies."""

import copy
import json
import math
import tempfile

import pytest
import torch
from torch.testing import assert_close

from snippets.rlhf import sft as original
from snippets.worlds import arithmetic, exact, lm
from tests.mutation import caught_by, load_mutant
from tests.trainers import QUIET, tiny

PATH = "snippets/rlhf/sft.py"


def numbers(seed=0, rows=6, width=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logps = -3 * torch.rand(rows, width, generator=generator, dtype=torch.float64)
    mask = (torch.rand(rows, width, generator=generator) < 0.6).long()
    mask[0] = 0  # a row without a label
    mask[1] = torch.tensor([1] + [0] * (width - 1))  # and one of a single token
    return logps.to(dtype), mask


# The loss. Each check takes the module, so that broken copies can be put to it.


def check_token_mean_in_loops(sft):
    logps, mask = numbers()
    total, count = 0.0, 0
    for row, keep in zip(logps.tolist(), mask.tolist(), strict=True):
        for value, one in zip(row, keep, strict=True):
            if one:
                total, count = total - value, count + 1
    assert sft.sft_loss(logps, mask).item() == pytest.approx(total / count, rel=1e-12)
    assert sft.sft_loss(logps, mask, normalize="token").item() == pytest.approx(total / count, rel=1e-12)


def check_sequence_mean_in_loops(sft):
    logps, mask = numbers()
    means = []
    for row, keep in zip(logps.tolist(), mask.tolist(), strict=True):
        values = [-value for value, one in zip(row, keep, strict=True) if one]
        means.append(sum(values) / len(values) if values else 0.0)
    assert sft.sft_loss(logps, mask, normalize="sequence").item() == pytest.approx(sum(means) / len(means), rel=1e-12)


def check_gradient_weighs_every_token_alike(sft):
    """-1 / N on each label, 0 elsewhere; by sequence, -1 / (B * length of the row)."""
    logps, mask = numbers()
    logps.requires_grad_()
    (grad,) = torch.autograd.grad(sft.sft_loss(logps, mask), logps)
    assert_close(grad, -mask.double() / mask.sum())
    (grad,) = torch.autograd.grad(sft.sft_loss(logps, mask, normalize="sequence"), logps)
    assert_close(grad, -mask.double() / mask.sum(-1, keepdim=True).clamp(min=1) / len(mask))


def check_what_stands_under_a_0_never_matters(sft):
    logps, mask = numbers(dtype=torch.float32)
    for normalize in ("token", "sequence"):
        clean = sft.sft_loss(logps, mask, normalize=normalize)
        for value in (-math.inf, 1e4, math.nan):
            spoiled = torch.where(mask.bool(), logps, value).requires_grad_()
            loss = sft.sft_loss(spoiled, mask, normalize=normalize)
            assert_close(loss, clean)
            (grad,) = torch.autograd.grad(loss, spoiled)
            assert grad.isfinite().all()


def check_padding_changes_nothing(sft):
    logps, mask = numbers()
    more = torch.full((len(logps), 3), -7.0, dtype=logps.dtype)
    for normalize in ("token", "sequence"):
        expected = sft.sft_loss(logps, mask, normalize=normalize)
        for wide, wide_mask in (
            (torch.cat([logps, more], 1), torch.cat([mask, more.long() * 0], 1)),
            (torch.cat([more, logps], 1), torch.cat([more.long() * 0, mask], 1)),
        ):
            assert_close(sft.sft_loss(wide, wide_mask, normalize=normalize), expected)


def check_parts_add_up_to_the_batch(sft):
    """Gradient accumulation: divided by the tokens of the whole batch. A mean of the parts' means is another number."""
    logps, mask = numbers()
    whole, tokens = sft.sft_loss(logps, mask), int(mask.sum())
    parts = [(logps[i : i + 2], mask[i : i + 2]) for i in (0, 2, 4)]
    assert_close(sum(sft.sft_loss(*part, tokens=tokens) for part in parts), whole)
    mean = sum(sft.sft_loss(*part) for part in parts) / 3
    assert (mean - whole).abs() > 0.01


def check_no_labels_at_all_give_zero(sft):
    for normalize in ("token", "sequence"):
        logps = torch.full((2, 3), -1.0, requires_grad=True)
        loss = sft.sft_loss(logps, torch.zeros(2, 3), normalize=normalize)
        assert loss.item() == 0.0
        assert (torch.autograd.grad(loss, logps)[0] == 0).all()


def check_half_precision_is_computed_in_float32(sft):
    logps, mask = torch.full((4, 1000), -1.01).to(torch.bfloat16), torch.ones(4, 1000)
    loss = sft.sft_loss(logps, mask)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-logps[0, 0].item(), rel=1e-6)
    big = torch.full((1, 2), -1e4, dtype=torch.float16, requires_grad=True)
    sft.sft_loss(big, torch.ones(1, 2)).backward()
    assert_close(big.grad, torch.full((1, 2), -0.5, dtype=torch.float16))
    assert sft.sft_loss(numbers()[0], numbers()[1]).dtype == torch.float64


def check_bad_input_is_named(sft):
    logps, mask = numbers()
    for arguments, options, message in [
        ((logps, mask[:, :3]), {}, r"shapes disagree: \(6, 5\) against \(6, 3\)"),
        ((logps[0], mask[0]), {}, r"shapes disagree: \(5,\) against \(5,\); want \(B, T\)"),
        ((logps[:0], mask[:0]), {}, r"an empty batch: shape \(0, 5\)"),
        ((logps, mask), {"normalize": "row"}, 'normalize must be "token" or "sequence", got \'row\''),
        ((logps, mask), {"tokens": 0}, "tokens must be at least 1"),
        ((logps, mask), {"tokens": 9, "normalize": "sequence"}, 'goes with "token"; got 9'),
    ]:
        with pytest.raises(ValueError, match=message):
            sft.sft_loss(*arguments, **options)


# Packing.

SEQUENCES = [
    ([5, 6, 7], [-100, -100, 7]),
    ([8, 9, 2, 3, 4, 1], [-100, 9, 2, 3, 4, 1]),
    ([4, 1], [4, 1]),  # its first label has nothing before it
    ([2, 3, 1], [-100, 3, 1]),
    ([7, 8, 9, 1], [-100, -100, 9, 1]),
]


def check_rows_hold_each_sequence_once_and_whole(sft):
    for length in (None, 6, 7, 9, 40):
        batch = sft.pack(SEQUENCES, length, pad=0)
        seen = []
        for row in range(len(batch.ids)):
            documents = batch.documents[row].tolist()
            for i in dict.fromkeys(d for d in documents if d >= 0):
                columns = [c for c, d in enumerate(documents) if d == i]
                assert columns == list(range(columns[0], columns[-1] + 1))
                assert batch.ids[row, columns].tolist() == SEQUENCES[i][0]
                assert batch.labels[row, columns].tolist() == [-100, *SEQUENCES[i][1][1:]]
                assert batch.positions[row, columns].tolist() == list(range(len(columns)))
                seen.append(i)
            free = [c for c, d in enumerate(documents) if d < 0]
            assert (batch.labels[row, free] == -100).all() and (batch.ids[row, free] == 0).all()
        assert sorted(seen) == list(range(len(SEQUENCES)))
        width = 6 if length is None else length
        assert batch.ids.shape[1] == width and len(batch.ids) == {None: 5, 6: 3, 7: 3, 9: 2, 40: 1}[length]


def check_a_row_that_is_nearly_full_is_filled_first(sft):
    """Best fit decreasing, as in TRL's "bfd": the long ones first, and 3 goes where 3 are free, not where 4 are."""
    for sizes, expected in (((3, 7, 6), [[0, 1], [2]]), ((3, 4, 6, 7), [[0, 3], [1, 2]]), ((4, 5, 4), [[0, 1], [2]])):
        batch = sft.pack([([1] * size, [1] * size) for size in sizes], 10)
        rows = [sorted(set(row) - {-1}) for row in batch.documents.tolist()]
        assert sorted(rows) == expected


def check_a_mask_lets_a_token_see_its_own_past_alone(sft):
    documents = torch.tensor([[0, 0, 2, 2, 2, -1, -1]])
    mask = sft.block_diagonal_mask(documents)
    assert mask.shape == (1, 1, 7, 7) and mask.dtype == torch.float32
    for i in range(7):
        for j in range(7):
            seen = j <= i and documents[0, i] == documents[0, j]
            assert mask[0, 0, i, j].item() == (0.0 if seen else torch.finfo(torch.float32).min)
    half = sft.block_diagonal_mask(documents, torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


RECORDS = [
    {"prompt": "37+48=", "completion": "85"},
    {"prompt": "7+8=", "completion": "15"},
    {"prompt": "99+9=", "completion": "108"},
    {"prompt": "0+0=", "completion": "0"},
    {"prompt": "1+1=", "completion": "2"},
]


def check_log_probabilities_are_those_of_each_record_alone(sft):
    """Whatever the rows: token by token, from a plain forward pass over one record."""
    model, tokenizer = tiny()
    examples = sft.encode(tokenizer, RECORDS)
    with torch.no_grad():
        for length in (None, 10, 16, 64):
            logps, mask = sft.label_logps(model, sft.pack(examples, length, pad=tokenizer.pad_token_id))
            for i, record in enumerate(RECORDS):
                prompt = tokenizer(record["prompt"])["input_ids"]
                completion = tokenizer(record["completion"])["input_ids"] + [tokenizer.eos_token_id]
                logits = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
                expected = [logits[len(prompt) + t - 1, token].item() for t, token in enumerate(completion)]
                assert_close(logps[i][mask[i].bool()], torch.tensor(expected), rtol=1e-5, atol=1e-5)
                assert mask[i].sum() == len(completion)


def check_positions_restart_for_a_model_that_counts_them(sft):
    """Rotary embeddings see distances alone, so that under the mask nothing else would show. GPT-2 counts from 0."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, initializer_range=0.5, **sizes)).eval()
    with torch.no_grad():
        alone, mask = sft.label_logps(model, sft.pack(SEQUENCES))
        packed, packed_mask = sft.label_logps(model, sft.pack(SEQUENCES, 20))
        for row, (ids, labels) in enumerate(SEQUENCES):
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = [logits[t - 1, token].item() for t, token in enumerate(labels) if t and token != -100]
            assert_close(alone[row][mask[row].bool()], torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(mask, packed_mask)


def check_logits_in_half_precision_are_softmaxed_in_float32(sft):
    model, tokenizer = tiny()
    batch = sft.pack(sft.encode(tokenizer, RECORDS), pad=tokenizer.pad_token_id)
    with torch.no_grad():
        logps, mask = sft.label_logps(model.to(torch.bfloat16), batch)
        assert logps.dtype == torch.float32
        logits = model(batch.ids, attention_mask=(batch.documents >= 0).long()).logits[0].float().log_softmax(-1)
    expected = [logits[t - 1, token].item() for t, token in enumerate(batch.labels[0].tolist()) if token != -100]
    assert_close(logps[0][mask[0].bool()], torch.tensor(expected), rtol=0.02, atol=0.02)
    assert not torch.equal(logps, logps.to(torch.bfloat16).float())


def check_training_follows_its_settings(sft):
    """The first loss of a run is that of its batch, averaged as the settings say."""
    model, tokenizer = tiny()
    with torch.no_grad():
        both = sft.label_logps(model, sft.pack(sft.encode(tokenizer, RECORDS), pad=tokenizer.pad_token_id))
    with tempfile.TemporaryDirectory() as folder:
        for normalize in ("token", "sequence"):
            settings = sft.settings_class()(out=folder, save_every=1000, steps=1, batch=5, lr=1e-9, normalize=normalize)
            history = sft.train(copy.deepcopy(model), tokenizer, RECORDS, settings).history
            assert history[0]["loss"] == pytest.approx(sft.sft_loss(*both, normalize=normalize).item(), rel=1e-5)


def check_encoding_masks_the_prompt_and_ends_with_eos(sft):
    _, tokenizer = tiny()
    for (ids, labels), record in zip(sft.encode(tokenizer, RECORDS), RECORDS, strict=True):
        size = len(record["prompt"])
        assert tokenizer.decode(ids[:size]) == record["prompt"] and labels[:size] == [-100] * size
        assert labels[size:] == ids[size:] and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[size:-1]) == record["completion"]


def check_bad_sequences_are_named(sft):
    with pytest.raises(ValueError, match="a sequence of 6 tokens does not fit a row of 5"):
        sft.pack(SEQUENCES, 5)
    for sequences in ([], [([], [])], [([1, 2], [1])]):
        with pytest.raises(ValueError, match="at least one sequence"):
            sft.pack(sequences)
    _, tokenizer = tiny()
    for record in ({"prompt": "", "completion": "1"}, {"prompt": "1+1=", "completion": ""}):
        with pytest.raises(ValueError, match="a prompt or a completion without a token: .*1"):
            sft.encode(tokenizer, [*RECORDS, record])
    with pytest.raises(ValueError, match="'x' cannot be encoded"):
        sft.encode(tokenizer, [{"prompt": "1+1=", "completion": "x"}])


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_code(check):
    check(original)


MISTAKES = {
    "the sign": ("-logps.to(dtype), 0.0", "logps.to(dtype), 0.0"),
    "a product with the mask": ("torch.where(keep, -logps.to(dtype), 0.0)", "(-logps.to(dtype) * keep)"),
    "a mean over the padded width": ("keep.sum().clamp(min=1) if", "keep.numel() if"),
    "a sum for a row's mean": ("(losses / keep.sum(-1).clamp(min=1)).mean()", "losses.mean()"),
    "a mean of the rows by default": ('normalize: str = "token"', 'normalize: str = "sequence"'),
    "a part by its own tokens": ("if tokens is None else tokens", "if True else tokens"),
    "0 / 0": ("keep.sum().clamp(min=1) if", "keep.sum() if"),
    "half precision": ("if logps.dtype == torch.float64 else torch.float32", "if False else logps.dtype"),
    "shapes unchecked": ("logps.shape != mask.shape or logps.dim() != 2", "False"),
    "labels on the prompt": ("[IGNORE] * len(p) + c", "p + c"),
    "no EOS": ("completion + [tokenizer.eos_token_id]", "completion"),
    "a first label predicted by the document before": ("[IGNORE, *sequences[i][1][1:]]", "sequences[i][1]"),
    "positions that go on": ("labels[i][t], t, i)", "labels[i][t], t + i, i)"),
    "documents that see each other": (").tril()  #", ").logical_or(torch.tensor(True)).tril()  #"),
    "tokens that see ahead": (").tril()  # (R, L, L)", ")  # (R, L, L)"),
    "positions left to the model": ("position_ids=batch.positions,", ""),
    "a softmax in half precision": ("(hidden[:, :-1][keep]).float()", "(hidden[:, :-1][keep])"),
    "normalize left out of the training": (", normalize=settings.normalize)", ")"),
    "labels unshifted": ("labels = batch.labels[:, 1:]", "labels = batch.labels[:, :-1]"),
    "packed first come, first served": ("-sizes[i])", "0)"),
    "the emptiest row first": ("min(fits, key", "max(fits, key"),
    "a sequence that is cut": ("if length is not None and max(sizes) > length", "if False"),
    "padding with labels": ("[(pad, IGNORE, 0, -1)]", "[(pad, pad, 0, -1)]"),
    "empty completions": ("if not prompt or not completion:", "if not prompt:"),
}


def test_no_check_fails_on_the_original():
    assert caught_by(original, CHECKS) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    """Each deliberate mistake makes at least one check fail."""
    assert caught_by(load_mutant(PATH, *MISTAKES[mistake]), CHECKS)


# TRL


def trl_trainer(model, tokenizer, records, folder, **options):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    options = SFTConfig(str(folder), completion_only_loss=True, **options, **QUIET)
    return SFTTrainer(
        model=copy.deepcopy(model), args=options, train_dataset=Dataset.from_list(records), processing_class=tokenizer
    )


@pytest.mark.evidence
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_agrees_with_trl_on_a_real_model(packing, tmp_path, evidence):
    """Tokens, labels, EOS, masks, positions, loss and gradients: TRL's trainer, its collator and its forward pass."""
    model, tokenizer = tiny()
    length = 24 if packing else 64
    trainer = trl_trainer(
        model, tokenizer, RECORDS, tmp_path, packing=packing, max_length=length, shuffle_dataset=False
    )
    assert (len(trainer.train_dataset) < len(RECORDS)) == packing
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
    trainer.model.eval()
    expected = trainer.compute_loss(trainer.model, inputs)
    expected.backward()

    batch = original.pack(original.encode(tokenizer, RECORDS), length if packing else None, pad=tokenizer.pad_token_id)
    loss = original.sft_loss(*original.label_logps(model, batch))
    loss.backward()
    theirs = dict(trainer.model.named_parameters())
    worst = (loss - expected).abs().item()
    for name, parameter in model.named_parameters():
        difference = (parameter.grad - theirs[name].grad).abs() / theirs[name].grad.abs().clamp(min=1.0)
        worst = max(worst, difference.max().item())
    evidence(
        "rlhf/sft",
        f"Largest difference from TRL 1.16.0, {'packed' if packing else 'padded'}",
        value=worst,
        bar=1e-6,
        note="Loss and gradients of a model of 17 thousand parameters through TRL's SFTTrainer.",
    )


def test_trl_divides_accumulated_parts_by_the_tokens_of_the_whole_batch(tmp_path):
    """num_items_in_batch is `tokens` here: the parts' losses add up to the loss of one batch."""
    model, tokenizer = tiny()
    trainer = trl_trainer(model, tokenizer, RECORDS, tmp_path, max_length=64)
    rows = [trainer.train_dataset[i] for i in range(len(RECORDS))]
    whole = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    tokens = sum(len(record["completion"]) + 1 for record in RECORDS)
    examples = original.encode(tokenizer, RECORDS)
    ours = 0.0
    for part, mine in ((rows[:2], examples[:2]), (rows[2:], examples[2:])):
        theirs = trainer.compute_loss(trainer.model, trainer.data_collator(part), num_items_in_batch=tokens)
        loss = original.sft_loss(*original.label_logps(model, original.pack(mine)), tokens=tokens)
        assert_close(loss, theirs, rtol=1e-6, atol=1e-6)
        ours = ours + loss
    assert_close(ours, whole, rtol=1e-6, atol=1e-6)


# What the model must be told about a packed row.


def test_positions_that_restart_are_enough_for_transformers_without_a_mask():
    """Given position_ids and no attention_mask, it finds the documents itself; given a mask of ones, it does not."""
    model, tokenizer = tiny()
    batch = original.pack(original.encode(tokenizer, RECORDS), 16, pad=tokenizer.pad_token_id)
    own, _ = original.label_logps(model, batch)
    keep = batch.labels[:, 1:] != original.IGNORE
    place = batch.documents[:, 1:][keep], batch.positions[:, 1:][keep]

    def logps(**mask):
        with torch.no_grad():
            logits = model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False, **mask).logits
        return logits[:, :-1][keep].log_softmax(-1).gather(-1, batch.labels[:, 1:][keep].unsqueeze(-1)).squeeze(-1)

    assert_close(logps(), own[place], rtol=1e-5, atol=1e-5)
    leaking = logps(attention_mask=torch.ones_like(batch.ids))
    first = batch.documents[:, 1:][keep] == batch.documents[:, :1].expand_as(keep)[keep]  # each row's first document
    assert_close(leaking[first], own[place][first], rtol=1e-5, atol=1e-5)
    assert (leaking - own[place])[~first].abs().min() > 1e-4


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_is_unpacked_whatever_the_attention(attention):
    model, tokenizer = tiny()
    model.set_attn_implementation(attention)
    examples = original.encode(tokenizer, RECORDS)
    alone, mask = original.label_logps(model, original.pack(examples))
    packed, packed_mask = original.label_logps(model, original.pack(examples, 20))
    assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    assert (mask == packed_mask).all()


# Where the loss leads: the exact world.


def cross_entropy(world, logits, demonstrator):
    """E_q[-log pi(y|x)], exact, a mean over prompts: sft_loss with a sequence for each prompt and response."""
    return -(demonstrator.exp() * exact.response_logps(world, logits)).sum(-1).mean()


def minimise(parameters, objective):
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = objective(parameters)
        loss.backward()
        return loss

    optimizer.step(closure)
    return parameters.detach()


def demonstrators(world):
    """Half of the demonstrations by an expert, which is the optimum itself, half by a careless one who likes what is
    bad as much: log q (X, Y)."""
    good = exact.optimal_policy(world.ref_logps, world.rewards, world.beta)
    bad = exact.optimal_policy(world.ref_logps, -world.rewards, world.beta)
    return torch.logaddexp(good, bad) - math.log(2), good


@pytest.mark.evidence
def test_it_reaches_the_demonstrator_and_not_the_optimum(evidence):
    """The loss is H(q) + KL(q || pi), so its minimum is q, the mixture of those who demonstrated. Rewards are nowhere
    in it."""
    seeds = list(range(5)) if evidence.full else [0]
    to_q, to_optimum, rewards, best = [], [], [], []
    for seed in seeds:
        world = exact.make_world(seed)
        q, optimum = demonstrators(world)
        start = world.ref_logits.clone().requires_grad_()
        logits = minimise(start, lambda logits, w=world, q=q: cross_entropy(w, logits, q))
        logps = exact.response_logps(world, logits)
        entropy = -(q.exp() * q).sum(-1).mean()
        assert_close(cross_entropy(world, logits, q) - entropy, exact.kl(q, logps).mean(), rtol=0, atol=1e-9)
        to_q.append(exact.kl(q, logps).mean().item())
        to_optimum.append(exact.distance(world, logits))
        rewards.append((logps.exp() * world.rewards).sum(-1).mean().item())
        best.append((optimum.exp() * world.rewards).sum(-1).mean().item())
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    common = {"seeds": seeds}
    evidence(
        "rlhf/sft",
        "KL(q‖π) to the demonstrators, exact loss",
        value=max(to_q),
        bar=1e-6,
        unit="nats",
        spread=to_q,
        note="The largest of the worlds. L-BFGS in float64.",
        **common,
    )
    name = "KL(π‖π*) after SFT on a mixed demonstrator"
    evidence("rlhf/sft", name, value=mean(to_optimum), bar=0.1, better=">", unit="nats", spread=to_optimum, **common)
    evidence("rlhf/sft", "Reward after SFT on a mixed demonstrator", value=mean(rewards), spread=rewards, **common)
    gap = [high - low for high, low in zip(best, rewards, strict=True)]
    evidence("rlhf/sft", "Reward of the good half alone", value=mean(best), spread=best, **common)
    assert min(gap) > 0.3


def test_sampled_demonstrations_give_the_exact_gradient():
    """sft_loss on responses drawn from q has the gradient of the exact loss on average: z-test over all logits."""
    world = exact.make_world(0)
    q, _ = demonstrators(world)
    logits = world.ref_logits.clone().requires_grad_()
    truth = torch.autograd.grad(cross_entropy(world, logits, q) / world.length, logits)[0]
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(1500):
        rows = torch.multinomial(q.exp(), 4, replacement=True, generator=generator)  # (X, 4)
        logps = exact.token_logps(world, logits)[torch.arange(4).unsqueeze(-1), rows].flatten(0, 1)  # (16, T)
        samples.append(torch.autograd.grad(original.sft_loss(logps, torch.ones_like(logps)), logits)[0])
    samples = torch.stack(samples)
    seen = (samples != 0).sum(0) > 500
    z = ((samples.mean(0) - truth) / (samples.std(0) / len(samples) ** 0.5))[seen]
    assert z.numel() > 50 and z.abs().max() < 4.5
    assert z.square().mean().item() == pytest.approx(1.0, abs=0.4)


@pytest.mark.parametrize("length", [2, 3, 4])
def test_it_covers_what_it_cannot_represent(length):
    """Two demonstrators, each with one response; a policy without memory, one softmax a position. Forward KL gives
    both letters one half everywhere, so 1 - 2^(1 - T) of its responses are ones that nobody demonstrated. The reverse
    KL, at the same loss of expressiveness, keeps to one demonstrator."""
    responses = torch.cartesian_prod(*[torch.arange(2)] * length).view(-1, length)  # (Y, T)
    q = torch.full((len(responses),), 1e-9, dtype=torch.float64)  # a little everywhere, so that log q is finite
    q[0] = q[-1] = 0.5
    q = q / q.sum()
    start = 0.3 * torch.randn(length, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def logps(logits):
        return logits.log_softmax(-1)[torch.arange(length), responses].sum(-1)  # (Y,)

    forward = logps(minimise(start.clone().requires_grad_(), lambda x: -(q * logps(x)).sum())).exp()
    reverse = logps(
        minimise(start.clone().requires_grad_(), lambda x: (logps(x).exp() * (logps(x) - q.log())).sum())
    ).exp()
    assert 1 - forward[0] - forward[-1] == pytest.approx(1 - 2.0 ** (1 - length), abs=1e-6)
    assert max(reverse[0], reverse[-1]) > 0.999


@pytest.mark.evidence
def test_errors_compound_quadratically(evidence):
    """A learner that errs with chance e a step where the expert has been, and never finds back: its expected cost is
    sum_t 1 - (1 - e)^t, which is e * T * (T + 1) / 2 for small e and below T^2 * e, the bound of Ross and Bagnell. A
    learner that finds back at once pays e * T."""

    def cost(e, steps, recovers):
        lost, total = 0.0, 0.0  # the chance to be off the expert's path
        for _ in range(steps):
            lost = e if recovers else lost + (1 - lost) * e
            total += lost
        return total

    e = 1e-3
    for steps in (5, 10, 20, 40):
        assert cost(e, steps, False) == pytest.approx(sum(1 - (1 - e) ** t for t in range(1, steps + 1)), rel=1e-9)
        assert e * steps * (steps + 1) / 2 * 0.97 < cost(e, steps, False) < steps**2 * e
        assert cost(e, steps, True) == pytest.approx(e * steps)
    evidence(
        "rlhf/sft",
        "Cost of 40 steps over that of 20, no way back",
        value=cost(e, 40, False) / cost(e, 20, False),
        bar=3.7,
        better=">=",
        note="One error in 1,000 steps. Quadratic would be 4, linear 2.",
    )


# Learning.


def quick(tmp_path, **options):
    return original.settings_class()(out=str(tmp_path / "run"), save_every=1000, **options)


def test_packing_changes_no_step_of_a_run(tmp_path):
    records = [record | {"completion": record["answer"]} for record in arithmetic.problems(held_out=False)[:40]]
    runs = {}
    for pack in (None, 40):
        model, tokenizer = tiny(hidden=16)
        settings = quick(tmp_path, steps=4, batch=8, lr=1e-2, pack=pack)
        runs[pack] = original.train(model, tokenizer, records, settings).history
    assert_close([x["loss"] for x in runs[40]], [x["loss"] for x in runs[None]], rtol=1e-4, atol=1e-5)
    assert all(x["rows"] == 8 for x in runs[None]) and all(x["rows"] < 4 for x in runs[40])


def test_bad_settings_and_empty_data_are_named(tmp_path):
    model, tokenizer = tiny(hidden=16)
    with pytest.raises(ValueError, match="there are no records"):
        original.train(model, tokenizer, [], quick(tmp_path))
    with pytest.raises(ValueError, match="--batch must be at least 1, got 0"):
        original.train(model, tokenizer, RECORDS, quick(tmp_path, batch=0))


def demonstrations(careless, seed):
    """The sums that are not held out, a share of them answered without the carry."""
    generator = torch.Generator().manual_seed(seed)
    records = arithmetic.problems(held_out=False)
    wrong = torch.rand(len(records), generator=generator) < careless
    return [
        {"prompt": r["prompt"], "completion": arithmetic.without_carry(r["prompt"]) if bad else r["answer"]}
        for r, bad in zip(records, wrong.tolist(), strict=True)
    ]


def with_carry(size):
    """Held-out sums in which right and careless differ."""
    held_out = arithmetic.problems(held_out=True)
    return [r for r in held_out if arithmetic.without_carry(r["prompt"]) != r["answer"]][:size]


@pytest.mark.evidence
def test_shown_right_sums_the_warm_start_adds(evidence, tmp_path):
    torch.set_num_threads(1)
    seeds = list(range(5)) if evidence.full else [0]
    steps, held_out = (200, with_carry(500)) if evidence.full else (20, with_carry(60))
    curves = []
    for seed in seeds:
        policy, tokenizer = arithmetic.warm_start()
        test = lambda model, tokenizer=tokenizer: arithmetic.greedy_accuracy(model, tokenizer, held_out)  # noqa: E731
        curve = [(0, test(policy))]
        settings = quick(tmp_path, steps=steps, seed=seed, eval_every=20)
        history = original.train(policy, tokenizer, demonstrations(0.0, seed), settings, evaluate=test).history
        curves.append(curve + [(x["step"], x["held_out"]) for x in history if "held_out" in x])
    ends = [curve[-1][1] for curve in curves]
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    evidence(
        "rlhf/sft",
        "Arithmetic: exact match on sums with a carry, before",
        value=mean([curve[0][1] for curve in curves]),
        seeds=seeds,
    )
    evidence(
        "rlhf/sft",
        "Arithmetic: exact match on sums with a carry, shown right sums",
        value=mean(ends),
        bar=0.7 if evidence.full else 0.3,
        better=">=",
        seeds=seeds,
        spread=ends,
        note=f"Greedy, held-out sums, {steps} steps of 64 sums.",
        curve={
            "x": [step for step, _ in curves[0]],
            "y": {"right sums": [[value for _, value in curve] for curve in curves]},
            "xlabel": "step",
            "ylabel": "exact match, sums with a carry",
        },
    )


@pytest.mark.evidence
def test_shown_sums_of_two_kinds_the_warm_start_gives_both(evidence, tmp_path):
    """Half of the demonstrations forget the carry. So does about half of its samples: nothing in the loss prefers the
    other half."""
    torch.set_num_threads(1)
    seeds = list(range(5)) if evidence.full else [0]
    steps, held_out = (200, with_carry(500)) if evidence.full else (20, with_carry(60))
    prompts = [r["prompt"] for r in held_out]
    wanted = {"right": [r["answer"] for r in held_out], "careless": [arithmetic.without_carry(p) for p in prompts]}
    shares = {name: [] for name in wanted}
    for seed in seeds:
        policy, tokenizer = arithmetic.warm_start()
        original.train(policy, tokenizer, demonstrations(0.5, seed), quick(tmp_path, steps=steps, seed=seed))
        uniforms = torch.rand(len(prompts), 4, generator=torch.Generator().manual_seed(seed))
        texts = lm.generate(policy, tokenizer, prompts, max_new_tokens=4, uniforms=uniforms).texts
        for name, answers in wanted.items():
            shares[name].append(sum(arithmetic.exact_match(texts, answers)) / len(texts))
    told = {"seeds": seeds, "note": "Sampled at temperature 1; the rest are other mistakes."}
    for name, check, bar, better in (
        ("right", "exact match on sums with a carry, half of them shown wrong", 0.5, "<="),
        ("careless", "carries forgotten, half of them shown wrong", 0.35, ">="),
    ):
        value = sum(shares[name]) / len(seeds)
        evidence("rlhf/sft", f"Arithmetic: {check}", value=value, bar=bar, better=better, spread=shares[name], **told)


def test_the_command_line_takes_a_model_and_a_file(tmp_path, capsys):
    model, tokenizer = tiny(hidden=16)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    paths = {"model": str(tmp_path / "model"), "data": str(tmp_path / "data.jsonl")}
    original.demo(quick(tmp_path, steps=30, batch=5, lr=1e-2, eval_every=10, **paths))
    assert "held_out before" in capsys.readouterr().out
    history = lm.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["history"]
    assert history[-1]["held_out"] < 0.8 < history[0]["loss"]
