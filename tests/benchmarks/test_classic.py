"""The race of the foundations' agents runs, a sliver of it here, in full under `make bench`. No test asserts a time."""

import math
import statistics

import pytest

from benchmarks import classic

SEEDS = range(1000, 1005)  # the settings were chosen on others
RATIOS = {"PPO": ("SB3 PPO", 4.0), "SAC": ("SB3 SAC", 8.0)}
AT_MOST = {"TRPO": 2.0}  # seconds
MODULES = sorted({c.module for name, c in classic.CONTESTANTS.items() if name not in classic.ZOO})
FILES = ["benchmarks/classic.py", *(f"snippets/foundations/{module}.py" for module in MODULES)]


def of(task: str) -> list[str]:
    return [name for name, contestant in classic.CONTESTANTS.items() if contestant.task.name == task]


@pytest.mark.parametrize("name", classic.CONTESTANTS)
def test_a_contestant_is_judged_in_the_real_environment(name):
    result = classic.run(name, seed=3, share=0.01)
    assert result.steps > 0 and result.seconds > 0 and math.isfinite(result.mean)
    assert result.solved == (result.mean >= classic.CONTESTANTS[name].task.solved)


def test_the_clock_stands_while_a_policy_is_judged(monkeypatch):
    """A judge that is slow, and never content, does not change a contestant's seconds."""
    now = [0.0]
    monkeypatch.setattr(classic.time, "perf_counter", lambda: now[0])

    def slow(judge):
        now[0] += 1000.0
        return -math.inf, False

    monkeypatch.setattr(classic.loop.Judge, "__call__", slow)
    for name, share in (("PPO", 0.01), ("SB3 PPO", 0.0205), ("SB3 SAC", 0.0085)):  # enough for one look
        now[0] = 0.0
        assert classic.run(name, seed=3, share=share).seconds == 0.0 < now[0], name


def test_the_table_names_all_that_ran():
    fast, slow = classic.Result(1.0, 2048, 480.0, True), classic.Result(9.0, 4096, 20.0, False)
    rows = classic.table({"PPO": [fast, fast, slow], "SB3 PPO": [slow]}).splitlines()
    assert rows[1].split() == ["PPO", "CartPole-v1", "1.00", "1.00", "to", "9.00", "2048", "2/3"]
    assert rows[2].split() == ["SB3", "PPO", "CartPole-v1", "9.00", "9.00", "to", "9.00", "4096", "0/1"]


@pytest.mark.evidence("benchmarks/classic")
@pytest.mark.parametrize("task", ["CartPole-v1", "Pendulum-v1"])
def test_seconds_until_solved(task, evidence):
    names = of(task)
    if not evidence.full:
        assert set(names) >= {name for name in RATIOS if name in names} and len(names) >= 4
        return
    found = classic.compare(names, SEEDS)
    print("\n" + classic.table(found))
    record = {"files": FILES, "seeds": list(SEEDS), "command": "make bench"}
    medians = {name: statistics.median(result.seconds for result in results) for name, results in found.items()}
    for name, (peer, bar) in RATIOS.items():
        if name in found:
            evidence(
                "benchmarks/classic",
                f"{peer} takes so many times as long as {name}, medians",
                value=medians[peer] / medians[name],
                bar=bar,
                better=">=",
                unit="times",
                note="Stable-Baselines3 with the settings of RL Zoo, in the same run, turn by turn",
                **record,
            )
    for name, results in found.items():
        solved = sum(result.solved for result in results) / len(results)
        bar = None if name in classic.ZOO else 1.0
        evidence(
            "benchmarks/classic",
            f"{name}: share of runs that solve {task}",
            value=solved,
            bar=bar,
            better=">=",
            **record,
        )
        evidence(
            "benchmarks/classic",
            f"{name}: seconds until {task} is solved, median",
            value=medians[name],
            bar=AT_MOST.get(name),
            unit="s",
            spread=[result.seconds for result in results],
            note="one thread, evaluation not timed",
            **record,
        )
        evidence(
            "benchmarks/classic",
            f"{name}: environment steps until {task} is solved, median",
            value=statistics.median(result.steps for result in results),
            spread=[result.steps for result in results],
            **record,
        )
