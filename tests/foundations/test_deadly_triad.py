"""The deadly triad: the matrices against enumeration and sampled updates, their eigenvalues against runs, theorems."""

import math

import pytest
import torch
from torch.testing import assert_close

from snippets.foundations import deadly_triad as original
from snippets.worlds import mdps
from tests.mutation import caught_by, load_mutant

torch.set_num_threads(1)
PATH = "snippets/foundations/deadly_triad.py"
SEEDS = list(range(10))
GAMMA = 0.99


def start(seed, size=8):
    """Starting weights of one seed."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(triad, example, gamma=GAMMA, n_steps=1):
    features, transitions, weights = example
    return triad.covariance(features, weights), triad.bootstrap(*example, gamma=gamma, n_steps=n_steps)


# The formulas. Each check takes the module, so that broken copies can be put to it.


def check_the_examples(triad):
    features, transitions, weights = triad.baird()
    assert features[:6].tolist() == [[2.0 * (i == j) for j in range(7)] + [1.0] for i in range(6)]
    assert features[6].tolist() == [0.0] * 6 + [1.0, 2.0]
    assert_close(transitions, torch.eye(7).double()[6].expand(7, 7))
    for solid in (0.0, 1 / 7, 0.4):
        assert_close(triad.baird(solid)[1].sum(-1), torch.ones(7).double())
    behaviour = triad.baird(1 / 7)[1]
    assert_close(weights @ behaviour, weights)  # the states are visited as often as the behaviour policy does
    assert weights.sum().item() == pytest.approx(1)
    assert not triad.two_states(1.0)[1][1].any()
    features, transitions, weights = triad.two_states(0.3)
    assert features.tolist() == [[1.0], [2.0]] and weights.tolist() == [0.5, 0.5]
    assert_close(transitions, torch.tensor([[0.0, 1.0], [0.0, 0.7]]).double())


def check_the_matrices_are_the_mean_of_the_updates(triad):
    """One-step and two-step off-policy TD with importance ratios on Baird's example, every course enumerated."""
    features, _, weights = triad.baird()
    dashed, solid = triad.baird(0.0)[1][0], triad.baird(1.0)[1][0]  # where each action leads
    w, alpha = start(0), 0.3
    values = features @ w
    for n_steps in (1, 2):
        mean = torch.zeros(8, dtype=torch.float64)
        for s in range(7):
            # Dashed has the ratio 0 and drops out; the solid action has the ratio 7, n times in a row.
            for actions, chance, ratio in [("s" * n_steps, (1 / 7) ** n_steps, 7.0**n_steps)]:
                after = values @ {"s": solid, "d": dashed}[actions[-1]]
                error = GAMMA**n_steps * after - values[s]
                mean += weights[s] * chance * ratio * error * features[s]
        M, N = parts(triad, triad.baird(), n_steps=n_steps)
        assert_close(triad.td_matrix(M, N, alpha=alpha) @ w, w + alpha * mean)
    M, N = parts(triad, triad.baird(), n_steps=None)
    assert not N.any()
    assert_close(triad.bootstrap(*triad.baird(), gamma=GAMMA), parts(triad, triad.baird())[1])  # one step unless told


def check_against_loops_in_a_random_world(triad):
    features, w, target = start(1, 12).view(4, 3), start(2, 3), start(3, 3)
    mdp = mdps.random_mdp(4, 1, seed=0)
    transitions, weights = mdp.transitions[:, 0], start(4, 4).softmax(-1)
    M, N = parts(triad, (features, transitions, weights), 0.9, 3)
    mean, step = torch.zeros(3, dtype=torch.float64), 0.2
    far = transitions @ transitions @ transitions
    for s in range(4):
        for t in range(4):
            error = 0.9**3 * features[t] @ target - features[s] @ w
            mean += weights[s] * far[s, t] * error * features[s]
    assert_close(w + step * (N @ target - M @ w), w + step * mean)
    # A target network of period 5, step by step.
    moving = target.clone()
    for _ in range(5):
        moving = moving + step * (N @ target - M @ moving)
    assert_close(triad.target_matrix(M, N, alpha=step, period=5) @ target, moving)
    assert_close(triad.target_matrix(M, N, alpha=step, period=1), triad.td_matrix(M, N, alpha=step))
    fitted = torch.linalg.solve(M, N)  # a long period is fitted value iteration
    assert_close(triad.target_matrix(M, N, alpha=step, period=20_000), fitted, atol=1e-6, rtol=0)


