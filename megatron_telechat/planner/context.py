"""Ways to share a sequence: context-parallel sizes that are worth trying, their split, and whether to keep what comes.

Within one context-parallel size only the attention differs, so its estimated time decides: the split with the least,
and keeping received keys and values where that saves time. Whether their memory is there is for the solver to say.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from megatron_telechat.config.context import head_sizes
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.devices import DeviceSpec
from megatron_telechat.costs.time import Software, TimeModel

LEAST_TOKENS = 8192
"""A planner leaves a rank at least so much of a row: with less, the blocks of its attention get small, which the cost
model does not see."""
WORTH = 0.002
"""Share of a layer's time below which keeping keys and values is not worth its memory."""
SIZE = "context_parallel_size"
SPLIT = ("cp_comm_type", "hierarchical_context_parallel_sizes")
KEEP = "cp_keep_received"
KEEP_FLAGS = {True: "--cp-keep-received", False: "--no-cp-keep-received"}


def context_sizes(run: RunConfig) -> list[int]:
    """Sizes that cut a row into parts that are not too small; powers of two, and other divisors where the row has
    them."""
    length, ranks = run.training.seq_length, run.parallel.world_size
    return [
        size
        for size in range(1, length // LEAST_TOKENS + 1)
        if ranks % size == 0 and (size == 1 or length % (2 * size) == 0)
    ] or [1]


def ways(
    run: RunConfig, device: DeviceSpec, software: Software | None, fixed: Collection[str], plain: bool = False
) -> Iterator[tuple[tuple[str, ...], RunConfig]]:
    """The run in the ways of its context-parallel size that may be best, each with the flags of its split; whether
    keys and values are kept is said by the plan's own flags.

    Args:
        fixed: fields that stay as they are, of SPLIT and KEEP.
        plain: only what Megatron-LM's flags can say, which is not whether received keys and values are kept.

    Raises:
        ConfigError: no times for this device at these shapes.
    """
    size = run.parallel.context_parallel_size
    if size == 1:
        yield (), run
        return
    flags: tuple[str, ...] = ()
    if not {*SPLIT} & {*fixed}:
        splits = [split_over(run, heads) for heads in head_sizes(run)]
        flags, run = min(splits, key=lambda split: _layer_seconds(split[1], device, software))
    if KEEP in fixed or plain or run.parallel.context_sizes[1] == 1:
        yield flags, run
        return
    fetches, keeps = (keeping(run, keep) for keep in (False, True))
    yield flags, fetches
    before, after = (_layer_seconds(one, device, software) for one in (fetches, keeps))
    if after < before * (1 - WORTH):
        yield flags, keeps


def keeping(run: RunConfig, keep: bool) -> RunConfig:
    """The run that keeps received keys and values for the backward, or fetches them again."""
    return replace(run, parallel=replace(run.parallel, cp_keep_received=keep))


def keep_flags(run: RunConfig) -> tuple[str, ...]:
    """The flag that says whether a run keeps received keys and values; none where it is left open."""
    keeps = run.parallel.cp_keep_received
    return () if keeps is None else (KEEP_FLAGS[keeps],)


def split_over(run: RunConfig, heads: int) -> tuple[tuple[str, ...], RunConfig]:
    """The run with an all-to-all over so many ranks, and the flags for it."""
    size = run.parallel.context_parallel_size
    sizes = (heads, size // heads)
    kind = "p2p" if heads == 1 else "a2a" if heads == size else "a2a+p2p"
    flags = ["--cp-comm-type", kind]
    if kind == "a2a+p2p":
        flags += ["--hierarchical-context-parallel-sizes", *map(str, sizes)]
    parallel = replace(run.parallel, cp_comm_type=kind, hierarchical_context_parallel_sizes=sizes)
    return tuple(flags), replace(run, parallel=parallel)


def _layer_seconds(run: RunConfig, device: DeviceSpec, software: Software | None) -> float:
    times = TimeModel(run, device, software).layer(0, ())
    return times.forward + times.backward
