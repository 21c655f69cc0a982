"""Interview pages: one form for all questions, and nothing named that is not there.

    ## Why …? { #slug }

    ??? question "Answer · core"

        **In 30 seconds.** 60 to 110 words.

        **Derivation and code.** With a link to a place on a page.

        **Follow-ups.**

        - *Question?* Answer.            (two or three)

        **Common wrong answer.** "…" Why it is wrong.

        **Level.** core · **References.** [@key]        (and where somebody asked it: · asked in [@key])
"""

import ast
import functools
import re
from collections import Counter
from pathlib import Path

import pytest
from markdown.extensions.toc import slugify

import bibliography  # hooks/, on the path by conftest.py

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(p for p in (DOCS / "interview").glob("*.md") if p.stem not in ("index", "pitfalls"))
PARTS = ["In 30 seconds", "Derivation and code", "Follow-ups", "Common wrong answer", "Level"]
LEVELS = ("screen", "core", "deep")
TEST = re.compile(r"`(tests/[\w/]+\.py)::([^`]*)`")
KEYS = r"(?: \[@[\w-]+\])+"
CITATION = re.compile(r"\[@([\w-]+)\]")


def questions(text):
    """(heading line, body) of each level-2 section, fences left alone."""
    found, fence = [], False
    for line in text.splitlines():
        fence ^= line.lstrip().startswith("```")
        if line.startswith("## ") and not fence:
            found.append((line, []))
        elif found:
            found[-1][1].append(line)
    return [(heading, "\n".join(lines).strip("\n")) for heading, lines in found]


def slug(heading):
    match = re.search(r"\{ *#([^\s}]+) *\}\s*$", heading)
    return match[1] if match else ""


def parts(body):
    """{name: text} of the fixed parts, in the order in which they stand."""
    marks = list(re.finditer(r"^    \*\*([^*\n]+)\.\*\*", body, re.M))
    ends = [mark.start() for mark in marks[1:]] + [len(body)]
    return [(mark[1], body[mark.end() : end].strip()) for mark, end in zip(marks, ends, strict=True)]


def links(text):
    """(file, anchor) of each link to a place on a page of the site."""
    return re.findall(r"\]\((?!https?://)([^)\s#]*)#([^)\s]*)\)", text)


def faults(heading, body):
    """What is wrong with the form of one question."""
    wrong = []
    if not re.fullmatch(r"## .+\? \{ #[a-z0-9]+(-[a-z0-9]+)* \}", heading):
        wrong.append('the heading is not "## Question? { #slug }"')
    summary = re.match(r'\?\?\? question "Answer · (\w+)"\n', body)
    if not summary:
        return [*wrong, 'the answer does not begin with ??? question "Answer · level"']
    rest = body[summary.end() :]
    if any(line and not line.startswith("    ") for line in rest.splitlines()):
        wrong.append("a line stands outside the folded answer")
    found = parts(rest)
    if [name for name, _ in found] != PARTS:
        return [*wrong, f"the parts are {[name for name, _ in found]}"]
    text = dict(found)
    words = len(text["In 30 seconds"].split())
    if not 60 <= words <= 110:
        wrong.append(f"the spoken answer has {words} words")
    if not links(rest):
        wrong.append("no link to a place on a page")
    items = re.findall(r"^ {4}- (.*)$", "    " + text["Follow-ups"], re.M)
    if not 2 <= len(items) <= 3 or not all(re.match(r"\*\S.*?\?\* \S", item) for item in items):
        wrong.append("not two or three follow-ups of the form *Question?* Answer.")
    if not re.match(r"[\"“].+?[\"”] \S", text["Common wrong answer"], re.S):
        wrong.append("the wrong answer is not a quotation followed by what is wrong with it")
    for name in ("Derivation and code", "Common wrong answer"):
        if not (TEST.search(text[name]) or CITATION.search(text[name]) or links(text[name])):
            wrong.append(f"{name}: backed by no test, citation or link")
    level = re.fullmatch(rf"(\w+) · \*\*References\.\*\*({KEYS})(?: · asked in({KEYS}))?", text["Level"])
    if not level:
        wrong.append('the last part is not "**Level.** core · **References.** [@key]"')
    elif level[1] != summary[1] or level[1] not in LEVELS:
        wrong.append(f"the levels are {summary[1]} and {level[1]}")
    return wrong


