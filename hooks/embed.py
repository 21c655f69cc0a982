"""Put tested code on pages: a fence names a function, and the build puts its source there.

    ```python
    --8<-- "snippets/rlhf/grpo.py:grpo_loss"
    ```

What is printed runs as it stands when pasted into an empty file: the imports, constants and functions of the same file
that it needs come with it, found with `ast`, so the code carries no markers. They are folded away on the page, behind a
button that names them, and copied along. Every file under snippets/ and tests/<topic>/ also becomes a page of the site
with an anchor for each function, and each can be downloaded.
"""

import ast
import itertools
import re
import sys
from html import escape
from pathlib import Path

from mkdocs.structure.files import File, InclusionLevel

from common import authored, fail, link, root

FENCE = re.compile(
    r"^(?P<indent>[ \t]*)(?P<ticks>`{3,}|~{3,})(?P<info>[^\n`]*)\n(?P<body>.*?)^[ \t]*(?P=ticks)[ \t]*$", re.M | re.S
)
EMBED = re.compile(r'^\s*--8<--\s+"(?P<path>[^":]+)(?::(?P<name>[^"]+))?"\s*$')
BLOCK = re.compile(
    r'(?P<open><div id="(?P<anchor>code-[^"]+)"[^>]*>)(?P<pre><pre>(?:<span></span>)?<code>)(?P<code>.*?)</code>', re.S
)
NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
IMPORT = (ast.Import, ast.ImportFrom)

_explained: dict[str, list[str]] = {}  # snippet -> the pages that embed it


class EmbedError(ValueError):
    """The named file or function is not there."""


# --- extracting -----------------------------------------------------------------------------------------------------


def extract(path: Path, names: list[str]) -> str:
    """The source of top-level `names` of a file, with all that it needs of that file; the whole file without names."""
    return "\n".join(text for text, _ in pieces(path, names))


def pieces(path: Path, names: list[str]) -> list[tuple[str, list[str]]]:
    """The same, statement by statement, each with the blank lines above it: (text, []) where it was asked for by name,
    (text, what to call it) where it only comes along."""
    source = path.read_text(encoding="utf-8")
    if not names:
        return [(source.strip("\n"), [])]
    lines = source.splitlines()
    tree = ast.parse(source)
    bound: dict[str, list[ast.stmt]] = {}  # name -> the top-level statements that bind it
    for node in tree.body:
        for name in _binds(node):
            bound.setdefault(name, []).append(node)

    for name in names:
        if all(isinstance(node, IMPORT) for node in bound.get(name, [])):
            have = ", ".join(n for n, nodes in bound.items() if not all(isinstance(node, IMPORT) for node in nodes))
            raise EmbedError(f"no function, class or constant {name!r} in {path.name} (it has {have or 'none'})")

    needed: dict[int, ast.stmt] = {}
    used: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name in used:
            continue
        used.add(name)
        for node in bound.get(name, []):
            needed[node.lineno] = node
            if not isinstance(node, IMPORT):
                todo += _reads(node)
    for node in tree.body:  # it changes what the code below means, so it always comes along
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            needed[node.lineno] = node

    out: list[tuple[str, list[str]]] = []
    previous: ast.stmt | None = None
    for _, node in sorted(needed.items()):
        text = _import(node, used) if isinstance(node, IMPORT) else _segment(node, lines)
        if previous is not None:
            if isinstance(node, NAMED) or isinstance(previous, NAMED):
                text = "\n\n" + text
            elif isinstance(node, IMPORT) != isinstance(previous, IMPORT) or _group(node) != _group(previous):
                text = "\n" + text
        label = ["imports"] if isinstance(node, IMPORT) else sorted(_binds(node))
        out.append((text, [] if _binds(node) & set(names) else label))
        previous = node
    return out


def folded(parts: list[tuple[str, list[str]]]) -> tuple[list[bool], list[str]]:
    """For each line of the pieces whether it only comes along; and the names of what does, each once."""
    fold: list[bool] = []
    labels: dict[str, None] = {}
    for text, label in parts:
        bare = text.lstrip("\n")
        above = len(text) - len(bare)
        # Blank lines go with what they part from a statement that is shown.
        fold += [bool(label) or all(fold)] * above + [bool(label)] * len(bare.split("\n"))
        labels |= dict.fromkeys(label)
    return fold, list(labels)


def _binds(node: ast.stmt) -> set[str]:
    """The names that a top-level statement binds."""
    if isinstance(node, NAMED):
        return {node.name}
    if isinstance(node, IMPORT):
        return {(alias.asname or alias.name.split(".")[0]) for alias in node.names}
    if isinstance(node, ast.If) and isinstance(node.test, ast.Compare) and ast.unparse(node.test.left) == "__name__":
        return set()
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _reads(node: ast.AST) -> list[str]:
    """The names that a statement mentions, those in quoted annotations included."""
    names = []
    for n in ast.walk(node):
        names += [n.id] if isinstance(n, ast.Name) else []
        for quoted in (getattr(n, "annotation", None), getattr(n, "returns", None)):
            if isinstance(quoted, ast.Constant) and isinstance(quoted.value, str):
                names += _reads(ast.parse(quoted.value, mode="eval"))
    return names


