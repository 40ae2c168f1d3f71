"""Keeping the newest checkpoints only."""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from pathlib import Path
from typing import Optional

from megatron_telechat.checkpoint.commit import committed_folders, folder_name
from megatron_telechat.checkpoint.format import CheckpointReader
from megatron_telechat.errors import CheckpointError

log = logging.getLogger(__name__)


def prune(root: Path, keep_last: int, protected: Optional[Path] = None) -> list[Path]:
    """Remove all but the newest ``keep_last`` sound checkpoints (0: remove none); returns what was removed.

    Damaged folders are neither counted nor removed, and ``protected`` (the one this run resumed
    from) stays. A folder is renamed to a temporary name before its files go, so that a run
    killed meanwhile leaves no half-deleted checkpoint behind.
    """
    if keep_last <= 0:
        return []
    sound = [(step, path) for step, path in committed_folders(root) if _is_sound(path)]
    removed = []
    for step, path in sound[:-keep_last]:
        if protected is not None and path.resolve() == protected.resolve():
            continue
        doomed = root / f"{folder_name(step)}.tmp-{uuid.uuid4().hex[:8]}"
        try:
            os.rename(path, doomed)
            shutil.rmtree(doomed)
        except OSError as error:  # the new checkpoint is safe; the next save tries again
            log.warning("cannot remove the old checkpoint %s: %s", path, error)
            continue
        removed.append(path)
    return removed


def _is_sound(folder: Path) -> bool:
    try:
        CheckpointReader(folder)
    except CheckpointError:
        return False
    return True
