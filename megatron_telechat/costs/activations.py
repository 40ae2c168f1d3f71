"""Bytes a rank keeps of one micro-batch: by layer and recompute, embedding, output layer.

Counted are the tensors the model keeps for its backward, each storage once; tests/costs/test_saved_tensors.py holds
the sums to what autograd saves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_telechat.config.loss_chunks import WEIGHT_PIECES, loss_chunk_rows
from megatron_telechat.config.schema import ModelConfig, RunConfig
from megatron_telechat.costs.software import Software
from megatron_telechat.device_kinds import planned_device
from megatron_telechat.tensors.table import expert_ffn_hidden_size

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
INDEX_BYTES = 8
"""Token ids, chosen experts and row numbers are int64."""
AUTO_PIECES = 2
"""Pieces of a transfer of keys and values where the run chooses their number itself, by trying."""
_FP32 = BYTES["fp32"]


@dataclass(frozen=True)
class LayerActivations:
    """Bytes of one layer for one micro-batch on one rank.

    Attributes:
        kept: from its forward to the end of its backward.
        working_set: on top of what is kept, made again during its backward or needed by it alone.
    """

    kept: float
    working_set: float


@dataclass(frozen=True)
class Tokens:
    """Tokens of one micro-batch on one rank, by region of the layer.

    `whole`: inside a tensor-parallel region, where the sequence is gathered but each tensor is cut
    `tensor` ways; `split`: outside, where sequence parallelism cuts the sequence instead.
    `routed`: rows that the rank's experts get, `imbalance` times those of a balanced routing.
    """

    whole: float
    split: float
    routed: float
    tensor: int
    expert: int
    expert_tensor: int
    imbalance: float


def tokens_of(run: RunConfig, imbalance: float = 1.0) -> Tokens:
    """Tokens of a micro-batch as one rank of this run sees them; `imbalance`: rows of its experts over the mean."""
    parallel = run.parallel
    tensor = parallel.tensor_model_parallel_size
    whole = run.training.seq_length * run.training.micro_batch_size / parallel.context_parallel_size
    split = whole / parallel.sequence_parallel_size
    expert, expert_tensor = parallel.expert_sizes
    # A rank's experts get as many rows as it sends, gathered over the ranks that share an expert.
    routed = split * run.model.moe_router_topk * expert_tensor * imbalance
    return Tokens(whole, split, routed, tensor, expert, expert_tensor, imbalance)


def layer_activations(
    run: RunConfig, layer: int, modes: tuple[str, ...], imbalance: float = 1.0, software: Software | None = None
) -> LayerActivations:
    """Activations of the zero-based `layer` under its recompute modes, on a rank whose experts get `imbalance` times
    the mean of rows; `software`: of the program, unset: our own.

    Elements a token, after Korthikanti et al. (arXiv 2205.05198, section 4) for a flash attention,
    which keeps no score matrix, and a SwiGLU that keeps its input alone:
        norms      2h (inputs) + 2h (outputs)
        attention  q + 2k (after rotary) + q (output) + `_core_attention`; with norms on q and k, q + k (their inputs);
                   multi-latent attention: q + k + v + output, and its latent vectors twice
        SwiGLU     2f (gate, up) + f (product); without a gate f (input of the activation) + f (its output)
        MoE        `expert_activations`
        dropout    2h, one byte each (the masks of both residual branches; on the CPU in the compute type)
    On the CPU a norm keeps one fp32 number a token.

    Full recompute keeps the layer's input alone. The other modes drop what the repeated module makes:
    ``core_attn`` what `_core_attention` counts (the output that the projection reads stays),
    ``layernorm`` both norm outputs, ``mlp`` and ``moe`` what lies between the norm output and the block's end.
    """
    model, tokens = run.model, tokens_of(run, imbalance)
    size = BYTES[run.training.precision]
    device = planned_device(run.training.device)
    hidden = model.hidden_size
    query, key = model.query_width, model.key_width

    layer_input = size * hidden * tokens.split
    norms = (2 * size * hidden + 8 * (not device.fused_rms_norm)) * tokens.split
    residual = size * hidden * tokens.split  # the second norm's input
    made = query + key + model.value_width + model.output_width
    attention = size * made * tokens.whole / tokens.tensor
    if model.multi_latent_attention:  # the latent vectors, before and behind their norms
        latent = (model.q_lora_rank or 0) + model.kv_lora_rank
        attention += size * (2 * latent + model.qk_pos_emb_head_dim) * tokens.split
    elif model.qk_layernorm:  # its input, the whole fused projection, and on the CPU a number a head
        heads = model.num_attention_heads + model.query_groups
        attention += (size * (query + 2 * key) + 4 * heads * (not device.fused_rms_norm)) * tokens.whole / tokens.tensor
    masks = 2 * _mask_bytes(run)
    core, exchange = _core_attention(run, tokens)
    if software is not None and software.attention == "unfused":
        core = _scores(run, tokens)
    block, block_dropped = _block_activations(model, layer, size, tokens)
    everything = layer_input + norms + residual + attention + core + block + masks
    work = max(exchange, _gradient_bytes(run, layer, tokens))

    if "full" in modes:
        return LayerActivations(layer_input, everything - layer_input + work)
    dropped = 0.0
    if "core_attn" in modes:
        dropped += core
    if "layernorm" in modes:
        dropped += norms
    if "mlp" in modes or "moe" in modes:
        dropped += block_dropped
    return LayerActivations(everything - dropped, dropped + work)


def _gradient_bytes(run: RunConfig, layer: int, tokens: Tokens) -> float:
    """What the backward of a layer holds at its fullest moment beside what its forward kept: at the second matrix of
    its MLP, the gradients of that matrix, in the compute type, and of its input. Under sequence parallelism also the
    gathered gradient of the output, and the buffer that gathered inputs lie in, which stays.

    Of a MoE layer the buffer alone: rows of experts and their gradients come in pieces.
    """
    model, size = run.model, BYTES[run.training.precision]
    gathered = size * model.hidden_size * tokens.whole * (tokens.split < tokens.whole)
    if model.layer_is_moe(layer):
        return gathered
    return 2 * gathered + size * (tokens.whole + model.hidden_size) * model.ffn_hidden_size / tokens.tensor


def context_pieces(run: RunConfig) -> int:
    """Pieces of each transfer of keys and values; auto counts as AUTO_PIECES."""
    return AUTO_PIECES if run.parallel.cp_pieces == "auto" else int(run.parallel.cp_pieces)


def _core_attention(run: RunConfig, tokens: Tokens) -> tuple[float, float]:
    """Bytes that the core attention keeps beside queries, keys, values and the output that the projection reads; and
    bytes that its backward needs alone.

    On one rank: statistics of the softmax, one fp32 log-sum-exp a head where the device does not keep more. On the CPU
    torch's attention returns its output head by head: the projection reads a copy, and both are kept.

    On context-parallel ranks (`parallel.context`): the log-sum-exp; the output once more where heads were exchanged,
    which the projection reads in another order; with `cp_keep_received` the keys and values of others, on the busiest
    rank those of all R - 1. In the backward: fp32 gradients of queries, keys and
    values, and the pieces at hand, each three quarters of its share of a rank's keys and values in the mean: one with
    its gradients (fp32, and as they travel), those of a step, at least two, of gradients on their way home, and unless
    they were kept as many on their way here. Of what is under way there is a buffer at each end.
    """
    model, parallel, size = run.model, run.parallel, BYTES[run.training.precision]
    share = tokens.whole / tokens.tensor
    query, key_value = model.output_width, model.key_width + model.value_width
    if parallel.context_parallel_size == 1:
        device = planned_device(run.training.device)
        statistics = device.attention_statistics_bytes * model.num_attention_heads
        return (statistics + size * query * device.copies_attention_output) * share, 0.0
    heads, ring = parallel.context_sizes
    kept = 4 * model.num_attention_heads + size * query * (heads > 1)
    kept += size * key_value * (ring - 1) * parallel.keeps_received
    each = context_pieces(run)
    under_way = 2 * max(2, each)
    pieces = 0.75 * (3 + under_way if parallel.keeps_received else 4 + 2 * under_way) * (ring > 1) / each
    return kept * share, (4 * (query + key_value) + size * key_value * pieces) * share


def _scores(run: RunConfig, tokens: Tokens) -> float:
    """Bytes of the matrix of scores that an attention without a flash kernel keeps: the softmax, and with dropout its
    mask and what is left (arXiv 2205.05198, section 4: 5 a s^2 b)."""
    size = BYTES[run.training.precision]
    element = size + (1 + size) * (run.model.attention_dropout > 0)
    return element * run.model.num_attention_heads * run.training.seq_length * tokens.whole / tokens.tensor


def _block_activations(model: ModelConfig, layer: int, size: int, tokens: Tokens) -> tuple[float, float]:
    """Bytes kept inside the MLP or MoE block, the norm output before it not counted, and those its recompute drops."""
    inner = 3 if model.is_gated else 2
    if not model.layer_is_moe(layer):
        dense = size * inner * model.ffn_hidden_size * tokens.whole / tokens.tensor
        return dense, dense
    shared = size * inner * (model.moe_shared_expert_intermediate_size or 0) * tokens.whole / tokens.tensor
    kept, dropped = expert_activations(model, size, tokens)
    return kept + shared, dropped + shared


def expert_activations(model: ModelConfig, size: int, tokens: Tokens) -> tuple[float, float]:
    """Bytes that router and routed experts keep, and those of them that recompute ``moe`` drops.

    Rows that arrived: h elements, one for every rank a token's experts lie on (`arriving_rows`); on a rank that has all
    experts they are the norm's output itself. Expert rows (top-k of a token): 2 f_e elements (gate, up; f_e without a
    gate), f_e cut by the expert tensor-parallel size, and the fp32 probability. The product of gate and up is made
    again in every backward.
    Router: the chosen experts (int64) and their fp32 weights, and fp32 scores of all experts for an auxiliary loss.
    Recompute ``moe`` drops gate and up: no exchange is repeated. Row numbers, below 1 % of a row, are left out.
    """
    shared = tokens.expert * tokens.expert_tensor > 1
    rows = size * model.hidden_size * arriving_rows(model, tokens) * shared
    gate_up = (2 if model.is_gated else 1) * size * tokens.routed * expert_ffn_hidden_size(model) / tokens.expert_tensor
    scores = 4 * (model.num_experts or 0) * (model.moe_aux_loss_coeff > 0 or model.moe_z_loss_coeff > 0)
    router = tokens.split * (model.moe_router_topk * (INDEX_BYTES + 4) + scores)
    return rows + gate_up + 4 * tokens.routed + router, gate_up


def arriving_rows(model: ModelConfig, tokens: Tokens) -> float:
    """Token rows that a rank receives, its own included, when the routing is balanced and random: a token travels once
    to each rank that holds one of its experts, and to all ranks that hold slices of it."""
    experts, here = model.num_experts or 1, (model.num_experts or 1) // tokens.expert
    # the chance that none of k different experts is among those of one rank
    missed = math.comb(experts - here, model.moe_router_topk) / math.comb(experts, model.moe_router_topk)
    # an uneven routing cannot send a rank more rows than there are tokens
    most = tokens.split * tokens.expert_tensor * tokens.expert
    return min(most, tokens.imbalance * most * (1 - missed))


def embedding_bytes(run: RunConfig) -> float:
    """What the embedding keeps of a micro-batch: the token ids, positions where they are learned, the mask of a
    dropout. Its output is the first layer's input."""
    tokens, model = tokens_of(run), run.model
    ids = 2 if model.position_embedding_type == "learned_absolute" else 1
    return INDEX_BYTES * ids * tokens.whole + _mask_bytes(run)


