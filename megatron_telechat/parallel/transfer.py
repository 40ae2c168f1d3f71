"""An exchange of rows between ranks that runs beside the computation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class Transfer(Protocol):
    """One exchange of rows under way."""

    @property
    def arrived(self) -> bool:
        """Whether :meth:`wait` would return at once. True on an accelerator, where the host does not know."""
        ...

    def wait(self) -> Tensor:
        """The received rows; to be called once.

        On the CPU the calling thread waits, on an accelerator the current stream does and the host goes on. From here
        on the transfer holds neither buffer.
        """
        ...

    def when_done(self, report: Callable[[], None]) -> None:
        """Call `report` when the rows have arrived, perhaps from another thread. Only the trace asks for it, and only
        on the CPU."""
        ...

    def wait_beside(self) -> None:
        """Let the current stream of an accelerator wait as :meth:`wait` does, and keep both buffers; before
        :meth:`wait`. Only the trace asks for it, on a stream of its own."""
        ...
