"""A plan as a person reads it, and as JSON."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_telechat.cli.model_text import model_text
from megatron_telechat.cli.text import context_text, gib, table
from megatron_telechat.config.loss_chunks import loss_lines
from megatron_telechat.config.plan_file import PlanFile, Predicted, plan_of
from megatron_telechat.config.schema import ModelConfig, RunConfig
from megatron_telechat.costs import count_parameters, model_tflops_per_device
from megatron_telechat.costs.imbalance import uneven_rows
from megatron_telechat.costs.memory import stage_memory
from megatron_telechat.costs.time import TimeModel
from megatron_telechat.errors import ConfigError
from megatron_telechat.planner.assignment import Solution
from megatron_telechat.planner.baselines import Baseline
from megatron_telechat.planner.build import UNLIMITED_BYTES, group_size
from megatron_telechat.planner.context import keep_flags
from megatron_telechat.planner.plan import Plan, Question
from megatron_telechat.planner.problem import BalanceProblem
from megatron_telechat.planner.remedy import Change, Shortage
from megatron_telechat.planner.simulate import stage_times

WORTH_A_WORD = 0.005
"""Share of a step below which what the messages between stages take is not named."""
SHORTEST_STEP_S = 0.02
"""Below this an estimate from FLOPs says nothing."""
WORTH = 0.005
"""Gain below which a plan is said to be none."""
NAMES = {
    "uniform split": "Megatron's uniform split",
    "account_for_embedding/loss": "--account-for-embedding/loss-in-pipeline-split",
    "best plain flags": "best plain flags (no layout string)",
    "as configured": "as configured (preset, file, flags)",
}


def sizes_text(run: RunConfig) -> str:
    """The parallel sizes as TP8 x PP8 x VP3 x DP8."""
    parallel = run.parallel
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    text = f"TP{parallel.tensor_model_parallel_size} x PP{parallel.pipeline_model_parallel_size}"
    text += f" x VP{virtual}" * (virtual > 1)
    groups = group_size(parallel)
    text += f" (groups of {groups} micro-batches)" if groups else ""
    text += f" x CP{context_text(parallel)}" * (parallel.context_parallel_size > 1)
    text += f" x DP{parallel.data_parallel_size}"
    if run.model.is_moe:
        text += ", experts EP{} x ETP{}".format(*parallel.expert_sizes)
    return text


def head(question: Question, problem: BalanceProblem) -> list[str]:
    """First lines of a report: sizes, model, micro-batches, and the memory that the plan may use."""
    run, training = question.run, question.run.training
    limit = "memory not limited" if problem.mem_limit >= UNLIMITED_BYTES else (
        f"{problem.mem_limit / 2**30:.1f} GiB a device, {problem.const_mem / 2**30:.3g} of them held back"
    )  # fmt: skip
    return [
        f"{run.model.name} on {question.device.name}: {sizes_text(run)}, {run.parallel.world_size} ranks",
        f"  {model_text(run.model)}",
        f"  {problem.m} micro-batches of {training.micro_batch_size} x {training.seq_length} tokens, "
        f"{training.precision_text}; {limit}; recompute allowed: {', '.join(question.kinds)}",
        *(f"  loss {line}" for line in loss_lines(run)),
    ]


def plan_text(
    plan: Plan, others: Sequence[Baseline], notes: Iterable[str] = (), given: Mapping[str, Sequence[str]] | None = None
) -> str:
    """Table of the stages, times, comparisons, proof, flags.

    Args:
        given: flags of the command that was pasted, without their hyphens; of them, what the plan replaces is named.
    """
    lines = [
        *head(plan.question, plan.problem),
        "",
        *_stages(plan),
        *_uneven(plan),
        "",
        *_times(plan),
        "",
        *_comparison(plan, others),
    ]
    lines += ["", _proof(plan), "", *_flags(plan), *_replaced(given or {})]
    return "\n".join([*lines, *notes_of(notes)])


def notes_of(notes: Iterable[str]) -> list[str]:
    """How the run was understood, by what it means for the plan: what was assumed, how flags were read, what is not
    part of the model of time and memory. Notes on what changes no plan are left out."""
    notes = list(notes)
    assumed = [note.removeprefix("assumed: ") for note in notes if note.startswith("assumed: ")]
    left_out = [note for note in notes if note.endswith(NOT_MODELLED)]
    understood = ("as Megatron-LM", "is not used, because stage", "not flags of Megatron-LM", "of another program")
    read = [note for note in notes if any(words in note for words in understood) and note not in assumed]
    lines = [f"! assumed: {note}" for note in assumed] + [f"note: {note}" for note in read]
    if left_out:
        flags = " ".join(note.removesuffix(NOT_MODELLED) for note in left_out)
        lines.append(f"note: not modelled, and ignored for the plan: {flags}")
    return lines


NOT_MODELLED = " is not modelled and was ignored for the plan"
SPLITS = (
    *("pipeline-model-parallel-layout", "num-layers-per-virtual-pipeline-stage", "account-for-loss-in-pipeline-split"),
    *("num-virtual-stages-per-pipeline-rank", "virtual-pipeline-model-parallel-size"),
    *("microbatch-group-size-per-virtual-pipeline-stage", "microbatch-group-size-per-vp-stage"),
    *("account-for-embedding-in-pipeline-split", "decoder-first-pipeline-num-layers", "num-layer-list"),
    *("decoder-last-pipeline-num-layers", "num-layers-in-first-pipeline-stage", "num-layers-in-last-pipeline-stage"),
    *("recompute-granularity", "recompute-method", "recompute-num-layers", "recompute-modules"),
    *("recompute-activations", "checkpoint-activations", "recompute-layout"),
)
"""Flags whose place a plan takes."""


def _replaced(given: Mapping[str, Sequence[str]]) -> list[str]:
    """What to take out of the command that was pasted, before the flags of the plan go in."""
    found = [" ".join((f"--{name}", *given[name])) for name in SPLITS if name in given]
    return [f"remove from your command: {' '.join(found)}"] if found else []


def _stages(plan: Plan) -> list[str]:
    problem, counts, pipeline = plan.problem, plan.assignment.counts, plan.nominal
    times = stage_times(problem, plan.assignment)
    limited = problem.mem_limit < UNLIMITED_BYTES
    rows = [
        ["stage", "layers", "recomputed", "forward", "backward", "busy", "waits", "memory GiB", *["of limit"] * limited]
    ]
    unit, scale = _unit(max(times))
    recompute = list(plan.planned.recompute)
    starts = [sum(counts[:stage]) for stage in range(len(counts))]
    for rank, peak in enumerate(plan.peak_bytes):
        own = range(rank, problem.num_stages, problem.P)
        forward, backward = (sum(times[first + stage] for stage in own) for first in (0, problem.num_stages))
        modes = [mode for stage in own for mode in recompute[starts[stage] : starts[stage] + counts[stage]]]
        busy = (forward + backward) * problem.m
        layers = "+".join(str(counts[stage]) for stage in own)
        layers += f" = {sum(counts[stage] for stage in own)}" * (problem.V > 1)
        rows.append([
            str(rank), layers, _recomputed(modes), f"{forward * scale:.4g} {unit}", f"{backward * scale:.4g} {unit}",
            f"{busy / pipeline:.0%}", f"{1 - busy / pipeline:.0%}", gib(peak),
            *[f"{peak / (problem.mem_limit - problem.const_mem):.0%}"] * limited,
        ])  # fmt: skip
    return table(rows, left=(0, 1, 2))


def _uneven(plan: Plan) -> list[str]:
    """A warning where the plan fits even routing only: no token is dropped, so that a busy rank needs more."""
    run, limit = plan.planned.run, plan.problem.mem_limit
    if not run.model.is_moe or limit >= UNLIMITED_BYTES:
        return []
    rows = uneven_rows(run)
    worst = max(stage_memory(run, rows, plan.question.software), key=lambda stage: stage.total_bytes)
    if worst.total_bytes <= limit - plan.problem.const_mem:
        return []
    need = f"stage {worst.pipeline_rank} needs {gib(worst.total_bytes)} GiB"
    return [f"! for even routing; on a rank whose experts get {rows:g} times the mean of rows {need} "
            f"(--moe-memory-imbalance, "
            "--memory-gib to plan with less)"]  # fmt: skip


def _recomputed(modes: Sequence[tuple[str, ...]]) -> str:
    names = ["+".join(mode) for mode in modes if mode]
    return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names)) or "-"


def _unit(seconds: float) -> tuple[str, float]:
    return ("s", 1.0) if seconds >= 1 else ("ms", 1e3)


def _seconds(value: float) -> str:
    unit, scale = _unit(value)
    return f"{value * scale:.4g} {unit}"


def _times(plan: Plan) -> list[str]:
    found = plan.prediction
    parts = [f"pipeline {_seconds(found.makespan)} (the busiest stage waits {found.bubble:.0%})"]
    if found.messages > WORTH_A_WORD * found.iteration:
        parts.append(f"messages {_seconds(found.messages)}")
    rest = (("gradient reduction", found.reduction), ("optimizer", found.optimizer), ("rest", found.constant))
    parts += [f"{name} {_seconds(value)}" for name, value in rest if value > 0]
    run, (tflops, share) = plan.question.run, _speed(plan)
    entry = TimeModel(plan.question.run, plan.question.device).measured
    source = (
        f"measured: {entry.source}" if entry else "estimates from the device file's figures; --calibrate measures them"
    )
    if entry is None and found.iteration < SHORTEST_STEP_S:
        source += ". A step this short is bound by kernel launches, which they do not model"
    if found.pace != 1:
        source += (
            f". Waiting neighbours and varying ops: {found.pace - 1:+.1%} of the pipeline's time, which the "
            f"comparison leaves out"
        )
    return [
        f"predicted: {_seconds(found.iteration)} a step (± {found.error:.0%}), "
        f"{found.tokens_per_s_per_device:,.0f} tokens/s a device: " + ", ".join(parts),
        f"  {tflops:.0f} TFLOP/s a device" + (f", MFU {share:.0%} (of {run.training.precision})" if share else ""),
        *_worst_case(plan),
        f"  times of the layers: {source}",
        *(f"  counted: {one}" for one in plan.question.counted if entry is None),
    ]


def _worst_case(plan: Plan) -> list[str]:
    """What a slow stage does to the plan, where it was made for that."""
    slow = plan.problem.slow_stage
    if not slow:
        return []
    seconds = f"{_seconds(plan.worst_iteration)} a step (pipeline {_seconds(plan.makespan)})"
    return [f"  with one stage {slow:.1%} slower, whichever it is: at most {seconds}"]


def _comparison(plan: Plan, others: Sequence[Baseline]) -> list[str]:
    worst = " in the worst case" * bool(plan.problem.slow_stage)
    rows = [
        [f"pipeline time{worst}, by the same simulator", "", "", ""],
        ["  this plan", _seconds(plan.makespan), "", _layout(plan.assignment.counts)],
    ]
    for other in others:
        name = f"  {NAMES.get(other.name, other.name)}"
        if other.makespan is None or other.assignment is None:
            layers, stages = plan.problem.num_layers, plan.problem.num_stages
            splits = {"uniform split": layers % stages == 0, "account_for_embedding/loss": (layers + 2) % stages == 0}
            why = (
                "does not fit the memory"
                if splits.get(other.name, True)
                else f"{layers} layers do not split this way over {stages} stages"
            )
            why = "none fits" if other.name == "best plain flags" else other.why or why
            rows.append([name, "-", "", why])
            continue
        more = other.makespan / plan.makespan - 1
        rows.append([name, _seconds(other.makespan), f"{more:+.1%}", _layout(other.assignment.counts)])
    return [*table(rows, left=(0, 3)), verdict(plan, others)]


def _layout(counts: Sequence[int]) -> str:
    text = " ".join(map(str, counts))
    return text if len(text) <= 60 else text[:57] + "..."


def verdict(plan: Plan, others: Sequence[Baseline]) -> str:
    """What the plan is worth, without flattery."""
    known = {other.name: other.makespan for other in others if other.makespan is not None}
    plain = [value for name, value in known.items() if name != "as configured"]
    configured = known.get("as configured")
    if not plain:
        fits = "none of Megatron's plain splits fits here; this plan does"
    else:
        gain = min(plain) / plan.makespan - 1
        if gain < -WORTH:
            fits = f"worse than plain flags by {-gain:.1%}: give the search more --time-limit"
        elif gain < WORTH:
            fits = f"no gain over plain flags: they are within {max(gain, 0):.1%} of this plan"
        else:
            fits = f"{gain:.1%} faster than the best plain flags" + _of_the_step(plan, min(plain))
        if "uniform split" in known and known["uniform split"] < plan.makespan * (1 + WORTH):
            fits += "; the uniform split is as good" if gain < WORTH else ""
    if configured is not None:
        gain = configured / plan.makespan - 1
        faster = f"; {gain:.1%} faster than as configured" + _of_the_step(plan, configured)
        fits += faster if gain >= WORTH else "; as good as configured, no more"
    return "  " + fits


def _of_the_step(plan: Plan, other: float) -> str:
    """The gain where the pipeline is not nearly all of a step."""
    whole, pipeline = plan.prediction.iteration, plan.prediction.makespan
    return f" ({(other - plan.makespan) / whole:.1%} of the whole step)" if pipeline < 0.95 * whole else ""


def _proof(plan: Plan) -> str:
    solution, seconds = plan.solution, f"{plan.solution.seconds:.2f} s"
    if solution.status == "optimal" and plan.gap <= 1e-6:
        worst = " in their worst case" * bool(plan.problem.slow_stage)
        faster = f"no layout and recompute that fit in memory are faster{worst} under this model"
        return f"proof: optimal; {faster} ({seconds} of search)"
    what = "any recompute per layer" if plan.question.plain else "anything"
    bound = f"{what} that fits is at most {plan.gap:.2%} faster"
    if plan.question.plain and solution.status == "optimal":
        return f"proof: {bound}, not expressible in Megatron-LM's flags; within them, the best found ({seconds})"
    return f"proof: not closed after {seconds}; {bound} (a longer --time-limit may close it)"


def plan_flags(plan: Plan) -> tuple[str, ...]:
    """Flags of our training that ask for the plan."""
    virtual_stages = plan.problem.V
    more = ("--num-virtual-stages-per-pipeline-rank", str(virtual_stages)) if virtual_stages > 1 else ()
    more += keep_flags(plan.question.run)
    return (*more, *(plan.planned.flags if plan.problem.P > 1 else plan.planned.flags[2:]))


def _megatron_flags(plan: Plan) -> tuple[str | None, str]:
    try:
        flags = plan.planned.megatron_flags()
        blocks = plan.question.run.model.mtp_num_layers
        if blocks and plan.problem.P > 1:  # Megatron-LM's layouts name them; the costs put them before the loss
            block = "m" if blocks == 1 else f"m*{blocks}"
            flags = (flags[0], flags[1].removesuffix("L") + f"{block}L", *flags[2:])
        return shlex.join(flags), ""
    except ConfigError as error:
        return None, error.problems[0].what


def megatron_line(plan: Plan, sizes: Sequence[str] = ()) -> str:
    """The plan in Megatron-LM's flags, behind these of the parallel sizes; or that it has no words for it."""
    flags, _ = _megatron_flags(plan)
    if flags is None:
        return (
            "Not expressible in Megatron-LM flags: recompute differs between stages; --plain-flags finds the best plan "
            "that is"
        )
    return f"Megatron-LM: {' '.join(filter(None, (shlex.join(sizes), flags)))}"


