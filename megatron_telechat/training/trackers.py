"""Dashboards behind one protocol: TensorBoard, Weights & Biases, MLflow, SwanLab. Each is imported when asked for."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.errors import ConfigError
from megatron_telechat.training.tolerance import tolerated

WANDB_ID_FILE, MLFLOW_ID_FILE, SWANLAB_ID_FILE = "wandb_id", "mlflow_id", "swanlab_id"


class Tracker(Protocol):
    """Where curves are drawn."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Values at a step. After a crash steps come again."""
        ...

    def close(self) -> None:
        """The run ended."""
        ...


class TensorBoard:
    """Event files in ``tensorboard/`` of the run folder; steps of a killed run beyond its resume are taken back."""

    def __init__(self, run: RunConfig, run_dir: Path, step: int):
        module = _imported("torch.utils.tensorboard", "tensorboard", "logging.tensorboard is on", "--tensorboard")
        folder = run_dir / "tensorboard"
        used = folder.is_dir() and any(folder.iterdir())
        # Events of a killed run beyond the step it resumes from would be drawn twice.
        self._writer = module.SummaryWriter(str(folder), purge_step=step + 1 if step or used else None)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """See :class:`Tracker`."""
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        """See :class:`Tracker`."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; the step is a metric, so that steps that are repeated are kept. ``WANDB_MODE=offline``
    needs no network."""

    def __init__(self, run: RunConfig, run_dir: Path, step: int):
        logging = run.logging
        wandb = _imported("wandb", "wandb", f"logging.wandb_project={logging.wandb_project}", "--wandb-project")
        self._session = wandb.init(
            project=logging.wandb_project,
            name=logging.wandb_exp_name or run_dir.name,
            id=_kept_id(run_dir / WANDB_ID_FILE),
            resume="allow",
            dir=str(run_dir),
        )
        _keep_id(run_dir / WANDB_ID_FILE, self._session.id)
        # Its own counter only grows: after a crash it would drop the steps that are taken again.
        self._session.define_metric("step")
        self._session.define_metric("*", step_metric="step")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """See :class:`Tracker`."""
        self._session.log({**numbers, "step": step})

    def close(self) -> None:
        """See :class:`Tracker`."""
        self._session.finish()


class MLflow:
    """A run of MLflow, on a server or in ``mlflow.db`` of the run folder."""

    def __init__(self, run: RunConfig, run_dir: Path, step: int):
        logging = run.logging
        # Its own default waits for minutes for a server that is gone, and the training with it.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        what = f"logging.mlflow_experiment={logging.mlflow_experiment}"
        self._mlflow = _imported("mlflow", "mlflow", what, "--mlflow-experiment")
        given = logging.mlflow_tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._mlflow.set_tracking_uri(given or f"sqlite:///{(run_dir / 'mlflow.db').absolute()}")
        self._mlflow.set_experiment(logging.mlflow_experiment)
        session = self._mlflow.start_run(
            run_id=_kept_id(run_dir / MLFLOW_ID_FILE), run_name=logging.mlflow_run_name or run_dir.name
        )
        _keep_id(run_dir / MLFLOW_ID_FILE, session.info.run_id)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """See :class:`Tracker`."""
        self._mlflow.log_metrics(dict(numbers), step=step)

    def close(self) -> None:
        """See :class:`Tracker`."""
        self._mlflow.end_run()


class SwanLab:
    """An experiment of SwanLab: in its cloud, or in ``swanlog/`` of the run folder."""

    def __init__(self, run: RunConfig, run_dir: Path, step: int):
        logging = run.logging
        what = f"logging.swanlab_project={logging.swanlab_project}"
        swanlab = _imported("swanlab", "swanlab", what, "--swanlab-project")
        kept = _kept_id(run_dir / SWANLAB_ID_FILE)
        mode = logging.swanlab_mode or os.environ.get("SWANLAB_MODE") or "online"
        # Only its cloud can go on with a run.
        resumed = {"id": kept, "resume": "allow"} if mode == "online" and kept else {}
        self._session = swanlab.init(
            project=logging.swanlab_project,
            name=logging.swanlab_exp_name or run_dir.name,
            mode=mode,
            log_dir=str(run_dir / "swanlog"),
            **resumed,
        )
        if mode == "online":
            _keep_id(run_dir / SWANLAB_ID_FILE, self._session.id)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """See :class:`Tracker`."""
        self._session.log(dict(numbers), step=step)

    def close(self) -> None:
        """See :class:`Tracker`."""
        self._session.finish()


_TRACKERS: dict[str, tuple[str, Callable[[RunConfig, Path, int], Tracker]]] = {
    "TensorBoard": ("tensorboard", TensorBoard),
    "Weights & Biases": ("wandb_project", WeightsAndBiases),
    "MLflow": ("mlflow_experiment", MLflow),
    "SwanLab": ("swanlab_project", SwanLab),
}
"""Name for people → the field that asks for it, and how it is opened."""


def open_trackers(run: RunConfig, run_dir: Path, step: int) -> dict[str, Tracker]:
    """The trackers that a run asks for. One that cannot be opened (no network, no key) is a warning.

    Args:
        step: where the run goes on.

    Raises:
        ConfigError: a package is missing.
    """
    found: dict[str, Tracker] = {}
    for name, (field, tracker) in _TRACKERS.items():
        if getattr(run.logging, field):
            with tolerated(name, Exception):
                found[name] = tracker(run, run_dir, step)
    return found


def _imported(module: str, package: str, what: str, flag: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{what}, but the package {package} is missing",
            fix=f'pip install "megatron_telechat[{package}]", or leave {flag} out',
        ) from error


def _kept_id(path: Path) -> str | None:
    """The run of a tracker that a resume goes on with."""
    with tolerated(path.name):
        return path.read_text(encoding="utf-8").strip() or None if path.exists() else None
    return None


def _keep_id(path: Path, identifier: str) -> None:
    with tolerated(path.name):
        path.write_text(identifier, encoding="utf-8")
