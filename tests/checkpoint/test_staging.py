"""Files of a save in host memory, and the process that writes them: the bytes of `write_safetensors`."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megatron_telechat.backend import get_backend
from megatron_telechat.checkpoint.files import LazyTensor, lazy, write_safetensors
from megatron_telechat.checkpoint.staging import FileImages, StagingBuffer
from megatron_telechat.checkpoint.writer_process import WriterProcess, write_images
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
