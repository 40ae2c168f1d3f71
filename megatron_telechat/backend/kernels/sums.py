"""Sums of groups of rows.

torch's ``embedding_bag`` moved bf16 rows of 4096 at 0.4 TB/s where a copy reached 3.9 (H200, torch 2.11).
"""

from __future__ import annotations

# Triton is optional and has no types; a compiled function is launched by `[grid]`.
# pyright: reportMissingImports=false, reportIndexIssue=false
import torch
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


def sum_bags(rows: Tensor, bags: Tensor, starts: Tensor) -> Tensor:
    """[len(starts), h]: the sums of groups of rows, each added up in order, in fp32.

    Args:
        rows: [r, h], fp32, bf16 or fp16.
        bags: indices of rows, grouped; int32.
        starts: where each group begins in `bags`; int32, ascending.
    """
    rows = rows.contiguous()
    hidden = rows.shape[1]
    out = rows.new_empty(starts.numel(), hidden)
    if out.numel():
        grid = (starts.numel(), triton.cdiv(hidden, BLOCK))
        _sum_groups[grid](rows, bags, starts, out, bags.numel(), starts.numel(), hidden, BLOCK=BLOCK, num_warps=4)
    return out


def check(device: torch.device) -> None:
    """Groups of none, one and several rows, at the end too, to the bit. Raises ArithmeticError."""
    groups = [[4], [], [0, 2, 3], [2], [1, 4], []]
    bags = torch.tensor([row for group in groups for row in group], dtype=torch.int32, device=device)
    starts = torch.tensor([sum(map(len, groups[:i])) for i in range(len(groups))], dtype=torch.int32, device=device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = torch.arange(5 * 1032, device=device, dtype=torch.float32).sin().view(5, -1).to(dtype)
        expected = torch.zeros(len(groups), rows.shape[1], device=device)
        for total, group in zip(expected, groups, strict=True):
            for row in group:
                total += rows[row]
        if not torch.equal(sum_bags(rows, bags, starts), expected.to(dtype)):
            raise ArithmeticError(f"wrong sums in {dtype}")
