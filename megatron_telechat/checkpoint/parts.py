"""What the ranks of a save have written, each by itself and all together. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_telechat.checkpoint.manifest import StoredBox, TensorEntry
from megatron_telechat.checkpoint.names import FileEntry
from megatron_telechat.errors import CheckpointError
from megatron_telechat.tensors.boxes import tiling_fault


@dataclass
class Part:
    """What one rank wrote: its files and its boxes of global tensors."""

    files: dict[str, FileEntry] = field(default_factory=dict)
    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    rng: dict[str, Any] | None = None


def merge_parts(parts: Iterable[Part]) -> Part:
    """The parts of all ranks as one. Raises CheckpointError when they do not tile every tensor exactly."""
    merged, faults = join_parts(parts)
    if faults:
        problems = [f"{key}: {fault}" for key, fault in faults.items()]
        raise CheckpointError(
            "the ranks do not hold every tensor exactly once: " + "; ".join(problems[:5]),
            fix="nothing was saved; this is a bug, please report it with the layout",
        )
    return merged


def join_parts(parts: Iterable[Part]) -> tuple[Part, dict[str, str]]:
    """Parts as one, and by its key what is wrong with each tensor that they do not tile exactly."""
    merged, faults = Part(), {}
    boxes: dict[str, list[StoredBox]] = {}
    for part in parts:
        assert not merged.files.keys() & part.files.keys(), "two ranks wrote the same file"
        merged.files.update(part.files)
        for key, entry in part.tensors.items():
            known = merged.tensors.setdefault(key, replace(entry, boxes=boxes.setdefault(key, [])))
            if (known.dtype, known.shape) != (entry.dtype, entry.shape):
                faults[key] = f"{known.dtype} {known.shape} and {entry.dtype} {entry.shape}"
            boxes[key].extend(entry.boxes)
    for key, entry in merged.tensors.items():
        fault = tiling_fault(entry.shape, [stored.box for stored in entry.boxes])
        if fault:
            faults.setdefault(key, fault)
    return merged, faults
