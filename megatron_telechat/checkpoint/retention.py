"""Keeping the newest checkpoints only."""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from pathlib import Path

from megatron_telechat.checkpoint.lineage import saved_in
from megatron_telechat.checkpoint.names import temporary_name
from megatron_telechat.checkpoint.verify import is_whole

log = logging.getLogger(__name__)


def prune(root: Path, keep_last: int, protected: Path | None = None) -> list[Path]:
    """Remove all but the newest ``keep_last`` sound checkpoints (0: remove none); returns what was removed.

    The newest are the last of the lineage, whatever their steps: what was saved last is never removed. What a roll-back
    set aside is neither counted nor removed, nor are damaged folders, and ``protected`` (the one this run resumed
    from) stays. A folder is renamed to a temporary name before its files go, so that a run
    killed meanwhile leaves no half-deleted checkpoint behind.
    """
    if keep_last <= 0:
        return []
    try:
        sound = [(saved.step, saved.path) for saved in saved_in(root) if is_whole(saved.path)]
    except OSError as error:
        log.warning("cannot look for old checkpoints in %s: %s", root, error)
        return []
    removed = []
    for step, path in sound[:-keep_last]:
        if protected is not None and path.resolve() == protected.resolve():
            continue
        doomed = root / temporary_name(step, uuid.uuid4().hex[:8])
        try:
            os.rename(path, doomed)
            shutil.rmtree(doomed)
        except OSError as error:  # the new checkpoint is safe; the next save tries again
            log.warning("cannot remove the old checkpoint %s: %s", path, error)
            continue
        removed.append(path)
    return removed
