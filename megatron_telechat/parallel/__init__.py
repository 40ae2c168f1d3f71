"""Process groups, coordinates, and ranks that agree and fail together.

`initialize` and its kin are imported on first use: `topology` is read by commands that never load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_telechat.lazy import lazy_names

if TYPE_CHECKING:
    from megatron_telechat.parallel.agreement import agree, all_ranks_ok, lost_ranks_reported, together
    from megatron_telechat.parallel.state import ParallelState, destroy, initialize

_DOORS = {
    "ParallelState": "state",
    "initialize": "state",
    "destroy": "state",
    "agree": "agreement",
    "all_ranks_ok": "agreement",
    "together": "agreement",
    "lost_ranks_reported": "agreement",
}

__all__ = ["ParallelState", "agree", "all_ranks_ok", "destroy", "initialize", "lost_ranks_reported", "together"]
__getattr__ = lazy_names(__name__, _DOORS)
