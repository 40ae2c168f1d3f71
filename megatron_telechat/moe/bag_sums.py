"""Sums of groups of rows on CUDA, as one Triton kernel.

torch's ``embedding_bag`` moved bf16 rows of 4096 at a tenth of the rate of a copy (H200, torch 2.11). Here each program sums a
part of the columns of one group. Both add the rows of a group in order, in fp32: the bits are the same.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import lru_cache
from typing import Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

BagSums = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``f(rows, bags, starts)``, see `engine.sum_bags`."""


def torch_sums(rows: Tensor, bags: Tensor, starts: Tensor) -> Tensor:
    """By torch."""
    return F.embedding_bag(bags, rows, starts, mode="sum")


@lru_cache
def fast_sums(index: Optional[int]) -> BagSums:
    """The kernel, if Triton is installed and the kernel passes a test on this CUDA device; else torch's.

    Triton compiles with the compiler of the machine; what it lacks, a warning says once a process, and the run goes on.
    """
    if importlib.util.find_spec("triton") is None:
        return torch_sums
    try:
        from megatron_telechat.moe.bag_sums_triton import triton_sums

        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            check_sums(triton_sums, torch.device("cuda", index), dtype)
    except Exception as error:  # whatever a compiler raises
        warnings.warn(
            f"Triton's kernel for sums of rows is not used ({type(error).__name__}: {error}); torch's takes its place"
        )
        return torch_sums
    return triton_sums


def check_sums(sums: BagSums, device: torch.device, dtype: torch.dtype) -> None:
    """Groups of none, one and several rows, at the end too, to the bit.

    Raises:
        ArithmeticError: a sum is wrong.
    """
    groups = [[4], [], [0, 2, 3], [2], [1, 4], []]
    bags = torch.tensor([row for group in groups for row in group], dtype=torch.int32, device=device)
    starts = torch.tensor(
        [sum(map(len, groups[:number])) for number in range(len(groups))], dtype=torch.int32, device=device
    )
    rows = torch.arange(5 * 1032, device=device, dtype=torch.float32).sin().view(5, -1).to(dtype)
    expected = torch.zeros(len(groups), rows.shape[1], device=device)
    for total, group in zip(expected, groups):
        for row in group:
            total += rows[row]
    if not torch.equal(sums(rows, bags, starts), expected.to(dtype)):
        raise ArithmeticError(f"wrong sums in {dtype}")
