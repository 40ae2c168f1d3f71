"""What some samples of a stream of documents have not read, as pieces of documents. Numbers only."""

from __future__ import annotations

import numpy as np


def unread_stretches(read: np.ndarray, places: range, length: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a stream that none of its read samples has as an input.

    Args:
        read: places of the samples that were read; sample p has the tokens [p * length, (p + 1) * length) as inputs.
        places: of the samples that count; all before them are read.
        end: tokens of the stream that count; what lies behind the last sample belongs to no sample.

    Returns:
        First token and end of each stretch, int64, ascending; no two touch.
    """
    left = np.ones(len(places) + 1, bool)  # the last one: the rest behind all samples
    left[read[read >= places.start].astype(np.int64) - places.start] = False
    edges = np.diff(np.concatenate([[0], left.view(np.int8), [0]]))
    begins, ends = (np.flatnonzero(edges == sign) + places.start for sign in (1, -1))
    begins, ends = begins.astype(np.int64) * length, ends.astype(np.int64) * length
    ends = np.minimum(ends, end)
    there = begins < ends
    return begins[there], ends[there]


def pieces_of(
    begins: np.ndarray, ends: np.ndarray, documents: np.ndarray, sizes: np.ndarray, pieces: np.ndarray, sequences: int
) -> np.ndarray:
    """Stretches of a stream as pieces of documents.

    Args:
        begins, ends: of the stretches, in tokens of the stream.
        documents: int32, what is laid end to end: numbers of sequences; from ``sequences`` on, numbers of pieces.
        sizes: tokens of each number.
        pieces: int32 [n, 3], sequence, first token and tokens of each piece.
        sequences: how many sequences the dataset has.

    Returns:
        int32 [m, 3], sequence, first token and tokens, in the order of the stream.
    """
    stops = np.cumsum(sizes[documents], dtype=np.int64)
    starts = stops - sizes[documents]
    first = np.searchsorted(stops, begins, side="right")
    counts = np.searchsorted(starts, ends, side="left") - first
    entries = np.repeat(first - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts) + np.arange(counts.sum())
    begin = np.maximum(np.repeat(begins, counts), starts[entries])
    tokens = np.minimum(np.repeat(ends, counts), stops[entries]) - begin
    numbers, begin = documents[entries].astype(np.int64), begin - starts[entries]
    carried = numbers >= sequences
    begin[carried] += pieces[numbers[carried] - sequences, 1]
    numbers[carried] = pieces[numbers[carried] - sequences, 0]
    return np.stack([numbers, begin, tokens], axis=1)[tokens > 0].astype(np.int32)
