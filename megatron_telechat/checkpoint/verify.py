"""Whether the files of a checkpoint are what was saved: presence, size, checksum, and the save they belong to. No
torch.

What one process has found sound, or has written itself, is remembered for as long as the file is not touched: the next
stage of a run, a retention and a second load read nothing again.
"""

from __future__ import annotations

import heapq
import json
import os
import struct
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megatron_telechat.checkpoint.checksums import crc32_of_files
from megatron_telechat.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from megatron_telechat.checkpoint.names import RESTORE_OR_OTHER, FileEntry, step_of_name
from megatron_telechat.errors import CheckpointError, Problem
from megatron_telechat.parallel.agreement import gather_objects, this_rank, together

SAVE, STEP, RANK = "save", "step", "rank"
"""Keys of ``__metadata__`` in each safetensors file of a save."""
_HEADER_LIMIT = 100 << 20  # that of the safetensors library
_SETTLED_S = 0.1
"""A file that was changed more recently may change again within one tick of the file system's clock."""

_Signature = tuple[int, int, int, int, str]
_sound: dict[str, _Signature] = {}
_manifests: OrderedDict[str, tuple[_Signature, Mapping[str, FileEntry]]] = OrderedDict()
_MOST_MANIFESTS = 32
"""Kept in memory; those of thousands of ranks list thousands of files."""


