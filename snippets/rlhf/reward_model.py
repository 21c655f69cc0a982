"""Reward model: a language model's trunk and one number, fitted to comparisons by Bradley-Terry.

InstructGPT (Ouyang et al. 2022, arXiv:2203.02155, equation 1); the margin: Llama 2 (Touvron et al.
2023, arXiv:2307.09288, equation 2); centering: Eisenstein et al. 2023 (arXiv:2312.09244).

    python -m snippets.rlhf.reward_model
"""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid


def bradley_terry_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, *, margin=None, centering: float = 0.0
) -> Tensor:
    """-log sigmoid(r_w - r_l - margin) + centering * (r_w + r_l)**2: the losses (B,) of B pairs.

    chosen_scores, rejected_scores (B,). The first term is the negative log-likelihood of the label
    and depends on the difference alone, so a score is known up to a term of its prompt; the second
    settles that term, towards a mean of 0 over each pair (TRL's center_rewards_coefficient).
    margin: (B,) or a number, in units of score: how much better the chosen one was said to be.
    Half precision is computed in float32. ValueError on shapes that disagree or a bad centering."""
    chosen, rejected = _pairs(chosen_scores, rejected_scores)
    if isinstance(margin, Tensor) and margin.shape != chosen.shape:
        raise ValueError(f"shapes disagree: margin {tuple(margin.shape)}, {tuple(chosen.shape)}")
    if not centering >= 0:
        raise ValueError(f"centering must be at least 0, got {centering}")
    losses = -logsigmoid(chosen - rejected - (0.0 if margin is None else margin))  # (B,)
    return losses + centering * (chosen + rejected).square() if centering else losses


def _pairs(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    if chosen.shape != rejected.shape or chosen.dim() != 1 or not chosen.numel():
        shapes = f"{tuple(chosen.shape)} against {tuple(rejected.shape)}"
        raise ValueError(f"shapes disagree or are empty: {shapes}; want (B,) for both")
    dtype = torch.float64 if chosen.dtype == torch.float64 else torch.float32
    return chosen.to(dtype), rejected.to(dtype)


def kwise_loss(scores: Tensor) -> Tensor:
    """InstructGPT's equation 1: scores (P, K), the best response first -> (P,), the mean of
    -log sigmoid(r_i - r_j) over the K * (K - 1) / 2 pairs i < j. ValueError if K < 2."""
    if scores.dim() != 2 or scores.shape[1] < 2:
        raise ValueError(f"want (P, K) with K of at least 2, got {tuple(scores.shape)}")
    better, worse = torch.triu_indices(scores.shape[1], scores.shape[1], offset=1)
    losses = bradley_terry_loss(scores[:, better].flatten(), scores[:, worse].flatten())
    return losses.view(len(scores), -1).mean(-1)


def accuracy(chosen_scores: Tensor, rejected_scores: Tensor) -> float:
    """The share of pairs (B,) whose chosen response scores higher; a tie counts one half."""
    chosen, rejected = _pairs(chosen_scores, rejected_scores)
    return ((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).mean().item()


def calibration_error(chosen_scores: Tensor, rejected_scores: Tensor, *, bins: int = 10) -> float:
    """Expected calibration error over pairs (B,): the model is sure of its favourite by
    sigmoid(|r_w - r_l|) in [0.5, 1]; in each of `bins` equal parts of that range, how far is the
    share of right favourites from the mean confidence? Averaged by the pairs in each part."""
    chosen, rejected = _pairs(chosen_scores.double(), rejected_scores.double())
    confidence = torch.sigmoid((chosen - rejected).abs())
    right = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
    part = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)  # (B,)
    gaps = torch.bincount(part, weights=right - confidence, minlength=bins)  # (bins,)
    return gaps.abs().sum().item() / len(chosen)


class RewardModel(nn.Module):
    """A causal LM's trunk (a copy) and a linear head: its number at the last real token, the EOS,
    is the score. The head starts at 0, so the first loss is log 2."""

    def __init__(self, policy: Any):
        super().__init__()
        self.trunk = copy.deepcopy(policy.base_model)
        self.head = nn.Linear(self.trunk.config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.head.to(policy.device, policy.dtype).weight)

    def forward(self, ids: Tensor, attention: Tensor) -> Tensor:
        """ids, attention (B, L), padded on either side -> scores (B,) in float32."""
        positions = (attention.cumsum(-1) - 1).clamp(min=0)
        inputs = {"input_ids": ids, "attention_mask": attention, "position_ids": positions}
        hidden = self.trunk(**inputs, use_cache=False)[0]  # (B, L, D)
        rows = torch.arange(len(ids), device=ids.device)
        return self.head(hidden[rows, last_token(attention)]).squeeze(-1).float()

    def save_pretrained(self, path: Any) -> None:
        """As transformers' sequence classifier of one label, which TRL takes for a reward."""
        from transformers import AutoModelForSequenceClassification

        config = copy.deepcopy(self.trunk.config)
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config, dtype=self.trunk.dtype)
        model.base_model.load_state_dict(self.trunk.state_dict())
        model.score.load_state_dict(self.head.state_dict())
        model.save_pretrained(path)


