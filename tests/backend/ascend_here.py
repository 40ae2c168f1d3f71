"""The way of an Ascend device on the CPU: its answers, and the stand-in for torch_npu behind its kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from megatron_telechat import device_kinds
from megatron_telechat.backend import grouped, kernels
from megatron_telechat.device_kinds import DEVICE_KINDS, HOST
from tests.backend import torch_npu_stand_in

PACKAGE = f"{kernels.__name__}.ascend."
OF_THE_KERNELS = (
    "fused_kernels", "fused_rms_norm", "expert_engine", "grouped_mm_types", "sums_by_embedding_bag"
)  # fmt: skip
"""Answers that decide which arithmetic runs; where tensors are and how ranks talk stays the CPU's."""


def forget() -> None:
    """Every kernel is checked anew, and imports torch_npu anew."""
    kernels.usable.cache_clear()
    grouped._one_kernel.cache_clear()
    for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
        del sys.modules[name]


@contextmanager
def ascend_here(**broken: Callable) -> Iterator[None]:
    """Inside, tensors on the CPU take the kernels of an Ascend device.

    Args:
        broken: functions of torch_npu to put in the place of the stand-in's.
    """
    module = torch_npu_stand_in.module()
    for name, function in broken.items():
        setattr(module, name, function)
    answers = {name: getattr(DEVICE_KINDS["npu"], name) for name in OF_THE_KERNELS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(device_kinds.DEVICE_KINDS, HOST, replace(DEVICE_KINDS[HOST], **answers))  # type: ignore[arg-type]
        patch.setitem(sys.modules, "torch_npu", module)
        forget()
        try:
            yield
        finally:
            forget()
