"""The formulas on a few numbers that can be followed by hand, and what must not matter: order, pieces, layout."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import pytest
import torch

from megatron_telechat.merging.methods import (
    Dare,
    Linear,
    Slerp,
    TaskArithmetic,
    Ties,
    largest_magnitudes,
    uniform,
)
from megatron_telechat.merging.sums import dot, flat_start, ordered_sum, pieces
from megatron_telechat.merging.weighting import LayerRule, LayerWeights


class Numbers:
    """Tensors of some inputs by key, read in pieces of so many elements."""

    def __init__(self, tensors: dict[str, Sequence[Sequence[float]]], piece: int = 100):
        self._tensors = {key: [torch.tensor(row) for row in rows] for key, rows in tensors.items()}
        self._piece = piece

    def keys(self) -> list[str]:
        return list(self._tensors)

    def pieces(self, key: str, numbers: Sequence[int]) -> Iterator[list[torch.Tensor]]:
        yield from zip(*(self._tensors[key][number].split(self._piece) for number in numbers), strict=True)

    def merged(self, method, key: str = "x") -> list[float]:
        rule, start, out = method.rule(key, self), 0, []
        for parts in self.pieces(key, rule.inputs):
            out.append(rule.combine([part.double() for part in parts], start))
            start += parts[0].numel()
        return torch.cat(out).tolist()


def weights(*values: float) -> LayerWeights:
    return LayerWeights(values)


def test_linear():
    numbers = Numbers({"x": [[1, 2], [3, -2]]})
    assert numbers.merged(Linear(weights(0.25, 0.75))) == [2.5, -1.0]
    by_key = LayerWeights((0.5, 0.5), (LayerRule(None, "x*", (0, 1), "rule"),))
    assert numbers.merged(Linear(by_key)) == [3, -2] and Linear(by_key).rule("x", numbers).copied == 1


def test_slerp_of_a_right_angle_and_of_60_degrees():
    right = Numbers({"x": [[1, 0], [0, 1]]})
    assert right.merged(Slerp(weights(0.5, 0.5))) == pytest.approx([math.sqrt(0.5)] * 2)
    third = right.merged(Slerp(weights(2 / 3, 1 / 3)))
    assert third == pytest.approx([math.cos(math.pi / 6), math.sin(math.pi / 6)])
    # lengths 1 and 2 at 60 degrees: halfway both weigh sin 30 / sin 60 = 1 / sqrt(3)
    sixty = Numbers({"x": [[1, 0], [1, math.sqrt(3)]]})
    assert sixty.merged(Slerp(weights(0.5, 0.5))) == pytest.approx([2 / math.sqrt(3), 1])


def test_slerp_without_an_arc_is_the_weighted_sum():
    for rows in ([[1, 2], [2, 4]], [[0, 0], [3, 4]]):
        wanted = [0.25 * a + 0.75 * b for a, b in zip(*rows, strict=True)]
        assert Numbers({"x": rows}).merged(Slerp(weights(0.25, 0.75))) == pytest.approx(wanted)
    assert Slerp(weights(0, 1)).rule("x", Numbers({"x": [[1, 0], [0, 1]]})).copied == 1


def test_task_arithmetic():
    # base 1, -1; task vectors (1, 2) and (-3, 0): base + 0.5 * (their sum)
    numbers = Numbers({"x": [[2, 1], [-2, -1], [1, -1]]})
    assert numbers.merged(TaskArithmetic(weights(1, 1), 0.5)) == [0, 0]
    alone = Numbers({"x": [[2, 1], [1, -1]]})
    assert TaskArithmetic(weights(1), 1.0).rule("x", alone).copied == 0


TASKS = [[4.0, -1.0, 3.0, 0.5, 2.0], [-3.0, -2.0, 4.0, 1.0, 0.5], [2.5, 1.5, -1.0, 5.0, -2.0]]
BASE = [10.0, 20.0, 30.0, 40.0, 50.0]


def trial() -> Numbers:
    return Numbers({"x": [*([b + t for b, t in zip(BASE, task, strict=True)] for task in TASKS), BASE]})


def test_ties_by_hand():
    # density 0.6 keeps 3 of 5:   4  .  3  .  2   |  -3 -2  4  .  .  |  2.5  .  .  5 -2
    # sums 3.5, -2, 7, 5, 0 elect +, -, +, +, none; means of those that agree (4 + 2.5) / 2, -2, 3.5, 5
    found = trial().merged(Ties(weights(1, 1, 1), 1.0, 0.6, over_model=True))
    assert found == pytest.approx([13.25, 18, 33.5, 45, 50])
    doubled = trial().merged(Ties(weights(1, 1, 1), 2.0, 0.6, over_model=False))
    assert doubled == pytest.approx([16.5, 16, 37, 50, 50])
    # twice the weight for the first: its 2 outweighs the -2 of the third; (2 * 4 + 2.5) / 3 and (2 * 3 + 4) / 3
    weighed = trial().merged(Ties(weights(2, 1, 1), 1.0, 0.6, over_model=True))
    assert weighed == pytest.approx([13.5, 18, 30 + 10 / 3, 45, 52])


def test_ties_ranks_over_the_model_or_in_each_tensor():
    numbers = Numbers({"x": [[1, 2, 3], [0, 0, 0]], "y": [[10, 20, 30], [0, 0, 0]]})
    assert numbers.merged(Ties(weights(1), 1.0, 0.5, over_model=True)) == [0, 0, 0]
    assert numbers.merged(Ties(weights(1), 1.0, 0.5, over_model=True), "y") == [10, 20, 30]
    assert numbers.merged(Ties(weights(1), 1.0, 0.5, over_model=False)) == [0, 0, 3]


def test_the_largest_magnitudes_are_those_of_sorting():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(2, 1000, generator=generator) * 10 ** torch.randint(-6, 6, (2, 1000), generator=generator)
    rows[0, :300] = rows[0, 0]  # equals
    numbers = Numbers({"x": [*rows.tolist(), [0.0] * 1000]}, piece=77)
    for keep in (1, 10, 299, 300, 301, 999, 1000):
        wanted = [float(row.abs().sort(descending=True).values[keep - 1]) for row in rows]
        assert largest_magnitudes(["x"], numbers, 2, keep / 1000) == wanted, keep


def split_mix_64(seed: int, number: int) -> float:
    """Written out with Python's integers."""
    mask = (1 << 64) - 1
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)


