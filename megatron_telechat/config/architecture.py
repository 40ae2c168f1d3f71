"""The architecture of a model as values to compare: equal values mean equal tensors."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from megatron_telechat.config.schema import ModelConfig

# What a template's config.json, or the run that reads a checkpoint, may say otherwise without being of another model.
_FREE = {
    "name",
    "rotary_table_dtype",
    "init_method_std",
    "router_init_std",
    "moe_aux_loss_coeff",
    "moe_aux_loss_formula",
    "moe_z_loss_coeff",
    "max_position_embeddings",
    "attention_dropout",
    "hidden_dropout",
    "num_query_groups",
    "kv_channels",
    "rotary_base_seqlen",
}


def comparable(model: ModelConfig) -> dict[str, Any]:
    """The architecture by field, so that equal values mean equal tensors: defaults filled in, what is not used left
    out."""
    values = {field.name: getattr(model, field.name) for field in fields(model) if field.name not in _FREE}
    values.update(
        query_groups=model.query_groups,
        head_dim=model.head_dim,
        rotary_base_seqlen=model.rotary_base_seqlen or model.rotary_training_seqlen,
    )
    if model.is_moe:
        values["moe_ffn_hidden_size"] = model.moe_ffn_hidden_size or model.ffn_hidden_size
        if model.moe_layer_freq == 1:
            values["ffn_hidden_size"] = None
    else:
        values.update(moe_ffn_hidden_size=None, moe_router_topk=None, moe_layer_freq=None)
    return values
