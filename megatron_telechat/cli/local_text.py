"""What a dry run tells of local checkpoints: what they will take, and what of them lies on this machine. No torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_telechat.checkpoint.lineage import Saved
from megatron_telechat.checkpoint.local.inventory import LocalCheckpoint, NodeParts, checkpoints_of, continuing
from megatron_telechat.checkpoint.local.marker import read_marker
from megatron_telechat.checkpoint.local.parts import parts_in
from megatron_telechat.checkpoint.owner import known_run_id
from megatron_telechat.checkpoint.start import Start
from megatron_telechat.cli.text import gib
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.memory import local_disk_bytes, staging_bytes

_SHOWN = 8


def local_lines(run: RunConfig) -> list[str]:
    """What local checkpoints take; nothing where there are none."""
    settings = run.checkpoint
    if not settings.has_local_tier:
        return []
    copies = settings.replication_factor - 1 if settings.replication else 0
    where = (
        f", with {copies} cop{'y' if copies == 1 else 'ies'} on other nodes"
        if copies
        else "; the loss of a node loses them"
    )
    memory = f"{gib(staging_bytes(run))} GiB of host memory a rank, {gib(local_disk_bytes(run))} GiB of a node's disk"
    return [
        f"{settings.non_persistent_local_ckpt_dir}/  on each node: a local checkpoint every "
        f"{settings.non_persistent_save_interval} steps, beside the training{where}: {memory}"
    ]


def local_beginning(run: RunConfig, start: Start, saved: Saved | None) -> list[str]:
    """Which local checkpoint a run would begin with, as far as this machine can tell; nothing where it knows of
    none."""
    settings = run.checkpoint
    if not settings.has_local_tier or settings.non_persistent_local_ckpt_dir is None:
        return []
    try:
        identifier = known_run_id(run.run_dir)
    except OSError:
        return []
    if not identifier:
        return []
    root = Path(settings.non_persistent_local_ckpt_dir).absolute() / identifier
    here, _ = parts_in(root, identifier)
    found = checkpoints_of([NodeParts(0, tuple(here))])
    usable = continuing(found, start, saved)
    if usable:
        return [f"in place of it the local checkpoint of step {usable[0].step}: {root} on this machine has all of it"]
    partly = _not_whole(found, start, saved)
    if partly is not None:
        ranks = ", ".join(map(str, sorted(partly.holders)[:_SHOWN])) + (" ..." if len(partly.holders) > _SHOWN else "")
        return [
            f"in place of it the local checkpoint of step {partly.step}, if the other nodes hold the rest: {root} on "
            f"this machine has the parts of rank {ranks} of {partly.ranks}"
        ]
    marker = read_marker(run.run_dir)
    anchor = -1 if start.weights_only or saved is None else saved.step
    if marker is not None and start.opens is None and marker.step > anchor:
        return [
            f"the nodes saved a local checkpoint of step {marker.step} in {marker.folder} ({marker.time}); this "
            "machine has no part of it that can be read"
        ]
    return []


def _not_whole(found: list[LocalCheckpoint], start: Start, saved: Saved | None) -> LocalCheckpoint | None:
    """The newest that continues the run, or may, and of which parts are missing here."""
    anchor = None if start.weights_only or start.opens is not None else saved
    for one in found:
        if one.missing and (anchor is None or one.step > anchor.step):
            # That of rank 0 says what it continues; where it is elsewhere, only the step tells.
            if one.saved is None or continuing([_as_whole(one)], start, saved):
                return one
    return None


def _as_whole(one: LocalCheckpoint) -> LocalCheckpoint:
    return replace(one, holders={rank: (0,) for rank in range(one.ranks)})
