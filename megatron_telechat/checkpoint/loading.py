"""Filling a model and an optimizer from a checkpoint of any layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from megatron_telechat.checkpoint import rng as rng_tree
from megatron_telechat.checkpoint.averages import average_key, saved_kinds
from megatron_telechat.checkpoint.checksums import default_threads
from megatron_telechat.checkpoint.find import require_fit, saved_config, weight_key
from megatron_telechat.checkpoint.format import CheckpointReader
from megatron_telechat.checkpoint.loss_scale import diverged_scales, load_scaler_state, one_scale, require_one_scale
from megatron_telechat.checkpoint.meaning import require_meaning
from megatron_telechat.checkpoint.opening import open_verified
from megatron_telechat.checkpoint.optimizer_state import (
    MASTER,
    MOMENTS,
    flat_boxes,
    optimizer_slices,
    set_adam_step,
)
from megatron_telechat.checkpoint.train_state import TrainState, topology
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.errors import CheckpointError
from megatron_telechat.locations import Location, location
from megatron_telechat.model.shards import LocalParameter
from megatron_telechat.parallel.agreement import together
from megatron_telechat.parallel.state import ParallelState, seed_generators
from megatron_telechat.tensors.boxes import Box


class WeightSource(Protocol):
    """Where global tensors can be read box by box: a checkpoint, or a Hugging Face folder."""

    def read(self, key: str, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """The box of tensor ``key`` at ``offset``, of this shape, on the CPU, in the dtype of the source."""
        ...


@dataclass(frozen=True)
class LoadedInfo:
    """What was loaded.

    Attributes:
        path: the checkpoint.
        step, consumed_samples: where the run goes on; 0 when only weights were taken.
        config: configuration of the run that saved it, None when this program cannot read it.
        message: one or more lines for the person who started the run.
        adam_step: steps that Adam had counted; None where the checkpoint holds no optimizer state.
        digest: of its manifest, which names the checkpoint as a parent; empty when only weights were taken.
        weights_only: nothing but weights was taken.
    """

    path: Location
    step: int
    consumed_samples: int
    config: RunConfig | None
    message: str
    data_fingerprint: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    adam_step: int | None = None
    digest: str = ""
    weights_only: bool = False


def load_checkpoint(
    root: Location | str | CheckpointReader,
    state: TrainState,
    run: RunConfig,
    parallel: ParallelState,
    *,
    step: int | None = None,
    weights_only: bool = False,
    saved_by: RunConfig | None = None,
) -> LoadedInfo:
    """Fill the parameters, the optimizer and the random generators; a collective over all ranks.

    Before any of them is touched every byte of the checkpoint is checked (`open_verified`).

    Args:
        root: a folder of checkpoints (the newest sound one is taken, or that of ``step``), one checkpoint, or the
            reader of one that was checked already (`local.copies`).
        weights_only: take the weights only, for a run that begins at step 0.
        saved_by: the stage that saved it, where the run goes on in another one.

    Raises CheckpointError on every rank when any rank cannot load.
    """

    def fits(reader: CheckpointReader) -> None:
        require_fit(reader, run.model)
        require_meaning(reader.config, reader.manifest.extra, run, reader.path, saved_by)

    if isinstance(root, CheckpointReader):
        reader, passed_over = root, ()
        with together(parallel):
            fits(reader)
    else:
        reader, passed_over = open_verified(
            location(root), step, fits=fits, wanted=lambda reader: _files_to_read(reader, state, weights_only)
        )
    folder, notes = reader.path, list(passed_over)
    with together(parallel):
        with _filling(reader) as fill:
            _load_parameters(fill, reader, state.shards)
            notes += _load_optimizer(fill, reader, state, run, weights_only)
            if not weights_only:
                _load_averages(fill, reader, state)
        if not weights_only:
            notes += _load_generators(reader, state, run, parallel)
    reader.close()
    manifest = reader.manifest
    config = saved_config(reader)
    if config is None:
        notes.append("its configuration is of another version and was not compared")
    if weights_only:
        head = f"weights of {folder}; step 0, fresh optimizer"
        return LoadedInfo(folder, 0, 0, config, "\n".join([head, *notes]), weights_only=True)
    head = f"resumed from {folder}: step {manifest.step}, {manifest.consumed_samples} samples"
    return LoadedInfo(
        folder,
        manifest.step,
        manifest.consumed_samples,
        config,
        "\n".join([head, *notes]),
        manifest.data_fingerprint,
        manifest.extra,
        manifest.optimizer["step"] if manifest.optimizer else None,
        manifest.digest,
    )


def _files_to_read(reader: CheckpointReader, state: TrainState, weights_only: bool) -> Counter[str]:
    """Bytes that this rank will read of each file."""
    files: Counter[str] = Counter()
    for item in state.shards:
        files += reader.files_of(weight_key(reader, item.piece.key, item.parameter.dtype), item.piece.box)
    for item in optimizer_slices(state.optimizer, state.shards) if state.optimizer is not None else ():
        for part in flat_boxes(item.shard, item.start, item.stop):
            for name in (MASTER,) if weights_only else (MASTER, *MOMENTS):
                files += reader.files_of(f"optimizer/{name}/{item.shard.piece.key}", part.box)
    for item in () if weights_only else state.averages:
        for part in flat_boxes(item.shard, item.start, item.stop):
            for name in item.tensors:
                files += reader.files_of(average_key(name, item.shard.piece.key), part.box)
    return files


_Fill = Callable[[torch.Tensor, str, Box], None]
"""Gives a flat range the values of a box of a tensor, by its key; done when `_filling` is left."""


@contextmanager
def _filling(reader: CheckpointReader) -> Iterator[_Fill]:
    """Fill tensors from several threads: one alone copies at a part of the memory's rate, and waits for one request
    at a time. Raises the first error of a thread."""
    with ThreadPoolExecutor(default_threads()) as pool:
        under_way: list[Future] = []

        def fill(flat: torch.Tensor, key: str, box: Box) -> None:
            under_way.append(pool.submit(_read_into, flat, reader, key, box))

        try:
            yield fill
            for one in under_way:
                one.result()
        finally:
            for one in under_way:
                one.cancel()


def _load_parameters(fill: _Fill, reader: CheckpointReader, shards: Sequence[LocalParameter]) -> None:
    for item in shards:
        dtype = item.parameter.dtype
        flat = item.parameter.detach().view(-1)
        key = weight_key(reader, item.piece.key, dtype)
        for part in flat_boxes(item):
            fill(flat[part.start : part.stop], key, part.box)


def load_weights(source: WeightSource, shards: Sequence[LocalParameter]) -> None:
    """Fill the parameters from any source of global tensors, converting to the parameter's dtype."""
    for item in shards:
        flat = item.parameter.detach().view(-1)
        for part in flat_boxes(item):
            _read_into(flat[part.start : part.stop], source, item.piece.key, part.box)


