"""The report of --dry-run --execute: what virtual ranks did, beside what was predicted of them."""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_telechat.cli.text import flop_text, gib, ranges, table
from megatron_telechat.config import LoadedConfig
from megatron_telechat.config.flags import Actions
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs import DeviceSpec, device_spec
from megatron_telechat.costs.communication import Links
from megatron_telechat.costs.memory import stage_memory
from megatron_telechat.costs.volumes import Volume, stage_volumes
from megatron_telechat.errors import ConfigError, ResourceError
from megatron_telechat.virtual.launch import MOST_MATCHED, VirtualRankError, executable, execute, one_of_each_stage
from megatron_telechat.virtual.match import MESSAGES, Match, match
from megatron_telechat.virtual.records import Call, RankRecord, ScopeWork

PLAYED = "h100-80g"
"""Device file of the device that is played."""
LAUNCH_S = 4e-6
"""Seconds from one kernel to the next where the host is the limit."""

GROUPS = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "ep",
    "EXPERT_TENSOR_MODEL_AND_EXPERT_PARALLEL_GROUP": "ep",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "DATA_PARALLEL_GROUP": "dp",
    "DATA_PARALLEL_GROUP_WITH_CP": "dp",
    "EXPERT_DATA_PARALLEL_GROUP": "edp",
}
"""megatron-core's names of groups → those of `costs.volumes`; others keep their names."""
_ONCE_A_STEP = ("dp", "edp")
_STEP_SCOPES = ("end of the step", "optimizer")
SMALL_BYTES = 1 << 20
"""Exchanges below this many bytes a step, such as counts and flags, are drawn together."""


@dataclass(frozen=True)
class Exchanged:
    """Bytes of one kind of exchange of one group in a step of all its micro-batches.

    Attributes:
        calls, bytes: executed.
        modelled: bytes by `costs.volumes`; None where it has no figure.
    """

    group: str
    kind: str
    calls: float
    bytes: float
    modelled: float | None


def execute_report(loaded: LoadedConfig) -> str:
    """Execute the ranks that the command asks for, and describe what they did.

    Raises:
        ConfigError: a run that is not for CUDA, or ranks that it does not have.
        ResourceError: no compiler, or a rank that failed; its traceback is printed.
    """
    run = executable(loaded.run)
    device = device_spec(PLAYED)
    assert device is not None, "a device file of the package"
    ranks = chosen_ranks(run, loaded.actions)
    try:
        records = execute(run, ranks, device, done=_tell)
    except VirtualRankError as error:
        print(error.details, file=sys.stderr)
        raise
    met = match(records) if loaded.actions.execute_all else None
    if loaded.actions.execute_json:
        write_json(Path(loaded.actions.execute_json), loaded.run, run, records, met)
    lines = [
        "",
        f"executed  ({len(records)} virtual rank{'s' * (len(records) > 1)} on {device.name}, {run.num_microbatches} of "
        f"{loaded.run.num_microbatches} micro-batches; docs/virtual.md says what this shows)",
        *(f"  {line}" for line in _sections(loaded.run, run, records, device, met)),
    ]
    if met is not None and met.problems:
        print("\n".join(lines))
        raise ResourceError(
            f"the ranks do not meet: {met.problems[0]}", "--execute-all", "this is a bug, please report it"
        )
    return "\n".join(line.rstrip() for line in lines)


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


def exchanged(whole: RunConfig, executed: RunConfig, record: RankRecord) -> list[Exchanged]:
    """What the rank exchanges in a step of the whole run, beside what is modelled.

    Args:
        whole: the run.
        executed: the run with the micro-batches that were executed.
        record: of a rank.
    """
    found: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for call in record.calls:
        factor = 1.0 if _once_a_step(call) else whole.num_microbatches / executed.num_microbatches
        total = found[group_of(call), call.kind]
        total[0] += factor
        total[1] += factor * call.bytes
    modelled: Mapping[tuple[str, str], Volume] = stage_volumes(whole, record.stage)
    entries = []
    for group, kind in sorted({*found, *modelled}):
        calls, executed_bytes = found.get((group, kind), (0.0, 0.0))
        volume = modelled.get((group, kind))
        entries.append(
            Exchanged(
                group, kind, calls, executed_bytes, None if volume is None else volume.of_step(whole.num_microbatches)
            )
        )
    return entries


