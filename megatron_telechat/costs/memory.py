"""Bytes that each pipeline rank holds: parameters, gradients, optimizer state, activations in flight.

Counted is what the training keeps on purpose. Not counted: the device's context and communication
buffers, the allocator's fragmentation, work space inside a kernel. ``docs/costs.md`` has the equations.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_telechat.config.layout import PipelineLayout, pipeline_layout
from megatron_telechat.config.recompute import recompute_plan
from megatron_telechat.config.schema import ModelConfig, RunConfig
from megatron_telechat.costs.parameters import LocalCount, expert_ffn_hidden_size, local_count, stage_table
from megatron_telechat.costs.schedule import Op, peak_in_flight

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
GRADIENT_BYTES = 4
"""Gradients are accumulated and reduced in fp32, whatever the compute type."""
MOMENT_BYTES = 8
"""AdamW's two moments, fp32."""
MASTER_BYTES = 4
"""The fp32 master weight; where the compute type is fp32 the parameter itself serves."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes one rank of a pipeline stage holds at its worst moment."""

    pipeline_rank: int
    parameters: LocalCount
    """Parameters it holds, counted."""
    parameters_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    activations_bytes: float
    """Largest sum, over the op order, of the activations kept and the transient part below."""
    transient_bytes: float
    """Of activations_bytes: the largest working set of a recompute, or the logits of the output layer."""
    in_flight: tuple[int, ...]
    """Micro-batches in flight in each chunk at that moment."""

    @property
    def total_bytes(self) -> float:
        return self.parameters_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes


@dataclass(frozen=True)
class LayerActivations:
    """Bytes of one layer for one micro-batch on one rank: kept until its backward, and repeated during it."""

    kept: float
    working_set: float


@dataclass(frozen=True)
class _Tokens:
    """Tokens of one micro-batch on one rank, by region of the layer.

    `whole`: inside a tensor-parallel region, where the sequence is gathered but each tensor is cut
    `tensor` ways; `split`: outside, where sequence parallelism cuts the sequence instead.
    """

    whole: float
    split: float
    tensor: int
    expert_tensor: int


def _tokens(run: RunConfig) -> _Tokens:
    parallel = run.parallel
    tensor = parallel.tensor_model_parallel_size
    whole = run.training.seq_length * run.training.micro_batch_size / parallel.context_parallel_size
    sequence_parallel = tensor > 1 if parallel.sequence_parallel is None else parallel.sequence_parallel
    return _Tokens(whole, whole / tensor if sequence_parallel else whole, tensor, parallel.expert_sizes[1])


def layer_activations(run: RunConfig, layer: int, modes: tuple[str, ...]) -> LayerActivations:
    """Activations of the zero-based `layer` under its recompute modes.

    Elements a token, after Korthikanti et al. (arXiv 2205.05198, section 4) for a flash attention,
    which keeps no score matrix, and a fused SwiGLU:
        attention  h (norm input) + h (norm output) + q + 2k (after rotary) + q (output) + fp32 log-sum-exp a head
        SwiGLU     h + h + 2f (gate, up) + f (product)
        MoE        h + h + topk (h + 2f_e + f_e + h) + 8 bytes an expert (router logits and scores, fp32)
    Full recompute keeps the layer's input alone. The other modes drop what the repeated module makes:
    ``core_attn`` the log-sum-exp (its output is the next linear's input and stays), ``layernorm`` both norm
    outputs, ``mlp`` and ``moe`` what lies between the norm output and the block's end. Routing is taken as balanced.
    """
    model, tokens = run.model, _tokens(run)
    size = BYTES[run.training.precision]
    hidden = model.hidden_size
    query, key = model.num_attention_heads * model.head_dim, model.query_groups * model.head_dim

    layer_input = size * hidden * tokens.split
    norm_outputs = 2 * size * hidden * tokens.split
    residual = size * hidden * tokens.split  # the second norm's input
    attention = size * (2 * query + 2 * key) * tokens.whole / tokens.tensor
    log_sum_exp = 4 * model.num_attention_heads * tokens.whole / tokens.tensor
    block = _block_activations(model, layer, size, tokens)
    everything = layer_input + norm_outputs + residual + attention + log_sum_exp + block

    if "full" in modes:
        return LayerActivations(layer_input, everything - layer_input)
    dropped = 0.0
    if "core_attn" in modes:
        dropped += log_sum_exp
    if "layernorm" in modes:
        dropped += norm_outputs
    if "mlp" in modes or "moe" in modes:
        dropped += block
    return LayerActivations(everything - dropped, dropped)


def _block_activations(model: ModelConfig, layer: int, size: int, tokens: _Tokens) -> float:
    """Bytes kept inside the MLP or MoE block, the norm output before it not counted."""
    hidden = model.hidden_size
    if not model.layer_is_moe(layer):
        return size * 3 * model.ffn_hidden_size * tokens.whole / tokens.tensor
    # A rank's experts get as many tokens as it sends when routing is balanced, gathered over ETP.
    routed = tokens.split * model.moe_router_topk * tokens.expert_tensor
    expert = size * routed * (2 * hidden + 3 * expert_ffn_hidden_size(model) / tokens.expert_tensor)
    shared = size * 3 * (model.moe_shared_expert_intermediate_size or 0) * tokens.whole / tokens.tensor
    return expert + shared + 8 * (model.num_experts or 0) * tokens.split