def _flags(plan: Plan) -> list[str]:
    flags = shlex.join(plan_flags(plan))
    lines = [f"layout: {plan.planned.layout}", f"flags: {flags}"]
    line = megatron_line(plan)
    lines += [line] if line != f"Megatron-LM: {flags}" else []
    other = plan.question.run.model.not_built
    if other:
        names = ", ".join(f"{name}={value}" for name, value in other.items())
        lines.append(f"planned only: the training does not build this model ({names})")
    return lines


def speed(plan: Plan) -> tuple[str, str]:
    """Model TFLOP/s of a device as predicted, and their share of its peak."""
    tflops, share = _speed(plan)
    return f"{tflops:.0f}", "-" if share is None else f"{share:.0%}"


def _speed(plan: Plan) -> tuple[float, float | None]:
    run, device = plan.question.run, plan.question.device
    rate = plan.prediction.tokens_per_s_per_device
    tflops = model_tflops_per_device(run.model, run.training.seq_length, rate)
    peak = device.peak(run.training.precision)
    return tflops, tflops / peak if peak else None


def model_json(model: ModelConfig) -> dict[str, int]:
    """Size of a model."""
    count = count_parameters(model)
    return {"parameters": count.total, "active_parameters": count.active, "vocab_size": model.vocab_size}


