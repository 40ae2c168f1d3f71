"""Names of the arms, and what their times come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

AUTO, KEEP, CONTROL = "ours auto", "ours keep", "control"
ONLY_COMPUTE, ONLY_LINK = "only-compute", "only-link"
ULYSSES, TWO_D = "Ulysses", "2D"
ZIGZAG_RING, REVERSED_RING, ALL_GATHER = "zigzag ring", "TE ring", "all-gather"
TORCH_GATHER, TORCH_ROTATE = "torch all-gather", "torch all-to-all"
DOCUMENT_ZIGZAG, DOCUMENT_REVERSED, SHARDS_RING = "per-document zigzag", "per-document TE", "ring of shards"
PARTS = (ONLY_COMPUTE, ONLY_LINK)
PIECES = (1, 2, 4)


def pieces_name(pieces: int) -> str:
    return f"ours {pieces} piece{'s' if pieces > 1 else ''}"


def summary(times: Mapping[str, Sequence[tuple[float, ...]]]) -> dict[str, Any]:
    """Medians in ms, and ratios within the rounds.

    With C the computation and L the transfers alone, each in one piece, one after the other takes C + L, and little is
    faster than max(C, L). The share of an arm that is hidden is what it saves against C + L, over min(C, L).
    """
    medians = {name: [median(column) for column in zip(*runs, strict=True)] for name, runs in times.items()}
    compute, link = (medians[name][2] for name in PARTS)
    limit = max(compute, link)

    def ratio(name: str, other: str) -> float:
        """How many times as long as the other, in the median of the rounds."""
        return median(ours[2] / theirs[2] for ours, theirs in zip(times[name], times[other], strict=True))

    arms = {}
    for name, (forward, backward, total, exposed, sent) in medians.items():
        arms[name] = {
            "forward_ms": forward * 1e3,
            "backward_ms": backward * 1e3,
            "total_ms": total * 1e3,
            "exposed_ms": exposed * 1e3,
            "interface_bytes": int(sent),
            "over_limit": total / limit,
            "hidden": (compute + link - total) / min(compute, link),
            "over_auto": ratio(name, AUTO),
            "samples_ms": [run[2] * 1e3 for run in times[name]],
        }
    return {"ratio": link / compute, "compute_ms": compute * 1e3, "link_ms": link * 1e3, "arms": arms}
