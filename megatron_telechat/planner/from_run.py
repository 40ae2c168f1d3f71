"""Times of a run's parts, fitted to what the run has logged: a plan from its first steps, without a calibration.

A run logs how long the ranks of each pipeline rank computed in a step, and how long the step took. Both ends of the
model lie on one pipeline rank each, so the times of a layer and of the ends can be told apart: two factors over what
the device file says, by least squares. Where the file has a calibration for these shapes, the two stay near each other.
What the step took beyond the schedule of those times is put to ops that vary from rank to rank, as a calibration would
(`planner.slowdown`), and where that does not reach, to the rest of a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import combinations

import numpy as np

from megatron_telechat.config.recompute import MODULES
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.conditions import conditions
from megatron_telechat.costs.devices import DeviceSpec, Measured
from megatron_telechat.costs.memory import stage_parameters
from megatron_telechat.costs.time import Software, TimeModel, mode_name
from megatron_telechat.errors import ConfigError
from megatron_telechat.planner.assignment import Assignment
from megatron_telechat.planner.build import assignment_of, balance_problem, kinds_of, of_layer
from megatron_telechat.planner.predict import predict
from megatron_telechat.planner.problem import BalanceProblem
from megatron_telechat.planner.simulate import stage_times
from megatron_telechat.planner.slowdown import device_pace

FARTHEST = 8.0
"""A factor beyond this, up or down, says that the device or the run is another one."""
SEEN = 0.02
"""Both ends have a factor of their own where they take this share of a pipeline rank's time."""
UNEXPLAINED = 0.02
"""Share of a rank's compute that differs from rank to rank without a reason that the times know."""
CALIBRATED = 0.1
"""Share within which a calibration has the ratio of ends to layers. Without one nothing is assumed of it."""
MOST_JITTER = 0.5
"""More than this is no variation of ops."""
_PACES = 4
_HALVINGS = 14


@dataclass(frozen=True)
class SeenRun:
    """What a run has logged, medians over its records.

    Attributes:
        iteration_s: seconds of a step.
        stage_compute_s: by pipeline rank, seconds a step that its ranks were at forwards and backwards.
        source: where it is from.
    """

    iteration_s: float
    stage_compute_s: tuple[float, ...]
    source: str


@dataclass(frozen=True)
class Fitted:
    """A device whose times are those of a run.

    Attributes:
        device: with an entry for the shapes of the run.
        layers, ends: factors over what the device file says, of a layer and of embedding and output layer.
        schedule_s: seconds of a step by these times alone.
        predicted_s: with the variation and the rest.
    """

    device: DeviceSpec
    layers: float
    ends: float
    schedule_s: float
    predicted_s: float


def fit_to_run(run: RunConfig, device: DeviceSpec, seen: SeenRun, software: Software | None = None) -> Fitted:
    """Fit the times of the parts of ``run`` on ``device``, as it is configured, to what it logged.

    Raises:
        ConfigError: layout or recompute do not fit the model; no times for this device at these shapes; what was seen
            is of other pipeline ranks, or of another device.
    """
    problem = balance_problem(run, device, kinds_of(run), software=software)
    assignment = assignment_of(run, problem)
    if len(seen.stage_compute_s) != problem.P or min(seen.stage_compute_s, default=0.0) <= 0:
        raise ConfigError(
            f"{seen.source} has the compute of {len(seen.stage_compute_s)} pipeline ranks, the run has {problem.P}",
            "--from",
            "name the folder of a run with the configuration of the command, and with logged steps of it",
        )
    times = TimeModel(run, device, software)
    alone = times.measured.alone if times.measured is not None else 1.0
    on_one_node = run.parallel.world_size <= run.parallel.node_size
    layers, ends = _factors(
        problem,
        assignment,
        seen.stage_compute_s,
        alone if on_one_node else 1.0,
        run.parallel.ranks_per_stage,
        math.inf if times.measured is None else CALIBRATED,
    )
    for factor in (layers, ends):
        if not 1 / FARTHEST < factor < FARTHEST:
            raise ConfigError(
                f"the run computed {factor:.3g} times as long as {device.name} should",
                "--from",
                "name the device that the run was on",
            )
    entry = replace(_entry(run, device, times, layers, ends), source=f"{date.today()}, fitted to {seen.source}")
    schedule_s = _predicted(run, device, entry, software)
    entry = _with_rest(run, device, entry, software, seen.iteration_s)
    return Fitted(_with_entry(device, entry), layers, ends, schedule_s, _predicted(run, device, entry, software))


