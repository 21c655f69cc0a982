"""The benchmarks run, small here and in full under `make bench`; no test asserts a time, the evidence does."""

import statistics

import pytest

from benchmarks import logit_memory, methods, steps

ONLINE = {"RLOO", "GRPO", "Dr. GRPO", "DAPO", "GSPO", "CISPO"}
METHODS = sorted({methods.method(name).snippet for name in steps.TRL if name not in steps.OURS})
FILES = ["benchmarks/steps.py", *(f"snippets/{snippet}.py" for snippet in METHODS)]


@pytest.mark.evidence("benchmarks/steps")
@pytest.mark.parametrize("name", steps.TRL)
def test_a_step_beside_trl(name, evidence):
    count, skip = (33, 3) if evidence.full else (3, 1)
    times = steps.compare(name, f"TRL {name}", steps=count, prompts=16, skip=skip)
    assert {side: len(values) for side, values in times.items()} == {name: count - skip, f"TRL {name}": count - skip}
    assert all(value > 0 for values in times.values() for value in values)
    if not evidence.full:
        return
    ours, theirs = (statistics.median(values) for values in times.values())
    evidence(
        "benchmarks/steps",
        f"{name}: a TRL step takes so many of ours, median CPU time",
        value=theirs / ours,
        bar=1.0,
        better=">=",
        unit="times",
        files=FILES,
        note=f"1M parameters, 16 {'prompts × 8 responses' if name in ONLINE else 'pairs or examples'} a step, "
        f"{count - skip} steps each, in turn, one thread",
    )
    for side, values in times.items():
        owner = "TRL" if side.startswith("TRL") else "ours"
        seconds = statistics.median(values)
        evidence("benchmarks/steps", f"{name}: CPU seconds a step, {owner}", value=seconds, unit="s", files=FILES)
        peak = steps.peak_memory(side, steps=12, prompts=16)
        evidence("benchmarks/steps", f"{name}: peak memory of a step, {owner}", value=peak, unit="MB", files=FILES)


@pytest.mark.evidence("benchmarks/logit_memory")
def test_a_chunk_of_logits_at_a_time_takes_less(evidence):
    sizes = (
        {"vocab": 150_000, "rows": 8, "length": 128} if evidence.full else {"vocab": 20_000, "rows": 4, "length": 128}
    )
    peaks = logit_memory.compare(**sizes, chunk=64)
    ratio = peaks["chunked"] / peaks["plain"]
    assert ratio < 0.5
    if evidence.full:
        files = ["benchmarks/logit_memory.py", "benchmarks/memory.py", "snippets/worlds/lm.py"]
        evidence(
            "benchmarks/logit_memory",
            "Peak memory of 1,024 log-probabilities, chunked over plain, vocabulary 150k",
            value=ratio,
            bar=0.5,
            better="<=",
            unit="times",
            files=files,
        )
        for side, value in peaks.items():
            evidence("benchmarks/logit_memory", f"Peak memory, {side}", value=value, unit="MB", files=files)
