"""--sweep of plan_pipeline: parallel layouts of a cluster in a ranked table."""

from __future__ import annotations

import itertools
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_telechat.cli.model_text import model_text
from megatron_telechat.cli.plan_answers import write_answers
from megatron_telechat.cli.plan_report import megatron_line, notes_of, plan_file, plan_flags, speed
from megatron_telechat.cli.plan_request import Request, question_of, read_device, said_ways
from megatron_telechat.cli.text import context_text, gib, table
from megatron_telechat.config import LoadedConfig
from megatron_telechat.config.fields import values_of
from megatron_telechat.config.megatron.meaning import MEGATRON
from megatron_telechat.config.origins import DEFAULT, DERIVED
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.errors import EXIT_NO_FIT, EXIT_OK, ConfigError
from megatron_telechat.planner.build import UNLIMITED_BYTES
from megatron_telechat.planner.context import KEEP_FLAGS, LEAST_TOKENS, SIZE, context_sizes
from megatron_telechat.planner.plan import Plan, Question
from megatron_telechat.planner.space import (
    EXPERT,
    EXPERT_TENSOR,
    FLAGS,
    GROUP,
    MICRO,
    MOST_VIRTUAL_STAGES,
    NO_FOLD,
    OFFLOAD,
    PIPELINE,
    TENSOR,
    VIRTUAL,
    Layout,
    Load,
    divisors,
    layouts,
)
from megatron_telechat.planner.sweep import GAP, Ranking, sweep
from megatron_telechat.planner.worker import processors


@dataclass(frozen=True)
class Asked:
    """A space to sweep.

    Attributes:
        question: with the run, and the batch of all layouts.
        fixed: what keeps its value.
        offload: whether the optimizer's state may go to the host.
        space: the layouts.
        load: the configuration with some flags added.
        loaded: without any.
    """

    question: Question
    fixed: Mapping[str, Any]
    offload: bool
    space: Sequence[Layout]
    load: Load
    loaded: LoadedConfig


def sweep_door(request: Request) -> int:
    """Rank the layouts of --world-size ranks; --output and --plot are those of the first.

    Raises:
        ConfigError: no number of ranks; no layout that the configuration takes.
    """
    options = request.options
    if options.top < 1:
        raise ConfigError(f"--top {options.top}", "command line", "at least 1")
    asked = asked_of(request)
    processes = options.processes or processors()
    ranking = sweep(asked.space, asked.load, options.top, options.time_limit, options.gap or GAP, processes)
    if options.json:
        print(json.dumps(_json(ranking)))
    else:
        lines = _text(ranking, asked.question, options.time_limit, processes)
        print("\n".join([*lines, *space_text(asked), *notes_of(asked.loaded.notes)]))
    if ranking.plans:
        write_answers(request, ranking.plans[0][1])
        return EXIT_OK
    return EXIT_NO_FIT


def asked_of(request: Request, *changes: str) -> Asked:
    """The space that a request asks for, with these flags in place of what it says of the same.

    Raises:
        ConfigError: no number of ranks; no layout that the configuration takes.
    """
    options = request.options
    loaded = request.load(*changes)
    if loaded.origins["world_size"] == "derived":
        raise ConfigError("the sweep needs a number of ranks", "command line", "--world-size N")

    def load(*flags: str) -> RunConfig:
        return request.load(*changes, *flags).run

    device, run = read_device(options.device, _least_batch(load, loaded))
    values = values_of(loaded.run)
    freed = freed_sizes(options.free)
    given = {name: values[name] for name in FLAGS if loaded.origins[name].startswith("flag") and values[name]}
    fixed = {name: value for name, value in given.items() if name not in freed}
    fixed |= {name: values[name] for name in said_ways(loaded) if "context_parallel_size" not in freed}
    said = not loaded.origins[OFFLOAD].startswith((DEFAULT, DERIVED, MEGATRON, "preset "))
    fixed |= {OFFLOAD: values[OFFLOAD]} if said and OFFLOAD not in freed else {}
    question = question_of(request, loaded, run, device)
    offload = OFFLOAD not in fixed and not request.pasted and bool(device.host_bandwidth_gb_s)
    found = layouts(question, load, fixed, offload)
    if not found:
        raise ConfigError(
            f"no parallel layout of {run.parallel.world_size} ranks fits this run",
            "--sweep",
            "another --world-size, a --global-batch-size with more divisors, or fewer fixed sizes",
        )
    return Asked(question, fixed, offload, found, load, loaded)


