"""The nodes of a job: the supervisor of node 0 leads, those of the others do what it says, each over a TCP connection.

Messages are lines of JSON. No command travels: every node starts the one it was given itself.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import select
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from megatron_telechat.errors import EXIT_SIGNAL, ConfigError, ResourceError
from megatron_telechat.supervisor.processes import Ended, Layout, LocalRanks

_SYSTEM_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST_PORT, _PORT_TRIES = 20000, 20
_HELLO_S = 5.0
_RETRY_S = 0.5
_KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 30_000}
"""A node without power sends no end of its connection: its silence is noticed after about half a minute."""


class Node(Protocol):
    """A node as its leader sees it.

    Attributes:
        number: of the node.
        ranks: how many run on it.
        asked: signals that its supervisor received, in order.
    """

    number: int
    ranks: int
    asked: list[int]

    @property
    def running(self) -> bool:
        """Whether a rank has not ended yet."""
        ...

    def start(self, layout: Layout) -> None:
        """Start the ranks of an attempt."""
        ...

    def ended(self) -> list[Ended]:
        """Ranks that have ended since the last call."""
        ...

    def signal(self, number: int) -> None:
        """Give a signal to the ranks that run."""
        ...

    def end(self) -> None:
        """End the ranks that run, at once; `running` says when they are gone."""
        ...


class LocalNode:
    """This node."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], ranks: int, asked: list[int]):
        self.number, self.ranks, self.asked = 0, ranks, asked
        self._command, self._environ = command, environ
        self._processes: LocalRanks | None = None

    @property
    def running(self) -> bool:
        """Whether a rank has not ended yet."""
        return self._processes is not None and self._processes.running

    @property
    def pids(self) -> list[int]:
        """Processes of the ranks of this attempt, or of the last one."""
        return self._processes.pids if self._processes is not None else []

    def start(self, layout: Layout) -> None:
        """Start the ranks of an attempt."""
        self._processes = LocalRanks(self._command, self._environ, layout)

    def ended(self) -> list[Ended]:
        """Ranks that have ended since the last call."""
        return self._processes.ended() if self._processes is not None else []

    def signal(self, number: int) -> None:
        """Give a signal to the ranks that run."""
        if self._processes is not None:
            self._processes.signal(number)

    def end(self) -> None:
        """End the ranks that run, and wait until they are gone."""
        if self._processes is not None:
            self._processes.end()


class Line:
    """A connection that carries lines of JSON."""

    def __init__(self, connection: socket.socket):
        self._socket = connection
        self._rest = b""
        self.open = True
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def fileno(self) -> int:
        """For select."""
        return self._socket.fileno()

    def send(self, **message: Any) -> None:
        """Send a message; a connection that broke is noticed here or at the next `received`."""
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.open = False

    def received(self, wait_s: float = 0.0) -> list[dict[str, Any]]:
        """The messages that came, waiting for at most so long for the first of them."""
        if self.open and select.select([self._socket], [], [], wait_s)[0]:
            try:
                data = self._socket.recv(1 << 16)
            except OSError:
                data = b""
            self.open = bool(data)
            self._rest += data
        *lines, self._rest = self._rest.split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """Close the connection."""
        self.open = False
        self._socket.close()


class RemoteNode:
    """Another node, by the connection of its supervisor."""

    def __init__(self, line: Line, number: int, ranks: int, host: str):
        self.number, self.ranks, self.host = number, ranks, host
        self.asked: list[int] = []
        self.line = line
        self._first = 0
        self._running = False
        self._ended: list[Ended] = []

    @property
    def connected(self) -> bool:
        """Whether its supervisor is still there."""
        return self.line.open

    @property
    def running(self) -> bool:
        """Whether a rank has not ended yet."""
        return self._running

    def start(self, layout: Layout) -> None:
        """Start the ranks of an attempt."""
        self._first, self._running = layout.first, True
        self.line.send(kind="start", **asdict(layout))

    def ended(self) -> list[Ended]:
        """Ranks that have ended since the last call; one that was lost stands for a node without contact."""
        found: list[Ended] = []
        for message in self.line.received():
            if message["kind"] == "ended":
                found.append(Ended(message["rank"], message["code"], message["host"]))
            elif message["kind"] == "over":
                self._running = False
            elif message["kind"] == "asked":
                self.asked.append(message["signal"])
        if not self.line.open and self._running:
            self._running = False
            found.append(Ended(self._first, -9, self.host, lost_node=True))
        return found

    def signal(self, number: int) -> None:
        """Give a signal to the ranks that run."""
        self.line.send(kind="signal", number=number)

    def end(self) -> None:
        """End the ranks that run."""
        self.line.send(kind="end")


