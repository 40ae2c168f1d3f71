"""Ranges of single values."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_telechat.config.fields import values_of
from megatron_telechat.config.origins import DEFAULT, Check, Rule, flag
from megatron_telechat.errors import Problem

SHAPE = ("num_layers", "hidden_size", "num_attention_heads")
"""What a model cannot be without."""

AT_LEAST_ONE = (
    *(
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "vocab_size",
        "max_position_embeddings",
    ),
    *("rotary_training_seqlen", "rotary_base_seqlen", "num_experts", "moe_ffn_hidden_size", "moe_router_topk"),
    *("moe_layer_freq", "moe_shared_expert_intermediate_size", "world_size", "ranks_per_node"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank"),
    "microbatch_group_size_per_virtual_pipeline_stage",
    *("context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"),
    *("seq_length", "micro_batch_size", "global_batch_size", "exit_interval", "recompute_num_layers"),
    *("train_samples", "lr_decay_samples", "lr_wsd_decay_samples"),
    "fp8_amax_history_len",
    *("lr_decay_iters", "lr_wsd_decay_iters", "lr_decay_tokens", "lr_wsd_decay_tokens"),
    *("loss_scale_window", "hysteresis"),
    *("save_interval", "eval_interval", "eval_iters", "log_interval", "num_workers", "moe_input_chunks"),
    *("average_window_steps", "average_interval"),
    *("non_persistent_save_interval", "replication_jump"),
)
NOT_NEGATIVE = (
    *("ffn_hidden_size", "init_method_std", "router_init_std", "moe_aux_loss_coeff", "moe_z_loss_coeff"),
    *(
        "train_iters",
        "seed",
        "min_lr",
        "lr_warmup_iters",
        "lr_warmup_tokens",
        "lr_warmup_samples",
        "lr_warmup_init",
        "weight_decay",
        "clip_grad",
        "max_skipped_steps",
    ),
    *("load_step", "keep_last", "fp8_margin", "loss_chunk_rows", "hang_timeout_minutes"),
    *("spike_threshold", "straggler_factor", "average_start_step"),
)
MORE_THAN_ZERO = (
    *("norm_epsilon", "rotary_base", "distributed_timeout_minutes", "exit_duration_in_mins", "lr", "adam_eps"),
    *("initial_loss_scale", "min_loss_scale", "peak_tflops", "train_epochs", "host_memory_gib"),
)
BELOW_ONE = ("attention_dropout", "hidden_dropout", "adam_beta1", "adam_beta2", "lr_warmup_fraction")
"""At least 0 and less than 1."""

OFF_BY_ZERO = {
    "save_interval": "to save only at the end",
    "non_persistent_save_interval": "for no local checkpoints",
    "eval_interval": "to evaluate never",
    "eval_iters": "and drop --eval-interval, to evaluate never",
    "exit_interval": "to run to the end",
    "num_experts": "for a dense model",
    "moe_shared_expert_intermediate_size": "for no shared expert",
    "average_window_steps": "to keep no mean of a window",
    "moe_input_chunks": "to exchange the whole input at once",
    "recompute_num_layers": "and --recompute-granularity with it, to recompute nothing",
}
"""What a person who writes 0 probably wants, and gets by leaving the flag out."""


def shape_given(check: Check) -> Iterator[Problem]:
    """A model is named or described."""
    values = values_of(check.run)
    missing = [
        name
        for name in SHAPE
        if name not in check.bad and check.origins.get(name, DEFAULT) == DEFAULT and not values[name]
    ]
    if not missing:
        return
    if len(missing) == len(SHAPE):
        yield Problem("no model: give a preset or the model's shape", "", _PRESET_HELP)
    else:
        yield Problem(
            f"the model's shape is incomplete, missing: {', '.join(missing)}",
            "",
            " ".join(flag(name, "N") for name in missing),
        )
    check.bad.update(missing)
    if len(missing) == len(SHAPE):
        check.bad.update(("ffn_hidden_size", "moe_ffn_hidden_size"))


_PRESET_HELP = (
    "--preset telechat2-tiny-moe (--list-presets lists them), or --num-layers, --hidden-size, --num-attention-heads ..."
)


def at_least_one(check: Check) -> Iterator[Problem]:
    """Sizes and intervals are at least 1 where they are given."""
    for name, value in _present(check, AT_LEAST_ONE):
        if not isinstance(value, str) and value < 1:
            off = (
                f"an integer of at least 1; leave it out {OFF_BY_ZERO[name]}"
                if name in OFF_BY_ZERO
                else "an integer of at least 1"
            )
            yield check.one(f"{name}={value} is less than 1", name, fix=off)


def not_negative(check: Check) -> Iterator[Problem]:
    """Rates, coefficients and counts are 0 or more."""
    for name, value in _present(check, NOT_NEGATIVE):
        if not isinstance(value, str) and value < 0:
            yield check.one(f"{name}={value} is negative", name, fix="0 or more")


def more_than_zero(check: Check) -> Iterator[Problem]:
    """Lengths, scales and time limits are above 0."""
    for name, value in _present(check, MORE_THAN_ZERO):
        if value <= 0:
            yield check.one(f"{name}={value} is not more than 0", name, fix="a number above 0")


def below_one(check: Check) -> Iterator[Problem]:
    """Probabilities and decay factors are at least 0 and less than 1."""
    for name, value in _present(check, BELOW_ONE):
        if not 0 <= value < 1:
            yield check.one(f"{name}={value} is out of range", name, fix="at least 0 and less than 1")


def share(check: Check) -> Iterator[Problem]:
    """optimizer_offload_fraction is a share."""
    value = check.take("optimizer_offload_fraction")
    if not 0 <= value <= 1:
        yield check.one(
            f"optimizer_offload_fraction={value} is out of range", "optimizer_offload_fraction", fix="from 0 to 1"
        )


def level(check: Check) -> Iterator[Problem]:
    """empty_unused_memory_level is 0 or 1."""
    value = check.take("empty_unused_memory_level")
    if value not in (0, 1):
        yield check.one(f"empty_unused_memory_level={value} is out of range", "empty_unused_memory_level", fix="0 or 1")


def name_is_a_folder_name(check: Check) -> Iterator[Problem]:
    """The name becomes the name of the run folder."""
    name = check.take("name")
    if not name.strip() or name in (".", "..") or "/" in name or "\0" in name:
        yield check.one(
            f"name={name!r} cannot name a folder", "name", fix="--name with letters, digits, dots and hyphens"
        )


def _present(check: Check, names: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    values = values_of(check.run)
    for name in names:
        if name not in check.bad and values[name] is not None:
            yield name, values[name]


RULES: tuple[Rule, ...] = (
    shape_given,
    at_least_one,
    not_negative,
    more_than_zero,
    below_one,
    share,
    level,
    name_is_a_folder_name,
)
