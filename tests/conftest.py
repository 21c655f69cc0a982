"""What all tests share: a quiet, offline, one-thread setting; the `gpu` marker; and the `evidence` fixture.

    def test_reaches_the_optimum(evidence):
        evidence("rlhf/grpo", "KL to the optimum", value=kl, bar=0.01, better="<=", unit="nats", seeds=[0, 1, 2, 3, 4])

asserts that the value meets its bar. Under `make evidence` (pytest --evidence) it is also written to
docs/evidence/rlhf/grpo.json, from which the pages draw; `evidence.full` is True then, and a test runs all its seeds.
"""

import datetime
import functools
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

for _name, _value in {
    "OMP_NUM_THREADS": "1",  # tiny models are fastest on one thread, and the tests run two at a time
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
    "NO_MKDOCS_2_WARNING": "1",
}.items():
    os.environ.setdefault(_name, _value)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "hooks"))  # where the hooks find each other, as under mkdocs

import measured  # noqa: E402

_SHARED = ("tests.foundations.on_policy", "tests.preferences.losses", "tests.rlhf.common", "tests.trainers")
pytest.register_assert_rewrite(*_SHARED)


def pytest_addoption(parser):
    group = parser.getgroup("evidence")
    group.addoption("--evidence", action="store_true", help="run every check in full and write docs/evidence/**.json")
    group.addoption("--snippet", metavar="TOPIC/NAME", help="only the evidence of this snippet, or of this topic")


