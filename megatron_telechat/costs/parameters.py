"""The parameters of a model: every tensor by its global key and shape, and how many there are.

The table is the one list that parameter counts, the start-up agreement, checkpoints, the
Hugging Face map and the initialisation refer to. It knows nothing of any parallel layout:
a key names a whole tensor of the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from megatron_telechat.config.schema import ModelConfig, ParallelConfig

Shape = tuple[int, ...]

EMBEDDING_KEY = "embedding.word_embeddings.weight"
POSITION_KEY = "embedding.position_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm"
OUTPUT_KEY = "output_layer.weight"
LAYER_PREFIX = "decoder.layers."

# Tensors that every tensor-parallel rank holds whole. The bias of a row-parallel linear is
# added once, after the reduce; norms and the router act on the whole hidden vector.
_REPLICATED_OVER_TP = (
    "layernorm.weight",
    "layernorm.bias",
    POSITION_KEY,
    "self_attention.linear_proj.bias",
    "linear_fc2.bias",
    "mlp.router.weight",
    "mlp.router.bias",
    "mlp.shared_experts.gate_weight",
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
        """Parameters that the rank holds."""
        return self.dense + self.expert

    def __add__(self, other: LocalCount) -> LocalCount:
        return LocalCount(self.dense + other.dense, self.expert + other.expert)


def layer_table(model: ModelConfig, layer: int) -> dict[str, Shape]:
    """Global keys and shapes of the decoder layer with zero-based number `layer`, in model order."""
    hidden, heads, head_dim = model.hidden_size, model.num_attention_heads, model.head_dim
    prefix = f"{LAYER_PREFIX}{layer}."
    qkv = (heads + 2 * model.query_groups) * head_dim
    table = _norm_table(model, "input_layernorm", hidden)
    table["self_attention.linear_qkv.weight"] = (qkv, hidden)
    if model.has_qkv_bias:
        table["self_attention.linear_qkv.bias"] = (qkv,)
    if model.qk_layernorm:
        for name in ("q", "k"):
            table.update(_norm_table(model, f"self_attention.{name}_layernorm", head_dim))
    table["self_attention.linear_proj.weight"] = (hidden, heads * head_dim)
    if model.has_attention_output_bias:
        table["self_attention.linear_proj.bias"] = (hidden,)
    table.update(_norm_table(model, "pre_mlp_layernorm", hidden))
    if model.layer_is_moe(layer):
        table.update(_moe_table(model))
    else:
        table.update(_mlp_table(model, "mlp", model.ffn_hidden_size, ()))
    return {prefix + key: shape for key, shape in table.items()}


def _norm_table(model: ModelConfig, name: str, width: int) -> dict[str, Shape]:
    """A norm's weight; a LayerNorm has a bias beside it."""
    table: dict[str, Shape] = {f"{name}.weight": (width,)}
    if model.normalization == "LayerNorm":
        table[f"{name}.bias"] = (width,)
    return table


def _mlp_table(model: ModelConfig, name: str, ffn: int, experts: Shape) -> dict[str, Shape]:
    """The two linear layers of an MLP `ffn` wide, or of as many as `experts` says; the first holds gate and up where it
    is gated."""
    hidden = model.hidden_size
    inner = (2, ffn) if model.is_gated else (ffn,)
    table: dict[str, Shape] = {f"{name}.linear_fc1.weight": (*experts, *inner, hidden)}
    if model.add_bias_linear:
        table[f"{name}.linear_fc1.bias"] = (*experts, *inner)
    table[f"{name}.linear_fc2.weight"] = (*experts, hidden, ffn)
    if model.has_mlp_output_bias:
        table[f"{name}.linear_fc2.bias"] = (*experts, hidden)
    return table


def expert_ffn_hidden_size(model: ModelConfig) -> int:
    """Width of one expert's MLP; the dense width where the model names none of its own."""
    return model.moe_ffn_hidden_size or model.ffn_hidden_size


