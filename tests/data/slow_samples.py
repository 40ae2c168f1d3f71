"""The orders of samples in plain Python, one list at a time: what the property tests compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from megatron_telechat.data.indexed import epochs


def epochs_joined(tokens: int, length: int) -> int:
    """Epochs that are laid end to end before the rest of a sample is dropped."""
    most = min(epochs.STRETCH_EPOCHS, math.ceil(epochs.STRETCH_SAMPLES * length / tokens))
    return max(math.ceil((length + 1) / tokens), most)


def endless(
    documents: Sequence[list[int]],
    numbers: Sequence[int],
    count: int,
    length: int,
    seed: int,
    megatron_for: int | None = None,
) -> list[tuple[int, list[int]]]:
    """The first samples of one dataset, each with the epoch it belongs to: each epoch is shuffled on its own.

    Args:
        documents: all documents of the dataset.
        numbers: those of the split.
        count: samples that are wanted; a few more may come.
        megatron_for: samples of Megatron's order that the run began with; its epochs count as one, the 0th.
    """
    tokens = sum(len(documents[number]) for number in numbers)
    out: list[tuple[int, list[int]]] = []
    epoch = 0
    if megatron_for and megatron_for * length + 1 > tokens:
        out = [(0, sample) for sample in flat_samples(documents, numbers, megatron_for, length, seed)]
        epoch = math.ceil((megatron_for * length + 1) / tokens)
    rest: list[int] = []
    joined = 0
    while len(out) < count:
        random = np.random.RandomState([seed, epoch] if epoch else seed)
        order = list(numbers)
        random.shuffle(order)
        stream = rest + [token for number in order for token in documents[number]]
        places = list(range((len(stream) - 1) // length))
        random.shuffle(places)
        out += [(epoch, stream[at * length : at * length + length + 1]) for at in places]
        joined += 1
        rest = [] if joined % epochs_joined(tokens, length) == 0 else stream[len(places) * length :]
        epoch += 1
    return out


def flat_samples(
    documents: Sequence[list[int]], numbers: Sequence[int], wanted: int | None, length: int, seed: int
) -> list[list[int]]:
    """Megatron's order of one dataset: documents shuffled, laid end to end, cut, shuffled again; the last epoch apart
    if it is short.

    Args:
        documents: all documents of the dataset.
        numbers: those of the split.
        wanted: samples that are needed; None: one epoch.
    """
    random = np.random.RandomState(seed)
    tokens = sum(len(documents[number]) for number in numbers)
    needed = 1
    while wanted is not None and needed * tokens < wanted * length + 1:
        needed += 1
    before_last = ((needed - 1) * tokens - 1) // length
    of_one = (tokens - 1) // length
    apart = needed > 1 and wanted - before_last < int(0.80 * of_one)

    order = np.array(list(numbers) * (needed - 1 if apart else needed), np.int32)
    random.shuffle(order)
    if apart:
        last = np.array(list(numbers), np.int32)
        random.shuffle(last)
        order = [*order, *last]
    stream = [token for number in order for token in documents[number]]
    count = (needed * tokens - 1) // length
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
        lags = [share * max(at, 1) - count for share, count in zip(shares, taken, strict=True)]
        source = lags.index(max(lags))
        out.append((source, taken[source]))
        taken[source] += 1
    return out


def surplus(weights: Sequence[float], size: int) -> list[int]:
    """Samples that Megatron prepares of each source of a blend."""
    return [math.ceil(math.ceil(size * (weight / sum(weights))) * 1.005) for weight in weights]
