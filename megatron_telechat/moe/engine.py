"""SwiGLU experts over rows that come from one buffer: what both engines share.

For an expert row x of expert e with routing probability p,

    y = p * (W2_e (silu(W1_e,gate x) * (W1_e,up x)) + b_e)

Kept for the backward: the buffer, p, and the output of the first product, or not even that if it is computed again. The
probability multiplies the activation before the second product, with which it commutes.

An engine is a module with four functions: ``first_product``, ``forward``, ``input_gradients``, ``weight_gradients``. The
last two are apart, so that the exchange of input gradients can run beside the products of the weights' gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_telechat.backend.kernels import kernels
from megatron_telechat.moe.gradients import WeightGradient
from megatron_telechat.moe.te_products import Accumulate


class ExpertWeights(NamedTuple):
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
    bias: Optional[Tensor]
    adds_bias: bool = True
    accumulate: Optional[Accumulate] = None

    @property
    def width(self) -> int:
        return self.fc2.shape[2]

    @property
    def flat_fc1(self) -> Tensor:
        return self.fc1.flatten(1, 2)

    def detached(self) -> "ExpertWeights":
        """The same values outside of autograd."""
        bias = None if self.bias is None else self.bias.detach()
        return self._replace(fc1=self.fc1.detach(), fc2=self.fc2.detach(), bias=bias)


class Gradients(NamedTuple):
    """Where the gradients of :class:`ExpertWeights` add up."""

    fc1: WeightGradient
    fc2: WeightGradient
    bias: Optional[WeightGradient]

    @classmethod
    def of(cls, weights: ExpertWeights, chunks: int) -> "Gradients":
        bias = None if weights.bias is None else WeightGradient(weights.bias, chunks)
        fc1, fc2 = (WeightGradient(weight, chunks, weights.accumulate) for weight in (weights.fc1, weights.fc2))
        return cls(fc1, fc2, bias)

    def end_chunk(self) -> None:
        for gradient in self:
            if gradient is not None:
                gradient.end_chunk()

    def results(self) -> tuple[Optional[Tensor], ...]:
        """For autograd, in the order of the weights."""
        return tuple(None if gradient is None else gradient.result() for gradient in self)


def engine_for(device: torch.device) -> Any:
    """The loop on the CPU, ``grouped_mm`` elsewhere."""
    if device.type == "cpu":
        from megatron_telechat.moe import engine_loop

        return engine_loop
    from megatron_telechat.moe import engine_grouped

    return engine_grouped


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
    if rows.device.type in ("cpu", "cuda") and rows.dtype != torch.float64:
        return F.embedding_bag(bags, rows, starts, mode="sum")
    ends = torch.cat((starts[1:], starts.new_tensor([bags.numel()])))
    owner = torch.repeat_interleave(torch.arange(starts.numel(), device=rows.device), (ends - starts).long(),
                                    output_size=bags.numel())  # fmt: skip
    sums = rows.new_zeros(starts.numel(), rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32))
    return sums.index_add_(0, owner, rows.index_select(0, bags).to(sums.dtype)).to(rows.dtype)
