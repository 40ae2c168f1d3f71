"""The report of --dry-run: everything about a run that can be told without its ranks.

Plain text on one or two screens for any number of ranks; torch is never imported.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_telechat.checkpoint.averages import resume_notes
from megatron_telechat.checkpoint.lineage import Saved
from megatron_telechat.checkpoint.meaning import saved_values
from megatron_telechat.checkpoint.reference import REFERENCE, Reference, reference_of
from megatron_telechat.checkpoint.start import Start, position_of, require_start
from megatron_telechat.cli.local_text import local_beginning, local_lines
from megatron_telechat.cli.model_text import model_text
from megatron_telechat.cli.rank_tables import expert_table, group_table, rank_table
from megatron_telechat.cli.stage_table import stage_table
from megatron_telechat.cli.text import context_text, count_text, flop_text, gib, table
from megatron_telechat.config import LoadedConfig
from megatron_telechat.config.averages import average_lines
from megatron_telechat.config.layout import pipeline_layout
from megatron_telechat.config.length import counts_epochs, with_steps
from megatron_telechat.config.loss_chunks import loss_lines
from megatron_telechat.config.plan_file import read_plan
from megatron_telechat.config.preference import preference_lines
from megatron_telechat.config.run_stages import Position, RunStage, RunStages, Span
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs import (
    DeviceSpec,
    count_parameters,
    device_spec,
    device_spec_names,
    training_flops_per_token,
)
from megatron_telechat.costs.communicators import communicators, sending_pairs
from megatron_telechat.costs.imbalance import uneven_rows
from megatron_telechat.costs.memory import (
    LEAST_STAGING_BYTES,
    STAGING_SHARE,
    StageMemory,
    checkpoint_bytes,
    host_bytes_of_node,
    stage_memory,
    staging_bytes,
)
from megatron_telechat.data.blend import DataPlan, data_plan
from megatron_telechat.data.formats import corpus_factory, data_files, require_enough
from megatron_telechat.data.length import known_length
from megatron_telechat.data.order import Progress, SampleOrder, progress_ahead, resumed_order
from megatron_telechat.data.reference_tables import read_table, table_folders
from megatron_telechat.device_kinds import planned_device
from megatron_telechat.errors import DataError
from megatron_telechat.locations import Url
from megatron_telechat.parallel.topology import Topology, placement_warnings
from megatron_telechat.planner.layout_text import layout_picture
from megatron_telechat.planner.predict import predict
from megatron_telechat.tensors.frozen import frozen_keys, frozen_parameters
from megatron_telechat.training.unsaved import unsaved_note

HELD_ERROR = 0.2
"""A device file with a larger error bar has shares that are assumed."""
SHORTEST_STEP_S = 0.02
"""Below this the time estimate says nothing and is left out."""


@dataclass
class _Report:
    """Sections in order, and the warnings gathered while they are written."""

    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def section(self, title: str, body: list[str]) -> None:
        self.lines += ["", title, *(f"  {line}" for line in body)]


def report(loaded: LoadedConfig) -> str:
    """Describe a run that passed every configuration rule.

    Raises:
        ConfigError: the parallel sizes or the data section do not fit.
        DataError: a dataset that is missing or damaged.
        CheckpointError: the checkpoint that the run begins with is not there, or of another model.
    """
    stages, out = loaded.stages, _Report()
    away = {one.missing for one in loaded.missing}
    out.warnings += [f"{one.what}: not here; the run will refuse to start without it" for one in loaded.missing]
    away_start = away & {"load", "pretrained_checkpoint", REFERENCE}
    start, saved = (Start(None), None) if away_start else require_start(stages)
    reference = None if away_start else reference_of(loaded.run, start, saved)
    goes_on = saved is not None and not start.weights_only
    position = position_of(saved) if saved is not None and goes_on else Position()
    if counts_epochs(loaded.run) and (length := known_length(loaded.run)) is not None:
        stages = with_steps(stages, length.steps(loaded.run, position))
        loaded = replace(loaded, run=stages.stages[0].run, stages=stages)
    spans = {span.stage.number: span for span in stages.spans(position)}
    if stages.several:
        out.lines.append(f"{loaded.run.model.name}: a run in {len(stages.stages)} stages")
        out.section("stages of the run", stage_table(stages, position))
    for stage in stages.stages:
        _of_stage(stage, spans.get(stage.number), stages, out)
    out.section("files", _files(loaded.run, out))
    begins = [f"{_names(away_start)}: not here"] if away_start else _beginning(start, saved, loaded.run)
    out.section("begins with", [*begins, *_reference(loaded.run, reference, away, out)])
    ahead = list(progress_ahead(stages, position, _order_so_far(stages, saved if goes_on else None, position)))
    out.section("data", _data_here(loaded.run, ahead, away - away_start, out))
    changed = _said_by_person(loaded)
    if changed:
        out.section("differs from the preset" if loaded.preset else "set", changed)
    if loaded.notes:
        out.section("notes", list(loaded.notes))
    out.section("warnings", [f"! {text}" for text in dict.fromkeys(out.warnings)] or ["none"])
    out.lines += ["", "dry run: nothing was started"]
    return "\n".join(out.lines)


def _of_stage(stage: RunStage, span: Span | None, stages: RunStages, out: _Report) -> None:
    """Everything that the stages of a run need not have in common; of a run that has none, the whole of it."""
    run, topology = stage.run, Topology.from_config(stage.run.parallel)
    earlier = len(out.warnings)
    if stages.several:
        out.lines += ["", f"=== {stage.title} ==="]
    out.lines += _head(run, topology)
    out.section(
        "pipeline layout  (E embedding, t decoder layer, L output layer and loss; stages of a rank side by side)",
        _layout(run),
    )
    out.section("ranks", rank_table(topology, run.model.is_moe))
    out.section("groups", group_table(topology, run.model.is_moe))
    if run.model.is_moe:
        out.section("experts", expert_table(topology, run.model, run.parallel.fold_tensor_into_experts))
    out.section(
        "memory of a rank of each stage, GiB  (estimate; leave 2-4 GiB to the context and fragmentation)",
        _memory(run, out),
    )
    iterations = run.training.train_iters
    if stages.several:
        iterations = span.steps if span is not None else 0
    out.section("steps", _steps(run, iterations, out, "the stage" if stages.several else "the run"))
    out.warnings += placement_warnings(topology, run.model.is_moe, run.parallel.fold_tensor_into_experts)
    if stages.several:
        out.warnings[earlier:] = [f"{stage.title}: {text}" for text in out.warnings[earlier:]]


def _order_so_far(stages: RunStages, saved: Saved | None, position: Position) -> SampleOrder | None:
    """The order in which the run of a checkpoint has read; what it does not say the training will tell."""
    if saved is None:
        return None
    run, length = stages.at(position).run, saved_values(saved.config).get("seq_length")
    then = run if length is None else replace(run, training=replace(run.training, seq_length=length))
    return resumed_order(run, saved.extra, then, str(saved.path))


def _head(run: RunConfig, topology: Topology) -> list[str]:
    parallel = run.parallel
    tokens = run.training.global_batch_size * run.training.seq_length
    sizes = [f"TP {topology.tp}", f"PP {topology.pp}", f"DP {topology.dp}"]
    if parallel.num_virtual_stages_per_pipeline_rank > 1:
        sizes[1] += f" x VP {parallel.num_virtual_stages_per_pipeline_rank}"
        if parallel.microbatch_group != topology.pp:
            sizes[1] += f" in groups of {parallel.microbatch_group} micro-batches"
    if topology.cp > 1:
        sizes.insert(2, f"CP {context_text(parallel)}")
    return [
        f"{run.model.name}: {model_text(run.model)}",
        f"  batch   {run.training.global_batch_size} x {run.training.seq_length} = {count_text(tokens)} tokens a step: "
        f"{run.num_microbatches} micro-batches of {run.training.micro_batch_size} on each of {topology.dp} "
        f"data-parallel ranks",
        f"  ranks   {topology.world_size} on {topology.num_nodes} node{'s' * (topology.num_nodes > 1)} of "
        f"{topology.ranks_per_node}: "
        + " x ".join(sizes)
        + ("  sequence parallel" if parallel.sequence_parallel_size > 1 else ""),
        f"  type    {run.training.precision_text}"
        + ("  distributed optimizer" if parallel.use_distributed_optimizer else ""),
        *(f"  loss    {text}" for text in (*preference_lines(run), *loss_lines(run))),
        *(f"  average {text}" for text in average_lines(run.average)),
        *_frozen(run),
    ]


def _frozen(run: RunConfig) -> list[str]:
    frozen, total = frozen_parameters(run), count_parameters(run.model).total
    tensors = len(frozen_keys(run))
    return [f"  frozen  {count_text(frozen)} of {count_text(total)} parameters, {tensors} tensors"] if frozen else []


def _layout(run: RunConfig) -> list[str]:
    return [*layout_picture(run).splitlines(), f"--pipeline-model-parallel-layout {str(pipeline_layout(run))!r}"]


def _devices(run: RunConfig) -> list[DeviceSpec]:
    """The devices to compare with: those of the kind that training.device names, all for auto, whose memory is known
    and whose shares were held against published runs: of the others --device of the planner tells."""
    specs = [spec for spec in map(device_spec, device_spec_names()) if spec is not None and spec.memory_gib]
    specs = [spec for spec in specs if spec.error <= HELD_ERROR]
    return [spec for spec in specs if run.training.device in ("auto", spec.kind)]


def _memory(run: RunConfig, out: _Report) -> list[str]:
    stages, devices, imbalance = stage_memory(run), _devices(run), uneven_rows(run)
    buffers = max(stage.buffers_bytes for stage in stages) > 0
    rows = [["stage", "parameters", "weights", "gradients", "optimizer", "activations", "in flight"]]
    on_host = any(stage.host_bytes for stage in stages)
    rows[0] += [*["buffers"] * buffers, "total", *["on the host"] * on_host]
    uneven = stage_memory(run, imbalance) if imbalance > 1 else []
    rows[0] += [f"at {imbalance:g}x"] * bool(uneven) + [f"of {spec.name}" for spec in devices]
    for number, stage in enumerate(stages):
        row = [*_memory_row(stage), *[gib(stage.buffers_bytes)] * buffers, gib(stage.device_bytes)]
        row += [gib(stage.host_bytes)] * on_host
        row += [gib(other.device_bytes) for other in uneven[number : number + 1]]
        rows.append(row + [f"{stage.device_bytes / 2**30 / (spec.memory_gib or 1):.0%}" for spec in devices])
    worst = max(stages, key=lambda stage: stage.device_bytes)
    need = worst.device_bytes / 2**30
    too_small = [f"{spec.name} ({spec.memory_gib:g} GiB)" for spec in devices if need > (spec.memory_gib or 0)]
    if too_small:
        out.warnings.append(
            f"stage {worst.pipeline_rank} needs about {need:.1f} GiB a rank: more than {', '.join(too_small)}. "
            "More tensor or pipeline stages, recompute, or --use-distributed-optimizer lower it"
        )
    lines = table(rows)
    if run.average.copies:
        shares = ", ".join(gib(stage.averages_bytes) for stage in stages)
        lines.append(f"optimizer: of it the averages of the weights, by stage: {shares}")
    if buffers:
        lines += _buffers(run)
    if on_host:
        lines.append(_on_the_host(run))
    if uneven:
        lines.append(
            f"at {imbalance:g}x: the total of a rank whose experts get {imbalance:g} times the mean of rows in every "
            "layer, since no token is dropped (--moe-memory-imbalance)"
        )
        _warn_of_uneven(max(uneven, key=lambda stage: stage.device_bytes), need, imbalance, devices, out)
    return lines


def _on_the_host(run: RunConfig) -> str:
    has = run.parallel.host_memory_gib
    limit = f" of {has:g} GiB" if has is not None else ", which is checked when the run starts (--host-memory-gib: now)"
    return f"on the host: optimizer state, {gib(host_bytes_of_node(run))} GiB a node{limit}"


def _buffers(run: RunConfig) -> list[str]:
    """What the column of buffers is made of."""
    opened, pairs, device = communicators(run), sending_pairs(run), planned_device(run.training.device)
    lines = []
    if device.communicator_buffer is not None:
        each = f"{device.communicator_buffer.count} of {device.communicator_buffer.variable}"
        count = f"{len(opened)} communicator{'s' * (len(opened) > 1)}"
        lines.append(f"buffers: {each} for each of {count} ({', '.join(opened)})")
    if device.pair_buffer is not None and pairs:
        each = f"{device.pair_buffer.count} of {device.pair_buffer.variable}"
        lines.append(f"         {each} for each of {pairs} pipeline neighbour{'s' * (pairs > 1)}")
    return lines


def _warn_of_uneven(
    stage: StageMemory, balanced_gib: float, imbalance: float, devices: list[DeviceSpec], out: _Report
) -> None:
    """Devices that the run fits while the routing is even, and no longer when it is not."""
    need = stage.device_bytes / 2**30
    tight = [
        f"{spec.name} ({spec.memory_gib:g} GiB)" for spec in devices if balanced_gib <= (spec.memory_gib or 0) < need
    ]
    if tight:
        out.warnings.append(
            f"stage {stage.pipeline_rank} needs about {need:.1f} GiB on a rank whose experts get {imbalance:g} times "
            f"the mean of rows: more than {', '.join(tight)}, which even routing fits. Recompute of moe, or smaller "
            "micro-batches, lower it"
        )


def _memory_row(stage: StageMemory) -> list[str]:
    parts = (stage.parameters_bytes, stage.gradients_bytes, stage.optimizer_bytes, stage.activations_bytes)
    in_flight = "+".join(str(count) for count in stage.in_flight)
    return [
        str(stage.pipeline_rank), count_text(stage.parameters.total), *(gib(part) for part in parts), in_flight,
    ]  # fmt: skip


def _steps(run: RunConfig, iterations: int | None, out: _Report, name: str) -> list[str]:
    tokens = run.training.global_batch_size * run.training.seq_length
    flops = training_flops_per_token(run.model, run.training.seq_length)
    stages, virtual = run.parallel.pipeline_model_parallel_size, run.parallel.num_virtual_stages_per_pipeline_rank
    bubble = (stages - 1) / (virtual * run.num_microbatches + stages - 1)
    lines = [
        (f"{iterations:,} steps, {count_text(iterations * tokens)} tokens" if iterations else _no_steps(run))
        + f"; {flop_text(flops)} a token, {flop_text(flops * tokens)} a step",
        f"pipeline bubble of an even split: {bubble:.1%} of a step",
    ]
    planned = read_plan(run.parallel.plan).prediction_for(run) if run.parallel.plan is not None else None
    if planned is not None:
        lines.append(
            f"predicted by {run.parallel.plan} on {planned.device}: {planned.iteration_s:.3g} s a step, "
            f"{planned.tokens_per_s_per_device:,.0f} tokens/s a device"
        )
    if run.parallel.optimizer_cpu_offload:
        unknown = [spec.name for spec in _devices(run) if not spec.host_bandwidth_gb_s]
        if unknown:
            lines.append(f"predictions without the way of the optimizer state to the host: {', '.join(unknown)}")
    times: list[tuple[float, str]] = [] if planned is None else [(planned.iteration_s, planned.device)]
    for spec in _devices(run):
        peak = spec.peak(run.training.precision)
        if not peak:
            continue
        prediction = predict(run, spec)
        if prediction.iteration < SHORTEST_STEP_S:
            continue  # a model this small is bound by launches, not by arithmetic
        mfu = flops * tokens / (peak * 1e12 * prediction.iteration * run.parallel.world_size)
        whole = f", {name} {_duration(prediction.iteration * iterations)}" if iterations else ""
        times.append((prediction.iteration, spec.name))
        lines.append(
            f"predicted on {spec.name}: {prediction.iteration:.3g} s a step (± {prediction.error:.0%}), "
            f"{prediction.tokens_per_s_per_device:,.0f} tokens/s a device, MFU {mfu:.0%}, "
            f"bubble {prediction.bubble:.0%}{whole}"
        )
    if times:
        fastest, name = min(times)
        note = unsaved_note(run, 0, fastest, f"as predicted for {name}")
        out.warnings += [note] if note is not None else []
    return lines


def _no_steps(run: RunConfig) -> str:
    epochs = run.training.train_epochs
    if epochs is None:
        return "train_iters is not set"
    return f"{epochs:g} epochs: their steps are known once the data is indexed (tools/build_index.py, or the run)"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _files(run: RunConfig, out: _Report) -> list[str]:
    run_dir, save = run.run_dir, run.save_dir
    size = checkpoint_bytes(run, count_parameters(run.model).total)
    free = None if isinstance(save, Url) else shutil.disk_usage(_existing_parent(save)).free
    kept = run.checkpoint.keep_last
    if not kept and run.checkpoint.save_interval and run.training.train_iters:
        kept = -(-run.training.train_iters // run.checkpoint.save_interval)
    # One more than is kept: the new checkpoint is complete before an old one goes.
    needed = size * (kept + 1 if run.checkpoint.keep_last else max(kept, 1))
    if free is not None and needed > free:
        out.warnings.append(
            f"the checkpoints of this run take {gib(needed)} GiB, {save} has {gib(free)} GiB free here: "
            "--keep-last N keeps the newest N, --save names another folder"
        )
    every = (
        f"every {run.checkpoint.save_interval} steps"
        if run.checkpoint.save_interval
        else "at the end or on a stop signal"
    )
    return [
        f"{run_dir}/  config.yaml, metrics.jsonl",
        f"{save}/  a checkpoint of {gib(size)} GiB {every}"
        + (f", the newest {run.checkpoint.keep_last} kept" if run.checkpoint.keep_last else ""),
        *([f"free there: {gib(free)} GiB"] if free is not None else []),
        _save_mode(run),
        *local_lines(run),
    ]


def _save_mode(run: RunConfig) -> str:
    """Whether saves go on beside the steps, as far as it can be told without the ranks."""
    mode, rank = run.checkpoint.checkpoint_mode, staging_bytes(run)
    if mode == "sync" or (mode == "auto" and (not run.checkpoint.save_interval or rank < LEAST_STAGING_BYTES)):
        return "training waits while a checkpoint is written"
    node = rank * Topology.from_config(run.parallel).ranks_per_node
    limit = f", if that is at most {STAGING_SHARE:.0%} of its free memory" if mode == "auto" else ""
    return (
        f"saved beside the training, from copies in host memory: about {gib(rank)} GiB a rank, {gib(node)} GiB a "
        f"node{limit}; no device memory"
    )


def _beginning(start: Start, saved: Saved | None, run: RunConfig) -> list[str]:
    """Where the weights come from; the model in that checkpoint was held against the run's."""
    local = local_beginning(run, start, saved)
    if saved is None:
        return ["initial weights", *local]
    if start.weights_only:
        return [f"the weights of {saved.path}, at step 0 with a fresh optimizer", *start.notes, *local]
    notes = resume_notes(run.average, saved.extra, saved.step)
    return [f"{saved.path}: step {saved.step}", *start.notes, *notes, *local]


