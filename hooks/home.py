"""The home page's numbers, counted at each build: `<!-- home-counts -->` becomes the strip of counts, and
`<!-- home-measured: rlhf/grpo | KL to the optimum | from the optimum -->` the value of the first check of that evidence
whose name holds the second part, followed by the third part, its bar and its seeds."""

import json
import re
from html import escape
from pathlib import Path

from bibliography import BIB
from common import authored, fail, link, root
from evidence import bar_text
from measured import meets, show

SUMMARY = "<!-- home-counts -->"
MEASURED = re.compile(r"<!-- home-measured: *([\w/-]+) *\| *([^\n]*?) *\| *([^\n|]*?) *-->")
QUESTION = re.compile(r"^#{2,4} .*[?？]", re.M)


def on_page_markdown(markdown, page, config, files):
    if not authored(page) or (SUMMARY not in markdown and not MEASURED.search(markdown)):
        return markdown
    base = root(config)

    def measured(match: re.Match) -> str:
        checks = [c for c in read(base / f"docs/evidence/{match[1]}.json") if match[2].lower() in c["check"].lower()]
        if not checks:
            fail(config, f"{page.file.src_uri}: docs/evidence/{match[1]}.json has no check named like {match[2]!r}")
            return "Not measured yet"
        return line(checks[0], match[3])

    return MEASURED.sub(measured, markdown).replace(SUMMARY, strip(counts(base), page, files))


def read(path: Path) -> list[dict]:
    """The checks of one evidence file; none where there is no file yet."""
    return json.loads(path.read_text(encoding="utf-8"))["checks"] if path.is_file() else []


def counts(base: Path) -> dict[str, int]:
    """What there is, each counted in the files themselves."""
    checks = [check for path in sorted((base / "docs/evidence").rglob("*.json")) for check in read(path)]
    pages = [path for path in sorted((base / "docs/interview").glob("*.md")) if ".zh." not in path.name]
    papers = sum(entry.type == "paper" for entry in BIB.entries.values())
    return {
        "checks": len([check for check in checks if check.get("bar") is not None and meets(check)]),
        "snippets": len([path for path in (base / "snippets").rglob("*.py") if path.stem != "__init__"]),
        "questions": sum(len(QUESTION.findall(path.read_text(encoding="utf-8"))) for path in pages),
        "papers": papers,
        "links": len(BIB.entries) - papers,
    }


def strip(n: dict[str, int], page, files) -> str:
    """The five counts as a list of terms, each linked to what it counts."""
    told = [
        ("checks", "evidence/index.md", "bars met, measured on the page"),
        ("snippets", "evidence/index.md", "tested files that the pages print"),
        ("questions", "interview/index.md", "interview questions, answered"),
        ("papers", "library/index.md", "papers, each with a note"),
        ("links", "library/index.md", "courses, posts, books and videos"),
    ]
    cells = []
    for name, uri, text in told:
        file = files.get_file_from_path(uri)
        number = f'<a href="{link(page, file.url)}">{n[name]}</a>' if file else n[name]
        cells.append(f"<div><dt>{text}</dt><dd>{number}</dd></div>")
    return f'<dl class="proven">{"".join(cells)}</dl>'


def line(check: dict, text: str) -> str:
    """What was measured, in the page's own words, with the bar that it had to meet."""
    value = f"{check['value']:.0%}" if check.get("unit") == "share" else show(check["value"], check.get("unit", ""))
    bar = [] if check.get("bar") is None else [f"bar {bar_text(check)}"]
    seeds = [f"{len(check['seeds'])} seeds"] if len(check.get("seeds") or []) > 1 else []
    about = f" ({', '.join(bar + seeds)})" if bar + seeds else ""
    return f"<b>{escape(value)}</b> {escape(text + about)}"
