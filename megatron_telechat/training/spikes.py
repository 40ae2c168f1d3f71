"""Losses and gradient norms that jump: reported, not acted on. Pure arithmetic."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

KEY = "spike_window"
"""Of the window in the ``extra`` of a checkpoint."""
WATCHED = ("loss", "grad_norm")


@dataclass(frozen=True)
class Spike:
    """A value far above those before it.

    Attributes:
        of: ``loss`` or ``grad_norm``.
        mean, deviation: of the window; the standard deviation is that of a sample.
    """

    of: str
    value: float
    mean: float
    deviation: float

    @property
    def deviations(self) -> float:
        """How far above the mean, in standard deviations."""
        return (self.value - self.mean) / self.deviation

    def event(self, step: int) -> dict[str, Any]:
        """Of metrics.jsonl."""
        return {
            "event": "spike",
            "step": step,
            "of": self.of,
            "value": self.value,
            "mean": self.mean,
            "deviation": self.deviation,
            "deviations": self.deviations,
        }

    def line(self, step: int, window: int) -> str:
        """For the console."""
        return (
            f"step {step}  spike: {self.of} {self.value:.4g} is {self.deviations:.1f} standard deviations above the "
            f"mean {self.mean:.4g} of the last {window} steps"
        )


class SpikeWindow:
    """The last steps that were taken, as OLMo-core's optimizer looks at them: a value is a spike where it is more than
    `threshold` standard deviations above their mean; not before half of the window is there. Spikes enter the window.

    Args:
        length: of the window, in steps.
        threshold: in standard deviations; 0: nothing is a spike.
        values: by name what the window holds already.
    """

    def __init__(self, length: int, threshold: float, values: Mapping[str, Iterable[float]] | None = None):
        self.length, self.threshold = length, threshold
        kept = values or {}
        self._values = {name: deque(map(float, kept.get(name, ())), maxlen=length) for name in WATCHED}

    def observe(self, loss: float | None, grad_norm: float | None) -> list[Spike]:
        """One step; None: it was not taken, or had no such number."""
        found = []
        for name, value in zip(WATCHED, (loss, grad_norm), strict=True):
            if value is None or not math.isfinite(value):
                continue
            window = self._values[name]
            if self.threshold and len(window) >= max(2, self.length // 2):
                mean = math.fsum(window) / len(window)
                deviation = math.sqrt(math.fsum((one - mean) ** 2 for one in window) / (len(window) - 1))
                if deviation > 0 and value - mean > self.threshold * deviation:
                    found.append(Spike(name, value, mean, deviation))
            window.append(value)
        return found

    @property
    def extra(self) -> dict[str, Any]:
        """What a checkpoint keeps: JSON has every digit of a number, so a resume reports the same spikes."""
        return {KEY: {name: list(window) for name, window in self._values.items()}}

    @classmethod
    def of(cls, length: int, threshold: float, extra: Mapping[str, Any]) -> SpikeWindow:
        """The window of a checkpoint; empty where it is of a release that kept none."""
        saved = extra.get(KEY)
        return cls(length, threshold, saved if isinstance(saved, Mapping) else None)