def output_layer_bytes(run: RunConfig) -> float:
    """Logits and loss of one micro-batch: logits in the compute type and their fp32 copy, which the
    vocabulary-parallel cross entropy turns into the softmax in place; with fp32, logits and gradient.
    The norm's input and output come on top.
    """
    tokens, size = _tokens(run), BYTES[run.training.precision]
    logits = (4 + size) * run.model.vocab_size * tokens.whole / tokens.tensor
    return logits + 2 * size * run.model.hidden_size * tokens.split


def _resident_bytes(run: RunConfig, count: LocalCount) -> tuple[float, float, float]:
    """Bytes of parameters, gradients and optimizer state of one rank."""
    parallel = run.parallel
    size = BYTES[run.training.precision]
    state = MOMENT_BYTES + (MASTER_BYTES if run.training.precision != "fp32" else 0)
    dense_shards = expert_shards = 1
    if parallel.use_distributed_optimizer:
        expert, expert_tensor = parallel.expert_sizes
        per_stage = max(parallel.world_size // parallel.pipeline_model_parallel_size, 1)
        dense_shards = max(per_stage // parallel.tensor_model_parallel_size, 1)
        expert_shards = max(per_stage // (expert * expert_tensor), 1)
    optimizer = state * (count.dense / dense_shards + count.expert / expert_shards)
    return size * count.total, GRADIENT_BYTES * count.total, optimizer


def stage_parameters(run: RunConfig) -> list[LocalCount]:
    """Parameters that a rank of each pipeline stage holds."""
    layout = pipeline_layout(run)
    return [_stage_count(run, layout, rank) for rank in range(layout.pipeline_size)]


def _stage_count(run: RunConfig, layout: PipelineLayout, rank: int) -> LocalCount:
    count = LocalCount(0, 0)
    for chunk in range(layout.num_chunks):
        table = stage_table(
            run.model,
            layout.layers_of(rank, chunk),
            has_embedding=layout.has_embedding(rank, chunk),
            has_loss=layout.has_loss(rank, chunk),
        )
        count += local_count(table, run.parallel)
    return count


def stage_memory(run: RunConfig) -> list[StageMemory]:
    """Memory of one rank of each pipeline stage, at the worst moment of a step.

    Raises:
        ConfigError: the layout or the recompute plan of the run does not fit the model.
    """
    layout, plan = pipeline_layout(run), recompute_plan(run)
    cache: dict[tuple[bool, tuple[str, ...]], LayerActivations] = {}
    layers = []
    for layer, modes in enumerate(plan):
        kind = (run.model.layer_is_moe(layer), modes)
        if kind not in cache:
            cache[kind] = layer_activations(run, layer, modes)
        layers.append(cache[kind])
    return [_stage(run, layout, rank, layers) for rank in range(layout.pipeline_size)]


def _stage(run: RunConfig, layout: PipelineLayout, rank: int, layers: list[LayerActivations]) -> StageMemory:
    chunks = [layout.layers_of(rank, chunk) for chunk in range(layout.num_chunks)]
    kept = [sum(layers[layer].kept for layer in chunk) for chunk in chunks]
    repeated = [max((layers[layer].working_set for layer in chunk), default=0.0) for chunk in chunks]
    output = [
        output_layer_bytes(run) if layout.has_loss(rank, chunk) else 0.0 for chunk in range(layout.num_chunks)
    ]

    def transient(op: Op) -> float:
        # A backward begins with the output layer's and goes on to the layers', each recomputed alone.
        # The forward and the backward of the last virtual stage follow each other: one set of logits.
        return output[op.chunk] if op.forward else max(output[op.chunk], repeated[op.chunk])

    num_microbatches = max(run.num_microbatches, 1)
    activations, in_flight = peak_in_flight(
        rank, layout.pipeline_size, layout.num_chunks, num_microbatches, kept, transient
    )
    count = _stage_count(run, layout, rank)
    parameters, gradients, optimizer = _resident_bytes(run, count)
    held = sum(number * size for number, size in zip(in_flight, kept))
    return StageMemory(
        pipeline_rank=rank,
        parameters=count,
        parameters_bytes=parameters,
        gradients_bytes=gradients,
        optimizer_bytes=optimizer,
        activations_bytes=activations,
        transient_bytes=activations - held,
        in_flight=in_flight,
    )


def checkpoint_bytes(run: RunConfig, total_parameters: int) -> float:
    """Size of one checkpoint: weights in the compute type; with the optimizer, master weights and both moments in fp32."""
    size = BYTES[run.training.precision]
    if run.checkpoint.no_save_optim:
        return size * total_parameters
    return (size + MASTER_BYTES + MOMENT_BYTES) * total_parameters