def check_gradient_td_in_loops(triad):
    """The updates of Sutton et al. 2009, state by state; and the main weights descend |b - A w|^2 in M^-1."""
    features, w, u = start(1, 12).view(4, 3), start(2, 3), start(3, 3)
    transitions, weights = mdps.random_mdp(4, 1, seed=0).transitions[:, 0], start(4, 4).softmax(-1)
    M, N = parts(triad, (features, transitions, weights), 0.9)
    moves = {"tdc": [0, 0], "gtd2": [0, 0]}
    for s in range(4):
        for t in range(4):
            p = weights[s] * transitions[s, t]
            x, y = features[s], features[t]
            error = 0.9 * y @ w - x @ w
            moves["tdc"][0] += p * (error * x - 0.9 * y * (x @ u))
            moves["gtd2"][0] += p * (x - 0.9 * y) * (x @ u)
            for method in moves:
                moves[method][1] += p * (error - x @ u) * x
    for method, (first, second) in moves.items():
        matrix = triad.gradient_td_matrix(M, N, alpha=0.2, beta=0.3, method=method)
        found = matrix @ torch.cat([w, u])
        assert_close(found, torch.cat([w + 0.2 * first, u + 0.3 * second]))
    plain = triad.gradient_td_matrix(M, N, alpha=0.2, beta=0.3)
    assert torch.equal(plain, triad.gradient_td_matrix(M, N, alpha=0.2, beta=0.3, method="tdc"))
    A = M - N
    leaf = w.clone().requires_grad_()
    (0.5 * (A @ leaf) @ torch.linalg.solve(M, A @ leaf)).backward()
    settled = torch.linalg.solve(M, -A @ w)  # the second weights at rest
    for method in moves:
        step = triad.gradient_td_matrix(M, N, alpha=0.2, beta=0.3, method=method) @ torch.cat([w, settled])
        assert_close(step[:3], w - 0.2 * leaf.grad)


