"""Runs of one model on many layouts: 20 losses, 20 gradient norms, all gradients of the first step, and the weights at
the end.

A mixture's experts are those that the one-rank run chose, so that no layout can part from it at a near tie; what each
layout would have chosen itself is recorded.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.harness import Cases  # noqa: E402
from tests.training.runs import DENSE, MOE, QKNORM, SHARED, run_and_keep  # noqa: E402

TP2 = "--tensor-model-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
VP2 = "--num-virtual-stages-per-pipeline-rank 2"
EP2 = "--expert-model-parallel-size 2 --no-fold-tensor-into-experts"
DIST = "--use-distributed-optimizer"
OVERLAP = "--overlap-grad-reduce --overlap-param-gather"
ETP2 = "--no-fold-tensor-into-experts --expert-tensor-parallel-size 2"
MOE_AGAIN = "--recompute-granularity selective --recompute-modules core_attn moe"
CHUNKED = "--loss-chunk-rows 24"
"""Of a micro-batch of 64 rows."""
STEPS = 21
"""One for its gradients, and those of the run."""
UNEVEN = "--pipeline-model-parallel-layout Et|t*3L"

GROUPED = "dense_pp2_interleaved_groups_of_3"
"""Eight micro-batches, of which the last two are a shorter group."""

NOISY = "moe_noisy_router"
"""Rounding that is larger than any machine's: every logit of the router is off by about 1e-6 of itself."""

LAYOUTS = {
    1: {
        "dense_one": (DENSE, ""),
        "dense_recompute_full": (DENSE, "--recompute-granularity full"),
        "dense_recompute_selective": (
            DENSE,
            "--recompute-granularity selective --recompute-modules core_attn mlp layernorm",
        ),
        "dense_recompute_mixed": (DENSE, "--recompute-layout full*1,none*1,core_attn+layernorm*1,mlp*1"),
        "dense_chunked_loss_recompute_full": (DENSE, f"{CHUNKED} --recompute-granularity full"),
        "moe_one": (MOE, ""),
        "moe_distributed_optimizer": (MOE, DIST),
        "moe_recompute_full": (MOE, "--recompute-granularity full"),
        "moe_recompute_selective": (MOE, MOE_AGAIN),
        "moe_chunks3": (MOE, "--moe-input-chunks 3"),
        NOISY: (MOE, ""),
        "shared_one": (SHARED, ""),
        "qknorm_one": (QKNORM, ""),
    },
    2: {
        "dense_dp2": (DENSE, ""),
        "dense_dp2_distributed_overlap": (DENSE, f"{DIST} {OVERLAP}"),
        "dense_tp2_sp": (DENSE, TP2),
        "dense_tp2_no_sp": (DENSE, f"{TP2} --no-sequence-parallel"),
        "dense_pp2": (DENSE, PP2),
        "dense_pp2_interleaved": (DENSE, f"{PP2} {VP2}"),
        "dense_pp2_uneven": (DENSE, f"{PP2} {UNEVEN}"),
        "dense_pp2_uneven_interleaved": (DENSE, f"{PP2} {VP2} {DIST} --pipeline-model-parallel-layout E|tt|t|tL"),
        GROUPED: (DENSE, f"{PP2} {VP2} --micro-batch-size 1 --microbatch-group-size-per-virtual-pipeline-stage 3"),
        "dense_pp2_recompute_per_stage": (DENSE, f"{PP2} --recompute-layout full*2|none*1,core_attn+mlp*1"),
        "dense_dp2_distributed_overlap_chunked_loss": (DENSE, f"{DIST} {OVERLAP} {CHUNKED}"),
        "dense_tp2_sp_chunked_loss": (DENSE, f"{TP2} {DIST} {CHUNKED}"),
        "dense_tp2_no_sp_chunked_loss": (DENSE, f"{TP2} --no-sequence-parallel {CHUNKED}"),
        "moe_dp2": (MOE, ""),
        "moe_dp2_distributed_overlap": (MOE, f"{DIST} {OVERLAP}"),
        "moe_etp2_distributed": (MOE, f"{ETP2} {DIST}"),
        "moe_pp2": (MOE, PP2),
        "moe_ep2": (MOE, EP2),
        "moe_ep2_distributed_overlap": (MOE, f"{EP2} {DIST} {OVERLAP}"),
        "moe_tp2_folded_ep2": (MOE, TP2),
        "moe_tp2_folded_ep2_recompute": (MOE, f"{TP2} --recompute-granularity full"),
        "moe_ep2_auto_chunks": (MOE, f"{EP2} --moe-input-chunks auto"),
        "moe_ep2_chunks3_distributed_overlap": (MOE, f"{EP2} {DIST} {OVERLAP} --moe-input-chunks 3"),
        "moe_tp2_folded_chunks5_recompute": (MOE, f"{TP2} --moe-input-chunks 5 --recompute-granularity full"),
        "shared_etp2": (SHARED, ETP2),
        "qknorm_tp2_sp_distributed": (QKNORM, f"{TP2} {DIST}"),
        "qknorm_tp2_no_sp": (QKNORM, f"{TP2} --no-sequence-parallel"),
        "shared_tp2_folded_chunks3_recompute_moe": (SHARED, f"{TP2} --moe-input-chunks 3 {MOE_AGAIN}"),
    },
    4: {
        "dense_pp4": (DENSE, "--pipeline-model-parallel-size 4"),
        "dense_tp4": (DENSE, "--tensor-model-parallel-size 4"),
        "dense_tp2_pp2": (DENSE, f"{TP2} {PP2}"),
        "moe_ep4": (MOE, EP2.replace("2", "4")),
        "moe_ep2_dp2_distributed": (MOE, f"{EP2} {DIST}"),
        "moe_tp2_pp2_ep2": (MOE, f"{TP2} {PP2}"),
        "moe_tp2_pp2_ep2_interleaved_distributed": (MOE, f"{TP2} {PP2} {VP2} {DIST}"),
        "moe_tp2_pp2_ep2_uneven_recompute": (
            MOE,
            f"{TP2} {PP2} {UNEVEN} --recompute-layout full*1|moe*1,none*1,core_attn*1",
        ),
        "moe_ep2_dp2_distributed_overlap_recompute": (MOE, f"{EP2} {DIST} {OVERLAP} {MOE_AGAIN}"),
        "moe_pp2_dp2_interleaved_distributed_overlap": (MOE, f"{PP2} {VP2} {DIST} {OVERLAP}"),
        "moe_ep2_etp2": (MOE, f"{EP2} {ETP2}"),
        "moe_tp2_etp4": (MOE, f"{TP2} {ETP2.replace('2', '4')}"),
        "moe_tp2_ep2_etp2": (MOE, f"{TP2} {EP2} --expert-tensor-parallel-size 2"),
        "moe_tp2_ep2_etp2_chunks3": (MOE, f"{TP2} {EP2} --expert-tensor-parallel-size 2 --moe-input-chunks 3"),
        "moe_tp2_pp2_ep2_interleaved_chunks3_chunked_loss": (
            MOE,
            f"{TP2} {PP2} {VP2} {DIST} {OVERLAP} --moe-input-chunks 3 {MOE_AGAIN} {CHUNKED}",
        ),
    },
}

