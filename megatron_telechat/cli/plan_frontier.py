"""--sweep --frontier of plan_pipeline: the fastest step against memory, or against the number of ranks."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_telechat.cli.plan_request import Request
from megatron_telechat.cli.plan_sweep import Asked, asked_of, layout_flags, space_text
from megatron_telechat.cli.text import context_text, table
from megatron_telechat.errors import EXIT_NO_FIT, EXIT_OK, ConfigError
from megatron_telechat.planner.frontier import memory_frontier
from megatron_telechat.planner.plan import Plan
from megatron_telechat.planner.sweep import GAP, Proof, sweep
from megatron_telechat.planner.worker import processors

POINTS = 8
"""Memory limits of a frontier that names none: of the whole memory down to an eighth of it."""
GIB = 2**30


@dataclass(frozen=True)
class Point:
    """The best of a space under a limit: `at` GiB or ranks; no plan where nothing fits."""

    at: float
    proof: Proof
    flags: tuple[str, ...] = ()
    plan: Plan | None = None


def _point(at: float, proof: Proof, best: tuple[tuple[str, ...], Plan] | None) -> Point:
    return Point(at, proof) if best is None else Point(at, proof, *best)


def frontier_door(request: Request) -> int:
    """Print the frontier, and draw it with --plot.

    Raises:
        ConfigError: neither memory nor ranks; numbers that are none; --output, which is for one plan.
    """
    options = request.options
    kind, _, text = options.frontier.partition("=")
    if kind not in ("memory", "ranks"):
        raise ConfigError(
            f"--frontier {options.frontier}", "command line", "memory, memory=80,64,48 (GiB), or ranks=64,128,256"
        )
    if options.output:
        raise ConfigError("--output with --frontier: a frontier has many plans", "command line", "drop one of them")
    asked = asked_of(request)
    points = _memory(request, asked, text) if kind == "memory" else _ranks(request, text)
    if options.json:
        print(json.dumps([_json(point, kind) for point in points]))
    else:
        print("\n".join(_text(points, kind, asked)))
    if options.plot:
        from megatron_telechat.cli.frontier_picture import draw_frontier

        drawn = [(point.at, point.plan.worst_iteration) for point in points if point.plan]
        title = f"{asked.question.run.model.name} on {asked.question.device.name}"
        draw_frontier(drawn, Path(options.plot), title, kind)
    return EXIT_OK if any(point.plan for point in points) else EXIT_NO_FIT


def _numbers(text: str, kind: str) -> list[float]:
    try:
        found = [float(word) for word in text.split(",") if word.strip()]
    except ValueError:
        found = [-1.0]
    if not all(number > 0 and math.isfinite(number) for number in found):
        fix = f"numbers above 0 with commas, such as --frontier {kind}=64,128"
        raise ConfigError(f"--frontier {kind}={text}", "command line", fix)
    return sorted(set(found))


def _memory(request: Request, asked: Asked, text: str) -> list[Point]:
    options = request.options
    whole = options.memory_gib or asked.question.device.memory_gib
    limits = _numbers(text, "memory")
    if not limits and not whole:
        fix = "--memory-gib N, or --frontier memory=80,64,48"
        raise ConfigError(f"no memory is known of {asked.question.device.name}", "--frontier", fix)
    limits = limits or [(whole or 0.0) * number / POINTS for number in range(1, POINTS + 1)]
    found = memory_frontier(
        asked.space,
        asked.load,
        [limit * GIB for limit in limits],
        options.time_limit,
        options.gap or GAP,
        options.processes or processors(),
    )
    return [_point(point.limit / GIB, point.proof, point.best) for point in found]


def _ranks(request: Request, text: str) -> list[Point]:
    options = request.options
    numbers = _numbers(text, "ranks")
    if not numbers or not all(number.is_integer() for number in numbers):
        raise ConfigError(f"--frontier ranks={text}", "command line", "numbers of ranks, such as ranks=64,128,256")
    points = []
    for number in reversed(numbers):
        asked = asked_of(request, "--world-size", f"{number:.0f}")
        seconds = options.time_limit / len(numbers)
        ranking = sweep(asked.space, asked.load, 1, seconds, options.gap or GAP, options.processes or processors())
        points.append(_point(number, ranking.proof, ranking.plans[0] if ranking.plans else None))
    return points


def _json(point: Point, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = {"memory_gib" if kind == "memory" else "ranks": point.at}
    if point.plan is None:
        return {**found, "flags": None}
    return {
        **found,
        "flags": list(layout_flags(point.flags, point.plan)),
        "iteration_s": point.plan.prediction.iteration,
        "tokens_per_s_per_device": point.plan.prediction.tokens_per_s_per_device,
        "proof": {**asdict(point.proof), "gap": point.proof.gap},
    }


def _text(points: list[Point], kind: str, asked: Asked) -> list[str]:
    run = asked.question.run
    moe, shared = (
        run.model.is_moe,
        any(p.plan.question.run.parallel.context_parallel_size > 1 for p in points if p.plan),
    )
    slow = asked.question.slow_stage > 0
    head = [
        "GiB a device" if kind == "memory" else "ranks",
        "step",
        *["worst"] * slow,
        "tokens/s a device",
        "TP",
        "PP",
        "VP",
    ]
    head += [*["CP"] * shared, *["EP", "ETP"] * moe, "DP", "micro-batch", "optimizer", "recomputed", "gap"]
    rows = [head]
    for point in points:
        at = f"{point.at:.4g}" if kind == "memory" else f"{point.at:.0f}"
        if point.plan is None:
            why = "nothing fits" if not point.proof.unseen else "nothing found in time"
            rows.append([at, why, *[""] * (len(head) - 2)])
            continue
        plan, parallel = point.plan, point.plan.question.run.parallel
        recomputed = sum(bool(mode) for mode in plan.planned.recompute)
        rows.append(
            [
                at,
                f"{plan.prediction.iteration:.4g} s",
                *[f"{plan.worst_iteration:.4g} s"] * slow,
                f"{plan.prediction.tokens_per_s_per_device:,.0f}",
                str(parallel.tensor_model_parallel_size),
                str(plan.problem.P),
                str(plan.problem.V),
                *[context_text(parallel)] * shared,
                *map(str, parallel.expert_sizes[: 2 * moe]),
                str(parallel.data_parallel_size),
                str(plan.question.run.training.micro_batch_size),
                "host" if parallel.optimizer_cpu_offload else "device",
                f"{recomputed} of {plan.problem.num_layers}",
                f"{point.proof.gap:.2%}",
            ]
        )
    title = f"{run.model.name} on {asked.question.device.name}: fastest step against {kind}"
    return [title, "", *table(rows, left=(1,)), "", *space_text(asked)]
