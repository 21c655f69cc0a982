"""Evidence: `<!-- evidence: rlhf/grpo -->` becomes the box of what was measured, from docs/evidence/rlhf/grpo.json.

Tests write those files (the `evidence` fixture of tests/conftest.py) under `make evidence`. Each check holds a hash of
the code that it measured: the snippet and the project files that it imports, docstrings and comments aside. Evidence
that is missing, or whose code has changed since, stops the strict build. `<!-- evidence: index -->` is the table of
all of it, and `<!-- evidence-value: rlhf/grpo | check -->`, in a sentence, one measured value.
"""

import re
from collections import Counter
from html import escape
from pathlib import Path

from common import authored, fail, link, root, table
from measured import load, meets, problems, show, snippet_files

BOX = re.compile(r"^<!-- evidence: *([\w./-]+) *-->[ \t]*$", re.M)
VALUE = re.compile(r"<!-- evidence-value: *([\w./-]+) *\| *(.+?) *-->")
ANY = re.compile(r"<!-- *evidence\b.*?-->")
LONG = 16  # checks; a longer box folds what has no bar


def bar_text(check: dict) -> str:
    if check.get("bar") is None:
        return "–"
    sign = {"<=": "≤", ">=": "≥", "==": "="}.get(check["better"], check["better"])
    return f"{sign} {show(check['bar'], check.get('unit', ''))}"


def state_html(check: dict) -> str:
    if check.get("bar") is None:
        return '<span class="evidence-state" data-state="measured">measured</span>'
    if meets(check):
        return '<span class="evidence-state" data-state="met">✓ met</span>'
    return '<span class="evidence-state" data-state="missed">✗ missed</span>'


def value_html(check: dict) -> str:
    text = escape(show(check["value"], check.get("unit", "")))
    if spread := check.get("spread"):
        text += f'<span class="evidence-spread"> ({escape(show(min(spread)))} to {escape(show(max(spread)))})</span>'
    return text


def anchor(name: str) -> str:
    """Where the evidence of a snippet stands on its page."""
    return "evidence-" + name.replace("/", "-")


def cells(check: dict) -> str:
    """Value, bar and seeds, as cells that sort by number."""
    seeds = len(check.get("seeds") or []) or "–"
    bar = check.get("bar")
    return (
        f'<td data-sort="{check["value"]!r}">{value_html(check)}</td>'
        f'<td data-sort="{"" if bar is None else repr(bar)}">{escape(bar_text(check))}</td><td>{seeds}</td>'
    )


def box(name: str, data: dict) -> str:
    """The evidence box of a page."""
    rows, further, board = [], [], []
    long = sum(not check["check"].startswith("Leaderboard, ") for check in data["checks"]) > LONG
    for check in data["checks"]:
        note = f'<span class="evidence-note">{escape(check["note"])}</span>' if check.get("note") else ""
        row = f'<th scope="row">{escape(check["check"])}{note}</th>{cells(check)}<td>{state_html(check)}</td>'
        if check["check"].startswith("Leaderboard, "):
            board.append(row)
        else:
            (further if long and check["bar"] is None else rows).append(row)
    if not rows:  # nothing but measurements: the first of them stand for all
        rows, further = further[:LONG], further[LONG:]
    about = Counter((check["command"], check["date"], check["commit"], check["machine"]) for check in data["checks"])
    lines = []
    for (command, date, commit, machine), count in about.items():
        part = f" ({count} of {len(data['checks'])} checks)" if len(about) > 1 else ""
        text = escape(f"{date}, commit {commit}, {machine}{part}")
        lines.append(f'<p class="evidence-meta"><code>{escape(command)}</code> <span>{text}</span></p>')
    caption = f"Measured on <code>{escape(name)}</code>"
    columns = ["Check", "Value", "Bar", "Seeds", "State"]
    drawn = table(caption, columns, rows, classes="evidence-table")
    if further:  # what has no bar proves nothing by itself; the prose quotes what matters
        folded = table("Without a bar", columns, further, classes="evidence-table")
        drawn += f"\n<details><summary>{len(further)} further measurements</summary>\n{folded}\n</details>"
    if board:  # what the leaderboard compares stands on a page of its own; here it is folded
        folded = table("With the budget of the leaderboard", columns, board, classes="evidence-table")
        drawn += f"\n<details><summary>On the leaderboard</summary>\n{folded}\n</details>"
    lines = "\n".join(lines)
    return f'<div class="evidence" id="{anchor(name)}">\n{drawn}\n{lines}\n</div>\n'


def stored(base: Path) -> list[str]:
    """The names of all evidence there is."""
    folder = base / "docs" / "evidence"
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.json"))


def index(base: Path, page) -> str:
    """All evidence as one table that sorts by any column."""
    rows = []
    for name in stored(base):
        title = escape(name)
        if name in _homes:
            title = f'<a href="{link(page, _homes[name])}#{anchor(name)}">{title}</a>'
        for check in load(base, name)["checks"]:
            rows.append(
                f"<td>{title}</td><td>{escape(check['check'])}</td>{cells(check)}"
                f"<td>{escape(check['date'])}</td><td>{state_html(check)}</td>"
            )
    columns = ["Snippet", "Check", "Value", "Bar", "Seeds", "Date", "State"]
    caption = f"{len(rows)} checks. Choose a heading to sort by it."
    drawn = table(caption, columns, rows, classes="sortable evidence-table", buttons=True)
    return f'<div class="table-scroll" tabindex="0" role="region" aria-label="All evidence">\n{drawn}\n</div>\n'


_homes: dict[str, str] = {}  # evidence -> url of the page with its box


def on_files(files, config):
    _homes.clear()
    for file in files.documentation_pages():
        for name in BOX.findall(file.content_string):
            if name != "index":
                _homes.setdefault(name, file.url)
    return files


def on_page_markdown(markdown, page, config, files):
    if not authored(page):
        return markdown
    base = root(config)
    where = page.file.src_uri
    told: set[str] = set()

    def sound(name: str) -> dict:
        if name not in told:
            told.add(name)
            if wrong := problems(base, name):
                fail(config, f"{where}: " + f"\n  {where}: ".join(wrong))
        return load(base, name) or {"checks": []}

    def draw(match: re.Match) -> str:
        if match[1] == "index":
            for name in set(stored(base)) - set(_homes):  # the others are checked where their box stands
                sound(name)
            return index(base, page)
        data = sound(match[1])
        return box(match[1], data) if data["checks"] else f"*No evidence for {match[1]} yet.*"

    def value(match: re.Match) -> str:
        name, wanted = match.groups()
        for check in sound(name)["checks"]:
            if check["check"] == wanted:
                # It may stand in a table, where a bar would end the cell.
                text = escape(show(check["value"], check.get("unit", ""))).replace("|", "&#124;")
                return f'<span class="evidence-value">{text}</span>'
        fail(config, f"{where}: docs/evidence/{name}.json has no check {wanted!r}")
        return "?"

    own = where[: -len(".md")].replace("-", "_")  # docs/rlhf/grpo.md explains snippets/rlhf/grpo.py
    if snippet_files(base, own) and not own.startswith("worlds/") and own not in BOX.findall(markdown):
        fail(config, f"{where}: explains snippets/{own}.py without its evidence: <!-- evidence: {own} --> is missing")
    markdown = VALUE.sub(value, BOX.sub(draw, markdown))
    for match in ANY.finditer(markdown):
        fail(config, f"{where}: cannot read {match[0]}: write <!-- evidence: topic/snippet --> on a line of its own")
    return markdown
