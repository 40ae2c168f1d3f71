"""Rules of the averages inside a run."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_telechat.config.averages import first_window_end
from megatron_telechat.config.fields import fields_by_name
from megatron_telechat.config.origins import Check, Rule, flag
from megatron_telechat.errors import Problem

DECAY, WINDOW, INTERVAL, START = "ema_decay", "average_window_steps", "average_interval", "average_start_step"


def decay_is_a_share(check: Check) -> Iterator[Problem]:
    """The decay is what the average keeps of itself: 0 would keep nothing, 1 would never learn."""
    decay = check.take(DECAY)
    if decay is not None and not 0 < decay < 1:
        yield check.one(
            f"ema_decay={decay:g} is not between 0 and 1",
            DECAY,
            fix=f"{flag(DECAY, 0.9999)}; leave it out for no average",
        )


def options_have_an_average(check: Check) -> Iterator[Problem]:
    """Interval and start belong to an average."""
    decay, window = check.take(DECAY, WINDOW)
    if decay is not None or window is not None:
        return
    for name in (INTERVAL, START):
        value = check.take(name)
        if value != fields_by_name()[name].default:
            yield check.problem(
                f"{name}={value}, but nothing is averaged", name, fix=f"{flag(DECAY, 0.9999)} or {flag(WINDOW, 'N')}"
            )


def interval_divides_the_window(check: Check) -> Iterator[Problem]:
    """Every window averages as many weights, and its last step is one of them."""
    window, interval = check.take(WINDOW, INTERVAL)
    if window is not None and window % interval:
        yield check.problem(
            f"average_interval={interval} does not divide average_window_steps={window}",
            WINDOW,
            INTERVAL,
            fix=flag(WINDOW, -(-window // interval) * interval),
        )


def averages_begin_before_the_end(check: Check) -> Iterator[Problem]:
    """The moving average begins, and a window is whole, before the run ends."""
    decay, window, start, steps = check.take(DECAY, WINDOW, START, "train_iters")
    if not steps:
        return
    if decay is not None and start >= steps:
        yield check.problem(
            f"average_start_step={start} leaves no step of train_iters={steps} to average",
            START,
            "train_iters",
            fix=flag(START, steps // 2),
        )
    if window is not None and first_window_end(window, start) > steps:
        behind = f" behind average_start_step={start}" if start else ""
        yield check.problem(
            f"no window of average_window_steps={window}{behind} ends within train_iters={steps}",
            WINDOW,
            "train_iters",
            fix=f"{flag(WINDOW, max(steps // 10, 1))}, or more steps",
        )


RULES: tuple[Rule, ...] = (
    decay_is_a_share,
    options_have_an_average,
    interval_divides_the_window,
    averages_begin_before_the_end,
)
