"""Attention over the ranks of a ring, all of its ranks played on one device, one after another.

A rank's part is computed by the code of a real run; what the others would send is computed beforehand and handed over
at once. So there are no transfers: this shows that the kernel's blocks give the attention of one call, and what the
cutting of one call into blocks costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from context.balance import web_like
from context.problem import Inputs, Problem, Result, in_fp64, largest, on_one_rank
from overlap.channels import Here
from overlap.one_device import Device
from torch import Tensor

from accelerator.section import Options, Results
from megatron_telechat.backend.block_attention import BlockAttention, block_attention
from megatron_telechat.parallel.clock import ExchangeClock, PassClock
from megatron_telechat.parallel.context.direct import Way, attend
from megatron_telechat.parallel.context.layout import Layout, contiguous, dealt, whole_documents, zigzag
from megatron_telechat.parallel.context.plan import ContextPlan, plan_rows

LIMIT = {"fp32": 2e-6, "bf16": 1.25}
"""fp32: largest relative error to fp64. bf16: the same, in units of that of the kernel in one call."""
EXACT = 4096
"""Tokens where fp64 is at hand: it writes out the scores of a head."""
DIFFERENCE = 0.02
"""Of bf16 results of many blocks and of one call."""
LONG = {
    "115B, TP8 CP8": Problem(131072, 8, 1, 128, 8, dtype="bf16"),
    "115B, TP8 CP16": Problem(131072, 8, 1, 128, 16, dtype="bf16"),
    "35B, TP8 CP8": Problem(131072, 6, 6, 128, 8, dtype="bf16"),
    "115B, TP8 CP16, 256K": Problem(262144, 8, 1, 128, 16, dtype="bf16"),
}
"""Query heads and groups of a tensor-parallel rank."""


def run(options: Options) -> Results:
    """Errors to fp64, then, at 128K and 256K tokens, the difference to one call and the time beside it."""
    device = Device(options.device)
    length = 512 if options.quick else EXACT
    for dtype in ("fp32", "bf16"):
        for ranks, groups, packed in ((4, 4, False), (8, 1, False), (4, 2, True), (8, 4, True)):
            problem = _problem(length, 4, groups, ranks, packed, dtype)
            for pieces in (1, 2):
                name = f"{dtype}, {ranks} ranks, {groups} of 4 groups, {'packed, ' if packed else ''}{pieces} pieces"
                yield name, _exactness(problem, device, pieces)
    long = {"small": Problem(2048, 2, 1, 64, 4, dtype="bf16")} if options.quick else LONG
    for name, problem in long.items():
        yield name, _against_one_call(problem, device, options)
        yield f"{name}, packed", _against_one_call(_packed(problem), device, options)


def _problem(length: int, heads: int, groups: int, ranks: int, packed: bool, dtype: Literal["fp32", "bf16"]) -> Problem:
    problem = Problem(length, heads, groups, 128, ranks, dtype=dtype)
    return _packed(problem) if packed else problem


def _packed(problem: Problem) -> Problem:
    return replace(problem, ends=tuple(web_like(problem.length, 1)[0].tolist()))


def _exactness(problem: Problem, device: Device, pieces: int) -> dict[str, Any]:
    inputs = Inputs(*(each.to(device.device) for each in problem.inputs))
    kernel = block_attention(inputs.query)
    exact = in_fp64(inputs, problem.documents)
    one = largest(on_one_rank(inputs, problem.documents, kernel).errors(exact))
    ours = largest(_Ring(problem, inputs, kernel, pieces).result().errors(exact))
    limit = LIMIT["fp32"] if problem.dtype == "fp32" else LIMIT["bf16"] * one
    return {"ok": ours <= limit, "kernel": type(kernel).__name__, "over ranks": ours, "one call": one}


def _against_one_call(problem: Problem, device: Device, options: Options) -> dict[str, Any]:
    """Difference to the kernel in one call, and times: of one call, of all ranks, of the slowest."""
    inputs = Inputs(*(each.to(device.device) for each in problem.inputs))
    kernel = block_attention(inputs.query)
    rounds = 1 if options.quick else 3
    one = on_one_rank(inputs, problem.documents, kernel)
    one_ms = device.time_ms(lambda: on_one_rank(inputs, problem.documents, kernel), rounds)
    lengths = np.diff(problem.documents).astype(float)
    pairs = float((lengths * (lengths + 1) / 2).sum())
    found: dict[str, Any] = {"ok": True, "one call, ms": one_ms}
    found["one call, TFLOP/s"] = 14 * pairs * problem.heads * problem.width / one_ms / 1e9
    ways = [(layout, 1) for layout in _layouts(problem)] if problem.packed else [(None, 1), (None, 2)]
    for layout, pieces in ways:
        ring = _Ring(problem, inputs, kernel, pieces, layout)
        difference = largest(ring.result().errors(one))
        times = [device.time_ms(lambda rank=rank: ring.step(rank), rounds, 1) for rank in range(problem.ranks)]
        found["ok"] = found["ok"] and difference < DIFFERENCE
        found[layout.name if layout else f"{pieces} pieces"] = {
            "difference": difference,
            "all ranks / one call": sum(times) / one_ms,
            "slowest rank, ms": max(times),
            "slowest rank x ranks / one call": max(times) * problem.ranks / one_ms,
        }
    return found


def _layouts(problem: Problem) -> list[Layout]:
    documents, ranks = problem.documents, problem.ranks
    made = [zigzag(problem.length, ranks), contiguous(problem.length, ranks)]
    return [*made, dealt(documents, ranks), whole_documents(documents, ranks)]


class _Ring:
    """All ranks of one problem.

    Args:
        inputs: of the whole row, on the device.
        pieces: see `Way`.
        layout: None: dealt for packed rows, else zigzag.
    """

    def __init__(
        self, problem: Problem, inputs: Inputs, kernel: BlockAttention, pieces: int, layout: Layout | None = None
    ):
        self.inputs, self.kernel, self.pieces = inputs, kernel, pieces
        if layout is None:
            packed = problem.packed
            layout = dealt(problem.documents, problem.ranks) if packed else zigzag(problem.length, problem.ranks)
        self.layout = layout
        self.plans = [plan_rows([layout], [problem.documents], rank) for rank in range(problem.ranks)]
        self.shards = [inputs.of_rows(layout.positions(rank)) for rank in range(problem.ranks)]
        self.homeward: dict[tuple[int, int], Tensor] = {}
        """Gradients of keys and values by the rank that sends them and their number."""
        for rank in range(problem.ranks):
            self.step(rank)  # what arrives is not known yet; what leaves does not depend on it

    def step(self, rank: int) -> Result:
        """Forward and backward of one rank."""
        shard = self.shards[rank]
        clock = ExchangeClock()
        clocks = PassClock(clock, 0, False, shard.query.device), PassClock(clock, 0, True, shard.query.device)
        way = Way(_FromMemory(self, rank), self.kernel, self.pieces, False, clocks)
        leaves = [each.detach().requires_grad_() for each in shard[:3]]
        out = attend(leaves[0], leaves[1], leaves[2], self.plans[rank], way)
        return Result(out.detach(), *torch.autograd.grad(out, leaves, shard.grad))

    def result(self) -> Result:
        """Of the whole row."""
        ranks = range(len(self.plans))
        parts = [self.step(rank) for rank in ranks]
        order = torch.from_numpy(np.argsort(np.concatenate([self.layout.positions(rank) for rank in ranks])))
        return Result(*(torch.cat(each)[order.to(each[0].device)] for each in zip(*parts, strict=True)))


class _FromMemory:
    """`RowLink` of one rank: what arrives is there; what goes home is written down."""

    def __init__(self, ring: _Ring, rank: int):
        self.ring, self.rank = ring, rank
        self._fetched = self._sent = 0

    def start(self, rows: Tensor, step: int, shape: tuple[int, ...]) -> Here:
        ring = self.ring
        other = (self.rank - step) % len(ring.plans)
        if step > 0:
            number = self._fetched % len(ring.plans[other].transfers(ring.pieces))
            self._fetched += 1
            return Here(_sent_by(ring.plans[other], ring.shards[other], ring.pieces, number))
        number = self._sent
        self._sent += 1
        ring.homeward[self.rank, number] = rows.clone()
        arriving = ring.homeward.get((other, number))
        return Here(rows.new_zeros(shape) if arriving is None else arriving)

    def finish(self, most: int = 0) -> None:
        """Nothing has left."""


def _sent_by(plan: ContextPlan, shard: Inputs, pieces: int, number: int) -> Tensor:
    """Keys and values that a rank sends, [2, rows, groups, d]."""
    ranges: Sequence[tuple[int, int]] = plan.transfers(pieces)[number].send
    parts = [torch.stack((shard.key[start:stop], shard.value[start:stop])) for start, stop in ranges]
    return torch.cat(parts, 1) if parts else shard.key.new_empty((2, 0, *shard.key.shape[1:]))
