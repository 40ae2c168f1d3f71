#!/usr/bin/env python3
"""Attention whose row is spread over ranks: how much of the exchange hides, and against other ways to exchange.

    python tools/bench/context_parallel.py --links [--stand-in 60] [--json FILE] [--plot FILE]      root, iproute2
    python tools/bench/context_parallel.py --links --ranks 4 --stand-in 60 --ratios 0.6,1.2,2.35,2.6
    python tools/bench/context_parallel.py --links --packed --ratios 1.2             documents that are kept apart
    python tools/bench/context_parallel.py --memory                                  peak memory, 4 ranks, 32K tokens
    python tools/bench/context_parallel.py --links --quick                           small shapes: does it run
    torchrun --nproc-per-node 2 tools/bench/context_parallel.py                      one row over the link there is

Forward and backward of one layer's attention. The arms take turns within one run:

    ours auto            the product: keys and values go straight to who needs them; pieces, and the layout of packed
                         rows, as it chooses them for the link
    ours 1, 2, 4 pieces  each step of the exchange in so many pieces
    ours keep            as auto; what was received is kept for the backward
    control              ours, waiting for each transfer at once: must miss the floors
    Ulysses, 2D          ours, with all (2D: two) ranks exchanging heads for tokens
    zigzag ring          whole shards go round, gradients after them in fp32, as in ring-flash-attention
    TE ring              the same as TransformerEngine does it: back from the last shard, gradients in the type of the
                         computation, one hop less
    all-gather           all keys and values on every rank, gradients by a reduce-scatter
    torch ...            the ring of torch.distributed.tensor.experimental, with both of its rotations
    per-document zigzag  packed rows: each document cut into 2 N chunks, whole shards go round; with the ring of
                         ring-flash-attention, or of TransformerEngine (Megatron's THD): per-document TE
    ring of shards       packed rows: the zigzag ring over the row as if it was one document
    only-compute         ours, but what arrives is taken from memory
    only-link            the transfers of ours in their order, without any computation

Before any time is taken, output and gradients of every arm are compared with the attention of one rank. With
``--links`` the ranks run over links of throttled_links.py, at rates where the transfers of ours alone take 0.6, 1.2 and
2.6 times as long as its computation alone (both in one piece, forward and backward), and without a limit. "card" counts
what leaves the interface of a rank, TCP's share included.

With ``--stand-in RATE`` the products sleep for ``flops / RATE`` (GFLOP/s, as an accelerator leaves the cores to the
transfers) in every arm; merging, packing, sums and transfers stay real. Such figures repeat on a busy machine; real
products need a quiet one, with a core a rank. Every line of output says which they are.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import over_links  # noqa: E402
from throttled_links import Links, start_ranks  # noqa: E402

RATIOS = (0.6, 1.2, 2.6)
QUICK = dict(tokens=256, heads=4, groups=2, width=32)
BALANCE_RANKS, BALANCE_LENGTH = (2, 8), 32768


def own_arguments(group: Any) -> None:
    group.add_argument("--heads", type=int, default=8)
    group.add_argument("--groups", type=int, default=2, help="of keys and values")
    group.add_argument("--width", type=int, default=64, help="of a head")
    group.add_argument("--packed", action="store_true", help="rows of documents that are kept apart")
    group.add_argument("--memory", action="store_true", help="peak memory of ours and of all-gather, nothing else")
    group.add_argument("--memory-arm", nargs=2, help=argparse.SUPPRESS)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    return over_links.read(over_links.make_parser(__doc__, own_arguments, 2048, RATIOS), argv, QUICK)


def rank(options: argparse.Namespace) -> int:
    """One rank of the bench."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    from context.problem import Problem

    from megatron_telechat import parallel
    from megatron_telechat.backend import get_backend

    backend = get_backend("cpu")
    ranks = int(os.environ["WORLD_SIZE"])
    problem = Problem(
        options.tokens * ranks, options.heads, options.groups, options.width, ranks, documents(options, ranks),
        options.dtype,
    )  # fmt: skip
    state = parallel.initialize(problem.run(), backend)
    try:
        if options.memory_arm:
            from context import memory

            name, result = options.memory_arm
            memory.rank(name, problem, Path(result))
            return 0
        report = measure(options, problem, state, backend)
        missed = write(options, report) if state.rank == 0 else 0
    finally:
        parallel.destroy()
    return over_links.MISSED if options.check and missed else 0


