"""What the benches share about the processes that they start."""

from __future__ import annotations

import subprocess
from typing import IO

MB = 1e6
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "16384", "MALLOC_TOP_PAD_": "0"}
"""Environment in which every tensor comes from the system and goes back at once."""


def resident_mb(field: str) -> float:
    """A line of /proc/self/status: VmRSS, the resident set, or VmHWM, the largest since it was reset."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024 / MB


def pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    """(stdin, stdout) of a process that was started with a pipe for both."""
    assert process.stdin is not None and process.stdout is not None
    return process.stdin, process.stdout


def output_of(process: subprocess.Popen[str]) -> str:
    """All that a process writes to its piped stdout, read to the end."""
    assert process.stdout is not None
    return process.stdout.read()
