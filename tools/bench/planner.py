#!/usr/bin/env python3
"""The solver on large problems of the cost model: value, proven bound, gap, seconds, and what other choices lose.

    python tools/bench/planner.py [--set NAME] [--only TEXT] [--time-limit 30] [--problem FILE.json ...] [--json FILE]
    python tools/bench/planner.py [--set NAME] --list

Every problem is a run (the flags are printed by --list) on a device file of the package; `loose` takes the memory
limit away, a size in GiB replaces the device's. Beside the solver: Megatron's uniform split, its
account-for-embedding/loss flags, the best that plain flags say, and two published surrogate objectives, each minimised
exactly (~ marks one that its own time limit cut short). Every makespan comes from the same simulator. Seconds are wall
time on a machine that should do nothing else, and processor time.

The set binding-32 has 32 virtual stages and limits that make layers be recomputed (but not of the model of experts),
for the solver alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_telechat.config import load_run_config  # noqa: E402
from megatron_telechat.config.schema import RunConfig  # noqa: E402
from megatron_telechat.costs.devices import device_spec  # noqa: E402
from megatron_telechat.planner.baselines import megatron_splits  # noqa: E402
from megatron_telechat.planner.build import balance_problem, mtp_block  # noqa: E402
from megatron_telechat.planner.problem import BalanceProblem  # noqa: E402
from megatron_telechat.planner.solve import solve  # noqa: E402
from megatron_telechat.planner.worker import processors  # noqa: E402
from tools.bench.yardsticks.surrogates import surrogates  # noqa: E402

LOOSE = float(2**20)
DEVICE = "ascend-910b-64g"
DENSE_80 = (
    "--num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64 --group-query-attention "
    "--num-query-groups 8 --seq-length 8192 --padded-vocab-size 128256 --micro-batch-size 1 --bf16 "
    "--use-distributed-optimizer --tensor-model-parallel-size 8 --sequence-parallel --swiglu --normalization RMSNorm "
    "--position-embedding-type rope --untie-embeddings-and-output-weights --disable-bias-linear --attention-dropout 0 "
    "--hidden-dropout 0 --mock-data"
)
DENSE_58 = (
    "--num-layers 58 --hidden-size 7168 --ffn-hidden-size 18432 --num-attention-heads 56 --seq-length 4096 "
    "--padded-vocab-size 129280 --micro-batch-size 1 --bf16 --use-distributed-optimizer --tensor-model-parallel-size "
    "4 --sequence-parallel --swiglu --normalization RMSNorm --position-embedding-type rope "
    "--untie-embeddings-and-output-weights --disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --mock-data"
)
MOE_58 = (
    DENSE_58 + " --num-experts 64 --moe-router-topk 8 --moe-ffn-hidden-size 2048 --expert-model-parallel-size 16 "
    "--expert-tensor-parallel-size 1"
)


@dataclass(frozen=True)
class Case:
    """A run in flags, the recompute it may choose from, and the memory of a device (GiB; unset: the device's own).

    first: (layers, flags of a run): that many of its layers before those of `flags`; a configuration knows no such
    mixture.
    """

    name: str
    flags: str
    pipeline: int
    virtual_stages: int
    microbatches: int
    data_parallel: int
    model_parallel: int
    memory_gib: float | None = None
    kinds: tuple[str, ...] = ("full",)
    device: str = DEVICE
    first: tuple[int, str] | None = None
    mtp: bool = False

    def words(self, flags: str) -> list[str]:
        sizes = {
            "world-size": self.pipeline * self.data_parallel * self.model_parallel,
            "global-batch-size": self.microbatches * self.data_parallel,
            "pipeline-model-parallel-size": self.pipeline,
            "num-virtual-stages-per-pipeline-rank": self.virtual_stages,
        }
        return [*flags.split(), *(word for name, size in sizes.items() for word in (f"--{name}", str(size)))]

    def problem(self) -> BalanceProblem:
        device = device_spec(self.device)
        assert device is not None  # it comes with the package
        limit = None if self.memory_gib is None else self.memory_gib * 2**30
        run, before = self._run(self.flags), self.first and self._run(self.first[1])
        block = mtp_block(run, device) if self.mtp else None
        problem = balance_problem(run, device, self.kinds, mem_limit_bytes=limit, mtp=block)
        if before is None or self.first is None:
            return problem
        group = replace(balance_problem(before, device, self.kinds).groups[0], count=self.first[0])
        return replace(problem, groups=(group, *problem.groups))

    def _run(self, flags: str) -> RunConfig:
        return load_run_config([*self.words(flags), "--dry-run"], {}, planning=True).run


def telechat_115b(
    name: str, pipeline: int, virtual_stages: int, microbatches: int, memory_gib: float | None = None, **more
) -> Case:
    dp = 512 // (8 * pipeline)
    return Case(
        f"115B {name}", "--preset telechat2-115b", pipeline, virtual_stages, microbatches, dp, 8, memory_gib, **more
    )


def telechat_39b(name: str, pipeline: int, virtual_stages: int, memory_gib: float | None = None) -> Case:
    return Case(f"39B-A12B {name}", "--preset telechat2-39b-a12b", pipeline, virtual_stages, 32, 16, 4, memory_gib)


CASES = (
    telechat_115b("PP8", 8, 1, 64),
    telechat_115b("PP16", 16, 1, 64),
    telechat_39b("PP4", 4, 1),
    telechat_39b("PP6", 6, 1),
    Case("80 layers PP16", DENSE_80, 16, 1, 64, 4, 8, device="h100-80g"),
    Case("61 layers dense+MoE+MTP PP8", MOE_58, 8, 1, 32, 16, 4, device="h100-80g", first=(3, DENSE_58), mtp=True),
    telechat_115b("PP8 V2 loose", 8, 2, 32, LOOSE),
    telechat_115b("PP8 V2 binding", 8, 2, 32, 50),
    telechat_39b("PP4 V2", 4, 2),
    Case("35B PP5 V2 selective+full", "--preset telechat2-35b", 5, 2, 30, 4, 4, 38, kinds=("core_attn+mlp", "full")),
    telechat_115b("PP8 V3", 8, 3, 32, LOOSE),
    telechat_115b("PP8 V3 binding", 8, 3, 32, 50),
    telechat_115b("PP8 V4", 8, 4, 32, LOOSE),
    telechat_115b("PP16 V2", 16, 2, 32, LOOSE),
    telechat_115b("PP8 V3, 8 micro-batches", 8, 3, 8),
    telechat_115b("the same, binding", 8, 3, 8, 44),
    telechat_115b("PP8 V4, 8 micro-batches", 8, 4, 8),
    telechat_115b("PP16 V2, 16 micro-batches", 16, 2, 16, LOOSE),
)


def telechat_35b(name: str, pipeline: int, virtual_stages: int, microbatches: int, memory_gib: float) -> Case:
    return Case(f"35B {name}", "--preset telechat2-35b", pipeline, virtual_stages, microbatches, 4, 4, memory_gib)


def moe_58(name: str, pipeline: int, virtual_stages: int, memory_gib: float) -> Case:
    return Case(f"58 layers MoE {name}", MOE_58, pipeline, virtual_stages, 32, 16, 4, memory_gib, device="h100-80g")


BINDING_32 = (
    telechat_115b("PP8 V4 m32 50 GiB", 8, 4, 32, 50),
    telechat_115b("PP8 V4 m32 40 GiB", 8, 4, 32, 40),
    telechat_115b("PP8 V4 m32 30 GiB", 8, 4, 32, 30),
    telechat_115b("PP8 V4 m16 44 GiB", 8, 4, 16, 44),
    telechat_115b("PP8 V4 m8 40 GiB", 8, 4, 8, 40),
    telechat_115b("PP16 V2 m16 38 GiB", 16, 2, 16, 38),
    telechat_115b("PP16 V2 m32 32 GiB", 16, 2, 32, 32),
    telechat_115b("PP16 V2 m64 26 GiB", 16, 2, 64, 26),
    telechat_115b("PP4 V8 m16 56 GiB", 4, 8, 16, 56),
    telechat_115b("PP4 V8 m4 48 GiB", 4, 8, 4, 48),
    telechat_35b("PP8 V4 m8 34 GiB", 8, 4, 8, 34),
    telechat_35b("PP8 V4 m32 30 GiB", 8, 4, 32, 30),
    telechat_35b("PP16 V2 m32 22 GiB", 16, 2, 32, 22),
    moe_58("PP8 V4 m32 60 GiB", 8, 4, 60),
    moe_58("PP16 V2 m32 40 GiB", 16, 2, 40),
)
SETS = {"reference": CASES, "binding-32": BINDING_32}


def processor_seconds() -> float:
    """Of this process and of those that it has waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def measure(name: str, one: BalanceProblem, time_limit: float, processes: int, compare: bool) -> dict:
    started = processor_seconds()
    answer = solve(one, time_limit, processes=processes)
    row = {"problem": name, **answer.to_json(), "nodes": answer.nodes, "cpu": processor_seconds() - started}
    row["recomputes"] = answer.assignment is not None and any(map(any, answer.assignment.modes))
    row["others"] = {
        other.name: {
            "excess": None if other.makespan is None or not answer.makespan else other.makespan / answer.makespan - 1,
            "proved": other.proved,
        }
        for other in ((*megatron_splits(one), *surrogates(one)) if compare else ())
    }
    return row


def show(row: dict) -> None:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f} %"

    if row["makespan"] is None:
        print(f"{row['problem']:<32}{row['status']}", flush=True)
        return
    numbers = f"{row['makespan']:>10.6g}{share(row['gap']):>9}{row['seconds']:>8.2f}{row['cpu']:>8.2f}{row['nodes']:>7}"
    others = "".join(f"{share(one['excess']) + '~' * (not one['proved']):>12}" for one in row["others"].values())
    recompute = "yes" if row["recomputes"] else "no"
    print(f"{row['problem']:<32}{row['status']:<9}{recompute:>10}{numbers}{others}", flush=True)


