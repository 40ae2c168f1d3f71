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
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from throttled_links import start_ranks  # noqa: E402

RATIOS = (0.5, 1.0, 1.8)
QUICK = dict(tokens=96, hidden=64, ffn=96)
MISSED = 1


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_argument_group("where")
    where.add_argument("--links", action="store_true", help="make throttled links, run all rows over them, remove them")
    where.add_argument("--ranks", type=int, default=2, help="without torchrun: so many, all experts spread over them")
    where.add_argument("--no-pin", action="store_true", help="do not bind rank r to core r")
    where.add_argument("--timeout", type=float, default=3600.0, help="seconds until the ranks are killed")
    what = parser.add_argument_group("what")
    what.add_argument("--tokens", type=int, default=1024, help="of a rank")
    what.add_argument("--hidden", type=int, default=512)
    what.add_argument("--ffn", type=int, default=768)
    what.add_argument("--experts", type=int, default=16)
    what.add_argument("--topk", type=int, default=4)
    what.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    what.add_argument("--stand-in", type=float, metavar="GFLOPS", help="the experts' products sleep flops / rate")
    what.add_argument("--chunks", default="1,2,4,8", help="fixed numbers of chunks; 1 is always among them")
    what.add_argument("--ratios", default=",".join(map(str, RATIOS)), help="link/FFN ratios of the rows, with --links")
    what.add_argument("--no-unlimited", action="store_true", help="leave out the row without a limit")
    what.add_argument("--rounds", type=int, default=7)
    what.add_argument("--quick", action="store_true", help="tiny shapes, two rounds, one ratio")
    out = parser.add_argument_group("output")
    out.add_argument("--json", type=Path, help="write everything measured to this file")
    out.add_argument("--plot", type=Path, help="write a picture to this file (matplotlib)")
    out.add_argument("--check", action="store_true", help=f"exit with {MISSED} if a bar is missed")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser()
    options = parser.parse_args(argv)
    try:
        options.fixed = tuple(sorted({1, *map(int, options.chunks.split(","))}))
        options.targets = tuple(map(float, options.ratios.split(",")))
    except ValueError as error:
        parser.error(f"--chunks and --ratios are numbers with commas: {error}")
    if options.quick:
        vars(options).update(QUICK, rounds=2, targets=options.targets[:1])
    if min(options.fixed) < 1 or options.rounds < 1:
        parser.error("--chunks and --rounds begin at 1")
    if options.stand_in is not None and options.stand_in <= 0:
        parser.error("--stand-in is a rate in GFLOP/s")
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
    return MISSED if options.check and missed else 0


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

    if links is None:
        add("this link")
    else:
        for target, mbit in bench.rates(options.targets).items():
            add(f"ratio {target:g}", mbit, target)
        if not options.no_unlimited:
            add("no limit")
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
    from turns import check_lines

    # The bars are for the full shapes.
    found = [] if options.quick else list(checks(report["rows"], report["wire_bytes"]))
    for line in check_lines(found):
        print(line)
    report["checks"] = [{**check._asdict(), "ok": check.ok} for check in found]
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    if options.plot:
        plot(options.plot, report["rows"], report["mode"])
    return sum(not check.ok for check in found)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse(argv)
    if "RANK" in os.environ:
        return rank(options)
    command = [sys.executable, "-u", "-W", "ignore", __file__, *argv]
    return start_ranks(command, options.ranks, options.links, not options.no_pin, options.timeout)


if __name__ == "__main__":
    sys.exit(main())
