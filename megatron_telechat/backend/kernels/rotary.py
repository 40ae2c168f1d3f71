"""The fused projection split into query, key and value, the first two rotated, in one pass; and the same back."""

from __future__ import annotations

from collections.abc import Sequence

# Triton is optional and has no types; a compiled function is launched by `[grid]`.
# pyright: reportMissingImports=false, reportIndexIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 1024
"""Pairs of numbers that a program rotates, about."""


@triton.jit
def _split_and_rotate(
    mixed, query, key, value, cos, sin,
    query_b, query_h, query_s, key_b, key_h, key_s, value_b, value_h, value_s, table_s, table_b,
    batch, groups, rep, half,
    HEADS: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    # One position of one sample, some heads of it: [HEADS, HALF] pairs.
    row = tl.program_id(0).to(tl.int64)
    s, b = row // batch, row % batch
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    column = tl.arange(0, HALF)
    inside = (head < groups * (rep + 2))[:, None] & (column < half)[None, :]
    group, place = head // (rep + 2), head % (rep + 2)
    of_query, of_key = (place < rep)[:, None] & inside, (place == rep)[:, None] & inside
    of_value = (place == rep + 1)[:, None] & inside
    first = mixed + (row * groups * (rep + 2) + head)[:, None] * (2 * half) + column[None, :]
    q = query + (b * query_b + s * query_s + (group * rep + place) * query_h)[:, None] + column[None, :]
    k = key + (b * key_b + s * key_s + group * key_h)[:, None] + column[None, :]
    v = value + (b * value_b + s * value_s + group * value_h)[:, None] + column[None, :]
    if BACK:
        x1, x2 = tl.load(q, of_query, 0.0), tl.load(q + half, of_query, 0.0)
        x1, x2 = tl.where(of_key, tl.load(k, of_key, 0.0), x1), tl.where(of_key, tl.load(k + half, of_key, 0.0), x2)
        x1, x2 = (
            tl.where(of_value, tl.load(v, of_value, 0.0), x1),
            tl.where(of_value, tl.load(v + half, of_value, 0.0), x2),
        )
    else:
        x1, x2 = tl.load(first, inside, 0.0), tl.load(first + half, inside, 0.0)
    table = s * table_s + b * table_b + column
    c, d = tl.load(cos + table, column < half, 0.0)[None, :], tl.load(sin + table, column < half, 0.0)[None, :]
    if BACK:
        d = -d
    f1, f2 = x1.to(tl.float32), x2.to(tl.float32)
    y1, y2 = (f1 * c - f2 * d).to(x1.dtype), (f2 * c + f1 * d).to(x2.dtype)
    y1, y2 = tl.where(of_value, x1, y1), tl.where(of_value, x2, y2)
    if BACK:
        tl.store(first, y1, inside)
        tl.store(first + half, y2, inside)
    else:
        tl.store(q, y1, of_query)
        tl.store(q + half, y2, of_query)
        tl.store(k, y1, of_key)
        tl.store(k + half, y2, of_key)
        tl.store(v, y1, of_value)
        tl.store(v + half, y2, of_value)


def _launch(mixed: Tensor, heads: Sequence[Tensor], cos: Tensor, sin: Tensor, heads_first: bool, back: bool) -> None:
    s, b, groups, width, dim = mixed.shape
    axes = (0, 1, 2) if heads_first else (1, 2, 0)  # of sample, head, position
    strides = [part.stride(axis) for part in heads for axis in axes]
    table = (cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1) if cos.shape[1] > 1 else 0)
    half = dim // 2
    block = triton.next_power_of_2(half)
    count = max(1, ELEMENTS // block)
    grid = (s * b, triton.cdiv(groups * width, count))
    _split_and_rotate[grid](mixed, *heads, cos, sin, *strides, *table, b, groups, width - 2, half,
                            HEADS=count, HALF=block, BACK=back, num_warps=4)  # fmt: skip


def split_and_rotate(mixed: Tensor, cos: Tensor, sin: Tensor, heads_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, contiguous: [b, heads, s, d] if `heads_first`, else [s, b, heads, d].

    Args:
        mixed: [s, b, groups, rep + 2, d]; of each group its query heads, its key, its value.
        cos, sin: fp32 [s, b or 1, 1, 1, d / 2].
    """
    s, b, groups, width, dim = mixed.shape
    counts = (groups * (width - 2), groups, groups)
    heads = [mixed.new_empty((b, n, s, dim) if heads_first else (s, b, n, dim)) for n in counts]
    _launch(mixed.contiguous(), heads, cos.contiguous(), sin.contiguous(), heads_first, False)
    return heads[0], heads[1], heads[2]


def mixed_gradient(grads: Sequence[Tensor], cos: Tensor, sin: Tensor, heads_first: bool) -> Tensor:
    """[s, b, groups, rep + 2, d], the gradient of `mixed`, from those of query, key and value in any strides."""
    b, heads, s, dim = grads[0].shape if heads_first else (grads[0].shape[i] for i in (1, 2, 0, 3))
    groups = grads[1].shape[1 if heads_first else 2]
    mixed = grads[0].new_empty((s, b, groups, heads // groups + 2, dim))
    grads = [grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads]
    _launch(mixed, grads, cos.contiguous(), sin.contiguous(), heads_first, True)
    return mixed


def check(device: torch.device) -> None:
    """Against complex numbers, forward and back. Raises ArithmeticError."""
    from megatron_telechat.backend.kernels import require_close

    s, b, groups, rep, dim = 5, 2, 3, 2, 20
    angles = torch.arange(s * b * dim // 2, device=device, dtype=torch.float32).view(s, b, 1, 1, dim // 2)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        numbers = torch.arange(s * b * groups * (rep + 2) * dim, device=device, dtype=torch.float32).mul_(0.7).cos()
        mixed = numbers.view(s, b, groups, rep + 2, dim).to(dtype)
        for table in (angles, angles[:, :1]):
            pairs = torch.complex(*mixed.float().chunk(2, -1))
            turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(table), table))
            turned = torch.cat(turned.unbind(-1), -1)
            expected = (turned[..., :rep, :], turned[..., rep : rep + 1, :], mixed[..., rep + 1 :, :].float())
            for heads_first in (True, False):
                found = split_and_rotate(mixed, table.cos(), table.sin(), heads_first)
                for one, wanted in zip(found, expected, strict=True):
                    wanted = wanted.flatten(2, 3)
                    require_close(one, wanted.permute(1, 2, 0, 3) if heads_first else wanted, "rotary")
                require_close(
                    mixed_gradient(found, table.cos(), table.sin(), heads_first), mixed.float(), "rotary, back"
                )
