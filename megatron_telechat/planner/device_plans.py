"""Which modes the layers of a device can have: all choices that fit, or the one that repeats the least work."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_telechat.planner.problem import BalanceProblem
from megatron_telechat.planner.simulate import in_flight

MAX_COMBINATIONS = 50_000
"""Choices of a device that are looked at; with more, the search for a start takes a sample. No bound rests on them."""
MAX_COMPARED = 2_000
"""Of those that fit, the ones with the least time that are compared each with each."""

Composition = tuple[tuple[int, ...], ...]
"""For each virtual stage of a device, its layers of each group."""


@dataclass(frozen=True)
class StageChoices:
    """Ways to choose the modes of one stage's layers that no other way beats in time, bytes and working set.

    `modes[i]` is a choice, its layers in model order; `extra`, `act`, `ws` are arrays over the choices.
    """

    modes: tuple[tuple[int, ...], ...]
    extra: np.ndarray
    act: np.ndarray
    ws: np.ndarray


@dataclass(frozen=True)
class DevicePlan:
    """A choice for each virtual stage of a device: time added to each backward, and the modes."""

    extra: tuple[float, ...]
    modes: tuple[tuple[int, ...], ...]


class DevicePlans:
    """Plans of single devices of a problem, kept once computed.

    Args:
        most: choices of a device that are looked at one by one; with more, one is built step by step.
    """

    def __init__(self, problem: BalanceProblem, most: int = MAX_COMBINATIONS):
        self.problem, self.most = problem, most
        moments = in_flight(*problem.schedule)
        self.held = [np.array([moment.held for moment in row], dtype=float) for row in moments]
        self.backward = [[moment.backward for moment in row] for row in moments]
        self._stage: dict[tuple[int, ...], StageChoices] = {}
        self._best: dict[tuple, DevicePlan | None] = {}

    def stage_choices(self, in_group: tuple[int, ...]) -> StageChoices:
        """Choices of a stage with these layers of each group."""
        if in_group not in self._stage:
            self._stage[in_group] = _stage_choices(self.problem, in_group)
        return self._stage[in_group]

    def best(self, device: int, virtual_stages: Composition, mtp_virtual_stage: int | None = None) -> DevicePlan | None:
        """The plan that fits and adds the least time; None if none fits. `mtp_virtual_stage`: the one of this device
        with the MTP block."""
        key = (device, virtual_stages, mtp_virtual_stage)
        if key not in self._best and self.many(virtual_stages):
            self._best[key] = self._built(device, virtual_stages, mtp_virtual_stage)
        if key not in self._best:
            found = self._fitting(device, virtual_stages, mtp_virtual_stage)
            self._best[key] = None
            if len(found[0]):
                total = sum(found[1])
                self._best[key] = self._plan(virtual_stages, found, int(np.argmin(total)))
        return self._best[key]

    def many(self, virtual_stages: Composition) -> bool:
        """Whether a device with these layers has more choices than are looked at one by one."""
        return math.prod(len(self.stage_choices(one).modes) for one in virtual_stages) > self.most

    def _built(self, device: int, virtual_stages: Composition, mtp_virtual_stage: int | None) -> DevicePlan | None:
        """A plan that fits: from the fastest choices on, the step that frees most of the worst moment for its time."""
        choices = [self.stage_choices(one) for one in virtual_stages]
        weights, fixed_act, fixed_ws = self._fixed(device, virtual_stages, mtp_virtual_stage)
        held, backward = self.held[device], self.backward[device]
        picked = [0] * len(choices)
        while True:
            act = np.array([one.act[at] + fixed for one, at, fixed in zip(choices, picked, fixed_act, strict=True)])
            ws = [max(one.ws[at], fixed) for one, at, fixed in zip(choices, picked, fixed_ws, strict=True)]
            transient = np.array([0.0 if stage is None else ws[stage] for stage in backward])
            moments = held @ act + transient
            worst = int(np.argmax(moments))
            if weights + moments[worst] <= self.problem.mem_limit:
                modes = tuple(one.modes[at] for one, at in zip(choices, picked, strict=True))
                extra = tuple(float(one.extra[at]) for one, at in zip(choices, picked, strict=True))
                return DevicePlan(extra, modes)
            best, step = 0.0, None
            for stage, (one, at) in enumerate(zip(choices, picked, strict=True)):
                freed = held[worst][stage] * (one.act[at] - one.act[at + 1 :])
                if backward[worst] == stage:
                    freed = freed + ws[stage] - np.maximum(one.ws[at + 1 :], fixed_ws[stage])
                if len(freed):
                    rate = freed / np.maximum(one.extra[at + 1 :] - one.extra[at], 1e-30)
                    most = int(np.argmax(rate))
                    if rate[most] > best:
                        best, step = float(rate[most]), (stage, at + 1 + most)
            if step is None:
                return None
            picked[step[0]] = step[1]

    def all(self, device: int, virtual_stages: Composition, mtp_virtual_stage: int | None = None) -> list[DevicePlan]:
        """All plans that fit and that no other beats in the time of every virtual stage."""
        found = self._fitting(device, virtual_stages, mtp_virtual_stage)
        if not len(found[0]):
            return []
        times = np.stack(found[1], axis=1)
        times, first = np.unique(times, axis=0, return_index=True)
        if len(times) > MAX_COMPARED:
            least = np.sort(np.argsort(times.sum(axis=1), kind="stable")[:MAX_COMPARED])
            times, first = times[least], first[least]
        kept = [
            at
            for at in range(len(times))
            if not (np.all(times <= times[at], axis=1) & np.any(times < times[at], axis=1)).any()
        ]
        return [self._plan(virtual_stages, found, int(first[at])) for at in kept]

    def _plan(self, virtual_stages: Composition, found: tuple[list, list], at: int) -> DevicePlan:
        picked, extra = found
        modes = tuple(
            self.stage_choices(one).modes[int(picked[virtual_stage][at])]
            for virtual_stage, one in enumerate(virtual_stages)
        )
        return DevicePlan(tuple(float(part[at]) for part in extra), modes)

    def _fitting(self, device: int, virtual_stages: Composition, mtp_virtual_stage: int | None) -> tuple[list, list]:
        """(index of the choice of each virtual stage, time added to each of them) of all combinations that fit."""
        choices = [self.stage_choices(one) for one in virtual_stages]
        sizes = self._thin([len(one.modes) for one in choices])
        picked = [grid.ravel() for grid in np.meshgrid(*(size for size in sizes), indexing="ij")]
        weights, fixed_act, fixed_ws = self._fixed(device, virtual_stages, mtp_virtual_stage)
        act = [choice.act[at] + fixed for choice, at, fixed in zip(choices, picked, fixed_act, strict=True)]
        fits = np.full(len(picked[0]), weights <= self.problem.mem_limit)
        for held, backward in zip(self.held[device], self.backward[device], strict=True):
            most = sum(count * size for count, size in zip(held, act, strict=True))
            if backward is not None:
                most = most + np.maximum(choices[backward].ws[picked[backward]], fixed_ws[backward])
            fits &= weights + most <= self.problem.mem_limit
        where = np.flatnonzero(fits)
        picked = [at[where] for at in picked]
        return (
            ([], [])
            if not len(where)
            else (picked, [choice.extra[at] for choice, at in zip(choices, picked, strict=True)])
        )

    def _fixed(
        self, device: int, virtual_stages: Composition, mtp_virtual_stage: int | None
    ) -> tuple[float, list[float], list[float]]:
        """Bytes of the weights and of what is always in use; of each virtual stage what its blocks keep, and their
        working set."""
        problem = self.problem
        weights, fixed_act, fixed_ws = problem.const_mem, [], []
        for virtual_stage, one in enumerate(virtual_stages):
            stage = virtual_stage * problem.P + device
            block = problem.fixed_block(stage, stage if virtual_stage == mtp_virtual_stage else None)
            weights += block.w + math.fsum(count * group.w for count, group in zip(one, problem.groups, strict=True))
            fixed_act.append(block.act)
            fixed_ws.append(block.ws)
        return weights, fixed_act, fixed_ws

    def _thin(self, sizes: list[int]) -> list[np.ndarray]:
        most = max(2, int(MAX_COMBINATIONS ** (1 / len(sizes))))
        if math.prod(sizes) <= MAX_COMBINATIONS:
            return [np.arange(size) for size in sizes]
        return [np.unique(np.linspace(0, size - 1, min(size, most)).astype(int)) for size in sizes]


def _stage_choices(problem: BalanceProblem, in_group: Sequence[int]) -> StageChoices:
    per_group = []
    for group, count in zip(problem.groups, in_group, strict=True):
        per_group.append(_group_choices(count, len(group.modes)))
    rows: list[tuple[float, float, float, tuple]] = []
    for chosen in itertools.product(*per_group):
        extra = act = ws = 0.0
        for group, counts in zip(problem.groups, chosen, strict=True):
            for mode, count in zip(group.modes, counts, strict=True):
                if count:
                    extra, act, ws = extra + count * mode.extra_b, act + count * mode.act, max(ws, mode.ws)
        rows.append((ws, extra, act, chosen))
    rows.sort(key=lambda row: row[:3])
    kept: list[tuple[float, float, float, tuple]] = []
    for _, same in itertools.groupby(rows, key=lambda row: row[0]):
        least = math.inf
        for row in same:
            if row[2] < least:
                least = row[2]
                kept.append(row)
    kept.sort(key=lambda row: row[1])
    modes = tuple(
        tuple(mode for counts in row[3] for mode, count in enumerate(counts) for _ in range(count)) for row in kept
    )
    arrays = (np.array([row[at] for row in kept]) for at in (1, 2, 0))
    return StageChoices(modes, *arrays)


def _group_choices(count: int, num_modes: int) -> list[tuple[int, ...]]:
    """How many of `count` layers have each mode."""
    if num_modes == 1:
        return [(count,)]
    return [(first, *rest) for first in range(count + 1) for rest in _group_choices(count - first, num_modes - 1)]
