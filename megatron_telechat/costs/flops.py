"""Floating-point operations of a model, counted as those the mathematics needs.

A multiply-add is two operations. Matrix products only: norms, rotary, softmax and the MLP's
element-wise part are below 1 % and left out, as in the PaLM paper (arXiv 2204.02311, appendix B)
and in Narayanan et al. (arXiv 2104.04473, section 5.1). Unlike the latter, causal attention is
counted as the half that is not masked, and recompute is not counted: these are *model* FLOPs,
the numerator of MFU.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_telechat.config.schema import ModelConfig
from megatron_telechat.tensors.table import expert_ffn_hidden_size


@dataclass(frozen=True)
class LayerFlops:
    """Forward FLOPs of one decoder layer for one token, by part."""

    projections: float
    """QKV and output projections: 2 h (q + 2k) + 2 q h, with q = heads*head_dim, k = groups*head_dim. Of multi-latent
    attention two for each element of its matrices."""
    core_attention: float
    """Scores and their product with V over the causal half: 2 S q; of a sliding window over what it lets through."""
    mlp: float
    """6 h f of a SwiGLU, 4 h f without a gate; in a MoE layer of the top-k experts and of the shared one."""
    router: float
    """2 h E; zero in a dense layer."""

    @property
    def total(self) -> float:
        """Forward FLOPs of the layer for one token."""
        return self.projections + self.core_attention + self.mlp + self.router


def mlp_forward_flops(model: ModelConfig, width: float) -> float:
    """Forward FLOPs of an MLP of this width for one token: three matrices where it is gated, else two."""
    return (6 if model.is_gated else 4) * model.hidden_size * width


def layer_forward_flops(model: ModelConfig, layer: int, seq_length: int) -> LayerFlops:
    """Forward FLOPs of the zero-based `layer` for one token of a sequence of `seq_length` tokens."""
    hidden = model.hidden_size
    projections = sum(2 * rows * columns for rows, columns in projection_shapes(model))
    # A token attends to S/2 positions on average, at 2 q (scores) and 2 v (values) each.
    core_attention = 2 * attended_positions(model, seq_length) * (model.query_width + model.output_width)
    if not model.layer_is_moe(layer):
        return LayerFlops(projections, core_attention, mlp_forward_flops(model, model.ffn_hidden_size), 0.0)
    experts = mlp_forward_flops(model, expert_ffn_hidden_size(model)) * model.moe_router_topk
    shared = mlp_forward_flops(model, model.moe_shared_expert_intermediate_size or 0)
    return LayerFlops(projections, core_attention, experts + shared, 2 * hidden * (model.num_experts or 0))


def projection_shapes(model: ModelConfig) -> list[tuple[int, int]]:
    """(rows, columns) of the matrices of an attention."""
    hidden, output = model.hidden_size, (model.hidden_size, model.output_width)
    if not model.multi_latent_attention:
        return [(model.query_width + model.key_width + model.value_width, hidden), output]
    latent = model.kv_lora_rank
    query = [(model.query_width, hidden)]
    if model.q_lora_rank:
        query = [(model.q_lora_rank, hidden), (model.query_width, model.q_lora_rank)]
    up = model.num_attention_heads * (model.qk_head_dim + model.v_head_dim)
    return [*query, (latent + model.qk_pos_emb_head_dim, hidden), (up, latent), output]


def attention_products(model: ModelConfig, whole: float, split: float, tensor: int) -> list[tuple[float, float, float]]:
    """(rows, columns, depth) of each product around the attention that a rank computes for a micro-batch.

    The down projections of a multi-latent attention are whole on each tensor-parallel rank, which has its part of the
    sequence there.

    Args:
        whole, split: tokens of the micro-batch within a tensor-parallel region, and outside of it.
        tensor: tensor-parallel size.
    """
    (*inner, output), hidden = projection_shapes(model), model.hidden_size
    last = (whole, output[0], output[1] / tensor)
    if not model.multi_latent_attention:
        return [(whole, inner[0][0] / tensor, hidden), last]
    latents = (model.q_lora_rank, model.kv_lora_rank + model.qk_pos_emb_head_dim)
    down = [(split, rows, depth) for rows, depth in inner if rows in latents]
    return [*down, *((whole, rows / tensor, depth) for rows, depth in inner if rows not in latents), last]


def attended_positions(model: ModelConfig, seq_length: int) -> float:
    """Positions that a token of a causal sequence attends to, on average over tokens and layers: S/2 without a window
    (the diagonal counts half); with one of w tokens beside its own, v - v^2 / (2 S) for v = w + 1.

    The mean over the layers, so that layers with a window and layers without one count alike.
    """
    if model.window is None:
        return seq_length / 2
    view = min(model.window + 1, seq_length)
    narrow = view - view**2 / (2 * seq_length)
    share = sum(model.layer_is_windowed(layer) for layer in range(model.num_layers)) / max(model.num_layers, 1)
    return share * narrow + (1 - share) * seq_length / 2


def mtp_forward_flops(model: ModelConfig, seq_length: int) -> float:
    """Forward FLOPs of the multi-token-prediction blocks for one token: each a decoder layer like the last one, a
    product of 2h with h, and the output layer once more."""
    layer = layer_forward_flops(model, model.num_layers - 1, seq_length).total
    return (model.mtp_num_layers or 0) * (layer + 4 * model.hidden_size**2 + head_forward_flops(model))


def head_forward_flops(model: ModelConfig) -> float:
    """Forward FLOPs of the output layer for one token: 2 h V. The embedding is a look-up and costs none."""
    return 2 * model.hidden_size * model.vocab_size


def forward_flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """Forward FLOPs of the whole model for one token."""
    layers = sum(layer_forward_flops(model, layer, seq_length).total for layer in range(model.num_layers))
    return layers + head_forward_flops(model) + mtp_forward_flops(model, seq_length)


def training_flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """FLOPs of forward and backward for one token: three times the forward.

    Each product of the forward has two in the backward (with respect to its input and to its
    weight). Recompute is not counted, the causal mask halves attention, a MoE layer counts the
    top-k experts, the embedding look-up counts nothing, the output layer counts.
    """
    return 3 * forward_flops_per_token(model, seq_length)


def model_tflops_per_device(model: ModelConfig, seq_length: int, tokens_per_s_per_device: float) -> float:
    """Model TFLOP/s that one device delivers at this throughput."""
    return training_flops_per_token(model, seq_length) * tokens_per_s_per_device / 1e12
