"""Megatron's sample order in plain Python, one list at a time: what the property tests compare with."""

from __future__ import annotations

import math
from typing import Optional, Sequence

import numpy as np


def flat_samples(documents: Sequence[list[int]], numbers: Sequence[int], wanted: Optional[int], length: int, seed: int) -> list[list[int]]:
    """All samples of one dataset: documents shuffled, laid end to end, cut, shuffled again; the last epoch apart if it is short.

    Args:
        documents: all documents of the dataset.
        numbers: those of the split.
        wanted: samples that are needed; None: one epoch.
    """
    random = np.random.RandomState(seed)
    tokens = sum(len(documents[number]) for number in numbers)
    epochs = 1
    while wanted is not None and epochs * tokens < wanted * length + 1:
        epochs += 1
    before_last = ((epochs - 1) * tokens - 1) // length
    of_one = (tokens - 1) // length
    apart = epochs > 1 and wanted - before_last < int(0.80 * of_one)

    order = np.array(list(numbers) * (epochs - 1 if apart else epochs), np.int32)
    random.shuffle(order)
    if apart:
        last = np.array(list(numbers), np.int32)
        random.shuffle(last)
        order = [*order, *last]
    stream = [token for number in order for token in documents[number]]
    count = (epochs * tokens - 1) // length
    samples = [stream[at * length : at * length + length + 1] for at in range(count)]

    first = np.arange(before_last if apart else count, dtype=np.uint32)
    random.shuffle(first)
    rest = np.arange(first.size, count, dtype=np.uint32)
    if apart:
        random.shuffle(rest)
    return [samples[at] for at in [*first, *rest]]


def blended(weights: Sequence[float], size: int) -> list[tuple[int, int]]:
    """(source, its sample) of each sample of a blend: the source that lags most behind its share comes next."""
    shares = [weight / sum(weights) for weight in weights]
    taken = [0] * len(weights)
    out = []
    for at in range(size):
        lags = [share * max(at, 1) - count for share, count in zip(shares, taken)]
        source = lags.index(max(lags))
        out.append((source, taken[source]))
        taken[source] += 1
    return out


def surplus(weights: Sequence[float], size: int) -> list[int]:
    """Samples that are prepared of each source of a blend."""
    return [math.ceil(math.ceil(size * (weight / sum(weights))) * 1.005) for weight in weights]