def pytest_configure(config):
    config.evidence = Record()
    if config.getoption("--snippet") and not config.getoption("--evidence"):
        raise pytest.UsageError("--snippet goes with --evidence")
    if config.getoption("--evidence") and getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("evidence is measured in one process: leave -n out")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("gpu") and not _cuda():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    config.evidence.collected = {item.nodeid for item in items}
    if not config.getoption("--evidence"):
        return
    wanted = config.getoption("--snippet")
    kept = [item for item in items if "evidence" in getattr(item, "fixturenames", ())]
    kept = [item for item in kept if not wanted or _about(item, wanted)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _about(item, wanted: str) -> bool:
    """Whether a test writes evidence of a snippet: by its marker, its place in the tree, or what it wrote before."""
    names = {arg for mark in item.iter_markers("evidence") for arg in mark.args}
    stored = measured.load(ROOT, wanted) or {"checks": []}
    path = item.path.relative_to(ROOT / "tests") if item.path.is_relative_to(ROOT / "tests") else item.path
    topic, _, name = wanted.partition("/")
    place = path.parts[0] == topic and (not name or f"{path.stem}_".startswith(f"test_{name}_"))
    return place or wanted in names or item.nodeid in {check.get("test") for check in stored["checks"]}


@functools.cache
def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.when == "call" and report.passed:
        item.config.evidence.passed.add(item.nodeid)


def pytest_sessionfinish(session):
    session.config.evidence.prune()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of a model that has learned nothing and of its tokenizer, as --model takes it: to be read only."""
    from snippets.worlds import arithmetic

    folder, tokenizer = tmp_path_factory.mktemp("model"), arithmetic.make_tokenizer()
    arithmetic.make_model(len(tokenizer), hidden=16, layers=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def evidence(request):
    return Evidence(request)


class Evidence:
    """Asserts that a measured value meets its bar and, under --evidence, records it."""

    def __init__(self, request):
        self.request = request
        self.full = bool(request.config.getoption("--evidence"))

    def __call__(
        self,
        snippet,
        check,
        *,
        value,
        bar=None,
        better="<=",
        unit="",
        seeds=(),
        spread=None,
        note="",
        curve=None,
        files=None,
        command=None,
        device=None,
    ):
        """Record `value` of `check` and assert that it meets `bar`, if there is one.

        snippet is "rlhf/grpo" for snippets/rlhf/grpo.py. Evidence about something else ("site/site", "benchmarks/grpo")
        names the `files` that it depends on, if any. spread: the value of each seed. device="cuda" adds the GPU to the
        machine. Raises ValueError where there is no such file, another test has recorded this check, or the unit is a
        remark.
        """
        value, bar = float(value), None if bar is None else float(bar)
        if not math.isfinite(value):
            raise ValueError(f"{snippet}, {check!r}: the value is {value}")
        if "(" in unit:  # it stands behind each value and bar of a narrow table
            raise ValueError(f"{snippet}, {check!r}: {unit!r} is no unit; what else there is to say belongs into note")
        result = {"check": check, "value": value, "bar": bar, "better": better, "unit": unit, "seeds": list(seeds)}
        if spread is not None:
            result["spread"] = [float(x) for x in spread]
        if self.full:
            command = command or f"make evidence SNIPPET={snippet}"
            today = datetime.date.today().isoformat()
            result |= {"machine": machine(device), "date": today, "commit": commit(), "command": command}
            result |= {"note": note} if note else {}
            result |= {"curve": curve} if curve else {}
            self.request.config.evidence.write(snippet, result, files, self.request.node.nodeid)
            state = "" if bar is None else f", bar {better} {bar:g}: {'met' if measured.meets(result) else 'MISSED'}"
            print(f"\n{snippet}: {check}: {value:g} {unit}{state}", flush=True)
        assert measured.meets(result), f"{snippet}, {check!r}: {value:g} {unit} misses its bar {better} {bar:g}"


class Record:
    """The evidence files, as one session of pytest changes them."""

    def __init__(self):
        self.collected: set[str] = set()  # all tests of the files that pytest looked at
        self.passed: set[str] = set()
        self.written: dict[str, dict[str, str]] = {}  # snippet -> check -> test

    def write(self, snippet, result, files, test):
        files = measured.snippet_files(ROOT, snippet) if files is None else list(files)
        if not files and snippet.split("/")[0] not in ("site", "benchmarks"):
            raise ValueError(f"there is no file snippets/{snippet}.py")
        mine = self.written.setdefault(snippet, {})
        if mine.setdefault(result["check"], test) != test:
            raise ValueError(f"{snippet}: {mine[result['check']]} has recorded {result['check']!r} already")
        result |= {"hash": measured.code_hash(ROOT, files) if files else "", "test": test}
        data = measured.load(ROOT, snippet) or {"checks": []}
        checks = data["checks"]
        at = next((i for i, check in enumerate(checks) if check["check"] == result["check"]), len(checks))
        checks[at : at + 1] = [result]
        self.save(snippet, {"snippet": snippet, "hash": result["hash"], "files": files, "checks": checks})

    def prune(self):
        """Drop what a test that ran, or is gone, recorded under a name that it no longer uses."""
        seen = {test.split("::")[0] for test in self.collected}

        def gone(test: str) -> bool:
            file = test.split("::")[0]
            return test in self.passed or not (ROOT / file).is_file() or (file in seen and test not in self.collected)

        for snippet, mine in self.written.items():
            data = measured.load(ROOT, snippet)
            checks = [c for c in data["checks"] if c["check"] in mine or not gone(c.get("test", ""))]
            if len(checks) == len(mine):  # all of it is new: it stands in the order of the tests
                checks.sort(key=lambda check: list(mine).index(check["check"]))
            self.save(snippet, data | {"checks": checks})

    @staticmethod
    def save(snippet, data):
        path = ROOT / "docs" / "evidence" / f"{snippet}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        checks = ",\n".join("  " + json.dumps(check, ensure_ascii=False) for check in data["checks"])
        head = ", ".join(f"{json.dumps(key)}: {json.dumps(data[key])}" for key in ("snippet", "hash", "files"))
        path.write_text(f'{{{head}, "checks": [\n{checks}\n]}}\n', encoding="utf-8")


@functools.cache
def machine(device: str | None = None) -> str:
    """Processor, cores, memory and versions: what a reader needs to compare times. No host name."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [cpu, f"{os.cpu_count()} cores", f"{memory:.0f} GiB"]
    if device == "cuda":
        import torch

        parts.append(torch.cuda.get_device_name())
    versions = f"Python {platform.python_version()}"
    try:
        versions += f", torch {importlib.metadata.version('torch')}"
    except importlib.metadata.PackageNotFoundError:
        pass
    return ", ".join([*parts, versions])


@functools.cache
def commit() -> str:
    """The commit that is checked out; a + where the snippets differ from it."""

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "snippets")
    return (git("rev-parse", "--short", "HEAD") or "none") + ("+" if changed else "")
