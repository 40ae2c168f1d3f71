"""The files of a save in host memory, byte for byte, before a process of its own writes them (`writer_process`)."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megatron_telechat.checkpoint.files import LazyTensor, safetensors_prefix
from megatron_telechat.checkpoint.names import FileEntry
from megatron_telechat.checkpoint.stores.protocol import ALIGNMENT
from megatron_telechat.checkpoint.writer_process import FileImage
from megatron_telechat.errors import ResourceError
from megatron_telechat.locations import Location

if TYPE_CHECKING:
    from megatron_telechat.backend import Backend

_NOT_YET = ""
"""The checksum of a file that was not written yet."""


class StagingBuffer:
    """Host memory of one rank, shared with its writer process and used by every save; pinned where the device copies
    faster into such memory. It has no name in any file system and ends with the processes that hold it.

    Args:
        nbytes: what is expected to be needed.
    """

    def __init__(self, backend: Backend, nbytes: int):
        self._backend = backend
        self.fd = os.memfd_create("checkpoint", os.MFD_CLOEXEC)
        self._nbytes = nbytes
        self._memory: torch.Tensor | None = None
        os.ftruncate(self.fd, nbytes)

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self._nbytes

    def expect(self, nbytes: int) -> None:
        """So many bytes will be needed; before the first call of `memory`. Raises OSError."""
        assert self._memory is None
        self._nbytes = max(self._nbytes, nbytes)
        os.ftruncate(self.fd, self._nbytes)

    def memory(self, nbytes: int) -> torch.Tensor:
        """uint8 [at least nbytes]: the memory; other tensors of it are void once it had to grow.

        Raises:
            ResourceError: the system has not that much.
        """
        if self._memory is None or self._memory.numel() < nbytes:
            self._release()
            try:
                if nbytes > self._nbytes:
                    os.ftruncate(self.fd, nbytes)
                    self._nbytes = nbytes
                flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
                mapped = mmap.mmap(self.fd, self._nbytes, flags=flags)
            except OSError as error:
                raise ResourceError(
                    f"no {nbytes / 2**30:.2f} GiB of host memory for a checkpoint's copy: {error.strerror or error}",
                    "--checkpoint-mode async",
                    "--checkpoint-mode sync needs none",
                ) from error
            self._memory = torch.frombuffer(mapped, dtype=torch.uint8)  # keeps the mapping
            self._backend.pin(self._memory)
        return self._memory

    def close(self) -> None:
        """Give the memory back."""
        self._release()
        os.close(self.fd)

    def _release(self) -> None:
        if self._memory is not None:
            self._backend.unpin(self._memory)
            self._memory = None


@dataclass(frozen=True)
class _Content:
    prefix: bytes
    tensors: tuple[LazyTensor, ...]


class FileImages:
    """The files of one save of this rank: first their places in the buffer, later their bytes."""

    def __init__(self) -> None:
        self.images: list[FileImage] = []
        self._contents: list[_Content] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer that they take."""
        return self.images[-1].stop if self.images else 0

    def add(
        self, path: Location, tensors: Sequence[LazyTensor], metadata: Mapping[str, str] | None = None
    ) -> FileEntry:
        """Give a safetensors file its place; in the place of `files.write_safetensors`. The tensors are kept by
        reference until `copy_to` has returned.

        Returns:
            Its entry, still without a checksum.
        """
        prefix = safetensors_prefix(path.name, tensors, metadata)
        start = -(-self.nbytes // ALIGNMENT) * ALIGNMENT
        size = len(prefix) + sum(tensor.nbytes for tensor in tensors)
        self.images.append(FileImage(path, start, start + size))
        self._contents.append(_Content(prefix, tuple(tensors)))
        return FileEntry(size, _NOT_YET)

    def copy_to(self, memory: torch.Tensor, backend: Backend) -> None:
        """Fill the places; the copies of a device's tensors run beside its kernels. Returns when all bytes are there.

        Any thread may call it. The tensors must not change meanwhile, and may be let go afterwards.
        """
        with torch.no_grad(), backend.copies_beside():
            for image, content in zip(self.images, self._contents, strict=True):
                at = image.start + len(content.prefix)
                memory[image.start : at] = torch.frombuffer(bytearray(content.prefix), dtype=torch.uint8)
                for tensor in content.tensors:
                    values = tensor.load().detach()
                    assert values.dtype == tensor.dtype and tuple(values.shape) == tensor.shape, tensor.name
                    if tensor.nbytes:
                        flat = values.contiguous().reshape(-1).view(torch.uint8)
                        memory[at : at + tensor.nbytes].copy_(flat, non_blocking=True)
                    at += tensor.nbytes
                assert at == image.stop, image.path.name
        self._contents = []


class CopyBeside:
    """A copy of one save in a thread of its own, beside the forward and backward of the next step.

    Args:
        work: copies, and hands over what follows.
        name: of the thread.

    Attributes:
        error: what the work raised; to be looked at once it is over.
    """

    def __init__(self, work: Callable[[], None], name: str):
        self.error: Exception | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether nothing reads the tensors of the state any more."""
        return not self._thread.is_alive()

    def wait(self) -> float:
        """Wait until it is over; the seconds that took."""
        started = time.perf_counter()
        self._thread.join()
        return time.perf_counter() - started

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:
            self.error = error
