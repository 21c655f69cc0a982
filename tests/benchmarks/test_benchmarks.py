"""The benchmarks run, small here and in full under `make bench`; no test asserts a time, the evidence does."""

import statistics

import pytest

from benchmarks import logit_memory, steps

SIZES = {"grpo": 16, "dpo": 16}  # prompts a step (times 8 responses), pairs a step


@pytest.mark.evidence("benchmarks/steps")
@pytest.mark.parametrize("method", ["grpo", "dpo"])
def test_a_step_beside_trl(method, evidence):
    count, skip = (43, 3) if evidence.full else (3, 1)
    times = steps.compare(method, steps=count, prompts=SIZES[method], skip=skip)
    assert {name: len(values) for name, values in times.items()} == {"ours": count - skip, "trl": count - skip}
    assert all(value > 0 for values in times.values() for value in values)
    if not evidence.full:
        return
    files = ["benchmarks/steps.py"]  # it imports all that it times
    name = method.upper()
    ours, theirs = (statistics.median(times[side]) for side in ("ours", "trl"))
    evidence(
        "benchmarks/steps",
        f"{name}: a TRL step takes so many of ours, median CPU time",
        value=theirs / ours,
        bar=1.1,
        better=">=",
        unit="times",
        files=files,
        note=f"1M parameters, {SIZES[method]} {'prompts × 8 responses' if method == 'grpo' else 'pairs'} a step, "
        f"{count - skip} steps each, in turn, one thread",
    )
    for side in ("ours", "trl"):
        evidence(
            "benchmarks/steps",
            f"{name}: CPU seconds a step, {side}",
            value=statistics.median(times[side]),
            unit="s",
            files=files,
        )
        peak = steps.peak_memory(method, side, steps=12, prompts=SIZES[method])
        evidence("benchmarks/steps", f"{name}: peak memory of a step, {side}", value=peak, unit="MB", files=files)


@pytest.mark.evidence("benchmarks/logit_memory")
def test_a_chunk_of_logits_at_a_time_takes_less(evidence):
    sizes = (
        {"vocab": 150_000, "rows": 8, "length": 128} if evidence.full else {"vocab": 20_000, "rows": 4, "length": 128}
    )
    peaks = logit_memory.compare(**sizes, chunk=64)
    ratio = peaks["chunked"] / peaks["plain"]
    assert ratio < 0.7
    if evidence.full:
        files = ["benchmarks/logit_memory.py", "snippets/worlds/lm.py"]
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