def test_random_numbers_are_those_of_splitmix_and_of_their_place():
    for stream in (0, 1, 0xDEADBEEFCAFEF00D, (1 << 64) - 1):
        wanted = [split_mix_64(stream, number) for number in range(200)]
        assert uniform(stream, 0, 200).tolist() == wanted
        assert uniform(stream, 50, 20).tolist() == wanted[50:70]
    # the generator's published first output for seed 0
    assert uniform(0, 0, 1).item() == (0xE220A8397B1DCDAF >> 11) / (1 << 53)


def test_dare_drops_a_share_and_divides_the_rest():
    count = 20_000
    numbers = Numbers({"x": [[2.0] * count, [1.0] * count]})
    found = torch.tensor(numbers.merged(Dare(weights(1), 1.0, 0.75, 3, elect=False)), dtype=torch.float64)
    assert set(found.tolist()) == {1.0, 5.0}  # base, or base + 1 / (1 - 0.75)
    share = float((found == 5).double().mean())
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / count)
    assert abs(float(found.mean()) - 2) < 0.1  # the expectation is the model's


def test_dare_depends_on_seed_key_and_content_only():
    values = torch.randn(3, 500, generator=torch.Generator().manual_seed(5)).tolist()
    base = [0.0] * 500

    def merged(rows, seed=1, piece=500, key="x", elect=False):
        method = Dare(weights(*[1.0] * len(rows)), 1.0, 0.5, seed, elect)
        return Numbers({key: [*rows, base]}, piece).merged(method, key)

    for elect in (False, True):
        one = merged(values, elect=elect)
        assert all(merged(list(order), elect=elect) == one for order in itertools.permutations(values))
        assert merged(values, piece=7, elect=elect) == one
        assert merged(values, seed=2, elect=elect) != one != merged(values, key="y", elect=elect)


def test_a_sum_does_not_depend_on_the_order_and_is_exact():
    generator = torch.Generator().manual_seed(2)
    exponents = torch.randint(-9, 9, (5, 300), generator=generator).double()
    terms = torch.randn(5, 300, generator=generator).double() * 10.0**exponents
    terms[:, :20] = torch.tensor([1e16, 1.0, -1e16, 3.0, -0.0], dtype=torch.float64)[:, None]
    # two that cancel, and three that are lost beside them: compensation alone rounds these in the order they come
    terms[:, 20:220] = torch.randn(5, 200, generator=generator, dtype=torch.float64)
    terms[0, 20:220], terms[1, 20:220] = 1e25, -1e25
    wanted = [math.fsum(column) for column in terms.T.tolist()]
    orders = list(itertools.permutations(range(5)))
    found = {tuple(ordered_sum([terms[i].clone() for i in order]).tolist()) for order in orders}
    assert len(found) == 1 and next(iter(found)) == pytest.approx(wanted, rel=1e-15, abs=1e-14)
    assert next(iter(found))[0] == 4.0
    naive = {tuple(sum(terms[i] for i in order).tolist()) for order in orders}
    assert len(naive) > 1


def test_pieces_tile_a_tensor_in_order_and_stay_small():
    for shape in ((), (7,), (3, 5), (2, 3, 4, 5), (1, 1, 9), (4, 1)):
        for limit in (1, 3, 7, 20, 1000):
            at = 0
            for box in pieces(shape, limit):
                assert box.numel <= limit and flat_start(box.offset, shape) == at
                at += box.numel
            assert at == math.prod(shape)


def test_inner_products_do_not_depend_on_threads():
    a, b = torch.randn(2, 300_001, generator=torch.Generator().manual_seed(3)).double()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = dot(a, b)
        torch.set_num_threads(2)
        assert dot(a, b) == one
    finally:
        torch.set_num_threads(threads)
