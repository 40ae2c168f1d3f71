"""What the end of a rank means for the job."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from megatron_telechat.errors import (
    EXIT_CHECKPOINT,
    EXIT_CONFIG,
    EXIT_DATA,
    EXIT_NUMERICS,
    EXIT_OK,
    EXIT_RESOURCE,
    EXIT_SIGNAL,
)
from megatron_telechat.supervisor.processes import Ended

_FINAL = (EXIT_CONFIG, EXIT_DATA, EXIT_CHECKPOINT, EXIT_NUMERICS)
"""Errors that the same command meets again."""

_GRACE_S = {**dict.fromkeys(_FINAL, 10.0), EXIT_SIGNAL: 120.0, EXIT_RESOURCE: 1.0}
"""How long the others may take to end by themselves: all have the same error, and one of them prints it."""


def grace_s(code: int) -> float:
    """Seconds between the end of a rank with this code and the end of the others; none for a rank that was lost."""
    return _GRACE_S.get(code, 0.0)


def cause(ended: Sequence[Ended]) -> Ended:
    """Of the ranks that ended by themselves, in order, the one whose end explains the others'."""
    return min(ended, key=lambda one: _order(one.code))


def _order(code: int) -> int:
    """An error of the user's before a rank that was lost, that before those that lost contact with it."""
    if code in _FINAL:
        return 0
    if code < 0:
        return 1
    return {EXIT_RESOURCE: 3, EXIT_SIGNAL: 4, EXIT_OK: 5}.get(code, 2)


def is_worth_a_restart(code: int) -> bool:
    """Whether the same command may well succeed: a rank was lost, or a device, a disk or an unknown error ended it."""
    return code not in (EXIT_OK, EXIT_SIGNAL, *_FINAL)


def code_of_stopped(ended: Sequence[Ended], signals: Sequence[int]) -> int:
    """The code of a job that was asked to stop by these signals.

    A rank that had not begun to listen is ended by the signal itself: it had nothing to save.
    """
    code = cause(ended).code
    if code < 0 and -code in signals:
        twice = -code == signal.SIGINT and list(signals).count(signal.SIGINT) > 1
        return exit_code(code) if twice else EXIT_SIGNAL
    return exit_code(code)


def exit_code(code: int) -> int:
    """As a shell says it: 128 and the signal for a process that a signal ended."""
    return code if code >= 0 else 128 - code


def what_happened(ended: Ended) -> str:
    """A rank's end in words."""
    if ended.lost_node:
        return f"lost contact with {ended.host} (rank {ended.rank} and the others there)"
    how = f"exit code {ended.code}" if ended.code >= 0 else f"killed by {_name(-ended.code)}"
    return f"rank {ended.rank} on {ended.host}: {how}"


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
