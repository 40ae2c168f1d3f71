"""What a virtual rank did beside what `costs` says of it; needs no torch."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs import DeviceSpec
from megatron_telechat.costs.communication import Links
from megatron_telechat.costs.volumes import stage_volumes
from megatron_telechat.parallel.topology import Topology
from megatron_telechat.virtual.match import MESSAGES
from megatron_telechat.virtual.records import Call, RankRecord, ScopeWork

LAUNCH_S = 4e-6
"""Seconds from one kernel to the next where the host is the limit."""

GROUPS = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "CONTEXT_PARALLEL_GROUP": "cp",
    "CONTEXT_HEADS": "cp",
    "CONTEXT_RING": "cp",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "ep",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "DATA_PARALLEL_GROUP_WITH_CP": "dp",
    "EXPERT_DATA_PARALLEL_GROUP": "edp",
}
"""megatron-core's names of groups, and those of `parallel.state` → those of `costs.volumes`; others keep theirs."""
_OF_GRADIENTS = ("dp", "edp")
ONCE_A_STEP = ("end of the step", "optimizer")
"""Scopes of a rank that do not belong to a micro-batch."""


@dataclass(frozen=True)
class Exchanged:
    """One kind of exchange of one group in a step of all its micro-batches.

    Attributes:
        calls, bytes: executed.
        modelled: bytes by `costs.volumes`; None where it has no figure.
    """

    group: str
    kind: str
    calls: float
    bytes: float
    modelled: float | None


def group_of(call: Call) -> str:
    """Short name of the call's group."""
    found = GROUPS.get(call.description)
    if call.kind in MESSAGES and found != "cp":
        return "pp"  # between two stages megatron-core sends one direction through the group of all ranks
    return found or call.description.lower() or "world"


def exchanged(whole: RunConfig, record: RankRecord) -> list[Exchanged]:
    """What the rank exchanges in a step of the whole run, beside what is modelled.

    Args:
        whole: the run with all its micro-batches.
        record: of a rank, which executed some of them.
    """
    found: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for call in record.calls:
        factor = 1.0 if _once_a_step(call) else whole.num_microbatches / record.microbatches
        total = found[group_of(call), call.kind]
        total[0] += factor
        total[1] += factor * call.bytes
    context_rank = Topology.from_config(whole.parallel).coordinates(record.rank).cp
    volumes = stage_volumes(whole, record.stage, context_rank)
    modelled = {key: each.of_step(whole.num_microbatches) for key, each in volumes.items()}
    entries = []
    for key in sorted({*found, *modelled}):
        (group, kind), (calls, total_bytes) = key, found.get(key, (0.0, 0.0))
        entries.append(Exchanged(group, kind, calls, total_bytes, modelled.get(key)))
    return entries


def _once_a_step(call: Call) -> bool:
    group = group_of(call)
    return group in _OF_GRADIENTS or call.scope in ONCE_A_STEP or group not in GROUPS.values()


def exchange_seconds(run: RunConfig, entry: Exchanged, device: DeviceSpec) -> float:
    """Seconds of these exchanges on the links of the device, as `costs.communication` takes them.

    Args:
        run: for the sizes of the groups.
        entry: of one group and kind, for a step.
        device: its links.
    """
    if not entry.calls:
        return 0.0
    links, parallel = Links.of(run, device), run.parallel
    tensor, experts = parallel.tensor_model_parallel_size, math.prod(parallel.expert_sizes)
    context = parallel.context_parallel_size
    if entry.kind in MESSAGES:
        # A message is counted where it is sent.
        apart = tensor * (context - 1) if entry.group == "cp" else parallel.ranks_per_stage
        carried = entry.bytes / links.between(apart) + entry.calls * links.latency
        return carried if entry.kind == "send" else 0.0
    dense, routed = parallel.gradient_ranks
    heads = parallel.context_sizes[0]
    places = {
        "tp": (tensor, 1), "cp": (heads, tensor), "ep": (experts, 1), "dp": (dense, tensor), "edp": (routed, experts)
    }  # fmt: skip
    size, stride = places.get(entry.group, (parallel.world_size, 1))
    each = entry.bytes / entry.calls
    if entry.kind == "all-to-all":
        return entry.calls * links.all_to_all(each, size, stride)
    return entry.calls * links.gather(each, size, stride) * (2 if entry.kind == "all-reduce" else 1)


def kernel_seconds(work: ScopeWork, precision: str, device: DeviceSpec) -> dict[str, float]:
    """Seconds by each of the three limits of a device: its arithmetic, its memory, and the host that launches."""
    peak = (device.peak(precision) or float("inf")) * 1e12 * device.efficiency.get("gemm", 1.0)
    bandwidth = (device.hbm_bandwidth_gb_s or float("inf")) * 1e9 * device.efficiency.get("hbm", 1.0)
    return {
        "arithmetic": work.flops / peak,
        "memory": work.bytes / bandwidth,
        "launches": work.launches * LAUNCH_S,
    }
