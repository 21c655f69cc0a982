"""The embed hook: what a page prints is the tested source, whole enough to run, or the build fails."""

import html
import re

import pytest

import embed

SNIPPET = '''"""A method (Author 2020), equation 1."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field

import collections.abc as abc

LIMIT = 20.0  # above this, exp overflows
OTHER = 3
# A pair of bounds,
# in nats.
LOW, HIGH = 0.0, LIMIT


@dataclass
class Settings:
    """What can be set."""

    beta: float = LIMIT
    names: list = field(default_factory=list)


def _clip(x: float) -> float:
    return min(max(x, LOW), HIGH)


# Why this is here.
def loss(x: float) -> float:
    """The loss. "quoted" and `ticks`."""
    return math.exp(_clip(x))


def unrelated(a: abc.Iterable) -> int:
    return OTHER + sys.maxsize


async def wait() -> None:
    pass


if __name__ == "__main__":
    OTHER = 4
    print(loss(1.0))
'''


@pytest.fixture
def snippet(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(SNIPPET)
    return path


def run(code: str) -> dict:
    space = {"__name__": "pasted"}
    exec(compile(code, "pasted", "exec"), space)
    return space


def test_a_function_comes_with_all_it_needs_and_no_more(snippet):
    code = embed.extract(snippet, ["loss"])
    assert run(code)["loss"](0.0) == 1.0
    assert code == (
        "from __future__ import annotations\n\nimport math\n\nLIMIT = 20.0  # above this, exp overflows\n"
        "# A pair of bounds,\n# in nats.\nLOW, HIGH = 0.0, LIMIT\n\n\n"
        "def _clip(x: float) -> float:\n    return min(max(x, LOW), HIGH)\n\n\n"
        "# Why this is here.\ndef loss(x: float) -> float:\n"
        '    """The loss. "quoted" and `ticks`."""\n    return math.exp(_clip(x))'
    )


def test_a_class_keeps_its_decorators_and_imports_only_what_it_uses(snippet):
    code = embed.extract(snippet, ["Settings"])
    assert "@dataclass\nclass Settings:" in code and "from dataclasses import dataclass, field" in code
    assert "import math" not in code and "HIGH" not in code
    assert embed.extract(snippet, ["wait"]).endswith("async def wait() -> None:\n    pass")


def test_a_constant_an_alias_and_several_names(snippet):
    assert run(embed.extract(snippet, ["HIGH"]))["HIGH"] == 20.0
    both = embed.extract(snippet, ["loss", "unrelated"])
    assert "import collections.abc as abc" in both and run(both)["unrelated"]([]) > 3
    assert "__main__" not in both


def test_a_quoted_annotation_brings_its_class_along(tmp_path):
    file = tmp_path / "m.py"
    file.write_text('def show(box: "Box | None") -> None:\n    pass\n\n\nclass Box:\n    pass\n', encoding="utf-8")
    assert "class Box:" in embed.extract(file, ["show"])


def shown(path, names):
    """The lines that stand on the page without a click, and what is said to come along."""
    parts = embed.pieces(path, names)
    fold, labels = embed.folded(parts)
    lines = "\n".join(text for text, _ in parts).split("\n")
    return [line for line, hide in zip(lines, fold, strict=True) if not hide], labels


def test_what_only_comes_along_is_folded_with_its_blank_lines(snippet):
    lines, labels = shown(snippet, ["loss"])
    assert lines[0] == "# Why this is here." and lines[-1] == "    return math.exp(_clip(x))" and len(lines) == 4
    assert labels == ["imports", "LIMIT", "HIGH", "LOW", "_clip"]
    lines, labels = shown(snippet, ["_clip", "loss"])  # two blank lines stay between what is shown
    assert lines[0].startswith("def _clip") and lines[2:5] == ["", "", "# Why this is here."] and "_clip" not in labels
    lines, _ = shown(snippet, ["LIMIT", "loss"])  # what is folded in between takes its own along
    assert lines[0].startswith("LIMIT") and lines[1:4] == ["", "", "# Why this is here."] and len(lines) == 7
    assert shown(snippet, []) == (SNIPPET.strip("\n").split("\n"), [])
    assert shown(snippet, ["OTHER"]) == (["OTHER = 3"], ["imports"])  # from __future__ comes along with all


def test_the_page_hides_what_comes_along_and_loses_nothing(project):
    project.write("snippets/rlhf/m.py", SNIPPET)
    project.page("page.md", fenced("snippets/rlhf/m.py:loss") + "\n??? note\n\n" + fenced("snippets/rlhf/m.py", "    "))
    project.build()
    first, whole = re.findall(r'<div id="code-.*?</code>', project.html("page"), re.S)
    assert 'aria-expanded="false">Copied along: imports, LIMIT, HIGH, LOW, _clip</button>' in first
    needed = re.findall(r'<span class="embed-needed">(.*?\n)</span>', first, re.S)
    assert len(needed) == 1 and "_clip" in needed[0] and "Why this is here" not in needed[0]
    plain = html.unescape(re.sub(r"<button.*?</button>|<[^>]+>", "", first))
    assert plain.strip("\n") == embed.extract(project.base / "snippets/rlhf/m.py", ["loss"])
    assert "embed-fold" not in whole and "embed-needed" not in whole


def test_the_whole_file_is_verbatim(snippet):
    assert embed.extract(snippet, []) == SNIPPET.strip("\n")


@pytest.mark.parametrize("name", ["gone", "math", "_clip2", "__name__"])
def test_an_unknown_name_is_named(snippet, name):
    with pytest.raises(embed.EmbedError, match=f"'{name}' in m.py .*loss"):
        embed.extract(snippet, [name])


def fenced(target: str, indent: str = "") -> str:
    return f'{indent}```python\n{indent}--8<-- "{target}"\n{indent}```\n'


def test_a_page_prints_the_source_and_links_to_it(project):
    project.write("snippets/rlhf/m.py", SNIPPET)
    project.write("tests/rlhf/test_m.py", 'def test_loss():\n    assert """\n```python\n"""\n')
    nested = "??? note\n    Text.\n\n" + fenced("snippets/rlhf/m.py:loss", "    ")
    links = "[whole](../snippets/rlhf/m.md#loss) [test](../tests/rlhf/test_m.md#test_loss) [here](#code-loss-2)"
    project.page("rlhf/page.md", fenced("snippets/rlhf/m.py:loss") + "\n" + nested + "\n" + links)
    project.build()
    page = project.html("rlhf/page")
    assert page.count('<span class="nf">loss</span>') == 2 and "--8&lt;--" not in page and "unrelated" not in page
    assert 'id="code-loss"' in page and 'id="code-loss-2"' in page and 'href="#code-loss"' in page
    assert 'href="../../snippets/rlhf/m/#loss"' in page and 'href="../../tests/rlhf/test_m/"' in page
    assert 'href="../../snippets/rlhf/m.py" download="m.py"' in page
    assert (project.base / "site/snippets/rlhf/m.py").read_text() == SNIPPET
    source = project.html("snippets/rlhf/m")
    assert 'id="loss"' in source and 'id="Settings"' in source and 'id="wait"' in source
    assert not re.search(r'<span [^>]*id=', source), "Material takes a span with an id for a line of code"
    assert "explained in" in source and 'href="../../../rlhf/page/"' in source
    assert 'id="test_loss"' in project.html("tests/rlhf/test_m")


def test_fences_of_other_languages_are_left_alone(project):
    project.page("page.md", '````text\n```python\n--8<-- "snippets/a/b.py:c"\n```\n````\n')
    project.build()
    assert '--8&lt;-- "snippets/a/b.py:c"' in project.html("page").replace("&quot;", '"')


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (fenced("snippets/rlhf/m.py:gone"), ["page.md", "snippets/rlhf/m.py", "gone"]),
        (fenced("snippets/rlhf/none.py:loss"), ["page.md", "snippets/rlhf/none.py", "loss"]),
        (fenced("snippets/rlhf/none.py"), ["page.md", "snippets/rlhf/none.py"]),
        (fenced("README.md"), ["page.md", "README.md"]),
        (fenced("../secret.py:x"), ["page.md", "../secret.py"]),
        ("```python\nx = 1\n```\n", ["page.md", "x = 1"]),
        ('```python\nimport os\n--8<-- "snippets/rlhf/m.py:loss"\n```\n', ["page.md", "import os"]),
        ("```{.python}\nx = 1\n```\n", ["page.md", "x = 1"]),
        ('--8<-- "snippets/rlhf/m.py:loss"\n', ["page.md", "inside a ```python fence"]),
        ("[x](snippets/rlhf/m.md#gone)\n", ["page.md", "does not contain an anchor '#gone'"]),
    ],
)
def test_what_cannot_be_embedded_fails_the_build(project, body, said):
    project.write("snippets/rlhf/m.py", SNIPPET)
    project.page("page.md", body)
    text = project.fails()
    assert all(part in text for part in said), text
