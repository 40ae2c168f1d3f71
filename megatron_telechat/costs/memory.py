"""Bytes that each pipeline rank holds: parameters, gradients, optimizer state, activations in flight.

Counted is what the training keeps on purpose, and apart from it the buffers of a communication library that are known
(`costs.communicators`). Not counted: the device's context, other buffers, the allocator's fragmentation, work space
inside a kernel. ``docs/costs.md`` has the equations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_telechat.config.layout import PipelineLayout, pipeline_layout
from megatron_telechat.config.recompute import recompute_plan
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.activations import (
    BYTES,
    LayerActivations,
    embedding_bytes,
    layer_activations,
    output_layer_activations,
)
from megatron_telechat.costs.communicators import buffer_bytes
from megatron_telechat.costs.op_order import Op, peak_in_flight
from megatron_telechat.costs.optimizer_state import (
    average_bytes,
    device_bytes,
    host_bytes,
    passage_bytes,
    rest_bytes,
)
from megatron_telechat.costs.parameters import LocalCount, local_count
from megatron_telechat.costs.software import Software
from megatron_telechat.errors import Problem
from megatron_telechat.tensors.frozen import frozen_parameters, trained_part
from megatron_telechat.tensors.pieces import virtual_stage_table
from megatron_telechat.tensors.table import Table, layer_table


@dataclass(frozen=True)
class StageMemory:
    """Bytes one rank of a pipeline stage holds at its worst moment."""

    pipeline_rank: int
    parameters: LocalCount
    """Parameters it holds, counted."""
    parameters_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    """The averages of the weights among them: they lie where the optimizer has its master weights."""
    activations_bytes: float
    """Largest sum, over the op order, of the activations kept and the transient part below."""
    transient_bytes: float
    """Of activations_bytes: the largest working set of a recompute, or of the loss."""
    in_flight: tuple[int, ...]
    """Micro-batches in flight in each virtual stage at that moment."""
    averages_bytes: float = 0.0
    """Of optimizer_bytes and host_bytes: the averages of the weights."""
    buffers_bytes: float = 0.0
    """Taken by the communication library, beside torch's allocator."""
    host_bytes: float = 0.0
    """Optimizer state in the memory of the host."""

    @property
    def total_bytes(self) -> float:
        """Bytes that a rank of the stage allocates, at the worst moment of the op order."""
        return self.parameters_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes

    @property
    def device_bytes(self) -> float:
        """The same with what the communication library takes: what the device must have."""
        return self.total_bytes + self.buffers_bytes


def optimizer_shards(run: RunConfig) -> tuple[int, int]:
    """Ranks that share the optimizer state of a dense parameter, and of an expert's."""
    return run.parallel.gradient_ranks if run.parallel.use_distributed_optimizer else (1, 1)


def averages_bytes(run: RunConfig, trained: LocalCount) -> float:
    """Bytes of the averages of the weights (`AverageConfig`) of a rank that trains these parameters, wherever they
    lie."""
    return average_bytes(run) * sum(optimizer_parameters(run, trained))


def resident_bytes(run: RunConfig, table: Table, software: Software | None = None) -> tuple[float, float, float]:
    """Bytes on the device of parameters, gradients and optimizer state of a rank that holds pieces of these tensors;
    frozen ones have neither gradient nor state. `software`: of the program, unset: our own. What state on its way takes
    (`passage_bytes`) comes once on top."""
    count, trained = local_count(table, run.parallel), local_count(trained_part(run, table), run.parallel)
    size, program = BYTES[run.training.precision], software or Software()
    if program.sharding == "none":
        optimizer = device_bytes(run, sum(optimizer_parameters(run, trained)))
        return size * count.total, program.gradient_bytes * trained.total, optimizer
    dense, routed = run.parallel.gradient_ranks
    shard = count.dense / dense + count.expert / routed
    held = shard if program.sharding == "full" else count.total  # gathered once, and kept for the backward
    own = trained.dense / dense + trained.expert / routed
    return size * held, program.gradient_bytes * own, rest_bytes(run) * own


