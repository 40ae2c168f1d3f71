"""Which steps are traced, recorded or replayed."""

from __future__ import annotations

import re


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