def _least_batch(load: Load, loaded: LoadedConfig) -> RunConfig:
    """The run with the batch of all layouts: one that nobody gave has grown to what this layout needs, and others may
    need less."""
    run = loaded.run
    if loaded.origins["global_batch_size"] != DERIVED:
        return run
    parallel, least = run.parallel, run.training.global_batch_size
    for tensor, stages in itertools.product(divisors(parallel.node_size), divisors(parallel.world_size)):
        try:
            other = load(FLAGS[TENSOR], str(tensor), FLAGS[PIPELINE], str(stages), FLAGS[VIRTUAL], "1")
        except ConfigError:
            continue
        least = min(least, other.training.global_batch_size)
    return replace(run, training=replace(run.training, global_batch_size=least))


def _json(ranking: Ranking) -> list[dict[str, Any]]:
    """The plans; the first of them with what was proved of the space."""
    found: list[dict[str, Any]] = [
        {"flags": list(layout_flags(flags, plan)), "plan": plan_file(plan, "").to_json()}
        for flags, plan in ranking.plans
    ]
    if found:
        found[0]["proof"] = {**asdict(ranking.proof), "gap": ranking.proof.gap}
    return found


SHORT = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vp": "num_virtual_stages_per_pipeline_rank",
    "group": "microbatch_group_size_per_virtual_pipeline_stage",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "mbs": "micro_batch_size",
    "offload": "optimizer_cpu_offload",
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


def layout_flags(flags: tuple[str, ...], plan: Plan) -> tuple[str, ...]:
    """Sizes of the sweep, and the plan's own flags; what is in both is said once."""
    own = plan_flags(plan)
    sizes = (word for word in _without(flags, VIRTUAL, GROUP) if word not in KEEP_FLAGS.values())
    return (*sizes, *own)


def _without(flags: tuple[str, ...], *names: str) -> tuple[str, ...]:
    """Flags without those of these sizes."""
    for name in names:
        if FLAGS[name] in flags:
            at = flags.index(FLAGS[name])
            flags = (*flags[:at], *flags[at + 2 :])
    return flags


def space_text(asked: Asked) -> list[str]:
    """What the proof is about: what was varied, how far, and what was held."""
    run, device, fixed, offload = asked.question.run, asked.question.device, asked.fixed, asked.offload
    parts = {
        TENSOR: "tensor-parallel sizes inside a node",
        PIPELINE: "pipeline sizes",
        VIRTUAL: f"1 to {MOST_VIRTUAL_STAGES} virtual stages a rank",
        GROUP: "the two smallest groups of micro-batches, 2 x PP, and all at once",
        MICRO: "micro-batches that are powers of two",
        SIZE: f"context-parallel sizes that leave a rank {LEAST_TOKENS:,} tokens, with each split and what is kept",
        EXPERT: "expert-parallel sizes",
        EXPERT_TENSOR: "expert-tensor-parallel sizes",
    }
    left = {name for name in (EXPERT, EXPERT_TENSOR) if not run.model.is_moe}
    left |= {SIZE} if context_sizes(run) == [1] else set()
    varied = [text for name, text in parts.items() if name not in left and name not in fixed]
    varied += ["the optimizer's state on the device or on the host"] * offload
    lines = [f"the space: {'; '.join([*varied, 'every split of the layers, and what each recomputes'])}"]
    if not device.host_bandwidth_gb_s and OFFLOAD not in fixed:
        lines.append(
            f"  not in it: the optimizer's state on the host, since host_bandwidth_gb_s of {device.name} is not known"
        )
    return [*lines, *(f"counted: {text}" for text in asked.question.counted), *_held(fixed)]


