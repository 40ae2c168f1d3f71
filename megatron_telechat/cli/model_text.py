"""A model in one line: how large it is, and how it differs from those that the training builds."""

from __future__ import annotations

from megatron_telechat.config.schema import ModelConfig
from megatron_telechat.costs import count_parameters

ACTIVATIONS = {"gelu": "GELU", "squared_relu": "squared ReLU", "quick_geglu": "quick GeGLU"}


def model_text(model: ModelConfig) -> str:
    """174,604,836,864 parameters, vocabulary 51,200; GELU, tied embeddings, ...; of a mixture the active ones too."""
    count = count_parameters(model)
    active = f", {count.active:,} active a token" if count.active != count.total else ""
    text = f"{count.total:,} parameters{active}, vocabulary {model.vocab_size:,}"
    positions = {
        "learned_absolute": f"{model.max_position_embeddings or 0:,} learned positions",
        **{"none": "no positions", "alibi": "ALiBi", "mrope": "M-RoPE", "yarn": "YaRN"},
    }
    blocks = model.mtp_num_layers or 0
    features = [
        "multi-latent attention" if model.multi_latent_attention else "",
        f"{blocks} multi-token-prediction block{'s' * (blocks > 1)}" if blocks else "",
        f"a window of {model.window + 1:,} tokens" if model.window is not None else "",
        ACTIVATIONS.get(model.activation, ""),
        "" if model.untie_embeddings_and_output_weights else "tied embeddings",
        positions.get(model.position_embedding_type, ""),
        "LayerNorm" if model.normalization == "LayerNorm" else "",
        "norms on queries and keys" if model.qk_layernorm else "",
        "biases on all linear layers"
        if model.add_bias_linear
        else "bias on queries, keys and values"
        if model.add_qkv_bias
        else "",
        "a gate on the shared expert" if model.moe_shared_expert_gate else "",
    ]
    said = ", ".join(filter(None, features))
    return f"{text}; {said}" if said else text
