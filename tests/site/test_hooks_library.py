"""The library hook: every entry by topic, language and type; what to read next on topic pages."""

import re

import pytest

from .test_hooks_cite import entry

BIB = (
    entry("old", year="2015", keywords="rlhf, paper", annotation="Why to read *A_b_c* [x](y).")
    + entry("new", year="2024", keywords="rlhf, reasoning, paper")
    + entry("course", keywords="rlhf, course", eprint="2001.00001")
    + entry(
        "zh",
        title="强化学习",
        titleaddon="Reinforcement <learning>",
        langid="chinese",
        keywords="rlhf, post",
        author="苏剑林",
    )
    + entry("shared", keywords="reasoning, rlhf, code")
)


@pytest.fixture
def library(project):
    project.write("references.bib", BIB)
    project.page("library/index.md", "<!-- library: index -->")
    for topic in ("rlhf", "reasoning"):
        project.page(f"library/{topic}.md", f"<!-- library: {topic} -->")
    return project


def test_a_shelf_holds_its_topic_by_language_and_type(library):
    library.build()
    html = library.html("library/rlhf")
    found = re.findall(r'<li class="lib-entry" data-lang="(\w+)" data-type="(\w+)" id="(\w+)">', html)
    assert found == [
        ("en", "paper", "new"),
        ("en", "paper", "old"),
        ("en", "course", "course"),
        ("en", "code", "shared"),
        ("zh", "post", "zh"),
    ]
    assert re.findall(r'<h([23]) id="([\w-]+)">', html) == [
        ("2", "en"), ("3", "en-paper"), ("3", "en-course"), ("3", "en-code"), ("2", "zh"), ("3", "zh-post"),
    ]  # fmt: skip
    title = '<a href="https://example.org/zh" lang="zh">强化学习</a>'
    assert f'{title} <span class="lib-gloss">(Reinforcement &lt;learning&gt;)</span>' in html
    assert html.count('<p class="lib-note">Why to read') == 5 and "Why to read *A_b_c* [x](y)." in html
    assert '<a href="https://arxiv.org/abs/2001.00001">arXiv:2001.00001</a>' in html
    assert html.count("<section") == html.count("</section>") == 6
    assert "English - #en" in html


def test_the_filter_is_hidden_without_its_script_and_labelled(library):
    library.build()
    html = library.html("library/rlhf")
    form = re.search(r'<form class="lib-filter" hidden>.*?</form>', html, re.S)[0]
    assert re.findall(r'name="(\w+)" value="(\w+)">', form) == [
        ("lang", "en"), ("lang", "zh"), ("type", "paper"), ("type", "course"), ("type", "post"), ("type", "code"),
    ]  # fmt: skip
    assert form.count("<label>") == 6 and "<legend>Language</legend>" in form
    assert '<output class="lib-count">5 of 5 shown</output>' in form


def test_the_index_counts_and_links(library):
    library.build()
    html = library.html("library/index".removesuffix("/index"))
    row = re.search(r'<tr><th scope="row"><a href="rlhf/">RLHF</a></th>(.*?)</tr>', html)[1]
    assert re.findall(r"<td>(.*?)</td>", row) == ["2", "1", "1", "1", "1", "5"]
    assert '<th scope="row">Control</th>' in html and "5 entries" in html


def test_go_deeper_lists_what_the_page_does_not_cite(library):
    library.page("rlhf/page.md", "As shown [@new].\n\n<!-- go-deeper: rlhf -->")
    library.build()
    html = library.html("rlhf/page")
    deeper = re.search(r'<ul class="go-deeper">.*?</ul>', html, re.S)[0]
    assert "example.org/old" in deeper and "example.org/zh" in deeper
    assert "example.org/new" not in deeper and "example.org/shared" not in deeper
    assert '<a href="../../library/rlhf/">All 5 entries on RLHF, with notes</a>' in html
    assert "Go deeper - #go-deeper" in html


def test_an_unknown_topic_fails_the_build(library):
    library.page("page.md", "<!-- library: cooking -->")
    text = library.fails()
    assert "page.md" in text and "unknown topic 'cooking'" in text
