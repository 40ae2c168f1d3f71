"""Runs of one model on many context-parallel layouts, at a length where NTK and attention scaling act: 20 losses, all
gradients of the first step, the weights at the end. Messages of a few rows, so that steps are cut into pieces."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.harness import Cases  # noqa: E402
from tests.training.runs import DENSE, MOE, run_and_keep  # noqa: E402

LONG = "--seq-length 64 --rotary-training-seqlen 16 --rotary-base-seqlen 16".split()
CP2, CP4 = "--context-parallel-size 2", "--context-parallel-size 4"
TP2 = "--tensor-model-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
VP2 = "--num-virtual-stages-per-pipeline-rank 2"
EP2 = "--expert-model-parallel-size 2 --no-fold-tensor-into-experts"
DIST = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
AGAIN = "--recompute-granularity"
P2P, A2A = "--cp-comm-type p2p", "--cp-comm-type a2a"

LAYOUTS = {
    1: {"dense_one": "", "moe_one": ""},
    2: {
        "dense_cp2_p2p": f"{CP2} {P2P} --cp-pieces 1",
        "dense_cp2_p2p_pieces2_keep": f"{CP2} {P2P} --cp-pieces 2 --cp-keep-received",
        "dense_cp2_a2a_distributed": f"{CP2} {A2A} {DIST}",
        "dense_cp2_recompute_full": f"{CP2} {P2P} {AGAIN} full --cp-pieces 4",
        "dense_cp2_recompute_core": f"{CP2} {P2P} {AGAIN} selective --recompute-modules core_attn",
        "moe_cp2": f"{CP2} {P2P}",
        "moe_cp2_ep2": f"{CP2} {P2P} {EP2}",
    },
    4: {
        "dense_cp4_p2p_pieces2": f"{CP4} {P2P} --cp-pieces 2",
        "dense_cp4_2d": f"{CP4} --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2",
        "dense_cp4_a2a": f"{CP4} {A2A}",
        "dense_cp2_dp2_distributed": f"{CP2} {P2P} {DIST} --cp-keep-received",
        "dense_cp2_tp2_sp": f"{CP2} {P2P} {TP2}",
        "dense_cp2_pp2_interleaved": f"{CP2} {P2P} {PP2} {VP2} {DIST}",
        "moe_cp2_pp2_ep2": f"{CP2} {P2P} {PP2} {EP2}",
        "moe_cp2_tp2_folded_ep2_recompute": f"{CP2} {P2P} {TP2} {AGAIN} full",
    },
}

QUICK = {
    *LAYOUTS[1],
    "dense_cp2_recompute_full",
    "moe_cp2_ep2",
    "dense_cp4_2d",
}
"""In the suite; the others, whose parts these hold too, are with the tests marked slow."""

cases = Cases()


def run_case(name: str) -> dict:
    folder = Path(os.environ["RUNS_DIR"])
    model = name.split("_")[0]
    base, routing = (MOE if model == "moe" else DENSE), []
    if model == "moe":
        routing = ["--moe-routing-record", str(folder / f"{name}.routing")]
        if name != "moe_one":
            routing += ["--moe-routing-replay", str(folder / "moe_one.routing")]
    return run_and_keep([*base, *LONG, *LAYOUTS[_world][name].split(), *routing], folder, name)


_world = int(os.environ.get("WORLD_SIZE", "1"))
_slow = bool(os.environ.get("RUNS_SLOW"))
for _name in [name for name in LAYOUTS.get(_world, ()) if (name in QUICK) != _slow]:
    cases.add(_name, lambda name=_name: run_case(name))

if __name__ == "__main__":
    from megatron_telechat.parallel.context import plan

    plan.LEAST_ROWS = 4
    cases.main()
