"""The Triton kernel of `bag_sums`; imported where Triton is installed and a CUDA device is used."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Columns of a program: 8 a thread of four warps, so that a thread reads 16 bytes of a 16-bit row at once."""


@triton.jit
def _sum_groups(rows, bags, starts, out, count, groups, hidden, BLOCK: tl.constexpr):
    group = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < hidden
    start = tl.load(starts + group)
    end = tl.load(starts + group + 1, mask=group + 1 < groups, other=count)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for place in range(start, end):
        row = tl.load(bags + place).to(tl.int64)
        total += tl.load(rows + row * hidden + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + group.to(tl.int64) * hidden + columns, total.to(out.dtype.element_ty), mask=inside)


def triton_sums(rows: Tensor, bags: Tensor, starts: Tensor) -> Tensor:
    """As `engine.sum_bags`; rows fp32, bf16 or fp16."""
    rows = rows.contiguous()
    hidden = rows.shape[1]
    out = rows.new_empty(starts.numel(), hidden)
    grid = (starts.numel(), triton.cdiv(hidden, BLOCK))
    if starts.numel():
        _sum_groups[grid](rows, bags, starts, out, bags.numel(), starts.numel(), hidden, BLOCK=BLOCK, num_warps=4)
    return out
