"""The plan of a run: the balance problem solved, the iteration that follows, and what plainer splits would give."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.devices import DeviceSpec
from megatron_telechat.costs.imbalance import worst_imbalance
from megatron_telechat.costs.time import Software
from megatron_telechat.errors import ConfigError
from megatron_telechat.planner.assignment import Assignment, Solution
from megatron_telechat.planner.baselines import Baseline, best_with_layout_string, megatron_splits
from megatron_telechat.planner.build import PlannedRun, assignment_of, balance_problem, kinds_of, planned_run
from megatron_telechat.planner.context import ways
from megatron_telechat.planner.predict import Prediction, predict
from megatron_telechat.planner.problem import BalanceProblem
from megatron_telechat.planner.simulate import peak_bytes, simulate
from megatron_telechat.planner.solve import solve


@dataclass(frozen=True)
class Question:
    """What is to be planned.

    Attributes:
        run: the run; its own layout and recompute are not read.
        kinds: recompute kinds a layer may have, next to none.
        memory_bytes, reserve_bytes: of one device; unset: the device file's, and the usual reserve.
        time_limit_s, gap, processes: of the search.
        plain: only what Megatron-LM's flags can say.
        software: what the program hides of its communication; unset: what our own does.
        counted: what of that was said, for the report.
        imbalance: rows of the busiest rank's experts over the mean that the plan must expect; 1: a balanced routing. A
            layout whose ranks hold many experts cannot be so uneven (`costs.imbalance.worst_imbalance`). Times and
            bytes grow with it, so a plan for the largest of several is the best for the worst of them.
        slow_stage: as of `BalanceProblem`: the plan is the best for the worst stage that may run slower by this share.
    """

    run: RunConfig
    device: DeviceSpec
    kinds: tuple[str, ...] = ("full",)
    memory_bytes: float | None = None
    reserve_bytes: float | None = None
    time_limit_s: float = 30.0
    gap: float = 0.0
    plain: bool = False
    software: Software | None = None
    counted: tuple[str, ...] = ()
    imbalance: float = 1.0
    slow_stage: float = 0.0
    processes: int = 1

    def of(self, run: RunConfig) -> Question:
        """The same of another run."""
        if self.imbalance == 1.0 or not run.model.is_moe:
            return replace(self, run=run)
        imbalance = min(self.imbalance, worst_imbalance(run))
        return replace(self, run=run, software=replace(self.software or Software.of(run), moe_imbalance=imbalance))

    def problem(self) -> BalanceProblem:
        """Its balance problem.

        Raises:
            ConfigError: unknown kind; no times for this device at these shapes.
        """
        problem = balance_problem(
            self.run, self.device, self.kinds, mem_limit_bytes=self.memory_bytes, reserve_bytes=self.reserve_bytes,
            software=self.software,
        )  # fmt: skip
        return replace(problem, slow_stage=self.slow_stage)


@dataclass(frozen=True)
class Plan:
    """An answer.

    Attributes:
        solution: of the solver; with plain flags its bound, and the assignment within them.
        makespan: in the worst case of the problem.
        planned: the run with layout and recompute in place.
        prediction: of one iteration of it; no stage is slower.
    """

    question: Question
    problem: BalanceProblem
    solution: Solution
    assignment: Assignment
    makespan: float
    planned: PlannedRun
    prediction: Prediction

    @property
    def gap(self) -> float:
        """Share of the makespan by which anything that fits may be faster."""
        return max(0.0, 1 - (self.solution.lower_bound or 0.0) / self.makespan) if self.makespan else 0.0

    @property
    def nominal(self) -> float:
        """The makespan where no stage is slower."""
        if not self.problem.slow_stage:
            return self.makespan
        return simulate(replace(self.problem, slow_stage=0.0), self.assignment).total

    @property
    def worst_iteration(self) -> float:
        """Seconds of an iteration in the worst case."""
        return self.prediction.iteration + self.makespan - self.nominal

    @property
    def peak_bytes(self) -> tuple[float, ...]:
        """Of each stage, without the reserve."""
        return tuple(peak - self.problem.const_mem for peak in peak_bytes(self.problem, self.assignment))


def make_plan(
    question: Question, problem: BalanceProblem | None = None
) -> tuple[Plan | None, Solution, BalanceProblem]:
    """Solve it. The plan is None where nothing fits, or nothing was found in time: the solution says which.

    Raises:
        ConfigError: see `Question.problem`.
    """
    problem = problem or question.problem()
    solution = solve(problem, question.time_limit_s, gap=question.gap, processes=question.processes)
    assignment, makespan = solution.assignment, solution.makespan
    if question.plain and assignment is not None:
        plain = best_with_layout_string(problem, [assignment], question.time_limit_s)
        assignment, makespan = plain.assignment, plain.makespan
    if assignment is None or makespan is None:
        return None, solution, problem
    planned = planned_run(question.run, problem, assignment)
    prediction = predict(planned.run, question.device, question.software)
    return Plan(question, problem, solution, assignment, makespan, planned, prediction), solution, problem


def best_plan(question: Question, fixed: Collection[str]) -> tuple[Plan | None, Solution, BalanceProblem]:
    """The fastest of the plans for the ways in which context-parallel ranks may share a row; of the first way where
    there is none. The ways share the time limit.

    Args:
        fixed: what of that stays as it is (`planner.context.ways`).

    Raises:
        ConfigError: see `Question.problem`.
    """
    found = ways(question.run, question.device, question.software, fixed, question.plain)
    asked = [question.of(run) for _, run in found]
    limit = question.time_limit_s / len(asked)
    answers = [make_plan(replace(one, time_limit_s=limit)) for one in asked]
    best, solution, problem = min(answers, key=lambda one: one[0].worst_iteration if one[0] else math.inf)
    return None if best is None else sayable(best), solution, problem


SAYABLE_S = 0.5
"""Seconds in which a plan as fast in Megatron-LM's words is looked for."""


