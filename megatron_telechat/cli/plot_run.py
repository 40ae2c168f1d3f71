"""Pictures of runs: loss, gradient norm, throughput, expert load, out of metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_telechat.cli.tool import ToolParser, run_tool
from megatron_telechat.errors import EXIT_OK, ConfigError, ResourceError
from megatron_telechat.training.metrics_file import Metrics, read_metrics

COLORS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#0891b2")
INK, GRID = "#334155", "#e2e8f0"
SMOOTHED_FROM = 40
"""Points from which on a running mean is drawn over the raw curve."""


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("drawing needs matplotlib, which is not installed", fix='pip install -e ".[plot]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def new_figure(
    mosaic: list[list[str]], size: tuple[float, float], rows: tuple[float, ...]
) -> tuple[Any, dict[str, Any]]:
    """A figure and its axes by name; `rows`: heights in proportion.

    Raises:
        ConfigError: matplotlib is missing.
    """
    return _pyplot().subplot_mosaic(mosaic, figsize=size, layout="constrained", height_ratios=rows)


def save_figure(figure: Any, output: Path, flag: str) -> None:
    """Write a figure and close it; `flag` names the file on the command line.

    Raises:
        ConfigError: the suffix is no picture format.
        ResourceError: the picture cannot be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=150, facecolor="white")
    except OSError as error:
        raise ResourceError(
            f"cannot write {output}: {error.strerror}", flag, "name a folder you may write to"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"cannot draw to {output}: {error}", flag, "a name that ends in .png, .svg or .pdf"
        ) from error
    finally:
        _pyplot().close(figure)


