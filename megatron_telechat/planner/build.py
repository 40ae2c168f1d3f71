"""From a run and a device to a balance problem, and from an answer back to what the training takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from megatron_telechat.config.layout import PipelineLayout, pipeline_layout
from megatron_telechat.config.recompute import MODULES, Modes, recompute_plan
from megatron_telechat.config.schema import ParallelConfig, RunConfig
from megatron_telechat.costs.activations import embedding_bytes, layer_activations, output_layer_activations
from megatron_telechat.costs.communicators import buffer_bytes
from megatron_telechat.costs.devices import DeviceSpec
from megatron_telechat.costs.memory import resident_bytes, whole_layers_bytes
from megatron_telechat.costs.optimizer_state import passage_bytes
from megatron_telechat.costs.parameters import local_count
from megatron_telechat.costs.time import Software, TimeModel, mode_name
from megatron_telechat.errors import ConfigError
from megatron_telechat.planner.assignment import Assignment
from megatron_telechat.planner.problem import BalanceProblem, Block, LayerGroup, Mode
from megatron_telechat.tensors.table import Table, layer_table, stage_table

RESERVE_GIB = 3.0
"""Memory left to the device's context, to buffers that `costs.communicators` does not know, and to fragmentation."""
UNLIMITED_BYTES = float(2**60)
"""Stands for the memory of a device whose file names none."""
DEFAULT_KINDS = ("full",)


def parse_kind(text: str) -> Modes:
    """A recompute kind such as full, core_attn or core_attn+mlp; mlp and moe both mean a layer's own block.

    Raises:
        ConfigError: an unknown module.
    """
    names = tuple(filter(None, text.replace(" ", "").split("+")))
    if names in ((), ("none",)):
        return ()
    unknown = [name for name in names if name not in MODULES]
    if unknown and names != ("full",):
        fix = f"none, full, or modules joined by +: {', '.join(MODULES)}"
        raise ConfigError(f"unknown recompute kind {text!r}", "recompute kinds", fix)
    return names


def of_layer(modes: Modes, is_moe: bool) -> Modes:
    """A kind on a layer of this type: mlp and moe become the block it has; the order is that of MODULES."""
    if modes == ("full",):
        return modes
    block = {"mlp", "moe"} & set(modes)
    own = (set(modes) - block) | ({"moe" if is_moe else "mlp"} if block else set())
    return tuple(module for module in MODULES if module in own)


def balance_problem(
    run: RunConfig,
    device: DeviceSpec,
    kinds: Sequence[str] = DEFAULT_KINDS,
    *,
    mem_limit_bytes: float | None = None,
    reserve_bytes: float | None = None,
    software: Software | None = None,
    mtp: Block | None = None,
) -> BalanceProblem:
    """The balance problem of a run on a device: seconds, and bytes of one rank.

    Layout and recompute of the run itself are not read.

    Args:
        kinds: recompute kinds a layer may have, next to none: see `parse_kind`.
        mem_limit_bytes: memory of one device; unset: that of the device file, unlimited where it names none.
        reserve_bytes: of it, never planned with; unset: RESERVE_GIB and the buffers of the communicators, nothing where
            the memory is unlimited.
        mtp: a multi-token-prediction block beside the model's own layers.

    Raises:
        ConfigError: unknown kind; no times for this device at these shapes.
    """
    times = TimeModel(run, device, software)
    limit = mem_limit_bytes if mem_limit_bytes is not None else device.memory_gib and device.memory_gib * 2**30
    if reserve_bytes is None:
        reserve_bytes = RESERVE_GIB * 2**30 + buffer_bytes(run) if limit else 0.0
    wanted = [parse_kind(kind) for kind in kinds]
    layers = range(run.model.num_layers)
    groups = []
    for is_moe, members in groupby(layers, run.model.layer_is_moe):
        numbers = list(members)
        own = dict.fromkeys([(), *(of_layer(modes, is_moe) for modes in wanted)])
        groups.append(_group(run, times, numbers[0], len(numbers), tuple(own), software))
    embedding, output = times.embedding(), times.output_layer()
    ends = [stage_table(run.model, (), has_embedding=first, has_loss=not first) for first in (True, False)]
    parallel = run.parallel
    if parallel.pipeline_model_parallel_size == 1:  # a tied matrix lies on the one stage once
        ends[1] = {key: spec for key, spec in ends[1].items() if key not in ends[0]}
    loss = output_layer_activations(run)
    embed_bytes, head_bytes = (_weights(run, table, software) for table in ends)
    return BalanceProblem(
        P=parallel.pipeline_model_parallel_size,
        V=parallel.num_virtual_stages_per_pipeline_rank,
        m=max(run.num_microbatches, 1),
        group_size=group_size(parallel),
        mem_limit=limit or UNLIMITED_BYTES,
        const_mem=reserve_bytes + passage_bytes(run, *[UNLIMITED_BYTES] * (2 if run.model.is_moe else 1)),
        p2p=times.p2p(),
        groups=tuple(groups),
        embed=Block(embedding.forward, embedding.backward, embed_bytes, embedding_bytes(run)),
        head=Block(output.forward, output.backward, head_bytes, loss.kept, loss.working_set),
        mtp=mtp,
    )


