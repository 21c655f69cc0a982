"""The evidence hook and fixture: numbers on pages are measured ones, and no page keeps what its code outgrew."""

import json
import re
import subprocess
import sys
from html import unescape

import pytest

import measured

from .trial import ROOT

SNIPPET = '''"""A loss."""

SCALE = 2.0


def loss(x: float) -> float:
    """Twice x."""
    from snippets.worlds.w import offset

    return SCALE * x + offset()  # why
'''
WORLD = "def offset():\n    return 0\n"


def check(**changes) -> dict:
    return {
        "check": "distance to the optimum",
        "value": 0.00412,
        "bar": 0.01,
        "better": "<=",
        "unit": "nats",
        "seeds": [0, 1, 2],
        "spread": [0.003, 0.0051, 0.0042],
        "machine": "A CPU, 2 cores",
        "date": "2026-01-02",
        "commit": "abc1234",
        "command": "make evidence SNIPPET=rlhf/m",
    } | changes


def store(project, name: str = "rlhf/m", **changes) -> None:
    """Write evidence as the tests do, for the code as it stands."""
    files = measured.snippet_files(project.base, name)
    now = measured.code_hash(project.base, files) if files else ""
    data = {"snippet": name, "hash": now, "checks": [check(**changes)]}
    project.write(f"docs/evidence/{name}.json", json.dumps(data))


@pytest.fixture
def proven(project):
    project.write("snippets/rlhf/m.py", SNIPPET)
    project.write("snippets/worlds/w.py", WORLD)
    project.page("rlhf/m.md", "<!-- evidence: rlhf/m -->")
    project.page("evidence/index.md", "<!-- evidence: index -->")
    store(project)
    return project


def test_the_box_shows_what_was_measured(proven):
    proven.build()
    html = proven.html("rlhf/m")
    row = re.search(r'<th scope="row">distance to the optimum</th>(.*?)</tr>', html)[1]
    assert re.sub("<.*?>", " ", row).split() == "0.00412 nats (0.003 to 0.0051) ≤ 0.01 nats 3 ✓ met".split()
    assert 'id="evidence-rlhf-m"' in html and "<code>make evidence SNIPPET=rlhf/m</code>" in html
    assert "2026-01-02, commit abc1234, A CPU, 2 cores" in html
    index = proven.html("evidence")
    assert '<table class="sortable evidence-table">' in index and '<button type="button">Value</button>' in index
    assert '<a href="../rlhf/m/#evidence-rlhf-m">rlhf/m</a>' in index and 'data-sort="0.00412"' in index


def test_a_long_box_folds_what_has_no_bar_and_nothing_else():
    import evidence

    kept = [check(check=f"bar {i}", bar=0.001 if i == 3 else 0.01) for i in range(12)]  # the fourth is missed
    loose = [check(check=f"loose {i}", bar=None) for i in range(9)]
    board = [check(check="Leaderboard, M: reward", bar=None)]
    html = evidence.box("rlhf/m", {"checks": kept + loose + board})
    shown, further, rest = html.split("<details>")
    assert all(f"bar {i}<" in shown for i in range(12)) and "missed" in shown and "loose" not in shown
    assert "<summary>9 further measurements</summary>" in further and all(f"loose {i}<" in further for i in range(9))
    assert "Leaderboard, M" in rest and "loose" not in rest
    assert "further" not in evidence.box("rlhf/m", {"checks": kept[:3] + loose + board})  # short enough
    only = evidence.box("rlhf/m", {"checks": loose * 3})
    assert only.split("<details>")[0].count("loose") == evidence.LONG and "11 further measurements" in only


def test_a_value_in_a_sentence(proven):
    proven.page("page.md", "It gets to <!-- evidence-value: rlhf/m | distance to the optimum --> of it.")
    proven.build()
    assert 'gets to <span class="evidence-value">0.00412 nats</span> of it.' in proven.html("page")


