"""The type that the CPU computes attention in, and attention in a wider type than its operands."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def _multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16 (AVX512_BF16 or AMX)."""
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in asked)


def widened(dtype: torch.dtype) -> torch.dtype:
    """The type in which torch's attention for the CPU is fast for operands of this type.

    Its backward in fp16 takes ten times as long as in fp32 on any CPU, in bf16 several times as long where the CPU has
    no instructions for it (`tools/bench/attention_types.py`). A property of the machine and not a measurement: a resume
    computes in the same type.
    """
    if dtype is torch.float16 or (dtype is torch.bfloat16 and not _multiplies_bf16()):
        return torch.float32
    return dtype


class _Wide(torch.autograd.Function):
    """Computes in `widened`; keeps the operands and the output in their own type, as the plain function does."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        wide = (each.to(widened(each.dtype)) for each in (query, key, value))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*wide, 0.0, True)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        *saved, lse = ctx.saved_tensors
        wide = (each.to(widened(each.dtype)) for each in (grad, *saved))
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*wide, lse, 0.0, True)
        return tuple(each.to(grad.dtype) for each in found)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention on the CPU without dropout, [b, heads, s, head_dim], in the type of `widened`.

    Args:
        query: [b, heads, s, head_dim].
        key, value: [b, groups, s, head_dim].
    """
    return _Wide.apply(query, key, value)
