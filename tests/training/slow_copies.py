"""A device whose copies to the host begin late."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class SlowCopies:
    """A backend in whose copies an optimizer step that does not wait for them is seen.

    Args:
        seconds: how late a copy begins.
    """

    def __init__(self, backend: Any, seconds: float):
        self._backend, self._seconds = backend, seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    @contextmanager
    def copies_beside(self) -> Iterator[None]:
        time.sleep(self._seconds)
        with self._backend.copies_beside():
            yield
