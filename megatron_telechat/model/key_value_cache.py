"""Keys and values of the tokens that a generation has read, so that the next token costs one row and not all of them.

With NTK-aware and attention scaling the rotary tables depend on the length of the whole sequence. When they change, the
attention of every earlier token changes with them, and so do the hidden states that the keys and values of the deeper
layers are made of: turning the keys is not enough. So a cache knows its tokens, and has them read anew then. Up to the
training length that never happens; beyond it attention scaling grows with every token.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GROWTH = 256
"""Rows of the first allocation are a multiple of this."""


class LayerCache:
    """Rotated keys and values of one layer, [batch, groups of this rank, rows, head_dim]; the rows double as they
    fill."""

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, key: Tensor, value: Tensor, past: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, those of new ones, [batch, groups, new, head_dim], behind `past` others."""
        total = past + key.shape[2]
        self._keys = _with_room(self._keys, key, past, total)
        self._values = _with_room(self._values, value, past, total)
        self._keys[:, :, past:total] = key
        self._values[:, :, past:total] = value
        return self._keys[:, :, :total], self._values[:, :, :total]


def _with_room(buffer: Tensor | None, like: Tensor, past: int, total: int) -> Tensor:
    """The buffer, or a larger one with its first `past` rows."""
    rows = 0 if buffer is None else buffer.shape[2]
    if buffer is not None and total <= rows:
        return buffer
    batch, groups, _, width = like.shape
    larger = like.new_empty(batch, groups, max(2 * rows, -(-total // _GROWTH) * _GROWTH), width)
    if buffer is not None:
        larger[:, :, :past] = buffer[:, :, :past]
    return larger


class KeyValueCache:
    """What every layer of this rank has read of some sequences of equal length.

    A model takes it in the place of the stretches that attend to themselves (`TeleChatModel.forward`).

    Attributes:
        tokens: int64 [batch, length], all that were read; None before the first.
        length: tokens of a sequence that the layers hold; fewer than `tokens` has while they are read anew.
        scaling: theta and attention scaling of the tables that the keys were rotated by.
    """

    def __init__(self) -> None:
        self.tokens: Tensor | None = None
        self.length = 0
        self.scaling: tuple[float, float] | None = None
        self._layers: dict[int, LayerCache] = {}

    def layer(self, number: int) -> LayerCache:
        """The part of a layer."""
        return self._layers.setdefault(number, LayerCache())

    def to_read(self, tokens: Tensor, scaling: tuple[float, float]) -> Tensor:
        """Add tokens, [batch, new]; what the model must read then: these, or, where the scaling is no longer that of
        the earlier ones, all."""
        self.tokens = tokens if self.tokens is None else torch.cat((self.tokens, tokens), dim=1)
        if scaling == self.scaling:
            return tokens
        self.scaling, self.length = scaling, 0
        return self.tokens

    def advance(self, new: int) -> None:
        """All layers have read so many tokens more."""
        self.length += new


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of the last tokens to all: query [batch, heads, new, head_dim], keys and values
    [batch, groups, total, head_dim] -> [new, batch, heads * head_dim]."""
    new, total = query.shape[2], key.shape[2]
    mask = None
    if new > 1:
        places = torch.arange(total, device=query.device)
        mask = places[None, :] <= places[total - new :, None]
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.permute(2, 0, 1, 3).flatten(2)
