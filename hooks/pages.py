"""What every page must have: a description of its own, a heading, and alternative text on each image."""

import re

from common import fail

_descriptions: dict[str, str] = {}


def on_pre_build(config):
    _descriptions.clear()


def on_page_content(html, page, config, files):
    where = page.file.src_uri
    description = str(page.meta.get("description") or "").strip()
    if not description:
        hint = "a notebook: in its metadata; one with a colon needs quotes"
        fail(config, f"{where}: has no `description:` in its front matter ({hint})")
    elif len(description) > 160:
        fail(config, f"{where}: its description has {len(description)} characters; 160 at most")
    elif _descriptions.setdefault(description, where) != where:
        fail(config, f"{where}: has the same description as {_descriptions[description]}")
    if not re.search(r"<h1\b", html) and not page.meta.get("template"):
        fail(config, f"{where}: has no level 1 heading")
    for image in re.findall(r"<img\b[^>]*>", html):
        if not re.search(r'\balt="[^"]+"', image):
            fail(config, f"{where}: an image without alternative text: {image}")
    return html
