"""Values that follow from others: filled in so that no field with a derivation stays unset."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from megatron_telechat.config.context import least_traffic
from megatron_telechat.config.fields import fields_by_name, make_run, values_of
from megatron_telechat.config.layer_pattern import moe_layers
from megatron_telechat.config.microbatch_groups import next_count
from megatron_telechat.config.origins import DEFAULT, DERIVED, Check
from megatron_telechat.config.run_stages import counts_tokens

Derivation = Callable[[dict[str, Any], Check], Any]


def derive(check: Check) -> None:
    """Fill in every derived value of ``check.run``; a derivation that needs a wrong value leaves its field unset."""
    values = values_of(check.run)
    _finetune_begins_with_load(values, check)
    _replace_values_of_the_preset(values, check)
    _pairs_attend_to_themselves(values, check)
    _count_samples_as_tokens(values, check)
    _pattern_as_frequency(values, check)
    for name, derivation in DERIVATIONS:
        if values[name] not in (None, ()) or name in check.bad:
            continue
        try:
            value = derivation(values, check)
        except (ZeroDivisionError, TypeError):
            continue  # one of the values it needs is wrong or unset, which a rule reports
        if value is not None:
            values[name] = value
            check.origins[name] = DERIVED
    _drop_sequence_parallel_without_tp(values, check)
    _say_that_groups_need_interleaving(values, check)
    _raise_global_batch(values, check)
    _count_samples_as_steps(values, check)
    check.run = make_run(values)


def _expert_model_parallel_size(values: dict[str, Any], check: Check) -> int:
    return values["tensor_model_parallel_size"] if _folds(values) else 1


def _expert_tensor_parallel_size(values: dict[str, Any], check: Check) -> int:
    return 1 if _folds(values) else values["tensor_model_parallel_size"]


def _folds(values: dict[str, Any]) -> bool:
    return values["fold_tensor_into_experts"] and values["num_experts"] is not None


def _has_position_table(values: dict[str, Any]) -> bool:
    return values["position_embedding_type"] == "learned_absolute"


def _kv_channels(values: dict[str, Any], check: Check) -> int | None:
    share, rest = divmod(values["hidden_size"], values["num_attention_heads"])
    return share if share and not rest else None


def _tokenizer_type(values: dict[str, Any], check: Check) -> str | None:
    model = values["tokenizer_model"]
    if model is None:
        return None
    if model.endswith(".tiktoken") or os.path.basename(model).startswith("tekken"):
        return "TikTokenizer"
    if model.endswith(".model"):
        return "SentencePieceTokenizer"
    return "HuggingFaceTokenizer"


def _context_sizes(values: dict[str, Any], check: Check) -> tuple[int, int] | None:
    if values["hierarchical_context_parallel_sizes"] or values["context_parallel_size"] == 1:
        return None
    run = make_run(values)
    return least_traffic(run) if values["cp_comm_type"] == "auto" else run.parallel.context_sizes


def _lr_decay_iters(values: dict[str, Any], check: Check) -> int | None:
    by_tokens = check.staged or counts_tokens(make_run(values).optimizer)
    if by_tokens or (values["train_epochs"] is not None and not values["train_iters"]):
        return None  # the steps of epochs are known once the data is (`config.length`)
    return values["train_iters"]


def _copy_of(name: str) -> Derivation:
    return lambda values, check: values[name]


def _in_run_dir(folder: str) -> Derivation:
    return lambda values, check: os.path.join(values["run_dir"], folder)


DERIVATIONS: tuple[tuple[str, Derivation], ...] = (
    ("num_query_groups", _copy_of("num_attention_heads")),
    ("moe_ffn_hidden_size", lambda values, check: values["num_experts"] and values["ffn_hidden_size"]),
    ("kv_channels", _kv_channels),
    ("rotary_base_seqlen", _copy_of("rotary_training_seqlen")),
    ("max_position_embeddings", lambda values, check: values["seq_length"] if _has_position_table(values) else None),
    ("ranks_per_node", lambda values, check: make_run(values).parallel.node_size),
    ("expert_model_parallel_size", _expert_model_parallel_size),
    ("expert_tensor_parallel_size", _expert_tensor_parallel_size),
    ("sequence_parallel", lambda values, check: make_run(values).parallel.sequence_parallel_size > 1),
    ("hierarchical_context_parallel_sizes", _context_sizes),
    ("overlap_p2p_communication", lambda values, check: make_run(values).parallel.overlaps_p2p),
    ("lr_decay_iters", _lr_decay_iters),
    ("tokenizer_type", _tokenizer_type),
    ("run_dir", lambda values, check: os.path.join("runs", values["name"])),
    ("save", _in_run_dir("checkpoints")),
    ("load", _copy_of("save")),
    ("data_cache_path", _in_run_dir("cache")),
)


def _finetune_begins_with_load(values: dict[str, Any], check: Check) -> None:
    """Megatron's form of pretrained_checkpoint: --finetune --load FOLDER. The run itself resumes from its own
    folder."""
    load, save = values["load"], values["save"]
    if not values["finetune"] or values["pretrained_checkpoint"] is not None or load is None:
        return
    if save is not None and os.path.abspath(load) == os.path.abspath(save):
        return  # a rule complains
    values["pretrained_checkpoint"], values["load"] = load, None
    check.origins["pretrained_checkpoint"] = check.origins.get("load", DEFAULT)
    check.origins["load"] = DERIVED


def _pairs_attend_to_themselves(values: dict[str, Any], check: Check) -> None:
    """The two halves of a pair stand in one row and must not see each other: the log-probability of an answer is that
    of the answer alone."""
    for name in ("reset_attention_mask", "reset_position_ids"):
        if values["dpo"] and not check.said_by_person(name):
            values[name] = True
            check.origins[name] = DERIVED


def _pattern_as_frequency(values: dict[str, Any], check: Check) -> None:
    """A list of MoE layers that says every k-th from the first on is moe_layer_freq k, which the training builds."""
    pattern, layers = values["moe_layer_pattern"], values["num_layers"]
    if pattern is None or {"moe_layer_pattern", "num_layers", "moe_layer_freq"} & check.bad:
        return
    try:
        found = moe_layers(pattern)
    except ValueError:
        return  # a rule complains
    every = found[1:].index(1) + 1 if 1 in found[1:] else 0
    if len(found) == layers and every and found == tuple(int(layer % every == 0) for layer in range(layers)):
        values["moe_layer_pattern"], values["moe_layer_freq"] = None, every
        check.origins["moe_layer_freq"] = check.origins.get("moe_layer_pattern", DEFAULT)
        check.notes.append(f"moe_layer_pattern={pattern}: taken as moe_layer_freq={every}")


SAMPLES = {
    "lr_warmup_samples": "lr_warmup_tokens",
    "lr_decay_samples": "lr_decay_tokens",
    "lr_wsd_decay_samples": "lr_wsd_decay_tokens",
}
"""Lengths of a schedule in samples → the same in tokens."""


def _count_samples_as_tokens(values: dict[str, Any], check: Check) -> None:
    """A schedule by samples is one by tokens: the learning rate of both is the same at each step.

    Megatron-LM's scheduler counts the samples of the steps taken (megatron/training/training.py,
    get_optimizer_param_scheduler); without lr_decay_samples the decay ends with the run.
    """
    if {"seq_length", "train_samples", *SAMPLES} & check.bad or check.staged:
        return
    decays = values["lr_decay_samples"] or values["train_samples"]
    for samples, tokens in SAMPLES.items():
        number = decays if samples == "lr_decay_samples" else values[samples]
        if number is not None and values[tokens] is None:
            values[tokens] = number * values["seq_length"]
            check.origins[tokens] = DERIVED


def _count_samples_as_steps(values: dict[str, Any], check: Check) -> None:
    """train_iters of train_samples: Megatron-LM rounds down."""
    samples, batch = values["train_samples"], values["global_batch_size"]
    if samples is None or {"train_samples", "global_batch_size"} & check.bad or batch < 1:
        return
    if check.said_by_person("train_iters"):
        return  # a rule complains
    values["train_iters"] = samples // batch
    check.origins["train_iters"] = DERIVED


def _replace_values_of_the_preset(values: dict[str, Any], check: Check) -> None:
    """A length that a person gives in another unit stands in place of the preset's."""
    for given, preset in (("train_epochs", "train_iters"), ("lr_warmup_fraction", "lr_warmup_iters")):
        of_preset = check.origins.get(preset, DEFAULT).startswith("preset ")
        if of_preset and values[given] is not None and check.said_by_person(given):
            values[preset] = fields_by_name()[preset].default
            check.origins[preset] = DERIVED


