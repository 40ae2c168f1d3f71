"""How the fastest step of a space grows where a device has less memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron_telechat.planner.plan import Plan
from megatron_telechat.planner.simulate import peak_bytes
from megatron_telechat.planner.space import Layout, Load
from megatron_telechat.planner.sweep import GAP, Proof, Search, plan_of
from megatron_telechat.planner.worker import Workers


def memory_frontier(
    layouts: Sequence[Layout],
    load: Load,
    limits: Sequence[float],
    time_limit_s: float,
    gap: float = GAP,
    processes: int = 1,
) -> Iterator[tuple[float, Proof, tuple[tuple[str, ...], Plan] | None]]:
    """For each memory limit, the largest first: the limit, what is proved, and the fastest layout with its flags.

    With less memory nothing gets faster: what was proved under a larger limit holds under all smaller ones, and a split
    that fits the smaller one is known from the start. Paths are shared. The limits share the time.

    Args:
        limits: bytes of a device, in any order.

    Raises:
        ResourceError: a process ended before it had answered.
    """
    deadline = time.perf_counter() + time_limit_s
    ordered = sorted(limits, reverse=True)
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
            proof = search.proof()
            yield limit, proof, None if search.best is None else plan_of(search.best)
            before = search


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
