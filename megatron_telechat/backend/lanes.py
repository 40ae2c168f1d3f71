"""Queues of a device: copies that go beside its kernels, and who waits for whom. The host never waits in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Lane:
    """One queue of a device. Where the device has none (the CPU), work is done when its call returns.

    Args:
        module: torch's module of the device, such as ``torch.cuda``; None: it has no queues.
        beside: a queue of its own; otherwise the one of the kernels.
    """

    def __init__(self, module: Any, beside: bool):
        self._module = module
        self._own = module.Stream() if module is not None and beside else None

    @property
    def _stream(self) -> Any:
        return self._module.current_stream() if self._own is None else self._own

    @contextmanager
    def queued(self) -> Iterator[None]:
        """What is issued inside is queued here."""
        if self._own is None:
            yield
        else:
            with self._module.stream(self._own):
                yield

    def mark(self) -> Any:
        """A place in the queue, behind everything issued so far; None where there is no queue."""
        return None if self._module is None else self._stream.record_event()

    def wait(self, mark: Any) -> None:
        """What is queued from now on begins after this mark, perhaps of another queue."""
        if mark is not None:
            self._stream.wait_event(mark)
