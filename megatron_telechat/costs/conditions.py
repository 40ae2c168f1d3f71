"""What measured times of a layer depend on."""

from __future__ import annotations

from typing import Any

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.activations import loss_chunks, tokens_of
from megatron_telechat.costs.devices import DeviceSpec


def conditions(run: RunConfig) -> dict[str, Any]:
    """What the times of a layer depend on, as a device file keeps it beside measured ones."""
    model, parallel, training = run.model, run.parallel, run.training
    expert, expert_tensor = parallel.expert_sizes
    tokens = tokens_of(run)
    context: dict[str, Any] = {}
    if parallel.context_parallel_size > 1:
        context = {"a2a_ranks": parallel.context_sizes[0], "cp_keep_received": parallel.keeps_received}
    return {
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.query_groups,
        "kv_channels": model.head_dim,
        "vocab_size": model.vocab_size,
        "num_experts": model.num_experts,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
        "moe_router_topk": model.moe_router_topk if model.is_moe else None,
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
        # what only some models have is named only for those: device files of before hold
        **model.not_built,
        **({"loss_chunks": loss_chunks(run)} if loss_chunks(run) else {}),
        "precision": training.precision,
        "seq_length": training.seq_length,
        "micro_batch_size": training.micro_batch_size,
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "sequence_parallel": tokens.split != tokens.whole,
        "context_parallel_size": parallel.context_parallel_size,
        **context,
        "expert_model_parallel_size": expert if model.is_moe else 1,
        "expert_tensor_parallel_size": expert_tensor if model.is_moe else 1,
    }


def nearest(device: DeviceSpec, wanted: dict[str, Any]) -> str:
    """How the measured entry that differs least from these conditions differs."""
    differences = [
        [
            f"{name}={entry.conditions.get(name)}, this run {value}"
            for name, value in wanted.items()
            if entry.conditions.get(name) != value
        ]
        for entry in device.measured
    ]
    return f"; measured was {'; '.join(min(differences, key=len))}" if differences else ""
