"""Files of a run that several rooms write or read. No torch."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

METRICS_FILE = "metrics.jsonl"
"""In the run folder: a record a line."""

_READ_BYTES = 1 << 24


def append_lines(path: Path, lines: str) -> None:
    """Append whole lines. What a write that was cut off has left of another line does not swallow the first of them.

    Raises:
        OSError: not all of it could be written.
    """
    with open(path, "ab+", buffering=0) as stream:
        data = lines.encode()
        if stream.seek(0, os.SEEK_END):
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                data = b"\n" + data
        if stream.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def sha256_of(path: Path | str) -> str:
    """SHA-256 of a whole file, in hexadecimal digits. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
