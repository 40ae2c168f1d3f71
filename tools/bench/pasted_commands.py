#!/usr/bin/env python3
"""What the planner and the training answer to the launch scripts of tests/cli/launch_scripts.

    python tools/bench/pasted_commands.py [--device h100-80g] [--time-limit 2] [--only TEXT]

A row a script: model, ranks and layout as the planner reads them, its plan (or what the tightest stage lacks), and what
the training says to the same flags: that it runs, or each thing it refuses.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_telechat.cli.plan_report import sizes_text  # noqa: E402
from megatron_telechat.cli.plan_request import (  # noqa: E402
    Request,
    question_of,
    read_device,
    read_request,
    said_ways,
)
from megatron_telechat.config import load_run_config  # noqa: E402
from megatron_telechat.costs import count_parameters  # noqa: E402
from megatron_telechat.errors import ConfigError, UserError  # noqa: E402
from megatron_telechat.planner.context import SPLIT  # noqa: E402
from megatron_telechat.planner.plan import best_plan  # noqa: E402
from megatron_telechat.planner.remedy import shortage  # noqa: E402
from tests.cli.launch_scripts import SCRIPTS, LaunchScript  # noqa: E402


def planned(request: Request) -> tuple[str, str, str]:
    """(billions of parameters, ranks and layout, step or shortage) of a script."""
    loaded = request.load()
    device, run = read_device(request.options.device, loaded.run)
    plan, solution, problem = best_plan(question_of(request, loaded, run, device), {*SPLIT, *said_ways(loaded)})
    count = count_parameters(run.model)
    size = f"{count.total / 1e9:.2f}" + (f" / {count.active / 1e9:.1f}" if count.active != count.total else "")
    layout = f"{run.parallel.world_size}: {sizes_text(run)}"
    if plan is not None:
        found = plan.prediction
        return size, layout, f"{found.iteration:.3g} s, {found.tokens_per_s_per_device:,.0f} tokens/s a device"
    lack = shortage(problem) if solution.status == "infeasible" else None
    return size, layout, f"does not fit: {lack.lacking_bytes / 2**30:.0f} GiB too much" if lack else solution.reason


def trained(request: Request) -> str:
    """What the training says to the same flags: the heads of its problems."""
    try:
        load_run_config([*request.words, "--dry-run"], {})
    except ConfigError as error:
        return "; ".join(problem.what.split(" (a Megatron")[0].split(": ")[0][:110] for problem in error.problems)
    return "runs"


def row(script: LaunchScript, device: str, limit: float) -> list[str]:
    """A script, the planner's answer, the training's."""
    words = ["--device", device, "--time-limit", str(limit), "--command", script.command, *script.flags]
    try:
        request = read_request(words)
        return [script.name, *planned(request), trained(request)]
    except UserError as error:
        return [script.name, "-", "-", error.problems[0].what, "-"]


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="h100-80g")
    parser.add_argument("--time-limit", type=float, default=2.0)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    print("| script | B parameters | ranks | plan | training |\n|---|---|---|---|---|")
    for script in SCRIPTS:
        if options.only in script.name:
            print(f"| {' | '.join(row(script, options.device, options.time_limit))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
