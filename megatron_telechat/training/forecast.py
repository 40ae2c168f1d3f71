"""What was predicted of a run, beside what is measured."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from megatron_telechat.backend import Backend
from megatron_telechat.config.plan_file import read_plan
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.devices import device_spec
from megatron_telechat.costs.memory import stage_memory
from megatron_telechat.errors import ConfigError
from megatron_telechat.planner.predict import predict

FIRST_REPORT = 10
"""Steps of this process after which prediction and measurement are first set side by side."""
SHORTEST_S = 0.02
"""Below this an estimate from FLOPs says nothing: launches and Python decide."""


@dataclass
class Forecast:
    """Predicted iteration time and memory, and the measured ones as they come in.

    Attributes:
        iteration_s: None where nothing is known of this device's speed at these shapes.
        memory_gib: of the fullest stage: parameters, gradients, optimizer, activations.
        source: where the time comes from.
        of_process: the measured memory is that of the whole process.
    """

    iteration_s: float | None
    memory_gib: float
    source: str
    of_process: bool = False
    _seconds: list[float] = field(default_factory=list)
    _steps: int = 0
    _memory: float = 0.0
    _said: int = 0

    @classmethod
    def of(cls, run: RunConfig, backend: Backend) -> Forecast:
        """From the run's plan, else from the device file of the device at hand, if there is one."""
        memory = max(stage.total_bytes for stage in stage_memory(run)) / 2**30
        seconds, source = _predicted_seconds(run, backend)
        return cls(seconds, memory, source, backend.traits.memory_is_of_process)

    def fields(self) -> dict[str, float]:
        """What every metrics record says of it."""
        out = {"predicted_memory_gib": self.memory_gib}
        return out if self.iteration_s is None else {"predicted_iteration_s": self.iteration_s, **out}

    def observe(self, record: dict[str, Any], steps: int) -> str | None:
        """Take a record of `steps` steps in; once, when enough steps are measured, the line that compares."""
        # the first window pays for allocation and warm-up, which tells where it is short
        if self._steps or steps > 2 * FIRST_REPORT:
            self._seconds += [record["iteration_time_s"]] * steps
        self._steps += steps
        self._memory = max(self._memory, record["memory_peak_gib"])
        if self._said or self._steps < FIRST_REPORT or not self._seconds:
            return None
        return self.line()

    @property
    def measured_s(self) -> float | None:
        """Seconds of a step, the median; None before enough steps were measured."""
        return statistics.median(self._seconds) if self._seconds and self._steps >= FIRST_REPORT else None

    def line(self) -> str | None:
        """Predicted beside measured; None while nothing was measured since it was said last."""
        if len(self._seconds) <= self._said:
            return None
        self._said = len(self._seconds)
        measured = statistics.median(self._seconds)
        text = f"measured {measured:.4g} s a step (median of {len(self._seconds)})"
        if self.iteration_s is not None:
            off = self.iteration_s / measured - 1
            text = f"predicted {self.iteration_s:.4g} s a step ({self.source}), {text}: {off:+.1%}"
        else:
            text += f", no prediction ({self.source})"
        held = f"{'peak of the whole process' if self.of_process else 'measured peak'} {self._memory:.2f}"
        return f"{text}; memory of the fullest stage: predicted {self.memory_gib:.2f} GiB, {held} GiB"


def _predicted_seconds(run: RunConfig, backend: Backend) -> tuple[float | None, str]:
    if run.parallel.plan is not None:
        found = read_plan(run.parallel.plan).prediction_for(run)
        if found is not None:
            return found.iteration_s, f"the plan, for {found.device}"
        return None, "the plan was made for another number of ranks or another batch"
    spec = device_spec(backend.device_name())
    if spec is None:
        return None, f"no device file for {backend.device_name()}; tools/plan_pipeline.py --calibrate makes one"
    try:
        seconds = predict(run, spec).iteration
    except ConfigError:
        return None, f"the device file of {spec.name} has no speed for this precision"
    return (
        (seconds, f"device file {spec.name}") if seconds >= SHORTEST_S else (None, "too short to estimate; calibrate")
    )
