"""What a run is: frozen dataclasses, one a section of the YAML file.

The literal under a field is its documentation: ``--help`` and ``--print-config``
print it. Field names are Megatron-LM's flag names wherever Megatron has the flag.
Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from megatron_telechat.config.data_formats import data_format
from megatron_telechat.config.layer_pattern import moe_layers
from megatron_telechat.config.lr_schedules import SCHEDULES, SHAPES
from megatron_telechat.device_kinds import DeviceChoice
from megatron_telechat.locations import Location, location


@dataclass(frozen=True)
class OneOf:
    """The values a text field takes, where they are the keys of a registry: ``Annotated[str, OneOf(REGISTRY)]``."""

    registry: Mapping[str, object]


Precision = Literal["bf16", "fp16", "fp32"]

PLANNED_ONLY = (
    *("activation", "untie_embeddings_and_output_weights", "position_embedding_type", "normalization"),
    *("add_qkv_bias", "add_bias_linear", "moe_shared_expert_gate", "moe_layer_pattern"),
    *("multi_latent_attention", "mtp_num_layers", "window_size"),
)
"""Fields of a model of which the training builds the default alone; the costs and the planner know the others too."""


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. Presets fill this section."""

    name: str = "custom"
    """Name of the model, for logs and checkpoints."""
    architecture: Literal["telechat2", "mixtral", "qwen3_moe"] = "telechat2"
    """Model family: telechat2, mixtral or qwen3_moe."""
    num_layers: int = 0
    """Number of decoder layers."""
    hidden_size: int = 0
    """Width of the residual stream."""
    ffn_hidden_size: int = 0
    """Width of the MLP of a dense layer."""
    activation: Literal["swiglu", "gelu", "squared_relu", "quick_geglu"] = "swiglu"
    """Activation of the MLPs: swiglu, gelu, squared_relu or quick_geglu (--swiglu, --squared-relu, --quick-geglu).
    The training supports swiglu only."""
    num_attention_heads: int = 0
    """Number of query heads."""
    num_query_groups: int | None = None
    """Number of key/value heads (grouped-query attention). Unset: one for each query head."""
    kv_channels: int | None = None
    """Width of a head. Unset: hidden_size / num_attention_heads."""
    vocab_size: int = 131072
    """Rows of the embedding and of the output layer. Never padded: tensor_model_parallel_size must divide it."""
    untie_embeddings_and_output_weights: bool = True
    """The output layer has its own matrix; off: it shares the matrix of the embedding. The training supports "on"
    only."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """RMSNorm or LayerNorm (which has a bias). The training supports RMSNorm only."""
    norm_epsilon: float = 1e-5
    """Epsilon of the norms."""
    qk_layernorm: bool = False
    """A norm on the queries and one on the keys, over the width of a head and before the rotary embedding."""
    attention_output_bias: bool = True
    """Bias on the attention output projection (TeleChat2: yes; Mixtral: no)."""
    mlp_output_bias: bool = True
    """Bias on the down projection, of the experts too (TeleChat2: yes; Mixtral: no)."""
    add_qkv_bias: bool = False
    """Bias on the query, key and value projection. Not supported by the training."""
    add_bias_linear: bool = False
    """Bias on every linear layer, including the router (Megatron-LM without --disable-bias-linear). Not supported
    by the training."""
    position_embedding_type: Literal["rope", "learned_absolute", "none", "alibi", "mrope", "yarn"] = "rope"
    """Positions: rope, learned_absolute (a table of max_position_embeddings rows), none, alibi, mrope or yarn. The
    training supports rope only."""
    max_position_embeddings: int | None = None
    """Rows of the learned position table; no effect with rope. Unset: seq_length."""
    rotary_base: float = 10000.0
    """Theta of the rotary embedding, before NTK-aware scaling."""
    rotary_training_seqlen: int | None = None
    """training_seqlen of the checkpoint: attention scaling applies to longer sequences. Unset: no NTK scaling and
    no attention scaling."""
    rotary_base_seqlen: int | None = None
    """base_seqlen of the checkpoint: the base length of NTK-aware scaling. Unset: rotary_training_seqlen."""
    rotary_table_dtype: Literal["fp32", "fp16"] = "fp32"
    """Precision of the cos/sin tables: fp32, or fp16 as in the published modelling file."""
    attention_dropout: float = 0.0
    """Dropout of the attention probabilities."""
    hidden_dropout: float = 0.0
    """Dropout of the residual branches."""
    init_method_std: float = 0.0048
    """Standard deviation of the normal initialisation of the linear layers and the embeddings."""
    router_init_std: float = 0.01
    """Standard deviation of the router's initialisation."""
    num_experts: int | None = None
    """Number of experts of a MoE layer. Unset: a dense model."""
    moe_ffn_hidden_size: int | None = None
    """Width of the MLP of one expert."""
    moe_router_topk: int = 2
    """Number of experts per token (top-k)."""
    moe_layer_freq: int = 1
    """Every moe_layer_freq-th layer is a MoE layer, starting with the first (1: all layers)."""
    moe_layer_pattern: str | None = None
    """Which layers are MoE layers, as a Megatron list such as ([0]*3+[1]*27): 1 MoE, 0 dense. Replaces
    moe_layer_freq."""
    moe_aux_loss_coeff: float = 0.0
    """Coefficient of the load-balancing auxiliary loss."""
    moe_aux_loss_formula: Literal["megatron", "hf"] = "megatron"
    """Auxiliary loss that moe_aux_loss_coeff weighs: megatron (one of each layer, added up; each is 1 with even
    routing) or hf (transformers' load_balancing_loss_func: one over the tokens of all layers, top-k with even
    routing)."""
    moe_z_loss_coeff: float = 0.0
    """Coefficient of the router z-loss."""
    moe_shared_expert_intermediate_size: int | None = None
    """Width of the shared expert. Unset: no shared expert."""
    moe_shared_expert_gate: bool = False
    """The output of the shared expert is weighted by a gate. Not supported by the training."""
    multi_latent_attention: bool = False
    """Multi-latent attention (MLA): queries, keys and values come from narrow latent vectors. Not supported by the
    training."""
    q_lora_rank: int | None = None
    """Width of the latent vector of the queries (MLA). Unset: queries come from the hidden state."""
    kv_lora_rank: int = 32
    """Width of the latent vector of keys and values (MLA)."""
    qk_head_dim: int = 128
    """Width of a query and key head without its rotary part (MLA)."""
    qk_pos_emb_head_dim: int = 64
    """Width of the rotary part of a query and key head (MLA)."""
    v_head_dim: int = 128
    """Width of a value head (MLA)."""
    mtp_num_layers: int | None = None
    """Number of multi-token-prediction blocks behind the last layer. Not supported by the training."""
    window_size: str | None = None
    """Sliding-window attention: earlier tokens that a token attends to beside itself, such as 127,0. Unset: all. Not
    supported by the training."""
    window_attn_skip_freq: str | None = None
    """Which layers attend to all tokens in spite of window_size: N for every N-th, or a list with 0 for these layers.
    Unset: none."""

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        """Number of key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def rotates(self) -> bool:
        """Whether queries and keys are rotated by their positions."""
        return self.position_embedding_type in ("rope", "mrope", "yarn")

    @property
    def query_width(self) -> int:
        """Width of the queries of all heads."""
        head = self.qk_head_dim + self.qk_pos_emb_head_dim if self.multi_latent_attention else self.head_dim
        return self.num_attention_heads * head

    @property
    def key_width(self) -> int:
        """Width of the keys of all groups; with multi-latent attention each head has its own."""
        return self.query_width if self.multi_latent_attention else self.query_groups * self.head_dim

    @property
    def value_width(self) -> int:
        """Width of the values of all groups."""
        return self.num_attention_heads * self.v_head_dim if self.multi_latent_attention else self.key_width

    @property
    def output_width(self) -> int:
        """Width of what the output projection of the attention reads."""
        return self.num_attention_heads * (self.v_head_dim if self.multi_latent_attention else self.head_dim)

    @property
    def window(self) -> int | None:
        """Earlier tokens that a token attends to in a layer with a window; None: no layer has one."""
        found = re.fullmatch(r"[(]?\s*(\d+)\s*(?:,\s*-?\d+)?\s*[)]?", self.window_size or "")
        return int(found[1]) if found else None

    def layer_is_windowed(self, layer: int) -> bool:
        """Whether the layer with this zero-based number attends to a window of tokens only."""
        if self.window is None or self.window_attn_skip_freq is None:
            return self.window is not None
        if self.window_attn_skip_freq.isdigit():
            return (layer + 1) % int(self.window_attn_skip_freq) != 0
        pattern = moe_layers(self.window_attn_skip_freq)
        return layer < len(pattern) and bool(pattern[layer])

    @property
    def is_moe(self) -> bool:
        """Whether the model has experts."""
        return self.num_experts is not None

    @property
    def is_gated(self) -> bool:
        """Whether the MLP multiplies two products of its input (three matrices in all) or takes one (two matrices)."""
        return self.activation in ("swiglu", "quick_geglu")

    @property
    def not_built(self) -> dict[str, object]:
        """Field → value, where the costs and the planner know the model and the training does not build it."""
        return {name: getattr(self, name) for name in PLANNED_ONLY if getattr(self, name) != getattr(type(self), name)}

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the query, key and value projection has a bias."""
        return self.add_qkv_bias or self.add_bias_linear

    @property
    def has_attention_output_bias(self) -> bool:
        """Whether the attention output projection has a bias."""
        return self.attention_output_bias or self.add_bias_linear

    @property
    def has_mlp_output_bias(self) -> bool:
        """Whether the down projection has a bias, in experts too."""
        return self.mlp_output_bias or self.add_bias_linear

    def layer_is_moe(self, layer: int) -> bool:
        """Whether the layer with this zero-based number is a MoE layer."""
        if self.moe_layer_pattern is not None:
            pattern = moe_layers(self.moe_layer_pattern)
            return self.is_moe and layer < len(pattern) and bool(pattern[layer])
        return self.is_moe and layer % self.moe_layer_freq == 0


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the batch are distributed over the ranks."""

    world_size: int = 1
    """Number of ranks. Filled from torchrun's WORLD_SIZE; --world-size sets it for --dry-run."""
    ranks_per_node: int | None = None
    """Ranks per node. Unset: LOCAL_WORLD_SIZE of torchrun, else the largest number up to 8 that divides world_size."""
    tensor_model_parallel_size: int = 1
    """Tensor-parallel size: ranks that share each layer of the attention and the dense MLP."""
    pipeline_model_parallel_size: int = 1
    """Pipeline-parallel size: pipeline ranks that the layers are split over."""
    num_virtual_stages_per_pipeline_rank: int = 1
    """Virtual stages on each pipeline rank; more than 1 selects the interleaved schedule."""
    microbatch_group_size_per_virtual_pipeline_stage: int | None = None
    """Micro-batches that a pipeline rank takes through one virtual stage before it goes on to the next (interleaved
    schedule). Unset: the pipeline-parallel size."""
    pipeline_model_parallel_layout: str | None = None
    """Megatron layout string, such as Et*3|t*4|t*4|t*3L. Unset: the layers are split evenly."""
    plan: str | None = None
    """Plan file written by tools/plan_pipeline.py --output. It sets parallel sizes, layout and recompute as flags
    would."""
    context_parallel_size: int = 1
    """Context-parallel size: ranks that share one sequence."""
    cp_comm_type: Literal["auto", "p2p", "a2a", "a2a+p2p"] = "auto"
    """How context-parallel ranks attend to each other's tokens: p2p (keys and values go to the ranks that need them),
    a2a (heads are exchanged for tokens, DeepSpeed-Ulysses), a2a+p2p (a2a in groups of neighbours, p2p across) or auto
    (the one with the least traffic for this model)."""
    cp_implementation: Literal["own", "transformer_engine"] = "own"
    """Whose attention over context-parallel ranks: own, or TransformerEngine's ring (p2p, one document a sample,
    CUDA)."""
    hierarchical_context_parallel_sizes: tuple[int, ...] = ()
    """The context-parallel size as two factors, ranks of a2a and ranks of p2p. Unset: they follow from
    cp_comm_type."""
    cp_pieces: int | Literal["auto"] = "auto"
    """Pieces of each p2p transfer of keys and values: attention to one piece overlaps with the next transfer; auto: the
    fastest number, measured at the start and kept in the checkpoint."""
    cp_keep_received: bool | None = None
    """Keep the keys and values of other ranks for the backward pass: less traffic, more memory. Unset: where that is
    faster and the memory is there, measured at the start and kept in the checkpoint."""
    cp_layout: Literal["auto", "zigzag", "contiguous", "dealt", "documents"] = "auto"
    """Which tokens a context-parallel rank holds where documents are kept apart: zigzag, contiguous, dealt (equal
    work), documents (whole ones on one rank) or auto (the fastest for each sample). Samples of one document are always
    zigzag."""
    expert_model_parallel_size: int | None = None
    """Expert-parallel size: ranks that the experts are distributed over. Unset: the tensor-parallel size with
    fold_tensor_into_experts, else 1."""
    expert_tensor_parallel_size: int | None = None
    """Expert-tensor-parallel size: ranks that share one expert. Unset: 1 with fold_tensor_into_experts, else the
    tensor-parallel size."""
    fold_tensor_into_experts: bool = False
    """Use the tensor-parallel ranks as expert-parallel ranks inside MoE layers (ETP 1, EP a multiple of TP)."""
    moe_input_chunks: int | Literal["auto"] = 1
    """Number of chunks that the input of a MoE layer is split into. The exchange of one chunk overlaps with the
    experts of another. 1: no split; auto: the fastest number, measured at the start on the real layer and kept in
    the checkpoint."""
    sequence_parallel: bool | None = None
    """Split the activations outside the tensor-parallel regions along the sequence. Unset: on when TP > 1."""
    use_distributed_optimizer: bool = False
    """Shard the optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Overlap the gradient reduction with the backward pass."""
    overlap_param_gather: bool = False
    """Overlap the gather of updated parameters with the next forward pass (needs the distributed optimizer)."""
    optimizer_cpu_offload: bool = False
    """Keep master weights and moments of the optimizer in the memory of the host. In a step they pass through the
    device, which updates them; the numbers of the run stay the same, bit for bit."""
    optimizer_offload_fraction: float = 1.0
    """Share of these bytes that is kept on the host (with optimizer_cpu_offload)."""
    overlap_cpu_optimizer_d2h_h2d: bool = False
    """Copy the state in both directions beside the update (with optimizer_cpu_offload)."""
    host_memory_gib: float | None = None
    """Memory of a node's host, in GiB: a run whose optimizer state does not fit is refused. Unset: the hosts are asked
    when the run starts."""
    overlap_p2p_communication: bool | None = None
    """Overlap pipeline sends with compute. Unset: on for the interleaved schedule."""
    distributed_timeout_minutes: float = 10.0
    """Time limit of a collective."""
    hang_timeout_minutes: float | None = None
    """When no rank of a node has moved for so long, the job ends with a message that names the rank, its host and its
    phase; 0: never. Unset: 0.8 of distributed_timeout_minutes."""

    @property
    def data_parallel_size(self) -> int:
        """Ranks that hold the same part of the dense model: world size / (TP x PP x CP)."""
        return self.world_size // (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )

    @property
    def ranks_per_stage(self) -> int:
        """Ranks of one pipeline stage."""
        return max(self.world_size // self.pipeline_model_parallel_size, 1)

    @property
    def gradient_ranks(self) -> tuple[int, int]:
        """Ranks that sum the gradients of a dense parameter, and of an expert's; context-parallel ranks among them."""
        expert, expert_tensor = self.expert_sizes
        stage = self.ranks_per_stage
        return max(stage // self.tensor_model_parallel_size, 1), max(stage // (expert * expert_tensor), 1)

    @property
    def sequence_parallel_size(self) -> int:
        """Ranks that the sequence is split over between the tensor-parallel regions; 1: sequence parallelism is off.

        `sequence_parallel` is what a person said; everybody else reads this.
        """
        return 1 if self.sequence_parallel is False else self.tensor_model_parallel_size

    @property
    def context_sizes(self) -> tuple[int, int]:
        """The context-parallel size as its factors: ranks that exchange heads for tokens (a2a), and ranks that send
        keys and values (p2p). Ranks of one a2a group are neighbours."""
        size = self.context_parallel_size
        if self.hierarchical_context_parallel_sizes:
            heads, rows = self.hierarchical_context_parallel_sizes
            return heads, rows
        return (size, 1) if self.cp_comm_type == "a2a" else (1, size)

    @property
    def overlaps_p2p(self) -> bool:
        """Whether pipeline sends run beside the compute; only the interleaved schedule can."""
        return self.num_virtual_stages_per_pipeline_rank > 1 and self.overlap_p2p_communication is not False

    @property
    def microbatch_group(self) -> int:
        """Micro-batches of a group in the interleaved schedule, with the default where it is unset."""
        return self.microbatch_group_size_per_virtual_pipeline_stage or self.pipeline_model_parallel_size

    @property
    def keeps_received(self) -> bool:
        """Whether keys and values of other ranks are kept for the backward by these settings; left open, it counts as
        no."""
        return bool(self.cp_keep_received)

    @property
    def node_size(self) -> int:
        """Ranks of one node, with the default where it is unset."""
        if self.ranks_per_node is not None:
            return self.ranks_per_node
        return max((size for size in range(1, 9) if self.world_size % size == 0), default=1)

    @property
    def expert_sizes(self) -> tuple[int, int]:
        """(expert, expert-tensor) parallel size, with their defaults where they are unset."""
        tensor, folded = self.tensor_model_parallel_size, self.fold_tensor_into_experts
        return (
            self.expert_model_parallel_size or (tensor if folded else 1),
            self.expert_tensor_parallel_size or (1 if folded else tensor),
        )


@dataclass(frozen=True)
class TrainingConfig:
    """Batch, length, precision, recompute."""

    device: DeviceChoice = "auto"
    """Kind of device that the ranks run on; auto: the first of the other kinds that is available."""
    precision: Precision = "bf16"
    """Compute type: bf16, fp16 or fp32 (short: --bf16, --fp16, --fp32). Master weights, gradients, optimizer state are
    fp32."""
    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """FP8 in the products of the attention projections and of the dense MLPs, by Transformer Engine: e4m3, or hybrid
    (e5m2 for gradients). Everything else stays bf16, the experts too. Unset: no FP8."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "delayed"
    """Scales of FP8: delayed (of earlier micro-batches), tensorwise (one a tensor, of its own values), blockwise (one a
    block; Hopper and newer) or mxfp8 (one for 32 values; Blackwell)."""
    fp8_margin: int = 0
    """Bits of room that delayed scaling leaves above the largest value it has seen."""
    fp8_amax_history_len: int = 1
    """Micro-batches whose largest values delayed scaling remembers."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """Which of the remembered values delayed scaling takes: most_recent or max."""
    seq_length: int = 8192
    """Tokens of a training sample."""
    micro_batch_size: int = 1
    """Samples per micro-batch on one data-parallel rank."""
    global_batch_size: int = 1
    """Samples per optimizer step, over all data-parallel ranks."""
    train_iters: int = 0
    """Optimizer steps of the whole run, including those before a resume."""
    train_samples: int | None = None
    """Samples of the whole run, in place of train_iters: train_iters is this divided by global_batch_size, rounded
    down. The learning rate then follows samples (lr_decay_samples, lr_warmup_samples)."""
    train_epochs: float | None = None
    """Passes over the training data, such as 1 or 2.5; replaces train_iters, which follows once the data is indexed.
    The last batch of the run is filled up with samples of the next pass."""
    exit_interval: int | None = None
    """Save a checkpoint and exit when the step count reaches a multiple of this."""
    exit_duration_in_mins: float | None = None
    """Save a checkpoint and exit (code 75: start it again to go on) after the first step that ends so many minutes
    after the start of this process. Unset: no limit."""
    seed: int = 1234
    """Seed of the initial weights, of dropout and of the sample order. The initial weights do not depend on the
    layout."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Activation recompute: full (whole layers) or selective (recompute_modules). Unset: none."""
    recompute_method: Literal["block", "uniform"] = "block"
    """Layers of full recompute: block (the first recompute_num_layers of each virtual stage) or uniform (all)."""
    recompute_num_layers: int | None = None
    """Layers per virtual stage that are recomputed with recompute_method block. Unset: all."""
    recompute_modules: tuple[Literal["core_attn", "mlp", "moe", "layernorm"], ...] = ("core_attn",)
    """Modules of selective recompute: core_attn, mlp, moe, layernorm."""
    recompute_layout: str | None = None
    """Recompute per layer: one entry per virtual stage, separated by |. An entry lists the layers in order, such as
    full*2,none*3 or core_attn+mlp*4. Replaces the recompute flags above."""
    loss_chunk_rows: int | Literal["auto"] = "auto"
    """Rows of logits that the output layer holds at once: the loss is computed in chunks of so many rows, whose logits
    are made again in the backward. 0: all rows, and nothing is made again; auto: in chunks where the fp32 logits of a
    micro-batch would take more than 4 GiB of a rank."""
    freeze: tuple[str, ...] = ()
    """Patterns over the keys of docs/checkpoints.md, such as embedding.* decoder.layers.0-11.*: tensors that keep their
    values. They have no gradient and no optimizer state."""
    freeze_except: tuple[str, ...] = ()
    """Patterns of tensors that are trained although freeze names them; without freeze all others are frozen."""
    iterations_to_skip: tuple[str, ...] = ()
    """Steps, such as 1000-1010,2000, whose data is read and not trained on. They count as steps, and their samples as
    consumed; the learning rate does not move."""
    deterministic: bool = True
    """Use deterministic algorithms only; a resume is then bitwise equal to an uninterrupted run."""
    empty_unused_memory_level: int = 0
    """Release cached device memory: 0 never, 1 after each step."""

    @property
    def precision_text(self) -> str:
        """The types of the compute for people: ``bf16``, or ``bf16, FP8 hybrid (delayed)``."""
        return self.precision + (f", FP8 {self.fp8_format} ({self.fp8_recipe})" if self.fp8_format else "")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, clipping and the learning-rate schedule."""

    lr: float = 3e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Final learning rate of the schedule."""
    lr_decay_style: Annotated[str, OneOf(SCHEDULES)] = "cosine"
    """Learning-rate schedule after the warm-up. WSD keeps lr until the last lr_wsd_decay_iters steps."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up."""
    lr_warmup_fraction: float | None = None
    """Warm-up as a fraction of lr_decay_iters; replaces lr_warmup_iters."""
    lr_warmup_init: float = 0.0
    """Learning rate at the start of the warm-up."""
    lr_decay_iters: int | None = None
    """Steps after which min_lr is reached. Unset: train_iters."""
    lr_wsd_decay_iters: int | None = None
    """Steps of the final decay of the WSD schedule."""
    lr_warmup_tokens: int | None = None
    """Tokens of linear warm-up; replaces lr_warmup_iters. The learning rate then follows the tokens consumed, so that
    a change of batch or length does not move it."""
    lr_decay_tokens: int | None = None
    """Tokens after which min_lr is reached; replaces lr_decay_iters. Unset, where the learning rate follows tokens: the
    end of the run, or of its last stage before another schedule begins."""
    lr_wsd_decay_tokens: int | None = None
    """Tokens of the final decay of the WSD schedule; replaces lr_wsd_decay_iters."""
    lr_warmup_samples: int | None = None
    """Samples of linear warm-up: lr_warmup_tokens divided by seq_length."""
    lr_decay_samples: int | None = None
    """Samples after which min_lr is reached: lr_decay_tokens divided by seq_length. Unset, with train_samples: all."""
    lr_wsd_decay_samples: int | None = None
    """Samples of the final decay of the WSD schedule: lr_wsd_decay_tokens divided by seq_length."""
    lr_wsd_decay_style: Annotated[str, OneOf(SHAPES)] = "exponential"
    """Shape of the final decay of WSD."""
    weight_decay: float = 0.1
    """Decoupled weight decay of AdamW; biases and norms have none."""
    adam_beta1: float = 0.9
    """First beta of AdamW."""
    adam_beta2: float = 0.95
    """Second beta of AdamW."""
    adam_eps: float = 1e-8
    """Epsilon of AdamW."""
    exp_avg_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which AdamW's first moment is kept between steps. The step itself is in fp32."""
    exp_avg_sq_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which AdamW's second moment is kept between steps. bf16 needs adam_beta2 of at most 0.996."""
    clip_grad: float = 1.0
    """Maximum global gradient norm; 0 turns clipping off."""
    initial_loss_scale: float = 65536.0
    """Initial dynamic loss scale (fp16)."""
    min_loss_scale: float = 1.0
    """Minimum dynamic loss scale (fp16)."""
    loss_scale_window: int = 1000
    """Steps without overflow after which the loss scale doubles (fp16)."""
    hysteresis: int = 2
    """Overflows tolerated before the loss scale halves (fp16)."""
    max_skipped_steps: int = 50
    """Skipped steps in a row (fp16 overflow, or no learned token) after which the run ends with exit code 5; 0:
    never."""


@dataclass(frozen=True)
class DataConfig:
    """Training data."""

    data_path: tuple[str, ...] = ()
    """Prefixes of indexed datasets (with sft: jsonl files), or alternating weights and prefixes: 0.7 en_document
    0.3 zh_document."""
    data_json: str | None = None
    """A data.json in the TeleChat format ({prefix: weight}); replaces data_path."""
    split: str = "969,30,1"
    """Shares of train, validation and test."""
    train_data_path: tuple[str, ...] = ()
    """Separate training data (with valid_data_path); replaces data_path and split."""
    valid_data_path: tuple[str, ...] = ()
    """Separate validation data."""
    data_cache_path: str | None = None
    """Folder of the sample index and of encoded dialogs. Unset: cache/ in the run folder."""
    data_order: Literal["epochs", "megatron"] = "epochs"
    """Sample order of indexed data: epochs (each epoch of a source is shuffled on its own; independent of the
    length of the run) or megatron (Megatron's order for the initial length of the run, then epochs). A run keeps
    its order."""
    mock_data: bool = False
    """Train on a fixed pseudo-random token stream, for benchmarks and smoke tests."""
    tokenizer_type: (
        Literal["HuggingFaceTokenizer", "SentencePieceTokenizer", "TikTokenizer", "NullTokenizer"] | None
    ) = None
    """HuggingFaceTokenizer, SentencePieceTokenizer, TikTokenizer or NullTokenizer. Unset: detected from
    tokenizer_model."""
    tokenizer_model: str | None = None
    """Tokenizer file or folder; pretraining reads only its vocabulary size and end-of-document token."""
    eod_mask_loss: bool = False
    """No loss where the input is an end-of-document token."""
    reset_position_ids: bool = False
    """Restart the positions after an end-of-document token; with sft, at every dialog of a row."""
    reset_attention_mask: bool = False
    """A document (with sft: a dialog) attends to itself only, not to earlier documents of the sample. Its first
    token is not learned, because it has no context. Always on with dpo."""
    sft: bool = False
    """Fine-tuning: the data paths are jsonl files of dialogs, which are packed and trained with a loss mask."""
    sft_template: Literal["telechat2", "telechat2-115b", "telechat"] = "telechat2"
    """Chat template: telechat2 (with system turn and tools), telechat2-115b or telechat (turns only, with or
    without <_start>)."""
    sft_loss_mask: Literal["telechat", "answer"] = "telechat"
    """Tokens that are learned: telechat (answers, <_end>, <_bot>, <_user>) or answer (answers and <_end> only)."""
    sft_system: str | None = None
    """System text for dialogs that have none. Unset: they get no system turn."""
    sft_packing: bool = True
    """Pack several dialogs into one sample; off: one dialog per sample, padded."""
    sft_overlong: Literal["truncate", "drop"] = "truncate"
    """Dialogs longer than seq_length: truncate or drop."""
    dpo: bool = False
    """Direct preference optimization: the data paths are jsonl files of pairs, a chosen and a rejected answer each.
    In place of sft; the template, the system text and the packing are those of sft."""
    dpo_overlong: Literal["drop", "refuse"] = "drop"
    """Pairs longer than seq_length: leave them out (drop) or end the run (refuse). A pair is never truncated."""
    num_workers: int = 1
    """Background threads that prepare batches on each rank."""
    data_index_timeout_minutes: float = 60.0
    """Maximum time that the other ranks wait for rank 0 to build the sample index."""


@dataclass(frozen=True)
class PreferenceConfig:
    """Direct preference optimization (--dpo)."""

    dpo_beta: float = 0.1
    """Strength of the pull towards the reference: what a difference of log-probabilities is multiplied by."""
    dpo_loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
    """Loss of a pair: sigmoid (DPO) or ipo (squared, of log-probabilities averaged over the tokens of an answer)."""
    dpo_label_smoothing: float = 0.0
    """Share of the pairs that are taken to be labelled the wrong way round (conservative DPO); below 0.5."""
    dpo_sft_loss_weight: float = 0.0
    """Weight of the mean cross entropy of the chosen answer, added to the loss of its pair (RPO)."""
    dpo_reference: str | None = None
    """Checkpoint whose log-probabilities are the reference. Unset: the weights that the run begins with
    (pretrained_checkpoint)."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving, resuming, and starting from existing weights."""

    save_interval: int | None = None
    """Steps between checkpoints. Unset: only at the end and on a stop signal."""
    save: str | None = None
    """Folder of the checkpoints, or a URL of fsspec such as s3://BUCKET/PREFIX. Unset: checkpoints/ in the run
    folder."""
    load: str | None = None
    """Checkpoint folder or URL to start from. Unset: the save folder. Applied once: if save already holds a checkpoint
    that started there, the run resumes from it."""
    load_step: int | None = None
    """Roll back to this step; the next save sets later checkpoints aside. Applied once: afterwards the run resumes
    from its newest checkpoint."""
    finetune: bool = False
    """Start at step 0 with the weights in --load (as pretrained_checkpoint does); if --save holds a checkpoint,
    resume from it."""
    pretrained_checkpoint: str | None = None
    """Checkpoint whose weights a new run starts with (step 0, fresh optimizer), such as an import by
    tools/convert_checkpoint.py."""
    no_save_optim: bool = False
    """Do not save the optimizer state (a resume is then not exact)."""
    no_load_optim: bool = False
    """Resume with a fresh optimizer state."""
    allow_data_change: bool = False
    """Resume even if the data, its blend, the seed or the sequence length differ from the checkpoint."""
    allow_model_change: bool = False
    """Load weights even if rotary base or lengths, the norm's epsilon, the top-k of the router or the tokenizer
    differ from the checkpoint. Heads, groups, widths and biases must always match."""
    keep_last: int = 0
    """Keep only this number of newest checkpoints; 0 keeps all."""
    checkpoint_mode: Literal["auto", "sync", "async"] = "auto"
    """Whether training waits while a checkpoint is written: sync waits; async copies it to host memory and goes on,
    and a process of each rank writes it. auto: async if save_interval is set, the copies are large enough to matter
    and take at most half of each node's free memory."""
    non_persistent_save_interval: int | None = None
    """Steps between local checkpoints, on the disks of the nodes and beside the training: more frequent than
    save_interval, and never in the way of it. Unset: none."""
    non_persistent_ckpt_type: Literal["local"] | None = None
    """Where they lie: local, on the disk of each node (of Megatron-LM's types the one that is here)."""
    non_persistent_local_ckpt_dir: str | None = None
    """Their folder on each node: NVMe, or memory such as /dev/shm. A relative path is one of the folder that the ranks
    of a node are started in."""
    replication: bool = False
    """Keep copies of each rank's local checkpoints on other nodes, so that the loss of a node loses none."""
    replication_jump: int | None = None
    """How many ranks further a copy lies: at least the ranks of a node. Of so many ranks times replication_factor each
    keeps copies for those that are a jump, or several, away."""
    replication_factor: int = 2
    """Nodes that hold each rank's local checkpoints, its own included."""

    @property
    def has_local_tier(self) -> bool:
        """Whether local checkpoints are asked for."""
        return self.non_persistent_save_interval is not None


@dataclass(frozen=True)
class EvaluationConfig:
    """Validation during the run."""

    eval_interval: int | None = None
    """Steps between evaluations. Unset: none."""
    eval_iters: int = 10
    """Batches (of global_batch_size samples) per evaluation."""


@dataclass(frozen=True)
class AverageConfig:
    """Averages of the fp32 weights inside the run, kept in its checkpoints and evaluated beside the weights."""

    ema_decay: float | None = None
    """Decay of an exponential moving average of the weights, such as 0.9999. Unset: none is kept."""
    average_window_steps: int | None = None
    """Steps of a window whose weights are averaged alike; the mean of the last whole window is kept. Windows end at
    multiples of it. Unset: none is kept."""
    average_interval: int = 1
    """Steps between two weights that enter an average."""
    average_start_step: int = 0
    """The moving average begins with the weights after this step, and windows behind it."""

    @property
    def copies(self) -> int:
        """How many fp32 values a parameter has for its averages: a window has its last mean, and that under way."""
        return (self.ema_decay is not None) + 2 * (self.average_window_steps is not None)


@dataclass(frozen=True)
class LoggingConfig:
    """Console, metrics and dashboards."""

    run_dir: str | None = None
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/, cache/. Unset: runs/NAME."""
    log_interval: int = 1
    """Steps between console lines and metrics."""
    tensorboard: bool = False
    """Write TensorBoard events to tensorboard/ in the run folder."""
    wandb_project: str | None = None
    """Weights & Biases project. Unset: off. A resume keeps the run id."""
    wandb_exp_name: str | None = None
    """Weights & Biases run name. Unset: the name of the run folder."""
    straggler_factor: float = 1.5
    """A rank that computes so many times longer than the median of the ranks with the same layers, in 3 logging
    intervals in a row of together a minute or more, is named; 0: none is."""
    mlflow_experiment: str | None = None
    """MLflow experiment. Unset: off. A resume keeps the run id."""
    mlflow_run_name: str | None = None
    """MLflow run name. Unset: the name of the run folder."""
    mlflow_tracking_uri: str | None = None
    """MLflow server or folder. Unset: MLFLOW_TRACKING_URI, else mlflow.db in the run folder, which needs no server."""
    swanlab_project: str | None = None
    """SwanLab project. Unset: off. A resume keeps the run id."""
    swanlab_exp_name: str | None = None
    """SwanLab experiment name. Unset: the name of the run folder."""
    swanlab_mode: Literal["online", "local", "offline", "disabled"] | None = None
    """SwanLab mode: online, local (a dashboard on this machine), offline (synchronised later) or disabled. Unset:
    SWANLAB_MODE, else online."""
    spike_window: int = 128
    """Steps whose mean and standard deviation a new loss or gradient norm is compared with."""
    spike_threshold: float = 6.0
    """Standard deviations above the mean from which on a loss or gradient norm is reported as a spike; 0: none is."""
    progress: bool | None = None
    """Show a progress bar instead of plain lines. Unset: if the output is a terminal."""
    peak_tflops: float | None = None
    """Peak TFLOP/s of one device for MFU. Unset: looked up from the device's name."""
    moe_trace: str | None = None
    """Steps, such as 10 or 10-12, whose expert exchange is written to moe_trace/ in the run folder, one Chrome
    trace per rank."""
    cp_trace: str | None = None
    """Steps, such as 10 or 10-12, whose attention over context-parallel ranks is written to cp_trace/ in the run
    folder, one Chrome trace per rank."""
    moe_routing_record: str | None = None
    """Folder in which to record the experts that each router chooses for each token, and the margin of the choice.
    tools/compare_routing.py compares two recordings. Unset: nothing is recorded."""
    moe_routing_replay: str | None = None
    """Recording whose choices replace those of the routers; layout and micro-batch size may differ. Unset: none."""
    moe_routing_steps: str | None = None
    """Steps, such as 10 or 1-20, that are recorded or replayed. Unset: all."""
    moe_memory_imbalance: float = 2.0
    """Load of the busiest rank's experts over the mean, for the second memory estimate of --dry-run; 1: none."""


@dataclass(frozen=True)
class RunConfig:
    """The whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def run_dir(self) -> Path:
        """Folder of the run, with its default where it is unset."""
        return Path(self.logging.run_dir or Path("runs", self.model.name))

    @property
    def save_dir(self) -> Location:
        """Where the checkpoints go, with its default where it is unset."""
        return location(self.checkpoint.save or self.run_dir / "checkpoints")

    @property
    def load_dir(self) -> Location:
        """Where the checkpoints to begin from are, with its default where it is unset."""
        return location(self.checkpoint.load or self.save_dir)

    @property
    def cache_dir(self) -> Path:
        """Folder of all indices and encoded dialogs, with its default where it is unset."""
        return Path(self.data.data_cache_path or self.run_dir / "cache")

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of one optimizer step on one data-parallel rank."""
        return self.training.global_batch_size // (self.training.micro_batch_size * self.parallel.data_parallel_size)

    @property
    def exchanges_overlap(self) -> bool:
        """Whether an exchange of the experts, or of the attention over ranks, is to run beside kernels."""
        parallel = self.parallel
        expert, expert_tensor = parallel.expert_sizes
        experts = self.model.is_moe and parallel.moe_input_chunks != 1 and expert * expert_tensor > 1
        return experts or parallel.context_sizes[1] > 1

    @property
    def needs_transformer_engine(self) -> bool:
        """Whether something is asked for that only Transformer Engine does."""
        return self.training.fp8_format is not None or self.parallel.cp_implementation == "transformer_engine"

    @property
    def balances_over_layers(self) -> bool:
        """Whether the auxiliary loss is one over all layers, wherever they lie."""
        model = self.model
        return model.is_moe and model.moe_aux_loss_coeff > 0 and model.moe_aux_loss_formula == "hf"

    @property
    def routers_read_masks(self) -> bool:
        """Whether the routers must be told which tokens are padding, and how many of a step are learned."""
        data = self.data
        marked = data_format(data).marks_tokens
        return self.model.is_moe and (marked or data.eod_mask_loss or data.reset_attention_mask)
