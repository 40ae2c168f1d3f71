"""A local search over whole assignments: one layer moves to another stage, or gets another mode, at a time."""

from __future__ import annotations

import time

import numpy as np

from megatron_telechat.planner.assignment import Assignment, stage_groups
from megatron_telechat.planner.op_graph import op_graph
from megatron_telechat.planner.path_cuts import PathCut, Separator
from megatron_telechat.planner.problem import BalanceProblem
from megatron_telechat.planner.rest import rest_seconds
from megatron_telechat.planner.simulate import in_flight
from megatron_telechat.planner.slow_stage import time_factors, worst_makespans

ENOUGH = 96
"""Neighbours that fit and are simulated in a step, those first that the known paths leave shortest; the memory of twice
as many is computed at once."""
DRAWN = 24
"""Random moves of which the first that fits is made."""
KNOWN_PATHS = 60
"""Critical paths that are remembered, the newest ones."""


class Exchange:
    """Assignments near a given one, as counts n[stage, kind] (a kind is a group in a mode).

    A neighbour is at least as slow as each known path leaves it; the ones that look best by that are simulated.
    """

    def __init__(self, problem: BalanceProblem):
        self.problem = problem
        self.separator = Separator(op_graph(*problem.schedule), problem.p2p, time_factors(problem))
        self.kinds = [(g, j) for g, group in enumerate(problem.groups) for j in range(len(group.modes))]
        of_kind = [(problem.groups[g], problem.groups[g].modes[j]) for g, j in self.kinds]
        self.group = np.array([g for g, _ in self.kinds])
        self.f = np.array([group.f for group, _ in of_kind], dtype=float)
        self.b = np.array([group.b + mode.extra_b for group, mode in of_kind], dtype=float)
        self.w = np.array([group.w for group, _ in of_kind], dtype=float)
        self.act = np.array([mode.act for _, mode in of_kind], dtype=float)
        self.ws = np.array([mode.ws for _, mode in of_kind], dtype=float)
        moments = in_flight(*problem.schedule)
        self.held = [np.array([moment.held for moment in row], dtype=float).T for row in moments]
        self.backward = [np.array([-1 if one.backward is None else one.backward for one in row]) for row in moments]
        stages, kinds = range(problem.num_stages), range(len(self.kinds))
        self.moves = np.array(
            [
                (source, kind, target, other)
                for source in stages
                for target in stages
                for kind in kinds
                for other in kinds
                if self.group[kind] == self.group[other] and (source, kind) != (target, other)
            ]
        ).reshape(-1, 4)

    def improve(
        self, start: Assignment, deadline: float, patience: int, enough: int = ENOUGH
    ) -> tuple[float, Assignment]:
        """(Makespan with the rest of the iteration, the best assignment met from a start that fits.)

        Args:
            patience: steps without gain after which it ends.
            enough: neighbours that are simulated in a step, if so many fit.
        """
        near = _Near(self, start.mtp_stage)
        here = self.counts(start)
        seen = {here.tobytes()}
        paths: dict[PathCut, None] = {}
        best, least, idle = here, float(near.spans(here[None])[0]), 0
        while idle < patience and time.perf_counter() < deadline:
            for cut in self.separator.longest(near.times(here[None])[0].tolist())[1]:
                paths.pop(cut, None)
                paths[cut] = None
            for cut in list(paths)[:-KNOWN_PATHS]:
                del paths[cut]
            found = [row for row in near.neighbours(here, list(paths), enough) if row.tobytes() not in seen]
            if not found:
                break
            spans = near.spans(np.array(found))
            at = int(np.argmin(spans))
            here = found[at]
            seen.add(here.tobytes())
            if spans[at] < least * (1 - 1e-9):
                best, least, idle = here, float(spans[at]), 0
            else:
                idle += 1
        return least, self.assignment(best, start.mtp_stage)

    def shaken(self, start: Assignment, moves: int, random: np.random.Generator) -> Assignment:
        """An assignment that fits, at most so many random moves from one that does."""
        near, here = _Near(self, start.mtp_stage), self.counts(start)
        for _ in range(moves):
            rows = near.moved(here, random.permutation(near.allowed(here))[:DRAWN])
            fitting = np.flatnonzero(near.fits(rows))
            if len(fitting):
                here = rows[fitting[0]]
        return self.assignment(here, start.mtp_stage)

    def assignment(self, counts: np.ndarray, place: int | None) -> Assignment:
        """What `counts` gives back as it is."""
        rows = ((mode for (_, mode), count in zip(self.kinds, row, strict=True) for _ in range(count))
                for row in counts.astype(int).tolist())  # fmt: skip
        return Assignment(tuple(map(tuple, rows)), place)

    def counts(self, assignment: Assignment) -> np.ndarray:
        """[C, kinds] layers of each kind."""
        out = np.zeros((self.problem.num_stages, len(self.kinds)))
        number = {kind: at for at, kind in enumerate(self.kinds)}
        inside = stage_groups(self.problem, assignment.counts)
        for stage, (in_group, modes) in enumerate(zip(inside, assignment.modes, strict=True)):
            groups = [g for g, count in enumerate(in_group) for _ in range(count)]
            for kind in zip(groups, modes, strict=True):
                out[stage, number[kind]] += 1
        return out


