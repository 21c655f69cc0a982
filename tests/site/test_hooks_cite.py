"""The cite hook and references.bib: numbered links with back-links, and a failed build for each kind of mistake."""

import re

import pytest

import bibliography
import cite


def entry(key: str, **fields: str) -> str:
    """A sound entry; a field given as "" is left out."""
    base = {
        "title": f"The {{KL}} of {key}",
        "author": "Schulman, John and Wolski, Filip and Dhariwal, Prafulla",
        "year": "2017",
        "url": f"https://example.org/{key}",
        "langid": "english",
        "keywords": "rlhf, paper",
        "annotation": f"Why to read {key} & co.",
    }
    lines = [f"  {name} = {{{value}}}," for name, value in (base | fields).items() if value]
    return f"@article{{{key},\n" + "\n".join(lines) + "\n}\n\n"


def test_citations_are_numbered_in_order_with_links_both_ways(project):
    project.write("references.bib", entry("a2017x") + entry("b2018y"))
    project.page(
        "page.md", "## H [@b2018y]\n\nFirst [@b2018y], both [@a2017x; @b2018y].\n\n| t |\n|---|\n| [@a2017x] |"
    )
    project.build()
    html = project.html("page")
    assert re.findall(r'class="cite" id="([^"]+)" href="#ref-([^"]+)"[^>]*>(\d+)</a>', html) == [
        ("cite-b2018y-1", "b2018y", "1"),
        ("cite-b2018y-2", "b2018y", "1"),
        ("cite-a2017x-1", "a2017x", "2"),
        ("cite-b2018y-3", "b2018y", "1"),
        ("cite-a2017x-2", "a2017x", "2"),
    ]
    assert 'title="Schulman et al., 2017. The KL of b2018y"' in html
    listed = html[html.index('<ol class="references">') :]
    assert listed.index('id="ref-b2018y"') < listed.index('id="ref-a2017x"')
    assert '<a href="https://example.org/b2018y">The KL of b2018y</a>' in listed
    assert "John Schulman, Filip Wolski, Prafulla Dhariwal, 2017" in listed and "Why to read b2018y &amp; co." in listed
    assert all(f'href="#cite-b2018y-{n}"' in listed for n in (1, 2, 3))
    assert "References - #references" in html and "[@" not in html


def test_code_and_attributes_are_not_cited(project):
    project.write("references.bib", entry("a2017x"))
    body = "[@a2017x]\n\n`[@none]` <code>[@none]</code>\n\n```text\n[@none; @other]\n```\n\n"
    project.page("page.md", body + '<p title="[@none]">x</p>\n\n<!-- [@none] -->\n')
    project.build()
    html = project.html("page")
    assert html.count("[@none") == 5 and html.count('class="cite"') == 1


def test_a_page_without_citations_has_no_references(project):
    project.write("references.bib", entry("a2017x"))
    project.page("page.md", "Text.")
    project.page("other.md", "[@a2017x]")
    project.build()
    assert "references" not in project.html("page")


def test_an_unknown_key_is_named_with_its_line(project):
    project.write("references.bib", entry("a2017x"))
    project.page("page.md", "Fine [@a2017x].\n\nWrong [@a2017x; @nobody1999z].")
    assert "page.md:8: unknown citation key 'nobody1999z'" in project.fails()


@pytest.mark.parametrize("wrong", ["[@a2017x, @a2017x]", "[@ a2017x]", "[@a2017x p. 3]"])
def test_what_looks_like_a_citation_is_not_printed_as_text(project, wrong):
    project.write("references.bib", entry("a2017x"))
    project.page("page.md", f"[@a2017x] {wrong}")
    assert "is not a citation" in project.fails()


TWO = entry("a2017x") + entry("b2018y")


