"""What a command of Megatron-LM means where it says nothing.

A flag that is left out has Megatron-LM's default there, and often another one here. A command whose model comes from
flags alone (no preset, no YAML file, no --architecture) is read as Megatron-LM reads it. Defaults are those of
megatron/training/arguments.py and of the configuration classes it makes flags of, at the release of megatron-core
0.16.1; where releases differ, that of most of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_telechat.config.fields import fields_by_name
from megatron_telechat.config.vocabulary import Vocabulary, named_vocabulary

MEGATRON = "Megatron-LM's default"
"""Origin of a value that a command leaves to Megatron-LM."""

SHAPE = ("num_layers", "hidden_size", "num_attention_heads")
"""Fields without which nothing describes a model."""

ARCHITECTURE: Mapping[str, tuple[Any, str]] = {
    "activation": ("gelu", "--swiglu"),
    "untie_embeddings_and_output_weights": (False, "--untie-embeddings-and-output-weights"),
    "position_embedding_type": ("learned_absolute", "--position-embedding-type rope"),
    "normalization": ("LayerNorm", "--normalization RMSNorm"),
    "add_bias_linear": (True, "--disable-bias-linear"),
}
"""Field → what Megatron-LM builds where nothing is said, and the flag that asks it for what our training builds."""

DEFAULTS: Mapping[str, Any] = {
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
    "init_method_std": 0.02,
    "norm_epsilon": 1e-5,
    "rotary_base": 10000.0,
    "moe_router_topk": 2,
    "moe_layer_freq": 1,
    "moe_aux_loss_coeff": 0.0,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "cp_comm_type": "p2p",
    "sequence_parallel": False,
    "use_distributed_optimizer": False,
    "overlap_grad_reduce": False,
    "overlap_param_gather": False,
    "distributed_timeout_minutes": 10.0,
    "precision": "fp32",
    "fp8_format": None,
    "fp8_recipe": "delayed",
    "fp8_margin": 0,
    "fp8_amax_history_len": 1,
    "fp8_amax_compute_algo": "most_recent",
    "seq_length": None,
    "micro_batch_size": None,
    "seed": 1234,
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "recompute_modules": ("core_attn",),
    "lr": None,
    "min_lr": 0.0,
    "lr_decay_style": "linear",
    "lr_warmup_iters": 0,
    "lr_warmup_init": 0.0,
    "lr_wsd_decay_style": "exponential",
    "weight_decay": 0.01,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_eps": 1e-8,
    "clip_grad": 1.0,
    "initial_loss_scale": 2.0**32,
    "min_loss_scale": 1.0,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "split": "969,30,1",
    "num_workers": 2,
    "eod_mask_loss": False,
    "reset_position_ids": False,
    "reset_attention_mask": False,
    "save_interval": None,
    "eval_interval": 1000,
    "eval_iters": 100,
    "log_interval": 100,
}
"""Field → Megatron-LM's default of the flag of the same name (of --bf16 and --fp16 for precision); None: none, where
ours is a value it has to be given."""

QUIET = ("num_workers", "log_interval")
"""Fields whose default differs and which change nothing that is trained."""


READ_BY_COSTS = ("precision", "sequence_parallel", "hidden_dropout", "cp_comm_type")
"""Fields whose default differs and on which times or bytes depend."""


def differing() -> dict[str, Any]:
    """Field → Megatron-LM's default, for the fields of DEFAULTS whose default here is another one."""
    known = fields_by_name()
    return {name: value for name, value in DEFAULTS.items() if known[name].default != value}


def matters(name: str, values: Mapping[str, Any]) -> bool:
    """Whether the default of this field has a say in a run with these values."""
    if name == "sequence_parallel":
        return values.get("tensor_model_parallel_size", 1) > 1
    if name == "cp_comm_type":
        return values.get("context_parallel_size", 1) > 1
    if name == "initial_loss_scale":
        return values.get("precision") == "fp16"
    if name == "recompute_method":
        return values.get("recompute_granularity") == "full"
    return name not in QUIET


