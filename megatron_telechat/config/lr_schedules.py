"""The learning-rate schedules: one function a schedule, under the name that ``--lr-decay-style`` takes.

To add a schedule, write a function here and register it. The flag, its help and its check read this registry.
Nothing here imports torch, so a schedule is known in ``--help`` and ``--dry-run`` too.

The formulas are those of megatron-core's ``OptimizerParamScheduler.get_lr``: a run that moves over from Megatron-LM
keeps its curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Moment:
    """A step after the warm-up, and what a schedule may know of it. Rates are learning rates, the rest are steps, or
    tokens where the schedule counts these.

    Attributes:
        step: optimizer steps taken before this one.
        warmup_steps: length of the warm-up; ``step`` is larger, or both are 0.
        decay_steps: the step at which the decay ends.
        lr: the largest rate, that of the end of the warm-up.
        min_lr: the rate at the end of the decay.
        wsd_decay_steps: length of WSD's final decay (lr_wsd_decay_iters); 0 where it is unset.
        wsd_decay_style: its shape, a name of `SHAPES`.
    """

    step: int
    warmup_steps: int
    decay_steps: int
    lr: float
    min_lr: float
    wsd_decay_steps: int = 0
    wsd_decay_style: str = "exponential"

    @property
    def progress(self) -> float:
        """Share of the way from the end of the warm-up to the end of the decay, between 0 and 1."""
        return (self.step - self.warmup_steps) / max(self.decay_steps - self.warmup_steps, 1)

    def between(self, share: float) -> float:
        """The rate that lies ``share`` of the way above min_lr: min_lr at 0, lr at 1."""
        return self.min_lr + share * (self.lr - self.min_lr)


@dataclass(frozen=True)
class Schedule:
    """A registered schedule.

    Attributes:
        rate: the learning rate at a moment of the decay.
        ends: whether the rate is min_lr in every step after ``decay_steps``.
    """

    rate: Callable[[Moment], float]
    ends: bool = True

    def __call__(self, moment: Moment) -> float:
        """The learning rate of a step after the warm-up."""
        return moment.min_lr if self.ends and moment.step > moment.decay_steps else self.rate(moment)


SCHEDULES: dict[str, Schedule] = {}
"""Value of ``--lr-decay-style`` → the schedule."""


def schedule(name: str, *, ends: bool = True) -> Callable[[Callable[[Moment], float]], Callable[[Moment], float]]:
    """Register a function as the schedule ``name``; see `Schedule` for ``ends``."""

    def register(rate: Callable[[Moment], float]) -> Callable[[Moment], float]:
        if name in SCHEDULES:
            raise ValueError(f"two learning-rate schedules are called {name}")
        SCHEDULES[name] = Schedule(rate, ends)
        return rate

    return register


SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (math.cos(math.pi * progress) + 1.0),
    "exponential": lambda progress: 2.0 * 0.5**progress - 1.0,
    "minus_sqrt": lambda progress: 1.0 - math.sqrt(progress),
}
"""Ways down from 1 to 0 while the progress goes from 0 to 1; values of ``--lr-wsd-decay-style``."""


@schedule("constant", ends=False)
def constant(moment: Moment) -> float:
    """Always lr."""
    return moment.lr


@schedule("linear")
def linear(moment: Moment) -> float:
    """Straight from lr to min_lr."""
    return moment.between(SHAPES["linear"](moment.progress))


@schedule("cosine")
def cosine(moment: Moment) -> float:
    """Half a cosine from lr to min_lr."""
    return moment.between(SHAPES["cosine"](moment.progress))


@schedule("inverse-square-root")
def inverse_square_root(moment: Moment) -> float:
    """lr × √(warm-up / step), and never below min_lr."""
    return max(moment.min_lr, moment.lr * math.sqrt(max(moment.warmup_steps, 1) / max(moment.step, 1)))


@schedule("WSD")
def warmup_stable_decay(moment: Moment) -> float:
    """lr, then a decay to min_lr in the last wsd_decay_steps."""
    start = moment.decay_steps - moment.wsd_decay_steps
    if moment.step <= start:
        return moment.between(1.0)
    return moment.between(SHAPES[moment.wsd_decay_style]((moment.step - start) / moment.wsd_decay_steps))
