"""Seconds of a layer against sums worked out by hand, and how they answer to device, recompute and parallel sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_telechat.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_telechat.costs.conditions import conditions
from megatron_telechat.costs.devices import (
    DeviceSpec,
    Measured,
    device_spec,
    device_spec_names,
    read_device_file,
    write_device_file,
)
from megatron_telechat.costs.parameters import LocalCount
from megatron_telechat.costs.time import Software, TimeModel
from megatron_telechat.errors import ConfigError
from tests.costs.test_parameters import M39B, M115B

ROUND = DeviceSpec(
    name="round", peak_tflops={"bf16": 1.0}, hbm_bandwidth_gb_s=1.0, intra_node_bandwidth_gb_s=0.5,
    inter_node_bandwidth_gb_s=0.125,
)  # fmt: skip
"""1e12 FLOP/s, 1e9 B/s of memory, 5e8 B/s inside a node and 1.25e8 B/s between nodes, all reached in full."""
SMALL = ModelConfig(
    num_layers=4, hidden_size=8, ffn_hidden_size=12, num_attention_heads=4, num_query_groups=2, vocab_size=32
)


def make(model=SMALL, **parallel) -> RunConfig:
    return RunConfig(
        model=model,
        parallel=ParallelConfig(**{"world_size": 1, **parallel}),
        training=TrainingConfig(seq_length=16, global_batch_size=8),
    )


def big(model, **parallel) -> RunConfig:
    return RunConfig(model=model, parallel=ParallelConfig(**parallel), training=TrainingConfig(global_batch_size=64))


def test_a_dense_layer_by_hand():
    layer = TimeModel(make(), ROUND).layer(0, ())
    # a token: projections 2*8*(8+8)+2*64, attention 2*16*8, SwiGLU 6*8*12
    projections, core, mlp = 16 * 384, 16 * 256, 16 * 576
    # bf16 elements a token, forward: norms 2*2*8, rotary 2*(8+8), residuals 2*3*8, SwiGLU 3*12
    forward = (projections + core + mlp) / 1e12 + 2 * 16 * (32 + 32 + 48 + 36) / 1e9
    assert layer.forward == pytest.approx(forward)
    parameters = 8 * 16 + 64 + 8 + 3 * 8 * 12 + 8 + 2 * 8
    backward = (2 * projections + 2.5 * core + 2 * mlp) / 1e12 + 2 * 16 * (64 + 32 + 16 + 60) / 1e9
    assert layer.backward == pytest.approx(backward + 10 * parameters / 1e9)
    assert layer.extra == 0


def test_recompute_repeats_the_forward_of_what_it_names():
    times = TimeModel(make(), ROUND)
    parts = times.layer_parts(0)
    assert times.layer(0, ("full",)).extra == pytest.approx(times.layer(0, ()).forward)
    assert times.layer(0, ("core_attn",)).extra == pytest.approx(parts["core_attn"].forward)
    assert times.layer(0, ("mlp",)).extra == pytest.approx(parts["block"].forward)
    both = times.layer(0, ("core_attn", "layernorm")).extra
    assert both == pytest.approx(parts["core_attn"].forward + parts["norms"].forward)
    assert times.layer(0, ("full",)).backward == times.layer(0, ()).backward


def test_tensor_parallel_exchange_by_hand():
    one, two = (TimeModel(make(world_size=size, tensor_model_parallel_size=size), ROUND) for size in (1, 2))
    whole = 2 * 8 * 16  # bytes of the hidden states
    exchange = 2 * whole / 2 / 5e8
    parts = two.layer_parts(0)["block"], one.layer_parts(0)["block"]
    assert parts[0].forward == pytest.approx(parts[1].forward / 2 + exchange)
    hidden = TimeModel(two.run, ROUND, Software(tensor_overlap=1.0)).layer_parts(0)["block"]
    assert hidden.forward == pytest.approx(parts[1].forward / 2)


def test_the_loss_in_chunks_makes_the_logits_again():
    run = make()
    cut = replace(run, training=replace(run.training, loss_chunk_rows=6))
    whole, chunks = (TimeModel(one, ROUND).output_layer() for one in (run, cut))
    assert chunks.forward == whole.forward
    # the product; logits written and read in bf16 and their exponentials in fp32; 3 additions to the gradient, not one
    again = 2 * 8 * 32 * 16 / 1e12 + 32 * 16 * (2 * 2 + 8) / 1e9 + 2 * 10 * (32 * 8 + 8) / 1e9
    assert chunks.backward == pytest.approx(whole.backward + again)
    assert conditions(cut) == {**conditions(run), "loss_chunks": 3}


def test_pipeline_and_gradient_messages_take_the_link_between_the_ranks():
    near = TimeModel(make(world_size=8, pipeline_model_parallel_size=4), ROUND)
    far = TimeModel(make(world_size=16, pipeline_model_parallel_size=2), ROUND)
    assert near.p2p() == pytest.approx(256 / 5e8)
    assert far.p2p() == pytest.approx(256 / 1.25e8)
    count = LocalCount(1000, 0)
    assert near.gradient_reduction(count) == pytest.approx(8 * 1000 / 2 / 5e8)
    alone = TimeModel(make(world_size=4, pipeline_model_parallel_size=4), ROUND)
    assert alone.gradient_reduction(count) == 0


def test_chunks_hide_the_expert_exchange_behind_the_experts():
    run = big(M39B, world_size=64, expert_model_parallel_size=16)
    device = device_spec("h100-80g")
    times = [TimeModel(run, device, Software(moe_chunks=chunks)).layer(0, ()).forward for chunks in (1, 2, 4)]
    assert times[0] > times[1] > times[2]
    uneven = TimeModel(run, device, Software(moe_imbalance=1.5)).layer(0, ())
    assert uneven.forward > times[0]


def test_optimizer_step_is_shared_by_the_distributed_optimizer():
    parallel = dict(world_size=64, tensor_model_parallel_size=8)
    device, count = device_spec("h100-80g"), LocalCount(10**9, 0)
    alone, shared = (
        TimeModel(big(M115B, **parallel, use_distributed_optimizer=on), device).optimizer_step(count)
        for on in (False, True)
    )
    assert alone > 2 * shared


@pytest.mark.parametrize("name", [name for name in device_spec_names() if name != "cpu"])
def test_every_device_gives_a_plausible_layer(name):
    """115B on TP8: between 30 % and 90 % of the peak over forward and backward."""
    run = big(M115B, world_size=64, tensor_model_parallel_size=8)
    device = device_spec(name)
    layer = TimeModel(run, device).layer(0, ())
    products = 3 * 8192 * (2 * 8192 * (8192 + 2048) + 2 * 8192**2 + 2 * 8192**2 + 6 * 8192 * 40960) / 8
    share = products / (layer.forward + layer.backward) / (device.peak("bf16") * 1e12)
    assert 0.3 < share < 0.9


def test_a_device_without_figures_says_what_to_do():
    with pytest.raises(ConfigError, match="--calibrate"):
        TimeModel(make(), device_spec("cpu"))


def test_measured_times_come_first_and_only_for_their_shapes(tmp_path):
    run = make()
    entry = Measured(
        conditions=conditions(run),
        layers={"dense": {"forward": 1.0, "backward": 2.0, "extra.full": 0.9}},
        embedding={"forward": 0.1, "backward": 0.2},
        output_layer={"forward": 0.3, "backward": 0.4},
        p2p=0.01,
        optimizer_per_parameter=1e-6,
        step=0.05,
        source="by hand",
    )
    write_device_file(tmp_path / "mine.yaml", replace(ROUND, measured=(entry,)))
    device = read_device_file(tmp_path / "mine.yaml")
    assert device.measured == (entry,)
    times = TimeModel(run, device)
    full = times.layer(2, ("full",))
    assert (full.forward, full.backward, full.extra) == (1.0, 2.0, 0.9)
    assert (times.p2p(), times.step_constant(), times.optimizer_step(LocalCount(1000, 0))) == (0.01, 0.05, 1e-3)
    with pytest.raises(ConfigError, match="recompute core_attn"):
        times.layer(0, ("core_attn",))
    other = replace(run, training=replace(run.training, micro_batch_size=2))
    assert TimeModel(other, device).layer(0, ()).forward < 1e-3


def test_gradients_are_reduced_as_fast_as_was_measured():
    run = make(world_size=8, ranks_per_node=8)
    ends = {"forward": 0.1, "backward": 0.2}
    entry = Measured(conditions(run), {"dense": ends}, ends, ends, 0.0, 1e-6, gradient_gb_s=2.0)
    times = TimeModel(run, replace(ROUND, measured=(entry,)))
    passed = 2 * 4 * 10**9 * 7 / 8  # a ring of eight: reduce-scatter and gather of fp32
    assert times.gradient_reduction(LocalCount(10**9, 0)) == pytest.approx(passed / 2e9, rel=1e-3)
    unknown = TimeModel(run, replace(ROUND, measured=(replace(entry, gradient_gb_s=None),)))
    assert unknown.gradient_reduction(LocalCount(10**9, 0)) != times.gradient_reduction(LocalCount(10**9, 0))


@pytest.mark.parametrize(
    "text, says",
    [
        ("peak_tflops: {bf16: 1}", "no name"),
        ("name: x\nspeed: 3", "unknown keys: speed"),
        ("name: x\nefficiency: {gem: 0.5}", "efficiency.gem"),
        ("name: x\npeak_tflops: {bf16: -1}", "not above 0"),
        ("name: x\nmemory_gib: yes", "not above 0"),
        ("name: x\nmemory_gib: 0", "not above 0"),
        ("name: x\nnode_devices: 0", "not above 0"),
        ("name: x\nerror: -0.1", "not above 0"),
        ("name: x\ngemm_edge: wide", "not above 0"),
        ("name: x\ncollective_latency_s: -1", "not above 0"),
        ("name: x\nmeasured: [{conditions: {}}]", "damaged"),
        ("name: [", "not YAML"),
    ],
)
def test_bad_device_files(tmp_path, text, says):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_device_file(tmp_path / "bad.yaml")


def test_missing_device_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        read_device_file(tmp_path / "none.yaml")


def test_an_mlp_without_a_gate_by_hand():
    gated, plain = (
        TimeModel(make(replace(SMALL, activation=name)), ROUND).layer_parts(0)["block"] for name in ("swiglu", "gelu")
    )
    # a token: one product of 2*8*12 FLOPs less, one array of 12 elements forward and two backward
    assert gated.forward - plain.forward == pytest.approx(16 * 192 / 1e12 + 2 * 16 * 12 / 1e9)
    assert gated.backward - plain.backward == pytest.approx(2 * 16 * 192 / 1e12 + 2 * 16 * 24 / 1e9)
    no_rotary = TimeModel(make(replace(SMALL, position_embedding_type="none")), ROUND).layer_parts(0)["projections"]
    rotary = TimeModel(make(), ROUND).layer_parts(0)["projections"]
    assert rotary.forward - no_rotary.forward == pytest.approx(2 * 16 * 2 * 16 / 1e9)


def test_gradients_of_a_tied_matrix_are_added_up_between_the_stages():
    tied = replace(SMALL, untie_embeddings_and_output_weights=False)
    two = {"world_size": 16, "ranks_per_node": 8, "pipeline_model_parallel_size": 2}
    # an all-reduce of two ranks on two nodes: the whole of 32 x 8 fp32 numbers passes once
    assert TimeModel(make(tied, **two), ROUND).tied_embedding() == pytest.approx(4 * 32 * 8 / 1.25e8, rel=1e-3)
    assert TimeModel(make(tied), ROUND).tied_embedding() == TimeModel(make(**two), ROUND).tied_embedding() == 0


def test_conditions_of_our_own_models_are_those_of_older_device_files():
    own = conditions(make())
    assert "activation" not in own and "normalization" not in own
    other = conditions(make(replace(SMALL, activation="gelu")))
    assert other == {**own, "activation": "gelu"}