def test_a_value_in_a_table_leaves_its_columns_alone(proven):
    store(proven, unit="of |g|")
    value = "<!-- evidence-value: rlhf/m | distance to the optimum -->"
    proven.page("page.md", f"| a | b |\n|---|---|\n| {value} | last |")
    proven.build()
    cells = re.findall(r"<td>(?:<span.*?>)?(.*?)(?:</span>)?</td>", proven.html("page"))
    assert [unescape(cell) for cell in cells] == ["0.00412 of |g|", "last"]


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("snippets/rlhf/m.py", "SCALE * x +", "SCALE * x -"),
        ("snippets/rlhf/m.py", "2.0", "-2.0"),
        ("snippets/rlhf/m.py", "x: float", "x: int"),
        ("snippets/worlds/w.py", "return 0", "return 1"),
    ],
)
def test_a_change_of_behaviour_makes_evidence_stale(proven, path, old, new):
    file = proven.base / path
    proven.write(path, file.read_text().replace(old, new))
    text = proven.fails()
    assert "rlhf/m.md" in text and "snippets/rlhf/m.py" in text and "has changed since" in text
    assert "make evidence SNIPPET=rlhf/m" in text


def test_words_and_layout_do_not(proven):
    changed = SNIPPET.replace("Twice x.", "Two x.").replace("  # why", "").replace("A loss", "The loss")
    proven.write("snippets/rlhf/m.py", changed.replace("SCALE * x", "(SCALE\n * x)"))
    proven.build()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: (p.base / "docs/evidence/rlhf/m.json").unlink(), "there is no evidence for rlhf/m"),
        (lambda p: p.write("docs/evidence/rlhf/m.json", '{"checks": []}'), "holds no check"),
        (lambda p: store(p, value=0.02), "misses its bar <= 0.01"),
        (lambda p: p.page("rlhf/m.md", "Nothing."), "<!-- evidence: rlhf/m --> is missing"),
        (lambda p: p.page("page.md", "x <!-- evidence-value: rlhf/m | gone --> y"), "has no check 'gone'"),
        (lambda p: p.page("page.md", "x <!-- evidence: rlhf/m --> y"), "on a line of its own"),
        (lambda p: p.page("page.md", "<!-- evidence: rlhf/none -->"), "there is no evidence for rlhf/none"),
        (lambda p: (p.base / "snippets/worlds/w.py").unlink(), "has changed since"),
        (lambda p: store(p, "site/old") or p.write("docs/evidence/x/y.json", '{"checks": []}'), "x/y"),
    ],
)
def test_what_is_not_proven_fails_the_build(proven, change, said):
    change(proven)
    text = proven.fails()
    assert said in text and ".md:" in text, text


def test_evidence_without_a_bar_or_a_snippet(proven):
    store(proven, "site/site", bar=None, unit="s", value=12.0, spread=None, seeds=[])
    proven.page("site.md", "<!-- evidence: site/site -->")
    proven.build()
    assert "measured</span>" in proven.html("site") and "12 s" in proven.html("site")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.00412, "0.00412"),
        (0, "0"),
        (5e-07, "5e-7"),
        (0.15, "0.15"),
        (1.0, "1"),
        (123.4, "123"),
        (15000, "15,000"),
        (2.5e7, "2.5e7"),
    ],
)
def test_numbers_as_they_are_shown(value, shown):
    assert measured.show(value) == shown and measured.show(value, "s") == f"{shown} s"


def test_imports_are_followed_wherever_they_stand(tmp_path):
    for name, text in {
        "a": "import snippets.t.b\nfrom snippets.t import c, gone\nimport os",
        "b": "def f():\n    from .d import x",
        "c": "",
        "d": "from . import e",
        "e": "import snippets.t.a",
    }.items():
        (tmp_path / "snippets/t").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"snippets/t/{name}.py").write_text(text)
    assert measured.closure(tmp_path, ["snippets/t/a.py"]) == {f"snippets/t/{name}.py" for name in "abcde"}


# --- the fixture ----------------------------------------------------------------------------------------------------

TESTS = """
import pytest

@pytest.mark.parametrize("name", ["one", "two"])
def test_loss(evidence, name):
    evidence("rlhf/m", name, value=VALUE, bar=1.0, unit="s", seeds=range(5 if evidence.full else 1), spread=[VALUE])

def test_other():
    assert 1

@pytest.mark.evidence("rlhf/m")
def test_more(evidence):
    evidence("rlhf/m", "measured only", value=3)
"""


