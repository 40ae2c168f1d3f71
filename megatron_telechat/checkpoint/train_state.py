"""Saving and loading the state of a training run, in any layout.

Every rank writes the boxes of global tensors it owns and reads those it needs; who owned
what when the checkpoint was written plays no part in reading it.

A save has three parts: all ranks begin it (`begin_save`), each writes its own files (`write_part`), and rank 0 commits
them (`commit_parts`). `save_checkpoint` does one after the other; `asynchronous.py` lets training go on beside the last
two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_telechat.checkpoint import commit as protocol
from megatron_telechat.checkpoint import rng as rng_tree
from megatron_telechat.checkpoint.committing import CommitRecord, always_writable, commit_parts
from megatron_telechat.checkpoint.disk import require_free_space
from megatron_telechat.checkpoint.files import FileEntry, write_safetensors
from megatron_telechat.checkpoint.format import PartWriter, versions
from megatron_telechat.checkpoint.lineage import Branch, look_at
from megatron_telechat.checkpoint.loss_scale import scaler_state
from megatron_telechat.checkpoint.meaning import TOKENIZER, tokenizer_of
from megatron_telechat.checkpoint.optimizer_state import OptimizerSlice, adam_steps
from megatron_telechat.checkpoint.owned import OwnedTensor, bytes_after_a_step, owned_tensors
from megatron_telechat.checkpoint.parts import Part
from megatron_telechat.checkpoint.verify import remember_files
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.locations import Location, location
from megatron_telechat.model.shards import LocalParameter
from megatron_telechat.parallel.agreement import from_rank_0, gather_objects, gather_on_rank_0, together
from megatron_telechat.parallel.state import ParallelState


@dataclass
class TrainState:
    """What a checkpoint keeps of a run, and what a load fills.

    Attributes:
        shards: the parameters of this rank and their places in the global tensors.
        optimizer: a megatron-core optimizer, None where there is none (evaluation, conversion).
        step: optimizer steps done.
        consumed_samples: samples consumed by them.
        backend: source of the random-generator states; None leaves them out.
        data_fingerprint: identity of the data, JSON.
        resumed_from: the checkpoint this run began from; --keep-last never removes it.
        extra: anything else of the run, JSON, the same on all ranks (rank 0's is kept).
        branch: the line of saves that this run continues; None: one without a parent.
        averages: of the weights, by kind (`checkpoint.averages`), on the ranges of the optimizer; a load fills those
            that the checkpoint holds.
        require_writable: called before the first byte, by rank 0, and before the commit, perhaps by the process that
            writes for it; raises a UserError where the folder belongs to another job by now.
    """

    shards: Sequence[LocalParameter]
    optimizer: Any
    step: int
    consumed_samples: int
    backend: Any = None
    data_fingerprint: Mapping[str, Any] | None = None
    resumed_from: Location | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    branch: Branch | None = None
    averages: Sequence[OptimizerSlice] = ()
    require_writable: Callable[[], None] = always_writable


@dataclass(frozen=True)
class BegunSave:
    """A save whose folder is there, and what this rank adds to it. ``owned`` is kept by reference."""

    attempt: protocol.Attempt
    owned: Sequence[OwnedTensor]
    generators: tuple[Any, Mapping[str, torch.Tensor]] | None
    scalars: dict[str, Any] | None
    record: CommitRecord
    branch: Branch


def topology(run: RunConfig, parallel: ParallelState) -> dict[str, Any]:
    """The layout, as the manifest keeps it. Equal topologies place every tensor and seed alike."""
    names = ("world_size", "tp_size", "cp_size", "pp_size", "vpp_size", "dp_size", "ep_size", "etp_size")
    layout = run.parallel.pipeline_model_parallel_layout
    return {**{name: getattr(parallel, name) for name in names}, "pipeline_layout": layout}


def save_checkpoint(root: Location, state: TrainState, run: RunConfig, parallel: ParallelState) -> Location:
    """Write and commit ``root/iter_<step>``; a collective over all ranks, which share the store.

    Raises ResourceError (disk) or CheckpointError on every rank when any rank fails; nothing is
    committed then. With overlap_param_gather the parameters must have been gathered before.
    """
    begun = begin_save(root, state, run, parallel)
    try:
        with together(parallel):
            part = write_part(begun, parallel.rank)
        gathered = gather_on_rank_0((part, begun.scalars))
        with together(parallel):
            if parallel.rank == 0:
                begun.branch.saved(look_at(commit_parts(begun.attempt, gathered, begun.record)))
    except BaseException:
        if parallel.rank == 0:
            protocol.abandon(begun.attempt)
        raise
    remember_files(begun.attempt.final, part.files)
    return begun.attempt.final


def begin_save(root: Location, state: TrainState, run: RunConfig, parallel: ParallelState) -> BegunSave:
    """Make the folder of a save and take what a checkpoint holds beside tensors; a collective over all ranks.

    Raises ResourceError on every rank.
    """
    owned = list(owned_tensors(state.shards, saved_optimizer(state, run), state.averages, parallel))
    attempt = _begin_together(location(root), state, owned, parallel)
    branch = state.branch
    if branch is None:
        branch = Branch.opening(attempt.root) if parallel.rank == 0 else Branch()
    generators = None if state.backend is None else rng_tree.flatten(state.backend.rng_state())
    tokenizer = tokenizer_of(run) if parallel.rank == 0 else None
    record = CommitRecord(
        run=run,
        versions=versions(),
        topology=topology(run, parallel),
        step=state.step,
        consumed_samples=state.consumed_samples,
        data_fingerprint=state.data_fingerprint,
        extra={**state.extra, **({TOKENIZER: tokenizer} if tokenizer else {})},
        lineage=branch.next().to_json(),
        resumed_from=state.resumed_from,
        require_writable=state.require_writable,
    )
    return BegunSave(attempt, owned, generators, optimizer_scalars(state, run), record, branch)


def write_part(begun: BegunSave, rank: int, write_file: Callable[..., FileEntry] = write_safetensors) -> Part:
    """Write the files of this rank; see :class:`PartWriter` for ``write_file``. Raises ResourceError."""
    writer = PartWriter(begun.attempt, rank, write_file=write_file)
    for item in begun.owned:
        writer.add(item.key, item.global_shape, item.offset, item.tensor)
    if begun.generators is not None:
        writer.add_rng(rank, *begun.generators)
    return writer.close()


def expected_bytes(state: TrainState, run: RunConfig, parallel: ParallelState) -> int:
    """Bytes of the tensors that this rank will write once the optimizer has taken a step."""
    return bytes_after_a_step(state.shards, saved_optimizer(state, run), state.averages, parallel)


def saved_optimizer(state: TrainState, run: RunConfig) -> Any:
    """The optimizer, where its state is saved."""
    return None if run.checkpoint.no_save_optim else state.optimizer


def _begin_together(
    root: Location, state: TrainState, owned: Sequence[OwnedTensor], parallel: ParallelState
) -> protocol.Attempt:
    needed = sum(gather_objects(sum(item.tensor.nbytes for item in owned)))
    attempt: protocol.Attempt | None = None
    with together(parallel):
        if parallel.rank == 0:
            state.require_writable()
            attempt = protocol.begin(root, state.step)
            try:
                require_free_space(root, needed)
            except BaseException:
                protocol.abandon(attempt)
                raise
    return from_rank_0(attempt)


def optimizer_scalars(state: TrainState, run: RunConfig) -> dict[str, Any] | None:
    """What this rank's optimizer holds beside tensors; JSON, for `merged_scalars`."""
    if saved_optimizer(state, run) is None:
        return None
    return {"steps": sorted(adam_steps(state.optimizer)), "grad_scaler": scaler_state(state.optimizer)}
