"""Rows that go from rank to rank of a ring beside the computation, in the order in which they were started."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import Thread
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_telechat.backend import traits_of
from megatron_telechat.parallel.transfer import RowTransfer


class RowLink(Protocol):
    """What the attention over ranks asks of whatever carries its rows. `Ring` is the real one; measurements and tests
    put others in its place."""

    def start(self, rows: Tensor, step: int, shape: tuple[int, ...]) -> RowTransfer:
        """Send rows to the rank ``step`` places behind, receive from the one ``step`` places before.

        Every rank starts the same transfers in the same order. A transfer without rows is none: neither rank is asked.

        Args:
            rows: contiguous; unchanged until `finish`, or on an accelerator until the wait.
            step: distance; negative for the other direction.
            shape: of what arrives.
        """
        ...

    def finish(self, most: int = 0) -> None:
        """Wait until at most so many of the messages that were sent are on their way; the others' rows are free."""
        ...


class Moving:
    """One transfer of a `Ring`.

    Args:
        received: where the rows arrive.
        works: handles of the messages to wait for.
        sent: rows that leave, where the wait is for them too: they are held until then.
    """

    def __init__(self, received: Tensor, works: list[dist.Work], sent: Tensor | None = None):
        self._received, self._works, self._sent = received, works, sent
        self._watcher: Thread | None = None

    def wait(self) -> Tensor:
        """The received rows; to be called once. On an accelerator the current stream waits, not the host."""
        if self._watcher is not None:
            self._watcher.join()
        else:
            self.wait_beside()
        self._works, self._sent = [], None
        return self._received

    def when_done(self, report: Callable[[], None]) -> None:
        """Call `report` from another thread when the rows are here; host transfers only."""

        def watch() -> None:
            self.wait_beside()
            report()

        # gloo's messages can be asked nothing, and be waited for once: that thread waits in place of this one.
        self._watcher = Thread(target=watch, daemon=True)
        self._watcher.start()

    def wait_beside(self) -> None:
        """Let the current stream wait too, before :meth:`wait`; transfers by the device only."""
        for work in self._works:
            work.wait()


class Alone:
    """The link of a ring of one rank: there is nobody to send to."""

    def start(self, rows: Tensor, step: int, shape: tuple[int, ...]) -> RowTransfer:
        """Never called: a plan for one rank has no transfers."""
        raise AssertionError("a ring of one rank has no transfers")

    def finish(self, most: int = 0) -> None:
        """Nothing has left."""


def all_to_all(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, ...]: entry r goes to rank r; entry r of the result is from rank r.

    On the CPU by messages, receives first (see `Ring.start`): gloo's own all-to-all sends before it asks, and takes
    twice the time of the link.
    """
    received = torch.empty_like(rows)
    if not traits_of(rows.device).host_waits_for_transfers:
        dist.all_to_all_single(received, rows, group=group)
        return received
    size, rank = group.size(), group.rank()
    received[rank] = rows[rank]
    others = [(rank + step) % size for step in range(1, size)]
    peers = [dist.get_global_rank(group, other) for other in others]
    messages = [dist.P2POp(dist.irecv, received[r], peer, group) for r, peer in zip(others, peers, strict=True)]
    messages += [dist.P2POp(dist.isend, rows[r], peer, group) for r, peer in zip(others, peers, strict=True)]
    for work in dist.batch_isend_irecv(messages):
        work.wait()
    return received


class Ring:
    """Messages among the ranks of one group.

    The ranks' messages need no tags: each pair exchanges its messages in the order of the starts, which is the same
    on both sides.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.size, self.rank = group.size(), group.rank()
        self._leaving: deque[tuple[dist.Work, Tensor]] = deque()

    def start(self, rows: Tensor, step: int, shape: tuple[int, ...]) -> Moving:
        """See `RowLink`."""
        by_host = traits_of(rows.device).host_waits_for_transfers
        received = rows.new_empty(shape)
        # Gloo tells the sender over the same connection that it may send. Behind rows that leave, that message would
        # wait for them, and the link would be used in one direction at a time: receives go first.
        messages = []
        if received.numel():
            messages.append(dist.P2POp(dist.irecv, received, self._peer(-step), self.group))
        if rows.numel():
            messages.append(dist.P2POp(dist.isend, rows, self._peer(step), self.group))
        works = dist.batch_isend_irecv(messages) if messages else []
        if not by_host:
            # One handle for both: the stream that waits for what arrives waits for what leaves as well.
            return Moving(received, works, rows)
        if rows.numel():
            self._leaving.append((works.pop(), rows))
        return Moving(received, works)

    def finish(self, most: int = 0) -> None:
        """See `RowLink`."""
        while len(self._leaving) > most:
            self._leaving.popleft()[0].wait()

    def _peer(self, step: int) -> int:
        return dist.get_global_rank(self.group, (self.rank + step) % self.size)
