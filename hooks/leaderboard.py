"""The leaderboard: `<!-- leaderboard: rlhf -->` becomes the table of all methods of that family.

Its numbers are the checks of the methods' own evidence that begin with "Leaderboard, <method>: ", which
`make leaderboard` writes. A method that lacks one of them stops the strict build.
"""

import re
from html import escape
from pathlib import Path

from common import fail, link, root, table
from evidence import stored
from measured import load, problems, show

MARK = re.compile(r"^<!-- leaderboard: *([a-z]+) *-->[ \t]*$", re.M)
CHECK = re.compile(r"Leaderboard, (.+?): (.+)")
COLUMNS = {  # heading -> how the check's name begins
    "KL(π‖π*), nats": "KL(π‖π*)",
    "Share of gain": "share of the optimal gain",
    "E[r]": "E[r]",
    "KL(π‖π_ref), nats": "KL(π‖π_ref)",
    "Exact match": "greedy exact match",
    "Time of a step": "CPU time of a step",
    "Peak memory, MB": "peak memory of a step",
}


def rows_of(base: Path, family: str) -> dict[str, tuple[str, dict[str, dict]]]:
    """method -> (its snippet, {what: check}), in the order of the distance from the optimum."""
    found: dict[str, tuple[str, dict[str, dict]]] = {}
    for name in stored(base):
        if not name.startswith(f"{family}/"):
            continue
        for check in load(base, name)["checks"]:
            if match := CHECK.fullmatch(check["check"]):
                found.setdefault(match[1], (name, {}))[1][match[2]] = check
    return dict(sorted(found.items(), key=lambda item: item[1][1].get("KL(π‖π*)", {"value": 0})["value"]))


def cell(check: dict) -> str:
    low, high = min(check.get("spread") or [check["value"]]), max(check.get("spread") or [check["value"]])
    text = escape(show(check["value"]))
    if low != high:
        text += f' <span class="evidence-spread">({escape(show(low))} to {escape(show(high))})</span>'
    return f'<td data-sort="{check["value"]!r}">{text}</td>'


def draw(base: Path, family: str, page, homes: dict[str, str]) -> tuple[str, list[str]]:
    """The table, and what is wrong with it."""
    rows, wrong = [], []
    for method, (name, checks) in rows_of(base, family).items():
        wrong += problems(base, name)
        cells = []
        for begins in COLUMNS.values():
            check = next((c for what, c in checks.items() if what.startswith(begins)), None)
            if check is None:
                wrong.append(f"docs/evidence/{name}.json has no check 'Leaderboard, {method}: {begins}'")
                continue
            cells.append(cell(check))
        title = escape(method)
        if name in homes:
            title = f'<a href="{link(page, homes[name])}">{title}</a>'
        rows.append(f'<th scope="row">{title}</th>{"".join(cells)}')
    if not rows:
        wrong.append(f"there is no evidence of the leaderboard for {family}: run make leaderboard")
    caption = "Mean over 5 seeds, and their range. Choose a heading to sort by it."
    drawn = table(caption, ["Method", *COLUMNS], rows, classes="sortable evidence-table leaderboard", buttons=True)
    box = '<div class="table-scroll" tabindex="0" role="region" aria-label="Leaderboard">'
    return f"{box}\n{drawn}\n</div>\n", wrong


def on_page_markdown(markdown, page, config, files):
    homes = {}
    for file in files.documentation_pages():
        uri = file.src_uri[: -len(".md")].replace("-", "_")  # docs/rlhf/grpo.md explains snippets/rlhf/grpo.py
        homes[uri] = file.url

    def replace(match: re.Match) -> str:
        drawn, wrong = draw(root(config), match[1], page, homes)
        for message in dict.fromkeys(wrong):
            fail(config, f"{page.file.src_uri}: {message}")
        return drawn

    return MARK.sub(replace, markdown)