def group_of(call: Call) -> str:
    """Short name of the call's group."""
    if call.kind in MESSAGES:  # between two stages megatron-core sends one direction through the group of all ranks
        return "pp"
    return GROUPS.get(call.description, call.description.lower() or "world")


def _once_a_step(call: Call) -> bool:
    return group_of(call) in _ONCE_A_STEP or call.scope in _STEP_SCOPES or group_of(call) not in GROUPS.values()


def _sections(
    whole: RunConfig, run: RunConfig, records: Sequence[RankRecord], device: DeviceSpec, met: Match | None
) -> list[str]:
    lines = _memory(run, records)
    for record in _one_a_stage(records):
        lines += ["", *_exchanges(whole, run, record)]
    lines += ["", *_layers(run, records, device), "", *_times(whole, run, records, device)]
    lines += ["", *_waits(records)]
    if met is not None:
        found = f"{len(met.problems)} problems" if met.problems else "all meet"
        lines += [
            "", f"matching: {met.groups} groups, {met.compared} collectives and messages compared: {found}",
            *(f"  ! {problem}" for problem in met.problems[:20]),
        ]  # fmt: skip
    return lines


def _one_a_stage(records: Sequence[RankRecord]) -> list[RankRecord]:
    return list({record.stage: record for record in reversed(records)}.values())[::-1]


def _memory(run: RunConfig, records: Sequence[RankRecord]) -> list[str]:
    stages = stage_memory(run)
    rows = [
        ["rank", "stage", "resident", "forward, backward", "optimizer", "peak GiB", "modelled", "executed/modelled"]
    ]
    for record in records[:32]:
        modelled = stages[record.stage].total_bytes
        rows.append(
            [
                str(record.rank), str(record.stage), gib(record.resident_bytes),
                gib(record.peaks.get("forward and backward", 0)), gib(record.peaks.get("optimizer", 0)),
                gib(record.peak_bytes), gib(modelled), f"{record.peak_bytes / modelled:.3f}",
            ]
        )  # fmt: skip
    if len(records) > 32:
        rows.append([f"  ... {len(records) - 32} more ranks"])
    return table(rows)


def _exchanges(whole: RunConfig, run: RunConfig, record: RankRecord) -> list[str]:
    rows = [[f"a step of rank {record.rank}", "kind", "calls", "GiB", "modelled", "executed/modelled"]]
    small = 0.0
    for entry in exchanged(whole, run, record):
        if entry.bytes < SMALL_BYTES and entry.modelled is None:
            small += entry.bytes
            continue
        share = f"{entry.bytes / entry.modelled:.3f}" if entry.modelled else "-"
        modelled = gib(entry.modelled) if entry.modelled is not None else "-"
        rows.append([entry.group, entry.kind, f"{entry.calls:.0f}", gib(entry.bytes), modelled, share])
    return [*table(rows, left=(0, 1)), f"and {small / 1024:.0f} KiB of counts and flags"]


def _layers(run: RunConfig, records: Sequence[RankRecord], device: DeviceSpec) -> list[str]:
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
                rows.append([name, *_work_row(work, record.microbatches, run, device)])
    return table(rows) if len(rows) > 1 else ["no layer was executed"]


