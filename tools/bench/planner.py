#!/usr/bin/env python3
"""The solver on large balance problems: value, proven bound, gap, seconds, and what plain splits would lose.

    python tools/bench/planner.py [--only TEXT] [--time-limit 30] [--problem FILE.json ...] [--json FILE]

Without --problem the problems are made here, from the shapes of the models: times in microseconds from FLOPs at a
fixed rate, bytes from parameters and activations, to be solved, not to be believed. Every value, also those of the
baselines, comes from the same simulator. Seconds are wall time on a machine that should do nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Sequence

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_telechat.planner.baselines import baselines  # noqa: E402
from megatron_telechat.planner.problem import BalanceProblem, Block, LayerGroup, Mode  # noqa: E402
from megatron_telechat.planner.solve import solve  # noqa: E402

GIB = 2**30
FLOPS_PER_MICROSECOND = 150e6
VOCABULARY, SEQUENCE = 131072, 8192
BYTES_PER_PARAMETER = 6 + 12 / 8
"""bf16 weight and fp32 gradient, and the optimizer over 8 data-parallel ranks."""


@dataclass(frozen=True)
class Layer:
    """Shape of a decoder layer; `kv` is the width of the keys; experts 0 for a dense one."""

    hidden: int
    kv: int
    ffn: int
    tp: int = 8
    experts: int = 0
    topk: int = 1

    def group(self, count: int, kinds: Sequence[str]) -> LayerGroup:
        h, s, tp = self.hidden, SEQUENCE, self.tp
        core = 2 * s * s * h
        gemm = (
            2 * s * h * (h + 2 * self.kv) + 2 * s * h * h + 6 * s * h * self.ffn * self.topk + 2 * s * h * self.experts
        )
        f = round((gemm + core) / tp / FLOPS_PER_MICROSECOND)
        b = round((2 * gemm + 2.5 * core) / tp / FLOPS_PER_MICROSECOND)
        parameters = (2 * h * h + 2 * h * self.kv) / tp + 3 * h * self.ffn * max(self.experts, 1) / 8
        ffn_bytes = 6 * self.ffn * self.topk * s / tp
        act = round((8 * h + 4 * h + 4 * self.kv) * s / tp + ffn_bytes)
        known = {
            "none": Mode("none", 0, act, 0),
            "selective": Mode("selective", round(0.12 * f), round(act - 0.66 * ffn_bytes), round(0.66 * ffn_bytes)),
            "full": Mode("full", f, round(2 * h * s / tp), act - round(2 * h * s / tp)),
        }
        return LayerGroup(count, f, b, round(parameters * BYTES_PER_PARAMETER), tuple(known[kind] for kind in kinds))


def problem(
    P: int,
    V: int,
    m: int,
    limit_gib: float,
    *layers: tuple[Layer, int],
    kinds: Sequence[str] = ("none", "full"),
    mtp: bool = False,
) -> BalanceProblem:
    groups = tuple(layer.group(count, kinds) for layer, count in layers)
    last, group = layers[-1][0], groups[-1]
    h, s, tp = last.hidden, SEQUENCE, last.tp
    w = round(VOCABULARY * h / tp * BYTES_PER_PARAMETER)
    f = round(2 * s * h * VOCABULARY / tp / FLOPS_PER_MICROSECOND)
    head = Block(f, 2 * f, w, round((6 * VOCABULARY + 4 * h) * s / tp))
    embed = Block(round(0.01 * group.f), round(0.01 * group.f), w, round(2 * h * s / tp))
    block = Block(group.f + head.f, group.b + head.b, group.w, group.modes[0].act + head.act) if mtp else None
    return BalanceProblem(P, V, m, limit_gib * GIB, 2 * GIB, 150, groups, embed, head, block)


LARGE, TELECHAT_39B, EIGHTY = Layer(8192, 1024, 40960), Layer(4096, 4096, 6144, 4, 16, 4), Layer(8192, 1024, 28672)
DENSE, MOE, MEDIUM = Layer(7168, 7168, 18432), Layer(7168, 7168, 2048, 8, 64, 8), Layer(5120, 5120, 13824, 4)
LOOSE = 2**20


def problems() -> Iterator[tuple[str, BalanceProblem]]:
    yield "115B PP8", problem(8, 1, 64, 54, (LARGE, 96))
    yield "115B PP16", problem(16, 1, 64, 40, (LARGE, 96))
    yield "39B PP4", problem(4, 1, 32, 54, (TELECHAT_39B, 30))
    yield "39B PP6", problem(6, 1, 32, 54, (TELECHAT_39B, 30))
    yield "80 layers PP16", problem(16, 1, 64, 40, (EIGHTY, 80))
    yield "61 layers dense+MoE+MTP PP8", problem(8, 1, 32, 70, (DENSE, 3), (MOE, 58), mtp=True)
    yield "115B PP8 V2 loose", problem(8, 2, 32, LOOSE, (LARGE, 96))
    yield "115B PP8 V2 binding", problem(8, 2, 32, 54, (LARGE, 96))
    yield "39B PP4 V2", problem(4, 2, 32, 54, (TELECHAT_39B, 30))
    yield "40 layers PP5 V2 selective+full", problem(5, 2, 30, 24, (MEDIUM, 40), kinds=("none", "selective", "full"))
    yield "115B PP8 V3", problem(8, 3, 32, LOOSE, (LARGE, 96))
    yield "115B PP8 V4", problem(8, 4, 32, LOOSE, (LARGE, 96))
    yield "115B PP16 V2", problem(16, 2, 32, LOOSE, (LARGE, 96))


def measure(name: str, one: BalanceProblem, time_limit: float) -> dict:
    answer = solve(one, time_limit)
    row = {"problem": name, **answer.to_json(), "nodes": answer.nodes}
    row["baselines"] = {
        other.name: None if other.makespan is None or not answer.makespan else other.makespan / answer.makespan - 1
        for other in baselines(one)
    }
    return row


def show(row: dict) -> None:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f} %"

    if row["makespan"] is None:
        print(f"{row['problem']:<34}{row['status']}", flush=True)
        return
    numbers = f"{row['makespan']:>12.6g}{row['lower_bound']:>12.6g}{share(row['gap']):>9}"
    numbers += f"{row['seconds']:>8.2f}{row['nodes']:>7}"
    others = "".join(f"{share(value):>12}" for value in row["baselines"].values())
    print(f"{row['problem']:<34}{row['status']:<9}{numbers}{others}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="problems whose name holds this text")
    parser.add_argument("--time-limit", type=float, default=30.0, help="seconds a problem")
    parser.add_argument("--problem", nargs="*", default=[], help="balance problems in files instead")
    parser.add_argument("--json", help="write the rows to this file")
    args = parser.parse_args()
    files = [(Path(name).stem, BalanceProblem.from_json(Path(name).read_text(), name)) for name in args.problem]
    print("excess of: uniform split, account_for_embedding/loss, best plain flags, largest stage, all pairs of chunks")
    print(f"{'problem':<34}{'status':<9}{'value':>12}{'bound':>12}{'gap':>9}{'s':>8}{'boxes':>7}"
          f"{'uniform':>12}{'accounted':>12}{'flags':>12}{'stage':>12}{'pairs':>12}")  # fmt: skip
    rows = []
    for name, one in files or problems():
        if args.only in name:
            rows.append(measure(name, one, args.time_limit))
            show(rows[-1])
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
