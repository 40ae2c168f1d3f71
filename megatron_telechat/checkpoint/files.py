"""Files of tensors: a streaming safetensors writer with checksum, and what reads them.

The safetensors package writes a file from tensors that are all in memory; here each
tensor is brought to the host when its turn comes, and the checksum is taken on the way.
"""

from __future__ import annotations

import json
import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from megatron_telechat.checkpoint.checksums import crc32
from megatron_telechat.checkpoint.disk import disk_error
from megatron_telechat.checkpoint.names import DTYPE_TAGS, RESTORE_OR_OTHER, FileEntry
from megatron_telechat.checkpoint.ranged import RangedFile
from megatron_telechat.checkpoint.stores import store_of
from megatron_telechat.errors import CheckpointError
from megatron_telechat.locations import Location, Url

# name in a manifest -> (torch dtype, name in a safetensors header)
DTYPES: Mapping[str, tuple[torch.dtype, str]] = {name: (getattr(torch, name), tag) for name, tag in DTYPE_TAGS.items()}
_NAME_OF = {dtype: name for name, (dtype, _) in DTYPES.items()}
_NAME_OF_SAFETENSORS = {tag: name for name, (_, tag) in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype in a manifest. Raises KeyError for one that the format does not store."""
    return _NAME_OF[dtype]


def dtype_named(name: str) -> torch.dtype:
    """The torch dtype of a name in a manifest. Raises KeyError for others; `read_manifest` has refused those."""
    return DTYPES[name][0]


def dtype_of_tag(tag: str) -> torch.dtype | None:
    """The torch dtype of a safetensors header's dtype, None for one we do not store."""
    name = _NAME_OF_SAFETENSORS.get(tag)
    return None if name is None else DTYPES[name][0]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a file to be: its header now, its values when ``load`` is called."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of its values in the file; known without loading them."""
        size = self.dtype.itemsize
        for extent in self.shape:
            size *= extent
        return size


def lazy(name: str, tensor: torch.Tensor) -> LazyTensor:
    """A tensor that is in memory already. It is kept by reference: it must not change before it is written."""
    return LazyTensor(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def write_safetensors(
    path: Location, tensors: Sequence[LazyTensor], metadata: Mapping[str, str] | None = None
) -> FileEntry:
    """Write a new safetensors file, one tensor in host memory at a time; it is durable then.

    Raises ResourceError when the disk is full, read-only or failing, or the file exists.
    """
    prefix = safetensors_prefix(path.name, tensors, metadata)
    try:
        with store_of(path).create(path) as sink, _SumBeside() as beside:
            for data in chain((memoryview(prefix),), map(_bytes_of, tensors)):
                beside.add(data)
                sink.write(data)
            checksum = beside.finish()
    except OSError as error:
        raise disk_error(path, error) from error
    return FileEntry(len(prefix) + sum(tensor.nbytes for tensor in tensors), f"{checksum:08x}")


def safetensors_prefix(
    file_name: str, tensors: Sequence[LazyTensor], metadata: Mapping[str, str] | None = None
) -> bytes:
    """What a safetensors file begins with; the values of the tensors follow it in their order, without gaps."""
    header: dict = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for tensor in tensors:
        assert tensor.name not in header, f"{tensor.name} twice in {file_name}"
        span = [position, position + tensor.nbytes]
        header[tensor.name] = {
            "dtype": DTYPES[_NAME_OF[tensor.dtype]][1],
            "shape": list(tensor.shape),
            "data_offsets": span,
        }
        position = span[1]
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head


class _SumBeside:
    """The checksum of a file, in another thread while one writes it; it lets go of the interpreter's lock. At most two
    tensors are kept for it."""

    def __init__(self) -> None:
        self._pool, self._value = ThreadPoolExecutor(1), 0
        self._summing: deque[Future] = deque()

    def __enter__(self) -> _SumBeside:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def add(self, data: memoryview) -> None:
        """The next bytes of the file; they must not change before `finish`."""
        while len(self._summing) > 1:
            self._summing.popleft().result()
        self._summing.append(self._pool.submit(self._sum, data))

    def finish(self) -> int:
        """The CRC-32 of all bytes."""
        for one in self._summing:
            one.result()
        return self._value

    def _sum(self, data: memoryview) -> None:
        self._value = crc32(data, self._value)


def _bytes_of(tensor: LazyTensor) -> memoryview:
    values = tensor.load().detach()
    assert values.dtype == tensor.dtype and tuple(values.shape) == tensor.shape, tensor.name
    flat = values.cpu().contiguous().reshape(-1)
    # numpy's stubs do not say below Python 3.12 that an array has a buffer
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")  # pyright: ignore[reportArgumentType]


def open_tensors(path: Location) -> Any:
    """A safetensors file to read slices of; what it offers is that of ``safetensors.safe_open`` and `RangedFile`.

    Raises an error of the library, of the store, or ValueError.
    """
    if isinstance(path, Url):
        return RangedFile(lambda start, stop: store_of(path).read(path, start, stop))
    from safetensors import safe_open

    return safe_open(path, framework="pt")


def read_file_error(path: Location, error: Exception, fix: str = RESTORE_OR_OTHER) -> CheckpointError:
    """The CheckpointError of a file that cannot be opened or read; ``fix`` where no checkpoint is meant."""
    return CheckpointError(f"cannot read the file: {error}", where=str(path), fix=fix)
