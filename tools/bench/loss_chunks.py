#!/usr/bin/env python3
"""Output layer and loss: chunk by chunk against all rows at once, memory and time.

    python tools/bench/loss_chunks.py [--tp 1,2] [--dtype fp32|bf16] [--rows N] [--json FILE]

Two arms in one process a rank take turns: megatron-core's ColumnParallelLinear and vocab_parallel_cross_entropy, and
our output layer with --loss-chunk-rows. Both do what a training does: forward, backward, and the weight's gradient into
an fp32 `main_grad`. Losses and gradients of the arms are compared first; the bench ends where they differ.

Peak is the highest point of forward and backward above the start of both, from /proc (VmHWM, reset before each pass),
kept what lies between them. The allocator gives large tensors back at once (MALLOC_MMAP_THRESHOLD_). One core a rank;
with --tp 2 the ranks share the rows by sequence parallelism and talk over gloo. Medians; ratios are medians of the
ratios of the rounds; "by CPU" leaves out the time that a rank waited for its core. The exit code is 1 where a floor is
missed: peak 4.5 times less, 1.2 times the time.

The shape is that of telechat2-tiny. With a wide hidden size the products decide, of which chunks make four where three
are needed: the time then goes to 4/3.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from throttled_links import run_ranks  # noqa: E402

from megatron_telechat.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainingConfig  # noqa: E402

WHOLE, CHUNKS = "all rows at once", "in chunks"
LEAST_MEMORY, MOST_TIME = 4.5, 1.2
WARM_UP = 1
TOLERANCE = {"fp32": 2e-6, "bf16": 2e-2}
"""Of losses (absolute) and of gradients (relative norm): in bf16 products of other shapes round otherwise."""
MB = 1e6
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576", "MALLOC_TOP_PAD_": "0"}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", default="1,2", help="tensor-parallel sizes, with commas")
    parser.add_argument("--tokens", type=int, default=8192, help="rows of the micro-batch")
    parser.add_argument("--vocabulary", type=int, default=8192, help="columns of the logits on a rank")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--rows", type=int, default=1024, help="of a chunk")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small shapes: does it run")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.quick:
        options.tokens, options.vocabulary, options.hidden, options.rows, options.rounds = 2048, 4096, 64, 256, 2
    return options


def run_of(options: argparse.Namespace, tensor: int, rows: int) -> RunConfig:
    """A run with this output layer."""
    return RunConfig(
        model=ModelConfig(
            num_layers=1,
            hidden_size=options.hidden,
            ffn_hidden_size=options.hidden,
            num_attention_heads=4,
            vocab_size=options.vocabulary * tensor,
        ),
        parallel=ParallelConfig(world_size=tensor, tensor_model_parallel_size=tensor),
        training=TrainingConfig(device="cpu", precision=options.dtype, seq_length=options.tokens, loss_chunk_rows=rows),
    )


def resident_mb(field: str) -> float:
    """VmRSS or VmHWM of this process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024 / MB


