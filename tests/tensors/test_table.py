"""The rows of the table: keys, shapes, cuts, initial values, weight decay."""

from __future__ import annotations

from dataclasses import replace

from megatron_telechat.config.schema import ModelConfig
from megatron_telechat.tensors.table import Constant, Normal, TensorSpec, layer_of, tensor_table
from tests.costs.test_parameters import M115B

MOE = ModelConfig(
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
WEIGHT, ROUTER = Normal(MOE.init_method_std), Normal(MOE.router_init_std)


def norm(key: str, width: int) -> TensorSpec:
    return TensorSpec(key, (width,), None, Constant(1.0), decays=False)


def bias(key: str, shape: tuple[int, ...], axis: int | None = None, expert: bool = False) -> TensorSpec:
    return TensorSpec(key, shape, axis, Constant(0.0), expert, decays=False)


def test_rows_in_model_order():
    moe, dense = "decoder.layers.0.", "decoder.layers.1."
    assert list(tensor_table(MOE).values()) == [
        TensorSpec("embedding.word_embeddings.weight", (32, 8), 0, WEIGHT),
        norm(moe + "input_layernorm.weight", 8),
        TensorSpec(moe + "self_attention.linear_qkv.weight", (16, 8), 0, WEIGHT),
        TensorSpec(moe + "self_attention.linear_proj.weight", (8, 8), 1, WEIGHT),
        bias(moe + "self_attention.linear_proj.bias", (8,)),
        norm(moe + "pre_mlp_layernorm.weight", 8),
        TensorSpec(moe + "mlp.router.weight", (4, 8), None, ROUTER),
        TensorSpec(moe + "mlp.experts.linear_fc1.weight", (4, 2, 6, 8), 2, WEIGHT, expert=True),
        TensorSpec(moe + "mlp.experts.linear_fc2.weight", (4, 8, 6), 2, WEIGHT, expert=True),
        bias(moe + "mlp.experts.linear_fc2.bias", (4, 8), expert=True),
        TensorSpec(moe + "mlp.shared_experts.linear_fc1.weight", (2, 10, 8), 1, WEIGHT),
        TensorSpec(moe + "mlp.shared_experts.linear_fc2.weight", (8, 10), 1, WEIGHT),
        norm(dense + "input_layernorm.weight", 8),
        TensorSpec(dense + "self_attention.linear_qkv.weight", (16, 8), 0, WEIGHT),
        TensorSpec(dense + "self_attention.linear_proj.weight", (8, 8), 1, WEIGHT),
        bias(dense + "self_attention.linear_proj.bias", (8,)),
        norm(dense + "pre_mlp_layernorm.weight", 8),
        TensorSpec(dense + "mlp.linear_fc1.weight", (2, 12, 8), 1, WEIGHT),
        TensorSpec(dense + "mlp.linear_fc2.weight", (8, 12), 1, WEIGHT),
        bias(dense + "mlp.linear_fc2.bias", (8,)),
        norm("decoder.final_layernorm.weight", 8),
        TensorSpec("output_layer.weight", (32, 8), 0, WEIGHT),
    ]


def test_rows_of_models_that_only_the_planner_knows():
    model = replace(
        MOE,
        activation="gelu",
        normalization="LayerNorm",
        add_bias_linear=True,
        qk_layernorm=True,
        untie_embeddings_and_output_weights=False,
        position_embedding_type="learned_absolute",
        max_position_embeddings=64,
        moe_shared_expert_gate=True,
    )
    plain, table = tensor_table(MOE), tensor_table(model)
    moe, dense = "decoder.layers.0.", "decoder.layers.1."
    wanted = [
        TensorSpec("embedding.position_embeddings.weight", (64, 8), None, WEIGHT),
        bias(dense + "self_attention.linear_qkv.bias", (16,), 0),
        norm(dense + "self_attention.q_layernorm.weight", 2),
        bias(dense + "self_attention.k_layernorm.bias", (2,)),
        TensorSpec(dense + "mlp.linear_fc1.weight", (12, 8), 0, WEIGHT),
        bias(dense + "mlp.linear_fc1.bias", (12,), 0),
        bias(moe + "mlp.router.bias", (4,)),
        TensorSpec(moe + "mlp.experts.linear_fc1.weight", (4, 6, 8), 1, WEIGHT, expert=True),
        bias(moe + "mlp.experts.linear_fc1.bias", (4, 6), 1, expert=True),
        TensorSpec(moe + "mlp.shared_experts.gate_weight", (1, 8), None, WEIGHT),
    ]
    assert [table[row.key] for row in wanted] == wanted
    assert set(plain) - set(table) == {"output_layer.weight"}


def test_dense_checkpoint_has_as_many_tensors_as_published():
    # HF: 10 L + 3 (query and key_value are one fused tensor here, gate and up one: 8 L + 3)
    assert len(tensor_table(M115B)) == 8 * 96 + 3


def test_layers_of_keys():
    assert layer_of("decoder.layers.12.mlp.router.weight") == 12
    assert layer_of("decoder.final_layernorm.weight") is None