def default_ffn_hidden_size(hidden: int, activation: str) -> int:
    """Megatron-LM's width of the MLP: 4 h; of a SwiGLU two thirds of that, down to a multiple of 64."""
    return int(4 * hidden * 2 / 3 / 64) * 64 if activation == "swiglu" else 4 * hidden


@dataclass(frozen=True)
class Meaning:
    """What a command means that leaves its model to Megatron-LM.

    Attributes:
        model: field → value, of what makes another model and is not given.
        values: field → Megatron-LM's default, of what makes another run of the same model and is not given; None: no
            default.
        add: flags that a command has to say, so that Megatron-LM and our training build the same model.
        vocabulary: rows of the embedding as the command's tokenizer gives them; None where nothing says them.
        asked: what cannot be told from the command, each with the flag that would say it.
    """

    model: Mapping[str, Any]
    values: Mapping[str, Any]
    add: tuple[str, ...]
    vocabulary: Vocabulary | None
    asked: tuple[tuple[str, str], ...] = ()


def read_meaning(values: Mapping[str, Any], said: frozenset[str], given: Mapping[str, tuple[str, ...]]) -> Meaning:
    """What the absent flags of a command mean.

    Args:
        values: field → value, of what is given.
        said: fields that the command gives.
        given: flag as typed, without its hyphens and with hyphens inside → its values; all flags of the command.
    """
    model = {name: value for name, (value, _) in ARCHITECTURE.items() if name not in said}
    if said & {"attention_output_bias", "mlp_output_bias"}:
        model.pop("add_bias_linear", None)  # the biases are told one by one, in our own words
    add = [ARCHITECTURE[name][1] for name in model]
    asked: list[tuple[str, str]] = []
    if "group-query-attention" in given and "num_query_groups" not in said:
        what = (
            "--group-query-attention without --num-query-groups: releases of Megatron-LM differ (1, or one for each "
            "head)"
        )
        asked.append((what, "--num-query-groups N"))
    elif (
        "group-query-attention" not in given
        and (values.get("num_query_groups") or values["num_attention_heads"]) != values["num_attention_heads"]
    ):
        model["num_query_groups"] = values["num_attention_heads"]
        add.append("--group-query-attention")
    every_layer_has_experts = (
        values.get("num_experts")
        and values.get("moe_ffn_hidden_size")
        and not said & {"moe_layer_freq", "moe_layer_pattern"}
    )
    if "ffn_hidden_size" not in said and not every_layer_has_experts:
        model["ffn_hidden_size"] = default_ffn_hidden_size(
            values["hidden_size"], values.get("activation", model.get("activation", "swiglu"))
        )
    vocabulary = None
    if "vocab_size" not in said:
        vocabulary = named_vocabulary(given)
        add.append(f"--vocab-size {vocabulary.size if vocabulary else 'N'}")
    absent = {name: value for name, value in differing().items() if name not in said and matters(name, values)}
    return Meaning(model, absent, tuple(add), vocabulary, tuple(asked))


def padded(size: int, tensor: int, given: Mapping[str, tuple[str, ...]]) -> int:
    """Rows of the embedding after Megatron-LM's padding: a multiple of --make-vocab-size-divisible-by (128) times the
    tensor-parallel size; --padded-vocab-size and --no-pad-vocab-size are left as they are."""
    if {
        "padded-vocab-size",
        "no-pad-vocab-size",
        "disable-pad-vocab-size",
        "pad-vocab-size-to",
        "extra-vocab-size",
    } & set(given):
        return size
    text = (given.get("make-vocab-size-divisible-by") or ("128",))[0]
    multiple = (int(text) if text.isdigit() and int(text) else 128) * max(tensor, 1)
    return math.ceil(size / multiple) * multiple
