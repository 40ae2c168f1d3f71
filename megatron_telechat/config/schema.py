"""What a run is: frozen dataclasses, one a section of the YAML file.

The literal under a field is its documentation: ``--help`` and ``--print-config``
print it. Field names are Megatron-LM's flag names wherever Megatron has the flag.
Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from megatron_telechat.config.data_formats import data_format
from megatron_telechat.config.layer_pattern import moe_layers
from megatron_telechat.config.lr_schedules import SCHEDULES, SHAPES
from megatron_telechat.device_kinds import DeviceChoice


@dataclass(frozen=True)
class OneOf:
    """The values a text field takes, where they are the keys of a registry: ``Annotated[str, OneOf(REGISTRY)]``."""

    registry: Mapping[str, object]


Precision = Literal["bf16", "fp16", "fp32"]

PLANNED_ONLY = (
    *("activation", "untie_embeddings_and_output_weights", "position_embedding_type", "normalization"),
    *("add_qkv_bias", "add_bias_linear", "moe_shared_expert_gate", "moe_layer_pattern"),
)
"""Fields of a model of which the training builds the default alone; the costs and the planner know the others too."""


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. Presets fill this section."""

    name: str = "custom"
    """Name of the model, for logs and checkpoints."""
    architecture: Literal["telechat2", "mixtral"] = "telechat2"
    """Family whose layer rules apply: telechat2 or mixtral."""
    num_layers: int = 0
    """Number of decoder layers."""
    hidden_size: int = 0
    """Width of the residual stream."""
    ffn_hidden_size: int = 0
    """Width of the MLP of a dense layer."""
    activation: Literal["swiglu", "gelu", "squared_relu", "quick_geglu"] = "swiglu"
    """Activation of the MLPs: swiglu, gelu, squared_relu or quick_geglu (--swiglu, --squared-relu, --quick-geglu). The
    training builds swiglu."""
    num_attention_heads: int = 0
    """Number of query heads."""
    num_query_groups: int | None = None
    """Number of key/value heads (grouped-query attention); unset means one for each query head."""
    kv_channels: int | None = None
    """Width of a head; unset means hidden_size / num_attention_heads."""
    vocab_size: int = 131072
    """Rows of the embedding and of the output layer. Never padded: it must divide by tensor_model_parallel_size."""
    untie_embeddings_and_output_weights: bool = True
    """The output layer has a matrix of its own; off: it uses that of the embedding. The training builds two."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """RMSNorm or LayerNorm (which has a bias). The training builds RMSNorm."""
    norm_epsilon: float = 1e-5
    """Epsilon of the norms."""
    qk_layernorm: bool = False
    """A norm on the queries and one on the keys, over the width of a head and before the rotary embedding."""
    attention_output_bias: bool = True
    """Bias on the attention output projection (TeleChat2: yes; Mixtral: no)."""
    mlp_output_bias: bool = True
    """Bias on the down projection, of the experts too (TeleChat2: yes; Mixtral: no)."""
    add_qkv_bias: bool = False
    """Bias on the query, key and value projection. The training builds none."""
    add_bias_linear: bool = False
    """Bias on every linear layer, the router too: Megatron-LM without --disable-bias-linear. The training builds none
    on the inputs."""
    position_embedding_type: Literal["rope", "learned_absolute", "none"] = "rope"
    """Positions: rope, learned_absolute (a table of max_position_embeddings rows) or none. The training builds rope."""
    max_position_embeddings: int | None = None
    """Rows of the table of learned positions; with rope it has no effect. Unset: seq_length."""
    rotary_base: float = 10000.0
    """Theta of the rotary embedding, before NTK-aware scaling."""
    rotary_training_seqlen: int | None = None
    """training_seqlen of the checkpoint: attention scaling acts beyond it. Unset turns NTK and attention scaling
    off."""
    rotary_base_seqlen: int | None = None
    """base_seqlen of the checkpoint: the length NTK-aware scaling counts from. Unset means rotary_training_seqlen."""
    rotary_table_dtype: Literal["fp32", "fp16"] = "fp32"
    """Rounding of the cos/sin tables: fp32, or fp16 as the published modelling file does."""
    attention_dropout: float = 0.0
    """Dropout of the attention probabilities."""
    hidden_dropout: float = 0.0
    """Dropout of the residual branches."""
    init_method_std: float = 0.0048
    """Standard deviation of the normal initialisation of the linear layers and the embeddings."""
    router_init_std: float = 0.01
    """Standard deviation of the router's initialisation."""
    num_experts: int | None = None
    """Number of experts of a MoE layer; unset means a dense model."""
    moe_ffn_hidden_size: int | None = None
    """Width of one expert's MLP."""
    moe_router_topk: int = 2
    """Experts a token is sent to."""
    moe_layer_freq: int = 1
    """Every moe_layer_freq-th layer is a MoE layer, counted from the first (1: all)."""
    moe_layer_pattern: str | None = None
    """Which layers are MoE layers, as Megatron's list, such as ([0]*3+[1]*27): 1 MoE, 0 dense. Takes the place of
    moe_layer_freq."""
    moe_aux_loss_coeff: float = 0.0
    """Coefficient of the load-balancing auxiliary loss."""
    moe_z_loss_coeff: float = 0.0
    """Coefficient of the router z-loss."""
    moe_shared_expert_intermediate_size: int | None = None
    """Width of the shared expert beside the routed ones; unset means none."""
    moe_shared_expert_gate: bool = False
    """The shared expert's output is weighed by a gate of its own. The training builds none."""

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def is_moe(self) -> bool:
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
        return self.add_qkv_bias or self.add_bias_linear

    @property
    def has_attention_output_bias(self) -> bool:
        return self.attention_output_bias or self.add_bias_linear

    @property
    def has_mlp_output_bias(self) -> bool:
        return self.mlp_output_bias or self.add_bias_linear

    def layer_is_moe(self, layer: int) -> bool:
        """Whether the layer with this zero-based number is a MoE layer."""
        if self.moe_layer_pattern is not None:
            pattern = moe_layers(self.moe_layer_pattern)
            return self.is_moe and layer < len(pattern) and bool(pattern[layer])
        return self.is_moe and layer % self.moe_layer_freq == 0


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the batch are spread over the ranks."""

    world_size: int = 1
    """Number of ranks. Filled from torchrun's WORLD_SIZE; --world-size sets it for --dry-run."""
    ranks_per_node: int | None = None
    """Ranks of one node; unset means LOCAL_WORLD_SIZE of torchrun, or the largest number up to 8 that divides
    world_size."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer of the attention and the dense MLP."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages (ranks) the layers are split over."""
    num_virtual_stages_per_pipeline_rank: int = 1
    """Chunks of layers on each pipeline rank; more than 1 selects the interleaved schedule."""
    pipeline_model_parallel_layout: str | None = None
    """Megatron's layout string, such as Et*3|t*4|t*4|t*3L. Unset: the layers are split evenly."""
    plan: str | None = None
    """Plan file of tools/plan_pipeline.py --output: parallel sizes, layout and recompute, as if given as flags."""
    context_parallel_size: int = 1
    """Ranks that share one sequence."""
    expert_model_parallel_size: int | None = None
    """Ranks the experts are spread over. Unset: derived by fold_tensor_into_experts, else 1."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share one expert. Unset: 1 where the tensor domain is folded into the expert domain."""
    fold_tensor_into_experts: bool = False
    """Turn the tensor-parallel domain into expert-parallel domain inside MoE layers (ETP 1, EP a multiple of TP)."""
    moe_input_chunks: int | Literal["auto"] = 1
    """Pieces a MoE layer's input is cut into, so that the exchange of one runs beside the experts of another. 1: whole;
    auto: the number that is fastest on the real layer, measured once at the start and kept in the checkpoint."""
    sequence_parallel: bool | None = None
    """Split the activations between the tensor-parallel regions along the sequence. Unset: on when TP > 1."""
    use_distributed_optimizer: bool = False
    """Shard the optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward runs (needs the distributed optimizer)."""
    overlap_p2p_communication: bool | None = None
    """Overlap pipeline sends with compute. Unset: on for the interleaved schedule."""
    distributed_timeout_minutes: float = 10.0
    """Time limit of a collective."""

    @property
    def data_parallel_size(self) -> int:
        return self.world_size // (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )

    @property
    def sequence_parallel_size(self) -> int:
        """Ranks that the sequence is split over between the tensor-parallel regions; 1: sequence parallelism is off.

        `sequence_parallel` is what a person said; everybody else reads this.
        """
        return 1 if self.sequence_parallel is False else self.tensor_model_parallel_size

    @property
    def overlaps_p2p(self) -> bool:
        """Whether pipeline sends run beside the compute; only the interleaved schedule can."""
        return self.num_virtual_stages_per_pipeline_rank > 1 and self.overlap_p2p_communication is not False

    @property
    def node_size(self) -> int:
        """Ranks of one node, with the default where it is unset."""
        if self.ranks_per_node is not None:
            return self.ranks_per_node
        return max((size for size in range(1, 9) if self.world_size % size == 0), default=1)

    @property
    def num_virtual_stages(self) -> int:
        return self.pipeline_model_parallel_size * self.num_virtual_stages_per_pipeline_rank

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
    """Kind of device that the ranks run on; auto: the first of the other kinds that is present."""
    precision: Precision = "bf16"
    """Compute type: bf16, fp16 or fp32 (short: --bf16, --fp16, --fp32). Master weights, gradients, optimizer state are
    fp32."""
    seq_length: int = 8192
    """Tokens of a training sample."""
    micro_batch_size: int = 1
    """Samples of one forward on one data-parallel rank."""
    global_batch_size: int = 1
    """Samples of one optimizer step over all data-parallel ranks."""
    train_iters: int = 0
    """Optimizer steps of the whole run, those before a resume counted in."""
    exit_interval: int | None = None
    """Stop cleanly, with a checkpoint, when the step count reaches a multiple of this."""
    seed: int = 1234
    """Seed of the initial weights, of dropout and of the order of the samples. The weights do not depend on the
    layout."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Activation recompute: full (whole layers) or selective (recompute_modules). Unset: none."""
    recompute_method: Literal["block", "uniform"] = "block"
    """Which layers full recompute takes: block (the first recompute_num_layers of each virtual stage) or uniform
    (all)."""
    recompute_num_layers: int | None = None
    """Layers of each virtual stage that full recompute takes with recompute_method block. Unset: all."""
    recompute_modules: tuple[Literal["core_attn", "mlp", "moe", "layernorm"], ...] = ("core_attn",)
    """Modules that selective recompute repeats: core_attn, mlp, moe, layernorm."""
    recompute_layout: str | None = None
    """Recompute that differs between layers: one entry a virtual stage, | between them, each a list such as
    full*2,none*3 or core_attn+mlp*4 in layer order. Takes the place of the recompute flags above."""
    deterministic: bool = True
    """Use only deterministic algorithms; a resume is then bitwise equal to the uninterrupted run."""
    empty_unused_memory_level: int = 0
    """Give cached device memory back: 0 never, 1 after a step."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, clipping and the learning-rate schedule."""

    lr: float = 3e-4
    """Largest learning rate."""
    min_lr: float = 1.5e-5
    """Learning rate the schedule ends at."""
    lr_decay_style: Annotated[str, OneOf(SCHEDULES)] = "cosine"
    """Schedule of the learning rate after the warm-up. WSD keeps lr until the last lr_wsd_decay_iters steps."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up."""
    lr_warmup_fraction: float | None = None
    """Warm-up as a share of lr_decay_iters; in place of lr_warmup_iters."""
    lr_warmup_init: float = 0.0
    """Learning rate the warm-up starts from."""
    lr_decay_iters: int | None = None
    """Steps after which min_lr is reached. Unset: train_iters."""
    lr_wsd_decay_iters: int | None = None
    """Steps of the final decay of the WSD schedule."""
    lr_wsd_decay_style: Annotated[str, OneOf(SHAPES)] = "exponential"
    """Shape of the final decay of WSD."""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay; none on biases and norms."""
    adam_beta1: float = 0.9
    """AdamW's first beta."""
    adam_beta2: float = 0.95
    """AdamW's second beta."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    initial_loss_scale: float = 65536.0
    """Dynamic loss scale to begin with (fp16)."""
    min_loss_scale: float = 1.0
    """Smallest dynamic loss scale (fp16)."""
    loss_scale_window: int = 1000
    """Steps without overflow after which the loss scale doubles (fp16)."""
    hysteresis: int = 2
    """Overflows tolerated before the loss scale halves (fp16)."""
    max_skipped_steps: int = 50
    """Steps in a row that were not taken, as after an fp16 overflow or without a learned token, at which the run ends
    with exit code 5; 0: never."""


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from."""

    data_path: tuple[str, ...] = ()
    """Prefixes of indexed datasets (with sft, jsonl files), or weights and prefixes in turn: 0.7 en_document 0.3
    zh_document."""
    data_json: str | None = None
    """A data.json as TeleChat writes it ({prefix: weight}), in place of data_path."""
    split: str = "969,30,1"
    """Shares of train, validation and test."""
    train_data_path: tuple[str, ...] = ()
    """Training data of its own (with valid_data_path), in place of data_path and split."""
    valid_data_path: tuple[str, ...] = ()
    """Validation data of its own."""
    data_cache_path: str | None = None
    """Folder of the sample index and of encoded dialogs. Unset: cache/ in the run folder."""
    data_order: Literal["epochs", "megatron"] = "epochs"
    """Order of the samples of indexed data: epochs (each epoch of a source on its own, whatever the length of the run)
    or megatron (Megatron's for the length the run is started with, then epochs). A run keeps the order it began
    with."""
    mock_data: bool = False
    """Train on a fixed pseudo-random token stream; for benchmarks and smoke tests."""
    tokenizer_type: (
        Literal["HuggingFaceTokenizer", "SentencePieceTokenizer", "TikTokenizer", "NullTokenizer"] | None
    ) = None
    """HuggingFaceTokenizer, SentencePieceTokenizer, TikTokenizer or NullTokenizer. Unset: told by tokenizer_model."""
    tokenizer_model: str | None = None
    """File or folder of the tokenizer; pretraining reads only its vocabulary size and end-of-document token."""
    eod_mask_loss: bool = False
    """No loss where the input is an end-of-document token."""
    reset_position_ids: bool = False
    """Positions begin anew after an end-of-document token; with sft, with every dialog of a row."""
    reset_attention_mask: bool = False
    """A document (with sft, a dialog) attends to itself only, not to what stands before it in the sample; its first
    token, which has nothing before it, is not learned."""
    sft: bool = False
    """Fine-tuning: the data paths name jsonl files of dialogs, which are packed and learned through a loss mask."""
    sft_template: Literal["telechat2", "telechat2-115b", "telechat"] = "telechat2"
    """Chat template: telechat2 (with system turn and tools), telechat2-115b or telechat (turns only, with or without
    <_start>)."""
    sft_loss_mask: Literal["telechat", "answer"] = "telechat"
    """Tokens that are learned: telechat (answers, <_end>, <_bot>, <_user>) or answer (answers and <_end> only)."""
    sft_system: str | None = None
    """System text of dialogs that have none; unset: they get no system turn."""
    sft_packing: bool = True
    """Put several dialogs into one sample; off: one each, the rest of the sample is padding."""
    sft_overlong: Literal["truncate", "drop"] = "truncate"
    """Dialogs longer than seq_length: cut off (truncate) or left out (drop)."""
    num_workers: int = 1
    """Background threads that prepare batches on each rank."""
    data_index_timeout_minutes: float = 60.0
    """Time the other ranks wait for rank 0 to build the sample index."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving, resuming, starting from other weights."""

    save_interval: int | None = None
    """Steps between checkpoints. Unset: only at the end and on a stop signal."""
    save: str | None = None
    """Folder of the checkpoints. Unset: checkpoints/ in the run folder."""
    load: str | None = None
    """Folder to begin from. Unset: the one of save. Obeyed once: when save holds a checkpoint of that beginning, go on
    from it."""
    load_step: int | None = None
    """Go back to this step; later ones are set aside by the next save. Obeyed once: then the run goes on from the
    newest."""
    finetune: bool = False
    """Begin at step 0 with the weights in --load (pretrained_checkpoint); once --save holds a checkpoint, go on from
    that."""
    pretrained_checkpoint: str | None = None
    """Checkpoint whose weights a new run begins with (step 0, fresh optimizer); tools/convert_checkpoint.py makes
    one."""
    no_save_optim: bool = False
    """Leave the optimizer state out of the checkpoints (a resume is then not exact)."""
    no_load_optim: bool = False
    """Resume with a fresh optimizer state."""
    allow_data_change: bool = False
    """Resume although the data, its blend, the seed or the sequence length differ from those of the checkpoint."""
    allow_model_change: bool = False
    """Load weights although rotary base or lengths, the norm's epsilon, the experts of a token (top-k) or the tokenizer
    differ from those of the checkpoint; heads, groups, widths and biases never may."""
    keep_last: int = 0
    """Keep only this many newest checkpoints; 0 keeps all."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Validation during the run."""

    eval_interval: int | None = None
    """Steps between evaluations. Unset: none."""
    eval_iters: int = 10
    """Batches of global_batch_size samples of one evaluation."""


