"""TRPO: the improvement bound on exact MDPs, the Fisher matrix by enumeration, conjugate gradient against dense solves,
the step against its constraint, and its own broken copies."""

import copy
import math

import pytest
import scipy.sparse.linalg
import torch
from torch import nn
from torch.distributions import Categorical, Normal, kl_divergence
from torch.nn.utils import parameters_to_vector
from torch.testing import assert_close

from snippets.foundations import loop
from snippets.foundations import trpo as original
from snippets.worlds import mdps
from snippets.worlds.classic import CARTPOLE, PENDULUM
from tests.foundations.on_policy import (
    adapter_knows_truncation_from_termination,
    batch_from,
    reaches_475,
    rollout_of,
)
from tests.mutation import caught_by, load_mutant

torch.set_num_threads(1)
PATH = "snippets/foundations/trpo.py"
SEEDS = [0, 1, 2, 3, 4]
FRESH = list(range(100, 112))  # not those that the settings were chosen on
GAMMA = 0.9


def random(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# The exact world: values and visits of a table of logits by linear solves.


def solve(mdp, logits):
    """Return J, advantages (S, A) and discounted visits (S,), of sum 1, of a softmax policy; differentiable."""
    pi = logits.softmax(-1)
    moves = torch.einsum("sa,sat->st", pi, mdp.transitions)
    one = torch.eye(len(pi), dtype=pi.dtype)
    values = torch.linalg.solve(one - mdp.gamma * moves, (pi * mdp.expected_rewards).sum(-1))
    q_values = mdp.expected_rewards + mdp.gamma * mdp.transitions @ values
    visits = torch.linalg.solve((one - mdp.gamma * moves).T, mdp.start) * (1 - mdp.gamma)
    return mdp.start @ values, q_values - values.unsqueeze(-1), visits


def exact_surrogate(trpo, mdp, old, new):
    """E over visits of the old policy and all actions, divided by 1 - gamma, through the snippet's function."""
    _, advantages, visits = solve(mdp, old.detach())
    weights = (visits.unsqueeze(-1) * old.detach().softmax(-1) * advantages).flatten() * old.numel()
    logps, old_logps = new.log_softmax(-1).flatten(), old.log_softmax(-1).flatten()
    return trpo.surrogate(logps, old_logps, weights) / (1 - mdp.gamma)


def pairs(count=20):
    """Random MDPs with pairs of policies, from almost equal to far apart."""
    for seed in range(count):
        mdp = mdps.random_mdp(4, 3, seed=seed, gamma=GAMMA)
        old = random(seed, 4, 3)
        for size in (0.01, 0.1, 1.0, 4.0):
            yield mdp, old, old + size * random(1000 + seed, 4, 3)


def gain_of(mdp, old, new):
    return solve(mdp, new)[0] - solve(mdp, old)[0]


def test_the_performance_difference_lemma():
    """J(new) - J(old) = E[A_old] over the visits and actions of the *new* policy / (1 - gamma): an identity."""
    for mdp, old, new in pairs():
        before, advantages, old_visits = solve(mdp, old)
        after, _, visits = solve(mdp, new)
        gain = (visits.unsqueeze(-1) * new.softmax(-1) * advantages).sum() / (1 - GAMMA)
        assert_close(after - before, gain, rtol=1e-9, atol=1e-10)
    # The visits of the two policies differ, so that the surrogate with the old ones is another number.
    mdp, old, new = next(iter(pairs()))
    assert (solve(mdp, new)[2] - solve(mdp, old)[2]).abs().max() > 1e-5


def check_the_surrogate_and_the_return_agree_to_first_order(trpo):
    """Equal values and gradients at the old policy: the policy gradient, here by autograd through the linear solve."""
    for seed in SEEDS:
        mdp, old = mdps.random_mdp(4, 3, seed=seed, gamma=GAMMA), random(seed, 4, 3)
        new = old.clone().requires_grad_()
        found = exact_surrogate(trpo, mdp, old, new)
        assert abs(found.item()) < 1e-12  # A has mean 0
        gradient = torch.autograd.grad(found, new)[0]
        assert_close(gradient, torch.autograd.grad(solve(mdp, new)[0], new)[0], rtol=1e-9, atol=1e-12)


def check_the_surrogate_in_a_loop(trpo):
    logps, old_logps, advantages = (random(k, 9) for k in range(3))
    steps = zip(logps.tolist(), old_logps.tolist(), advantages.tolist(), strict=True)
    expected = sum(math.exp(new - old) * a for new, old, a in steps) / 9
    assert trpo.surrogate(logps, old_logps, advantages).item() == pytest.approx(expected, rel=1e-12)
    tensors = [x.requires_grad_() for x in (logps, old_logps, advantages)]
    gradients = torch.autograd.grad(trpo.surrogate(*tensors), tensors, allow_unused=True)
    assert gradients[0] is not None and gradients[1] is None and gradients[2] is None


def check_the_improvement_bound_holds(trpo):
    """Theorem 1 of Schulman et al. on random MDPs; and by hand, constant and powers included."""
    for mdp, old, new in pairs():
        before, advantages, _ = solve(mdp, old)
        max_kl = kl_divergence(Categorical(logits=old), Categorical(logits=new)).max()
        gain = exact_surrogate(trpo, mdp, old, new)
        bound = trpo.guaranteed_gain(gain, max_kl, advantages.abs().max(), gamma=GAMMA)
        assert solve(mdp, new)[0] - before >= bound - 1e-12
    found = trpo.guaranteed_gain(torch.tensor(3.0), torch.tensor(0.5), torch.tensor(2.0), gamma=0.75)
    assert found.item() == pytest.approx(3.0 - 4 * 2.0 * 0.75 / 0.25**2 * 0.5)
    assert trpo.guaranteed_gain(torch.tensor(3.0), torch.tensor(9.0), torch.tensor(2.0), gamma=0.0).item() == 3.0


def test_without_the_penalty_the_surrogate_promises_too_much():
    """There are pairs whose surrogate rises and whose return falls."""
    assert any(exact_surrogate(original, *pair) > 0 > gain_of(*pair) for pair in pairs(40))


def bound_along_a_path(seed):
    """From a random policy towards the greedy one of its advantages: true gain, surrogate and guaranteed gain."""
    mdp, old = mdps.random_mdp(4, 3, seed=seed, gamma=GAMMA), random(seed, 4, 3)
    before, advantages, _ = solve(mdp, old)
    greedy = nn.functional.one_hot(advantages.argmax(-1), 3).double()
    shares = [10 ** (-5 + k / 4) for k in range(20)]
    rows = []
    for share in shares:
        new = ((1 - share) * old.softmax(-1) + share * greedy).log()
        max_kl = kl_divergence(Categorical(logits=old), Categorical(logits=new)).max()
        gain = exact_surrogate(original, mdp, old, new)
        bound = original.guaranteed_gain(gain, max_kl, advantages.abs().max(), gamma=GAMMA)
        rows.append([(solve(mdp, new)[0] - before).item(), gain.item(), bound.item()])
    return shares, rows


def gain_to_the_greedy_policy(seed):
    mdp, old = mdps.random_mdp(4, 3, seed=seed, gamma=GAMMA), random(seed, 4, 3)
    best = nn.functional.one_hot(solve(mdp, old)[1].argmax(-1), 3).double()
    return gain_of(mdp, old, 1e3 * best).item()


def test_how_small_a_step_the_bound_allows(evidence):
    """Of the way to the greedy policy, the last of four points a decade; the return itself rises from each to the next
    and to the end."""
    allowed, paths = [], []
    for seed in SEEDS:
        shares, rows = bound_along_a_path(seed)
        allowed.append(100 * max(share for share, row in zip(shares, rows, strict=True) if row[2] > 0))
        paths.append(rows)
        gains = [0.0, *(row[0] for row in rows), gain_to_the_greedy_policy(seed)]
        assert all(b > a for a, b in zip(gains, gains[1:], strict=False))
    names = ("return", "surrogate", "guaranteed")
    curve = {"x": shares, "y": {name: [[row[k] for row in rows] for rows in paths] for k, name in enumerate(names)}}
    evidence(
        "foundations/trpo",
        "Share of the way to the greedy policy up to which theorem 1 guarantees a gain",
        value=max(allowed),
        bar=5.0,
        unit="%",
        seeds=SEEDS,
        spread=allowed,
        note="Largest of the seeds. Random MDPs of 4 states and 3 actions, γ = 0.9; exact. The return itself rises all "
        "along the way.",
        curve=curve,
    )


# KL and Fisher.


def check_the_divergences(trpo):
    old, new = random(0, 6, 3).requires_grad_(), random(1, 6, 3).requires_grad_()
    found = trpo.categorical_kl(old, new)
    assert_close(found, kl_divergence(Categorical(logits=old), Categorical(logits=new)))
    gradients = torch.autograd.grad(found.sum(), (old, new), allow_unused=True)
    assert gradients[0] is None and gradients[1].abs().max() > 0.01
    four = [random(k, 6, 2).requires_grad_() for k in range(4)]
    found = trpo.gaussian_kl(*four)
    first, second = Normal(four[0], four[1].exp()), Normal(four[2], four[3].exp())
    assert_close(found, kl_divergence(first, second).sum(-1))
    gradients = torch.autograd.grad(found.sum(), four, allow_unused=True)
    assert gradients[0] is None and gradients[1] is None
    assert gradients[2].abs().max() > 0.01 and gradients[3].abs().max() > 0.01


def check_extreme_policies_have_finite_divergences(trpo):
    for dtype in (torch.float32, torch.float64):
        old = torch.tensor([[1e4, -1e4], [0.0, 0.0]], dtype=dtype)
        new = torch.tensor([[-1e4, 1e4], [0.0, 0.0]], dtype=dtype, requires_grad=True)
        found = trpo.categorical_kl(old, new)
        assert found.dtype == dtype and found.tolist() == [2e4, 0.0]
        assert torch.autograd.grad(found.sum(), new)[0].isfinite().all()


def discrete_net(seed=0):
    """A net of two layers over 6 states with 3 actions, its parameters and its states, in float64."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return net, list(net.parameters()), random(seed, 6, 4)


def jacobian(outputs, parameters):
    """(..., ) -> (number of outputs, P)."""
    rows = [torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True) for x in outputs.flatten()]
    full = [[torch.zeros_like(p) if g is None else g for g, p in zip(row, parameters, strict=True)] for row in rows]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in full])


def discrete_fisher(net, parameters, obs):
    """E[score score^T] over states and all actions, each weighted by its probability."""
    log_probs = net(obs).log_softmax(-1)
    scores = jacobian(log_probs, parameters)  # (B * A, P)
    return torch.einsum("k,kp,kq->pq", log_probs.exp().flatten().detach(), scores, scores) / len(obs)


def check_the_product_is_that_of_the_fisher_matrix(trpo):
    for seed in (0, 1):
        net, parameters, obs = discrete_net(seed)
        fisher = discrete_fisher(net, parameters, obs)
        kl = trpo.categorical_kl(net(obs).detach(), net(obs)).mean()
        for damping in (0.0, 0.3):
            product = trpo.fisher_product(kl, parameters, damping=damping)
            for k in range(3):
                v = random(10 + k, len(fisher))
                assert_close(product(v), fisher @ v + damping * v, rtol=1e-9, atol=1e-12)


def check_the_product_for_normal_actions(trpo):
    """The mean's part is J^T diag(1 / std^2) J, that of a log-std exactly 2, and nothing connects the two."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    log_std = nn.Parameter(torch.tensor([-0.5, 0.3], dtype=torch.float64))
    parameters, obs = [*net.parameters(), log_std], random(0, 6, 4)
    mean = net(obs)
    slopes = jacobian(mean, parameters).view(6, 2, -1)
    fisher = torch.einsum("bap,a,baq->pq", slopes, (-2 * log_std).exp().detach(), slopes) / 6
    fisher[-2:, -2:] += 2 * torch.eye(2, dtype=torch.float64)
    kl = trpo.gaussian_kl(mean, log_std.expand(6, 2), mean, log_std.expand(6, 2)).mean()
    product = trpo.fisher_product(kl, parameters)
    for k in range(3):
        v = random(k, len(fisher))
        assert_close(product(v), fisher @ v, rtol=1e-9, atol=1e-12)


def test_the_fisher_matrix_is_the_hessian_of_either_kl_at_equality():
    """Of KL(old || new) and of KL(new || old); the KL itself and its gradient are 0 there. E[score] = 0, too."""
    net, parameters, obs = discrete_net()
    fisher = discrete_fisher(net, parameters, obs)
    old, names = net(obs).detach(), [name for name, _ in net.named_parameters()]

    def kl(flat, forward):
        parts = flat.split([p.numel() for p in parameters])
        values = {name: x.view_as(p) for name, x, p in zip(names, parts, parameters, strict=True)}
        new = Categorical(logits=torch.func.functional_call(net, values, (obs,)))
        old_policy = Categorical(logits=old)
        both = (old_policy, new) if forward else (new, old_policy)
        return kl_divergence(*both).mean()

    at = parameters_to_vector(parameters).detach()
    for forward in (True, False):
        assert abs(kl(at, forward).item()) < 1e-12
        assert torch.autograd.functional.jacobian(lambda x, way=forward: kl(x, way), at).abs().max() < 1e-12
        hessian = torch.autograd.functional.hessian(lambda x, way=forward: kl(x, way), at)
        assert_close(hessian, fisher, rtol=1e-8, atol=1e-10)
    log_probs = net(obs).log_softmax(-1)
    scores = jacobian(log_probs, parameters)
    assert (log_probs.exp().flatten() @ scores).abs().max() < 1e-12
    # The empirical one, of the actions that were taken alone, is another matrix.
    taken = torch.tensor([0, 1, 2, 0, 1, 2])
    some = jacobian(log_probs.gather(-1, taken[:, None]), parameters)
    assert (some.T @ some / 6 - fisher).abs().max() > 0.01


# Conjugate gradient.


def spd(seed, size=12):
    x = random(seed, size, size)
    return x @ x.T + 0.1 * torch.eye(size, dtype=torch.float64)


def check_conjugate_gradient_solves_the_system(trpo):
    for seed in SEEDS:
        matrix, b = spd(seed), random(50 + seed, 12)
        found = trpo.conjugate_gradient(lambda v, m=matrix: m @ v, b, steps=60, tolerance=1e-28)
        assert_close(found, torch.linalg.solve(matrix, b), rtol=1e-6, atol=1e-8)
        for steps in (1, 3, 6):  # the same iterates as SciPy's
            theirs, _ = scipy.sparse.linalg.cg(matrix.numpy(), b.numpy(), rtol=0.0, maxiter=steps)
            ours = trpo.conjugate_gradient(lambda v, m=matrix: m @ v, b, steps=steps, tolerance=0.0)
            assert_close(ours, torch.as_tensor(theirs), rtol=1e-8, atol=1e-10)


def check_conjugate_gradient_stops_when_it_is_done(trpo):
    calls = []

    def product(v):
        calls.append(v)
        return 2 * v

    b = random(0, 5)
    assert_close(trpo.conjugate_gradient(product, b, steps=10), b / 2)
    assert len(calls) == 1  # one distinct eigenvalue: one step
    zero = torch.zeros(5, dtype=torch.float64)
    assert not trpo.conjugate_gradient(product, zero, steps=10).any()
    assert len(calls) == 1


def check_the_tolerance_is_relative(trpo):
    """Of a right side of any size: a tiny one is solved as well as a large one."""
    matrix, b = spd(0), random(1, 12)
    found = [trpo.conjugate_gradient(lambda v: matrix @ v, scale * b, steps=5) / scale for scale in (1e-8, 1.0)]
    assert_close(found[0], found[1], rtol=1e-8, atol=1e-12)


def check_each_step_is_the_best_of_its_space(trpo):
    """The error in the norm of A falls with each step: to one of three distinct eigenvalues in three."""
    values = torch.tensor([1.0] * 4 + [2.0] * 4 + [5.0] * 4, dtype=torch.float64)
    basis, b = torch.linalg.qr(random(0, 12, 12))[0], random(1, 12)
    matrix = basis @ values.diag() @ basis.T
    right, errors = torch.linalg.solve(matrix, b), []
    for steps in (1, 2, 3):
        error = trpo.conjugate_gradient(lambda v: matrix @ v, b, steps=steps) - right
        errors.append((error @ matrix @ error).item())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-20


# The natural gradient.


def natural_direction(trpo, parameters, logits_of, steps=60):
    """F^-1 g of a fixed batch, as the snippet finds it, without damping."""
    logits = logits_of()
    advantages = random(7, len(logits))
    actions = torch.arange(len(logits)) % logits.shape[-1]
    logps = logits.log_softmax(-1).gather(-1, actions[:, None]).squeeze(-1)
    gradient = torch.autograd.grad(trpo.surrogate(logps, logps.detach(), advantages), parameters, retain_graph=True)
    gradient = torch.cat([g.reshape(-1) for g in gradient])
    product = trpo.fisher_product(trpo.categorical_kl(logits.detach(), logits).mean(), parameters)
    return gradient, trpo.conjugate_gradient(product, gradient, steps=steps, tolerance=1e-26)


def check_the_natural_gradient_does_not_depend_on_the_parameters(trpo):
    """Three states, two actions, the logit of one of them as parameter: directly, through a matrix, and as x^3. To
    first order the policy moves in the same way. The plain gradient moves it in three ways."""
    matrix, logits = random(0, 3, 3) + 2 * torch.eye(3, dtype=torch.float64), random(1, 3)
    cube = logits.sign() * logits.abs() ** (1 / 3)
    forms = {
        "direct": (logits.clone(), lambda x: x),
        "mixed": (torch.linalg.solve(matrix, logits), lambda x: matrix @ x),
        "cubed": (cube, lambda x: x**3),
    }
    plain, natural = [], []
    for start, form in forms.values():
        x = start.clone().requires_grad_()

        def logits_of(x=x, form=form):
            return torch.stack([form(x), torch.zeros(3, dtype=torch.float64)], -1)

        gradient, direction = natural_direction(trpo, [x], logits_of)
        moves = torch.autograd.functional.jacobian(form, start)  # of the logit, for a move of x
        plain.append(moves @ gradient)
        natural.append(moves @ direction)
    for other in (1, 2):
        assert_close(natural[other], natural[0], rtol=1e-7, atol=1e-9)
        assert (plain[other] - plain[0]).abs().max() > 0.05


# The step.


def batch_of(net, obs, seed=0):
    old = net(obs).detach()
    actions = torch.multinomial(old.softmax(-1), 1, generator=torch.Generator().manual_seed(seed)).squeeze(-1)
    advantages = random(seed + 1, len(obs))
    old_logps = old.log_softmax(-1).gather(-1, actions[:, None]).squeeze(-1)
    return old, actions, advantages, old_logps


def make_measure(trpo, net, obs, seed=0):
    old, actions, advantages, old_logps = batch_of(net, obs, seed)

    def measure():
        logits = net(obs)
        logps = logits.log_softmax(-1).gather(-1, actions[:, None]).squeeze(-1)
        return trpo.surrogate(logps, old_logps, advantages), trpo.categorical_kl(old, logits).mean()

    return measure


def check_a_step_stays_inside_and_climbs(trpo):
    for seed in range(6):
        for max_kl in (1e-4, 0.01):
            net, parameters, _ = discrete_net(seed)
            measure = make_measure(trpo, net, random(seed, 60, 4), seed)
            before = measure()[0].item()
            fraction = trpo.trust_region_step(parameters, measure, max_kl=max_kl, damping=1e-3)
            after, kl = measure()
            assert 0 < fraction <= 1
            assert 0 < kl.item() <= max_kl and after.item() > before


def check_the_full_step_has_the_kl_that_it_aims_at(trpo):
    """To second order: for a small max_kl the KL of the step is max_kl times the square of the fraction taken. Six
    states with a logit each, so that nothing is singular and no damping needed."""
    for seed in range(3):
        x = random(seed, 6).requires_grad_()
        measure = make_measure(trpo, lambda _, x=x: torch.stack([x, torch.zeros_like(x)], -1), torch.zeros(6), seed)
        fraction = trpo.trust_region_step([x], measure, max_kl=1e-8, damping=0.0, cg_steps=6)
        assert measure()[1].item() == pytest.approx(1e-8 * fraction**2, rel=0.01)
        assert fraction >= 0.8


def check_the_step_is_along_the_solution_of_a_dense_system(trpo):
    net, parameters, obs = discrete_net()
    measure, damping = make_measure(trpo, net, obs), 0.05
    start = parameters_to_vector(parameters).detach().clone()
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(measure()[0], parameters)])
    fisher = discrete_fisher(net, parameters, obs) + damping * torch.eye(len(gradient), dtype=torch.float64)
    x = torch.linalg.solve(fisher, gradient)
    full = (2 * 1e-3 / (x @ fisher @ x)).sqrt() * x
    fraction = trpo.trust_region_step(parameters, measure, max_kl=1e-3, damping=damping, cg_steps=60)
    assert_close(parameters_to_vector(parameters).detach() - start, fraction * full, rtol=1e-3, atol=1e-5)


