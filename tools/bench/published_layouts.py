#!/usr/bin/env python3
"""TeleChat2's published runs under the cost model: throughput, and the published layout beside the planned one.

    python tools/bench/published_layouts.py [--device FILE] [--fit PRESET] [--time-limit 10] [--json FILE]

Throughput: predicted over published tokens a second and device. --fit PRESET sets the share of the peak that products
reach so that this preset's is met (what is in the device file came so), and shows what that makes of the others.
Layouts: makespan and fullest stage of the published one and of the plan, under the published memory cap. "same
recompute" may move layers only; "free" may also choose what each layer recomputes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_telechat.costs.devices import DeviceSpec, device_spec, read_device_file  # noqa: E402
from megatron_telechat.planner.assignment import Assignment  # noqa: E402
from megatron_telechat.planner.build import assignment_of, kinds_of, planned_run  # noqa: E402
from megatron_telechat.planner.problem import BalanceProblem, LayerGroup, Mode  # noqa: E402
from megatron_telechat.planner.simulate import simulate  # noqa: E402
from megatron_telechat.planner.solve import solve  # noqa: E402
from tools.bench.yardsticks.published import PUBLISHED, Published, fit_gemm, published_device  # noqa: E402


def throughput(device: DeviceSpec) -> list[dict[str, Any]]:
    """Predicted and published tokens a second and device."""
    rows = []
    for entry in PUBLISHED:
        ratio = entry.ratio(device)
        rows.append(
            {
                "preset": entry.preset,
                "published": entry.tokens_per_s,
                "predicted": entry.tokens_per_s * ratio,
                "ratio": ratio,
            }
        )
    return rows


def one_kind(problem: BalanceProblem, group: LayerGroup, mode: int) -> BalanceProblem:
    """The problem in which every layer recomputes alike: what that costs is in the backward, no choice is left."""
    chosen = group.modes[mode]
    only = replace(group, b=group.b + chosen.extra_b, modes=(Mode(chosen.name, 0.0, chosen.act, chosen.ws),))
    return replace(problem, groups=(only,))


def layouts(entry: Published, device: DeviceSpec, time_limit: float) -> dict[str, Any]:
    """The published layout and the plans, by the same simulator."""
    run = entry.run()
    problem = entry.problem(device, tuple(dict.fromkeys((*kinds_of(run), "full"))))
    published = assignment_of(run, problem)
    out = {"preset": entry.preset, "memory_gb": entry.memory_gb, "published": _row(problem, published)}
    kinds = {mode for stage in published.modes for mode in stage}
    if len(kinds) == 1:
        alike = one_kind(problem, problem.groups[0], kinds.pop())
        solution = solve(alike, time_limit)
        found = solution.assignment and Assignment(
            tuple(tuple(published.modes[0][:1] * len(stage)) for stage in solution.assignment.modes)
        )
        out["same recompute"] = _plan(run, problem, found, solution)
    solution = solve(problem, time_limit, warm_start=published)
    out["free"] = _plan(run, problem, solution.assignment, solution)
    return out


def _row(problem: BalanceProblem, assignment: Assignment) -> dict[str, Any]:
    result = simulate(problem, assignment)
    stages = [sum(assignment.counts[rank :: problem.P]) for rank in range(problem.P)]
    return {
        "layers": stages,
        "counts": assignment.counts,
        "makespan_s": result.makespan,
        "peak_gb": max(result.peak_bytes) / 1e9,
        "recomputed": [
            sum(mode > 0 for stage in assignment.modes[rank :: problem.P] for mode in stage)
            for rank in range(problem.P)
        ],
    }


def _plan(run, problem: BalanceProblem, assignment: Assignment | None, solution) -> dict[str, Any]:
    if assignment is None:
        return {"status": solution.status}
    planned = planned_run(run, problem, assignment)
    return {
        **_row(problem, assignment),
        "status": solution.status,
        "gap": solution.gap,
        "seconds": solution.seconds,
        "flags": planned.flags,
    }


def show(rows: list[dict[str, Any]], tables: list[dict[str, Any]]) -> None:
    print(f"{'preset':22}{'published':>11}{'predicted':>11}{'ratio':>7}   tokens/s a device")
    for row in rows:
        print(f"{row['preset']:22}{row['published']:>11.0f}{row['predicted']:>11.0f}{row['ratio']:>7.2f}")
    for table in tables:
        print(f"\n{table['preset']}, at most {table['memory_gb']} GB")
        for name in ("published", "same recompute", "free"):
            row = table.get(name)
            if row is None or "layers" not in row:
                continue
            gain = table["published"]["makespan_s"] / row["makespan_s"] - 1
            proof = f", {row['status']}, gap {row['gap']:.2%}, {row['seconds']:.1f} s" if "gap" in row else ""
            print(
                f"  {name:15} {row['makespan_s']:8.3f} s  {gain:+6.1%}  fullest {row['peak_gb']:5.1f} GB  "
                f"layers {' '.join(map(str, row['layers']))}  recomputed {' '.join(map(str, row['recomputed']))}{proof}"
            )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="name or file of the device; unset: that of the publication")
    parser.add_argument("--fit", choices=[entry.preset for entry in PUBLISHED])
    parser.add_argument("--time-limit", type=float, default=10.0, help="seconds for each plan")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    options = parser.parse_args(argv)
    device = published_device()
    if options.device:
        device = device_spec(options.device) or read_device_file(Path(options.device))
    if options.fit:
        device = fit_gemm(next(entry for entry in PUBLISHED if entry.preset == options.fit), device)
        print(f"fitted to {options.fit}: {dict(device.efficiency)}")
    rows = throughput(device)
    tables = [
        layouts(entry, device, options.time_limit)
        for entry in PUBLISHED
        if entry.run().parallel.pipeline_model_parallel_size > 1
    ]
    show(rows, tables)
    if options.json:
        options.json.write_text(
            json.dumps({"efficiency": dict(device.efficiency), "throughput": rows, "layouts": tables}, indent=1)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
