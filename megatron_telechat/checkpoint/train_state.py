"""Saving and loading the state of a training run, in any layout.

Every rank writes the boxes of global tensors it owns and reads those it needs; who owned
what when the checkpoint was written plays no part in reading it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_telechat.checkpoint import commit as protocol
from megatron_telechat.checkpoint import rng as rng_tree
from megatron_telechat.checkpoint.companions import carry_companions
from megatron_telechat.checkpoint.files import require_free_space
from megatron_telechat.checkpoint.format import Part, PartWriter, merge_parts, versions
from megatron_telechat.checkpoint.lineage import Branch, look_at
from megatron_telechat.checkpoint.loss_scale import scaler_state
from megatron_telechat.checkpoint.manifest import COMPANIONS, Manifest
from megatron_telechat.checkpoint.meaning import TOKENIZER, tokenizer_of
from megatron_telechat.checkpoint.names import committed_folders
from megatron_telechat.checkpoint.optimizer_state import adam_steps, flat_boxes, optimizer_slices
from megatron_telechat.checkpoint.retention import prune
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.config.yaml_io import dump_run_config
from megatron_telechat.errors import CheckpointError
from megatron_telechat.model.shards import LocalParameter
from megatron_telechat.parallel.agreement import from_rank_0, gather_objects, together
from megatron_telechat.parallel.state import ParallelState
from megatron_telechat.tensors.pieces import is_first_over_tensor


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
        require_writable: called on rank 0 before the first byte and before the commit; raises a UserError where the
            folder belongs to another job by now.
    """

    shards: Sequence[LocalParameter]
    optimizer: Any
    step: int
    consumed_samples: int
    backend: Any = None
    data_fingerprint: Mapping[str, Any] | None = None
    resumed_from: Path | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    branch: Branch | None = None
    require_writable: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class _OwnedTensor:
    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: torch.Tensor


_Written = tuple[Part, dict[str, Any] | None]
"""What one rank has written, and the scalars of its optimizer."""


def topology(run: RunConfig, parallel: ParallelState) -> dict[str, Any]:
    """The layout, as the manifest keeps it. Equal topologies place every tensor and seed alike."""
    names = ("world_size", "tp_size", "cp_size", "pp_size", "vpp_size", "dp_size", "ep_size", "etp_size")
    layout = run.parallel.pipeline_model_parallel_layout
    return {**{name: getattr(parallel, name) for name in names}, "pipeline_layout": layout}


def save_checkpoint(root: Path, state: TrainState, run: RunConfig, parallel: ParallelState) -> Path:
    """Write and commit ``root/iter_<step>``; a collective over all ranks on a shared file system.

    Raises ResourceError (disk) or CheckpointError on every rank when any rank fails; nothing is
    committed then. With overlap_param_gather the parameters must have been gathered before.
    """
    owned = list(_owned_tensors(state, run, parallel))
    attempt = _begin_together(Path(root), state, owned, parallel)
    try:
        with together(parallel):
            part = _write_part(attempt, owned, state, parallel)
        gathered = _gathered_on_rank_0((part, _optimizer_scalars(state, run)), parallel)
        with together(parallel):
            if parallel.rank == 0:
                _commit(attempt, gathered, state, run, parallel)
    except BaseException:
        if parallel.rank == 0:
            protocol.abandon(attempt)
        raise
    return attempt.final


def _gathered_on_rank_0(mine: _Written, parallel: ParallelState) -> list[_Written]:
    """What every rank gives, on rank 0; nothing on the others. Collective."""
    if parallel.world_size == 1:
        return [mine]
    gathered: list[Any] = [None] * parallel.world_size if parallel.rank == 0 else []
    dist.gather_object(mine, gathered if parallel.rank == 0 else None, dst=0)
    return gathered


