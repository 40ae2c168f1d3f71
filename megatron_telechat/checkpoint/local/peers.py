"""How the processes beside the ranks (`writer_process`) hand parts of local checkpoints to each other. No torch.

They speak TCP of their own, and not through the process groups of the training: the bytes of a mirror then pass neither
the rank's interpreter nor its communicators, nothing waits in a destructor for a node that is gone, and the end of a
process is the end of its connections. Who connects must know the secret of the job, which the ranks share when they
join. Nothing that is received is code: one line of JSON, then bytes of a length that was said before.

    put   a part: its files as they lie in the memory of the rank, then its manifest; answered once all of it is on disk
    get   a range of a file of a part that lies here
"""

from __future__ import annotations

import contextlib
import hmac
import json
import mmap
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megatron_telechat.errors import ResourceError

_LINE_BYTES = 1 << 20
_CHUNK_BYTES = 4 << 20
_LENGTH = struct.Struct("<Q")
_PATIENCE_S = 300.0
"""A peer that says nothing for so long is gone; a disk that syncs gigabytes may be silent for minutes."""
_FILE_NAME = re.compile(r"rank_\d{5,}(-\d{5,})?\.safetensors")
_SAVE = re.compile(r"[0-9a-f]{32}")

Address = tuple[str, int]
Answer = Callable[["Channel", Mapping[str, Any]], None]
"""Reads what follows a request, and answers it."""


