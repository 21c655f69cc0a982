"""What a newcomer does: clone, `make site`, `make test`. In full only, since it runs all the other tests."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.evidence("site/clone")
def test_the_two_commands_from_a_fresh_clone(evidence, tmp_path):
    if not evidence.full:
        pytest.skip("runs under make evidence SNIPPET=site/clone")
    clone = tmp_path / "advantage"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    for target, what, minutes in (("build", "make site, until it serves", 5), ("test", "make test", 20)):
        shutil.rmtree(clone / ".venv", ignore_errors=True)
        start = time.monotonic()
        done = subprocess.run(["make", target], cwd=clone, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        check = f"{what}, from a fresh clone, installing included"
        evidence("site/clone", check, value=(time.monotonic() - start) / 60, bar=minutes, unit="minutes")