def _mask_bytes(run: RunConfig) -> float:
    """Mask of one dropout of hidden states: a byte an element, on the CPU one of the compute type."""
    if not run.model.hidden_dropout:
        return 0.0
    each = 1 if planned_device(run.training.device).byte_dropout_masks else BYTES[run.training.precision]
    return each * run.model.hidden_size * tokens_of(run).split


def output_layer_activations(run: RunConfig) -> LayerActivations:
    """Final norm, logits and loss of one micro-batch.

    Kept between forward and backward are the norm's input and output and, of the loss, the softmax, fp32, of the
    vocabulary-parallel cross entropy; in chunks, of each row the label, the largest logit, the sum of the exponentials
    and the label's logit. The working set is what is free again before the first layer recomputes: the logits in the
    compute type (in the forward) or their gradient (in the backward), in chunks `_chunk_bytes`. With multi-token
    prediction each block adds its decoder layer, and a loss of its own, which is held at the same time.
    """
    tokens, size, chunks = tokens_of(run), BYTES[run.training.precision], loss_chunks(run)
    norm = 2 * size * run.model.hidden_size * tokens.split
    a_row = INDEX_BYTES + 3 * _FP32 if chunks else _FP32 * _columns(run)
    working_set = _chunk_bytes(run) if chunks else _columns(run) * size * tokens.whole
    kept = norm + a_row * tokens.whole
    if run.model.mtp_num_layers:
        block = layer_activations(run, run.model.num_layers - 1, ()).kept + kept + working_set
        kept += run.model.mtp_num_layers * block
    return LayerActivations(kept, working_set)


