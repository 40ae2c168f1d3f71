"""Names that a manifest uses: dtypes, files, folders of checkpoints. No torch, so that a checkpoint can be looked at
without it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_telechat.errors import CheckpointError

# name in a manifest -> name in a safetensors header
DTYPE_TAGS: Mapping[str, str] = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}

RESTORE_OR_OTHER = "restore the file from a copy, or use another checkpoint (--load-step)"

_COMMITTED = re.compile(r"iter_(\d{7,})")
_REPLACED = re.compile(r"iter_(\d{7,})\.replaced-[0-9a-f]+")
_ASIDE = re.compile(r"iter_(\d{7,})\.aside-[0-9a-f]+")
_LEFTOVER = re.compile(r"iter_\d{7,}\.tmp-[0-9a-f]+")


@dataclass(frozen=True)
class FileEntry:
    """What a manifest remembers of a file."""

    size: int
    crc32: str


def folder_name(step: int) -> str:
    """``iter_0001000``; a step of more than 7 digits keeps them all."""
    return f"iter_{step:07d}"


def temporary_name(step: int, identifier: str) -> str:
    """A save under way, or a folder that is being deleted: never a checkpoint, whatever it holds."""
    return f"{folder_name(step)}.tmp-{identifier}"


def replaced_name(step: int, identifier: str) -> str:
    """A checkpoint that makes room for another one of its step: a checkpoint as long as that one is not in place."""
    return f"{folder_name(step)}.replaced-{identifier}"


def aside_name(step: int, identifier: str) -> str:
    """A checkpoint that a roll-back left behind: whole, never deleted, and loaded only when it is named."""
    return f"{folder_name(step)}.aside-{identifier}"


def is_leftover(path: Path) -> bool:
    """Whether the name is one of `temporary_name`: a save or a deletion under way, or what a killed one left."""
    return _LEFTOVER.fullmatch(path.name) is not None


def is_replaced(path: Path) -> bool:
    """Whether the name is one of `replaced_name`."""
    return _REPLACED.fullmatch(path.name) is not None


def step_of(path: Path) -> int | None:
    """The step of a committed checkpoint's folder by its name, None for any other name."""
    match = _COMMITTED.fullmatch(path.name) or _REPLACED.fullmatch(path.name)
    return int(match.group(1)) if match else None


def step_of_name(path: Path) -> int | None:
    """The step that the name of a checkpoint's folder says, also of one set aside; None for any other name."""
    match = _ASIDE.fullmatch(path.name)
    return int(match.group(1)) if match else step_of(path)


def committed_folders(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every committed checkpoint under ``root``, by step; those set aside are not among them."""
    if not root.is_dir():
        return []
    found: dict[int, Path] = {}
    for path in sorted(root.iterdir()):
        step = step_of(path)
        if step is not None and path.is_dir() and (step not in found or not is_replaced(path)):
            found[step] = path
    return sorted(found.items())


def folders_aside(root: Path) -> list[Path]:
    """Folders that roll-backs have set aside, by name."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if _ASIDE.fullmatch(path.name) and path.is_dir())


def folder_of_step(root: Path, step: int) -> Path:
    """The committed folder of one step. Raises CheckpointError listing the steps there are."""
    folders = committed_folders(root)
    for found, path in folders:
        if found == step:
            return path
    steps = ", ".join(str(found) for found, _ in folders) or "none"
    aside = [path.name for path in folders_aside(root)]
    more = f"; set aside by a roll-back: {', '.join(aside)}" if aside else ""
    raise CheckpointError(
        f"no checkpoint of step {step}; there: {steps}{more}",
        where=str(root),
        fix="choose one of these with --load-step"
        + (", or name a folder with --load and another --run-dir" if aside else ""),
    )
