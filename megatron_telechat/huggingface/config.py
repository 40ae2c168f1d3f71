"""config.json of a Hugging Face folder <-> ModelConfig.

Values come from the checkpoint's own config.json; where a key is absent, from the defaults of
the class that would read it (TelechatConfig: vocab_size 160256, layer_norm_epsilon 1e-5, …),
because that is what the published modelling file computes with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_telechat.config.architecture import comparable
from megatron_telechat.config.schema import ModelConfig
from megatron_telechat.errors import CheckpointError, Problem

TELECHAT, MIXTRAL, QWEN3_MOE = "telechat", "mixtral", "qwen3_moe"
_TORCH_DTYPE = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

# No config.json of TeleChat2-39B-A12B is public; these are the names in use for each quantity.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "expert_num", "num_moe_experts")
_TOPK = ("num_experts_per_tok", "moe_router_topk", "moe_topk", "num_experts_chosen", "top_k", "topk")
_EXPERT_FFN = ("moe_intermediate_size", "moe_ffn_hidden_size", "expert_ffn_hidden_size")
_SHARED_FFN = ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size")
_FREQUENCY = ("moe_layer_freq", "decoder_sparse_step")
_AUX = ("router_aux_loss_coef", "moe_aux_loss_coeff", "aux_loss_factor")


class _Reader:
    """Typed access that collects every complaint."""

    def __init__(self, config: Mapping[str, Any], where: str):
        self.config = config
        self.where = where
        self.problems: list[Problem] = []

    def complain(self, what: str, fix: str = "") -> None:
        self.problems.append(Problem(what, self.where, fix))

    def whole(self, *names: str, default: Any = None) -> Any:
        """A whole number above 0 under the first of these names that is there and not null."""
        return self._number(names, default, lambda v: isinstance(v, int) and v > 0, "an integer above 0")

    def real(self, *names: str, default: Any = None) -> Any:
        value = self._number(names, default, lambda v: isinstance(v, (int, float)) and v >= 0, "a number from 0")
        return None if value is None else float(value)

    def _number(self, names: tuple[str, ...], default: Any, good: Any, wanted: str) -> Any:
        for name in names:
            value = self.config.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not good(value):
                self.complain(f"{name} is {value!r}, not {wanted}")
                return default
            return value
        return default

    def word(self, name: str, words: tuple[str, ...]) -> str:
        """One of these words; the first where the name is not there."""
        value = self.config.get(name, words[0])
        if value not in words:
            self.complain(f"{name} is {value!r}, not {' or '.join(words)}")
            return words[0]
        return value

    def switch(self, name: str, default: bool) -> bool:
        value = self.config.get(name, default)
        if not isinstance(value, bool):
            self.complain(f"{name} is {value!r}, not true or false")
            return default
        return value

    def require(self, value: Any, *names: str) -> None:
        if value is None:
            self.complain(f"{names[0]} is missing", f'add "{names[0]}" to config.json')


def model_config_from_hf(
    config: Mapping[str, Any], where: str = "config.json", tensor_names: Mapping[str, Any] = {}
) -> ModelConfig:
    """The architecture that a config.json describes.

    Args:
        config: the parsed file.
        where: its path, for messages.
        tensor_names: names of the weights; tell a MoE model whose config.json does not.

    Raises:
        CheckpointError: another or an unsupported architecture, or values that do not go together;
            all of them at once.
    """
    kind = config.get("model_type")
    if "mup_scale_factor" in config or "transformer.wte.weight" in tensor_names:
        raise CheckpointError(
            "this is TeleChat-52B, another architecture (GPT-2 names, fused c_attn, muP scaling)",
            where,
            "use a TeleChat2 checkpoint: 3B, 7B, 35B, 115B or 39B-A12B",
        )
    if kind not in (TELECHAT, "telechat2", MIXTRAL, QWEN3_MOE):
        missing = _not_built(config)
        because = f"; not built here: {', '.join(missing)}" if missing else ""
        raise CheckpointError(
            f"model_type is {kind!r}, which is not imported{because}",
            where,
            "supported are telechat (TeleChat2), mixtral, qwen3_moe; docs/checkpoints.md says what others would need",
        )
    reader = _Reader(config, where)
    read = {MIXTRAL: _mixtral, QWEN3_MOE: _qwen3_moe}.get(kind)
    values = _telechat(reader, tensor_names) if read is None else read(reader)
    if not reader.problems:
        _check_shapes(reader, values)
    if reader.problems:
        raise CheckpointError(reader.problems)
    return ModelConfig(**values)


def _not_built(config: Mapping[str, Any]) -> list[str]:
    """What other published models have and the layers that are trained here have not, as far as a ``config.json`` says
    it."""

    def number(name: str) -> float:
        value = config.get(name)
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else 0

    mixture = any(number(name) > 1 for name in ("num_experts", "n_routed_experts", "num_local_experts"))
    dense, scale = number("first_k_dense_replace"), number("routed_scaling_factor")
    applies = {
        f"multi-latent attention (kv_lora_rank {number('kv_lora_rank'):g})": number("kv_lora_rank") > 0,
        f"dense layers before those of experts (first_k_dense_replace {dense:g})": dense > 0,
        "single layers without experts (mlp_only_layers)": bool(config.get("mlp_only_layers")),
        f"experts chosen by groups (n_group {number('n_group'):g})": number("n_group") > 1,
        "sigmoid scores of the router (scoring_func)": config.get("scoring_func") == "sigmoid",
        "probabilities of the chosen experts that do not sum to 1 (norm_topk_prob false)": mixture
        and config.get("norm_topk_prob") is False,
        f"a factor on the output of the experts (routed_scaling_factor {scale:g})": scale not in (0, 1),
        "a gate on the shared expert": number("shared_expert_intermediate_size") > 0,
        "biases on queries, keys and values": config.get("qkv_bias") is True or config.get("attention_bias") is True,
        "tied embeddings": config.get("tie_word_embeddings") is True,
    }
    return [text for text, is_so in applies.items() if is_so]


def _telechat(reader: _Reader, names: Mapping[str, Any]) -> dict[str, Any]:
    config = reader.config
    if config.get("embed_layernorm") or "transformer.word_embeddings_layernorm.weight" in names:
        reader.complain(
            "embed_layernorm: a norm after the embedding is not supported",
            "no published TeleChat2 has one; use one of those",
        )
    if config.get("tie_word_embeddings") or "word_embeddings.weight" in names:
        reader.complain(
            "the embeddings are tied (TeleChat-7B of the first generation), which is not supported",
            "use TeleChat2-7B, or untie them: save lm_head.weight and set tie_word_embeddings to false",
        )
    if config.get("apply_residual_connection_post_layernorm"):
        reader.complain("apply_residual_connection_post_layernorm is not supported")
    hidden = reader.whole("n_embed", "hidden_size", default=4096)
    heads = reader.whole("n_head", "num_attention_heads", default=32)
    # null, which the published class cannot compute with, is how a model without scaling is written
    unscaled = "training_seqlen" in config and config["training_seqlen"] is None
    training_seqlen = None if unscaled else reader.whole("training_seqlen", default=8192)
    values: dict[str, Any] = {
        "name": "telechat2",
        "architecture": "telechat2",
        "num_layers": reader.whole("n_layer", "num_hidden_layers", default=30),
        "hidden_size": hidden,
        "ffn_hidden_size": reader.whole("ffn_hidden_size", "intermediate_size", default=12288),
        "num_attention_heads": heads,
        "num_query_groups": reader.whole("num_key_value_heads", default=heads),
        "kv_channels": reader.whole("head_dim"),
        "vocab_size": reader.whole("vocab_size", default=160256),
        "norm_epsilon": reader.real("layer_norm_epsilon", default=1e-5),
        "rotary_base": _rope_theta(reader),
        "rotary_training_seqlen": training_seqlen,
        "rotary_base_seqlen": reader.whole("base_seqlen", default=training_seqlen),
        "rotary_table_dtype": reader.word("rotary_table_dtype", ("fp32", "fp16")),
        "attention_output_bias": reader.switch("attention_output_bias", default=True),
        "mlp_output_bias": reader.switch("mlp_output_bias", default=True),
        "hidden_dropout": reader.real("hidden_dropout", default=0.0),
        "attention_dropout": reader.real("attention_dropout", default=0.0),
        "init_method_std": reader.real("initializer_range", default=0.02),
    }
    experts = reader.whole(*_EXPERTS) or _experts_among(names)
    if experts is not None and experts > 1:
        topk = reader.whole(*_TOPK)
        reader.require(topk, *_TOPK)
        values.update(
            num_experts=experts,
            moe_router_topk=topk or 1,
            moe_ffn_hidden_size=reader.whole(*_EXPERT_FFN, default=values["ffn_hidden_size"]),
            moe_layer_freq=reader.whole(*_FREQUENCY, default=1),
            moe_aux_loss_coeff=reader.real(*_AUX, default=0.01),
            moe_shared_expert_intermediate_size=reader.whole(*_SHARED_FFN),
        )
    return values


def _experts_among(names: Mapping[str, Any]) -> int | None:
    marker = ".mlp.local_experts."
    numbers = {name.split(marker)[1].split(".")[0] for name in names if marker in name}
    return len(numbers) or None


def _require_full_attention(reader: _Reader) -> None:
    window, longest = reader.config.get("sliding_window"), reader.config.get("max_position_embeddings")
    if isinstance(window, int) and (not isinstance(longest, int) or window < longest):
        reader.complain(f"sliding_window {window} is not supported", "only full causal attention is computed")


def _require_silu(reader: _Reader) -> None:
    activation = reader.config.get("hidden_act", "silu")
    if activation != "silu":
        reader.complain(f"hidden_act is {activation!r}, only silu is supported")


def _mixtral(reader: _Reader) -> dict[str, Any]:
    config = reader.config
    if config.get("tie_word_embeddings"):
        reader.complain("tie_word_embeddings is not supported")
    _require_full_attention(reader)
    _require_silu(reader)
    ffn = reader.whole("intermediate_size", default=14336)
    heads = reader.whole("num_attention_heads", default=32)
    return {
        "name": "mixtral",
        "architecture": "mixtral",
        "num_layers": reader.whole("num_hidden_layers", default=32),
        "hidden_size": reader.whole("hidden_size", default=4096),
        "ffn_hidden_size": ffn,
        "moe_ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "num_query_groups": reader.whole(
            "num_key_value_heads", default=8 if "num_key_value_heads" not in config else heads
        ),
        "kv_channels": reader.whole("head_dim"),
        "vocab_size": reader.whole("vocab_size", default=32000),
        "norm_epsilon": reader.real("rms_norm_eps", default=1e-5),
        "rotary_base": _rope_theta(reader, 1e6),
        "attention_output_bias": False,
        "mlp_output_bias": False,
        "attention_dropout": reader.real("attention_dropout", default=0.0),
        "init_method_std": reader.real("initializer_range", default=0.02),
        "num_experts": reader.whole("num_local_experts", default=8),
        "moe_router_topk": reader.whole("num_experts_per_tok", default=2),
        # the coefficient belongs to transformers' formula
        "moe_aux_loss_coeff": reader.real("router_aux_loss_coef", default=0.001),
        "moe_aux_loss_formula": "hf",
    }


def _qwen3_moe(reader: _Reader) -> dict[str, Any]:
    """The defaults are those of transformers' Qwen3MoeConfig."""
    config = {"norm_topk_prob": False, **reader.config}
    for missing in _not_built(config):
        reader.complain(f"not built here: {missing}")
    _require_silu(reader)
    if reader.switch("use_sliding_window", default=False):
        _require_full_attention(reader)
    if config.get("decoder_sparse_step", 1) != 1:
        reader.complain(f"decoder_sparse_step {config['decoder_sparse_step']}: layers without experts are not mapped")
    return {
        "name": "qwen3-moe",
        "architecture": QWEN3_MOE,
        "num_layers": reader.whole("num_hidden_layers", default=24),
        "hidden_size": reader.whole("hidden_size", default=2048),
        "ffn_hidden_size": reader.whole("intermediate_size", default=6144),
        "moe_ffn_hidden_size": reader.whole("moe_intermediate_size", default=768),
        "num_attention_heads": reader.whole("num_attention_heads", default=32),
        "num_query_groups": reader.whole("num_key_value_heads", default=4),
        "kv_channels": reader.whole("head_dim"),
        "vocab_size": reader.whole("vocab_size", default=151936),
        "norm_epsilon": reader.real("rms_norm_eps", default=1e-6),
        "qk_layernorm": True,
        "rotary_base": _rope_theta(reader),
        "attention_output_bias": False,
        "mlp_output_bias": False,
        "attention_dropout": reader.real("attention_dropout", default=0.0),
        "init_method_std": reader.real("initializer_range", default=0.02),
        "num_experts": reader.whole("num_experts", "num_local_experts", default=128),
        "moe_router_topk": reader.whole("num_experts_per_tok", default=8),
        "moe_aux_loss_coeff": reader.real("router_aux_loss_coef", default=0.001),
        "moe_aux_loss_formula": "hf",
    }


