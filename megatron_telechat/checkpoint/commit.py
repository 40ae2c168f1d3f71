"""The commit protocol, over any store (``stores/``).

On a file system: temporary folder, manifest last, rename = commit. A folder ``iter_0001000`` under the root is a
committed checkpoint; ``iter_0001000.tmp-<id>`` never is, whatever it holds. A save of a step that is already there
(after a roll-back) sets the old folder aside as ``iter_0001000.replaced-<id>``, which still counts as committed as long
as the new one is not in place, so that no moment is without a checkpoint. Afterwards it is kept as
``iter_0001000.aside-<id>``, with the rest of the branch that the roll-back left (``lineage.py``).

In an object store each save has a name of its own, ``iter_0001000.save-<id>``, and is a checkpoint as soon as its
manifest is there. A mark beside it sets it aside.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_telechat.checkpoint.disk import disk_error
from megatron_telechat.checkpoint.lineage import set_aside
from megatron_telechat.checkpoint.manifest import Manifest
from megatron_telechat.checkpoint.names import LATEST
from megatron_telechat.checkpoint.stores import store_of
from megatron_telechat.errors import ResourceError
from megatron_telechat.locations import Location

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """A save under way."""

    root: Location
    step: int
    save: str
    """Id of the save, in its manifest and in each of its files."""

    @property
    def identifier(self) -> str:
        """The beginning of the id, for names of folders."""
        return self.save[:8]

    @property
    def temporary(self) -> Location:
        """Where the files are written; no checkpoint before the commit."""
        return store_of(self.root).written_at(self.root, self.step, self.identifier)

    @property
    def final(self) -> Location:
        """Where it lies from the commit on; a checkpoint of the same step may lie there until then."""
        return store_of(self.root).committed_at(self.root, self.step, self.identifier)


def begin(root: Location, step: int) -> Attempt:
    """Make a fresh temporary folder, clearing what killed saves have left in ``root``.

    Only one process of one job may call this at a time. Raises ResourceError.
    """
    attempt, store = Attempt(root, step, uuid.uuid4().hex), store_of(root)
    try:
        store.prepare(root)
        clean_leftovers(root)
        store.begin(attempt.temporary)
    except OSError as error:
        raise disk_error(root, error) from error
    return attempt


def clean_leftovers(root: Location) -> None:
    """Remove what killed saves have left. A checkpoint that was to be replaced is set aside, never removed."""
    for path in store_of(root).clean(root):
        log.info("removed %s, left by an interrupted save", path)
    for path in set_aside(root, uuid.uuid4().hex[:8]):
        log.info("set aside: %s", path)


def commit(attempt: Attempt, manifest: Manifest, keep_replaced: bool = True) -> Location:
    """Write the manifest and make the files a checkpoint, all at once.

    Args:
        keep_replaced: a folder of the same step is kept under another name; else it is removed once the new one is in
            place.
    """
    try:
        replaced = store_of(attempt.root).commit(
            attempt.temporary, attempt.final, manifest.to_bytes(), attempt.identifier
        )
    except OSError as error:
        raise disk_error(attempt.temporary, error) from error
    _tidy_up(attempt, [] if keep_replaced else replaced)
    return attempt.final


def _tidy_up(attempt: Attempt, doomed: Sequence[Location]) -> None:
    """What follows a commit. The save is whole: an error is a warning, and `begin` of the next save tries again."""
    store = store_of(attempt.root)
    try:
        for folder in doomed:
            store.remove(folder, attempt.step, attempt.identifier)
        set_aside(attempt.root, attempt.identifier)
        store.put_hint(attempt.root, LATEST, f"{attempt.final.name}\n", attempt.identifier)
    except (OSError, ResourceError) as error:
        log.warning("%s is saved, but %s could not be tidied up: %s", attempt.final, attempt.root, error)


def abandon(attempt: Attempt) -> None:
    """Remove the files of a save that failed. Raises nothing: `begin` of the next save removes the rest."""
    store_of(attempt.root).abandon(attempt.temporary)