def _times(whole: RunConfig, run: RunConfig, records: Sequence[RankRecord], device: DeviceSpec) -> list[str]:
    """Seconds of a step of a rank of each stage, if nothing waited and nothing overlapped."""
    rows = [["a step by these limits", "kernels s", "exchanges s"]]
    for record in _one_a_stage(records):
        kernels = 0.0
        for scope, work in record.work.items():
            factor = 1.0 if scope in _STEP_SCOPES else whole.num_microbatches / run.num_microbatches
            times = kernel_seconds(work.launches, work.flops, work.bytes, run.training.precision, device)
            kernels += factor * max(times.values())
        entries = exchanged(whole, run, record)
        seconds = sum(exchange_seconds(whole, entry, device) for entry in entries)
        rows.append([f"rank {record.rank}, stage {record.stage}", f"{kernels:.3f}", f"{seconds:.3f}"])
    return table(rows)


def exchange_seconds(run: RunConfig, entry: Exchanged, device: DeviceSpec) -> float:
    """Seconds of these exchanges on the links of the device, as `costs.communication` takes them.

    Args:
        run: for the sizes of the groups.
        entry: of one group and kind, for a step.
        device: its links.
    """
    links, parallel = Links.of(run, device), run.parallel
    stage = parallel.world_size // parallel.pipeline_model_parallel_size
    tensor, experts = parallel.tensor_model_parallel_size, math.prod(parallel.expert_sizes)
    places = {
        "tp": (tensor, 1),
        "ep": (experts, 1),
        "dp": (stage // tensor, tensor),
        "edp": (stage // experts, experts),
    }
    if not entry.calls:
        return 0.0
    if entry.kind in MESSAGES:
        # A message is counted where it is sent.
        return (entry.kind == "send") * (entry.bytes / links.between(stage) + entry.calls * links.latency)
    size, stride = places.get(entry.group, (run.parallel.world_size, 1))
    each = entry.bytes / entry.calls
    if entry.kind == "all-to-all":
        return entry.calls * links.all_to_all(each, size)
    return entry.calls * links.gather(each, size, stride) * (2 if entry.kind == "all-reduce" else 1)


def _work_row(work: ScopeWork, microbatches: int, run: RunConfig, device: DeviceSpec) -> list[str]:
    launches, flops, moved = (value / microbatches for value in (work.launches, work.flops, work.bytes))
    times = kernel_seconds(launches, flops, moved, run.training.precision, device)
    bound = max(times, key=lambda name: times[name])
    return [
        f"{launches:.0f}", flop_text(flops), gib(moved), bound, f"{times[bound] * 1e3:.2f}",
    ]  # fmt: skip


def kernel_seconds(launches: float, flops: float, moved: float, precision: str, device: DeviceSpec) -> dict[str, float]:
    """Seconds by each of the three limits of a device: its arithmetic, its memory, and the host that launches."""
    peak = (device.peak(precision) or float("inf")) * 1e12 * device.efficiency.get("gemm", 1.0)
    bandwidth = (device.hbm_bandwidth_gb_s or float("inf")) * 1e9 * device.efficiency.get("hbm", 1.0)
    return {"arithmetic": flops / peak, "memory": moved / bandwidth, "launches": launches * LAUNCH_S}


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


def write_json(path: Path, whole: RunConfig, run: RunConfig, records: Sequence[RankRecord], met: Match | None) -> None:
    """Everything that was recorded.

    Raises:
        ResourceError: the file cannot be written.
    """
    stages = stage_memory(run)
    document = {
        "microbatches": {"executed": run.num_microbatches, "of": whole.num_microbatches},
        "ranks": [
            {
                **{key: value for key, value in asdict(record).items() if key != "calls"},
                "peak_bytes": record.peak_bytes,
                "modelled_bytes": stages[record.stage].total_bytes,
                "exchanges": [asdict(entry) for entry in exchanged(whole, run, record)],
            }
            for record in records
        ],
        "match": asdict(met) if met is not None else None,
    }
    try:
        path.write_text(json.dumps(document, indent=1), encoding="utf-8")
    except OSError as error:
        raise ResourceError(
            f"cannot write what was executed: {error.strerror}", str(path), "name a file in a folder that exists"
        ) from error
