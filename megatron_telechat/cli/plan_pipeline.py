"""The door of the pipeline-stage balancer; torch is imported only to calibrate."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_telechat.cli.plan_answers import write_answers
from megatron_telechat.cli.plan_request import (
    Request,
    on_device,
    question_of,
    read_device,
    read_request,
    said_ways,
)
from megatron_telechat.cli.tool import interrupted
from megatron_telechat.errors import EXIT_NO_FIT, EXIT_OK, ConfigError, UserError
from megatron_telechat.planner.context import SPLIT

if TYPE_CHECKING:  # the solver's libraries are loaded when there is something to solve: --help is quick
    from megatron_telechat.planner.assignment import Solution
    from megatron_telechat.planner.plan import Question
    from megatron_telechat.planner.problem import BalanceProblem


def main(argv: Sequence[str] | None = None) -> int:
    """Plan, sweep, solve or calibrate; the exit code of the error where one stands in the way.

    Under torchrun, what all ranks find wrong before they meet is said by the first alone.
    """
    quiet = os.environ.get("RANK", "0") != "0"
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        distributed = sys.modules.get("torch.distributed")
        if not quiet or distributed is not None and distributed.is_initialized():
            print(error.render(), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return interrupted()


def _run(argv: list[str]) -> int:
    request = read_request(argv)
    options = request.options
    for note in request.notes:
        print(f"note: {note}", file=sys.stderr)
    chosen = [name for name in ("problem", "sweep", "calibrate") if getattr(options, name)]
    if len(chosen) > 1:
        raise ConfigError(f"--{' and --'.join(chosen)} cannot be combined", "command line", "give one of them")
    if options.reserve_gib is not None and not 0 <= options.reserve_gib < float("inf"):
        raise ConfigError(f"--reserve-gib {options.reserve_gib:g}", "command line", "a number of GiB, at least 0")
    if options.from_ and (options.sweep or options.problem):
        raise ConfigError(
            "--from belongs to --calibrate, or to the plan of one layout: a run says nothing of other sizes",
            "command line",
            "drop --from, or --sweep and --problem",
        )
    if options.frontier and not options.sweep:
        raise ConfigError("--frontier belongs to --sweep", "command line", "--sweep --frontier memory, or drop it")
    if options.problem:
        return _problem(request)
    if options.calibrate:
        from megatron_telechat.cli.tool import quiet_imports

        if not options.output:
            raise ConfigError("--calibrate needs --output", "command line", "--output FILE.yaml")
        if options.from_:
            from megatron_telechat.cli.calibrate_from import calibrate_from_door

            return calibrate_from_door(request)
        if options.rounds < 1:
            raise ConfigError(f"--rounds {options.rounds}", "command line", "at least 1")
        quiet_imports()
        from megatron_telechat.cli.calibrate import calibrate_door

        return calibrate_door(request)
    if options.frontier:
        from megatron_telechat.cli.plan_frontier import frontier_door

        return frontier_door(request)
    if options.sweep:
        from megatron_telechat.cli.plan_sweep import sweep_door

        return sweep_door(request)
    return _plan(request)


def _problem(request: Request) -> int:
    """--problem FILE: the abstract problem, in its own units."""
    from megatron_telechat.planner.problem import BalanceProblem
    from megatron_telechat.planner.solve import solve
    from megatron_telechat.planner.worker import processors

    options = request.options
    if request.words or options.device or options.plain_flags or options.output or options.slow_stage:
        others = [*request.words[:3], *(f"--{name}" for name in ("device", "output") if getattr(options, name))]
        others += ["--plain-flags"] * options.plain_flags
        others += ["--slow-stage (a problem has slow_stage)"] * bool(options.slow_stage)
        raise ConfigError(f"--problem needs no other input; {' '.join(others)} cannot be "
                          f"combined with it", "command line",
                          "leave it out; --time-limit, --gap, --json and --plot do")  # fmt: skip
    try:
        text = sys.stdin.read() if options.problem == "-" else Path(options.problem).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(
            f"cannot read {options.problem}: {reason}", "--problem", "name a JSON file, or - for stdin"
        ) from None
    problem = BalanceProblem.from_json(text, options.problem)
    solution = solve(problem, options.time_limit, gap=options.gap, processes=options.processes or processors())
    if options.json:
        print(json.dumps(solution.to_json()))
    else:
        from megatron_telechat.cli.plan_report import problem_text

        print(problem_text(problem, solution))
    if options.plot and solution.assignment is not None:
        from megatron_telechat.cli.plan_picture import draw

        draw(problem, solution.assignment, Path(options.plot), title=Path(options.problem).name)
    return EXIT_OK


def _plan(request: Request) -> int:
    from megatron_telechat.cli.plan_report import plan_json, plan_text
    from megatron_telechat.planner.plan import best_plan, plainer

    loaded = request.load()
    device, run = read_device(request.options.device, loaded.run)
    if request.options.from_:
        from megatron_telechat.cli.calibrate_from import device_of_run

        device, lines = device_of_run(request, device)
        for line in lines:
            print(f"note: {line}", file=sys.stderr)
    question = question_of(request, loaded, run, device)
    plan, solution, problem = best_plan(question, {*SPLIT, *said_ways(loaded)})
    if plan is None:
        return _no_plan(request, question, problem, solution, loaded.notes)
    configured, why_not = request.as_configured()
    if configured is not None:
        configured = on_device(configured, device)
    others = plainer(plan, configured, why_not)
    if request.options.json:
        print(json.dumps(plan_json(plan, others)))
    else:
        print(plan_text(plan, others, loaded.notes, loaded.given if request.pasted else {}))
    write_answers(request, plan)
    return EXIT_OK


def _no_plan(
    request: Request, question: Question, problem: BalanceProblem, solution: Solution, notes: Sequence[str]
) -> int:
    """Why there is none, and the smallest changes with which there is one; no file is written. Returns EXIT_NO_FIT."""
    from megatron_telechat.cli.plan_report import model_json, no_plan_text, notes_of
    from megatron_telechat.planner.remedy import remedies, shortage

    lack = shortage(problem) if solution.status == "infeasible" else None
    parallel = question.run.parallel
    pinned = ("--world-size", str(parallel.world_size))
    pinned += ("--num-virtual-stages-per-pipeline-rank", str(parallel.num_virtual_stages_per_pipeline_rank))
    changes = remedies(question, lambda *flags: request.load(*pinned, *flags).run) if lack else []
    if request.options.json:
        print(
            json.dumps(
                {
                    **solution.to_json(),
                    "model": model_json(question.run.model),
                    "stage": lack and lack.stage,
                    "changes": [vars(change) for change in changes],
                }
            )
        )
    else:
        print("\n".join([no_plan_text(question, problem, solution, lack, changes), *notes_of(notes)]))
    return EXIT_NO_FIT
