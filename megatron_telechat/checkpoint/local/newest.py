"""The newest sound checkpoint of a run, shared and local ones together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_telechat.checkpoint.format import CheckpointReader
from megatron_telechat.checkpoint.lineage import Candidate, Saved, candidates
from megatron_telechat.checkpoint.local.checking import rank_of
from megatron_telechat.checkpoint.local.copies import LocalCopies, OpenedLocal
from megatron_telechat.checkpoint.local.inventory import Choice, in_order
from megatron_telechat.checkpoint.names import MANIFEST
from megatron_telechat.checkpoint.opening import open_sound, tell_passed_over
from megatron_telechat.checkpoint.start import Start
from megatron_telechat.checkpoint.stores import store_of
from megatron_telechat.errors import CheckpointError, Problem
from megatron_telechat.parallel.agreement import from_rank_0, this_rank, together


@dataclass(frozen=True)
class Newest:
    """What a run begins with. At most one of both is there; where none is, no local checkpoint is in question, and the
    run begins with what its shared ones say.

    Attributes:
        local: opened and checked.
        base: digest of the shared checkpoint that it goes on from; "": there is none.
        shared: opened and checked.
        notes: what was passed over.
    """

    local: OpenedLocal | None = None
    base: str = ""
    shared: CheckpointReader | None = None
    notes: tuple[str, ...] = ()


def open_newest(copies: LocalCopies, start: Start, saved: Saved | None) -> Newest:
    """Try one checkpoint after the other, as `inventory.in_order` has them; a collective over all ranks. Each answer is
    the same on all of them, so they go on to the next one together.

    A shared checkpoint behind which no local one is left is not opened here: the load does that, in which each rank
    knows what it will read.

    Args:
        start, saved: of rank 0, where the run begins by its shared checkpoints.

    Raises:
        CheckpointError: on every rank: none is sound, with every fault.
    """
    found: list[Choice] | None = None
    with together():
        if this_rank() == 0:
            found = in_order(copies.found, start, saved, _left_open(start))
    choices = from_rank_0(found)
    notes = [*tell_passed_over(map(Problem, copies.unreadable))]
    problems: list[Problem] = []
    went_back = False
    for number, choice in enumerate(choices):
        local, shared = None, None
        if choice.local is not None:
            local, wrong = copies.open(choice.local)
        else:
            assert choice.shared is not None
            if not went_back and all(one.local is None for one in choices[number:]):
                return Newest(notes=tuple(notes))
            shared, wrong = open_sound(choice.shared, wanted=_own_files)
            went_back = went_back or shared is None
        notes += tell_passed_over(wrong)
        if local is not None or shared is not None:
            return Newest(local, choice.base, shared, tuple(notes))
        problems += wrong
    if went_back:
        raise CheckpointError(problems).on_every_rank()
    return Newest(notes=tuple(notes))


def _left_open(start: Start) -> list[Candidate]:
    """The shared checkpoints that a start may take; none where the command names one, or none of the run is there."""
    if start.root is None or start.weights_only or start.step is not None:
        return []
    return [] if store_of(start.root).is_file(start.root / MANIFEST) else candidates(start.root)


def _own_files(reader: CheckpointReader) -> Mapping[str, int]:
    """What this rank will read for the most part, if the layout is that of the save: there is no model yet to ask."""
    return {name: entry.size for name, entry in reader.manifest.files.items() if rank_of(name) == this_rank()}
