"""The commit protocol: temporary folder, manifest last, rename = commit.

A folder ``iter_0001000`` under the root is a committed checkpoint; ``iter_0001000.tmp-<id>``
never is, whatever it holds. A save of a step that is already there (after a roll-back) sets
the old folder aside as ``iter_0001000.replaced-<id>``, which still counts as committed as long
as the new one is not in place, so that no moment is without a checkpoint. Afterwards it is kept as
``iter_0001000.aside-<id>``, with the rest of the branch that the roll-back left (``lineage.py``).
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from megatron_telechat.checkpoint.disk import disk_error, fsync_folder, write_bytes
from megatron_telechat.checkpoint.lineage import set_aside
from megatron_telechat.checkpoint.manifest import MANIFEST, Manifest
from megatron_telechat.checkpoint.names import folder_name, is_leftover, replaced_name, temporary_name

LATEST = "latest"
_HINT = re.compile(rf"\.{LATEST}-[0-9a-f]+")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """A save under way."""

    root: Path
    step: int
    save: str
    """Id of the save, in its manifest and in each of its files."""

    @property
    def identifier(self) -> str:
        """The beginning of the id, for names of folders."""
        return self.save[:8]

    @property
    def temporary(self) -> Path:
        """Where the files are written; never a checkpoint."""
        return self.root / temporary_name(self.step, self.identifier)

    @property
    def final(self) -> Path:
        """Where `commit` renames it to; a checkpoint of the same step may lie there until then."""
        return self.root / folder_name(self.step)


def begin(root: Path, step: int) -> Attempt:
    """Make a fresh temporary folder, clearing what killed saves have left in ``root``.

    Only one process of one job may call this at a time. Raises ResourceError.
    """
    attempt = Attempt(root, step, uuid.uuid4().hex)
    try:
        root.mkdir(parents=True, exist_ok=True)
        clean_leftovers(root)
        attempt.temporary.mkdir()
    except OSError as error:
        raise disk_error(root, error) from error
    return attempt


def clean_leftovers(root: Path) -> None:
    """Remove the temporary folders of killed saves. A checkpoint that was to be replaced is set aside, never
    removed."""
    for path in sorted(root.iterdir()):
        if is_leftover(path) and not path.is_symlink():
            log.info("removing %s, left by an interrupted save", path)
            shutil.rmtree(path)
        elif _HINT.fullmatch(path.name):
            path.unlink()
    for path in set_aside(root, uuid.uuid4().hex[:8]):
        log.info("set aside: %s", path)


def commit(attempt: Attempt, manifest: Manifest, keep_replaced: bool = True) -> Path:
    """Write the manifest, sync the folder, rename it into place; the rename is the commit.

    Args:
        keep_replaced: a folder of the same step is kept under another name; else it is removed once the new one is in
            place.
    """
    try:
        write_bytes(attempt.temporary / MANIFEST, manifest.to_bytes())
        for folder, _, _ in os.walk(attempt.temporary):
            fsync_folder(Path(folder))
        replaced: Path | None = None
        if attempt.final.exists():
            replaced = attempt.root / replaced_name(attempt.step, attempt.identifier)
            os.rename(attempt.final, replaced)
        os.rename(attempt.temporary, attempt.final)
        fsync_folder(attempt.root)
    except OSError as error:
        raise disk_error(attempt.temporary, error) from error
    _tidy_up(attempt, None if keep_replaced else replaced)
    return attempt.final


def _tidy_up(attempt: Attempt, doomed: Path | None) -> None:
    """What follows a commit. The save is whole: an error is a warning, and `begin` of the next save tries again."""
    try:
        if doomed is not None:
            shutil.rmtree(doomed)
        if set_aside(attempt.root, attempt.identifier):
            fsync_folder(attempt.root)
        _point_latest(attempt)
    except OSError as error:
        log.warning("%s is saved, but %s could not be tidied up: %s", attempt.final, attempt.root, error)


def _point_latest(attempt: Attempt) -> None:
    """A hint for people and scripts; loading never trusts it."""
    hint = attempt.root / f".{LATEST}-{attempt.identifier}"
    write_bytes(hint, f"{attempt.final.name}\n".encode())
    os.replace(hint, attempt.root / LATEST)
    fsync_folder(attempt.root)


def abandon(attempt: Attempt) -> None:
    """Remove the temporary folder of a save that failed. Raises nothing: `begin` of the next save removes the rest."""
    shutil.rmtree(attempt.temporary, ignore_errors=True)
