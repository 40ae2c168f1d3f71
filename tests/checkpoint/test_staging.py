"""Files of a save in host memory, and the process that writes them: the bytes of `write_safetensors`."""

from __future__ import annotations

import errno
import mmap
import os
import random
import signal
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_telechat.backend import get_backend
from megatron_telechat.checkpoint import asynchronous, disk
from megatron_telechat.checkpoint.files import LazyTensor, lazy, write_safetensors
from megatron_telechat.checkpoint.staging import FileImages, StagingBuffer
from megatron_telechat.checkpoint.stores import posix, store_of
from megatron_telechat.checkpoint.stores.protocol import ALIGNMENT
from megatron_telechat.checkpoint.writer_process import WriterProcess, give_way, write_images
from megatron_telechat.errors import ResourceError


@contextmanager
def writing(device: str, nbytes: int):
    buffer = StagingBuffer(get_backend(device), nbytes)
    writer = WriterProcess(buffer.fd, nbytes)
    try:
        yield buffer, writer
    finally:
        writer.close()
        buffer.close()


def tensors(device: str, scale: int = 1) -> list[LazyTensor]:
    """Odd sizes, every place misaligned for the next type; nothing; a scalar; a transposed one."""
    generator = torch.Generator().manual_seed(scale)
    made = [
        torch.randn(3 * scale, generator=generator).bfloat16(),
        torch.randn(50 * scale, 30, generator=generator),
        torch.zeros(0),
        torch.tensor(True),
        torch.randn(7, 5 * scale, generator=generator).t(),
        torch.arange(11 * scale),
    ]
    return [lazy(str(number), tensor.to(device)) for number, tensor in enumerate(made)]


def save(folder: Path, device: str, buffer: StagingBuffer, writer: WriterProcess, scale: int) -> None:
    """Two files both ways, and compare."""
    folder.mkdir()
    images, found = FileImages(), tensors(device, scale)
    sizes = [images.add(folder / "a", found, {"save": "1"}).size, images.add(folder / "b", found[:2]).size]
    assert all(image.start % ALIGNMENT == 0 for image in images.images), "else they go through the page cache"
    images.copy_to(buffer.memory(images.nbytes), buffer._backend)
    for tensor in found:
        tensor.load().zero_()  # they may change now
    writer.submit(write_images, buffer.fd, images.images)
    entries = writer.result()
    again = tensors(device, scale)
    other = [
        write_safetensors(folder / "c", again, {"save": "1"}),
        write_safetensors(folder / "d", again[:2]),
    ]
    assert [entries["a"], entries["b"]] == other and sizes == [entry.size for entry in other]
    assert (folder / "a").read_bytes() == (folder / "c").read_bytes()
    assert (folder / "b").read_bytes() == (folder / "d").read_bytes()


def check(tmp_path: Path, device: str) -> None:
    with writing(device, 1000) as (buffer, writer):
        for number, scale in enumerate((1, 40, 3)):  # the buffer grows, and is used again
            save(tmp_path / str(number), device, buffer, writer, scale)


@pytest.mark.heavy
def test_the_bytes_of_a_file(tmp_path):
    check(tmp_path, "cpu")


@pytest.mark.heavy
def test_who_gives_way():
    """The process that writes into the shared folder from its start; that of local checkpoints once it writes, because
    a rank that starts waits for what it reads."""
    buffer, lower = StagingBuffer(get_backend("cpu"), 1000), min(19, os.nice(0) + 10)
    for gives_way in (False, True):
        writer = WriterProcess(buffer.fd, gives_way=gives_way)
        found = []
        for function in (None, give_way, give_way):
            if function is not None:
                writer.submit(function)
                writer.result()
            writer.submit(os.nice, 0)
            found.append(writer.result())
        writer.close()
        assert found == [lower if gives_way else os.nice(0), lower, lower]
    buffer.close()


@pytest.mark.heavy
def test_shared_saves_give_way_where_they_pass_the_page_cache(tmp_path, monkeypatch):
    for one_host, lower in ((True, min(19, os.nice(0) + 10)), (False, os.nice(0))):
        monkeypatch.setattr(asynchronous, "is_of_one_host", lambda path, answer=one_host: answer)
        parallel: Any = SimpleNamespace(rank=1)
        saves = asynchronous.AsynchronousSaves(get_backend("cpu"), parallel, 1000, tmp_path)
        saves._writer.submit(os.nice, 0)
        assert saves._writer.result() == lower
        saves.close()


