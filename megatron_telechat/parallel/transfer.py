"""An exchange of rows between ranks that runs beside the computation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class Traced(Protocol):
    """What a trace asks of an exchange under way, before somebody waits for it."""

    def when_done(self, report: Callable[[], None]) -> None:
        """Call `report` when the rows have arrived, perhaps from another thread; only on the CPU."""
        ...

    def wait_beside(self) -> None:
        """Let the current stream of an accelerator wait as `wait` does, and keep both buffers; on a stream of its
        own."""
        ...


class RowTransfer(Traced, Protocol):
    """One exchange of rows under way."""

    def wait(self) -> Tensor:
        """The received rows; to be called once.

        On the CPU the calling thread waits, on an accelerator the current stream does and the host goes on. From here
        on the transfer holds neither buffer.
        """
        ...


class Transfer(RowTransfer, Protocol):
    """One that can be asked whether it is over."""

    @property
    def arrived(self) -> bool:
        """Whether :meth:`wait` would return at once. True on an accelerator, where the host does not know."""
        ...