def last_token(attention: Tensor) -> Tensor:
    """(B,): the column of each row's last 1 in attention (B, L). Found by the mask, not by ids that
    differ from the pad's: that skips an EOS that is the pad too. ValueError on a row of zeros."""
    if not attention.any(-1).all():
        raise ValueError("a row of the attention mask is all zeros: it has no last token")
    return attention.shape[-1] - 1 - attention.long().flip(-1).argmax(-1)


@torch.no_grad()
def score(model: RewardModel, tokenizer: Any, prompts: Sequence, completions: Sequence) -> Tensor:
    """(B,): the scores of completions (texts), each ended by an EOS as in training."""
    from snippets.preferences.loop import encode_pairs

    texts = zip(prompts, completions, strict=True)
    pairs = [{"prompt": p, "chosen": text, "rejected": text} for p, text in texts]
    batch = encode_pairs(tokenizer, pairs, model.head.weight.device)
    return model(batch.ids[: len(pairs)], batch.attention[: len(pairs)])


def reward_function(model: RewardModel, tokenizer: Any) -> Callable[..., list[float]]:
    """The model as a reward in TRL's format: reward(completions, prompts, **columns)."""
    return lambda completions, prompts, **_: score(model, tokenizer, prompts, completions).tolist()


def evaluate(model: RewardModel, tokenizer: Any, pairs: Sequence[dict]) -> dict[str, float]:
    """Accuracy (as "held_out") and calibration error on pairs."""
    prompts, *both = ([pair[name] for pair in pairs] for name in ("prompt", "chosen", "rejected"))
    two = [score(model, tokenizer, prompts, texts) for texts in both]
    return {"held_out": accuracy(*two), "calibration_error": calibration_error(*two)}


@functools.cache
def settings_class() -> type:
    from snippets.preferences.loop import Settings

    @dataclass
    class RewardSettings(Settings):
        centering: float = field(default=0.0, metadata={"help": "of the sum of a pair's scores"})
        lr: float = 3e-4
        steps: int = 200
        out: str = "runs/reward_model"

    return RewardSettings


def train_reward_model(model: RewardModel, tokenizer, pairs, settings, *, evaluate=None) -> Any:
    """Fit `model` in place to records {"prompt", "chosen", "rejected"}, with a "margin" or none; ->
    the trainer. evaluate(model) -> dict goes into its history. ValueError where there is no pair,
    or one of two equal responses: its label says nothing."""
    from snippets.preferences.loop import collate, tokenize_pairs
    from snippets.worlds import lm

    lm.check_settings(settings, "batch")
    if not pairs or any(pair["chosen"] == pair["rejected"] for pair in pairs):
        raise ValueError("want pairs, and none whose chosen and rejected are equal")
    tokens, trainer = tokenize_pairs(tokenizer, pairs), lm.Trainer(settings, {"model": model})
    for step in range(trainer.step, settings.steps):
        rows = lm.batch_indices(len(pairs), settings.batch, step, settings.seed)
        batch = collate([tokens[i] for i in rows], tokenizer.pad_token_id, model.head.weight.device)
        chosen, rejected = model(batch.ids, batch.attention).chunk(2)
        margin = chosen.new_tensor([pairs[i].get("margin", 0.0) for i in rows])
        losses = bradley_terry_loss(chosen, rejected, margin=margin, centering=settings.centering)
        trainer.update(losses.mean())
        record = {"loss": losses.mean().item(), "accuracy": accuracy(chosen, rejected)}
        if evaluate and (step + 1 == settings.steps or (step + 1) % settings.eval_every == 0):
            record |= evaluate(model)
        trainer.finish_step(record)
    return trainer


def demo(settings: Any) -> None:
    """Right against wrong sums of the arithmetic warm start; or any causal LM and JSONL."""
    from snippets.preferences import loop
    from snippets.worlds import arithmetic, lm

    torch.set_num_threads(settings.threads)
    device, path = lm.pick_device(settings.device), settings.model
    policy, tokenizer = lm.load_model(path, device) if path else arithmetic.warm_start()
    model = RewardModel(policy.to(device))
    if settings.data:
        columns = {"prompt": str, "chosen": str, "rejected": str}
        files = settings.data, settings.eval_data or settings.data
        pairs, held = (lm.read_jsonl(file, columns) for file in files)
    else:
        sums = arithmetic.problems(False)[: settings.sampled_prompts], arithmetic.problems(True)
        rest = arithmetic.exact_match, settings
        pairs, held = (loop.sample_pairs(policy, tokenizer, part, *rest) for part in sums)
    test = functools.partial(evaluate, tokenizer=tokenizer, pairs=held[: settings.eval_size])
    trainer = train_reward_model(model, tokenizer, pairs, settings, evaluate=test)
    lm.report(trainer, ["loss", "held_out", "calibration_error"], "held_out", tokenizer, model)


if __name__ == "__main__":
    from snippets.worlds import lm

    lm.run(demo, settings_class())