def _rope_theta(reader: _Reader, default: float = 10000.0) -> float:
    """rope_theta, in its own key or, as newer files write it, in rope_parameters.

    A rope_scaling with factor 1 changes nothing. Another one is not what the published TeleChat2
    file computes (it scales by training_seqlen and base_seqlen), so it is refused, not ignored.
    """
    for section in ("rope_scaling", "rope_parameters"):
        scaling = reader.config.get(section)
        if not isinstance(scaling, dict):
            continue
        if scaling.get("factor", 1.0) not in (None, 1, 1.0):
            reader.complain(
                f"{section} has the factor {scaling['factor']!r}, which is not supported", f"remove {section}"
            )
        if isinstance(scaling.get("rope_theta"), (int, float)):
            default = float(scaling["rope_theta"])
    return reader.real("rope_theta", default=default)


def _check_shapes(reader: _Reader, values: Mapping[str, Any]) -> None:
    heads, groups, hidden = values["num_attention_heads"], values["num_query_groups"], values["hidden_size"]
    if values.get("kv_channels") is None and hidden % heads:
        reader.complain(f"hidden_size {hidden} does not divide by {heads} heads")
    elif (values.get("kv_channels") or hidden // heads) % 2:
        reader.complain(f"the head width {values.get('kv_channels') or hidden // heads} is odd: no rotary embedding")
    if heads % groups:
        reader.complain(f"{heads} heads do not divide by num_key_value_heads {groups}")
    experts, topk = values.get("num_experts"), values.get("moe_router_topk")
    if experts is not None and topk > experts:
        reader.complain(f"{topk} experts per token of {experts}")
    elif topk == 1:
        reader.complain(
            "one expert per token is not supported: the softmax over one chosen logit is 1, and its router learns "
            "nothing",
            "a mixture with two experts per token or more",
        )


def hf_config_of(
    model: ModelConfig, precision: str, tokens: Mapping[str, int] = {}, seq_length: int | None = None
) -> dict[str, Any]:
    """A config.json for a model that did not come from a Hugging Face folder.

    TelechatConfig's names; for MoE the fields that docs/checkpoints.md defines, because no public
    TeleChat2-MoE config exists. ``precision`` is bf16, fp16 or fp32; ``tokens`` e.g. eos_token_id; ``seq_length``: of
    the samples that the model was trained with last.
    """
    if model.architecture != "telechat2":
        return _llama_config(model, precision, tokens, seq_length)
    return {
        "architectures": ["TelechatForCausalLM"],
        "model_type": TELECHAT,
        **_telechat_shape(model),
        **_positions(model, seq_length),
        "apply_residual_connection_post_layernorm": False,
        "embed_layernorm": False,
        "tie_word_embeddings": False,
        "flash_attn": False,
        "use_cache": True,
        "torch_dtype": _TORCH_DTYPE[precision],
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, **tokens},
    }


