"""The leaderboard: every method through the same trials. `make leaderboard` measures all of it again.

What is measured is written into the evidence of each method's own snippet, as checks that begin with "Leaderboard,";
the page draws its tables from there.
"""

import importlib.util
import math
import statistics
from pathlib import Path

import pytest
import torch

import measured
from benchmarks import leaderboard, methods, steps
from benchmarks.methods import METHODS
from snippets.worlds import arithmetic, exact

ROOT = Path(__file__).resolve().parents[2]
BASE = {"rlhf": "GRPO", "preferences": "DPO"}  # what the time of a step is compared with
torch.set_num_threads(1)


def entries():
    return [pytest.param(entry, id=entry.name) for entry in METHODS]


def curve(label, x, rows, ylabel):
    return {"x": x, "y": {label: rows}, "xlabel": "step", "ylabel": ylabel}


@pytest.mark.parametrize("entry", entries())
def test_in_the_exact_world(entry, evidence):
    if not evidence.full:
        trial = leaderboard.exact_trial(entry, 0, steps=100)
        world = exact.make_world(0)
        start = exact.distance(world, world.ref_logits)
        assert trial.curve[0] == (0, pytest.approx(start)) and trial.curve[-1][0] == 100
        assert trial.to_optimum == pytest.approx(exact.distance(world, trial.logits))
        again = leaderboard.exact_trial(entry, 0, steps=100)
        assert torch.equal(trial.logits, again.logits)  # a function of its seed
        return
    runs = [leaderboard.exact_trial(entry, seed) for seed in range(5)]
    common = {"seeds": list(range(5)), "command": "make leaderboard"}
    series = [[y for _, y in run.curve] for run in runs]
    nats = curve(entry.name, [x for x, _ in runs[0].curve], series, "KL(π‖π*), nats")
    for what, name, unit, drawn in (
        ("KL(π‖π*)", "to_optimum", "nats", nats),
        ("KL(π*‖π)", "from_optimum", "nats", None),
        ("share of the optimal gain", "share", "", None),
        ("E[r]", "reward", "", None),
        ("KL(π‖π_ref)", "from_reference", "nats", None),
    ):
        values = [getattr(run, name) for run in runs]
        value = statistics.mean(values)
        check = f"Leaderboard, {entry.name}: {what}"
        evidence(entry.snippet, check, value=value, unit=unit, spread=values, curve=drawn, **common)


@pytest.mark.parametrize("entry", entries())
def test_on_arithmetic(entry, evidence, tmp_path):
    if not evidence.full:
        changes = {"steps": 2, "eval_every": 2, "sampled_prompts": 64}
        if entry.family == "rlhf":
            changes = {"steps": 2, "eval_every": 2, "prompts": 4}
        run = leaderboard.arithmetic_trial(entry, 0, **changes)
        assert run["step"] == [0, 2] and run["accuracy"][0] == pytest.approx(0.452, abs=0.001)
        start = dict(arithmetic.warm_start()[0].named_parameters())
        moved = [name for name, p in run["policy"].named_parameters() if not torch.equal(p, start[name])]
        assert moved
        return
    runs = [leaderboard.arithmetic_trial(entry, seed) for seed in range(5)]
    ends = [run["accuracy"][-1] for run in runs]
    drawn = curve(entry.name, runs[0]["step"], [run["accuracy"] for run in runs], "greedy held-out exact match")
    evidence(
        entry.snippet,
        f"Leaderboard, {entry.name}: greedy exact match",
        value=statistics.mean(ends),
        seeds=list(range(5)),
        spread=ends,
        curve=drawn,
        note=f"From {runs[0]['accuracy'][0]:.3f}; {leaderboard.ARITHMETIC_STEPS} steps.",
        command="make leaderboard",
    )


@pytest.mark.parametrize("entry", entries())
def test_what_a_step_costs(entry, evidence):
    """CPU time beside the family's base, in turn; peak memory in a process of its own."""
    if not evidence.full:
        return pytest.skip("a cost is measured, not asserted: in full only")
    base = BASE[entry.family]
    ratio = 1.0
    if entry.name != base:
        times = steps.compare(entry.name, base, steps=18, prompts=16, skip=3)
        own, other = (statistics.median(values) for values in times.values())
        ratio = own / other
    peak = steps.peak_memory(entry.name, steps=10, prompts=16)
    common = {"command": "make leaderboard"}
    check = f"Leaderboard, {entry.name}: CPU time of a step, in steps of {base}"
    evidence(entry.snippet, check, value=ratio, unit="times", **common)
    evidence(entry.snippet, f"Leaderboard, {entry.name}: peak memory of a step", value=peak, unit="MB", **common)