def _import(node: ast.stmt, used: set[str]) -> str:
    """An import with only the names that are used."""
    if isinstance(node, ast.ImportFrom) and node.module != "__future__":
        kept = [alias for alias in node.names if (alias.asname or alias.name) in used]
        node = ast.ImportFrom(module=node.module, names=kept, level=node.level)
    return ast.unparse(node)


def _segment(node: ast.stmt, lines: list[str]) -> str:
    """A statement's lines, with its decorators and the comment that stands right above it."""
    start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
    while start > 0 and lines[start - 1].startswith("#") and not lines[start - 1].startswith("#!"):
        start -= 1
    return "\n".join(lines[start : node.end_lineno])


def _group(node: ast.stmt) -> str:
    """Imports stand in groups: those from __future__, the standard library, and the rest."""
    if not isinstance(node, IMPORT):
        return "code"
    module = (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
    if module == "__future__":
        return "future"
    return "stdlib" if module.split(".")[0] in sys.stdlib_module_names else "other"


def embeds(markdown: str):
    """Each python fence: (match, path or None, names). Path is None where the fence holds anything but embeds."""
    for match in FENCE.finditer(markdown):
        if not re.match(r"\s*\{?\s*\.?(python|py|python3|pycon)\b", match["info"]):
            continue
        wanted = [EMBED.match(line) for line in match["body"].splitlines() if line.strip()]
        paths = {m["path"] for m in wanted if m}
        if not wanted or not all(wanted) or len(paths) != 1:
            yield match, None, []
        else:
            yield match, paths.pop(), [m["name"] for m in wanted if m["name"]]


# --- the site -------------------------------------------------------------------------------------------------------


def on_files(files, config):
    """Add a page for each snippet and topic test, and each snippet as a download."""
    base = root(config)
    _explained.clear()
    for file in files.documentation_pages():
        for _, path, _ in embeds(file.content_string):
            if path and file.src_uri not in _explained.setdefault(path, []):
                _explained[path].append(file.src_uri)
    sources = sorted(base.glob("snippets/**/*.py")) + sorted(base.glob("tests/*/test_*.py"))
    for path in sources:
        uri = path.relative_to(base).as_posix()
        if path.name == "__init__.py" or uri.startswith("tests/site/"):
            continue
        files.append(File.generated(config, uri, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV))
        page = File.generated(config, uri[:-3] + ".md", content=_page(path, uri), inclusion=InclusionLevel.NOT_IN_NAV)
        files.append(page)
    return files


def _page(path: Path, uri: str) -> str:
    source = path.read_text(encoding="utf-8").strip("\n")
    try:
        about = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0].replace("\n", " ")
    except SyntaxError:
        about = ""
    about = re.sub(r"[\"\\]", "", f"Source of {uri}. {about}")
    about = about if len(about) <= 160 else about[:157].rsplit(" ", 1)[0] + "..."
    ticks = "`" * max([3, *(len(t) + 1 for t in re.findall("`+", source))])
    return (
        f'---\ntitle: "{uri}"\ndescription: "{about}"\ngenerated: true\nsearch:\n  exclude: true\n---\n'
        f"# `{uri}`\n\n<!-- source-links -->\n\n{ticks}python\n{source}\n{ticks}\n"
    )


def on_page_markdown(markdown, page, config, files):
    """Replace each embed by the source it names."""
    if not authored(page):
        return markdown.replace("<!-- source-links -->", _source_links(page, files))
    if page.meta.get("notebook"):
        return markdown  # its code is what was run
    base = root(config)
    where = page.file.src_uri
    ids: set[str] = set()
    folds: dict[str, tuple[list[bool], list[str]]] = {}
    out, at = [], 0
    for match, path, names in embeds(markdown):
        first = match["body"].strip().splitlines()[0][:70] if match["body"].strip() else "(empty)"
        if path is None:
            fail(config, f'{where}: a python fence holds only embeds of one file, `--8<-- "file:name"`; found: {first}')
            continue
        name = ",".join(names)
        file = base / path
        if not (path.startswith("snippets/") and file.is_file()):
            fail(config, f"{where}: cannot embed {path}:{name or '(whole file)'}: there is no file {path}")
            continue
        try:
            parts = pieces(file, names)
        except (EmbedError, SyntaxError) as error:
            fail(config, f"{where}: cannot embed {path}:{name}: {error}")
            continue
        anchor = unique(f"code-{names[0] if names else file.stem}", ids)
        indent, ticks = match["indent"], match["ticks"]
        info = match["info"].strip()
        info = f"{{ .python #{anchor} }}" if info in ("python", "py") else info
        code = "\n".join(text for text, _ in parts)
        body = "\n".join(indent + line if line else "" for line in code.splitlines())
        folds[anchor] = folded(parts)
        note = _note(page, files, path, names, anchor)
        out += [markdown[at : match.start()], f"{indent}{ticks}{info}\n{body}\n{indent}{ticks}\n\n{indent}{note}\n"]
        at = match.end()
    result = "".join(out) + markdown[at:]
    for line in FENCE.sub("", result).splitlines():
        if EMBED.match(line):
            fail(config, f"{where}: an embed must stand inside a ```python fence: {line.strip()}")
    page.embed_ids, page.embed_folds = ids, folds
    return result