@functools.cache
def anchors(page):
    """The places of a page that a link can name: headings, and the code that it embeds."""
    found = {"": 1}
    text = page.read_text(encoding="utf-8")
    for line in text.splitlines():
        if match := re.match(r"#{1,6} (.+)$", line):
            found[slug(line) or slugify(re.sub(r"[*`]|\{.*\}", "", match[1]), "-")] = 1
    for attributes in re.findall(r"\{:?[^}\n]*#([\w-]+)[^}\n]*\}", text):
        found[attributes] = 1
    for name in re.findall(r'--8<-- "snippets/[^":]+:(\w+)"', text):
        found[f"code-{name}"] = 1
    return set(found)


@functools.cache
def functions_of(file):
    """The test functions of a file, those in classes as `Class::test`."""
    found = set()
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return {name for name in found if name.split("::")[-1].startswith("test")}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_question_has_its_fixed_parts(page):
    found = questions(page.read_text(encoding="utf-8"))
    assert found
    wrong = [f"{heading}: {fault}" for heading, body in found for fault in faults(heading, body)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", [*PAGES, DOCS / "interview/index.md"], ids=lambda p: p.stem)
def test_links_lead_to_places_that_exist(page):
    wrong = []
    for file, anchor in links(page.read_text(encoding="utf-8")):
        target = (page.parent / file).resolve() if file else page
        if target.suffix == ".md" and (not target.is_file() or anchor not in anchors(target)):
            wrong.append(f"{file}#{anchor}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", [*PAGES, DOCS / "interview/index.md"], ids=lambda p: p.stem)
def test_named_tests_exist(page):
    wrong = []
    for file, name in TEST.findall(page.read_text(encoding="utf-8")):
        if not (ROOT / file).is_file() or re.sub(r"\[.*", "", name) not in functions_of(file):
            wrong.append(f"{file}::{name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_citations_are_in_the_bibliography(page):
    keys = bibliography.read(ROOT / "references.bib")[0]
    assert not set(CITATION.findall(page.read_text(encoding="utf-8"))) - set(keys)


def test_there_are_at_least_forty_questions_and_each_has_its_own_address():
    slugs = [slug(heading) for page in PAGES for heading, _ in questions(page.read_text(encoding="utf-8"))]
    assert len(slugs) >= 40
    assert not [name for name, count in Counter(slugs).items() if count > 1]


# The checker itself.

HEADING = "## Why is it so? { #why-so }"
BODY = f"""??? question "Answer · core"

    **In 30 seconds.** {"word " * 70}

    **Derivation and code.** $x$, as in [`f`](../a.md#f): `tests/a/test_a.py::test_f`.

    **Follow-ups.**

    - *One?* Yes.
    - *Two?* No.

    **Common wrong answer.** "It is not so." It is [@key].

    **Level.** core · **References.** [@key] [@other2020key]
"""
BREAKS = [
    ("Answer · core", "Answer · deep", "levels"),
    ("Answer · core", "Answer", "does not begin"),
    ("**Level.** core", "**Level.** hard", "levels"),
    ("word " * 70, "word " * 40, "40 words"),
    ("word " * 70, "word " * 140, "140 words"),
    ("    **Follow-ups.**", "    **More.**", "the parts are"),
    ("    - *Two?* No.\n", "", "two or three"),
    ("    - *Two?* No.\n", "    - *Two?* No.\n    - *Three?* No.\n    - *Four?* No.\n", "two or three"),
    ("*Two?* No.", "Two? No.", "two or three"),
    ("../a.md#f", "../a.md", "no link"),
    ("as in [`f`](../a.md#f): `tests/a/test_a.py::test_f`", "as is well known", "backed by no"),
    ("It is [@key].", "It is.", "backed by no"),
    ('"It is not so." It is [@key].', "It is [@key].", "quotation"),
    (" · **References.** [@key] [@other2020key]", "", "last part"),
    ("    - *One?* Yes.", "- *One?* Yes.", "outside"),
]


def test_the_form_above_has_no_faults():
    assert faults(HEADING, BODY) == []
    assert questions(f"# Title\n\n{HEADING}\n\n{BODY}\n## Two? {{ #two }}\n")[0] == (HEADING, BODY.strip("\n"))


@pytest.mark.parametrize(("old", "new", "fault"), BREAKS)
def test_each_break_of_the_form_is_found(old, new, fault):
    assert BODY.count(old) == 1
    assert any(fault in wrong for wrong in faults(HEADING, BODY.replace(old, new)))


@pytest.mark.parametrize("heading", ["## Why is it so?", "## Why it is so { #why-so }", "## Why? { #Why_So }"])
def test_a_heading_that_is_no_question_with_an_address_is_found(heading):
    assert any("heading" in wrong for wrong in faults(heading, BODY))
