"""The table of a run's stages: where each begins, what it is, what it costs."""

from __future__ import annotations

from megatron_telechat.cli.text import gib, table
from megatron_telechat.config.rates import curve_of
from megatron_telechat.config.run_stages import Position, RunStage, RunStages, Span
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.memory import stage_memory


def stage_table(stages: RunStages, position: Position) -> list[str]:
    """One row a stage, and below it what each changes.

    Args:
        position: where the run goes on; stages that are over have no steps.
    """
    spans = {span.stage.number: span for span in stages.spans(position)}
    rows = [["stage", "steps", "tokens", "samples", "length", "theta", "batch", "ranks", "lr", "GiB", "plan"]]
    for stage in stages.stages:
        run, span = stage.run, spans.get(stage.number)
        training = run.training
        rows.append(
            [
                f"{stage.number}  {stage.start}", *_counts(span), f"{training.seq_length:,}", _theta(run),
                f"{training.global_batch_size} of {training.micro_batch_size}", _sizes(run),
                _rates(stages, stage, span), gib(max(one.device_bytes for one in stage_memory(run))),
                run.parallel.plan or "-",
            ]
        )  # fmt: skip
    lines = table(rows, left=(0, 5, 7, 8, 10))
    for stage in stages.stages[1:]:
        changed = ", ".join(f"{name} {before} -> {now}" for name, (before, now) in stages.changes(stage).items())
        lines.append(f"{stage.title} changes {changed or 'nothing'}")
    return lines


def _counts(span: Span | None) -> list[str]:
    """Steps, tokens and samples of a stage; all of it may lie behind the run, or beyond its end."""
    if span is None:
        return ["-", "-", "-"]
    if span.end is None:
        return ["to the end", "", ""]
    begin, end = span.begin, span.end
    return [
        f"{begin.step + 1:,}-{end.step:,}", f"{end.tokens - begin.tokens:,}", f"{end.samples - begin.samples:,}",
    ]  # fmt: skip


def _theta(run: RunConfig) -> str:
    """The base of the rotary embedding; where the NTK formula acts at this length, its lengths too."""
    model = run.model
    if model.rotary_training_seqlen is None:
        return f"{model.rotary_base:g}"
    return f"{model.rotary_base:g}, NTK {model.rotary_training_seqlen}/{model.rotary_base_seqlen}"


def _sizes(run: RunConfig) -> str:
    parallel = run.parallel
    sizes = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "CP": parallel.context_parallel_size,
        "DP": parallel.data_parallel_size,
    }
    return " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1 or name == "CP")


def _rates(stages: RunStages, stage: RunStage, span: Span | None) -> str:
    """The learning rate of the first and of the last step."""
    if span is None or span.end is None:
        return "-"
    curve = curve_of(stages, stage, span.begin)
    last = span.end.after(stage.run, -1)
    return f"{curve.rate(span.begin.tokens):.3g} to {curve.rate(last.tokens):.3g}"
