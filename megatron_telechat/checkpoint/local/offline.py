"""Local checkpoints outside of a job: read from the folder of one node, or from those of several, as they lie on the
nodes or wherever they were copied to. No torch before a tensor is read.

No ranks say here how many nodes there are: a part that is in none of the folders may lie on a node whose folder was not
given.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_telechat.checkpoint.local import parts
from megatron_telechat.checkpoint.local.checking import checked_part, manifest_of_some, rank_of, whole_manifest
from megatron_telechat.checkpoint.local.inventory import LocalCheckpoint, NodeParts, checkpoints_of
from megatron_telechat.checkpoint.manifest import Manifest, TensorEntry, read_manifest
from megatron_telechat.checkpoint.names import MANIFEST, step_of
from megatron_telechat.errors import CheckpointError, Problem
from megatron_telechat.locations import Location

if TYPE_CHECKING:
    from megatron_telechat.checkpoint.format import CheckpointReader

_RUN = re.compile(r"[0-9a-f]{32}")
_OTHER_PLACES = "give the folders of the other nodes too, or choose another step (--step)"


@dataclass(frozen=True)
class HeldPart:
    """What a given folder holds that is a part by its name.

    Attributes:
        place: number of the folder among those given.
        run: identifier; "" where the part does not say it.
        part: what it says of itself; None where that cannot be read, or is not what its names say.
        manifest: read with every file of the part; None before `checked`, and where it is damaged.
        problems: what is wrong with it.
        seconds: that the check took.
    """

    place: int
    folder: Path
    run: str
    part: parts.LocalPart | None
    problems: tuple[Problem, ...] = ()
    manifest: Manifest | None = None
    seconds: float = 0.0

    @property
    def is_sound(self) -> bool:
        """Whether every byte is what was saved; after `checked`."""
        return self.manifest is not None and not self.problems

    @property
    def unknown_files(self) -> list[str]:
        """Files that its manifest does not list."""
        known = {MANIFEST, *(self.manifest.files if self.manifest is not None else ())}
        return sorted(path.name for path in self.folder.iterdir() if path.name not in known)


def holds_parts(path: Location) -> bool:
    """Whether parts of local checkpoints lie there: in ``--non-persistent-local-ckpt-dir``, the folder of a run in it,
    the folder of a rank in that, or one part."""
    return isinstance(path, Path) and bool(_part_folders(path))


def held_in(places: Sequence[Path]) -> list[HeldPart]:
    """The parts in these folders, as the first parts of their manifests describe them. Links in the folders are not
    followed. Raises CheckpointError where there are none."""
    found = []
    for number, place in enumerate(places):
        here = [_held(number, folder) for folder in _part_folders(place)]
        if not here:
            raise CheckpointError(
                "no part of a local checkpoint there",
                str(place),
                "give the folder of --non-persistent-local-ckpt-dir on a node, or that of one run in it",
            )
        found += here
    return found


def checked(held: HeldPart) -> HeldPart:
    """The same with every byte read."""
    if held.part is None:
        return held
    began = time.perf_counter()
    part, root = held.part, held.folder.parent.parent
    manifest, problems = checked_part(root, held.run, part.rank, part.ranks, part.step, part.save)
    return replace(held, problems=tuple(problems), manifest=manifest, seconds=time.perf_counter() - began)


@dataclass(frozen=True)
class Gathered:
    """A local checkpoint, as far as it lies in the given folders.

    Attributes:
        one: what its parts say; its holders are the numbers of the folders.
        copies: of each rank's part what is in the folders.
    """

    run: str
    one: LocalCheckpoint
    copies: Mapping[int, tuple[HeldPart, ...]]

    @property
    def name(self) -> str:
        """Of the folder of each of its parts."""
        return next(iter(self.copies.values()))[0].folder.name

    @property
    def sound(self) -> dict[int, HeldPart]:
        """Of each rank the first sound copy of its part; after `checked`."""
        whole = {rank: [copy for copy in copies if copy.is_sound] for rank, copies in self.copies.items()}
        return {rank: copies[0] for rank, copies in sorted(whole.items()) if copies}

    @property
    def missing(self) -> list[int]:
        """Ranks of whose part no folder has a copy."""
        return [rank for rank in range(self.one.ranks) if rank not in self.copies]

    @property
    def damaged(self) -> list[int]:
        """Ranks of whose part each copy is damaged; after `checked`."""
        return sorted(self.copies.keys() - self.sound.keys())

    @property
    def is_whole(self) -> bool:
        """Whether a restart would have all of it from these folders; after `checked`."""
        return len(self.sound) == self.one.ranks

    def lost_with(self, place: int) -> list[int]:
        """Ranks of whose part the only sound copies are in this folder."""
        there = {rank: {copy.place for copy in copies if copy.is_sound} for rank, copies in self.copies.items()}
        return sorted(rank for rank, places in there.items() if places == {place})

    def problems(self) -> list[Problem]:
        """What is wrong with the parts together though each is sound by itself: copies that differ, pieces that do not
        make the tensors."""
        found = []
        for rank, copies in sorted(self.copies.items()):
            sound = [(copy, copy.manifest.digest) for copy in copies if copy.manifest is not None and copy.is_sound]
            for other, digest in sound[1:]:
                if digest != sound[0][1]:
                    what = f"this copy of the part of rank {rank} differs from the one in {sound[0][0].folder}"
                    found.append(Problem(what, str(other.folder), "one of them was changed: use another checkpoint"))
        if self.is_whole and not found:
            try:
                whole_manifest(_manifests(self.sound))
            except CheckpointError as error:
                found += [Problem(problem.what, self.name, _OTHER_PLACES) for problem in error.problems]
        return found


def gathered(held: Sequence[HeldPart]) -> list[Gathered]:
    """The local checkpoints that the parts are of, by run, the one saved last first. Parts that say nothing of
    themselves are of none."""
    found = []
    for run in dict.fromkeys(one.run for one in held if one.part is not None):
        mine = [one for one in held if one.part is not None and one.run == run]
        nodes = [
            NodeParts(place, tuple(one.part for one in mine if one.place == place and one.part is not None))
            for place in sorted({one.place for one in mine})
        ]
        for one in checkpoints_of(nodes):
            copies: dict[int, tuple[HeldPart, ...]] = {}
            for each in held:
                rank = _rank_in(one, run, each)
                if rank is not None:
                    copies[rank] = (*copies.get(rank, ()), each)
            found.append(Gathered(run, one, copies))
    return found


def _rank_in(one: LocalCheckpoint, run: str, held: HeldPart) -> int | None:
    """Whose part of a local checkpoint it is; None: of another one. One that is damaged is known by its names."""
    if held.part is None:
        there = held.run in ("", run) and held.folder.name == parts.committed(Path(), 0, one.step, one.save).name
        return parts.rank_of_holder(held.folder.parent) if there else None
    mine = (held.run, held.part.save, held.part.step, held.part.ranks) == (run, one.save, one.step, one.ranks)
    return held.part.rank if mine else None


@dataclass(frozen=True)
class OpenedOffline:
    """A local checkpoint to be read, as far as it is in the folders.

    Attributes:
        reader: of the tensors that the folders hold whole; no others are in it.
        pieces: of the other tensors what there is.
        checkpoint: with every copy that was looked at.
        notes: what was passed over.
    """

    reader: CheckpointReader
    checkpoint: Gathered
    pieces: Mapping[str, TensorEntry] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def open_offline(places: Sequence[Path], step: int | None = None) -> OpenedOffline:
    """Open the newest local checkpoint that the folders hold whole and sound; where they hold none, the newest of which
    they hold a sound part.

    Args:
        step: the one to open, as far as it is there.

    Raises:
        CheckpointError: there is none, of one run, or no sound part of one.
    """
    held = held_in(places)
    runs = sorted({one.run for one in held if one.run})
    if len(runs) > 1:
        raise CheckpointError(
            f"there are local checkpoints of {len(runs)} runs: {', '.join(runs[:5])}",
            ", ".join(map(str, places)),
            "name the folder of one run in each, DIR/<run id>; run_id in a run folder says which is its own",
        )
    every = gathered(held)
    wanted = [one for one in every if step in (None, one.one.step)]
    problems = [problem for one in held if step in (None, step_of(one.folder)) for problem in one.problems]
    if not wanted and not problems:
        steps = ", ".join(str(one.one.step) for one in every)
        raise CheckpointError(
            f"no local checkpoint of step {step}; there: {steps}", ", ".join(map(str, places)), "choose one of these"
        )
    partly: Gathered | None = None
    for one in wanted:
        read = replace(one, copies={rank: tuple(map(checked, copies)) for rank, copies in one.copies.items()})
        problems += [problem for copies in read.copies.values() for copy in copies for problem in copy.problems]
        faults = read.problems()
        problems += faults
        if read.is_whole and not faults:
            return _opened(read, problems)
        partly = partly if partly is not None or not read.sound else read
    if partly is None:
        raise CheckpointError(problems)
    return _opened(partly, problems)


def _opened(one: Gathered, problems: Sequence[Problem]) -> OpenedOffline:
    from megatron_telechat.checkpoint.files import open_tensors
    from megatron_telechat.checkpoint.format import CheckpointReader

    sound = one.sound
    if one.is_whole:
        manifest, pieces = whole_manifest(_manifests(sound)), {}
    else:
        manifest, pieces = manifest_of_some(_manifests(sound))

    def open_file(name: str) -> Any:
        return open_tensors(sound[rank_of(name)].folder / name)

    root = next(iter(sound.values())).folder.parent.parent
    reader = CheckpointReader(root / "part_*" / one.name, check_sizes=False, manifest=manifest, open_file=open_file)
    notes = tuple(dict.fromkeys(f"passed over: {problem.what} ({problem.where})" for problem in problems))
    return OpenedOffline(reader, one, pieces, notes)


def _manifests(sound: Mapping[int, HeldPart]) -> dict[int, Manifest]:
    return {rank: copy.manifest for rank, copy in sound.items() if copy.manifest is not None}


def _held(place: int, folder: Path) -> HeldPart:
    root = folder.parent.parent
    run = root.name if _RUN.fullmatch(root.name) else ""
    try:
        # A folder that was copied under another name: the parts say whose they are.
        run = run or str((read_manifest(folder, part=True).part or {}).get("run", ""))
        return HeldPart(place, folder, run, parts.part_at(folder, run))
    except CheckpointError as error:
        return HeldPart(place, folder, run, None, tuple(error.problems))


def _part_folders(place: Path) -> list[Path]:
    place = place.resolve()
    if parts.is_part(place):
        return [place]
    if parts.rank_of_holder(place) is not None:
        return [folder for folder in parts.folders_in(place.parent) if folder.parent == place]
    return [folder for root in _roots(place) for folder in parts.folders_in(root)]


def _roots(place: Path) -> list[Path]:
    """Folders of runs: this one, or those in it."""
    place = place.resolve()
    try:
        if not place.is_dir():
            return []
        inside = sorted(path for path in place.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:
        return []
    if any(parts.rank_of_holder(path) is not None for path in inside):
        return [place]
    return [path for path in inside if parts.folders_in(path)]
