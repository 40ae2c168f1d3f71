"""The expert block by itself: moe_gpu.py, at its own shape and at that of the 39B-A12B."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from accelerator.section import Options, Results

BENCH = Path(__file__).resolve().parents[1]
SHAPES = {"experts of 1536": ("--rounds", "8"), "experts of 6144": ("--ffn", "6144", "--rounds", "4")}


def run(options: Options) -> Results:
    for name, flags in SHAPES.items():
        path = options.work / f"{name.replace(' ', '-')}.json"
        command = [sys.executable, str(BENCH / "moe_gpu.py"), "--device", options.device, "--json", str(path), *flags]
        done = subprocess.run(
            [*command, *(["--quick"] if options.quick else [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        path.with_suffix(".log").write_text(done.stdout, encoding="utf-8")
        if done.returncode:
            yield name, {"ok": False, "error": done.stdout[-1500:]}
            continue
        yield name, json.loads(path.read_text())
        if options.quick:
            return
