"""The tiny models on the CPU and on the device, from the same weights, on the same samples.

The generators of CPU and device differ, and so do initial weights. The CPU therefore takes one step and saves; all
other runs go on from that checkpoint. Where a mixture routes, the device takes the experts that the CPU chose (a near
tie may fall the other way), and what it would have chosen itself is recorded and compared.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerator.section import ROOT, Options, Results
from accelerator.training import Finished, pretrain_all

COMMON = (
    "--mock-data --micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --lr-decay-style constant --lr-warmup-iters 0"
).split()
DENSE = ("--preset", "telechat2-tiny", *COMMON)
MOE = ("--preset", "telechat2-tiny-moe", *COMMON)
LOSS, NORM = 1e-5, 5e-4
"""Largest relative difference of fp32 losses and gradient norms of ten steps: other order of sums, other kernels. The
norm gets more because the CPU's adds the squares of a tensor in fp32: it is off by 1e-5 for a million, 6e-4 for 16."""
ROUNDED = 0.02
"""The same for losses of 16-bit runs against the fp32 ones."""

DENSE_CASES = {
    "fp32": (),
    "recompute full": ("--recompute-granularity", "full"),
    "recompute selective": (
        "--recompute-granularity",
        "selective",
        "--recompute-modules",
        "core_attn",
        "mlp",
        "layernorm",
    ),
    "distributed optimizer": ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
}
MOE_CASES = {
    "fp32": (),
    "chunks 4": ("--moe-input-chunks", "4"),
    "recompute full": ("--recompute-granularity", "full"),
    "recompute moe": ("--recompute-granularity", "selective", "--recompute-modules", "core_attn", "moe"),
    "distributed optimizer": ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
}
ROUNDED_CASES = {
    "bf16": ("--bf16",),
    "bf16 without determinism": ("--bf16", "--no-deterministic"),
    "bf16 dropout": ("--bf16", "--hidden-dropout", "0.02", "--attention-dropout", "0.02"),
    "fp16": ("--fp16", "--initial-loss-scale", "16"),
}


@dataclass(frozen=True)
class Model:
    """One of the tiny models in this section.

    Attributes:
        flags: of all its runs but the first.
        cases: fp32 runs on the device, by name: what they add.
        recording: experts that the CPU chose; None where nothing routes.
    """

    name: str
    flags: tuple[str, ...]
    cases: Mapping[str, tuple[str, ...]]
    rounded: Mapping[str, tuple[str, ...]]
    recording: Path | None

    def folder(self, case: str) -> str:
        return f"{self.name}-{case.replace(' ', '-')}"


def run(options: Options) -> Results:
    """One check a case: the largest relative differences over the steps."""
    steps = 3 if options.quick else 11
    length = ("--seq-length", "64" if options.quick else "256", "--train-iters", str(steps))
    flags = {"dense": (*DENSE, *length), **({} if options.quick else {"moe": (*MOE, *length)})}
    first = {f"{name}-start": ((*line, "--fp32", "--exit-interval", "1"), "cpu") for name, line in flags.items()}
    starts = pretrain_all(first, options)
    models = []
    for name, line in flags.items():
        start = starts[f"{name}-start"]
        if start.error:
            yield f"{name} start", {"ok": False, "error": start.error}
            continue
        cases = {"fp32": ()} if options.quick else DENSE_CASES if name == "dense" else MOE_CASES
        recording = options.work / f"{name}-routing-cpu" if name == "moe" else None
        rounded = {} if options.quick else ROUNDED_CASES
        models.append(Model(name, (*line, "--load", str(start.checkpoints)), cases, rounded, recording))
    runs: dict[str, tuple[Sequence[str], str]] = {}
    for model in models:
        record = ("--moe-routing-record", str(model.recording)) if model.recording else ()
        runs[f"{model.name}-cpu"] = ((*model.flags, "--fp32", *record), "cpu")
        runs |= {model.folder(case): ((*model.flags, *more), options.device) for case, more in model.rounded.items()}
        if not model.recording:
            runs |= _cases(model, options)
    done = pretrain_all(runs, options)
    for model in models:
        if model.recording and not done[f"{model.name}-cpu"].error:
            done |= pretrain_all(_cases(model, options), options)
        yield from _checks(model, done, options)


def _cases(model: Model, options: Options) -> dict[str, tuple[Sequence[str], str]]:
    runs = {}
    for case, more in model.cases.items():
        replay: tuple[str, ...] = ()
        if model.recording:
            own = options.work / f"{model.folder(case)}-routing"
            replay = ("--moe-routing-replay", str(model.recording), "--moe-routing-record", str(own))
        runs[model.folder(case)] = ((*model.flags, "--fp32", *more, *replay), options.device)
    return runs


def _checks(model: Model, done: Mapping[str, Finished], options: Options) -> Results:
    reference = done[f"{model.name}-cpu"]
    for case in model.cases:
        check = compare(done.get(model.folder(case), reference), reference, LOSS, NORM)
        if model.recording and "error" not in check:
            check |= _choices(model.recording, options.work / f"{model.folder(case)}-routing")
            check["ok"] = check["ok"] and check["choices that are no ties"] == 0
        yield f"{model.name} {case}", check
    for case in model.rounded:
        yield f"{model.name} {case}", compare(done[model.folder(case)], reference, ROUNDED, math.inf)


def compare(run: Finished, reference: Finished, loss: float, norm: float) -> dict[str, Any]:
    """Largest relative differences of losses and gradient norms, and whether they are within the limits."""
    for one in (run, reference):
        if one.error:
            return {"ok": False, "error": one.error}
    found: dict[str, Any] = {"steps": len(run.steps), "seconds": round(run.seconds, 1)}
    for name, limit in (("loss", loss), ("grad_norm", norm)):
        ours, theirs = run.series(name), reference.series(name)
        same = len(ours) == len(theirs) > 0
        difference = (
            max((abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)), default=math.inf)
            if same
            else math.inf
        )
        found[name] = {"largest relative difference": difference, "last": ours[-1:], "reference": theirs[-1:]}
        found["ok"] = found.get("ok", True) and difference <= limit
    return found


def _choices(one: Path, other: Path) -> dict[str, Any]:
    """What tools/compare_routing.py says of two recordings."""
    command = [sys.executable, str(ROOT / "tools" / "compare_routing.py"), str(one), str(other), "--limit", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]])[-1]
    return {"choices that are no ties": {0: 0, 5: 1}.get(done.returncode, -1), "choices": last}
