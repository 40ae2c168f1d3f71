"""Samples drawn from several sources in the proportion of their weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_telechat.data.core import core_datasets
from megatron_telechat.data.corpus import Marks, SampleSource
from megatron_telechat.data.pieces import IndexFolder, roomy
from megatron_telechat.errors import DataError

_LEAST = 1 << 12
_SCANNED = 1 << 20


class BlendOrder:
    """Which source, and which of its samples, comes next: the source that lags most behind its share (Megatron's rule).

    The rule looks at the samples before only, so the order of a shorter blend is the beginning of that of a longer one.

    Args:
        weights: positive, any scale.
        size: samples of the blend.
        index: the folder of the index.
        name: of the blend there.
        there: samples there are in all, where the sources end; their numbers are then the weights.
    """

    def __init__(self, weights: Sequence[float], size: int, index: IndexFolder, name: str, there: int | None = None):
        built = roomy(size, _LEAST) if there is None else min(roomy(size, _LEAST), there)

        def build(folder: Path) -> None:
            index.say(f"blending {built:,} samples for {name}")
            for file, array in zip(("source", "sample"), _blend_order(weights, built), strict=True):
                np.save(folder / f"{file}.npy", array)

        folder = index.piece(f"{name}-{built}", build)
        self._source, self._sample = (
            np.load(folder / f"{file}.npy", mmap_mode="r")[:size] for file in ("source", "sample")
        )
        self._sources = len(weights)

    def __len__(self) -> int:
        return self._source.shape[0]

    def place(self, sample: int) -> tuple[int, int]:
        """(number of the source, its sample) of a sample of the blend."""
        return int(self._source[sample]), int(self._sample[sample])

    def drawn(self) -> list[int]:
        """Samples of each source in the whole blend: one more than the last number of each, looked for from the end."""
        counts = [0] * self._sources
        missing = set(range(self._sources))
        for end in range(len(self), 0, -_SCANNED):
            begin = max(0, end - _SCANNED)
            found, last = np.unique(self._source[begin:end][::-1], return_index=True)
            for source, place in zip(found.tolist(), last.tolist(), strict=True):
                if source in missing:
                    missing.remove(source)
                    counts[source] = int(self._sample[end - 1 - place]) + 1
            if not missing:
                break
        return counts


class BlendedSamples:
    """The samples of several sources in the order of a blend."""

    def __init__(self, sources: Sequence[SampleSource], order: BlendOrder):
        self.sources = tuple(sources)
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def tokens(self, sample: int) -> np.ndarray:
        """int64 [sequence_length + 1]."""
        source, inner = self.order.place(sample)
        return self.sources[source].tokens(inner)

    def marks(self, sample: int) -> Marks | None:
        """What the sample's source says of its tokens; None where sources of this format say nothing."""
        source, inner = self.order.place(sample)
        return self.sources[source].marks(inner)

    def cuts(self, sample: int) -> np.ndarray:
        """Tokens that do not follow from the one before, as the sample's source says."""
        source, inner = self.order.place(sample)
        return self.sources[source].cuts(inner)

    def pieces(self, sample: int) -> list[tuple[int, str]]:
        """First token, and name, of each document of a sample and of its padding."""
        source, inner = self.order.place(sample)
        return self.sources[source].pieces(inner)

    def origin(self, sample: int) -> str:
        """Where the tokens of a sample come from, for messages; the source names its file."""
        source, inner = self.order.place(sample)
        return self.sources[source].origin(inner)

    def find_token(self, sample: int, token: int) -> str:
        """Where the first occurrence of a token of a sample comes from, for messages."""
        source, inner = self.order.place(sample)
        return self.sources[source].find_token(inner, token)

    def drawn(self) -> list[int]:
        """Samples of each source in the whole blend."""
        return self.order.drawn()


def _blend_order(weights: Sequence[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    source = np.zeros(size, np.int16)
    sample = np.zeros(size, np.int64)
    total = sum(weights)
    shares = np.array([weight / total for weight in weights], dtype=np.float64)
    core_datasets("helpers").build_blending_indices(source, sample, shares.tolist(), len(weights), size, False)
    return source, sample


def samples_of_each(weights: Sequence[float], size: int) -> list[int]:
    """Samples that Megatron builds of each source of a weighted blend of ``size``.

    Its 0.5 % surplus decides how many epochs are shuffled together, so with another one the order would not be
    Megatron's.
    """
    total = sum(weights)
    return [math.ceil(math.ceil(size * (weight / total)) * 1.005) for weight in weights]


class LaterSamples:
    """The samples of a source under their numbers in the whole run, of which the first were of other lengths."""

    def __init__(self, source: SampleSource, begin: int):
        self.source = source
        self.begin = begin

    def _own(self, sample: int) -> int:
        if sample < self.begin:
            raise DataError(
                f"sample {sample} is not one of the present length, which begins with sample {self.begin}",
                "stages",
                "look at it with the seq_length of its stage",
            )
        return sample - self.begin

    def __len__(self) -> int:
        return self.begin + len(self.source)

    def tokens(self, sample: int) -> np.ndarray:
        """int64 [sequence_length + 1]."""
        return self.source.tokens(self._own(sample))

    def marks(self, sample: int) -> Marks | None:
        """What the source says of its tokens."""
        return self.source.marks(self._own(sample))

    def cuts(self, sample: int) -> np.ndarray:
        """Tokens that do not follow from the one before."""
        return self.source.cuts(self._own(sample))

    def pieces(self, sample: int) -> list[tuple[int, str]]:
        """First token, and name, of each document of a sample and of its padding."""
        return self.source.pieces(self._own(sample))

    def origin(self, sample: int) -> str:
        """Where the tokens of a sample come from, for messages."""
        return self.source.origin(self._own(sample))

    def find_token(self, sample: int, token: int) -> str:
        """Where the first occurrence of a token of a sample comes from, for messages."""
        return self.source.find_token(self._own(sample), token)
