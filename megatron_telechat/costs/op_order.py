"""Megatron-Core's order of forwards and backwards on one pipeline rank, and what it keeps in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_telechat.errors import ConfigError


@dataclass(frozen=True)
class Op:
    """One forward or backward of one micro-batch through one virtual stage of a pipeline rank."""

    forward: bool
    virtual_stage: int
    microbatch: int


def _forward_order(
    num_stages: int, num_virtual_stages: int, num_microbatches: int, group_size: int | None
) -> list[tuple[int, int]]:
    """(micro-batch, virtual stage) in the order of the forwards: groups of micro-batches, virtual stage by virtual
    stage (megatron-core 0.16.1, pipeline_parallel/schedules.py, get_schedule_table)."""
    group = (group_size or num_stages) if num_virtual_stages > 1 else max(num_microbatches, 1)
    return [
        (microbatch, virtual_stage)
        for start in range(0, num_microbatches, group)
        for virtual_stage in range(num_virtual_stages)
        for microbatch in range(start, min(start + group, num_microbatches))
    ]


def num_warmup_forwards(
    rank: int, num_stages: int, num_virtual_stages: int, num_microbatches: int, group_size: int | None = None
) -> int:
    """Forwards that pipeline rank `rank` runs before its first backward turn.

    1F1B: P - 1 - p. Interleaved in groups of N: 2 (P - 1 - p) + (V - 1) N (megatron-core 0.16.1,
    pipeline_parallel/schedules.py, get_pp_rank_microbatches). Never more than there are.
    """
    if num_virtual_stages == 1:
        warmup = num_stages - 1 - rank
    elif num_stages == 1:
        warmup = 0
    else:
        warmup = 2 * (num_stages - 1 - rank) + (num_virtual_stages - 1) * (group_size or num_stages)
    return min(warmup, num_microbatches * num_virtual_stages)


def rank_ops(
    rank: int, num_stages: int, num_virtual_stages: int, num_microbatches: int, group_size: int | None = None
) -> list[Op]:
    """The ops of one pipeline rank in Megatron-Core's order: warm-up forwards, then one of each in turn, then
    backwards.

    Args:
        group_size: micro-batches that go through one virtual stage at a time, of several; unset: `num_stages`.

    Raises:
        ConfigError: more than one virtual stage without a pipeline, which no schedule runs.
    """
    if num_virtual_stages > 1 and num_stages == 1:
        raise ConfigError(
            "virtual stages need more than one pipeline stage",
            fix="--num-virtual-stages-per-pipeline-rank 1, or a larger --pipeline-model-parallel-size",
        )
    order = _forward_order(num_stages, num_virtual_stages, num_microbatches, group_size)
    forwards = [Op(True, virtual_stage, microbatch) for microbatch, virtual_stage in order]
    backwards = [Op(False, num_virtual_stages - 1 - virtual_stage, microbatch) for microbatch, virtual_stage in order]
    warmup = num_warmup_forwards(rank, num_stages, num_virtual_stages, num_microbatches, group_size)
    ops = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        ops += [forward, backward]
    return ops + backwards[len(forwards) - warmup :]


def peak_in_flight(
    rank: int,
    num_stages: int,
    num_virtual_stages: int,
    num_microbatches: int,
    kept_bytes: Sequence[float],
    transient_bytes: Callable[[Op], float] | None = None,
    group_size: int | None = None,
) -> tuple[float, tuple[int, ...]]:
    """Most bytes of activations that pipeline rank `rank` holds at once, and the micro-batches of each virtual stage
    then.

    Args:
        kept_bytes: what one micro-batch keeps for each virtual stage from its forward to the end of its backward.
        transient_bytes: what an op needs on top while it runs.
        group_size: as of `rank_ops`.
    """
    # The order repeats itself after the warm-up, so a few groups of micro-batches, and the last one, show the peak.
    group = group_size or num_stages
    num_microbatches = min(num_microbatches, 4 * group + num_microbatches % group)
    in_flight = [0] * num_virtual_stages
    peak, at_peak = 0.0, tuple(in_flight)
    for op in rank_ops(rank, num_stages, num_virtual_stages, num_microbatches, group_size):
        in_flight[op.virtual_stage] += op.forward
        held = sum(count * size for count, size in zip(in_flight, kept_bytes, strict=True))
        held += transient_bytes(op) if transient_bytes else 0.0
        if held > peak:
            peak, at_peak = held, tuple(in_flight)
        in_flight[op.virtual_stage] -= not op.forward
    return peak, at_peak
