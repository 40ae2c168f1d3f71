"""Attention over the ranks of a ring: keys and values go straight to who needs them, gradients straight home.

    forward    link    | K1 | K2 | K3 |            K: keys and values of a step, from the rank so many places before
               compute | own | A1 | A2 | A3 |      A: blocks of the own queries with them

    backward   link    | K1 | K2 | G1 | K3 | G2 |  G: gradients of keys and values on their way home
               compute | own | B1 | B2 | B3 | own |

Two transfers are under way at a time: with one, the link would stand still while the next is asked for. What a step
needs may travel in several pieces (`ContextPlan.transfers`); each is then a transfer of its own, and as many of keys
and values, and of gradients, are under way as make a step: fewer do not fill the link beside the own blocks. Half of
the own blocks of the backward come last, beside the last gradients.

In place of a ring that hands whole shards from neighbour to neighbour: no row travels that nobody needs, none is handed
on, and gradients travel once, in the type of the computation, and are summed in fp32 by their owner.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_telechat.backend.block_attention import Block, BlockAttention, Grads, Running, Saved
from megatron_telechat.parallel.clock import PassClock
from megatron_telechat.parallel.context.exchange import RowLink
from megatron_telechat.parallel.context.plan import ContextPlan, Range, Transfer
from megatron_telechat.parallel.transfer import RowTransfer

IN_FLIGHT = 2

Clocks = tuple[PassClock, PassClock]
"""Of the forward and of the backward of one call."""


@dataclass(frozen=True)
class Way:
    """How the attention of one call is carried out.

    Attributes:
        link: between the ranks of the ring.
        kernel: of the blocks.
        pieces: of each step.
        keep: hold what was received for the backward, in place of fetching it again.
        clocks: of the forward and of the backward.
    """

    link: RowLink
    kernel: BlockAttention
    pieces: int
    keep: bool
    clocks: Clocks


def attend(query: Tensor, key: Tensor, value: Tensor, plan: ContextPlan, way: Way) -> Tensor:
    """Causal attention within the documents of a plan, [t, heads, d].

    Args:
        query: [t, heads, d] of the tokens of this rank, in the order of the plan.
        key, value: [t, groups, d] of the same tokens.
    """
    return _Attend.apply(query, key, value, plan, way)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: ContextPlan, way: Way) -> Tensor:
        total, received = _Forward(query, key, value, plan, way).run()
        out = total.out.to(query.dtype)
        ctx.plan, ctx.way = plan, way
        ctx.save_for_backward(query, key, value, out, total.lse, *received)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, *received = ctx.saved_tensors
        saved = Saved(ctx.way.kernel, grad, query, out, lse)
        grads = _Backward(saved, key, value, ctx.plan, ctx.way, received).run()
        return *(each.to(query.dtype) for each in (grads.query, grads.key, grads.value)), None, None


class _Pass:
    """What both passes share: the fetching of keys and values."""

    def __init__(self, key: Tensor, value: Tensor, plan: ContextPlan, way: Way, clock: PassClock):
        self.key, self.value = key, value
        self.plan, self.way, self.clock = plan, way, clock
        self.transfers = plan.transfers(way.pieces)
        self.window = max(IN_FLIGHT, way.pieces)
        self._coming: deque[tuple[int, RowTransfer]] = deque()
        self._next = 0

    def fetch_ahead(self) -> None:
        """Start fetching until enough is under way."""
        while len(self._coming) < self.window and self._next < len(self.transfers):
            number = self._next
            self._next += 1
            transfer = self.transfers[number]
            with self.clock.computing("pack", number):
                rows = _rows_of(self.key, self.value, transfer.send)
            shape = (2, transfer.rows_in, *self.key.shape[1:])
            self._coming.append((number, self.start(rows, transfer.step, shape, "K", number)))

    def start(self, rows: Tensor, step: int, shape: tuple[int, ...], name: str, number: int) -> RowTransfer:
        self.way.link.finish(2 * self.window - 1)
        moving = self.way.link.start(rows, step, shape)
        if rows.numel() or 0 not in shape:
            self.clock.started(moving, name, number)
        return moving

    def arrive(self, moving: RowTransfer, name: str, number: int) -> Tensor:
        with self.clock.waiting(name, number):
            return moving.wait()

    def arrivals(self) -> Iterator[tuple[int, Transfer, Tensor]]:
        """Keys and values of the others, [2, rows, groups, d], one transfer after another; the next is started before
        each is given out."""
        while self._coming:
            number, moving = self._coming.popleft()
            rows = self.arrive(moving, "K", number)
            del moving
            self.fetch_ahead()
            yield number, self.transfers[number], rows


class _Forward(_Pass):
    def __init__(self, query: Tensor, key: Tensor, value: Tensor, plan: ContextPlan, way: Way):
        super().__init__(key, value, plan, way, way.clocks[0])
        self.query = query

    def run(self) -> tuple[Running, list[Tensor]]:
        """The attention, and the rows received, if they are to be kept."""
        kernel, kept = self.way.kernel, []
        self.fetch_ahead()
        query = kernel.prepared(self.query)
        total = Running(query)
        with self.clock.computing("own"):
            own = kernel.prepared(self.key), kernel.prepared(self.value)
            kernel.forward(query, *own, self.plan.own, True, total)
        del own
        for number, transfer, rows in self.arrivals():
            if transfer.blocks:
                with self.clock.computing("A", number):
                    ready = kernel.prepared(rows)
                    kernel.forward(query, ready[0], ready[1], transfer.blocks, False, total)
            if self.way.keep:
                kept.append(rows)
        self.way.link.finish()
        return total, kept


class _Backward(_Pass):
    def __init__(
        self, saved: Saved, key: Tensor, value: Tensor, plan: ContextPlan, way: Way, received: Sequence[Tensor]
    ):
        super().__init__(key, value, plan, way, way.clocks[1])
        self.saved, self.received = saved, received
        zeros = (torch.zeros(each.shape, dtype=torch.float32, device=each.device) for each in (saved.query, key, value))
        self.grads = Grads(*zeros)
        self._leaving: deque[tuple[int, RowTransfer]] = deque()

    def run(self) -> Grads:
        """The gradients of this rank's queries, keys and values, in fp32."""
        first, last = halves(self.plan.own)
        if not self.received:
            self.fetch_ahead()
        own = self.way.kernel.prepared(self.key), self.way.kernel.prepared(self.value)
        self._own(own, first)
        for number, transfer, rows in self._all_rows():
            self._send_home(number, transfer, self._of_others(number, transfer, rows))
        self._own(own, last)
        while self._leaving:
            self._add_arrived()
        self.way.link.finish()
        return self.grads

    def _all_rows(self) -> Iterator[tuple[int, Transfer, Tensor]]:
        if not self.received:
            return self.arrivals()
        return ((number, self.transfers[number], rows) for number, rows in enumerate(self.received))

    def _own(self, own: tuple[Tensor, Tensor], blocks: Sequence[Block]) -> None:
        with self.clock.computing("own"):
            self.way.kernel.backward(self.saved, *own, blocks, True, self.grads)

    def _of_others(self, number: int, transfer: Transfer, rows: Tensor) -> Tensor:
        """Gradients of the rows of others, [2, rows, groups, d], in the type that they travel in."""
        with self.clock.computing("B", number):
            found = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
            ready = self.way.kernel.prepared(rows)
            into = self.grads.with_keys(found[0], found[1])
            self.way.kernel.backward(self.saved, ready[0], ready[1], transfer.blocks, False, into)
            return found.to(rows.dtype)

    def _send_home(self, number: int, transfer: Transfer, found: Tensor) -> None:
        """The way back of a transfer: what arrived goes to where it came from."""
        if len(self._leaving) >= self.window:
            self._add_arrived()
        shape = (2, transfer.rows_out, *self.key.shape[1:])
        self._leaving.append((number, self.start(found, -transfer.step, shape, "G", number)))

    def _add_arrived(self) -> None:
        """Add the gradients that the others have sent of this rank's rows."""
        number, moving = self._leaving.popleft()
        found = self.arrive(moving, "G", number)
        with self.clock.computing("add", number):
            begin = 0
            for start, stop in self.transfers[number].send:
                end = begin + stop - start
                self.grads.key[start:stop] += found[0, begin:end]
                self.grads.value[start:stop] += found[1, begin:end]
                begin = end