class Arms:
    """Both ways to a loss, on one weight."""

    def __init__(self, options: argparse.Namespace, tensor: int):
        import torch

        from megatron_telechat import parallel
        from megatron_telechat.backend import get_backend
        from megatron_telechat.model.output_layer import OutputLayer
        from megatron_telechat.model.transformer_config import DTYPES, transformer_config

        backend = get_backend("cpu")
        backend.install()
        run = run_of(options, tensor, options.rows)
        self.state = parallel.initialize(run, backend)
        self.layer = OutputLayer(run, transformer_config(run, self.state, backend.traits), self.state.tp_group)
        generator = torch.Generator().manual_seed(3)
        shape = (options.tokens, 1, options.hidden)
        hidden = torch.randn(shape, generator=generator).to(DTYPES[options.dtype])
        own = options.tokens // tensor
        self.hidden = hidden[own * self.state.tp_rank : own * (self.state.tp_rank + 1)].clone()
        self.labels = torch.randint(0, run.model.vocab_size, (1, options.tokens), generator=generator)
        self.direction = torch.rand(1, options.tokens, generator=generator)
        weight: Any = self.layer.weight
        with torch.no_grad():
            own_generator = torch.Generator().manual_seed(5 + self.state.tp_rank)
            weight.copy_(torch.randn(weight.shape, generator=own_generator) * 0.05)
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(weight.shape), False
        self.weight = weight

    def loss(self, arm: str, hidden: Any) -> Any:
        """[1, tokens]."""
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        if arm == CHUNKS:
            return self.layer(hidden, labels=self.labels)[0]
        logits, _ = self.layer(hidden)
        return vocab_parallel_cross_entropy(logits, self.labels.t().contiguous()).t().contiguous()

    def take(self, arm: str, between: Callable[[], None] = lambda: None) -> tuple[Any, Any]:
        """Forward and backward; the losses and the gradient of the hidden states."""
        hidden = self.hidden.detach().requires_grad_()
        loss = self.loss(arm, hidden)
        between()
        loss.backward(self.direction)
        if not self.weight.grad_added_to_main_grad:  # as DistributedDataParallel's hook does
            self.weight.main_grad.add_(self.weight.grad)
        self.weight.grad, self.weight.grad_added_to_main_grad = None, False
        return loss.detach(), hidden.grad

    def errors(self) -> dict[str, float]:
        """How far the arms are apart: the worst loss, and the gradients of hidden states and weight."""
        found = []
        for arm in (WHOLE, CHUNKS):
            self.weight.main_grad.zero_()
            found.append((*self.take(arm), self.weight.main_grad.clone()))
        (loss, *ours), (expected, *theirs) = found[1], found[0]
        apart = {"loss": float((loss - expected).abs().max())}
        for name, one, other in zip(("hidden", "weight"), ours, theirs, strict=True):
            apart[name] = float((one.float() - other.float()).norm() / other.float().norm())
        return apart

    def measure(self, arm: str) -> dict[str, float]:
        """One pass."""
        import torch

        kept: list[float] = []
        torch.distributed.barrier()
        before = resident_mb("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        start, cpu = time.perf_counter(), time.process_time()
        self.take(arm, lambda: kept.append(resident_mb("VmRSS") - before))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        return {"s": seconds, "cpu_s": cpu, "peak_mb": resident_mb("VmHWM") - before, "kept_mb": kept[0]}


def rank(options: argparse.Namespace) -> None:
    """All rounds on one rank; rank 0 writes what it saw."""
    import torch

    torch.set_num_threads(1)
    order = json.loads(options.arm)
    arms = Arms(options, order["tp"])
    apart = arms.errors()
    if not all(error <= TOLERANCE[options.dtype] for error in apart.values()):
        raise SystemExit(f"the arms do not agree: {apart}")
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(WARM_UP + options.rounds):
        turn = (WHOLE, CHUNKS) if number % 2 else (CHUNKS, WHOLE)
        rounds.append({arm: arms.measure(arm) for arm in turn})
    torch.distributed.barrier()
    if arms.state.rank == 0:
        Path(order["result"]).write_text(json.dumps({"errors": apart, "rounds": rounds[WARM_UP:]}))
    torch.distributed.destroy_process_group()


def modelled_mb(options: argparse.Namespace, tensor: int, rows: int) -> float:
    """What the memory model says of the arm, without the norm's input and output."""
    from megatron_telechat.costs.activations import BYTES, output_layer_activations

    run = run_of(options, tensor, rows)
    size = BYTES[options.dtype]
    output = output_layer_activations(run)
    return (output.kept + output.working_set - 2 * size * options.hidden * options.tokens / tensor) / MB


def start(options: argparse.Namespace, tensor: int) -> dict[str, Any]:
    """One size of the tensor group."""
    with tempfile.NamedTemporaryFile(suffix=".json") as result:
        arm = json.dumps({"tp": tensor, "result": result.name})
        command = [sys.executable, "-W", "ignore", __file__, "--arm", arm]
        for name in ("tokens", "vocabulary", "hidden", "rows", "dtype", "rounds"):
            command += [f"--{name}", str(getattr(options, name))]
        code = run_ranks(command, tensor, pin=True, env=AT_ONCE)
        if code:
            raise SystemExit(code)
        report = json.loads(Path(result.name).read_text())
    arms = {}
    for arm, rows in ((WHOLE, 0), (CHUNKS, options.rows)):
        taken = [one[arm] for one in report["rounds"]]
        arms[arm] = {name: statistics.median(one[name] for one in taken) for name in taken[0]}
        arms[arm]["modelled_mb"] = modelled_mb(options, tensor, rows)
    pairs = [(one[WHOLE], one[CHUNKS]) for one in report["rounds"]]
    return {
        "tp": tensor,
        "errors": report["errors"],
        "arms": arms,
        "memory_ratio": statistics.median(whole["peak_mb"] / ours["peak_mb"] for whole, ours in pairs),
        "time_ratio": statistics.median(ours["s"] / whole["s"] for whole, ours in pairs),
        "cpu_ratio": statistics.median(ours["cpu_s"] / whole["cpu_s"] for whole, ours in pairs),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(arguments)
    if "RANK" in os.environ:
        rank(options)
        return 0
    shape = {name: getattr(options, name) for name in ("tokens", "vocabulary", "hidden", "rows", "dtype")}
    print(
        f"{options.tokens:,} rows x {options.vocabulary:,} columns a rank, hidden {options.hidden}, {options.dtype}; "
        f"chunks of {options.rows:,} rows"
    )
    print(f"{'':4}{'':18}{'s':>8}{'peak MB':>10}{'kept MB':>10}{'model MB':>10}   memory   time  by CPU")
    results, missed = [], False
    for size in map(int, options.tp.split(",")):
        results.append(row := start(options, size))
        held = row["memory_ratio"] >= LEAST_MEMORY and row["time_ratio"] <= MOST_TIME
        missed = missed or not held
        for arm, found in row["arms"].items():
            ratios = f"{row['memory_ratio']:8.1f}x{row['time_ratio']:6.2f}x{row['cpu_ratio']:7.2f}x"
            print(
                f"TP{row['tp']:<2}{arm:18}{found['s']:8.2f}{found['peak_mb']:10.1f}{found['kept_mb']:10.1f}"
                f"{found['modelled_mb']:10.1f}" + ("" if arm == WHOLE else ratios + ("  ok" if held else "  missed")),
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps({"shape": shape, "rounds": options.rounds, "rows": results}, indent=1))
    return 1 if missed and not options.quick else 0


if __name__ == "__main__":
    sys.exit(main())