def _proof(ranking: Ranking, limit_s: float, processes: int, slow_stage: float) -> list[str]:
    proof = ranking.proof
    counts = [
        (proof.no_fit, "do not fit the memory"),
        (proof.by_work, "take longer by their work alone"),
        (proof.by_relaxation, "by a relaxation"),
        (proof.searched, "searched"),
        (proof.refused, "refused by the configuration"),
        (proof.unseen, "not looked at"),
    ]
    said = ", ".join(f"{number:,} {text}" for number, text in counts if number)
    took = f"{proof.seconds:.1f} s, {processes} process{'es' * (processes > 1)}"
    if not math.isfinite(proof.step):
        left = (
            f"; {proof.unseen:,} were not looked at: --time-limit {limit_s * 3:g} covers more" if proof.unseen else ""
        )
        return [f"  {proof.layouts:,} layouts: {said} ({took}){left}"]
    closed = proof.gap <= ranking.gap * (1 + 1e-6)
    what = "proof" if closed else f"! not closed in {limit_s:g} s"
    claim = f"no layout of the space is faster than the first by more than {proof.gap:.2%} under this model"
    claim += f", each in its worst case (one stage {slow_stage:.1%} slower)" if slow_stage else ""
    more = "" if closed else "; a longer --time-limit goes on"
    return [f"{what}: {claim}{more} ({took})", f"  {proof.layouts:,} layouts: {said}"]


def _text(ranking: Ranking, question: Question, limit_s: float, processes: int) -> list[str]:
    run, device = question.run, question.device.name
    number = f"{ranking.proof.layouts:,} parallel layouts"
    lines = [f"{run.model.name} on {run.parallel.world_size} x {device}: {number}", f"  {model_text(run.model)}"]
    proof = _proof(ranking, limit_s, processes, question.slow_stage)
    if not ranking.plans:
        return [
            *lines,
            *proof,
            "",
            "no layout was found that fits: use more ranks, --recompute-kinds full, or a larger device",
        ]
    moe = any(plan.question.run.model.is_moe for _, plan in ranking.plans)
    slow = question.slow_stage > 0
    grouped = any(plan.problem.group_size for _, plan in ranking.plans)
    offloaded = any(plan.question.run.parallel.optimizer_cpu_offload for _, plan in ranking.plans)
    shared = any(plan.question.run.parallel.context_parallel_size > 1 for _, plan in ranking.plans)
    rows = [
        [
            "",
            "TP",
            "PP",
            "VP",
            *["group"] * grouped,
            *["CP"] * shared,
            *["EP", "ETP"] * moe,
            *["optimizer"] * offloaded,
            "DP",
            "micro-batch",
            "tokens/s a device",
            "TFLOP/s",
            "MFU",
            "step",
            *["worst"] * slow,
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
                *["-" if problem.V == 1 else str(problem.group_size or problem.P)] * grouped,
                *[context_text(parallel)] * shared,
                *map(str, parallel.expert_sizes[: 2 * moe]),
                *["host" if parallel.optimizer_cpu_offload else "device"] * offloaded,
                str(parallel.data_parallel_size),
                str(plan.question.run.training.micro_batch_size),
                f"{plan.prediction.tokens_per_s_per_device:,.0f}",
                *speed(plan),
                f"{plan.prediction.iteration:.4g} s",
                *[f"{plan.worst_iteration:.4g} s"] * slow,
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
        "flags of the first: " + shlex.join(layout_flags(flags, plan)),
        megatron_line(plan, _sizes(flags)),
        "",
        *proof,
    ]


def _sizes(flags: tuple[str, ...]) -> tuple[str, ...]:
    """Sizes of the sweep in Megatron-LM's flags, which have no folded tensor domain; a layout string tells the virtual
    stages."""
    return tuple(word for word in _without(flags, VIRTUAL, GROUP) if word not in (NO_FOLD, *KEEP_FLAGS.values()))
