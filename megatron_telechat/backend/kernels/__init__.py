"""Kernels in the place of chains of torch's: Triton's for CUDA in this package, torch_npu's in `ascend`.

Each module is imported on a device of its kind only, and has a ``check(device)`` that compares its kernels with plain
arithmetic. Where what it needs is not installed, cannot compile or is wrong, :func:`usable` says no, and whoever asked
does the same with torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from functools import lru_cache
from typing import Any

import torch

from megatron_telechat.device_kinds import DEVICE_KINDS, HOST

SWITCH = "MEGATRON_TELECHAT_KERNELS"
"""Environment variable: 0 takes torch's kernels instead; for comparisons, and where a compiler makes trouble."""

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What a module takes unless it has `TYPES` of its own."""

FAMILIES = {
    "triton": (__name__, ("sums", "rotary", "swiglu", "adding", "block_sums")),
    "torch_npu": (f"{__name__}.ascend", ("grouped", "attention", "blocks", "norm", "rotary", "swiglu")),
}
"""For each package that kernels need: where the modules are that use it, and their names. Modules of one name offer the
same functions."""


def kernels(name: str, like: torch.Tensor) -> Any | None:
    """The module of this name, where the device of such a tensor has it and it can be used; else None."""
    traits = DEVICE_KINDS.get(like.device.type)
    if traits is None or traits.fused_kernels is None or like.dtype not in TYPES:
        return None
    package, names = FAMILIES[traits.fused_kernels]
    if name not in names or not usable(name, like.device):
        return None
    module = importlib.import_module(f"{package}.{name}")
    return module if like.dtype in getattr(module, "TYPES", TYPES) else None


@lru_cache
def usable(name: str, device: torch.device) -> bool:
    """Whether what the kernels need is here and they pass their check on this device; a warning says why not."""
    needed = DEVICE_KINDS[device.type].fused_kernels
    if needed is None or os.environ.get(SWITCH) == "0" or importlib.util.find_spec(needed) is None:
        return False
    package, _ = FAMILIES[needed]
    try:
        # Whoever asks first may stand in a forward, in generation, or under another default device.
        with torch.inference_mode(False), torch.enable_grad(), torch.device(HOST):
            importlib.import_module(f"{package}.{name}").check(device)
    except Exception as error:  # whatever a compiler or a foreign kernel raises: the run goes on without it
        warnings.warn(
            f"the {needed} kernel '{name}' is not used ({type(error).__name__}: {error}); torch's kernels take its "
            "place",
            stacklevel=2,
        )
        return False
    return True


def require_close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Compare what a kernel computed with fp32 numbers, up to the rounding of its type.

    Raises:
        ArithmeticError: they differ by more, or have another shape.
    """
    if found.shape != expected.shape:
        raise ArithmeticError(f"{what} in {found.dtype} has the shape {tuple(found.shape)}")
    allowed = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[found.dtype]
    error = (found.float() - expected).abs().max() / expected.abs().max()
    if not error <= allowed:  # also NaN
        raise ArithmeticError(f"{what} in {found.dtype} is off by {error:.1e}")