def _telechat_shape(model: ModelConfig) -> dict[str, Any]:
    """The architecture but positions. What the published class does not know is written where it differs from it."""
    config: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        # all layers may be of experts, and the dense width left out
        "ffn_hidden_size": model.ffn_hidden_size or model.moe_ffn_hidden_size,
        "layer_norm_epsilon": model.norm_epsilon,
        "initializer_range": model.init_method_std,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
    }
    if model.head_dim * model.num_attention_heads != model.hidden_size:
        config["head_dim"] = model.head_dim
    biases = ("attention_output_bias", "mlp_output_bias")
    config.update({name: False for name in biases if not getattr(model, name)})
    if model.rotary_table_dtype != "fp32":
        config["rotary_table_dtype"] = model.rotary_table_dtype
    if model.is_moe:
        config.update(
            num_experts=model.num_experts,
            num_experts_per_tok=model.moe_router_topk,
            moe_intermediate_size=model.moe_ffn_hidden_size or model.ffn_hidden_size,
            moe_layer_freq=model.moe_layer_freq,
            router_aux_loss_coef=model.moe_aux_loss_coeff,
            shared_expert_intermediate_size=model.moe_shared_expert_intermediate_size,
        )
    return config


_CLASS = "MegatronTelechat"
_OTHER_SPELLINGS = ("n_embed", "num_hidden_layers", "num_attention_heads", "intermediate_size", "rms_norm_eps")


