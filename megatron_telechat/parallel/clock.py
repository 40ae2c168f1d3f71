"""How long a computation waited for the exchange that runs beside it, and traces of both."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from megatron_telechat.backend import traits_of
from megatron_telechat.parallel.transfer import Traced


class Span(NamedTuple):
    """Something that took time, or an instant; microseconds since the clock's start.

    Attributes:
        track: "compute", or "link" for a transfer from its start to its arrival.
        name: of the experts F forward, R recompute, B gradients of inputs, W gradients of weights; D dispatch, C
            combine, with a ' for their gradients; of the attention own blocks, A and B blocks with rows of others and
            their gradients; K keys and values, G their gradients, H heads; plan, pack, sum, add; wait.
        chunk: or piece of a step of the attention; None for what belongs to none.
        layer: zero-based number of the layer; None where it is not known.
        backward: in the backward pass.
    """

    track: str
    name: str
    chunk: int | None
    layer: int | None
    backward: bool
    start_us: float
    end_us: float


EVENTS = 4096
"""Pairs of events that may wait to be read: beyond, those that have passed are read at once."""


class DeviceSpans:
    """Spans on the streams of a device, between two events each: the host issues work and goes on.

    Args:
        module: the device's part of torch, such as ``torch.cuda``: Event, Stream, stream, synchronize.
    """

    def __init__(self, module: Any):
        self._module = module
        self._spans: list[tuple[Span, Any, Any]] = []
        self._beside: Any = None

    @contextmanager
    def around(self, span: Span) -> Iterator[None]:
        """What the current stream does inside is this span; its times are left open."""
        begin = self._event()
        yield
        self._spans.append((span, begin, self._event()))

    def until_arrival(self, span: Span, transfer: Traced) -> None:
        """From now to the arrival of a transfer, which a stream of its own waits for."""
        begin = self._event()
        if self._beside is None:
            self._beside = self._module.Stream()
        with self._module.stream(self._beside):
            transfer.wait_beside()
            self._spans.append((span, begin, self._event()))

    def take(self, now_us: Callable[[], float]) -> list[Span]:
        """The spans with their times on the host's clock, which `now_us` reads. Waits for the device."""
        if not self._spans:
            return []
        # One event whose time the host knows too: it has been waited for, and nothing comes after it.
        self._module.synchronize()
        last = self._event()
        last.synchronize()
        end_us = now_us()

        def of(event: Any) -> float:
            return end_us - event.elapsed_time(last) * 1e3

        taken = [span._replace(start_us=of(begin), end_us=of(end)) for span, begin, end in self._spans]
        self._spans.clear()
        return taken

    def _event(self) -> Any:
        event = self._module.Event(enable_timing=True)
        event.record()
        return event


