"""What virtual ranks report, without torch: written as JSON by each rank, read by whoever compares them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Call:
    """One collective, or one message, as a rank started it.

    Attributes:
        kind: "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "broadcast", "send" or "receive".
        group: its name, the same on all of its ranks.
        description: what megatron-core calls the group.
        size, rank: ranks of the group, and the place of this one.
        bytes: of the larger of the two buffers.
        dtype: of it.
        splits: of an all-to-all, rows received from and sent to each rank.
        peer: of a message, the place of the other rank in the group.
        scope: what the rank was at.
    """

    kind: str
    group: str
    description: str
    size: int
    rank: int
    bytes: int
    dtype: str
    splits: tuple[tuple[int, ...], ...] = ()
    peer: int | None = None
    scope: str = "other"


@dataclass
class ScopeWork:
    """Kernels of one scope of a step.

    Attributes:
        launches: kernels started.
        flops: of matrix products and attention; a multiplication and an addition are two.
        bytes: read and written by all kernels, each operand once.
    """

    launches: int = 0
    flops: float = 0.0
    bytes: float = 0.0

    def add(self, launches: int, flops: float, moved: float) -> None:
        """Count some more."""
        self.launches += launches
        self.flops += flops
        self.bytes += moved


@dataclass(frozen=True)
class RankRecord:
    """One executed step of one virtual rank.

    Attributes:
        rank, stage: number of the rank, and its pipeline stage.
        microbatches: executed.
        resident_bytes: on the device after the step.
        peaks: most bytes in each phase of the step: forward and backward, optimizer.
        work: kernels by scope.
        calls: exchanges in order.
        syncs: [what the host waits for, file:line, how often], of one step.
        seconds, host_bytes: that building and the step took here, and the most memory of this machine.
    """

    rank: int
    stage: int
    microbatches: int
    resident_bytes: int
    peaks: Mapping[str, int]
    work: Mapping[str, ScopeWork]
    calls: tuple[Call, ...]
    syncs: tuple[tuple[str, str, int], ...]
    seconds: float
    host_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were alive at once."""
        return max(self.peaks.values())

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> RankRecord:
        """What :meth:`write` wrote."""
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        values["work"] = {scope: ScopeWork(**work) for scope, work in values["work"].items()}
        values["calls"] = tuple(
            Call(**{**call, "splits": tuple(map(tuple, call["splits"]))}) for call in values["calls"]
        )
        values["syncs"] = tuple(map(tuple, values["syncs"]))
        return cls(**values)
