"""Which boxes of which global tensors a rank writes: its share of what it and its replicas hold alike.

Data-parallel replicas hold the same weights, and without the distributed optimizer the same optimizer state. Each
writes an equal part of the bytes, so that a save takes as long as the slowest rank of even shares, and not as long as
one rank that writes for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_telechat.checkpoint.averages import PREFIX
from megatron_telechat.checkpoint.optimizer_state import OptimizerSlice, flat_boxes, optimizer_slices
from megatron_telechat.model.shards import LocalParameter
from megatron_telechat.parallel.state import ParallelState
from megatron_telechat.tensors.pieces import is_first_over_tensor
from megatron_telechat.tensors.table import TensorSpec


@dataclass(frozen=True)
class OwnedTensor:
    """A box of a global tensor that this rank, and no other, writes."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: torch.Tensor


@dataclass(frozen=True)
class _FlatRange:
    """A 1-D view on elements [start, …) of a local parameter, or of the optimizer's state of them."""

    prefix: str
    shard: LocalParameter
    start: int
    values: torch.Tensor

    def cut(self, nbytes: int) -> int:
        """How many elements, at most, a cut after so many bytes leaves before it: whole rows, so that few boxes are
        made."""
        count = min(max(nbytes, 0) // self.values.element_size(), self.values.numel())
        shape = self.shard.piece.box.shape
        if count == self.values.numel() or not shape:
            return count
        return max(0, count - (self.start + count) % shape[-1])


def owned_tensors(
    shards: Sequence[LocalParameter], optimizer: Any, averages: Iterable[OptimizerSlice], parallel: ParallelState
) -> Iterator[OwnedTensor]:
    """What this rank writes; over all ranks it is every element of every tensor once.

    Args:
        optimizer: None leaves the optimizer's state out.
        averages: of the weights, on the ranges of the optimizer.
    """
    for one in _owned_ranges(shards, optimizer, averages, parallel):
        yield from _boxes_of(one)


def bytes_after_a_step(
    shards: Sequence[LocalParameter], optimizer: Any, averages: Iterable[OptimizerSlice], parallel: ParallelState
) -> int:
    """Bytes of the tensors that this rank will write once the optimizer has taken a step."""
    return sum(one.values.nbytes for one in _owned_ranges(shards, optimizer, averages, parallel, with_moments=True))


def _owned_ranges(
    shards: Sequence[LocalParameter],
    optimizer: Any,
    averages: Iterable[OptimizerSlice],
    parallel: ParallelState,
    with_moments: bool = False,
) -> list[_FlatRange]:
    ranges = [_FlatRange("model", shard, 0, shard.parameter.detach().view(-1)) for shard in shards]
    own: list[_FlatRange] = []
    for item in optimizer_slices(optimizer, shards) if optimizer is not None else ():
        tensors = dict(item.tensors)
        if with_moments:
            tensors = {
                name: torch.empty(item.stop - item.start, dtype=kind, device="meta")
                for name, kind in item.moment_types.items()
            } | tensors
        found = [_FlatRange(f"optimizer/{name}", item.shard, item.start, each) for name, each in tensors.items()]
        (own if item.sharded else ranges).extend(found)
    for item in averages:
        found = [_FlatRange(f"{PREFIX}/{name}", item.shard, item.start, each) for name, each in item.tensors.items()]
        (own if item.sharded else ranges).extend(found)
    own, ranges = ([one for one in each if _counts(one, parallel)] for each in (own, ranges))
    for expert in (False, True):
        alike = [one for one in ranges if one.shard.piece.spec.expert == expert]
        own += _share(alike, *_replica(expert, parallel))
    return own


def _counts(one: _FlatRange, parallel: ParallelState) -> bool:
    """Whether no other rank of the tensor (or expert-tensor) domain holds the same."""
    return is_first_over_tensor(one.shard.piece.spec, parallel)


def _replica(expert: bool, parallel: ParallelState) -> tuple[int, int]:
    """The number of this rank among those that hold the same pieces of the dense tensors, or of the experts', and how
    many those are."""
    if expert:
        return parallel.edp_rank, parallel.edp_size
    return parallel.dp_rank * parallel.cp_size + parallel.cp_rank, parallel.dp_size * parallel.cp_size


def _share(ranges: Sequence[_FlatRange], number: int, count: int) -> Iterator[_FlatRange]:
    """Part ``number`` of ``count`` of the bytes in a row."""
    total = sum(one.values.nbytes for one in ranges)
    low, high = total * number // count, total * (number + 1) // count
    for one in ranges:
        begin, end = one.cut(low), one.cut(high)
        if begin < end:
            yield _FlatRange(one.prefix, one.shard, one.start + begin, one.values[begin:end])
        low, high = low - one.values.nbytes, high - one.values.nbytes


def _boxes_of(one: _FlatRange) -> Iterator[OwnedTensor]:
    spec: TensorSpec = one.shard.piece.spec
    for part in flat_boxes(one.shard, one.start, one.start + one.values.numel()):
        values = one.values[part.start - one.start : part.stop - one.start].view(part.box.shape)
        yield OwnedTensor(f"{one.prefix}/{spec.key}", spec.shape, part.box.offset, values)
