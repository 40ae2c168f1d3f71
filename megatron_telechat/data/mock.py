"""A made-up stream of tokens, for runs without data."""

from __future__ import annotations

import math

import numpy as np


class MockSamples:
    """A stream that costs nothing, is the same everywhere, and can be learned.

    Tokens are Zipf-distributed (p(id) ~ 1/id) starts of short runs in which each token is the one before
    plus 17: the loss falls first to the entropy of the ids, then further as successors are learned.
    """

    STEP = 17
    CONTINUE = 0.75

    def __init__(self, size: int, sequence_length: int, vocab_size: int, seed: int, split: int):
        self.size = size
        self.sequence_length = sequence_length
        self.vocab_size = vocab_size
        self._key = (seed, split)

    def __len__(self) -> int:
        return self.size

    def tokens(self, sample: int) -> np.ndarray:
        """int64 [sequence_length + 1]."""
        if not 0 <= sample < self.size:
            raise IndexError(sample)
        rng = np.random.default_rng((*self._key, sample))
        count = self.sequence_length + 1
        starts = np.minimum(np.exp(rng.random(count) * math.log(self.vocab_size)).astype(np.int64), self.vocab_size) - 1
        place = np.arange(count)
        begins = rng.random(count) >= self.CONTINUE
        begins[0] = True
        run = np.maximum.accumulate(np.where(begins, place, 0))
        return (starts[run] + (place - run) * self.STEP) % self.vocab_size

    def marks(self, sample: int) -> None:
        """Every token is learned."""

    def cuts(self, sample: int) -> np.ndarray:
        """None: nothing is laid end to end anew."""
        return np.empty(0, np.int64)

    def pieces(self, sample: int) -> list[tuple[int, str]]:
        """The whole sample as one document: the stream has no borders."""
        return [(0, self.origin(sample))]

    def origin(self, sample: int) -> str:
        """The number of the sample: there is no file to name."""
        return f"mock sample {sample}"

    def find_token(self, sample: int, token: int) -> str:
        """As `origin`."""
        return self.origin(sample)
