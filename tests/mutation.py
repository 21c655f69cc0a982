"""Deliberate mistakes: a snippet's source with one thing changed, as a module of its own."""

import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load_mutant(path: str | Path, old: str, new: str) -> types.ModuleType:
    """The module at `path` (from the root), with `old` replaced by `new`. ValueError unless `old` stands there once."""
    source = (ROOT / path).read_text(encoding="utf-8")
    if source.count(old) != 1:
        raise ValueError(f"{path}: {old!r} occurs {source.count(old)} times, not once")
    name = "mutant_" + Path(path).stem
    module = types.ModuleType(name)
    module.__file__ = str(ROOT / path)
    sys.modules[name] = module  # a dataclass looks its own module up while it is made
    exec(compile(source.replace(old, new), str(path), "exec"), module.__dict__)
    return module


def caught_by(module: types.ModuleType, checks: Iterable[Callable[[types.ModuleType], None]]) -> list[str]:
    """The names of the checks that fail on the module: an assertion, or an error of the mutated code."""
    failed = []
    for check in checks:
        try:
            check(module)
        except (Exception, pytest.fail.Exception):
            failed.append(check.__name__)
    return failed
