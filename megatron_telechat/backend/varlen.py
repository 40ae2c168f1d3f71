"""Attention within the stretches of a packed micro-batch, all of them in one call of torch's varlen_attn.

Its kernel is FlashAttention's: 16-bit types, causal, query groups, no dropout, and deterministic where torch is asked
to be.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from megatron_telechat.backend.base import traits_of

_TYPES = (torch.bfloat16, torch.float16)
_MAX_HEAD, _HEAD_MULTIPLE = 256, 8
"""Head widths that the kernel takes; scaled_dot_product_attention pads others, varlen_attn does not."""


def takes(query: Tensor) -> bool:
    """Whether :func:`attend` can be used for such heads, [..., head_dim], on their device."""
    width = query.shape[-1]
    return (
        traits_of(query.device).varlen_attention
        and query.dtype in _TYPES
        and width <= _MAX_HEAD
        and width % _HEAD_MULTIPLE == 0
        and usable(query.device)
    )


def attend(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """[t, heads, head_dim], causal within each stretch.

    Args:
        query: [t, heads, head_dim] of all stretches, one after another.
        key, value: [t, groups, head_dim].
        bounds: int32 [stretches + 1] on the device: 0, and where each stretch ends.
        longest: tokens of the longest stretch.
    """
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        window_size=(-1, 0),  # everything to the left, nothing to the right
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor), "no further results were asked for"
    return out


def has_arguments() -> bool:
    """Whether the installed torch has a varlen_attn that :func:`attend` can call: one that knows query groups."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()


@lru_cache
def usable(device: torch.device) -> bool:
    """Whether torch has the function, and it passes its check on this device; a warning says what went wrong."""
    if not has_arguments():
        return False
    try:
        with torch.enable_grad():
            check(device)
    except Exception as error:  # whatever a kernel raises: the run goes on without it
        reason = [*str(error).strip().splitlines(), ""][0]
        warnings.warn(
            f"torch's varlen_attn is not used ({type(error).__name__}: {reason}); each document of a packed sample is "
            "a call of its own",
            stacklevel=2,
        )
        return False
    return True


def check(device: torch.device) -> None:
    """Output and gradients against plain fp32 products, one stretch after another. Raises ArithmeticError."""
    lengths, heads, groups, width = (3, 1, 20), 4, 2, 16
    total = sum(lengths)
    bounds = torch.tensor([0, *(sum(lengths[: n + 1]) for n in range(len(lengths)))], dtype=torch.int32, device=device)
    for dtype in _TYPES:
        counts = ((1, heads), (2, groups), (3, groups))
        parts = [_numbers((total, count, width), seed, device, dtype) for seed, count in counts]
        grad = _numbers((total, heads, width), 4, device, dtype)
        found = _with_gradients(parts, grad, partial(attend, bounds=bounds, longest=max(lengths)))
        exact = [part.detach().float() for part in parts]
        wanted = _with_gradients(exact, grad.float(), partial(_plain, lengths=lengths))
        for one, other in zip(found, wanted, strict=True):
            error = float((one.float() - other).norm() / other.norm())
            if not error < 2e-2:  # also NaN
                raise ArithmeticError(f"it is off by {error:.1e} in {dtype}")


def _numbers(shape: tuple[int, ...], seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Without a random generator: nothing of the run's may move."""
    numbers = torch.arange(math.prod(shape), device=device, dtype=torch.float32)
    return (numbers * (0.7 + seed)).sin().view(shape).to(dtype)


def _with_gradients(parts: Sequence[Tensor], grad: Tensor, function: Callable[..., Tensor]) -> list[Tensor]:
    leaves = [part.detach().clone().requires_grad_() for part in parts]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _plain(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    outs = []
    for q, k, v in zip(*(part.split(lengths) for part in (query, key, value)), strict=True):
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        allowed = torch.ones_like(scores[0], dtype=torch.bool).tril()
        outs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -math.inf).softmax(-1), v))
    return torch.cat(outs)
