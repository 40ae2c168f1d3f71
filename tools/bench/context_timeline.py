#!/usr/bin/env python3
"""A picture of one forward and backward of the attention over ranks: what the computation and the link did, from a real
run.

    python tools/bench/context_timeline.py --links --mbit 130 --plot FILE [--stand-in 15]        root, iproute2
    torchrun --nproc-per-node 4 tools/bench/context_timeline.py --plot FILE                      the link there is

Rank 0 is drawn, after a few passes to warm up. Names as in docs/long_context.md: own and A blocks of the forward, own
and B blocks of the backward, K keys and values, G their gradients.
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

from throttled_links import Links, start_ranks  # noqa: E402
from timeline import add_arguments, draw_rank_0  # noqa: E402

COLOURS = {"own": "#8aa6d6", "A": "#4878cf", "B": "#d65f5f", "K": "#6acc65", "G": "#3a8f5f"}
WARM_UP = 3


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, 130.0, "the products")
    parser.add_argument("--ranks", type=int, default=4, help="without torchrun: so many")
    parser.add_argument("--tokens", type=int, default=1024, help="of a rank")
    parser.add_argument("--pieces", type=int, default=2, help="of each step")
    return parser.parse_args(argv)


def trace(options: argparse.Namespace) -> list[Any]:
    """Spans of one forward and backward on this rank."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    from context.arms import Arms
    from context.problem import Problem
    from turns import reshape

    from megatron_telechat import parallel
    from megatron_telechat.backend import get_backend

    ranks = int(os.environ["WORLD_SIZE"])
    problem = Problem(options.tokens * ranks, 8, 8, 32, ranks)
    parallel.initialize(problem.run(), get_backend("cpu"))
    try:
        links = Links.of_this_rank()
        reshape(links.set_rate if links else None, options.mbit)
        arm = Arms(problem, options.stand_in).ours(options.pieces)
        clock = arm.way.core.clock
        for number in range(WARM_UP + 1):
            torch.distributed.barrier()
            clock.take_spans()
            clock.tracing = number == WARM_UP
            arm.run()
        torch.distributed.barrier()
        return clock.take_spans()
    finally:
        parallel.destroy()


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse(argv)
    if "RANK" in os.environ:
        title = f"attention over ranks, rank 0 of {os.environ['WORLD_SIZE']}, {options.pieces} pieces a step"
        return draw_rank_0(options, trace, COLOURS, title)
    command = [sys.executable, "-u", "-W", "ignore", __file__, *argv]
    return start_ranks(command, options.ranks, options.links, True, 300.0)


if __name__ == "__main__":
    sys.exit(main())
