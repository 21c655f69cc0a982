"""Labs become pages like any other, and every page has a description, a heading and alternative texts."""

import base64
import json

import pytest

PIXEL = base64.b64encode(b"not really a png").decode()
IMAGE = {"output_type": "display_data", "data": {"image/png": PIXEL, "text/plain": "<Figure size 1x1>"}, "metadata": {}}


def notebook(*cells: dict, **metadata) -> str:
    return json.dumps({"cells": list(cells), "metadata": metadata, "nbformat": 4, "nbformat_minor": 5})


def words(source: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": source.splitlines(keepends=True)}


def code(source: str, *outputs: dict, **metadata) -> dict:
    return {"cell_type": "code", "metadata": metadata, "source": source, "outputs": list(outputs), "execution_count": 1}


def stream(text: str, name: str = "stdout") -> dict:
    return {"output_type": "stream", "name": name, "text": [text]}


def test_a_lab_is_a_page(project):
    lab = notebook(
        words("# The lab\n\nSee [the page](../page.md#part) and [the lab](lab.ipynb).\n\n## A part"),
        code("print('a')\nprint('``` b')", stream("a\n``` b\n"), stream("\x1b[32m100%\x1b[0m", "stderr")),
        code("plot()", IMAGE, alt="Reward [nats] over steps"),
        code("secret()", {"output_type": "execute_result", "data": {"text/plain": ["42"]}}, tags=["hide-input"]),
        code(
            "t",
            {
                "output_type": "execute_result",
                "data": {"text/html": "<style>x</style>\n<table>\n\n<tr><td>1</td></tr></table>"},
            },
        ),
        description="What the lab shows.",
    )
    project.write("docs/rlhf/lab.ipynb", lab)
    project.page("page.md", "## Part\n\n[lab](rlhf/lab.ipynb#a-part)")
    project.build()
    html = project.html("rlhf/lab")
    assert "<h1" in html and 'href="../../page/#part"' in html and 'href="./"' in html
    assert "``` b" in html and "100%" not in html and "secret" not in html and "<code>42" in html
    assert 'alt="Reward (nats) over steps"' in html and "Figure size" not in html
    assert 'src="../lab_files/2-0.png"' in html
    assert (project.base / "site/rlhf/lab_files/2-0.png").read_bytes() == b"not really a png"
    assert '<div class="table-scroll"><table>' in html and "<style>" not in html
    assert 'href="../lab.ipynb" download' in html and (project.base / "site/rlhf/lab.ipynb").read_text() == lab
    assert 'href="../rlhf/lab/#a-part"' in project.html("page")


@pytest.mark.parametrize(
    ("cells", "metadata", "said"),
    [
        (
            [words("# L"), code("plot()", IMAGE)],
            {"description": "d"},
            "lab.ipynb: cell 1: an image without alternative text",
        ),
        ([words("# L")], {}, "lab.md: has no `description:`"),
        ([words("Text.")], {"description": "d"}, "lab.md: has no level 1 heading"),
        (
            [words("# L"), code("x", {"output_type": "error", "ename": "E", "evalue": "bad"})],
            {"description": "d"},
            "an error: E: bad",
        ),
        ([words("# L\n\n[x](gone.md)")], {"description": "d"}, "gone.md"),
        ([words("# L\n\n[@none]")], {"description": "d"}, "unknown citation key 'none'"),
    ],
)
def test_a_lab_with_a_fault_fails_the_build(project, cells, metadata, said):
    project.write("docs/lab.ipynb", notebook(*cells, **metadata))
    text = project.fails()
    assert said in text, text


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("# T\n", "page.md: has no `description:`"),
        (f"---\ndescription: {'x' * 161}\n---\n# T\n", "page.md: its description has 161 characters"),
        ("---\ndescription: About index.md.\n---\n# T\n", "has the same description as"),
        ("---\ndescription: d\n---\nText.\n", "page.md: has no level 1 heading"),
        ("---\ndescription: d\n---\n# T\n\n![](x.svg)\n", "page.md: an image without alternative text"),
        ('---\ndescription: d\n---\n# T\n\n<img src="x.svg">\n', "page.md: an image without alternative text"),
    ],
)
def test_a_page_that_lacks_something_fails_the_build(project, page, said):
    project.write("docs/page.md", page)
    project.write("docs/x.svg", "<svg/>")
    text = project.fails()
    assert said in text, text


def test_a_draft_build_only_warns(project):
    project.write("docs/page.md", "# T\n\n[@none]\n\n```python\nx\n```\n\n<!-- evidence: a/b -->\n")
    project.write("references.bib", "@article{a, title = {T}}\n")
    project.build(strict=False)
    assert "unknown citation key" in project.caplog.text and "none?" in project.html("page")
