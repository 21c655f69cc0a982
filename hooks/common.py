"""What the hooks share: how they report a mistake, and how they link from one page to another."""

import logging
from html import escape
from pathlib import Path

from mkdocs.utils import get_relative_url

log = logging.getLogger("mkdocs.hooks.advantage")


def fail(config, message: str) -> None:
    """Fail the strict build, which goes on to its end so that it names every mistake; a draft build only warns."""
    log.log(logging.ERROR if config.strict else logging.WARNING, message)


def root(config) -> Path:
    """The folder that mkdocs.yml stands in."""
    return Path(config.config_file_path).resolve().parent


def link(page, url: str) -> str:
    """The address of a site url (as in `file.url`), relative to the page."""
    target, hash_, anchor = url.partition("#")
    return get_relative_url(target, page.file.url) + hash_ + anchor


def authored(page) -> bool:
    """False for pages that a hook generated from source code."""
    return not page.meta.get("generated")


def table(caption: str, columns: list[str], rows: list[str], *, classes: str, buttons: bool = False) -> str:
    """A table with a caption and column headings; each row is a string of cells. Buttons in the headings sort it."""
    heads = [f'<button type="button">{escape(name)}</button>' if buttons else escape(name) for name in columns]
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<table class="{classes}">\n<caption>{caption}</caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table>"
    )
