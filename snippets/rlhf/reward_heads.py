"""Several rewards on one frozen trunk, and a gate that weighs them by the prompt: ArmoRM.

Wang et al. 2024 (arXiv:2406.12845). Stage 1: a linear head a rated objective (helpful, correct,
verbose, ...), by ridge regression. Stage 2: a gate, softmax of an MLP on the prompt's last hidden
state, by Bradley-Terry on the weighted sum; the trunk and the heads stay as they are.

    python -m snippets.rlhf.reward_heads
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid


@torch.no_grad()
def trunk_features(trunk, ids: Tensor, attention: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(B, D) twice: the last hidden state of the prompt, for the gate, and of all, for the heads.
    ids, attention (B, L): prompts padded on the left, responses in the last `length` columns."""
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": attention, "position_ids": positions}
    hidden = trunk(**inputs, use_cache=False)[0]  # (B, L, D)
    last = attention.shape[-1] - 1 - attention.long().flip(-1).argmax(-1)  # (B,)
    rows = torch.arange(len(ids), device=ids.device)
    return hidden[:, -length - 1].float(), hidden[rows, last].float()


def fit_objectives(features: Tensor, ratings: Tensor, *, ridge: float = 1.0) -> Tensor:
    """Stage 1: features (N, D), ratings (N, K) -> weights (K, D), so that rewards are features @
    weights.T. Ridge regression without intercept, each objective on the rows that have it: a
    missing rating is NaN, since each data set rates other things. ValueError where shapes disagree,
    ridge is not positive, or an objective has no rating at all."""
    if features.dim() != 2 or ratings.dim() != 2 or len(features) != len(ratings):
        shapes = f"features {tuple(features.shape)} against ratings {tuple(ratings.shape)}"
        raise ValueError(f"shapes disagree: {shapes}; want (N, D) and (N, K)")
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, got {ridge}")
    weights = []
    for k, column in enumerate(ratings.T):
        rated = ~column.isnan()
        if not rated.any():
            raise ValueError(f"objective {k} has no rating")
        x, y = features[rated], column[rated].to(features.dtype)
        gram = x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        weights.append(torch.linalg.solve(gram, x.T @ y))
    return torch.stack(weights)


def spearman(x: Tensor, y: Tensor) -> float:
    """The correlation of the ranks of x and y (N,), equal values sharing their mean rank; 0 where
    one of them is constant."""
    ranks = []
    for values in (x, y):
        _, place, counts = values.unique(sorted=True, return_inverse=True, return_counts=True)
        middle = counts.cumsum(0) - (counts - 1) / 2  # the mean rank of each value
        ranks.append(middle.double()[place] - (len(values) + 1) / 2)
    a, b = ranks
    norm = a.norm() * b.norm()
    return (a @ b / norm).item() if norm > 0 else 0.0


def verbosity_penalties(rewards: Tensor, verbose: int, *, most: float = 10.0) -> Tensor:
    """(K,): the least lam_k >= 0 at which r_k - lam_k * r_verbose no longer ranks with r_verbose.

    rewards (N, K) on a reference set of responses; `verbose`: the column of the verbosity reward,
    whose own penalty is 0. As lam grows, a pair of responses can only change from agreeing with
    verbosity to disagreeing, so Spearman's correlation falls and bisection finds where it passes 0.
    ValueError where verbosity is constant, or `most` is not enough."""
    verbosity = rewards[:, verbose]
    if (verbosity == verbosity[0]).all():
        raise ValueError("the verbosity reward is constant: there is nothing to remove")
    penalties = torch.zeros(rewards.shape[1], dtype=rewards.dtype)
    for k in range(rewards.shape[1]):
        if k == verbose or spearman(rewards[:, k], verbosity) <= 0:
            continue
        low, high = 0.0, most
        if spearman(rewards[:, k] - high * verbosity, verbosity) > 0:
            raise ValueError(f"objective {k} needs a penalty above {most}")
        for _ in range(40):
            middle = (low + high) / 2
            ranks_with = spearman(rewards[:, k] - middle * verbosity, verbosity) > 0
            low, high = (middle, high) if ranks_with else (low, middle)
        penalties[k] = high
    return penalties


class Gate(nn.Module):
    """Prompt features (B, D) -> weights (B, K), not negative, of sum 1. Its scale is what a unit of
    reward is worth in log-odds, which weights that sum to 1 cannot express."""

    def __init__(self, size: int, objectives: int, *, hidden: int = 16):
        super().__init__()
        first, last = nn.Linear(size, hidden), nn.Linear(hidden, objectives)
        self.layers = nn.Sequential(first, nn.ReLU(), last)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, prompts: Tensor) -> Tensor:
        return self.layers(prompts).float().softmax(-1)


