"""Where the gradients of the experts' weights add up, over chunks and micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from megatron_telechat.backend.grouped import add_grouped_sum_product, grouped_sum_product
from megatron_telechat.backend.kernels import kernels
from megatron_telechat.moe.dispatch import Arrivals
from megatron_telechat.moe.te_products import Accumulate


def main_grad_of(parameter: Tensor) -> Tensor | None:
    """The gradient buffer that Megatron's DistributedDataParallel gave to a parameter; None without one."""
    return getattr(parameter, "main_grad", None)


def set_added_to_main_grad(parameter: Tensor, added: bool) -> None:
    """Tell that DistributedDataParallel whether ``main_grad`` holds the gradient of this backward already."""
    parameter.grad_added_to_main_grad = added  # pyright: ignore[reportAttributeAccessIssue] - Megatron-Core's mark


def _runs(counts: Sequence[int]) -> Iterator[tuple[bool, tuple[int, int]]]:
    """Experts [start, stop) that all have rows, or all have none, in order: few slices, and no index on the device."""
    start = 0
    for some, run in groupby(counts, bool):
        stop = start + len(list(run))
        yield some, (start, stop)
        start = stop


class WeightGradient:
    """The gradient of one parameter during one backward.

    With Megatron's DistributedDataParallel the parameter has a ``main_grad``, usually fp32: every chunk adds into
    it, and autograd is handed a placeholder that nobody reads (``grad_added_to_main_grad``, as in megatron-core's
    linear layers). Else chunks add up in one buffer; for 16-bit weights and several chunks it is fp32.

    Args:
        parameter: the weight.
        chunks: how many times each part will be added to.
        accumulate: TransformerEngine's product for :meth:`add_grouped_product`, where there is one.
        wanted: something will be added.
    """

    def __init__(self, parameter: Tensor, chunks: int, accumulate: Accumulate | None = None, wanted: bool = True):
        self.parameter = parameter
        main = main_grad_of(parameter)
        self.into_main = main is not None and hasattr(parameter, "grad_added_to_main_grad")
        self.fresh = not self.into_main
        """Whether the buffer holds nothing yet: the first sum replaces its content."""
        self.buffer: Tensor
        if main is not None and self.into_main:
            self.buffer = main
        else:
            wide = torch.promote_types(parameter.dtype, torch.float32) if chunks > 1 else parameter.dtype
            self.buffer = torch.empty_like(parameter, dtype=wide) if wanted else parameter.new_empty(0)
        self.wanted = wanted
        self._accumulate = accumulate if self.buffer.dtype == torch.float32 else None
        self._scratch: Tensor | None = None

    def add_product(self, part: int | slice, a: Tensor, b: Tensor) -> None:
        """``buffer[part] += a @ b``, for two matrices. No part has more rows than the first that was asked for."""
        target = self.buffer[part].view(a.shape[0], b.shape[1])
        if target.dtype == a.dtype:
            torch.addmm(target, a, b, beta=0 if self.fresh else 1, out=target)
            return
        if self._scratch is None:
            self._scratch = torch.empty(target.shape, dtype=a.dtype, device=a.device)
        self._put(target, torch.mm(a, b, out=self._scratch[: target.shape[0]]))

    def add_nothing(self, part: int) -> None:
        """An expert without rows."""
        if self.fresh:
            self.buffer[part].zero_()

    def add_grouped_product(self, a: Tensor, b: Tensor, plan: Arrivals) -> None:
        """``buffer[e] += a_e^T @ b_e`` for the rows of every expert e of `plan`.

        An expert without rows takes no part in torch's product: CUDA's kernel has left its matrix unwritten, written
        NaN into it or hung, depending on card and release (pytorch issues 172439, 193633, 152668).
        """
        buffer = self.buffer.view(-1, a.shape[1], b.shape[1])
        if self._accumulate is not None:
            self._accumulate(buffer, a, b, plan.counts, self.fresh)
            return
        if add_grouped_sum_product(buffer, a, b, plan.offsets, self.fresh):
            return
        runs = list(_runs(plan.counts))
        if self.fresh:
            for some, (start, stop) in runs:
                if not some:
                    buffer[start:stop].zero_()
        filled = [run for some, run in runs if some]
        if not filled:
            return
        # Where an expert begins, the one with rows before it ends: the ends of those with rows are all that is needed.
        ends = [plan.offsets[start:stop] for start, stop in filled]
        products = grouped_sum_product(a, b, ends[0] if len(ends) == 1 else torch.cat(ends))
        if products is None:
            counts = [count for count in plan.counts if count]
            experts = [expert for start, stop in filled for expert in range(start, stop)]
            for expert, left, right in zip(experts, a.split(counts), b.split(counts), strict=True):
                self.add_product(expert, left.t(), right)
            return
        parts = products.split([stop - start for start, stop in filled])
        for (start, stop), part in zip(filled, parts, strict=True):
            self._put(buffer[start:stop], part)

    def add(self, value: Tensor) -> None:
        """``buffer += value``, whole."""
        self._put(self.buffer, value.view_as(self.buffer))

    def _put(self, target: Tensor, value: Tensor) -> None:
        if self.fresh:
            target.copy_(value)
            return
        fused = kernels("adding", value) if target.dtype != value.dtype and value.is_contiguous() else None
        if fused is not None and target.is_contiguous() and target.dtype == torch.float32:
            fused.add(target, value)
        else:
            target.add_(value)

    def end_chunk(self) -> None:
        """All parts have had their share of one chunk."""
        self.fresh = False

    def result(self) -> Tensor | None:
        """What autograd gets for the parameter; None where nothing was wanted."""
        if not self.wanted:
            return None
        if self.fresh:  # no chunk had a row
            self.buffer.zero_()
        if not self.into_main:
            return self.buffer.to(self.parameter.dtype)
        set_added_to_main_grad(self.parameter, True)
        return torch.empty_like(self.parameter)
