"""The tensors of a model, one row each: key, shape, cut, initial values, weight decay.

This is the one list of these facts. Parameter counts, the memory model, initial weights, sharding, checkpoints, the
optimizer's groups and the Hugging Face map read it. It knows no parallel layout: a key names a whole tensor of the
whole model. A parameter that a model builds and that has no row here is an error (`model.shards`).

Keys and axes:
    embedding.word_embeddings.weight              [vocab, hidden]
    ...input_layernorm.weight                     [hidden]
    ...self_attention.linear_qkv.weight           [(heads + 2*groups)*head_dim, hidden]; for each
        group its query heads, then its K, then its V (Megatron's fused order)
    ...self_attention.linear_proj.weight / .bias  [hidden, heads*head_dim] / [hidden]
    ...pre_mlp_layernorm.weight                   [hidden]
    ...mlp.linear_fc1.weight                      [2, ffn, hidden]; gate, up
    ...mlp.linear_fc2.weight / .bias              [hidden, ffn] / [hidden]
    ...mlp.router.weight                          [experts, hidden]
    ...mlp.experts.linear_fc1.weight              [experts, 2, ffn, hidden]
    ...mlp.experts.linear_fc2.weight / .bias      [experts, hidden, ffn] / [experts, hidden]
    ...mlp.shared_experts.linear_fc{1,2}.weight   [2, ffn, hidden], [hidden, ffn]
    decoder.final_layernorm.weight                [hidden]
    output_layer.weight                           [vocab, hidden]

Models that only the planner knows have others, with Megatron-Core's names:
    embedding.position_embeddings.weight          [max_position_embeddings, hidden]; learned positions
    norms' .bias                                  as their weight; LayerNorm
    ...self_attention.{q,k}_layernorm.weight      [head_dim]
    ...linear_qkv.bias, ...linear_fc1.bias, ...router.bias   as their weight without its last axis
    ...linear_fc1.weight                          [ffn, hidden], [experts, ffn, hidden] where the MLP has no gate
    ...mlp.shared_experts.gate_weight             [1, hidden]
    ...self_attention.linear_q_down_proj.weight   [q_lora_rank, hidden]; multi-latent attention, as the next four
    ...self_attention.linear_q_up_proj.weight     [heads*(qk_head_dim + qk_pos_emb_head_dim), q_lora_rank]
    ...self_attention.linear_q_proj.weight        [heads*(qk_head_dim + qk_pos_emb_head_dim), hidden], without a latent
    ...self_attention.linear_kv_down_proj.weight  [kv_lora_rank + qk_pos_emb_head_dim, hidden]
    ...self_attention.linear_kv_up_proj.weight    [heads*(qk_head_dim + v_head_dim), kv_lora_rank]
    mtp.layers.N.{enorm,hnorm,final_layernorm}.weight   [hidden]; multi-token prediction
    mtp.layers.N.eh_proj.weight                   [hidden, 2*hidden]
    mtp.layers.N.transformer_layer.               as a decoder layer; the kind of the last one
Tied, there is no output_layer.weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_telechat.config.schema import ModelConfig
from megatron_telechat.tensors.boxes import Shape

_LAYER = "decoder.layers."
_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Constant:
    """Every element begins with this value."""

    value: float


@dataclass(frozen=True)
class Normal:
    """The elements are drawn from N(0, std^2)."""

    std: float


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the model.

    Attributes:
        key: its name in the whole model; layers are numbered from 0.
        shape: of the whole tensor.
        tensor_axis: the axis that is cut over the tensor-parallel ranks, for a routed expert over the
            expert-tensor-parallel ranks; None: each of these ranks holds the tensor whole (norms and the router act on
            the whole hidden vector; the bias of a row-parallel linear is added once, after the reduce).
        initial: the values it begins with.
        expert: belongs to the routed experts: axis 0 counts them and is cut over the expert-parallel ranks; replicas
            are the expert-data-parallel ranks.
        decays: weight decay acts on it. Not on biases and norms, as in Megatron-Core.
    """

    key: str
    shape: Shape
    tensor_axis: int | None
    initial: Constant | Normal
    expert: bool = False
    decays: bool = True

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)


Table = dict[str, TensorSpec]
"""Rows by key, in model order."""


def tensor_table(model: ModelConfig) -> Table:
    """Every tensor of the model, in model order."""
    return stage_table(model, range(model.num_layers), has_embedding=True, has_loss=True)


