"""Bytes on disk: a streaming safetensors writer, checksums, fsync, free space.

The safetensors package writes a file from tensors that are all in memory; here each
tensor is brought to the host when its turn comes, and the checksum is taken on the way.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_telechat.checkpoint.names import DTYPE_TAGS, FileEntry
from megatron_telechat.errors import CheckpointError, ResourceError

FREE_SPACE_FACTOR = 1.2
_CHUNK_BYTES = 16 << 20

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
    path: Path, tensors: Sequence[LazyTensor], metadata: Mapping[str, str] | None = None
) -> FileEntry:
    """Write a new safetensors file, one tensor in host memory at a time, and fsync it.

    Raises ResourceError when the disk is full, read-only or failing, or the file exists.
    """
    prefix = safetensors_prefix(path.name, tensors, metadata)
    size = len(prefix)
    try:
        with open(path, "xb") as stream:
            stream.write(prefix)
            checksum = zlib.crc32(prefix)
            for tensor in tensors:
                data = _bytes_of(tensor)
                stream.write(data)
                checksum = zlib.crc32(data, checksum)
                size += len(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise disk_error(path, error) from error
    return FileEntry(size, f"{checksum:08x}")


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


def _bytes_of(tensor: LazyTensor) -> memoryview:
    values = tensor.load().detach()
    assert values.dtype == tensor.dtype and tuple(values.shape) == tensor.shape, tensor.name
    flat = values.cpu().contiguous().reshape(-1)
    # numpy's stubs do not say below Python 3.12 that an array has a buffer
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")  # pyright: ignore[reportArgumentType]


def disk_error(path: Path, error: OSError) -> ResourceError:
    """The ResourceError of a write that failed: names ``path`` and the system's reason."""
    return ResourceError(
        f"cannot write: {error.strerror or error}",
        where=str(path),
        fix="free some space, or give another folder (--save of a run, --output of a conversion); committed "
        "checkpoints are untouched",
    )


def crc32_of(path: Path) -> str:
    """CRC-32 of a whole file, 8 hex digits, as `FileEntry` keeps it; holds 16 MiB at a time. Raises OSError."""
    checksum = 0
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return f"{checksum:08x}"


def write_bytes(path: Path, data: bytes) -> FileEntry:
    """Write a new small file and fsync it."""
    try:
        with open(path, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise disk_error(path, error) from error
    return FileEntry(len(data), f"{zlib.crc32(data):08x}")


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable (a rename is not, until its folder is synced)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_free_space(folder: Path, needed_bytes: int) -> None:
    """Refuse before the first byte. ``needed_bytes`` is what will be written, without the margin.

    Raises ResourceError when less than 1.2 times that is free.
    """
    free = shutil.disk_usage(folder).free
    wanted = int(FREE_SPACE_FACTOR * needed_bytes)
    if free < wanted:
        raise ResourceError(
            f"{free / 2**30:.2f} GiB free, {wanted / 2**30:.2f} GiB wanted for the checkpoint "
            f"({needed_bytes / 2**30:.2f} GiB and a margin)",
            where=str(folder),
            fix="free some space, give another folder with --save, or keep fewer with --keep-last",
        )


RESTORE_OR_OTHER = "restore the file from a copy, or use another checkpoint (--load-step)"


def read_file_error(path: Path, error: Exception, fix: str = RESTORE_OR_OTHER) -> CheckpointError:
    """The CheckpointError of a file that cannot be opened or read; ``fix`` where no checkpoint is meant."""
    return CheckpointError(f"cannot read the file: {error}", where=str(path), fix=fix)
