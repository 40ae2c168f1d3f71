"""A tokenizer.json opened by a process of its own, while this process opens the fast engine.

Both readers hold the interpreter lock for half a second on a vocabulary of 131,072. The helper also answers the
self-check. It ends when the connection does, that is with this process however that ends; where it is lost, the file is
opened here.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_telechat.data.tokenizers import HuggingFaceTokenizer, digest_of

_ROOT = Path(__file__).resolve().parents[3]
# Ctrl-C is for the process that asks.
_START = """import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.path.insert(0, sys.argv[1])
from megatron_telechat.data.text.tokenizer_process import serve; serve(sys.argv[2], sys.argv[3] == "special")"""
_FACTS = ("vocab_size", "eod", "bos", "pad", "affixes", "added_tokens", "splitting")
_SIZE = struct.Struct("<Q")
# A helper that says nothing for so long is taken for lost. A document of 100 MB takes it half as long.
LIMIT_S = 120.0


class TokenizerBeside(HuggingFaceTokenizer):
    """A ``HuggingFaceTokenizer`` whose ids come from the helper. Nothing waits for the helper before it is asked.

    What needs the ``backend`` itself (another engine, ``decode``) opens the file here. Call ``close`` at the end.
    """

    def __init__(self, file: Path, special_tokens_in_text: bool = True):
        self.special_tokens_in_text = special_tokens_in_text
        self.file, self.digest = file, digest_of(file, special_tokens_in_text)
        self._lock = threading.RLock()
        self._connection, theirs = socket.socketpair()
        self._connection.settimeout(LIMIT_S)
        self._helper: subprocess.Popen | None = None
        with theirs:
            try:
                command = [
                    sys.executable,
                    "-c",
                    _START,
                    str(_ROOT),
                    str(file),
                    "special" if special_tokens_in_text else "text",
                ]
                self._helper = subprocess.Popen(
                    command, stdin=theirs.fileno(), env={**os.environ, "RAYON_NUM_THREADS": "1"}
                )
            except OSError:
                pass  # no more processes here: the file is opened when it is asked for

    def encode(self, text: str) -> list[int]:
        """Ids of one text; see `encode_batch`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, from the helper; from here where it is lost or says nothing for ``LIMIT_S`` seconds."""
        answer = None
        _ = self._facts  # its first word, before the lock: others ask for it too
        with self._lock:
            if self._helper is not None:
                try:
                    _send(self._connection, list(texts))
                    answer = _receive(self._connection)
                except (OSError, EOFError):
                    self.close()
        return super().encode_batch(texts) if answer is None else answer

    def close(self) -> None:
        """End the helper; whoever goes on asking opens the file here."""
        with self._lock:
            helper, self._helper = self._helper, None
            self._connection.close()
            if helper is not None:
                helper.kill()  # it holds nothing
                helper.wait()

    @cached_property
    def _facts(self) -> dict[str, Any]:
        """The helper's first word."""
        with self._lock:
            try:
                return _receive(self._connection)
            except (OSError, EOFError):
                self.close()
                return {name: getattr(self.here, name) for name in _FACTS}

    @cached_property
    def here(self) -> HuggingFaceTokenizer:
        """The same tokenizer, opened by this process."""
        return HuggingFaceTokenizer(self.file, self.special_tokens_in_text)

    @property
    def backend(self) -> Any:
        """The package's tokenizer in this process; the first who asks opens the file."""
        return self.here.backend


for _name in _FACTS:
    setattr(TokenizerBeside, _name, property(lambda self, name=_name: self._facts[name]))


def _send(connection: socket.socket, message: Any) -> None:
    data = json.dumps(message).encode()
    connection.sendall(_SIZE.pack(len(data)) + data)


def _receive(connection: socket.socket) -> Any:
    """One message.

    Raises:
        EOFError: the other side is gone.
        OSError: it says nothing.
    """
    (size,) = _SIZE.unpack(_bytes(connection, _SIZE.size))
    return json.loads(_bytes(connection, size))


def _bytes(connection: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = connection.recv(min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def serve(file: str, special_tokens_in_text: bool) -> None:
    """The helper: says what it knows of the tokenizer, then encodes what it is asked, until the connection ends."""
    connection = socket.socket(fileno=0)
    try:
        tokenizer = HuggingFaceTokenizer(Path(file), special_tokens_in_text)
        _send(connection, {name: getattr(tokenizer, name) for name in _FACTS})
        while True:
            _send(connection, tokenizer.encode_batch(_receive(connection)))
    finally:
        # Who asks does without the helper, and says what is wrong, if anything is. Freeing the vocabulary word by word
        # would take a tenth of a second.
        os._exit(0)
