"""The report of --dry-run --execute: what virtual ranks did, beside what was predicted of them."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from megatron_telechat.cli.text import flop_text, gib, ranges, table
from megatron_telechat.config import LoadedConfig
from megatron_telechat.config.flags import Actions
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.memory import stage_memory
from megatron_telechat.errors import ConfigError, ResourceError
from megatron_telechat.virtual.compare import ONCE_A_STEP, exchange_seconds, exchanged, kernel_seconds
from megatron_telechat.virtual.launch import VirtualRankError, executable, execute, one_of_each_stage, played_device
from megatron_telechat.virtual.match import Match, match
from megatron_telechat.virtual.records import RankRecord, ScopeWork

MOST_MATCHED = 64
"""Ranks of a world that are all executed, to compare them."""
MOST_SHOWN = 32
"""Rows of the table of ranks, and problems of the matching, that are printed."""
SMALL_BYTES = 1 << 20
"""Exchanges below this many bytes a step, such as counts and flags, are drawn together."""


def execute_report(loaded: LoadedConfig) -> str:
    """Execute the ranks that the command asks for, and describe what they did.

    Raises:
        ConfigError: a run that is not for CUDA, or ranks that it does not have.
        ResourceError: no compiler, or a rank that failed; its traceback is printed.
    """
    run = executable(loaded.run)
    ranks = chosen_ranks(run, loaded.actions)
    json_file = Path(loaded.actions.execute_json) if loaded.actions.execute_json else None
    if json_file is not None:
        _write(json_file, "", "a")  # can it be written? asked before minutes of work
    try:
        records = execute(run, ranks, _tell)
    except VirtualRankError as error:
        print(error.details, file=sys.stderr)
        raise
    met = match(records) if loaded.actions.execute_all else None
    if json_file is not None:
        _write(json_file, json_text(loaded.run, run, records, met))
    text = "\n".join(
        [
            "",
            f"executed  ({len(records)} virtual rank{'s' * (len(records) > 1)} on {played_device().name}, "
            f"{run.num_microbatches} of {loaded.run.num_microbatches} micro-batches; docs/virtual.md says what this "
            "shows)",
            *(f"  {line}".rstrip() for line in _sections(loaded.run, run, records, met)),
        ]
    )
    if met is not None and met.problems:
        print(text)
        raise ResourceError(
            f"the ranks do not meet: {met.problems[0]}", "--execute-all", "this is a bug, please report it"
        )
    return text


def chosen_ranks(run: RunConfig, actions: Actions) -> list[int]:
    """The ranks to execute.

    Raises:
        ConfigError: all of more ranks than are compared.
    """
    world = run.parallel.world_size
    if actions.execute_all:
        if world > MOST_MATCHED:
            raise ConfigError(
                f"--execute-all executes every rank, {MOST_MATCHED} at most; the run has {world}",
                "--execute-all",
                f"--world-size {MOST_MATCHED} or less with fewer data-parallel ranks, or --execute",
            )
        return list(range(world))
    return list(actions.execute_ranks) or one_of_each_stage(run)


def _tell(record: RankRecord) -> None:
    print(
        f"virtual rank {record.rank}: {record.seconds:.0f} s, {gib(record.host_bytes)} GiB here",
        file=sys.stderr,
        flush=True,
    )


def _sections(whole: RunConfig, run: RunConfig, records: Sequence[RankRecord], met: Match | None) -> list[str]:
    lines = _memory(run, records)
    for record in _one_a_stage(records):
        lines += ["", *_exchanges(whole, record)]
    lines += ["", *_layers(run, records), "", *_times(whole, records)]
    lines += ["", *_waits(records)]
    if met is not None:
        found = f"{len(met.problems)} problems" if met.problems else "all meet"
        lines += [
            "", f"matching: {met.groups} groups, {met.compared} collectives and messages compared: {found}",
            *(f"  ! {problem}" for problem in met.problems[:MOST_SHOWN]),
        ]  # fmt: skip
    return lines


def _one_a_stage(records: Sequence[RankRecord]) -> list[RankRecord]:
    return list({record.stage: record for record in reversed(records)}.values())[::-1]


def _memory(run: RunConfig, records: Sequence[RankRecord]) -> list[str]:
    stages = stage_memory(run)
    rows = [
        ["rank", "stage", "resident", "forward, backward", "optimizer", "peak GiB", "modelled", "executed/modelled"]
    ]
    for record in records[:MOST_SHOWN]:
        modelled = stages[record.stage].total_bytes
        rows.append(
            [
                str(record.rank), str(record.stage), gib(record.resident_bytes),
                gib(record.peaks.get("forward and backward", 0)), gib(record.peaks.get("optimizer", 0)),
                gib(record.peak_bytes), gib(modelled), f"{record.peak_bytes / modelled:.3f}",
            ]
        )  # fmt: skip
    if len(records) > MOST_SHOWN:
        rows.append([f"  ... {len(records) - MOST_SHOWN} more ranks"])
    return table(rows)


def _exchanges(whole: RunConfig, record: RankRecord) -> list[str]:
    rows = [[f"a step of rank {record.rank}", "kind", "calls", "GiB", "modelled", "executed/modelled"]]
    small = 0.0
    for entry in exchanged(whole, record):
        if entry.bytes < SMALL_BYTES and entry.modelled is None:
            small += entry.bytes
            continue
        share = f"{entry.bytes / entry.modelled:.3f}" if entry.modelled else "-"
        modelled = gib(entry.modelled) if entry.modelled is not None else "-"
        rows.append([entry.group, entry.kind, f"{entry.calls:.0f}", gib(entry.bytes), modelled, share])
    return [*table(rows, left=(0, 1)), f"and {small / 1024:.0f} KiB of counts and flags"]


def _layers(run: RunConfig, records: Sequence[RankRecord]) -> list[str]:
    """Launches, FLOPs and bytes of a layer of each kind, of one micro-batch, and a time under a simple model."""
    rows = [["a micro-batch of", "launches", "FLOP", "GiB moved", "bound by", "ms"]]
    for moe in (False, True):
        for way in ("forward", "backward"):
            found = [
                (layer, record)
                for record in _one_a_stage(records)
                for layer in range(run.model.num_layers)
                if run.model.layer_is_moe(layer) == moe and f"layer {layer} {way}" in record.work
            ]
            if found:
                # One in the middle: the first and the last share their scope with the ends of a stage.
                layer, record = found[len(found) // 2]
                name = f"{'MoE' if moe else 'dense'} layer, {way} ({layer})"
                work = record.work[f"layer {layer} {way}"]
                rows.append([name, *_work_row(work, record.microbatches, run.training.precision)])
    return table(rows) if len(rows) > 1 else ["no layer was executed"]


def _times(whole: RunConfig, records: Sequence[RankRecord]) -> list[str]:
    """Seconds of a step of a rank of each stage, if nothing waited and nothing overlapped."""
    rows = [["a step by these limits", "kernels s", "exchanges s"]]
    for record in _one_a_stage(records):
        kernels = 0.0
        for scope, work in record.work.items():
            factor = 1.0 if scope in ONCE_A_STEP else whole.num_microbatches / record.microbatches
            kernels += factor * max(kernel_seconds(work, whole.training.precision, played_device()).values())
        seconds = sum(exchange_seconds(whole, entry, played_device()) for entry in exchanged(whole, record))
        rows.append([f"rank {record.rank}, stage {record.stage}", f"{kernels:.3f}", f"{seconds:.3f}"])
    return table(rows)


def _work_row(work: ScopeWork, microbatches: int, precision: str) -> list[str]:
    times = kernel_seconds(work, precision, played_device())
    bound = max(times, key=lambda name: times[name])
    launches, flops, moved, seconds = (
        value / microbatches for value in (work.launches, work.flops, work.bytes, times[bound])
    )
    return [f"{launches:.0f}", flop_text(flops), gib(moved), bound, f"{seconds * 1e3:.2f}"]


def _waits(records: Sequence[RankRecord]) -> list[str]:
    """Where the host waits for the device, over all ranks that were executed."""
    at: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    for record in records:
        for what, place, count in record.syncs:
            at[what, place][record.rank] = count
    if not at:
        return ["the host waits nowhere"]
    rows = [["the host waits at", "for", "times a step", "ranks"]]
    for (what, place), counts in sorted(at.items(), key=lambda item: -max(item[1].values())):
        low, high = min(counts.values()), max(counts.values())
        rows.append([place, what, str(low) if low == high else f"{low}-{high}", ranges(counts)])
    return table(rows, left=(0, 1, 3))


def json_text(whole: RunConfig, run: RunConfig, records: Sequence[RankRecord], met: Match | None) -> str:
    """Everything that was recorded, the single exchanges drawn together."""
    stages = stage_memory(run)
    document = {
        "microbatches": {"executed": run.num_microbatches, "of": whole.num_microbatches},
        "ranks": [
            {
                **{key: value for key, value in asdict(record).items() if key != "calls"},
                "peak_bytes": record.peak_bytes,
                "modelled_bytes": stages[record.stage].total_bytes,
                "exchanges": [asdict(entry) for entry in exchanged(whole, record)],
            }
            for record in records
        ],
        "match": asdict(met) if met is not None else None,
    }
    return json.dumps(document, indent=1)


def _write(path: Path, text: str, mode: Literal["w", "a"] = "w") -> None:
    try:
        with path.open(mode, encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise ResourceError(
            f"cannot write what is executed: {error.strerror}", str(path), "name a file in a folder that exists"
        ) from error
