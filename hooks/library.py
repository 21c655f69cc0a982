"""The library: `<!-- library: rlhf -->` becomes that topic's entries of references.bib, by language and type;
`<!-- library: index -->` the overview of all topics; `<!-- go-deeper: rlhf -->` at a topic page's end a short list."""

import re
from html import escape

from bibliography import BIB, LANGUAGES, TOPICS, TYPES, Entry
from common import authored, fail, link, table

PLACE = re.compile(r"^<!-- (library|go-deeper): *([\w-]+) *-->[ \t]*$", re.M)
CITED = re.compile(r"@([\w:.\-/]+)")
DEEPER = {"paper": 6, "book": 2, "course": 3, "post": 4, "video": 2, "code": 2, "qa": 2}  # at most so many of each


def on_page_markdown(markdown, page, config, files):
    if not authored(page):
        return markdown

    def draw(match: re.Match) -> str:
        kind, topic = match.groups()
        if topic not in TOPICS and not (kind == "library" and topic == "index"):
            fail(config, f"{page.file.src_uri}: unknown topic {topic!r} in {match[0]} (topics: {', '.join(TOPICS)})")
            return ""
        if kind == "go-deeper":
            return go_deeper(topic, page, files, set(CITED.findall(markdown)))
        return index(page, files) if topic == "index" else shelf(topic)

    return PLACE.sub(draw, markdown)


def of(topic: str) -> list[Entry]:
    """A topic's entries; what its keywords name first as topic comes first, then the newest."""
    sound = [entry for entry in BIB.entries.values() if entry.type and entry.get("langid") in LANGUAGES]

    def order(entry: Entry) -> tuple:
        return entry.topics[0] != topic, -int(entry.year) if entry.year.isdigit() else 0, entry.get("title").lower()

    return sorted((entry for entry in sound if topic in entry.topics), key=order)


def item(entry: Entry) -> str:
    meta = entry.meta_html()
    return (
        f'<li class="lib-entry" id="{escape(entry.key)}" data-lang="{entry.lang}" data-type="{entry.type}">'
        f'<p class="lib-title">{entry.title_html()}</p>'
        + (f'<p class="lib-meta">{meta}</p>' if meta else "")
        + f'<p class="lib-note">{escape(entry.get("annotation"))}</p></li>'
    )


def shelf(topic: str) -> str:
    """All entries of a topic, English and Chinese apart, by type, with the controls that filter them."""
    entries = of(topic)
    BIB.shown.update(entry.key for entry in entries)
    out = [controls(entries)]
    for langid, (lang, name) in LANGUAGES.items():
        spoken = [entry for entry in entries if entry.get("langid") == langid]
        if not spoken:
            continue
        out.append(f'<section class="lib-language" data-lang="{lang}" markdown>\n\n## {name} {{ #{lang} }}\n')
        for type_, title in TYPES.items():
            if items := "\n".join(item(entry) for entry in spoken if entry.type == type_):
                out.append(f'<section class="lib-group" data-lang="{lang}" data-type="{type_}" markdown>\n')
                out.append(f"### {escape(title)} {{ #{lang}-{type_} }}\n")
                out.append(f'<ul class="lib-list">\n{items}\n</ul>\n\n</section>\n')
        out.append("</section>\n")
    return "\n".join(out)


def controls(entries: list[Entry]) -> str:
    """Boxes that narrow the list to some languages and types. Hidden until the script that works them is there."""
    langs = [(lang, name) for lang, name in LANGUAGES.values() if any(e.lang == lang for e in entries)]
    types = [(type_, title) for type_, title in TYPES.items() if any(e.type == type_ for e in entries)]

    def boxes(name: str, legend: str, options: list[tuple[str, str]]) -> str:
        labels = "".join(
            f'<label><input type="checkbox" name="{name}" value="{value}"> {escape(title)}</label>'
            for value, title in options
        )
        return f"<fieldset><legend>{legend}</legend>{labels}</fieldset>"

    return (
        f'<form class="lib-filter" hidden>{boxes("lang", "Language", langs)}{boxes("type", "Type", types)}'
        f'<output class="lib-count">{len(entries)} of {len(entries)} shown</output></form>\n'
    )


def index(page, files) -> str:
    """A table of the topics, with how much there is of each type and language."""
    types = [type_ for type_ in TYPES if any(e.type == type_ for e in BIB.entries.values())]
    rows = []
    for topic, name in TOPICS.items():
        entries = of(topic)
        file = files.get_file_from_path(f"library/{topic}.md")
        title = f'<a href="{link(page, file.url)}">{name}</a>' if file else name
        cells = "".join(f"<td>{sum(e.type == t for e in entries) or '–'}</td>" for t in types)
        chinese = sum(e.lang == "zh" for e in entries)
        rows.append(f'<th scope="row">{title}</th>{cells}<td>{chinese or "–"}</td><td>{len(entries)}</td>')
    caption = f"{len(BIB.entries)} entries by topic and type; one that serves two topics counts in both."
    columns = ["Topic", *(TYPES[type_] for type_ in types), "In Chinese", "All"]
    return table(caption, columns, rows, classes="lib-index") + "\n"


def go_deeper(topic: str, page, files, cited: set[str]) -> str:
    """What to read next on a topic: entries that the page does not cite, those of this topic before shared ones."""
    chosen: list[Entry] = []
    for type_, most in DEEPER.items():
        typed = [entry for entry in of(topic) if entry.type == type_ and entry.topics[0] == topic]
        chosen += [entry for entry in typed if entry.key not in cited][:most]
    BIB.shown.update(entry.key for entry in chosen)
    items = []
    for entry in chosen:
        meta = f', <span class="lib-meta">{entry.meta_html()}</span>' if entry.meta_html() else ""
        items.append(f'<li><span class="lib-type">{entry.type}</span> {entry.title_html()}{meta}</li>')
    drawn = '## Go deeper { #go-deeper }\n\n<ul class="go-deeper">\n' + "\n".join(items) + "\n</ul>\n"
    if file := files.get_file_from_path(f"library/{topic}.md"):
        more = f'<a href="{link(page, file.url)}">All {len(of(topic))} entries on {TOPICS[topic]}, with notes</a>'
        drawn += f'\n<p class="go-deeper-all">{more}</p>\n'
    return drawn
