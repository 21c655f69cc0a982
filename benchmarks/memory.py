"""Peak memory, which is a property of a process: each side is measured in one of its own.

Freed memory must go back to the system at once. Else a process keeps what it once had, and what comes later seems to
take little; so every block but a small one is mapped on its own. Where the C library is not glibc, the settings do
nothing, and a peak is a lower bound.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RETURN = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}


def status(field: str) -> float:
    """MB of this process: "VmRSS" now, "VmHWM" the most since the start, or since `restart`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise ValueError(f"no {field} in /proc/self/status")


def restart() -> None:
    """Let the high-water mark begin anew at what the process holds now."""
    Path("/proc/self/clear_refs").write_text("5")


def measured_alone(module: str, *arguments: str) -> float:
    """The number that `python -m module arguments` prints last."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ | RETURN)
    return json.loads(done.stdout.splitlines()[-1])
