"""Names that a manifest uses: dtypes, files, folders of checkpoints. No torch, so that a checkpoint can be looked at
without it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_telechat.locations import Location

MANIFEST = "manifest.json"
LATEST = "latest"
"""A file with the name of the newest checkpoint, for people and scripts; no load trusts it."""

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
_OBJECTS = re.compile(r"iter_(\d{7,})\.save-[0-9a-f]+")
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


def objects_name(step: int, identifier: str) -> str:
    """A checkpoint in an object store, where nothing can be renamed: a name of its own from the first byte on."""
    return f"{folder_name(step)}.save-{identifier}"


def is_leftover(path: Location) -> bool:
    """Whether the name is one of `temporary_name`: a save or a deletion under way, or what a killed one left."""
    return _LEFTOVER.fullmatch(path.name) is not None


def is_of_objects(path: Location) -> bool:
    """Whether the name is one of `objects_name`."""
    return _OBJECTS.fullmatch(path.name) is not None


def is_aside(path: Location) -> bool:
    """Whether the name is one of `aside_name`."""
    return _ASIDE.fullmatch(path.name) is not None


def is_replaced(path: Location) -> bool:
    """Whether the name is one of `replaced_name`."""
    return _REPLACED.fullmatch(path.name) is not None


def step_of(path: Location) -> int | None:
    """The step of a committed checkpoint's folder by its name, None for any other name."""
    match = _COMMITTED.fullmatch(path.name) or _REPLACED.fullmatch(path.name) or _OBJECTS.fullmatch(path.name)
    return int(match.group(1)) if match else None


def step_of_name(path: Location) -> int | None:
    """The step that the name of a checkpoint's folder says, also of one set aside; None for any other name."""
    match = _ASIDE.fullmatch(path.name)
    return int(match.group(1)) if match else step_of(path)
