"""Bytes of the optimizer's state: in which types it is kept, how much of it on the host, and what its travel takes.

The training lays the state out by the same figures (`training.resting`).
"""

from __future__ import annotations

from megatron_telechat.config.schema import OptimizerConfig, RunConfig
from megatron_telechat.costs.devices import DeviceSpec

MASTER_BYTES = 4
"""The fp32 master weight; where the compute type is fp32 the parameter itself serves."""
AVERAGE_BYTES = 4
"""A value of an average of the weights, fp32."""
WIDE_BYTES = 4
"""A number as AdamW computes with it: fp32."""
STORED_BYTES = {"fp32": 4, "bf16": 2}
"""Type of a moment between steps → its bytes."""
BUCKET_ELEMENTS = 1 << 22
"""Parameters whose state passes through the device at a time: 48 MiB in fp32, some milliseconds of any link, so that
the start of a copy (microseconds) does not count."""
OVERLAPPED_SLOTS = 3
"""Buckets on the device at a time: one that comes, one that is updated, one that goes."""


def moment_bytes(settings: OptimizerConfig) -> int:
    """Of one parameter, both moments at rest."""
    return STORED_BYTES[settings.exp_avg_dtype] + STORED_BYTES[settings.exp_avg_sq_dtype]


def master_bytes(run: RunConfig) -> int:
    """Of one parameter, the master weight apart from the parameter."""
    return MASTER_BYTES if run.training.precision != "fp32" else 0


def rest_bytes(run: RunConfig) -> int:
    """Of one parameter, the state at rest."""
    return master_bytes(run) + moment_bytes(run.optimizer)


def average_bytes(run: RunConfig) -> int:
    """Of one parameter, the averages of the weights (`AverageConfig`). They lie beside the master weight."""
    return AVERAGE_BYTES * run.average.copies


def offloaded_fraction(run: RunConfig) -> float:
    """Share of the state that is kept on the host."""
    return run.parallel.optimizer_offload_fraction if run.parallel.optimizer_cpu_offload else 0.0


def slots(overlap: bool) -> int:
    """Buckets that are on the device at a time."""
    return OVERLAPPED_SLOTS if overlap else 1


def host_bytes(run: RunConfig, parameters: float) -> float:
    """State at rest on the host, and averages beside it.

    Args:
        parameters: whose state the rank keeps.
    """
    averages = average_bytes(run) if master_bytes(run) else 0
    return offloaded_fraction(run) * (rest_bytes(run) + averages) * parameters


def device_bytes(run: RunConfig, parameters: float) -> float:
    """State at rest on the device, and averages beside it; `passage_bytes` come on top."""
    return (rest_bytes(run) + average_bytes(run)) * parameters - host_bytes(run, parameters)


def passage_bytes(run: RunConfig, *parameters: float) -> float:
    """Places on the device for the buckets on their way, and for 16-bit moments while they are fp32.

    Args:
        parameters: whose state the rank keeps, of each of its optimizers (dense, experts).
    """
    kept = (run.optimizer.exp_avg_dtype, run.optimizer.exp_avg_sq_dtype)
    widened = sum(WIDE_BYTES for kind in kept if STORED_BYTES[kind] < WIDE_BYTES)
    on_host, each = offloaded_fraction(run), slots(run.parallel.overlap_cpu_optimizer_d2h_h2d) * rest_bytes(run)
    return sum(
        each * min(BUCKET_ELEMENTS, on_host * count) + widened * min(BUCKET_ELEMENTS, count) for count in parameters
    )


def travel_seconds(run: RunConfig, parameters: float, device: DeviceSpec, update: float) -> float:
    """Seconds of an optimizer step whose state passes the link to the host: the longest of `travel_parts`."""
    return max(travel_parts(run, parameters, device, update))


def travel_parts(run: RunConfig, parameters: float, device: DeviceSpec, update: float) -> tuple[float, ...]:
    """What an optimizer step whose state passes the link to the host is the longest of; each grows in proportion.

    With overlap three: the way there, the way back, the update. The link carries both ways at once.

    Args:
        parameters: whose state the rank keeps.
        update: seconds of the step on the device.
    """
    if not device.host_bandwidth_gb_s:
        return (update,)  # not known of this device: a lower bound, which the dry run says
    one_way = offloaded_fraction(run) * rest_bytes(run) * parameters / (device.host_bandwidth_gb_s * 1e9)
    return (one_way, update) if run.parallel.overlap_cpu_optimizer_d2h_h2d else (2 * one_way + update,)
