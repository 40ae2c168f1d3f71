"""megatron-core's data code, for processes with or without a backend."""

from __future__ import annotations

import importlib
from typing import Any

from megatron_telechat.backend.triton_guard import let_core_import_without_triton


def core_datasets(module: str) -> Any:
    """A module of ``megatron.core.datasets``; a tool that installs no backend may read it, too. Loads torch."""
    let_core_import_without_triton()
    return importlib.import_module(f"megatron.core.datasets.{module}")