def check_the_growth_rate_is_that_of_a_run(triad):
    """The ratio of the values, late in a run, on three systems; and weights that change no value do not count."""
    example = triad.baird()
    for n_steps, steps in ((1, 300), (12, 3000)):
        M, N = parts(triad, example, n_steps=n_steps)
        matrix = triad.td_matrix(M, N, alpha=0.5)
        norms = triad.value_norms(matrix, example[0], start(5), steps=steps)
        assert len(norms) == steps + 1
        for k, w in enumerate((start(5), matrix @ start(5))):
            assert norms[k].item() == pytest.approx((example[0] @ w).square().mean().sqrt().item())
        late = (norms[-1] / norms[steps // 3]).item() ** (1 / (steps - steps // 3))  # n = 12 swings as it grows
        assert late == pytest.approx(triad.growth_rate(matrix, example[0]), rel=1e-3)
    M, N = parts(triad, example, n_steps=None)  # all values shrink, the eighth direction stays: not 1
    assert triad.growth_rate(triad.td_matrix(M, N, alpha=0.5), example[0]) < 0.9
    M, N = parts(triad, triad.two_states())
    assert triad.growth_rate(triad.td_matrix(M, N, alpha=0.1), triad.two_states()[0]) == pytest.approx(
        1 + 0.1 * (6 * GAMMA - 5) / 2
    )
    matrix = triad.gradient_td_matrix(M, N, alpha=0.1, beta=0.5)  # its second weights start at 0, and count
    norms = triad.value_norms(matrix, triad.two_states()[0], start(0, 1), steps=4000)
    assert (norms[1] / norms[0]).item() == pytest.approx(1 + 0.1 * (6 * GAMMA - 5) / 2)
    assert (norms[-1] / norms[-2]).item() == pytest.approx(triad.growth_rate(matrix, triad.two_states()[0]), rel=1e-9)
    # Two columns alike: w_1 - w_2 changes no value. A weight of small influence counts all the same.
    outside = 0.5 * torch.eye(2) + 2 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    alike = torch.tensor([[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]]).double()
    assert triad.growth_rate(outside.double(), alike) == pytest.approx(0.5)
    small = torch.tensor([[1.0, 0.0], [0.0, 1e-3]]).double()
    assert triad.growth_rate(torch.tensor([[0.5, 0.0], [0.0, 2.0]]).double(), small) == pytest.approx(2)


def check_the_threshold_of_two_states(triad):
    """Divergence exactly where gamma^n (1 - end)^(n - 1) (6 - 4 end) > 5: 5 / (6 - 4 end) at n = 1."""
    for end in (0.0, 0.1, 0.25, 0.6):
        for n in (1, 2, 4):
            for gamma in (0.0, 0.5, 0.8, 0.84, 0.9, 0.99, 1.0):
                example = triad.two_states(end)
                rate = triad.growth_rate(triad.td_matrix(*parts(triad, example, gamma, n), alpha=0.1), example[0])
                assert (rate > 1) == (gamma**n * (1 - end) ** (n - 1) * (6 - 4 * end) > 5)


def check_bad_input(triad):
    features, transitions, weights = triad.baird()
    for message, call in {
        "solid must lie in .0, 1., got 1.5": lambda: triad.baird(1.5),
        "end must lie in .0, 1., got -1": lambda: triad.two_states(-1),
        r"features \(7, 8\), state_weights \(3,\)": lambda: triad.covariance(features, weights[:3]),
        r"features \(7, 8\), transitions \(7, 6\)": lambda: triad.bootstrap(
            features, transitions[:, :6], weights, gamma=0.9
        ),
        r"transitions \(7, 7\), state_weights \(3,\)": lambda: triad.bootstrap(
            features, transitions, weights[:3], gamma=0.9
        ),
        "gamma must lie in .0, 1., got 2": lambda: triad.bootstrap(features, transitions, weights, gamma=2),
        "n_steps must be 1 or more, got 0": lambda: triad.bootstrap(
            features, transitions, weights, gamma=0.9, n_steps=0
        ),
        "period must be 1 or more, got 0": lambda: triad.target_matrix(torch.eye(2), torch.eye(2), alpha=0.1, period=0),
        "method must be .*'gtd'": lambda: triad.gradient_td_matrix(
            torch.eye(2), torch.eye(2), alpha=0.1, beta=0.1, method="gtd"
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_functions(check):
    check(original)


MISTAKES = {
    "sign of the update": ("dtype=M.dtype) - alpha * (M - N)\n", "dtype=M.dtype) + alpha * (M - N)\n"),
    "a full gradient": ("dtype=M.dtype) - alpha * (M - N)\n", "dtype=M.dtype) - alpha * (M - N - N.T + M)\n"),
    "the target does not move": ("dtype=M.dtype) - alpha * (M - N)\n", "dtype=M.dtype) - alpha * M\n"),
    "discount once": ("matrix_power(gamma * transitions, n_steps)", "matrix_power(transitions, n_steps) * gamma"),
    "no discount": ("matrix_power(gamma * transitions, n_steps)", "matrix_power(transitions, n_steps)"),
    "one step less": ("matrix_power(gamma * transitions, n_steps)", "matrix_power(gamma * transitions, n_steps - 1)"),
    "transitions turned round": ("power(gamma * transitions, n_steps)", "power(gamma * transitions.T, n_steps)"),
    "states alike in the bootstrap": ("features.T @ (state_weights[:, None] * ahead)", "features.T @ ahead / 7"),
    "states alike in the regression": ("features.T @ (state_weights[:, None] * features)", "features.T @ features"),
    "the target weights move": ("shrink @ matrix + alpha * N", "(shrink + alpha * N) @ matrix"),
    "the period is one short": ("range(period)", "range(period - 1)"),
    "TDC without its correction": ("[-A, -N.T]", "[-A, 0 * N.T]"),
    "TDC, correction not transposed": ("[-A, -N.T]", "[-A, -N]"),
    "TDC corrects the wrong way": ("[-A, -N.T]", "[-A, N.T]"),
    "GTD2 without transposing": ("torch.zeros_like(A), A.T]", "torch.zeros_like(A), A]"),
    "second weights do not forget": ("lower = torch.cat([-A, -M]", "lower = torch.cat([-A, 0 * M]"),
    "step sizes exchanged": ("[alpha * upper, beta * lower]", "[beta * upper, alpha * lower]"),
    "weights outside count": ("rows[singular > 1e-10 * singular.max()].T", "torch.eye(rows.shape[1]).double()"),
    "eigenvalues with sign": ("@ basis).abs().max()", "@ basis).real.min()"),
    "Baird's last state": ("1.0, 2.0  # v(7)", "2.0, 1.0  # v(7)"),
    "dashed leads to seven": ("[(1 - solid) / 6] * 6 + [solid]", "[(1 - solid) / 7] * 6 + [solid]"),
    "the episode never ends": ("1.0 - end]]", "1.0]]"),
    "norms of the weights": ("(features @ w[: len(weights)])", "(w[: len(weights)])"),
    "shapes unchecked": ("if features.shape[:1] != state_weights.shape:", "if False:"),
}  # fmt: skip


def test_no_check_fails_on_the_original():
    assert caught_by(original, CHECKS) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    """Each deliberate mistake makes at least one check fail."""
    mutant = load_mutant(PATH, *MISTAKES[mistake])
    assert any(caught_by(mutant, [check]) for check in CHECKS)


# What the pages say.


def systems():
    """name -> (matrix, features): Baird's example with all three, with each taken away, and with cures."""
    example, alpha = original.baird(), 0.5
    table, on = torch.eye(7, dtype=torch.float64), original.baird(1 / 7)
    M, N = parts(original, example)
    return {
        "all three": (original.td_matrix(M, N, alpha=alpha), example[0]),
        "a table": (original.td_matrix(*parts(original, (table, *example[1:])), alpha=alpha), table),
        "no bootstrap": (original.td_matrix(M, 0 * N, alpha=alpha), example[0]),
        "on-policy": (original.td_matrix(*parts(original, on), alpha=alpha), example[0]),
        "20-step targets": (original.td_matrix(*parts(original, example, GAMMA, 20), alpha=alpha), example[0]),
        "target network, 10 steps": (original.target_matrix(M, N, alpha=alpha, period=10), example[0]),
        "TDC": (original.gradient_td_matrix(M, N, alpha=0.1, beta=0.5), example[0]),
        "GTD2": (original.gradient_td_matrix(M, N, alpha=0.1, beta=0.5, method="gtd2"), example[0]),
    }


@pytest.mark.parametrize("name", systems())
def test_take_one_of_the_three_away(evidence, name):
    """The eigenvalue says whether the values diverge, and by what factor a step; a run from 10 starts agrees."""
    matrix, features = systems()[name]
    rate, period = original.growth_rate(matrix, features), 10 if name.startswith("target") else 1
    assert (rate > 1) == (name == "all three")
    steps, runs = (2000 if evidence.full else 200) // period, []
    for seed in SEEDS:
        w = original.baird()[0] @ start(seed) if name == "a table" else start(seed)
        runs.append(original.value_norms(matrix, features, w, steps=steps))
    runs = torch.stack(runs)
    ratios = (runs[:, steps] / runs[:, steps // 2]) ** (2 / steps)
    assert evidence.full or ((ratios - rate).abs() < 0.03).all()
    evidence(
        "foundations/deadly_triad",
        f"Growth of the values a step: {name}",
        value=rate ** (1 / period),
        bar=1.0,
        better=">" if name == "all three" else "<",
        note="Largest eigenvalue of the expected update, Baird's example, γ = 0.99, α = 0.5"
        + (" (gradient TD: α = 0.1, β = 0.5)." if name in ("TDC", "GTD2") else "."),
    )
    shown = list(range(0, steps + 1, 50 // period))
    late = runs[:, min(1000 // period, steps)]
    evidence(
        "foundations/deadly_triad",
        f"Error after 1,000 steps: {name}",
        value=late.median(),
        seeds=SEEDS,
        spread=late.tolist(),
        note="Root mean square value; the true values are 0. Median of 10 random starting weights.",
        curve={"x": [period * i for i in shown], "y": {"error": runs[:, shown].clamp(1e-12, 1e12).tolist()}},
    )


def test_theory_is_the_measured_growth(evidence):
    """From ten starts, the factor of the last of 400 steps against the eigenvalue, with all three."""
    matrix, features = systems()["all three"]
    rate = original.growth_rate(matrix, features)
    found = []
    for seed in SEEDS:
        norms = original.value_norms(matrix, features, start(seed), steps=400)
        found.append(abs((norms[-1] / norms[-2]).item() - rate))
    evidence(
        "foundations/deadly_triad",
        "Measured growth less the eigenvalue, all three",
        value=max(found),
        bar=1e-9,
        seeds=SEEDS,
        spread=found,
    )


def test_no_step_size_helps():
    """An eigenvalue of A itself is negative: every alpha > 0 diverges. On-policy none is."""
    M, N = parts(original, original.baird())
    assert torch.linalg.eigvals(M - N).real.min() < -0.1
    for alpha in (1e-4, 1e-2, 1.0):
        assert original.growth_rate(original.td_matrix(M, N, alpha=alpha), original.baird()[0]) > 1


def test_on_policy_linear_td_is_stable():
    """Tsitsiklis and Van Roy's theorem: with the stationary distribution A is positive definite, whatever the features;
    with other distributions it need not be, and in some of these worlds it is not."""
    broken = 0
    for seed in range(200):
        transitions = mdps.random_mdp(5, 1, seed=seed, noise=3.0).transitions[:, 0]
        stationary = torch.linalg.matrix_power(transitions, 4096)[0]
        features = start(1000 + seed, 10).view(5, 2)
        M, N = parts(original, (features, transitions, stationary))
        assert torch.linalg.eigvalsh((M - N + (M - N).T) / 2).min() > 0
        M, N = parts(original, (features, transitions, start(2000 + seed, 5).mul(2).softmax(-1)))
        broken += bool(torch.linalg.eigvals(M - N).real.min() < 0)
    assert 0 < broken < 50  # most of the 200 are harmless


def test_one_sampled_run_diverges_too():
    """No expectation taken: the behaviour policy acts, importance ratios correct, and the values explode."""
    features, _, _ = original.baird()
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        w, state = torch.tensor([1.0, 1, 1, 1, 1, 1, 10, 1], dtype=torch.float64), 0
        solid = torch.rand(20_000, generator=generator) < 1 / 7
        upper = torch.randint(6, (20_000,), generator=generator)
        for is_solid, other in zip(solid.tolist(), upper.tolist(), strict=True):
            after = 6 if is_solid else other
            if is_solid:  # the ratio is 7, and 0 for dashed: no update
                error = GAMMA * features[after] @ w - features[state] @ w
                w = w + 0.01 * 7 * error * features[state]
            state = after
        assert (features @ w).abs().max() > 1e6


def test_target_networks(evidence):
    """Period 1 diverges and a long one does not, in Baird's example; where the regression expands, none helps."""
    example, curve = original.baird(), {}
    M, N = parts(original, example)
    for alpha in (0.02, 0.1, 0.5):
        rates = {
            k: original.growth_rate(original.target_matrix(M, N, alpha=alpha, period=k), example[0])
            for k in range(1, 201)
        }
        curve[f"α = {alpha:g}"] = [rate ** (1 / k) for k, rate in rates.items()]
        first = next(k for k in rates if all(rates[j] < 1 for j in range(k, 201)))
        evidence(
            "foundations/deadly_triad",
            f"Shortest stable period of the target network, α = {alpha:g}",
            value=first,
            unit="steps",
            note="Every longer one up to 200 is stable too.",
            curve={"x": list(rates), "y": {"growth": curve[f"α = {alpha:g}"]}},
        )
    long = original.growth_rate(original.target_matrix(M, N, alpha=0.5, period=2000), example[0])
    assert long == pytest.approx(GAMMA, abs=1e-6)  # value iteration, exactly represented
    pair = original.two_states()
    M, N = parts(original, pair)
    rates = [original.growth_rate(original.target_matrix(M, N, alpha=0.1, period=k), pair[0]) for k in range(1, 201)]
    assert min(rates) > 1
    evidence(
        "foundations/deadly_triad",
        "Growth in a long period of the target network: two states",
        value=rates[-1],
        note="6γ / 5 with γ = 0.99: the regression on the bootstrapped targets expands by itself.",
        curve={"x": list(range(1, 201)), "y": {"growth": [rate ** (1 / (k + 1)) for k, rate in enumerate(rates)]}},
    )
    assert rates[-1] == pytest.approx(6 * GAMMA / 5, abs=1e-9)


def test_longer_returns(evidence):
    """The bootstrap shrinks by gamma^n: from some n on both examples converge, and at n = 1 neither does."""
    for name, example in {"Baird's example": original.baird(), "two states": original.two_states()}.items():
        rates = {}
        for n in range(1, 61):
            M, N = parts(original, example, GAMMA, n)
            rates[n] = original.growth_rate(original.td_matrix(M, N, alpha=0.1), example[0])
        first = next(n for n in rates if rates[n] < 1)
        assert all((rate < 1) == (n >= first) for n, rate in rates.items())
        evidence(
            "foundations/deadly_triad",
            f"Smallest n whose n-step target is stable: {name}",
            value=first,
            unit="steps",
            note="γ = 0.99.",
            curve={"x": list(rates), "y": {"growth": list(rates.values())}},
        )
        if name == "two states":
            assert first == math.floor(math.log(5 / 6) / math.log(GAMMA)) + 1


def test_a_little_off_policy_is_safe(evidence):
    """The target policy takes solid with chance p, the behaviour policy with 1/7: from some p on the values diverge."""
    rates = {}
    for percent in range(15, 101):
        example = original.baird(percent / 100)
        rates[percent] = original.growth_rate(original.td_matrix(*parts(original, example), alpha=0.1), example[0])
    first = next(p for p in rates if rates[p] > 1)
    assert all((rate > 1) == (p >= first) for p, rate in rates.items())
    evidence(
        "foundations/deadly_triad",
        "Smallest chance of solid in the target policy that diverges",
        value=first / 100,
        note="The behaviour policy takes solid with chance 1/7. γ = 0.99.",
        curve={"x": list(rates), "y": {"growth": list(rates.values())}},
    )


def test_gradient_td_converges_and_is_slow(evidence):
    """Both converge; with gamma near 1 the slowest direction hardly moves. TDC needs a fast second step, GTD2 not."""
    example = original.baird()
    M, N = parts(original, example)
    for method in ("tdc", "gtd2"):
        matrix = original.gradient_td_matrix(M, N, alpha=0.1, beta=0.5, method=method)
        rate = original.growth_rate(matrix, example[0])
        far = torch.linalg.matrix_power(matrix, 4_000_000)
        errors = []
        for seed in SEEDS:
            w = far @ torch.cat([start(seed), torch.zeros(8, dtype=torch.float64)])
            errors.append((example[0] @ w[:8]).square().mean().sqrt().item())
        evidence(
            "foundations/deadly_triad",
            f"Steps in which the error halves: {method.upper()}",
            value=math.log(0.5) / math.log(rate),
            unit="steps",
            note="From the largest eigenvalue, γ = 0.99, α = 0.1, β = 0.5.",
        )
        evidence(
            "foundations/deadly_triad",
            f"Error after 4,000,000 steps: {method.upper()}",
            value=max(errors),
            bar=1e-2,
            seeds=SEEDS,
            spread=errors,
        )
    slow = {
        m: original.growth_rate(original.gradient_td_matrix(M, N, alpha=0.1, beta=0.01, method=m), example[0])
        for m in ("tdc", "gtd2")
    }
    assert slow["tdc"] > 1 > slow["gtd2"]
