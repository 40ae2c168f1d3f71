"""What a section is: a function that yields its results one by one, with a time limit of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Options:
    """How a section is to run.

    Attributes:
        device: ``cuda``, or ``cpu`` to see that the bench runs.
        quick: small shapes, few cases.
        work: folder for runs and checkpoints.
        jobs: processes at a time, where figures are no timings.
    """

    device: str
    quick: bool
    work: Path
    jobs: int = max(1, min(12, (os.cpu_count() or 2) * 3 // 4))


Results = Iterator[tuple[str, Any]]
"""(name, JSON value); a value with the key ``ok`` is a check."""


@dataclass(frozen=True)
class Section:
    """One part of the bench, run in a process of its own.

    Attributes:
        name: on the command line and in the JSON.
        title: on the page.
        limit_s: after which its process is ended; what it had found is kept.
        module: of this package; its function ``run(options, **arguments)`` yields the results.
        arguments: of that function.
    """

    name: str
    title: str
    limit_s: int
    module: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def run(self, options: Options) -> Results:
        from importlib import import_module

        function: Callable[..., Results] = import_module(f"accelerator.{self.module}").run
        return function(options, **self.arguments)


DENSE_3B = ("--preset", "telechat2-3b")
MOE_39B = (
    *("--preset", "telechat2-39b-a12b", "--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"),
    *("--expert-model-parallel-size", "1", "--no-fold-tensor-into-experts", "--no-use-distributed-optimizer"),
    "--no-sequence-parallel",
)
KEPT, FULL = ("--recompute-layout", "none"), ("--recompute-granularity", "full")
WHOLE_LOSS, LONG_ROWS = ("--loss-chunk-rows", "0"), {"length": 32768, "batch": 1}
ONE, FOUR = ("--moe-input-chunks", "1"), ("--moe-input-chunks", "4")


def _step(name: str, title: str, *flags: str, **sizes: int) -> Section:
    return Section(name, title, 120, "step", {"flags": flags, **sizes})


SECTIONS = (
    Section("environment", "Environment", 60, "environment"),
    Section("parity", "The same run on the CPU and on the device", 240, "parity"),
    Section("resume", "A resumed run against an uninterrupted one", 180, "resume"),
    Section("experts", "The expert block", 120, "experts"),
    _step("step-3b", "A training step, dense", *DENSE_3B),
    _step("step-3b-fast", "The same with --no-deterministic", *DENSE_3B, "--no-deterministic"),
    _step("step-39b", "A training step, mixture of experts, fewer layers", *MOE_39B, *KEPT, *ONE),
    _step("step-39b-chunks", "The same in four chunks", *MOE_39B, *KEPT, *FOUR),
    _step("step-39b-full", "The same with full recompute", *MOE_39B, *FULL, *ONE),
    Section("long-context", "Attention over ranks, all played on this device", 150, "long_context"),
    Section("long-runs", "Lengths inside a run, and packed documents, on the CPU and on the device", 180, "long_runs"),
    _step("step-long", "A training step of 32,768 tokens, the loss in chunks", *DENSE_3B, *FULL, **LONG_ROWS),
    _step("step-long-fast", "The same with --no-deterministic", *DENSE_3B, *FULL, "--no-deterministic", **LONG_ROWS),
    _step("step-long-whole", "step-long with all logits at once", *DENSE_3B, *FULL, *WHOLE_LOSS, **LONG_ROWS),
    Section("attention", "Core attention", 90, "attention"),
    Section("checkpoint", "Saving and loading", 120, "checkpoint"),
)
"""In order of worth."""
