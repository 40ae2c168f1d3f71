"""The fixed graph of forwards and backwards of a schedule, in an order in which every op comes after what it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from megatron_telechat.costs.op_order import rank_ops
from megatron_telechat.errors import ConfigError


@dataclass(frozen=True)
class OpGraph:
    """Ops numbered so that predecessors come first. Number 0 is the start: it ends at time 0 and takes no time.

    Attributes:
        group: micro-batches of a group of the interleaved schedule.
        kind: of each op: c for a forward of virtual stage c, P*V + c for its backward; -1 for the start.
        before: op that the same device runs before (0: none).
        needs: op of another virtual stage (or the forward of the last one) whose result it needs (0: none).
        lags: whether that result comes from another device, so that it arrives p2p later.
        microbatch: of each op.
    """

    P: int
    V: int
    m: int
    group: int
    kind: tuple[int, ...]
    before: tuple[int, ...]
    needs: tuple[int, ...]
    lags: tuple[bool, ...]
    microbatch: tuple[int, ...]

    @property
    def num_stages(self) -> int:
        """Virtual stages, P x V."""
        return self.P * self.V

    @cached_property
    def last_ops(self) -> list[int]:
        """The last op of every device."""
        last = [0] * self.P
        for op, kind in enumerate(self.kind[1:], 1):
            last[kind % self.num_stages % self.P] = op
        return last


@lru_cache(maxsize=256)
def op_graph(P: int, V: int, m: int, group: int | None = None) -> OpGraph:
    """The graph of Megatron-Core's order on every rank (costs/op_order.rank_ops), in groups of so many micro-batches
    (unset: P).

    Raises:
        ConfigError: the ranks would wait for each other for ever, or a pipeline of one rank with virtual stages.
    """
    stages = P * V
    queues = [
        [(op.forward, op.virtual_stage * P + rank, op.microbatch) for op in rank_ops(rank, P, V, m, group)]
        for rank in range(P)
    ]
    number: dict[tuple[bool, int, int], int] = {}
    kind, before, needs, lags, microbatch = [-1], [0], [0], [False], [-1]
    at, last = [0] * P, [0] * P
    while len(kind) <= 2 * stages * m:
        stuck = True
        for rank in range(P):
            queue = queues[rank]
            while at[rank] < len(queue):
                forward, stage, item = queue[at[rank]]
                need = _needed(forward, stage, item, stages)
                if need is not None and need not in number:
                    break
                number[forward, stage, item] = len(kind)
                needs.append(0 if need is None else number[need])
                lags.append(need is not None and need[1] % P != rank)
                before.append(last[rank])
                last[rank] = len(kind)
                kind.append(stage if forward else stages + stage)
                microbatch.append(item)
                at[rank] += 1
                stuck = False
        if stuck:
            raise ConfigError(
                f"with P={P}, V={V}, m={m} and groups of {group or P} the ranks of Megatron-Core's interleaved order "
                "wait for each other",
                fix="a number of micro-batches that is a multiple of P, or leaves P or more to the last group",
            )
    return OpGraph(P, V, m, group or P, tuple(kind), tuple(before), tuple(needs), tuple(lags), tuple(microbatch))


def _needed(forward: bool, stage: int, item: int, stages: int) -> tuple[bool, int, int] | None:
    if forward:
        return (True, stage - 1, item) if stage else None
    return (False, stage + 1, item) if stage + 1 < stages else (True, stage, item)


def end_times(graph: OpGraph, times: Sequence[float], p2p: float) -> list[float]:
    """End of every op. `times`: of each kind, as in OpGraph.kind."""
    ends = [0.0]
    append = ends.append
    for kind, before, needs, lag in zip(
        graph.kind[1:], graph.before[1:], graph.needs[1:], graph.lags[1:], strict=False
    ):
        start = ends[before]
        ready = ends[needs] + p2p if lag else ends[needs]
        append((ready if ready > start else start) + times[kind])
    return ends


@lru_cache(maxsize=16)
def _levels(P: int, V: int, m: int, group: int) -> tuple[tuple[np.ndarray, ...], ...]:
    """Ops that can be computed together: for each level (ops, kinds, before, needs, lag of each as 0 or 1)."""
    graph = op_graph(P, V, m, group)
    level = [0]
    for before, needs in zip(graph.before[1:], graph.needs[1:], strict=False):
        level.append(1 + max(level[before], level[needs]))
    found: list[list[int]] = [[] for _ in range(max(level))]
    for op in range(1, len(level)):
        found[level[op] - 1].append(op)
    out = []
    for ops in found:
        columns = ([source[op] for op in ops] for source in (graph.kind, graph.before, graph.needs, graph.lags))
        out.append((np.array(ops), *(np.array(list(column), dtype=np.int64) for column in columns)))
    return tuple(out)


def makespans(graph: OpGraph, times: np.ndarray, p2p: float, factors: np.ndarray | None = None) -> np.ndarray:
    """Makespan for many vectors of times at once: [K, 2*P*V] -> [K]. `factors`: [ops, K], on the time of every op."""
    times = np.ascontiguousarray(times.T)
    ends = np.zeros((len(graph.kind), times.shape[1]))
    for ops, kinds, before, needs, lag in _levels(graph.P, graph.V, graph.m, graph.group):
        ready = ends[needs]
        if p2p:
            ready += (lag * p2p)[:, None]
        np.maximum(ready, ends[before], out=ready)
        ready += times[kinds] if factors is None else times[kinds] * factors[ops]
        ends[ops] = ready
    return ends[graph.last_ops].max(axis=0)
