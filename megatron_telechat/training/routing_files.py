"""The files of a recording of the experts' choices: boxes of layers, samples and positions, whatever the layout.

A rank writes for a step one safetensors file with ``experts.L`` [samples, positions, k] (uint8, int16 or int32) and
``gaps.L`` [samples, positions] (fp32) for each of its MoE layers L: k + 4 bytes a token and layer with up to 256
experts. When all files are there, rank 0 writes the index of the step; without it the step does not count.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_telechat.config.routing import FORMAT, INDEX, MANIFEST, step_folder
from megatron_telechat.errors import DataError, ResourceError

KINDS = ("experts", "gaps")


@dataclass(frozen=True)
class Box:
    """What one file holds, and what one rank routes.

    Attributes:
        name: of the file.
        layers: zero-based numbers of MoE layers.
        samples: numbers within the step, in the order of the file's rows.
        start, stop: positions of the sequence.
    """

    name: str
    layers: tuple[int, ...]
    samples: tuple[int, ...]
    start: int
    stop: int


def write_manifest(recording: Path, shape: Mapping[str, int], replayed: bool, data: Mapping[str, Any] | None) -> None:
    """Begin a recording. Raises ResourceError."""
    _make(recording)
    _write(recording / MANIFEST, _json({"format": FORMAT, "shape": dict(shape), "replayed": replayed, "data": data}))


def begin_step(recording: Path, step: int) -> None:
    """Make the folder of a step; one that was recorded before counts no longer. Raises ResourceError."""
    folder = step_folder(recording, step)
    _make(folder)
    try:
        (folder / INDEX).unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def write_box(
    recording: Path, step: int, box: Box, experts: Mapping[int, np.ndarray], gaps: Mapping[int, np.ndarray]
) -> None:
    """Write one rank's file. Raises ResourceError."""
    from safetensors.numpy import save

    tensors = {f"experts.{layer}": np.ascontiguousarray(array) for layer, array in experts.items()}
    tensors |= {f"gaps.{layer}": np.ascontiguousarray(array) for layer, array in gaps.items()}
    _write(step_folder(recording, step) / box.name, save(tensors))


def commit_step(recording: Path, step: int, boxes: Sequence[Box]) -> None:
    """The files of all ranks are there: write the index. Raises ResourceError."""
    _write(step_folder(recording, step) / INDEX, _json({"step": step, "files": [asdict(box) for box in boxes]}))


class StepReader:
    """One recorded step, read by layer, sample and position.

    Raises:
        DataError: from all methods, when a file is missing, damaged, or does not hold what the index says.
    """

    def __init__(self, recording: Path, step: int):
        self.folder = step_folder(recording, step)
        try:
            found = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
            self.boxes = [
                Box(f["name"], tuple(f["layers"]), tuple(f["samples"]), int(f["start"]), int(f["stop"]))
                for f in found["files"]
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(self.folder / INDEX, error) from error

    def read(self, kind: str, layer: int, samples: Sequence[int], start: int, stop: int) -> np.ndarray:
        """Experts [samples, stop - start, k] or gaps [samples, stop - start] of a layer.

        Args:
            kind: one of `KINDS`.
        """
        rows = {sample: row for row, sample in enumerate(samples)}
        out, filled = None, np.zeros((len(samples), stop - start), dtype=bool)
        for box in self.boxes:
            begin, end = max(start, box.start), min(stop, box.stop)
            mine = [(rows[sample], row) for row, sample in enumerate(box.samples) if sample in rows]
            if layer not in box.layers or begin >= end or not mine:
                continue
            array = self._load(box, f"{kind}.{layer}")
            if out is None:
                out = np.zeros((*filled.shape, *array.shape[2:]), dtype=array.dtype)
            to, at = (list(part) for part in zip(*mine, strict=True))
            out[to, begin - start : end - start] = array[at, begin - box.start : end - box.start]
            filled[to, begin - start : end - start] = True
        if out is None or not filled.all():
            raise _damaged(
                self.folder, f"it lacks {kind} of layer {layer} for {int((~filled).sum())} of {filled.size} tokens"
            )
        return out

    def _load(self, box: Box, name: str) -> np.ndarray:
        from safetensors import SafetensorError, safe_open

        path = self.folder / box.name
        try:
            with safe_open(path, framework="np") as file:
                array = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise _damaged(path, error) from error
        if array.shape[:2] != (len(box.samples), box.stop - box.start):
            raise _damaged(path, f"{name} has the shape {list(array.shape)}")
        return array


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1).encode()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _write(path: Path, data: bytes) -> None:
    """The whole file under its name, or no change."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> ResourceError:
    return ResourceError(
        f"cannot write {path}: {error.strerror}",
        "moe_routing_record",
        "free the disk, or another folder for --moe-routing-record",
    )


def _damaged(path: Path, why: object) -> DataError:
    return DataError(f"the recording is damaged: {why}", str(path), "record the step again")
