"""A plan as a picture: time of each stage, memory against the limit, the schedule as a Gantt chart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_telechat.cli.plot_run import GRID, INK, new_figure, save_figure, style
from megatron_telechat.planner.assignment import Assignment
from megatron_telechat.planner.build import UNLIMITED_BYTES
from megatron_telechat.planner.problem import BalanceProblem
from megatron_telechat.planner.simulate import SimResult, in_flight, simulate, stage_groups, stage_times

FORWARD = ("#2563eb", "#60a5fa", "#93c5fd", "#1d4ed8")
BACKWARD = ("#ea580c", "#fb923c", "#fdba74", "#c2410c")
"""One shade per virtual stage of a rank, in turn."""
WEIGHTS, KEPT, WORKING, HELD = "#64748b", "#059669", "#f59e0b", "#e2e8f0"
MOST_DRAWN = 24
"""Micro-batches of the Gantt chart; the rest repeats the steady state."""


def draw(problem: BalanceProblem, assignment: Assignment, output: Path, title: str, real: bool = False) -> None:
    """Draw the plan.

    Args:
        real: times are seconds and sizes bytes; otherwise they are in the problem's own units.

    Raises:
        ConfigError: matplotlib is missing, or the suffix is no picture format.
        ResourceError: the picture cannot be written.
    """
    figure, axes = new_figure(
        [["times", "memory"], ["gantt", "gantt"]], (11, 3.4 + 2.4 + 0.28 * problem.P), (3.2, 1.6 + 0.28 * problem.P)
    )
    _times(axes["times"], problem, assignment, real)
    _memory(axes["memory"], problem, assignment, real)
    drawn = _few(problem)
    _gantt(axes["gantt"], figure, problem, simulate(drawn, assignment), drawn.m, real)
    counts = " ".join(map(str, assignment.counts))
    figure.suptitle(f"{title}:  "
                    f"{counts if len(counts) < 80 else counts[:77] + '...'}", fontsize=12, fontweight="bold", color=INK,
                    x=0.01, ha="left")  # fmt: skip
    save_figure(figure, output, "--plot")


def _few(problem: BalanceProblem) -> BalanceProblem:
    """The problem with few enough micro-batches to be told apart, and no slow stage."""
    problem = replace(problem, slow_stage=0.0)
    group = problem.group_size or problem.P
    few = max(MOST_DRAWN // group, 2) * group
    return problem if problem.m <= max(MOST_DRAWN, few) else replace(problem, m=few)


def _unit(problem: BalanceProblem, times: list[float], real: bool) -> tuple[float, str]:
    return ((1e3, "ms") if max(times) < 1 else (1.0, "s")) if real else (1.0, "time units")


def _times(axes: Any, problem: BalanceProblem, assignment: Assignment, real: bool) -> None:
    times = stage_times(problem, assignment)
    scale, unit = _unit(problem, times, real)
    stages = range(problem.P)
    bottom = [0.0] * problem.P
    for offset, colors, name in ((0, FORWARD, "forward"), (problem.num_stages, BACKWARD, "backward")):
        for virtual_stage in range(problem.V):
            heights = [times[offset + virtual_stage * problem.P + stage] * scale for stage in stages]
            label = name if virtual_stage == 0 else None
            axes.bar(
                stages,
                heights,
                0.72,
                bottom,
                color=colors[virtual_stage % 4],
                edgecolor="white",
                linewidth=0.6,
                label=label,
            )
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    mean = sum(bottom) / len(bottom)
    axes.axhline(mean, color=INK, linestyle=":", linewidth=1.1, label="mean")
    style(axes, f"One micro-batch on each stage, {unit}")
    axes.set_ylim(0, max(bottom) * 1.22)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, ncols=3, loc="upper right")
    _stage_ticks(axes, problem)


def _stage_ticks(axes: Any, problem: BalanceProblem) -> None:
    axes.set_xticks(range(problem.P))
    axes.set_xlabel("stage", fontsize=9, color=INK)


def _memory(axes: Any, problem: BalanceProblem, assignment: Assignment, real: bool) -> None:
    scale = 1 / 2**30 if real else 1.0
    weights, kept, working = _parts(problem, assignment)
    stages = range(problem.P)
    bottom = [0.0] * problem.P
    parts = [("held back", [problem.const_mem] * problem.P, HELD), ("weights, gradients, optimizer", weights, WEIGHTS)]
    parts += [("activations", kept, KEPT), ("working set", working, WORKING)]
    for name, sizes, color in parts:
        if not any(sizes):
            continue
        heights = [size * scale for size in sizes]
        axes.bar(stages, heights, 0.72, bottom, color=color, edgecolor="white", linewidth=0.6, label=name)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    top = max(bottom)
    if problem.mem_limit < UNLIMITED_BYTES:
        axes.axhline(problem.mem_limit * scale, color="#dc2626", linewidth=1.4, label="limit")
        top = max(top, problem.mem_limit * scale)
    style(axes, f"Memory at the worst moment, {'GiB' if real else 'size units'}")
    axes.set_ylim(0, top * 1.32)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, ncols=3, loc="upper right")
    _stage_ticks(axes, problem)


def _parts(problem: BalanceProblem, assignment: Assignment) -> tuple[list[float], list[float], list[float]]:
    """Of each device at its worst moment: resident bytes, activations in flight, working set."""
    resident, kept, working = [], [], []
    for stage, (in_group, modes) in enumerate(
        zip(stage_groups(problem, assignment.counts), assignment.modes, strict=True)
    ):
        fixed = problem.fixed_block(stage, assignment.mtp_stage)
        groups = [group for group, count in zip(problem.groups, in_group, strict=True) for _ in range(count)]
        used = [group.modes[mode] for group, mode in zip(groups, modes, strict=True)]
        resident.append(fixed.w + sum(group.w for group in groups))
        kept.append(fixed.act + sum(mode.act for mode in used))
        working.append(max([fixed.ws, *(mode.ws for mode in used)]))
    held, again = [], []
    for device, moments in enumerate(in_flight(*problem.schedule)):
        own = range(device, problem.num_stages, problem.P)
        found = [
            (sum(count * kept[stage] for count, stage in zip(moment.held, own, strict=True)),
             0.0 if moment.backward is None else working[own[moment.backward]])
            for moment in moments
        ]  # fmt: skip
        most = max(found, key=sum)
        held.append(most[0])
        again.append(most[1])
    return [sum(resident[device :: problem.P]) for device in range(problem.P)], held, again


def _gantt(axes: Any, figure: Any, problem: BalanceProblem, result: SimResult, drawn: int, real: bool) -> None:
    scale, unit = _unit(problem, [result.makespan], real)
    width = figure.get_size_inches()[0] * 72 * 0.9
    bars: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for op in result.ops:
        color = (FORWARD if op.kind == "F" else BACKWARD)[op.virtual_stage % 4]
        bars.setdefault((op.device, color), []).append((op.start * scale, (op.end - op.start) * scale))
        if (op.end - op.start) / result.makespan * width > 11:
            axes.text(
                (op.start + op.end) / 2 * scale,
                op.device,
                str(op.microbatch),
                ha="center",
                va="center",
                fontsize=6.5,
                color="white",
            )
    for (device, color), spans in bars.items():
        axes.broken_barh(spans, (device - 0.42, 0.84), color=color, edgecolor="white", linewidth=0.4)
    most = "" if drawn == problem.m else f", the first {drawn} of {problem.m} micro-batches"
    shades = ", shades are virtual stages" if problem.V > 1 else ""
    style(axes, f"Schedule, {unit}: forwards blue, backwards orange{shades}{most}")
    axes.grid(False, axis="y")
    axes.set_yticks(range(problem.P))
    axes.set_ylabel("stage", fontsize=9, color=INK)
    axes.invert_yaxis()
    axes.margins(x=0.005)
    axes.axvline(result.makespan * scale, color=GRID, linewidth=1.0)
