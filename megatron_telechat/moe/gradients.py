"""Where the gradients of the experts' weights add up, over chunks and micro-batches."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor


class WeightGradient:
    """The gradient of one parameter during one backward.

    With Megatron's DistributedDataParallel the parameter has a ``main_grad``, usually fp32: every chunk adds into
    it, and autograd is handed a placeholder that nobody reads (``grad_added_to_main_grad``, as in megatron-core's
    linear layers). Else chunks add up in one buffer; for 16-bit weights and several chunks it is fp32.

    Args:
        parameter: the weight.
        chunks: how many times :meth:`add_product` or :meth:`add` will be called for each part.
    """

    def __init__(self, parameter: Tensor, chunks: int):
        self.parameter = parameter
        main = getattr(parameter, "main_grad", None)
        self.into_main = main is not None and hasattr(parameter, "grad_added_to_main_grad")
        self.fresh = not self.into_main
        """Whether the buffer holds nothing yet: the first sum replaces its content."""
        if self.into_main:
            self.buffer = main
        else:
            wide = torch.promote_types(parameter.dtype, torch.float32) if chunks > 1 else parameter.dtype
            self.buffer = torch.empty_like(parameter, dtype=wide)
        self._scratch: Optional[Tensor] = None

    def add_product(self, part: int, a: Tensor, b: Tensor) -> None:
        """``buffer[part] += a @ b``, for two matrices."""
        target = self.buffer[part].view(a.shape[0], b.shape[1])
        if target.dtype == a.dtype:
            torch.addmm(target, a, b, beta=0 if self.fresh else 1, out=target)
            return
        if self._scratch is None:
            self._scratch = torch.empty(target.shape, dtype=a.dtype, device=a.device)
        self._put(target, torch.mm(a, b, out=self._scratch))

    def add_nothing(self, part: int) -> None:
        """An expert without rows."""
        if self.fresh:
            self.buffer[part].zero_()

    def add(self, value: Tensor) -> None:
        """``buffer += value``, whole."""
        self._put(self.buffer, value.view_as(self.buffer))

    def _put(self, target: Tensor, value: Tensor) -> None:
        if self.fresh:
            target.copy_(value)
        else:
            target.add_(value)

    def end_chunk(self) -> None:
        """All parts have had their share of one chunk."""
        self.fresh = False

    def result(self) -> Tensor:
        """What autograd gets for the parameter."""
        if self.fresh:  # no chunk had a row
            self.buffer.zero_()
        if not self.into_main:
            return self.buffer.to(self.parameter.dtype)
        self.parameter.grad_added_to_main_grad = True
        return torch.empty_like(self.parameter)
