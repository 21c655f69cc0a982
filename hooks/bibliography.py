"""references.bib, read and checked: the one source of citations and of the library."""

import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

import bibtexparser
from bibtexparser.model import DuplicateBlockKeyBlock, DuplicateFieldKeyBlock

TOPICS = {
    "foundations": "Foundations",
    "rlhf": "RLHF",
    "preferences": "Preferences",
    "reasoning": "Reasoning",
    "control": "Control",
    "systems": "Systems",
}
TYPES = {
    "paper": "Papers",
    "book": "Books",
    "course": "Courses",
    "post": "Posts",
    "video": "Videos",
    "code": "Code",
    "qa": "Q&A",
}
LANGUAGES = {"english": ("en", "English"), "chinese": ("zh", "中文 (Chinese)")}
REQUIRED = ("title", "langid", "keywords", "annotation")


@dataclass(frozen=True)
class Entry:
    """One entry of references.bib."""

    key: str
    line: int
    fields: dict[str, str]

    def get(self, name: str) -> str:
        """A field without its BibTeX braces; "" where there is none."""
        return re.sub(r"\s+", " ", re.sub(r"(?<!\\)[{}]", "", self.fields.get(name, "")).replace("\\", "")).strip()

    @property
    def url(self) -> str:
        if self.get("url"):
            return self.get("url")
        if self.get("eprint"):
            return f"https://arxiv.org/abs/{self.get('eprint')}"
        return f"https://doi.org/{self.get('doi')}"

    @property
    def keywords(self) -> list[str]:
        return [word.strip() for word in self.get("keywords").split(",") if word.strip()]

    @property
    def topics(self) -> list[str]:
        return [word for word in self.keywords if word in TOPICS]

    @property
    def type(self) -> str:
        return next((word for word in self.keywords if word in TYPES), "")

    @property
    def lang(self) -> str:
        return LANGUAGES[self.get("langid")][0]

    @property
    def gloss(self) -> str:
        """The English gloss of a Chinese title."""
        return self.get("titleaddon")

    @property
    def year(self) -> str:
        return self.get("year") or self.get("date")[:4]

    @property
    def authors(self) -> list[tuple[str, str]]:
        """(family name, whole name) of each author; organisations, which BibTeX holds in double braces, as they are."""
        names = []
        for raw in re.split(r"\s+and\s+", self.fields.get("author", "").strip()):
            name = re.sub(r"\s+", " ", re.sub(r"[{}]", "", raw)).strip()
            if raw.startswith("{") or not name.isascii() and " " not in name:
                names.append((name, name))
            elif "," in name:
                last, first = (part.strip() for part in name.split(",", 1))
                names.append((last, f"{first} {last}"))
            elif name:
                names.append((name.rsplit(" ", 1)[-1], name))
        organisation = self.get("organization") or self.get("institution")
        return names or ([(organisation, organisation)] if organisation else [])

    @property
    def by(self) -> str:
        """The authors as they stand in a list of references: all up to four, else three."""
        names = [whole for _, whole in self.authors if whole != "others"]
        more = len(names) > 4 or len(names) < len(self.authors)
        return ", ".join(names[:3] if more else names) + (" et al." if more else "")

    @property
    def short(self) -> str:
        """Schulman et al., 2017."""
        names = [last for last, _ in self.authors]
        by = " and ".join(names) if len(names) < 3 and "others" not in names else f"{names[0]} et al."
        return ", ".join(part for part in (by or self.get("title"), self.year) if part)

    def title_html(self) -> str:
        """The linked title; a Chinese one is marked as Chinese and followed by its English gloss."""
        lang = ' lang="zh"' if self.lang == "zh" else ""
        html = f'<a href="{escape(self.url)}"{lang}>{escape(self.get("title"))}</a>'
        if self.gloss:
            html += f' <span class="lib-gloss">({escape(self.gloss)})</span>'
        return html

    def meta_html(self) -> str:
        """Authors, where it appeared, year."""
        venue = self.get("journal") or self.get("booktitle") or self.get("publisher") or self.get("howpublished")
        parts = [escape(part) for part in (self.by, venue, self.year) if part]
        arxiv = self.get("eprint")
        if arxiv and "arxiv.org" not in self.url:
            parts.append(f'<a href="https://arxiv.org/abs/{arxiv}">arXiv:{arxiv}</a>')
        return ", ".join(parts)