@pytest.mark.gpu
def test_the_bytes_of_a_file_from_a_gpu(tmp_path):
    """Pinned memory, a stream beside the kernels."""
    check(tmp_path, "cuda")


@pytest.mark.heavy
def test_faults_of_the_process_are_said(tmp_path):
    with writing("cpu", 1000) as (buffer, writer):
        images = FileImages()
        images.add(tmp_path / "none" / "a", tensors("cpu"))
        images.copy_to(buffer.memory(images.nbytes), buffer._backend)
        writer.submit(write_images, buffer.fd, images.images)
        with pytest.raises(OSError, match="No such file") as caught:
            writer.result()
        assert caught.value.filename == str(tmp_path / "none" / "a")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(writer.pid, number)  # meant for the rank
        writer.submit(os.getppid)
        assert writer.result() == os.getpid()
        os.kill(writer.pid, signal.SIGKILL)
        writer.submit(os.getppid)
        with pytest.raises(ResourceError, match="was killed by signal 9"):
            writer.result()


# ---- past the page cache --------------------------------------------------------------------


def pages(content: bytes) -> memoryview:
    """The same bytes at the begin of a page."""
    memory = mmap.mmap(-1, len(content))
    memory[:] = content
    return memoryview(memory)


def is_direct(path: Path) -> bool:
    """Whether this process has the file open past the page cache."""
    (number,) = (one.name for one in Path("/proc/self/fd").iterdir() if os.path.realpath(one) == str(path))
    flags = Path(f"/proc/self/fdinfo/{number}").read_text().split("flags:")[1].split()[0]
    return bool(int(flags, 8) & os.O_DIRECT)


def written(path: Path, pieces: list[memoryview]) -> list[bool]:
    """Write a file; whether it was open past the page cache after each piece."""
    found = []
    with store_of(path).create(path, aligned=True) as sink:
        for piece in pieces:
            sink.write(piece)
            found.append(is_direct(path))
    assert path.read_bytes() == b"".join(pieces), path
    return found


CONTENT = random.Random(1).randbytes(5 * ALIGNMENT + 123)


def test_whole_blocks_pass_the_page_cache_and_the_rest_does_not(tmp_path, monkeypatch):
    if disk._file_system(tmp_path) not in ("ext4", "xfs", "btrfs"):
        pytest.skip("needs a disk")
    whole = pages(CONTENT)
    first, rest = whole[: 3 * ALIGNMENT], whole[3 * ALIGNMENT :]
    assert written(tmp_path / "a", [first, rest]) == [True, False], "the last block is not whole"
    assert written(tmp_path / "b", [whole[1:ALIGNMENT], first]) == [False, False]
    assert written(tmp_path / "c", [pages(b"x" + CONTENT)[1 : 1 + ALIGNMENT], first]) == [False, False], "no page"
    assert written(tmp_path / "d", [whole[:0], whole[:100]]) == [True, False]
    monkeypatch.setattr(posix, "is_of_one_host", lambda path: False)
    assert written(tmp_path / "e", [first, rest]) == [False, False], "not where other hosts write too"


@pytest.mark.parametrize("fault", ["refused by the file system", "refused by a write", "short writes"])
def test_a_file_system_that_cannot_do_it_gets_the_same_bytes(tmp_path, monkeypatch, fault):
    class Stream:
        """A file whose writes past the page cache fail, or end early."""

        def __init__(self, stream):
            self._stream, self._calls = stream, 0

        def __getattr__(self, name):
            return getattr(self._stream, name)

        def write(self, data):
            self._calls += 1
            if fault == "refused by a write" and self._calls == 2:
                raise OSError(errno.EINVAL, "Invalid argument")
            return self._stream.write(data[:512] if fault == "short writes" and self._calls == 1 else data)

    def refused(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(posix, "_CHUNK_BYTES", 2 * ALIGNMENT)
    if fault == "refused by the file system":
        monkeypatch.setattr("fcntl.fcntl", refused)
    path = tmp_path / "a"
    with store_of(path).create(path, aligned=True) as sink:
        sink._stream = Stream(sink._stream)  # pyright: ignore[reportAttributeAccessIssue]
        sink.write(pages(CONTENT))
    assert path.read_bytes() == CONTENT
    with pytest.raises(FileExistsError), store_of(path).create(path, aligned=True):
        pass