class Others:
    """The other nodes, for the one that leads.

    Args:
        listener: where their supervisors come in; None: there are none.
        count: how many there are.
        job: what all supervisors of a job have in common.
    """

    def __init__(self, listener: socket.socket | None, count: int, job: str):
        self._listener, self._count, self._job = listener, count, job
        self._nodes: dict[int, RemoteNode] = {}

    @property
    def nodes(self) -> list[RemoteNode]:
        """Those that are connected, by number."""
        return [self._nodes[number] for number in sorted(self._nodes)]

    def gathered(self) -> bool:
        """Let in who waits, and tell whether all are there."""
        self._nodes = {number: node for number, node in self._nodes.items() if node.connected}
        while self._listener is not None and select.select([self._listener], [], [], 0)[0]:
            connection, _ = self._listener.accept()
            self._let_in(Line(connection))
        return len(self._nodes) == self._count

    def missing(self) -> list[int]:
        """The numbers of nodes that are not there."""
        return [number for number in range(1, self._count + 1) if number not in self._nodes]

    def finish(self, code: int) -> None:
        """The job is over."""
        for node in self._nodes.values():
            node.line.send(kind="finish", code=code)
            node.line.close()
        if self._listener is not None:
            self._listener.close()

    def _let_in(self, line: Line) -> None:
        try:
            hello = next(one for one in line.received(_HELLO_S) if one["kind"] == "hello")
        except (StopIteration, ValueError, KeyError, TypeError):
            line.close()  # whoever that is, no supervisor
            return
        number = hello["node"] if hello["node"] is not None else next(iter(self.missing()), self._count + 1)
        before = self._nodes.get(number)
        if before is not None and before.host == hello["host"] and hello["node"] is not None:
            self._nodes.pop(number).line.close()  # it was restarted, and its old connection has no end
        if hello["job"] != self._job:
            why = f"it belongs to job {hello['job']!r}, and this is {self._job!r} (--rdzv-id)"
        elif number not in self.missing():
            why = f"node {number} is there already, or above --nnodes {self._count + 1}"
        else:
            self._nodes[number] = RemoteNode(line, number, hello["ranks"], hello["host"])
            return
        line.send(kind="refused", why=why)
        line.close()


def follow(
    local: LocalNode, address: str, port: int, node: int | None, job: str, wait_s: float, say: Callable[[str], None]
) -> int:
    """Do what the supervisor of node 0 says until the job is over. Returns its exit code.

    Raises:
        ConfigError: it does not want this node.
        ResourceError: it was not there for so many seconds.
    """
    while True:
        line = _connect(address, port, wait_s, lambda: bool(local.asked))
        if line is None:
            return EXIT_SIGNAL  # asked to stop while no rank runs
        try:
            line.send(kind="hello", node=node, ranks=local.ranks, host=os.uname().nodename, job=job)
            code = _obey(local, line)
        finally:
            local.end()
            line.close()
        if code is not None:
            return code
        say(f"lost contact with node 0 at {address}:{port}; the ranks of this node were ended, waiting for it")


def _obey(local: LocalNode, line: Line) -> int | None:
    """The job's exit code; None when the connection broke."""
    passed, started = 0, False
    while line.open:
        for message in line.received(0.02):
            kind = message.pop("kind")
            if kind == "start":
                local.start(Layout(**message))
                started = True
            elif kind == "signal":
                local.signal(message["number"])
            elif kind == "end":
                local.end()
            elif kind == "finish":
                return message["code"]
            elif kind == "refused":
                raise ConfigError(f"node 0 refused this node: {message['why']}", "--node-rank")
        for number in local.asked[passed:]:
            line.send(kind="asked", signal=number)
            passed += 1
        for one in local.ended():
            line.send(kind="ended", rank=one.rank, code=one.code, host=one.host)
        if started and not local.running:
            started = False
            line.send(kind="over")
    return None


def _connect(address: str, port: int, wait_s: float, over: Callable[[], bool]) -> Line | None:
    deadline = time.monotonic() + wait_s
    while not over():
        try:
            return Line(socket.create_connection((address, port), timeout=_HELLO_S))
        except OSError as error:
            if time.monotonic() > deadline:
                raise ResourceError(
                    f"node 0 at {address}:{port} was not there for {wait_s:.0f} s: {error.strerror or error}",
                    "--rdzv-endpoint",
                    "start every node with the same address, and check that its port is open",
                ) from error
        time.sleep(_RETRY_S)
    return None


def listen(address: str, port: int, node: int | None) -> socket.socket | None:
    """The door of node 0; None on another node.

    Without a number of the node, the one that has the address leads.

    Raises:
        ResourceError: node 0 cannot listen there.
    """
    if node not in (0, None):
        return None
    listener = socket.socket()
    # Connections of an attempt before stay reserved for a minute. (On Linux a second listener is still refused.)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("" if node == 0 else address, port))
        listener.listen(128)
        return listener
    except OSError as error:
        listener.close()
        elsewhere = isinstance(error, socket.gaierror) or error.errno in (errno.EADDRNOTAVAIL, errno.EADDRINUSE)
        if node is None and elsewhere:
            return None
        raise ResourceError(
            f"cannot listen on port {port}: {error.strerror}", "--rdzv-endpoint", "give a free port"
        ) from error


def free_port() -> int:
    """A port that is free on this host now, where possible one that the system gives to nobody who asks for any port.

    Until rank 0 listens there, the imports of a rank take seconds, in which every process group of another job asks for
    some.
    """
    ports = _ports_to_name()
    for port in random.SystemRandom().sample(ports, k=min(_PORT_TRIES, len(ports))):
        with contextlib.closing(socket.socket()) as found, contextlib.suppress(OSError):
            found.bind(("", port))
            return port
    with contextlib.closing(socket.socket()) as found:
        found.bind(("", 0))
        return found.getsockname()[1]


def _ports_to_name() -> range:
    """Ports outside of those that the system gives to who names none."""
    low, high = 32768, 65535
    with contextlib.suppress(OSError, ValueError):
        low, high = map(int, _SYSTEM_PORTS.read_text().split())
    return max(range(_FIRST_PORT, low), range(high + 1, 65536), key=len)