def test_every_adapter_is_on_the_leaderboard():
    """A method that has an adapter and does not stand in the table would be left out in silence."""
    for family in ("rlhf", "preferences"):
        for path in (ROOT / "snippets" / family).glob("*.py"):
            if "def algorithm()" in path.read_text(encoding="utf-8"):
                assert f"{family}/{path.stem}" in {entry.snippet for entry in METHODS}, path
    assert len({entry.name for entry in METHODS}) == len(METHODS)
    with pytest.raises(ValueError, match="no method 'DQN'; there are REINFORCE, "):
        methods.method("DQN")


def test_modules_are_there():
    for entry in METHODS:
        assert importlib.util.find_spec(f"snippets.{entry.snippet.replace('/', '.')}"), entry


def test_the_table_of_needs_is_what_the_adapters_ask_for():
    """The table of the page that says which method to take, row by row against the adapters."""
    page = (ROOT / "docs/compare/which.md").read_text(encoding="utf-8")
    lines = page.split("## What each one needs")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    named = {row[0]: row[1:] for row in rows[1:]}
    wanted = {}
    for entry in METHODS:
        asks, settings = entry.algorithm(), entry.algorithm().settings(**entry.changes)
        if entry.family == "rlhf":
            also = "a greedy response a prompt" if asks.greedy else "nothing"
            also = "a group of responses" if settings.group > 1 else also
            trained = "policy, critic" if asks.critic_loss else "policy"
            wanted[entry.name] = ["rewards", trained, "for the KL", also]
            continue
        learns, reference, also = "pairs", "stored numbers" if asks.reference else "none", "nothing"
        if asks.vocab_kl:
            reference, also = "at every step", "the reference's logits over the vocabulary"
        if asks.mismatched:
            learns, reference, also = "ratings", "at every step", "responses of other prompts"
        if settings.refresh:
            learns, reference, also = "labelled samples", "at every step", "a judge"
        wanted[entry.name] = [learns, "policy", reference, also]
    for name, base in {"Dr. GRPO": "GRPO", "DAPO": "GRPO", "GSPO": "GRPO", "cDPO": "DPO", "Robust DPO": "DPO"}.items():
        assert wanted.pop(name) == wanted[base]  # settings of the same method: no row of their own
    assert wanted.pop("REINFORCE++-baseline")[3] == "a group of responses"
    wanted["REINFORCE++"][3] = "a group for its baseline variant"  # plain, it takes any batch
    assert named == wanted


def reward_possible(world, kl: float) -> float:
    """The largest E[r] at this KL(pi || pi_ref): that of pi_ref * exp(r / beta), for the beta that has this KL."""
    low, high = -6.0, 8.0  # log beta: the KL falls as beta grows
    for _ in range(60):
        middle = (low + high) / 2
        best = exact.optimal_policy(world.ref_logps, world.rewards, math.exp(middle))
        low, high = (middle, high) if exact.kl(best, world.ref_logps).mean() > kl else (low, middle)
    return (best.exp() * world.rewards).sum(-1).mean().item()


def test_who_stands_on_the_line_of_the_page():
    """What the page says of reward against KL, from the stored evidence: which share of the gain is missed."""
    missed = {}
    for entry in METHODS:
        checks = {check["check"]: check for check in measured.load(ROOT, entry.snippet)["checks"]}
        rewards, kls = (checks[f"Leaderboard, {entry.name}: {what}"]["spread"] for what in ("E[r]", "KL(π‖π_ref)"))
        shares = []
        for seed, (reward, kl) in enumerate(zip(rewards, kls, strict=True)):
            world = exact.make_world(seed)
            start = (world.ref_logps.exp() * world.rewards).sum(-1).mean().item()
            possible = reward_possible(world, kl)
            assert reward < possible + 1e-3  # nobody beats the line
            shares.append((possible - reward) / (possible - start))
        missed[entry.name] = statistics.mean(shares)
    on = {"REINFORCE", "ReMax", "RLOO", "PPO", "CISPO", "REINFORCE++", "RAFT"}
    assert all(missed[name] < 0.005 for name in on)
    assert all(missed[name] > 0.05 for name in ("GRPO", "Dr. GRPO", "DAPO", "GSPO"))
    near = {"Online DPO", "cDPO", "DPO", "IPO", "TDPO2"}
    assert all(0.005 < missed[name] < 0.07 for name in near), missed
    assert min(missed["SimPO"], missed["DPOP"]) > 0.15
