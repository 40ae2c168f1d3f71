"""The parts of local checkpoints that lie on one node. No torch.

    DIR/<run id>/part_00003/iter_0001010.save-1f0c77aa/    what rank 3 wrote, or what was mirrored here for it
                     rank_00003.safetensors
                     manifest.json                         of this part: its boxes do not tile the tensors

A part is written under a temporary name, synced, and renamed. It says which save it is of: all parts of one save are
one checkpoint. Each save has a name of its own, so one of the same step after a roll-back goes beside the other.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_telechat.checkpoint.disk import fsync_folder
from megatron_telechat.checkpoint.lineage import Saved, look_at
from megatron_telechat.checkpoint.names import is_leftover, is_of_objects, objects_name, temporary_name
from megatron_telechat.errors import CheckpointError

_PART = re.compile(r"part_(\d{5,})")


@dataclass(frozen=True)
class LocalPart:
    """One rank's part of a local checkpoint, as its manifest describes it.

    Attributes:
        rank, ranks: whose part, and of how many ranks.
        number: of the save among the local ones of the run.
        save: id of the save, the same in all parts.
        saved: the checkpoint, in the part of rank 0; None in the others.
        continues: digests of the checkpoints of the shared folder that this one goes on from, newest last.
        under_way: id of a save into the shared folder that was not committed yet; "" where there was none.
    """

    rank: int
    ranks: int
    step: int
    number: int
    save: str
    saved: Saved | None
    continues: tuple[str, ...] = ()
    under_way: str = ""


def part_folder(root: Path, rank: int) -> Path:
    """Where the parts of a rank lie; ``root`` is the folder of the run on this node."""
    return root / f"part_{rank:05d}"


def committed(root: Path, rank: int, step: int, save: str) -> Path:
    """The folder of one part."""
    return part_folder(root, rank) / objects_name(step, save[:8])


def temporary(root: Path, rank: int, step: int, save: str) -> Path:
    """Where it is written."""
    return part_folder(root, rank) / temporary_name(step, save[:8])


def description(
    run: str, rank: int, ranks: int, number: int, continues: Sequence[str], under_way: str, optimizer: Any
) -> dict[str, Any]:
    """What the manifest of a part says beside that of a checkpoint (`Manifest.part`)."""
    return {
        "run": run,
        "rank": rank,
        "ranks": ranks,
        "number": number,
        "continues": list(continues),
        "under_way": under_way,
        "optimizer": optimizer,
    }


def look_at_part(folder: Path, run: str) -> LocalPart:
    """What a part of a run says of itself, from the first part of its manifest. Raises CheckpointError."""
    saved = look_at(folder, part=True)
    try:
        said = saved.part
        assert said is not None
        if said["run"] != run:
            raise ValueError("it is of another run")
        rank = int(said["rank"])
        return LocalPart(
            rank, int(said["ranks"]), saved.step, int(said["number"]), saved.save, saved if rank == 0 else None,
            tuple(map(str, said["continues"])), str(said["under_way"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"no part of a local checkpoint of this run: {error}", str(folder)) from error


def parts_in(root: Path, run: str) -> tuple[list[LocalPart], list[str]]:
    """The committed parts on this node, and a note for each that cannot be read. Links are not followed."""
    found: list[LocalPart] = []
    notes: list[str] = []
    for folder in folders_in(root):
        try:
            found.append(part_at(folder, run))
        except CheckpointError as error:
            notes.append(f"{error.problems[0].what} ({folder})")
    return found, notes


def folders_in(root: Path) -> list[Path]:
    """What is a part on this node by its name. Links are not followed."""
    holders = [holder for holder in _folders(root) if _PART.fullmatch(holder.name)]
    return [folder for holder in holders for folder in _folders(holder) if is_of_objects(folder)]


def part_at(folder: Path, run: str) -> LocalPart:
    """What a part of a run says of itself, which must be what its folder is named after. Raises CheckpointError."""
    part = look_at_part(folder, run)
    if folder != committed(folder.parent.parent, part.rank, part.step, part.save):
        raise CheckpointError(f"the part of rank {part.rank}, step {part.step} lies under another name", str(folder))
    return part


def is_part(path: Path) -> bool:
    """Whether the names say that it is a part."""
    return is_of_objects(path) and rank_of_holder(path.parent) is not None


def rank_of_holder(path: Path) -> int | None:
    """The rank of a `part_folder`, by its name; None for any other name."""
    match = _PART.fullmatch(path.name)
    return int(match.group(1)) if match else None


def commit(root: Path, rank: int, step: int, save: str) -> None:
    """Make a part of what was written. Raises OSError."""
    target = committed(root, rank, step, save)
    temporary(root, rank, step, save).rename(target)
    fsync_folder(target.parent)


def prune(root: Path, run: str, keep_from: int) -> None:
    """Remove the parts on this node of all saves before this number. Raises nothing: the next one tries again."""
    for part in parts_in(root, run)[0]:
        if part.number < keep_from:
            doomed = temporary(root, part.rank, part.step, part.save)
            with contextlib.suppress(OSError):
                committed(root, part.rank, part.step, part.save).rename(doomed)
                shutil.rmtree(doomed)


def clean(root: Path) -> None:
    """Remove what killed saves have left on this node; before any save begins. What stays in spite of it is no part."""
    for holder in _folders(root):
        for folder in _folders(holder) if _PART.fullmatch(holder.name) else ():
            if is_leftover(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _folders(root: Path) -> list[Path]:
    """Real folders in a real folder, by name."""
    if root.is_symlink() or not root.is_dir():
        return []
    with contextlib.suppress(OSError):
        return sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink())
    return []
