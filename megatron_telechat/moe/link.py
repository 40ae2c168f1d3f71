"""What the expert block asks of whatever carries its rows between ranks.

:class:`megatron_telechat.parallel.channel.Channel` is the real link. Measurements and tests put others in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor


class Transfer(Protocol):
    """One all-to-all under way."""

    @property
    def arrived(self) -> bool:
        """Whether :meth:`wait` would return at once. True on an accelerator, where the host does not know."""
        ...

    def wait(self) -> Tensor:
        """The received rows, [sum(receive), ...] in the order of the sending ranks; to be called once.

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


class Link(Protocol):
    """All-to-alls among the ranks that share the experts of a layer."""

    def start(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Transfer:
        """Start one all-to-all, and return before it is over.

        Every rank of the group starts the same transfers in the same order, empty ones too. Transfers are carried out
        in the order of their starts. Any number of them may be under way: the block starts one for each chunk before
        it waits for the first.

        Args:
            rows: [sum(send), ...], contiguous, in the order of the receiving ranks; unchanged until the wait.
            send: rows for each rank of the group; 0 is allowed.
            receive: rows from each rank of the group.
        """
        ...
