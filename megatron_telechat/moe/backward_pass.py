"""The backward of the experts, chunk by chunk: C' gradients of the outputs to the experts, B gradients of inputs and
probabilities, D' their way back, W gradients of weights, R the first product once more.

    issue C'0 .. C'k-1;  then for each chunk: (R,) wait C', compute B, issue D';  then wait for the D's and sum

and W of an earlier chunk wherever the computation would wait, the rest at the end, beside the last D'. Only the place
of W depends on how fast the link is here, and no other rank sees that. On the CPU the host looks whether a C' has
arrived. An accelerator's host is far ahead of its queues: there a plan from measured times says where W goes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_telechat.moe.dispatch import Arrivals, Dispatch, RowFormat
from megatron_telechat.moe.engine import Engine, ExpertWeights, Gradients, sum_bags
from megatron_telechat.moe.exchange import Exchange
from megatron_telechat.moe.forward_pass import Saved
from megatron_telechat.moe.link import Link
from megatron_telechat.parallel.clock import PassClock


@dataclass(frozen=True)
class _Pending:
    """Gradients of weights that are still to be computed for a chunk; see :meth:`Engine.weight_gradients`."""

    chunk: int
    grad: Tensor
    saved: Saved
    grad_gate_up: Tensor
    hidden: Tensor


class BackwardTransport(ABC):
    """The way of the gradients in a backward: :class:`BackwardOverLink`, or :class:`BackwardInPlace` where no rank has
    others to send to."""

    @abstractmethod
    def send_all(self) -> None:
        """Start C' of all chunks."""

    @abstractmethod
    def is_gap(self, chunk: int, filled: int) -> bool:
        """Whether now is the time for weight gradients of earlier chunks: this chunk's C' is still on its way, or
        nothing is gained by leaving them for later.

        Args:
            chunk: the one to wait for next.
            filled: how many chunks' weight gradients were put before this wait already.
        """

    @abstractmethod
    def receive(self, chunk: int) -> Tensor:
        """Wait for C' of a chunk: the gradient of each token row's output, [T, h]."""

    @abstractmethod
    def sums(self, arrivals: Arrivals, grad_rows: Tensor, grad_scale: Tensor) -> Tensor:
        """Sums of the expert rows' gradients, [N, h], by token row, in the form that :meth:`send_back` takes.

        Args:
            arrivals: of the chunk.
            grad_rows: [N, h].
            grad_scale: [N], gradients of the probabilities.
        """

    @abstractmethod
    def send_back(self, chunk: int, sums: Tensor, grad_scale: Tensor) -> None:
        """Start D' of a chunk, or store its result.

        Args:
            sums: what :meth:`sums` gave.
            grad_scale: [N], gradients of the probabilities.
        """

    @abstractmethod
    def finish(self) -> tuple[Tensor, Tensor]:
        """Wait for the D's in order, and sum what came back: the gradients of the tokens, [n, h], and of the
        probabilities, [n, k] in the type that they travel in."""


