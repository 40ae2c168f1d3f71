"""Opening a local checkpoint: of each part a sound copy is found, and read where it lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_telechat.checkpoint.files import open_tensors
from megatron_telechat.checkpoint.format import CheckpointReader
from megatron_telechat.checkpoint.handed import to_hand_out
from megatron_telechat.checkpoint.lineage import Saved
from megatron_telechat.checkpoint.local import parts
from megatron_telechat.checkpoint.local.checking import checked_part, rank_of, whole_manifest
from megatron_telechat.checkpoint.local.inventory import LocalCheckpoint, NodeParts, checkpoints_of
from megatron_telechat.checkpoint.local.peers import Address, RemotePart
from megatron_telechat.checkpoint.manifest import Manifest
from megatron_telechat.checkpoint.ranged import RangedFile
from megatron_telechat.errors import CheckpointError, Problem
from megatron_telechat.parallel.agreement import from_rank_0, gather_objects, gather_on_rank_0, this_rank, together


@dataclass(frozen=True)
class Place:
    """Where a rank runs, and how the process beside it is reached.

    Attributes:
        node: the first rank of its node.
    """

    node: int
    address: Address


@dataclass(frozen=True)
class OpenedLocal:
    """A local checkpoint of which every byte was checked; the same on all ranks but for the reader's connections.

    Attributes:
        saved: as `lineage.look_at` describes a checkpoint of the shared folder; its digest is of the whole manifest.
        mirrored: ranks whose part is read from the mirror, because its own node does not hold a sound one.
    """

    checkpoint: LocalCheckpoint
    reader: CheckpointReader
    saved: Saved
    mirrored: tuple[int, ...] = ()


class LocalCopies:
    """The local checkpoints of a run, on all its nodes. The same on all ranks.

    Attributes:
        found: whole or not, the one saved last first.
        unreadable: a note for each part that cannot be read.

    Args:
        root: the folder of the run on each node.
        places: of the ranks.
        secret: that the processes beside the ranks want to hear.
        nodes: what they hold.
    """

    def __init__(self, root: Path, run: str, places: Sequence[Place], secret: str, nodes: Sequence[NodeParts]):
        self._root, self._run, self._places, self._secret = root, run, places, secret
        self.found = checkpoints_of(nodes)
        self.unreadable = tuple(note for node in nodes for note in node.notes)
        self._remote: list[RemotePart] = []

    def close(self) -> None:
        """End the connections to other nodes."""
        for remote in self._remote:
            remote.close()
        self._remote.clear()

    def open(self, one: LocalCheckpoint) -> tuple[OpenedLocal | None, list[Problem]]:
        """One checkpoint, if a sound copy of each part is there, and what is wrong with copies of its parts; a
        collective, with the same answer on all ranks."""
        if one.lack:
            return None, [Problem(f"local checkpoint of step {one.step}: {one.lack}")]
        left = {rank: self._by_preference(rank, nodes) for rank, nodes in one.holders.items()}
        checkers: dict[int, int] = {}
        mine: dict[int, Manifest] = {}
        problems: list[Problem] = []
        while len(checkers) < len(left):
            # All ranks come to the same plan: who looks at which copy.
            plan = {rank: self._checker(rank, nodes.pop(0)) for rank, nodes in left.items() if rank not in checkers}
            faults: dict[int, list[Problem]] = {}
            with together():
                for rank in (rank for rank, checker in plan.items() if checker == this_rank()):
                    manifest, faults[rank] = checked_part(self._root, self._run, rank, one.ranks, one.step, one.save)
                    if manifest is not None:
                        mine[rank] = manifest
            for found in gather_objects(faults):
                for rank, wrong in found.items():
                    problems += wrong
                    if not wrong:
                        checkers[rank] = plan[rank]
            if any(rank not in checkers and not nodes for rank, nodes in left.items()):
                return None, _sorted(problems)
        manifest, wrong = self._merged(one, mine)
        if manifest is None:
            return None, _sorted([*problems, *wrong])
        reader = self._reader(one, manifest, checkers)
        assert one.saved is not None
        saved = replace(
            one.saved, path=reader.path, digest=manifest.digest, optimizer=manifest.optimizer, save=one.save, part=None
        )
        own = {rank: self._places[rank].node if rank < len(self._places) else -1 for rank in checkers}
        mirrored = tuple(rank for rank, checker in checkers.items() if self._places[checker].node != own[rank])
        return OpenedLocal(one, reader, saved, mirrored), _sorted(problems)

    def _by_preference(self, rank: int, nodes: Sequence[int]) -> list[int]:
        """The nodes that hold a part: where its rank runs now first."""
        here = self._places[rank].node if rank < len(self._places) else -1
        return sorted(nodes, key=lambda node: (node != here, node))

    def _checker(self, rank: int, node: int) -> int:
        """Who reads a part on a node: its rank, if that runs there, else the ranks of the node take turns."""
        there = [number for number, place in enumerate(self._places) if place.node == node]
        return rank if rank in there else there[rank % len(there)]

    def _merged(self, one: LocalCheckpoint, mine: Mapping[int, Manifest]) -> tuple[Manifest | None, list[Problem]]:
        """The manifest of the whole, as rank 0 hands it out; a collective."""
        gathered = gather_on_rank_0(dict(mine))
        given: tuple[Manifest | None, list[Problem]] | None = None
        with together():
            if this_rank() == 0:
                found = {rank: manifest for each in gathered for rank, manifest in each.items()}
                try:
                    given = to_hand_out(whole_manifest(found)), []
                except CheckpointError as error:
                    given = None, [replace(problem, where=self._shown(one)) for problem in error.problems]
        return from_rank_0(given)

    def _reader(self, one: LocalCheckpoint, manifest: Manifest, checkers: Mapping[int, int]) -> CheckpointReader:
        here = self._places[this_rank()].node
        remote: dict[int, RemotePart] = {}

        def open_file(name: str) -> Any:
            rank = rank_of(name)
            checker = checkers[rank]
            if self._places[checker].node == here:
                return open_tensors(parts.committed(self._root, rank, one.step, one.save) / name)
            if rank not in remote:
                remote[rank] = RemotePart(self._places[checker].address, self._secret, rank, one.step, one.save)
                self._remote.append(remote[rank])
            return RangedFile(lambda start, stop: remote[rank].read(name, start, stop))

        path = Path(self._shown(one))
        return CheckpointReader(path, check_sizes=False, manifest=manifest, open_file=open_file)

    def _shown(self, one: LocalCheckpoint) -> str:
        """A name for people: the parts lie in several folders of several nodes."""
        return str(self._root / "part_*" / parts.committed(self._root, 0, one.step, one.save).name)


def _sorted(problems: Sequence[Problem]) -> list[Problem]:
    return sorted(problems, key=lambda problem: problem.where)
