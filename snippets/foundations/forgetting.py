"""Forgetting and loss of plasticity in small networks, and what helps against each.

Forgetting: training on B undoes A, because nothing in B's loss holds it (McCloskey and Cohen 1989;
Kirkpatrick et al. 2017, arXiv:1612.00796). Loss of plasticity: after many tasks a network learns a
new one worse than a fresh network would (Lyle et al. 2023, arXiv:2303.01486; Dohare et al. 2024).
The first is about what was learnt, the second about what can still be.

R networks are trained side by side, as one batch of matrices: a run each.

    python -m snippets.foundations.forgetting
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Params = list[Tensor]  # of each layer a weight (R, I, O), then a bias (R, 1, O)


def network(runs: int, sizes: list[int], generator: torch.Generator) -> Params:
    """R multilayer perceptrons, weights normal with variance 2 / I (He et al. 2015), biases 0."""
    if runs < 1 or len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"want runs >= 1 and two sizes or more, all >= 1; got {runs}, {sizes}")
    params = []
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        weight = torch.randn(runs, inputs, outputs, generator=generator) * math.sqrt(2 / inputs)
        params += [weight, torch.zeros(runs, 1, outputs)]
    return params


def forward(params: Params, x: Tensor, *, layer_norm: bool = False) -> tuple[Tensor, list[Tensor]]:
    """x (R, N, D) -> log-probabilities (R, N, K) and the ReLU units' outputs, a (R, N, H) a layer.

    layer_norm: normalise before each ReLU, without scale and shift. ValueError where x does not
    fit the first layer.
    """
    if x.dim() != 3 or x.shape[0] != params[0].shape[0] or x.shape[2] != params[0].shape[1]:
        raise ValueError(f"x {tuple(x.shape)} does not fit weights {tuple(params[0].shape)}")
    units = []
    for weight, bias in zip(params[:-2:2], params[1:-2:2], strict=True):
        x = torch.baddbmm(bias, x, weight)
        x = torch.nn.functional.layer_norm(x, x.shape[-1:]) if layer_norm else x
        units.append(x.relu())
        x = units[-1]
    return torch.baddbmm(params[-1], x, params[-2]).log_softmax(-1), units


def imitation_loss(logps: Tensor, targets: Tensor) -> Tensor:
    """-E_q[log pi] a run: logps and the demonstrators' chances (R, N, K) -> (R,)."""
    return -(targets * logps).sum(-1).mean(-1)


def policy_loss(logps: Tensor, rewards: Tensor) -> Tensor:
    """-E_pi[r] a run, exact: its gradient is the mean of REINFORCE's. (R, N, K) both -> (R,)."""
    return -(logps.exp() * rewards).sum(-1).mean(-1)