def _reference(run: RunConfig, reference: Reference | None, away: set[str], out: _Report) -> list[str]:
    """What answers are held against, and whether it has been asked already."""
    if reference is None:
        return []
    line = f"reference: {reference.path}, step {reference.step}; its log-probabilities "
    named = run.data.data_path or run.data.data_json or run.data.train_data_path
    there = named and run.data.tokenizer_model is not None and not away
    if there:
        tables = table_folders(run, data_plan(run.data), reference.digest).values()
        if all(read_table(folder) is not None for folder in tables):
            return [f"{line}are in {run.cache_dir}"]
    if not reference.is_there:
        out.warnings.append(
            f"the reference {reference.path} is gone, and its log-probabilities are not in {run.cache_dir}: the run "
            "will refuse to start"
        )
    share = "a quarter" if run.training.recompute_granularity == "full" else "a third"
    return [f"{line}are computed before the first step: a forward over every pair, about {share} of an epoch's time"]


def _names(fields: set[str]) -> str:
    return ", ".join(sorted(fields))


def _data_here(run: RunConfig, ahead: Sequence[tuple[Span, Progress]], away: set[str], out: _Report) -> list[str]:
    """The data, as far as it is on this machine.

    Raises:
        DataError: a dataset that is damaged.
    """
    if away:
        return [f"{_names(away)}: not here, and not looked at"]
    try:
        return _data(run, ahead, out)
    except DataError as error:
        if not all(problem.missing for problem in error.problems):
            raise
        out.warnings += [f"{one.what}: not here; the run will refuse to start without it" for one in error.problems]
        return ["not here, and not looked at"]


