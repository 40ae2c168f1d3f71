"""Storage under checkpoints: a file system, or an object store through fsspec. No torch.

``store_of(place)`` is the door; what a store can do is in ``protocol.py``.
"""

from __future__ import annotations

import functools
import os

from megatron_telechat.checkpoint.stores.objects import ObjectStore
from megatron_telechat.checkpoint.stores.posix import PosixStore
from megatron_telechat.checkpoint.stores.protocol import Signature, Sink, Store
from megatron_telechat.locations import Location, Url

_POSIX = PosixStore()


def store_of(place: Location) -> Store:
    """The store that a place lies in. Raises ConfigError for a URL that no driver here can read."""
    return _objects(place.protocol, os.getpid()) if isinstance(place, Url) else _POSIX


@functools.lru_cache(maxsize=8)
def _objects(protocol: str, process: int) -> ObjectStore:
    """One for each process: a connection does not survive a fork."""
    return ObjectStore(protocol)


__all__ = ["ObjectStore", "Signature", "Sink", "Store", "store_of"]
