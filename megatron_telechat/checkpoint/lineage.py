"""Which checkpoint of a folder is the newest: the head of a lineage, not the largest step.

Each training save has a number, one more than any before it in its folder, and names its parent: the checkpoint that
the run had saved before it, or was started from. A save whose parent is of step 10 says that every earlier save beyond
step 10 belongs to a branch that was left (by ``--load-step 10``, or because those were damaged). Manifests of releases
before lineages, and imports, have number 0; among them the largest step is the newest. Everything here reads the first
part of manifests only, without torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_telechat.checkpoint.folders import committed_folders, folders_aside
from megatron_telechat.checkpoint.manifest import is_sound_head, read_manifest
from megatron_telechat.checkpoint.names import MANIFEST, is_replaced, step_of
from megatron_telechat.checkpoint.stores import Signature, store_of
from megatron_telechat.errors import CheckpointError
from megatron_telechat.locations import Location

_HEAD = (
    "digest", "step", "consumed_samples", "config", "optimizer", "data_fingerprint", "extra", "lineage", "save", "part",
)  # fmt: skip
_BEHIND_THE_HEAD = ("rng", "files", "tensors")
_SHORT_HEAD_BYTES = 64 << 10
_HEAD_BYTES = 4 << 20
_heads: dict[str, tuple[Signature, dict[str, Any]]] = {}


@dataclass(frozen=True)
class Began:
    """Where a command said to begin: ``--load`` of another folder, or ``--load-step`` in the run's own.

    Attributes:
        folder: the folder that was named, absolute, links resolved.
        step, digest: the checkpoint taken from it.
    """

    folder: str
    step: int
    digest: str


@dataclass(frozen=True)
class Lineage:
    """What a manifest says of the saves before it.

    Attributes:
        number: of the save in its folder; 0 for those of older releases and imports.
        parent: (step, digest) of the checkpoint it continues; None at the first save of a run that began with initial
            weights.
        began: every place that a command named as a beginning, oldest first.
    """

    number: int = 0
    parent: tuple[int, str] | None = None
    began: tuple[Began, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What a manifest keeps of it; `from_json` is the inverse."""
        parent = None if self.parent is None else {"step": self.parent[0], "digest": self.parent[1]}
        return {"number": self.number, "parent": parent, "began": [vars(one) for one in self.began]}

    @classmethod
    def from_json(cls, body: Any) -> Lineage:
        """Raises KeyError, TypeError or ValueError for what is no lineage."""
        if not body:
            return cls()
        parent = body["parent"]
        began = tuple(Began(str(one["folder"]), int(one["step"]), str(one["digest"])) for one in body["began"])
        return cls(int(body["number"]), None if parent is None else (int(parent["step"]), str(parent["digest"])), began)


@dataclass(frozen=True)
class Saved:
    """A checkpoint, as the first part of its manifest describes it."""

    path: Location
    step: int
    digest: str
    lineage: Lineage
    config: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    consumed_samples: int = 0
    optimizer: Mapping[str, Any] | None = None
    save: str = ""
    """Id of the save; "" where an older release saved it."""
    part: Mapping[str, Any] | None = None
    """Whose part it is, of a part of a local checkpoint."""

    @property
    def age(self) -> tuple[int, int]:
        """Sorts the saves of a folder, oldest first."""
        return self.lineage.number, self.step


@dataclass(frozen=True)
class Candidate:
    """A folder that a load may try.

    Attributes:
        saved: None where its manifest says nothing, or is of another step than the folder's name.
    """

    step: int
    path: Location
    saved: Saved | None


