# SPDX-License-Identifier: Apache-2.0
"""Configuration of a TeleChat2 model, dense or with experts, that megatron_telechat has exported.

This file stands alone: it is copied into the exported folder and needs transformers only.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class MegatronTelechatConfig(PretrainedConfig):
    """What config.json says; the names are those of the published TelechatConfig where it has one.

    Args:
        n_layer, n_head, num_key_value_heads, hidden_size, ffn_hidden_size, vocab_size: the shape. head_dim: width of a
            head; None: hidden_size / n_head.
        rope_theta: base of the rotary embedding, before NTK-aware scaling.
        training_seqlen: longer sequences get attention scaling; None: no scaling at all.
        base_seqlen: base length of NTK-aware scaling; None: training_seqlen.
        rotary_table_dtype: fp32, or fp16 as in the published modelling files.
        attention_output_bias, mlp_output_bias: a bias on the output projection of the attention; on the down
            projections, of experts too.
        num_experts: experts of a MoE layer; None: a dense model. num_experts_per_tok, moe_intermediate_size (width of
            an expert), moe_layer_freq (every how many layers there is a MoE layer, from the first on),
            router_aux_loss_coef, shared_expert_intermediate_size belong to it.
        output_router_logits: return the logits of the routers, and add the balancing loss to the loss.

    Raises:
        ValueError: tied embeddings or a norm after the embedding, which these models do not have; one expert a token.
    """

    model_type = "telechat"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "ffn_hidden_size",
        "rms_norm_eps": "layer_norm_epsilon",
        "num_local_experts": "num_experts",
    }

    def __init__(
        self,
        vocab_size: int = 131072,
        hidden_size: int = 4096,
        n_layer: int = 30,
        n_head: int = 32,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        ffn_hidden_size: int = 12288,
        layer_norm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        rope_theta: float = 10000.0,
        training_seqlen: int | None = 8192,
        base_seqlen: int | None = None,
        rotary_table_dtype: str = "fp32",
        attention_output_bias: bool = True,
        mlp_output_bias: bool = True,
        hidden_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        num_experts: int | None = None,
        num_experts_per_tok: int = 2,
        moe_intermediate_size: int | None = None,
        moe_layer_freq: int = 1,
        router_aux_loss_coef: float = 0.0,
        shared_expert_intermediate_size: int | None = None,
        output_router_logits: bool = False,
        use_cache: bool = True,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        pad_token_id: int | None = 3,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ):
        if tie_word_embeddings or kwargs.get("embed_layernorm"):
            raise ValueError("tied embeddings and a norm after the embedding are not part of this model")
        if num_experts is not None and num_experts_per_tok < 2:
            raise ValueError("a mixture needs two experts per token or more: the weights are a softmax over them")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.n_layer = n_layer
        self.n_head = n_head
        self.num_key_value_heads = num_key_value_heads or n_head
        self.head_dim = head_dim or hidden_size // n_head
        self.ffn_hidden_size = ffn_hidden_size
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.rope_theta = rope_theta
        self.training_seqlen = training_seqlen
        self.base_seqlen = base_seqlen or training_seqlen
        self.rotary_table_dtype = rotary_table_dtype
        self.attention_output_bias = attention_output_bias
        self.mlp_output_bias = mlp_output_bias
        self.hidden_dropout = hidden_dropout
        self.attention_dropout = attention_dropout
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size or ffn_hidden_size
        self.moe_layer_freq = moe_layer_freq
        self.router_aux_loss_coef = router_aux_loss_coef
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.output_router_logits = output_router_logits
        self.use_cache = use_cache
        super().__init__(
            bos_token_id=bos_token_id,  # pyright: ignore[reportCallIssue]
            eos_token_id=eos_token_id,  # pyright: ignore[reportCallIssue]
            pad_token_id=pad_token_id,  # pyright: ignore[reportCallIssue]
            tie_word_embeddings=tie_word_embeddings,  # pyright: ignore[reportCallIssue]
            **kwargs,
        )

    def layer_is_moe(self, layer: int) -> bool:
        """Whether the layer with this number, from 0, is a mixture of experts."""
        return self.num_experts is not None and layer % self.moe_layer_freq == 0