def stage_table(model: ModelConfig, layers: Iterable[int], *, has_embedding: bool, has_loss: bool) -> Table:
    """The rows of a virtual stage with these global layers.

    Where the output layer is tied, the first and the last stage both hold the embedding's matrix, as in Megatron-Core;
    one stage that is both holds it once.
    """
    rows = _embedding(model) if has_embedding else []
    for layer in layers:
        rows += _layer(model, layer)
    return _table([*rows, *_output(model)] if has_loss else rows)


def layer_table(model: ModelConfig, layer: int) -> Table:
    """The rows of the decoder layer with zero-based number `layer`."""
    return _table(_layer(model, layer))


def mlp_rows(
    prefix: str,
    hidden: int,
    ffn: int,
    initial: Constant | Normal,
    *,
    gated: bool,
    input_bias: bool = False,
    output_bias: bool = False,
    experts: int | None = None,
) -> list[TensorSpec]:
    """The two linear layers of an MLP `ffn` wide, or of this many experts; the first holds gate and up where it is
    gated.

    Args:
        prefix: of the keys, with its dot.
        initial: values of the weights.
    """
    expert, lead = experts is not None, () if experts is None else (experts,)
    inner = (*lead, 2, ffn) if gated else (*lead, ffn)
    width_axis = len(inner) - 1
    rows = [TensorSpec(f"{prefix}linear_fc1.weight", (*inner, hidden), width_axis, initial, expert)]
    if input_bias:
        rows.append(_bias(f"{prefix}linear_fc1.bias", inner, width_axis, expert))
    rows.append(TensorSpec(f"{prefix}linear_fc2.weight", (*lead, hidden, ffn), len(lead) + 1, initial, expert))
    if output_bias:
        rows.append(_bias(f"{prefix}linear_fc2.bias", (*lead, hidden), None, expert))
    return rows


def layer_key(layer: int, name: str) -> str:
    """Key of a tensor that is called `name` within the decoder layer with this zero-based number."""
    return f"{_LAYER}{layer}.{name}"


def layer_of(key: str) -> int | None:
    """Number of the decoder layer that a tensor belongs to; None: to none."""
    return int(key.removeprefix(_LAYER).split(".", 1)[0]) if key.startswith(_LAYER) else None


def expert_ffn_hidden_size(model: ModelConfig) -> int:
    """Width of one expert's MLP; the dense width where the model names none of its own."""
    return model.moe_ffn_hidden_size or model.ffn_hidden_size


def _table(rows: Iterable[TensorSpec]) -> Table:
    return {row.key: row for row in rows}


def _embedding(model: ModelConfig) -> list[TensorSpec]:
    initial = Normal(model.init_method_std)
    rows = [TensorSpec(_EMBEDDING, (model.vocab_size, model.hidden_size), 0, initial)]
    if model.position_embedding_type == "learned_absolute":
        shape = (model.max_position_embeddings or 0, model.hidden_size)
        rows.append(TensorSpec("embedding.position_embeddings.weight", shape, None, initial))
    return rows


def _output(model: ModelConfig) -> list[TensorSpec]:
    """Final norm and output layer; where the output layer is tied, its matrix is the embedding's."""
    key = "output_layer.weight" if model.untie_embeddings_and_output_weights else _EMBEDDING
    matrix = TensorSpec(key, (model.vocab_size, model.hidden_size), 0, Normal(model.init_method_std))
    return [*_norm(model, "decoder.final_layernorm", model.hidden_size), matrix, *_mtp(model)]


def _mtp(model: ModelConfig) -> list[TensorSpec]:
    """Blocks of multi-token prediction, as Megatron-Core builds them behind the last layer; they read the embedding, of
    which the last stage then holds a copy."""
    hidden, rows = model.hidden_size, []
    for number in range(model.mtp_num_layers or 0):
        prefix, initial = f"mtp.layers.{number}.", Normal(model.init_method_std)
        for name in ("enorm", "hnorm", "final_layernorm"):
            rows += _norm(model, prefix + name, hidden)
        rows.append(TensorSpec(f"{prefix}eh_proj.weight", (hidden, 2 * hidden), 0, initial))
        rows += _layer(model, model.num_layers - 1, f"{prefix}transformer_layer.")
    return [*_embedding(model)[:1], *rows] if rows else []


def _layer(model: ModelConfig, layer: int, prefix: str = "") -> list[TensorSpec]:
    prefix = prefix or layer_key(layer, "")
    mlp = _moe(model, prefix + "mlp") if model.layer_is_moe(layer) else _dense_mlp(model, prefix + "mlp")
    return [
        *_norm(model, prefix + "input_layernorm", model.hidden_size),
        *_attention(model, prefix + "self_attention"),
        *_norm(model, prefix + "pre_mlp_layernorm", model.hidden_size),
        *mlp,
    ]


