"""The stable door of the cost model, and the terms that only programs of others need, by hand where that is short."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_telechat.config.schema import ModelConfig, ParallelConfig, TrainingConfig
from megatron_telechat.costs.communication import Links, p2p_seconds
from megatron_telechat.costs.devices import device_spec
from megatron_telechat.costs.memory import stage_memory
from megatron_telechat.costs.software import Software
from megatron_telechat.costs.time import FLASH_BACKWARD, TimeModel
from megatron_telechat.errors import ConfigError
from megatron_telechat.planner.estimate import estimate
from megatron_telechat.planner.predict import predict
from tests.costs.test_parameters import M39B
from tests.costs.test_time import ROUND, SMALL, make

LLAMA = ModelConfig(
    num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32, vocab_size=32000,
    attention_output_bias=False, mlp_output_bias=False,
)  # fmt: skip
EIGHT = ParallelConfig(world_size=8, tensor_model_parallel_size=2, use_distributed_optimizer=True)
BATCH = TrainingConfig(seq_length=4096, global_batch_size=64)
H100 = device_spec("h100-80g")


def test_the_answer_is_that_of_the_planner_with_an_error_bar():
    answer = estimate(LLAMA, EIGHT, BATCH, H100)
    assert answer.step_s == answer.prediction.iteration
    assert answer.tokens_per_s == pytest.approx(64 * 4096 / 8 / answer.step_s)
    assert answer.fastest_s < answer.step_s < answer.slowest_s == pytest.approx(1.15 * answer.step_s)
    assert answer.fits and not estimate(LLAMA, EIGHT, replace(BATCH, micro_batch_size=16), H100).fits


def test_the_error_bar_is_wider_where_published_runs_were_farther_off():
    wide = replace(EIGHT, tensor_model_parallel_size=8)
    far = ParallelConfig(world_size=64, expert_model_parallel_size=16)
    plain, tensor = (estimate(LLAMA, parallel, BATCH, H100).error for parallel in (EIGHT, wide))
    assert plain < tensor < estimate(M39B, far, replace(BATCH, global_batch_size=64), H100).error
    assert estimate(LLAMA, EIGHT, BATCH, device_spec("mi300x")).error == 0.3
    calibrated = replace(H100, efficiency={**H100.efficiency, "stack": 0.8})
    assert estimate(LLAMA, EIGHT, BATCH, calibrated).error < plain


@pytest.mark.parametrize(
    "parallel, batch, said",
    [({"tensor_model_parallel_size": 3}, 64, "does not divide 8 ranks"), ({}, 63, "no whole number of micro-batches")],
)
def test_sizes_that_do_not_divide_are_named(parallel, batch, said):
    with pytest.raises(ConfigError, match=said):
        estimate(LLAMA, replace(EIGHT, **parallel), replace(BATCH, global_batch_size=batch), H100)


def test_a_factor_of_the_program_scales_the_whole_step():
    half = replace(H100, efficiency={**H100.efficiency, "stack": 0.5})
    pipeline = replace(EIGHT, pipeline_model_parallel_size=2)
    once, twice = (estimate(LLAMA, pipeline, BATCH, device).step_s for device in (H100, half))
    assert twice == pytest.approx(2 * once)


def test_narrow_and_shallow_products_take_longer_by_hand():
    device = replace(ROUND, gemm_edge=4.0, gemm_start_s=1e-6)
    plain, edged = (TimeModel(make(), spec).layer_parts(0)["block"].forward for spec in (ROUND, device))
    # gate and up [16, 8] x [8, 24], down [16, 12] x [12, 8], in bf16
    products = 2 * 16 * (8 * 24 * 4 * (1 / 24 + 1 / 8) + 12 * 8 * 4 * (1 / 8 + 1 / 12)) / 1e12
    operands = 2 * (16 * 8 + 8 * 24 + 16 * 24 + 16 * 12 + 12 * 8 + 16 * 8) / 1e9
    assert edged - plain == pytest.approx(products + operands + 2e-6)


def test_the_attention_of_a_deterministic_run_has_shares_of_its_own():
    device = replace(ROUND, efficiency={"attention": 0.5, "attention_flash2": 0.25, "attention_flash2_ordered": 0.125})
    flops = 16 * 256 / 1e12
    parts = {
        kernel: TimeModel(make(), device, Software(attention=kernel)).layer_parts(0)["core_attn"]
        for kernel in ("fused", "flash2", "ordered")
    }
    assert parts["fused"].forward == pytest.approx(flops / 0.5)
    assert parts["flash2"].backward == pytest.approx(FLASH_BACKWARD * flops / 0.25)
    assert parts["ordered"].forward == parts["flash2"].forward
    assert parts["ordered"].backward == pytest.approx(FLASH_BACKWARD * flops / 0.125)
    run = make()
    for on, kernel in ((True, "ordered"), (False, "fused")):
        own = replace(run, training=replace(run.training, deterministic=on))
        assert TimeModel(own, device).layer_parts(0)["core_attn"] == parts[kernel]


def test_one_h100_and_one_h200_as_measured():
    """TeleChat2-3B on one device, 2026-11-26: a row of 32,768 tokens with full recompute on an H100 took 4.77 s; four
    of 4096 on an H200 0.752 s, 0.652 s with --no-deterministic."""
    model = ModelConfig(num_layers=24, hidden_size=3072, ffn_hidden_size=6144, num_attention_heads=24)
    one, h200 = ParallelConfig(world_size=1), device_spec("h200-141g")
    long = TrainingConfig(seq_length=32768, recompute_granularity="full")
    four = TrainingConfig(seq_length=4096, micro_batch_size=1, global_batch_size=4)
    for device, training, kernel, seconds in (
        (H100, long, "ordered", 4.77), (h200, four, "ordered", 0.752), (h200, four, "fused", 0.652),
    ):  # fmt: skip
        found = estimate(model, one, training, device, Software(attention=kernel))
        assert found.step_s == pytest.approx(seconds, rel=0.1), (device.name, kernel)


def test_scores_in_memory_take_room_and_passes():
    flash, whole = (TimeModel(make(), ROUND, Software(attention=kernel)) for kernel in ("fused", "unfused"))
    assert whole.layer(0, ()).forward > flash.layer(0, ()).forward
    kept = [
        stage_memory(make(replace(SMALL, attention_dropout=dropout)), software=Software(attention="unfused"))[0]
        for dropout in (0.0, 0.1)
    ]
    # four heads of 16 x 16 scores in four layers: the softmax in bf16; with dropout its mask and what is left
    assert kept[1].activations_bytes - kept[0].activations_bytes == pytest.approx(4 * 4 * 16 * 16 * 3)


@pytest.mark.parametrize("sharding, gathers", [("full", 2), ("gradients", 1)])
def test_sharded_parameters_are_gathered_in_each_micro_batch(sharding, gathers):
    run = make(world_size=8, use_distributed_optimizer=True)
    free = replace(ROUND, peak_tflops={"bf16": 1e9}, hbm_bandwidth_gb_s=1e9, intra_node_bandwidth_gb_s=0.5)
    plain, sharded = (TimeModel(run, free, Software(sharding=kind)).layer(0, ()) for kind in ("none", sharding))
    parameters = 8 * 16 + 64 + 8 + 3 * 8 * 12 + 8 + 2 * 8
    once = parameters * 7 / 8 / 5e8
    assert sharded.forward - plain.forward == pytest.approx(2 * once, rel=1e-3)
    assert sharded.backward - plain.backward == pytest.approx((4 + 2 * (gathers - 1)) * once, rel=1e-3)
    whole, shards = (stage_memory(run, software=Software(sharding=kind))[0] for kind in ("none", "full"))
    assert shards.gradients_bytes == pytest.approx(whole.gradients_bytes / 8)
    assert shards.parameters_bytes == pytest.approx(whole.parameters_bytes / 8)
    logits = 16 * 2 * 32  # the working set of the loss, where no layer has a larger one
    gradients = 2 * 8 * 12 + 16 * 2 * 12  # of the second matrix of the MLP, and of its input
    assert shards.activations_bytes - whole.activations_bytes == pytest.approx(
        (2 * 2 + 4) * parameters + gradients - logits
    )


def test_gradients_in_16_bits_halve_their_memory_and_their_reduction():
    run = make(world_size=8)
    wide, narrow = (Software(gradient_bytes=size) for size in (4, 2))
    bytes_of = [stage_memory(run, software=software)[0].gradients_bytes for software in (wide, narrow)]
    seconds = [predict(run, ROUND, software).reduction for software in (wide, narrow)]
    assert bytes_of[0] == 2 * bytes_of[1] and seconds[0] == pytest.approx(2 * seconds[1])


def test_hidden_states_in_pieces_by_hand():
    run = make(world_size=4, tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=False)
    links = Links.of(run, ROUND)
    assert p2p_seconds(run, links) == pytest.approx(256 / 5e8)
    assert p2p_seconds(run, links, in_pieces=True) == pytest.approx(128 / 5e8 + 128 / 5e8)
    split = replace(run, parallel=replace(run.parallel, sequence_parallel=True))
    assert p2p_seconds(split, links, in_pieces=True) == pytest.approx(128 / 5e8)
