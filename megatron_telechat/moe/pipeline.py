"""The input in chunks, one after another: dispatch, experts and combine of different chunks overlap.

Forward, for chunks 0..k-1 (D dispatch, F experts, C combine; the link works one transfer after another):

    issue D0 .. Dk-1;  then for each chunk: wait D, compute F, issue C;  then wait for the C's and sum
    link     | D0 | D1 | C0 | D2 | ...
    compute       | F0 | F1 | F2 | ...

Backward (C' gradients of the outputs to the experts, B gradients of inputs and probabilities, D' their way back, W
gradients of weights):

    issue C'0 .. C'k-1;  then for each chunk: wait C', compute B, issue D'

and W of an earlier chunk wherever the computation would wait, the rest at the end, beside the last D'. The order of
transfers is the same on every rank, whatever the local timing; only the place of W depends on it, and no one else sees
that.

Recomputation keeps the rows that arrived and repeats the first product alone, while a chunk's gradient is on its way.
No dispatch is ever repeated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_telechat.moe.clock import ExchangeClock
from megatron_telechat.moe.dispatch import Dispatch, RowFormat
from megatron_telechat.moe.engine import ExpertWeights, Gradients, sum_bags
from megatron_telechat.moe.engine_choice import engine_for


@dataclass
class Saved:
    """What a forward keeps of one chunk.

    Attributes:
        rows: the buffer that arrived: token rows and probabilities; with one rank in the group, the input itself.
        scale: [N] probability of every expert row, in the type that probabilities travel in.
        gate_up: [N, 2 f], or None if it is computed again.
    """

    rows: Tensor
    scale: Tensor
    gate_up: Tensor | None


@dataclass
class _Pending:
    """Gradients of weights that are still to be computed for a chunk."""

    chunk: int
    grad: Tensor
    saved: Saved
    hidden: Tensor


@dataclass
class ChunkPipeline:
    """Runs the chunks of one call of a block, forward and then backward.

    Args:
        dispatch: the plan.
        channel: `Channel` among the ranks of the group, or anything with its ``start``.
        clock: measures what was not hidden.
        layer: number of the layer, for traces.
        recompute: repeat the first product in the backward.
        max_pending: how many chunks' weight gradients may wait for a gap; each keeps its activations alive.
        engine: the four functions of :mod:`megatron_telechat.moe.engine`; None takes the device's.
    """

    dispatch: Dispatch
    channel: Any
    clock: ExchangeClock = field(default_factory=ExchangeClock)
    layer: int | None = None
    recompute: bool = False
    max_pending: int = 8
    engine: Any = None

    # ---- forward ------------------------------------------------------------------------------

    def forward(
        self, tokens: Tensor, probabilities: Tensor, weights: ExpertWeights, keep: bool
    ) -> tuple[Tensor, list[Saved]]:
        """Tokens to their experts and back, weighted and summed.

        Args:
            tokens: [n, h], contiguous.
            probabilities: [n, k].
            weights: the local experts.
            keep: a backward will follow.

        Returns:
            [n, h], and what the backward needs of every chunk.
        """
        engine = self.engine or engine_for(tokens.device)
        arriving = self._dispatch_all(tokens, probabilities)
        with self.clock.computing("plan", None, self.layer, False):
            self.dispatch.lay_out_arrivals()
        kept, returning = [], []
        output = torch.empty_like(tokens)
        for chunk, plan in enumerate(self.dispatch.arrivals):
            rows, scale = self._arrived(arriving, chunk, tokens, probabilities)
            with self.clock.computing("F", chunk, self.layer, False):
                if plan.num_rows:
                    outputs, gate_up = engine.forward(rows, scale, plan, weights, keep and not self.recompute)
                else:
                    outputs, gate_up = rows.new_empty(0, rows.shape[1]), rows.new_empty(0, 2 * weights.width)
                sums = sum_bags(outputs, plan.bags, plan.bag_starts)
                del outputs
            if keep:
                kept.append(Saved(rows, scale, gate_up))
            del rows, gate_up
            if self.dispatch.local:
                start, stop = self.dispatch.ranges[chunk]
                output[start:stop] = sums
            else:
                out = self.dispatch.outgoing[chunk]
                returning.append(self._start(sums, plan.receive_tokens, out.send_tokens, "C", chunk, False))
        for chunk in range(len(returning)):
            outputs, returning[chunk] = self._wait(returning[chunk], "C", chunk, False, tokens.device), None
            out, (start, stop) = self.dispatch.outgoing[chunk], self.dispatch.ranges[chunk]
            with self.clock.computing("sum", chunk, self.layer, False):
                output[start:stop] = sum_bags(outputs, out.bags, out.bag_starts)
        return output, kept

    def _dispatch_all(self, tokens: Tensor, probabilities: Tensor) -> list[Any]:
        if self.dispatch.local:
            return []
        form = RowFormat(tokens.shape[1], tokens.dtype)
        flat = probabilities.to(form.weight_dtype)
        started = []
        for chunk, out in enumerate(self.dispatch.outgoing):
            with self.clock.computing("pack", chunk, self.layer, False):
                rows = tokens.index_select(0, out.row_tokens)
                start, stop = self.dispatch.ranges[chunk]
                packed, values = form.flat_weights(rows), flat[start:stop].flatten()
                for slots in out.weight_slots:
                    packed.index_copy_(0, slots, values)
            receive = self.dispatch.incoming_sizes(chunk)
            started.append(self._start(rows, out.send, receive, "D", chunk, False))
        return started

    def _arrived(self, arriving: list[Any], chunk: int, tokens: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        plan = self.dispatch.arrivals[chunk]
        form = RowFormat(tokens.shape[1], tokens.dtype)
        if self.dispatch.local:
            return tokens, probabilities.to(form.weight_dtype).flatten().index_select(0, plan.weight_slots)
        rows, arriving[chunk] = self._wait(arriving[chunk], "D", chunk, False, tokens.device), None
        return rows, form.flat_weights(rows).index_select(0, plan.weight_slots)

    # ---- backward -----------------------------------------------------------------------------

    def backward(
        self, grad: Tensor, weights: ExpertWeights, kept: list[Saved], gradients: Gradients
    ) -> tuple[Tensor, Tensor]:
        """Gradients of tokens and probabilities; those of the weights are added into `gradients`.

        Args:
            grad: [n, h], of the output.
            weights: the local experts.
            kept: what the forward kept; its gate and up are overwritten, and it is emptied.
            gradients: where the gradients of the weights add up.

        Returns:
            [n, h], and [n, k] in the type that probabilities travel in.
        """
        engine = self.engine or engine_for(grad.device)
        grad = grad.contiguous()
        arriving = self._send_gradients(grad)
        grad_tokens = torch.empty_like(grad)
        form = RowFormat(grad.shape[1], grad.dtype)
        grad_probabilities = grad.new_zeros((grad.shape[0], self.dispatch.topk), dtype=form.weight_dtype)
        returning, pending = [], []
        for chunk, plan in enumerate(self.dispatch.arrivals):
            saved, kept[chunk] = kept[chunk], None
            if saved.gate_up is None and plan.num_rows:
                with self.clock.computing("R", chunk, self.layer, True):
                    saved.gate_up = engine.first_product(saved.rows, plan, weights)
            self._use_the_gap(arriving, chunk, pending, engine, gradients)
            g = self._gradient_rows(arriving, chunk, grad)
            with self.clock.computing("B", chunk, self.layer, True):
                sums, grad_scale = self._input_gradients(engine, g, saved, chunk, weights, pending)
            if self.dispatch.local:
                self._store(chunk, sums, grad_scale, grad_tokens, grad_probabilities)
            else:
                out = self.dispatch.outgoing[chunk]
                returning.append(self._start(sums, plan.receive, out.send, "D'", chunk, True))
            del saved, g, sums, grad_scale
            while len(pending) > (self.max_pending if not self.recompute else 1):
                self._weight_gradients(pending, engine, gradients)
        while pending:
            self._weight_gradients(pending, engine, gradients)
        for chunk in range(len(returning)):
            rows, returning[chunk] = self._wait(returning[chunk], "D'", chunk, True, grad.device), None
            with self.clock.computing("sum", chunk, self.layer, True):
                self._collect(chunk, rows, grad_tokens, grad_probabilities)
        return grad_tokens, grad_probabilities

    def _send_gradients(self, grad: Tensor) -> list[Any]:
        if self.dispatch.local:
            return []
        started = []
        for chunk, (out, plan) in enumerate(zip(self.dispatch.outgoing, self.dispatch.arrivals, strict=True)):
            with self.clock.computing("pack", chunk, self.layer, True):
                rows = grad.index_select(0, out.output_tokens)
            started.append(self._start(rows, out.send_tokens, plan.receive_tokens, "C'", chunk, True))
        return started

    def _gradient_rows(self, arriving: list[Any], chunk: int, grad: Tensor) -> Tensor:
        """Gradients of the outputs of this chunk's token rows."""
        if self.dispatch.local:
            start, stop = self.dispatch.ranges[chunk]
            return grad[start:stop]
        rows, arriving[chunk] = self._wait(arriving[chunk], "C'", chunk, True, grad.device), None
        return rows

    def _input_gradients(self, engine, g, saved: Saved, chunk: int, weights, pending) -> tuple[Tensor, Tensor]:
        """Sums of input gradients in the form of the buffer that arrived, with the probabilities' gradients packed
        in."""
        plan = self.dispatch.arrivals[chunk]
        starts = plan.bag_starts if self.dispatch.local else plan.buffer_bag_starts
        if not plan.num_rows:
            return g.new_zeros(starts.numel(), g.shape[1]), g.new_empty(0)
        grad_rows, grad_scale, hidden = engine.input_gradients(g, saved.scale, saved.gate_up, plan, weights)
        pending.append(_Pending(chunk, g, saved, hidden))
        sums = sum_bags(grad_rows, plan.bags, starts)
        if not self.dispatch.local:
            RowFormat(sums.shape[1], sums.dtype).flat_weights(sums).index_copy_(0, plan.weight_slots, grad_scale)
        return sums, grad_scale

    def _store(
        self, chunk: int, sums: Tensor, grad_scale: Tensor, grad_tokens: Tensor, grad_probabilities: Tensor
    ) -> None:
        start, stop = self.dispatch.ranges[chunk]
        grad_tokens[start:stop] = sums
        slots = self.dispatch.arrivals[chunk].weight_slots
        if slots.numel():
            grad_probabilities.view(-1).index_copy_(0, slots, grad_scale)

    def _collect(self, chunk: int, rows: Tensor, grad_tokens: Tensor, grad_probabilities: Tensor) -> None:
        out, (start, stop) = self.dispatch.outgoing[chunk], self.dispatch.ranges[chunk]
        grad_tokens[start:stop] = sum_bags(rows, out.gradient_bags, out.bag_starts)
        packed = RowFormat(rows.shape[1], rows.dtype).flat_weights(rows)
        mine = grad_probabilities[start:stop].view(-1)
        for slots in out.weight_slots:  # slices of an expert each hold a part of the sum
            mine += packed.index_select(0, slots)

    def _use_the_gap(
        self, arriving: list[Any], chunk: int, pending: list[_Pending], engine, gradients: Gradients
    ) -> None:
        """Weight gradients of earlier chunks while this chunk's gradient is on its way."""
        if self.dispatch.local:
            while pending:
                self._weight_gradients(pending, engine, gradients)
        elif arriving[chunk] is not None:
            while pending and not arriving[chunk].arrived:
                self._weight_gradients(pending, engine, gradients)

    def _weight_gradients(self, pending: list[_Pending], engine, gradients: Gradients) -> None:
        work = pending.pop(0)
        saved, plan = work.saved, self.dispatch.arrivals[work.chunk]
        with self.clock.computing("W", work.chunk, self.layer, True):
            engine.weight_gradients(work.grad, saved.scale, saved.rows, saved.gate_up, work.hidden, plan, gradients)
            gradients.end_chunk()

    # ---- transfers ----------------------------------------------------------------------------

    def _start(self, rows: Tensor, send, receive, name: str, chunk: int, backward: bool) -> Any:
        """Every rank starts every transfer, also an empty one: they would part else."""
        transfer = self.channel.start(rows, send, receive)
        self.clock.transfer(transfer, name, chunk, self.layer, backward)
        return transfer

    def _wait(self, transfer: Any, name: str, chunk: int, backward: bool, device: torch.device) -> Tensor:
        with self.clock.waiting(name, chunk, self.layer, backward, device):
            return transfer.wait()
