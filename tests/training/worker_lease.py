"""Takes the lease of a folder where /proc hides the processes of other users; prints one JSON line.

    worker_lease.py FOLDER PID hidden       a /proc with hidepid=2, as another user; needs root
    worker_lease.py FOLDER PID noaccess     the same with hidepid=1: there are their folders, and nothing can be read
    worker_lease.py FOLDER PID made-up      a made-up /proc without that process, which is said to be of another user
    worker_lease.py FOLDER PID foreign      a made-up /proc of another namespace, where the number is somebody else's

It ends with code 77 where the machine does not allow that.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_telechat import host  # noqa: E402
from megatron_telechat.errors import LeaseError  # noqa: E402
from megatron_telechat.training.lease import Lease  # noqa: E402

NOT_HERE = 77
_NEW_MOUNTS, _PRIVATE = 0x20000, (1 << 18) | (1 << 14)
_NOBODY = 65534


def _system(name: str, *arguments: object) -> None:
    if getattr(ctypes.CDLL(None), name)(*arguments) != 0:
        sys.exit(NOT_HERE)


def hide(hidepid: int) -> None:
    """The processes of others, for this process alone, which goes on as another user."""
    if os.getuid() != 0 or sys.platform != "linux":
        sys.exit(NOT_HERE)
    _system("unshare", _NEW_MOUNTS)
    _system("mount", b"none", b"/", None, _PRIVATE, None)
    _system("mount", b"proc", b"/proc", b"proc", 0, f"hidepid={hidepid}".encode())
    os.setgroups([])
    os.setgid(_NOBODY)
    os.setuid(_NOBODY)
    assert Path("/proc/self/stat").read_text() and not os.access("/proc/1/stat", os.R_OK)


def make_up(pid: int, foreign: bool) -> None:
    """A /proc in which there is this process alone, and a kernel that says of the other one that it is not ours.

    Args:
        foreign: this process has another number in that /proc, and there is a process of the other one's number.
    """
    proc = Path(tempfile.mkdtemp())
    me = os.getpid() + 1 if foreign else os.getpid()
    for number in (me, pid) if foreign else (me,):
        (proc / str(number)).mkdir()
        (proc / str(number) / "stat").write_bytes(Path("/proc/self/stat").read_bytes())
    (proc / "self").symlink_to(str(me))
    host._PROC = proc
    kill = os.kill

    def refuse(number: int, signal: int) -> None:
        if number == pid:
            raise PermissionError(1, "Operation not permitted")
        kill(number, signal)

    os.kill = refuse


def attempt(folder: Path) -> dict:
    said: list[str] = []
    began = time.monotonic()
    error = ""
    try:
        Lease(folder, said.append).take()
    except LeaseError as refused:
        error = str(refused)
    return {"error": error, "said": said, "seconds": time.monotonic() - began}


def main() -> None:
    folder, pid, view = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    if view in ("made-up", "foreign"):
        make_up(pid, view == "foreign")
    else:
        hide({"hidden": 2, "noaccess": 1}[view])
    print(json.dumps(attempt(folder)), flush=True)


if __name__ == "__main__":
    main()