@pytest.mark.parametrize(
    ("bib", "said"),
    [
        (
            TWO + entry("a2017x", url="https://example.org/other"),
            ["references.bib:21: a2017x: duplicate key", "line 1"],
        ),
        (
            TWO + entry("c", url="http://www.example.org/a2017x/"),
            ["references.bib:21: c: duplicate url", "a2017x on line 1"],
        ),
        (
            entry("a", eprint="1707.06347") + entry("b", url="https://arxiv.org/pdf/1707.06347v2"),
            ["references.bib:12: b: dup"],
        ),
        (entry("a", doi="10.1/x") + entry("b", url="https://doi.org/10.1/x"), ["references.bib:12: b: duplicate url"]),
        (entry("a", title=""), ["references.bib:1: a: missing field title"]),
        (entry("a", langid=""), ["references.bib:1: a: missing field langid"]),
        (entry("a", keywords=""), ["references.bib:1: a: missing field keywords"]),
        (entry("a", annotation=""), ["references.bib:1: a: missing field annotation"]),
        (entry("a", url=""), ["references.bib:1: a: missing field url, eprint or doi"]),
        (entry("a", url="example.org"), ["references.bib:1: a: url is not"]),
        (entry("a", keywords="rlhf, paper, misc"), ["references.bib:1: a: unknown keyword 'misc'"]),
        (entry("a", keywords="paper"), ["references.bib:1: a: no topic"]),
        (entry("a", keywords="rlhf"), ["references.bib:1: a: needs exactly one type"]),
        (entry("a", keywords="rlhf, paper, post"), ["references.bib:1: a: needs exactly one type"]),
        (entry("a", langid="german"), ["references.bib:1: a: unknown langid 'german'"]),
        (entry("a", langid="chinese"), ["references.bib:1: a: missing field titleaddon"]),
        (TWO + "@article{c,\n  title = {Never closed,\n", ["references.bib:21: c: malformed entry"]),
        (TWO + "article{c,\n  title = {No at},\n}\n", ["references.bib:21:", "malformed entry"]),
        (TWO + "@article{c,\n  title = {A},\n  title = {B},\n}\n", ["references.bib:21: c: duplicate field title"]),
        (TWO + entry("c").replace("  url", "  title = {T},\n  url"), ["references.bib:21: c: duplicate field title"]),
        (TWO + "@article{c,\n  title {No equals},\n}\n", ["references.bib:21: c: malformed entry"]),
        (TWO + "@article{,\n  title = {No key},\n}\n", ["references.bib:21:", "malformed entry"]),
        (TWO + entry("c d"), ["references.bib:21: c d: malformed entry"]),
        (TWO + "@string{x = {y}}\n@article{c, title = x}\n", ["references.bib:22: c: missing field"]),
    ],
)
def test_a_mistake_in_the_bibliography_fails_the_build(project, bib, said):
    project.write("references.bib", bib)
    text = project.fails()
    assert all(part in text for part in said), text


def test_all_mistakes_are_told_at_once(project):
    project.write("references.bib", entry("a", title="") + entry("b", annotation=""))
    text = project.fails()
    assert (
        "references.bib:1: a: missing field title" in text and "references.bib:10: b: missing field annotation" in text
    )


def test_an_entry_that_no_page_shows_fails_the_build(project):
    project.write("references.bib", TWO)
    project.page("page.md", "[@a2017x]")
    text = project.fails()
    assert "references.bib:11: b2018y: no page shows this entry" in text and "a2017x" not in text


def test_no_bibliography_at_all_fails_the_build(project):
    (project.base / "references.bib").unlink()
    assert "references.bib: there is no such file" in project.fails()


@pytest.mark.parametrize(
    ("author", "short", "by"),
    [
        ("Schulman, John", "Schulman, 2017", "John Schulman"),
        ("Hafner, D. and Li, E.", "Hafner and Li, 2017", "D. Hafner, E. Li"),
        ("John Schulman and others", "Schulman et al., 2017", "John Schulman et al."),
        ("A, B and C, D and E, F and G, H and I, J", "A et al., 2017", "B A, D C, F E et al."),
        ("{Kimi Team}", "Kimi Team, 2017", "Kimi Team"),
        ("{DeepSeek-AI} and Guo, Daya", "DeepSeek-AI and Guo, 2017", "DeepSeek-AI, Daya Guo"),
        ("van Hasselt, Hado", "van Hasselt, 2017", "Hado van Hasselt"),
        ("苏剑林", "苏剑林, 2017", "苏剑林"),
        ("", "The KL of a, 2017", ""),
    ],
)
def test_authors_as_they_are_shown(tmp_path, author, short, by):
    path = tmp_path / "references.bib"
    path.write_text(entry("a", author=author), encoding="utf-8")
    entries, problems = bibliography.read(path)
    assert not problems
    assert (entries["a"].short, entries["a"].by) == (short, by)


def test_text_outside_code_only():
    html = '<p a="[x]">x<code>x<b>x</b></code>x</p><pre>x</pre>x<!-- x -->'
    assert cite.outside_code(html, str.upper) == '<p a="[x]">X<code>x<b>x</b></code>X</p><pre>x</pre>X<!-- x -->'