def documents(options: argparse.Namespace, ranks: int) -> tuple[int, ...]:
    """Where the documents of the row end; nothing for a row of one."""
    from context.balance import web_like

    return tuple(web_like(options.tokens * ranks, 1, 2 * ranks)[0].tolist()) if options.packed else ()


def measure(options: argparse.Namespace, problem: Any, state: Any, backend: Any) -> dict[str, Any]:
    """All rows; the same on every rank."""
    from context import errors
    from context.arms import Arms, Chooser
    from context.balance import spread
    from context.report import mode_label, table
    from context.rows import Bench

    def say(line: str) -> None:
        if state.rank == 0:
            print(line, flush=True)

    links = Links.of_this_rank()
    mode = mode_label(options.stand_in)
    say(f"{problem.ranks} ranks, {asdict(problem)}; {mode}; median of {options.rounds}")
    found = {}
    for what, rate in (("real products", None), ("stand-in", options.stand_in)):
        if what == "real products" or rate:
            arms = Arms(problem, rate)
            chooser = Chooser(arms, state, backend)
            bench = Bench(arms, chooser, options.rounds, links.set_rate if links else None, say)
            found[what] = bench.verify()
    say("largest relative error against one rank: "
        + ", ".join(f"{what} {max(values.values()):.1e}" for what, values in found.items()))  # fmt: skip
    wire, exact = bench.wire(), errors.measure(problem.ranks)
    rows = []

    def add(*arguments: Any) -> None:
        rows.append(bench.row(*arguments))
        for line in table(rows[-1], mode):
            say(line)

    over_links.add_rows(options, links, bench, add)
    return {
        "mode": mode,
        "stand_in_gflops": options.stand_in,
        "links": links is not None,
        "packed": options.packed,
        "shape": asdict(problem),
        "rounds": options.rounds,
        "errors_against_one_rank": found,
        "errors": exact,
        "wire": wire,
        "balance": {
            size: {name: one._asdict() for name, one in spread(BALANCE_LENGTH, size).items()} for size in BALANCE_RANKS
        },
        "rows": rows,
    }


def write(options: argparse.Namespace, report: dict[str, Any]) -> int:
    """Checks, JSON and plot; returns how many floors were missed."""
    from context.report import balance_lines, checks, plot

    for line in balance_lines(report["balance"]):
        print(line)
    # The floors are for the full shapes.
    found = [] if options.quick else list(checks(report))
    return over_links.conclude(options, report, found, plot)


def memory_of_arms(options: argparse.Namespace, command: Sequence[str]) -> int:
    """Peak memory of each arm, its check and the JSON."""
    from context import memory
    from context.report import memory_check
    from turns import check_lines

    peaks = memory.start(command, options.timeout)
    print(f"peak above the inputs, rank 0 of {memory.RANKS}, {memory.LENGTH} tokens, bf16")
    for name, peak in peaks.items():
        print(f"  {name:20}{peak:>8.1f} MB")
    check = memory_check(peaks)
    for line in check_lines([check]):
        print(line)
    if options.json:
        options.json.write_text(
            json.dumps({"peak_mb": peaks, "checks": [{**check._asdict(), "ok": check.ok}]}, indent=1)
        )
    return over_links.MISSED if options.check and not check.ok else 0


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse(argv)
    if "RANK" in os.environ:
        return rank(options)
    command = [sys.executable, "-u", "-W", "ignore", __file__, *argv]
    if options.memory:
        return memory_of_arms(options, command)
    return start_ranks(command, options.ranks, options.links, not options.no_pin, options.timeout)


if __name__ == "__main__":
    sys.exit(main())
