"""Spans on the streams of a device: what is recorded between which events, and their times on the host's clock."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from megatron_telechat.device_kinds import DEVICE_KINDS
from megatron_telechat.parallel import clock as clocks
from megatron_telechat.parallel.clock import DeviceSpans, ExchangeClock, PassClock, Span


class Queues:
    """The part of torch that belongs to a device whose streams work by themselves: `work` puts work on one, which
    begins when the last on that stream is over, while the host goes on at once."""

    def __init__(self):
        self.free = {None: 0.0}
        self.current = None
        self.waits = 0

    def work(self, ms: float) -> None:
        self.free[self.current] += ms

    def Event(self, enable_timing: bool):  # noqa: N802 (torch's name)
        assert enable_timing
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.free[self.current])
        event.synchronize = lambda: setattr(self, "waits", self.waits + 1)
        event.query = lambda: True
        event.elapsed_time = lambda later: later.at - event.at
        return event

    def Stream(self):  # noqa: N802
        stream = len(self.free)
        self.free[stream] = 0.0
        return stream

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def synchronize(self) -> None:
        self.waits += 1
        self.free = dict.fromkeys(self.free, max(self.free.values()))


class Transfer:
    """Arrives at a time of the device; a stream that waits for it is free no earlier."""

    def __init__(self, queues: Queues, arrives: float):
        self.queues, self.arrives = queues, arrives

    def wait_beside(self) -> None:
        free = self.queues.free
        free[self.queues.current] = max(free[self.queues.current], self.arrives)

    wait = wait_beside


def span(track: str, name: str) -> Span:
    return Span(track, name, 0, 3, True, 0.0, 0.0)


def test_times_are_those_of_the_device_and_on_the_clock_of_the_host():
    queues = Queues()
    spans = DeviceSpans(queues)
    queues.work(5.0)
    transfer = Transfer(queues, arrives=12.0)
    spans.until_arrival(span("link", "D"), transfer)
    with spans.around(span("compute", "F")):
        queues.work(4.0)
    with spans.around(span("compute", "wait D")):
        transfer.wait()
    assert queues.waits == 0, "the host waits for nothing before the end"
    found = {one.name: (one.start_us, one.end_us) for one in spans.take(lambda: 112_000.0)}  # 12 ms on the device
    assert found == {"D": (105e3, 112e3), "F": (105e3, 109e3), "wait D": (109e3, 112e3)}
    assert queues.waits == 2 and spans.take(lambda: 0.0) == [] and queues.waits == 2


@pytest.fixture
def queues(monkeypatch):
    """What a clock finds where it asks for the device's part of torch."""
    queues = Queues()
    monkeypatch.setattr(clocks, "traits_of", lambda device: DEVICE_KINDS["cuda"])
    monkeypatch.setattr(clocks, "torch", SimpleNamespace(cpu=queues))
    return queues


def test_a_traced_pass_records_work_transfers_and_waits_of_the_device(queues):
    clock = ExchangeClock(tracing=True)
    mine = PassClock(clock, 3, False, torch.device("cpu"))
    transfer = Transfer(queues, arrives=7.0)
    mine.started(transfer, "D", 0)
    with mine.computing("plan"):
        queues.work(2.0)
    with mine.waiting("D", 0):
        transfer.wait()
    with mine.waiting():  # part of another span
        queues.work(1.0)
    spans = clock.take_spans()
    lengths = {one.name: pytest.approx(one.end_us - one.start_us, abs=1e-3) for one in spans}
    assert lengths == {"D": 7e3, "plan": 2e3, "wait D": 5e3}
    assert {one.name: one.track for one in spans} == {"D": "link", "plan": "compute", "wait D": "compute"}
    assert all((one.layer, one.backward) == (3, False) for one in spans) and clock.take_spans() == []
    assert clock.take_exposed_s() == pytest.approx(6e-3)


def test_without_a_trace_only_waits_are_timed_and_nothing_waits_for_the_device(queues):
    clock = ExchangeClock()
    mine = PassClock(clock, 3, False, torch.device("cpu"))
    transfer = Transfer(queues, arrives=7.0)
    mine.started(transfer, "D", 0)
    with mine.computing("F", 0):
        queues.work(2.0)
    with mine.waiting("D", 0):
        transfer.wait()
    assert clock.take_spans() == [] and queues.waits == 0
    assert clock.take_exposed_s() == pytest.approx(5e-3)
