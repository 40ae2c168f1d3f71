"""Process groups, coordinates, and ranks that agree and fail together.

`initialize` and its kin are imported on first use: `topology` is read by commands that never load torch.
"""

from __future__ import annotations

from typing import Any

_DOORS = {
    "ParallelState": "state",
    "initialize": "state",
    "destroy": "state",
    "agree": "agreement",
    "all_ranks_ok": "agreement",
    "together": "agreement",
    "lost_ranks_reported": "agreement",
}

__all__ = sorted(_DOORS)


def __getattr__(name: str) -> Any:
    if name not in _DOORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_DOORS[name]}"), name)
