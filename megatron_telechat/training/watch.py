"""The watch over a rank: its pulse, its stacks on request, and the monitor of its node."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import megatron_telechat
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.errors import StopAtStart, UserError
from megatron_telechat.host import PULSE_DIR, boot_id, shared_memory
from megatron_telechat.parallel.agreement import gather_objects, is_lost_rank, lost_ranks_reported
from megatron_telechat.training.monitor import STACKS_SIGNAL, Job, Ranks
from megatron_telechat.training.pulse import PULSE, Activity, Phase, read_pulses, stack_path

_SHARE_OF_COLLECTIVE_LIMIT = 0.8
_LOOK_S = 1.0
_MONITOR = "import sys; from megatron_telechat.training.monitor import main; sys.exit(main(sys.argv[1:]))"


def hang_limit_s(run: RunConfig) -> float:
    """How long no rank of a node may move, in seconds; 0: for ever."""
    minutes = run.parallel.hang_timeout_minutes
    if minutes is None:
        minutes = _SHARE_OF_COLLECTIVE_LIMIT * run.parallel.distributed_timeout_minutes
    return 60 * minutes


class Watch:
    """Begins with the process, ends with it. Whatever goes wrong with it ends no training.

    Args:
        environ: rank, local rank and, from a launcher, the folder of the pulse files.
    """

    def __init__(self, run: RunConfig, environ: Mapping[str, str]):
        self._run = run
        self._rank = int(environ.get("RANK", "0"))
        self._local_rank = int(environ.get("LOCAL_RANK", "0"))
        self._local_world = int(environ.get("LOCAL_WORLD_SIZE", "1"))
        self._world = int(environ.get("WORLD_SIZE", "1"))
        self._given = environ.get(PULSE_DIR)
        self._stacks: TextIO | None = None
        self._monitor: subprocess.Popen[bytes] | None = None
        if self._given:
            self._open(Path(self._given), owns=False)

    def open_together(self) -> None:
        """Where no launcher gave a folder: one of the node, made by its local rank 0. Collective over all ranks."""
        made: str | None = None
        if not self._given and self._local_rank == 0:
            with contextlib.suppress(OSError):
                made = tempfile.mkdtemp(prefix="megatron_telechat_pulse_", dir=shared_memory())
        everyone = gather_objects((_node(), made))
        if self._given:
            return
        mine = next((folder for node, folder in everyone if node == _node() and folder), None)
        if mine is None:
            _warn("no folder for the pulse files of this node: hangs and lost ranks will have no name")
        else:
            self._open(Path(mine), owns=True)

    def who_is_gone(self) -> str:
        """Which ranks of this node are gone, for the message of one that lost contact; "" where none is known."""
        if PULSE.path is None:
            return ""
        folder, ranks = PULSE.path.parent, Ranks()
        deadline = time.monotonic() + _LOOK_S
        while True:
            found = []
            for beat in read_pulses(folder):
                name = f"rank {beat.rank} (host {beat.host}, pid {beat.pid})"
                if beat.phase is Phase.FAILED:
                    found.append(f"{name} ended with an error of its own")
                elif beat.phase is not Phase.LEFT and not ranks.alive(beat):
                    found.append(f"{name} is gone; it was at {beat.where}")
            # What was killed closes its connections before its process is gone.
            if found or time.monotonic() > deadline:
                return "; ".join(found)
            time.sleep(0.05)

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Around the work: what ends it is told to those who ask who is gone.

        Raises:
            ResourceError: contact with another rank was lost; it names who is gone.
        """
        try:
            with lost_ranks_reported(self.who_is_gone):
                yield
        except BaseException as error:
            lost = error.__cause__ is not None and is_lost_rank(error.__cause__)
            others_too = isinstance(error, StopAtStart) or (isinstance(error, UserError) and (error.agreed or lost))
            PULSE.turn_to(Activity.ENDED, Phase.LEFT if others_too else Phase.FAILED)
            raise

    def close(self) -> None:
        """The training is over."""
        PULSE.turn_to(Activity.ENDED, Phase.LEFT)
        if self._monitor is not None and self._monitor.stdin is not None:
            with contextlib.suppress(OSError):
                self._monitor.stdin.close()
        if self._stacks is not None:
            faulthandler.unregister(STACKS_SIGNAL)
            self._stacks.close()

    def _open(self, folder: Path, owns: bool) -> None:
        try:
            # The signal would end a process that has not registered for it; the pulse tells others whom to send it to.
            self._stacks = open(stack_path(folder, self._rank), "w", encoding="utf-8")
            faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True)
            PULSE.open(folder, self._rank, self._local_rank)
            if self._local_rank == 0:
                self._monitor = self._start_monitor(folder, owns)
        except (OSError, ValueError) as error:
            _warn(f"no pulse files in {folder}: {error}; hangs and lost ranks will have no name")

    def _start_monitor(self, folder: Path, owns: bool) -> subprocess.Popen[bytes] | None:
        limit_s = hang_limit_s(self._run)
        if not limit_s and not owns:
            return None
        nodes = max(1, self._world // max(1, self._local_world))
        index_s = 60 * self._run.data.data_index_timeout_minutes
        job = Job(str(folder), str(self._run.run_dir.absolute()), limit_s, index_s, nodes, owns)
        package = str(Path(megatron_telechat.__file__).parents[1])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        return subprocess.Popen(
            [sys.executable, "-c", _MONITOR, json.dumps(asdict(job)), str(os.getpid())],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            # Ctrl-C of a terminal is for the ranks.
            start_new_session=True,
        )


def _node() -> str:
    """Names a node and what it sees as its files: containers of one machine are several."""
    return f"{os.uname().nodename}/{boot_id()}"


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
