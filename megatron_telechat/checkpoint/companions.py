"""Files of a Hugging Face folder that travel with the weights: tokenizer, configuration, code."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_telechat.checkpoint.checksums import crc32_of
from megatron_telechat.checkpoint.disk import disk_error
from megatron_telechat.checkpoint.manifest import FileEntry

_WEIGHT_SUFFIXES = frozenset(
    (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".tflite", ".npz")
)
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def companions(folder: Path) -> list[Path]:
    """Files of a Hugging Face folder that are not weights, relative to it; hidden ones left out."""
    found = []
    for base, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(base, name)
            weights = path.suffix in _WEIGHT_SUFFIXES or name in _INDEXES
            if not weights and not name.startswith(".") and path.is_file():
                found.append(path.relative_to(folder))
    return found


def carry_companions(source: Path | None, target: Path) -> dict[str, FileEntry]:
    """Copy the files that are not weights, unchanged, into ``target`` (a folder of a checkpoint under way).

    Returns them as files of the manifest, named from the checkpoint's folder.

    Raises:
        ResourceError: a file cannot be read or written.
    """
    entries: dict[str, FileEntry] = {}
    if source is None:
        return entries
    for relative in companions(source):
        copied = target / relative
        try:
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / relative, copied)
            with open(copied, "rb+") as stream:
                os.fsync(stream.fileno())
            entry = FileEntry(copied.stat().st_size, crc32_of(copied))
        except OSError as error:
            raise disk_error(Path(error.filename or copied), error) from error
        entries[f"{target.name}/{relative.as_posix()}"] = entry
    return entries
