"""What is printed once at the start: model, layout, memory, files, and what differs from the preset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from megatron_telechat import __version__
from megatron_telechat.backend import Backend
from megatron_telechat.config.averages import average_lines
from megatron_telechat.config.fields import values_of
from megatron_telechat.config.layout import pipeline_layout
from megatron_telechat.config.loss_chunks import loss_lines
from megatron_telechat.config.preference import preference_lines
from megatron_telechat.config.run_stages import Position, RunStage, RunStages
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs import count_parameters
from megatron_telechat.costs.memory import stage_memory
from megatron_telechat.parallel.state import ParallelState
from megatron_telechat.parallel.topology import Topology, expert_groups_text, placement_warnings
from megatron_telechat.planner.layout_text import layout_picture
from megatron_telechat.tensors.frozen import frozen_keys, frozen_parameters
from megatron_telechat.training.console import format_count
from megatron_telechat.training.paths import RunPaths

NOT_SAID = ("preset", "default", "derived", "torchrun", "no torchrun", "plan ")
"""Origins of values that no person gave for this run; --print-config shows those too."""


def banner(
    run: RunConfig,
    state: ParallelState,
    backend: Backend,
    paths: RunPaths,
    datasets,
    origins: Mapping[str, str],
) -> str:
    """The start of a run in a dozen lines."""
    count = count_parameters(run.model)
    active = f" ({format_count(count.active)} active)" if count.active != count.total else ""
    tokens = run.training.global_batch_size * run.training.seq_length
    layout = pipeline_layout(run)
    lines = [
        f"megatron_telechat {__version__}  {run.model.name}: {format_count(count.total)} parameters{active}",
        f"  batch     {run.training.global_batch_size} x {run.training.seq_length} = {format_count(tokens)} tokens a "
        f"step, {run.num_microbatches} micro-batches of {run.training.micro_batch_size}, "
        f"{run.training.precision_text}",
        f"  length    {length_text(run)}",
        *(f"  frozen    {line}" for line in frozen_lines(run)),
        f"  ranks     {state.world_size} on {backend.device_name()}: {parallel_sizes(run)}",
        *(f"  experts   {line}" for line in expert_lines(run)),
        *(f"  loss      {line}" for line in (*preference_lines(run), *loss_lines(run))),
        *(f"  average   {line}" for line in average_lines(run.average)),
        f"  layout    {layout}",
        *(f"            {line}" for line in layout_picture(run).splitlines()),
        *_memory_lines(run, backend),
        *(f"  data      {line}" for line in datasets.summary),
        f"  files     {paths.run_dir}/metrics.jsonl, {paths.save_dir}/iter_*",
    ]
    lines += [f"  given     {line}" for line in given_lines(run, origins)]
    lines += [f"  ! {warning}" for warning in warnings(run, backend)]
    return "\n".join(lines)


def given_lines(run: RunConfig, origins: Mapping[str, str]) -> list[str]:
    """What a person gave for this run; of a file, which may hold every value of a model, what is not the default."""
    values, usual = values_of(run), values_of(RunConfig())
    said = [
        f"{name}={_short(values[name])}"
        for name, origin in origins.items()
        if not origin.startswith(NOT_SAID) and (origin.startswith("flag") or values[name] != usual[name])
    ]
    return [", ".join(said)] if said else []


def length_text(run: RunConfig) -> str:
    """Steps of the run, and where they come from."""
    epochs, steps = run.training.train_epochs, f"{run.training.train_iters:,} steps"
    return steps if epochs is None else f"{steps}: {epochs:g} epoch{'s' * (epochs != 1)}"


def frozen_lines(run: RunConfig) -> list[str]:
    """How much of the model is not trained."""
    frozen, total = frozen_parameters(run), count_parameters(run.model).total
    tensors = len(frozen_keys(run))
    return [f"{format_count(frozen)} of {format_count(total)} parameters, {tensors} tensors"] if frozen else []


def expert_lines(run: RunConfig) -> Iterator[str]:
    """Where the experts are, and in how many pieces their input comes."""
    if not run.model.is_moe:
        return
    topology = Topology.from_config(run.parallel)
    chunks = run.parallel.moe_input_chunks
    pieces = (
        "whole" if chunks == 1 else "in chunks, number measured (auto)" if chunks == "auto" else f"in {chunks} chunks"
    )
    held = (run.model.num_experts or 0) // topology.ep
    yield f"{run.model.num_experts}, top-{run.model.moe_router_topk}: {held} a rank; their input {pieces}"
    if topology.ep * topology.etp > 1:
        folded = run.parallel.fold_tensor_into_experts and topology.tp > 1
        yield ("the tensor domain folded in, " if folded else "") + expert_groups_text(topology)


def warnings(run: RunConfig, backend: Backend) -> list[str]:
    """What makes this run slower than it need be, each with its remedy."""
    topology = Topology.from_config(run.parallel)
    found = placement_warnings(topology, run.model.is_moe, run.parallel.fold_tensor_into_experts)
    warning = backend.overlap_warning() if run.exchanges_overlap else None
    return found if warning is None else [*found, warning]


def parallel_sizes(run: RunConfig) -> str:
    """TP2 x PP2 x DP1, EP2: the sizes larger than one, and always TP, PP and DP."""
    parallel = run.parallel
    text = f"TP{parallel.tensor_model_parallel_size} x PP{parallel.pipeline_model_parallel_size}"
    if parallel.num_virtual_stages_per_pipeline_rank > 1:
        groups = parallel.microbatch_group
        other = f", groups of {groups} micro-batches" * (groups != parallel.pipeline_model_parallel_size)
        text += f" (VP{parallel.num_virtual_stages_per_pipeline_rank}{other})"
    if parallel.context_parallel_size > 1:
        text += f" x CP{parallel.context_parallel_size}"
    text += f" x DP{parallel.data_parallel_size}"
    if run.model.is_moe:
        expert, expert_tensor = parallel.expert_sizes
        text += f", experts EP{expert} x ETP{expert_tensor}"
    return text


def _memory_lines(run: RunConfig, backend: Backend) -> Iterator[str]:
    total = backend.memory().total_bytes
    limit = f" of {total / 2**30:.0f} GiB" if total else ""
    figures = ", ".join(f"{stage.device_bytes / 2**30:.2f}" for stage in stage_memory(run))
    yield f"  memory    estimated GiB a rank of each stage: {figures}{limit}"
    if run.parallel.optimizer_cpu_offload:
        held, free = backend.host_memory.nbytes / 2**30, backend.host_bytes_free() / 2**30
        yield f"            {held:.2f} GiB of optimizer state of this rank on the host, {free:.1f} GiB left there"


def _short(value: object) -> str:
    text = " ".join(value) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def resume_differences(
    run: RunConfig, saved: RunConfig | None, origins: Mapping[str, str], weights_only: bool
) -> list[str]:
    """Values that shape the curve and differ from those of the checkpoint, one line each.

    Args:
        origins: where the values of the run come from; what it derives where the checkpoint says nothing is no change.
        weights_only: the run takes nothing but weights from the checkpoint, so only the model is compared.
    """
    if saved is None:
        return []
    lines = []
    for section in ("model",) if weights_only else ("model", "training", "optimizer", "data", "preference", "average"):
        now, then = getattr(run, section), getattr(saved, section)
        for field in fields(now):
            a, b = getattr(then, field.name), getattr(now, field.name)
            # A run keeps the order of its samples, whatever the flag says now; the lines about the data say which it
            # is.
            if a == b or field.name == "data_order":
                continue
            if a is not None or not origins.get(field.name, "").startswith("derived"):
                lines.append(f"{section}.{field.name}: {a} -> {b}")
    return lines


def stage_line(stages: RunStages, stage: RunStage, changes: Mapping[str, tuple[Any, Any]]) -> str:
    """What a switch changes, in one line."""
    listed = ", ".join(f"{name} {_value(before)} -> {_value(now)}" for name, (before, now) in changes.items())
    return f"stage {stage.number} of {len(stages.stages)} ({stage.start}): {listed or 'nothing changes'}"


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        value = " ".join(map(str, value)) or None
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else _short(value)


def stages_lines(stages: RunStages, position: Position) -> list[str]:
    """The stages that are left of a run that has several, one line each."""
    if not stages.several:
        return []
    lines = []
    for span in stages.spans(position):
        steps = "" if span.end is None else f", steps {span.begin.step + 1} to {span.end.step}"
        changes = stages.changes(span.stage) if span.stage.number > 1 else {}
        lines.append(f"  {stage_line(stages, span.stage, changes) if changes else span.stage.title}{steps}")
    return lines


def stage_event(step: int, stage: RunStage, changes: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """The record for metrics.jsonl of a switch after a step."""
    listed = {name: {"before": before, "now": now} for name, (before, now) in changes.items()}
    return {"event": "stage", "step": step, "stage": stage.number, "changes": listed}
