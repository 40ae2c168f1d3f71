"""Where a checkpoint lies: a folder of a file system, or a prefix of an object store."""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.*", re.DOTALL)
_OF_THIS_MACHINE = frozenset(("file", "local"))
_OF_THIS_PROCESS = frozenset(("memory",))
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "oss": "ossfs"}
"""Packages of the usual drivers; of others fsspec itself says which one."""


@dataclass(frozen=True, order=True)
class Url:
    """A URL of fsspec, such as ``s3://bucket/prefix``, with the operations of a pure path.

    It is no ``os.PathLike``: a function that wants a file of this machine refuses it, and makes no folder ``s3:``.

    Attributes:
        text: without a slash at its end; `location` makes it.
    """

    text: str

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.text}/{name}")

    @property
    def protocol(self) -> str:
        """Before ``://``."""
        return self.text.partition("://")[0]

    @property
    def bucket(self) -> str:
        """The first name behind ``://``; empty where there is none, as in ``file:///data``."""
        return self.text.partition("://")[2].partition("/")[0]

    @property
    def name(self) -> str:
        """The last name of its path."""
        return posixpath.basename(self.text)

    @property
    def suffix(self) -> str:
        """Of the name, with its dot; empty where there is none."""
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> Url:
        """The prefix that it lies in."""
        return Url(posixpath.dirname(self.text))

    @property
    def is_of_this_process(self) -> bool:
        """Whether no other process sees what is written there."""
        return self.protocol in _OF_THIS_PROCESS

    @property
    def has_bucket(self) -> bool:
        """Whether its first name is that of a bucket, which somebody else makes."""
        return self.protocol not in _OF_THIS_MACHINE | _OF_THIS_PROCESS


Location = Path | Url
"""A file or a folder."""


def location(text: str | Path | Url) -> Location:
    """What a person has named: a URL where it has ``://``, else a path."""
    if isinstance(text, (Path, Url)):
        return text
    if not _URL.fullmatch(text):
        return Path(text)
    protocol, _, path = text.partition("://")
    return Url(f"{protocol.lower()}://{path.rstrip('/')}")


def is_url(text: str | None) -> bool:
    """Whether `location` makes a URL of it."""
    return text is not None and _URL.fullmatch(text) is not None


def url_fault(url: Url) -> tuple[str, str] | None:
    """(what is wrong, fix) of a URL that no driver here can read, or that names no place; None where nothing is. No
    server is asked, no driver loaded."""
    from fsspec.registry import known_implementations, registry

    known: Any = known_implementations.get(url.protocol)
    if known is None and url.protocol not in registry:
        return f"fsspec knows no protocol {url.protocol}://", "a folder, or a URL such as s3://BUCKET/PREFIX"
    if known is not None and find_spec(str(known["class"]).partition(".")[0]) is None:
        package = _PACKAGES.get(url.protocol)
        hint = f"pip install {package}" if package else str(known.get("err") or "install its driver")
        return f"the driver of {url.protocol}:// is not installed", hint
    if url.has_bucket and not url.bucket:
        return "the URL names no bucket", f"write it like {url.protocol}://BUCKET/PREFIX"
    if not url.has_bucket and not url.text.partition("://")[2].strip("/"):
        return "the URL names no folder", f"write it like {url.protocol}:///FOLDER"
    return None
