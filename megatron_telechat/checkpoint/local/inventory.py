"""What all nodes hold of local checkpoints together, and which of it continues a run. No torch.

A local checkpoint goes on from one of the shared folder: it names that by its digest, or, where that save was still
under way, by the id of the save. So it continues a run only as long as the checkpoint that it goes on from is of the
run's lineage, and is taken only as long as nothing newer of that can be read: a save of another branch, a roll-back and
a newer sound save into the shared folder all end it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from megatron_telechat.checkpoint.lineage import Began, Candidate, Saved
from megatron_telechat.checkpoint.local.parts import LocalPart
from megatron_telechat.checkpoint.start import Start
from megatron_telechat.locations import Location


@dataclass(frozen=True)
class NodeParts:
    """What one node holds.

    Attributes:
        node: the first rank of the node.
        notes: parts that cannot be read.
    """

    node: int
    parts: tuple[LocalPart, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LocalCheckpoint:
    """A local checkpoint, as the parts of all nodes describe it.

    Attributes:
        saved: what the part of rank 0 says; None where that is nowhere.
        holders: for each rank's part the nodes that hold it.
    """

    save: str
    step: int
    number: int
    ranks: int
    saved: Saved | None
    continues: tuple[str, ...]
    under_way: str
    holders: dict[int, tuple[int, ...]]

    @property
    def missing(self) -> list[int]:
        """Ranks whose part no node holds."""
        return [rank for rank in range(self.ranks) if rank not in self.holders]

    @property
    def lack(self) -> str:
        """What no node holds of it; "" where it is whole."""
        ranks = ", ".join(map(str, self.missing[:8])) + (" and others" if len(self.missing) > 8 else "")
        return f"no node holds the part of rank {ranks}" if ranks else ""

    def goes_on_from(self, anchor: Saved | None, lines: Set[tuple[Began, ...]], passed: Mapping[str, int]) -> bool:
        """Whether it continues a run from this shared checkpoint.

        Args:
            anchor: None: there is none, the run began with initial or foreign weights.
            lines: what the places may be that commands named as beginnings, all of them in order.
            passed: by their digests the steps of newer shared checkpoints, none of which can be read.
        """
        assert self.saved is not None
        if self.saved.lineage.began not in lines:
            return False
        if anchor is None:
            # What a fall-back saved names the newest one that it could not read, from which it does not go on.
            return all(self.step <= passed.get(digest, -1) for digest in self.continues)
        known = anchor.digest in self.continues or (anchor.save != "" and anchor.save == self.under_way)
        return known and self.step > anchor.step


def checkpoints_of(nodes: Sequence[NodeParts]) -> list[LocalCheckpoint]:
    """The local checkpoints of the run, whole or not, the one saved last first."""
    by_save: dict[str, list[tuple[int, LocalPart]]] = {}
    for node in nodes:
        for part in node.parts:
            by_save.setdefault(part.save, []).append((node.node, part))
    found = []
    for save, held in by_save.items():
        first = next((part for _, part in held if part.rank == 0), held[0][1])
        alike = [(node, part) for node, part in held if (part.step, part.ranks) == (first.step, first.ranks)]
        holders: dict[int, tuple[int, ...]] = {}
        for node, part in sorted(alike, key=lambda one: (one[1].rank, one[0])):
            holders[part.rank] = (*holders.get(part.rank, ()), node)
        found.append(
            LocalCheckpoint(
                save, first.step, first.number, first.ranks, first.saved, first.continues, first.under_way, holders
            )
        )
    return sorted(found, key=lambda one: (one.number, one.step, one.save), reverse=True)


def continuing(found: Sequence[LocalCheckpoint], start: Start, saved: Saved | None) -> list[LocalCheckpoint]:
    """The whole local checkpoints that a run begins with rather than with its shared one, the one saved last first.

    Args:
        start, saved: where the run begins by its shared checkpoints, see `start.require_start`.
    """
    anchor = None if start.root is None or start.weights_only else saved
    fitting = _fitting(found, anchor, _first_began(start, anchor), {})
    return [one for one in fitting if not one.lack]


@dataclass(frozen=True)
class Choice:
    """A checkpoint that a run may begin with.

    Attributes:
        shared: its folder; None: it is a local one.
        base: digest of the shared checkpoint that the local one goes on from; "": there is none.
    """

    shared: Location | None = None
    local: LocalCheckpoint | None = None
    base: str = ""


def in_order(
    found: Sequence[LocalCheckpoint], start: Start, saved: Saved | None, shared: Sequence[Candidate]
) -> list[Choice]:
    """What a run may begin with, shared and local together, newest first: before each shared checkpoint the local ones
    that go on from it, and at the end those that were saved before there was any.

    A local checkpoint between two shared ones must be of the same line as the newer one of them, or be one that a
    fall-back from that has saved: its beginnings are those that a newer one names. What a roll-back has left behind
    has others.

    Args:
        start, saved: where the run begins by its shared checkpoints, see `start.require_start`.
        shared: the folders of ``start.root``, as `lineage.candidates` has them, if the command leaves open which one is
            taken; none where it begins with initial or foreign weights, which are no choice.
    """
    if start.root is None or start.weights_only:
        return [Choice(local=one) for one in _fitting(found, None, {start.began}, {})]
    if not shared and saved is not None:
        shared = [Candidate(saved.step, saved.path, saved)]
    out: list[Choice] = []
    left, unread = list(found), list[Candidate]()
    lines, passed = {start.began}, dict[str, int]()
    for candidate in [*shared, None]:
        anchor = candidate.saved if candidate is not None else None
        if candidate is not None and anchor is None:
            unread.append(candidate)
            continue
        if start.opens is not None:
            # Nothing lies before a beginning that the command names.
            fitting = _fitting(left, anchor, _first_began(start, anchor), passed) if anchor is not None else []
        else:
            fitting = _fitting(left, anchor, lines, passed)
        for one in fitting:
            left.remove(one)
            while unread and unread[0].step > one.step:
                out.append(Choice(unread.pop(0).path))
            out.append(Choice(local=one, base=anchor.digest if anchor is not None else ""))
        out += [Choice(one.path) for one in unread]
        unread.clear()
        if candidate is not None and anchor is not None:
            out.append(Choice(candidate.path))
            lines.add(anchor.lineage.began)
            passed[anchor.digest] = anchor.step
    return out


_Began = tuple[Began, ...]


def _first_began(start: Start, anchor: Saved | None) -> set[_Began]:
    """The beginnings of what goes on from the checkpoint that a run begins with."""
    if anchor is None or start.opens is None:
        return {start.began}
    return {(*start.began, Began(start.opens, anchor.step, anchor.digest))}


def _fitting(
    found: Sequence[LocalCheckpoint], anchor: Saved | None, lines: Set[_Began], passed: Mapping[str, int]
) -> list[LocalCheckpoint]:
    """Those that go on from a shared checkpoint. Where no node holds the part of rank 0, which says that, by the step:
    they cannot be read, but may be named."""

    def fits(one: LocalCheckpoint) -> bool:
        if one.saved is None:
            return anchor is None or one.step > anchor.step
        return one.goes_on_from(anchor, lines, passed)

    return [one for one in found if fits(one)]