def check_an_inexact_direction_still_has_the_right_length(trpo):
    """By x^T F x, damping included, however early conjugate gradient stops (where it equals x^T g at every step)."""
    matrix = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64).diag()
    g = torch.ones(3, dtype=torch.float64)
    for offset in (0.0, 30.0):
        x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        trpo.trust_region_step(
            [x], lambda x=x: (g @ x, 0.5 * x @ matrix @ x), max_kl=1.0, damping=offset, cg_steps=1, backtracks=1
        )
        moved = x.detach()
        damped = matrix + offset * torch.eye(3, dtype=torch.float64)
        assert (moved @ damped @ moved).item() == pytest.approx(2.0, rel=1e-9)


def check_a_step_that_does_not_climb_is_refused(trpo):
    """A surrogate that falls wherever it is looked at again, a KL that is always too large, and NaN: nothing moves."""
    for worse in ("surrogate", "kl", "nan"):
        net, parameters, _ = discrete_net()
        inner, calls = make_measure(trpo, net, random(0, 60, 4)), []
        start = parameters_to_vector(parameters).detach().clone()

        def measure(worse=worse, inner=inner, calls=calls):
            calls.append(1)
            value, kl = inner()
            if len(calls) == 1:
                return value, kl
            if worse == "nan":
                return value * math.nan, kl * math.nan
            return (value - 10.0, kl) if worse == "surrogate" else (value, kl + 1.0)

        assert trpo.trust_region_step(parameters, measure, max_kl=0.01, backtracks=7) == 0.0
        assert len(calls) == 8  # once for the direction, then each shorter step
        assert_close(parameters_to_vector(parameters).detach(), start, rtol=0, atol=0)


