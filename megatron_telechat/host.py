"""What the processes of a job must know of the host that they run on. No torch."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

PULSE_DIR = "MEGATRON_TELECHAT_PULSE_DIR"
"""Environment variable: the folder in which the ranks of this node say what they are at (`training.pulse`), empty at
the start of each attempt."""

_SHARED_MEMORY = Path("/dev/shm")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_CGROUP = Path("/sys/fs/cgroup")
_PR_SET_PDEATHSIG = 1


def shared_memory() -> Path | None:
    """A folder in memory, so that no slow disk holds a process up; None: where temporary files go."""
    return _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None


def boot_id() -> str:
    """Identifier of this boot of the machine; "" where the system has none."""
    with contextlib.suppress(OSError):
        return _BOOT_ID.read_text().strip()
    return ""


def available_bytes() -> int:
    """Host memory that this process could still get: of the machine, and of its control group if that has a limit."""
    import psutil

    free = psutil.virtual_memory().available
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            used = int((_CGROUP / "memory.current").read_text())
            stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
            free = min(free, int(limit) - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass  # no control group of this kind: the machine alone limits
    return max(free, 0)


class EndWithParent:
    """Lets a process be killed when its parent ends, however that ends; Linux only. To be made in the parent, or with
    its number; called in the child, also between fork and exec.

    Args:
        parent: its process id.
    """

    def __init__(self, parent: int):
        self._parent = parent
        self._library = ctypes.CDLL(None) if sys.platform == "linux" else None

    def __call__(self) -> None:
        """From now on. Ends the process at once where the parent is gone already."""
        if self._library is not None:
            self._library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self._parent:
            os._exit(1)
