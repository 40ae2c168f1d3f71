"""Which box of which tensor a rank holds, who of its holders speaks for it, and whether all boxes tile the model.

All of it is arithmetic on the rows of the table, the layout of the pipeline and a rank's place: no process group, no
model, no torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_telechat.config.layout import PipelineLayout, pipeline_layout
from megatron_telechat.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_telechat.errors import ConfigError, Problem
from megatron_telechat.tensors.boxes import Box, tiling_fault
from megatron_telechat.tensors.table import Table, TensorSpec, layer_of, layer_table, stage_table, tensor_table


class Place(Protocol):
    """Where a rank stands in the domains that cut or copy tensors; `parallel.state.ParallelState` is one."""

    @property
    def tp_rank(self) -> int:
        """Which piece of a dense tensor that is cut along its `tensor_axis`."""
        ...

    @property
    def tp_size(self) -> int:
        """Pieces of such a tensor."""
        ...

    @property
    def cp_rank(self) -> int:
        """Among the ranks that differ in the part of a sequence they read; they hold the same pieces."""
        ...

    @property
    def dp_rank(self) -> int:
        """Among the ranks that differ in the samples they read; they hold the same dense pieces."""
        ...

    @property
    def ep_rank(self) -> int:
        """Which part of the routed experts."""
        ...

    @property
    def ep_size(self) -> int:
        """Parts of the routed experts."""
        ...

    @property
    def etp_rank(self) -> int:
        """Which piece of an expert's tensor that is cut along its `tensor_axis`."""
        ...

    @property
    def etp_size(self) -> int:
        """Pieces of such a tensor."""
        ...

    @property
    def edp_rank(self) -> int:
        """Among the ranks that hold the same pieces of the experts."""
        ...


@dataclass(frozen=True)
class Piece:
    """A box of a tensor. A local parameter holds one, row-major.

    A dense linear_fc1 is [2, ffn, hidden] as a tensor of the model and [2*ffn / tp, hidden] as a parameter, gate rows
    first: the box [2, ffn / tp, hidden] in row-major order.
    """

    spec: TensorSpec
    box: Box

    @property
    def key(self) -> str:
        """Global key of its tensor."""
        return self.spec.key

    @property
    def numel(self) -> int:
        """Elements that the local parameter has."""
        return self.box.numel


@dataclass(frozen=True)
class _FirstReplica:
    """A place among the ranks that hold the first copy of everything."""

    tp_rank: int
    tp_size: int
    ep_rank: int
    ep_size: int
    etp_rank: int
    etp_size: int
    cp_rank: int = 0
    dp_rank: int = 0
    edp_rank: int = 0


def piece_at(spec: TensorSpec, place: Place) -> Piece:
    """The piece of a tensor that a rank at this place holds, if its pipeline stage has the tensor.

    Raises:
        ConfigError: the axis that is cut does not divide by the number of ranks.
    """
    offset, shape = [0] * len(spec.shape), list(spec.shape)

    def cut(axis: int, size: int, rank: int) -> None:
        if shape[axis] % size:
            raise ConfigError(
                f"{spec.key} {spec.shape} cannot be cut into {size} along axis {axis}",
                "parallel",
                f"parallel sizes that divide {shape[axis]}",
            )
        shape[axis] //= size
        offset[axis] = rank * shape[axis]

    if spec.expert:
        cut(0, place.ep_size, place.ep_rank)
    if spec.tensor_axis is not None:
        cut(spec.tensor_axis, *_tensor_domain(spec, place))
    return Piece(spec, Box(tuple(offset), tuple(shape)))


def _tensor_domain(spec: TensorSpec, place: Place) -> tuple[int, int]:
    """Size of the domain that `tensor_axis` is cut over, and the rank in it."""
    return (place.etp_size, place.etp_rank) if spec.expert else (place.tp_size, place.tp_rank)


def number_of_pieces(spec: TensorSpec, parallel: ParallelConfig) -> int:
    """Pieces that a tensor is cut into: over TP; for the experts over EP and over ETP."""
    expert, expert_tensor = parallel.expert_sizes
    tensor = expert_tensor if spec.expert else parallel.tensor_model_parallel_size
    return (expert if spec.expert else 1) * (tensor if spec.tensor_axis is not None else 1)


