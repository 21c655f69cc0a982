"""The pages as they stand: what they print runs, what they tell a reader to type works, and where they lead exists."""

import functools
import json
import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

import embed
from tests.site.trial import ROOT

PAGES = sorted((ROOT / "docs").rglob("*.md"))
SNIPPETS = sorted(p for p in (ROOT / "snippets").rglob("*.py") if p.stem not in ("__init__", "__main__"))
# Only these may use another file of the project at module level; the others stand alone when copied.
SHARED = [p for p in SNIPPETS if "worlds" in p.parts or p.stem in ("loop", "lm")]


def uri(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def embedded() -> list[tuple[str, str, tuple[str, ...]]]:
    """(page, file, names) of each embed of each page."""
    found = []
    for page in PAGES:
        for _, file, names in embed.embeds(page.read_text(encoding="utf-8")):
            if file:
                found.append((uri(page), file, tuple(names)))
    return found


RUN = """
import json, sys, types
for label, code in json.load(sys.stdin):
    module = types.ModuleType("pasted")
    module.__file__ = "pasted.py"
    sys.modules["pasted"] = module
    try:
        exec(compile(code, label, "exec"), module.__dict__)
    except BaseException as error:
        print(f"{label}: {type(error).__name__}: {error}")
"""


def test_what_is_copied_from_a_page_runs_in_an_empty_folder(tmp_path):
    """Each embed is executed on its own, outside the repository, and uses no name that it does not define."""
    shared = {uri(path) for path in SHARED}
    alone, beside = [], []
    for page, file, names in embedded():
        code = embed.extract(ROOT / file, list(names))
        (beside if file in shared else alone).append((f"{page}: {file}:{','.join(names)}", code))
    for cases, path in ((alone, ""), (beside, str(ROOT))):
        run = subprocess.run(
            [sys.executable, "-c", RUN],
            input=json.dumps(cases),
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0 and not run.stdout, run.stdout + run.stderr[-2000:]
    for number, (label, code) in enumerate(alone + beside):
        (tmp_path / f"embed_{number}.py").write_text(f"# {label}\n{code}\n", encoding="utf-8")
    lint = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--isolated",
        "--select",
        "F821,F822,F401",
        "--output-format",
        "full",
    ]
    run = subprocess.run([*lint, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


# --- commands -------------------------------------------------------------------------------------------------------


def commands(text: str) -> list[str]:
    """The lines of the bash fences of a text, without comments, continued lines joined."""
    lines = []
    for body in re.findall(r"^[ \t]*```\s*(?:bash|sh|shell|console)\b[^\n]*\n(.*?)^[ \t]*```", text, re.S | re.M):
        for line in body.replace("\\\n", " ").splitlines():
            if line.strip() and not line.strip().startswith("#"):
                lines.append(line.strip())
    return lines


def all_commands() -> dict[str, list[str]]:
    """Each command of the pages, README and CONTRIBUTING, and of the `Run:` lines of evidence, with where it stands."""
    where = defaultdict(list)
    for path in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for command in commands(path.read_text(encoding="utf-8")) if path.is_file() else []:
            where[command].append(uri(path))
    for path in sorted((ROOT / "docs/evidence").rglob("*.json")):
        for check in json.loads(path.read_text(encoding="utf-8"))["checks"]:
            where[check["command"]].append(uri(path))
    return where


def make_problem(words: list[str]) -> str:
    run = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
    snippet = next((word.partition("=")[2] for word in words if word.startswith("SNIPPET=")), "")
    if run.returncode:
        return run.stderr
    known = (ROOT / f"snippets/{snippet}.py").is_file() or snippet.split("/")[0] in ("", "site", "benchmarks")
    return "" if known else f"there is no snippet {snippet}"


# Demos without options that train for half a minute or more: here they need only be there, and their tests print them.
LONG = {f"snippets.rlhf.{name}" for name in ("arena_learning", "complex_instructions", "learn_from_feedback")}


@functools.cache
def help_of(module: str) -> subprocess.CompletedProcess:
    words = ["-c", f"from {module} import main"] if module in LONG else ["-m", module, "--help"]
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)


def module_problem(words: list[str]) -> str:
    """A demo exists, starts, and knows each option that the page gives it."""
    module, *rest = words
    if not (ROOT / f"{module.replace('.', '/')}.py").is_file():
        return f"there is no module {module}"
    run = help_of(module)
    known = set(re.findall(r"--[\w-]+", run.stdout))
    unknown = [word.partition("=")[0] for word in rest if word.startswith("--") and word.partition("=")[0] not in known]
    return run.stderr or f"no such option: {', '.join(unknown)}" if run.returncode or unknown else ""


def problem(command: str) -> str:
    """What is wrong with a command; empty where it works. A command of a kind that nothing here checks is wrong."""
    for part in re.split(r"\s*(?:&&|;)\s*", command):
        words = shlex.split(part, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        match words:
            case [] | ["cd", _] | ["git", "clone", _] | ["git", "clone", _, _]:
                found = ""
            case ["make", *rest]:
                found = make_problem(rest)
            case [python, "-m", module, *rest] if Path(python).name in ("python", "python3"):
                if module == "pytest":
                    found = "".join(
                        f"there is no {w}" for w in rest if "/" in w and not (ROOT / w.split("::")[0]).exists()
                    )
                else:
                    found = module_problem([module, *rest])
            case ["torchrun", *rest] if "-m" in rest:
                found = module_problem(rest[rest.index("-m") + 1 :])
            case ["pip", "install", *_] | [_, "-m", "pip", "install", *_]:
                found = ""
            case _:
                found = "nothing tests a command of this kind"
        if found:
            return found
    return ""


def test_commands_on_pages_work():
    wrong = [
        f"{', '.join(sorted(set(at)))}: {command}: {told}"
        for command, at in all_commands().items()
        if (told := problem(command))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "command",
    [
        "make nothing",
        "make evidence SNIPPET=rlhf/nothing",
        "python -m snippets.rlhf.nothing",
        "python -m snippets.worlds.knights_knaves --no-such-option",
        "python -m pytest tests/none/test_none.py",
        "rm -rf /",
        "make lint && curl example.org",
    ],
)
def test_a_command_that_does_not_work_is_found(command):
    assert problem(command)


# --- the built site -------------------------------------------------------------------------------------------------


def parsed(path: Path) -> tuple[set[str], list[str]]:
    """The anchors of a page, and the addresses that it links to or loads."""
    html = re.sub(
        r"<!--.*?-->|<script\b(?![^>]*\bsrc)[^>]*>.*?</script>", "", path.read_text(encoding="utf-8"), flags=re.S
    )
    anchors, links = set(), []
    for tag in re.findall(r"<[a-zA-Z][^>]*>", html):
        for name, _, value in re.findall(r"\s(id|name|href|src)=([\"']?)(.*?)\2(?=[\s>/])", tag):
            if name in ("id", "name"):
                anchors.add(unescape(value))
            else:
                links.append(unescape(value))
    return anchors, links


def test_every_link_inside_the_site_leads_somewhere(site):
    pages = {path.relative_to(site.folder).as_posix(): parsed(path) for path in site.folder.rglob("*.html")}
    wrong = []
    for page, (_, links) in pages.items():
        if page == "404.html":  # it is served at any address, so its links start at the root
            links = [link.lstrip("/") for link in links]
        for link in links:
            if urlsplit(link).scheme or link.startswith("//"):
                continue
            target = urlsplit(urljoin(f"http://x/{page}", link))
            path = unquote(target.path).lstrip("/")
            path = path + "index.html" if not path or path.endswith("/") else path
            if not (site.folder / path).is_file():
                wrong.append(f"{page}: {link}: there is no {path}")
            elif target.fragment and path in pages and unquote(target.fragment) not in pages[path][0] | {"__top"}:
                wrong.append(f"{page}: {link}: no such anchor")
    assert not wrong, "\n".join(wrong[:40])


def test_every_page_has_its_own_description_and_loads_only_from_the_site(site):
    seen: dict[str, str] = {}
    for path in site.folder.rglob("*.html"):
        html, name = path.read_text(encoding="utf-8"), path.relative_to(site.folder).as_posix()
        loaded = re.findall(r"<(?:script|img|iframe|source|video)\b[^>]*\bsrc=[\"']?((?:https?:)?//[^\"'\s>]+)", html)
        loaded += re.findall(
            r"<link\b[^>]*\brel=[\"']?(?!canonical)[\w ]+[\"']?[^>]*\bhref=[\"']?((?:https?:)?//[^\"'\s>]+)", html
        )
        assert not loaded, f"{name} loads {loaded}"
        if name != "404.html":
            description = re.search(r'<meta name="?description"? content="([^"]+)"', html)
            assert description, f"{name} has no meta description"
            assert seen.setdefault(description[1], name) == name, (
                f"{name} and {seen[description[1]]} share a description"
            )


def test_the_configuration_is_strict():
    """A build that only warns would let a page through that has lost its code, its source or its proof."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert re.search(r"^strict: true", text, re.M)
    assert all(f"{name}: warn" in text for name in ("not_found", "anchors", "absolute_links", "unrecognized_links"))
    assert "-q" not in (ROOT / "Makefile").read_text(encoding="utf-8").split("mkdocs build")[1].splitlines()[0]
