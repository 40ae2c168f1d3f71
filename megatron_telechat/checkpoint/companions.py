"""Files of a Hugging Face folder that travel with the weights: tokenizer, configuration, code."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_telechat.checkpoint.checksums import crc32
from megatron_telechat.checkpoint.disk import disk_error
from megatron_telechat.checkpoint.names import FileEntry
from megatron_telechat.checkpoint.stores import store_of
from megatron_telechat.locations import Location

_WEIGHT_SUFFIXES = frozenset(
    (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".tflite", ".npz")
)
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_CHUNK_BYTES = 16 << 20


def companions(folder: Location) -> list[str]:
    """Names, relative to it, of the files of a Hugging Face folder that are not weights; hidden ones left out."""
    store, found = store_of(folder), []
    for name in store.files(folder):
        parts = name.split("/")
        weights = (folder / name).suffix in _WEIGHT_SUFFIXES or parts[-1] in _INDEXES
        if not weights and not any(part.startswith(".") for part in parts) and store.is_file(folder / name):
            found.append(name)
    return found


def carry_companions(source: Location | None, target: Location) -> dict[str, FileEntry]:
    """Copy the files that are not weights, unchanged, into ``target`` (a folder of a checkpoint under way).

    Returns them as files of the manifest, named from the checkpoint's folder.

    Raises:
        ResourceError: a file cannot be read or written.
    """
    if source is None:
        return {}
    return {f"{target.name}/{name}": _copy(source / name, target / name) for name in companions(source)}


def _copy(source: Location, target: Location) -> FileEntry:
    store, size, checksum = store_of(source), 0, 0
    try:
        store_of(target).make_folder(target.parent)
        with store_of(target).create(target) as sink:
            while data := store.read(source, size, size + _CHUNK_BYTES):
                checksum = crc32(data, checksum)
                sink.write(memoryview(data))
                size += len(data)
    except OSError as error:
        place = target if error.filename is None else Path(error.filename)
        raise disk_error(place, error) from error
    return FileEntry(size, f"{checksum:08x}")


def write_companion(target: Location, data: bytes) -> FileEntry:
    """Write a new file of this program beside them. Raises ResourceError."""
    try:
        with store_of(target).create(target) as sink:
            sink.write(memoryview(data))
    except OSError as error:
        raise disk_error(target, error) from error
    return FileEntry(len(data), f"{crc32(data):08x}")


@contextmanager
def on_this_machine(folder: Location) -> Iterator[Path]:
    """The companions of a folder as files of this machine, while the block runs: the folder itself, or copies."""
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="companions-") as copies:
        carry_companions(folder, Path(copies))
        yield Path(copies)
