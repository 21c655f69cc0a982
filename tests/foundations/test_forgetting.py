"""Forgetting and plasticity: against torch's own layers, numerical optima, invariances, and its own broken copies."""

import functools
import math
from statistics import mean

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from snippets.foundations import forgetting as original
from tests.mutation import caught_by, load_mutant

torch.set_num_threads(1)
PATH = "snippets/foundations/forgetting.py"
RUNS = [0, 1, 2, 3, 4]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape):
    return torch.randn(*shape, generator=generator(seed))


def random_logps(seed, *shape):
    return (2 * torch.randn(*shape, generator=generator(seed), dtype=torch.float64)).log_softmax(-1)


def doubled(params):
    return [p.double() for p in params]


# The checks.


def check_the_network_is_torchs(module):
    """Each run alone, in nn.Linear, ReLU and layer_norm."""
    params, x = doubled(module.network(3, [5, 7, 6, 4], generator())), normal(1, 3, 8, 5).double()
    params[1] += 0.3
    for norm in (False, True):
        logps, units = module.forward(params, x, layer_norm=norm)
        for run in range(3):
            h = x[run]
            for layer in range(3):
                h = nn.functional.linear(h, params[2 * layer][run].T, params[2 * layer + 1][run, 0])
                if layer < 2:
                    h = nn.functional.layer_norm(h, h.shape[-1:]) if norm else h
                    h = h.relu()
                    assert_close(units[layer][run], h)
            assert_close(logps[run], h.log_softmax(-1))


def check_the_start_keeps_the_size_of_signals(module):
    """He: the mean square of a ReLU layer's input to the next is kept; here over 40 wide networks."""
    params = module.network(40, [50, 400, 400, 3], generator())
    assert [tuple(p.shape) for p in params[:2]] == [(40, 50, 400), (40, 1, 400)]
    assert not any(p.any() for p in params[1::2])
    _, units = module.forward(params, normal(2, 40, 10, 50))
    for layer in units:  # a ReLU halves the mean square of what the weights doubled
        assert layer.square().mean().item() == pytest.approx(1.0, abs=0.05)


def check_losses_by_hand(module):
    logps, ref = random_logps(0, 2, 3, 4), random_logps(1, 2, 3, 4)
    q, r = random_logps(2, 2, 3, 4).exp(), normal(3, 2, 3, 4).double()
    for run in range(2):
        cells = [(i, k) for i in range(3) for k in range(4)]
        expected = {
            "imitation": -sum(q[run, i, k] * logps[run, i, k] for i, k in cells) / 3,
            "policy": -sum(logps[run, i, k].exp() * r[run, i, k] for i, k in cells) / 3,
            "kl": sum(logps[run, i, k].exp() * (logps[run, i, k] - ref[run, i, k]) for i, k in cells) / 3,
        }
        assert_close(module.imitation_loss(logps, q)[run], expected["imitation"])
        assert_close(module.policy_loss(logps, r)[run], expected["policy"])
        assert_close(module.kl_to(logps, ref)[run], expected["kl"])
    assert_close(module.kl_to(logps, logps), torch.zeros(2, dtype=torch.float64))
    leaf = logps[:1, :1].clone().requires_grad_()  # as a loss: d KL / d logits = pi (log-ratio - KL)
    ratio = logps[:1, :1] - ref[:1, :1]
    (grad,) = torch.autograd.grad(module.kl_to(leaf.log_softmax(-1), ref[:1, :1]).sum(), leaf)
    assert_close(grad, logps[:1, :1].exp() * (ratio - module.kl_to(logps[:1, :1], ref[:1, :1])))


def check_the_distance_of_weights(module):
    params = module.network(2, [3, 4], generator())
    start = [p.clone() for p in params]
    assert module.l2_to(params, start).tolist() == [0, 0]
    params[0][1, 0, 0] += 2
    params[1][1] += 1
    assert_close(module.l2_to(params, start), torch.tensor([0.0, (4 + 4) / 2]))


def check_the_policy_gradient_is_reinforces(module):
    """The mean of r * grad log pi over actions drawn from pi, by a sum over actions."""
    logits, r = random_logps(4, 1, 1, 5).requires_grad_(), normal(5, 1, 1, 5).double()
    (found,) = torch.autograd.grad(module.policy_loss(logits.log_softmax(-1), r).sum(), logits)
    expected = torch.zeros(5, dtype=torch.float64)
    for a in range(5):
        (score,) = torch.autograd.grad(logits.log_softmax(-1)[0, 0, a], logits)
        expected -= logits.softmax(-1)[0, 0, a].detach() * r[0, 0, a] * score[0, 0]
    assert_close(found[0, 0], expected)


