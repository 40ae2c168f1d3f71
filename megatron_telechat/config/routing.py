"""What a recording of the experts' choices is made for, and which steps it holds; read without torch.

A recording is a folder::

    routing.json                        what the run must have in common with the recorded one (`SHAPE`)
    step_00000012/index.json            which file holds which layers, samples and positions; written last
    step_00000012/rank_00003.safetensors
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_telechat.config.fields import values_of
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.errors import ConfigError

FORMAT = "megatron_telechat routing 1"
MANIFEST, INDEX = "routing.json", "index.json"
SHAPE = ("num_layers", "moe_layer_freq", "num_experts", "moe_router_topk", "global_batch_size", "seq_length")
"""Fields that must be equal; the layout, the micro-batch size and the number of input chunks may differ."""


@dataclass(frozen=True)
class Recording:
    """A recording, its manifest read.

    Attributes:
        path: the folder.
        shape: field of `SHAPE` → its value in the recorded run.
        replayed: the recorded run was a replay itself: the recording holds what its routers would have chosen, not what
            was used.
        data: fingerprint of the data, None where it was not known.
    """

    path: Path
    shape: Mapping[str, int]
    replayed: bool
    data: Mapping[str, Any] | None

    def steps(self) -> tuple[int, ...]:
        """Numbers of the steps that are there as a whole, from 1, in order."""
        found = (re.fullmatch(r"step_(\d+)", folder.name) for folder in self.path.iterdir())
        return tuple(sorted(int(match[1]) for match in found if match and (self.path / match[0] / INDEX).is_file()))

    def differences(self, run: RunConfig) -> list[str]:
        """Fields in which the run is not the recorded one, such as ``num_experts=16, recorded 8``."""
        now = shape_of(run)
        return [f"{name}={now[name]}, recorded {value}" for name, value in self.shape.items() if now[name] != value]


def shape_of(run: RunConfig) -> dict[str, int]:
    """Field of `SHAPE` → its value in this run."""
    values = values_of(run)
    return {name: values[name] for name in SHAPE}


def step_folder(recording: Path, step: int) -> Path:
    """Folder of one recorded step, counted from 1."""
    return recording / f"step_{step:08d}"


def is_recording(path: Path) -> bool:
    """Whether the folder holds the manifest of a recording."""
    return (path / MANIFEST).is_file()


def read_recording(path: Path) -> Recording:
    """Read the manifest of a recording.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    fix = "a folder that a run with --moe-routing-record wrote"
    if not is_recording(path):
        raise ConfigError(f"{path} holds no recording of the routing: there is no {MANIFEST}", "", fix)
    try:
        found = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        known = found.get("format") == FORMAT
        shape = {name: found["shape"][name] for name in SHAPE} if known else {}
        if known and all(type(value) is int for value in shape.values()):
            return Recording(path, shape, bool(found["replayed"]), found.get("data"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ConfigError(f"{path / MANIFEST} is damaged, or not of the format {FORMAT!r}", "", fix)
