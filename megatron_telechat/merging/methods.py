"""The formulas of merging, tensor by tensor, in fp64.

    linear            sum_i w_i θ_i                            (model soups, arXiv 2203.05482)
    slerp             sin(w_0 Ω)/sin Ω θ_0 + sin(w_1 Ω)/sin Ω θ_1, Ω the angle of the two     (Shoemake, SIGGRAPH 1985)
    task-arithmetic   θ + λ sum_i w_i τ_i, τ_i = θ_i - θ       (arXiv 2212.04089)
    ties              trim, elect sign, disjoint mean          (arXiv 2306.01708)
    dare              drop at random, rescale (arXiv 2311.03099), then task arithmetic or TIES' election

A method makes a `Rule` of each tensor. Rules work on pieces: what needs the whole tensor (an angle, a threshold, the
digest that seeds the drops) is taken in a pass of its own before.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import torch

from megatron_telechat.merging.sums import dot, ordered_sum
from megatron_telechat.merging.weighting import LayerWeights

Terms = Sequence[torch.Tensor]
"""The same elements of several inputs: 1-D fp64 tensors of one length."""


@dataclass(frozen=True)
class Rule:
    """How one tensor is merged.

    Attributes:
        inputs: numbers of the inputs that take part.
        combine: their terms, and the row-major number of the first element, to the merged elements.
        copied: the result is this input's tensor itself.
    """

    inputs: tuple[int, ...]
    combine: Callable[[Terms, int], torch.Tensor]
    copied: int | None = None


class Tensors(Protocol):
    """The tensors of all inputs, in pieces that are the same for every layout."""

    def keys(self) -> Sequence[str]:
        """Keys of the model's tensors, in model order."""
        ...

    def pieces(self, key: str, numbers: Sequence[int]) -> Iterator[list[torch.Tensor]]:
        """Piece by piece, in order, the stored values of these inputs, 1-D."""
        ...


class Method(Protocol):
    """One way to merge. Keys are those of the model's tensors."""

    def rule(self, key: str, tensors: Tensors) -> Rule:
        """The rule of one tensor."""
        ...


def linear_rule(weights: Sequence[float]) -> Rule:
    """The weighted sum; a single weight of 1 is a copy."""
    numbers = tuple(number for number, weight in enumerate(weights) if weight != 0)
    if len(numbers) == 1 and weights[numbers[0]] == 1:
        return Rule(numbers, lambda terms, start: terms[0], copied=numbers[0])
    kept = [weights[number] for number in numbers]

    def combine(terms: Terms, start: int) -> torch.Tensor:
        return ordered_sum([term * weight for term, weight in zip(terms, kept, strict=True)])

    if not numbers:  # weights that are all 0
        return Rule((0,), lambda terms, start: torch.zeros_like(terms[0]))
    return Rule(numbers, combine)


@dataclass(frozen=True)
class Linear:
    """The weighted sum of the inputs."""

    weights: LayerWeights

    def rule(self, key: str, tensors: Tensors) -> Rule:
        """See :class:`Method`."""
        return linear_rule(self.weights.of(key))


@dataclass(frozen=True)
class Slerp:
    """Spherical interpolation of two inputs, each global tensor as one vector.

    Where the two are parallel or one is zero, so that there is no arc (sin Ω below 1e-6), it is the weighted sum.
    """

    weights: LayerWeights

    def rule(self, key: str, tensors: Tensors) -> Rule:
        """See :class:`Method`."""
        weights = self.weights.of(key)
        if 1 in weights and 0 in weights:
            return linear_rule(weights)
        angle = self._angle(key, tensors)
        if math.sin(angle) < 1e-6:
            return linear_rule(weights)
        return linear_rule([math.sin(weight * angle) / math.sin(angle) for weight in weights])

    def _angle(self, key: str, tensors: Tensors) -> float:
        products: list[tuple[float, float, float]] = []
        for pair in tensors.pieces(key, (0, 1)):
            a, b = (values.double() for values in pair)
            products.append((dot(a, a), dot(b, b), dot(a, b)))
        aa, bb, ab = (math.fsum(column) for column in zip(*products, strict=True))
        length = math.sqrt(aa) * math.sqrt(bb)
        return math.acos(max(-1.0, min(1.0, ab / length))) if length > 0 else 0.0


