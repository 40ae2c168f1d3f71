"""A picture of what the computation and the link did, from the spans of a clock."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from over_links import pyplot_to_files

from megatron_telechat.parallel.clock import Span

LABELLED_US = 9000.0
"""Shorter spans have no room for their letters; microseconds."""


def add_arguments(parser: argparse.ArgumentParser, mbit: float, what: str) -> None:
    """The options of every picture.

    Args:
        mbit: default rate of the links.
        what: sleeps in place of the real products.
    """
    parser.add_argument("--links", action="store_true", help="make throttled links, run, remove them")
    parser.add_argument("--mbit", type=float, default=mbit, help="rate of the links")
    parser.add_argument("--stand-in", type=float, metavar="GFLOPS", help=f"{what} sleep flops / rate")
    parser.add_argument("--plot", type=Path, required=True)


def draw_rank_0(
    options: argparse.Namespace,
    trace: Callable[[argparse.Namespace], Sequence[Span]],
    colours: Mapping[str, str],
    title: str,
) -> int:
    """What each rank does: trace, and draw on rank 0; the exit code.

    Args:
        options: with those of :func:`add_arguments`.
        trace: spans of one forward and backward on this rank; collective.
        title: of the picture; the link and the products are added.
    """
    spans = trace(options)
    if os.environ["RANK"] == "0":
        products = f"stand-in products at {options.stand_in:g} GFLOP/s" if options.stand_in else "real products"
        link = f"{options.mbit:g} Mbit/s" if options.links else "no limit"
        draw(options.plot, spans, colours, f"{title}, {link}, {products}")
    return 0


def draw(path: Path, spans: Sequence[Span], colours: Mapping[str, str], title: str) -> None:
    """Forward and backward, each with a row of the computation and one of the link.

    Transfers that share the link are drawn one after another, in the order in which they ended: from the end of the one
    before, or from its start if the link was free.

    Args:
        spans: of one forward and backward on one rank.
        colours: by name of a span; others are left out.
    """
    figure, axes = pyplot_to_files().subplots(2, 1, figsize=(11, 4.6), layout="constrained")
    for axis, backward in zip(axes, (False, True), strict=True):
        mine = [span for span in spans if span.backward == backward and span.name in colours]
        origin = min(span.start_us for span in mine)
        free = 0.0
        for span in sorted(mine, key=lambda span: span.end_us):
            start, end = span.start_us - origin, span.end_us - origin
            if span.track == "link":
                start, free = max(start, free), end
            height = 1 if span.track == "compute" else 0
            axis.barh(
                height, (end - start) / 1e3, left=start / 1e3, height=0.8, color=colours[span.name], edgecolor="white"
            )
            if end - start > LABELLED_US:
                axis.text(
                    (start + end) / 2e3,
                    height,
                    span.name if span.chunk is None else f"{span.name}{span.chunk}",
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="white",
                )
        axis.set_xlim(left=0)
        axis.set_yticks((0, 1), ("link", "compute"))
        axis.set_title("backward" if backward else "forward", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_xlabel("ms")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
