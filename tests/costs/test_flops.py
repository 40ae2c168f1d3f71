"""FLOP counts against numbers worked out by hand and against published throughput."""

from __future__ import annotations

import pytest

from megatron_telechat.config.schema import ModelConfig
from megatron_telechat.costs import (
    count_parameters,
    forward_flops_per_token,
    model_tflops_per_device,
    training_flops_per_token,
)
from megatron_telechat.costs.flops import head_forward_flops, layer_forward_flops
from tests.costs.test_parameters import M7B, M35B, M39B, M115B


def test_parts_of_a_layer_by_hand():
    # h=8, 4 heads of 2 (q=8), 2 groups (k=4), f=12, S=16
    model = ModelConfig(
        num_layers=1, hidden_size=8, ffn_hidden_size=12, num_attention_heads=4, num_query_groups=2, vocab_size=32
    )
    flops = layer_forward_flops(model, 0, 16)
    assert flops.projections == 2 * 8 * 16 + 2 * 8 * 8 == 384
    assert flops.core_attention == 2 * 16 * 8 == 256
    assert flops.mlp == 3 * 2 * 8 * 12 == 576
    assert flops.router == 0
    assert head_forward_flops(model) == 2 * 8 * 32 == 512
    assert forward_flops_per_token(model, 16) == 384 + 256 + 576 + 512
    assert training_flops_per_token(model, 16) == 3 * 1728


def test_moe_counts_the_experts_a_token_meets():
    model = ModelConfig(
        num_layers=2,
        hidden_size=8,
        ffn_hidden_size=12,
        num_attention_heads=4,
        vocab_size=32,
        num_experts=16,
        moe_ffn_hidden_size=6,
        moe_router_topk=4,
        moe_layer_freq=2,
        moe_shared_expert_intermediate_size=10,
    )
    moe, dense = layer_forward_flops(model, 0, 16), layer_forward_flops(model, 1, 16)
    assert moe.mlp == 6 * 8 * 6 * 4 + 6 * 8 * 10
    assert moe.router == 2 * 8 * 16
    assert (dense.mlp, dense.router) == (6 * 8 * 12, 0)


@pytest.mark.parametrize("model", [M7B, M115B, M39B], ids=["7b", "115b", "39b"])
def test_agrees_with_six_n_plus_attention(model):
    weights = count_parameters(model).active - model.vocab_size * model.hidden_size  # without the look-up
    attention = 6 * model.num_layers * 8192 * model.num_attention_heads * model.head_dim
    assert training_flops_per_token(model, 8192) == pytest.approx(6 * weights + attention, rel=1e-4)


@pytest.mark.parametrize(
    "model, tokens_per_s, tflops",
    [(M7B, 2950, 143.1), (M35B, 516, 117.2), (M39B, 865, 65.5), (M115B, 158, 112.5)],
    ids=["7b", "35b", "39b", "115b"],
)
def test_published_throughput(model, tokens_per_s, tflops):
    assert model_tflops_per_device(model, 8192, tokens_per_s) == pytest.approx(tflops, rel=0.005)
