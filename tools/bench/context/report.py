"""Table, checks and plot of the rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from over_links import pyplot_to_files
from turns import Check, link_label

from context.summary import (
    AUTO,
    CONTROL,
    DOCUMENT_ZIGZAG,
    PARTS,
    PIECES,
    SHARDS_RING,
    TORCH_GATHER,
    TWO_D,
    ZIGZAG_RING,
    pieces_name,
)

# By link/computation ratio of a row, N = 2 or 4.
LIMIT_STAND_IN = {2: {0.6: 1.10, 1.2: 1.10, 2.6: 1.10}, 4: {0.6: 1.10, 1.2: 1.20, 2.6: 1.14}}
LIMIT_REAL = {0.6: 1.15, 1.2: 1.15, 2.6: 1.15}
HIDDEN_REAL = 0.85
AGAINST_RING = {0.6: 1.15, 1.2: 1.25, 2.6: 1.23}
AGAINST_TORCH = {0.6: 1.45, 1.2: 1.75, 2.6: 1.80}
AGAINST_CONTROL = {0.6: 1.30, 1.2: 1.45, 2.6: 1.20}
WITHIN_BEST = 1.05
TWO_D_RATIO, TWO_D_LIMIT = 2.35, 0.80
PACKED_RATIO = 1.2
AGAINST_DOCUMENT_ZIGZAG, AGAINST_SHARDS_RING = 3.0, 4.0
WIRE_LIMIT = 1.01
FP32_LIMIT, BF16_LIMIT = 1e-6, 1.25
BALANCE_LIMIT = 1.08
MEMORY_LIMIT = 2.5
LEAST_LINK = 0.1
"""Where transfers take less of the computation than this, the share that is hidden is noise over nothing."""


def mode_label(stand_in: float | None) -> str:
    return f"STAND-IN attention at {stand_in:g} GFLOP/s (products sleep)" if stand_in else "real products"


def table(row: Mapping[str, Any], mode: str) -> Iterator[str]:
    """Lines of one row."""
    auto = row["auto"]
    yield ""
    yield (
        f"{row['label']}: link/computation {row['ratio']:.2f} (link {row['link_ms']:.0f} ms, computation "
        f"{row['compute_ms']:.0f} ms; {link_label(row['mbit'])}), {mode}"
    )
    yield (
        f"  auto chose pieces {auto['pieces']}{', keep' if auto['keep'] else ''}, layout {auto['layout']}: "
        f"{auto['reason']}"
    )
    yield (
        f"  {'':20}{'forward':>9}{'backward':>10}{'total ms':>10}{'exposed':>9}{'/ limit':>9}{'hidden':>8}"
        f"{'/ auto':>8}{'card MB':>9}"
    )
    for name, arm in row["arms"].items():
        part = name in PARTS
        exposed = f"{arm['exposed_ms']:.0f}" if arm["exposed_ms"] and not part else ""
        limit = "" if part else f"{arm['over_limit']:.2f}"
        hidden = "" if part or row["link_ms"] < LEAST_LINK * row["compute_ms"] else f"{arm['hidden']:.0%}"
        card = f"{arm['interface_bytes'] / 1e6:.2f}" if arm["interface_bytes"] else ""
        yield (
            f"  {name:20}{arm['forward_ms']:>9.0f}{arm['backward_ms']:>10.0f}{arm['total_ms']:>10.0f}{exposed:>9}"
            f"{limit:>9}{hidden:>8}{arm['over_auto']:>7.2f}x{card:>9}"
        )


def balance_lines(balance: Mapping[Any, Mapping[str, Mapping[str, float]]]) -> Iterator[str]:
    """Layouts of packed rows, by arithmetic."""
    for ranks, layouts in balance.items():
        yield f"\nweb-like packed rows, {ranks} ranks: busiest over mean work (worst row); rows received over a ring's"
        for name, one in layouts.items():
            yield f"  {name:20}{one['work']:>8.2f} ({one['worst']:.2f}){one['traffic']:>8.2f}"


def checks(report: Mapping[str, Any]) -> Iterator[Check]:
    """What the attention over ranks must reach, for what the run measured."""
    for row in report["rows"]:
        yield from _packed_checks(row) if report["packed"] else _row_checks(row, report)
    wire = report["wire"]
    for kind in ("", " keep"):
        if wire[f"formula{kind}"]:
            yield Check(f"wire bytes{kind} over the formula", wire[f"counted{kind}"] / wire[f"formula{kind}"],
                        WIRE_LIMIT, at_least=False)  # fmt: skip
    errors = report["errors"]
    yield Check("fp32: largest relative error to fp64, in 1e-6", errors["fp32"] * 1e6, FP32_LIMIT * 1e6, at_least=False)
    yield Check("bf16: error over the kernel's on one rank", errors["bf16"] / errors["bf16 one rank"], BF16_LIMIT,
                at_least=False)  # fmt: skip
    for ranks, layouts in report["balance"].items():
        yield Check(f"packed rows, N={ranks}: work of the busiest rank over the mean, dealt", layouts["dealt"]["worst"],
                    BALANCE_LIMIT, at_least=False)  # fmt: skip


def _row_checks(row: Mapping[str, Any], report: Mapping[str, Any]) -> Iterator[Check]:
    arms, label, target = row["arms"], row["label"], row["target_ratio"]
    ranks, stand_in = report["shape"]["ranks"], report["stand_in_gflops"]
    auto = arms[AUTO]
    limits = LIMIT_STAND_IN.get(ranks, {}) if stand_in else LIMIT_REAL
    if target in limits:
        yield Check(f"{label}: time over max(computation, link)", auto["over_limit"], limits[target], at_least=False)
        yield Check(f"{label}: the control misses that", arms[CONTROL]["over_limit"], limits[target])
    if target is not None and not stand_in:
        yield Check(f"{label}: share of the exchange that is hidden", auto["hidden"], HIDDEN_REAL)
    for name, floors in ((ZIGZAG_RING, AGAINST_RING), (TORCH_GATHER, AGAINST_TORCH), (CONTROL, AGAINST_CONTROL)):
        if target in floors and name in arms and ranks == 2:
            yield Check(f"{label}: {name} over ours", arms[name]["over_auto"], floors[target])
    if target == TWO_D_RATIO and TWO_D in arms:
        direct = min(arms[pieces_name(pieces)]["total_ms"] for pieces in PIECES)
        yield Check(f"{label}: {TWO_D} over direct", arms[TWO_D]["total_ms"] / direct, TWO_D_LIMIT, at_least=False)
    if row["mbit"] is None:
        # Within the rounds, as all ratios of two arms: medians of their own differ by more between two equal arms.
        fastest = min(arm["over_auto"] for name, arm in arms.items() if name not in (AUTO, *PARTS))
        yield Check(f"{label}: auto over the best other", 1 / fastest, WITHIN_BEST, at_least=False)


def _packed_checks(row: Mapping[str, Any]) -> Iterator[Check]:
    arms, label = row["arms"], row["label"]
    if row["target_ratio"] == PACKED_RATIO:
        yield Check(
            f"{label}: {DOCUMENT_ZIGZAG} over ours", arms[DOCUMENT_ZIGZAG]["over_auto"], AGAINST_DOCUMENT_ZIGZAG
        )
        yield Check(f"{label}: {SHARDS_RING} over ours", arms[SHARDS_RING]["over_auto"], AGAINST_SHARDS_RING)


def memory_check(peaks: Mapping[str, float]) -> Check:
    """What ours must save."""
    return Check("memory: all-gather over ours", peaks["all-gather"] / peaks["ours 2 pieces"], MEMORY_LIMIT)


def plot(path: Path, rows: Sequence[Mapping[str, Any]], mode: str) -> None:
    """Time of each arm over max(computation, link), a group of bars a row.

    Raises:
        ImportError: matplotlib is not installed; the message has the line that installs it.
    """
    pyplot = pyplot_to_files()
    names = [name for name in rows[0]["arms"] if name not in PARTS]
    figure, axes = pyplot.subplots(figsize=(9, 4.4))
    width = 0.86 / len(names)
    for number, name in enumerate(names):
        places = [place + (number + 0.5) * width - 0.43 for place in range(len(rows))]
        heights = [row["arms"][name]["over_limit"] for row in rows]
        ours = name.startswith("ours")
        color = pyplot.get_cmap("Blues" if ours else "autumn")(0.95 - 0.08 * number if ours else number / len(names))
        axes.bar(places, heights, width, color=color, label=name)
    axes.axhline(1.0, color="black", linewidth=1, linestyle=":")
    labels = [f"link/computation {row['ratio']:.2f}\n({link_label(row['mbit'])})" for row in rows]
    axes.set_xticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylabel("time / max(computation, link)")
    axes.set_title(f"Attention over ranks, forward and backward, {mode}", fontsize=9)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
