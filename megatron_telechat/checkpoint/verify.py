"""Whether the files of a checkpoint are what was saved: presence, size, checksum, and the save they belong to. No
torch.

What one process has found sound, or has written itself, is remembered for as long as the file is not touched: the next
stage of a run, a retention and a second load read nothing again.
"""

from __future__ import annotations

import heapq
import json
import struct
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

from megatron_telechat.checkpoint.checksums import crc32_of_files
from megatron_telechat.checkpoint.manifest import Manifest, read_manifest
from megatron_telechat.checkpoint.names import MANIFEST, RESTORE_OR_OTHER, FileEntry, step_of_name
from megatron_telechat.checkpoint.stores import Signature, store_of
from megatron_telechat.errors import CheckpointError, Problem
from megatron_telechat.locations import Location
from megatron_telechat.parallel.agreement import gather_objects, this_rank, together

SAVE, STEP, RANK = "save", "step", "rank"
"""Keys of ``__metadata__`` in each safetensors file of a save."""
_HEADER_LIMIT = 100 << 20  # that of the safetensors library
_SETTLED_S = 0.1
"""A file that was changed more recently may change again within one tick of the file system's clock."""

_sound: dict[str, tuple[Signature, str]] = {}
_manifests: OrderedDict[str, tuple[Signature, Mapping[str, FileEntry]]] = OrderedDict()
_MOST_MANIFESTS = 32
"""Kept in memory; those of thousands of ranks list thousands of files."""


def remember_files(folder: Location, files: Mapping[str, FileEntry]) -> None:
    """This process has written these files of a checkpoint."""
    store = store_of(folder)
    for name, entry in files.items():
        signature = store.signature(folder / name)
        if signature is not None:
            _sound[store.identity(folder / name)] = signature, entry.crc32


def remember_manifest(folder: Location, files: Mapping[str, FileEntry]) -> None:
    """This process has written or read the manifest of a checkpoint, and these are the files that it lists."""
    store = store_of(folder)
    signature, key = store.signature(folder / MANIFEST), store.identity(folder)
    if signature is not None:
        _manifests[key] = signature, files
        _manifests.move_to_end(key)
        if len(_manifests) > _MOST_MANIFESTS:
            _manifests.popitem(last=False)


def forget() -> None:
    """Read every file again, as a new process would; for measurements."""
    _sound.clear()
    _manifests.clear()


def is_whole(folder: Location) -> bool:
    """Whether a checkpoint has a sound manifest and every file in its size.

    A manifest that this process knows is not read again: a retention looks at every checkpoint after every save.
    """
    store = store_of(folder)
    signature, files = _manifests.get(store.identity(folder), (None, {}))
    if signature is None or signature != store.signature(folder / MANIFEST):
        try:
            files = read_sound_manifest(folder).files
        except CheckpointError:
            return False
    return not store.faults(folder, files)


def is_known_sound(path: Location, entry: FileEntry) -> bool:
    """Whether this process knows the file to be what the manifest says, and it has not been touched since."""
    store = store_of(path)
    known = _sound.get(store.identity(path)) if _sound else None
    return known is not None and not store.is_link(path) and known == (store.signature(path), entry.crc32)


def check_files(folder: Location, manifest: Manifest, names: Iterable[str], checksums: bool = True) -> list[Problem]:
    """What is wrong with these files of a checkpoint, one problem a file; empty where nothing is.

    Args:
        checksums: read every byte; else sizes only.
    """
    problems: list[Problem] = []
    to_read: list[tuple[str, Signature | None]] = []
    store, entries = store_of(folder), {name: manifest.files[name] for name in names}
    faults = store.faults(folder, entries, patient=True)
    for name, entry in entries.items():
        path = folder / name
        if name in faults:
            problems.append(_problem(path, faults[name], manifest))
        elif checksums and not is_known_sound(path, entry):
            to_read.append((name, store.signature(path)))
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
        elif before is not None and (before.changed_ns is None or before.changed_ns < (began - _SETTLED_S) * 1e9):
            _sound[store.identity(path)] = before, entry.crc32
    return problems


def _problem(path: Location, what: str, manifest: Manifest | None = None) -> Problem:
    """With the save that a file belongs to, where that explains the fault."""
    stranger = _other_save(path, manifest) if manifest is not None else None
    return Problem(f"{what}; {stranger}" if stranger else what, str(path), RESTORE_OR_OTHER)


def _other_save(path: Location, manifest: Manifest) -> str | None:
    """That the file says itself to be of another save; None for files, and manifests, that say nothing."""
    if manifest.save is None or path.suffix != ".safetensors":
        return None
    said = metadata_of(path)
    if SAVE not in said or said[SAVE] == manifest.save:
        return None
    step = said.get(STEP, "?")
    return f"the file is of another save (step {step}, save {said[SAVE][:8]}) than the manifest ({manifest.save[:8]})"


def metadata_of(path: Location) -> dict[str, str]:
    """``__metadata__`` of a safetensors file; {} where there is none or the file cannot be read."""
    try:
        (length,) = struct.unpack("<Q", store_of(path).read(path, 0, 8))
        if length > _HEADER_LIMIT:
            return {}
        found = json.loads(store_of(path).read(path, 8, 8 + length)).get("__metadata__", {})
        return {str(key): str(value) for key, value in found.items()}
    except (OSError, ValueError, RecursionError, AttributeError, struct.error):
        return {}


def read_sound_manifest(folder: Location) -> Manifest:
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


def check_together(folder: Location, manifest: Manifest, wanted: Mapping[str, int]) -> list[Problem]:
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
        # What this rank checks and will read: from a store that is slow to read it comes once.
        held = [name for name in share if wanted.get(name)]
        store_of(folder).hold({folder / name: manifest.files[name].size for name in held})
        found = check_files(folder, manifest, share)
    return sorted((problem for one in gather_objects(found) for problem in one), key=lambda one: one.where)