def sayable(plan: Plan) -> Plan:
    """Of plans that are equally fast, one that Megatron-LM's flags can ask for, where it is found at once."""
    try:
        plan.planned.megatron_flags()
    except ConfigError:
        plain = best_with_layout_string(plan.problem, [plan.assignment], SAYABLE_S)
        if plain.assignment is None or plain.makespan is None or plain.makespan > plan.makespan * (1 + EQUAL):
            return plan
        planned = planned_run(plan.question.run, plan.problem, plain.assignment)
        prediction = predict(planned.run, plan.question.device, plan.question.software)
        return replace(
            plan, assignment=plain.assignment, makespan=plain.makespan, planned=planned, prediction=prediction
        )
    return plan


EQUAL = 1e-7
"""Difference of two makespans that the proof does not see either."""


def plainer(plan: Plan, configured: RunConfig | None, why_not: str = "") -> list[Baseline]:
    """What to compare with: the run as it was configured, Megatron's splits, the best plain flags.

    Args:
        configured: the run with its own layout and recompute; None where it names none, or none that works.
        why_not: then what is wrong with it.
    """
    found = []
    if configured is not None:
        found = [_configured(plan.question, configured)]
    elif why_not:
        found = [Baseline(AS_CONFIGURED, None, None, why=why_not)]
    return found + megatron_splits(plan.problem, strict=True)


AS_CONFIGURED = "as configured"


def _configured(question: Question, run: RunConfig) -> Baseline:
    """The configured layout and recompute, which may use kinds that the plan may not."""
    kinds = tuple(dict.fromkeys([*question.kinds, *kinds_of(run)]))
    try:
        wide = replace(question, kinds=kinds).problem()
        assignment = assignment_of(run, wide)
    except ConfigError as error:
        return Baseline(AS_CONFIGURED, None, None, why=error.problems[0].what)
    fits = max(peak_bytes(wide, assignment)) <= wide.mem_limit
    return Baseline(AS_CONFIGURED, simulate(wide, assignment).makespan if fits else None, assignment)
