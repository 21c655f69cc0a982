"""The deadly triad: function approximation, bootstrapping and off-policy data, whose expected update is a matrix.

Semi-gradient TD moves the weights w by alpha * (b - A w) in expectation. Whether they diverge is
therefore no matter of luck: it stands in the eigenvalues of I - alpha * A. The two examples are those of
Baird 1995 (in the form of Sutton and Barto 2018, figure 11.1) and of Tsitsiklis and Van Roy 1996; the
theorem for on-policy data is that of Tsitsiklis and Van Roy 1997; TDC and GTD2: Sutton et al. 2009.

Shapes: features (S, K), one row a state; transitions (S, S) of the *target* policy, rows that sum to less
than 1 where an episode may end; state_weights (S,), how often each state is updated, from the *behaviour*
policy. Off-policy means that state_weights is not the stationary distribution of transitions.

    python -m snippets.foundations.deadly_triad
"""

import torch
from torch import Tensor


def baird(solid: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Baird's seven states -> features (7, 8), transitions (7, 7), state_weights (7,).

    The action "solid" leads to the last state, "dashed" to one of the other six. The behaviour policy takes
    solid with chance 1/7, and so visits all states equally often; the target policy takes it with chance
    `solid`: 1/7 is on-policy. All rewards are 0, and eight weights can represent every value function.
    Raises ValueError unless 0 <= solid <= 1.
    """
    if not 0 <= solid <= 1:
        raise ValueError(f"solid must lie in [0, 1], got {solid}")
    features = torch.zeros(7, 8, dtype=torch.float64)
    features[:6, :6], features[:6, 7] = 2 * torch.eye(6), 1.0  # v(i) = 2 w_i + w_8
    features[6, 6], features[6, 7] = 1.0, 2.0  # v(7) = w_7 + 2 w_8
    chances = torch.tensor([(1 - solid) / 6] * 6 + [solid], dtype=torch.float64)
    return features, chances.repeat(7, 1), torch.full((7,), 1 / 7, dtype=torch.float64)


def two_states(end: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Tsitsiklis and Van Roy's w -> 2w -> features (2, 1), transitions (2, 2), state_weights (2,).

    The first state leads to the second, the second to itself, and ends the episode with chance `end`; both are
    updated equally often. All rewards are 0, so w = 0 is exact. Raises ValueError unless 0 <= end <= 1.
    """
    if not 0 <= end <= 1:
        raise ValueError(f"end must lie in [0, 1], got {end}")
    features = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    transitions = torch.tensor([[0.0, 1.0], [0.0, 1.0 - end]], dtype=torch.float64)
    return features, transitions, torch.full((2,), 0.5, dtype=torch.float64)


def covariance(features: Tensor, state_weights: Tensor) -> Tensor:
    """M = X^T D X (K, K): what one regression step on fixed targets subtracts. ValueError on shapes that disagree."""
    if features.shape[:1] != state_weights.shape:
        shapes = f"features {tuple(features.shape)}, state_weights {tuple(state_weights.shape)}"
        raise ValueError(f"shapes disagree: {shapes}")
    return features.T @ (state_weights[:, None] * features)


def bootstrap(
    features: Tensor,
    transitions: Tensor,
    state_weights: Tensor,
    *,
    gamma: float,
    n_steps: int | None = 1,
) -> Tensor:
    """N = gamma^n X^T D P^n X (K, K): what the n-step target, which holds w itself, adds.

    n_steps=None is Monte Carlo: no bootstrap, zeros. Raises ValueError on shapes that disagree, gamma outside
    [0, 1], n_steps < 1.
    """
    states = len(features)
    if transitions.shape != (states, states) or state_weights.shape != (states,):
        shapes = (
            f"transitions {tuple(transitions.shape)}, state_weights {tuple(state_weights.shape)}"
        )
        raise ValueError(f"shapes disagree: features {tuple(features.shape)}, {shapes}")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
    if n_steps is None:
        return torch.zeros_like(features.T @ features)
    if n_steps < 1:
        raise ValueError(f"n_steps must be 1 or more, got {n_steps}")
    ahead = torch.linalg.matrix_power(gamma * transitions, n_steps) @ features  # (S, K)
    return features.T @ (state_weights[:, None] * ahead)


def td_matrix(M: Tensor, N: Tensor, *, alpha: float) -> Tensor:
    """Semi-gradient TD without rewards: w <- (I - alpha * (M - N)) w. A = M - N is the key matrix."""
    return torch.eye(len(M), dtype=M.dtype) - alpha * (M - N)


def target_matrix(M: Tensor, N: Tensor, *, alpha: float, period: int) -> Tensor:
    """Semi-gradient TD with a target network that is copied every `period` steps: the matrix of one period.

    Within a period the target weights stand still, w <- (I - alpha * M) w + alpha * N w_target. Period 1 is
    plain TD; a long one solves the regression, w <- M^-1 N w: fitted value iteration. Raises ValueError unless
    period >= 1.
    """
    if period < 1:
        raise ValueError(f"period must be 1 or more, got {period}")
    shrink = torch.eye(len(M), dtype=M.dtype) - alpha * M
    matrix = torch.eye(len(M), dtype=M.dtype)
    for _ in range(period):
        matrix = shrink @ matrix + alpha * N
    return matrix


def gradient_td_matrix(
    M: Tensor, N: Tensor, *, alpha: float, beta: float, method: str = "tdc"
) -> Tensor:
    """TDC or GTD2 (Sutton et al. 2009), expected, without rewards: the matrix (2K, 2K) of (w, u) stacked.

    A second set of weights u regresses the TD error on the features: u <- u + beta * (-A w - M u).
    TDC: w <- w + alpha * (-A w - N^T u), TD with a correction. GTD2: w <- w + alpha * A^T u. Both descend the
    projected Bellman error. Raises ValueError on another method.
    """
    if method not in ("tdc", "gtd2"):
        raise ValueError(f'method must be "tdc" or "gtd2", got {method!r}')
    A = M - N
    upper = torch.cat([-A, -N.T] if method == "tdc" else [torch.zeros_like(A), A.T], dim=1)
    lower = torch.cat([-A, -M], dim=1)
    return torch.eye(2 * len(M), dtype=M.dtype) + torch.cat([alpha * upper, beta * lower])


def growth_rate(matrix: Tensor, features: Tensor) -> float:
    """By what factor a step of w <- matrix w multiplies the values in the long run: above 1 they diverge.

    The largest eigenvalue in absolute value, in the row space of the features: weights outside of it change
    no value and never move (Baird's has eight weights for seven states). matrix (K, K), or (2K, 2K) for
    gradient TD, whose second weights live in the same space.
    """
    _, singular, rows = torch.linalg.svd(features, full_matrices=False)
    basis = rows[singular > 1e-10 * singular.max()].T  # (K, rank)
    if len(matrix) == 2 * len(basis):
        basis = torch.block_diag(basis, basis)
    return torch.linalg.eigvals(basis.T @ matrix @ basis).abs().max().item()


def value_norms(matrix: Tensor, features: Tensor, weights: Tensor, *, steps: int) -> Tensor:
    """The root mean square value over states, before each of `steps` steps and after: (steps + 1,).

    weights (K,) to start from; for gradient TD its second weights start at 0. With rewards of 0 the true
    values are 0, so this is the error.
    """
    w = torch.cat([weights, torch.zeros(len(matrix) - len(weights), dtype=weights.dtype)])
    norms = []
    for _ in range(steps + 1):
        norms.append((features @ w[: len(weights)]).square().mean().sqrt())
        w = matrix @ w
    return torch.stack(norms)


def main() -> None:
    """The demo: Baird's example with all three, with each taken away, and with the cures."""
    gamma, start = 0.99, torch.tensor([1.0, 1, 1, 1, 1, 1, 10, 1], dtype=torch.float64)
    features, transitions, weights = baird()
    table, on_policy = torch.eye(7, dtype=torch.float64), baird(1 / 7)[1]
    M, M_table = covariance(features, weights), covariance(table, weights)
    N = bootstrap(features, transitions, weights, gamma=gamma)
    N_table = bootstrap(table, transitions, weights, gamma=gamma)
    N_on = bootstrap(features, on_policy, weights, gamma=gamma)
    N_20 = bootstrap(features, transitions, weights, gamma=gamma, n_steps=20)
    rows = {
        "all three": td_matrix(M, N, alpha=0.5),
        "a table": td_matrix(M_table, N_table, alpha=0.5),
        "no bootstrap": td_matrix(M, torch.zeros_like(N), alpha=0.5),
        "on-policy": td_matrix(M, N_on, alpha=0.5),
        "20-step targets": td_matrix(M, N_20, alpha=0.5),
        "target network, 10 steps": target_matrix(M, N, alpha=0.5, period=10),
        "TDC": gradient_td_matrix(M, N, alpha=0.1, beta=0.5),
        "GTD2": gradient_td_matrix(M, N, alpha=0.1, beta=0.5, method="gtd2"),
    }
    print(f"{'':26s}{'growth rate':>12s}{'error at first':>16s}{'after 1000':>12s}")
    for name, matrix in rows.items():
        x, w = (table, features @ start) if name == "a table" else (features, start)
        norms = value_norms(matrix, x, w, steps=1000)
        print(f"{name:26s}{growth_rate(matrix, x):12.7f}{norms[0]:16.2f}{norms[-1]:12.2e}")


if __name__ == "__main__":
    main()