@dataclass(frozen=True)
class TaskArithmetic:
    """Base plus scaled, weighted task vectors: a weighted sum, and computed as one. The base is the last input."""

    weights: LayerWeights
    scale: float

    def rule(self, key: str, tensors: Tensors) -> Rule:
        """See :class:`Method`."""
        scaled = [self.scale * weight for weight in self.weights.of(key)]
        return linear_rule([*scaled, 1 - math.fsum(scaled)])


class Ties:
    """Trim each task vector to its largest elements, elect a sign for each element, average those that agree with it.

    Kept are the largest magnitudes (in fp32; equals of the smallest of them, too), at least one element. The elected
    sign is that of the weighted sum; where that is 0, the base is kept. The base is the last input.

    Args:
        density: share of the elements that is kept.
        over_model: rank the elements of the whole task vector, as the paper does; else those of each tensor.
    """

    def __init__(self, weights: LayerWeights, scale: float, density: float, over_model: bool):
        self._weights, self._scale, self._density, self._over_model = weights, scale, density, over_model
        self._of_model: list[float] | None = None

    def rule(self, key: str, tensors: Tensors) -> Rule:
        """See :class:`Method`."""
        weights = self._weights.of(key)
        if len(weights) == 1 and self._density >= 1 and self._scale == 1:
            return linear_rule([1.0, 0.0])  # base and task vector are the input, which no rounding may move
        thresholds = self._thresholds(key, tensors, len(weights))

        def combine(terms: Terms, start: int) -> torch.Tensor:
            base, kept = terms[-1], []
            for term, threshold in zip(terms[:-1], thresholds, strict=True):
                task = term - base
                kept.append(torch.where(task.abs().float() >= threshold, task, 0.0))
            return base + self._scale * elected_mean(kept, weights)

        return Rule(tuple(range(len(weights) + 1)), combine)

    def _thresholds(self, key: str, tensors: Tensors, count: int) -> list[float]:
        if self._density >= 1:
            return [0.0] * count
        if not self._over_model:
            return largest_magnitudes([key], tensors, count, self._density)
        if self._of_model is None:
            self._of_model = largest_magnitudes(tensors.keys(), tensors, count, self._density)
        return self._of_model


def elected_mean(tasks: Terms, weights: Sequence[float]) -> torch.Tensor:
    """TIES-Merging, section 4: the mean, weighted, of the values whose sign is that of the weighted sum."""
    weighted = [weight * task for weight, task in zip(weights, tasks, strict=True)]
    sign = ordered_sum(list(weighted)).sign()
    agree = [(task.sign() == sign) & (sign != 0) for task in tasks]
    total = ordered_sum([torch.where(yes, value, 0.0) for yes, value in zip(agree, weighted, strict=True)])
    share = ordered_sum([yes.double() * weight for yes, weight in zip(agree, weights, strict=True)])
    return torch.where(share > 0, total / share, 0.0)


def largest_magnitudes(keys: Sequence[str], tensors: Tensors, count: int, density: float) -> list[float]:
    """For each of ``count`` task vectors, the smallest of the magnitudes (fp32) that are the largest share ``density``.

    Exact and in little memory: the bits of a float above 0 are ordered as it is, so two passes count first the upper,
    then the lower 16 bits.
    """
    upper = torch.zeros(count, 1 << 15, dtype=torch.int64)
    for number, bits in _magnitude_bits(keys, tensors, count):
        upper[number] += torch.bincount(bits >> 16, minlength=1 << 15)
    keep = max(1, int(Fraction(str(density)) * int(upper[0].sum())))
    buckets = [_from_the_top(row, keep) for row in upper]
    lower = torch.zeros(count, 1 << 16, dtype=torch.int64)
    for number, bits in _magnitude_bits(keys, tensors, count):
        inside = bits[bits >> 16 == buckets[number][0]]
        lower[number] += torch.bincount(inside & 0xFFFF, minlength=1 << 16)
    found = []
    for (bucket, above), row in zip(buckets, lower, strict=True):
        bits = bucket << 16 | _from_the_top(row, keep - above)[0]
        found.append(float(torch.tensor(bits, dtype=torch.int32).view(torch.float32)))
    return found


