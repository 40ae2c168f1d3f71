"""A frontier of a sweep as a picture: seconds of a step against memory or ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_telechat.cli.plot_run import new_figure, save_figure, style

LABELS = {"memory": "GiB of a device", "ranks": "ranks"}


def draw_frontier(points: Sequence[tuple[float, float]], output: Path, title: str, kind: str) -> None:
    """Draw the frontier.

    Args:
        points: (GiB or ranks, seconds of the fastest step).
        kind: memory or ranks.

    Raises:
        ConfigError: matplotlib is missing, or the suffix is no picture format.
        ResourceError: the picture cannot be written.
    """
    figure, axes = new_figure([["step"]], (7, 4), (1.0,))
    ordered = sorted(points)
    axis = axes["step"]
    axis.plot([at for at, _ in ordered], [seconds for _, seconds in ordered], marker="o", color="#2563eb")
    style(axis, f"{title}: seconds of the fastest step")
    axis.set_xlabel(LABELS[kind])
    axis.set_ylim(bottom=0)
    save_figure(figure, output, "--plot")
