"""Slices of a safetensors file of which only ranges of bytes can be asked for, as of an object store."""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from megatron_telechat.checkpoint.names import DTYPE_TAGS

_FIRST_BYTES = 64 << 10
"""The header of most files, in one request."""
_HEADER_LIMIT = 100 << 20  # that of the safetensors library
_GAP_BYTES = 1 << 20
"""Bytes that nobody wants are read as long as a further request would cost more."""
_DTYPES = {tag: getattr(torch, name) for name, tag in DTYPE_TAGS.items()}


class RangedFile:
    """What a reader of checkpoints uses of ``safetensors.safe_open``.

    Args:
        read: bytes [start, stop) of the file, fewer where it ends earlier.

    Raises ValueError for a header that is damaged, and what ``read`` raises.
    """

    def __init__(self, read: Callable[[int, int], bytes]):
        self._read = read
        first = read(0, _FIRST_BYTES)
        if len(first) < 8:
            raise ValueError("the file is too short for a header")
        (length,) = struct.unpack("<Q", first[:8])
        if length > _HEADER_LIMIT:
            raise ValueError(f"the header says to have {length} bytes")
        text = first[8 : 8 + length]
        text += read(_FIRST_BYTES, 8 + length) if 8 + length > _FIRST_BYTES else b""
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError("the header is no object")
        header.pop("__metadata__", None)
        self._header, self._data = header, 8 + length

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self._header)

    def get_slice(self, name: str) -> RangedTensor:
        """A tensor, to be read by slices. Raises KeyError, TypeError or ValueError where the header says none."""
        entry = self._header[name]
        (begin, end), shape = entry["data_offsets"], tuple(map(int, entry["shape"]))
        return RangedTensor(self._read, entry["dtype"], shape, self._data + begin, end - begin)

    def get_tensor(self, name: str) -> torch.Tensor:
        """A whole tensor. Raises as `get_slice`."""
        found = self.get_slice(name)
        return found[tuple(slice(0, extent) for extent in found.get_shape())]


class RangedTensor:
    """A tensor of such a file."""

    def __init__(
        self, read: Callable[[int, int], bytes], tag: str, shape: tuple[int, ...], start: int, nbytes: int
    ) -> None:
        self._read, self._tag, self._shape, self._start = read, tag, shape, start
        if any(extent < 0 for extent in shape) or nbytes != math.prod(shape) * _DTYPES[tag].itemsize:
            raise ValueError(f"{nbytes} bytes are not {tag} {shape}")

    def get_shape(self) -> list[int]:
        """Of the whole tensor."""
        return list(self._shape)

    def get_dtype(self) -> str:
        """Its name in a header."""
        return self._tag

    def __getitem__(self, wanted: Sequence[slice]) -> torch.Tensor:
        """The slices, one an axis, each with a start and a stop; on the CPU, memory of its own."""
        dtype: Any = _DTYPES[self._tag]
        sizes = [one.stop - one.start for one in wanted]
        out = torch.empty(sizes, dtype=dtype)
        if not out.numel():
            return out
        for lead in _leads(self._shape, [(one.start, one.stop) for one in wanted], dtype.itemsize):
            axis = len(lead)
            inner = math.prod(self._shape[axis + 1 :])
            first, last = (wanted[axis].start, wanted[axis].stop) if axis < len(self._shape) else (0, 1)
            at = self._start + (_flat(self._shape, lead) + first * inner) * dtype.itemsize
            stop = at + (last - first) * inner * dtype.itemsize
            data = self._read(at, stop)
            if len(data) != stop - at:
                raise ValueError(f"the file ends within a tensor: {len(data)} bytes in place of {stop - at}")
            rows = torch.frombuffer(bytearray(data), dtype=dtype).view(last - first, *self._shape[axis + 1 :])
            place = tuple(index - one.start for index, one in zip(lead, wanted, strict=False))
            if axis < len(self._shape):
                out[place].copy_(rows[(slice(None), *wanted[axis + 1 :])])
            else:
                out[place].copy_(rows[0])
        return out


def _leads(shape: Sequence[int], wanted: Sequence[tuple[int, int]], itemsize: int) -> Iterator[tuple[int, ...]]:
    """The requests of a box: each reads, below these leading indices, all rows of the next axis that are wanted. A
    request goes on over what is not wanted between two rows, if that is little."""
    axis = 0
    while axis < len(shape):
        row = math.prod(shape[axis + 1 :])
        kept = math.prod(stop - start for start, stop in wanted[axis + 1 :])
        if (row - kept) * itemsize <= _GAP_BYTES or axis + 1 == len(shape):
            break
        axis += 1
    return itertools.product(*(range(*one) for one in wanted[:axis]))


def _flat(shape: Sequence[int], lead: Sequence[int]) -> int:
    """Elements before the place that the leading indices name."""
    return sum(index * math.prod(shape[axis + 1 :]) for axis, index in enumerate(lead))
