#!/usr/bin/env python3
"""A picture of one forward and backward of the expert block: what the computation and the link did, from a real run.

    python tools/bench/moe_timeline.py --links --mbit 300 --chunks 4 --plot FILE [--stand-in 60]   root, iproute2
    torchrun --nproc-per-node 2 tools/bench/moe_timeline.py --plot FILE                            the link there is

Two ranks, shapes as in moe_overlap.py; rank 0 is drawn, after a few passes to warm up. Letters as in docs/moe.md: D
dispatch, C combine, F experts forward, B and W gradients of inputs and of weights, with a ' the transfers of gradients.
A transfer is drawn from the end of the one before it, or from its start if the link was free: the channel carries one
at a time.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from throttled_links import LinksError, links_up, run_ranks  # noqa: E402
from timeline import add_arguments, draw_rank_0  # noqa: E402

COLOURS = {"F": "#4878cf", "B": "#d65f5f", "W": "#e0a458", "R": "#956cb4", "D": "#6acc65", "C": "#3a8f5f"}
COLOURS |= {f"{name}'": COLOURS[name] for name in "DC"}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, 300.0, "the experts' products")
    parser.add_argument("--chunks", type=int, default=4)
    return parser.parse_args(argv)


def trace(options: argparse.Namespace) -> list[Any]:
    """Spans of one forward and backward on this rank."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    from overlap.layers import Shape, build_block, make_input, random_weights, transformer_config, use_stand_in

    from megatron_telechat import parallel
    from megatron_telechat.backend import get_backend
    from megatron_telechat.config.schema import ParallelConfig, RunConfig

    backend = get_backend("cpu")
    backend.install()
    size = int(os.environ["WORLD_SIZE"])
    state = parallel.initialize(
        RunConfig(parallel=ParallelConfig(world_size=size, expert_model_parallel_size=size)), backend
    )
    shape = Shape()
    block = build_block(shape, transformer_config(shape, size), state.process_groups, random_weights(shape))
    if options.stand_in:
        use_stand_in(block, options.stand_in)
    block.num_chunks = options.chunks
    tokens, direction = make_input(shape)
    for number in range(4):
        torch.distributed.barrier()
        block.clock.take_spans()
        block.clock.tracing = number == 3
        output, _ = block(tokens.clone().requires_grad_())
        output.backward(direction)
    torch.distributed.barrier()
    spans = block.clock.take_spans()
    parallel.destroy()
    return spans


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse(argv)
    if "RANK" in os.environ:
        return draw_rank_0(options, trace, COLOURS, f"one expert block, rank 0 of 2, {options.chunks} chunks")
    command = [sys.executable, str(Path(__file__).resolve()), *argv]
    try:
        if not options.links:
            return run_ranks(command, size=2, links=None, pin=True, timeout=300.0, env={"OMP_NUM_THREADS": "1"})
        with links_up(2, options.mbit) as links:
            return run_ranks(command, size=2, links=links, pin=True, timeout=300.0, env={"OMP_NUM_THREADS": "1"})
    except LinksError as error:
        print(f"moe_timeline: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
