"""What each rank is at: a small memory-mapped file a rank, read by a process beside the ranks (`training.monitor`).

A change of phase packs six numbers into the map: no system call, no lock, well under a microsecond. The file of a rank
that was killed, or that stands, still says what it was at.
"""

from __future__ import annotations

import contextlib
import enum
import mmap
import os
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MAGIC = b"pulse/01"
_WHO = struct.Struct("<8sqqq64s")
"""Magic, rank, local rank, process id, host."""
_NOW = struct.Struct("<qqqqqq")
"""Number of the change, activity, phase, step, monotonic nanoseconds, number of the change once more."""
_SIZE = 4096
_READS = 100


class Activity(enum.IntEnum):
    """What the run is at, as a person would say it."""

    STARTING = 0
    TRAINING = 1
    EVALUATION = 2
    SAVING = 3
    SWITCHING_A_STAGE = 4
    LOCATING = 5
    ENDED = 6

    @property
    def text(self) -> str:
        """For messages."""
        return self.name.lower().replace("_", " ")


class Phase(enum.IntEnum):
    """What a rank is at within its activity."""

    IMPORTS = 0
    JOINING = 1
    MODEL = 2
    LOADING = 3
    DATA_INDEX = 4
    MEASURING = 5
    BATCH = 6
    FORWARD = 7
    BACKWARD = 8
    SCHEDULE = 9
    PIPELINE_EXCHANGE = 10
    GRADIENT_REDUCTION = 11
    LOSS_REDUCTION = 12
    GRADIENT_NORM = 13
    OPTIMIZER = 14
    REPORT = 15
    WRITING = 16
    LEFT = 17
    FAILED = 18
    STAGING = 19

    @property
    def text(self) -> str:
        """For messages."""
        return self.name.lower().replace("_", " ")


WAITS = frozenset(
    {Phase.JOINING, Phase.PIPELINE_EXCHANGE, Phase.GRADIENT_REDUCTION, Phase.LOSS_REDUCTION, Phase.GRADIENT_NORM}
)
"""Phases that are a wait for other ranks: whoever stands in one of them is not the cause."""
OVER = frozenset({Phase.LEFT, Phase.FAILED})
"""The rank ended by its own will: after a lost rank, or by an error of its own."""


class Pulse:
    """The pulse of this process. Until :meth:`open` it keeps what it is told to itself."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.step = 0
        self._activity = int(Activity.STARTING)
        self._phase = int(Phase.IMPORTS)
        self._count = 0
        self._map: mmap.mmap | bytearray = bytearray(_SIZE)
        self._pack = _NOW.pack_into

    def open(self, folder: Path, rank: int, local_rank: int) -> None:
        """Write into ``folder`` from now on. Raises OSError."""
        path = pulse_path(folder, rank)
        who = _WHO.pack(_MAGIC, rank, local_rank, os.getpid(), socket.gethostname().encode()[:64])
        with open(path, "w+b") as stream:
            # Written in full: a page that the disk has no room for would end the process later, at a mere store.
            stream.write(who.ljust(_SIZE, b"\0"))
            stream.flush()
            self._map = mmap.mmap(stream.fileno(), _SIZE)
        self.path = path
        self.enter(Phase(self._phase))

    def enter(self, phase: int) -> None:
        """This phase begins."""
        self._phase = phase
        self._count = count = self._count + 1
        self._pack(
            self._map, _WHO.size, count, self._activity, phase, self.step, time.monotonic_ns(), count
        )  # fmt: skip

    @contextlib.contextmanager
    def within(self, activity: Activity, phase: Phase) -> Iterator[None]:
        """Around an activity that begins with this phase; then what was before goes on."""
        before = self._activity, self._phase
        self._activity = int(activity)
        self.enter(phase)
        yield
        # Not after an error: the file tells where the rank was when it came.
        self._activity, self._phase = before
        self.enter(self._phase)

    def turn_to(self, activity: Activity, phase: Phase) -> None:
        """From now on the run is at this."""
        self._activity = int(activity)
        self.enter(phase)


PULSE = Pulse()
"""Of this process: a rank has one, as it has one standard output."""


@dataclass(frozen=True)
class Beat:
    """What a pulse file says.

    Attributes:
        pid: process id on its node.
        count: changes of phase so far.
        step: completed steps.
        since_s: begin of the phase, on the monotonic clock of the node.
    """

    rank: int
    local_rank: int
    pid: int
    host: str
    count: int
    activity: Activity
    phase: Phase
    step: int
    since_s: float

    @property
    def where(self) -> str:
        """``forward (training), step 13``; the step is the one under way."""
        if self.activity in (Activity.STARTING, Activity.ENDED):
            return f"{self.phase.text} ({self.activity.text})"
        return f"{self.phase.text} ({self.activity.text}), step {self.step + (self.activity == Activity.TRAINING)}"


def pulse_path(folder: Path, rank: int) -> Path:
    """The file of a rank."""
    return folder / f"rank_{rank:05d}.pulse"


def stack_path(folder: Path, rank: int) -> Path:
    """The file that a rank writes its stacks to when it is asked for them."""
    return folder / f"rank_{rank:05d}.stack"


def read_pulse(path: Path) -> Beat | None:
    """One rank's pulse; None where the file is not there, or not yet whole."""
    for _ in range(_READS):
        try:
            raw = path.read_bytes()
        except OSError:
            return None
        if len(raw) < _WHO.size + _NOW.size or not raw.startswith(_MAGIC):
            return None
        _, rank, local_rank, pid, host = _WHO.unpack_from(raw)
        begun, activity, phase, step, since_ns, done = _NOW.unpack_from(raw, _WHO.size)
        if begun == done:
            name = host.rstrip(b"\0").decode(errors="replace")
            return Beat(rank, local_rank, pid, name, begun, Activity(activity), Phase(phase), step, since_ns / 1e9)
    return None


def read_pulses(folder: Path) -> list[Beat]:
    """All ranks of the node, by rank."""
    beats = (read_pulse(path) for path in sorted(folder.glob("rank_*.pulse")))
    return [beat for beat in beats if beat is not None]
