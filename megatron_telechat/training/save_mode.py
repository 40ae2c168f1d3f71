"""Whether a run saves beside its training or in between: decided once, by all ranks together."""

from __future__ import annotations

import os
import platform
from collections import defaultdict
from dataclasses import dataclass

from megatron_telechat.backend.host_memory import available_bytes
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.memory import LEAST_STAGING_BYTES, STAGING_SHARE
from megatron_telechat.errors import ResourceError
from megatron_telechat.parallel.agreement import gather_objects


@dataclass(frozen=True)
class SaveMode:
    """The decision, the same on all ranks.

    Attributes:
        about: a line for a person.
    """

    asynchronous: bool
    about: str


def decide_save_mode(run: RunConfig, needed_bytes: int) -> SaveMode:
    """Decide; a collective over all ranks.

    Args:
        needed_bytes: what a save of this rank holds (`train_state.expected_bytes`).

    Raises:
        ResourceError: on every rank: asynchronous saves were asked for, and some node has no memory for the copies or
            no system for it.
    """
    mode = run.checkpoint.checkpoint_mode
    can = hasattr(os, "memfd_create")
    everyone = gather_objects((platform.node(), can, needed_bytes, available_bytes()))
    needed: dict[str, int] = defaultdict(int)
    free: dict[str, int] = {}
    for node, _, bytes_of_rank, available in everyone:
        needed[node] += bytes_of_rank
        free[node] = min(free.get(node, available), available)
    tight = max(needed, key=lambda node: needed[node] / max(free[node], 1))
    largest = max(bytes_of_rank for _, _, bytes_of_rank, _ in everyone)
    memory = f"{_size(largest)} of host memory a rank, {_size(needed[tight])} of {_size(free[tight])} free on a node"
    waits = "training waits while a checkpoint is written"
    beside = f"beside the training: copies take {memory}"
    can = all(capable for _, capable, _, _ in everyone)
    if mode == "sync":
        return SaveMode(False, waits)
    if mode == "async":
        _require(can, needed[tight] <= free[tight], tight, memory)
        return SaveMode(True, beside)
    if not run.checkpoint.save_interval:
        return SaveMode(False, f"{waits} (no --save-interval)")
    if not can:
        return SaveMode(False, f"{waits} (copies need Linux)")
    if largest < LEAST_STAGING_BYTES:
        return SaveMode(False, f"{waits} ({_size(largest)} a rank; --checkpoint-mode async does not wait)")
    if needed[tight] > STAGING_SHARE * free[tight]:
        share = f"more than {STAGING_SHARE:.0%} of what is free"
        return SaveMode(False, f"{waits} (copies would take {memory}: {share})")
    return SaveMode(True, beside)


def _require(can: bool, fits: bool, node: str, memory: str) -> None:
    where, fix = "--checkpoint-mode async", "--checkpoint-mode sync needs neither memory nor a process"
    if not can:
        raise ResourceError("asynchronous saves need Linux (memfd_create)", where, fix).on_every_rank()
    if not fits:
        raise ResourceError(
            f"no host memory for the copies of a checkpoint: {memory} ({node})", where, fix
        ).on_every_rank()


def _size(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
