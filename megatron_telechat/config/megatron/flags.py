"""What becomes of a flag of Megatron-LM that is not one of ours: another name, a note, or a problem with a way out."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_telechat.config.megatron.answers import Alias, Answer, LayersPerVirtualStage, Refused, UnevenSplit
from megatron_telechat.config.megatron.table import BLOCKS

ALIASES: Mapping[str, Answer] = {
    # names of other releases, and names that people type
    "expert-parallel": Alias(("expert_model_parallel_size",)),
    "expert-parallel-size": Alias(("expert_model_parallel_size",)),
    "tensor-parallel": Alias(("tensor_model_parallel_size",)),
    "tensor-parallel-size": Alias(("tensor_model_parallel_size",)),
    "model-parallel-size": Alias(("tensor_model_parallel_size",)),
    "pipeline-parallel": Alias(("pipeline_model_parallel_size",)),
    "pipeline-parallel-size": Alias(("pipeline_model_parallel_size",)),
    "context-parallel": Alias(("context_parallel_size",)),
    "virtual-pipeline-model-parallel-size": Alias(("num_virtual_stages_per_pipeline_rank",)),
    "microbatch-group-size-per-vp-stage": Alias(("microbatch_group_size_per_virtual_pipeline_stage",)),
    "num-layers-per-virtual-pipeline-stage": LayersPerVirtualStage(),
    "account-for-embedding-in-pipeline-split": UnevenSplit("embedding"),
    "account-for-loss-in-pipeline-split": UnevenSplit("loss"),
    "decoder-first-pipeline-num-layers": UnevenSplit("first"),
    "decoder-last-pipeline-num-layers": UnevenSplit("last"),
    "num-layers-in-first-pipeline-stage": UnevenSplit("first"),
    "num-layers-in-last-pipeline-stage": UnevenSplit("last"),
    "num-moe-experts": Alias(("num_experts",)),
    "encoder-num-layers": Alias(("num_layers",)),
    "layernorm-epsilon": Alias(("norm_epsilon",)),
    "padded-vocab-size": Alias(("vocab_size",)),
    "batch-size": Alias(("micro_batch_size",)),
    "overlap-p2p-comm": Alias(("overlap_p2p_communication",)),
    "ckpt-step": Alias(("load_step",)),
    "load-iteration": Alias(("load_step",)),
    # flags that stand for a value
    "bf16": Alias(("precision",), "bf16"),
    "fp16": Alias(("precision",), "fp16"),
    "fp32": Alias(("precision",), "fp32"),
    "swiglu": Alias(("activation",), "swiglu"),
    "squared-relu": Alias(("activation",), "squared_relu"),
    "quick-geglu": Alias(("activation",), "quick_geglu"),
    "openai-gelu": Alias(("activation",), "gelu"),
    "use-rotary-position-embeddings": Alias(("position_embedding_type",), "rope"),
    "disable-bias-linear": Alias(("add_bias_linear", "attention_output_bias", "mlp_output_bias"), "false"),
    "recompute-activations": Alias(("recompute_granularity",), "selective"),
    "checkpoint-activations": Alias(("recompute_granularity",), "full"),
    "async-save": Alias(("checkpoint_mode",), "async"),
    "deterministic-mode": Alias(("deterministic",), "true"),
    "tensorboard-dir": Alias(("tensorboard",), "true", but="events go to tensorboard/ in the run folder"),
}

WORDS: Mapping[str, Mapping[str, str]] = {
    "tokenizer_type": {
        "Llama2Tokenizer": "SentencePieceTokenizer",
        "GPTSentencePieceTokenizer": "SentencePieceTokenizer",
        "MistralTokenizer": "TikTokenizer",
        "Llama3Tokenizer": "TikTokenizer",
        "AutoTokenizer": "HuggingFaceTokenizer",
        "PretrainedFromHF": "HuggingFaceTokenizer",
        "HFTokenizer": "HuggingFaceTokenizer",
    },
    "lr_decay_style": {"wsd": "WSD"},
    "lr_wsd_decay_style": {"minus-sqrt": "minus_sqrt"},
    "precision": {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "half": "fp16", "float": "fp32"},
}
"""Field → Megatron's and other people's words for its values → ours."""

_GATHER = Refused(
    "every rank would hold the keys and values of all ranks at once; p2p sends the same rows only to the ranks that "
    "need them, and keeps none longer than it uses them",
    "--cp-comm-type p2p",
)
_SCALED = Refused(
    "without a scale for each tensor the moments of small gradients are below the range of this type; bf16 has the "
    "range of fp32",
    "bf16",
)
REFUSED_WORDS: Mapping[str, Mapping[str, Refused]] = {
    "cp_comm_type": {"all_gather": _GATHER, "allgather": _GATHER},
    "recompute_modules": {
        "moe_act": Refused("the experts' activation alone is not recomputed", "--recompute-modules moe"),
        "mla_up_proj": Refused("there is no multi-latent attention", "--recompute-modules core_attn"),
        "shared_experts": Refused("the shared expert is recomputed with the routed ones", "--recompute-modules moe"),
    },
    "exp_avg_dtype": {"fp16": _SCALED, "fp8": _SCALED},
    "exp_avg_sq_dtype": {"fp16": _SCALED, "fp8": _SCALED},
}
"""Field → Megatron's words for values that are not here."""

ONE_FOR_ALL_LAYERS: Mapping[str, Refused] = {
    "cp_comm_type": Refused("all layers exchange in the same way", "--cp-comm-type with one value"),
}
"""Field of one value, for which Megatron-LM takes a value for each layer."""


def _answers() -> dict[str, Answer]:
    out = dict(ALIASES)
    for answer, names in BLOCKS:
        for name in names.split():
            assert name not in out, f"{name} has two answers"
            out[name] = answer
    return out


ANSWERS: Mapping[str, Answer] = _answers()
"""Flag, without its two hyphens and with hyphens inside → answer."""
