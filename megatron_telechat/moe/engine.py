"""SwiGLU experts over rows that come from one buffer: what an engine is given, what it must do, and the sums around it.

For an expert row x of expert e with routing probability p,

    y = p * (W2_e (silu(W1_e,gate x) * (W1_e,up x)) + b_e)

Kept for the backward: the buffer, p, and the output of the first product, or not even that if it is computed again. The
probability multiplies the activation before the second product, with which it commutes.

The engines are :mod:`megatron_telechat.moe.engine_loop` and :mod:`megatron_telechat.moe.engine_grouped`;
:mod:`megatron_telechat.moe.engines` says which device takes which.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_telechat.backend import traits_of
from megatron_telechat.backend.kernels import kernels
from megatron_telechat.moe.dispatch import Arrivals
from megatron_telechat.moe.gradients import WeightGradient
from megatron_telechat.moe.te_products import Accumulate


@dataclass(frozen=True)
class ExpertWeights:
    """The local experts.

    Attributes:
        fc1: [experts, 2, f, h], gate and up projection.
        fc2: [experts, h, f], down projection.
        bias: [experts, h] or None, of the down projection; multiplied by the probability too.
        adds_bias: whether this rank adds the bias. Where several ranks hold slices of f and their outputs are
            summed, one of them does. The bias gets its whole gradient on all of them.
        accumulate: TransformerEngine's product for gradients of weights, or None.
    """

    fc1: Tensor
    fc2: Tensor
    bias: Tensor | None
    adds_bias: bool = True
    accumulate: Accumulate | None = None

    @property
    def width(self) -> int:
        """f: the width of an expert, or of the slice of it that this rank holds."""
        return self.fc2.shape[2]

    @property
    def flat_fc1(self) -> Tensor:
        """[experts, 2 f, h]: gate above up; a view."""
        return self.fc1.flatten(1, 2)

    def detached(self) -> ExpertWeights:
        """The same values outside of autograd."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, fc1=self.fc1.detach(), fc2=self.fc2.detach(), bias=bias)


class Gradients(NamedTuple):
    """Where the gradients of :class:`ExpertWeights` add up."""

    fc1: WeightGradient
    fc2: WeightGradient
    bias: WeightGradient | None

    @classmethod
    def of(cls, weights: ExpertWeights, chunks: int, wanted: bool = True) -> Gradients:
        """Buffers for one backward.

        Args:
            weights: the parameters themselves: where Megatron's DistributedDataParallel gave them a ``main_grad``, that
                is the buffer.
            chunks: how many times each part will be added to.
            wanted: some weight is trained; then all gradients are computed.
        """
        bias = None if weights.bias is None else WeightGradient(weights.bias, chunks, wanted=wanted)
        fc1, fc2 = (WeightGradient(weight, chunks, weights.accumulate, wanted) for weight in (weights.fc1, weights.fc2))
        return cls(fc1, fc2, bias)

    @property
    def wanted(self) -> bool:
        """Whether some weight is trained."""
        return self.fc1.wanted

    def end_chunk(self) -> None:
        """Every weight has had its share of one chunk."""
        for gradient in self:
            if gradient is not None:
                gradient.end_chunk()

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """For autograd: fc1, fc2, bias, each in the shape and type of its weight; None where all are frozen."""
        return self.fc1.result(), self.fc2.result(), None if self.bias is None else self.bias.result()


class Engine(Protocol):
    """The arithmetic of the local experts on one chunk; :class:`ForwardPass` and :class:`BackwardPass` call it.

    An engine keeps no state between calls. It issues its work on the current stream and waits for nothing: on an
    accelerator its results are there when that stream has come to them. Other chunks' transfers run beside it. It is
    never called for a chunk without rows here. A module with these four functions is an engine.

    Shapes: N expert rows sorted by expert, T token rows (each the input of one expert row or more), b rows of the
    buffer that arrived (token rows, and rows of probabilities among them), h the hidden size, f the width. `scale` has
    the type in which probabilities travel, all else the type of the rows.
    """

    def first_product(self, rows: Tensor, arrivals: Arrivals, weights: ExpertWeights, /) -> Tensor:
        """Gate and up of every expert row, [N, 2 f], for a backward whose forward did not keep them.

        Args:
            rows: [b, h].
            arrivals: which rows go to which expert.
            weights: the local experts.
        """
        ...

    def forward(
        self, rows: Tensor, scale: Tensor, arrivals: Arrivals, weights: ExpertWeights, keep: bool, /
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs of the expert rows, times their probabilities: [N, h]; and gate and up, [N, 2 f], if `keep`.

        Args:
            rows: [b, h].
            scale: [N], the probability of every expert row.
            arrivals: which rows go to which expert.
            weights: the local experts.
            keep: return gate and up for the backward, else None.
        """
        ...

    def input_gradients(
        self, grad: Tensor, scale: Tensor, gate_up: Tensor, arrivals: Arrivals, weights: ExpertWeights, /
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the expert rows, [N, h], and of their probabilities, [N].

        Apart from :meth:`weight_gradients`, so that the way back of these gradients can run beside the products of the
        weights' gradients.

        Args:
            grad: [T, h], of the sums of the token rows' outputs.
            scale: [N], the probability of every expert row.
            gate_up: [N, 2 f]; overwritten by its own gradient.
            arrivals: which rows go to which expert.
            weights: the local experts.

        Returns:
            Both gradients; and the weighted activations [N, f], which :meth:`weight_gradients` needs.
        """
        ...

    def weight_gradients(
        self,
        grad: Tensor,
        scale: Tensor,
        rows: Tensor,
        grad_gate_up: Tensor,
        hidden: Tensor,
        arrivals: Arrivals,
        gradients: Gradients,
        /,
    ) -> None:
        """Add one chunk's share of the weights' gradients.

        Args:
            grad: [T, h], as in :meth:`input_gradients`.
            scale: [N], the probability of every expert row.
            rows: [b, h], as in :meth:`forward`.
            grad_gate_up: [N, 2 f], the gradient of gate and up.
            hidden: [N, f], the weighted activations.
            arrivals: which rows go to which expert.
            gradients: where the sums stand; the caller ends the chunk.
        """
        ...


def sum_bags(rows: Tensor, bags: Tensor, starts: Tensor) -> Tensor:
    """[len(starts), h]: the sum of each group of rows; a group may be empty.

    Args:
        rows: [r, h].
        bags: indices of rows, grouped; int32.
        starts: where each group begins in `bags`; int32, ascending.

    Each output row adds its own inputs in order: no atomics, so the result is the same in every run, which a
    scatter-add on an accelerator is not. The sum is taken in fp32 for 16-bit rows.
    """
    if not bags.numel():
        return rows.new_zeros(starts.numel(), rows.shape[1])
    fused = kernels("sums", rows)
    if fused is not None:
        return fused.sum_bags(rows, bags, starts)
    if traits_of(rows.device).sums_by_embedding_bag and rows.dtype != torch.float64:
        return F.embedding_bag(bags, rows, starts, mode="sum")
    ends = torch.cat((starts[1:], starts.new_tensor([bags.numel()])))
    owner = torch.repeat_interleave(torch.arange(starts.numel(), device=rows.device), (ends - starts).long(),
                                    output_size=bags.numel())  # fmt: skip
    sums = rows.new_zeros(starts.numel(), rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32))
    return sums.index_add_(0, owner, rows.index_select(0, bags).to(sums.dtype)).to(rows.dtype)