def plan_file(plan: Plan, path: str) -> PlanFile:
    """What --output writes."""
    found = plan.prediction
    memory = tuple(
        round(stage.total_bytes / 2**30, 4) for stage in stage_memory(plan.planned.run, software=plan.question.software)
    )
    predicted = Predicted(plan.question.device.name, found.iteration, memory, found.tokens_per_s_per_device)
    about: dict[str, Any] = {
        "flags": list(plan_flags(plan)),
        "megatron_flags": _megatron_flags(plan)[0],
        "proof": {
            "status": plan.solution.status,
            "makespan": plan.makespan,
            "lower_bound": plan.solution.lower_bound,
            "gap": plan.gap,
        },
    }
    if plan.problem.slow_stage:
        about["worst_case"] = {"slow_stage": plan.problem.slow_stage, "iteration_s": plan.worst_iteration}
    return plan_of(plan.planned.run, path, predicted, about)


def plan_json(plan: Plan, others: Sequence[Baseline]) -> dict[str, Any]:
    """The answer of a balance problem, and what it means for the run."""
    found = plan.prediction
    answer = plan.solution.to_json()
    answer |= {"makespan": plan.makespan, "gap": plan.gap, "modes": [list(stage) for stage in plan.assignment.modes]}
    tflops, share = _speed(plan)
    return {
        **answer,
        "model": model_json(plan.question.run.model),
        "peak_bytes": [peak + plan.problem.const_mem for peak in plan.peak_bytes],
        "layers": list(plan.assignment.counts),
        "compared": {other.name: other.makespan for other in others},
        "predicted": {
            "iteration_s": found.iteration, "pipeline_s": found.makespan, "bubble": found.bubble,
            "gradient_reduction_s": found.reduction, "optimizer_s": found.optimizer, "rest_s": found.constant,
            "tokens_per_s_per_device": found.tokens_per_s_per_device, "tflops_per_device": tflops, "mfu": share,
        },
        "plan": plan_file(plan, "").to_json(),
    }  # fmt: skip


