"""``tools/compare_routing.py``: where two runs sent tokens to other experts, and whether that was rounding."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_telechat.cli.tool import ToolParser, natural, run_tool
from megatron_telechat.config.routing import read_recording
from megatron_telechat.config.trace import trace_steps
from megatron_telechat.errors import EXIT_NUMERICS, EXIT_OK

TIE = 1e-5
"""Sums of fp32 in another order move a router's logit by about 1e-6."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code (0 equal up to ties, 2 arguments, 3 a damaged recording, 5 other choices)."""
    return run_tool(_run, argv)


def _parser() -> ToolParser:
    parser = ToolParser(
        prog="tools/compare_routing.py",
        description="Compare two recordings of --moe-routing-record; exit 0 where all differences are ties, else 5.",
    )
    add = parser.add_argument
    add("recordings", nargs=2, type=Path, metavar="DIR", help="folders that --moe-routing-record wrote")
    add(
        "--tie",
        type=_gap,
        default=TIE,
        metavar="GAP",
        help="largest gap between the last chosen logit and the next one that counts as a tie "
        f"[{TIE:g}; with bf16 about 1e-2]",
    )
    add("--steps", type=_steps, metavar="A-B", help="steps to compare [all that both recordings hold]")
    add("--limit", type=natural, default=20, metavar="N", help="lines shown [20]")
    return parser


def _gap(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a gap from 0")
    return value


def _steps(text: str) -> range:
    try:
        return trace_steps(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} names no steps: it takes {error}") from None


def _run(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    from megatron_telechat.training.routing_compare import common_steps, differences

    one, other = (read_recording(path) for path in args.recordings)
    steps = common_steps(one, other, args.steps)
    left_out = [len(set(recording.steps()) - set(steps)) for recording in (one, other)]
    different = beyond = shown = 0
    for found in differences(one, other, steps, args.tie):
        different, beyond = different + found.different, beyond + found.beyond_ties
        if shown < args.limit:
            print(_line(found))
        shown += 1
    if shown > args.limit:
        print(f"... {shown - args.limit} more layers and steps (--limit)")
    layers = len(range(0, one.shape["num_layers"], one.shape["moe_layer_freq"]))
    tokens = len(steps) * layers * one.shape["global_batch_size"] * one.shape["seq_length"]
    print(
        f"{'DIFFERENT' if beyond else 'EQUAL'}: {len(steps)} steps, {tokens:,} choices; {different:,} differ, of which "
        f"{different - beyond:,} are ties (gap at most {args.tie:g})"
    )
    if args.steps is None and any(left_out):
        print(
            f"steps in one recording only, not compared: {left_out[0]} of {args.recordings[0]}, {left_out[1]} of "
            f"{args.recordings[1]}"
        )
    return EXIT_NUMERICS if beyond else EXIT_OK


def _line(found) -> str:
    worst = found.worst
    experts = " / ".join(" ".join(map(str, part)) for part in worst.experts)
    return (
        f"step {found.step} layer {found.layer}: {found.different:,} of {found.tokens:,} tokens differ, "
        f"{found.ties:,} of them ties; clearest: sample {worst.sample} position {worst.position}, experts {experts}, "
        f"gap {worst.gaps[0]:.2g} / {worst.gaps[1]:.2g}"
    )
