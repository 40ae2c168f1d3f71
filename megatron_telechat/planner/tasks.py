"""Problems of a sweep solved in processes of their own; what comes out is the same for any number of them."""

from __future__ import annotations

import select
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_telechat.planner.assignment import Assignment, Solution
from megatron_telechat.planner.budget import Budget
from megatron_telechat.planner.messages import register
from megatron_telechat.planner.path_cuts import PathCut
from megatron_telechat.planner.problem import BalanceProblem, Block, DeviceCost, LayerGroup, Mode
from megatron_telechat.planner.solve import solve_below
from megatron_telechat.planner.worker import Employer, Worker

Solved = tuple[Solution, tuple[PathCut, ...]]
"""The answer to a task, and the paths that were met."""


@dataclass(frozen=True)
class Task:
    """A problem for `solve_below`; `seconds`: until the search of all ends."""

    problem: BalanceProblem
    limit: float
    work: int
    gap: float
    cuts: tuple[PathCut, ...]
    warm_start: Assignment | None
    seconds: float

    def answer(self, memory: dict[str, Any]) -> Solved:
        """Solve it; nothing is kept."""
        cuts = dict.fromkeys(self.cuts)
        budget = Budget(time.perf_counter() + self.seconds, self.work)
        answer = solve_below(self.problem, self.limit, budget, self.gap, cuts, self.warm_start)
        known = set(self.cuts)
        return answer, tuple(cut for cut in cuts if cut not in known)


register(Task, Solution, Assignment, PathCut, BalanceProblem, LayerGroup, Mode, Block, DeviceCost)


class Workers(Employer):
    """So many processes, or none for one: then tasks run here. They start at the first tasks that come after `wait_s`
    seconds: a short search is over before they would be there."""

    def __init__(self, number: int, wait_s: float = 1.0):
        self.number = number
        super().__init__()
        self._from = time.perf_counter() + wait_s

    def run(self, tasks: Sequence[Task]) -> list[Solved]:
        """The answers, in the order of the tasks.

        Raises:
            ResourceError: a process ended before it had answered.
        """
        if self.number == 1 or len(tasks) == 1 or time.perf_counter() < self._from:
            return [task.answer({}) for task in tasks]
        if not self._workers:
            self.employ(self.number)
        answers: dict[int, Solved] = {}
        waiting = list(enumerate(tasks))[::-1]
        busy: dict[Worker, int] = {}
        idle = list(self._workers)
        while waiting or busy:
            while waiting and idle:
                worker = idle.pop()
                busy[worker], task = waiting.pop()
                worker.ask(task)
            for worker in select.select(list(busy), [], [])[0]:
                answers[busy.pop(worker)] = worker.answer()
                idle.append(worker)
        return [answers[number] for number in range(len(tasks))]
