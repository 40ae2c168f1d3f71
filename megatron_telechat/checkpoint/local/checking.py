"""Whether the parts of a local checkpoint are what was saved, each by itself and all together. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from megatron_telechat.checkpoint.committing import merged_scalars
from megatron_telechat.checkpoint.local.parts import committed
from megatron_telechat.checkpoint.manifest import Manifest, TensorEntry, read_manifest
from megatron_telechat.checkpoint.parts import Part, join_parts, merge_parts
from megatron_telechat.checkpoint.verify import check_files
from megatron_telechat.errors import CheckpointError, Problem

_RANK_OF_FILE = re.compile(r"rank_(\d+)(-\d+)?\.safetensors")
_FIX = "nothing need be done: an older checkpoint is taken"


def checked_part(
    root: Path, run: str, rank: int, ranks: int, step: int, save: str
) -> tuple[Manifest | None, list[Problem]]:
    """Read every byte of a part.

    Args:
        root: the folder of the run on a node.
        run, rank, ranks, step, save: what the part must say of itself.

    Returns:
        Its manifest, and what is wrong with it; nothing of it may be read where something is.
    """
    folder = committed(root, rank, step, save)
    try:
        if any(path.is_symlink() for path in (root, folder.parent, folder)):
            return None, [Problem("the folder is a symbolic link", str(folder), _FIX)]
        manifest = read_manifest(folder, part=True)
        said = manifest.part or {}
        wanted = (run, rank, ranks, save, step)
        if (said.get("run"), said.get("rank"), said.get("ranks"), manifest.save, manifest.step) != wanted:
            return None, [Problem("the part is of another save than its folder", str(folder), _FIX)]
        strangers = [name for name in manifest.files if rank_of(name) != rank]
        if strangers:
            return None, [Problem(f"the part names {strangers[0]}, a file of another rank", str(folder), _FIX)]
        return manifest, check_files(folder, manifest, manifest.files)
    except CheckpointError as error:
        return None, list(error.problems)
    except OSError as error:
        return None, [Problem(f"the part cannot be read: {error.strerror or error}", str(folder), _FIX)]


def whole_manifest(found: Mapping[int, Manifest]) -> Manifest:
    """The manifest of a checkpoint, of those of all its parts by rank. Raises CheckpointError: they are not one."""
    return _together(found, merge_parts(map(_part, _ordered(found)))).digested()


def manifest_of_some(found: Mapping[int, Manifest]) -> tuple[Manifest, dict[str, TensorEntry]]:
    """What some of its parts make of a checkpoint: the manifest of the tensors that they hold whole, so that nothing
    else can be read by it, and the tensors of which they hold a piece. Its digest is empty.

    Raises CheckpointError: they are not of one checkpoint.
    """
    merged, faults = join_parts(map(_part, _ordered(found)))
    pieces = {key: merged.tensors.pop(key) for key in faults}
    return _together(found, merged), pieces


def _together(found: Mapping[int, Manifest], merged: Part) -> Manifest:
    ordered = _ordered(found)
    scalars = merged_scalars([one.part["optimizer"] if one.part else None for one in ordered])
    rng = tuple(state for one in ordered for state in one.rng)
    lists = {"files": merged.files, "tensors": merged.tensors, "rng": rng}
    return replace(ordered[0], **lists, optimizer=scalars, part=None, digest="")


def _ordered(found: Mapping[int, Manifest]) -> list[Manifest]:
    return [found[rank] for rank in sorted(found)]


def _part(one: Manifest) -> Part:
    return Part(dict(one.files), dict(one.tensors), dict(one.rng[0]) if one.rng else None)


def rank_of(name: str) -> int:
    """Whose file it is, by its name; -1 where that says nothing."""
    match = _RANK_OF_FILE.fullmatch(name)
    return int(match.group(1)) if match else -1
