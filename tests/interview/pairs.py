"""What the tests of the pitfalls share: each wrong function fails, the right one holds, and both are measured."""

import ast
import functools
import statistics
from pathlib import Path

SEEDS = [0, 1, 2, 3, 4]


@functools.cache
def measured(pitfalls, function: str, seed: int) -> dict:
    """{what: (wrong, right, unit)} of one measure_ function of a module."""
    return getattr(pitfalls, function)(seed)


def measures(pitfalls) -> list[str]:
    return [name for name in dir(pitfalls) if name.startswith("measure_")]


def check_pair(evidence, pitfalls, case: tuple, *, chance: bool) -> None:
    """Wrong and right meet their bars, and differ the same way on every seed; several seeds where there is chance."""
    function, what, wrong_bar, right_bar = case
    seeds = SEEDS if evidence.full and chance else SEEDS[:1]
    results = [measured(pitfalls, function, seed)[what] for seed in seeds]
    wrong, right = [result[0] for result in results], [result[1] for result in results]
    for label, values, (better, bar) in (("wrong", wrong, wrong_bar), ("right", right, right_bar)):
        evidence(
            pitfalls.__name__.removeprefix("snippets.").replace(".", "/"),
            f"{what}: {label}",
            value=statistics.mean(values) + 0.0,  # no -0
            bar=bar,
            better=better,
            unit=results[0][2],
            seeds=seeds,
            spread=values if len(values) > 1 else None,
        )
    worse = max if statistics.mean(wrong) > statistics.mean(right) else min
    assert all(worse(w, r) == w and w != r for w, r in zip(wrong, right, strict=True))


def check_module(pitfalls, cases: list[tuple], capsys, *, without_bar: frozenset = frozenset()) -> None:
    """Every measurement has a case, the demo prints each, and what is wrong says so, with the right one behind it."""
    found = {(name, what) for name in measures(pitfalls) for what in measured(pitfalls, name, 0)}
    assert found - without_bar == {(function, what) for function, what, *_ in cases}

    pitfalls.main()
    printed = capsys.readouterr().out
    assert all(what in printed for _, what in found)

    source = Path(pitfalls.__file__).read_text(encoding="utf-8")
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    wrong = [node for node in functions if node.name.endswith("_wrong")]
    assert wrong
    for node in wrong:
        assert ast.get_docstring(node).startswith("WRONG"), node.name
        after = functions[functions.index(node) + 1]
        assert not ast.get_docstring(after).startswith("WRONG"), f"{node.name} has no right one behind it"