def _magnitude_bits(keys: Sequence[str], tensors: Tensors, count: int) -> Iterator[tuple[int, torch.Tensor]]:
    for key in keys:
        for *models, base in tensors.pieces(key, range(count + 1)):
            for number, model in enumerate(models):
                yield number, (model.double() - base.double()).abs().float().view(torch.int32)


def _from_the_top(counts: torch.Tensor, keep: int) -> tuple[int, int]:
    """(the bucket that holds number ``keep`` from the top, how many lie above it)."""
    reached = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(reached, keep))
    return counts.numel() - 1 - place, int(reached[place - 1]) if place else 0


class Dare:
    """Drop elements of each task vector at random and divide the rest by what is kept; then task arithmetic, or the
    election of TIES. The base is the last input.

    Whether an element is dropped is a function of the seed, the tensor's key, the element's number and the content of
    the input's tensor: neither the order of the inputs nor any layout changes it.

    Args:
        drop: probability p of an element to be dropped; the others are divided by 1 - p.
        elect: merge as TIES does, without trimming.
    """

    def __init__(self, weights: LayerWeights, scale: float, drop: float, seed: int, elect: bool):
        self._weights, self._scale, self._drop, self._seed, self._elect = weights, scale, drop, seed, elect

    def rule(self, key: str, tensors: Tensors) -> Rule:
        """See :class:`Method`."""
        weights = self._weights.of(key)
        if len(weights) == 1 and self._drop == 0 and self._scale * (1 if self._elect else weights[0]) == 1:
            return linear_rule([1.0, 0.0])
        streams = self._streams(key, tensors, len(weights))

        def combine(terms: Terms, start: int) -> torch.Tensor:
            base, kept = terms[-1], []
            for term, stream in zip(terms[:-1], streams, strict=True):
                stays = uniform(stream, start, base.numel()) >= self._drop
                kept.append((term - base) * stays / (1 - self._drop))
            if self._elect:
                return base + self._scale * elected_mean(kept, weights)
            return base + self._scale * ordered_sum([w * task for w, task in zip(weights, kept, strict=True)])

        return Rule(tuple(range(len(weights) + 1)), combine)

    def _streams(self, key: str, tensors: Tensors, count: int) -> list[int]:
        digests = [hashlib.blake2b(f"{self._seed} {key} ".encode(), digest_size=8) for _ in range(count)]
        for values in tensors.pieces(key, range(count)):
            for digest, value in zip(digests, values, strict=True):
                # numpy's stubs do not say below Python 3.12 that an array has a buffer
                digest.update(value.contiguous().view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
        return [int.from_bytes(digest.digest(), "little") for digest in digests]


def uniform(stream: int, start: int, count: int) -> torch.Tensor:
    """fp64 numbers of [0, 1), ``start`` to ``start + count`` of a stream: SplitMix64 (Steele, Lea and Flood, OOPSLA
    2014), where each number is a function of its place."""
    z = torch.arange(start + 1, start + 1 + count, dtype=torch.int64)
    z.mul_(_signed(0x9E3779B97F4A7C15)).add_(_signed(stream))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    return _shifted(z ^ _shifted(z, 31), 11).double() * 2.0**-53


def _shifted(z: torch.Tensor, by: int) -> torch.Tensor:
    """Shifted to the right without the sign."""
    return (z >> by) & ((1 << 64 - by) - 1)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
