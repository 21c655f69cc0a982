"""A small site in a folder of its own, for trying the hooks on."""

from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

ROOT = Path(__file__).resolve().parents[2]
HOOKS = ["notebooks", "embed", "evidence", "library", "cite", "pages"]
CONFIG = f"""
site_name: Trial
site_url: ""
strict: true
theme: {{name: null, custom_dir: theme}}
plugins: []
hooks: [{", ".join(str(ROOT / "hooks" / f"{name}.py") for name in HOOKS)}]
markdown_extensions: [attr_list, md_in_html, tables, pymdownx.superfences, pymdownx.highlight, pymdownx.details]
validation: {{nav: {{omitted_files: ignore}}, links: {{anchors: warn, not_found: warn}}}}
"""
TEMPLATE = "<main>{{ page.content }}</main><nav>{% for item in page.toc %}{{ item }}{% endfor %}</nav>"


class Project:
    """A site in a folder of its own, with the hooks of this repository."""

    def __init__(self, base: Path, caplog):
        self.base = base
        self.caplog = caplog
        self.write("mkdocs.yml", CONFIG)
        self.write("theme/main.html", TEMPLATE)
        self.write("references.bib", "")
        self.page("index.md", "Nothing yet.")

    def write(self, path: str, text: str) -> Path:
        file = self.base / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return file

    def page(self, path: str, body: str) -> Path:
        return self.write(f"docs/{path}", f"---\ndescription: About {path}.\n---\n# Title of {path}\n\n{body}\n")

    def build(self, **settings) -> None:
        build(load_config(str(self.base / "mkdocs.yml"), site_dir=str(self.base / "site"), **settings))

    def html(self, url: str) -> str:
        return (self.base / "site" / url / "index.html").read_text(encoding="utf-8")

    def fails(self) -> str:
        """What the strict build says when it fails; a build that passes fails the test."""
        self.caplog.clear()
        with pytest.raises(Abort):
            self.build()
        return self.caplog.text
