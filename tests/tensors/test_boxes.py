"""Boxes against brute force over every element."""

from __future__ import annotations

import itertools
import random

import numpy
import pytest

from megatron_telechat.tensors.boxes import Box, flat_range_boxes, intersect, tiling_fault, whole


def _members(box: Box) -> set:
    return set(itertools.product(*(range(o, o + s) for o, s in zip(box.offset, box.shape, strict=True))))


def _random_box(random_: random.Random, shape) -> Box:
    offset = tuple(random_.randrange(s) for s in shape)
    return Box(offset, tuple(random_.randint(1, s - o) for s, o in zip(shape, offset, strict=True)))


def test_intersection_is_the_set_of_common_elements():
    random_ = random.Random(1)
    for _ in range(400):
        shape = tuple(random_.randint(1, 5) for _ in range(random_.randint(1, 3)))
        a, b = _random_box(random_, shape), _random_box(random_, shape)
        common = intersect(a, b)
        assert (_members(common) if common else set()) == _members(a) & _members(b)


@pytest.mark.parametrize("shape", [(7,), (3, 4), (1, 5), (4, 1), (2, 3, 4), (3, 2, 2, 5)])
def test_every_flat_range_is_a_few_contiguous_boxes(shape):
    tensor = numpy.arange(numpy.prod(shape)).reshape(shape)
    for start, stop in itertools.combinations_with_replacement(range(tensor.size + 1), 2):
        boxes = flat_range_boxes(shape, start, stop)
        assert len(boxes) <= 2 * len(shape) - 1
        position = start
        for flat, box in boxes:
            assert flat == position
            values = tensor[box.slices()].reshape(-1)
            assert (values == numpy.arange(position, position + box.numel)).all()
            position += box.numel
        assert position == stop


def test_a_range_outside_the_tensor_is_refused():
    with pytest.raises(ValueError):
        flat_range_boxes((2, 3), 0, 7)


def test_tiling_fault_agrees_with_counting_every_element():
    random_ = random.Random(2)
    seen = {True: 0, False: 0}
    for _ in range(600):
        shape = tuple(random_.randint(1, 4) for _ in range(random_.randint(1, 3)))
        size = int(numpy.prod(shape))
        cuts = sorted({0, size, *(random_.randint(0, size) for _ in range(3))})
        boxes = [b for lo, hi in zip(cuts, cuts[1:], strict=False) for _, b in flat_range_boxes(shape, lo, hi)]
        for _ in range(random_.randint(0, 1)):
            boxes[random_.randrange(len(boxes))] = _random_box(random_, shape)
        if random_.random() < 0.2:
            boxes.pop()
        random_.shuffle(boxes)
        count = numpy.zeros(shape, dtype=int)
        for box in boxes:
            count[box.slices()] += 1
        exact = bool((count == 1).all())
        seen[exact] += 1
        assert (tiling_fault(shape, boxes) is None) == exact
    assert min(seen.values()) > 100


def test_a_box_that_leaves_the_tensor_is_named():
    assert "leaves" in tiling_fault((4, 4), [Box((2, 0), (3, 4)), whole((2, 4))])
    assert "leaves" in tiling_fault((4,), [Box((-1,), (5,))])


def test_boxes_that_no_plane_parts_are_compared_too():
    pinwheel = [Box((0, 0), (1, 2)), Box((0, 2), (2, 1)), Box((2, 1), (1, 2)), Box((1, 0), (2, 1)), Box((1, 1), (1, 1))]
    assert tiling_fault((3, 3), pinwheel) is None
    pinwheel[4] = Box((1, 0), (1, 1))
    assert "overlap" in tiling_fault((3, 3), pinwheel)


def test_what_very_many_ranks_hold_is_not_compared_pair_by_pair(monkeypatch):
    """Eight tensor ranks have columns, and 150 data-parallel ranks flat ranges of them: over a thousand boxes."""
    from megatron_telechat.tensors import boxes as module

    part, ranks = (96, 40), 150
    cuts = [rank * 96 * 40 // ranks for rank in range(ranks + 1)]
    of_one = [box for lo, hi in zip(cuts, cuts[1:], strict=False) for _, box in flat_range_boxes(part, lo, hi)]
    boxes = [box.shifted((0, 40 * tensor)) for tensor in range(8) for box in of_one]
    calls = []
    real = module.intersect
    monkeypatch.setattr(module, "intersect", lambda a, b: calls.append(1) or real(a, b))
    assert tiling_fault((96, 320), boxes) is None
    assert len(boxes) > 1000 and len(calls) < len(boxes)
    assert "overlap" in tiling_fault((96, 320), [*boxes, Box((50, 100), (1, 1))])