def chosen(args: argparse.Namespace) -> Iterator[tuple[str, BalanceProblem]]:
    for name in args.problem:
        yield Path(name).stem, BalanceProblem.from_json(Path(name).read_text(), name)
    for case in () if args.problem else SETS[args.set]:
        if args.only in case.name:
            yield case.name, case.problem()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", default="reference", choices=SETS, help="which problems")
    parser.add_argument("--only", default="", help="problems whose name holds this text")
    parser.add_argument("--time-limit", type=float, default=30.0, help="seconds a problem")
    parser.add_argument("--processes", type=int, default=processors(), help="that search [one for each processor]")
    parser.add_argument("--problem", nargs="*", default=[], help="balance problems in files instead")
    parser.add_argument("--list", action="store_true", help="print device, memory and flags of each problem and stop")
    parser.add_argument("--json", help="write the rows to this file")
    args = parser.parse_args()
    if args.list:
        for case in SETS[args.set]:
            memory = "no limit" if case.memory_gib == LOOSE else f"{case.memory_gib or 'its own'} GiB"
            print(
                f"{case.name}: {case.device}, {memory}, recompute {', '.join(case.kinds)}\n  "
                f"{' '.join(case.words(case.flags))}"
            )
        return
    compare = args.set == "reference"
    heads = f"{'problem':<32}{'status':<9}{'recomputes':>10}{'value s':>10}{'gap':>9}{'s':>8}{'cpu s':>8}{'boxes':>7}"
    others = f"{'uniform':>12}{'accounted':>12}{'flags':>12}{'stage':>12}{'pairs':>12}"
    print(heads + others if compare else heads)
    rows = []
    for name, one in chosen(args):
        rows.append(measure(name, one, args.time_limit, args.processes, compare))
        show(rows[-1])
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
