"""Training runs as a user starts them, and what they wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerator.section import ROOT, Options

TIMEOUT_S = 150


@dataclass(frozen=True)
class Finished:
    """A training command that has ended.

    Attributes:
        steps: its records with a loss, from metrics.jsonl, in order.
        error: the end of its output where it failed; None where it did not.
    """

    run_dir: Path
    seconds: float
    steps: tuple[Mapping[str, Any], ...]
    output: str
    error: str | None

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def series(self, name: str) -> list[float]:
        return [record[name] for record in self.steps if record.get(name) is not None]


def pretrain(flags: Sequence[str], run_dir: Path, device: str) -> Finished:
    """Run one training command to its end."""
    command = [sys.executable, str(ROOT / "pretrain" / "pretrain_telechat2.py")]
    command += [*flags, "--device", device, "--run-dir", str(run_dir), "--no-progress"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, timeout=TIMEOUT_S
        )
        output, error = done.stdout, None if done.returncode == 0 else f"exit code {done.returncode}"
    except subprocess.TimeoutExpired as late:
        output, error = (late.stdout or b"").decode(errors="replace"), f"not done after {TIMEOUT_S} s"
    (run_dir.parent / f"{run_dir.name}.log").write_text(
        f"{' '.join(command)}\n{output}\n{error or ''}", encoding="utf-8"
    )
    if error is not None:
        error = f"{error}: {output[-1500:]}"
    return Finished(run_dir, time.perf_counter() - begin, tuple(_steps(run_dir / "metrics.jsonl")), output, error)


def _steps(path: Path) -> Iterable[Mapping[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "tokens_per_s" in record:
            yield record


def pretrain_all(runs: Mapping[str, tuple[Sequence[str], str]], options: Options) -> dict[str, Finished]:
    """Several commands side by side: (flags, device) by name, which is also the name of the run's folder."""
    with ThreadPoolExecutor(options.jobs) as pool:
        started = {
            name: pool.submit(pretrain, flags, options.work / name, device) for name, (flags, device) in runs.items()
        }
        return {name: future.result() for name, future in started.items()}
