"""The fastest layout of a space, with a proof for the whole space.

Branch and bound over layouts. A layout has a lower bound on its step: at first the work of its layers, then the
relaxation of its balance problem, then whatever its search proves. One whose bound is not below the best step found,
less the gap, is closed. The others are searched, with a little effort each, then with more: the first ones make the
best step, and most others are closed by it at once. Layouts with the same schedule share the paths that were long in
one of them (`planner.path_cuts`), which hold for all.

The search counts its effort in linear programs and goes on in rounds of fixed size, so that neither the speed of the
machine nor the number of processes changes what is found; only the end of the time does.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from megatron_telechat.errors import ConfigError
from megatron_telechat.planner.assignment import Assignment, Solution
from megatron_telechat.planner.branch import least_work
from megatron_telechat.planner.build import planned_run
from megatron_telechat.planner.path_cuts import PathCut
from megatron_telechat.planner.plan import Plan
from megatron_telechat.planner.predict import predict
from megatron_telechat.planner.problem import BalanceProblem
from megatron_telechat.planner.rest import least_seconds
from megatron_telechat.planner.solve import reaches
from megatron_telechat.planner.space import Layout, Load
from megatron_telechat.planner.tasks import Task, Workers

GAP = 0.005
"""The proof is closed when no layout is faster by more than this."""
EFFORT, MORE_EFFORT, MOST_TIMES = 60, 100, 4
"""Linear programs for a layout at first, and the factor from one time to the next, so often: a search begins anew each
time, and what the relaxation does not close takes some thousands."""
POLISHING, POLISHED_GAP = 3000, 1e-4
"""Linear programs for the best layout once the proof is closed, and the gap of its own that ends them."""
FIRST_ROUNDS, ROUND = (1, 2, 4), 8
"""Layouts that are searched at once; the first ones make the step that closes others."""
NO_EFFORT, LOOKS = -1, 16
"""A look finds a split and proves nothing; so many layouts get one before the search begins."""
ROWS_EFFORT, ROWS_GAP, ROWS_TRIED = 60, 0.02, 2
"""Of a layout that is searched for the table alone; and how many of them, in lengths of the table."""


@dataclass
class Entry:
    """A layout, and what is known of it.

    Attributes:
        bound: no split of it takes less for a step; inf where nothing fits.
        guess: seconds that it may take, to order by.
        value, assignment: the best split found.
        refused: why the configuration does not take it.
        checked: whether the configuration was asked.
        effort: how often it was searched.
        searched: whether its relaxation was solved.
        nodes: boxes that searches looked at beyond it.
    """

    layout: Layout
    bound: float
    guess: float
    value: float = math.inf
    assignment: Assignment | None = None
    refused: str = ""
    checked: bool = False
    effort: int = 0
    searched: bool = False
    nodes: int = 0
    solution: Solution | None = None

    @property
    def fits(self) -> bool:
        """Whether anything may fit."""
        return math.isfinite(self.bound)


@dataclass(frozen=True)
class Proof:
    """What was proved of a space.

    Attributes:
        layouts: of the space; all of the following add up to them.
        no_fit: nothing of them fits the memory.
        by_work: of these the work of the layers alone takes too long.
        by_relaxation: of these the relaxation does.
        searched: these were searched beyond it.
        refused: the configuration does not take these.
        unseen: nothing is known of these but their work: the time was up.
        step: of the best layout, seconds.
        bound: no layout takes less.
        seconds: of the search.
    """

    layouts: int
    no_fit: int
    by_work: int
    by_relaxation: int
    searched: int
    refused: int
    unseen: int
    step: float
    bound: float
    seconds: float

    @property
    def gap(self) -> float:
        """Share of the step by which another layout may be faster."""
        return max(0.0, 1 - self.bound / self.step) if math.isfinite(self.step) else math.inf


@dataclass(frozen=True)
class Ranking:
    """What a sweep found.

    Attributes:
        plans: fastest first, with the flags of each. The first is the one of the proof; the others are the best found.
        proof: of the whole space.
        gap: that closes it.
    """

    plans: tuple[tuple[tuple[str, ...], Plan], ...]
    proof: Proof
    gap: float


def quick_bound(problem: BalanceProblem) -> float:
    """Seconds of a step below which no split can be, by arithmetic."""
    return least_work(problem) + least_seconds(problem)


def guess(problem: BalanceProblem) -> float:
    """Seconds that an even split may take, to order layouts by: work, bubble, the recompute that makes stage 0 fit, and
    the rest of the step."""
    layers, stages = problem.num_layers, problem.P * problem.V
    group = problem.group_size or problem.P
    in_flight = min(problem.m, (2 * problem.P - 1 + (problem.V - 1) * group) / problem.V)
    leanest = [min(group.modes, key=lambda mode: mode.act) for group in problem.groups]
    pairs = list(zip(problem.groups, leanest, strict=True))
    kept = sum(group.count * group.modes[0].act for group in problem.groups) / problem.P * in_flight
    saved = kept - sum(group.count * mode.act for group, mode in pairs) / problem.P * in_flight
    resident = sum(group.count * group.w for group in problem.groups) / problem.P + max(problem.embed.w, problem.head.w)
    over = problem.const_mem + resident + kept - problem.mem_limit
    share = max(over, 0.0) / saved if saved else math.inf * (over > 0)
    extra = problem.m / problem.P * sum(group.count * mode.extra_b for group, mode in pairs)
    bubble = (problem.P - 1) / (problem.V * problem.m)
    uneven = -(-layers // stages) * stages / layers
    pipeline = (least_work(problem) + extra * min(share, 1.0)) * (1 + bubble) * uneven
    return (pipeline + least_seconds(problem)) * (1 if share <= 1 else 1e3)


@dataclass
class Search:
    """A search of a space that can be asked at any time what it has proved.

    Args:
        layouts: the space.
        load: of the configuration, for the layouts that are answers.
        gap: where to stop.
        deadline: of `time.perf_counter`.
        workers: who solves.
    """

    layouts: Sequence[Layout]
    load: Load
    gap: float
    deadline: float
    workers: Workers
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.entries = [Entry(one, quick_bound(one.problem), guess(one.problem)) for one in self.layouts]
        self.best: Entry | None = None
        self.cuts: dict[tuple[int, int, int, int], dict[PathCut, None]] = defaultdict(dict)

    @property
    def limit(self) -> float:
        """A bound from here on closes a layout."""
        return math.inf if self.best is None else self.best.value * (1 - self.gap)

    def closed(self, one: Entry) -> bool:
        """Whether it is not faster by more than the gap."""
        return math.isinf(one.bound) or self.best is not None and reaches(one.bound, self.limit)

    def open_entries(self) -> list[Entry]:
        """Layouts that may be faster by more than the gap, those to look at next first."""
        found = [one for one in self.entries if not one.refused and not self.closed(one)]
        return sorted(found, key=lambda one: (one.effort, one.guess, one.layout.number))

    def over(self) -> bool:
        """Whether the time is up."""
        return time.perf_counter() > self.deadline

    def run(self) -> None:
        """Search until the proof is closed or the time is up."""
        self.look()
        rounds = iter(FIRST_ROUNDS)
        while not self.over():
            now = self.open_entries()[: next(rounds, ROUND)]
            if not now:
                return
            self.solve(now, self.limit, self.gap, [EFFORT * MORE_EFFORT ** min(one.effort, MOST_TIMES) for one in now])
            for one in now:
                one.effort += 1

    def look(self) -> None:
        """Find a step, in the layouts that look best, before anything is proved: so there is an answer at any time."""
        looks = 0
        for one in sorted(self.entries, key=lambda one: (one.guess, one.layout.number)):
            if self.over() or looks >= LOOKS and self.best is not None:
                return
            self.solve([one], math.inf, self.gap, [NO_EFFORT])
            looks += 1

    def solve(self, entries: Sequence[Entry], limit: float, gap: float, work: Sequence[int]) -> None:
        """Search these at once, and note what is found of them."""
        left = max(self.deadline - time.perf_counter(), 0.05)
        tasks = [
            Task(one.layout.problem, limit, most, gap, tuple(self.cuts[one.layout.schedule]), one.assignment, left)
            for one, most in zip(entries, work, strict=True)
        ]
        for one, (answer, cuts) in zip(entries, self.workers.run(tasks), strict=True):
            self.cuts[one.layout.schedule] |= dict.fromkeys(cuts)
            one.searched |= work[0] != NO_EFFORT
            self.note(one, answer)

    def note(self, one: Entry, answer: Solution) -> None:
        """What a search says of a layout; a split that may be an answer is shown to the configuration."""
        if answer.status == "infeasible":
            one.bound = math.inf
            return
        one.bound = max(one.bound, answer.lower_bound or 0.0)
        one.nodes += answer.nodes
        if answer.assignment is None or answer.makespan is None or answer.makespan >= one.value:
            return
        one.value, one.assignment, one.solution = answer.makespan, answer.assignment, answer
        if (self.best is None or one.value < self.best.value) and self.takes(one):
            self.best = one

    def takes(self, one: Entry) -> bool:
        """Whether the configuration takes the layout; its costs are then those of the loaded run."""
        if one.checked:
            return not one.refused
        one.checked = True
        try:
            loaded = one.layout.loaded(self.load)
        except ConfigError as error:
            one.refused = error.problems[0].what
            return False
        if loaded.problem != one.layout.problem:  # the configuration adds something that the space did not know of
            one.bound, one.value, one.assignment = quick_bound(loaded.problem), math.inf, None
        one.layout = loaded
        return one.assignment is not None

    def polish(self, gap: float) -> None:
        """Search the best layout further, down to a smaller gap of its own."""
        if self.best is None or self.over():
            return
        self.solve([self.best], math.inf, gap, [POLISHING])

    def rows(self, top: int) -> list[Entry]:
        """The best layout, and the best found of the others. Few more are searched for that: the proof does not need
        them."""
        for _ in range(ROWS_TRIED * -(-top // ROUND)):
            known = self._known()
            worst = known[top - 1].value if len(known) >= top else math.inf
            left = [one for one in self.entries if one.assignment is None and not one.refused and one.bound < worst]
            left = sorted(left, key=lambda one: (one.guess, one.layout.number))[:ROUND]
            if not left or self.over():
                break
            self.solve(left, worst, ROWS_GAP, [ROWS_EFFORT] * len(left))
            for one in left:
                if one.assignment is None:
                    one.guess = math.inf
        found: list[Entry] = []
        for one in self._known():
            if len(found) < top and self.takes(one):
                found.append(one)
        return found

    def _known(self) -> list[Entry]:
        found = [one for one in self.entries if one.assignment is not None and not one.refused]
        return sorted(found, key=lambda one: (one.value, one is not self.best, one.layout.number))

    def proof(self) -> Proof:
        """What is proved by now."""
        live = [one for one in self.entries if not one.refused]
        fitting = [one for one in live if one.fits]
        step = math.inf if self.best is None else self.best.value
        unseen = [one for one in fitting if not one.searched and not self.closed(one)]
        by_work = [one for one in fitting if not one.searched and self.closed(one)]
        relaxed = [one for one in fitting if one.searched and not one.nodes]
        return Proof(
            layouts=len(self.entries),
            no_fit=len(live) - len(fitting),
            by_work=len(by_work),
            by_relaxation=len(relaxed),
            searched=len(fitting) - len(unseen) - len(by_work) - len(relaxed),
            refused=len(self.entries) - len(live),
            unseen=len(unseen),
            step=step,
            bound=min([step, *(one.bound for one in fitting)]),
            seconds=time.perf_counter() - self.started,
        )


def sweep(
    layouts: Sequence[Layout],
    load: Load,
    top: int,
    time_limit_s: float,
    gap: float = GAP,
    processes: int = 1,
    told: Callable[[Proof], None] | None = None,
) -> Ranking:
    """The fastest layout of a space with a proof, and the best found of the others.

    Args:
        layouts: `planner.space.layouts`.
        load: the run with some flags added; raises ConfigError where they do not go together.
        top: plans that are returned.
        time_limit_s: wall time after which the best so far is returned, with what is proved of it.
        gap: the proof ends here.
        processes: that search at once.
        told: gets the proof as soon as it is closed, or the time is up.

    Raises:
        ResourceError: a process ended before it had answered.
    """
    deadline = time.perf_counter() + time_limit_s
    with Workers(processes) as workers:
        search = Search(layouts, load, gap, deadline, workers)
        search.run()
        search.polish(min(gap, POLISHED_GAP))
        proof = search.proof()
        if told is not None:
            told(proof)
        plans = [plan_of(one) for one in search.rows(top)]
    return Ranking(tuple(plans), proof, gap)


def plan_of(one: Entry) -> tuple[tuple[str, ...], Plan]:
    """The best split found of a layout as a plan, with the flags of its sizes."""
    question, problem = one.layout.question, one.layout.problem
    assert one.assignment is not None and one.solution is not None
    planned = planned_run(question.run, problem, one.assignment)
    prediction = predict(planned.run, question.device, question.software)
    status = "optimal" if one.bound >= one.value * (1 - 1e-7) else "feasible"
    bound = min(one.bound, one.value)
    solution = replace(one.solution, status=status, lower_bound=bound, gap=1 - bound / one.value)
    return one.layout.flags, Plan(question, problem, solution, one.assignment, one.value, planned, prediction)
