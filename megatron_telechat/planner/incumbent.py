"""The best assignment so far, and where new ones come from."""

from __future__ import annotations

import math
import time

import numpy as np

from megatron_telechat.errors import ConfigError
from megatron_telechat.planner.assignment import Assignment, check_assignment
from megatron_telechat.planner.count_program import Space
from megatron_telechat.planner.descent import Evaluator, descend, round_counts, starts
from megatron_telechat.planner.device_plans import DevicePlans
from megatron_telechat.planner.exchange import Exchange
from megatron_telechat.planner.problem import BalanceProblem
from megatron_telechat.planner.simulate import SimResult, peak_bytes, simulate

MOST_EVALUATED = 50_000_000
"""Ops, of all neighbours of all steps, that a descent simulates where it is not eager: half a second."""
FEW_COMBINATIONS = 2_000
"""Choices of a device that are looked at one by one where it is not eager."""
FEWEST_STEPS, FEW_STEPS, MANY_STEPS = 6, 20, 100
"""Steps of an exchange without gain after which it ends: after a shake, around a new best, around the first."""
MANY_DESCENTS, FEW_DESCENTS = 10, 3
"""Boxes of a search whose points are all rounded, where it is eager and where not."""
SELDOM = 20
"""After those, the point of one box in so many is."""
FIRST_SHAKES = 20
"""Shakes at the start."""
MOVES = 2, 6
"""Random moves of a shake: from, and below."""
FEW_NEIGHBOURS = 48
"""Neighbours that are simulated in each step after a shake."""
ACCEPTED = 0.01
"""A shake goes on from what is slower than the best by less than this."""
RELATIVE = 1e-7
"""Where times are not whole numbers, makespans nearer than this (relative) count as equal."""


def rounding(time: float) -> float:
    """Where times are whole numbers, a bound this much above one is still taken for it."""
    return min(0.25, max(1e-3, abs(time) * 1e-12))


class Incumbent:
    """Keeps the best assignment that the simulator says fits.

    Args:
        eager: descends often, for the sake of a good answer; else seldom, where most of the work is to prove that none
            is good enough.
        seed: of its random moves.
    """

    def __init__(self, problem: BalanceProblem, deadline: float, eager: bool = True, seed: int = 0):
        self.problem, self.deadline, self.eager = problem, deadline, eager
        self.plans = DevicePlans(problem) if eager else DevicePlans(problem, FEW_COMBINATIONS)
        self.evaluator = Evaluator(problem, self.plans)
        self.makespan = math.inf
        self.assignment: Assignment | None = None
        self.result: SimResult | None = None
        self._tried: set[tuple] = set()
        self._exchange: Exchange | None = None
        self._random = np.random.default_rng(seed)
        self._from: tuple[float, Assignment] | None = None
        ops = 2 * problem.num_stages * problem.m
        self._steps = None if eager else MOST_EVALUATED // (ops * problem.num_stages**2)

    def cutoff(self, best: float) -> float:
        """Bounds from here on leave nothing better than `best`."""
        if self.problem.integral:
            return math.ceil(best - 1e-6) - 1 + 2 * rounding(best)
        return best * (1 - RELATIVE)

    def offer(self, assignment: Assignment) -> bool:
        """Take it if it fits and is faster."""
        result = simulate(self.problem, assignment)
        if max(result.peak_bytes) > self.problem.mem_limit or result.total >= self.makespan:
            return False
        self.makespan, self.assignment, self.result = result.total, assignment, result
        return True

    def offer_counts(self, counts: tuple[int, ...], place: int | None, patience: int, starting: bool = False) -> None:
        """Descend from a split and take what comes out; look around it too if it is the best, or one to start from."""
        if (counts, place) in self._tried:
            return
        self._tried.add((counts, place))
        span, counts = descend(self.evaluator, counts, place, self.deadline, patience, self._steps)
        self._tried.add((counts, place))
        if math.isfinite(span):
            assignment = self.evaluator.assignment(counts, place)
            if self.offer(assignment) or starting:
                self.exchange(assignment, FEW_STEPS)

    def exchange(self, start: Assignment, patience: int) -> None:
        """Look for a better assignment near one that fits and recomputes some layer.

        A descent gives each split the modes that add the least time, which need not be the best for the schedule.
        """
        if not self._recomputes(start) or max(peak_bytes(self.problem, start)) > self.problem.mem_limit:
            return
        self.offer(self._around.improve(start, self.deadline, patience)[1])

    def _recomputes(self, assignment: Assignment) -> bool:
        """Whether to look around an assignment: where it recomputes nothing, a descent finds as good ones."""
        return self.eager and any(map(any, assignment.modes))

    @property
    def _around(self) -> Exchange:
        if self._exchange is None:
            self._exchange = Exchange(self.problem)
        return self._exchange

    def begin(self) -> None:
        """Descend from some plain splits, and look around what comes out."""
        quarter = time.perf_counter() + 0.25 * (self.deadline - time.perf_counter())
        for place in reversed(self.problem.mtp_places()):
            found = list(starts(self.problem, place))
            if not self.eager and found:
                found = [found[int(np.argmin(self.evaluator.spans(np.array(found), place)))]]
            for counts in found:
                if time.perf_counter() < quarter:
                    self.offer_counts(counts, place, 2, starting=True)
        if self.assignment is not None:
            self.exchange(self.assignment, MANY_STEPS)
            self.shake(FIRST_SHAKES)

    def shake(self, times: int) -> None:
        """Exchange from so many assignments a few random moves away from the best, or from one nearly as good: an
        iterated local search. It goes on where it was at the last call, unless something better is known since."""
        for _ in range(times):
            if self.assignment is None or not self._recomputes(self.assignment) or time.perf_counter() >= self.deadline:
                return
            if self._from is None or self.makespan < self._from[0]:
                self._from = self.makespan, self.assignment
            start = self._around.shaken(self._from[1], int(self._random.integers(*MOVES)), self._random)
            span, found = self._around.improve(start, self.deadline, FEWEST_STEPS, FEW_NEIGHBOURS)
            if span < self.makespan:
                self.offer(found)
            if span < self.makespan * (1 + ACCEPTED):
                self._from = span, found

    def offer_point(self, space: Space, x: np.ndarray, whole: bool, node: int) -> None:
        """A point of the LP: taken as it is if whole, else rounded (seldom: rounding costs time)."""
        if whole:
            try:
                assignment = Assignment(space.modes(x), space.place(x))
                check_assignment(self.problem, assignment)
            except ConfigError:
                return
            if self.offer(assignment):
                self.exchange(assignment, FEW_STEPS)
        elif node < (MANY_DESCENTS if self.eager else FEW_DESCENTS) or node % SELDOM == 0:
            counts = round_counts(self.problem, space.counts(x), space.place(x))
            if counts is not None:
                self.offer_counts(counts, space.place(x), 0 if node > MANY_DESCENTS else 2)

    def exact(self, space: Space, x: np.ndarray) -> float:
        """Makespan of a box of one point; inf if that point is not allowed or does not fit."""
        assignment = Assignment(space.modes(x), space.place(x))
        try:
            result = simulate(self.problem, assignment)
        except ConfigError:
            return math.inf
        return result.total if max(result.peak_bytes) <= self.problem.mem_limit else math.inf
