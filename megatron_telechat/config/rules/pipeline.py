"""Rules of the pipeline: stages, chunks, layouts."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_telechat.config.layout import PipelineLayout, default_layout
from megatron_telechat.config.origins import Check, Rule, flag
from megatron_telechat.errors import ConfigError, Problem

PP = "pipeline_model_parallel_size"
CHUNKS = "num_virtual_stages_per_pipeline_rank"
LAYOUT = "pipeline_model_parallel_layout"


def chunks_need_a_pipeline(check: Check) -> Iterator[Problem]:
    """Several virtual stages a rank need more than one pipeline rank."""
    stages, chunks = check.take(PP, CHUNKS)
    if stages == 1 and chunks > 1:
        yield check.problem(
            f"{CHUNKS}={chunks} interleaves virtual stages, but {PP}=1",
            CHUNKS,
            PP,
            fix=f"{flag(PP, 2)} or more, or {flag(CHUNKS, 1)}",
        )
        check.bad.add(CHUNKS)


def layers_split(check: Check) -> Iterator[Problem]:
    """30 layers on 4 stages built 28 elsewhere, without a word."""
    layers, stages, chunks, layout = check.take("num_layers", PP, CHUNKS, LAYOUT)
    if layout is not None or layers % (stages * chunks) == 0:
        return
    named = f"{PP}={stages}" + (f" x {CHUNKS}={chunks}" if chunks > 1 else "")
    names = ("num_layers", PP, CHUNKS) if chunks > 1 else ("num_layers", PP)
    works = working_layout(layers, stages, chunks)
    if works is None:
        fix = f"at most {layers + 2} stages: an empty one would deadlock"
    else:
        fix = proposal(works)
    yield check.problem(f"num_layers={layers} does not split over {named}", *names, fix=fix)
    check.bad.add(LAYOUT)


def layout_fits(check: Check) -> Iterator[Problem]:
    """The layout string can be read and fits layers, pipeline ranks and virtual stages."""
    layers, stages, chunks, text = check.take("num_layers", PP, CHUNKS, LAYOUT)
    if text is None:
        return
    works = working_layout(layers, stages, chunks)
    fix = proposal(works) if works else ""
    try:
        layout = PipelineLayout.parse(text, stages)
        complaints = layout.problems(layers, chunks)
    except ConfigError as error:
        yield check.problem(error.problems[0].what, LAYOUT, fix=fix or error.problems[0].fix)
        check.bad.add(LAYOUT)
        return
    if stages == 1 and layout.num_chunks > 1:
        fix = f"{flag(PP, layout.num_chunks)}, or a divisor of it" + (f"; or {fix}" if fix else "")
    elif layout.num_chunks != chunks:
        fix = f"{flag(CHUNKS, layout.num_chunks)}, or {fix}" if fix else flag(CHUNKS, layout.num_chunks)
    for complaint in complaints:
        yield check.problem(
            complaint, LAYOUT, PP, *([CHUNKS] if "stages, not" in complaint else ["num_layers"]), fix=fix
        )
    if complaints:
        check.bad.add(LAYOUT)


def proposal(layout: PipelineLayout) -> str:
    """A layout that works, and where to find the best one."""
    return f"{flag(LAYOUT, layout)}  (tools/plan_pipeline.py prints the best one)"


def working_layout(layers: int, stages: int, chunks: int) -> PipelineLayout | None:
    """A layout to propose, or None where no layout can work."""
    if stages * chunks > 4096:
        return None
    try:
        return default_layout(layers, stages, chunks)
    except ConfigError:
        return None


def interleaving_over_two_ranks_overlaps(check: Check) -> Iterator[Problem]:
    """The interleaved schedule over 2 pipeline ranks deadlocks without overlapped messages."""
    stages, chunks, overlap = check.take(PP, CHUNKS, "overlap_p2p_communication")
    if stages == 2 and chunks > 1 and overlap is False:
        yield check.problem(
            "the interleaved schedule over 2 pipeline ranks deadlocks without overlap_p2p_communication",
            "overlap_p2p_communication",
            PP,
            fix=flag("overlap_p2p_communication", True),
        )


RULES: tuple[Rule, ...] = (chunks_need_a_pipeline, layers_split, layout_fits, interleaving_over_two_ranks_overlaps)
