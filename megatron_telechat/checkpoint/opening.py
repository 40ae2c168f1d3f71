"""Opening the checkpoint that a run, or a tool, goes on from: the newest whose every byte is what was saved.

Nothing is loaded before all ranks know that the whole checkpoint is sound. One that is not is passed over for the next
older one of its lineage, unless the user has named it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

from megatron_telechat.checkpoint.format import CheckpointReader
from megatron_telechat.checkpoint.handed import to_hand_out
from megatron_telechat.checkpoint.lineage import candidates, folder_of_step
from megatron_telechat.checkpoint.manifest import Manifest
from megatron_telechat.checkpoint.names import MANIFEST
from megatron_telechat.checkpoint.stores import store_of
from megatron_telechat.checkpoint.verify import check_together, read_sound_manifest
from megatron_telechat.errors import CheckpointError, Problem
from megatron_telechat.locations import Location
from megatron_telechat.parallel.agreement import from_rank_0, this_rank, together

Wanted = Callable[[CheckpointReader], Mapping[str, int]]
"""Bytes that this rank will read of each file of a checkpoint."""
Fits = Callable[[CheckpointReader], None]
"""Raises CheckpointError for a checkpoint that is none of this run: none older is tried then."""

log = logging.getLogger(__name__)


def open_verified(
    root: Location, step: int | None = None, *, fits: Fits | None = None, wanted: Wanted | None = None
) -> tuple[CheckpointReader, tuple[str, ...]]:
    """Open the newest sound checkpoint; a collective over all ranks, where there are several.

    Rank 0 reads the manifest and hands it out; each file is read and checked by one rank.

    Args:
        root: a folder of checkpoints, or one checkpoint.
        step: the one to take; then, and where ``root`` is one checkpoint, no other is tried.
        fits, wanted: asked on every rank, with the manifest read and the files not yet checked.

    Returns:
        The reader, and what was passed over.

    Raises:
        CheckpointError: on every rank: there is none, or none is sound; with every file at fault.
    """
    folders: list[Location] | None = None
    named = False
    with together():
        if this_rank() == 0:
            named = step is not None or store_of(root).is_file(root / MANIFEST)
            folders = _folders(root, step)
    folders, named = from_rank_0((folders, named))
    problems: list[Problem] = []
    for folder in folders or ():
        reader, found = open_sound(folder, named, fits=fits, wanted=wanted)
        if reader is not None:
            return reader, tell_passed_over(problems)
        if named:
            raise CheckpointError(found).on_every_rank()
        problems += found
    if problems:
        raise CheckpointError(problems).on_every_rank()
    raise CheckpointError(
        "no checkpoint there", str(root), "give a folder that holds iter_… folders, or one of these"
    ).on_every_rank()


def tell_passed_over(problems: Iterable[Problem]) -> tuple[str, ...]:
    """A line for each, which rank 0 logs."""
    lines = tuple(f"passed over: {one.what}" + (f" ({one.where})" if one.where else "") for one in problems)
    for line in lines if this_rank() == 0 else ():
        log.warning("%s", line)
    return lines


def _folders(root: Location, step: int | None) -> list[Location]:
    if store_of(root).is_file(root / MANIFEST):
        return [root]
    return [folder_of_step(root, step)] if step is not None else [one.path for one in candidates(root)]


def open_sound(
    folder: Location, named: bool = False, *, fits: Fits | None = None, wanted: Wanted | None = None
) -> tuple[CheckpointReader | None, list[Problem]]:
    """A reader of one checkpoint, if it is sound, or what is wrong with it; a collective, with the same answer on all
    ranks.

    Args:
        named: by the user, who may give a link.
        fits, wanted: see `open_verified`.
    """
    given: tuple[Manifest | None, list[Problem]] | None = None
    with together():
        if this_rank() == 0:
            given = _manifest_to_hand_out(folder, named)
    manifest, problems = from_rank_0(given)
    if manifest is None:
        return None, problems
    reader = CheckpointReader(folder, check_sizes=False, manifest=manifest)
    files: Mapping[str, int] = {}
    with together():
        if fits is not None:
            fits(reader)
        if wanted is not None:
            files = wanted(reader)
    problems = check_together(folder, manifest, files)
    if problems:
        reader.close()
        return None, problems
    return reader, []


def _manifest_to_hand_out(folder: Location, named: bool) -> tuple[Manifest | None, list[Problem]]:
    if store_of(folder).is_link(folder) and not named:
        return None, [Problem("the folder is a symbolic link", str(folder), "copy the folder, or name it with --load")]
    try:
        return to_hand_out(read_sound_manifest(folder)), []
    except CheckpointError as error:
        return None, list(error.problems)
