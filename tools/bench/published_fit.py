#!/usr/bin/env python3
"""How far the shares of the device files hold for runs they were not fitted to.

    python tools/bench/published_fit.py --json FILE [--terms]

Every share and constant of the cost model is moved by 2 % and every published run predicted anew: the logarithm of
predicted over published is taken as linear in the logarithms of the shares. Fits are robust (Huber at 8 %), each source
has the same say on each device, and a share is held near where it was before (`PARAMETERS` has how near). Printed are:
the shares as they are, fitted to all, fitted to one half of the rows and scored on the other, and each source scored by
a fit to all others; --terms leaves one term of the model out at a time and fits the shares anew.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_telechat.config.schema import RunConfig  # noqa: E402
from megatron_telechat.costs import time as times  # noqa: E402
from megatron_telechat.costs.devices import DeviceSpec  # noqa: E402
from megatron_telechat.planner import predict as prediction  # noqa: E402
from tools.bench.published_runs import OWN  # noqa: E402
from tools.bench.yardsticks.published_rows import Question, Row, read_rows  # noqa: E402

DELTA = 0.08
STEP = 0.02
PRIOR = 0.15
PARAMETERS = {
    **{f"{device}.{share}": 0.1 for device in ("a100", "h100", "ascend") for share in ("gemm", "attention")},
    "h100.grouped_gemm": 0.1, "h100.fp8_gemm": 0.2,
    "all.hbm": 0.08, "all.link": 0.15, "all.link_between_nodes": 0.3, "all.gemm_edge": 0.5, "all.gemm_start_s": 0.5,
    "HIDDEN": 0.2, "LEFT": 0.6, "MESSAGES_EXPOSED": 0.6, "SHARDS_EXPOSED": 0.7, "EXPERTS_EXPOSED": 0.1,
    "UNFUSED_SHARE": 0.3, "UNFUSED_PASSES": 0.5, "PLAIN_PASSES": 0.5,
}  # fmt: skip
"""Share or constant → how far its logarithm may well move."""
TERMS: dict[str, Mapping[str, float]] = {
    "edges of products": {"all.gemm_edge": 1e-9},
    "start of a product": {"all.gemm_start_s": 1e-12},
    "exposed messages": {"MESSAGES_EXPOSED": 0.0},
    "a part of the reduction is exposed": {"HIDDEN": 1.0, "LEFT": 0.0},
    "slower links between nodes": {"all.link_between_nodes": -1.0},
    "exposed gathers of shards": {"SHARDS_EXPOSED": 0.0},
    "experts' exchange overlaps at its ends": {"EXPERTS_EXPOSED": 1.0},
    "passes of plain kernels": {"PLAIN_PASSES": 1.0},
    "whole square without flash attention": {"UNFUSED_SHARE": 2.0, "UNFUSED_PASSES": 0.0},
}
"""Term → values that leave it out."""


@contextmanager
def constants(values: Mapping[str, float]) -> Iterator[None]:
    """Constants of the model at other values."""
    where = {name: prediction if hasattr(prediction, name) else times for name in values if name.isupper()}
    before = {name: getattr(module, name) for name, module in where.items()}
    try:
        for name, module in where.items():
            setattr(module, name, values[name])
        yield
    finally:
        for name, module in where.items():
            setattr(module, name, before[name])


def start(name: str, device: DeviceSpec | None = None) -> float:
    """A constant as it is, or a share of a device."""
    if device is None:
        return getattr(prediction if hasattr(prediction, name) else times, name)
    key = name.partition(".")[2]
    return getattr(device, key) if key.startswith("gemm_") else device.efficiency.get(key, 1.0)


def changed(device: DeviceSpec, values: Mapping[str, float], factors: Mapping[str, float]) -> DeviceSpec:
    """A device with shares at other values, or times a factor."""
    shares, own = dict(device.efficiency), {}
    for name in (*values, *factors):
        kind, _, key = name.partition(".")
        if not key or not (kind == "all" or kind in device.name):
            continue
        value = values[name] if name in values else start(name, device) * factors[name]
        if value < 0:
            shares.pop(key, None)
        elif key.startswith("gemm_"):
            own[key] = value
        else:
            shares[key] = value
    return replace(device, efficiency=shares, **own)


def logarithms(
    rows: Sequence[tuple[Row, Question]],
    values: Mapping[str, float] | None = None,
    moved: Mapping[str, float] | None = None,
) -> np.ndarray:
    """Logarithm of predicted over published of each row, with terms at `values` and parameters moved by factors."""
    values, moved = values or {}, moved or {}
    now = (
        {"MOST_OPS": 512}
        | {name: start(name) * factor for name, factor in moved.items() if name.isupper()}
        | dict(values)
    )
    with constants(now):  # a pipeline's start is simulated and carried on
        found = [
            prediction.predict(
                RunConfig(model, parallel, replace(training, device=device.kind)),
                changed(device, values, moved),
                software,
            ).tokens_per_s_per_device
            / row.tokens_per_s
            for row, (model, parallel, training, device, software) in rows
        ]
    return np.log(found)


class Fit:
    """The linear picture of the model around its shares."""

    def __init__(self, rows: Sequence[tuple[Row, Question]]):
        self.rows, self.names = rows, list(PARAMETERS)
        self.now = logarithms(rows)
        slopes = [(logarithms(rows, moved={name: 1 + STEP}) - self.now) / math.log1p(STEP) for name in self.names]
        self.slopes = np.stack(slopes, axis=1)
        self.scale = np.array([PARAMETERS[name] for name in self.names])
        counts = Counter((row.source, row.device_name) for row, _ in rows)
        self.weights = np.array([1 / counts[row.source, row.device_name] for row, _ in rows])

    def solve(self, use: np.ndarray, base: np.ndarray | None = None, fixed: Collection[str] = ()) -> np.ndarray:
        """Steps of the logarithms of the parameters that fit the rows `use`.

        Args:
            base: logarithms of the rows now; unset: those of the model as it is.
            fixed: parameters that stay where they are.
        """
        base = self.now if base is None else base
        steps = np.zeros(len(self.names))
        slopes = self.slopes * np.array([name not in fixed for name in self.names])
        for _ in range(30):
            left = base + slopes @ steps
            weight = self.weights * np.minimum(1, DELTA / np.maximum(np.abs(left), 1e-9)) / DELTA**2 * use
            hessian = slopes.T @ (weight[:, None] * slopes) + PRIOR * np.diag(1 / self.scale**2)
            steps -= np.linalg.solve(hessian, slopes.T @ (weight * left) + PRIOR * steps / self.scale**2)
        return steps

    def after(self, steps: np.ndarray, base: np.ndarray | None = None) -> np.ndarray:
        """Logarithms of the rows after these steps."""
        return (self.now if base is None else base) + self.slopes @ steps


def line(name: str, logs: np.ndarray) -> str:
    """Median ratio, median error, share within 15 %."""
    ratios = np.exp(logs)
    errors = abs(ratios - 1)
    return f"{name:44}{len(ratios):>5}{np.median(ratios):>7.2f}{np.median(errors):>8.1%}{np.mean(errors <= 0.15):>8.0%}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="the published runs")
    parser.add_argument("--terms", action="store_true", help="leave out one term at a time")
    options = parser.parse_args(argv)
    found = [row for row in read_rows(options.json) if row.ran and row.grade in "AB" and row.source != OWN]
    known = [row for row in found if any(word in row.device_name for word in ("a100", "h100", "ascend"))]
    rows = [(row, row.question()) for row in known]
    fit = Fit(rows)
    everything = np.ones(len(rows))
    print(f"{'':44}{'rows':>5}{'ratio':>7}{'error':>8}{'in 15 %':>8}")
    print(line("the shares as they are", fit.now))
    steps = fit.solve(everything)
    print(line("fitted to all rows", fit.after(steps)))
    for name, step in zip(fit.names, steps, strict=True):
        print(f"  {name:28} x {math.exp(step):.3f}")
    half = np.arange(len(rows)) % 2
    scored = [fit.after(fit.solve((half != part) * 1.0))[half == part] for part in (0, 1)]
    print(line("fitted to one half, scored on the other", np.concatenate(scored)))
    left_out = []
    for source in dict.fromkeys(row.source for row, _ in rows):
        own = np.array([row.source == source for row, _ in rows])
        left_out.append(fit.after(fit.solve(~own * 1.0))[own])
        print(line(f"  fitted without {source}, scored on it", left_out[-1]))
    print(line("source by source left out", np.concatenate(left_out)))
    factor = [logs - statistics.median(logs) for logs in left_out]
    print(line("the same, one factor a source", np.concatenate(factor)))
    if options.terms:
        for name, values in TERMS.items():
            base = logarithms(rows, values)
            print(line(f"without: {name}", fit.after(fit.solve(everything, base, values), base)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