def optimizer_parameters(run: RunConfig, trained: LocalCount) -> tuple[float, float]:
    """Dense and expert parameters whose optimizer state a rank keeps that trains these."""
    dense_shards, expert_shards = optimizer_shards(run)
    return trained.dense / dense_shards, trained.expert / expert_shards


def whole_layers_bytes(run: RunConfig, layer: LocalCount, software: Software | None = None) -> float:
    """Bytes that sharded parameters (FSDP) take beside their shards: two layers gathered, the one at work and the next,
    and the gradients of one."""
    program = software or Software()
    if program.sharding == "none":
        return 0.0
    gathered = 2 * BYTES[run.training.precision] * (program.sharding == "full")
    return (gathered + program.gradient_bytes) * layer.total


def stage_parameters(run: RunConfig) -> list[LocalCount]:
    """Parameters that a rank of each pipeline stage holds."""
    layout = pipeline_layout(run)
    return [_stage_count(run, layout, rank) for rank in range(layout.pipeline_size)]


def _stage_count(run: RunConfig, layout: PipelineLayout, rank: int) -> LocalCount:
    return _sum(local_count(table, run.parallel) for table in _stage_tables(run, layout, rank))


def _stage_tables(run: RunConfig, layout: PipelineLayout, rank: int) -> list[Table]:
    """Of each virtual stage of a pipeline rank. A tied matrix is in two of them, and is held twice."""
    return [virtual_stage_table(run.model, layout, rank, number) for number in range(layout.num_virtual_stages)]


def _sum(counts: Iterable[LocalCount]) -> LocalCount:
    return sum(counts, LocalCount(0, 0))


def stage_memory(run: RunConfig, imbalance: float = 1.0, software: Software | None = None) -> list[StageMemory]:
    """Memory of one rank of each pipeline stage, at the worst moment of a step; `imbalance`: rows of the busiest rank's
    experts over the mean; `software`: of the program, unset: our own.

    The rules are those of a balance problem (docs/planner.md), so the planner's figures are these: what a layer, the
    embedding or the output layer keeps is held from the start of its forward to the end of the virtual stage's
    backward, and a backward is charged the largest working set of its layers, or of the loss, once.

    Raises:
        ConfigError: the layout or the recompute plan of the run does not fit the model.
    """
    layout, plan = pipeline_layout(run), recompute_plan(run)
    cache: dict[tuple[bool, tuple[str, ...]], LayerActivations] = {}
    layers = []
    for layer, modes in enumerate(plan):
        kind = (run.model.layer_is_moe(layer), modes)
        if kind not in cache:
            cache[kind] = layer_activations(run, layer, modes, imbalance, software)
        layers.append(cache[kind])
    return [_stage(run, layout, rank, layers, software) for rank in range(layout.pipeline_size)]


def _stage(
    run: RunConfig, layout: PipelineLayout, rank: int, layers: list[LayerActivations], software: Software | None
) -> StageMemory:
    kept, transients = [], []
    for virtual_stage in range(layout.num_virtual_stages):
        own = [layers[layer] for layer in layout.layers_of(rank, virtual_stage)]
        fixed = embedding_bytes(run) if layout.has_embedding(rank, virtual_stage) else 0.0
        ends = [output_layer_activations(run)] if layout.has_loss(rank, virtual_stage) else []
        kept.append(fixed + sum(layer.kept for layer in [*own, *ends]))
        kinds = {run.model.layer_is_moe(layer): layer for layer in layout.layers_of(rank, virtual_stage)}
        counts = (local_count(layer_table(run.model, layer), run.parallel) for layer in kinds.values())
        gathered = max((whole_layers_bytes(run, count, software) for count in counts), default=0.0)
        recomputed = max((layer.working_set for layer in own), default=0.0) + gathered
        transients.append(max([recomputed, *(end.working_set for end in ends)]))

    def transient(op: Op) -> float:
        return 0.0 if op.forward else transients[op.virtual_stage]

    num_microbatches = max(run.num_microbatches, 1)
    activations, in_flight = peak_in_flight(
        rank, layout.pipeline_size, layout.num_virtual_stages, num_microbatches, kept, transient,
        run.parallel.microbatch_group,
    )  # fmt: skip
    count = _stage_count(run, layout, rank)
    tables = _stage_tables(run, layout, rank)
    parameters, gradients, optimizer = map(
        sum, zip(*(resident_bytes(run, table, software) for table in tables), strict=True)
    )
    trained = _sum(local_count(trained_part(run, table), run.parallel) for table in tables)
    owned = optimizer_parameters(run, trained)
    held = sum(number * size for number, size in zip(in_flight, kept, strict=True))
    return StageMemory(
        pipeline_rank=rank,
        parameters=count,
        parameters_bytes=parameters,
        gradients_bytes=gradients,
        optimizer_bytes=optimizer + passage_bytes(run, *owned),
        activations_bytes=activations,
        transient_bytes=activations - held,
        in_flight=in_flight,
        averages_bytes=averages_bytes(run, trained),
        buffers_bytes=buffer_bytes(run),
        host_bytes=host_bytes(run, sum(owned)),
    )


