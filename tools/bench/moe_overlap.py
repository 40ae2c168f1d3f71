#!/usr/bin/env python3
"""How much of the experts' exchange hides behind their computation, and against megatron-core's MoELayer.

    python tools/bench/moe_overlap.py --links [--stand-in 60] [--json FILE] [--plot FILE] everything; root, iproute2
    python tools/bench/moe_overlap.py --links --quick                                     small shapes: does it run
    torchrun --nproc-per-node 2 tools/bench/moe_overlap.py                                one row over the link there is

Forward and backward of one MoE layer through autograd: 2 ranks with half of 16 experts each, top-4, hidden 512, experts
of 768, 1024 tokens a rank. The arms take turns within one run:

    k=1, 2, 4, 8       our block with its input in so many chunks
    auto               our block with the number that moe/autotune.py chooses on this link
    only-compute       our block, but what arrives is taken from memory
    only-link          the block's transfers in their order, without any computation
    megatron-core      its MoELayer: alltoall dispatcher, SequentialMLP
    serial             our block in 1 chunk, every wait beside its issue; k=1 hides a transfer behind weight gradients
    negative control   our block in 4 chunks, every wait beside its issue: must miss the bar

Before any time is taken, output and gradients of every arm are compared with k=1. With ``--links`` the ranks run over
links of throttled_links.py, at the rates where the link takes 0.5, 1 and 1.8 times as long as the computation (forward,
k=1), and without a limit. "wire" counts what leaves a rank by the sizes of the messages, "card" by the counter of its
interface: TCP's share, and acknowledgements, included.

With ``--stand-in RATE`` the experts' products of our block and of megatron-core's layer sleep for ``flops / RATE``
(RATE in GFLOP/s, as an accelerator leaves the cores to the transfers); everything else stays real. Such figures repeat
on a busy machine; real products need a quiet one, with a core a rank. Every line of output says which they are.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import over_links  # noqa: E402
from throttled_links import start_ranks  # noqa: E402

RATIOS = (0.5, 1.0, 1.8)
QUICK = dict(tokens=96, hidden=64, ffn=96)


def own_arguments(group: Any) -> None:
    group.add_argument("--hidden", type=int, default=512)
    group.add_argument("--ffn", type=int, default=768)
    group.add_argument("--experts", type=int, default=16, help="spread over all ranks")
    group.add_argument("--topk", type=int, default=4)
    group.add_argument("--chunks", default="1,2,4,8", help="fixed numbers of chunks; 1 is always among them")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = over_links.make_parser(__doc__, own_arguments, 1024, RATIOS)
    options = over_links.read(parser, argv, QUICK)
    try:
        options.fixed = tuple(sorted({1, *map(int, options.chunks.split(","))}))
    except ValueError as error:
        parser.error(f"--chunks are numbers with commas: {error}")
    if min(options.fixed) < 1:
        parser.error("--chunks begin at 1")
    return options


def rank(options: argparse.Namespace) -> int:
    """One rank of the bench."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    from megatron_telechat import parallel
    from megatron_telechat.backend import get_backend
    from megatron_telechat.config.schema import ParallelConfig, RunConfig

    backend = get_backend("cpu")
    backend.install()
    size = int(os.environ["WORLD_SIZE"])
    state = parallel.initialize(
        RunConfig(parallel=ParallelConfig(world_size=size, expert_model_parallel_size=size)), backend
    )
    try:
        report = measure(options, state)
    finally:
        parallel.destroy()
    missed = write(options, report) if state.rank == 0 else 0
    return over_links.MISSED if options.check and missed else 0


def measure(options: argparse.Namespace, state: Any) -> dict[str, Any]:
    """All rows; the same on every rank."""
    from overlap.arms import Arms
    from overlap.layers import (
        Shape,
        build_block,
        build_core,
        make_input,
        random_weights,
        transformer_config,
        use_core_stand_in,
        use_stand_in,
    )
    from overlap.report import mode_label, table
    from overlap.rows import Bench, Options
    from throttled_links import Links

    def say(line: str) -> None:
        if state.rank == 0:
            print(line, flush=True)

    shape = Shape(options.tokens, options.hidden, options.ffn, options.experts, options.topk, options.dtype)
    config, weights = transformer_config(shape, state.ep_size), random_weights(shape)
    block = build_block(shape, config, state.process_groups, weights)
    layer = build_core(shape, config, state.process_groups, weights)
    arms = Arms(shape, block, layer, make_input(shape))
    links = Links.of_this_rank()
    bench = Bench(arms, Options(options.rounds, options.fixed), links.set_rate if links else None, say)
    mode = mode_label(options.stand_in)
    say(f"{state.world_size} ranks, {asdict(shape)}; {mode}; median of {options.rounds}")
    errors = {"real products": bench.verify()}
    if options.stand_in:
        use_stand_in(block, options.stand_in)
        use_core_stand_in(layer, options.stand_in)
        arms.forget()
        errors["stand-in"] = bench.verify()
    say(
        "largest relative error against k=1: "
        + ", ".join(f"{what} {max(found.values()):.1e}" for what, found in errors.items())
    )
    wire = bench.wire_bytes()
    rows = []

    def add(*arguments: Any) -> None:
        rows.append(bench.row(*arguments))
        for line in table(rows[-1], mode, wire):
            say(line)

    over_links.add_rows(options, links, bench, add)
    return {
        "mode": mode,
        "stand_in_gflops": options.stand_in,
        "ranks": state.world_size,
        "links": links is not None,
        "shape": asdict(shape),
        "rounds": options.rounds,
        "errors_against_k1": errors,
        "wire_bytes": wire,
        "rows": rows,
    }


def write(options: argparse.Namespace, report: dict[str, Any]) -> int:
    """Checks, JSON and plot; returns how many bars were missed."""
    from overlap.report import checks, plot

    # The bars are for the full shapes.
    found = [] if options.quick else list(checks(report["rows"], report["wire_bytes"]))
    return over_links.conclude(options, report, found, plot)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse(argv)
    if "RANK" in os.environ:
        return rank(options)
    command = [sys.executable, "-u", "-W", "ignore", __file__, *argv]
    return start_ranks(command, options.ranks, options.links, not options.no_pin, options.timeout)


if __name__ == "__main__":
    sys.exit(main())
