"""Where two tensor-parallel ranks over gloo spend a training step; ``train_step.py --tp2`` calls this.

Three layouts of a tiny dense model on two ranks of one machine, by the doors that training uses: data
parallel, tensor parallel, and tensor parallel with sequence parallelism. Every collective is timed from
its call to its end, asynchronous ones up to the wait, and the table says how many there are, how many
bytes they move, and what part of the step they take. A second table times single collectives.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
from processes import output_of  # noqa: E402

COLLECTIVES = (
    "all_reduce",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "all_gather",
    "reduce_scatter",
    "broadcast",
    "all_to_all_single",
    "_all_gather_base",
    "_reduce_scatter_base",
)
LAYOUTS = {
    "DP2": {},
    "TP2": dict(tensor_model_parallel_size=2, sequence_parallel=False),
    "TP2 + SP": dict(tensor_model_parallel_size=2, sequence_parallel=True),
}


class Timeline:
    """Counts, bytes and seconds of the collectives of this process."""

    def __init__(self) -> None:
        self.lines: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0.0])
        self.enabled = False

    def install(self) -> None:
        """Before megatron.core is imported: it keeps references to the functions of torch."""
        import torch.distributed as dist

        for name in COLLECTIVES:
            if hasattr(dist, name):
                setattr(dist, name, self._timed(name, getattr(dist, name)))

    def _timed(self, name: str, call: Callable) -> Callable:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.enabled:
                return call(*args, **kwargs)
            begin = time.perf_counter()
            work = call(*args, **kwargs)
            line = self.lines[name]
            line[0] += 1
            line[1] += max((_bytes(value) for value in (*args, *kwargs.values())), default=0)
            line[2] += time.perf_counter() - begin
            if kwargs.get("async_op") and work is not None:
                return _TimedWork(work, line)
            return work

        return timed


class _TimedWork:
    """An asynchronous collective whose wait is timed."""

    def __init__(self, work: Any, line: list[float]):
        self._work, self._line = work, line

    def wait(self, *args: Any) -> Any:
        begin = time.perf_counter()
        result = self._work.wait(*args)
        self._line[2] += time.perf_counter() - begin
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _bytes(value: Any) -> int:
    import torch

    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes, value))
    return 0


def train(layout: str, steps: int) -> dict[str, Any]:
    """Steps of a tiny dense model in this layout; medians of this rank."""
    import torch

    timeline = Timeline()
    timeline.install()
    from megatron_telechat import parallel
    from megatron_telechat.backend import get_backend
    from megatron_telechat.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainingConfig

    backend = get_backend("cpu")
    backend.install()
    from megatron_telechat.model import build_model

    run = RunConfig(
        model=ModelConfig(num_layers=4, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, vocab_size=512),
        parallel=ParallelConfig(world_size=2, **LAYOUTS[layout]),
        training=TrainingConfig(precision="fp32", seq_length=64, micro_batch_size=2, global_batch_size=4),
    )
    state = parallel.initialize(run, backend)
    (model,) = build_model(run, state, backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(512, (2, 64))
    positions = torch.arange(64).expand(2, 64)
    walls, cpus = [], []
    for step in range(steps + 3):
        if step == 3:
            timeline.enabled = True
        wall, cpu = time.perf_counter(), time.process_time()
        model(tokens, positions, labels=tokens).float().mean().backward()
        if state.dp_size > 1:
            for parameter in model.parameters():
                torch.distributed.all_reduce(parameter.grad, group=state.dp_group)
        optimizer.step()
        optimizer.zero_grad()
        if step >= 3:
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
    return {
        "layout": layout,
        "step_ms": statistics.median(walls) * 1e3,
        "cpu_ms": statistics.median(cpus) * 1e3,
        "collectives": {name: [n / steps, b / steps, s / steps * 1e3] for name, (n, b, s) in timeline.lines.items()},
    }


def single_collectives(elements: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of one collective on [elements] fp32 of a rank."""
    import torch
    import torch.distributed as dist

    part, whole = torch.ones(elements // 2), torch.ones(elements)
    calls = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(whole, part),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(part, whole),
        "all_to_all_single": lambda: dist.all_to_all_single(torch.empty_like(whole), whole),
    }
    result = {}
    for name, call in calls.items():
        times = []
        for _ in range(repeats):
            dist.barrier()
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        result[name] = statistics.median(times) * 1e3
    return result


def worker(layout: str, steps: int) -> None:
    import torch

    report: dict[str, Any] = train(layout, steps)
    if layout == "DP2":
        report["single"] = {size: single_collectives(size, 5 * steps) for size in (1024, 16384, 262144)}
    if os.environ["RANK"] == "0":
        print("REPORT " + json.dumps(report), flush=True)
    torch.distributed.destroy_process_group()


def launch(layout: str, steps: int, threads: int) -> dict[str, Any]:
    import torch.distributed as dist

    # Public, and missing in torch's __all__.
    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    common = dict(
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(store.port),
        OMP_NUM_THREADS=str(threads),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    command = [sys.executable, "-W", "ignore", __file__, "--layout", layout, "--steps", str(steps)]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        while None in [rank.poll() for rank in ranks]:
            if any(rank.returncode for rank in ranks):
                break
            time.sleep(0.1)
        if any(rank.returncode for rank in ranks):
            raise SystemExit(f"{layout}: a rank failed")
        output = output_of(ranks[0])
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    line = next(line for line in output.splitlines() if line.startswith("REPORT "))
    return json.loads(line.removeprefix("REPORT "))


def main(quick: bool = False, json_path: Path | None = None) -> int:
    steps = 5 if quick else 30
    reports = []
    for layout in LAYOUTS:
        for threads in (1, 2):
            reports.append({**launch(layout, steps, threads), "threads": threads})
    print(f"{'layout':10}{'threads':>8}{'step ms':>9}{'CPU ms':>8}{'in collectives ms':>19}   a step: calls, KiB, ms")
    for report in reports:
        lines = report["collectives"]
        spent = sum(ms for _, _, ms in lines.values())
        detail = "; ".join(f"{name} {n:.0f}, {b / 1024:.0f}, {ms:.1f}" for name, (n, b, ms) in sorted(lines.items()))
        print(
            f"{report['layout']:10}{report['threads']:>8}{report['step_ms']:>9.1f}{report['cpu_ms']:>8.1f}"
            f"{spent:>19.1f}   {detail}"
        )
    print("\nmilliseconds of one collective, both ranks ready")
    for size, times in reports[0]["single"].items():
        print(f"{int(size) * 4 // 1024:>6} KiB   " + "   ".join(f"{name} {ms:.2f}" for name, ms in times.items()))
    if json_path:
        json_path.write_text(json.dumps(reports, indent=1))
    return 0


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--layout", required=True)
    arguments.add_argument("--steps", type=int, required=True)
    options = arguments.parse_args()
    worker(options.layout, options.steps)
