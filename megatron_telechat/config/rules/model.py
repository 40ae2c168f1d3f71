"""Rules of the architecture."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_telechat.config.fields import fields_by_name, values_of
from megatron_telechat.config.layer_pattern import moe_layers
from megatron_telechat.config.origins import Check, Rule, flag
from megatron_telechat.errors import Problem


def heads_divide_hidden(check: Check) -> Iterator[Problem]:
    """num_attention_heads divides hidden_size unless kv_channels gives the width of a head."""
    hidden, heads = check.take("hidden_size", "num_attention_heads")
    check.take("kv_channels")
    if hidden % heads and not check.said("kv_channels"):
        yield check.problem(
            f"hidden_size={hidden} does not divide by num_attention_heads={heads}",
            "hidden_size",
            "num_attention_heads",
            fix="a number of heads that divides the width, or --kv-channels for the width of a head",
        )


def groups_divide_heads(check: Check) -> Iterator[Problem]:
    """num_query_groups divides num_attention_heads."""
    heads, groups = check.take("num_attention_heads", "num_query_groups")
    if groups is not None and heads % groups:
        yield check.problem(
            f"num_query_groups={groups} does not divide num_attention_heads={heads}",
            "num_query_groups",
            "num_attention_heads",
            fix=flag("num_query_groups", nearest_divisor(heads, groups)),
        )


def head_dim_is_even(check: Check) -> Iterator[Problem]:
    """The rotary embedding pairs channels, so a head has an even width."""
    head = check.take("kv_channels")
    check.take("position_embedding_type")
    if head is not None and head % 2 and check.run.model.rotates:
        yield check.problem(
            f"a head {head} wide cannot be rotated: the rotary embedding pairs its channels",
            "kv_channels",
            fix=flag("kv_channels", head + 1),
        )


def ntk_scaling_has_channels(check: Check) -> Iterator[Problem]:
    """NTK-aware scaling raises a factor to d / (d - 2)."""
    head, training = check.take("kv_channels", "rotary_training_seqlen")
    if head == 2 and training is not None:
        yield check.problem(
            "a head 2 wide has one rotary frequency, and NTK-aware scaling (rotary_training_seqlen) needs two",
            "kv_channels",
            "rotary_training_seqlen",
            fix=f"{flag('kv_channels', 4)}, or --rotary-training-seqlen none",
        )


def dense_ffn_given(check: Check) -> Iterator[Problem]:
    """Dense layers need ffn_hidden_size."""
    width = check.take("ffn_hidden_size")
    if width == 0 and has_dense_layers(check):
        yield check.problem(
            "ffn_hidden_size is not given, and the model has dense layers", "ffn_hidden_size", fix="--ffn-hidden-size N"
        )


def expert_ffn_given(check: Check) -> Iterator[Problem]:
    """Experts need moe_ffn_hidden_size."""
    width, experts = check.take("moe_ffn_hidden_size", "num_experts")
    check.take("ffn_hidden_size")
    if experts is not None and not width:
        yield check.problem(
            "moe_ffn_hidden_size is not given, and the model has experts",
            "moe_ffn_hidden_size",
            fix="--moe-ffn-hidden-size N",
        )


def has_dense_layers(check: Check) -> bool:
    """Whether any layer of the model is dense."""
    check.take("num_experts", "moe_layer_freq", "moe_layer_pattern")
    return not all(check.run.model.layer_is_moe(layer) for layer in range(check.take("num_layers")))


def pattern_is_one(check: Check) -> Iterator[Problem]:
    """moe_layer_pattern is a list of 0 and 1 with one number for each layer."""
    pattern, layers = check.take("moe_layer_pattern", "num_layers")
    if pattern is None:
        return
    try:
        length = len(moe_layers(pattern))
    except ValueError as error:
        yield check.one(
            f"moe_layer_pattern: {error}", "moe_layer_pattern", fix="--moe-layer-freq N, or a list such as [0]*3+[1]*27"
        )
        return
    if length != layers:
        yield check.one(
            f"moe_layer_pattern={pattern} is of {length} layers, the model has num_layers={layers}",
            "moe_layer_pattern",
            fix="a list with one number for each layer",
        )


def window_is_one(check: Check) -> Iterator[Problem]:
    """A window has a number of earlier tokens, and its exceptions are a frequency or a list with an entry a layer."""
    window, exceptions, layers = check.take("window_size", "window_attn_skip_freq", "num_layers")
    if window is not None and check.run.model.window is None:
        yield check.one(f"window_size={window} is not a number of earlier tokens", "window_size", fix="127,0, for 128")
    if exceptions is None or exceptions.isdigit() and int(exceptions) > 0:
        return
    try:
        length = len(moe_layers(exceptions))
    except ValueError as error:
        length, layers = -1, f"a list: {error}"
    if length != layers:
        yield check.one(
            f"window_attn_skip_freq={exceptions} is not N or a list with one number for each of {layers} layers",
            "window_attn_skip_freq",
            fix="N: every N-th layer attends to all tokens",
        )


def topk_within_experts(check: Check) -> Iterator[Problem]:
    """A token is sent to at most num_experts experts."""
    topk, experts = check.take("moe_router_topk", "num_experts")
    if experts is not None and topk > experts:
        yield check.problem(
            f"moe_router_topk={topk} is more than num_experts={experts}",
            "moe_router_topk",
            "num_experts",
            fix=f"{flag('moe_router_topk', experts)} at most"
            if experts > 1
            else "leave --num-experts out for a dense model",
        )


def freq_within_layers(check: Check) -> Iterator[Problem]:
    """moe_layer_freq is at most num_layers; else only the first layer would have experts."""
    freq, layers, experts = check.take("moe_layer_freq", "num_layers", "num_experts")
    if experts is not None and freq > layers:
        yield check.problem(
            f"moe_layer_freq={freq} is more than num_layers={layers}: only the first layer would have experts",
            "moe_layer_freq",
            "num_layers",
            fix=flag("moe_layer_freq", 1),
        )


def experts_for_expert_flags(check: Check) -> Iterator[Problem]:
    """A forgotten --num-experts would silently train a dense model."""
    if check.take("num_experts") is not None:
        return
    values = values_of(check.run)
    for name in _NEED_EXPERTS:
        default = fields_by_name()[name].default
        if name not in check.bad and check.said_by_person(name) and values[name] not in (default, None, 1):
            yield check.problem(
                f"{name}={values[name]} without num_experts: the model is dense",
                name,
                fix=f"--num-experts N, or drop {fields_by_name()[name].flag}",
            )


_NEED_EXPERTS = (
    "moe_ffn_hidden_size",
    "moe_router_topk",
    "moe_layer_freq",
    "moe_layer_pattern",
    "moe_shared_expert_intermediate_size",
    "moe_aux_loss_coeff",
    "moe_aux_loss_formula",
    "moe_z_loss_coeff",
    "expert_model_parallel_size",
    "moe_input_chunks",
    "moe_trace",
    "moe_routing_record",
    "moe_routing_replay",
)


def rotary_base_goes_with_training(check: Check) -> Iterator[Problem]:
    """rotary_base_seqlen has no effect without rotary_training_seqlen."""
    training, base = check.take("rotary_training_seqlen", "rotary_base_seqlen")
    if base is not None and training is None:
        yield check.problem(
            f"rotary_base_seqlen={base} without rotary_training_seqlen has no effect",
            "rotary_base_seqlen",
            fix=f"{flag('rotary_training_seqlen', base)}, or drop --rotary-base-seqlen",
        )


def mixtures_of_transformers_are_theirs(check: Check) -> Iterator[Problem]:
    """Mixtral and Qwen3-MoE have no biases and no NTK-aware scaling; the schema's defaults are TeleChat2's."""
    family = check.take("architecture")
    if family == "telechat2":
        return
    if check.take("num_experts") is None:
        fix = "--num-experts 8, or --preset mixtral-8x7b" if family == "mixtral" else "--num-experts 128"
        yield check.problem(f"architecture={family} without num_experts", "architecture", fix=fix)
    for name in ("attention_output_bias", "mlp_output_bias"):
        if check.take(name):
            yield check.problem(
                f"{name} is on, but architecture={family} has no biases", name, "architecture", fix=flag(name, False)
            )
    if family == "qwen3_moe" and not check.take("qk_layernorm"):
        yield check.problem(
            "qk_layernorm is off, but architecture=qwen3_moe has a norm on queries and keys",
            "qk_layernorm",
            "architecture",
            fix="--qk-layernorm",
        )
    if check.take("rotary_training_seqlen") is not None:
        yield check.problem(
            f"rotary_training_seqlen is given, but architecture={family} has no NTK-aware scaling",
            "rotary_training_seqlen",
            "architecture",
            fix="--rotary-training-seqlen none",
        )


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of ``number`` closest to ``wanted``."""
    return (
        min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - wanted))
        if number < 10**6
        else 1
    )


RULES: tuple[Rule, ...] = (
    pattern_is_one,
    window_is_one,
    heads_divide_hidden,
    groups_divide_heads,
    head_dim_is_even,
    ntk_scaling_has_channels,
    dense_ffn_given,
    expert_ffn_given,
    topk_within_experts,
    freq_within_layers,
    experts_for_expert_flags,
    rotary_base_goes_with_training,
    mixtures_of_transformers_are_theirs,
)
