"""Rules of the pipeline: stages, virtual stages, layouts."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_telechat.config.layout import PipelineLayout, default_layout
from megatron_telechat.config.origins import Check, Rule, flag
from megatron_telechat.errors import ConfigError, Problem

PP = "pipeline_model_parallel_size"
VIRTUAL_STAGES = "num_virtual_stages_per_pipeline_rank"
LAYOUT = "pipeline_model_parallel_layout"
GROUP = "microbatch_group_size_per_virtual_pipeline_stage"


def virtual_stages_need_a_pipeline(check: Check) -> Iterator[Problem]:
    """Several virtual stages a rank need more than one pipeline rank."""
    stages, virtual_stages = check.take(PP, VIRTUAL_STAGES)
    if stages == 1 and virtual_stages > 1:
        yield check.problem(
            f"{VIRTUAL_STAGES}={virtual_stages} interleaves virtual stages, but {PP}=1",
            VIRTUAL_STAGES,
            PP,
            fix=f"{flag(PP, 2)} or more, or {flag(VIRTUAL_STAGES, 1)}",
        )
        check.bad.add(VIRTUAL_STAGES)


def groups_reach_all_ranks(check: Check) -> Iterator[Problem]:
    """A group of micro-batches of the interleaved schedule has one for each pipeline rank."""
    stages, virtual_stages, group = check.take(PP, VIRTUAL_STAGES, GROUP)
    if virtual_stages > 1 and group is not None and group < stages:
        yield check.problem(
            f"{GROUP}={group} is less than {PP}={stages}: the ranks would wait for each other",
            GROUP,
            PP,
            fix=f"{flag(GROUP, stages)} or more; unset it is {stages}",
        )
        check.bad.add(GROUP)


def layers_split(check: Check) -> Iterator[Problem]:
    """30 layers on 4 stages built 28 elsewhere, without a word."""
    layers, stages, virtual_stages, layout = check.take("num_layers", PP, VIRTUAL_STAGES, LAYOUT)
    if layout is not None or layers % (stages * virtual_stages) == 0:
        return
    named = f"{PP}={stages}" + (f" x {VIRTUAL_STAGES}={virtual_stages}" if virtual_stages > 1 else "")
    names = ("num_layers", PP, VIRTUAL_STAGES) if virtual_stages > 1 else ("num_layers", PP)
    works = working_layout(layers, stages, virtual_stages)
    if works is None:
        fix = f"at most {layers + 2} stages: an empty one would deadlock"
    else:
        fix = proposal(works)
    yield check.problem(f"num_layers={layers} does not split over {named}", *names, fix=fix)
    check.bad.add(LAYOUT)


def layout_fits(check: Check) -> Iterator[Problem]:
    """The layout string can be read and fits layers, pipeline ranks and virtual stages."""
    layers, stages, virtual_stages, text = check.take("num_layers", PP, VIRTUAL_STAGES, LAYOUT)
    if text is None:
        return
    works = working_layout(layers, stages, virtual_stages)
    fix = proposal(works) if works else ""
    try:
        layout = PipelineLayout.parse(text, stages)
        complaints = layout.problems(layers, virtual_stages)
    except ConfigError as error:
        yield check.problem(error.problems[0].what, LAYOUT, fix=fix or error.problems[0].fix)
        check.bad.add(LAYOUT)
        return
    if stages == 1 and layout.num_virtual_stages > 1:
        fix = f"{flag(PP, layout.num_virtual_stages)}, or a divisor of it" + (f"; or {fix}" if fix else "")
    elif layout.num_virtual_stages != virtual_stages:
        fix = (
            f"{flag(VIRTUAL_STAGES, layout.num_virtual_stages)}, or {fix}"
            if fix
            else flag(VIRTUAL_STAGES, layout.num_virtual_stages)
        )
    for complaint in complaints:
        yield check.problem(
            complaint, LAYOUT, PP, *([VIRTUAL_STAGES] if "stages, not" in complaint else ["num_layers"]), fix=fix
        )
    if complaints:
        check.bad.add(LAYOUT)


def proposal(layout: PipelineLayout) -> str:
    """A layout that works, and where to find the best one."""
    return f"{flag(LAYOUT, layout)}  (tools/plan_pipeline.py prints the best one)"


def working_layout(layers: int, stages: int, virtual_stages: int) -> PipelineLayout | None:
    """A layout to propose, or None where no layout can work."""
    if stages * virtual_stages > 4096:
        return None
    try:
        return default_layout(layers, stages, virtual_stages)
    except ConfigError:
        return None


def interleaving_over_two_ranks_overlaps(check: Check) -> Iterator[Problem]:
    """The interleaved schedule over 2 pipeline ranks deadlocks without overlapped messages."""
    stages, virtual_stages, overlap = check.take(PP, VIRTUAL_STAGES, "overlap_p2p_communication")
    if stages == 2 and virtual_stages > 1 and overlap is False:
        yield check.problem(
            "the interleaved schedule over 2 pipeline ranks deadlocks without overlap_p2p_communication",
            "overlap_p2p_communication",
            PP,
            fix=flag("overlap_p2p_communication", True),
        )


RULES: tuple[Rule, ...] = (
    virtual_stages_need_a_pipeline,
    groups_reach_all_ranks,
    layers_split,
    layout_fits,
    interleaving_over_two_ranks_overlaps,
)
