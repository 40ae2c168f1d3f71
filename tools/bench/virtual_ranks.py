#!/usr/bin/env python3
"""Every preset on virtual ranks: a rank of each pipeline stage at the published layout, beside the models of costs; and
of the first and the last stage of the largest ones with rows of 128K and 256K tokens over context-parallel ranks.

    python tools/bench/virtual_ranks.py [--presets telechat2-3b,telechat2-39b-a12b] [--json FILE]

Executed are memory and exchanges of the CUDA path on tensors without numbers; no accelerator is needed. The bars: peak
within 5 % of the memory model, exchanged bytes within 1 % of `costs.volumes`, 60 seconds (of the published layouts)
and 2 GiB a rank. The exit code is 1 where one is missed. A rank takes one core; run it on an idle machine where its
seconds matter. The long rows of the 115B take minutes a rank: each exchanges keys and values in every layer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_telechat.cli.text import gib, table  # noqa: E402
from megatron_telechat.config import load_run_config  # noqa: E402
from megatron_telechat.config.schema import RunConfig  # noqa: E402
from megatron_telechat.costs.memory import stage_memory  # noqa: E402
from megatron_telechat.virtual.compare import exchanged  # noqa: E402
from megatron_telechat.virtual.launch import executable, execute, one_of_each_stage  # noqa: E402

WORLDS = {
    "telechat2-3b": 8,
    "telechat2-7b": 8,
    "telechat2-35b": 16,
    "telechat2-39b-a12b": 1024,
    "mixtral-8x7b": 32,
    "telechat2-115b": 512,
}
"""Ranks of each preset; the layout is the preset's own."""
PACKED = "packed"
LONG = {
    "telechat2-35b 128k": "--world-size 256 --seq-length 131072 --context-parallel-size 8",
    "telechat2-35b 256k": "--world-size 512 --seq-length 262144 --context-parallel-size 16",
    "telechat2-115b 128k": "--world-size 512 --seq-length 131072 --context-parallel-size 8",
    "telechat2-115b 256k": "--world-size 1024 --seq-length 262144 --context-parallel-size 16",
}
"""Rows over ranks: flags beside the preset, whole layers recomputed."""
MOST_MEMORY_OFF, MOST_BYTES_OFF, MOST_SECONDS, MOST_HOST_BYTES = 0.05, 0.01, 60.0, 2 * 2**30
SMALLEST_EXCHANGE = 1 << 24
"""Exchanges below this many bytes a step are not compared: a buffer's padding is a share of them."""


@dataclass(frozen=True)
class Row:
    """One executed rank.

    Attributes:
        memory, exchanges: executed over modelled; of the exchanges the one that is furthest off.
    """

    preset: str
    rank: int
    stage: int
    peak_bytes: int
    memory: float
    exchanges: float
    seconds: float
    host_bytes: int

    @property
    def missed(self) -> list[str]:
        """The bars that it missed."""
        bars = {
            "memory": abs(self.memory - 1) <= MOST_MEMORY_OFF,
            "exchanges": abs(self.exchanges - 1) <= MOST_BYTES_OFF,
            "seconds": self.seconds <= MOST_SECONDS or self.preset in LONG,
            "host memory": self.host_bytes <= MOST_HOST_BYTES,
        }
        return [name for name, held in bars.items() if not held]


def run_of(name: str) -> RunConfig:
    """The run of a preset; "NAME packed": with documents kept apart; or one of `LONG`."""
    preset, _, kind = name.partition(" ")
    flags = f"{LONG[name]} --recompute-granularity full" if name in LONG else f"--world-size {WORLDS[preset]}"
    command = f"--preset {preset} {flags} --device cuda --dry-run --mock-data --train-iters 10000"
    run = load_run_config(command.split(), {}).run
    if kind != PACKED:
        return run
    return replace(run, data=replace(run.data, reset_attention_mask=True, reset_position_ids=True))


def execute_preset(name: str) -> list[Row]:
    """A rank of each stage; of the long rows of the first and the last one."""
    whole = run_of(name)
    run = executable(whole)
    stages = stage_memory(run)
    rows: list[Row] = []
    ranks = one_of_each_stage(run)
    for record in execute(run, [ranks[0], ranks[-1]] if name in LONG else ranks):
        shares = [
            entry.bytes / entry.modelled
            for entry in exchanged(whole, record)
            if entry.modelled is not None and entry.modelled >= SMALLEST_EXCHANGE
        ]
        rows.append(
            Row(
                name,
                record.rank,
                record.stage,
                record.peak_bytes,
                record.peak_bytes / stages[record.stage].total_bytes,
                max(shares, key=lambda share: abs(share - 1), default=1.0),
                record.seconds,
                record.host_bytes,
            )
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench and return its exit code."""
    names = [*WORLDS, f"telechat2-7b {PACKED}", f"telechat2-39b-a12b {PACKED}", *LONG]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--presets",
        default=",".join(names),
        help="names with commas; 'NAME packed' for documents, 'NAME 128k' for long rows",
    )
    parser.add_argument("--json", type=Path, help="write every row to this file")
    options = parser.parse_args(argv)
    chosen = options.presets.split(",")
    unknown = [name for name in chosen if name not in names and name.partition(" ")[0] not in WORLDS]
    if unknown:
        parser.error(f"unknown preset {unknown[0]}; there are {', '.join(WORLDS)}")
    rows: list[Row] = []
    for name in chosen:
        rows += execute_preset(name)
        print(f"{name}: done", file=sys.stderr, flush=True)
    cells = [["preset", "rank", "stage", "peak GiB", "executed/modelled", "exchanges", "s", "GiB here", ""]]
    for row in rows:
        cells.append(
            [
                row.preset, str(row.rank), str(row.stage), gib(row.peak_bytes), f"{row.memory:.3f}",
                f"{row.exchanges:.3f}", f"{row.seconds:.0f}", gib(row.host_bytes), " ".join(row.missed) or "ok",
            ]
        )  # fmt: skip
    print("\n".join(table(cells, left=(0, 8))))
    if options.json:
        options.json.write_text(json.dumps([{**vars(row), "missed": row.missed} for row in rows], indent=1))
    return 1 if any(row.missed for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
