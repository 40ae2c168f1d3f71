"""Two ranks calibrate small runs, and the cost model predicts from what they found."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megatron_telechat.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_telechat.costs.devices import DeviceSpec, read_device_file, write_device_file
from megatron_telechat.errors import ConfigError
from megatron_telechat.planner.predict import predict
from tests.harness import Cases

cases = Cases()
EXPERTS = dict(num_experts=4, moe_ffn_hidden_size=64, moe_router_topk=2)


def make_run(pp: int = 2, moe: dict[str, Any] | None = None, **parallel: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            num_layers=4, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, vocab_size=256, **(moe or {})
        ),
        parallel=ParallelConfig(world_size=2, pipeline_model_parallel_size=pp, **parallel),
        training=TrainingConfig(
            device="cpu", precision="fp32", seq_length=128, global_batch_size=4, recompute_layout="full*1,none*1|none*2"
            if pp == 2 else None,
        ),
    )  # fmt: skip


def calibrated(run: RunConfig, kinds: tuple[str, ...] = ("full", "mlp")) -> dict[str, Any]:
    from megatron_telechat.training.calibrate import calibrate

    base = DeviceSpec("mine", description="a machine", measured=())
    device = calibrate(run, kinds, base, rounds=5)
    again = calibrate(run, kinds, device, rounds=1)
    path = Path(f"{os.environ['CASE_REPORTS']}/{os.environ['RANK']}.yaml")
    write_device_file(path, device)
    read = read_device_file(path)
    (entry,) = read.measured
    return {
        "same": read == device,
        "replaced": len(again.measured),
        "layers": {kind: dict(times) for kind, times in entry.layers.items()},
        "ends": [*entry.embedding.values(), *entry.output_layer.values()],
        "p2p": entry.p2p,
        "optimizer": entry.optimizer_per_parameter,
        "source": entry.source,
        "alone": entry.alone,
        "jitter": entry.jitter,
        "gradients": entry.gradient_gb_s,
        "reduction": predict(run, read).reduction,
        "iteration": predict(run, read).iteration,
    }


@cases.case
def pipeline_dense():
    return calibrated(make_run())


@cases.case
def pipeline_dense_and_experts():
    return calibrated(make_run(moe={**EXPERTS, "moe_layer_freq": 2}), ("full", "mlp", "core_attn+mlp"))


@cases.case
def tensor_parallel_experts():
    return calibrated(make_run(1, EXPERTS, tensor_model_parallel_size=2, fold_tensor_into_experts=True), ("moe",))


@cases.case
def context_parallel():
    """And the shapes of what the ranks compute."""
    from megatron_telechat.training import calibrate

    shapes: set[tuple[int, ...]] = set()
    forward_step = calibrate.forward_step

    def watched(device: Any, batches: Any, stage: Any) -> Any:
        (batch,) = batches
        shapes.add(tuple(batch["tokens"].shape))
        return forward_step(device, iter([batch]), stage)

    with patch.object(calibrate, "forward_step", watched):
        found = calibrated(make_run(1, context_parallel_size=2), ("core_attn",))
    return {**found, "shapes": sorted(shapes)}


@cases.case
def wrong_number_of_ranks():
    from megatron_telechat.training.calibrate import Calibration

    run = make_run(1, tensor_model_parallel_size=4)
    try:
        Calibration(replace(run, parallel=replace(run.parallel, world_size=4)))
    except ConfigError as error:
        return str(error)
    return None


if __name__ == "__main__":
    cases.main()
