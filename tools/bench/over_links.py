"""What the benches over throttled links share at their doors: arguments, the rows, how they end. Loads no torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from throttled_links import Links

if TYPE_CHECKING:
    from turns import Check

MISSED = 1
"""Exit code with --check where something is missed."""


class Rates(Protocol):
    """A bench that finds the rates of links."""

    def rates(self, ratios: Sequence[float], /) -> dict[float, float]:
        """Mbit/s for which the link takes so many times as long as the computation, by ratio."""
        ...


def make_parser(
    text: str | None, what: Callable[[Any], None], tokens: int, ratios: Sequence[float]
) -> argparse.ArgumentParser:
    """The arguments of such a bench.

    Args:
        text: its description.
        what: adds the arguments of its own.
        tokens: default of a rank.
        ratios: default of link over computation.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_argument_group("where")
    where.add_argument("--links", action="store_true", help="make throttled links, run all rows over them, remove them")
    where.add_argument("--ranks", type=int, default=2, help="without torchrun: so many")
    where.add_argument("--no-pin", action="store_true", help="do not bind rank r to core r, modulo their number")
    where.add_argument("--timeout", type=float, default=3600.0, help="seconds until the ranks are killed")
    group = parser.add_argument_group("what")
    group.add_argument("--tokens", type=int, default=tokens, help="of a rank")
    what(group)
    group.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    group.add_argument("--stand-in", type=float, metavar="GFLOPS", help="the products sleep flops / rate")
    group.add_argument("--ratios", default=",".join(map(str, ratios)), help="link/computation ratios, with --links")
    group.add_argument("--no-unlimited", action="store_true", help="leave out the row without a limit")
    group.add_argument("--rounds", type=int, default=7)
    group.add_argument("--quick", action="store_true", help="tiny shapes, two rounds, one ratio")
    out = parser.add_argument_group("output")
    out.add_argument("--json", type=Path, help="write everything measured to this file")
    out.add_argument("--plot", type=Path, help="write a picture to this file (matplotlib)")
    out.add_argument("--check", action="store_true", help=f"exit with {MISSED} if a floor is missed")
    return parser


def read(parser: argparse.ArgumentParser, argv: Sequence[str] | None, quick: Mapping[str, int]) -> argparse.Namespace:
    """The options, checked; ``targets`` are the ratios.

    Args:
        quick: sizes of --quick.
    """
    options = parser.parse_args(argv)
    try:
        options.targets = tuple(map(float, options.ratios.split(",")))
    except ValueError as error:
        parser.error(f"--ratios are numbers with commas: {error}")
    if options.quick:
        vars(options).update(quick, rounds=2, targets=options.targets[:1])
    if options.rounds < 1:
        parser.error("--rounds begin at 1")
    if options.stand_in is not None and options.stand_in <= 0:
        parser.error("--stand-in is a rate in GFLOP/s")
    return options


def add_rows(options: argparse.Namespace, links: Links | None, bench: Rates, add: Callable[..., None]) -> None:
    """One row over the link there is, or one for each ratio and one without a limit.

    Args:
        add: times a row: label, Mbit/s, ratio.
    """
    if links is None:
        add("this link")
        return
    for target, mbit in bench.rates(options.targets).items():
        add(f"ratio {target:g}", mbit, target)
    if not options.no_unlimited:
        add("no limit")


def conclude(
    options: argparse.Namespace,
    report: dict[str, Any],
    found: Sequence[Check],
    plot: Callable[[Path, Sequence[Mapping[str, Any]], str], None],
) -> int:
    """Say the checks, write JSON and plot; returns how many were missed."""
    from turns import check_lines

    for line in check_lines(found):
        print(line)
    report["checks"] = [{**check._asdict(), "ok": check.ok} for check in found]
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    if options.plot:
        plot(options.plot, report["rows"], report["mode"])
    return sum(not check.ok for check in found)


def pyplot_to_files() -> Any:
    """matplotlib's pyplot, which draws to files.

    Raises:
        ImportError: matplotlib is not installed; the message has the line that installs it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