def canonical(url: str) -> str:
    """One spelling for the addresses of one thing."""
    url = re.sub(r"^https?://(www\.)?", "", url.strip()).rstrip("/")
    arxiv = re.match(r"(?:arxiv\.org/(?:abs|pdf|html)|papers\.cool/arxiv)/(\d{4}\.\d{4,5})", url)
    return f"arxiv:{arxiv[1]}" if arxiv else url


def read(path: Path) -> tuple[dict[str, Entry], list[str]]:
    """The entries by key, and one line for each mistake: `file:line: key: what is wrong`."""
    if not path.is_file():
        return {}, [f"{path.name}: there is no such file"]
    library = bibtexparser.parse_string(path.read_text(encoding="utf-8"))
    name = path.name
    problems: list[tuple[int, str]] = []
    entries: dict[str, Entry] = {}

    for block in library.failed_blocks:
        line = (block.start_line or 0) + 1
        key = getattr(getattr(block, "ignore_error_block", None), "key", None) or _key(block.raw)
        if isinstance(block, DuplicateBlockKeyBlock):
            before = (block.previous_block.start_line or 0) + 1
            problems.append((line, f"{key}: duplicate key, first on line {before}"))
        elif isinstance(block, DuplicateFieldKeyBlock):
            problems.append((line, f"{key}: duplicate field {', '.join(sorted(block.duplicate_keys))}"))
        else:
            problems.append((line, f"{key}: malformed entry: {block.error}"))
    for block in library.comments:
        text = getattr(block, "comment", "").strip()
        stray = [part for part in text.splitlines() if part.strip() and not part.lstrip().startswith("%")]
        if type(block).__name__ == "ImplicitComment" and stray:
            line = (block.start_line or 0) + 1
            problems.append((line, f"{_key(text)}: malformed entry: text between entries: {stray[0][:60]!r}"))

    seen: dict[str, Entry] = {}
    for raw in library.entries:
        entry = Entry(raw.key, (raw.start_line or 0) + 1, {f.key.lower(): str(f.value) for f in raw.fields})
        entries[entry.key] = entry
        wrong = [f"missing field {field}" for field in REQUIRED if not entry.get(field)]
        if not re.fullmatch(r"[\w:.\-/]+", entry.key):
            wrong.append(f"malformed entry: {entry.key!r} cannot be cited as a key")
        if not any(entry.get(field) for field in ("url", "eprint", "doi")):
            wrong.append("missing field url, eprint or doi")
        if entry.get("url") and not re.match(r"https?://\S+$", entry.get("url")):
            wrong.append(f"url is not an http address: {entry.get('url')!r}")
        if entry.get("langid") and entry.get("langid") not in LANGUAGES:
            wrong.append(f"unknown langid {entry.get('langid')!r} (known: {', '.join(LANGUAGES)})")
        if entry.get("langid") == "chinese" and not entry.gloss:
            wrong.append("missing field titleaddon (the English gloss of a Chinese title)")
        wrong += [f"unknown keyword {word!r}" for word in entry.keywords if word not in TOPICS and word not in TYPES]
        if entry.keywords and not entry.topics:
            wrong.append(f"no topic among the keywords (topics: {', '.join(TOPICS)})")
        types = [word for word in entry.keywords if word in TYPES]
        if entry.keywords and len(types) != 1:
            wrong.append(f"needs exactly one type among the keywords (types: {', '.join(TYPES)})")
        addresses = {entry.get("url"), entry.get("eprint") and f"https://arxiv.org/abs/{entry.get('eprint')}"}
        if entry.get("doi"):
            addresses.add(f"https://doi.org/{entry.get('doi')}")
        for address in sorted({canonical(a) for a in addresses if a}):
            if address in seen:
                wrong.append(f"duplicate url {address}, first at {seen[address].key} on line {seen[address].line}")
            seen.setdefault(address, entry)
        problems += [(entry.line, f"{entry.key}: {text}") for text in wrong]
    return entries, [f"{name}:{line}: {text}" for line, text in sorted(problems)]


def _key(raw: str | None) -> str:
    match = re.search(r"@\w+\s*\{\s*([^\s,{}]+)", raw or "")
    return match[1] if match else "(no key)"


class Bibliography:
    """The entries of one build, and which of them a page has shown. The cite and library hooks share one."""

    entries: dict[str, Entry] = {}
    shown: set[str] = set()
    path: Path = Path("references.bib")


BIB = Bibliography()