def _moe_table(model: ModelConfig) -> dict[str, Shape]:
    hidden, experts = model.hidden_size, model.num_experts
    assert experts is not None  # layer_is_moe said so
    table: dict[str, Shape] = {"mlp.router.weight": (experts, hidden)}
    if model.add_bias_linear:
        table["mlp.router.bias"] = (experts,)
    table.update(_mlp_table(model, "mlp.experts", expert_ffn_hidden_size(model), (experts,)))
    shared = model.moe_shared_expert_intermediate_size
    if shared:
        # a shared expert has no biases, in Megatron-Core and here
        bare = replace(model, add_bias_linear=False, mlp_output_bias=False)
        table.update(_mlp_table(bare, "mlp.shared_experts", shared, ()))
        if model.moe_shared_expert_gate:
            table["mlp.shared_experts.gate_weight"] = (1, hidden)
    return table


def _embedding_table(model: ModelConfig) -> dict[str, Shape]:
    table: dict[str, Shape] = {EMBEDDING_KEY: (model.vocab_size, model.hidden_size)}
    if model.position_embedding_type == "learned_absolute":
        table[POSITION_KEY] = (model.max_position_embeddings or 0, model.hidden_size)
    return table


def _output_table(model: ModelConfig) -> dict[str, Shape]:
    """Final norm and output layer; where the output layer is tied, its matrix is the embedding's."""
    table = _norm_table(model, FINAL_NORM, model.hidden_size)
    key = OUTPUT_KEY if model.untie_embeddings_and_output_weights else EMBEDDING_KEY
    return {**table, key: (model.vocab_size, model.hidden_size)}


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

    Models that only the planner knows have others, with Megatron-Core's names:
        embedding.position_embeddings.weight          [max_position_embeddings, hidden]; learned positions
        norms' .bias                                  as their weight; LayerNorm
        ...self_attention.{q,k}_layernorm.weight      [head_dim]
        ...linear_qkv.bias, ...linear_fc1.bias, ...router.bias   as their weight without its last axis
        ...linear_fc1.weight                          [ffn, hidden], [experts, ffn, hidden] where the MLP has no gate
        ...mlp.shared_experts.gate_weight             [1, hidden]
    Tied, there is no output_layer.weight.
    """
    table = _embedding_table(model)
    for layer in range(model.num_layers):
        table.update(layer_table(model, layer))
    return {**table, **_output_table(model)}


def is_expert_key(key: str) -> bool:
    """Whether the tensor belongs to the routed experts (and so to the expert-parallel domain)."""
    return _EXPERTS in key


def is_replicated_over_tensor_parallel(key: str) -> bool:
    """Whether every tensor-parallel rank holds the whole tensor."""
    return not is_expert_key(key) and key.endswith(_REPLICATED_OVER_TP)


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Parameters of the whole model, and those one token meets: of the routed experts only top-k.

    Both embedding matrices are counted, as in the published sizes; one where they are tied.
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
    (the experts' output bias over EP only: each expert-tensor rank keeps the output bias of its experts whole).
    """
    tensor = parallel.tensor_model_parallel_size
    expert, expert_tensor = parallel.expert_sizes
    dense_count = expert_count = 0
    for key, shape in table.items():
        size = math.prod(shape)
        if is_expert_key(key):
            expert_count += size // expert if key.endswith("linear_fc2.bias") else size // (expert * expert_tensor)
        else:
            dense_count += size if is_replicated_over_tensor_parallel(key) else size // tensor
    return LocalCount(dense_count, expert_count)


def stage_table(model: ModelConfig, layers: Iterable[int], *, has_embedding: bool, has_loss: bool) -> dict[str, Shape]:
    """The part of the parameter table that a pipeline rank with these global layers holds.

    Where the output layer is tied, the first and the last stage both hold the embedding's matrix, as in Megatron-Core;
    one stage that is both holds it once.
    """
    table = _embedding_table(model) if has_embedding else {}
    for layer in layers:
        table.update(layer_table(model, layer))
    return {**table, **_output_table(model)} if has_loss else table
