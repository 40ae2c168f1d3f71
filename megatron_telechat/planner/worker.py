"""Processes that search, one request at a time each.

A worker is `python -m megatron_telechat.planner.serve`: it reads requests from its standard input until that ends,
which it does with the process that started it, however that ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, TypeVar

from megatron_telechat.errors import ResourceError
from megatron_telechat.planner.messages import decode, encode

_ROOT = Path(__file__).resolve().parents[2]
_LENGTH = 8
"""Bytes before each message that say how long it is."""


class Request(Protocol):
    """What a worker can be asked."""

    def answer(self, memory: dict[str, Any]) -> Any:
        """Computed in the worker. `memory` is kept there from one request to the next."""


class Worker:
    """A process of its own; ends with `close`, or with this process."""

    def __init__(self) -> None:
        self._process = _start()

    def ask(self, request: Request) -> None:
        """Send a request; its answer has to be fetched before the next one.

        Raises:
            ResourceError: the process has ended.
        """
        assert self._process.stdin is not None
        try:
            send(self._process.stdin, request)
        except OSError:
            raise _gone() from None

    def answer(self) -> Any:
        """Wait for the answer.

        Raises:
            ResourceError: the process ended before it had answered.
        """
        assert self._process.stdout is not None
        data = received(self._process.stdout)
        if data is None:
            raise _gone()
        return decode(data)

    def fileno(self) -> int:
        """Readable when the answer, or the end of the process, is there: for `select`."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def close(self) -> None:
        """End it at once, whatever it is at."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            try:
                stream.close()
            except OSError:
                pass  # part of a request was still to be sent


_Self = TypeVar("_Self", bound="Employer")


class Employer:
    """A context whose workers end with it."""

    def __init__(self) -> None:
        self._workers: list[Worker] = []

    def employ(self, number: int) -> None:
        """Start so many."""
        for _ in range(number):
            self._workers.append(Worker())

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.close()


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start() -> subprocess.Popen[bytes]:
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_telechat.planner.serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **threads, "PYTHONPATH": path},
        start_new_session=True,  # an interrupt at the terminal is for the one who started it
    )


def send(stream: IO[bytes], message: Any) -> None:
    """Write a message."""
    data = encode(message)
    stream.write(len(data).to_bytes(_LENGTH, "little") + data)
    stream.flush()


def received(stream: IO[bytes]) -> bytes | None:
    """The next message, encoded; None at the end of the stream."""
    length = stream.read(_LENGTH)
    size = int.from_bytes(length, "little")
    data = stream.read(size) if len(length) == _LENGTH else b""
    return data if data and len(data) == size else None


def _gone() -> ResourceError:
    return ResourceError(
        "a process of the search ended before it had answered",
        "planner",
        "see its message above, if there is one; with too little memory, --processes 1",
    )
