"""Parameter tables and counts against published totals."""

from __future__ import annotations

import math

import pytest

from megatron_telechat.config.schema import ModelConfig, ParallelConfig
from megatron_telechat.costs import count_parameters
from megatron_telechat.costs.parameters import local_count
from megatron_telechat.tensors.table import stage_table, tensor_table

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


@pytest.mark.parametrize("tensor, expert, expert_tensor", [(1, 1, 1), (4, 8, 1), (8, 2, 4), (2, 16, 1)])
def test_local_counts_add_up_to_the_model(tensor, expert, expert_tensor):
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
    )
    whole = tensor_table(M39B)
    replicated = 30 * (3 * 4096 + 16 * 4096) + 4096  # two norms and the projection bias; the router; the last norm
    expert_bias = 30 * 16 * 4096
    experts = sum(math.prod(spec.shape) for key, spec in whole.items() if ".experts." in key)

    first = local_count(stage_table(M39B, range(0, 13), has_embedding=True, has_loss=False), parallel)
    last = local_count(stage_table(M39B, range(13, 30), has_embedding=False, has_loss=True), parallel)
    both = first + last
    assert (both.dense - replicated) * tensor + replicated == 39_330_099_200 - experts
    assert both.expert * expert == (experts - expert_bias) // expert_tensor + expert_bias
    assert both == local_count(whole, parallel)