def host_bytes_of_node(run: RunConfig) -> float:
    """Optimizer state in the memory of a node's host; of the node whose ranks hold most."""
    return run.parallel.node_size * max(stage.host_bytes for stage in stage_memory(run))


def host_memory_problem(run: RunConfig) -> Problem | None:
    """What is wrong where that is more than the host has, as far as somebody said how much it has."""
    has = run.parallel.host_memory_gib
    if has is None or not run.parallel.optimizer_cpu_offload:
        return None
    needed = host_bytes_of_node(run) / 2**30
    if needed <= has:
        return None
    fraction = run.parallel.optimizer_offload_fraction
    return Problem(
        f"the optimizer state of the {run.parallel.node_size} ranks of a node takes {needed:.1f} GiB of host memory, "
        f"more than host_memory_gib={has:g}",
        "--optimizer-cpu-offload",
        f"--optimizer-offload-fraction {int(90 * fraction * has / needed) / 100:g}, or more data-parallel ranks with "
        "--use-distributed-optimizer, which share the state",
    )


STAGING_SHARE = 0.5
"""Of the free memory of a node, what the copies of its ranks may take where nobody asked for asynchronous saves."""
LEAST_STAGING_BYTES = 64 << 20
"""Where every rank writes less, a save is over sooner than processes and copies are worth."""


def staging_bytes(run: RunConfig) -> float:
    """Host memory that an asynchronous save takes on the busiest rank: a copy of what that rank writes.

    Replicas share the writing: of the ranks that hold the same parameters each writes its part.
    """
    dense_ranks, expert_ranks = run.parallel.gradient_ranks
    size, layout = BYTES[run.training.precision], pipeline_layout(run)
    state = rest_bytes(run) * (not run.checkpoint.no_save_optim) + average_bytes(run)

    def written(tables: list[Table], each: int) -> float:
        count = _sum(local_count(table, run.parallel) for table in tables)
        return each * (count.dense / dense_ranks + count.expert / expert_ranks)

    stages = [_stage_tables(run, layout, rank) for rank in range(layout.pipeline_size)]
    return max(
        written(tables, size) + written([trained_part(run, table) for table in tables], state) for tables in stages
    )


LOCAL_SAVES_ON_DISK = 3
"""Local checkpoints that a node's disk holds at a time: two that are kept, and one that is written."""


def local_disk_bytes(run: RunConfig) -> float:
    """What local checkpoints take of the disk of a node at most, the copies for other nodes included; of a folder in
    memory it is host memory."""
    copies = run.checkpoint.replication_factor if run.checkpoint.replication else 1
    return LOCAL_SAVES_ON_DISK * copies * run.parallel.node_size * staging_bytes(run)


def checkpoint_bytes(run: RunConfig, total_parameters: int) -> float:
    """Size of one checkpoint: weights in the compute type and their averages in fp32; with the optimizer, master
    weights in fp32 and both moments in their types."""
    state = rest_bytes(run) * (not run.checkpoint.no_save_optim) + average_bytes(run)
    return BYTES[run.training.precision] * total_parameters + state * (total_parameters - frozen_parameters(run))
