#!/usr/bin/env python3
"""The cost model against training runs that others published: throughput, order of layouts, memory.

    python tools/bench/published_runs.py --json FILE [--split dev] [--only REGEX] [--rows] [--output FILE]
        [--calibrated] [--max-median-error 6] [--min-within-15 90] ...

FILE holds `rows`: model, layout, recompute, hardware and what was measured (`yardsticks/published_rows.py` reads them).
Every row goes through `planner.estimate.estimate`, and through nothing else.

A *family* is one model on one kind and number of devices in one precision, from one source. Pairs of a family that were
measured more than 5 % apart are ordered right or wrong; the *loss* of a family of three layouts or more is what the
layout that the model likes best was measured slower than the best one. Rows of grade C (layout not fully published) and
TeleChat2's own are shown and left out of the statistics. --calibrated: each program's factor is fitted to the first row
of each source and device, which is then left out, too: what one known run of the same program buys.

Exit code: 1 where a bar given as a flag is missed, 2 for a file that cannot be read, else 0.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_telechat.errors import UserError  # noqa: E402
from megatron_telechat.planner.estimate import estimate  # noqa: E402
from tools.bench.yardsticks.published_rows import Row, read_rows  # noqa: E402

APART = 0.05
"""Layouts that were measured closer than this are as good as each other."""
OWN = "TeleChat2"


@dataclass(frozen=True)
class Answer:
    """A row and what the model says of it.

    Attributes:
        ratio: predicted over published tokens a second; None where the run did not run, or nothing is predicted.
        error: the error bar.
        memory_gib, fits: of the fullest rank.
        refused: why there is no prediction.
    """

    row: Row
    ratio: float | None = None
    tokens_per_s: float | None = None
    error: float = 0.0
    memory_gib: float | None = None
    fits: bool | None = None
    refused: str = ""

    @property
    def counts(self) -> bool:
        """Whether it is part of the statistics."""
        return self.ratio is not None and self.row.grade in "AB" and self.row.source != OWN


def answer(row: Row) -> Answer:
    """What the model says of one row."""
    try:
        model, parallel, training, device, software = row.question()
        found = estimate(model, parallel, training, device, software)
    except UserError as error:
        return Answer(row, refused=" ".join(error.render().split())[:120])
    ratio = found.tokens_per_s / row.tokens_per_s if row.ran and row.tokens_per_s else None
    return Answer(row, ratio, found.tokens_per_s, found.error, found.memory_bytes / 2**30, found.fits)


# ---- tables ---------------------------------------------------------------------------------

Chosen = Callable[[Row], Any]
CLASSES: tuple[tuple[str, Chosen], ...] = (
    ("dense", lambda r: not r.moe),
    ("MoE", lambda r: r.moe),
    ("A100", lambda r: "a100" in r.device_name),
    ("H100", lambda r: "h100" in r.device_name),
    ("Ascend 910B", lambda r: "ascend" in r.device_name),
    ("TP 1, PP 1, dense", lambda r: not r.moe and r.tp == 1 and r.pp == 1),
    ("TP > 1, PP 1, dense", lambda r: not r.moe and r.tp > 1 and r.pp == 1),
    ("PP > 1, 1 chunk, dense", lambda r: not r.moe and r.pp > 1 and r.vpp == 1),
    ("chunks > 1, dense", lambda r: not r.moe and r.vpp > 1),
    ("CP > 1", lambda r: r.cp > 1),
    ("EP x ETP inside a node", lambda r: r.moe and 1 < r.ep * r.etp <= 8),
    ("EP x ETP across nodes", lambda r: r.moe and r.ep * r.etp > 8),
    ("TP 8", lambda r: r.tp == 8),
    ("full recompute", lambda r: r.recompute == "full"),
    ("512 ranks and more", lambda r: r.ranks >= 512),
    ("FSDP", lambda r: r.fsdp),
    ("FP8", lambda r: r.fp8),
    ("without a gate (GELU)", lambda r: not r.gated),
    ("without flash attention", lambda r: not r.flash),
)


def summary(name: str, found: Sequence[Answer]) -> dict[str, Any] | None:
    """Statistics of the ratios of some rows; None of no rows."""
    ratios = sorted(one.ratio for one in found if one.ratio is not None)
    if not ratios:
        return None
    errors = [abs(ratio - 1) for ratio in ratios]
    worst = max(found, key=lambda one: abs((one.ratio or 1.0) - 1))
    return {
        "name": name,
        "rows": len(ratios),
        "median_ratio": statistics.median(ratios),
        "median_error": statistics.median(errors),
        "within_15": sum(error <= 0.15 for error in errors) / len(errors),
        "in_bar": sum(abs(one.ratio - 1) <= one.error for one in found if one.ratio is not None) / len(errors),
        "p10": ratios[int(0.1 * len(ratios))],
        "p90": ratios[min(int(0.9 * len(ratios)), len(ratios) - 1)],
        "worst": worst.ratio,
        "worst_row": worst.row.id,
    }


def ordering(found: Sequence[Answer]) -> tuple[int, int, list[dict[str, Any]]]:
    """(pairs ordered right, pairs, loss of each family of three or more)."""
    families: dict[str, list[Answer]] = {}
    for one in found:
        families.setdefault(one.row.family, []).append(one)
    right = pairs = 0
    losses = []
    for name, members in families.items():
        for a, b in combinations(members, 2):
            if abs(a.row.tokens_per_s / b.row.tokens_per_s - 1) <= APART:
                continue
            if abs(b.row.tokens_per_s / a.row.tokens_per_s - 1) <= APART:
                continue
            pairs += 1
            right += (a.row.tokens_per_s > b.row.tokens_per_s) == ((a.tokens_per_s or 0) > (b.tokens_per_s or 0))
        if len(members) >= 3:
            best = max(one.row.tokens_per_s for one in members)
            liked = max(members, key=lambda one: one.tokens_per_s or 0.0)
            losses.append(
                {"family": name, "rows": len(members), "loss": 1 - liked.row.tokens_per_s / best, "liked": liked.row.id}
            )
    return right, pairs, losses


def report(answers: Sequence[Answer]) -> dict[str, Any]:
    """Everything that is printed, for machines."""
    core = [one for one in answers if one.counts]
    memory = [one for one in answers if one.fits is not None and one.row.grade in "AB"]
    ran, not_ran = [one for one in memory if one.row.ran], [one for one in memory if not one.row.ran]
    right, pairs, losses = ordering(core)
    peaks = [one.memory_gib * 2**30 / 1e9 / one.row.peak_gb for one in ran if one.memory_gib and one.row.peak_gb]
    graded = [one for one in answers if one.ratio is not None and one.row.grade in "AB"]
    sources = dict.fromkeys(one.row.source for one in graded)
    tables = {
        "all": [summary("all", core)],
        "sources": [summary(name, [one for one in graded if one.row.source == name]) for name in sources],
        "programs": [
            summary(name, [one for one in core if one.row.program == name])
            for name in dict.fromkeys(one.row.program for one in core)
        ],
        "classes": [summary(name, [one for one in core if chosen(one.row)]) for name, chosen in CLASSES],
    }
    return {
        "tables": {name: [row for row in rows if row] for name, rows in tables.items()},
        "ordering": {"right": right, "pairs": pairs, "share": right / pairs if pairs else None},
        "losses": losses,
        "memory": {
            "ran": len(ran),
            "false_alarms": [one.row.id for one in ran if not one.fits],
            "not_ran": len(not_ran),
            "missed": [one.row.id for one in not_ran if one.fits],
            "peaks": {"rows": len(peaks), "median_ratio": statistics.median(peaks) if peaks else None},
        },
        "refused": {one.row.id: one.refused for one in answers if one.refused},
        "rows": [
            {
                "id": one.row.id, "source": one.row.source, "published": one.row.tokens_per_s,
                "predicted": one.tokens_per_s, "ratio": one.ratio, "error": one.error, "memory_gib": one.memory_gib,
                "fits": one.fits, "ran": one.row.ran,
            }
            for one in answers
        ],
    }  # fmt: skip


def show(found: dict[str, Any], rows: bool) -> None:
    if rows:
        for one in found["rows"]:
            if one["ratio"] is not None:
                print(
                    f"{one['id'][:48]:50}{one['published']:>9.0f}{one['predicted']:>9.0f}{one['ratio']:>7.3f}"
                    f"{one['memory_gib']:>8.1f}  {'' if one['fits'] else 'does not fit'}"
                )
    head = f"{'rows':>5}{'ratio':>7}{'error':>8}{'in 15 %':>9}{'in bar':>8}{'10 %':>7}{'90 %':>6}  worst"
    for title, entries in found["tables"].items():
        print(f"\n{title:36}{head}")
        for row in entries:
            print(
                f"{row['name'][:35]:36}{row['rows']:>5}{row['median_ratio']:>7.2f}{row['median_error']:>8.1%}"
                f"{row['within_15']:>9.0%}{row['in_bar']:>8.0%}{row['p10']:>7.2f}{row['p90']:>6.2f}  "
                f"{row['worst']:.2f} {row['worst_row']}"
            )
    order = found["ordering"]
    print(f"\npairs more than {APART:.0%} apart: {order['right']} of {order['pairs']} ordered right", end="")
    print(f" ({order['share']:.1%})" if order["pairs"] else "")
    for row in sorted(found["losses"], key=lambda row: -row["loss"]):
        print(f"  loss {row['loss']:6.1%}  {row['family']} ({row['rows']} layouts; liked {row['liked']})")
    if found["losses"]:
        print(f"  median loss {statistics.median(row['loss'] for row in found['losses']):.1%}")
    memory = found["memory"]
    print(
        f"memory: {len(memory['false_alarms'])} of {memory['ran']} runs that ran are said not to fit, "
        f"{len(memory['missed'])} of {memory['not_ran']} that ran out are said to fit"
    )
    if memory["peaks"]["rows"]:
        print(
            f"  published peaks: {memory['peaks']['rows']}, predicted over them {memory['peaks']['median_ratio']:.2f}"
        )
    for name, why in found["refused"].items():
        print(f"no prediction: {name}: {why}")


# ---- bars -----------------------------------------------------------------------------------


def _share(part: Sequence[Any], whole: int) -> float:
    return 100 * len(part) / whole if whole else 0.0


BARS: dict[str, tuple[str, bool, Callable[[dict[str, Any]], float]]] = {
    "max-median-error": ("per cent, of all rows", True, lambda f: 100 * f["tables"]["all"][0]["median_error"]),
    "min-within-15": ("per cent of the rows", False, lambda f: 100 * f["tables"]["all"][0]["within_15"]),
    "max-class-error": (
        "per cent, median error of the worst class", True,
        lambda f: 100 * max(row["median_error"] for row in f["tables"]["classes"]),
    ),
    "max-source-ratio": (
        "per cent, median ratio of the farthest source from 1", True,
        lambda f: 100 * max(abs(row["median_ratio"] - 1) for row in f["tables"]["sources"]),
    ),
    "min-ordered": ("per cent of the pairs", False, lambda f: 100 * (f["ordering"]["share"] or 1.0)),
    "max-median-loss": (
        "per cent, of the families", True,
        lambda f: 100 * statistics.median([row["loss"] for row in f["losses"]] or [0.0]),
    ),
    "max-loss": ("per cent, of the worst family", True, lambda f: 100 * max([r["loss"] for r in f["losses"]] or [0.0])),
    "max-false-alarms": (
        "per cent of the runs that ran", True,
        lambda f: _share(f["memory"]["false_alarms"], f["memory"]["ran"]),
    ),
    "max-missed": (
        "per cent of the runs that ran out of memory", True,
        lambda f: _share(f["memory"]["missed"], f["memory"]["not_ran"]),
    ),
}  # fmt: skip
"""Flag → (its unit, whether it is an upper bar, the value)."""


def missed_bars(found: dict[str, Any], bars: dict[str, float]) -> list[str]:
    """A line for each bar that is missed."""
    lines = []
    for name, bar in bars.items():
        unit, upper, value_of = BARS[name]
        value = value_of(found)
        if (value > bar) if upper else (value < bar):
            lines.append(f"missed --{name} {bar:g}: {value:.1f} {unit}")
    return lines


def calibrated(answers: Sequence[Answer]) -> list[Answer]:
    """The ratios after a factor for each source, device and precision, from its first row, which is left out."""
    factor: dict[tuple[str, str, bool], float] = {}
    out = []
    for one in answers:
        if not one.counts:
            out.append(one)
            continue
        assert one.ratio is not None and one.tokens_per_s is not None
        key = (one.row.source, one.row.device_name, one.row.fp8)
        if key in factor:
            by = factor[key]
            out.append(Answer(one.row, one.ratio / by, one.tokens_per_s / by, one.error, one.memory_gib, one.fits))
        else:
            factor[key] = one.ratio
            out.append(Answer(one.row, None, None, one.error, one.memory_gib, one.fits))
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="the published runs")
    parser.add_argument("--split", help="only rows with this value of `split`")
    parser.add_argument("--only", help="only rows whose id, source or program matches this expression")
    parser.add_argument("--rows", action="store_true", help="each row, too")
    parser.add_argument("--calibrated", action="store_true", help="one run of each program sets its factor")
    parser.add_argument("--output", type=Path, help="write everything as JSON")
    for name, (unit, _, _) in BARS.items():
        parser.add_argument(f"--{name}", type=float, help=unit.replace("%", "%%"))
    options = parser.parse_args(argv)
    try:
        rows = read_rows(options.json, options.split, options.only)
    except UserError as error:
        print(error.render(), file=sys.stderr)
        return error.exit_code
    answers = [answer(row) for row in rows]
    found = report(calibrated(answers) if options.calibrated else answers)
    if options.output:
        options.output.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if not found["tables"]["all"]:
        print("no row was predicted", file=sys.stderr)
        return 2
    show(found, options.rows)
    bars = {name: getattr(options, name.replace("-", "_")) for name in BARS}
    missed = missed_bars(found, {name: bar for name, bar in bars.items() if bar is not None})
    for line in missed:
        print(line)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
