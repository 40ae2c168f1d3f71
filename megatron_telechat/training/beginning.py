"""Where a training begins: the checkpoint, the place in the run, and so the stage. Rank 0 decides it for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_telechat.checkpoint import LoadedInfo
from megatron_telechat.checkpoint.lineage import Began, Branch, Saved
from megatron_telechat.checkpoint.local.copies import OpenedLocal
from megatron_telechat.checkpoint.local.newest import Newest
from megatron_telechat.checkpoint.opening import open_verified
from megatron_telechat.checkpoint.start import Start, position_of, require_start
from megatron_telechat.config.length import counts_epochs
from megatron_telechat.config.run_stages import Position, RunStages
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.data import fingerprint_differences
from megatron_telechat.data.datasets import SEQUENCE_LENGTH
from megatron_telechat.errors import DataError
from megatron_telechat.locations import Location
from megatron_telechat.parallel.agreement import from_rank_0, this_rank, together
from megatron_telechat.training.local_tier import LocalTier


@dataclass(frozen=True)
class Beginning:
    """What a training begins with.

    Attributes:
        start: what is loaded.
        position: the place of that checkpoint in the run; the begin of the run where only weights are loaded.
        branch: the line of saves that goes on, where another stage of this process saved the checkpoint.
        protected: the checkpoint that the process began with, where it was another one.
        local: the local checkpoint that is loaded in place of what ``start`` says, opened and checked.
        base: digest of the shared checkpoint that the local one goes on from; "": there is none.
        newest: digest of the newest shared checkpoint, by its manifest, that the run goes on from; of rank 0.
        notes: what was passed over.
    """

    start: Start
    position: Position
    branch: Branch | None = None
    protected: Location | None = None
    local: OpenedLocal | None = None
    base: str = ""
    newest: str = ""
    notes: tuple[str, ...] = ()


def find_beginning(stages: RunStages, tier: LocalTier | None = None) -> Beginning:
    """Decide where a training begins; a collective over all ranks. Rank 0 decides, because a stale cache of a shared
    folder would part the ranks.

    Args:
        tier: local checkpoints. One that continues the run is taken in place of an older shared one, also where newer
            shared ones turn out to be damaged, if a sound copy of each of its parts is found.

    Raises:
        CheckpointError: see :func:`require_start`, and `open_verified`.
    """
    decided: tuple[Start, Saved | None] | None = None
    with together():
        if this_rank() == 0:
            decided = require_start(stages)
    start, saved = from_rank_0(decided)
    found = tier.open_newest(start, saved) if tier is not None else Newest()
    opened, notes = found.local, found.notes
    newest = saved.digest if saved is not None and not start.weights_only else ""
    if opened is not None:
        with together():
            position = position_of(opened.saved)
        return Beginning(start, position, local=opened, base=found.base, newest=newest, notes=notes)
    if start.root is None or saved is None or start.weights_only:
        return Beginning(start, Position(), notes=notes)
    reader, passed_over = found.shared, ()
    if reader is None and (stages.several or counts_epochs(stages.stages[0].run)):
        # A load passes damaged checkpoints over, and an older one may be of another stage, or of another batch, from
        # which the steps that are left of the epochs are counted.
        reader, passed_over = open_verified(start.root, start.step)
    if reader is not None and reader.path != saved.path:
        manifest = reader.manifest
        start = replace(start, step=manifest.step, notes=(*start.notes, *passed_over))
        saved = replace(
            saved, path=reader.path, step=manifest.step, config=manifest.config, extra=manifest.extra,
            consumed_samples=manifest.consumed_samples,
        )  # fmt: skip
    with together():
        position = position_of(saved)
    return Beginning(start, position, newest=newest, notes=notes)


def local_notes(found: Beginning) -> list[str]:
    """What a person should know of the local checkpoint that a training begins with, or did not begin with."""
    if found.local is None:
        return list(found.notes)
    one, shared = found.local.checkpoint, found.start
    notes = [f"from the disks of the nodes ({one.ranks} parts)"]
    if found.local.mirrored:
        ranks = ", ".join(map(str, found.local.mirrored[:8])) + (" and others" if len(found.local.mirrored) > 8 else "")
        notes.append(f"the parts of rank {ranks} come from other nodes")
    if shared.opens is not None:
        notes.append("the beginning that the command names was applied when these were saved")
    return [*notes, *found.notes]


def require_same_data(info: LoadedInfo, fingerprint: Mapping[str, Any], run: RunConfig, before: RunConfig) -> None:
    """Other data under the same sample numbers would train on samples twice, or never, without a word.

    Args:
        fingerprint: of the data of the run.
        before: the stage of the run that ends with the checkpoint: its length of a sample is as good as the run's,
            because what one length has not read is cut anew for the next.

    Raises:
        DataError: the data is another one.
    """
    if info.data_fingerprint is None or run.checkpoint.allow_data_change:
        return
    differences = fingerprint_differences(info.data_fingerprint, fingerprint)
    length = info.config.training.seq_length if info.config is not None else None
    if differences and length == before.training.seq_length:
        differences = fingerprint_differences(info.data_fingerprint, {**fingerprint, SEQUENCE_LENGTH: length})
    if differences:
        raise DataError(
            f"the data is not the data of the checkpoint: {'; '.join(differences[:3])}",
            where=str(info.path),
            fix="give the data, seed and seq_length of the run that saved it (a stage of the run can have another "
            "length: stages:), or --allow-data-change to continue anyway",
        )


def continued_branch(found: Beginning, info: LoadedInfo | None, save_dir: Location) -> Branch:
    """The line of saves that the next checkpoint continues; a collective over all ranks, of which only rank 0's line
    says anything.

    Args:
        info: what was loaded; None where nothing was.
    """
    if found.branch is not None:
        return found.branch
    began, start = found.start.began, found.start
    if start.opens is not None and found.local is not None:
        began = found.local.saved.lineage.began
    elif start.opens is not None and info is not None:
        began = (*began, Began(start.opens, info.step, info.digest))
    resumes = found.local is not None or not start.weights_only
    parent = (info.step, info.digest) if info is not None and resumes else None
    with together():
        return Branch.opening(save_dir, parent, began) if this_rank() == 0 else Branch()
