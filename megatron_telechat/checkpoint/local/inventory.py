"""What all nodes hold of local checkpoints together, and which of it continues a run. No torch.

A local checkpoint goes on from one of the shared folder: it names that by its digest, or, where that save was still
under way, by the id of the save. So it continues a run only as long as the checkpoint that it goes on from is the
newest of the run's lineage: a save of another branch, a roll-back and a newer save into the shared folder all end it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_telechat.checkpoint.lineage import Began, Saved
from megatron_telechat.checkpoint.local.parts import LocalPart
from megatron_telechat.checkpoint.start import Start


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

    def goes_on_from(self, anchor: Saved | None, began: Sequence[Began]) -> bool:
        """Whether it continues a run whose newest shared checkpoint is this one.

        Args:
            anchor: None: there is none, the run began with initial or foreign weights.
            began: every place that commands named as a beginning, that of the command at hand included.
        """
        assert self.saved is not None
        if tuple(began) != self.saved.lineage.began:
            return False
        if anchor is None:
            return not self.continues
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


def continuing(
    found: Sequence[LocalCheckpoint], start: Start, saved: Saved | None
) -> tuple[list[LocalCheckpoint], list[str]]:
    """The local checkpoints that a run may begin with in place of what it would begin with, newest first; and what is
    not whole.

    Args:
        start, saved: where the run begins by its shared checkpoints, see `start.require_start`.
    """
    anchor = None if start.root is None or start.weights_only else saved
    began = start.began
    if anchor is not None and start.opens is not None:
        began = (*began, Began(start.opens, anchor.step, anchor.digest))
    usable, notes = [], []
    for one in found:
        if one.saved is None:
            if anchor is None or one.step > anchor.step:
                notes.append(f"local checkpoint of step {one.step}: no node holds the part of rank 0")
        elif one.goes_on_from(anchor, began):
            if one.missing:
                notes.append(
                    f"local checkpoint of step {one.step}: no node holds the part of rank "
                    f"{', '.join(map(str, one.missing[:8]))}{' and others' if len(one.missing) > 8 else ''}"
                )
            else:
                usable.append(one)
    return usable, notes
