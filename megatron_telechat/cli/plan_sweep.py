"""--sweep of plan_pipeline: parallel layouts of a cluster in a ranked table."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from megatron_telechat.cli.model_text import model_text
from megatron_telechat.cli.plan_answers import write_answers
from megatron_telechat.cli.plan_report import megatron_line, notes_of, plan_file, plan_flags, speed
from megatron_telechat.cli.plan_request import Request, question_of, read_device, said_ways
from megatron_telechat.cli.text import context_text, gib, table
from megatron_telechat.config.fields import values_of
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.errors import EXIT_NO_FIT, EXIT_OK, ConfigError
from megatron_telechat.planner.build import UNLIMITED_BYTES
from megatron_telechat.planner.plan import Plan
from megatron_telechat.planner.sweep import FLAGS, Ranking, candidates, sweep


def sweep_door(request: Request) -> int:
    """Rank the layouts of --world-size ranks; --output and --plot are those of the first.

    Raises:
        ConfigError: no number of ranks; no layout that the configuration takes.
    """
    options = request.options
    if options.top < 1:
        raise ConfigError(f"--top {options.top}", "command line", "at least 1")
    loaded = request.load()
    if loaded.origins["world_size"] == "derived":
        raise ConfigError("the sweep needs a number of ranks", "command line", "--world-size N")
    device, run = read_device(options.device, loaded.run)
    values = values_of(loaded.run)
    freed = freed_sizes(options.free)
    given = {name: values[name] for name in FLAGS if loaded.origins[name].startswith("flag") and values[name]}
    fixed = {name: value for name, value in given.items() if name not in freed}
    fixed |= {name: values[name] for name in said_ways(loaded) if "context_parallel_size" not in freed}
    question = question_of(request, loaded, run, device)
    found = candidates(question, lambda *flags: request.load(*flags).run, fixed)
    if not found:
        raise ConfigError(
            f"no parallel layout of {run.parallel.world_size} ranks fits this run",
            "--sweep",
            "another --world-size, a --global-batch-size with more divisors, or fewer fixed sizes",
        )
    ranking = sweep(found, options.top, options.time_limit)
    if options.json:
        print(
            json.dumps(
                [
                    {"flags": list(_flags(flags, plan)), "plan": plan_file(plan, "").to_json()}
                    for flags, plan in ranking.plans
                ]
            )
        )
    else:
        held = _held(fixed)
        print("\n".join([*_text(ranking, run, device.name, options.time_limit), *held, *notes_of(loaded.notes)]))
    if ranking.plans:
        write_answers(request, ranking.plans[0][1])
        return EXIT_OK
    return EXIT_NO_FIT


SHORT = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vp": "num_virtual_stages_per_pipeline_rank",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "mbs": "micro_batch_size",
}
"""Words of --free → sizes that a sweep varies."""


def freed_sizes(text: str) -> set[str]:
    """Sizes that the sweep varies though they are given.

    Raises:
        ConfigError: a word that names none.
    """
    words = [word.strip().lower() for word in text.split(",") if word.strip()]
    wrong = [word for word in words if word not in (*SHORT, "all")]
    if wrong:
        raise ConfigError(f"--free {','.join(wrong)} names no size", "command line", f"of {','.join(SHORT)}, or all")
    return set(SHORT.values()) if "all" in words else {SHORT[word] for word in words}


def _held(fixed: Mapping[str, Any]) -> list[str]:
    """What the sweep did not vary, since it was given."""
    short = {name: word for word, name in SHORT.items()}
    sizes = [f"{short[name]} {value}" for name, value in fixed.items() if name in short]
    if not sizes:
        return []
    free = ",".join(short[name] for name in fixed if name in short)
    return [f"held fixed, as given: {', '.join(sizes)}; --free {free} (or a part of it) varies them too"]


def _flags(flags: tuple[str, ...], plan: Plan) -> tuple[str, ...]:
    """Sizes of the sweep, and the plan's own flags; the number of virtual stages is in both."""
    virtual = flags.index(FLAGS["num_virtual_stages_per_pipeline_rank"])
    return (*flags[:virtual], *flags[virtual + 2 :], *plan_flags(plan))


def _text(ranking: Ranking, run: RunConfig, device: str, limit_s: float) -> list[str]:
    tried = f"{ranking.tried} parallel layouts solved, {ranking.no_fit} of them do not fit the memory"
    lines = [f"{run.model.name} on {run.parallel.world_size} x {device}: {tried}", f"  {model_text(run.model)}"]
    if ranking.skipped:
        lines.append(f"  {ranking.skipped} more were ruled out: their work alone takes longer")
    if ranking.unseen:
        lines.append(
            f"  ! no time for {ranking.unseen} more, which look less promising: --time-limit {limit_s * 3:g} covers "
            f"more of them"
        )
    if not ranking.plans:
        return [*lines, "", "no layout was found that fits: use more ranks, --recompute-kinds full, or a larger device"]
    moe = any(plan.question.run.model.is_moe for _, plan in ranking.plans)
    shared = any(plan.question.run.parallel.context_parallel_size > 1 for _, plan in ranking.plans)
    rows = [
        [
            "",
            "TP",
            "PP",
            "VP",
            *["CP"] * shared,
            *["EP"] * moe,
            "DP",
            "micro-batch",
            "tokens/s a device",
            "TFLOP/s",
            "MFU",
            "step",
            "waits",
            "GiB",
            "of limit",
            "recomputed",
            "gap",
            "layers",
        ]
    ]
    for number, (_, plan) in enumerate(ranking.plans, 1):
        parallel, problem = plan.question.run.parallel, plan.problem
        peak = max(plan.peak_bytes)
        share = "-" if problem.mem_limit >= UNLIMITED_BYTES else f"{peak / (problem.mem_limit - problem.const_mem):.0%}"
        recomputed = sum(bool(mode) for mode in plan.planned.recompute)
        counts = " ".join(map(str, plan.assignment.counts))
        rows.append(
            [
                str(number),
                str(parallel.tensor_model_parallel_size),
                str(problem.P),
                str(problem.V),
                *[context_text(parallel)] * shared,
                *[str(parallel.expert_sizes[0])] * moe,
                str(parallel.data_parallel_size),
                str(plan.question.run.training.micro_batch_size),
                f"{plan.prediction.tokens_per_s_per_device:,.0f}",
                *speed(plan),
                f"{plan.prediction.iteration:.4g} s",
                f"{plan.prediction.bubble:.0%}",
                gib(peak),
                share,
                f"{recomputed} of {problem.num_layers}",
                f"{plan.gap:.1%}",
                counts if len(counts) <= 40 else counts[:37] + "...",
            ]
        )
    flags, plan = ranking.plans[0]
    return [
        *lines,
        "",
        *table(rows, left=(0, len(rows[0]) - 1)),
        "",
        "flags of the first: " + shlex.join(_flags(flags, plan)),
        megatron_line(plan, _sizes(flags)),
    ]


def _sizes(flags: tuple[str, ...]) -> tuple[str, ...]:
    """Sizes of the sweep in Megatron-LM's flags; a layout string tells the virtual stages."""
    virtual = flags.index(FLAGS["num_virtual_stages_per_pipeline_rank"])
    return (*flags[:virtual], *flags[virtual + 2 :])
