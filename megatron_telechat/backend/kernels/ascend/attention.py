"""Causal attention by ``npu_fusion_attention``, query groups and stretches of a sample included.

Its causal mask is one of 2048 x 2048 for any length (``sparse_mode`` 2), with True where a key must not be seen.
torch_npu knows its gradient: the calls stand in autograd as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate

# torch_npu is installed on Ascend machines only.
# pyright: reportMissingImports=false
import torch
import torch_npu
from torch import Tensor

TYPES = (torch.bfloat16, torch.float16)

CAUSAL = 2
"""``sparse_mode``: key j is seen by query i if j <= i, both counted from the start."""
MASK_SIZE = 2048
"""What ``sparse_mode`` 2 expects, whatever the length."""
MOST_STRETCHES = 1024
"""Stretches that one call takes."""


@lru_cache
def causal_mask(device: torch.device) -> Tensor:
    """bool [2048, 2048], True where a key must not be seen."""
    return torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.bool, device=device).triu_(1)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, heads: int, layout: str, dropout: float, ends: list[int] | None
) -> Tensor:
    out, *_ = torch_npu.npu_fusion_attention(
        query,
        key,
        value,
        head_num=heads,
        input_layout=layout,
        atten_mask=causal_mask(query.device),
        scale=1.0 / math.sqrt(query.shape[-1] if layout == "TND" else query.shape[-1] // heads),
        keep_prob=1.0 - dropout,
        sparse_mode=CAUSAL,
        actual_seq_qlen=ends,
        actual_seq_kvlen=ends,
    )
    return out


def causal(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """[s, b, heads*head_dim].

    Args:
        query: [s, b, heads, head_dim], contiguous.
        key, value: [s, b, groups, head_dim], contiguous; heads is a multiple of groups.
        dropout: chance of a weight to be dropped.
    """
    return _attend(query.flatten(2), key.flatten(2), value.flatten(2), query.shape[2], "SBH", dropout, None)


def causal_within(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, stretches: Sequence[Sequence[int]]
) -> Tensor:
    """[s, b, heads*head_dim], every token attending within its own stretch only.

    Args:
        query, key, value, dropout: as in :func:`causal`.
        stretches: for each sample the lengths of its stretches, in order; they sum to s. Numbers of the host.
    """
    length, samples, heads, _ = query.shape
    rows = [part.transpose(0, 1).flatten(0, 1) for part in (query, key, value)]
    sizes = [size for sample in stretches for size in sample]
    cuts = [sizes[start : start + MOST_STRETCHES] for start in range(0, len(sizes), MOST_STRETCHES)]
    parts = zip(*(row.split([sum(cut) for cut in cuts]) for row in rows), strict=True)
    out = [
        _attend(q, k, v, heads, "TND", dropout, list(accumulate(cut)))
        for (q, k, v), cut in zip(parts, cuts, strict=True)
    ]
    whole = out[0] if len(out) == 1 else torch.cat(out)
    return whole.view(samples, length, -1).transpose(0, 1)


def _plain(query: Tensor, key: Tensor, value: Tensor, stretches: Sequence[Sequence[int]]) -> Tensor:
    """The same in plain arithmetic, [s, b, heads*head_dim]."""
    rep = query.shape[2] // key.shape[2]
    q, k, v = (
        part.permute(1, 2, 0, 3) for part in (query, key.repeat_interleave(rep, 2), value.repeat_interleave(rep, 2))
    )
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    seen = torch.stack(list(_seen(stretches))).unsqueeze(1)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ v).permute(2, 0, 1, 3).flatten(2)


def _seen(stretches: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """For each sample [s, s], which keys a query may see."""
    for sample in stretches:
        yield torch.block_diag(*(torch.ones(size, size).tril() for size in sample)).bool()


def check(device: torch.device) -> None:
    """Against plain arithmetic on the host, with gradients: whole samples, and stretches. Raises ArithmeticError."""
    from megatron_telechat.backend.kernels import require_close

    s, b, heads, groups, dim = 48, 2, 4, 2, 64
    shapes = ((s, b, heads, dim), (s, b, groups, dim), (s, b, groups, dim), (s, b, heads * dim))
    for dtype in TYPES:
        generator = torch.Generator().manual_seed(1)
        query, key, value, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
        for stretches in (((s,), (s,)), ((17, 31), (1, 40, 7))):
            wide = [part.float().requires_grad_() for part in (query, key, value)]
            expected = _plain(wide[0], wide[1], wide[2], stretches)
            wanted = torch.autograd.grad(expected, wide, grad.float())
            heads_there = [part.to(device).requires_grad_() for part in (query, key, value)]
            if len(stretches[0]) == 1:
                found = causal(heads_there[0], heads_there[1], heads_there[2], 0.0)
            else:
                found = causal_within(heads_there[0], heads_there[1], heads_there[2], 0.0, stretches)
            require_close(found.detach().cpu(), expected.detach(), "attention")
            for one, other in zip(torch.autograd.grad(found, heads_there, grad.to(device)), wanted, strict=True):
                require_close(one.cpu(), other, "attention, back")
