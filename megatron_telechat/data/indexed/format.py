"""``.idx`` files written from streams of lengths, and checksums beside the two files of a dataset. Memory is constant.

The side file ``PREFIX.sums`` holds the size of ``.bin`` and ``.idx`` and a SHA-256 for each 16 MiB of them, so that
a damaged part can be named.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_telechat.data.indexed.header import header_bytes

CHUNK_BYTES = 16 << 20
_ENTRIES = 1 << 20


def bytes_of(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, not copied."""
    return array.data.cast("B")


class ChunkSums:
    """SHA-256 of each 16 MiB of a stream of bytes."""

    def __init__(self):
        self.size = 0
        self.done: list[str] = []
        self._hash = hashlib.sha256()

    def update(self, data: Any) -> None:
        """Take the next bytes of the stream: any contiguous buffer."""
        view = memoryview(data).cast("B")
        while len(view):
            room = CHUNK_BYTES - self.size % CHUNK_BYTES
            part, view = view[:room], view[room:]
            self._hash.update(part)
            self.size += len(part)
            if self.size % CHUNK_BYTES == 0:
                self.done.append(self._hash.hexdigest())
                self._hash = hashlib.sha256()

    def result(self) -> dict[str, Any]:
        """What the side file says of this stream."""
        tail = [self._hash.hexdigest()] if self.size % CHUNK_BYTES else []
        return {"bytes": self.size, "sha256": [*self.done, *tail]}

    def whole_chunks(self) -> list[str]:
        """SHA-256 of each full chunk so far: with the size, what `resumed` goes on from."""
        return list(self.done)

    @classmethod
    def resumed(cls, path: Path, size: int, chunks: list[str]) -> ChunkSums:
        """The state after ``size`` bytes of a file whose whole chunks are known: reads its last, open chunk."""
        sums = cls()
        sums.done, sums.size = list(chunks), len(chunks) * CHUNK_BYTES
        with open(path, "rb") as file:
            file.seek(sums.size)
            sums.update(file.read(size - sums.size))
        return sums


def sums_path(prefix: str) -> Path:
    """The side file of a dataset: ``PREFIX.sums``."""
    return Path(f"{prefix}.sums")


def write_sums(path: Path, bin_sums: dict[str, Any], idx_sums: dict[str, Any]) -> None:
    """Write a side file and fsync it; ``bin_sums`` and ``idx_sums`` are of :meth:`ChunkSums.result`. Raises OSError."""
    content = {"format": 1, "chunk_bytes": CHUNK_BYTES, "bin": bin_sums, "idx": idx_sums}
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def file_sums(path: Path) -> dict[str, Any]:
    """What the side file of a dataset should say of this file: reads all of it. Raises OSError."""
    sums = ChunkSums()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            sums.update(chunk)
    return sums.result()


Arrays = Callable[[], Iterable[np.ndarray]]


def write_index(
    file: BinaryIO, dtype: np.dtype, sequences: int, documents: int, lengths: Arrays, counts: Arrays
) -> ChunkSums:
    """Write an index.

    Args:
        sequences, documents: how many there are.
        lengths: gives, each time it is called, the int32 lengths in pieces.
        counts: the same for the number of sequences of each document.

    Returns:
        The checksums of what was written.
    """
    sums, item = ChunkSums(), np.dtype(dtype).itemsize

    def put(data: Any) -> None:
        file.write(data)
        sums.update(data)

    put(header_bytes(np.dtype(dtype).name, sequences, documents))
    for piece in _cut(lengths()):
        put(bytes_of(np.ascontiguousarray(piece, "<i4")))
    at = 0
    for piece in _cut(lengths()):
        ends = np.cumsum(piece, dtype=np.int64)
        ends *= item
        ends += at
        starts = np.empty_like(ends)
        starts[0], starts[1:] = at, ends[:-1]
        at = int(ends[-1])
        put(bytes_of(starts))
    put(struct.pack("<q", 0))
    at = 0
    for piece in _cut(counts()):
        boundaries = np.cumsum(piece, dtype=np.int64)
        boundaries += at
        at = int(boundaries[-1])
        put(bytes_of(boundaries))
    file.flush()
    os.fsync(file.fileno())
    return sums


def _cut(pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for piece in pieces:
        for begin in range(0, piece.size, _ENTRIES):
            yield piece[begin : begin + _ENTRIES]


def stored(path: Path, dtype: str, begin: int = 0, count: int | None = None) -> Iterator[np.ndarray]:
    """Numbers out of a file in pieces: ``count`` of them (None: all) from byte ``begin``."""
    kind = np.dtype(dtype)
    left = (os.path.getsize(path) - begin) // kind.itemsize if count is None else count
    with open(path, "rb") as file:
        file.seek(begin)
        while left > 0:
            piece = np.fromfile(file, kind, min(left, _ENTRIES))
            if not piece.size:
                return
            left -= piece.size
            yield piece
