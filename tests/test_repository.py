"""The repository as a whole: its texts are true of it, and pages, snippets and tests belong together."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(p for p in (ROOT / "docs").rglob("*.md") if "overrides" not in p.parts)
SNIPPETS = sorted(p for p in (ROOT / "snippets").rglob("*.py") if not p.stem.startswith("__"))
EMBED = re.compile(r'^\s*--8<--\s+"(?P<path>snippets/[^":]+)(?::(?P<name>\w+))?"\s*$')
FENCE = re.compile(r"^[ \t]*(?P<ticks>`{3,}|~{3,})(?P<info>[^\n`]*)\n(?P<body>.*?)^[ \t]*(?P=ticks) *$", re.M | re.S)
INDENTED_PYTHON = re.compile(r"( {4}|\t)\s*(import \w|from [\w.]+ import |def \w+\(.*:$)")
MEBIBYTE = 2**20


def name(path):
    return path.relative_to(ROOT).as_posix()


def read(path):
    return path.read_text(encoding="utf-8")


def tracked():
    """The files that a clone has; in a copy without git, all but what a build leaves."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode == 0 and listing.stdout:
        return [ROOT / path for path in listing.stdout.split("\0") if path and (ROOT / path).is_file()]
    built = {".git", ".venv", "site", "runs", ".cache", "__pycache__", ".pytest_cache", ".ruff_cache"}
    return [p for p in ROOT.rglob("*") if p.is_file() and not built & set(p.relative_to(ROOT).parts)]


def blocks(text):
    """(language, body) of each fenced block of a Markdown text."""
    return [(re.sub(r"^\{?\s*\.?", "", m["info"].strip()).split(" ")[0], m["body"]) for m in FENCE.finditer(text)]


def embedded():
    """{snippet path: names embedded} over all pages; None stands for the whole file."""
    found = {}
    for page in PAGES:
        for _, body in blocks(read(page)):
            for line in body.splitlines():
                if match := EMBED.match(line):
                    found.setdefault(match["path"], set()).add(match["name"])
    return found


# Texts of the root.


@pytest.mark.parametrize("text", ["README.md", "CONTRIBUTING.md"])
def test_make_commands_in_texts_exist(text):
    """The other commands, and those on pages, are tried in tests/site/test_pages.py."""
    targets = set(re.findall(r"^([\w.-]+):(?!=)", read(ROOT / "Makefile"), re.M))
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", read(ROOT / text), re.M))
    assert {"site", "test"} <= named <= targets


@pytest.mark.parametrize("text", ["README.md", "CONTRIBUTING.md"])
def test_links_in_texts_lead_somewhere(text):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", read(ROOT / text)):
        assert (ROOT / target).is_file(), f"{text} links to {target}"
    for path in re.findall(r"`((?:docs|snippets|tests|hooks|benchmarks)/[\w./-]+)`", read(ROOT / text)):
        assert (ROOT / path).exists(), f"{text} names {path}"


def sections():
    parts = re.split(r"^## (.+)$", read(ROOT / "CONTRIBUTING.md"), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_contributing_is_short_and_each_part_names_its_tests():
    assert list(sections()) == ["Add a page", "Add a snippet", "Add a reference", "Add a question"]
    for title, body in sections().items():
        assert len([line for line in body.splitlines() if line.strip()]) < 10, title
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", body)
        assert named, f"{title}: names no test"
        for file, function in named:
            tree = ast.parse(read(ROOT / file))
            functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert function in functions, f"{title}: there is no {file}::{function}"


def test_citation_file():
    """The fields that the Citation File Format 1.2.0 requires, and a licence that agrees with the files."""
    cff = yaml.safe_load(read(ROOT / "CITATION.cff"))
    assert cff["cff-version"] == "1.2.0"
    assert cff["title"].startswith("Advantage") and cff["message"]
    assert cff["authors"] and all(author.get("name") or author.get("family-names") for author in cff["authors"])
    assert cff["license"] == "MIT"
    version = re.search(r'^version = "(.+)"$', read(ROOT / "pyproject.toml"), re.M)[1]
    assert cff["version"] == version


def test_licences():
    assert read(ROOT / "LICENSE").startswith("MIT License\n")
    prose = read(ROOT / "LICENSE-docs")
    assert "CC BY 4.0" in prose and "https://creativecommons.org/licenses/by/4.0/" in prose
    for text in ("README.md", "mkdocs.yml"):
        assert "MIT" in read(ROOT / text) and "CC BY 4.0" in read(ROOT / text)


# Pages, snippets, tests.


def test_every_snippet_has_a_page_and_a_test():
    assert SNIPPETS
    shown = embedded()
    for path in SNIPPETS:
        topic = path.relative_to(ROOT / "snippets").parent
        assert name(path) in shown, f"{name(path)}: no page embeds it"
        test = ROOT / "tests" / topic / f"test_{path.stem}.py"
        assert test.is_file(), f"{name(path)}: there is no {name(test)}"


def module_level_imports(tree):
    """Names of the modules that a file imports when it is imported: outside of functions and of `if __name__ ...`."""
    todo, found = list(tree.body), []
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append("." * node.level + (node.module or ""))
        elif isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            continue
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.For | ast.While | ast.ClassDef):
            todo += [child for child in ast.walk(node) if isinstance(child, ast.Import | ast.ImportFrom)]
    return found


