"""What a person sees while a run goes on: one line an interval, and a bar where the output is a terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO


def format_count(value: float) -> str:
    """3-digit engineering notation: 412, 12.3k, 4.19M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def format_duration(seconds: float) -> str:
    """MM:SS, H:MM:SS or Dd HH:MM."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        days, hour = divmod(hours, 24)
        return f"{days}d {hour:02d}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute:02d}:{second:02d}"


def format_step(record: dict[str, Any], train_iters: int, eta_s: float, memory_total_gib: float | None) -> str:
    """The line of one record."""
    loss, norm = record["loss"], record.get("grad_norm")
    parts = [
        f"step {record['step']}/{train_iters}",
        f"loss {loss:.4f}" if loss is not None else "loss none",
        *preference_parts(record),
        f"gnorm {norm:.3f}" if norm is not None else "gnorm none",
        f"lr {record['lr']:.2e}",
        f"{format_count(record['tokens_per_s'])} tok/s",
    ]
    if record.get("mfu") is not None:
        parts.append(f"MFU {100 * record['mfu']:.1f}%")
    total = f"/{memory_total_gib:.0f}" if memory_total_gib else ""
    host = f" + {record['memory_host_gib']:.1f} on the host" if record.get("memory_host_gib") else ""
    parts.append(f"mem {record['memory_peak_gib']:.1f}{total} GiB{host}")
    if record.get("expert_load_max_over_mean") is not None:
        parts.append(f"experts max/mean {record['expert_load_max_over_mean']:.2f}")
    if record.get("a2a_exposed") is not None:
        parts.append(f"a2a exposed {100 * record['a2a_exposed']:.1f}%")
    if record.get("cp_exposed") is not None:
        parts.append(f"cp exposed {100 * record['cp_exposed']:.1f}%")
    if record.get("loss_scale") is not None:
        parts.append(f"loss scale {record['loss_scale']:g}")
    if record.get("skipped_steps"):
        parts.append(f"skipped {record['skipped_steps']} ({', '.join(record['skipped_reasons'])})")
    if record.get("local_step") is not None:
        parts.append(f"local {record['local_step']}")
    parts.append(f"eta {format_duration(eta_s)}")
    return "  ".join(parts)


def preference_parts(record: Mapping[str, Any]) -> Iterator[str]:
    """What a line says of pairs of answers: the margin of their rewards, and the share of pairs on the right side."""
    if "reward_margin" in record:
        yield f"margin {record['reward_margin']:.4f}"
        yield f"accuracy {100 * record['reward_accuracy']:.1f}%"


class Console:
    """Prints on one rank only; silent on the others."""

    WIDTH = 30

    def __init__(self, enabled: bool, train_iters: int, progress: bool | None = None, stream: TextIO = sys.stdout):
        self._enabled = enabled
        self._train_iters = train_iters
        self._stream = stream
        self._bar = enabled and (stream.isatty() if progress is None else progress)
        self._drawn = 0
        self._smoothed_s: float | None = None

    def say(self, text: str | None) -> None:
        """One or more plain lines; None or "": nothing."""
        if self._enabled and text:
            self._clear_bar()
            self._print(text + "\n")

    def forget_speed(self) -> None:
        """The steps to come take another time than those before."""
        self._smoothed_s = None

    def step(self, record: dict[str, Any], memory_total_gib: float | None, steps_left: float | None = None) -> None:
        """The line of a record, and the bar below it.

        Args:
            steps_left: to the end of the run, in steps of the present size; None: as many as are left.
        """
        if not self._enabled:
            return
        # A slow first step (allocation, compilation) must not spoil the estimate for long.
        seconds = record["iteration_time_s"]
        smoothed_s = seconds if self._smoothed_s is None else 0.9 * self._smoothed_s + 0.1 * seconds
        self._smoothed_s = smoothed_s
        eta_s = smoothed_s * (self._train_iters - record["step"] if steps_left is None else steps_left)
        self.say(format_step(record, self._train_iters, eta_s, memory_total_gib))
        if self._bar:
            self._draw_bar(record["step"], eta_s)

    def _draw_bar(self, step: int, eta_s: float) -> None:
        share = step / max(self._train_iters, 1)
        filled = int(self.WIDTH * share)
        text = (
            f"[{'#' * filled}{'.' * (self.WIDTH - filled)}] {100 * share:3.0f}%  eta {format_duration(eta_s)}  "
            f"{time.strftime('%H:%M:%S')}"
        )
        self._print(text)
        self._drawn = len(text)

    def _clear_bar(self) -> None:
        if self._drawn:
            self._print("\r" + " " * self._drawn + "\r")
            self._drawn = 0

    def _print(self, text: str) -> None:
        """A terminal that was closed, or a reader that has left, must not end a training."""
        try:
            print(text, end="", file=self._stream, flush=True)
        except OSError:
            self._enabled = self._bar = False
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