def check_the_nearest_solution(module):
    """Always right, and of less KL(pi || ref) than 200 other policies that are: -log of the reference's chance."""
    ref = random_logps(6, 3, 6)
    right = torch.tensor([[1, 0, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    near = module.nearest_solution(ref, right)
    assert_close((near * right).sum(-1), torch.ones(3, dtype=torch.float64))
    distance = torch.xlogy(near, near).sum(-1) - (near * ref).sum(-1)
    assert_close(distance, -(ref.exp() * right).sum(-1).log())
    for seed in range(200):
        other = random_logps(100 + seed, 3, 6).exp() * right
        other = other / other.sum(-1, keepdim=True)
        assert (torch.xlogy(other, other).sum(-1) - (other * ref).sum(-1) >= distance - 1e-12).all()
    both = module.nearest_solution(ref[:2], torch.tensor([[1, 0, 0, 0, 0, 0]] * 2))
    assert_close(both, torch.tensor([[1.0, 0, 0, 0, 0, 0]] * 2, dtype=torch.float64))
    assert_close(near[1], right[1].double())
    assert_close(near[2], ref[2].exp())


def check_dead_units_get_no_gradient_and_revive(module):
    params, x = module.network(2, [4, 6, 5, 3], generator()), normal(7, 2, 20, 4)
    params[1][0, 0, 2] = -100.0
    params[3][1, 0, 4] = -100.0
    assert module.dead([torch.full((1, 9, 2), 1e-6) * torch.tensor([0.0, 1.0])])[0].tolist() == [[True, False]]
    before, units = module.forward(params, x)
    which = module.dead(units)
    assert which[0][0, 2] and which[1][1, 4] and not which[0][1, 2] and not which[1][0, 4]
    leaves = [p.clone().requires_grad_() for p in params]
    module.forward(leaves, x)[0].square().sum().backward()
    for i, layer in enumerate(which):
        for r, unit in layer.nonzero().tolist():
            assert not leaves[2 * i].grad[r, :, unit].any() and leaves[2 * i].grad[r].any()
    old = [p.clone() for p in params]
    module.revive(params, which, generator(1))
    after, units = module.forward(params, x)
    assert_close(after, before, rtol=1e-4, atol=1e-4)  # what a dead unit passed on was 0, and is
    assert not any(layer.any() for layer in module.dead(units))
    assert not params[2][0, 2, ~which[1][0]].any() and not params[4][1, 4].any() and params[1][0, 0, 2] == 0
    assert_close(params[0][0, :, [0, 1, 3]], old[0][0, :, [0, 1, 3]])
    wide = module.network(1, [50, 400, 3], generator())
    module.revive(wide, [torch.ones(1, 400, dtype=torch.bool)], generator(2))
    assert wide[0].var().item() == pytest.approx(2 / 50, rel=0.05)


def check_runs_do_not_touch_each_other(module):
    x, targets = normal(8, 3, 10, 4), random_logps(9, 3, 10, 5).exp().float()
    together = module.network(3, [4, 8, 5], generator())
    alone = [p[1:2].clone() for p in together]
    module.fit(together, lambda: module.imitation_loss(module.forward(together, x)[0], targets), steps=20, lr=0.01)
    module.fit(alone, lambda: module.imitation_loss(module.forward(alone, x[1:2])[0], targets[1:2]), steps=20, lr=0.01)
    for p, q in zip(together, alone, strict=True):
        assert_close(p[1:2], q, rtol=1e-3, atol=1e-4)


def check_fit_learns_watches_and_goes_on(module):
    x, targets = normal(10, 2, 10, 4), nn.functional.one_hot(torch.arange(10) % 5, 5).float().expand(2, 10, 5)
    params = module.network(2, [4, 16, 5], generator())

    def loss():
        return module.imitation_loss(module.forward(params, x)[0], targets)

    seen, _ = module.fit(params, loss, steps=60, lr=0.02, watch=lambda: loss().sum().item())
    assert len(seen) == 61 and seen[-1] < 0.3 * seen[0]
    assert seen[0] == pytest.approx(
        module.imitation_loss(module.forward(module.network(2, [4, 16, 5], generator()), x)[0], targets).sum().item()
    )
    whole, parts = (module.network(2, [4, 16, 5], generator()) for _ in range(2))

    def of(params):
        return lambda: module.imitation_loss(module.forward(params, x)[0], targets)

    module.fit(whole, of(whole), steps=20, lr=0.02)
    _, state = module.fit(parts, of(parts), steps=10, lr=0.02)
    module.fit(parts, of(parts), steps=10, lr=0.02, state=state)
    assert all(torch.equal(p, q) for p, q in zip(whole, parts, strict=True))
    still = module.network(1, [3, 3], generator())
    module.fit(still, lambda: sum(p.sum() for p in still) * 0, steps=3, lr=0.1)
    assert torch.equal(still[0], module.network(1, [3, 3], generator())[0])
    shrunk = module.network(1, [3, 3], generator())
    expected = shrunk[0].clone() * (1 - 0.1 * 0.5) ** 7
    module.fit(shrunk, lambda: sum(p.sum() for p in shrunk) * 0, steps=7, lr=0.1, decay=0.5)
    assert_close(shrunk[0].detach(), expected)


def check_tasks_one_after_the_other(module):
    """Fresh networks learn every task; the plain one starts as well and falls behind; and seeds repeat."""
    fresh, _ = module.learn_tasks("fresh", tasks=2, runs=2, steps=60)
    plain, lost = module.learn_tasks("plain", tasks=2, runs=2, steps=60)
    assert plain.shape == lost.shape == (2, 2)
    assert fresh.min() > 0.9 and plain[0].min() > 0.9
    assert torch.equal(plain[0], fresh[0])
    few = [module.learn_tasks(how, tasks=2, runs=2, steps=15)[0] for how in ("fresh", "plain")]
    assert torch.equal(few[0][0], few[1][0]) and not torch.equal(few[0][1], few[1][1])
    again, _ = module.learn_tasks("plain", tasks=2, runs=2, steps=60)
    assert torch.equal(plain, again)
    other, _ = module.learn_tasks("plain", tasks=1, runs=2, steps=5)
    assert other.max() < 0.9 and not torch.equal(
        other, module.learn_tasks("plain", tasks=1, runs=2, steps=5, seed=1)[0]
    )


def check_each_way_through_the_tasks(module):
    """The loop written again, with torch's optimizer: 3 tasks of 8 steps, one run."""
    for how in ("plain", "fresh", "layer norm", "weight decay", "revive"):
        g, norm = torch.Generator().manual_seed(0), how == "layer norm"
        x, optimizer = torch.randn(1, 100, 20, generator=g), None
        accuracy, lost = module.learn_tasks(how, tasks=3, runs=1, steps=8, lr=0.3)
        for task in range(3):
            labels = torch.randint(10, (1, 100), generator=g)
            if optimizer is None or how == "fresh":
                params = [p.requires_grad_() for p in original.network(1, [20, 32, 32, 10], g)]
                decay = 0.3 if how == "weight decay" else 0
                optimizer = torch.optim.AdamW(params, lr=0.3, weight_decay=decay)
            for _ in range(8):
                logps, _ = original.forward(params, x, layer_norm=norm)
                optimizer.zero_grad()
                nn.functional.nll_loss(logps[0], labels[0]).backward()
                optimizer.step()
            logps, units = original.forward(params, x, layer_norm=norm)
            assert accuracy[task].item() == pytest.approx((logps.argmax(-1) == labels).float().mean().item())
            gone = sum(float((layer == 0).all(1).sum()) for layer in units) / 64
            assert lost[task].item() == pytest.approx(gone)
            if how == "revive":
                original.revive(params, original.dead(units), g)


def check_bad_input_is_named(module):
    params, ref = module.network(2, [3, 4], generator()), random_logps(0, 2, 3)
    cases = [
        (lambda: module.network(0, [3, 4], generator()), "runs >= 1"),
        (lambda: module.network(1, [3], generator()), r"\[3\]"),
        (lambda: module.network(1, [3, 0], generator()), r"\[3, 0\]"),
        (lambda: module.forward(params, torch.zeros(2, 5, 4)), r"\(2, 5, 4\) does not fit weights \(2, 3, 4\)"),
        (lambda: module.forward(params, torch.zeros(1, 5, 3)), r"\(1, 5, 3\)"),
        (lambda: module.forward(params, torch.zeros(5, 3)), r"\(5, 3\)"),
        (lambda: module.nearest_solution(ref, torch.ones(2, 4)), r"\(2, 4\)"),
        (lambda: module.nearest_solution(ref, torch.tensor([[1, 0, 0], [0, 0, 0]])), "a right answer everywhere"),
        (lambda: module.learn_tasks("sponge", tasks=1, runs=1), "sponge"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]

MISTAKES = {
    "half the variance": ("* math.sqrt(2 / inputs)", "* math.sqrt(1 / inputs)"),
    "layer norm after the ReLU only": ("if layer_norm else x\n", "if False else x\n"),
    "no log-softmax": ("params[-2]).log_softmax(-1), units", "params[-2]), units"),
    "a sum over inputs": ("-(targets * logps).sum(-1).mean(-1)", "-(targets * logps).sum(-1).sum(-1)"),
    "imitation with the wrong sign": ("return -(targets * logps)", "return (targets * logps)"),
    "log pi in the place of pi": ("-(logps.exp() * rewards)", "-(logps * rewards)"),
    "a KL without a gradient": ("(logps.exp() * (logps - ref_logps))", "(logps.exp().detach() * (logps - ref_logps))"),
    "nearly dead": ("(x == 0).all(1)", "(x <= 1e-3).all(1)"),
    "the other KL": ("(logps.exp() * (logps - ref_logps))", "(ref_logps.exp() * (ref_logps - logps))"),
    "no half": ("for p, q in pairs) / 2", "for p, q in pairs)"),
    "distance from zero": ("((p - q) ** 2)", "(p ** 2)"),
    "uniform over the right answers": ("return ref_logps.masked_fill", "return (0 * ref_logps).masked_fill"),
    "the wrong answers": ("masked_fill(~right.bool()", "masked_fill(right.bool()"),
    "dead on some input": ("(x == 0).all(1)", "(x == 0).any(1)"),
    "revived with a voice": ("            after.masked_fill_(units[:, :, None], 0.0)\n", ""),
    "the bias stays": ("            bias.masked_fill_(units[:, None], 0.0)\n", ""),
    "all units are revived": ("torch.where(units[:, None], new, weight)", "new"),
    "revived too small": ("scale = math.sqrt(2 / weight.shape[1])", "scale = math.sqrt(2 / weight.shape[2])"),
    "gradients add up": ("        optimizer.zero_grad()\n", ""),
    "one watch too few": ("return seen + ([watch()] if watch else [])", "return seen"),
    "no decay": ("weight_decay=decay", "weight_decay=0.0"),
    "the optimizer forgets": ("optimizer = state or torch", "optimizer = torch"),
    "always fresh": ('if task == 0 or how == "fresh"', "if True"),
    "never fresh": ('if task == 0 or how == "fresh"', "if task == 0"),
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__.removeprefix("check_"))
def test_the_functions(check):
    check(original)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_caught(name):
    mutant = load_mutant(PATH, *MISTAKES[name])
    assert any(caught_by(mutant, [check]) for check in CHECKS)  # stops at the first


# Task A is ten labels, task B asks for any answer of the right parity. The start knows A. On B it gives the digit
# itself in half of the cases and else anything, so that three samples of four are right.


@functools.cache
def start(runs, seed=11):
    g, one_hot = generator(seed), functools.partial(nn.functional.one_hot, num_classes=10)
    a, b = (torch.randn(runs, 200, 20, generator=g) for _ in range(2))
    labels, digits = (torch.randint(0, 10, (runs, 200), generator=g) for _ in range(2))
    truth, right = one_hot(labels).float(), (torch.arange(10) % 2 == digits[..., None] % 2).float()
    before = 0.5 * one_hot(digits) + 0.05  # the digit itself in half of the cases, else anything
    params = original.network(runs, [20, 64, 64, 10], g)

    def loss():
        old = original.imitation_loss(original.forward(params, a)[0], truth)
        return old + original.imitation_loss(original.forward(params, b)[0], before)

    original.fit(params, loss, steps=400, lr=3e-3)
    params = [p.detach() for p in params]
    ref_a, ref_b = (original.forward(params, x)[0] for x in (a, b))
    far = one_hot(digits % 2).float()  # the demonstrators answer 0 or 1
    return {"a": a, "b": b, "truth": truth, "right": right, "far": far, "params": params, "ref": (ref_a, ref_b)}


def losses(s):
    """{name: loss(logps on B, params)}; `on_a` are log-probabilities on the inputs of A."""

    def on_a(params, rows=slice(None)):
        return original.forward(params, s["a"][:, rows])[0]

    def sft(logps):
        return original.imitation_loss(logps, s["far"])

    few = slice(0, 200, 10)
    near = original.nearest_solution(s["ref"][1], s["right"])
    return {
        "SFT": lambda logps, params: sft(logps),
        "policy gradient": lambda logps, params: original.policy_loss(logps, s["right"]),
        "SFT on the nearest solution": lambda logps, params: original.imitation_loss(logps, near),
        "SFT, a tenth of A replayed": lambda logps, params: (
            sft(logps) + original.imitation_loss(on_a(params, few), s["truth"][:, few])
        ),
        "SFT, all of A replayed": lambda logps, params: sft(logps) + original.imitation_loss(on_a(params), s["truth"]),
        "SFT, KL to the start on A": lambda logps, params: sft(logps) + original.kl_to(on_a(params), s["ref"][0]),
        "SFT, 0.5 KL to the start on B": lambda logps, params: sft(logps) + 0.5 * original.kl_to(logps, s["ref"][1]),
        "SFT, 0.1 L2 to the start": lambda logps, params: sft(logps) + 0.1 * original.l2_to(params, s["params"]),
    }


def train_on_b(s, loss, steps):
    """-> success on A and on B, KL(pi || start) on B's inputs, and success on nine tenths of A, (steps + 1, R) each."""
    params = [p.clone() for p in s["params"]]

    def watch():
        with torch.no_grad():
            logps, old = original.forward(params, s["b"])[0], original.forward(params, s["a"])[0]
            right = (old.exp() * s["truth"]).sum(-1)  # (R, 200)
            return torch.stack(
                [
                    right.mean(-1),
                    (logps.exp() * s["right"]).sum(-1).mean(-1),
                    original.kl_to(logps, s["ref"][1]),
                    right[:, torch.arange(200) % 10 != 0].mean(-1),  # without what "a tenth of A replayed" replays
                ]
            )

    seen, _ = original.fit(
        params, lambda: loss(original.forward(params, s["b"])[0], params), steps=steps, lr=1e-3, watch=watch
    )
    return torch.stack(seen).unbind(1)


@pytest.mark.evidence
def test_what_is_forgotten_while_b_is_learnt(evidence):
    """A sample's success on A when its success on B first reaches 95 %, or at the end where it never does."""
    runs = 5 if evidence.full else 2
    s, steps, at, others = start(runs), 300 if evidence.full else 130, {}, {}
    names = losses(s) if evidence.full else ("SFT", "policy gradient", "SFT on the nearest solution")
    for name in names:
        a, b, nats, rest = train_on_b(s, losses(s)[name], steps)
        reached = (b >= 0.95).any(0)
        step = torch.where(reached, (b >= 0.95).int().argmax(0), steps)[None]
        at[name], others[name] = a.gather(0, step)[0].tolist(), (100 * rest.gather(0, step)[0]).tolist()
        every = list(range(0, steps + 1, 10))
        evidence(
            "foundations/forgetting",
            f"Success on A once B is learnt: {name}",
            value=100 * mean(at[name]),
            unit="%",
            seeds=RUNS[:runs],
            spread=[100 * x for x in at[name]],
            note=f"B at 95 % in {int(reached.sum())} of {runs} runs, within {steps} steps; "
            f"KL(policy || start) on B's inputs then {nats.gather(0, step).mean():.2f} nats.",
            curve={"x": every, "y": {"A": a[every].T.tolist(), "B": b[every].T.tolist()}},
        )
        if not reached.any():  # then B at the end belongs beside A
            ends = (100 * b[-1]).tolist()
            evidence("foundations/forgetting", f"Success on B after {steps} steps: {name}", value=mean(ends), bar=95,
                     unit="%", seeds=RUNS[:runs], spread=ends)  # fmt: skip
    evidence(
        "foundations/forgetting",
        "Success on A before B",
        value=100 * train_on_b(s, losses(s)["SFT"], 0)[0].mean().item(),
        bar=95,
        better=">=",
        unit="%",
        seeds=RUNS[:runs],
    )
    for name in ("SFT", "SFT, a tenth of A replayed") if evidence.full else ():
        evidence(
            "foundations/forgetting",
            f"Success on nine tenths of A that are never replayed: {name}",
            value=mean(others[name]),
            bar=60,
            unit="%",
            seeds=RUNS[:runs],
            spread=others[name],
            note="When B first reaches 95 %. The tenth itself is left out.",
        )
    for low, high in zip(at["SFT"], at["policy gradient"], strict=True):
        assert low < 0.6 < 0.9 < high
    for low, high in zip(at["SFT"], at["SFT on the nearest solution"], strict=True):
        assert low + 0.3 < high
    if evidence.full:
        assert mean(at["SFT, all of A replayed"]) > 0.9 > 0.7 > mean(at["SFT, a tenth of A replayed"])
        assert mean(at["SFT, KL to the start on A"]) > 0.9


@pytest.mark.evidence
def test_the_capacity_was_there(evidence):
    """Both tasks at once, from the same start: so forgetting was not for want of room."""
    runs = 5 if evidence.full else 2
    s = start(runs)
    a, b, _, _ = train_on_b(s, losses(s)["SFT, all of A replayed"], 400 if evidence.full else 150)
    both = [100 * min(x, y) for x, y in zip(a[-1].tolist(), b[-1].tolist(), strict=True)]
    evidence(
        "foundations/forgetting",
        "Success on the worse of A and B, trained on both",
        value=mean(both),
        bar=94,
        better=">=",
        unit="%",
        seeds=RUNS[:runs],
        spread=both,
        note="The same network, start and demonstrations.",
    )


KINDS = ["fresh", "plain", "layer norm", "weight decay", "revive"]


@pytest.mark.evidence
def test_later_tasks_are_learnt_worse(evidence):
    """100 inputs with new random labels, 40 times; a fresh network learns each of them."""
    runs, tasks = (5, 40) if evidence.full else (2, 10)
    ends = {}
    for how in KINDS if evidence.full else KINDS[:2]:
        count = tasks if evidence.full or how != "fresh" else 2  # fresh ones are all alike
        accuracy, lost = original.learn_tasks(how, tasks=count, runs=runs, seed=21)
        ends[how] = (100 * accuracy[-5:].mean(0)).tolist()
        gone = 100 * lost[-5:].mean(0)
        evidence(
            "foundations/forgetting",
            f"Accuracy on the last five of {tasks} tasks: {how}",
            value=mean(ends[how]),
            bar={"fresh": 99, "plain": 60 if evidence.full else 92}.get(how),
            better="<=" if how == "plain" else ">=",
            unit="%",
            seeds=RUNS[:runs],
            spread=ends[how],
            note=f"100 steps of Adam a task; {gone.mean():.0f} % of the hidden units dead at the end. "
            "Always the commonest of the 100 random labels: 15 %.",
            curve={"x": list(range(1, count + 1)), "y": {"accuracy": accuracy.T.tolist(), "dead": lost.T.tolist()}},
        )
    gap = 30 if evidence.full else 5
    assert all(a < b - gap for a, b in zip(ends["plain"], ends["fresh"], strict=True))


def test_what_a_constant_answer_earns():
    """The commonest of 100 random labels out of ten: 15 %, which is where the plain network ends."""
    labels = torch.randint(0, 10, (5_000, 100), generator=generator())
    assert nn.functional.one_hot(labels, 10).sum(1).amax(-1).float().mean().item() == pytest.approx(15.1, abs=0.15)


def test_the_demo_runs(capsys, monkeypatch):
    monkeypatch.setattr(original, "learn_tasks", functools.partial(original.learn_tasks, steps=2))
    original.main()
    assert "revive" in capsys.readouterr().out


def test_the_distance_of_the_nearest_solution():
    """The share of the reference's chance on right answers is what the least KL depends on, and nothing else."""
    ref = random_logps(30, 4, 10)
    right = torch.arange(10) % 2 == torch.arange(4)[:, None] % 2
    near = original.nearest_solution(ref, right.int())
    assert_close(
        original.kl_to(near.clamp(min=1e-300).log()[None], ref[None])[0], -(ref.exp() * right).sum(-1).log().mean()
    )
    assert math.isfinite(near.sum())