def look_at(folder: Location, part: bool = False) -> Saved:
    """What a checkpoint says of itself, from the first part of its manifest: quick for any number of ranks, but not
    verified.

    Args:
        part: see `read_manifest`.

    Raises CheckpointError when there is no manifest or it cannot be read.
    """
    head = _head(folder / MANIFEST)
    try:
        lineage = Lineage.from_json(head.get("lineage"))
        if (head.get("part") is not None) != part:
            raise ValueError("part")
        return Saved(
            folder, int(head["step"]), str(head["digest"]), lineage, str(head["config"]), dict(head["extra"]),
            int(head["consumed_samples"]), head.get("optimizer"), str(head.get("save") or ""), head.get("part"),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        read_manifest(folder, part)  # says what is wrong with a damaged one
        raise CheckpointError(
            f"the manifest does not follow the schema ({type(error).__name__}: {error})",
            str(folder / MANIFEST),
            "use another checkpoint (--load-step)",
        ) from error


def _head(path: Location) -> dict[str, Any]:
    """The values that stand before the lists of files and tensors; {} where the file does not begin like a manifest.

    Of a store where each look is a request they are kept until the manifest changes.
    """
    store, key = store_of(path), str(path)
    signature = store.signature(path) if store.remote else None
    if signature is not None and _heads.get(key, (None, {}))[0] == signature:
        return _heads[key][1]
    if store.is_link(path) or not store.is_file(path):
        read_manifest(path.parent)  # raises
    try:
        found: dict[str, Any] = {}
        # A blend of very many files makes a long fingerprint.
        for count in (_SHORT_HEAD_BYTES, _HEAD_BYTES, None):
            found = found or _values(store.read(path, 0, count).decode(errors="ignore"))
    except OSError as error:
        raise CheckpointError(
            f"no readable {MANIFEST}: {error.strerror or error}", str(path.parent), "restore it from a copy"
        ) from error
    if signature is not None:
        _heads[key] = signature, found
    return found


def _values(text: str) -> dict[str, Any]:
    decoder, found, at = json.JSONDecoder(), {}, text.find("{") + 1
    try:
        while at > 0:
            key, at = decoder.raw_decode(text, _skip(text, at, " \r\n\t,"))
            if key in _BEHIND_THE_HEAD:
                break
            found[key], at = decoder.raw_decode(text, _skip(text, at, " \r\n\t:"))
    except (ValueError, RecursionError):
        return {}
    return {key: found[key] for key in _HEAD if key in found} if is_sound_head(found) else {}


def _skip(text: str, at: int, blanks: str) -> int:
    while at < len(text) and text[at] in blanks:
        at += 1
    return at


def saved_in(root: Location) -> list[Saved]:
    """The checkpoints of a folder whose manifests can be read, oldest save first; those of branches that were left are
    not among them."""
    return live(readable(root))


def readable(root: Location) -> list[Saved]:
    """The checkpoints of a folder whose manifests can be read and are of the step that their folder is named after, by
    step."""
    found = []
    for step, path in committed_folders(root):
        try:
            saved = look_at(path)
        except CheckpointError:
            continue  # a load names it
        if saved.step == step:
            found.append(saved)
    return found


def live(found: Sequence[Saved]) -> list[Saved]:
    """Oldest save first, without those that a later save has left behind: its parent lies before them."""
    kept: list[Saved] = []
    reach: int | None = None
    for saved in sorted(found, key=lambda one: one.age, reverse=True):
        if reach is None or saved.step <= reach:
            kept.append(saved)
            if saved.lineage.parent is not None:
                reach = saved.lineage.parent[0]
    return kept[::-1]


def candidates(root: Location) -> list[Candidate]:
    """What a load tries, in this order: the lineage, newest first; among it, by their steps, those whose manifests say
    nothing, which a reader must hear of."""
    known = readable(root)
    told = {saved.path for saved in known}
    mute = [Candidate(step, path, None) for step, path in reversed(committed_folders(root)) if path not in told]
    out: list[Candidate] = []
    for saved in live(known)[::-1]:
        while mute and mute[0].step > saved.step:
            out.append(mute.pop(0))
        out.append(Candidate(saved.step, saved.path, saved))
    return [*out, *mute]


def set_aside(root: Location, identifier: str) -> list[Location]:
    """Set aside what branches left behind: the trunk after a roll-back, and the folder that a save of the same step
    replaced.

    A branch is the newer one from the commit of its first save on, by its number; so this may be cut off anywhere and
    is done again by the next save. Nothing is deleted. Returns where they lie now.
    """
    found, store = readable(root), store_of(root)
    kept = {saved.path for saved in live(found)}
    left = [saved.path for saved in found if saved.path not in kept]
    there = {path.name for _, path in committed_folders(root)}
    left += [
        path for path in store.folders(root) if is_replaced(path) and path.name not in there and not store.is_link(path)
    ]
    moved = []
    for path in left:
        step = step_of(path)
        assert step is not None
        moved.append(store.set_aside(path, step, identifier))
    return moved


def folder_of_step(root: Location, step: int) -> Location:
    """The committed folder of one step, the newest where there are two. Raises CheckpointError listing the steps there
    are."""
    folders = committed_folders(root)
    here = [path for found, path in folders if found == step]
    if len(here) > 1:
        known = {saved.path: saved.age for saved in readable(root)}
        here.sort(key=lambda path: known.get(path, (-1, 0)))
    if here:
        return here[-1]
    steps = ", ".join(str(found) for found, _ in folders) or "none"
    aside = [path.name for path in folders_aside(root)]
    more = f"; set aside by a roll-back: {', '.join(aside)}" if aside else ""
    raise CheckpointError(
        f"no checkpoint of step {step}; there: {steps}{more}",
        where=str(root),
        fix="choose one of these with --load-step"
        + (", or name a folder with --load and another --run-dir" if aside else ""),
    )


class Branch:
    """The line of saves that a run continues. Rank 0 keeps it; other ranks may hold one that is never asked.

    Args:
        number: of the last save in the folder, on any branch.
        parent: what the run was loaded from, None for initial or foreign weights.
        began: see :class:`Lineage`.
    """

    def __init__(self, number: int = 0, parent: tuple[int, str] | None = None, began: tuple[Began, ...] = ()):
        self._number, self._parent, self._began = number, parent, began

    @classmethod
    def opening(cls, root: Location, parent: tuple[int, str] | None = None, began: tuple[Began, ...] = ()) -> Branch:
        """A branch that saves into ``root``, numbered behind everything that lies there."""
        found = readable(root)
        for path in folders_aside(root):
            try:
                found.append(look_at(path))
            except CheckpointError:
                continue
        return cls(max((saved.lineage.number for saved in found), default=0), parent, began)

    @property
    def newest(self) -> str:
        """Digest of the checkpoint that it ends with; "" where it began without one."""
        return self._parent[1] if self._parent is not None else ""

    def next(self) -> Lineage:
        """What the manifest of the next save says."""
        return Lineage(self._number + 1, self._parent, self._began)

    def saved(self, saved: Saved) -> None:
        """The next save was committed."""
        self._number, self._parent = saved.lineage.number, (saved.step, saved.digest)
