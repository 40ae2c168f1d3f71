"""A line for all-to-alls that run beside the computation, in the order they were started."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore


class AllToAll:
    """One all-to-all under way. Keeps both buffers alive until it was waited for.

    Args:
        received: where the rows arrive.
        sent: the rows that leave.
        work: its handle in torch.distributed.
        by_host: threads of the host move the rows, so that the host knows when they are here; otherwise the device
            does, in the order of its queues.
    """

    def __init__(self, received: Tensor, sent: Tensor, work: dist.Work, by_host: bool):
        self._by_host = by_host
        self._under_way: tuple[Tensor, Tensor, dist.Work] | None = (received, sent, work)

    @property
    def arrived(self) -> bool:
        """Whether :meth:`wait` would return at once. Where the device moves the rows, the host never waits: True."""
        _, _, work = self._parts()
        return not self._by_host or work.is_completed()

    def wait(self) -> Tensor:
        """The received rows; to be called once. On an accelerator the current stream waits, not the host."""
        received, _, work = self._parts()
        work.wait()
        self._under_way = None
        return received

    def when_done(self, report: Callable[[], None]) -> None:
        """Call `report` from another thread when the rows are here; host transfers only."""
        _, _, work = self._parts()
        work.get_future().add_done_callback(lambda _: report())

    def wait_beside(self) -> None:
        """Let the current stream wait too, before :meth:`wait`; transfers by the device only."""
        _, _, work = self._parts()
        work.wait()

    def _parts(self) -> tuple[Tensor, Tensor, dist.Work]:
        assert self._under_way is not None, "this transfer was awaited before"
        return self._under_way


class Channel:
    """All-to-alls among the ranks of one group, one after another.

    Every rank must start the same transfers in the same order; none waits for another to be waited for.

    On CUDA and NPU the transfers run on the stream that the group's communicator owns. A gloo group has two threads,
    and two transfers at a time share the link, so that both arrive late: the first piece of a pipeline would come when
    the second does. This class therefore opens a gloo group of its own with one thread.

    Opening one is a collective over the group. A group of one rank never transfers.

    Args:
        group: the ranks; its backend decides the kind of transfer.
        name: the same on all ranks of the group, and used for no other channel of this group.
        timeout: after which a transfer that does not end raises.
    """

    def __init__(self, group: dist.ProcessGroup, name: str = "experts", timeout: timedelta = timedelta(minutes=10)):
        self.group = group
        self.size, self.rank = group.size(), group.rank()
        on_gloo = self.size > 1 and dist.get_backend(group) == "gloo"
        self._gloo = _one_thread_gloo(group, name, timeout) if on_gloo else None

    def start(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> AllToAll:
        """Send consecutive runs of rows to the ranks of the group.

        Args:
            rows: [sum(send), ...], contiguous, in the order of the receiving ranks; must not change until the wait.
            send: rows for each rank of the group; none is allowed.
            receive: rows from each rank of the group.

        Returns:
            The transfer; its wait gives [sum(receive), ...] in the order of the sending ranks.
        """
        received = rows.new_empty((sum(receive), *rows.shape[1:]))
        if self._gloo is not None:
            work = self._gloo.alltoall_base(received, rows, list(receive), list(send), dist.AllToAllOptions())
        else:
            work = dist.all_to_all_single(received, rows, list(receive), list(send), group=self.group, async_op=True)
            assert work is not None, "this rank is not in the group"
        return AllToAll(received, rows, work, by_host=self._gloo is not None)


def _one_thread_gloo(group: dist.ProcessGroup, name: str, timeout: timedelta) -> Any:
    # new_group takes no options for gloo; its class does. The name of a group is unique in the life of a process.
    gloo = dist.ProcessGroupGloo
    interfaces = os.environ.get("GLOO_SOCKET_IFNAME")
    options = gloo._Options()  # pyright: ignore[reportAttributeAccessIssue] - not in torch's stubs
    options._threads = 1
    options._timeout = timeout
    options._devices = (
        [gloo.create_device(interface=interface) for interface in interfaces.split(",")]
        if interfaces
        else [gloo.create_default_device()]
    )
    store = PrefixStore(f"{name}/{group.group_name}", distributed_c10d._get_default_store())
    return gloo(store, group.rank(), group.size(), options)
