"""The problem of a whole iteration: what `planner.predict` adds to the pipeline, in terms that the solver minimises.

Gradient reduction, weight gather and optimizer are those of the slowest stage: maxima over devices of sums over what a
device holds. So the proof of a solver is one of the step, not of the pipeline alone.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.devices import DeviceSpec
from megatron_telechat.costs.parameters import LocalCount, local_count
from megatron_telechat.costs.time import Software, TimeModel
from megatron_telechat.planner.predict import HIDDEN, LEFT, messages_seconds
from megatron_telechat.planner.problem import BalanceProblem, DeviceCost
from megatron_telechat.tensors.table import layer_table, stage_table


def whole_step(
    problem: BalanceProblem, run: RunConfig, device: DeviceSpec, software: Software | None = None
) -> BalanceProblem:
    """The balance problem of a run with the rest of its iteration (`BalanceProblem.rest`).

    The makespan of an assignment, and its rest, are then `predict(...).iteration` of the run with that assignment, as
    far as no calibration measured how ranks slow each other down (`Prediction.pace`), and the schedule is not so long
    that the prediction carries it on from a part (`predict.simulated`).
    """
    times = TimeModel(run, device, software)
    parts = _Counts.of(problem, run)
    reduction = parts.costs(times.gradient_reduction)
    gather = parts.costs(times.parameter_gather)
    reduced = _exposed(reduction, run.parallel.overlap_grad_reduce, backward=True)
    gathered = _exposed(gather, run.parallel.overlap_param_gather, backward=False)
    number = len(times.optimizer_step_parts(LocalCount(0, 0)))
    optimizer = [parts.costs(lambda count, at=at: times.optimizer_step_parts(count)[at]) for at in range(number)]
    constant = times.tied_embedding() + times.step_constant()
    return replace(
        problem,
        rest=(
            tuple(_sum(one, other) for one in reduced for other in gathered),
            tuple(optimizer),
            _fixed(problem, constant),
            _fixed(problem, messages_seconds(problem, times)),
        ),
    )


def other_virtual_stages(
    problem: BalanceProblem, number: int, group_size: int | None, measured: bool
) -> BalanceProblem:
    """The same run with another number of virtual stages a device, and micro-batches in groups of this size: its parts
    cost the same, its messages are more."""
    changed = replace(problem, V=number, group_size=group_size)
    if not problem.rest or measured:
        return changed
    return replace(changed, rest=(*problem.rest[:-1], _fixed(problem, messages_seconds(changed))))


def _fixed(problem: BalanceProblem, seconds: float) -> tuple[DeviceCost, ...]:
    return (DeviceCost(seconds, (0.0,) * len(problem.groups)),)


def _exposed(cost: DeviceCost, overlapped: bool, backward: bool) -> list[DeviceCost]:
    """What is left of an exchange beside one micro-batch is the largest of these (`predict`)."""
    if not overlapped:
        return [cost]
    left = DeviceCost(
        LEFT * cost.constant, tuple(LEFT * value for value in cost.layers), LEFT * cost.embed, LEFT * cost.head
    )
    hidden = replace(cost, backward=-HIDDEN) if backward else replace(cost, forward=-HIDDEN)
    return [hidden, left]


def _sum(one: DeviceCost, other: DeviceCost) -> DeviceCost:
    return DeviceCost(
        one.constant + other.constant,
        tuple(a + b for a, b in zip(one.layers, other.layers, strict=True)),
        one.embed + other.embed,
        one.head + other.head,
        one.forward + other.forward,
        one.backward + other.backward,
    )


class _Counts:
    """Parameters that a rank holds of a layer of each group, of the embedding, of the output layer."""

    def __init__(self, layers: list[LocalCount], embed: LocalCount, head: LocalCount):
        self.layers, self.embed, self.head = layers, embed, head

    @classmethod
    def of(cls, problem: BalanceProblem, run: RunConfig) -> _Counts:
        layers, first = [], 0
        for group in problem.groups:
            layers.append(local_count(layer_table(run.model, first), run.parallel))
            first += group.count
        ends = [stage_table(run.model, (), has_embedding=first, has_loss=not first) for first in (True, False)]
        if problem.P == 1:  # a tied matrix lies on the one stage once
            ends[1] = {key: spec for key, spec in ends[1].items() if key not in ends[0]}
        embed, head = (local_count(table, run.parallel) for table in ends)
        return cls(layers, embed, head)

    def costs(self, seconds) -> DeviceCost:
        """Of a function of the parameters of a rank that is a constant and a sum over them."""
        constant = seconds(LocalCount(0, 0))
        return DeviceCost(
            constant,
            tuple(seconds(count) - constant for count in self.layers),
            seconds(self.embed) - constant,
            seconds(self.head) - constant,
        )