def _norm(model: ModelConfig, name: str, width: int) -> list[TensorSpec]:
    """A norm's weight; a LayerNorm has a bias beside it."""
    rows = [TensorSpec(f"{name}.weight", (width,), None, Constant(1.0), decays=False)]
    if model.normalization == "LayerNorm":
        rows.append(_bias(f"{name}.bias", (width,), None))
    return rows


def _bias(key: str, shape: Shape, tensor_axis: int | None, expert: bool = False) -> TensorSpec:
    return TensorSpec(key, shape, tensor_axis, Constant(0.0), expert, decays=False)


def _latent_attention(model: ModelConfig, name: str) -> list[TensorSpec]:
    """Multi-latent attention (arXiv 2405.04434, section 2.1). Down projections are whole on each tensor-parallel rank,
    as in Megatron-Core; latents have a norm with qk_layernorm."""
    hidden, heads, initial = model.hidden_size, model.num_attention_heads, Normal(model.init_method_std)

    def linear(part: str, rows: int, columns: int, axis: int | None) -> TensorSpec:
        return TensorSpec(f"{name}.{part}.weight", (rows, columns), axis, initial)

    rows, query = [], model.q_lora_rank
    if query:
        rows.append(linear("linear_q_down_proj", query, hidden, None))
        rows += _norm(model, f"{name}.q_layernorm", query) if model.qk_layernorm else []
        rows.append(linear("linear_q_up_proj", model.query_width, query, 0))
    else:
        rows.append(linear("linear_q_proj", model.query_width, hidden, 0))
    latent = model.kv_lora_rank
    rows.append(linear("linear_kv_down_proj", latent + model.qk_pos_emb_head_dim, hidden, None))
    rows += _norm(model, f"{name}.kv_layernorm", latent) if model.qk_layernorm else []
    rows.append(linear("linear_kv_up_proj", heads * (model.qk_head_dim + model.v_head_dim), latent, 0))
    rows.append(linear("linear_proj", hidden, model.output_width, 1))
    if model.has_attention_output_bias:
        rows.append(_bias(f"{name}.linear_proj.bias", (hidden,), None))
    return rows


def _attention(model: ModelConfig, name: str) -> list[TensorSpec]:
    if model.multi_latent_attention:
        return _latent_attention(model, name)
    hidden, query = model.hidden_size, model.num_attention_heads * model.head_dim
    fused = query + 2 * model.query_groups * model.head_dim
    initial = Normal(model.init_method_std)
    rows = [TensorSpec(f"{name}.linear_qkv.weight", (fused, hidden), 0, initial)]
    if model.has_qkv_bias:
        rows.append(_bias(f"{name}.linear_qkv.bias", (fused,), 0))
    if model.qk_layernorm:
        rows += [*_norm(model, f"{name}.q_layernorm", model.head_dim)]
        rows += [*_norm(model, f"{name}.k_layernorm", model.head_dim)]
    rows.append(TensorSpec(f"{name}.linear_proj.weight", (hidden, query), 1, initial))
    if model.has_attention_output_bias:
        rows.append(_bias(f"{name}.linear_proj.bias", (hidden,), None))
    return rows


def _dense_mlp(model: ModelConfig, name: str) -> list[TensorSpec]:
    return mlp_rows(
        f"{name}.",
        model.hidden_size,
        model.ffn_hidden_size,
        Normal(model.init_method_std),
        gated=model.is_gated,
        input_bias=model.add_bias_linear,
        output_bias=model.has_mlp_output_bias,
    )


def _moe(model: ModelConfig, name: str) -> list[TensorSpec]:
    hidden, experts, initial = model.hidden_size, model.num_experts, Normal(model.init_method_std)
    assert experts is not None, "layer_is_moe says so"
    rows = [TensorSpec(f"{name}.router.weight", (experts, hidden), None, Normal(model.router_init_std))]
    if model.add_bias_linear:
        rows.append(_bias(f"{name}.router.bias", (experts,), None))
    rows += mlp_rows(
        f"{name}.experts.",
        hidden,
        expert_ffn_hidden_size(model),
        initial,
        gated=model.is_gated,
        input_bias=model.add_bias_linear,
        output_bias=model.has_mlp_output_bias,
        experts=experts,
    )
    shared = model.moe_shared_expert_intermediate_size
    if shared:
        # a shared expert has no biases, in Megatron-Core and here
        rows += mlp_rows(f"{name}.shared_experts.", hidden, shared, initial, gated=model.is_gated)
        if model.moe_shared_expert_gate:
            rows.append(TensorSpec(f"{name}.shared_experts.gate_weight", (1, hidden), None, initial))
    return rows
