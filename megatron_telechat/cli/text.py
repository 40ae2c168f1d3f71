"""Numbers and tables as a person reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_telechat.config.schema import ParallelConfig


def count_text(number: float) -> str:
    """39.33B, 4.19M, 12.3k, 512."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:g}"


def flop_text(number: float) -> str:
    """75.7 GFLOP, 318 PFLOP."""
    sizes = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"))
    size, letter = next((entry for entry in sizes if number >= entry[0]), (1e6, "M"))
    return f"{number / size:.3g} {letter}FLOP"


def gib(size_bytes: float) -> str:
    """Bytes as GiB, finer where they are few."""
    value = size_bytes / 2**30
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"


def context_text(parallel: ParallelConfig) -> str:
    """The context-parallel size and how its ranks exchange, such as 8 (a2a 2 x p2p 4, kept)."""
    heads, ring = parallel.context_sizes
    if heads * ring == 1:
        return "1"
    how = "p2p" if heads == 1 else f"a2a {heads} x p2p {ring}" if ring > 1 else "a2a"
    return f"{heads * ring} ({how}{', kept' * parallel.keeps_received})"


def ranges(numbers: Iterable[int]) -> str:
    """0-3, or 0,4,8, or 0-3,8-11: sorted numbers with the runs drawn together; a long list is cut short."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(low) if low == high else f"{low}-{high}" for low, high in runs]
    if len(texts) > 6:
        texts = [*texts[:3], "..", texts[-1]]
    return ",".join(texts)


def table(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,), gap: str = "  ") -> list[str]:
    """Rows of text as aligned lines; columns in `left` stand left, the others right. A row of one cell is printed as it
    is."""
    full = [row for row in rows if len(row) > 1]
    widths = [max(len(row[column]) for row in full) for column in range(len(full[0]))] if full else []
    lines = []
    for row in rows:
        if len(row) == 1:
            lines.append(row[0])
            continue
        cells = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append(gap.join(cells).rstrip())
    return lines
