"""megatron-core 0.19 without triton.

``import megatron.core`` runs ``import triton`` there, which it does not declare: its pipeline schedules import the
kernels of paged activation stashing. CPU builds of torch, and Ascend's, bring no triton. This puts a stand-in in the
place of that one module; the kernels are never used here. Nothing else sees a change.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any, NoReturn

KERNELS = "megatron.core.transformer.moe.ops.paged_stash"


class _Kernel:
    """In the place of a triton kernel."""

    def __getitem__(self, grid: Any) -> NoReturn:
        raise RuntimeError("paged activation stashing needs triton, which is not installed")


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != KERNELS or triton_present():
            return None
        return importlib.machinery.ModuleSpec(fullname, _StandIn())

    def exec_module(self, module: types.ModuleType) -> None:
        names = {"paged_stash_copy_kernel": _Kernel(), "paged_stash_pop_kernel": _Kernel(), "GLOBAL_BLOCK_SIZE": 1024}
        module.__dict__.update(names, __all__=sorted(names))


def triton_present() -> bool:
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def let_core_import_without_triton() -> None:
    """Make ``import megatron.core`` work where triton is absent; nothing where it is there. Idempotent.

    For code that reads megatron-core before a `Backend` is installed, or without one: the rooms moe and model when they
    are imported, the data tools, tests. `Backend.install` does the same.
    """
    if not any(isinstance(finder, _StandIn) for finder in sys.meta_path):
        sys.meta_path.insert(0, _StandIn())
