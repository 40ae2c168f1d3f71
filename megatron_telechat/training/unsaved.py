"""A run that would lose hours: long, and without a save interval."""

from __future__ import annotations

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.training.console import format_duration

LONG_S = 3600.0
ADVISED_S = 1800.0
"""Time between saves that the note proposes."""


def unsaved_note(run: RunConfig, step: int, seconds_a_step: float | None, how: str) -> str | None:
    """The note, where what is left of a run takes more than an hour and nothing is saved on the way; else None.

    Args:
        step: steps done.
        seconds_a_step: None where it is not known.
        how: ``predicted`` or ``measured``.
    """
    if run.checkpoint.save_interval or not seconds_a_step:
        return None
    left = (run.training.train_iters - step) * seconds_a_step
    if left <= LONG_S:
        return None
    interval = max(1, _round(ADVISED_S / seconds_a_step))
    return (
        f"the run takes {format_duration(left)} ({how}) and has no save interval: if it is killed, all progress "
        f"is lost. --save-interval {interval} saves about every half hour; --keep-last 2 keeps the newest two"
    )


def _round(value: float) -> int:
    """One or two leading digits: 1,437 becomes 1,400."""
    whole = int(value)
    unit = 10 ** max(0, len(str(whole)) - 2)
    return whole // unit * unit