def gate_loss(weights: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor, scale=1) -> Tensor:
    """-log sigmoid(scale * sum_k g_k * (r_k,w - r_k,l)): the losses (B,). Weights g and the rewards
    of both responses are (B, K), scale a number or (). ValueError on shapes that disagree."""
    for x in (chosen_rewards, rejected_rewards):
        if x.shape != weights.shape or x.dim() != 2:
            shapes = f"{tuple(x.shape)} against {tuple(weights.shape)}"
            raise ValueError(f"shapes disagree: {shapes}; want (B, K) for all three")
    difference = (weights * (chosen_rewards.float() - rejected_rewards.float())).sum(-1)  # (B,)
    return -logsigmoid(scale * difference)


def train_gate(
    gate: Gate, prompts: Tensor, chosen: Tensor, rejected: Tensor, *, steps=400, lr=3e-3, seed=0
) -> Gate:
    """Stage 2: prompts (N, D), rewards of chosen and rejected responses (N, K), which get no
    gradient; Adam on batches of 256 pairs, the rate falling to 0. The scale learns ten times as
    fast: while it lags behind, the gate makes up for it by weights that are too extreme."""
    layers, scale = gate.layers.parameters(), [gate.log_scale]
    optimizer = torch.optim.Adam([{"params": layers, "lr": lr}, {"params": scale, "lr": 10 * lr}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(prompts), (256,), generator=generator)
        both = chosen[rows].detach(), rejected[rows].detach()
        loss = gate_loss(gate(prompts[rows]), *both, gate.log_scale.exp()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return gate


@dataclass
class Settings:
    pairs: int = field(default=8000, metadata={"help": "labelled pairs, half of them held out"})
    rated: int = field(default=2000, metadata={"help": "rated responses"})
    seed: int = field(default=0, metadata={"help": "of the data and of the gate"})


KINDS = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]])  # true weights by kind


def make_data(settings: Settings) -> dict[str, Tensor]:
    """Responses of 32 features, 3 rewards linear in them, each rated in half of the cases, with
    noise; prompts of 3 kinds, 16 noisy features; Bradley-Terry labels of the weighted sum."""
    generator = torch.Generator().manual_seed(settings.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    heads, centres = normal(3, 32) / math.sqrt(32), 2 * normal(3, 16)
    rated = normal(settings.rated, 32)
    ratings = rated @ heads.T + 0.5 * normal(settings.rated, 3)
    missing = torch.rand(ratings.shape, generator=generator) < 0.5
    kind = torch.randint(3, (settings.pairs,), generator=generator)
    both = normal(2, settings.pairs, 32)
    true = 4 * (KINDS[kind] * (both @ heads.T)).sum(-1)  # (2, N), in log-odds
    wins = torch.rand(settings.pairs, generator=generator) < torch.sigmoid(true[0] - true[1])
    order = torch.stack([1 - wins.long(), wins.long()])  # which of the two was chosen, which not
    rows = torch.arange(settings.pairs)
    return {
        "rated": rated,
        "ratings": ratings.masked_fill(missing, math.nan),
        "heads": heads,
        "kind": kind,
        "prompts": centres[kind] + normal(settings.pairs, 16),
        "chosen": both[order[0], rows],
        "rejected": both[order[1], rows],
        "margin": true[order[0], rows]
        - true[order[1], rows],  # the true one, which may be negative
    }


def main(settings: Settings) -> None:
    """A gate, and one weighting for all prompts, on pairs that neither has seen."""
    torch.set_num_threads(1)
    data = make_data(settings)
    heads = fit_objectives(data["rated"], data["ratings"])
    chosen, rejected = (data[name] @ heads.T for name in ("chosen", "rejected"))
    half = settings.pairs // 2
    print(f"best possible      {(data['margin'][half:] > 0).double().mean():.3f}")
    for name, prompts in (("gate", data["prompts"]), ("one weighting", data["prompts"] * 0)):
        torch.manual_seed(settings.seed)
        gate = train_gate(Gate(16, 3), prompts[:half], chosen[:half], rejected[:half])
        weights = gate(prompts[half:]).detach()
        right = ((weights * (chosen - rejected)[half:]).sum(-1) > 0).double().mean()
        error = (weights - KINDS[data["kind"][half:]]).abs().mean()
        print(f"{name:<18} {right:.3f}   error of a weight {error:.3f}")


if __name__ == "__main__":
    from snippets.worlds import lm

    lm.run(main, Settings)
