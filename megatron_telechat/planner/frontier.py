"""How the fastest step of a space grows where a device has less memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_telechat.planner.plan import Plan
from megatron_telechat.planner.simulate import peak_bytes
from megatron_telechat.planner.space import Layout, Load
from megatron_telechat.planner.sweep import GAP, Proof, Search, plan_of
from megatron_telechat.planner.tasks import Workers


@dataclass(frozen=True)
class FrontierPoint:
    """The best under a limit: what is proved, and the fastest layout with its flags; None where nothing was found."""

    limit: float
    proof: Proof
    best: tuple[tuple[str, ...], Plan] | None


def memory_frontier(
    layouts: Sequence[Layout],
    load: Load,
    limits: Sequence[float],
    time_limit_s: float,
    gap: float = GAP,
    processes: int = 1,
) -> list[FrontierPoint]:
    """A point for each memory limit, the largest first.

    With less memory nothing gets faster: what was proved under a larger limit holds under all smaller ones, a split
    that fits the smaller one is known from the start, and what is found under it counts for the larger ones.
    Paths are shared. The limits share the time.

    Args:
        limits: bytes of a device, in any order.

    Raises:
        ResourceError: a process ended before it had answered.
    """
    deadline = time.perf_counter() + time_limit_s
    ordered = sorted(limits, reverse=True)
    found: list[FrontierPoint] = []
    with Workers(processes) as workers:
        before: Search | None = None
        for number, limit in enumerate(ordered):
            now = time.perf_counter()
            until = now + max(deadline - now, 0.05) / (len(ordered) - number)
            here = [replace(one, problem=replace(one.problem, mem_limit=limit)) for one in layouts]
            here = [replace(one, question=replace(one.question, memory_bytes=limit)) for one in here]
            search = Search(here, load, gap, until, workers)
            if before is not None:
                _carry_over(before, search)
            search.run()
            found.append(FrontierPoint(limit, search.proof(), search.best and plan_of(search.best)))
            before = search
    return _monotone(found)


def _monotone(found: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """The points, each with what a smaller limit found where that is faster."""
    out: list[FrontierPoint] = []
    for point in reversed(found):
        smaller = out[-1] if out else None
        if smaller is not None and smaller.best is not None and smaller.proof.step < point.proof.step:
            proof = replace(point.proof, step=smaller.proof.step, bound=min(point.proof.bound, smaller.proof.step))
            flags, plan = smaller.best
            problem = replace(plan.problem, mem_limit=point.limit)
            question = replace(plan.question, memory_bytes=point.limit)
            point = FrontierPoint(point.limit, proof, (flags, replace(plan, problem=problem, question=question)))
        out.append(point)
    return out[::-1]


def _carry_over(before: Search, search: Search) -> None:
    search.cuts = before.cuts
    for old, new in zip(before.entries, search.entries, strict=True):
        new.bound, new.refused = max(new.bound, old.bound), old.refused
        new.searched, new.nodes = old.searched, old.nodes
        if old.assignment is None or old.solution is None or old.refused:
            continue
        if max(peak_bytes(new.layout.problem, old.assignment)) <= new.layout.problem.mem_limit:
            new.value, new.assignment, new.solution = old.value, old.assignment, old.solution
            if (search.best is None or new.value < search.best.value) and search.takes(new):
                search.best = new
