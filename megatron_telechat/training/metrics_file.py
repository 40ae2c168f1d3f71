"""Reading metrics.jsonl back: the curve as it stands, steps repeated after a resume counted once."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_telechat.errors import DataError
from megatron_telechat.files import METRICS_FILE


@dataclass
class Metrics:
    """One run's records. `train`, `valid` and `test` map a step to its record, in order; `resumes` are the steps
    resumed from."""

    name: str
    train: dict[int, dict[str, Any]] = field(default_factory=dict)
    valid: dict[int, dict[str, Any]] = field(default_factory=dict)
    test: dict[int, dict[str, Any]] = field(default_factory=dict)
    resumes: list[int] = field(default_factory=list)
    switches: list[int] = field(default_factory=list)
    """Steps at which a stage of lengths or layouts began."""
    torn: list[int] = field(default_factory=list)
    """Numbers of lines that a killed or failed write cut off; they are passed over."""

    def settled(self) -> list[dict[str, Any]]:
        """The records of training behind the last resume and the last switch of stages: all of one configuration."""
        began = max([*self.resumes, *self.switches], default=-1)
        return [record for step, record in self.train.items() if step > began]

    def series(self, key: str, of: str = "train") -> tuple[list[int], list[float]]:
        """Steps and values of one key, where it was recorded; text such as ``nan`` is read as a number."""
        steps, values = [], []
        for step, record in getattr(self, of).items():
            value = _number(record.get(key))
            if value is not None:
                steps.append(step)
                values.append(value)
        return steps, values


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def metrics_path(run: Path) -> Path:
    """The metrics file of a run folder, or the file itself where one is named."""
    return run / METRICS_FILE if run.is_dir() else run


def read_metrics(run: Path) -> Metrics:
    """The records of a run folder (or of a metrics file).

    A line ``{"event": "resume", "step": N}`` takes back every record beyond step N; a step recorded
    twice counts as last recorded. A line that a killed or failed write cut off is passed over, and noted.

    Raises:
        DataError: no such file, a line that is not a record, or no record at all.
    """
    path = metrics_path(run)
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise DataError(
            f"cannot read {path}: {reason}", str(run), "name a run folder, which holds metrics.jsonl"
        ) from error
    metrics = Metrics(run.resolve().name if run.is_dir() else run.resolve().parent.name)
    for number, line in enumerate(lines, 1):
        if line.strip():
            _take(metrics, line, f"{path}:{number}", number)
    if not metrics.train and not metrics.valid:
        raise DataError(f"{path} holds no step yet", str(run), "wait for the first logged step")
    metrics.train = dict(sorted(metrics.train.items()))
    metrics.valid = dict(sorted(metrics.valid.items()))
    metrics.test = dict(sorted(metrics.test.items()))
    return metrics


def _take(metrics: Metrics, line: str, where: str, number: int) -> None:
    try:
        record = json.loads(line)
    except ValueError:
        metrics.torn.append(number)
        return
    try:
        step = int(record["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{where} is not a metrics record", where, "a line is one JSON object with a step; fix or drop it"
        ) from error
    if record.get("event") == "resume":
        for kept in (metrics.train, metrics.valid, metrics.test):
            for later in [known for known in kept if known > step]:
                del kept[later]
        metrics.resumes = [*(known for known in metrics.resumes if known < step), step]
    elif record.get("event") == "stage":
        metrics.switches.append(step)
    elif "valid_loss" in record:
        metrics.valid[step] = record
    elif "test_loss" in record:
        metrics.test[step] = record
    elif "event" not in record:
        metrics.train[step] = record
