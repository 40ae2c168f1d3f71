"""Parameters of models that only the planner knows, against their published checkpoints; FLOPs of latent attention and
of windows against a sum written out."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_telechat.config.schema import ModelConfig
from megatron_telechat.costs import count_parameters, training_flops_per_token
from megatron_telechat.costs.flops import attended_positions


def model(layers: int, hidden: int, ffn: int, heads: int, vocabulary: int, **more: Any) -> ModelConfig:
    plain: dict[str, Any] = {"attention_output_bias": False, "mlp_output_bias": False}
    return ModelConfig(
        num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=heads, vocab_size=vocabulary,
        **(plain | more),
    )  # fmt: skip


GELU: dict[str, Any] = {"activation": "gelu", "normalization": "LayerNorm", "add_bias_linear": True}
LATENT: dict[str, Any] = {
    "multi_latent_attention": True,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_layernorm": True,
}


def experts(number: int, width: int, topk: int, shared: int, pattern: str) -> dict[str, Any]:
    return {
        "num_experts": number, "moe_ffn_hidden_size": width, "moe_router_topk": topk,
        "moe_shared_expert_intermediate_size": shared or None, "moe_layer_pattern": pattern,
    }  # fmt: skip


V3 = model(61, 7168, 18432, 128, 129280, **LATENT, **experts(256, 2048, 8, 2048, "([0]*3+[1]*58)"))
V2_LITE = model(
    27, 2048, 10944, 16, 102400, **{**LATENT, "q_lora_rank": None}, **experts(64, 1408, 6, 2816, "[0]*1+[1]*26")
)

PUBLISHED = {
    # the checkpoint has one more number for each routed expert, a bias of the router: 58 x 256
    "DeepSeek-V3": (V3, 671_026_419_200 - 58 * 256),
    "DeepSeek-V2": (model(60, 5120, 12288, 128, 102400, **LATENT, **experts(160, 1536, 6, 3072, "[0]+[1]*59")),
                    235_741_434_880),
    "DeepSeek-V2-Lite": (V2_LITE, 15_706_484_224),
    "Llama-3-70B": (model(80, 8192, 28672, 64, 128256, num_query_groups=8), 70_553_706_496),
    "Llama-2-7B": (model(32, 4096, 11008, 32, 32000), 6_738_415_616),
    "Qwen2.5-72B": (model(80, 8192, 29568, 64, 152064, num_query_groups=8, add_qkv_bias=True), 72_706_203_648),
    "Qwen3-32B": (model(64, 5120, 25600, 64, 151936, num_query_groups=8, kv_channels=128, qk_layernorm=True),
                  32_762_123_264),
    "Mixtral-8x7B": (model(32, 4096, 14336, 32, 32000, num_query_groups=8, num_experts=8), 46_702_792_704),
    "GPT-NeoX-20B": (model(44, 6144, 24576, 64, 50432, **GELU), 20_554_567_680),
    # BLOOM has a norm behind the embedding beside: 2 x 14336
    "BLOOM-176B": (model(70, 14336, 57344, 112, 250880, position_embedding_type="alibi",
                         untie_embeddings_and_output_weights=False, **GELU), 176_247_271_424 - 2 * 14336),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_checkpoint(name: str) -> None:
    described, parameters = PUBLISHED[name]
    assert count_parameters(described).total == parameters


def test_active_parameters_and_a_prediction_block() -> None:
    assert round(count_parameters(V3).active / 1e9, 1) == 37.6  # 37 billion without the embedding
    block = count_parameters(ModelConfig(**{**vars(V3), "mtp_num_layers": 1})).total - count_parameters(V3).total
    layer = (count_parameters(V3).total - count_parameters(ModelConfig(**{**vars(V3), "num_layers": 60,
             "moe_layer_pattern": "([0]*3+[1]*57)"})).total)  # fmt: skip
    assert block == layer + 2 * 7168**2 + 3 * 7168


def test_flops_of_latent_attention_written_out() -> None:
    length, hidden, heads = 4096, 2048, 16
    query, latent = heads * 192, 512
    attention = 2 * (hidden * query + hidden * (latent + 64) + latent * heads * 256 + heads * 128 * hidden)
    attention += length * (query + heads * 128)
    dense, sparse = 6 * hidden * 10944, 6 * hidden * (6 * 1408 + 2816) + 2 * hidden * 64
    forward = 27 * attention + dense + 26 * sparse + 2 * hidden * 102400
    assert training_flops_per_token(V2_LITE, length) == pytest.approx(3 * forward, rel=1e-12)


def test_flops_of_a_prediction_block() -> None:
    """A layer like the last one, a product of 2h with h, the output layer again."""
    length = 4096
    with_block = ModelConfig(**{**vars(V2_LITE), "mtp_num_layers": 1})
    longer = ModelConfig(**{**vars(V2_LITE), "num_layers": 28, "moe_layer_pattern": "[0]*1+[1]*27"})
    more = training_flops_per_token(with_block, length) - training_flops_per_token(longer, length)
    assert more == pytest.approx(3 * (2 * 2 * 2048 * 2048 + 2 * 2048 * 102400))


@pytest.mark.parametrize(
    "window, skip, share", [("127,0", None, 1.0), ("127,0", "2", 0.5), ("(127, -1)", "[1]*3+[0]", 0.75)]
)
def test_positions_within_a_window_are_counted_one_by_one(window: str, skip: str | None, share: float) -> None:
    small = model(4, 64, 128, 4, 128, window_size=window, window_attn_skip_freq=skip)
    length = 1000
    near = sum(min(place + 1, 128) for place in range(length)) / length
    whole = (length + 1) / 2
    found = attended_positions(small, length)
    assert found == pytest.approx(share * near + (1 - share) * whole, abs=0.6)  # the diagonal counts half
