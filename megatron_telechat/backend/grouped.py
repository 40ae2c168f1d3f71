"""Products of the rows of each expert with its own matrix, for all experts, without a copy to the host.

torch's ``grouped_mm`` multiplies the types of `DeviceTraits.grouped_mm_types` in one kernel, on CUDA with compute
capability 9 or 10. For everything else it copies the group sizes to the host, in every product, and loops (torch 2.10
to 2.13, ``_grouped_mm_cuda`` in GroupedBlas.cpp). Whoever calls here has the sizes on the host: the loop needs no copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_telechat.backend.base import traits_of
from megatron_telechat.backend.kernels import kernels

CAPABILITIES = (9, 10)
"""Compute capabilities, without their minor number, that torch has the kernel for."""


def grouped_product(a: Tensor, b: Tensor, offsets: Tensor, counts: Sequence[int]) -> Tensor:
    """[N, q]: the rows of every group times its own matrix.

    Args:
        a: [N, p], rows by group.
        b: [groups, p, q], contiguous or a view with the last two axes exchanged.
        offsets: [groups] int32, where the rows of each group end; on the device.
        counts: rows of each group, on the host; they sum to N.
    """
    fused = kernels("grouped", a)
    if fused is not None:
        return fused.product(a, b, offsets)
    if _one_kernel(a.device, a.dtype):
        return F.grouped_mm(a, b, offs=offsets)
    out = a.new_empty(a.shape[0], b.shape[2])
    for group, (rows, result) in enumerate(zip(a.split(list(counts)), out.split(list(counts)), strict=True)):
        if counts[group]:
            torch.mm(rows, b[group], out=result)
    return out


def grouped_sum_product(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor | None:
    """[groups, p, q]: ``a_g^T b_g`` of every group; None where no kernel does it.

    Args:
        a: [N, p], rows by group; every group has some: torch's kernel has left the matrix of an empty one unwritten,
            written NaN into it or hung, depending on card and release (pytorch issues 172439, 193633, 152668).
        b: [N, q].
        offsets: as in :func:`grouped_product`.
    """
    fused = kernels("grouped", a)
    if fused is not None:
        return fused.sum_product(a, b, offsets)
    if not _one_kernel(a.device, a.dtype):
        return None
    return F.grouped_mm(a.t(), b, offs=offsets)


def add_grouped_sum_product(buffer: Tensor, a: Tensor, b: Tensor, offsets: Tensor, fresh: bool) -> bool:
    """``buffer[g] += a_g^T b_g`` of every group, where a kernel adds into such a buffer.

    Args:
        buffer: [groups, p, q]; replaced if `fresh`.
        a, b, offsets: as in :func:`grouped_sum_product`.
        fresh: the buffer holds nothing yet.

    Returns:
        Whether it was done.
    """
    fused = kernels("grouped", a)
    if fused is None or not fused.accumulates(buffer, a):
        return False
    fused.accumulate(buffer, a, b, offsets, fresh)
    return True


@lru_cache
def _one_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch multiplies all groups of this type in one kernel."""
    traits = traits_of(device)
    if str(dtype).removeprefix("torch.") not in traits.grouped_mm_types:
        return False
    if traits.torch_cuda != "native" or not torch.cuda.is_available():
        return True
    return torch.cuda.get_device_capability(device)[0] in CAPABILITIES
