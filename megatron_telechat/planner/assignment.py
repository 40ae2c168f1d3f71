"""An answer to a balance problem: which layers, in which mode, on which virtual stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_telechat.errors import ConfigError
from megatron_telechat.planner.problem import BalanceProblem


@dataclass(frozen=True)
class Assignment:
    """Layers in model order over virtual stages.

    Attributes:
        modes: for each virtual stage the mode index of each of its layers, in model order.
        mtp_stage: virtual stage of the MTP block, None without one.
    """

    modes: tuple[tuple[int, ...], ...]
    mtp_stage: int | None = None

    @property
    def counts(self) -> tuple[int, ...]:
        """Layers of each virtual stage."""
        return tuple(len(stage) for stage in self.modes)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Assignment:
        """Read `modes` and `mtp_stage` of an answer."""
        return cls(tuple(tuple(stage) for stage in data["modes"]), data.get("mtp_stage"))


@dataclass(frozen=True)
class Solution:
    """What the solver says of a problem.

    Attributes:
        status: "optimal" (gap proved to be 0, or below the tolerance where times are not whole numbers),
            "feasible" (stopped early; the gap is proved), "infeasible" (proved) or, of `solve_below`, "bounded".
        makespan: of `assignment`, by the simulator; with the rest of the iteration where the problem has some. None if
            infeasible, or if none was found in time.
        lower_bound: no assignment that fits is faster. None if infeasible.
        gap: (makespan - lower_bound) / makespan.
        peak_bytes: of each device.
        seconds: wall time of the search.
        shortfall: if infeasible for memory: bytes that the tightest device lacks in the best case. None where
            the layers cannot be laid out at all (fewer layers than the stages need).
        reason: if infeasible, why, in words.
        nodes: boxes that branch and bound looked at.
    """

    status: str
    makespan: float | None = None
    lower_bound: float | None = None
    gap: float | None = None
    assignment: Assignment | None = None
    peak_bytes: tuple[float, ...] | None = None
    seconds: float = 0.0
    shortfall: float | None = None
    reason: str = ""
    nodes: int = 0

    def to_json(self) -> dict[str, Any]:
        """The answer as `tools/plan_pipeline.py --problem FILE --json` prints it."""
        plan = self.assignment
        out: dict[str, Any] = {
            "status": self.status,
            "makespan": self.makespan,
            "lower_bound": self.lower_bound,
            "gap": self.gap,
            "modes": None if plan is None else [list(stage) for stage in plan.modes],
            "mtp_stage": None if plan is None else plan.mtp_stage,
            "peak_bytes": None if self.peak_bytes is None else list(self.peak_bytes),
            "seconds": round(self.seconds, 4),
        }
        if self.status == "infeasible":
            out |= {"shortfall": self.shortfall, "reason": self.reason}
        return out


def stage_groups(problem: BalanceProblem, counts: tuple[int, ...]) -> list[list[int]]:
    """For each virtual stage the number of its layers of each group, when the stages hold `counts` layers in order."""
    left = [group.count for group in problem.groups]
    at = 0
    out = []
    for count in counts:
        row = [0] * len(left)
        while count:
            while not left[at]:
                at += 1
            take = min(count, left[at])
            row[at] += take
            left[at] -= take
            count -= take
        out.append(row)
    return out


def check_assignment(problem: BalanceProblem, assignment: Assignment, where: str = "assignment") -> None:
    """Whether an assignment is one for this problem (memory aside).

    Raises:
        ConfigError: a wrong number of stages or layers, an unknown mode, too few layers on a stage, a wrong MTP stage.
    """
    counts, place = assignment.counts, assignment.mtp_stage
    if len(counts) != problem.num_stages:
        raise ConfigError(f"{len(counts)} virtual stages", where, f"P*V = {problem.num_stages} of them")
    if sum(counts) != problem.num_layers:
        raise ConfigError(f"{sum(counts)} layers", where, f"the {problem.num_layers} layers of the groups")
    if place not in problem.mtp_places():
        raise ConfigError(f"mtp_stage = {place!r}", where, f"one of {list(problem.mtp_places())}")
    if place is not None and any(counts[place + 1 :]):
        raise ConfigError(f"decoder layers after mtp_stage = {place}", where, "put the MTP block behind the last layer")
    for stage, (count, least) in enumerate(zip(counts, problem.fewest_layers(place), strict=True)):
        if count < least:
            raise ConfigError(f"{count} layers on virtual stage {stage}", where, f"at least {least}")
    of_layer = [group for group in problem.groups for _ in range(group.count)]
    layer = 0
    for stage, modes in enumerate(assignment.modes):
        for mode in modes:
            known = len(of_layer[layer].modes)
            if not isinstance(mode, int) or not 0 <= mode < known:
                raise ConfigError(
                    f"mode {mode!r} of layer {layer} on virtual stage {stage}", where, f"0 to {known - 1}"
                )
            layer += 1