def _read_into(flat: torch.Tensor, source: WeightSource, key: str, box: Box) -> None:
    flat.view(box.shape).copy_(source.read(key, box.offset, box.shape))


def _load_optimizer(
    fill: _Fill, reader: CheckpointReader, state: TrainState, run: RunConfig, weights_only: bool
) -> list[str]:
    """Master weights always (from the most exact value there is); moments and step on a resume."""
    if state.optimizer is None:
        return []
    saved = reader.manifest.optimizer
    resumed = None if weights_only or run.checkpoint.no_load_optim else saved
    if resumed is not None:
        require_one_scale(resumed, reader.path)
    parted = diverged_scales(saved)
    with_moments = resumed is not None and resumed["step"] > 0
    for item in optimizer_slices(state.optimizer, state.shards, create_state=with_moments):
        for name, tensor in item.tensors.items():
            if name in MOMENTS and not with_moments:
                continue
            key = item.shard.piece.key
            stored = weight_key(reader, key, tensor.dtype) if name == MASTER else f"optimizer/{name}/{key}"
            if stored not in reader.entries:
                raise CheckpointError(
                    f"the optimizer state lacks {stored}: the run that saved it did not train {key}",
                    where=str(reader.path),
                    fix="freeze what that run froze, begin a run with its weights (--finetune --load), or resume with "
                    "--no-load-optim",
                )
            for part in flat_boxes(item.shard, item.start, item.stop):
                fill(tensor[part.start - item.start : part.stop - item.start], stored, part.box)
    if resumed is not None:
        if with_moments:
            set_adam_step(state.optimizer, resumed["step"])
        load_scaler_state(state.optimizer, one_scale(resumed["grad_scaler"]))
    notes = [] if parted is None else [parted.what]
    if weights_only or resumed is not None:
        return notes
    why = "--no-load-optim was given" if saved is not None else "the checkpoint holds none"
    return [*notes, f"the optimizer state is fresh: {why}"]


def _load_averages(fill: _Fill, reader: CheckpointReader, state: TrainState) -> None:
    """The averages that the run keeps and the checkpoint holds."""
    kinds = saved_kinds(reader.manifest.extra)
    for item in state.averages:
        for name in item.tensors.keys() & set(kinds):
            stored = average_key(name, item.shard.piece.key)
            if stored not in reader.entries:
                raise CheckpointError(
                    f"the averages lack {stored}",
                    where=str(reader.path),
                    fix="resume without --ema-decay and --average-window-steps, or use another checkpoint",
                )
            for part in flat_boxes(item.shard, item.start, item.stop):
                fill(item.tensors[name][part.start - item.start : part.stop - item.start], stored, part.box)


def _load_generators(reader: CheckpointReader, state: TrainState, run: RunConfig, parallel: ParallelState) -> list[str]:
    """Restore this rank's random generators; in another layout or on another kind of device seed them by the step, so
    that dropout does not repeat."""
    if state.backend is None:
        return []
    same = dict(reader.manifest.topology) == topology(run, parallel)
    saved = reader.read_rng(parallel.rank) if same else None
    generators = rng_tree.unflatten(*saved) if saved is not None else None
    if generators is not None and state.backend.can_restore(generators):
        state.backend.set_rng_state(generators)
        return []
    seed_generators(run.training.seed + 1_000_003 * reader.manifest.step, parallel, state.backend)
    why = "the checkpoint is of another kind of device"
    if generators is None:
        why = "the checkpoint holds no state of them" if same else "the layout has changed"
    return [f"random generators reseeded: {why}"]