def test_snippets_stand_alone():
    """A copied file runs without the rest; what the demos run on (worlds, loops, the model helper) is exempt."""
    ours = {p.name for p in ROOT.iterdir() if p.is_dir()} | {"conftest"}
    for path in SNIPPETS:
        if "worlds" in path.parts or path.stem in ("loop", "lm"):
            continue
        for module in module_level_imports(ast.parse(read(path))):
            mine = module.startswith(".") or module.split(".")[0] in ours
            assert not mine, f"{name(path)} imports {module} at module level"
        assert len(read(path).splitlines()) <= 200, f"{name(path)} has more than 200 lines"


def loose_python(text):
    """Lines of Python in a Markdown text that no hook took from a tested file."""
    loose = []
    for language, body in blocks(text):
        if re.match(r"(py|python|python3|py3|pycon|ipython)\b", language):
            lines = [line for line in body.splitlines() if line.strip()]
            loose += [line for line in lines if not EMBED.match(line)] if lines else ["(an empty python fence)"]
    rest = FENCE.sub("", text).splitlines()  # Markdown takes four spaces for code, too
    return loose + [line for line in rest if INDENTED_PYTHON.match(line)]


def test_python_on_pages_is_embedded():
    for page in PAGES:
        loose = loose_python(read(page))
        assert not loose, f"{name(page)}: python that is not embedded: {loose[0].strip()}"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('```python\n--8<-- "snippets/a/b.py:c"\n--8<-- "snippets/a/b.py:d"\n```\n', 0),
        ('??? note\n\n    ```{ .python #x }\n    --8<-- "snippets/a/b.py"\n    ```\n', 0),
        ("```text\nimport torch\n```\nWe import a law from physics.\n", 0),
        ('```python\n--8<-- "snippets/a/b.py:c"\nx = 1\n```\n', 1),
        ("```py\nx = 1\n```\n", 1),
        ("- a list\n\n  ~~~python title=x\n  x = 1\n  ~~~\n", 1),
        ("```python\n```\n", 1),
        ("Text:\n\n    import torch\n", 1),
    ],
)
def test_loose_python_is_found(text, found):
    assert len(loose_python(text)) == found


def test_every_page_describes_itself():
    """A description of its own, at most 160 characters, and exactly one title."""
    seen = {}
    for page in PAGES:
        front = re.match(r"---\n(.*?)\n---\n", read(page), re.S)
        meta = yaml.safe_load(front[1]) if front else {}
        description = meta.get("description", "")
        assert 40 <= len(description) <= 160, f"{name(page)}: a description of {len(description)} characters"
        assert description not in seen, f"{name(page)} and {seen.get(description)} have one description"
        seen[description] = name(page)
        titles = re.findall(r"^# .+$", FENCE.sub("", read(page)), re.M)
        assert len(titles) == 1, f"{name(page)}: {len(titles)} titles"


# Files.


def test_the_repository_stays_small():
    sizes = {name(path): path.stat().st_size for path in tracked()}
    assert sum(sizes.values()) < 40 * MEBIBYTE, sorted(sizes.items(), key=lambda item: -item[1])[:5]


def test_no_file_names_a_place_on_somebodys_machine():
    places = re.compile(r"(?<![\w.:/~-])/(?:ho" + r"me|Us" + r"ers|ro" + r"ot|wo" + r"rk|tmp/pl" + r"an)/[\w.-]+")
    for path in tracked():
        if "vendor" in path.parts:
            continue
        try:
            text = read(path)
        except UnicodeDecodeError:
            continue  # an image, a font, weights
        if match := places.search(text):
            line = text.count("\n", 0, match.start()) + 1
            raise AssertionError(f"{name(path)}:{line} names {match[0]}")
