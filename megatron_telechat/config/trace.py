"""Which steps are traced, recorded, replayed or skipped."""

from __future__ import annotations

import re
from collections.abc import Sequence


def trace_steps(text: str) -> range:
    """The steps that ``--moe-trace`` or ``--moe-routing-steps`` names, counted from 1: ``10`` or ``10-12``.

    Raises:
        ValueError: it names no step; the message says what is expected.
    """
    match = re.fullmatch(r"\s*(\d{1,12})(?:\s*-\s*(\d{1,12}))?\s*", text)
    if match is None:
        raise ValueError("a step such as 10, or first and last step such as 10-12")
    first = int(match.group(1))
    last = int(match.group(2) or first)
    if first < 1 or last < first:
        raise ValueError("steps from 1 on, the first one first")
    return range(first, last + 1)


def step_windows(texts: Sequence[str]) -> tuple[range, ...]:
    """The steps that ``--iterations-to-skip`` names, counted from 1: ``1000-1010,2000`` or ``1000-1010 2000``.

    Raises:
        ValueError: a part names no step; the message says what is expected.
    """
    return tuple(trace_steps(part) for text in texts for part in str(text).split(",") if part.strip())