@pytest.fixture
def small(tmp_path):
    """A repository of one snippet and its test, with this one's conftest."""
    (tmp_path / "hooks").symlink_to(ROOT / "hooks")
    for path, text in {
        "snippets/rlhf/m.py": "X = 1\n",
        "tests/conftest.py": (ROOT / "tests/conftest.py").read_text(),
        "tests/rlhf/test_m.py": TESTS.replace("VALUE", "0.5"),
        "pyproject.toml": (ROOT / "pyproject.toml").read_text(),
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def pytest_in(base, *args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args]
    return subprocess.run(command, cwd=base, capture_output=True, text=True)


def recorded(base) -> list[dict]:
    return json.loads((base / "docs/evidence/rlhf/m.json").read_text())["checks"]


def test_a_short_run_asserts_and_writes_nothing(small):
    run = pytest_in(small)
    assert run.returncode == 0 and "4 passed" in run.stdout, run.stdout
    assert not (small / "docs").exists()
    (small / "tests/rlhf/test_m.py").write_text(TESTS.replace("VALUE", "1.5"))
    run = pytest_in(small)
    assert run.returncode == 1 and "misses its bar <= 1" in run.stdout, run.stdout


def test_an_evidence_run_records_and_replaces(small):
    run = pytest_in(small, "--evidence", "--snippet", "rlhf/m")
    assert run.returncode == 0 and "3 passed, 1 deselected" in run.stdout, run.stdout
    first = recorded(small)
    assert [c["check"] for c in first] == ["one", "two", "measured only"]
    assert first[0]["value"] == 0.5 and first[0]["seeds"] == [0, 1, 2, 3, 4] and first[0]["bar"] == 1.0
    assert first[0]["command"] == "make evidence SNIPPET=rlhf/m" and re.match(r"\d{4}-\d\d-\d\d$", first[0]["date"])
    assert "cores" in first[0]["machine"] and "Python" in first[0]["machine"] and first[0]["commit"]
    assert first[0]["hash"] == measured.code_hash(small, ["snippets/rlhf/m.py"])

    # renamed, gone, and kept: what was not run again keeps its own hash, and so stays stale
    (small / "snippets/rlhf/m.py").write_text("X = 2\n")
    text = TESTS.replace("VALUE", "0.25").replace('"two"]', '"three"]')
    (small / "tests/rlhf/test_m.py").write_text(text)
    run = pytest_in(small, "--evidence", "-k", "test_loss")
    assert run.returncode == 0, run.stdout
    assert [(c["check"], c["value"]) for c in recorded(small)] == [
        ("one", 0.25),
        ("measured only", 3.0),
        ("three", 0.25),
    ]
    assert [p for p in measured.problems(small, "rlhf/m") if "'one'" in p or "'three'" in p] == []
    assert any("'measured only'" in p and "has changed since" in p for p in measured.problems(small, "rlhf/m"))

    run = pytest_in(small, "--evidence")
    assert run.returncode == 0 and measured.problems(small, "rlhf/m") == []
    assert [c["check"] for c in recorded(small)] == ["one", "three", "measured only"]


def test_a_missed_bar_is_recorded_as_missed(small):
    (small / "tests/rlhf/test_m.py").write_text(TESTS.replace("VALUE", "1.5"))
    run = pytest_in(small, "--evidence")
    assert run.returncode == 1 and "MISSED" in run.stdout, run.stdout
    assert any("misses its bar" in problem for problem in measured.problems(small, "rlhf/m"))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("evidence('rlhf/none', 'a', value=1)", "there is no file snippets/rlhf/none.py"),
        ("evidence('rlhf/m', 'a', value=float('nan'))", "the value is nan"),
    ],
)
def test_a_record_that_means_nothing_is_refused(small, body, said):
    (small / "tests/rlhf/test_m.py").write_text(f"def test_a(evidence):\n    {body}\n")
    run = pytest_in(small, "--evidence")
    assert run.returncode == 1 and said in run.stdout, run.stdout


def test_two_tests_cannot_record_one_check(small):
    body = "def test_{}(evidence):\n    evidence('rlhf/m', 'same', value=1)\n"
    (small / "tests/rlhf/test_m.py").write_text(body.format("a") + body.format("b"))
    run = pytest_in(small, "--evidence")
    assert "test_a has recorded 'same' already" in run.stdout, run.stdout


def test_evidence_is_measured_in_one_process(small):
    run = pytest_in(small, "--evidence", "-n", "2")
    assert run.returncode != 0 and "one process" in run.stderr + run.stdout
