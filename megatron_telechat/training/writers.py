"""Where the records go: metrics.jsonl always, trackers when asked for (`training.trackers`). None ends a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.files import METRICS_FILE, append_lines
from megatron_telechat.training.tolerance import reason, tolerated, warn_once
from megatron_telechat.training.trackers import Tracker, open_trackers

_BLOCK = 1 << 16


class LineFile:
    """A file of lines, opened for each: so a folder that vanished, a file that was replaced or a disk that was full for
    an hour costs the lines of that time, one warning, and nothing else."""

    def __init__(self, path: Path):
        self.path = path
        self.lost = 0
        """Lines in a row that could not be written."""

    def append(self, line: str) -> None:
        """Write one line. What a write that failed has left of another does not swallow it."""
        try:
            append_lines(self.path, line + "\n")
        except OSError as error:
            self.lost += 1
            what = f"{self.path} cannot be written ({reason(error)})"
            warn_once(str(self.path), f"{what}; the training goes on, the lines until it can are lost")
            return
        if self.lost:
            warn_once(f"{self.path} again", f"{self.path} is written again; {self.lost} lines are lost")
            self.lost = 0


class MetricsWriter:
    """Writes on one rank; elsewhere it does nothing.

    Each record is one JSON object a line, written at once, so that a killed run keeps its curve. A
    line ``{"event": "resume", "step": N}`` says that later lines replace those beyond step N. TensorBoard is told the
    same; the other trackers keep both, each at its step. A tracker that fails is switched off with a warning.

    Args:
        step: where the run goes on. What a killed run has written beyond it is taken back, also where it begins anew at
            0.
        may_write: asked before each record; False leaves it out (the folder belongs to another job by now).

    Raises:
        ConfigError: the package of a tracker is missing.
    """

    def __init__(
        self,
        run: RunConfig,
        run_dir: Path,
        enabled: bool,
        step: int = 0,
        may_write: Callable[[], bool] = lambda: True,
    ):
        self._may_write = may_write
        self._lines: LineFile | None = None
        self._trackers: dict[str, Tracker] = {}
        if not enabled:
            return
        self._trackers = open_trackers(run, run_dir, step)
        path = run_dir / METRICS_FILE
        with tolerated(str(path)):
            _drop_unfinished_line(path)
        self._lines = LineFile(path)
        if step or (path.exists() and path.stat().st_size > 0):
            self.write({"event": "resume", "step": step})

    def write(self, record: dict[str, Any]) -> None:
        """Write one record; its ``step`` places it on the curves."""
        if self._lines is None or not self._may_write():
            return
        self._lines.append(json.dumps(_finite(record)))
        numbers = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
        for name in list(self._trackers) if numbers else ():
            self._guarded(name, lambda tracker: tracker.write(record["step"], numbers))

    def close(self) -> None:
        """Close all sinks; the trackers are told that the run ended."""
        for name in list(self._trackers):
            self._guarded(name, lambda tracker: tracker.close())
        self._trackers.clear()

    def _guarded(self, name: str, use: Callable[[Tracker], None]) -> None:
        tracker = self._trackers.pop(name)
        with tolerated(name, Exception):
            use(tracker)
            self._trackers[name] = tracker


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    # JSON has no NaN: a strict reader would refuse the whole file for one value.
    return {k: (str(v) if isinstance(v, float) and not math.isfinite(v) else v) for k, v in record.items()}


def _drop_unfinished_line(path: Path) -> None:
    """What a kill in the middle of a write left would join the next record, and both would be lost."""
    if not path.exists():
        return
    with open(path, "rb+") as stream:
        end = stream.seek(0, 2)
        while end:
            begin = max(0, end - _BLOCK)
            stream.seek(begin)
            newline = stream.read(end - begin).rfind(b"\n")
            if newline >= 0:
                stream.truncate(begin + newline + 1)
                return
            end = begin
        stream.truncate(0)


def recorded_at(run_dir: Path, step: int) -> set[str]:
    """The keys of all records of one step that later lines did not take back; none where the file cannot be read."""
    path, keys = run_dir / METRICS_FILE, set()
    if not path.exists():
        return keys
    with tolerated(str(path)), open(path, encoding="utf-8") as lines:
        for line in lines:
            try:
                record = json.loads(line)
                if record.get("event") == "resume" and record["step"] < step:
                    keys.clear()
                elif record["step"] == step:
                    keys.update(record)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
    return keys
