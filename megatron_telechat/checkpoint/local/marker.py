"""A small file in the run folder that says which local checkpoint is the newest: for the supervisor, which must see
that a job gets on, and for people. No load trusts it. No torch."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

MARKER = "local_checkpoint.json"


@dataclass(frozen=True)
class LocalMarker:
    """What it says.

    Attributes:
        save: id of the save.
        folder: on the nodes.
        time: UTC, ISO 8601.
    """

    step: int
    save: str
    folder: str
    time: str


def write_marker(run_dir: Path, marker: LocalMarker) -> None:
    """Replace the file. Raises OSError."""
    beside = run_dir / f".{MARKER}-{os.getpid()}"
    beside.write_text(json.dumps(asdict(marker)) + "\n", encoding="utf-8")
    beside.replace(run_dir / MARKER)


def read_marker(run_dir: Path) -> LocalMarker | None:
    """What the file says; None where there is none, or nothing that can be read."""
    try:
        body = json.loads((run_dir / MARKER).read_text(encoding="utf-8"))
        return LocalMarker(int(body["step"]), str(body["save"]), str(body["folder"]), str(body["time"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
