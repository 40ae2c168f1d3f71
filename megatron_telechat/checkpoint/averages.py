"""The averages of the weights that a checkpoint holds: their names, and what its manifest says of them. No torch.

Their tensors are ``average/<kind>/<key>``, fp32, of the shapes of the model's. ``extra.averages`` of the manifest has
one entry a kind: what was averaged so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_telechat.config.averages import first_window_end
from megatron_telechat.config.schema import AverageConfig, RunConfig
from megatron_telechat.errors import CheckpointError
from megatron_telechat.tensors.frozen import frozen_keys

KEY = "averages"
"""Of the entries in the ``extra`` of a checkpoint."""
EMA = "ema"
"""The exponential moving average: ``decay``, ``since`` (the step it began with), ``updates``."""
WINDOW = "window"
"""The mean over the last whole window: its ``first`` and ``last`` step, ``averaged`` weights."""
UNDER_WAY = "window_under_way"
"""The mean so far of the window that is not over: ``steps`` and ``interval`` of the run, its ``first`` step,
``averaged`` weights; without tensors where those are none."""
KINDS = (EMA, WINDOW)
"""Those of use to a person."""
FLAGS = {EMA: "--ema-decay", WINDOW: "--average-window-steps"}
PREFIX = "average"


def average_key(kind: str, key: str) -> str:
    """Where a checkpoint keeps the average of the model's tensor ``key``."""
    return f"{PREFIX}/{kind}/{key}"


def stored_average(kind: str, key: str, run: RunConfig) -> str:
    """Where the average of the model's tensor ``key`` is read; a tensor that the run froze is its own average.

    Args:
        run: the run that saved the checkpoint.
    """
    return f"model/{key}" if key in frozen_keys(run) else average_key(kind, key)


def entries(extra: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Of a checkpoint, by kind; empty where it holds no average."""
    found = extra.get(KEY)
    return found if isinstance(found, Mapping) else {}


def saved_kinds(extra: Mapping[str, Any]) -> tuple[str, ...]:
    """The kinds whose tensors a checkpoint holds."""
    return tuple(kind for kind, entry in entries(extra).items() if kind != UNDER_WAY or entry["averaged"])


def require_average(extra: Mapping[str, Any], kind: str, where: str) -> None:
    """Raises CheckpointError where a checkpoint does not hold an average."""
    if kind in saved_kinds(extra):
        return
    held = " and ".join(each for each in KINDS if each in saved_kinds(extra)) or "no average of the weights"
    what = f"it holds no average {kind}, but {held}"
    if kind == WINDOW and UNDER_WAY in entries(extra):
        what += "; its first window is not over"
    raise CheckpointError(what, where, f"a checkpoint of a run with {FLAGS[kind]}")


def resume_notes(average: AverageConfig, extra: Mapping[str, Any], step: int) -> Iterator[str]:
    """What a person should know of the averages of a run that goes on from a checkpoint.

    Args:
        average: of the run.
        extra, step: of the checkpoint.
    """
    saved, length, start = entries(extra), average.average_window_steps, average.average_start_step
    if average.ema_decay is None and EMA in saved:
        updates = saved[EMA]["updates"]
        yield f"warning: the checkpoint's moving average of {updates} updates is dropped; {FLAGS[EMA]} keeps it"
    if average.ema_decay is not None and EMA not in saved and step >= start:
        yield "the moving average (ema) begins here: the checkpoint holds none"
    windows = WINDOW in saved or UNDER_WAY in saved
    if length is None and windows:
        yield f"warning: the checkpoint's mean over a window is dropped; {FLAGS[WINDOW]} keeps it"
    if length is None:
        return
    if UNDER_WAY in saved and not same_window(average, extra):
        yield "the checkpoint's window under way has other steps and is dropped; the next whole window is averaged"
    if not windows and step > first_window_end(length, start) - length:
        yield "the checkpoint holds no mean over a window; the next whole window is averaged"


def same_window(average: AverageConfig, extra: Mapping[str, Any]) -> bool:
    """Whether the window under way in a checkpoint is one of this run."""
    entry = entries(extra).get(UNDER_WAY)
    wanted = (average.average_window_steps, average.average_interval)
    return entry is not None and (entry["steps"], entry["interval"]) == wanted
