"""Phases inside a step, and how long a rank computes: megatron-core's schedules tell when they compute and when they
exchange, through the ``timers`` of their configuration."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from megatron_telechat.backend import traits_of
from megatron_telechat.parallel.clock import EVENTS
from megatron_telechat.training.pulse import PULSE, Phase

_EXCHANGES = (
    *("forward-recv", "forward-send", "backward-recv", "backward-send"),
    *("forward-send-backward-recv", "backward-send-forward-recv"),
    *("forward-send-forward-recv", "backward-send-backward-recv"),
    "forward-backward-send-forward-backward-recv",
)


class ComputeClock:
    """How long this rank was at forwards and backwards: between events on the device's stream, which nobody waits for;
    on the CPU by the host's clock."""

    def __init__(self, device: torch.device):
        self._host = traits_of(device).host_waits_for_transfers
        self._module: Any = None if self._host else getattr(torch, device.type)
        self._total_s = 0.0
        self._begin: Any = None
        self._events: list[tuple[Any, Any]] = []

    def start(self) -> None:
        """A forward or backward of a micro-batch begins."""
        self._begin = time.perf_counter() if self._host else self._event()

    def stop(self) -> None:
        """It ends."""
        if self._begin is None:
            return
        if self._host:
            self._total_s += time.perf_counter() - self._begin
        else:
            self._events.append((self._begin, self._event()))
            if len(self._events) >= EVENTS:
                self._drain()
        self._begin = None

    def take_s(self) -> float:
        """Seconds since the last call. On an accelerator: call it once the device is synchronised."""
        self._drain()
        total_s, self._total_s = self._total_s, 0.0
        return total_s

    def _drain(self) -> None:
        """Read what the device has behind it; never waits for the rest."""
        passed = next((number for number, (_, end) in enumerate(self._events) if not end.query()), len(self._events))
        self._total_s += sum(begin.elapsed_time(end) for begin, end in self._events[:passed]) / 1e3
        del self._events[:passed]

    def _event(self) -> Any:
        event = self._module.Event(enable_timing=True)
        event.record()
        return event


class _Timer:
    def __init__(self, start: Callable[[], None], stop: Callable[[], None]):
        self._start, self._stop = start, stop

    def start(self, barrier: bool = False) -> None:
        self._start()

    def stop(self, barrier: bool = False) -> None:
        self._stop()


class ScheduleTimers:
    """Takes the place of megatron-core's timers: moves the pulse, and runs a clock of the compute. No barriers.

    Attributes:
        clock: of all forwards and backwards of this rank.
        after_backward: called after each backward of a micro-batch; unset: nothing is.
    """

    def __init__(self, device: torch.device):
        self.clock = ComputeClock(device)
        self.after_backward: Callable[[], None] | None = None
        self._other = _Timer(_nothing, _nothing)
        between = _entering(Phase.SCHEDULE)
        self._timers = {name: _Timer(_entering(Phase.PIPELINE_EXCHANGE), between) for name in _EXCHANGES}
        self._timers["all-grads-sync"] = _Timer(_entering(Phase.GRADIENT_REDUCTION), _nothing)
        self._timers["forward-compute"] = _Timer(self._begin(Phase.FORWARD), self._end_forward)
        self._timers["backward-compute"] = _Timer(self._begin(Phase.BACKWARD), self._end_backward)

    def __call__(self, name: str, log_level: int | None = None) -> _Timer:
        return self._timers.get(name, self._other)

    def install(self, virtual_stages: Sequence[nn.Module]) -> None:
        """Let the schedules of these virtual stages tell it."""
        for stage in virtual_stages:
            config: Any = stage.config
            config.timers = self

    def _begin(self, phase: Phase) -> Callable[[], None]:
        number = int(phase)

        def begin() -> None:
            PULSE.enter(number)
            self.clock.start()

        return begin

    def _end_forward(self) -> None:
        self.clock.stop()
        PULSE.enter(Phase.SCHEDULE)

    def _end_backward(self) -> None:
        self.clock.stop()
        PULSE.enter(Phase.SCHEDULE)
        if self.after_backward is not None:
            self.after_backward()


def _entering(phase: Phase) -> Callable[[], None]:
    number = int(phase)
    return lambda: PULSE.enter(number)


def _nothing() -> None:
    pass
