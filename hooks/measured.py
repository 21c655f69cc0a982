"""Evidence as it is stored: what a hash of code covers, and whether a measured value still counts.

Shared by the hook that draws evidence and by the tests that write it; it needs nothing but the standard library.
"""

import ast
import functools
import hashlib
import json
import operator
from pathlib import Path

COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "==": operator.eq}


def code_hash(base: Path, files: list[str]) -> str:
    """A hash of the behaviour of some files: python by its syntax tree, with all project files that it imports,
    docstrings and comments aside; other files by their bytes. The same on every version of Python."""
    digest = hashlib.sha256()
    for uri in sorted(closure(base, files)):
        body = (base / uri).read_bytes()
        digest.update(uri.encode() + b"\0" + (behaviour(body) if uri.endswith(".py") else sha(body)))
    return digest.hexdigest()[:16]


def closure(base: Path, files: list[str]) -> set[str]:
    """The files, and the project files that they import, at module level or inside functions, transitively."""
    found: set[str] = set()
    todo = list(files)
    while todo:
        uri = todo.pop()
        if uri in found:
            continue
        if not (base / uri).is_file():
            raise FileNotFoundError(f"there is no file {uri}")
        found.add(uri)
        if uri.endswith(".py"):
            todo += imports(base, uri)
    return found


def sha(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()


@functools.cache  # a file is part of many snippets' evidence, and parsing it takes longest
def behaviour(source: bytes) -> bytes:
    """The hash of a python file's syntax tree."""
    return sha(canonical(source.decode()).encode())


def imports(base: Path, uri: str) -> list[str]:
    """The project files that a python file names in its import statements."""
    files = [f"{module.replace('.', '/')}.py" for module in modules((base / uri).read_bytes(), Path(uri).parent)]
    return [file for file in files if (base / file).is_file()]


@functools.cache
def modules(source: bytes, folder: Path) -> list[str]:
    """The project's modules, and what may be one, in the import statements of a file in this folder."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = folder.parts
                module = ".".join([*package[: len(package) - node.level + 1], *([module] if module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return [module for module in found if module.split(".")[0] in ("snippets", "benchmarks")]


def canonical(source: str) -> str:
    """The syntax tree as text, without docstrings, positions, and fields that only some Python versions have."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:]
    return _dump(tree)


def _dump(node) -> str:
    if isinstance(node, ast.AST):
        fields = {name: value for name, value in ast.iter_fields(node) if name not in ("ctx", "kind")}
        parts = [f"{name}={_dump(fields[name])}" for name in sorted(fields) if fields[name] not in (None, [])]
        return f"{type(node).__name__}({','.join(parts)})"
    if isinstance(node, list):
        return f"[{','.join(map(_dump, node))}]"
    return f"{type(node).__name__}:{node!r}"


def snippet_files(base: Path, name: str) -> list[str]:
    """What evidence of this name measures: rlhf/grpo is snippets/rlhf/grpo.py; site/site is no snippet."""
    uri = f"snippets/{name}.py"
    return [uri] if (base / uri).is_file() else []


def load(base: Path, name: str) -> dict | None:
    """The stored evidence of a snippet; None where there is none."""
    path = base / "docs" / "evidence" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def problems(base: Path, name: str) -> list[str]:
    """Why the evidence of a snippet cannot be shown; empty where it can."""
    data = load(base, name)
    command = f"run: make evidence SNIPPET={name}"
    if data is None:
        return [f"there is no evidence for {name} (docs/evidence/{name}.json is missing); {command}"]
    if not data.get("checks"):
        return [f"docs/evidence/{name}.json holds no check; {command}"]
    files = data.get("files") or snippet_files(base, name)
    try:
        now = code_hash(base, files) if files else ""
    except (FileNotFoundError, SyntaxError) as error:
        return [f"the evidence for {name} is about code that cannot be read: {error}"]
    out = []
    for check in data["checks"]:
        label = f"{name}, {check['check']!r}"
        if check.get("hash", data.get("hash")) != now:
            what = " and ".join(files)
            out.append(f"{label}: {what} (or what it imports) has changed since this was measured; {command}")
        if not meets(check):
            bar = f"{check['better']} {show(check['bar'])}"
            out.append(f"{label}: measured {show(check['value'])}, which misses its bar {bar}")
    return out


def meets(check: dict) -> bool:
    """Whether a check's value meets its bar; True where it has none."""
    bar, value = check.get("bar"), check["value"]
    if bar is None:
        return True
    return COMPARE[check["better"]](value, bar)


def show(value, unit: str = "") -> str:
    """A number with as many digits as a reader can use."""
    if value is None:
        return "–"
    if value != value or value in (float("inf"), float("-inf")):
        text = str(value)
    elif value == 0 or (float(value).is_integer() and abs(value) < 1e6):
        text = f"{int(value):,}"
    elif abs(value) < 1e-3 or abs(value) >= 1e6:
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    elif abs(value) >= 100:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.3g}"
    return f"{text} {unit}".strip()
