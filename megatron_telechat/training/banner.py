"""What is printed once at the start: model, layout, memory, files, and what differs from the preset."""

from __future__ import annotations

from dataclasses import fields
from typing import Iterator, Mapping, Optional

from ..backend import Backend
from ..config.layout import pipeline_layout
from ..config.schema import RunConfig
from ..costs import count_parameters
from ..costs.memory import stage_memory
from ..parallel.state import ParallelState
from .console import format_count
from .paths import RunPaths


def banner(
    run: RunConfig,
    state: ParallelState,
    backend: Backend,
    paths: RunPaths,
    datasets,
    origins: Mapping[str, str],
) -> str:
    """The start of a run in a dozen lines."""
    from .. import __version__
    from ..planner.picture import layout_picture

    count = count_parameters(run.model)
    active = f" ({format_count(count.active)} active)" if count.active != count.total else ""
    tokens = run.training.global_batch_size * run.training.seq_length
    layout = pipeline_layout(run)
    lines = [
        f"megatron_telechat {__version__}  {run.model.name}: {format_count(count.total)} parameters{active}",
        f"  batch     {run.training.global_batch_size} x {run.training.seq_length} = {format_count(tokens)} tokens a step, "
        f"{run.num_microbatches} micro-batches of {run.training.micro_batch_size}, {run.training.precision}",
        f"  ranks     {state.world_size} on {backend.device_name()}: {parallel_sizes(run)}",
        f"  layout    {layout}",
        *(f"            {line}" for line in layout_picture(run).splitlines()),
        *_memory_lines(run, backend),
        *(f"  data      {line}" for line in datasets.summary()),
        f"  files     {paths.run_dir}/metrics.jsonl, {paths.save_dir}/iter_*",
    ]
    changed = [f"{key}={_value(run, key)} ({origin})" for key, origin in origins.items() if origin.startswith("flag")]
    if changed:
        lines.append("  flags     " + ", ".join(changed))
    return "\n".join(lines)


def parallel_sizes(run: RunConfig) -> str:
    """TP2 x PP2 x DP1, EP2: the sizes larger than one, and always TP, PP and DP."""
    parallel = run.parallel
    text = f"TP{parallel.tensor_model_parallel_size} x PP{parallel.pipeline_model_parallel_size}"
    if parallel.num_virtual_stages_per_pipeline_rank > 1:
        text += f" (VP{parallel.num_virtual_stages_per_pipeline_rank})"
    if parallel.context_parallel_size > 1:
        text += f" x CP{parallel.context_parallel_size}"
    text += f" x DP{parallel.data_parallel_size}"
    if run.model.is_moe:
        text += f", experts EP{parallel.expert_model_parallel_size} x ETP{parallel.expert_tensor_parallel_size}"
    return text


def _memory_lines(run: RunConfig, backend: Backend) -> Iterator[str]:
    total = backend.memory().total_bytes
    limit = f" of {total / 2**30:.0f} GiB" if total else ""
    figures = ", ".join(f"{stage.total_bytes / 2**30:.2f}" for stage in stage_memory(run))
    yield f"  memory    estimated GiB a rank of each stage: {figures}{limit}"


def _value(run: RunConfig, key: str):
    section, name = key.split(".", 1)
    return getattr(getattr(run, section), name)


def resume_differences(run: RunConfig, saved: Optional[RunConfig]) -> list[str]:
    """Values that shape the curve and differ from those of the checkpoint, one line each."""
    if saved is None:
        return []
    lines = []
    for section in ("model", "training", "optimizer", "data"):
        now, then = getattr(run, section), getattr(saved, section)
        for field in fields(now):
            a, b = getattr(then, field.name), getattr(now, field.name)
            if a != b:
                lines.append(f"{section}.{field.name}: {a} -> {b}")
    return lines
