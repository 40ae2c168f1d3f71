#!/usr/bin/env python3
"""A training step on one CPU core: our specification, megatron-core's own, Hugging Face transformers.

    python tools/bench/train_step.py [--quick] [--json FILE] [--cases dense-fp32,moe-bf16] [--rounds 7]
    python tools/bench/train_step.py --profile ours --cases moe-bf16
    python tools/bench/train_step.py --tp2

Forward, backward and fused AdamW of one sequence of 1024 tokens: hidden 512, 8 layers; dense, and
16 experts top-4; fp32 and bf16. The arms of a case live in processes of their own, pinned to one
core, and take their steps in turn, so that whatever else the machine does hits all of them alike.
Medians over the rounds. ``--tp2`` shows where the time of two tensor-parallel ranks goes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from processes import pipes  # noqa: E402
from train_step_arms import ARMS, Case  # noqa: E402

CASES = (
    Case("dense-fp32", False, "fp32"),
    Case("dense-bf16", False, "bf16"),
    Case("moe-fp32", True, "fp32"),
    Case("moe-bf16", True, "bf16"),
)
# Arms differ in rounding and in the order of sums only.
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}
# Freed memory stays with the process instead of going back to the system page by page.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(64 << 20)}


class Server:
    """One arm in a process of its own."""

    def __init__(self, arm: str, case: Case, core: int | None, malloc: bool):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **(MALLOC if malloc else {})}
        command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("train_step_arms.py"))]
        self.arm = arm
        self.process = subprocess.Popen(
            [*command, arm, json.dumps(asdict(case))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        if core is not None and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self.process.pid, {core})
        self.parameters = self._read()["parameters"]

    def _read(self) -> dict[str, Any]:
        for line in pipes(self.process)[1]:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"the arm {self.arm} ended with code {self.process.wait()}")

    def ask(self, command: str, number: int) -> dict[str, Any]:
        requests, _ = pipes(self.process)
        requests.write(f"{command} {number}\n")
        requests.flush()
        return self._read()

    def close(self) -> None:
        pipes(self.process)[0].close()
        self.process.wait()


def check_losses(case: Case, losses: dict[str, list[float]]) -> None:
    """All finite, and alike over the arms at every step."""
    for step, values in enumerate(zip(*losses.values(), strict=True)):
        spread = (max(values) - min(values)) / min(values)
        if not all(map(math.isfinite, values)) or spread > LOSS_TOLERANCE[case.precision]:
            raise SystemExit(
                f"{case.name}: losses of step {step} do not agree: {dict(zip(losses, values, strict=True))}"
            )


def run_case(case: Case, arms: Sequence[str], rounds: int, warmup: int, core: int | None, malloc: bool):
    """Interleaved steps; per arm the medians, and the median of the ratios of each round."""
    servers = [Server(arm, case, core, malloc) for arm in arms]
    steps: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    try:
        for number in range(warmup + rounds):
            # Rotate who goes first.
            for server in servers[number % len(servers) :] + servers[: number % len(servers)]:
                steps[server.arm].append(server.ask("step", number))
    finally:
        for server in servers:
            server.close()
    check_losses(case, {arm: [step["loss"] for step in taken] for arm, taken in steps.items()})
    result: dict[str, Any] = {"case": asdict(case), "rounds": rounds, "arms": {}}
    for server in servers:
        taken = steps[server.arm][warmup:]
        wall, cpu = ([step[name] for step in taken] for name in ("wall_s", "cpu_s"))
        result["arms"][server.arm] = {
            "parameters": server.parameters,
            "tokens_per_s": case.sequence / statistics.median(wall),
            "tokens_per_cpu_s": case.sequence / statistics.median(cpu),
            "best_tokens_per_s": case.sequence / min(wall),
            "wall_s": wall,
            "cpu_s": cpu,
            "loss": [step["loss"] for step in taken],
            "page_faults": statistics.median(step["page_faults"] for step in taken),
        }
    ours = result["arms"].get("ours")
    if ours:
        for other in result["arms"].values():
            for name in ("wall_s", "cpu_s"):
                ratios = [b / a for a, b in zip(ours[name], other[name], strict=True)]
                other[f"ours_over_this_{name[:-2]}"] = statistics.median(ratios)
    return result


def print_case(result: dict[str, Any]) -> None:
    print(f"\n{result['case']['name']}   ({result['rounds']} rounds)")
    print(
        f"{'':16}{'parameters':>14}{'tokens/s':>10}{'tok/CPU s':>11}{'best':>8}{'faults':>9}{'loss':>9}"
        f"{'ours / this':>13}{'by CPU s':>10}"
    )
    for arm, line in result["arms"].items():
        print(
            f"{arm:16}{line['parameters']:>14,}{line['tokens_per_s']:>10.0f}{line['tokens_per_cpu_s']:>11.0f}"
            f"{line['best_tokens_per_s']:>8.0f}{line['page_faults']:>9.0f}{line['loss'][-1]:>9.4f}"
            f"{line.get('ours_over_this_wall', float('nan')):>12.2f}x"
            f"{line.get('ours_over_this_cpu', float('nan')):>9.2f}x",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes and two rounds: does it run at all")
    parser.add_argument("--wide", action="store_true", help="SwiGLU of 2048, experts of 768, vocabulary 16384")
    parser.add_argument("--cases", default=",".join(case.name for case in CASES))
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--core", type=int, default=0, help="the core all arms run on; -1 leaves them free")
    parser.add_argument(
        "--malloc", choices=("default", "keep"), default="default", help="keep: see docs/performance.md"
    )
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--profile", metavar="ARM", help="torch.profiler table of one step of this arm")
    parser.add_argument("--tp2", action="store_true", help="where two tensor-parallel ranks spend their time")
    options = parser.parse_args(argv)
    if options.tp2:
        from tensor_parallel_profile import main as tp2

        return tp2(quick=options.quick, json_path=options.json)

    known = {case.name: case for case in CASES}
    wanted = options.cases.split(",")
    if set(wanted) - set(known):
        parser.error(f"--cases: choose from {', '.join(known)}")
    cases = [known[name] for name in wanted]
    if options.wide:
        cases = [replace(case, vocabulary=16384, dense_width=2048, expert_width=768) for case in cases]
    rounds, warmup = options.rounds, options.warmup
    if options.quick:
        cases = [replace(case, layers=2, sequence=128, vocabulary=512) for case in cases]
        rounds, warmup = 2, 1
    core = None if options.core < 0 else options.core
    malloc = options.malloc == "keep"
    if options.profile:
        for case in cases:
            server = Server(options.profile, case, core, malloc)
            for number in range(warmup):
                server.ask("step", number)
            server.ask("profile", warmup)
            server.close()
        return 0
    results = []
    for case in cases:
        results.append(run_case(case, options.arms.split(","), rounds, warmup, core, malloc))
        print_case(results[-1])
    if options.json:
        options.json.write_text(json.dumps({"malloc": options.malloc, "results": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
