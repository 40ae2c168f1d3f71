"""Predicted time and memory of one iteration of a run as it is configured."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.devices import DeviceSpec
from megatron_telechat.costs.memory import stage_parameters
from megatron_telechat.costs.time import Software, TimeModel
from megatron_telechat.planner.assignment import Assignment
from megatron_telechat.planner.build import assignment_of, balance_problem, kinds_of
from megatron_telechat.planner.problem import BalanceProblem
from megatron_telechat.planner.simulate import SimResult, simulate, stage_times
from megatron_telechat.planner.slowdown import expected_makespan

MOST_OPS = 16384
"""Forwards and backwards that a prediction simulates; a schedule with more is carried on from its start."""
MIN_ROUNDS = 8
"""Groups of micro-batches that are simulated in any case: the pipeline is full after two."""

HIDDEN = 0.68
"""Of the backward of one micro-batch, the share beside which gradients are reduced."""
LEFT = 0.16
"""Share of an overlapped reduction that is exposed at least: its last bucket, and what it slows the compute down."""
MESSAGES_EXPOSED = 0.19
"""Share of the messages between stages that stands in the way of compute even where the schedule has time for them."""


@dataclass(frozen=True)
class Prediction:
    """Seconds of one iteration.

    Attributes:
        problem, assignment: the pipeline.
        makespan: from its first forward to the end of its last backward.
        pace: of the makespan, the factor for waiting neighbours and varying ops; 1 where no calibration measured them.
        simulation: its ops; of the first micro-batches alone where there are very many.
        messages: between stages, which stand in the way of compute where the schedule has time for them.
        reduction: gradient reduction and weight gathering that the backward does not cover, of the slowest stage.
        optimizer: optimizer step of the stage with the most parameters.
        constant: the rest of an iteration; measured, or 0.
        tokens: tokens of one iteration.
        ranks: ranks that share them.
        error: nine in ten runs like this one lie within this share of the prediction (`error_bar`).
    """

    problem: BalanceProblem
    assignment: Assignment
    makespan: float
    pace: float
    simulation: SimResult
    messages: float
    reduction: float
    optimizer: float
    constant: float
    tokens: int
    ranks: int
    error: float = 0.0

    @property
    def iteration(self) -> float:
        """Seconds of the whole iteration."""
        return self.makespan + self.messages + self.reduction + self.optimizer + self.constant

    @property
    def tokens_per_s_per_device(self) -> float:
        """Tokens per second and device."""
        return self.tokens / self.iteration / self.ranks

    @property
    def bubble(self) -> float:
        """Share of the makespan in which the busiest stage waits, by the schedule alone."""
        times = stage_times(self.problem, self.assignment)
        stages, size = self.problem.num_stages, self.problem.P
        busy = [sum(times[rank:stages:size]) + sum(times[stages + rank :: size]) for rank in range(size)]
        return 1 - max(busy) * self.problem.m * self.pace / self.makespan


def simulated(problem: BalanceProblem, assignment: Assignment) -> tuple[float, SimResult]:
    """Makespan, and the simulation it comes from.

    Where the ops are more than MOST_OPS, a shorter run of two lengths is simulated and its growth carried on: once the
    pipeline is full, every further group of micro-batches takes the busiest device's time for it.
    """
    group = problem.group_size or problem.P
    rounds = max(MOST_OPS // (2 * problem.num_stages * group), MIN_ROUNDS)
    if problem.m <= rounds * group:
        result = simulate(problem, assignment)
        return result.makespan, result
    short = rounds * group + problem.m % group
    before, result = (simulate(replace(problem, m=m), assignment) for m in (short - group, short))
    growth = result.makespan - before.makespan
    return result.makespan + growth * ((problem.m - short) // group), result


def _pace(
    run: RunConfig, times: TimeModel, problem: BalanceProblem, assignment: Assignment, simulation: SimResult
) -> float:
    """What waiting neighbours and varying ops do to the makespan, where a calibration measured them."""
    if times.measured is None or problem.P == 1:
        return 1.0
    ops = max(op.microbatch for op in simulation.ops) + 1
    on_one_node = run.parallel.world_size <= run.parallel.node_size
    alone = times.measured.alone if on_one_node else 1.0
    together = run.parallel.ranks_per_stage
    expected = expected_makespan(
        replace(problem, m=ops), stage_times(problem, assignment), alone, times.measured.jitter, together
    )
    return expected / simulation.makespan


FAR_EXPERTS, WIDE_TENSOR = 0.1, 0.03
"""What published runs add to the error: experts exchanged between nodes, and tensor parallelism over a node."""
MEASURED_ERROR, CALIBRATED_ERROR = 0.1, 0.1


def error_bar(run: RunConfig, device: DeviceSpec, times: TimeModel) -> float:
    """Share of the prediction within which nine in ten runs lie (docs/costs.md): of the device's file, more where links
    between nodes or small products matter, less where times or a throughput were measured."""
    if times.measured is not None:
        return MEASURED_ERROR
    if "stack" in device.efficiency:
        return CALIBRATED_ERROR
    expert, expert_tensor = run.parallel.expert_sizes
    far = run.model.is_moe and expert * expert_tensor > times.links.ranks_per_node
    wide = run.parallel.tensor_model_parallel_size >= 8
    return device.error + FAR_EXPERTS * far + WIDE_TENSOR * wide


def messages_seconds(problem: BalanceProblem, times: TimeModel | None = None) -> float:
    """Messages between stages that stand in the way of compute, of an iteration; none where times were measured."""
    if problem.P == 1 or times is not None and times.measured is not None:
        return 0.0
    return MESSAGES_EXPOSED * 2 * problem.m * problem.V * problem.p2p


def _exposed(exchange: float, compute: float, overlapped: bool) -> float:
    """What is left of an exchange once a step beside the `compute` of one micro-batch."""
    return max(exchange - HIDDEN * compute, LEFT * exchange) if overlapped else exchange


def predict(run: RunConfig, device: DeviceSpec, software: Software | None = None) -> Prediction:
    """One iteration of this run: its own layout and recompute, on Megatron-Core's schedule, then the optimizer.

    With `overlap_grad_reduce` one micro-batch's backward hides the reduction (the others run before it may start).

    Raises:
        ConfigError: layout or recompute do not fit the model; no times for this device at these shapes.
    """
    problem = balance_problem(run, device, kinds_of(run), software=software)
    assignment = assignment_of(run, problem)
    makespan, simulation = simulated(problem, assignment)
    times = TimeModel(run, device, software)
    pace = _pace(run, times, problem, assignment, simulation)
    counts = stage_parameters(run)
    stages, ranks = problem.num_stages, range(problem.P)
    seconds = stage_times(problem, assignment)
    cover = [(sum(seconds[rank : stages : problem.P]), sum(seconds[stages + rank :: problem.P])) for rank in ranks]
    return Prediction(
        problem=problem,
        assignment=assignment,
        makespan=makespan * pace,
        pace=pace,
        simulation=simulation,
        messages=messages_seconds(problem, times),
        reduction=times.tied_embedding()
        + max(
            _exposed(times.gradient_reduction(count), backward, run.parallel.overlap_grad_reduce)
            + _exposed(times.parameter_gather(count), forward, run.parallel.overlap_param_gather)
            for count, (forward, backward) in zip(counts, cover, strict=True)
        ),
        optimizer=max(times.optimizer_step(count) for count in counts),
        constant=times.step_constant(),
        tokens=run.training.global_batch_size * run.training.seq_length,
        ranks=max(run.parallel.world_size, 1),
        error=error_bar(run, device, times),
    )