def remember_files(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """This process has written these files of a checkpoint."""
    for name, entry in files.items():
        signature = _signature(folder / name, entry.crc32)
        if signature is not None:
            _sound[os.path.realpath(folder / name)] = signature


def remember_manifest(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """This process has written or read the manifest of a checkpoint, and these are the files that it lists."""
    signature = _signature(folder / MANIFEST)
    if signature is not None:
        _manifests[os.path.realpath(folder)] = signature, files
        _manifests.move_to_end(os.path.realpath(folder))
        if len(_manifests) > _MOST_MANIFESTS:
            _manifests.popitem(last=False)


def forget() -> None:
    """Read every file again, as a new process would; for measurements."""
    _sound.clear()
    _manifests.clear()


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint has a sound manifest and every file in its size.

    A manifest that this process knows is not read again: a retention looks at every checkpoint after every save.
    """
    signature, files = _manifests.get(os.path.realpath(folder), (None, {}))
    if signature is None or signature != _signature(folder / MANIFEST):
        try:
            files = read_sound_manifest(folder).files
        except CheckpointError:
            return False
    return not any(size_fault(folder / name, entry) for name, entry in files.items())


def is_known_sound(path: Path, entry: FileEntry) -> bool:
    """Whether this process knows the file to be what the manifest says, and it has not been touched since."""
    known = _sound.get(os.path.realpath(path)) if _sound else None
    return known is not None and not path.is_symlink() and known == _signature(path, entry.crc32)


def _signature(path: Path, crc32: str = "") -> _Signature | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, crc32


def check_files(folder: Path, manifest: Manifest, names: Iterable[str], checksums: bool = True) -> list[Problem]:
    """What is wrong with these files of a checkpoint, one problem a file; empty where nothing is.

    Args:
        checksums: read every byte; else sizes only.
    """
    problems: list[Problem] = []
    to_read: list[tuple[str, _Signature | None]] = []
    for name in names:
        path, entry = folder / name, manifest.files[name]
        fault = size_fault(path, entry)
        if fault:
            problems.append(_problem(path, fault, manifest))
        elif checksums and not is_known_sound(path, entry):
            to_read.append((name, _signature(path, entry.crc32)))
    began = time.time()
    sums = crc32_of_files([(folder / name, manifest.files[name].size) for name, _ in to_read])
    for (name, before), found in zip(to_read, sums, strict=True):
        path, entry = folder / name, manifest.files[name]
        if isinstance(found, OSError):
            problems.append(_problem(path, f"the file cannot be read: {found.strerror or found}"))
        elif found != entry.crc32:
            what = "the file's checksum differs from the manifest's: its content has changed"
            problems.append(_problem(path, what, manifest))
        elif (stranger := _other_save(path, manifest)) is not None:
            problems.append(_problem(path, stranger))
        elif before is not None and before[2] < (began - _SETTLED_S) * 1e9:
            _sound[os.path.realpath(path)] = before
    return problems


def size_fault(path: Path, entry: FileEntry) -> str | None:
    """What is wrong with a file that shows without reading it."""
    if path.is_symlink():
        return "the file is a symbolic link"
    if not path.is_file():
        return "the file is missing"
    size = path.stat().st_size
    return None if size == entry.size else f"the file has {size} bytes, the manifest says {entry.size}"


def _problem(path: Path, what: str, manifest: Manifest | None = None) -> Problem:
    """With the save that a file belongs to, where that explains the fault."""
    stranger = _other_save(path, manifest) if manifest is not None else None
    return Problem(f"{what}; {stranger}" if stranger else what, str(path), RESTORE_OR_OTHER)


def _other_save(path: Path, manifest: Manifest) -> str | None:
    """That the file says itself to be of another save; None for files, and manifests, that say nothing."""
    if manifest.save is None or path.suffix != ".safetensors":
        return None
    said = metadata_of(path)
    if SAVE not in said or said[SAVE] == manifest.save:
        return None
    step = said.get(STEP, "?")
    return f"the file is of another save (step {step}, save {said[SAVE][:8]}) than the manifest ({manifest.save[:8]})"


def metadata_of(path: Path) -> dict[str, str]:
    """``__metadata__`` of a safetensors file; {} where there is none or the file cannot be read."""
    try:
        with open(path, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(_HEADER_LIMIT, os.fstat(stream.fileno()).st_size):
                return {}
            found = json.loads(stream.read(length)).get("__metadata__", {})
        return {str(key): str(value) for key, value in found.items()}
    except (OSError, ValueError, RecursionError, AttributeError, struct.error):
        return {}


def read_sound_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, held against the name of its folder. Raises CheckpointError."""
    manifest = read_manifest(folder)
    named = step_of_name(folder)
    if named not in (None, manifest.step):
        raise CheckpointError(
            f"the manifest is of step {manifest.step}, the folder is named after step {named}",
            str(folder),
            "use another checkpoint (--load-step), or restore this folder from a copy",
        )
    remember_manifest(folder, manifest.files)
    return manifest


def shares(
    sizes: Mapping[str, int], wanted: Sequence[Mapping[str, int]], known: Sequence[Iterable[str]]
) -> list[list[str]]:
    """Who checks which file: each file on exactly one rank, about as many bytes everywhere.

    A file that a rank knows to be sound is checked there, for nothing; else, where that leaves the shares even, by the
    rank that will read most of it.

    Args:
        sizes: bytes of each file.
        wanted: by rank, bytes that it will read of each file.
        known: by rank, the files that it knows to be sound.

    Returns:
        The files of each rank, by rank.
    """
    out: list[list[str]] = [[] for _ in wanted]
    load = [0] * len(wanted)
    knowing = {name: rank for rank in reversed(range(len(known))) for name in known[rank]}
    readers: dict[str, list[tuple[int, int]]] = {}
    for rank, files in enumerate(wanted):
        for name, count in files.items():
            readers.setdefault(name, []).append((-count, rank))
    left = []
    for name in sorted(sizes):
        if name in knowing:
            out[knowing[name]].append(name)
        else:
            left.append(name)
    fair = sum(sizes[name] for name in left) / len(wanted)
    idlest = [(0, rank) for rank in range(len(wanted))]
    for name in sorted(left, key=lambda one: (-sizes[one], one)):
        while load[idlest[0][1]] != idlest[0][0]:
            heapq.heapreplace(idlest, (load[idlest[0][1]], idlest[0][1]))
        _, rank = min(readers.get(name, [idlest[0]]))
        if load[rank] + sizes[name] > 1.1 * fair:
            rank = idlest[0][1] if load[idlest[0][1]] < load[rank] else rank
        out[rank].append(name)
        load[rank] += sizes[name]
    return out


def check_together(folder: Path, manifest: Manifest, wanted: Mapping[str, int]) -> list[Problem]:
    """Check every file of a checkpoint, the work shared over the ranks; a collective. All ranks get all problems.

    Args:
        wanted: bytes that this rank will read of each file.
    """
    names = list(manifest.files)
    numbers = {name: number for number, name in enumerate(names)}
    mine: tuple[dict[int, int], list[int]] = {}, []
    found: list[Problem] = []
    with together():
        known = [number for name, number in numbers.items() if is_known_sound(folder / name, manifest.files[name])]
        mine = {numbers[name]: count for name, count in wanted.items()}, known
    said = gather_objects(mine)
    with together():
        share = shares(
            {name: entry.size for name, entry in manifest.files.items()},
            [{names[number]: count for number, count in one.items()} for one, _ in said],
            [[names[number] for number in one] for _, one in said],
        )[this_rank()]
        found = check_files(folder, manifest, share)
    return sorted((problem for one in gather_objects(found) for problem in one), key=lambda one: one.where)