def running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Mean of each value and its `reach` neighbours on both sides; values that are not finite are left out."""
    means = []
    for middle in range(len(values)):
        seen = [value for value in values[max(0, middle - reach) : middle + reach + 1] if math.isfinite(value)]
        means.append(sum(seen) / len(seen) if seen else math.nan)
    return means


def _curve(
    axes: Any, steps: list[int], values: list[float], color: str, label: str | None, smooth: bool = True
) -> None:
    if smooth and len(values) >= SMOOTHED_FROM:
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
        values = running_mean(values, max(len(values) // 60, 2))
    axes.plot(steps, values, color=color, linewidth=1.6, label=label)


def style(axes: Any, title: str) -> None:
    """Title, grid and frame as all our pictures have them."""
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8.5, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)
    axes.margins(x=0.02)


VALIDATION = {
    "valid_loss": "validation",
    "valid_loss_ema": "validation (ema)",
    "valid_loss_window": "validation (window)",
}
"""Key of a record → what was evaluated; where there are several runs, the first of each."""


def _draw_loss(axes: Any, runs: Sequence[Metrics]) -> None:
    several = len(runs) > 1
    for run, color in zip(runs, _colors(runs), strict=False):
        _curve(axes, *run.series("loss"), color, run.name if several else "train")
        for number, (key, label) in enumerate(VALIDATION.items(), 1):
            steps, values = run.series(key, "valid")
            if steps and (number == 1 or not several):
                axes.plot(steps, values, color=color if several else COLORS[number], linestyle="--", linewidth=1.2,
                          marker="o", markersize=3.5, label=None if several else label)  # fmt: skip
        for number, step in enumerate(run.resumes):
            label = "resumed" if number == 0 and not several else None
            axes.axvline(step, color=color if several else INK, linestyle=":", linewidth=1.2, alpha=0.8, label=label)
    style(axes, "Loss")
    axes.legend(frameon=False, fontsize=8.5, labelcolor=INK)


def _draw_key(key: str, title: str, scale: float = 1.0, smooth: bool = True, floor: float | None = None) -> Callable:
    def draw(axes: Any, runs: Sequence[Metrics]) -> None:
        for run, color in zip(runs, _colors(runs), strict=False):
            steps, values = run.series(key)
            _curve(axes, steps, [value * scale for value in values], color, None, smooth)
        style(axes, title)
        if floor is not None:
            axes.set_ylim(bottom=floor)

    return draw


WAITS = {"a2a_exposed": "experts", "cp_exposed": "attention"}
"""Key of a record → whose exchange it is."""


def _draw_throughput(axes: Any, runs: Sequence[Metrics]) -> None:
    largest = max((max(values) for _, values in (run.series("tokens_per_s") for run in runs) if values), default=0.0)
    scale, unit = (1e-3, "thousand tokens / s") if largest >= 5000 else (1.0, "tokens / s")
    _draw_key("tokens_per_s", f"Throughput, {unit}", scale, floor=0)(axes, runs)
    utilised = [value for run in runs for value in run.series("mfu")[1] if math.isfinite(value)]
    if len(runs) == 1 and utilised:
        middle = sorted(utilised)[len(utilised) // 2]
        axes.text(0.98, 0.06, f"median MFU {middle:.1%}", transform=axes.transAxes, ha="right", fontsize=8.5, color=INK)


def _colors(runs: Sequence[Metrics]) -> list[str]:
    return [COLORS[number % len(COLORS)] for number in range(len(runs))]


def plot_runs(runs: Sequence[Metrics], output: Path) -> None:
    """Draw the runs over each other: loss, gradient norm, throughput, and expert load (learning rate for dense models).

    Where experts exchange tokens between ranks, or rows are spread over ranks, also the learning rate, and the time
    spent waiting for these exchanges.

    Raises:
        ConfigError: matplotlib is missing, or the suffix is no picture format.
        ResourceError: the picture cannot be written.
    """
    pyplot = _pyplot()
    has_experts = any(run.series("expert_load_max_over_mean")[0] for run in runs)
    last = (
        _draw_key("expert_load_max_over_mean", "Expert load, busiest over mean (1 is balanced)")
        if has_experts
        else _draw_key("lr", "Learning rate", smooth=False, floor=0)
    )
    panels = [_draw_loss, _draw_key("grad_norm", "Gradient norm", floor=0), _draw_throughput, last]
    exposed = [
        _draw_key(key, f"Waiting for the exchange of the {what}, % of the time", 100, floor=0)
        for key, what in WAITS.items()
        if any(run.series(key)[0] for run in runs)
    ]
    if exposed:
        rate = [_draw_key("lr", "Learning rate", smooth=False, floor=0)] if has_experts else []
        panels = [*panels[:2], *rate, *panels[2:], *exposed]
    columns = (len(panels) + 1) // 2
    figure, grid = pyplot.subplots(2, columns, figsize=(5.5 * columns, 6.6), layout="constrained")
    for draw, axes in zip(panels, grid.flat, strict=False):
        draw(axes, runs)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[1]:
        axes.set_xlabel("step", fontsize=9, color=INK)
    figure.suptitle(", ".join(run.name for run in runs), fontsize=12, fontweight="bold", color=INK, x=0.01, ha="left")
    save_figure(figure, output, "--output")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the named runs; the exit code of the error where one stands in the way."""
    return run_tool(_plot, argv)


def _plot(argv: list[str]) -> int:
    parser = ToolParser(prog="plot_run.py", description="Draw loss, gradient norm, throughput and expert load of runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="run folder, or its metrics.jsonl")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.png", help="picture to write (default: metrics.png in the first run)"
    )
    arguments = parser.parse_args(argv)
    first = arguments.runs[0]
    output = arguments.output or (first if first.is_dir() else first.parent) / "metrics.png"
    runs = [read_metrics(run) for run in arguments.runs]
    plot_runs(runs, output)
    for run in runs:
        if run.torn:
            print(f"{run.name}: {len(run.torn)} cut-off lines are passed over, the first is line {run.torn[0]}")
        line = predicted_and_measured(run)
        if line is not None:
            print(f"{run.name}: {line}")
    print(output)
    return EXIT_OK


def predicted_and_measured(run: Metrics) -> str | None:
    """Seconds of a step, predicted and measured (the median), where the run has both."""
    predicted = [value for value in run.series("predicted_iteration_s")[1] if math.isfinite(value)]
    measured = sorted(value for value in run.series("iteration_time_s")[1] if math.isfinite(value))
    if not predicted or not measured:
        return None
    middle = measured[len(measured) // 2]
    return f"{predicted[-1]:.4g} s a step predicted, {middle:.4g} s measured: {predicted[-1] / middle - 1:+.1%}"