def group_size(parallel: ParallelConfig) -> int | None:
    """`BalanceProblem.group_size` of these parallel sizes: unset where it changes nothing."""
    interleaved = parallel.num_virtual_stages_per_pipeline_rank > 1
    group = parallel.microbatch_group
    return group if interleaved and group != parallel.pipeline_model_parallel_size else None


def _weights(run: RunConfig, table: Table, software: Software | None) -> float:
    return sum(resident_bytes(run, table, software))


def _group(
    run: RunConfig, times: TimeModel, layer: int, count: int, kinds: tuple[Modes, ...], software: Software | None
) -> LayerGroup:
    plain, table = times.layer(layer, ()), layer_table(run.model, layer)
    gathered = whole_layers_bytes(run, local_count(table, run.parallel), software)
    modes = []
    for kind in kinds:
        memory = layer_activations(run, layer, kind, times.software.moe_imbalance, software)
        modes.append(Mode(mode_name(kind), times.layer(layer, kind).extra, memory.kept, memory.working_set + gathered))
    return LayerGroup(count, plain.forward, plain.backward, _weights(run, table, software), tuple(modes))


def mtp_block(run: RunConfig, device: DeviceSpec, layer: int = -1, software: Software | None = None) -> Block:
    """A multi-token-prediction block as DeepSeek-V3 has it (arXiv 2412.19437, section 2.2), for a model that has one:
    one more decoder layer like `layer`, a projection of 2h to h, and the shared output layer once more (its weights
    are not counted again)."""
    layer %= run.model.num_layers
    times = TimeModel(run, device, software)
    decoder, output = times.layer(layer, ()), times.output_layer()
    hidden, tensor = run.model.hidden_size, run.parallel.tensor_model_parallel_size
    table = layer_table(run.model, layer)
    own = _weights(run, table, software)
    per_parameter = own / local_count(table, run.parallel).total
    loss = output_layer_activations(run)
    # its loss and the model's own are held at the same time: no working set beside that of the head
    kept = layer_activations(run, layer, (), software=software).kept + loss.kept + loss.working_set
    weights = own + per_parameter * 2 * hidden * hidden / tensor
    return Block(decoder.forward + output.forward, decoder.backward + output.backward, weights, kept)


# ---- and back -------------------------------------------------------------------------------


