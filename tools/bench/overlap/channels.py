"""Links in the place of the block's: one that writes down, one that answers from memory, one that waits at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor


class Message(NamedTuple):
    """One transfer as it happened."""

    sent: Tensor
    send: tuple[int, ...]
    receive: tuple[int, ...]
    received: Tensor

    def wire_bytes(self, rank: int) -> int:
        """What left this rank; its share of its own rows does not."""
        row = self.sent[0].numel() * self.sent.element_size() if len(self.sent) else 0
        return (sum(self.send) - self.send[rank]) * row


class Here:
    """A transfer that is over."""

    arrived = True

    def __init__(self, rows: Tensor):
        self._rows = rows

    def wait(self) -> Tensor:
        return self._rows

    def when_done(self, report: Callable[[], None]) -> None:
        report()

    def wait_beside(self) -> None:
        """There is nothing to wait for."""


class _Substitute:
    """A :class:`megatron_telechat.moe.link.Link` over a `Channel`, with its group."""

    def __init__(self, channel: Any):
        self.channel = channel
        self.group, self.size, self.rank = channel.group, channel.size, channel.rank


class RecordingChannel(_Substitute):
    """The real channel; keeps a copy of all that was received."""

    def __init__(self, channel: Any):
        super().__init__(channel)
        self.messages: list[Message] = []

    def start(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Here:
        received = self.channel.start(rows, send, receive).wait()
        self.messages.append(Message(rows.clone(), tuple(send), tuple(receive), received.clone()))
        return Here(received)


class ReplayChannel(_Substitute):
    """No transfers: gives what was received before, at once. For the same input, weights and chunks only."""

    def __init__(self, channel: Any, messages: Sequence[Message]):
        super().__init__(channel)
        self._messages, self._next = messages, 0

    def start(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Here:
        message = self._messages[self._next]
        assert message.send == tuple(send) and message.receive == tuple(receive), "not the transfers that were recorded"
        self._next = (self._next + 1) % len(self._messages)
        return Here(message.received)


class WaitingChannel(_Substitute):
    """The negative control: every wait is moved beside its issue, and nothing can overlap."""

    def start(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Here:
        return Here(self.channel.start(rows, send, receive).wait())


@contextmanager
def counting_all_to_alls(counter: list[int]) -> Iterator[None]:
    """Add to ``counter[0]`` the bytes that leave this rank through torch.distributed.all_to_all_single."""
    real = dist.all_to_all_single

    def counted(
        output: Tensor, input: Tensor, output_split_sizes=None, input_split_sizes=None, group=None, **options: Any
    ):
        mine = dist.get_rank(group)
        size = dist.get_world_size(group)
        own = len(input) // size if input_split_sizes is None else input_split_sizes[mine]
        counter[0] += (len(input) - int(own)) * (input[0].numel() * input.element_size() if len(input) else 0)
        return real(output, input, output_split_sizes, input_split_sizes, group=group, **options)

    dist.all_to_all_single = counted
    try:
        yield
    finally:
        dist.all_to_all_single = real
