"""How far a run has read, from the checkpoint it resumes from; for the training, and for the tools that look at its
data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_telechat.checkpoint.find import find_checkpoint, saved_config
from megatron_telechat.checkpoint.format import CheckpointReader
from megatron_telechat.checkpoint.start import find_start
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.data import Progress, resumed_order


def progress_at(
    run: RunConfig, step: int, consumed_samples: int, extra: Mapping[str, Any], saved: RunConfig | None, where: str
) -> Progress:
    """The progress that a checkpoint tells of; at step 0 that of a run that begins.

    Raises:
        CheckpointError, ConfigError: see :func:`resumed_order`.
    """
    if not step:
        return Progress()
    return Progress(step, consumed_samples, resumed_order(run, extra, saved, where))


def saved_progress(run: RunConfig) -> Progress:
    """Where the training with this configuration would go on.

    Raises:
        CheckpointError: there are checkpoints and none is sound, or what the command names is not there.
    """
    start = find_start(run)
    folder = None
    if start.root is not None and not start.weights_only:
        folder, _ = find_checkpoint(start.root, start.step)
    if folder is None:
        return Progress()
    reader = CheckpointReader(folder, check_sizes=False)
    manifest = reader.manifest
    saved = saved_config(reader)
    reader.close()
    return progress_at(run, manifest.step, manifest.consumed_samples, manifest.extra, saved, str(folder))
