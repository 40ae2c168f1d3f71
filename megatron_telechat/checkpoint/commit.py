"""The commit protocol: temporary folder, manifest last, rename = commit.

A folder ``iter_0001000`` under the root is a committed checkpoint; ``iter_0001000.tmp-<id>``
never is, whatever it holds. A save of a step that is already there (after a roll-back) sets
the old folder aside as ``iter_0001000.replaced-<id>``, which still counts as committed as long
as the new one is not in place, so that no moment is without a checkpoint.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from megatron_telechat.checkpoint.files import disk_error, fsync_folder, write_bytes
from megatron_telechat.checkpoint.manifest import MANIFEST, Manifest
from megatron_telechat.errors import CheckpointError

LATEST = "latest"
_COMMITTED = re.compile(r"iter_(\d{7,})")
_REPLACED = re.compile(r"iter_(\d{7,})\.replaced-[0-9a-f]+")
_HINT = re.compile(rf"\.{LATEST}-[0-9a-f]+")
_LEFTOVER = re.compile(r"iter_\d{7,}\.tmp-[0-9a-f]+")

log = logging.getLogger(__name__)


def folder_name(step: int) -> str:
    return f"iter_{step:07d}"


@dataclass(frozen=True)
class Attempt:
    """A save under way."""

    root: Path
    step: int
    identifier: str

    @property
    def temporary(self) -> Path:
        return self.root / f"{folder_name(self.step)}.tmp-{self.identifier}"

    @property
    def final(self) -> Path:
        return self.root / folder_name(self.step)


def begin(root: Path, step: int) -> Attempt:
    """Make a fresh temporary folder, clearing what killed saves have left in ``root``.

    Only one process of one job may call this at a time. Raises ResourceError.
    """
    attempt = Attempt(root, step, uuid.uuid4().hex[:8])
    try:
        root.mkdir(parents=True, exist_ok=True)
        clean_leftovers(root)
        attempt.temporary.mkdir()
    except OSError as error:
        raise disk_error(root, error) from error
    return attempt


def clean_leftovers(root: Path) -> None:
    committed = {path.name for path in root.iterdir() if _COMMITTED.fullmatch(path.name)}
    for path in sorted(root.iterdir()):
        superseded = _REPLACED.fullmatch(path.name) and path.name.split(".")[0] in committed
        if (_LEFTOVER.fullmatch(path.name) or superseded) and not path.is_symlink():
            log.info("removing %s, left by an interrupted save", path)
            shutil.rmtree(path)
        elif _HINT.fullmatch(path.name):
            path.unlink()


def commit(attempt: Attempt, manifest: Manifest) -> Path:
    """Write the manifest, sync the folder, rename it into place; the rename is the commit."""
    try:
        write_bytes(attempt.temporary / MANIFEST, manifest.to_bytes())
        for folder, _, _ in os.walk(attempt.temporary):
            fsync_folder(Path(folder))
        replaced: Optional[Path] = None
        if attempt.final.exists():
            replaced = attempt.root / f"{attempt.final.name}.replaced-{attempt.identifier}"
            os.rename(attempt.final, replaced)
        os.rename(attempt.temporary, attempt.final)
        fsync_folder(attempt.root)
        if replaced is not None:
            shutil.rmtree(replaced)
        _point_latest(attempt)
    except OSError as error:
        raise disk_error(attempt.temporary, error) from error
    return attempt.final


def _point_latest(attempt: Attempt) -> None:
    """A hint for people and scripts; loading never trusts it."""
    hint = attempt.root / f".{LATEST}-{attempt.identifier}"
    write_bytes(hint, f"{attempt.final.name}\n".encode())
    os.replace(hint, attempt.root / LATEST)
    fsync_folder(attempt.root)


def abandon(attempt: Attempt) -> None:
    shutil.rmtree(attempt.temporary, ignore_errors=True)


def committed_folders(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every committed checkpoint under ``root``, oldest first."""
    if not root.is_dir():
        return []
    found: dict[int, Path] = {}
    for path in sorted(root.iterdir()):
        match = _COMMITTED.fullmatch(path.name) or _REPLACED.fullmatch(path.name)
        if match and path.is_dir():
            step = int(match.group(1))
            if step not in found or _COMMITTED.fullmatch(path.name):
                found[step] = path
    return sorted(found.items())


def folder_of_step(root: Path, step: int) -> Path:
    """The committed folder of one step. Raises CheckpointError listing the steps there are."""
    folders = committed_folders(root)
    for found, path in folders:
        if found == step:
            return path
    steps = ", ".join(str(found) for found, _ in folders) or "none"
    raise CheckpointError(f"no checkpoint of step {step}; there: {steps}", where=str(root),
                          fix="choose one of these with --load-step")
