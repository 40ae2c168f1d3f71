"""Parameter tables and counts against published totals."""

from __future__ import annotations

import math

import pytest

from megatron_telechat.config.schema import ModelConfig, ParallelConfig
from megatron_telechat.costs import count_parameters, parameter_table
from megatron_telechat.costs.parameters import local_count, stage_table

M3B = ModelConfig(num_layers=24, hidden_size=3072, ffn_hidden_size=6144, num_attention_heads=24)
M7B = ModelConfig(num_layers=30, hidden_size=4096, ffn_hidden_size=12288, num_attention_heads=32)
M35B = ModelConfig(num_layers=64, hidden_size=6144, ffn_hidden_size=20480, num_attention_heads=48)
M115B = ModelConfig(num_layers=96, hidden_size=8192, ffn_hidden_size=40960, num_attention_heads=64, num_query_groups=8)
M39B = ModelConfig(
    num_layers=30,
    hidden_size=4096,
    ffn_hidden_size=6144,
    num_attention_heads=32,
    num_experts=16,
    moe_ffn_hidden_size=6144,
    moe_router_topk=4,
)
MIXTRAL = ModelConfig(
    architecture="mixtral",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=32000,
    attention_output_bias=False,
    mlp_output_bias=False,
    num_experts=8,
    moe_ffn_hidden_size=14336,
    moe_router_topk=2,
)


@pytest.mark.parametrize(
    "model, total, active",
    [
        (M3B, 3_070_528_512, 3_070_528_512),
        (M7B, 7_617_351_680, 7_617_351_680),
        (M35B, 35_435_059_200, 35_435_059_200),
        (M115B, 113_282_916_352, 113_282_916_352),
        (M39B, 39_330_099_200, 12_149_534_720),
        (MIXTRAL, 46_702_792_704, 12_879_925_248),
    ],
    ids=["3b", "7b", "35b", "115b", "39b-a12b", "mixtral-8x7b"],
)
def test_published_totals(model, total, active):
    count = count_parameters(model)
    assert (count.total, count.active) == (total, active)


def test_table_is_in_model_order_with_global_shapes():
    model = ModelConfig(
        num_layers=2,
        hidden_size=8,
        ffn_hidden_size=12,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=32,
        num_experts=4,
        moe_ffn_hidden_size=6,
        moe_layer_freq=2,
        moe_shared_expert_intermediate_size=10,
    )
    moe, dense = "decoder.layers.0.", "decoder.layers.1."
    assert list(parameter_table(model).items()) == [
        ("embedding.word_embeddings.weight", (32, 8)),
        (moe + "input_layernorm.weight", (8,)),
        (moe + "self_attention.linear_qkv.weight", (16, 8)),
        (moe + "self_attention.linear_proj.weight", (8, 8)),
        (moe + "self_attention.linear_proj.bias", (8,)),
        (moe + "pre_mlp_layernorm.weight", (8,)),
        (moe + "mlp.router.weight", (4, 8)),
        (moe + "mlp.experts.linear_fc1.weight", (4, 2, 6, 8)),
        (moe + "mlp.experts.linear_fc2.weight", (4, 8, 6)),
        (moe + "mlp.experts.linear_fc2.bias", (4, 8)),
        (moe + "mlp.shared_experts.linear_fc1.weight", (2, 10, 8)),
        (moe + "mlp.shared_experts.linear_fc2.weight", (8, 10)),
        (dense + "input_layernorm.weight", (8,)),
        (dense + "self_attention.linear_qkv.weight", (16, 8)),
        (dense + "self_attention.linear_proj.weight", (8, 8)),
        (dense + "self_attention.linear_proj.bias", (8,)),
        (dense + "pre_mlp_layernorm.weight", (8,)),
        (dense + "mlp.linear_fc1.weight", (2, 12, 8)),
        (dense + "mlp.linear_fc2.weight", (8, 12)),
        (dense + "mlp.linear_fc2.bias", (8,)),
        ("decoder.final_layernorm.weight", (8,)),
        ("output_layer.weight", (32, 8)),
    ]


def test_dense_checkpoint_has_as_many_tensors_as_published():
    # HF: 10 L + 3 (query and key_value are one fused tensor here, gate and up one: 8 L + 3)
    assert len(parameter_table(M115B)) == 8 * 96 + 3


@pytest.mark.parametrize("tensor, expert, expert_tensor", [(1, 1, 1), (4, 8, 1), (8, 2, 4), (2, 16, 1)])
def test_local_counts_add_up_to_the_model(tensor, expert, expert_tensor):
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
    )
    whole = parameter_table(M39B)
    replicated = 30 * (3 * 4096 + 16 * 4096) + 4096  # two norms and the projection bias; the router; the last norm
    expert_bias = 30 * 16 * 4096
    experts = sum(math.prod(shape) for key, shape in whole.items() if ".experts." in key)

    first = local_count(stage_table(M39B, range(0, 13), has_embedding=True, has_loss=False), parallel)
    last = local_count(stage_table(M39B, range(13, 30), has_embedding=False, has_loss=True), parallel)
    both = first + last
    assert (both.dense - replicated) * tensor + replicated == 39_330_099_200 - experts
    assert both.expert * expert == (experts - expert_bias) // expert_tensor + expert_bias
    assert both == local_count(whole, parallel)
