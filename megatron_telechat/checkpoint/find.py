"""Finding the checkpoint to load, and whether it fits the model."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from megatron_telechat.checkpoint.format import CheckpointReader
from megatron_telechat.checkpoint.lineage import candidates, folder_of_step
from megatron_telechat.checkpoint.names import MANIFEST
from megatron_telechat.checkpoint.optimizer_state import MASTER
from megatron_telechat.checkpoint.stores import store_of
from megatron_telechat.checkpoint.verify import read_sound_manifest
from megatron_telechat.config.schema import ModelConfig, RunConfig
from megatron_telechat.config.yaml_io import run_config_from_yaml
from megatron_telechat.errors import CheckpointError, ConfigError, Problem
from megatron_telechat.locations import Location, location
from megatron_telechat.tensors.table import tensor_table

_SHOWN = 8

log = logging.getLogger(__name__)


def latest_checkpoint(root: Location | str) -> Location | None:
    """The newest checkpoint under ``root`` whose manifest and file sizes are right, None where nothing was saved;
    what a run loads is read whole before (`opening.open_verified`).

    ``root`` may also be one checkpoint. Raises CheckpointError when there are checkpoints but
    every one is damaged: a run must not begin anew over them.
    """
    return find_checkpoint(location(root))[0]


def find_checkpoint(root: Location, step: int | None = None) -> tuple[Location | None, tuple[str, ...]]:
    """(folder, what had to be passed over). See :func:`latest_checkpoint`."""
    if store_of(root).is_file(root / MANIFEST):
        _open(root)
        return root, ()
    if step is not None:
        folder = folder_of_step(root, step)
        _open(folder)
        return folder, ()
    problems: list[Problem] = []
    for folder in (one.path for one in candidates(root)):
        try:
            _open(folder)
        except CheckpointError as error:
            problems.extend(error.problems)
            continue
        notes = tuple(f"passed over: {problem.what} ({problem.where})" for problem in problems)
        for note in notes:
            log.warning("%s", note)
        return folder, notes
    if problems:
        raise CheckpointError(problems)
    return None, ()


def _open(folder: Location) -> None:
    """Check the manifest and the sizes of all files. Raises CheckpointError."""
    CheckpointReader(folder, manifest=read_sound_manifest(folder))


def saved_config(reader: CheckpointReader) -> RunConfig | None:
    """Configuration of the run that saved a checkpoint; None where this version cannot read it."""
    try:
        return run_config_from_yaml(reader.config, str(reader.path))
    except ConfigError:
        return None


def require_fit(reader: CheckpointReader, model: ModelConfig) -> None:
    """Raises CheckpointError listing the tensors that the checkpoint lacks, has beyond the model, or has in another
    shape."""
    wanted = {f"model/{key}": spec.shape for key, spec in tensor_table(model).items()}
    stored = {key: entry.shape for key, entry in reader.entries.items() if key.startswith("model/")}
    complaints = _listed("missing", [key for key in wanted if key not in stored])
    complaints += _listed("not of this model", [key for key in stored if key not in wanted])
    complaints += _listed(
        "of another shape",
        [f"{key} {stored[key]}, wanted {shape}" for key, shape in wanted.items() if stored.get(key, shape) != shape],
    )
    if complaints:
        raise CheckpointError(
            f"the checkpoint is of another model than {model.name}: " + "; ".join(complaints),
            where=str(reader.path),
            fix="start with the configuration saved in its manifest.json, or choose another checkpoint",
        )


def _listed(what: str, items: Sequence[str]) -> list[str]:
    if not items:
        return []
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return [f"{what}: {', '.join(items[:_SHOWN])}{more}"]


def weight_key(reader: CheckpointReader, key: str, dtype: torch.dtype) -> str:
    """The stored tensor that gives ``key`` in ``dtype`` most exactly.

    A weight stored in that dtype is taken as it is; else the fp32 master, where there is one.
    """
    master = f"optimizer/{MASTER}/{key}"
    if master in reader.entries and reader.dtype(f"model/{key}") != dtype:
        return master
    return f"model/{key}"
