"""Google's Lighthouse on the built site, desktop preset: python -m benchmarks.lighthouse http://127.0.0.1:8000/ [more]

Prints performance, accessibility, best practices and SEO of each address, out of 100. Needs npm: Lighthouse, and a Node
new enough for it, are installed in a folder of their own. `make evidence SNIPPET=site/lighthouse` records the result.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = ["lighthouse@13.5.0", "node@22.23.3"]
CATEGORIES = ["performance", "accessibility", "best-practices", "seo"]
CHROME = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"


def install(folder: Path) -> Path:
    """Install Lighthouse in `folder` unless it is there, and return the folder of its programs."""
    programs = folder / "node_modules" / ".bin"
    if not (programs / "lighthouse").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"private": true}')
        subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--silent", *PACKAGES], cwd=folder, check=True)
    return programs


def scores(url: str, programs: Path, chrome: str | None = None) -> dict[str, int]:
    """The four scores of one address, 0 to 100. chrome: the browser to use."""
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    if chrome:
        environment["CHROME_PATH"] = chrome
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [str(programs / "lighthouse"), url, "--preset=desktop", "--output=json", f"--output-path={report}"]
        command += ["--quiet", f"--chrome-flags={CHROME}", f"--only-categories={','.join(CATEGORIES)}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        if not report.exists():
            raise RuntimeError(f"lighthouse gave no report for {url}:\n{done.stderr[-2000:]}")
        found = json.loads(report.read_text(encoding="utf-8"))["categories"]
    return {name: round(100 * found[name]["score"]) for name in CATEGORIES}


def main() -> int:
    if len(sys.argv) < 2 or not shutil.which("npm"):
        reason = "name an address to look at" if shutil.which("npm") else "npm is not installed"
        print(f"{reason}: python -m benchmarks.lighthouse http://127.0.0.1:8000/", file=sys.stderr)
        return 2
    programs = install(Path(tempfile.gettempdir()) / "advantage-lighthouse")
    chrome = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    print(f"{'':40s}" + "".join(f"{name:>16s}" for name in CATEGORIES))
    for url in sys.argv[1:]:
        print(f"{url:40s}" + "".join(f"{score:16d}" for score in scores(url, programs, chrome).values()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
