"""When the averages of a run begin and end, and how they are told to people. Pure arithmetic, no torch."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_telechat.config.schema import AverageConfig


def window_begin(step: int, length: int) -> int:
    """The first step of the window that a step, counted from 1, lies in: windows are 1..N, N+1..2N and so on."""
    return step - (step - 1) % length


def first_window_end(length: int, start: int) -> int:
    """The last step of the first window that lies whole behind step ``start``."""
    return -(-start // length) * length + length


def average_lines(average: AverageConfig) -> Iterator[str]:
    """What is averaged, for people; nothing where nothing is."""
    every = "each step" if average.average_interval == 1 else f"every {average.average_interval} steps"
    behind = f" from step {average.average_start_step}" if average.average_start_step else ""
    if average.ema_decay is not None:
        memory = average.average_interval / (1 - average.ema_decay)
        yield f"ema: decay {average.ema_decay:g} {every}{behind} (a memory of {memory:,.0f} steps)"
    if average.average_window_steps is not None:
        yield f"window: the mean over each {average.average_window_steps:,} steps, of the weights {every}{behind}"
