"""One kind of transfer in one pass: the dispatches, or the combines, of all chunks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_telechat.moe.link import Link
from megatron_telechat.parallel.clock import PassClock
from megatron_telechat.parallel.transfer import Transfer


class Exchange:
    """The transfers of one kind: one for each chunk, started in the order of the chunks, and each awaited once.

    All of them may be under way at once. A transfer that was awaited is let go, and its buffers with it.

    Args:
        name: D or C, in the backward C' or D': the name in traces.
        link: among the ranks that share the experts.
        clock: measures the waits.
    """

    def __init__(self, name: str, link: Link, clock: PassClock):
        self._name, self._link, self._clock = name, link, clock
        self._transfers: list[Transfer | None] = []

    def start(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> None:
        """Start the transfer of the next chunk, as :meth:`Link.start` does; an empty one too, for the other ranks'
        sake."""
        transfer = self._link.start(rows, send, receive)
        self._clock.started(transfer, self._name, len(self._transfers))
        self._transfers.append(transfer)

    def arrived(self, chunk: int) -> bool:
        """Whether :meth:`wait` would return at once; on an accelerator always."""
        return self._under_way(chunk).arrived

    def wait(self, chunk: int) -> Tensor:
        """What arrived for this chunk, [sum(receive), h]."""
        transfer, self._transfers[chunk] = self._under_way(chunk), None
        with self._clock.waiting(self._name, chunk):
            return transfer.wait()

    def _under_way(self, chunk: int) -> Transfer:
        transfer = self._transfers[chunk]
        assert transfer is not None, f"transfer {self._name} of chunk {chunk} was awaited before"
        return transfer