def assignment_of(run: RunConfig, problem: BalanceProblem) -> Assignment:
    """Layout and recompute plan of the run as an assignment of its problem.

    Raises:
        ConfigError: the run recomputes a kind that the problem does not offer.
    """
    layout, plan = pipeline_layout(run), recompute_plan(run)
    names = [[mode.name for mode in group.modes] for group in problem.groups for _ in range(group.count)]
    indices = []
    for layer, modes in enumerate(plan):
        name = mode_name(of_layer(modes, run.model.layer_is_moe(layer)))
        if name not in names[layer]:
            raise ConfigError(f"layer {layer} recomputes {name}", "recompute", f"one of {', '.join(names[layer])}")
        indices.append(names[layer].index(name))
    stages = (layout.layers_of(c % layout.pipeline_size, c // layout.pipeline_size) for c in range(len(layout.stages)))
    return Assignment(tuple(tuple(indices[layer] for layer in stage) for stage in stages))


def kinds_of(run: RunConfig) -> tuple[str, ...]:
    """The recompute kinds that a run uses."""
    return tuple(dict.fromkeys(mode_name(modes) for modes in recompute_plan(run) if modes))


@dataclass(frozen=True)
class PlannedRun:
    """An assignment in the words of the training.

    Attributes:
        layout: layers of every virtual stage.
        recompute: modes of every layer.
        run: the run with both in place.
    """

    layout: PipelineLayout
    recompute: tuple[Modes, ...]
    run: RunConfig

    @property
    def recompute_layout(self) -> str:
        """Such as full*2,none*3|none*4: what --recompute-layout takes."""
        layers = iter(self.recompute)
        stages = []
        for count in self.layout.counts:
            names = [mode_name(next(layers)) for _ in range(count)]
            stages.append(",".join(_times(name, len(list(same))) for name, same in groupby(names)))
        return "|".join(stages)

    @property
    def flags(self) -> tuple[str, ...]:
        """Flags of our training that ask for this plan, whatever a preset says."""
        layout = ("--pipeline-model-parallel-layout", str(self.layout), *self._group_flags)
        if any(self.recompute):
            return (*layout, "--recompute-layout", self.recompute_layout)
        return (*layout, "--recompute-granularity", "none")

    def megatron_flags(self) -> tuple[str, ...]:
        """Flags of Megatron-LM that ask for this plan.

        Raises:
            ConfigError: Megatron-LM has no words for recompute that differs so between layers.
        """
        layout = ("--pipeline-model-parallel-layout", str(self.layout), *self._group_flags)
        kinds = set(self.recompute)
        if kinds <= {()}:
            return layout
        if len(kinds) == 1 and ("full",) not in kinds:
            return (*layout, "--recompute-granularity", "selective", "--recompute-modules", *next(iter(kinds)))
        number = self._block_layers()
        if kinds <= {(), ("full",)} and number is not None:
            flags = ("--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers")
            return (*layout, *flags, str(number))
        raise ConfigError(
            "Megatron-LM's flags recompute the first N layers of every virtual stage, or the same modules everywhere; "
            f"this plan is {self.recompute_layout}",
            "plain flags",
            "ask for the best plan within plain flags",
        )

    @property
    def _group_flags(self) -> tuple[str, ...]:
        """What asks for the groups of micro-batches, here and in Megatron-LM."""
        group = group_size(self.run.parallel)
        return () if group is None else ("--microbatch-group-size-per-virtual-pipeline-stage", str(group))

    def _block_layers(self) -> int | None:
        """N, if full recompute takes the first N layers of every virtual stage (all of a shorter one)."""
        layers = iter(self.recompute)
        stages = [[next(layers) == ("full",) for _ in range(count)] for count in self.layout.counts]
        number = max(sum(stage) for stage in stages)
        fits = all(stage == [True] * min(number, len(stage)) + [False] * (len(stage) - number) for stage in stages)
        return number if fits else None


def _times(name: str, count: int) -> str:
    return name if count == 1 else f"{name}*{count}"


def planned_run(run: RunConfig, problem: BalanceProblem, assignment: Assignment) -> PlannedRun:
    """The run as an assignment of its problem wants it.

    Raises:
        ConfigError: the assignment puts nothing on a virtual stage, which would deadlock.
    """
    layout = PipelineLayout.from_counts(assignment.counts, problem.P)
    wrong = layout.problems(run.model.num_layers, problem.V)
    if wrong:
        raise ConfigError(wrong[0], "plan", "a plan for this model and pipeline")
    groups = [group for group in problem.groups for _ in range(group.count)]
    indices = [mode for stage in assignment.modes for mode in stage]
    plan = tuple(parse_kind(group.modes[index].name) for group, index in zip(groups, indices, strict=True))
    planned = PlannedRun(layout, plan, run)
    training = replace(
        run.training,
        recompute_granularity=None,
        recompute_layout=planned.recompute_layout if any(plan) else None,
    )
    parallel = replace(run.parallel, pipeline_model_parallel_layout=str(layout) if problem.P > 1 else None)
    return replace(planned, run=replace(run, training=training, parallel=parallel))
