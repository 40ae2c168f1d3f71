"""The forward of the experts, chunk by chunk: D dispatch, F experts, C combine.

    issue D0 .. Dk-1;  then for each chunk: wait D, compute F, issue C;  then wait for the C's and sum
    link     | D0 | D1 | C0 | D2 | ...
    compute       | F0 | F1 | F2 | ...

The link works one transfer after another, in the order of their issue.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_telechat.moe.dispatch import Arrivals, Dispatch, RowFormat
from megatron_telechat.moe.engine import Engine, ExpertWeights, sum_bags
from megatron_telechat.moe.exchange import Exchange
from megatron_telechat.moe.link import Link
from megatron_telechat.parallel.clock import PassClock


@dataclass(frozen=True)
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


class ForwardTransport(ABC):
    """The way of the rows in a forward: :class:`ForwardOverLink`, or :class:`ForwardInPlace` where no rank has others
    to send to."""

    @abstractmethod
    def send_all(self) -> None:
        """Start D of all chunks."""

    @abstractmethod
    def receive(self, chunk: int) -> tuple[Tensor, Tensor]:
        """Wait for D of a chunk: the buffer [b, h] that arrived, and the probability of every expert row, [N]."""

    @abstractmethod
    def send_back(self, chunk: int, sums: Tensor) -> None:
        """Start C of a chunk, or store its result: the summed outputs of its token rows, [T, h]."""

    @abstractmethod
    def finish(self) -> Tensor:
        """Wait for the C's in order, and sum what came back: the output, [n, h]."""


class ForwardPass:
    """One forward of one call.

    Args:
        dispatch: which rows go where; its arrivals are laid out here, while the first chunk is on its way.
        transport: carries the rows.
        engine: multiplies.
        weights: the local experts.
        clock: of this pass.
    """

    def __init__(
        self, dispatch: Dispatch, transport: ForwardTransport, engine: Engine, weights: ExpertWeights, clock: PassClock
    ):
        self.dispatch, self.transport = dispatch, transport
        self.engine, self.weights = engine, weights
        self.clock = clock

    def run(self, keep: bool, keep_gate_up: bool) -> tuple[Tensor, list[Saved]]:
        """The output [n, h]; and, if `keep`, what the backward needs of every chunk."""
        self.transport.send_all()
        with self.clock.computing("plan"):
            self.dispatch.lay_out_arrivals()
        kept = []
        for chunk, arrivals in enumerate(self.dispatch.arrivals):
            rows, scale = self.transport.receive(chunk)
            with self.clock.computing("F", chunk):
                sums, gate_up = self._experts(rows, scale, arrivals, keep_gate_up)
            if keep:
                kept.append(Saved(rows, scale, gate_up))
            del rows, scale, gate_up
            self.transport.send_back(chunk, sums)
            del sums
        return self.transport.finish(), kept

    def _experts(
        self, rows: Tensor, scale: Tensor, arrivals: Arrivals, keep_gate_up: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Summed outputs of the token rows, [T, h]; gate and up."""
        if arrivals.num_rows:
            outputs, gate_up = self.engine.forward(rows, scale, arrivals, self.weights, keep_gate_up)
        else:
            outputs, gate_up = rows.new_empty(0, rows.shape[1]), rows.new_empty(0, 2 * self.weights.width)
        return sum_bags(outputs, arrivals.bags, arrivals.bag_starts), gate_up


class ForwardOverLink(ForwardTransport):
    """Rows travel to the ranks of their experts and back.

    Args:
        dispatch: which rows go where.
        link: among the ranks that share the experts.
        clock: of the pass.
        tokens: [n, h], contiguous.
        probabilities: [n, k].
    """

    def __init__(self, dispatch: Dispatch, link: Link, clock: PassClock, tokens: Tensor, probabilities: Tensor):
        self._dispatch, self._clock = dispatch, clock
        self._tokens, self._probabilities = tokens, probabilities
        self._form = RowFormat(tokens.shape[1], tokens.dtype)
        self._dispatches, self._combines = Exchange("D", link, clock), Exchange("C", link, clock)

    def send_all(self) -> None:
        flat = self._probabilities.to(self._form.weight_dtype)
        for chunk, (out, part) in enumerate(zip(self._dispatch.outgoing, self._dispatch.ranges, strict=True)):
            with self._clock.computing("pack", chunk):
                rows = self._tokens.index_select(0, out.row_tokens)
                packed, values = self._form.flat_weights(rows), flat[part.start : part.stop].flatten()
                for slots in out.weight_slots:
                    packed.index_copy_(0, slots, values)
            self._dispatches.start(rows, out.send, self._dispatch.incoming_sizes(chunk))

    def receive(self, chunk: int) -> tuple[Tensor, Tensor]:
        rows = self._dispatches.wait(chunk)
        slots = self._dispatch.arrivals[chunk].weight_slots
        return rows, self._form.flat_weights(rows).index_select(0, slots)

    def send_back(self, chunk: int, sums: Tensor) -> None:
        receive = self._dispatch.outgoing[chunk].send_tokens
        self._combines.start(sums, self._dispatch.arrivals[chunk].receive_tokens, receive)

    def finish(self) -> Tensor:
        output = torch.empty_like(self._tokens)
        for chunk, (out, part) in enumerate(zip(self._dispatch.outgoing, self._dispatch.ranges, strict=True)):
            outputs = self._combines.wait(chunk)
            with self._clock.computing("sum", chunk):
                output[part.start : part.stop] = sum_bags(outputs, out.bags, out.bag_starts)
            del outputs
        return output


class ForwardInPlace(ForwardTransport):
    """All experts are on this rank: nothing is sent, and the buffer of every chunk is the input itself.

    Args:
        dispatch: which rows go to which expert.
        tokens: [n, h], contiguous.
        probabilities: [n, k].
    """

    def __init__(self, dispatch: Dispatch, tokens: Tensor, probabilities: Tensor):
        self._dispatch, self._tokens = dispatch, tokens
        self._flat = probabilities.to(RowFormat(tokens.shape[1], tokens.dtype).weight_dtype).flatten()
        self._output = torch.empty_like(tokens)

    def send_all(self) -> None:
        """There is nobody to send to."""

    def receive(self, chunk: int) -> tuple[Tensor, Tensor]:
        return self._tokens, self._flat.index_select(0, self._dispatch.arrivals[chunk].weight_slots)

    def send_back(self, chunk: int, sums: Tensor) -> None:
        part = self._dispatch.ranges[chunk]
        self._output[part.start : part.stop] = sums

    def finish(self) -> Tensor:
        return self._output
