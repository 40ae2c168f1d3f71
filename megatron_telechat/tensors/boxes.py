"""Boxes of N-dimensional tensors: intersection, flat ranges, exact tilings. No torch.

A checkpoint stores boxes of global tensors and a rank owns boxes of global tensors,
so that loading any layout into any other is only a matter of intersecting them. The
distributed optimizer owns *flat ranges* of row-major parameters; a flat range is a
short list of boxes (:func:`flat_range_boxes`).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """The elements ``offset[d] <= index[d] < offset[d] + shape[d]`` of a tensor."""

    offset: Shape
    shape: Shape

    @property
    def stop(self) -> Shape:
        """The first index beyond it, axis by axis."""
        return tuple(o + s for o, s in zip(self.offset, self.shape, strict=True))

    @property
    def numel(self) -> int:
        """Number of elements; 1 where there are no axes."""
        return math.prod(self.shape)

    def slices(self, origin: Shape | None = None) -> tuple[slice, ...]:
        """Index of this box in a tensor whose first element is the global element ``origin``."""
        origin = origin or (0,) * len(self.offset)
        return tuple(slice(o - g, o - g + s) for o, s, g in zip(self.offset, self.shape, origin, strict=True))

    def shifted(self, by: Sequence[int]) -> Box:
        """A box of the same shape, moved by this many elements on each axis."""
        return Box(tuple(o + b for o, b in zip(self.offset, by, strict=True)), self.shape)

    def inside(self, shape: Sequence[int]) -> bool:
        """Whether it is not empty and lies in a tensor of this shape; false for another number of axes."""
        return len(self.shape) == len(self.offset) == len(shape) and all(
            0 <= o and s > 0 and o + s <= g for o, s, g in zip(self.offset, self.shape, shape, strict=True)
        )


def whole(shape: Sequence[int]) -> Box:
    """The box of a whole tensor of this shape."""
    return Box((0,) * len(shape), tuple(shape))


def intersect(a: Box, b: Box) -> Box | None:
    """The common elements of two boxes, or None."""
    offset = tuple(map(max, a.offset, b.offset))
    shape = tuple(map(lambda p, q, o: min(p, q) - o, a.stop, b.stop, offset))
    return Box(offset, shape) if all(s > 0 for s in shape) else None


def flat_range_boxes(shape: Sequence[int], start: int, stop: int) -> list[tuple[int, Box]]:
    """Cut elements [start, stop) of a row-major tensor into boxes that are each contiguous.

    Returns (flat index of the first element, box) in flat order: at most 2*ndim - 1
    boxes, namely a partial row, whole rows, and a partial row, applied recursively.
    """
    shape = tuple(shape)
    if not 0 <= start <= stop <= math.prod(shape):
        raise ValueError(f"range [{start}, {stop}) is not inside a tensor of shape {shape}")
    return list(_flat_boxes(shape, start, stop))


def _flat_boxes(shape: Shape, start: int, stop: int) -> Iterator[tuple[int, Box]]:
    if start == stop:
        return
    if not shape:
        yield start, Box((), ())
        return
    row = math.prod(shape[1:])
    first_whole, last_whole = -(-start // row), stop // row
    if first_whole > last_whole:  # inside one row
        yield from _in_row(shape, start // row, start % row, stop - (start // row) * row)
        return
    if start < first_whole * row:
        yield from _in_row(shape, start // row, start % row, row)
    if first_whole < last_whole:
        offset = (first_whole,) + (0,) * (len(shape) - 1)
        yield first_whole * row, Box(offset, (last_whole - first_whole,) + shape[1:])
    if last_whole * row < stop:
        yield from _in_row(shape, last_whole, 0, stop - last_whole * row)


def _in_row(shape: Shape, row: int, start: int, stop: int) -> Iterator[tuple[int, Box]]:
    base = row * math.prod(shape[1:])
    for flat, box in _flat_boxes(shape[1:], start, stop):
        yield base + flat, Box((row,) + box.offset, (1,) + box.shape)


def tiling_fault(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """Why ``boxes`` do not cover every element of ``shape`` exactly once, or None if they do."""
    for box in boxes:
        if not box.inside(shape):
            return f"the box at {box.offset} of shape {box.shape} leaves the tensor {tuple(shape)}"
    pair = overlapping_pair(boxes)
    if pair is not None:
        return f"the boxes at {pair[0].offset} and {pair[1].offset} overlap"
    covered, wanted = sum(box.numel for box in boxes), math.prod(shape)
    if covered != wanted:
        return f"{wanted - covered} of {wanted} elements are missing"
    return None


def overlapping_pair(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two boxes with a common element, if any.

    Where a plane parallel to the axes cuts none of the boxes, those on its sides are looked at by themselves. What
    ranks hold of a tensor comes apart so until single boxes are left: parts of tensor ranks, rows of flat ranges, and
    parts of one row. The time then grows as n log n; only what does not come apart is compared pair by pair.
    """
    waiting = [list(boxes)]
    while waiting:
        group = waiting.pop()
        if len(group) < 2:
            continue
        for axis in range(len(group[0].shape)):
            parts = _apart(group, axis)
            if len(parts) > 1:
                waiting.extend(parts)
                break
        else:
            pair = _pair_by_pair(group)
            if pair is not None:
                return pair
    return None


def _apart(boxes: Sequence[Box], axis: int) -> list[list[Box]]:
    """The boxes in groups whose extents on an axis do not touch those of another group."""
    groups: list[list[Box]] = []
    reach = 0
    for box in sorted(boxes, key=lambda box: box.offset[axis]):
        if not groups or box.offset[axis] >= reach:
            groups.append([])
        groups[-1].append(box)
        reach = max(reach, box.offset[axis] + box.shape[axis])
    return groups


def _pair_by_pair(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two boxes with a common element, if any: a sweep along the axis with the most cuts."""
    if not boxes[0].shape:
        return boxes[0], boxes[1]
    axis = max(range(len(boxes[0].shape)), key=lambda d: len({box.offset[d] for box in boxes}))
    active: list[tuple[int, int]] = []
    ordered = sorted(boxes, key=lambda box: box.offset[axis])
    for number, box in enumerate(ordered):
        while active and active[0][0] <= box.offset[axis]:
            heapq.heappop(active)
        for _, other in active:
            if intersect(box, ordered[other]) is not None:
                return ordered[other], box
        heapq.heappush(active, (box.stop[axis], number))
    return None