def is_first_over_tensor(spec: TensorSpec, place: Place) -> bool:
    """Whether no earlier rank of the tensor (or expert-tensor) domain holds the same piece."""
    return spec.tensor_axis is not None or _tensor_domain(spec, place)[1] == 0


def is_writer(spec: TensorSpec, place: Place) -> bool:
    """Whether this rank is the first of all that hold the same piece. The pieces of all writers tile the tensor."""
    first_replica = place.edp_rank == 0 if spec.expert else place.dp_rank == 0 and place.cp_rank == 0
    return first_replica and is_first_over_tensor(spec, place)


def virtual_stage_table(model: ModelConfig, layout: PipelineLayout, pp_rank: int, virtual_stage: int) -> Table:
    """The rows that a virtual stage of a pipeline rank holds."""
    return stage_table(
        model,
        layout.layers_of(pp_rank, virtual_stage),
        has_embedding=layout.has_embedding(pp_rank, virtual_stage),
        has_loss=layout.has_loss(pp_rank, virtual_stage),
    )


def tiling_problems(run: RunConfig) -> list[Problem]:
    """What keeps the writers of all ranks from holding every tensor of the model exactly once; empty if nothing.

    For models that the training builds; where the output layer is tied, two stages hold one matrix on purpose.

    Raises:
        ConfigError: a tensor does not divide by the parallel sizes.
    """
    layout, table = pipeline_layout(run), tensor_table(run.model)
    places = list(_first_replicas(run.parallel))
    boxes: dict[str, list[Box]] = defaultdict(list)
    for pp_rank in range(layout.pipeline_size):
        for virtual_stage in range(layout.num_virtual_stages):
            for spec in virtual_stage_table(run.model, layout, pp_rank, virtual_stage).values():
                boxes[spec.key] += _written(spec, places)
    missing = [key for key in table if key not in boxes]
    problems = _missing_problems(missing, run)
    for key, held in boxes.items():
        fault = tiling_fault(table[key].shape, held) if key in table else "the model has no such tensor"
        if fault:
            problems.append(Problem(f"{key}: {fault}", "pipeline_model_parallel_layout"))
    return problems


def _first_replicas(parallel: ParallelConfig) -> Iterator[_FirstReplica]:
    tp, (ep, etp) = parallel.tensor_model_parallel_size, parallel.expert_sizes
    for tp_rank in range(tp):
        for ep_rank in range(ep):
            for etp_rank in range(etp):
                yield _FirstReplica(tp_rank, tp, ep_rank, ep, etp_rank, etp)


def _written(spec: TensorSpec, places: Iterable[_FirstReplica]) -> Iterator[Box]:
    """The boxes of all writers, each of them once: the other domain's ranks do not tell pieces apart."""
    for place in places:
        other = place.tp_rank if spec.expert else place.ep_rank + place.etp_rank
        if other == 0 and is_writer(spec, place):
            yield piece_at(spec, place).box


def _missing_problems(missing: Sequence[str], run: RunConfig) -> list[Problem]:
    """Whole missing layers as one problem, single tensors one by one."""
    lacking: dict[int | None, set[str]] = defaultdict(set)
    for key in missing:
        lacking[layer_of(key)].add(key)
    whole = [n for n in sorted(n for n in lacking if n is not None) if lacking[n] == set(layer_table(run.model, n))]
    problems = [Problem(f"{key}: on no pipeline stage") for key in missing if layer_of(key) not in whole]
    if whole:
        parallel, total = run.parallel, run.model.num_layers
        stages = parallel.pipeline_model_parallel_size * parallel.num_virtual_stages_per_pipeline_rank
        names = f"layer {whole[0]} is" if len(whole) == 1 else f"layers {', '.join(map(str, whole))} are"
        problems.insert(
            0,
            Problem(
                f"{total} layers on {stages} pipeline stages give only {total - len(whole)}: {names} missing",
                where="pipeline_model_parallel_layout",
                fix="give a layout that holds every layer",
            ),
        )
    return problems