class Channel:
    """One connection: lines of JSON and bytes. Raises OSError, also where the peer is gone."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(_PATIENCE_S)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._stream = connection.makefile("rb")

    def send(self, message: Mapping[str, Any]) -> None:
        """A line."""
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """A line; None at the end. Raises ValueError for what is none."""
        line = self._stream.readline(_LINE_BYTES)
        if not line:
            return None
        found = json.loads(line)
        if not isinstance(found, dict):
            raise ValueError("no object")
        return found

    def send_bytes(self, data: memoryview | bytes) -> None:
        """Bytes whose number the peer knows."""
        self._socket.sendall(data)

    def chunks(self, length: int, in_pages: bool = False) -> Iterator[memoryview]:
        """So many bytes, piece by piece; each is void when the next is asked for.

        Args:
            in_pages: each lies at the begin of a page of memory, and all but the last are as long.
        """
        size = min(length, _CHUNK_BYTES)
        buffer = memoryview(mmap.mmap(-1, size) if in_pages and size else bytearray(size))
        while length:
            wanted = min(length, size)
            have = self._fill(buffer[:wanted], wanted if in_pages else 1)
            yield buffer[:have]
            length -= have

    def _fill(self, buffer: memoryview, least: int) -> int:
        """Read at least so many bytes, through the buffer of the stream: what it has read ahead is part of them."""
        have = 0
        while have < least:
            count = self._stream.readinto(buffer[have:])
            if not count:
                raise ConnectionResetError("the connection ended")
            have += count
        return have

    def bytes(self, length: int) -> bytes:
        """So many bytes."""
        return b"".join(bytes(chunk) for chunk in self.chunks(length))

    def send_sized(self, data: bytes) -> None:
        """Bytes behind their number."""
        self._socket.sendall(_LENGTH.pack(len(data)) + data)

    def sized(self, most: int) -> bytes:
        """What `send_sized` sent. Raises ValueError for more than ``most``."""
        (length,) = _LENGTH.unpack(self.bytes(_LENGTH.size))
        if length > most:
            raise ValueError(f"{length} bytes")
        return self.bytes(length)

    def close(self) -> None:
        """End the connection."""
        with contextlib.suppress(OSError):
            self._stream.close()
            self._socket.close()


class Server:
    """Answers peers in threads, until the process ends.

    Args:
        host: the address to listen on.
        secret: that a peer must know.
        answers: by the name of a request.

    Raises:
        OSError: the address cannot be had.
    """

    def __init__(self, host: str, secret: str, answers: Mapping[str, Answer]):
        self._secret, self._answers = secret, answers
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=128)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="local checkpoints", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        channel = Channel(connection)
        # What is no request, too: of it nothing is kept.
        expected = (OSError, ValueError, KeyError, TypeError, struct.error)
        with contextlib.suppress(*expected), contextlib.closing(channel):
            greeting = channel.receive()
            if greeting is None or not hmac.compare_digest(str(greeting.get("secret")), self._secret):
                return
            while (request := channel.receive()) is not None:
                answer = self._answers.get(str(request.get("do")))
                if answer is None:
                    return
                answer(channel, request)


def connect(address: Address, secret: str) -> Channel:
    """A connection to the process beside another rank. Raises OSError."""
    channel = Channel(socket.create_connection(address, timeout=30.0))
    channel.send({"secret": secret})
    return channel


class RemotePart:
    """A part that lies on another node, to be read by ranges of its files; threads take turns.

    Raises ResourceError where that node does not answer: it is no damage.
    """

    def __init__(self, address: Address, secret: str, rank: int, step: int, save: str):
        self._address, self._secret = address, secret
        self._about = {"do": "get", "rank": rank, "step": step, "save": save}
        self._channel: Channel | None = None
        self._turn = threading.Lock()

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file, fewer where it ends earlier."""
        with self._turn:
            return self._ask(name, start, stop)

    def _ask(self, name: str, start: int, stop: int) -> bytes:
        if self._channel is not None:
            # A connection that was not used for some minutes has been ended by the other side.
            with contextlib.suppress(OSError, ValueError, struct.error):
                return self._read(self._channel, name, start, stop)
            self.close()
        try:
            self._channel = connect(self._address, self._secret)
            return self._read(self._channel, name, start, stop)
        except (OSError, ValueError, struct.error) as error:
            self.close()
            raise ResourceError(
                f"a local checkpoint cannot be read from another node: {error}",
                f"{self._address[0]} port {self._address[1]}, {name}",
                "check the network between the nodes and run the same command again; without "
                "--non-persistent-save-interval a run goes on from the shared folder",
            ) from error

    def _read(self, channel: Channel, name: str, start: int, stop: int) -> bytes:
        channel.send({**self._about, "file": name, "start": start, "stop": stop})
        reply = channel.receive()
        if reply is None or "error" in reply:
            raise OSError(reply["error"] if reply else "the connection ended")
        return channel.sized(max(stop - start, 0))

    def close(self) -> None:
        """End the connection."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None


def require_place(request: Mapping[str, Any]) -> tuple[int, int, str]:
    """(rank, step, save) that a request names. Raises ValueError for what is none: they become names of folders."""
    rank, step, save = request.get("rank"), request.get("step"), request.get("save")
    if type(rank) is not int or type(step) is not int or rank < 0 or step < 0:
        raise ValueError("rank, step")
    if not isinstance(save, str) or not _SAVE.fullmatch(save):
        raise ValueError("save")
    return rank, step, save


def require_file_name(name: Any) -> str:
    """The name of a file of a part. Raises ValueError."""
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
        raise ValueError("file")
    return name


def own_address(towards: str | None) -> str:
    """The address of this host that other nodes reach it at: that of the interface GLOO_SOCKET_IFNAME, or that from
    which ``towards`` (MASTER_ADDR) is reached."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0].strip()
    if interface:
        with contextlib.suppress(OSError, ImportError):
            import fcntl

            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                said = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", interface.encode()[:15]))  # SIOCGIFADDR
                return socket.inet_ntoa(said[20:24])
    if towards:
        with contextlib.suppress(OSError):
            family, kind, protocol, _, where = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(where)  # of a datagram socket: nothing is sent
                return probe.getsockname()[0]
    return "127.0.0.1"


def is_loopback(host: str) -> bool:
    """Whether no other host reaches that address."""
    return host == "::1" or host.startswith("127.")
