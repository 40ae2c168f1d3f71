"""What the processes of a job must know of the host that they run on. No torch."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import signal
import sys
from pathlib import Path

PULSE_DIR = "MEGATRON_TELECHAT_PULSE_DIR"
"""Environment variable: the folder in which the ranks of this node say what they are at (`training.pulse`), empty at
the start of each attempt."""

_SHARED_MEMORY = Path("/dev/shm")
_PROC = Path("/proc")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_CGROUP = Path("/sys/fs/cgroup")
_PR_SET_PDEATHSIG = 1
_MARK = re.compile(r"([0-9a-f]{12})-(\d+)-(\d+)")
_NOWHERE = "0" * 12


def shared_memory() -> Path | None:
    """A folder in memory, so that no slow disk holds a process up; None: where temporary files go."""
    return _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None


def boot_id() -> str:
    """Identifier of this boot of the machine; "" where the system has none."""
    with contextlib.suppress(OSError):
        return _BOOT_ID.read_text().strip()
    return ""


def pid_namespace() -> str:
    """In which the numbers of processes count: containers of one machine have each their own; "" where the system does
    not tell."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def start_of_this_process() -> int:
    """In ticks since the boot; 0 where the system does not tell."""
    seen = _seen(os.getpid())
    return seen[1] if seen is not None else 0


def process_lives(pid: int, start: int) -> bool | None:
    """Whether a process of this boot and of this namespace of process numbers lives; None where that cannot be told.

    The kernel says whether a number is anybody's, and hides nobody. Whose it is by now, only /proc can say, which may
    hide the processes of other users (``hidepid``) or show those of another namespace.

    Args:
        start: when it started, see `start_of_this_process`; tells it from a later one with its number.
    """
    if pid <= 0:
        return None  # signals to these go to groups
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass  # another user's; or no number that this system knows, which it then says nothing of
    if sys.platform != "linux":
        return start == 0  # nothing hides a process, and nothing tells it from a later one
    seen = _seen(pid)
    if seen is None or not start:
        return None
    state, began = seen
    # What only its parent has not asked about yet is gone.
    return state not in "ZX" and began == start


def _seen(pid: int) -> tuple[str, int] | None:
    """State and start of a process; None where /proc does not show it, or is none of this namespace."""
    try:
        if os.readlink(_PROC / "self") != str(os.getpid()):
            return None
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def process_mark() -> str:
    """A word for names of files that says which process of the world made them; see `has_ended`."""
    pid = os.getpid()
    return f"{_process_space()}-{pid}-{start_of_this_process()}"


def has_ended(mark: str) -> bool | None:
    """Whether the process of a `process_mark` is gone; None where that cannot be told from here: it ran on another
    host, before the last boot, or among other containers, it is hidden from this user, or the word is none."""
    match = _MARK.fullmatch(mark)
    if match is None or match[1] != _process_space() or match[1] == _NOWHERE:
        return None
    lives = process_lives(int(match[2]), int(match[3]))
    return None if lives is None else not lives


def _process_space() -> str:
    """12 hex digits for where a number of a process means one process: a boot of a host, and a container there."""
    boot, namespace = boot_id(), pid_namespace()
    if not boot or not namespace:
        return _NOWHERE
    # The name, too: copies of one virtual machine's memory have the same boot.
    return hashlib.blake2b(f"{os.uname().nodename}/{boot}/{namespace}".encode(), digest_size=6).hexdigest()


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
