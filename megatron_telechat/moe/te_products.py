"""TransformerEngine's grouped product for gradients of weights: it adds 16-bit products into an fp32 buffer.

torch's ``grouped_mm`` returns a 16-bit gradient of all experts, which then has to be added; this writes nothing but the
sum.
"""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from megatron_telechat.backend import traits_of
from megatron_telechat.device_kinds import HOST

Accumulate = Callable[[Tensor, Tensor, Tensor, Sequence[int], bool], None]
"""``f(buffer, a, b, counts, fresh)``: buffer[e] (+)= a_e^T b_e; buffer [experts, p, q] fp32, a [rows, p], b [rows, q],
rows by expert."""


@lru_cache
def accumulating_product(device: torch.device, dtype: torch.dtype) -> Accumulate | None:
    """The product, if TransformerEngine is installed, the types suit it, and it passes a test on this device:
    once a process.

    Its function is not a public interface and has changed its arguments between releases: it is tried on a small
    case, and left out with a warning when it fails or is wrong.
    """
    if not traits_of(device).transformer_engine or dtype not in (torch.bfloat16, torch.float16):
        return None
    if importlib.util.find_spec("transformer_engine") is None:
        return None
    try:
        product = _product()
        _check(product, device, dtype)
    except Exception as error:  # whatever a foreign internal function raises: the run goes on without it
        warnings.warn(
            f"TransformerEngine's grouped product is not used ({type(error).__name__}: {error}); weight gradients of "
            "the experts are added in a pass of their own",
            stacklevel=2,
        )
        return None
    return product


def _product() -> Accumulate:
    from transformer_engine.pytorch.cpp_extensions import (  # pyright: ignore[reportMissingImports] - optional
        general_grouped_gemm,
    )

    known = inspect.signature(general_grouped_gemm).parameters
    version_options: dict[str, Any] = {}
    if "workspaces" in known:  # before 2.10
        from transformer_engine.pytorch.module.base import (  # pyright: ignore[reportMissingImports] - optional
            get_multi_stream_cublas_workspace,
        )

        version_options["workspaces"] = get_multi_stream_cublas_workspace()

    def accumulate(buffer: Tensor, a: Tensor, b: Tensor, counts: Sequence[int], fresh: bool) -> None:
        options = dict(version_options)
        if "quantization_params" in known:  # since 2.11
            options["quantization_params"] = [None] * len(counts)
        general_grouped_gemm(
            list(b.split(list(counts))),
            list(a.split(list(counts))),
            list(buffer.unbind()),
            out_dtype=a.dtype,
            layout="NT",
            grad=True,
            m_splits=list(counts),
            accumulate=not fresh,
            use_split_accumulator=True,
            **options,
        )

    return accumulate


def _check(product: Accumulate, device: torch.device, dtype: torch.dtype) -> None:
    """Two experts and one without rows, added to and replaced."""
    counts, generator = (32, 0, 16), torch.Generator().manual_seed(0)
    # Drawn on the CPU, whose generator this is: the model is built with another default device.
    a, b = (torch.randn(sum(counts), width, generator=generator, device=HOST).to(device, dtype) for width in (64, 32))
    expected = torch.stack([x.float().t() @ y.float() for x, y in zip(a.split(counts), b.split(counts), strict=True)])
    for fresh in (True, False):
        buffer = torch.ones(expected.shape, device=device)
        product(buffer, a, b, counts, fresh)
        error = (buffer - (expected if fresh else expected + 1)).norm() / expected.norm()
        if not error < 1e-2:
            raise ArithmeticError(f"it is off by {float(error):.1e}")
