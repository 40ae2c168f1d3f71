"""The parameters of a model: every tensor by its global key and shape, and how many there are.

The table is the one list that parameter counts, the start-up agreement, checkpoints, the
Hugging Face map and the initialisation refer to. It knows nothing of any parallel layout:
a key names a whole tensor of the whole model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Iterable, Mapping

from megatron_telechat.config.schema import ModelConfig, ParallelConfig

Shape = tuple[int, ...]

EMBEDDING_KEY = "embedding.word_embeddings.weight"
FINAL_NORM_KEY = "decoder.final_layernorm.weight"
OUTPUT_KEY = "output_layer.weight"
LAYER_PREFIX = "decoder.layers."

# Tensors that every tensor-parallel rank holds whole. The bias of a row-parallel linear is
# added once, after the reduce; norms and the router act on the whole hidden vector.
_REPLICATED_OVER_TP = (
    "layernorm.weight",
    "self_attention.linear_proj.bias",
    "mlp.linear_fc2.bias",
    "mlp.router.weight",
)
_EXPERTS = ".mlp.experts."


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model: all of them, and those that act on one token (top-k experts)."""

    total: int
    active: int


@dataclass(frozen=True)
class LocalCount:
    """Parameters that one rank holds: those shared by the attention domain, and those of its experts."""

    dense: int
    expert: int

    @property
    def total(self) -> int:
        return self.dense + self.expert

    def __add__(self, other: "LocalCount") -> "LocalCount":
        return LocalCount(self.dense + other.dense, self.expert + other.expert)


def layer_table(model: ModelConfig, layer: int) -> dict[str, Shape]:
    """Global keys and shapes of the decoder layer with zero-based number `layer`, in model order."""
    hidden, heads, head_dim = model.hidden_size, model.num_attention_heads, model.head_dim
    prefix = f"{LAYER_PREFIX}{layer}."
    table: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "self_attention.linear_qkv.weight": ((heads + 2 * model.query_groups) * head_dim, hidden),
        "self_attention.linear_proj.weight": (hidden, heads * head_dim),
    }
    if model.attention_output_bias:
        table["self_attention.linear_proj.bias"] = (hidden,)
    table["pre_mlp_layernorm.weight"] = (hidden,)
    table.update(_moe_table(model) if model.layer_is_moe(layer) else _dense_mlp_table(model))
    return {prefix + key: shape for key, shape in table.items()}


def _dense_mlp_table(model: ModelConfig) -> dict[str, Shape]:
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    table: dict[str, Shape] = {
        "mlp.linear_fc1.weight": (2, ffn, hidden),
        "mlp.linear_fc2.weight": (hidden, ffn),
    }
    if model.mlp_output_bias:
        table["mlp.linear_fc2.bias"] = (hidden,)
    return table


def expert_ffn_hidden_size(model: ModelConfig) -> int:
    """Width of one expert's SwiGLU; the dense width where the model names none of its own."""
    return model.moe_ffn_hidden_size or model.ffn_hidden_size


def _moe_table(model: ModelConfig) -> dict[str, Shape]:
    hidden, ffn, experts = model.hidden_size, expert_ffn_hidden_size(model), model.num_experts
    assert experts is not None  # layer_is_moe said so
    table: dict[str, Shape] = {
        "mlp.router.weight": (experts, hidden),
        "mlp.experts.linear_fc1.weight": (experts, 2, ffn, hidden),
        "mlp.experts.linear_fc2.weight": (experts, hidden, ffn),
    }
    if model.mlp_output_bias:
        table["mlp.experts.linear_fc2.bias"] = (experts, hidden)
    shared = model.moe_shared_expert_intermediate_size
    if shared:
        table["mlp.shared_experts.linear_fc1.weight"] = (2, shared, hidden)
        table["mlp.shared_experts.linear_fc2.weight"] = (hidden, shared)
    return table


def parameter_table(model: ModelConfig) -> dict[str, Shape]:
    """Every parameter of the model: global key -> global shape, in model order.

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
    """
    table: dict[str, Shape] = {EMBEDDING_KEY: (model.vocab_size, model.hidden_size)}
    for layer in range(model.num_layers):
        table.update(layer_table(model, layer))
    table[FINAL_NORM_KEY] = (model.hidden_size,)
    table[OUTPUT_KEY] = (model.vocab_size, model.hidden_size)
    return table


def is_expert_key(key: str) -> bool:
    """Whether the tensor belongs to the routed experts (and so to the expert-parallel domain)."""
    return _EXPERTS in key


def is_replicated_over_tensor_parallel(key: str) -> bool:
    """Whether every tensor-parallel rank holds the whole tensor."""
    return not is_expert_key(key) and key.endswith(_REPLICATED_OVER_TP)


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Parameters of the whole model, and those one token meets: of the routed experts only top-k.

    Both embedding matrices are counted, as in the published sizes.
    """
    total = active = 0
    for key, shape in parameter_table(model).items():
        size = math.prod(shape)
        total += size
        # axis 0 of a routed expert's tensor counts the experts
        active += size // shape[0] * model.moe_router_topk if is_expert_key(key) else size
    return ParameterCount(total, active)


def local_count(table: Mapping[str, Shape], parallel: ParallelConfig) -> LocalCount:
    """Parameters one rank holds of the tensors in `table` (those of its pipeline stage).

    Column- and row-parallel weights and the vocabulary are cut over TP; experts over EP x ETP
    (the expert bias over EP only: each expert-tensor rank keeps the bias of its experts whole).
    """
    tensor = parallel.tensor_model_parallel_size
    expert, expert_tensor = parallel.expert_sizes
    dense_count = expert_count = 0
    for key, shape in table.items():
        size = math.prod(shape)
        if is_expert_key(key):
            expert_count += size // expert if key.endswith(".bias") else size // (expert * expert_tensor)
        else:
            dense_count += size if is_replicated_over_tensor_parallel(key) else size // tensor
    return LocalCount(dense_count, expert_count)


def stage_table(
    model: ModelConfig, layers: Iterable[int], *, has_embedding: bool, has_loss: bool
) -> dict[str, Shape]:
    """The part of the parameter table that a pipeline rank with these global layers holds."""
    table: dict[str, Shape] = {}
    if has_embedding:
        table[EMBEDDING_KEY] = (model.vocab_size, model.hidden_size)
    for layer in layers:
        table.update(layer_table(model, layer))
    if has_loss:
        table[FINAL_NORM_KEY] = (model.hidden_size,)
        table[OUTPUT_KEY] = (model.vocab_size, model.hidden_size)
    return table
