"""Citations: `[@key]` or `[@a; @b]` in prose becomes a numbered link to the references at the page's end.

The entries are those of references.bib. A mistake in that file, an unknown key, and an entry that no page shows
stop the build with file, line and key. Citations in code, fenced or inline, are left as they are.
"""

import re
from html import escape

from mkdocs.structure.toc import AnchorLink

from bibliography import BIB, read
from common import authored, fail, root

CITE = re.compile(r"\[(@[\w:.\-/]+(?:\s*;\s*@[\w:.\-/]+)*)\]")
TOKEN = re.compile(r"<!--.*?-->|</?[a-zA-Z][^<>]*(?:\"[^\"]*\"[^<>]*)*>", re.S)
CODE = {"code", "pre", "script", "style", "textarea", "kbd"}
LIKE_CITE = re.compile(r"\[@[^\]\n]*\]")


def on_config(config):
    BIB.path = root(config) / "references.bib"
    BIB.entries, problems = read(BIB.path)
    BIB.shown = set()
    if problems:
        fail(config, "references.bib is not sound:\n  " + "\n  ".join(problems))
    return config


def on_page_content(html, page, config, files):
    if not authored(page):
        return html
    numbers: dict[str, int] = {}
    places: dict[str, list[str]] = {}

    def group(match: re.Match) -> str:
        links = []
        for key in (part.strip()[1:] for part in match[1].split(";")):
            if key not in BIB.entries:
                fail(config, f"{where(page, key)}: unknown citation key {key!r}: references.bib has no such entry")
                links.append(f'<strong class="cite-unknown">{escape(key)}?</strong>')
                continue
            entry = BIB.entries[key]
            number = numbers.setdefault(key, len(numbers) + 1)
            spots = places.setdefault(key, [])
            spots.append(f"cite-{key}-{len(spots) + 1}")
            hover = escape(f"{entry.short}. {entry.get('title')}" + (f" ({entry.gloss})" if entry.gloss else ""))
            links.append(
                f'<a class="cite" id="{spots[-1]}" href="#ref-{key}" title="{hover}" '
                f'aria-label="Reference {number}: {escape(entry.short)}">{number}</a>'
            )
        return f'<span class="cites">[{", ".join(links)}]</span>'

    def text(part: str) -> str:
        part = CITE.sub(group, part)
        for match in LIKE_CITE.finditer(part):
            fail(config, f"{page.file.src_uri}: {match[0]} is not a citation: write [@key] or [@a; @b]")
        return part

    html = outside_code(html, text)
    for item in page.toc:
        _strip(item)
    if numbers:
        html += references(numbers, places)
        BIB.shown.update(numbers)
        heads = list(page.toc)
        heading = AnchorLink("References", "references", 2)
        (heads[0].children if heads and heads[0].level == 1 else page.toc.items).append(heading)
        ids = {"references", *(f"ref-{key}" for key in numbers), *(spot for spots in places.values() for spot in spots)}
        page.present_anchor_ids = (page.present_anchor_ids or set()) | ids
    return html


def outside_code(html: str, change) -> str:
    """Apply `change` to the text of the html that is neither a tag nor code."""
    out, at, depth = [], 0, 0
    for match in TOKEN.finditer(html):
        piece = html[at : match.start()]
        out.append(piece if depth else change(piece))
        tag = match[0]
        name = re.match(r"</?([a-zA-Z0-9]+)", tag)
        if name and name[1].lower() in CODE and not tag.endswith("/>"):
            depth = max(0, depth + (-1 if tag.startswith("</") else 1))
        out.append(tag)
        at = match.end()
    out.append(html[at:] if depth else change(html[at:]))
    return "".join(out)


def where(page, key: str) -> str:
    """file:line of the first place on a page that cites the key."""
    source = page.file.content_string if page.file.src_uri.endswith(".md") else ""
    for number, line in enumerate(source.splitlines(), 1):
        if re.search(rf"@{re.escape(key)}(?![\w:.\-/])", line):
            return f"{page.file.src_uri}:{number}"
    return page.file.src_uri


def references(numbers: dict[str, int], places: dict[str, list[str]]) -> str:
    """The list at the page's end, in the order of first citation, with a link back to each citing place."""
    items = []
    for key in numbers:
        entry = BIB.entries[key]
        many = len(places[key]) > 1
        back = " ".join(
            f'<a class="ref-back" href="#{spot}" aria-label="Back to citation {n} of {escape(entry.short)}">'
            f"↩{n if many else ''}</a>"
            for n, spot in enumerate(places[key], 1)
        )
        parts = [f"{entry.title_html()}."]
        if meta := entry.meta_html():
            parts.append(f'<span class="ref-meta">{meta}.</span>')
        if note := entry.get("annotation"):
            parts.append(f'<span class="ref-note">{escape(note)}</span>')
        items.append(f'<li id="ref-{key}">{" ".join([*parts, back])}</li>')
    link = '<a class="headerlink" href="#references" title="Permanent link">&para;</a>'
    listed = "\n".join(items)
    return f'\n<h2 id="references">References{link}</h2>\n<ol class="references">\n{listed}\n</ol>\n'


def _strip(item) -> None:
    """Citations in headings do not belong in the table of contents."""
    item.title = CITE.sub("", item.title).strip()
    for child in item.children:
        _strip(child)


def on_env(env, config, files):
    """All pages are drawn now: an entry that none of them shows is a mistake."""
    unused = [entry for key, entry in BIB.entries.items() if key not in BIB.shown]
    if unused:
        lines = "\n  ".join(f"references.bib:{e.line}: {e.key}: no page shows this entry" for e in unused)
        fail(config, f"references.bib has entries that no page shows:\n  {lines}")
    return env
