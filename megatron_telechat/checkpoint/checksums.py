"""CRC-32 of files, piece by piece in threads. No torch.

ISA-L computes the CRC-32 of zlib several times as fast, with the processor's carry-less multiplication, and lets go of
the interpreter's lock meanwhile. The pieces of a file are read and summed by several threads, and their sums put
together by arithmetic: a disk that is faster than one core is read at its own speed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from isal.isal_zlib import crc32

from megatron_telechat.checkpoint.stores import store_of
from megatron_telechat.locations import Location

_PIECE_BYTES = 32 << 20
_MAX_THREADS = 8
_POLYNOMIAL = 0xEDB88320


def crc32_combine(first: int, second: int, length: int) -> int:
    """CRC-32 of A followed by B, from those of A and of B and the bytes of B.

    CRC-32 is linear over polynomials modulo 2: appending B multiplies that of A by x^(8 * length). This is what zlib's
    ``crc32_combine`` does.
    """
    return _product(_power_of_x(8 * length), first) ^ second


def _product(a: int, b: int) -> int:
    """Of two polynomials, modulo that of CRC-32; the highest bit is the constant term."""
    out, bit = 0, 1 << 31
    while a:
        if a & bit:
            out ^= b
            a ^= bit
        bit >>= 1
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return out


def _power_of_x(exponent: int) -> int:
    out, square = 1 << 31, 1 << 30
    while exponent:
        if exponent & 1:
            out = _product(square, out)
        square = _product(square, square)
        exponent >>= 1
    return out


def default_threads() -> int:
    """Threads for one process: its share of the cores of this machine, at least 2, so that reads overlap."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(_MAX_THREADS, cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))))


def crc32_of_files(files: Sequence[tuple[Location, int]], threads: int | None = None) -> list[str | OSError]:
    """CRC-32 of each file, 8 hex digits as a manifest keeps it, or the error that its reading met.

    Args:
        files: paths, and how many bytes of each are summed; a file that ends earlier gives the sum of what is there.
        threads: unset: `default_threads`. Each holds 1 MiB, of an object store a piece (32 MiB).
    """
    pieces = [
        (number, start, min(_PIECE_BYTES, size - start))
        for number, (_, size) in enumerate(files)
        for start in range(0, size, _PIECE_BYTES)
    ]
    out: list[int] = [0] * len(files)
    errors: dict[int, OSError] = {}
    with ThreadPoolExecutor(threads or default_threads()) as pool:
        sums = pool.map(lambda piece: _crc32_of_piece(files[piece[0]][0], piece[1], piece[2]), pieces)
        for (number, _, length), found in zip(pieces, sums, strict=True):
            if isinstance(found, OSError):
                errors.setdefault(number, found)
            else:
                out[number] = crc32_combine(out[number], found, length)
    return [errors.get(number, f"{value:08x}") for number, value in enumerate(out)]


def _crc32_of_piece(path: Location, start: int, length: int) -> int | OSError:
    value = 0
    try:
        for piece in store_of(path).pieces(path, start, length):
            value = crc32(piece, value)
    except OSError as error:
        return error
    return value
