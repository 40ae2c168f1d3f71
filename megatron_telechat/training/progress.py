"""How far a run has read, from the checkpoint it resumes from; for the training, and for the tools that look at its
data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_telechat.checkpoint.find import find_checkpoint, saved_config
from megatron_telechat.checkpoint.format import CheckpointReader
from megatron_telechat.checkpoint.lineage import look_at
from megatron_telechat.checkpoint.start import find_start, position_of
from megatron_telechat.config.run_stages import Position, RunStage, RunStages
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.data import Progress, progress_ahead, resumed_order


def progress_at(
    stages: RunStages, position: Position, extra: Mapping[str, Any], saved: RunConfig | None, where: str
) -> Progress:
    """The progress that a checkpoint tells of, and how far its stage reads; at step 0 that of a run that begins.

    Raises:
        CheckpointError, ConfigError: see :func:`resumed_order`.
    """
    order = resumed_order(stages.at(position).run, extra, saved, where) if position.step else None
    _, progress = next(progress_ahead(stages, position, order))
    return progress


def saved_progress(stages: RunStages) -> tuple[RunStage, Progress]:
    """The stage in which the training with this configuration would go on, and where.

    Raises:
        CheckpointError: there are checkpoints and none is sound, or what the command names is not there.
    """
    start = find_start(stages.stages[0].run)
    folder = None
    if start.root is not None and not start.weights_only:
        folder, _ = find_checkpoint(start.root, start.step)
    if folder is None:
        return stages.stages[0], progress_at(stages, Position(), {}, None, "")
    position = position_of(look_at(folder))
    reader = CheckpointReader(folder, check_sizes=False)
    manifest = reader.manifest
    saved = saved_config(reader)
    reader.close()
    return stages.at(position), progress_at(stages, position, manifest.extra, saved, str(folder))
