"""Keeping the newest checkpoints only."""

from __future__ import annotations

import logging
import uuid

from megatron_telechat.checkpoint.lineage import saved_in
from megatron_telechat.checkpoint.stores import store_of
from megatron_telechat.checkpoint.verify import is_whole
from megatron_telechat.errors import ResourceError
from megatron_telechat.locations import Location

log = logging.getLogger(__name__)


def prune(root: Location, keep_last: int, protected: Location | None = None) -> list[Location]:
    """Remove all but the newest ``keep_last`` sound checkpoints (0: remove none); returns what was removed.

    The newest are the last of the lineage, whatever their steps: what was saved last is never removed. What a roll-back
    set aside is neither counted nor removed, nor are damaged folders, and ``protected`` (the one this run resumed
    from) stays. A run that is killed meanwhile leaves no half-deleted checkpoint behind (`Store.remove`).
    """
    if keep_last <= 0:
        return []
    try:
        sound = [(saved.step, saved.path) for saved in saved_in(root) if is_whole(saved.path)]
    except (OSError, ResourceError) as error:
        log.warning("cannot look for old checkpoints in %s: %s", root, error)
        return []
    store, removed = store_of(root), []
    kept = None if protected is None else store_of(protected).identity(protected)
    for step, path in sound[:-keep_last]:
        if store.identity(path) == kept:
            continue
        try:
            store.remove(path, step, uuid.uuid4().hex[:8])
        except (OSError, ResourceError) as error:  # the new checkpoint is safe; the next save tries again
            log.warning("cannot remove the old checkpoint %s: %s", path, error)
            continue
        removed.append(path)
    return removed
