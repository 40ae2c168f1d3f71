"""Averages of the fp32 weights inside a run: an exponential moving average, and the mean over a window of steps.

After step t, whose fp32 weights are w_t, if it was taken and ``average_interval`` divides t:

    ema:     E <- d E + (1 - d) w_t, with E = w_s at its begin after step s (``average_start_step``)
    window:  M <- M + (w_t - M) / n, the n-th weight of the window that t lies in; its last step makes M the mean

Each rank averages what its optimizer steps on, so an average is cut over the ranks as the master weights are. What was
counted is in the ``extra`` of a checkpoint (`checkpoint.averages`), and nothing else decides what comes next but the
number of the step: a resume has nothing to restore that it could restore wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from megatron_telechat.checkpoint.averages import EMA, KEY, KINDS, UNDER_WAY, WINDOW, entries, same_window
from megatron_telechat.checkpoint.optimizer_state import (
    MASTER,
    OptimizerSlice,
    optimizer_slices,
    weights_of,
    weights_stepped_on,
)
from megatron_telechat.config.averages import window_begin
from megatron_telechat.config.schema import AverageConfig
from megatron_telechat.model.shards import LocalParameter
from megatron_telechat.training.param_gather import gather_parameters

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel

    from megatron_telechat.training.chain import ModelOptimizer


class Averages:
    """The averages of one run, or of one stage, on this rank.

    Args:
        optimizer: asked for its fp32 weights each time, wherever they lie; an average lies beside them.
    """

    def __init__(self, optimizer: ModelOptimizer, shards: Sequence[LocalParameter], settings: AverageConfig):
        self._optimizer, self._shards, self._settings = optimizer, shards, settings
        kinds = [EMA] * (settings.ema_decay is not None)
        kinds += [WINDOW, UNDER_WAY] * (settings.average_window_steps is not None)
        self._values = {kind: [torch.zeros_like(weights_stepped_on(one)) for one in self._ranges()] for kind in kinds}
        self._entries: dict[str, dict[str, Any]] = {}
        """What was averaged, by kind, as a checkpoint keeps it; a kind that has not begun has none."""

    def begin(self, step: int, extra: Mapping[str, Any]) -> None:
        """Go on after a step.

        Args:
            extra: of the checkpoint that was loaded, `slices` among it; empty where the run begins.
        """
        for kind, entry in entries(extra).items():
            if kind in self._values and (kind != UNDER_WAY or same_window(self._settings, extra)):
                self._entries[kind] = dict(entry)
        if EMA in self._entries:
            self._entries[EMA]["decay"] = self._settings.ema_decay
        self._begin_ema(step)

    def follow(self, step: int, taken: bool) -> None:
        """After a step.

        Args:
            step: its number, from 1.
            taken: whether it changed the weights.
        """
        enters = taken and step % self._settings.average_interval == 0
        if EMA in self._entries:
            if enters:
                assert self._settings.ema_decay is not None
                self._blend(EMA, 1 - self._settings.ema_decay)
                self._entries[EMA]["updates"] += 1
        else:
            self._begin_ema(step)
        self._follow_window(step, enters)

    @property
    def ready(self) -> tuple[str, ...]:
        """The averages that there are, in a fixed order."""
        return tuple(kind for kind in KINDS if kind in self._entries)

    @property
    def extra(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the tensors."""
        return {KEY: {kind: dict(entry) for kind, entry in self._entries.items()}} if self._entries else {}

    def slices(self, begun: bool = False) -> list[OptimizerSlice]:
        """The averages as a checkpoint keeps them (`TrainState.averages`).

        Args:
            begun: leave out those that average nothing yet; else there are all that the run will have.
        """
        kinds = [kind for kind in self._values if not begun or self._averaged(kind)]
        return [
            one._replace(tensors={kind: self._values[kind][number] for kind in kinds})
            for number, one in enumerate(self._ranges() if kinds else ())
        ]

    @contextmanager
    def in_place_of_weights(self, kind: str, virtual_stages: Sequence[DistributedDataParallel]) -> Iterator[None]:
        """Inside, the parameters of all ranks are those of an average, rounded to their type; behind it, they are bit
        for bit what they were. Collective; inside of `gathered_parameters`, and of no save's copies.

        An error inside leaves the average in place: the run ends, and the ranks are not made to wait for each other.
        """
        kept: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            for number, one in enumerate(self._ranges()):
                weights, average = weights_of(one), self._values[kind][number]
                if MASTER not in one.tensors:
                    _exchange(weights, average)
                    continue
                if not _same_bits(weights, one.tensors[MASTER].to(weights)):
                    # Weights that were loaded, and not yet written by a step, can be rounded otherwise.
                    kept[number] = weights.clone()
                weights.copy_(average)
        gather_parameters(virtual_stages)
        yield
        with torch.no_grad():
            for number, one in enumerate(self._ranges()):
                if MASTER not in one.tensors:
                    _exchange(weights_of(one), self._values[kind][number])
                else:
                    weights_of(one).copy_(kept.get(number, one.tensors[MASTER]))
        gather_parameters(virtual_stages)

    def _ranges(self) -> list[OptimizerSlice]:
        return list(optimizer_slices(self._optimizer, self._shards))

    def _averaged(self, kind: str) -> bool:
        """Whether there is anything in the tensors of a kind."""
        return kind in self._entries and (kind != UNDER_WAY or self._entries[kind]["averaged"] > 0)

    def _begin_ema(self, step: int) -> None:
        if EMA in self._values and EMA not in self._entries and step >= self._settings.average_start_step:
            self._blend(EMA, 1.0)
            self._entries[EMA] = {"decay": self._settings.ema_decay, "since": step, "updates": 0}

    def _follow_window(self, step: int, enters: bool) -> None:
        length = self._settings.average_window_steps
        if length is None:
            return
        if step == window_begin(step, length) and step > self._settings.average_start_step:
            interval = self._settings.average_interval
            self._entries[UNDER_WAY] = {"steps": length, "interval": interval, "first": step, "averaged": 0}
        entry = self._entries.get(UNDER_WAY)
        if entry is None:
            return
        if enters:
            entry["averaged"] += 1
            self._blend(UNDER_WAY, 1 / entry["averaged"])
        if step % length == 0:
            del self._entries[UNDER_WAY]
            if entry["averaged"]:
                self._values[WINDOW], self._values[UNDER_WAY] = self._values[UNDER_WAY], self._values[WINDOW]
                self._entries[WINDOW] = {"first": entry["first"], "last": step, "averaged": entry["averaged"]}

    @torch.no_grad()
    def _blend(self, kind: str, weight: float) -> None:
        """A <- A + weight (w - A), in a few kernels for all tensors, as torch's `swa_utils` does it."""
        averages, weights = self._values[kind], [weights_stepped_on(one) for one in self._ranges()]
        if not averages:
            return
        if weight == 1.0:
            torch._foreach_copy_(averages, weights)  # pyright: ignore[reportPrivateImportUsage]
        else:
            torch._foreach_lerp_(averages, weights, weight)  # pyright: ignore[reportPrivateImportUsage]


def _exchange(one: torch.Tensor, other: torch.Tensor) -> None:
    held = one.clone()
    one.copy_(other)
    other.copy_(held)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
