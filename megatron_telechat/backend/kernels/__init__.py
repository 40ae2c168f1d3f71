"""Triton kernels for CUDA, in the place of chains of torch's element-wise ones: `sums`, `rotary`, `swiglu`, `adding`.

Each module is imported on a CUDA device only, and has a ``check(device)`` that compares the kernel with torch. Where
Triton is not installed, cannot compile or is wrong, :func:`usable` says no, and whoever asked does the same with torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from functools import lru_cache
from typing import Any

import torch

SWITCH = "MEGATRON_TELECHAT_KERNELS"
"""Environment variable: 0 takes torch's kernels instead; for comparisons, and where a compiler makes trouble."""

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels(name: str, like: torch.Tensor) -> Any | None:
    """The module of this name in this package, where its kernels can be used for such a tensor; else None."""
    if like.device.type != "cuda" or like.dtype not in TYPES or not usable(name, like.device.index):
        return None
    return importlib.import_module(f"{__name__}.{name}")


@lru_cache
def usable(name: str, index: int | None) -> bool:
    """Whether Triton is here and the kernels pass their check on this CUDA device; a warning says why not."""
    if os.environ.get(SWITCH) == "0" or importlib.util.find_spec("triton") is None:
        return False
    try:
        importlib.import_module(f"{__name__}.{name}").check(torch.device("cuda" if index is None else f"cuda:{index}"))
    except Exception as error:  # whatever a compiler raises: the run goes on without it
        warnings.warn(
            f"the Triton kernel '{name}' is not used ({type(error).__name__}: {error}); torch's kernels take its place",
            stacklevel=2,
        )
        return False
    return True


def require_close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Compare what a kernel computed with fp32 numbers, up to the rounding of its type.

    Raises:
        ArithmeticError: they differ by more.
    """
    allowed = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[found.dtype]
    error = (found.float() - expected).abs().max() / expected.abs().max()
    if not error <= allowed:  # also NaN
        raise ArithmeticError(f"{what} in {found.dtype} is off by {error:.1e}")