def _factors(
    problem: BalanceProblem,
    assignment: Assignment,
    seen: Sequence[float],
    alone: float,
    together: int,
    apart_by: float,
) -> tuple[float, float]:
    """Of a layer's time and of the ends' that explain the compute of every pipeline rank best, by relative errors.

    `apart_by`: standard deviation that is assumed of (ends - layers) / layers before anything was seen (a ridge). The
    ends are a small part of two ranks, so a rank that is slower for a reason of its own would else be put to them.
    """
    whole = np.array(stage_times(problem, assignment))
    fixed = [problem.fixed_block(stage, assignment.mtp_stage) for stage in range(problem.num_stages)]
    of_ends = np.array([block.f for block in fixed] + [block.b for block in fixed])
    of_layers = whole - of_ends

    def of_ranks(of_ops: np.ndarray) -> np.ndarray:
        return problem.m * of_ops.reshape(-1, problem.P).sum(axis=0)

    factors, measured = np.ones(2), np.array(seen)
    for _ in range(_PACES):
        ops = factors[0] * of_layers + factors[1] * of_ends
        # What was seen is the time beside whoever worked then; the model's times are those beside all.
        paced = measured / device_pace(problem, ops.tolist(), alone, together)
        shares = np.stack([of_ranks(of_layers) / paced, of_ranks(of_ends) / paced], axis=1)
        both = shares.sum(axis=1)
        factors = np.full(2, both.sum() / (both**2).sum())
        if problem.P > 1 and shares[:, 1].max() >= SEEN:
            pull = UNEXPLAINED / (apart_by * factors[0]) * np.array([[-1.0, 1.0]])
            apart = np.linalg.lstsq(np.concatenate([shares, pull]), np.append(np.ones(problem.P), 0.0), rcond=None)[0]
            factors = apart if apart.min() > 0 else factors
    return float(factors[0]), float(factors[1])


def _entry(run: RunConfig, device: DeviceSpec, times: TimeModel, layers: float, ends: float) -> Measured:
    """What the device file measured, or estimates, times these factors."""
    known = times.measured
    embedding, output = times.embedding(), times.output_layer()
    return Measured(
        conditions=conditions(run),
        layers={
            kind: {name: seconds * layers for name, seconds in of_kind.items()}
            for kind, of_kind in (known.layers if known is not None else _estimated_layers(run, times)).items()
        },
        embedding={"forward": embedding.forward * ends, "backward": embedding.backward * ends},
        output_layer={"forward": output.forward * ends, "backward": output.backward * ends},
        p2p=times.p2p(),
        optimizer_per_parameter=_optimizer_per_parameter(run, device, times),
        step=0.0,
        alone=known.alone if known is not None else 1.0,
        gradient_gb_s=known.gradient_gb_s if known is not None else None,
    )


def _estimated_layers(run: RunConfig, times: TimeModel) -> dict[str, dict[str, float]]:
    """By type of layer, its times, and what every kind of recompute adds."""
    found: dict[str, dict[str, float]] = {}
    for layer in range(run.model.num_layers):
        is_moe = run.model.layer_is_moe(layer)
        kind = "moe" if is_moe else "dense"
        if kind in found:
            continue
        plain = times.layer(layer, ())
        found[kind] = {"forward": plain.forward, "backward": plain.backward}
        subsets = (modes for count in range(1, len(MODULES) + 1) for modes in combinations(MODULES, count))
        for modes in dict.fromkeys([("full",), *(of_layer(subset, is_moe) for subset in subsets)]):
            found[kind][f"extra.{mode_name(modes)}"] = times.layer(layer, modes).extra
    return found


def _optimizer_per_parameter(run: RunConfig, device: DeviceSpec, times: TimeModel) -> float:
    if times.measured is not None:
        return times.measured.optimizer_per_parameter
    on_device = replace(run, parallel=replace(run.parallel, optimizer_cpu_offload=False))
    model = TimeModel(on_device, device, times.software)
    return max(model.optimizer_step(count) / model.own_parameters(count) for count in stage_parameters(run))


def _with_rest(
    run: RunConfig, device: DeviceSpec, entry: Measured, software: Software | None, seen_s: float
) -> Measured:
    """The entry with what a step took beyond its schedule."""
    if run.parallel.pipeline_model_parallel_size > 1:
        low, high = 0.0, MOST_JITTER
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if _predicted(run, device, replace(entry, jitter=middle), software) < seen_s:
                low = middle
            else:
                high = middle
        entry = replace(entry, jitter=round(low, 4))
    return replace(entry, step=max(0.0, seen_s - _predicted(run, device, entry, software)))


def _predicted(run: RunConfig, device: DeviceSpec, entry: Measured, software: Software | None) -> float:
    return predict(run, _with_entry(device, entry), software).iteration


def _with_entry(device: DeviceSpec, entry: Measured) -> DeviceSpec:
    others = tuple(known for known in device.measured if dict(known.conditions) != dict(entry.conditions))
    return replace(device, measured=(entry, *others))
