"""The samples of a run whose samples change their length, in plain Python: what the tests of lengths compare with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tests.data.slow_samples import epochs_joined, flat_samples


@dataclass
class Unit:
    """Tokens that are shuffled as samples among themselves: what was left, or an epoch and the rest of the one before.

    `epoch` is the first one behind it; `order` the places of its samples as they are read.
    """

    stream: list[int]
    epoch: int
    order: list[int]


class PlainSource:
    """One dataset, read with one length after another."""

    def __init__(self, documents: Sequence[list[int]], seed: int, megatron_for: int | None = None):
        self.documents, self.seed, self.megatron_for = documents, seed, megatron_for
        self.left: list[int] = []
        self.epoch = 0
        self.begun = False

    def read(self, length: int, count: int, ends: int | None, once: bool = False) -> list[list[int]]:
        """The next samples, in another length than before; `ends` of them were planned."""
        found: list[list[int]] = []
        for unit in self._units(length, ends, once):
            taken = unit.order[: count - len(found)]
            found += [unit.stream[at * length : at * length + length + 1] for at in taken]
            if len(found) == count:
                gone = {token for at in taken for token in range(at * length, (at + 1) * length)}
                if count:
                    self.left = [token for at, token in enumerate(unit.stream) if at not in gone]
                    self.epoch = unit.epoch
                break
        assert len(found) == count
        self.begun = True
        return found

    def _units(self, length: int, ends: int | None, once: bool) -> Iterator[Unit]:
        tokens = sum(map(len, self.documents))
        epoch, before, rest, joined = self.epoch, 0, list(self.left), 0

        def unit(stream: list[int], random: np.random.RandomState, behind: int) -> Unit:
            nonlocal before
            places = list(range((len(stream) - 1) // length))
            cut = min(max(0, ends - before), len(places)) if ends is not None else 0
            first, last = places[:cut], places[cut:]
            if first:
                random.shuffle(first)
            random.shuffle(last)
            before += len(places)
            return Unit(stream, behind, [*first, *last])

        if not self.begun and self.megatron_for and self.megatron_for * length + 1 > tokens:
            yield self._megatrons(length)
            epoch = -(-(self.megatron_for * length + 1) // tokens)
            before = (epoch * tokens - 1) // length
        elif rest:
            made = unit(rest, np.random.RandomState([self.seed, epoch, length]), epoch)
            yield made
            rest = rest[len(made.order) * length :]
        while not (once and self.begun):
            random = np.random.RandomState([self.seed, epoch] if epoch else self.seed)
            order = list(range(len(self.documents)))
            random.shuffle(order)
            stream = rest + [token for number in order for token in self.documents[number]]
            epoch += 1
            made = unit(stream, random, epoch)
            yield made
            joined += 1
            rest = [] if joined % epochs_joined(tokens, length) == 0 else stream[len(made.order) * length :]

    def _megatrons(self, length: int) -> Unit:
        """Megatron's epochs, as one unit."""
        assert self.megatron_for is not None
        stream, order = megatrons(self.documents, self.megatron_for, length, self.seed)
        epochs = len(stream) // sum(map(len, self.documents))
        wanted = flat_samples(self.documents, range(len(self.documents)), self.megatron_for, length, self.seed)
        assert [stream[at * length : at * length + length + 1] for at in order] == wanted
        return Unit(stream, epochs, order)


def megatrons(documents: Sequence[list[int]], wanted: int, length: int, seed: int) -> tuple[list[int], list[int]]:
    """What Megatron lays end to end for so many samples, and the places of these samples in their order; `flat_samples`
    gives the samples alone."""
    random = np.random.RandomState(seed)
    tokens = sum(map(len, documents))
    needed = -(-(wanted * length + 1) // tokens)
    before_last, of_one = ((needed - 1) * tokens - 1) // length, (tokens - 1) // length
    apart = needed > 1 and wanted - before_last < int(0.80 * of_one)
    order = np.array(list(range(len(documents))) * (needed - 1 if apart else needed), np.int32)
    random.shuffle(order)
    if apart:
        last = np.arange(len(documents), dtype=np.int32)
        random.shuffle(last)
        order = np.concatenate([order, last])
    count = (needed * tokens - 1) // length
    first = np.arange(before_last if apart else count, dtype=np.uint32)
    random.shuffle(first)
    rest = np.arange(first.size, count, dtype=np.uint32)
    if apart:
        random.shuffle(rest)
    return [token for number in order for token in documents[number]], [*first.tolist(), *rest.tolist()]
