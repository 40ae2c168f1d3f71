"""Loading what a training begins with: the model and the optimizer, and what the run knew at that step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_telechat.checkpoint import LoadedInfo, TrainState, load_checkpoint
from megatron_telechat.checkpoint.averages import resume_notes
from megatron_telechat.config.run_stages import Position, RunStages
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.data.order import saved_tokens
from megatron_telechat.parallel.agreement import together
from megatron_telechat.parallel.state import ParallelState
from megatron_telechat.training.beginning import Beginning, local_notes, require_same_data
from megatron_telechat.training.steps_taken import StepsTaken


@dataclass(frozen=True)
class Resumed:
    """What was loaded.

    Attributes:
        info: of the checkpoint; None: initial weights.
        goes_on_from: digests of the shared checkpoints that the run continues; of rank 0. None where another stage of
            this process has saved what was loaded.
    """

    info: LoadedInfo | None
    position: Position = Position()
    steps_taken: StepsTaken = field(default_factory=StepsTaken)
    goes_on_from: tuple[str, ...] | None = ()


def load_beginning(
    found: Beginning,
    state: TrainState,
    run: RunConfig,
    parallel: ParallelState,
    stages: RunStages,
    fingerprint: Mapping[str, Any] | None,
) -> Resumed:
    """Fill the state from a checkpoint of this run, or of other weights; a collective over all ranks.

    Args:
        fingerprint: of the data; None: not compared, on ranks that do not have it.

    Raises:
        CheckpointError, DataError: on every rank.
    """
    start, local = found.start, found.local
    source = local.reader if local is not None else start.root
    if source is None:
        return Resumed(None)
    weights_only = start.weights_only and local is None
    saved_by = stages.before(found.position).run
    info = load_checkpoint(
        source, state, run, parallel, step=start.step, weights_only=weights_only, saved_by=saved_by
    )  # fmt: skip
    notes = [*local_notes(found), *(() if local is not None else start.notes)]
    if weights_only:
        return Resumed(replace(info, message="\n".join([info.message, *notes])))
    position = Position()
    with together(parallel):
        length = (info.config or run).training.seq_length
        tokens = saved_tokens(info.extra, info.consumed_samples, length, str(info.path))
        position = Position(info.step, info.consumed_samples, tokens)
        if fingerprint is not None:
            require_same_data(info, fingerprint, run, stages.before(position).run)
    steps_taken, note = StepsTaken.of(info)
    notes += [*([note] if note else []), *resume_notes(run.average, info.extra, position.step)]
    info = replace(info, message="\n".join([info.message, *notes]))
    shared = (found.newest, found.base if local is not None else info.digest)
    return Resumed(info, position, steps_taken, goes_on_from=shared if found.branch is None else None)