def no_plan_text(
    question: Question, problem: BalanceProblem, solution: Solution, lack: Shortage | None, changes: Sequence[Change]
) -> str:
    """Which stage lacks how much, and what fits."""
    lines = head(question, problem)
    if solution.assignment is not None:
        what = f"without --plain-flags there is a plan of {_seconds(solution.makespan or 0.0)}"
        return "\n".join([*lines, "", f"no plan in Megatron-LM's flags was found to fit; {what}"])
    if solution.status != "infeasible":
        return "\n".join(
            [
                *lines,
                "",
                f"no plan found in {solution.seconds:.1f} s: {solution.reason}; a longer --time-limit may help",
            ]
        )
    if lack is None:
        return "\n".join([*lines, "", f"does not fit: {solution.reason}"])
    most = problem.mem_limit - problem.const_mem
    at_least = "" if lack.proved else " (best case found)"
    lines += ["", f"does not fit: in the best case, stage {lack.stage} lacks {gib(lack.lacking_bytes)} GiB{at_least}"]
    lines.append(
        "  GiB of each stage then: " + ", ".join(gib(need) for need in lack.needed_bytes) + f"; usable: {gib(most)}"
    )
    if not changes:
        return "\n".join(
            [*lines, "  none of the changes tried (single or in pairs) fits: use a larger device or more devices"]
        )
    rows = [["  changes that make it fit, smallest first", "pipeline", "tokens/s", "flags"]]
    for change in changes:
        rows.append(
            [f"  {change.text}", _seconds(change.makespan), f"{change.tokens_per_s:,.0f}", " ".join(change.flags)]
        )
    return "\n".join([*lines, *table(rows, left=(0, 3))])