class BackwardPass:
    """One backward of one call.

    Args:
        dispatch: which rows went where.
        transport: carries the gradients.
        engine: multiplies.
        weights: the local experts, outside of autograd.
        gradients: where the gradients of the weights add up.
        clock: of this pass.
        max_pending: how many chunks' weight gradients may wait for a gap; each keeps its activations alive.
    """

    def __init__(
        self,
        dispatch: Dispatch,
        transport: BackwardTransport,
        engine: Engine,
        weights: ExpertWeights,
        gradients: Gradients,
        clock: PassClock,
        max_pending: int,
    ):
        self.dispatch, self.transport = dispatch, transport
        self.engine, self.weights, self.gradients = engine, weights, gradients
        self.clock = clock
        self.max_pending = max_pending
        self._pending: deque[_Pending] = deque()

    def run(self, kept: list[Saved]) -> tuple[Tensor, Tensor]:
        """Gradients of the tokens, [n, h], and of the probabilities, [n, k].

        Args:
            kept: what the forward kept of every chunk; its gate and up are overwritten, and the list is emptied.
        """
        self.transport.send_all()
        for chunk, arrivals in enumerate(self.dispatch.arrivals):
            saved = kept.pop(0)
            gate_up = self._gate_up(chunk, arrivals, saved)  # R
            filled = 0
            while self._pending and self.transport.is_gap(chunk, filled):
                self._weight_gradients()  # W
                filled += 1
            grad = self.transport.receive(chunk)
            with self.clock.computing("B", chunk):
                sums, grad_scale = self._input_gradients(chunk, arrivals, grad, saved, gate_up)
            del saved, gate_up, grad
            self.transport.send_back(chunk, sums, grad_scale)
            del sums, grad_scale
            while len(self._pending) > self.max_pending:
                self._weight_gradients()
        while self._pending:
            self._weight_gradients()
        return self.transport.finish()

    def _gate_up(self, chunk: int, arrivals: Arrivals, saved: Saved) -> Tensor:
        """[N, 2 f]: kept, or computed again while the chunk's gradient is on its way."""
        if saved.gate_up is not None:
            return saved.gate_up
        if not arrivals.num_rows:
            return saved.rows.new_empty(0, 2 * self.weights.width)
        with self.clock.computing("R", chunk):
            return self.engine.first_product(saved.rows, arrivals, self.weights)

    def _input_gradients(
        self, chunk: int, arrivals: Arrivals, grad: Tensor, saved: Saved, gate_up: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sums of input gradients as :meth:`BackwardTransport.sums` gives them; gradients of the probabilities."""
        if not arrivals.num_rows:
            nothing = torch.empty_like(saved.scale)
            return self.transport.sums(arrivals, grad.new_empty(0, grad.shape[1]), nothing), nothing
        grad_rows, grad_scale, hidden = self.engine.input_gradients(grad, saved.scale, gate_up, arrivals, self.weights)
        self._pending.append(_Pending(chunk, grad, saved, gate_up, hidden))
        return self.transport.sums(arrivals, grad_rows, grad_scale), grad_scale

    def _weight_gradients(self) -> None:
        """W of the chunk that has waited longest."""
        work = self._pending.popleft()
        if not self.gradients.wanted:
            return
        saved, arrivals = work.saved, self.dispatch.arrivals[work.chunk]
        with self.clock.computing("W", work.chunk):
            self.engine.weight_gradients(
                work.grad, saved.scale, saved.rows, work.grad_gate_up, work.hidden, arrivals, self.gradients
            )
            self.gradients.end_chunk()


class BackwardOverLink(BackwardTransport):
    """Gradients travel to the ranks of the experts and back.

    Args:
        dispatch: which rows went where.
        link: among the ranks that share the experts.
        clock: of the pass.
        grad: [n, h] of the output, contiguous.
        plan: for each chunk, how many weight gradients go before the wait for it (`overlap_model.fillings`), where the
            host cannot see what has arrived; None: by what has arrived.
    """

    def __init__(
        self, dispatch: Dispatch, link: Link, clock: PassClock, grad: Tensor, plan: Sequence[int] | None = None
    ):
        self._dispatch, self._clock, self._grad, self._plan = dispatch, clock, grad, plan
        self._form = RowFormat(grad.shape[1], grad.dtype)
        self._outputs, self._inputs = Exchange("C'", link, clock), Exchange("D'", link, clock)

    def send_all(self) -> None:
        for chunk, (out, arrivals) in enumerate(zip(self._dispatch.outgoing, self._dispatch.arrivals, strict=True)):
            with self._clock.computing("pack", chunk):
                rows = self._grad.index_select(0, out.output_tokens)
            self._outputs.start(rows, out.send_tokens, arrivals.receive_tokens)

    def is_gap(self, chunk: int, filled: int) -> bool:
        return not self._outputs.arrived(chunk) if self._plan is None else filled < self._plan[chunk]

    def receive(self, chunk: int) -> Tensor:
        return self._outputs.wait(chunk)

    def sums(self, arrivals: Arrivals, grad_rows: Tensor, grad_scale: Tensor) -> Tensor:
        """In the form of the buffer that arrived: [b, h], the probabilities' gradients packed in."""
        sums = sum_bags(grad_rows, arrivals.bags, arrivals.buffer_bag_starts)
        if arrivals.num_rows:
            self._form.flat_weights(sums).index_copy_(0, arrivals.weight_slots, grad_scale)
        return sums

    def send_back(self, chunk: int, sums: Tensor, grad_scale: Tensor) -> None:
        self._inputs.start(sums, self._dispatch.arrivals[chunk].receive, self._dispatch.outgoing[chunk].send)

    def finish(self) -> tuple[Tensor, Tensor]:
        grad_tokens, grad_probabilities = _empty_gradients(self._grad, self._dispatch.topk)
        for chunk, (out, part) in enumerate(zip(self._dispatch.outgoing, self._dispatch.ranges, strict=True)):
            rows = self._inputs.wait(chunk)
            with self._clock.computing("sum", chunk):
                grad_tokens[part.start : part.stop] = sum_bags(rows, out.gradient_bags, out.bag_starts)
                packed = self._form.flat_weights(rows)
                mine = grad_probabilities[part.start : part.stop].view(-1)
                for slots in out.weight_slots:  # slices of an expert each hold a part of the sum
                    mine += packed.index_select(0, slots)
            del rows, packed
        return grad_tokens, grad_probabilities


class BackwardInPlace(BackwardTransport):
    """All experts are on this rank: nothing is sent.

    Args:
        dispatch: which rows went to which expert.
        grad: [n, h] of the output, contiguous.
    """

    def __init__(self, dispatch: Dispatch, grad: Tensor):
        self._dispatch, self._grad = dispatch, grad
        self._grad_tokens, self._grad_probabilities = _empty_gradients(grad, dispatch.topk)

    def send_all(self) -> None:
        """There is nobody to send to."""

    def is_gap(self, chunk: int, filled: int) -> bool:
        return True  # no wait will come, and each chunk's activations are let go the sooner

    def receive(self, chunk: int) -> Tensor:
        part = self._dispatch.ranges[chunk]
        return self._grad[part.start : part.stop]

    def sums(self, arrivals: Arrivals, grad_rows: Tensor, grad_scale: Tensor) -> Tensor:
        """[T, h]."""
        return sum_bags(grad_rows, arrivals.bags, arrivals.bag_starts)

    def send_back(self, chunk: int, sums: Tensor, grad_scale: Tensor) -> None:
        part = self._dispatch.ranges[chunk]
        self._grad_tokens[part.start : part.stop] = sums
        slots = self._dispatch.arrivals[chunk].weight_slots
        if slots.numel():
            self._grad_probabilities.view(-1).index_copy_(0, slots, grad_scale)

    def finish(self) -> tuple[Tensor, Tensor]:
        return self._grad_tokens, self._grad_probabilities


def _empty_gradients(grad: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Room for the gradients of the tokens, [n, h], and zeros for those of the probabilities, [n, k]."""
    form = RowFormat(grad.shape[1], grad.dtype)
    return torch.empty_like(grad), grad.new_zeros((grad.shape[0], topk), dtype=form.weight_dtype)
