"""Faults of the process that writes asynchronous saves: called in it by a test, before a save begins. No torch."""

from __future__ import annotations

import os
import resource
import signal
import time

_made: dict[str, int] = {}


def kill_rank_before(name: str, ordinal: int) -> None:
    """SIGKILL the rank before so manieth call of ``os.NAME`` in this process, which ends with it."""
    original = getattr(os, name)

    def call(*args, **kwargs):
        _made[name] = _made.get(name, 0) + 1
        if _made[name] == ordinal:
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        return original(*args, **kwargs)

    setattr(os, name, call)


def slow_disk(seconds: float, calls: int | None = None) -> None:
    """Every fsync takes so long, or the first ones do."""
    original = os.fsync

    def fsync(handle):
        _made["slow"] = _made.get("slow", 0) + 1
        if calls is None or _made["slow"] <= calls:
            time.sleep(seconds)
        return original(handle)

    os.fsync = fsync


def small_disk(nbytes: int) -> None:
    """No file of this process can grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))


def full_disk_after(saves: int, nbytes: int) -> None:
    """As `small_disk`, after so many files of tensors were synced."""
    original = os.fsync

    def fsync(handle):
        original(handle)
        _made["fsync"] = _made.get("fsync", 0) + 1
        if _made["fsync"] == saves:
            small_disk(nbytes)

    os.fsync = fsync


def end() -> None:
    """This process is killed, such as by a machine that has no memory left."""
    os.kill(os.getpid(), signal.SIGKILL)