def problem_text(problem: BalanceProblem, solution: Solution) -> str:
    """The answer to an abstract problem, in its own units."""
    if solution.assignment is None:
        lack = f"; the tightest device lacks {solution.shortfall:g}" if solution.shortfall is not None else ""
        return f"{solution.status}: {solution.reason}{lack}"
    rows = [["device", "layers", "modes", "peak", "of limit"]]
    for rank, peak in enumerate(solution.peak_bytes or ()):
        own = solution.assignment.modes[rank :: problem.P]
        modes = [mode for stage in own for mode in stage]
        uses = ", ".join(f"{modes.count(mode)} of mode {mode}" for mode in sorted(set(modes)))
        rows.append([str(rank), "+".join(str(len(stage)) for stage in own), uses or "-", f"{peak:g}",
                     f"{peak / problem.mem_limit:.0%}" if problem.mem_limit else "-"])  # fmt: skip
    place = (
        "" if solution.assignment.mtp_stage is None else f"; MTP block on virtual stage {solution.assignment.mtp_stage}"
    )
    state = (
        f"{solution.status}: makespan {solution.makespan:g}, lower bound {solution.lower_bound:g}, gap "
        f"{solution.gap:.3%}{place}"
    )
    return "\n".join([f"{state} ({solution.seconds:.2f} s)", *table(rows, left=(0, 1, 2))])
