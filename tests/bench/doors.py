"""Start a bench of tools/bench as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench"


def bench(name: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run it to its end.

    Args:
        name: of the script.
        arguments: its flags.
    """
    command = [sys.executable, str(BENCH / name), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # more threads than free cores wait for each other
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