def unique(anchor: str, taken: set[str]) -> str:
    """An anchor that is not taken yet; it is taken then."""
    name, n = anchor, 2
    while name in taken:
        name, n = f"{anchor}-{n}", n + 1
    taken.add(name)
    return name


def _note(page, files, path: str, names: list[str], anchor: str) -> str:
    """The line under the code: whole file, download, test, permalink."""
    whole = files.get_file_from_path(path[:-3] + ".md")
    hash_ = f"#{names[0]}" if names else ""
    parts = [
        f'<a class="embed-file" href="{link(page, whole.url + hash_)}">{escape(path)}</a>',
        _download(page, path),
    ]
    if test := files.get_file_from_path(_test(path)):
        parts.append(f'<a class="embed-test" href="{link(page, test.url)}">its tests</a>')
    parts.append(f'<a class="embed-permalink" href="#{anchor}">permalink</a>')
    return f'<span class="embed-note">{" ".join(parts)}</span>'


def _download(page, path: str) -> str:
    name = path.rsplit("/", 1)[-1]
    return f'<a class="embed-download" href="{link(page, path)}" download="{name}">download {name}</a>'


def _test(path: str) -> str:
    folder, _, name = path.removeprefix("snippets/").rpartition("/")
    return f"tests/{folder}/test_{name[:-3]}.md"


def _source_links(page, files) -> str:
    """On a source page: download it, its tests, and the pages that explain it."""
    path = page.file.src_uri[:-3] + ".py"
    parts = [_download(page, path)]
    if path.startswith("snippets/") and (test := files.get_file_from_path(_test(path))):
        parts.append(f'<a class="embed-test" href="{link(page, test.url)}">its tests</a>')
    if path.startswith("tests/"):
        snippet = "snippets/" + path.removeprefix("tests/").replace("/test_", "/")[:-3] + ".md"
        if file := files.get_file_from_path(snippet):
            parts.append(f'<a href="{link(page, file.url)}">what it tests</a>')
    for uri in _explained.get(path, []):
        parts.append(f'explained in <a href="{link(page, files.get_file_from_path(uri).url)}">{uri[:-3]}</a>')
    return f'<span class="embed-note">{" ".join(parts)}</span>'


def _fold(match: re.Match, fold: list[bool], labels: list[str]) -> str:
    """The block with what only comes along in spans that the page hides, below a button that shows it. (A span of
    pygments' never reaches beyond its line.)"""
    if not labels:
        return match[0]
    lines = match["code"].removesuffix("\n").split("\n")
    if len(lines) != len(fold):
        raise EmbedError(f"{match['anchor']}: {len(lines)} lines were drawn for {len(fold)}")
    code = ""
    for hide, group in itertools.groupby(zip(lines, fold, strict=True), key=lambda pair: pair[1]):
        text = "".join(line + "\n" for line, _ in group)
        code += f'<span class="embed-needed">{text}</span>' if hide else text
    names = ", ".join(labels)
    button = f'<button type="button" class="embed-fold" aria-expanded="false">Copied along: {names}</button>'
    return f"{match['open']}{button}{match['pre']}{code}</code>"


def on_page_content(html, page, config, files):
    """Give each function of a source page an anchor, and tell mkdocs about the anchors of the code on all pages."""
    if authored(page):
        page.present_anchor_ids = (page.present_anchor_ids or set()) | getattr(page, "embed_ids", set())
        folds = getattr(page, "embed_folds", {})
        return BLOCK.sub(lambda match: _fold(match, *folds.get(match["anchor"], ([], []))), html)
    ids: set[str] = set()

    def anchor(match: re.Match) -> str:
        # Not an id on the span itself: the theme takes a span with an id for a whole line.
        return f'<a id="{unique(match[2], ids)}"></a>{match[0]}'

    html = re.sub(
        r'(?:^|(?<=<code>))(?:<span class="k">async</span>(?:<span class="w"> </span>| ))?'
        r'<span class="k">(?:def|class)</span>(?:<span class="w"> </span>| )<span class="(nf|nc)">(\w+)</span>',
        anchor,
        html,
        flags=re.M,
    )
    page.present_anchor_ids = (page.present_anchor_ids or set()) | ids
    return html