def _chunk_bytes(run: RunConfig) -> float:
    """What the backward of one chunk of the loss holds on top; the forward holds less.

    The logits in the compute type and the softmax, fp32 (one array, where the compute type is fp32); a piece of the
    weight's gradient, where it has another type than its sum; the gradient of the norm's output. Under sequence
    parallelism the gathered rows of this chunk and of the next, and the gradients of two.
    """
    tokens, size, hidden = tokens_of(run), BYTES[run.training.precision], run.model.hidden_size
    rows, narrow = math.ceil(tokens.whole / loss_chunks(run)), size != _FP32
    logits = (_FP32 + size * narrow) * _columns(run) * rows
    piece = size * narrow * _columns(run) * hidden / WEIGHT_PIECES
    gathered = 4 * size * hidden * rows * (tokens.split < tokens.whole)
    return logits + piece + gathered + size * hidden * tokens.split


def loss_chunks(run: RunConfig) -> int:
    """Chunks that the loss of a micro-batch is computed in; 0 where the logits are whole."""
    rows = loss_chunk_rows(run)
    return math.ceil(tokens_of(run).whole / rows) if rows else 0


def _columns(run: RunConfig) -> float:
    """Of the logits, on one rank."""
    return run.model.vocab_size / run.parallel.tensor_model_parallel_size