def _owned_tensors(state: TrainState, run: RunConfig, parallel: ParallelState) -> Iterator[_OwnedTensor]:
    """The boxes that this rank, and no other, writes."""
    for shard in state.shards:
        if shard.writer:
            yield from _boxes_of("model", shard, 0, shard.parameter.detach().view(-1))
    if state.optimizer is None or run.checkpoint.no_save_optim:
        return
    for item in optimizer_slices(state.optimizer, state.shards):
        # The slices of one parameter differ over the data-parallel ranks. Only a tensor that every rank of the tensor
        # (or expert-tensor) domain holds whole has replicas left.
        if is_first_over_tensor(item.shard.piece.spec, parallel) if item.sharded else item.shard.writer:
            for name, tensor in item.tensors.items():
                yield from _boxes_of(f"optimizer/{name}", item.shard, item.start, tensor)


def _boxes_of(prefix: str, shard: LocalParameter, start: int, flat: torch.Tensor) -> Iterator[_OwnedTensor]:
    spec = shard.piece.spec
    for part in flat_boxes(shard, start, start + flat.numel()):
        values = flat[part.start - start : part.stop - start].view(part.box.shape)
        yield _OwnedTensor(f"{prefix}/{spec.key}", spec.shape, part.box.offset, values)


def _begin_together(
    root: Path, state: TrainState, owned: Sequence[_OwnedTensor], parallel: ParallelState
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


def _write_part(
    attempt: protocol.Attempt, owned: Sequence[_OwnedTensor], state: TrainState, parallel: ParallelState
) -> Part:
    writer = PartWriter(attempt.temporary, parallel.rank)
    for item in owned:
        writer.add(item.key, item.global_shape, item.offset, item.tensor)
    if state.backend is not None:
        tree, tensors = rng_tree.flatten(state.backend.rng_state())
        writer.add_rng(parallel.rank, tree, tensors)
    return writer.close()


def _optimizer_scalars(state: TrainState, run: RunConfig) -> dict[str, Any] | None:
    if state.optimizer is None or run.checkpoint.no_save_optim:
        return None
    return {"steps": sorted(adam_steps(state.optimizer)), "grad_scaler": scaler_state(state.optimizer)}


def _merged_scalars(found: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    saved = [item for item in found if item is not None]
    if not saved:
        return None
    steps = sorted({step for item in saved for step in item["steps"]})
    if len(steps) > 1:
        raise CheckpointError(
            f"parameters have taken different numbers of optimizer steps: {steps}",
            fix="nothing was saved; this is a bug, please report it",
        )
    scaler = saved[0]["grad_scaler"]
    if any(item["grad_scaler"] != scaler for item in saved):
        raise CheckpointError(
            "the ranks have different loss scales", fix="nothing was saved; this is a bug, please report it"
        )
    return {"step": steps[0] if steps else 0, "grad_scaler": scaler}


def _commit(
    attempt: protocol.Attempt, gathered: Sequence[_Written], state: TrainState, run: RunConfig, parallel: ParallelState
) -> None:
    part = merge_parts(item for item, _ in gathered)
    branch, tokenizer = state.branch or Branch.opening(attempt.root), tokenizer_of(run)
    companions = carry_companions(_companion_source(attempt.root, run), attempt.temporary / COMPANIONS)
    manifest = Manifest(
        step=state.step,
        consumed_samples=state.consumed_samples,
        config=dump_run_config(run),
        topology=topology(run, parallel),
        versions=versions(),
        files={**part.files, **companions},
        tensors=part.tensors,
        optimizer=_merged_scalars([scalars for _, scalars in gathered]),
        rng=tuple(item.rng for item, _ in gathered if item.rng),
        data_fingerprint=state.data_fingerprint,
        extra={**state.extra, **({TOKENIZER: tokenizer} if tokenizer else {})},
        lineage=branch.next().to_json(),
    )
    state.require_writable()
    branch.saved(look_at(protocol.commit(attempt, manifest)))
    prune(attempt.root, run.checkpoint.keep_last, state.resumed_from)


def _companion_source(root: Path, run: RunConfig) -> Path | None:
    """Where the Hugging Face files of this model's origin lie: a newer checkpoint of the run, or its first weights."""
    folders = [path for _, path in reversed(committed_folders(root))]
    first = run.checkpoint.pretrained_checkpoint
    if first:
        folders += [Path(first), *(path for _, path in reversed(committed_folders(Path(first))))]
    return next((path / COMPANIONS for path in folders if (path / COMPANIONS).is_dir()), None)
