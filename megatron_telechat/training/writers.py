"""Where the records go: metrics.jsonl always, TensorBoard and Weights & Biases when asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.errors import ConfigError

METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb_id"
_BLOCK = 1 << 16


class MetricsWriter:
    """Writes on one rank; elsewhere it does nothing.

    Each record is one JSON object a line, flushed at once, so that a killed run keeps its curve. A
    line ``{"event": "resume", "step": N}`` says that later lines replace those beyond step N. TensorBoard is told the
    same; Weights & Biases keeps both, each at its step.

    Args:
        step: where the run goes on. What a killed run has written beyond it is taken back, also where it begins anew at
            0.
        may_write: asked before each record; False leaves it out (the folder belongs to another job by now).
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
        self._file: TextIO | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not enabled:
            return
        if run.logging.tensorboard:
            self._tensorboard = _open_tensorboard(run_dir / "tensorboard", step)
        if run.logging.wandb_project:
            self._wandb = _open_wandb(run, run_dir)
        path = run_dir / METRICS_FILE
        _drop_unfinished_line(path)
        written = path.exists() and path.stat().st_size > 0
        self._file = open(path, "a", encoding="utf-8")
        if step or written:
            self.write({"event": "resume", "step": step})

    def write(self, record: dict[str, Any]) -> None:
        """Write one record; its ``step`` places it on the curves."""
        if self._file is None or not self._may_write():
            return
        self._file.write(json.dumps(_finite(record)) + "\n")
        self._file.flush()
        numbers = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, record["step"])
        if self._wandb is not None and numbers:
            self._wandb.log({**numbers, "step": record["step"]})

    def close(self) -> None:
        """Close all sinks; Weights & Biases is told that the run ended."""
        for sink in (self._file, self._tensorboard):
            if sink is not None:
                sink.close()
        if self._wandb is not None:
            self._wandb.finish()


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
    """The keys of all records of one step that later lines did not take back."""
    path, keys = run_dir / METRICS_FILE, set()
    if not path.exists():
        return keys
    with open(path, encoding="utf-8") as lines:
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


def _open_tensorboard(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "logging.tensorboard is on, but the package tensorboard is missing",
            fix='pip install "megatron_telechat[tensorboard]", or leave --tensorboard out',
        ) from error
    used = folder.is_dir() and any(folder.iterdir())
    # Events of a killed run beyond the step it resumes from would be drawn twice.
    return SummaryWriter(str(folder), purge_step=step + 1 if step or used else None)


def _open_wandb(run: RunConfig, run_dir: Path):
    try:
        import wandb  # pyright: ignore[reportMissingImports] (optional)
    except ImportError as error:
        raise ConfigError(
            f"logging.wandb_project={run.logging.wandb_project}, but the package wandb is missing",
            fix='pip install "megatron_telechat[wandb]", or leave --wandb-project out',
        ) from error
    id_file = run_dir / WANDB_ID_FILE
    run_id: str | None = id_file.read_text().strip() if id_file.exists() else None
    session = wandb.init(
        project=run.logging.wandb_project,
        name=run.logging.wandb_exp_name or run_dir.name,
        id=run_id,
        resume="allow",
        dir=str(run_dir),
    )
    id_file.write_text(session.id)
    # Its own counter only grows: after a crash it would drop the steps that are taken again.
    session.define_metric("step")
    session.define_metric("*", step_metric="step")
    return session
