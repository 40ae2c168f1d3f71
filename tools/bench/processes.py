"""What the benches share about the processes that they start."""

from __future__ import annotations

import subprocess
from typing import IO


def pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    """(stdin, stdout) of a process that was started with a pipe for both."""
    assert process.stdin is not None and process.stdout is not None
    return process.stdin, process.stdout


def output_of(process: subprocess.Popen[str]) -> str:
    """All that a process writes to its piped stdout, read to the end."""
    assert process.stdout is not None
    return process.stdout.read()
