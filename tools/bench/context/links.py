"""Links in the place of the ring's: one that writes down, one that answers from memory, one that waits at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from overlap.channels import Here
from torch import Tensor
from turns import Sample, Stopwatch

from megatron_telechat.parallel.context.direct import IN_FLIGHT
from megatron_telechat.parallel.context.exchange import RowLink


class Message(NamedTuple):
    """One transfer as it happened."""

    rows: Tensor
    step: int
    received: Tensor

    @property
    def sent_bytes(self) -> int:
        return self.rows.numel() * self.rows.element_size()


class WaitingLink:
    """The control: every wait is moved beside its start, and nothing can overlap."""

    def __init__(self, link: RowLink):
        self.link = link

    def start(self, rows: Tensor, step: int, shape: tuple[int, ...]) -> Here:
        received = self.link.start(rows, step, shape).wait()
        self.link.finish()
        return Here(received)

    def finish(self, most: int = 0) -> None:
        """Everything has left."""


class RecordingLink(WaitingLink):
    """Waits at once, and keeps all that was sent and received, pass by pass."""

    def __init__(self, link: RowLink):
        super().__init__(link)
        self.passes: list[list[Message]] = [[]]

    def start(self, rows: Tensor, step: int, shape: tuple[int, ...]) -> Here:
        here = super().start(rows, step, shape)
        self.passes[-1].append(Message(rows.clone(), step, here.wait().clone()))
        return here

    def finish(self, most: int = 0) -> None:
        """Nothing is under way; where all had to have left, a pass ends."""
        if not most:
            self.passes.append([])

    @property
    def sent_bytes(self) -> int:
        return sum(message.sent_bytes for messages in self.passes for message in messages)


class ReplayLink:
    """No transfers: gives what was received before, at once. For the same inputs and pieces only."""

    def __init__(self, passes: Sequence[Sequence[Message]]):
        self._messages = [message for messages in passes for message in messages]
        self._next = 0

    def start(self, rows: Tensor, step: int, shape: tuple[int, ...]) -> Here:
        message = self._messages[self._next]
        assert (message.step, message.received.shape) == (step, shape), "not the transfers that were recorded"
        self._next = (self._next + 1) % len(self._messages)
        return Here(message.received)

    def finish(self, most: int = 0) -> None:
        """Nothing has left."""


class OnlyLink:
    """An arm: the recorded transfers in their order, as many under way as in the attention, and nothing else."""

    def __init__(self, link: RowLink, passes: Sequence[Sequence[Message]]):
        self.link, self.passes = link, passes

    def run(self) -> Sample:
        watch = Stopwatch()
        self._transfer(self.passes[0])
        watch.forward_ends()
        self._transfer(self.passes[1])
        return watch.sample()

    def _transfer(self, messages: Sequence[Message]) -> None:
        under_way = deque()
        for message in messages:
            if len(under_way) == IN_FLIGHT:
                under_way.popleft().wait()
            under_way.append(self.link.start(message.rows, message.step, tuple(message.received.shape)))
        for transfer in under_way:
            transfer.wait()
        self.link.finish()
