"""Table, checks and plot of the rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from over_links import pyplot_to_files
from turns import Check, link_label

from overlap.rows import AUTO, CONTROL, CORE, FIXED

# At k=4 against k=1, by the link/FFN ratio that a row aims at.
FLOORS = {0.5: 1.25, 1.0: 1.45, 1.8: 1.70}
FLOOR_AGAINST_CORE = 1.45  # at ratio 1
WITHIN = 0.97
WIRE_LIMIT = 1.01
CHECKED_CHUNKS = "k=4"


def mode_label(stand_in: float | None) -> str:
    return f"STAND-IN experts at {stand_in:g} GFLOP/s (products sleep)" if stand_in else "real matrix products"


def table(row: Mapping[str, Any], mode: str, wire: Mapping[str, int]) -> Iterator[str]:
    """Lines of one row."""
    yield ""
    yield f"{row['label']}: link/FFN {row['ratio']:.2f} ({link_label(row['mbit'])}), {mode}"
    yield (
        f"  limit of many chunks: {row['ideal_ms']:.1f} ms, {row['ideal_gain']:.2f}x of serial, "
        f"{row['ideal_gain_of_k1']:.2f}x of k=1"
    )
    yield f"  auto chose {row['auto']['num_chunks']}: {row['auto']['reason']}"
    yield (
        f"  {'':20}{'forward':>9}{'backward':>10}{'total ms':>10}{'exposed':>9}{'/ k=1':>8}{'/ serial':>10}"
        f"{'/ core':>8}{'ideal':>8}{'wire MB':>9}{'card MB':>9}"
    )
    for name, arm in row["arms"].items():
        part = name.startswith("only-")
        exposed = "" if arm["exposed_ms"] is None or part else f"{arm['exposed_ms']:.1f}"
        gains = ["" if part else f"{arm[f'against_{other}']:.2f}x" for other in ("k1", "serial", "core")]
        share = "" if part else f"{arm['share_of_ideal']:.0%}"
        sent = f"{wire[name] / 1e6:.2f}" if name in wire else ""
        card = f"{arm['interface_bytes'] / 1e6:.2f}" if arm["interface_bytes"] else ""
        yield (
            f"  {name:20}{arm['forward_ms']:>9.1f}{arm['backward_ms']:>10.1f}{arm['total_ms']:>10.1f}{exposed:>9}"
            f"{gains[0]:>8}{gains[1]:>10}{gains[2]:>8}{share:>8}{sent:>9}{card:>9}"
        )


def checks(rows: Sequence[Mapping[str, Any]], wire: Mapping[str, int]) -> Iterator[Check]:
    """What the expert block must reach, for the rows that there are."""
    for row in rows:
        arms, label, target = row["arms"], row["label"], row["target_ratio"]
        fixed = {name: arm for name, arm in arms.items() if name.startswith("k=")}
        if target in FLOORS and CHECKED_CHUNKS in arms:
            floor = FLOORS[target]
            limit = f"limit {row['ideal_gain_of_k1']:.2f}"
            yield Check(f"{label}: {CHECKED_CHUNKS} against k=1 ({limit})", arms[CHECKED_CHUNKS]["against_k1"], floor)
            yield Check(f"{label}: {CHECKED_CHUNKS} against serial", arms[CHECKED_CHUNKS]["against_serial"], floor)
            yield Check(
                f"{label}: the negative control misses that", arms[CONTROL]["against_serial"], floor, at_least=False
            )
        if target == 1.0 and CHECKED_CHUNKS in arms:
            yield Check(
                f"{label}: {CHECKED_CHUNKS} against {CORE}", arms[CHECKED_CHUNKS]["against_core"], FLOOR_AGAINST_CORE
            )
        yield Check(f"{label}: k=1 against {CORE}", arms["k=1"]["against_core"], WITHIN)
        best = min(arm["total_ms"] for arm in fixed.values())
        yield Check(f"{label}: auto against the best fixed k", best / arms[AUTO]["total_ms"], WITHIN)
        if row["mbit"] is None:
            yield Check(f"{label}: auto against k=1", arms[AUTO]["against_k1"], WITHIN)
    for k in FIXED[1:]:
        if f"k={k}" in wire:
            yield Check(f"wire bytes of k={k} over k=1", wire[f"k={k}"] / wire["k=1"], WIRE_LIMIT, at_least=False)


def plot(path: Path, rows: Sequence[Mapping[str, Any]], mode: str) -> None:
    """Gain over k=1 against the number of chunks, with the limit of each row.

    Raises:
        ImportError: matplotlib is not installed; the message has the line that installs it.
    """
    pyplot = pyplot_to_files()
    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for number, row in enumerate(rows):
        color = f"C{number}"
        points = {int(name[2:]): arm["against_k1"] for name, arm in row["arms"].items() if name.startswith("k=")}
        label = f"link/FFN {row['ratio']:.2f}" + ("" if row["mbit"] else " (no limit)")
        axes.plot(list(points), list(points.values()), "o-", color=color, label=label)
        axes.axhline(row["ideal_gain_of_k1"], color=color, linestyle=":", linewidth=1)
        axes.plot([row["auto"]["num_chunks"]], [row["arms"][AUTO]["against_k1"]], "*", color=color, markersize=13)
    axes.set_xscale("log", base=2)
    axes.set_xticks(FIXED, [str(k) for k in FIXED])
    axes.set(xlabel="chunks", ylabel="times as fast as one chunk")
    axes.set_title(f"Forward and backward of the block, {mode}", fontsize=9)
    axes.legend(title="dotted: limit; star: auto")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