def _drop_sequence_parallel_without_tp(values: dict[str, Any], check: Check) -> None:
    if values["sequence_parallel"] and values["tensor_model_parallel_size"] == 1:
        values["sequence_parallel"] = False
        origin = check.origins.get("sequence_parallel", DEFAULT)
        if not origin.startswith("preset "):
            check.notes.append(
                f"sequence_parallel ({origin}) has no effect with tensor_model_parallel_size=1: turned off"
            )
        check.origins["sequence_parallel"] = DERIVED


def _say_that_groups_need_interleaving(values: dict[str, Any], check: Check) -> None:
    """megatron-core reads the size of a group in the interleaved schedule only."""
    if (
        values[GROUP] is not None
        and values["num_virtual_stages_per_pipeline_rank"] == 1
        and check.said_by_person(GROUP)
    ):
        check.notes.append(
            f"{GROUP} ({check.origins[GROUP]}) has no effect: one virtual stage a rank is not interleaved"
        )


GROUP = "microbatch_group_size_per_virtual_pipeline_stage"
_OF_THE_BATCH = (
    *("global_batch_size", "micro_batch_size", "world_size", "tensor_model_parallel_size"),
    *("pipeline_model_parallel_size", "context_parallel_size", "num_virtual_stages_per_pipeline_rank", GROUP),
)


def _raise_global_batch(values: dict[str, Any], check: Check) -> None:
    """A batch that nobody asked for grows to what the ranks need; one that a person gave is never touched."""
    if check.said_by_person("global_batch_size") or check.bad.intersection(_OF_THE_BATCH):
        return
    model_ranks = (
        values["tensor_model_parallel_size"] * values["pipeline_model_parallel_size"] * values["context_parallel_size"]
    )
    if min(model_ranks, values["micro_batch_size"]) < 1 or values["world_size"] % model_ranks:
        return
    unit = values["micro_batch_size"] * (values["world_size"] // model_ranks)
    given, stages = values["global_batch_size"], values["pipeline_model_parallel_size"]
    if unit < 1 or given < 1:
        return
    count = -(-given // unit)
    if values["num_virtual_stages_per_pipeline_rank"] > 1:
        count = next_count(count, max(values[GROUP] or 0, stages), stages)
    if count * unit == given:
        return
    values["global_batch_size"] = count * unit
    check.notes.append(
        f"global_batch_size={given} ({check.origins.get('global_batch_size', DEFAULT)}) does not divide by these "
        f"ranks: set to {values['global_batch_size']}; --global-batch-size sets it"
    )
    check.origins["global_batch_size"] = DERIVED