def _rows_of(key: Tensor, value: Tensor, ranges: Sequence[Range]) -> Tensor:
    """These rows of keys and values, [2, rows, groups, d], contiguous."""
    rows = sum(stop - start for start, stop in ranges)
    out = key.new_empty((2, rows, *key.shape[1:]))
    begin = 0
    for start, stop in ranges:
        end = begin + stop - start
        out[0, begin:end].copy_(key[start:stop])
        out[1, begin:end].copy_(value[start:stop])
        begin = end
    return out


def halves(blocks: Sequence[Block]) -> tuple[list[Block], list[Block]]:
    """Causal blocks in two parts of about equal work; the one in the middle is cut between its queries."""
    work = [_pairs(*block) for block in blocks]
    half, done = sum(work) / 2, 0.0
    first: list[Block] = []
    for number, (block, pairs) in enumerate(zip(blocks, work, strict=True)):
        if done + pairs <= half:
            first.append(block)
            done += pairs
            continue
        q0, q1, k0, k1 = block
        middle = q0 + round((q1 - q0) * (half - done) / pairs)
        rest = list(blocks[number + 1 :])
        if q0 < middle < q1:
            return [*first, (q0, middle, k0, k1 - (q1 - middle))], [(middle, q1, k0, k1), *rest]
        return first, [block, *rest]
    return first, []


def _pairs(q0: int, q1: int, k0: int, k1: int) -> float:
    """Pairs of a query and a key that it sees, in a causal block."""
    return (q1 - q0) * (k1 - k0) - (q1 - q0) * (q1 - q0 - 1) / 2