SLOW = {
    *("dense_recompute_full", "moe_recompute_full", "moe_distributed_optimizer", "moe_chunks3"),
    *("dense_dp2_distributed_overlap", "dense_tp2_sp", "dense_pp2", "dense_pp2_recompute_per_stage"),
    *("moe_ep2", "moe_ep2_auto_chunks", "moe_etp2_distributed", "qknorm_tp2_sp_distributed"),
    *("moe_tp2_pp2_ep2_interleaved_distributed", "moe_tp2_etp4", "moe_ep2_dp2_distributed_overlap_recompute"),
    "moe_tp2_folded_ep2_recompute",
    "shared_etp2",
    "dense_pp4",
    "dense_tp4",
    "moe_ep4",
    "moe_ep2_dp2_distributed",
    "moe_tp2_ep2_etp2_chunks3",
    "dense_recompute_selective",
    "dense_pp2_uneven",
    "moe_dp2",
    "moe_ep2_distributed_overlap",
    "moe_tp2_pp2_ep2",
    "moe_ep2_etp2",
    "dense_chunked_loss_recompute_full",
    "dense_tp2_no_sp_chunked_loss",
    "dense_pp2_interleaved",
    "moe_pp2",
    "moe_dp2_distributed_overlap",
    "qknorm_tp2_no_sp",
    *("dense_dp2", "dense_tp2_pp2", "moe_tp2_folded_ep2", "moe_tp2_ep2_etp2"),
}
"""Layouts whose parts others hold too: with the tests marked slow."""


def layouts_of(world: int, slow: bool) -> list[str]:
    """The layouts of one launch."""
    return [name for name in LAYOUTS[world] if (name in SLOW) == slow]


cases = Cases()


def one_routing(name: str, folder: Path) -> list[str]:
    """Flags: take the choices of the one-rank run of this model, and record one's own."""
    model = name.split("_")[0]
    if model in ("dense", "qknorm"):
        return []
    record = ["--moe-routing-record", str(folder / f"{name}.routing")]
    return record if name == f"{model}_one" else [*record, "--moe-routing-replay", str(folder / f"{model}_one.routing")]


@contextmanager
def noise(name: str) -> Iterator[None]:
    import torch

    from megatron_telechat.moe import Router

    real, generator = Router.gating, torch.Generator().manual_seed(3)

    def gating(router, hidden):
        logits = real(router, hidden)
        return logits * (1 + 1e-6 * torch.randn(logits.shape, generator=generator))

    if name == NOISY:
        Router.gating = gating
    try:
        yield
    finally:
        Router.gating = real


@contextmanager
def noted_ops(ops: list[tuple[bool, int, int]]) -> Iterator[None]:
    """Note what megatron-core's schedule runs: whether it is a forward, of which virtual stage, of which
    micro-batch."""
    from megatron.core.pipeline_parallel import schedules

    forward, backward, outputs = schedules.forward_step, schedules.backward_step, {}

    def noted_forward(*args, **kwargs):
        output, tokens = forward(*args, **kwargs)
        outputs[id(output)] = output, (kwargs["vp_stage"], kwargs["current_microbatch"])
        ops.append((True, *outputs[id(output)][1]))
        return output, tokens

    def noted_backward(entered, output, *args):
        ops.append((False, *outputs.pop(id(output))[1]))
        return backward(entered, output, *args)

    schedules.forward_step, schedules.backward_step = noted_forward, noted_backward
    try:
        yield
    finally:
        schedules.forward_step, schedules.backward_step = forward, backward


def run_case(name: str) -> dict:
    folder = Path(os.environ["RUNS_DIR"])
    base, flags = LAYOUTS[_world][name]
    ops: list[tuple[bool, int, int]] = []
    with noted_ops(ops) if name == GROUPED else nullcontext():
        found = run_and_keep([*base, *flags.split(), *one_routing(name, folder)], folder, name)
    return {**found, "ops": ops[: len(ops) // STEPS]}


_world = int(os.environ.get("WORLD_SIZE", "1"))
for _name in layouts_of(_world, bool(os.environ.get("RUNS_SLOW"))):
    cases.add(_name, noise(_name)(lambda name=_name: run_case(name)))

if __name__ == "__main__":
    cases.main()
