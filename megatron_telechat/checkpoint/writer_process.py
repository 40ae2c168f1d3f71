"""The process beside a rank that writes its asynchronous saves: functions of this package, one after another.

A process and not a thread: the commit of a save of many ranks takes seconds of Python (boxes, JSON, retention), and
the rank's own Python would wait for the interpreter lock all that time (docs/checkpoints.md has figures). It is started
once, as a program and not by a fork, so that it shares no device, no locks and no threads with the rank; it loads no
torch unless a function needs it; and it ends with the rank, however that ends. Rank and process speak over a pair of
sockets that no other process has, and share the memory of a file descriptor.
"""

from __future__ import annotations

import contextlib
import importlib
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from megatron_telechat.checkpoint.checksums import crc32
from megatron_telechat.checkpoint.names import FileEntry
from megatron_telechat.checkpoint.stores import store_of
from megatron_telechat.errors import ResourceError
from megatron_telechat.host import EndWithParent
from megatron_telechat.locations import Location

_CHUNK_BYTES = 4 << 20
"""Checksum and write take turns on so many bytes."""
_NICENESS = 10
"""Where cores are short, the steps go first. Nothing starves by it: a rank that waits for its save uses no core."""
_gives_way = threading.local()
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Meant for the rank, which waits for its save before it leaves."""
_START = f"import sys; sys.path.insert(0, sys.argv[1]); from {__name__} import main; main()"
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
"""Should a function load torch: it touches no device."""


class WriterProcess:
    """The rank's side. To be made on the main thread: the process ends with the thread that started it.

    Args:
        memory_fd: descriptor of shared memory, which functions find under the same number.
        memory_bytes: taken from the system for it as the first thing, while the rank goes on.
        preload: modules that functions to come will need.
        gives_way: whether all that it does has a lower priority (`give_way`).
    """

    def __init__(self, memory_fd: int, memory_bytes: int = 0, preload: Sequence[str] = (), gives_way: bool = False):
        self._connection, theirs = Pipe()
        numbers = [theirs.fileno(), os.getpid(), memory_fd, memory_bytes, int(gives_way)]
        package_root = Path(__file__).resolve().parents[2]
        # A stop request that reaches the whole process group must not end it before it ignores these signals.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(package_root), *map(str, numbers), *preload],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, **_ENVIRONMENT},
                pass_fds=(theirs.fileno(), memory_fd),
            )
        except OSError as error:
            raise ResourceError(
                f"the process that writes checkpoints cannot be started: {error.strerror or error}",
                "--checkpoint-mode",
                "--checkpoint-mode sync saves without it",
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def submit(self, function: Callable[..., Any], *args: Any) -> None:
        """Let the process call a function of a module; one at a time, each followed by `result`."""
        # A process that has ended says so in `result`.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send((function, args))

    def is_alive(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def is_over(self) -> bool:
        """Whether `result` would return, or raise, at once."""
        return self._connection.poll()

    def result(self) -> Any:
        """Wait for the function; returns what it returned.

        Raises:
            ResourceError: the process has ended.
            Exception: what the function raised.
        """
        try:
            failed, value = self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            code = self._process.wait()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            raise ResourceError(
                f"the process that writes checkpoints {how}; the save was not committed",
                f"process {self._process.pid}",
                "look for the reason in the system's log (a lack of memory?); --checkpoint-mode sync saves without it",
            ) from error
        if failed:
            raise value
        return value

    def wait(self, seconds: float) -> bool:
        """Whether the function is over within so many seconds."""
        return self._connection.poll(seconds)

    def close(self) -> None:
        """End the process, whatever it does."""
        self._connection.close()
        self._process.kill()
        self._process.wait()


@dataclass(frozen=True)
class FileImage:
    """The bytes of a file to be: [start, stop) of the shared memory."""

    path: Location
    start: int
    stop: int


def write_images(memory_fd: int, images: Sequence[FileImage]) -> dict[str, FileEntry]:
    """Write new files from the shared memory, durably; their entries by name.

    Raises OSError with the path, or ResourceError from an object store.
    """
    size = max((image.stop for image in images), default=0)
    if not size:
        return {}
    with mmap.mmap(memory_fd, size, prot=mmap.PROT_READ) as memory, memoryview(memory) as whole:
        return {image.path.name: _write(image.path, whole[image.start : image.stop]) for image in images}


def give_way() -> None:
    """Lower the priority of this thread, and of threads that it starts from now on; once for each thread."""
    if not getattr(_gives_way, "already", False):
        _gives_way.already = True
        with contextlib.suppress(OSError):
            os.nice(_NICENESS)


def _write(path: Location, content: memoryview) -> FileEntry:
    checksum = 0
    try:
        with content:
            with store_of(path).create(path, aligned=True) as sink:
                for start in range(0, len(content), _CHUNK_BYTES):
                    with content[start : start + _CHUNK_BYTES] as chunk:
                        checksum = crc32(chunk, checksum)
                        sink.write(chunk)
            return FileEntry(len(content), f"{checksum:08x}")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def main() -> None:
    """The process: call what the rank asks for until it is gone."""
    connection_fd, parent, memory_fd, memory_bytes, gives_way = map(int, sys.argv[2:7])
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    EndWithParent(parent)()  # where the system cannot (macOS), the end of the pipe tells
    take_memory(memory_fd, memory_bytes)
    for module in sys.argv[7:]:
        importlib.import_module(module)
    if gives_way:
        give_way()
    with Connection(connection_fd) as connection:
        while True:
            try:
                function, args = connection.recv()
            except EOFError:
                return
            try:
                answer = (False, function(*args))
            except Exception as error:
                answer = (True, error)
            connection.send(answer)


def take_memory(memory_fd: int, memory_bytes: int) -> None:
    """Pages of the shared memory, so that the rank's first save need not wait for the system to clear them."""
    if memory_bytes:
        with contextlib.suppress(OSError):
            os.posix_fallocate(memory_fd, 0, memory_bytes)
