"""A process that has imported what ranks import, and forks them: a rank of a test starts in milliseconds, not seconds.

The harness starts two of these, so that two ranks do not order their sets alike, and speaks to each over a socket: a
line of JSON for a rank to start, the number of its process back, and when it has ended its exit code. A rank is a
session of its own, has the environment, folder, arguments and output files of a process that was started anew, and runs
its script as ``__main__``. It dies with the zygote, which dies with the harness.

What is imported here is imported on the CPU backend, as the doors do it. A test of imports, of another device, or of
environment variables that are read while torch is loaded asks the harness for a fresh process.

A rank ends without the interpreter's last collection, which takes a third of a second of every one: it waits for its
threads, runs what was left to be run at exit, and writes out what it has said. Where that last collection is part of
the question, a test starts processes anew.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import os
import runpy
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve until the harness is gone; in a forked rank, run its script instead."""
    _die_with_parent()
    connection = socket.socket(fileno=int(sys.argv[1]))
    with _silent():
        _load()
    gc.collect()
    gc.freeze()  # a collection in a rank would touch, and so copy, the memory that all of them share
    wake, woken = socket.socketpair()
    for one in (wake, woken):
        one.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    request = _serve(connection, wake)
    if request is None:
        return
    for one in (connection, wake, woken):
        one.close()
    _become(request)


def _load() -> None:
    sys.path.insert(0, str(ROOT))
    from megatron_telechat.backend import get_backend

    get_backend("cpu").install()
    import safetensors.torch  # noqa: F401
    import torch._dynamo  # noqa: F401  the first optimizer of a process loads it: more than a second

    import megatron_telechat.checkpoint
    import megatron_telechat.cli.pretrain
    import megatron_telechat.data
    import megatron_telechat.training.loop  # noqa: F401

    sys.path.remove(str(ROOT))


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing goes to standard error: packages warn while they are loaded, once in each process."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _serve(connection: socket.socket, wake: socket.socket) -> dict[str, Any] | None:
    """Fork what is asked for. Returns the request in a forked rank; None in the zygote once the harness is gone."""
    import select

    pending = b""
    connection.sendall(b'{"ready": true}\n')
    while True:
        ready, _, _ = select.select([connection, wake], [], [])
        if wake in ready:
            while _drained(wake):
                pass
            for pid, status in _ended():
                _say(connection, {"pid": pid, "code": os.waitstatus_to_exitcode(status)})
        if connection in ready:
            data = connection.recv(1 << 20)
            if not data:
                return None
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                request = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    return request
                _say(connection, {"started": pid})


def _say(connection: socket.socket, answer: dict[str, Any]) -> None:
    connection.sendall(json.dumps(answer).encode() + b"\n")


def _drained(wake: socket.socket) -> bytes:
    try:
        return wake.recv(4096)
    except BlockingIOError:
        return b""


def _ended() -> list[tuple[int, int]]:
    found = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        found.append((pid, status))


def _become(request: dict[str, Any]) -> None:
    """The rank: what a process that was started anew would find."""
    import random

    import numpy

    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    _die_with_parent()
    for number, path in ((1, request["stdout"]), (2, request["stderr"])):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(handle, number)
        os.close(handle)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    script, *words = request["command"]
    sys.argv[:] = [script, *words]
    own = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [str(Path(script).parent), *filter(None, own), *sys.path[1:]]
    random.seed()
    numpy.random.seed()
    os._exit(_run(script))


def _run(script: str) -> int:
    """The exit code of a script; all is done that an interpreter does at its end, but for freeing what there is."""
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = _code_of(stop)
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # closed, or nobody reads it any more
            code = code or 120
    return code


def _code_of(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return (stop.code or 0) & 0xFF
    print(stop.code, file=sys.stderr)
    return 1


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
