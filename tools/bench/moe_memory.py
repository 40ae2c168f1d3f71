#!/usr/bin/env python3
"""Peak memory of the expert block by number of chunks, beside what the memory model says it keeps.

    python tools/bench/moe_memory.py [--chunks 1,2,4,8] [--dtype fp32|bf16] [--json FILE]

Two ranks share the experts; shapes as in moe_overlap.py. Every arm is a launch of its own. The allocator is told to
take every tensor from the system and to give it back at once (MALLOC_MMAP_THRESHOLD_), so that the resident set is the
memory in use, buffers of the link included. "kept" is what a forward adds, "peak" the highest point of forward and
backward, from /proc (VmHWM, reset before each pass), median of five passes on rank 0. Weight gradients go into
`main_grad`, as in training.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from processes import AT_ONCE, MB, resident_mb  # noqa: E402
from throttled_links import run_ranks  # noqa: E402

RANKS, ROUNDS, WARM_UP = 2, 5, 3


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", default="1,2,4,8")
    parser.add_argument("--tokens", type=int, default=1024, help="of a rank")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def rank(options: argparse.Namespace) -> None:
    """One arm on one rank; rank 0 writes what it saw."""
    import torch

    torch.set_num_threads(1)
    from overlap.layers import Shape, build_block, make_input, random_weights, transformer_config

    from megatron_telechat import parallel
    from megatron_telechat.backend import get_backend
    from megatron_telechat.config.schema import ParallelConfig, RunConfig

    arm = json.loads(options.arm)
    backend = get_backend("cpu")
    backend.install()
    state = parallel.initialize(
        RunConfig(parallel=ParallelConfig(world_size=RANKS, expert_model_parallel_size=RANKS)), backend
    )
    shape = Shape(tokens=options.tokens, dtype=options.dtype)
    block = build_block(shape, transformer_config(shape, RANKS), state.process_groups, random_weights(shape))
    block.num_chunks, block.recompute_experts = arm["chunks"], arm["recompute"]
    for parameter in block.experts.parameters():
        parameter.main_grad = torch.zeros(parameter.shape)
        parameter.grad_added_to_main_grad = False
    tokens, direction = make_input(shape)
    kept, peaks = [], []
    for number in range(WARM_UP + ROUNDS):
        torch.distributed.barrier()
        before = resident_mb("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        output, _ = block(tokens.clone().requires_grad_())
        held = resident_mb("VmRSS")
        output.backward(direction)
        if number >= WARM_UP:
            kept.append(held - before)
            peaks.append(resident_mb("VmHWM") - before)
        del output
        for parameter in block.parameters():
            parameter.grad = None
    torch.distributed.barrier()
    if state.rank == 0:
        Path(arm["result"]).write_text(json.dumps({"kept": statistics.median(kept), "peak": statistics.median(peaks)}))
    parallel.destroy()


def expected_kept_mb(options: argparse.Namespace, recompute: bool) -> float:
    """What the memory model charges for the experts of such a layer on one rank, its input and output added."""
    from overlap.layers import Shape

    from megatron_telechat.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainingConfig
    from megatron_telechat.costs.activations import BYTES, expert_activations, tokens_of

    shape = Shape(tokens=options.tokens, dtype=options.dtype)
    run = RunConfig(
        model=ModelConfig(
            num_layers=1,
            hidden_size=shape.hidden,
            num_attention_heads=8,
            ffn_hidden_size=shape.ffn,
            num_experts=shape.experts,
            moe_ffn_hidden_size=shape.ffn,
            moe_router_topk=shape.topk,
            vocab_size=1024,
        ),
        parallel=ParallelConfig(world_size=RANKS, expert_model_parallel_size=RANKS),
        training=TrainingConfig(seq_length=shape.tokens, micro_batch_size=1, precision=shape.dtype),
    )
    size = BYTES[shape.dtype]
    kept, dropped = expert_activations(run.model, size, tokens_of(run))
    return (kept - dropped * recompute + 2 * size * shape.tokens * shape.hidden) / MB


def start(options: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for recompute in (False, True):
        for chunks in map(int, options.chunks.split(",")):
            with tempfile.NamedTemporaryFile(suffix=".json") as result:
                arm = json.dumps({"chunks": chunks, "recompute": recompute, "result": result.name})
                command = [sys.executable, "-W", "ignore", __file__, "--arm", arm]
                command += ["--tokens", str(options.tokens), "--dtype", options.dtype]
                code = run_ranks(command, RANKS, pin=True, timeout=300.0, env=AT_ONCE)
                if code:
                    raise SystemExit(code)
                rows.append({"recompute": recompute, "chunks": chunks, **json.loads(Path(result.name).read_text())})
    return {"tokens": options.tokens, "dtype": options.dtype, "rows": rows}


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(sys.argv[1:] if argv is None else argv)
    if "RANK" in os.environ:
        rank(options)
        return 0
    report = start(options)
    print(f"{'':12}{'chunks':>8}{'kept MB':>10}{'model MB':>10}{'peak MB':>10}{'/ whole':>9}")
    for recompute in (False, True):
        rows = [row for row in report["rows"] if row["recompute"] == recompute]
        for row in rows:
            row["model"] = expected_kept_mb(options, recompute)
            name = "recompute" if recompute else "keep"
            ratio = row["peak"] / rows[0]["peak"]
            print(
                f"{name:12}{row['chunks']:>8}{row['kept']:>10.1f}{row['model']:>10.1f}{row['peak']:>10.1f}{ratio:>9.2f}"
            )
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