def check_no_gradient_no_step(trpo):
    net, parameters, obs = discrete_net()
    start = parameters_to_vector(parameters).detach().clone()
    old = net(obs).detach()

    def measure():
        logits = net(obs)
        return 0.0 * logits.sum(), trpo.categorical_kl(old, logits).mean()

    assert trpo.trust_region_step(parameters, measure) == 0.0
    assert_close(parameters_to_vector(parameters).detach(), start, rtol=0, atol=0)


def check_backtracking_shortens_by_the_factor(trpo):
    """A first step that is too long is tried again at 0.5, 0.25, ... of its length, and the first good one is taken."""
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)

    def measure():  # curvature 1 at 0, and a wall beyond 0.3; the full step is sqrt(2 * 0.5) = 1
        return x.sum(), 0.5 * (x**2).sum() + (1.0 if x.item() > 0.3 else 0.0)

    assert trpo.trust_region_step([x], measure, max_kl=0.5, damping=0.0, shrink=0.5) == 0.25
    assert x.item() == pytest.approx(0.25)


def check_bad_input_is_named(trpo):
    three, four = torch.zeros(3), torch.zeros(4)
    for call, words in (
        (lambda: trpo.surrogate(three, four, three), r"logps \(3,\).*old_logps \(4,\)"),
        (lambda: trpo.surrogate(three, three, four), r"advantages \(4,\)"),
        (lambda: trpo.guaranteed_gain(three[0], three[0], three[0], gamma=1.0), r"gamma must lie in \[0, 1\), got 1"),
        (lambda: trpo.guaranteed_gain(three[0], three[0], three[0], gamma=-0.1), "got -0.1"),
        (lambda: trpo.categorical_kl(torch.zeros(2, 3), torch.zeros(2, 4)), r"\(2, 3\).*\(2, 4\)"),
        (lambda: trpo.gaussian_kl(*[torch.zeros(2, 3)] * 3, torch.zeros(3)), r"log_std \(3,\)"),
        (lambda: trpo.fisher_product(three, [three]), r"scalar, got \(3,\)"),
        (lambda: trpo.fisher_product(three[0], [three], damping=-1.0), "damping >= 0, got -1"),
        (lambda: trpo.conjugate_gradient(lambda v: v, three, steps=0), "steps must be positive, got 0"),
        (lambda: trpo.trust_region_step([three], lambda: None, max_kl=0.0), "got 0.0"),
        (lambda: trpo.trust_region_step([three], lambda: None, shrink=1.0), "and 1.0"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


# In the loop.


def check_the_adapter_knows_truncation_from_termination(trpo):
    adapter_knows_truncation_from_termination(trpo)


def check_an_update_keeps_its_kl_and_fits_the_critic(trpo):
    for task in (CARTPOLE, PENDULUM):
        algorithm = trpo.algorithm()
        settings = algorithm.settings(max_kl=0.02)
        agent, rollout, generator = rollout_of(task)
        advantages, returns = algorithm.advantages(rollout, settings)
        batch = batch_from(rollout, advantages, returns)
        before = copy.deepcopy(agent)
        optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2)
        algorithm.update(agent, optimizer, batch, settings, generator)
        with torch.no_grad():
            old, new = before.policy(batch.obs), agent.policy(batch.obs)
            if task.discrete:
                kl = kl_divergence(Categorical(logits=old), Categorical(logits=new)).mean()
            else:
                assert agent.log_std.item() != 0.0  # it is part of the policy
                first, second = Normal(old, before.log_std.exp()), Normal(new, agent.log_std.exp())
                kl = kl_divergence(first, second).sum(-1).mean()
            ratio = (agent.logps(batch.obs, batch.actions)[0] - batch.logps).exp()
            weights = batch.advantages - batch.advantages.mean()
            errors = [(who.values(batch.obs) - batch.returns).square().mean() for who in (before, agent)]
        assert 1e-4 < kl.item() <= 0.02 * 1.001
        assert (ratio * weights).mean() > weights.mean() + 1e-4  # the surrogate of what the batch says rises
        assert errors[1] < errors[0]


def check_each_setting_reaches_the_step(trpo):
    """Bound, damping and steps of conjugate gradient each change the result."""
    algorithm, results = trpo.algorithm(), []
    for options in ({}, {"max_kl": 0.02}, {"max_kl": 0.01}, {"damping": 1.0}, {"cg_steps": 1}):
        agent, rollout, generator = rollout_of(CARTPOLE)
        settings = algorithm.settings(**options)
        advantages, returns = algorithm.advantages(rollout, settings)
        batch = batch_from(rollout, advantages, returns)
        algorithm.update(agent, torch.optim.Adam(agent.parameters()), batch, settings, generator)
        results.append(parameters_to_vector(agent.policy.parameters()).detach())
    for i, first in enumerate(results):
        assert all((first - second).abs().max() > 1e-3 for second in results[i + 1 :])


def check_a_constant_added_to_the_advantages_changes_nothing(trpo):
    algorithm = trpo.algorithm()
    moved = []
    for constant in (0.0, 5.0):
        agent, rollout, generator = rollout_of(CARTPOLE)
        advantages, returns = algorithm.advantages(rollout, algorithm.settings())
        batch = batch_from(rollout, advantages + constant, returns)
        algorithm.update(agent, torch.optim.Adam(agent.parameters()), batch, algorithm.settings(), generator)
        moved.append(parameters_to_vector(agent.policy.parameters()).detach())
    assert_close(moved[0], moved[1], rtol=1e-2, atol=1e-3)


def check_equal_advantages_move_nothing(trpo):
    """Whatever their size: the mean of equal numbers is rounded in float32, and must not become a direction."""
    algorithm = trpo.algorithm()
    agent, rollout, generator = rollout_of(CARTPOLE)
    same = torch.full_like(rollout.values, 3333.3)
    batch = batch_from(rollout, same, same)[:-3]
    before = parameters_to_vector(agent.policy.parameters()).detach().clone()
    algorithm.update(agent, torch.optim.Adam(agent.parameters()), batch, algorithm.settings(), generator)
    assert torch.equal(parameters_to_vector(agent.policy.parameters()), before)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_functions(check):
    check(original)


MISTAKES = {
    "ratio without its exponential": (
        "return ((logps - old_logps.detach()).exp()",
        "return ((logps - old_logps.detach())",
    ),
    "ratio upside down": ("(logps - old_logps.detach()).exp()", "(old_logps.detach() - logps).exp()"),
    "penalty with a 2": ("gain - 4 * max_advantage", "gain - 2 * max_advantage"),
    "penalty added": ("gain - 4 * max_advantage", "gain + 4 * max_advantage"),
    "one power of 1 - gamma": ("(1 - gamma) ** 2", "(1 - gamma)"),
    "penalty without gamma": ("max_advantage * gamma /", "max_advantage /"),
    "reverse KL": ("(old.exp() * (old - new))", "(new.exp() * (new - old))"),
    "KL with another weight": ("(old.exp() * (old - new))", "(new.exp() * (old - new))"),
    "gradient into the old logits": ("old_logits.detach().log_softmax", "old_logits.log_softmax"),
    "gradient into the old mean": (
        "old_mean, old_log_std = old_mean.detach(), old_log_std.detach()\n    square",
        "square",
    ),
    "KL without the half": ("+ 0.5 * square", "+ square"),
    "KL without its constant": ("(-2 * log_std).exp() - 0.5)", "(-2 * log_std).exp())"),
    "std for variance": ("(2 * old_log_std).exp()", "old_log_std.exp()"),
    "log-stds swapped": ("(log_std - old_log_std +", "(old_log_std - log_std +"),
    "no second backward": ("return torch.cat([x.reshape(-1) for x in second]) + damping * v", "return v + damping * v"),
    "damping forgotten": ("for x in second]) + damping * v", "for x in second])"),
    "damping of the product": ("+ damping * v", "* (1 + damping)"),
    "residual not updated": (
        "x, residual = x + rate * search, residual - rate * image",
        "x = x + rate * search",
    ),
    "residual the wrong way": ("residual - rate * image", "residual + rate * image"),
    "steepest descent": ("search = residual + size / before * search", "search = residual"),
    "Polak's ratio upside down": ("size / before * search", "before / size * search"),
    "one step fewer": ("for _ in range(steps):", "for _ in range(steps - 1):"),
    "never done": ("if size <= enough:", "if False:"),
    "step without the 2": ("(2 * max_kl / curvature)", "(max_kl / curvature)"),
    "step without its root": ("(2 * max_kl / curvature).sqrt()", "(2 * max_kl / curvature)"),
    "plain gradient": ("direction = conjugate_gradient(product, gradient, steps=cg_steps)", "direction = gradient"),
    "downhill": ("vector_to_parameters(old + shrink**k * full", "vector_to_parameters(old - shrink**k * full"),
    "KL not asked": ("if after > before and kl <= max_kl:", "if after > before:"),
    "surrogate not asked": ("if after > before and kl <= max_kl:", "if kl <= max_kl:"),
    "either will do": ("if after > before and kl", "if after > before or kl"),
    "not put back": ("    vector_to_parameters(old, parameters)\n    return 0.0", "    return 0.0"),
    "no backtracking": ("for k in range(backtracks):", "for k in range(1):"),
    "gradient into the advantages": ("advantages.detach()).mean()", "advantages).mean()"),
    "length without curvature": ("direction @ product(direction)", "direction @ direction"),
    "absolute tolerance": ("enough = tolerance * size", "enough = tolerance"),
    "advantages not centred": ("weights = normalise(batch.advantages)", "weights = batch.advantages"),
    "ends swapped": ("(rollout.terminated, rollout.truncated)", "(rollout.truncated, rollout.terminated)"),
    "log-std left out": ("(*agent.policy.parameters(), agent.log_std)", "agent.policy.parameters()"),
    "bound not passed": ('"max_kl": settings.max_kl', '"max_kl": 0.01'),
    "damping not passed": ('"damping": settings.damping', '"damping": 0.1'),
    "critic not fitted": ("        fit(agent, optimizer, batch, settings, generator)\n", ""),
    "old logits follow": ("old = agent.policy(batch.obs)\n", "old = 0 * agent.policy(batch.obs)\n"),
    "gamma may be 1": ("if not 0 <= gamma < 1:", "if not 0 <= gamma <= 1:"),
    "shapes unchecked": ("if len({tuple(x.shape) for x in tensors.values()}) > 1:", "if False:"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutations(mistake):
    """Each deliberate mistake makes at least one check fail."""
    mutant = load_mutant(PATH, *MISTAKES[mistake])
    assert any(caught_by(mutant, [check]) for check in CHECKS)


# Learning.


def watched(algorithm, points):
    """The algorithm, noting for each update: environment steps, steps an ending of the rollout, KL of the update."""

    def update(agent, optimizer, batch, settings, generator):
        before = copy.deepcopy(agent.policy)
        algorithm.update(agent, optimizer, batch, settings, generator)
        with torch.no_grad():
            kl = original.categorical_kl(before(batch.obs), agent.policy(batch.obs)).mean().item()
        points[-1] += [kl]

    def advantages(rollout, settings):
        endings = (rollout.terminated | rollout.truncated).sum().item()
        points.append([min(rollout.rewards.numel() / max(endings, 1), 500.0)])
        return algorithm.advantages(rollout, settings)

    return loop.Algorithm(algorithm.settings, advantages, update)


@pytest.mark.evidence
def test_learns_cartpole(evidence, monkeypatch):
    seeds = FRESH if evidence.full else [103]  # a quick one
    reaches_475(evidence, monkeypatch, "foundations/trpo", original.algorithm(), seeds, updates=150)


@pytest.mark.evidence
def test_no_update_leaves_the_trust_region(evidence):
    """KL of each update over the states of its batch, beside its bound."""
    method, seeds, updates = original.algorithm(), SEEDS if evidence.full else SEEDS[:1], 40 if evidence.full else 10
    kls, lengths = [], []
    for seed in seeds:
        points = []
        loop.train(CARTPOLE, watched(method, points), method.settings(seed=seed, updates=updates), judge=False)
        lengths.append([length for length, _ in points])
        kls.append([kl for _, kl in points])
    evidence(
        "foundations/trpo",
        "Largest mean KL(π_old‖π) of an update on CartPole",
        value=max(max(row) for row in kls),
        bar=0.05,
        unit="nats",
        seeds=seeds,
        spread=[max(row) for row in kls],
        note=f"The bound is max_kl = 0.05; {updates} updates a seed.",
        curve={"x": [1024 * (k + 1) for k in range(updates)], "y": {"KL": kls, "steps an ending": lengths}},
    )