class _Near:
    """What depends on where the MTP block is."""

    def __init__(self, exchange: Exchange, place: int | None):
        self.exchange, self.problem = exchange, exchange.problem
        problem = exchange.problem
        self.blocks = [problem.fixed_block(stage, place) for stage in range(problem.num_stages)]
        self.fewest = np.array(problem.fewest_layers(place))
        self.last = problem.num_stages if place is None else place + 1

    def times(self, counts: np.ndarray) -> np.ndarray:
        """[K, C, kinds] -> [K, 2 C] forward, then backward times."""
        forward = counts @ self.exchange.f + [block.f for block in self.blocks]
        return np.concatenate([forward, counts @ self.exchange.b + [block.b for block in self.blocks]], axis=1)

    def spans(self, counts: np.ndarray) -> np.ndarray:
        """Makespans of [K, C, kinds], with the rest of the iteration."""
        problem, group = self.problem, self.exchange.group
        times = self.times(counts)
        inside = [counts[:, :, group == g].sum(axis=2) for g in range(len(problem.groups))]
        return worst_makespans(problem, times) + rest_seconds(problem, np.stack(inside, axis=2), times)

    def neighbours(self, here: np.ndarray, paths: list[PathCut], enough: int) -> np.ndarray:
        """[K, C, kinds]: those that keep the rules and fit, the best by the paths first."""
        exchange, C = self.exchange, self.problem.num_stages
        moves = self.allowed(here)
        source, kind, target, other = moves.T
        visits = np.array([cut.visits for cut in paths], dtype=float)
        length = visits @ self.times(here[None])[0] + self.problem.p2p * np.array([cut.lags for cut in paths])
        layer = visits[:, :C, None] * exchange.f + visits[:, C:, None] * exchange.b
        bounds = (length[:, None] + layer[:, target, other] - layer[:, source, kind]).max(axis=0)
        order = np.argsort(bounds, kind="stable")
        out = np.zeros((0, *here.shape))
        for first in range(0, len(order), 2 * enough):
            rows = self.moved(here, moves[order[first : first + 2 * enough]])
            out = np.concatenate([out, rows[self.fits(rows)]])
            if len(out) >= enough:
                break
        return out

    def allowed(self, here: np.ndarray) -> np.ndarray:
        """[K, 4] moves that keep the rules."""
        exchange = self.exchange
        source, kind, target, other = exchange.moves.T
        total = here.sum(axis=1)
        allowed = (here[source, kind] > 0) & (target < self.last)
        allowed &= (source == target) | (total[source] > self.fewest[source])
        if len(self.problem.groups) > 1:  # between two stages with layers of a group all layers are of that group
            in_group = np.stack([here[:, exchange.group == g].sum(axis=1) for g in range(len(self.problem.groups))])
            allowed &= in_group[exchange.group[other], target] > 0
        return exchange.moves[allowed]

    def moved(self, here: np.ndarray, moves: np.ndarray) -> np.ndarray:
        """[K, C, kinds]: one for each of the moves [K, 4]."""
        rows, each = np.repeat(here[None], len(moves), axis=0), np.arange(len(moves))
        source, kind, target, other = moves.T
        rows[each, source, kind] -= 1
        rows[each, target, other] += 1
        return rows

    def fits(self, counts: np.ndarray) -> np.ndarray:
        """Which of [K, C, kinds] fit the memory."""
        problem, exchange = self.problem, self.exchange
        weights = counts @ exchange.w + [block.w for block in self.blocks]
        act = counts @ exchange.act + [block.act for block in self.blocks]
        transient = np.maximum(((counts > 0) * exchange.ws).max(axis=2), [block.ws for block in self.blocks])
        out = np.ones(len(counts), dtype=bool)
        for device in range(problem.P):
            stages = slice(device, None, problem.P)
            running = exchange.backward[device]
            most = act[:, stages] @ exchange.held[device]
            most += np.where(running >= 0, transient[:, stages][:, running], 0.0)
            out &= problem.const_mem + weights[:, stages].sum(axis=1) + most.max(axis=1) <= problem.mem_limit
        return out
