"""Heads for tokens (DeepSpeed-Ulysses): ranks that hold neighbouring tokens exchange them for whole heads.

Before: every rank has its own tokens of all heads. After: the tokens of all ranks of the group, of a part of the heads.
The attention in between sees one rank with more tokens and fewer heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_telechat.parallel.clock import PassClock
from megatron_telechat.parallel.context.direct import Clocks
from megatron_telechat.parallel.context.exchange import all_to_all


class _Exchange(torch.autograd.Function):
    """One all-to-all; its gradient is the one in the other direction."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup, clocks: Clocks) -> Tensor:
        ctx.group, ctx.clock = group, clocks[1]
        return _all_to_all(rows, group, clocks[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _all_to_all(grad, ctx.group, ctx.clock), None, None


def _all_to_all(rows: Tensor, group: dist.ProcessGroup, clock: PassClock) -> Tensor:
    """[ranks, ...]: entry r goes to rank r; entry r of the result is from rank r. Nothing runs beside it."""
    with clock.computing("pack"):
        rows = rows.contiguous()
    with clock.waiting("H"):
        return all_to_all(rows, group)


def to_heads(parts: tuple[Tensor, ...], group: dist.ProcessGroup, clocks: Clocks) -> tuple[Tensor, ...]:
    """All tokens of the group, of this rank's heads.

    Args:
        parts: [b, t, heads, d] each (queries, keys, values), of the tokens of this rank; the ranks divide each number
            of heads. One all-to-all for all of them.

    Returns:
        [b, ranks t, heads / ranks, d] each.
    """
    ranks = group.size()
    each = [part.shape[2] // ranks for part in parts]
    # [ranks, b, t, heads of that rank, d]
    rows = torch.cat([part.unflatten(2, (ranks, -1)).permute(2, 0, 1, 3, 4) for part in parts], dim=3)
    received = _Exchange.apply(rows, group, clocks)
    return tuple(part.permute(1, 0, 2, 3, 4).flatten(1, 2) for part in received.split(each, dim=3))


def to_tokens(out: Tensor, group: dist.ProcessGroup, clocks: Clocks) -> Tensor:
    """The way back: [b, ranks t, heads / ranks, d] of all tokens -> [b, t, heads, d] of this rank's tokens."""
    ranks = group.size()
    rows = out.unflatten(1, (ranks, -1)).permute(1, 0, 2, 3, 4)
    received = _Exchange.apply(rows, group, clocks)
    return received.permute(1, 2, 0, 3, 4).flatten(2, 3)
