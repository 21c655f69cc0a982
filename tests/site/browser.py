"""What the browser tests share: finding a browser, building and serving the site once, watching what a page does."""

import fcntl
import functools
import gzip
import os
import shutil
import subprocess
import sys
import threading
import time
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from serve import Handler  # hooks/serve.py, what `make site` serves with

ROOT = Path(__file__).resolve().parents[2]
AXE = (Path(__file__).parent / "vendor" / "axe.min.js").read_text(encoding="utf-8")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
COMPRESSED = {".woff2", ".png", ".jpg", ".gz"}  # these gain nothing from gzip on the way


def executable() -> str | None:
    """An installed Chromium or Chrome; None leaves the choice to Playwright, which has its own."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    return found or (str(MAC) if MAC.exists() else None)


def build(shared: Path) -> tuple[Path, float]:
    """Build the site strictly, once for all processes of this test run. Returns its folder and the seconds it took.

    ADVANTAGE_SITE names a site that is built already, for quick rounds while writing.
    """
    if ready := os.environ.get("ADVANTAGE_SITE"):
        return Path(ready), 0.0
    site, took, failed = shared / "site", shared / "site.seconds", shared / "site.failed"
    with open(shared / "site.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if failed.exists():
            raise RuntimeError(failed.read_text())
        if not took.exists():
            start = time.perf_counter()
            command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--clean", "--site-dir", str(site)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                said = [line for line in (done.stdout + done.stderr).splitlines() if "INFO" not in line]
                failed.write_text("the strict build failed:\n" + "\n".join(said)[-4000:])
                raise RuntimeError(failed.read_text())
            took.write_text(str(time.perf_counter() - start))
    return site, float(took.read_text())


class Compressing(Handler):
    """Sends text compressed, as GitHub Pages does."""

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        path = path / "index.html" if path.is_dir() and urlsplit(self.path).path.endswith("/") else path
        if not path.is_file() or path.suffix in COMPRESSED or "gzip" not in self.headers.get("Accept-Encoding", ""):
            return super().do_GET()
        body = gzip.compress(path.read_bytes(), 6)
        self.send_response(200)
        self.send_header("Content-Type", self.guess_type(str(path)))
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Site:
    """The built site, served on a free port of this machine."""

    def __init__(self, folder: Path, seconds: float):
        self.folder, self.seconds = folder, seconds
        handler = functools.partial(Compressing, directory=str(folder))
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    @functools.cached_property
    def pages(self) -> list[str]:
        """The address of each page, as "/rlhf/grpo/"."""
        files = [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*.html")]
        return sorted("/" + file.removesuffix("index.html") for file in files if file != "404.html")

    @functools.cached_property
    def written(self) -> list[str]:
        """The pages that people wrote; the others show the source of a snippet or a test."""
        return [page for page in self.pages if not page.startswith(("/snippets/", "/tests/"))]

    def file(self, url: str) -> Path:
        path = unquote(urlsplit(url).path).lstrip("/")
        return self.folder / (path + "index.html" if not path or path.endswith("/") else path)

    @functools.cache  # noqa: B019  one site lives as long as the tests
    def weight(self, url: str) -> int:
        """The bytes that a server which compresses would send for this address."""
        path = self.file(url)
        if not path.is_file():
            return 0  # asked for, but not there: Watch.wrong says so
        data = path.read_bytes()
        return len(data) if path.suffix in COMPRESSED else len(gzip.compress(data, 6))


class Watch:
    """All that a page asks for, and all that goes wrong on it."""

    def __init__(self, page, site: Site):
        self.asked: list[str] = []
        self.wrong: list[str] = []
        self.site = site
        page.on("request", self._request)
        page.on("response", lambda r: r.status >= 400 and self.wrong.append(f"{r.status} for {r.url}"))
        page.on("requestfailed", lambda r: self.wrong.append(f"failed: {r.url}"))
        page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        page.on("console", self._console)

    def _request(self, request):
        if request.url.startswith(("data:", "blob:")):
            return
        if not request.url.startswith(self.site.url + "/"):
            self.wrong.append(f"leaves the site: {request.url}")
        self.asked.append(request.url)

    def _console(self, message):
        if message.type in ("error", "warning"):
            self.wrong.append(f"console {message.type}: {message.text}")

    @property
    def weight(self) -> int:
        return sum(self.site.weight(url) for url in {url.split("#")[0].split("?")[0] for url in self.asked})


def thin(page):
    """Leave one block of code, of 200 tokens, and ten formulas as they are; the others, which look the same, become
    plain text. axe looks at each token by itself, and its time goes there."""
    page.evaluate(
        """() => {
            [...document.querySelectorAll("pre code")].slice(1).forEach(e => (e.textContent = e.textContent));
            const far = [...document.querySelectorAll("pre code span")].slice(200);
            far.forEach(e => e.isConnected && e.replaceWith(e.textContent));
            [...document.querySelectorAll(".katex")].slice(10).forEach(e => (e.textContent = ""));
        }"""
    )


def axe(page, *, only_colours: bool = False) -> list[str]:
    """The violations of WCAG 2 A and AA that axe finds, one line each."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE)
    rules = ["color-contrast", "link-in-text-block"] if only_colours else ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]
    found = page.evaluate(
        """(runOnly) => axe.run(document, {runOnly, resultTypes: ["violations"]}).then((r) => r.violations.map((v) =>
            [v.id, v.nodes.length, v.nodes[0].html.slice(0, 160),
                (v.nodes[0].any[0] || v.nodes[0].all[0] || v.nodes[0].none[0] || {}).message]))""",
        rules,
    )
    return [f"axe {name} ({count} times), first {html}: {why}" for name, count, html, why in found]
