"""Labs: a committed, executed notebook becomes a page like any other, so that citations, maths, links, search and the
checks of the other hooks apply to it too. The build runs nothing; the tests run every lab again.

Pages link to `lab.ipynb`, which the reader gets as a page with a download of the notebook. An image in an output needs
its alternative text in the cell's metadata (`"alt": "..."`, or a list for several); the notebook's metadata holds its
`description`.
"""

import base64
import json
import re

from mkdocs.structure.files import File, Files

from common import fail

LINK = re.compile(r"(\]\([^)\s#]*)\.ipynb(#[^)\s]*)?(?=[)\s])")
IMAGES = {"image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpg"}
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def on_files(files, config):
    """Beside each notebook stands the page drawn from it; the notebook itself is its download."""
    out = list(files)
    for file in files:
        if file.src_uri.endswith(".ipynb") and file.inclusion.is_included():
            page = file.src_uri[: -len(".ipynb")] + ".md"
            markdown, images = convert(json.loads(file.content_string), file.src_uri, config)
            out.append(File.generated(config, page, content=markdown))
            out += [File.generated(config, uri, content=data) for uri, data in images.items()]
    return Files(out)


def on_page_markdown(markdown, page, config, files):
    """Links to a notebook lead to its page."""

    def to_page(match: re.Match) -> str:
        return f"{match[1]}.md{match[2] or ''}"

    return LINK.sub(to_page, markdown)


def text(value) -> str:
    return "".join(value) if isinstance(value, list) else value or ""


def convert(notebook: dict, uri: str, config) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and the images of its outputs by their address in the site."""
    stem = uri[: -len(".ipynb")]
    name = stem.rsplit("/", 1)[-1]
    out, images, noted = [], {}, False
    for number, cell in enumerate(notebook["cells"]):
        source = text(cell["source"]).strip("\n")
        if cell["cell_type"] == "markdown":
            out.append(source)
            if not noted and re.search(r"^# ", source, re.M):
                noted = True
                link = f'<a class="embed-download" href="../{name}.ipynb" download>download {name}.ipynb</a>'
                out.append(f'<span class="embed-note">{link} An executed notebook; the tests run it again.</span>')
        elif cell["cell_type"] == "code":
            if source and "hide-input" not in cell["metadata"].get("tags", []):
                out.append(fence(source, "python"))
            alts = cell["metadata"].get("alt") or []
            alts = [alts] if isinstance(alts, str) else list(alts)
            for output in cell.get("outputs", []):
                image = f"{stem}_files/{number}-{len(images)}"
                out.append(draw(output, alts, image, images, f"{uri}: cell {number}", config))
    meta = {"notebook": uri}
    if notebook["metadata"].get("description"):
        meta["description"] = notebook["metadata"]["description"]
    front = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in meta.items())
    return f"---\n{front}---\n" + "\n\n".join(part for part in out if part) + "\n", images


def fence(body: str, language: str) -> str:
    ticks = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", body))])
    return f"{ticks}{language}\n{body}\n{ticks}"


def draw(output: dict, alts: list[str], image: str, images: dict[str, bytes], where: str, config) -> str:
    """One output of a cell as Markdown. Progress bars and warnings (stderr) are left out."""
    if output["output_type"] == "error":
        fail(config, f"{where}: the committed notebook holds an error: {output['ename']}: {output['evalue']}")
        return ""
    if output["output_type"] == "stream":
        body = ESCAPES.sub("", text(output["text"])).rstrip()
        return fence(body, "text") if body and output["name"] == "stdout" else ""
    data = output.get("data", {})
    for kind, suffix in IMAGES.items():
        if kind in data:
            raw = text(data[kind])
            alt = alts.pop(0) if alts else output.get("metadata", {}).get("alt") or ""
            if not alt:
                fail(config, f'{where}: an image without alternative text: give the cell the metadata {{"alt": "..."}}')
            images[f"{image}.{suffix}"] = raw.encode() if suffix == "svg" else base64.b64decode(raw)
            beside = "/".join(image.split("/")[-2:])
            return f"![{alt.replace('[', '(').replace(']', ')')}]({beside}.{suffix})"
    if "text/markdown" in data:
        return text(data["text/markdown"])
    if "text/html" in data:
        html = re.sub(r"<style.*?</style>", "", text(data["text/html"]), flags=re.S)
        html = re.sub(r"\s*\n\s*", " ", html).strip()
        return f'<div class="table-scroll">{html}</div>'
    body = text(data.get("text/plain")).rstrip()
    return fence(body, "text") if body and not re.fullmatch(r"<.* at 0x.*>|<Figure .*>", body) else ""