def with_our_modeling(config: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
    """A config.json of TeleChat2 that our modelling file reads: every quantity under the one name that it knows.

    A dense model keeps the architecture's name that vLLM knows. A model of experts gets ours, so that no program that
    knows dense ones only takes it for one of them.
    """
    dropped = (*_OTHER_SPELLINGS, "rope_scaling", "rope_parameters")
    kept = {name: value for name, value in config.items() if name not in dropped}
    modeling = f"modeling_megatron_telechat.{_CLASS}"
    return {
        **kept,
        **_telechat_shape(model),
        **_positions(model, None),
        "model_type": TELECHAT,
        "architectures": [f"{_CLASS}ForCausalLM" if model.is_moe else "TeleChat2ForCausalLM"],
        "rotary_table_dtype": model.rotary_table_dtype,
        "auto_map": {
            **(config.get("auto_map") or {}),
            "AutoConfig": f"configuration_megatron_telechat.{_CLASS}Config",
            "AutoModel": f"{modeling}Model",
            "AutoModelForCausalLM": f"{modeling}ForCausalLM",
        },
    }


def _positions(model: ModelConfig, seq_length: int | None) -> dict[str, Any]:
    """What a config.json says of positions and lengths."""
    values: dict[str, Any] = {"rope_theta": model.rotary_base}
    if model.architecture == "telechat2":
        values["training_seqlen"] = model.rotary_training_seqlen
        values["base_seqlen"] = model.rotary_base_seqlen or model.rotary_training_seqlen
        if seq_length is not None:
            values["seq_length"] = seq_length
    return values


def with_reached_positions(config: Mapping[str, Any], model: ModelConfig, seq_length: int) -> dict[str, Any]:
    """A config.json that came with the first weights, as it is after the run has changed lengths or rotary base."""
    changed = {**config, **_positions(model, seq_length)}
    section = config.get("rope_parameters")
    if isinstance(section, dict) and "rope_theta" in section:
        changed["rope_parameters"] = {**section, "rope_theta": model.rotary_base}
    return changed


def _llama_config(
    model: ModelConfig, precision: str, tokens: Mapping[str, int], seq_length: int | None
) -> dict[str, Any]:
    """Of Mixtral and of Qwen3-MoE, which have one set of names but for the experts."""
    width = model.moe_ffn_hidden_size or model.ffn_hidden_size
    if model.architecture == MIXTRAL:
        family: dict[str, Any] = {
            "architectures": ["MixtralForCausalLM"],
            "intermediate_size": width,
            "num_local_experts": model.num_experts,
            "sliding_window": None,
            **{"bos_token_id": 1, "eos_token_id": 2, **tokens},
        }
    else:
        family = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "intermediate_size": model.ffn_hidden_size or width,
            "moe_intermediate_size": width,
            "num_experts": model.num_experts,
            "norm_topk_prob": True,
            **tokens,
        }
    # without it transformers takes a number of its own, 131,072 for a Mixtral
    longest = {} if seq_length is None else {"max_position_embeddings": seq_length}
    return {
        "model_type": model.architecture,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rotary_base,
        "num_experts_per_tok": model.moe_router_topk,
        "router_aux_loss_coef": model.moe_aux_loss_coeff,
        "initializer_range": model.init_method_std,
        "attention_dropout": model.attention_dropout,
        "tie_word_embeddings": False,
        "torch_dtype": _TORCH_DTYPE[precision],
        **longest,
        **family,
    }


POSITIONS = ("rotary_base", "rotary_training_seqlen", "rotary_base_seqlen")
"""Fields of the architecture that a run may change on its way."""


def config_differences(model: ModelConfig, template: ModelConfig) -> dict[str, str]:
    """What of the architecture differs: field → ``field: ours, theirs``."""
    ours, theirs = comparable(model), comparable(template)
    return {
        name: f"{name}: {ours[name]} in the checkpoint, {theirs[name]} in config.json"
        for name in ours
        if ours[name] != theirs[name]
    }
