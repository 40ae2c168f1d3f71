"""Where the records go: metrics.jsonl always, TensorBoard and Weights & Biases when asked for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Optional

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.errors import ConfigError

METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb_id"


class MetricsWriter:
    """Writes on one rank; elsewhere it does nothing.

    Each record is one JSON object a line, flushed at once, so that a killed run keeps its curve. A
    line ``{"event": "resume", "step": N}`` says that later lines replace those beyond step N.
    """

    def __init__(self, run: RunConfig, run_dir: Path, enabled: bool):
        self._enabled = enabled
        self._file = self._tensorboard = self._wandb = None
        if not enabled:
            return
        self._file = open(run_dir / METRICS_FILE, "a", encoding="utf-8")
        if run.logging.tensorboard:
            self._tensorboard = _open_tensorboard(run_dir / "tensorboard")
        if run.logging.wandb_project:
            self._wandb = _open_wandb(run, run_dir)

    def write(self, record: dict[str, Any]) -> None:
        """Write one record; its ``step`` places it on the curves."""
        if not self._enabled:
            return
        self._file.write(json.dumps(_finite(record)) + "\n")
        self._file.flush()
        numbers = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, record["step"])
        if self._wandb is not None and numbers:
            self._wandb.log(numbers, step=record["step"])

    def close(self) -> None:
        for sink in (self._file, self._tensorboard):
            if sink is not None:
                sink.close()
        if self._wandb is not None:
            self._wandb.finish()


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    # JSON has no NaN: a strict reader would refuse the whole file for one value.
    return {k: (str(v) if isinstance(v, float) and not math.isfinite(v) else v) for k, v in record.items()}


def _open_tensorboard(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "logging.tensorboard is on, but the package tensorboard is missing",
            fix='pip install "megatron_telechat[tensorboard]", or leave --tensorboard out',
        ) from error
    return SummaryWriter(str(folder))


def _open_wandb(run: RunConfig, run_dir: Path):
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"logging.wandb_project={run.logging.wandb_project}, but the package wandb is missing",
            fix='pip install "megatron_telechat[wandb]", or leave --wandb-project out',
        ) from error
    id_file = run_dir / WANDB_ID_FILE
    run_id: Optional[str] = id_file.read_text().strip() if id_file.exists() else None
    session = wandb.init(
        project=run.logging.wandb_project,
        name=run.logging.wandb_exp_name or run_dir.name,
        id=run_id,
        resume="allow",
        dir=str(run_dir),
    )
    id_file.write_text(session.id)
    return session