def kl_to(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """KL(pi || pi_ref) in nats, a mean over inputs: (R, N, K) both, finite -> (R,)."""
    return (logps.exp() * (logps - ref_logps)).sum(-1).mean(-1)


def l2_to(params: Params, start: Params) -> Tensor:
    """Half the squared distance of the weights from where they started, (R,)."""
    pairs = zip(params, start, strict=True)
    return sum(((p - q) ** 2).sum((1, 2)) for p, q in pairs) / 2


def nearest_solution(ref_logps: Tensor, right: Tensor) -> Tensor:
    """The policy of least KL(pi || pi_ref) among those that are always right: pi_ref, restricted to
    the right answers and normalised. ref_logps, right (.., K) of 0 and 1 -> chances (.., K).

    ValueError on shapes that disagree, or an input without a right answer.
    """
    if ref_logps.shape != right.shape or not right.bool().any(-1).all():
        raise ValueError(
            f"ref_logps {tuple(ref_logps.shape)}, right {tuple(right.shape)}: want one shape and a "
            "right answer everywhere"
        )
    return ref_logps.masked_fill(~right.bool(), -math.inf).softmax(-1)


def dead(units: list[Tensor]) -> list[Tensor]:
    """Which units are 0 on every input, so that no gradient reaches them: (R, H) bool a layer."""
    return [(x == 0).all(1) for x in units]


def revive(params: Params, which: list[Tensor], generator: torch.Generator) -> None:
    """New incoming weights for these units (R, H), outgoing ones 0, in place: the output does not
    change. Continual backpropagation does this to units of low utility (Dohare et al. 2024)."""
    for i, units in enumerate(which):
        weight, bias, after = params[2 * i : 2 * i + 3]
        scale = math.sqrt(2 / weight.shape[1])
        new = torch.randn(weight.shape, generator=generator) * scale
        with torch.no_grad():
            weight.copy_(torch.where(units[:, None], new, weight))
            bias.masked_fill_(units[:, None], 0.0)
            after.masked_fill_(units[:, :, None], 0.0)


def fit(
    params: Params,
    loss: Callable[[], Tensor],
    *,
    steps: int,
    lr: float,
    decay: float = 0.0,
    watch: Callable[[], object] | None = None,
    state: torch.optim.Optimizer | None = None,
) -> tuple[list, torch.optim.Optimizer]:
    """Adam on loss() (R,), summed over runs, which stay independent of each other. In place.

    decay: decoupled weight decay. -> what `watch` returned before each step and at the end, and the
    optimizer, which goes on where it stopped, with its own lr and decay, if given back as `state`.
    """
    for p in params:
        p.requires_grad_()
    optimizer = state or torch.optim.AdamW(params, lr=lr, weight_decay=decay)
    seen = []
    for _ in range(steps):
        seen += [watch()] if watch else []
        optimizer.zero_grad()
        loss().sum().backward()
        optimizer.step()
    return seen + ([watch()] if watch else []), optimizer


def learn_tasks(
    how: str, *, tasks: int, runs: int, seed: int = 0, steps: int = 100, lr: float = 0.01
) -> tuple[Tensor, Tensor]:
    """One task after the other: 100 inputs, the same for all, with new random labels each time.

    how: "plain", "fresh" (a new network for each task), "layer norm", "weight decay" or "revive"
    (dead units, after each task). -> accuracy at the end of each task and share of dead units,
    (tasks, R) both. ValueError on another `how`.
    """
    kinds = ("plain", "fresh", "layer norm", "weight decay", "revive")
    if how not in kinds:
        raise ValueError(f"how must be one of {kinds}, got {how!r}")
    generator, norm = torch.Generator().manual_seed(seed), how == "layer norm"
    x, state = torch.randn(runs, 100, 20, generator=generator), None
    accuracy, lost = [], []
    for task in range(tasks):
        labels = torch.randint(0, 10, (runs, 100), generator=generator)
        if task == 0 or how == "fresh":
            params, state = network(runs, [20, 32, 32, 10], generator), None
        targets = torch.nn.functional.one_hot(labels, 10).float()

        def loss(params=params, targets=targets) -> Tensor:
            return imitation_loss(forward(params, x, layer_norm=norm)[0], targets)

        decay = 0.3 if how == "weight decay" else 0.0
        _, state = fit(params, loss, steps=steps, lr=lr, decay=decay, state=state)
        with torch.no_grad():
            logps, units = forward(params, x, layer_norm=norm)
        accuracy.append((logps.argmax(-1) == labels).float().mean(-1))
        lost.append(torch.cat(dead(units), -1).float().mean(-1))
        if how == "revive":
            revive(params, dead(units), generator)
    return torch.stack(accuracy), torch.stack(lost)


def main() -> None:
    """The demo: a network that learns task after task, beside one that starts afresh each time."""
    torch.set_num_threads(1)
    print("accuracy at the end of task    1      5     10     20   dead units")
    for how in ("fresh", "plain", "revive"):
        accuracy, lost = learn_tasks(how, tasks=20, runs=5)
        row = "  ".join(f"{accuracy[i].mean():.3f}" for i in (0, 4, 9, 19))
        print(f"{how:26s} {row}   {lost[-1].mean():.2f}")


if __name__ == "__main__":
    main()
