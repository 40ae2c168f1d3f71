"""A folder in the Hugging Face layout: its weights tensor by tensor, and all that is not weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_telechat.checkpoint.disk import fsync_folder
from megatron_telechat.checkpoint.files import (
    LazyTensor,
    dtype_of_tag,
    read_file_error,
    write_safetensors,
)
from megatron_telechat.device_kinds import HOST
from megatron_telechat.errors import CheckpointError

CONFIG = "config.json"
_SAFE, _SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
_BIN, _BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_DOWNLOAD = "download or copy the file again"


@dataclass(frozen=True)
class TensorHeader:
    """Where a tensor of the folder lies and what it is."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class HfFolder:
    """Weights of ``folder``: model.safetensors or pytorch_model.bin, whole or in shards with an index.

    Tensors are read one at a time from memory-mapped files. Pickles are read with torch's
    restricted unpickler, which runs no code. Raises CheckpointError naming the file at fault.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.config = read_json(self.folder / CONFIG)
        self._open: tuple[str, Any] = ("", None)
        names, listed = self._files()
        self._pickled = names[0].endswith(".bin")
        self.tensors: dict[str, TensorHeader] = {}
        for name in names:
            for key, header in self._headers(name).items():
                if key in self.tensors:
                    raise CheckpointError(f"{key} is in {self.tensors[key].file} and in {name}", str(self.folder))
                self.tensors[key] = header
        if listed is not None:
            self._check_index(listed)

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, in its own dtype, on the CPU."""
        header = self.tensors[name]
        handle = self._handle(header.file)
        try:
            return handle[name] if self._pickled else handle.get_tensor(name)
        except Exception as error:  # safetensors raises types of its own
            raise read_file_error(self.folder / header.file, error, _DOWNLOAD) from error

    def _files(self) -> tuple[list[str], Mapping[str, str] | None]:
        for single, index in ((_SAFE, _SAFE_INDEX), (_BIN, _BIN_INDEX)):
            if (self.folder / single).is_file():
                return [single], None
            if (self.folder / index).is_file():
                return self._indexed(index)
        raise CheckpointError(
            "no weights there",
            where=str(self.folder),
            fix=f"the folder must hold {_SAFE}, {_SAFE_INDEX}, {_BIN} or {_BIN_INDEX}",
        )

    def _indexed(self, index: str) -> tuple[list[str], Mapping[str, str]]:
        path = self.folder / index
        listed = read_json(path).get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(v, str) for v in listed.values()):
            raise CheckpointError("the index has no weight_map of tensor names to files", where=str(path))
        names = sorted(set(listed.values()))
        suffix = ".safetensors" if index == _SAFE_INDEX else ".bin"
        for name in names:
            if os.path.basename(name) != name or not name.endswith(suffix):
                raise CheckpointError(
                    f"the index names {name!r}, which is not a {suffix} file of the folder", str(path)
                )
            if not (self.folder / name).is_file():
                raise CheckpointError(
                    "a file of the index is missing",
                    str(self.folder / name),
                    "download the folder again; the index lists every file it needs",
                )
        return names, listed

    def _check_index(self, listed: Mapping[str, str]) -> None:
        found = {key: header.file for key, header in self.tensors.items()}
        wrong = sorted(key for key in {*listed, *found} if listed.get(key) != found.get(key))
        if wrong:
            key = wrong[0]
            raise CheckpointError(
                f"{len(wrong)} tensors are not where the index says, the first is {key}: "
                f"index {listed.get(key)}, found in {found.get(key)}",
                where=str(self.folder),
                fix="download the folder again",
            )

    def _handle(self, name: str) -> Any:
        if self._open[0] != name:
            path = self.folder / name
            self._open = ("", None)  # let the last file go before the next is opened
            self._open = (name, _load_pickle(path) if self._pickled else _open_safetensors(path))
        return self._open[1]

    def _headers(self, name: str) -> dict[str, TensorHeader]:
        handle = self._handle(name)
        headers = {}
        if self._pickled:
            for key, value in handle.items():
                headers[key] = TensorHeader(name, value.dtype, tuple(value.shape))
            return headers
        for key in handle.keys():
            view = handle.get_slice(key)
            dtype = dtype_of_tag(view.get_dtype())
            if dtype is None:
                raise CheckpointError(
                    f"{key} has the dtype {view.get_dtype()}",
                    str(self.folder / name),
                    "give unquantised weights: fp32, bf16 or fp16",
                )
            headers[key] = TensorHeader(name, dtype, tuple(view.get_shape()))
        return headers


def _open_safetensors(path: Path) -> Any:
    from safetensors import safe_open

    try:
        return safe_open(path, framework="pt")
    except Exception as error:
        raise read_file_error(path, error, _DOWNLOAD) from error


def _load_pickle(path: Path) -> Mapping[str, torch.Tensor]:
    import pickle
    import zipfile

    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        value = torch.load(path, map_location=HOST, weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise read_file_error(
            path, ValueError(str(error).splitlines()[0] if str(error) else "empty"), _DOWNLOAD
        ) from error
    if not isinstance(value, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items()
    ):
        raise CheckpointError("the file is not a dictionary of tensors", str(path))
    return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise read_file_error(path, error, _DOWNLOAD) from error
    if not isinstance(value, dict):
        raise CheckpointError("the file is not a JSON object", str(path))
    return value


def write_hf_weights(folder: Path, tensors: Sequence[LazyTensor], max_shard_bytes: int) -> list[str]:
    """Write tensors as model.safetensors, or as numbered shards with an index above ``max_shard_bytes``.

    A single tensor larger than that gets a shard of its own. Returns the names of the files.
    """
    shards: list[list[LazyTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    count = len(shards)
    names = [_SAFE] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, {"format": "pt"})
    if count > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / _SAFE_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    fsync_folder(folder)
    return names
