"""Sums over blocks of attention: outputs by their LSE, and gradients of rows that lie anywhere.

torch takes ten kernels for a merge and three for a sum over numbered rows, and reads and writes fp32 numbers in each.
"""

from __future__ import annotations

# Triton is optional and has no types; a compiled function is launched by `[grid]`.
# pyright: reportMissingImports=false, reportIndexIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Numbers of a row that one program adds."""


@triton.jit
def _merge(
    total, lse, out, new_lse, numbers, first, heads, tokens, rows, width, NUMBERED: tl.constexpr, D: tl.constexpr
):
    row, head = tl.program_id(0), tl.program_id(1)
    into = tl.load(numbers + row) if NUMBERED else (first + row).to(tl.int64)
    before = tl.load(lse + head.to(tl.int64) * tokens + into)
    new = tl.load(new_lse + head.to(tl.int64) * rows + row)
    most = tl.maximum(before, new)
    after = most + tl.log(tl.exp(before - most) + tl.exp(new - most))
    at = tl.arange(0, D)
    inside = at < width
    mine = total + (into * heads + head) * width + at
    theirs = out + (row.to(tl.int64) * heads + head) * width + at
    merged = tl.load(mine, inside, 0.0) * tl.exp(before - after)
    merged += tl.load(theirs, inside, 0.0).to(tl.float32) * tl.exp(new - after)
    tl.store(mine, merged, inside)
    tl.store(lse + head.to(tl.int64) * tokens + into, after)


@triton.jit
def _add_rows(total, part, numbers, first, width, NUMBERED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    into = tl.load(numbers + row) if NUMBERED else (first + row).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    mine = total + into * width + at
    value = tl.load(part + row.to(tl.int64) * width + at, inside, 0.0).to(tl.float32)
    tl.store(mine, tl.load(mine, inside, 0.0) + value, inside)


def merge(total: Tensor, lse: Tensor, rows: slice | Tensor, out: Tensor, new_lse: Tensor) -> None:
    """Add the attention of further keys to a total, in place.

    Args:
        total: fp32 [t, heads, d], contiguous.
        lse: fp32 [heads, t], contiguous; each is finite, or the new one is.
        rows: which of the t rows: a slice, or int64 numbers on the device, none of them twice.
        out: [n, heads, d], contiguous.
        new_lse: fp32 [heads, n], contiguous.
    """
    count, heads, width = out.shape
    if count:
        numbers, first = (rows, 0) if isinstance(rows, Tensor) else (lse, rows.start)
        _merge[(count, heads)](
            *(total, lse, out, new_lse, numbers, first, heads, lse.shape[1], count, width),
            NUMBERED=isinstance(rows, Tensor),
            D=triton.next_power_of_2(width),
            num_warps=1,
        )


def add_rows(total: Tensor, rows: slice | Tensor, part: Tensor) -> None:
    """``total[rows] += part``.

    Args:
        total: fp32 [t, groups, d], contiguous.
        rows: as for `merge`.
        part: [n, groups, d], contiguous; any float type.
    """
    count, width = part.shape[0], part.shape[1] * part.shape[2]
    if count:
        numbers, first = (rows, 0) if isinstance(rows, Tensor) else (total, rows.start)
        _add_rows[(count, triton.cdiv(width, BLOCK))](
            *(total, part, numbers, first, width), NUMBERED=isinstance(rows, Tensor), BLOCK=BLOCK, num_warps=4
        )


def check(device: torch.device) -> None:
    """Against torch. Raises ArithmeticError."""
    from megatron_telechat.backend.kernels import require_close

    tokens, heads, width = 37, 3, 72
    numbers = torch.arange(2 * tokens * heads * width, device=device, dtype=torch.float32).sin()
    for rows in (slice(5, 29), torch.tensor([3, 0, 36, 7], device=device)):
        for dtype in (torch.bfloat16, torch.float16):
            total = numbers[: tokens * heads * width].view(tokens, heads, width).clone()
            lse = numbers[: heads * tokens].view(heads, tokens).clone() * 40
            part = total[rows].mul(3).cos().to(dtype)
            new = lse[:, rows].mul(0.7).add(1).contiguous()
            after = torch.logaddexp(lse[:, rows], new)
            old, fresh = ((each - after).exp().t().unsqueeze(-1) for each in (lse[:, rows], new))
            expected, expected_lse, sums = total.clone(), lse.clone(), total.clone()
            expected[rows] = total[rows] * old + part.float() * fresh
            expected_lse[:, rows] = after
            sums[rows] += part
            added = total.clone()
            add_rows(added, rows, part)
            merge(total, lse, rows, part, new)
            require_close(total, expected, "the merge of two blocks")
            require_close(lse, expected_lse, "the LSE of two blocks")
            require_close(added, sums, "the sum of rows")
