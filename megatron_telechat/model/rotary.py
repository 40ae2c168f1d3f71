"""Rotary embedding with NTK-aware scaling and attention scaling (TeleChat2's modelling_telechat.py)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_telechat.backend.kernels import kernels
from megatron_telechat.config.schema import ModelConfig

Tables = tuple[Tensor, Tensor]
"""(cos, sin) in fp32, each [length or length, batch; then 1, 1; head_dim / 2] so that they broadcast over heads."""

MAX_CACHED_LENGTHS = 8


def ntk_alpha(length: int, training_seqlen: int, base_seqlen: int) -> float:
    """Factor on theta for a sequence of this length: ``max(2^ceil(log2(s / base) + 1) - 1, 1)``, s floored at
    training_seqlen."""
    length = max(length, training_seqlen)
    return max(2.0 ** math.ceil(math.log2(length / base_seqlen) + 1) - 1, 1.0)


def attention_scaling(length: int, training_seqlen: int) -> float:
    """Factor m on cos and sin, so that attention logits grow by m^2: ``1 + 0.1 ln(s / training_seqlen)`` beyond it."""
    return 1.0 if length <= training_seqlen else 1.0 + 0.1 * math.log(length / training_seqlen)


class RotaryEmbedding(torch.nn.Module):
    """Makes the cos/sin tables of a sequence and keeps those of the last few lengths."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.dim = model.head_dim
        self.theta = model.rotary_base
        self.training_seqlen = model.rotary_training_seqlen
        self.base_seqlen = model.rotary_base_seqlen
        self.table_dtype = torch.float16 if model.rotary_table_dtype == "fp16" else torch.float32
        self._tables: dict[tuple[int, torch.device], Tables] = {}
        self._parts: dict[tuple[int, torch.device], Tables] = {}

    def scaling(self, length: int) -> tuple[float, float]:
        """Theta and the factor on cos and sin for a sequence of this length: where they are equal, so are the tables of
        the tokens that two lengths have in common."""
        factor = 1.0 if self.training_seqlen is None else attention_scaling(length, self.training_seqlen)
        return self.scaled_theta(length), factor

    def scaled_theta(self, length: int) -> float:
        """Theta for a sequence of this length: ``theta * alpha^(d / (d - 2))``."""
        if self.training_seqlen is None:
            return self.theta
        alpha = ntk_alpha(length, self.training_seqlen, self.base_seqlen or self.training_seqlen)
        return self.theta * alpha ** (self.dim / (self.dim - 2))

    def forward(self, length: int, device: torch.device, position_ids: Tensor | None = None) -> Tables:
        """Tables of a sequence of `length` tokens.

        Args:
            position_ids: [batch, length]; gives every token its own position. Unset: 0, 1, 2, …
        """
        tables = self._tables.get((length, device))
        if tables is None:
            if len(self._tables) >= MAX_CACHED_LENGTHS:  # generation asks for every length in turn
                self._tables.clear()
            tables = self._tables[length, device] = self._make(length, device)
        if position_ids is None:
            return tables
        rows = position_ids.t()
        cos, sin = (table[:, 0][rows] for table in tables)
        return cos, sin

    def at(self, length: int, device: torch.device, positions: np.ndarray) -> Tables:
        """Tables of some tokens of every row: those at these positions, int64 [tokens]. Made once for a length: the
        positions of a rank are then always the same."""
        tables = self._parts.get((length, device))
        if tables is None:
            if len(self._parts) >= MAX_CACHED_LENGTHS:
                self._parts.clear()
            rows = torch.from_numpy(positions).to(device)
            cos, sin = (table[rows] for table in self(length, device))
            tables = self._parts[length, device] = cos, sin
        return tables

    def _make(self, length: int, device: torch.device) -> Tables:
        theta, scaling = self.scaling(length)
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float32, device=device) / self.dim
        frequencies = 1.0 / theta**exponents
        angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
        cos, sin = (
            (scaling * table.to(self.table_dtype)).float().view(length, 1, 1, 1, self.dim // 2)
            for table in (angles.cos(), angles.sin())
        )
        return cos, sin


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Write the rotation of x into out, whose memory order may differ; computed in fp32."""
    x1, x2 = x.float().chunk(2, dim=-1)
    out1, out2 = out.chunk(2, dim=-1)
    # through a contiguous temporary: kernels on strided halves cost more than the copy
    rotated = (x1 * cos).addcmul_(x2, sin, value=-1)
    out1.copy_(rotated)
    torch.mul(x2, cos, out=rotated).addcmul_(x1, sin)
    out2.copy_(rotated)


class SplitAndRotate(torch.autograd.Function):
    """Split the fused projection into query, key, value; rotate the first two. One pass, one buffer each way."""

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, cos: Tensor, sin: Tensor, heads_first: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Args:
            mixed: [s, b, groups, rep + 2, head_dim]; of each group its query heads, its key, its value.
            cos, sin: tables of `RotaryEmbedding`.
            heads_first: return [b, heads, s, head_dim] (torch's SDPA) in place of [s, b, heads, head_dim].

        Returns:
            query, key, value, contiguous, with groups*rep, groups and groups heads.
        """
        s, b, groups, heads, dim = mixed.shape
        ctx.save_for_backward(cos, sin)
        ctx.heads_first = heads_first
        fused = kernels("rotary", mixed)
        if fused is not None:
            return fused.split_and_rotate(mixed, cos, sin, heads_first)
        rep = heads - 2
        outs = []
        for count in (rep, 1, 1):
            shape = (b, groups * count, s, dim) if heads_first else (s, b, groups * count, dim)
            outs.append(mixed.new_empty(shape))
        views = [_group_view(out, groups, heads_first) for out in outs]
        _rotate(mixed[..., :rep, :], cos, sin, views[0])
        _rotate(mixed[..., rep : rep + 1, :], cos, sin, views[1])
        views[2].copy_(mixed[..., rep + 1 :, :])
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Gradient of `mixed`, [s, b, groups, rep + 2, head_dim], from those of query, key and value in any strides.

        The transpose of a rotation by an angle, scaled or not, is that by its negative: sin changes its sign.
        """
        cos, sin = ctx.saved_tensors
        fused = kernels("rotary", grads[0])
        if fused is not None:
            return fused.mixed_gradient(grads, cos, sin, ctx.heads_first), None, None, None
        groups = grads[1].shape[1 if ctx.heads_first else 2]
        query, key, value = (_group_view(grad, groups, ctx.heads_first) for grad in grads)
        s, b, _, rep, dim = query.shape
        mixed = query.new_empty((s, b, groups, rep + 2, dim))
        back = -sin
        _rotate(query, cos, back, mixed[..., :rep, :])
        _rotate(key, cos, back, mixed[..., rep : rep + 1, :])
        mixed[..., rep + 1 :, :].copy_(value)
        return mixed, None, None, None


def _group_view(x: Tensor, groups: int, heads_first: bool) -> Tensor:
    """View heads of either order as [s, b, groups, heads of a group, head_dim]."""
    if heads_first:
        x = x.permute(2, 0, 1, 3)
    return x.unflatten(2, (groups, -1))
