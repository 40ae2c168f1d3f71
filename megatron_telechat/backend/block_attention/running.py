"""The sum over blocks of keys, exact in fp32."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatron_telechat.backend.kernels import kernels

_WORTH_A_KERNEL = 1 << 22
"""Numbers. Triton's start of a kernel takes the host longer than torch's of several: an H100 was slower with them where
blocks were smaller."""


class Running:
    """Attention of all keys so far.

    Attributes:
        out: fp32 [t, heads, d].
        lse: fp32 [heads, t], the logarithm of the sum of the exponentials.
    """

    def __init__(self, query: Tensor):
        tokens, heads, _ = query.shape
        self.out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
        self.lse = query.new_full((heads, tokens), -math.inf, dtype=torch.float32)

    def begin(self, rows: slice | Tensor, out: Tensor, lse: Tensor) -> None:
        """The first keys of these queries.

        Args:
            rows: which queries: a slice, or numbers on the device.
            out: [n, heads, d].
            lse: fp32 [heads, n].
        """
        self.out[rows] = out.float()
        self.lse[:, rows] = lse

    def add(self, rows: slice | Tensor, out: Tensor, lse: Tensor) -> None:
        """Further keys of these queries; as :meth:`begin`.

        ``lse = max + log(1 + exp(min - max))``, ``out = sum of out_i exp(lse_i - lse)``: nothing overflows.
        """
        fused = _fused(out)
        if fused is not None:
            fused.merge(self.out, self.lse, rows, out.contiguous(), lse.contiguous())
            return
        before = self.lse[:, rows]
        after = torch.logaddexp(before, lse)
        old, new = ((part - after).exp_().t().unsqueeze(-1) for part in (before, lse))
        if isinstance(rows, slice):
            self.out[rows].mul_(old).addcmul_(out.float(), new)
        else:
            self.out[rows] = (self.out[rows] * old).addcmul_(out.float(), new)
        self.lse[:, rows] = after


def _fused(part: Tensor) -> Any | None:
    """The kernels of this device for a part of that size."""
    return kernels("block_sums", part) if part.numel() >= _WORTH_A_KERNEL else None


def add_rows(total: Tensor, rows: slice | Tensor, part: Tensor) -> None:
    """``total[rows] += part``, in one order.

    Args:
        total: fp32 [t, groups, d], contiguous.
        rows: a slice, or numbers on the device, none of them twice.
        part: [n, groups, d].
    """
    fused = _fused(part)
    if fused is not None:
        fused.add_rows(total, rows, part.contiguous())
    else:
        total[rows] += part
