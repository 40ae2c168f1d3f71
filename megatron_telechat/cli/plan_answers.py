"""The files that plan_pipeline writes: the plan for the training, and its picture."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_telechat.cli.plan_request import Request
from megatron_telechat.errors import ResourceError

if TYPE_CHECKING:  # the solver's libraries are loaded when there is something to solve: --help is quick
    from megatron_telechat.planner.plan import Plan


def write_answers(request: Request, plan: Plan) -> None:
    """The plan file and the picture, where they are asked for."""
    options = request.options
    if options.output:
        from megatron_telechat.cli.plan_report import plan_file

        text = json.dumps(plan_file(plan, options.output).to_json(), indent=1) + "\n"
        write_text(options.output, text)
        if not options.json:
            print(f"written: {options.output}  (train with --plan {options.output})")
    if options.plot:
        from megatron_telechat.cli.plan_picture import draw

        run = plan.question.run
        draw(
            plan.problem,
            plan.assignment,
            Path(options.plot),
            title=f"{run.model.name} on {plan.question.device.name}",
            real=True,
        )


def write_text(path: str, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        ResourceError: it cannot be written.
    """
    target = Path(path)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(target)
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error.strerror}", "--output", "name a file you may write") from None
