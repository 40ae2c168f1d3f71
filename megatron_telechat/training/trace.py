"""Chrome traces of an exchange: what was computed, what was on the link, what waited."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.config.trace import trace_steps
from megatron_telechat.model.context_attention import context_attentions
from megatron_telechat.moe import moe_blocks
from megatron_telechat.parallel.agreement import gather_objects
from megatron_telechat.parallel.clock import ExchangeClock, Span
from megatron_telechat.parallel.state import ParallelState
from megatron_telechat.training.tolerance import tolerated

ROWS = {"steps": 0, "compute": 1, "link": 2}
"""Rows of a rank in the picture, and their thread numbers in the file."""


class ExchangeTrace:
    """Records what the clocks of an exchange see in some steps, and writes ``rank_N.json`` after each of them.

    The file is in the trace event format of Chrome, which chrome://tracing and ui.perfetto.dev open; the ranks' files
    use one process number a rank and start at one moment, so that their events can be put into one file.

    Args:
        flag: field that asked for it, for messages.
        clocks: of the layers of this rank.
        steps: which are traced, counted from 1.
        folder: of the files.
    """

    def __init__(self, flag: str, clocks: Sequence[ExchangeClock], steps: range, state: ParallelState, folder: Path):
        self._flag, self._clocks, self._steps = flag, clocks, steps
        self._state = state
        self._file = folder / f"rank_{state.rank}.json"
        self._start_s: float | None = None
        self._link_end_us = 0.0
        self._events: list[dict[str, Any]] = []

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the step with this number, from 1; collective over all ranks if it is traced. A file that cannot be
        written is a warning."""
        if number not in self._steps:
            yield
            return
        if self._start_s is None:
            gather_objects(None)  # the ranks' clocks mean nothing to each other: all start when the last one is here
            self._start_s = time.perf_counter()
            self._events += self._names()
        for clock in self._clocks:
            clock.tracing = True
        begin = self._now_us()
        try:
            yield
        finally:
            for clock in self._clocks:
                clock.tracing = False
        self._events.append(
            _event(self._state.rank, "steps", f"step {number}", begin, self._now_us(), {"step": number})
        )
        self._collect(number)
        with tolerated(str(self._file)):
            self._write()

    def _now_us(self) -> float:
        assert self._start_s is not None, "set at the first step that is traced"
        return (time.perf_counter() - self._start_s) * 1e6

    def _names(self) -> list[dict[str, Any]]:
        rank, place = self._state.rank, self._state.place()
        named = [("process_name", 0, f"rank {rank}" + (f" ({place})" if place else ""))]
        named += [("thread_name", number, name) for name, number in ROWS.items()]
        return [{"ph": "M", "pid": rank, "tid": tid, "name": kind, "args": {"name": name}} for kind, tid, name in named]

    def _collect(self, step: int) -> None:
        spans = []
        for clock in self._clocks:
            shift = self._now_us() - clock.now_us()
            spans += [
                span._replace(start_us=span.start_us + shift, end_us=span.end_us + shift) for span in clock.take_spans()
            ]
        for span in sorted(spans, key=lambda span: span.start_us):
            self._events.append(self._of_span(span, step))

    def _of_span(self, span: Span, step: int) -> dict[str, Any]:
        name = span.name if span.chunk is None else f"{span.name} {span.chunk}"
        details = {
            "step": step,
            "layer": span.layer,
            "chunk": span.chunk,
            "pass": "backward" if span.backward else "forward",
        }
        start = span.start_us
        if span.track == "link":
            # Issued early, it stood in the queue: the link takes one transfer after another.
            details["issued_us"] = start
            start = min(max(start, self._link_end_us), span.end_us)
            self._link_end_us = max(span.end_us, self._link_end_us)
        return _event(self._state.rank, span.track, name, start, span.end_us, details)

    def _write(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"displayTimeUnit": "ms", "traceEvents": self._events})
        self._file.write_text(text, encoding="utf-8")


def exchange_traces(
    virtual_stages: Sequence[nn.Module], run: RunConfig, state: ParallelState, run_dir: Path
) -> list[ExchangeTrace]:
    """What ``--moe-trace`` and ``--cp-trace`` ask for: traces in ``moe_trace/`` and ``cp_trace/`` of the run folder."""
    found = []
    for flag, text, clocks in (
        ("moe_trace", run.logging.moe_trace, [block.clock for block in moe_blocks(virtual_stages)]),
        ("cp_trace", run.logging.cp_trace, [each.clock for each in context_attentions(virtual_stages)]),
    ):
        if text:
            found.append(ExchangeTrace(flag, clocks, trace_steps(text), state, run_dir / flag))
    return found


def _event(rank: int, row: str, name: str, start_us: float, end_us: float, details: dict[str, Any]) -> dict[str, Any]:
    return {
        "ph": "X",
        "pid": rank,
        "tid": ROWS[row],
        "name": name,
        "ts": start_us,
        "dur": end_us - start_us,
        "args": details,
    }