def _data(run: RunConfig, ahead: Sequence[tuple[Span, Progress]], out: _Report) -> list[str]:
    data = run.data
    if data.mock_data:
        return ["mock data: a fixed pseudo-random token stream"]
    if not (data.data_path or data.data_json or data.train_data_path):
        out.warnings.append("no training data is named: --data-path PREFIX ... (or --mock-data)")
        return ["none named"]
    plan = data_plan(data)
    factory = corpus_factory(plan.format)
    dataset, documents = factory.columns
    rows = [[dataset, "weight", "tokens", documents]]
    weights = _weights(plan)
    files = data_files(plan)
    for file in files:
        counts = ["-" if number is None else count_text(number) for number in (file.tokens, file.documents)]
        rows.append([file.prefix, weights[file.prefix], *counts])
    total = sum(file.tokens or 0 for file in files)
    lines = table(rows)
    end = ahead[-1][0].end
    wanted = end.tokens if end is not None else 0
    if total and wanted:
        lines.append(f"{count_text(total)} tokens for {count_text(wanted)} of the run: {wanted / total:.2f} epochs")
    require_enough(plan, files, [(span.stage.run, progress) for span, progress in ahead])
    return [*lines, *factory.notes(run)]


def _weights(plan: DataPlan) -> dict[str, str]:
    """The weight of each dataset where it is named first; - where it has none."""
    found: dict[str, str] = {}
    for blend in plan.blends:
        for place, prefix in enumerate(blend.prefixes if blend else ()):
            found.setdefault(prefix, f"{blend.weights[place]:g}" if blend and blend.weights else "-")
    return found


def _said_by_person(loaded: LoadedConfig) -> list[str]:
    """Values that come from a flag or from a YAML file, with their origin."""
    sections = vars(loaded.run).values()
    values = {name: value for section in sections for name, value in vars(section).items()}
    quiet = ("default", "derived", "preset ", "torchrun", "no torchrun", "plan ")
    return [
        f"{name} = {values[name]}  ({origin})"
        for name, origin in loaded.origins.items()
        if name in values and not origin.startswith(quiet)
    ]