@dataclass
class ExchangeClock:
    """Measures waits for transfers, and, while tracing, everything.

    On the CPU a wait is the time that the thread stood still. On an accelerator it is the time between two events on
    the computing stream around the wait, read when :meth:`take_exposed_s` is called.

    Attributes:
        tracing: record every span: host time on the CPU, on an accelerator time of its streams.
    """

    tracing: bool = False
    spans: list[Span] = field(default_factory=list)
    _exposed_s: float = 0.0
    _events: list[tuple[Any, Any]] = field(default_factory=list)
    _device_spans: DeviceSpans | None = None
    _origin: float = field(default_factory=time.perf_counter)

    def now_us(self) -> float:
        """Microseconds since the clock's start."""
        return (time.perf_counter() - self._origin) * 1e6

    @contextmanager
    def waiting(
        self, name: str | None, chunk: int | None, layer: int | None, backward: bool, device: torch.device
    ) -> Iterator[None]:
        """Around a wait for other ranks; one without a name is part of another span, and gets none of its own."""
        if traits_of(device).host_waits_for_transfers:
            start = time.perf_counter()
            yield
            self._exposed_s += time.perf_counter() - start
            if self.tracing and name is not None:
                begin = (start - self._origin) * 1e6
                self.spans.append(Span("compute", f"wait {name}", chunk, layer, backward, begin, self.now_us()))
            return
        on_device = self._on_device(device)
        module = getattr(torch, device.type)
        begin, end = module.Event(enable_timing=True), module.Event(enable_timing=True)
        begin.record()
        if on_device is not None and name is not None:
            with on_device.around(Span("compute", f"wait {name}", chunk, layer, backward, 0.0, 0.0)):
                yield
        else:
            yield
        end.record()
        self._events.append((begin, end))
        if len(self._events) >= EVENTS:
            self._drain()

    @contextmanager
    def computing(
        self, name: str, chunk: int | None, layer: int | None, backward: bool, device: torch.device
    ) -> Iterator[None]:
        """Around a piece of computation; free unless tracing."""
        if not self.tracing:
            yield
            return
        on_device = self._on_device(device)
        if on_device is not None:
            with on_device.around(Span("compute", name, chunk, layer, backward, 0.0, 0.0)):
                yield
            return
        start = self.now_us()
        yield
        self.spans.append(Span("compute", name, chunk, layer, backward, start, self.now_us()))

    def transfer(
        self, transfer: Traced, name: str, chunk: int, layer: int | None, backward: bool, device: torch.device
    ) -> None:
        """A transfer was started; while tracing, record when it arrives."""
        if not self.tracing:
            return
        on_device = self._on_device(device)
        if on_device is not None:
            on_device.until_arrival(Span("link", name, chunk, layer, backward, 0.0, 0.0), transfer)
            return
        start = self.now_us()
        transfer.when_done(lambda: self.spans.append(Span("link", name, chunk, layer, backward, start, self.now_us())))

    def _on_device(self, device: torch.device) -> DeviceSpans | None:
        """Where spans are recorded on a device that works by itself; None while nothing is traced, or on the CPU."""
        if not self.tracing or traits_of(device).host_waits_for_transfers:
            return None
        if self._device_spans is None:
            self._device_spans = DeviceSpans(getattr(torch, device.type))
        return self._device_spans

    def take_exposed_s(self) -> float:
        """Seconds of waiting since the last call. On an accelerator: call it once the device is synchronised."""
        self._drain()
        exposed, self._exposed_s = self._exposed_s, 0.0
        return exposed

    def _drain(self) -> None:
        """Read the waits that the device has behind it; never waits for the others."""
        passed = next((number for number, (_, end) in enumerate(self._events) if not end.query()), len(self._events))
        for begin, end in self._events[:passed]:
            self._exposed_s += begin.elapsed_time(end) / 1e3
        del self._events[:passed]

    def take_spans(self) -> list[Span]:
        """The recorded spans, in order of their start; the clock goes on. On an accelerator: waits for it, once."""
        spans, self.spans = self.spans, []
        if self._device_spans is not None:
            spans += self._device_spans.take(self.now_us)
        return sorted(spans, key=lambda span: span.start_us)


@dataclass(frozen=True)
class PassClock:
    """The clock of a block as one pass of one call sees it.

    Attributes:
        clock: of the block.
        layer: zero-based number of the layer; None where it is not known.
        backward: whether this is a backward pass.
        device: of the computation.
    """

    clock: ExchangeClock
    layer: int | None
    backward: bool
    device: torch.device

    def computing(self, name: str, chunk: int | None = None) -> AbstractContextManager[None]:
        """Around a piece of computation; see :meth:`ExchangeClock.computing`."""
        return self.clock.computing(name, chunk, self.layer, self.backward, self.device)

    def waiting(self, name: str | None = None, chunk: int | None = None) -> AbstractContextManager[None]:
        """Around a wait for other ranks; see :meth:`ExchangeClock.waiting`."""
        return self.clock.waiting(name, chunk, self.layer, self.backward, self.device)

    def started(self, transfer: Traced, name: str, chunk: int) -> None:
        """A transfer was started; see :meth:`ExchangeClock.transfer`."""
        self.clock.transfer(transfer, name, chunk, self.layer, self.backward, self.device)
