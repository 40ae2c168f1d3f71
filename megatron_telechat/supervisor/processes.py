"""The ranks of one node as processes that end with their supervisor."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from shutil import rmtree

from megatron_telechat.host import PULSE_DIR, EndWithParent, shared_memory

_PATIENCE_S = 0.01


@dataclass(frozen=True)
class Layout:
    """Where the ranks of this node stand in one attempt.

    Attributes:
        attempt: 0 at the start, one more at each restart.
        first, count: ranks of this node: first, first + 1, ...
        world: ranks of all nodes.
        node: number of this node.
        address, port: where rank 0 of the job waits for the others; another port in each attempt, so that nothing of
            an earlier one is met.
    """

    attempt: int
    first: int
    count: int
    world: int
    node: int
    address: str
    port: int

    def variables(self, local_rank: int) -> dict[str, str]:
        """Torchrun's variables of one rank."""
        found = {
            "RANK": self.first + local_rank,
            "WORLD_SIZE": self.world,
            "LOCAL_RANK": local_rank,
            "LOCAL_WORLD_SIZE": self.count,
            "GROUP_RANK": self.node,
            "MASTER_ADDR": self.address,
            "MASTER_PORT": self.port,
            "TORCHELASTIC_RESTART_COUNT": self.attempt,
        }
        return {name: str(value) for name, value in found.items()}


@dataclass(frozen=True)
class Ended:
    """A rank that has ended; `code` is negative where a signal ended it. With `lost_node` it stands for all ranks of a
    node that does not answer."""

    rank: int
    code: int
    host: str = ""
    lost_node: bool = False


class LocalRanks:
    """The processes of one attempt on this node.

    Args:
        command: the program with its arguments.
        environ: what the ranks inherit.
    """

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], layout: Layout):
        self._layout = layout
        self._pulses = tempfile.mkdtemp(prefix="ranks_", dir=shared_memory())
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        for local_rank in range(layout.count):
            variables = {**layout.variables(local_rank), PULSE_DIR: self._pulses}
            self._running[layout.first + local_rank] = subprocess.Popen(
                command,
                env={**environ, **variables},
                stdin=subprocess.DEVNULL,
                # Ctrl-C of a terminal goes to the supervisor alone, which passes it on once.
                start_new_session=True,
                preexec_fn=EndWithParent(os.getpid()),
            )
        self.pids = [process.pid for process in self._running.values()]

    @property
    def running(self) -> bool:
        """Whether a rank of this node has not ended yet."""
        return bool(self._running)

    def ended(self) -> list[Ended]:
        """The ranks that have ended since the last call."""
        found = [rank for rank, process in self._running.items() if _is_over(process.pid)]
        return [self._reap(rank) for rank in found]

    def signal(self, number: int) -> None:
        """Give a signal to every rank that runs."""
        for process in self._running.values():
            process.send_signal(number)

    def end(self) -> list[Ended]:
        """End the ranks that still run, at once, and wait until they are gone: their memory, their devices and their
        ports are free then."""
        for process in self._running.values():
            _kill_session(process.pid)
        while not all(_is_over(process.pid) for process in self._running.values()):
            time.sleep(_PATIENCE_S)
        gone = [self._reap(rank) for rank in list(self._running)]
        rmtree(self._pulses, ignore_errors=True)
        return gone

    def _reap(self, rank: int) -> Ended:
        process = self._running.pop(rank)
        # Before it is waited for: as long as it is not, its number is not given to another process.
        _kill_session(process.pid)
        return Ended(rank, process.wait(), os.uname().nodename)


def _is_over(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _kill_session(pid: int) -> None:
    """End a rank and the processes that it has started."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # PermissionError: macOS, for a process that has ended
