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


def start_of(pid: int) -> int | None:
    """When a process started, in ticks since the boot; None where there is none, or only what its parent has not asked
    about yet. 0 where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except (OSError, ValueError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return 0


def process_mark() -> str:
    """A word for names of files that says which process of the world made them; see `has_ended`."""
    pid = os.getpid()
    return f"{_process_space()}-{pid}-{start_of(pid) or 0}"


def has_ended(mark: str) -> bool | None:
    """Whether the process of a `process_mark` is gone; None where that cannot be told from here: it ran on another
    host, before the last boot, or among other containers, it is hidden from this user, or the word is none."""
    match = _MARK.fullmatch(mark)
    if match is None or match[1] != _process_space() or match[1] == _NOWHERE:
        return None
    pid, start = int(match[2]), start_of(int(match[2]))
    if start is None:
        try:
            os.kill(pid, 0)
        except PermissionError:
            return None  # /proc may hide the processes of other users
        except OSError:
            pass
    return start != int(match[3])


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