@dataclass(frozen=True)
class LoggingConfig:
    """What a person and a dashboard see."""

    run_dir: str | None = None
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/, cache/. Unset: runs/NAME."""
    log_interval: int = 1
    """Steps between console lines and metrics."""
    tensorboard: bool = False
    """Write TensorBoard events to tensorboard/ in the run folder."""
    wandb_project: str | None = None
    """Weights & Biases project; unset means off. The run id is kept over a resume."""
    wandb_exp_name: str | None = None
    """Weights & Biases run name; unset means the run folder's name."""
    progress: bool | None = None
    """A progress bar in place of plain lines. Unset: where the output is a terminal."""
    peak_tflops: float | None = None
    """Peak TFLOP/s of one device for MFU. Unset: looked up from the device's name."""
    moe_trace: str | None = None
    """Steps, such as 10 or 10-12, whose expert exchange is written to moe_trace/ in the run folder, one Chrome trace a
    rank."""
    moe_routing_record: str | None = None
    """Folder that gets the experts each router chooses, token by token, and how clear the choice was;
    tools/compare_routing.py compares two of them. Unset: nothing is recorded."""
    moe_routing_replay: str | None = None
    """Recording whose choices take the place of the routers' own; layout and micro-batch size may differ. Unset:
    none."""
    moe_routing_steps: str | None = None
    """Steps, such as 10 or 1-20, that are recorded or replayed. Unset: all."""
    moe_memory_imbalance: float = 2.0
    """Rows of the busiest rank's experts over the mean, for the second memory estimate of --dry-run; 1: none."""


@dataclass(frozen=True)
class RunConfig:
    """The whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def run_dir(self) -> Path:
        """Folder of the run, with its default where it is unset."""
        return Path(self.logging.run_dir or Path("runs", self.model.name))

    @property
    def save_dir(self) -> Path:
        """Folder that the checkpoints go to, with its default where it is unset."""
        return Path(self.checkpoint.save or self.run_dir / "checkpoints")

    @property
    def load_dir(self) -> Path:
        """Folder of the checkpoints to begin from, with its default where it is unset."""
        return Path(self.checkpoint.load or self.save_dir)

    @property
    def cache_dir(self) -> Path:
        """Folder of all indices and encoded dialogs, with its default where it is unset."""
        return Path(self.data.data_cache_path or self.run_dir / "cache")

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of one optimizer step on one data-parallel rank."""
        return self.training.global_batch_size // (self.training.micro_batch_size * self.parallel.data_parallel_size)

    @property
    def routers_read_masks(self) -> bool:
        """Whether the routers must be told which tokens are padding, and how many of a step are learned."""
        data = self.data
        marked = data_format(data).marks_tokens
        return self.model.is_moe and (marked or data.eod_mask_loss or data.reset_attention_mask)
