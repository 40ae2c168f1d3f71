"""RunConfig → megatron-core's TransformerConfig."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_telechat.backend.transformer_engine import require_for_context, require_for_fp8
from megatron_telechat.config.layout import pipeline_layout
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.device_kinds import DeviceTraits
from megatron_telechat.errors import ConfigError
from megatron_telechat.model.spec import has_transformer_engine
from megatron_telechat.parallel.state import ParallelState
from megatron_telechat.tensors.table import expert_ffn_hidden_size

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compute_dtype(run: RunConfig) -> torch.dtype:
    """Type of the parameters and of the compute."""
    return DTYPES[run.training.precision]


def leave_uninitialised(tensor: torch.Tensor) -> None:
    """Initialiser for megatron-core's modules: `initialize_weights` fills every parameter afterwards."""


def transformer_config(
    run: RunConfig, state: ParallelState, device: DeviceTraits, vp_stage: int | None = None
) -> TransformerConfig:
    """What megatron-core has to know of a run.

    The block-level recompute of megatron-core stays off: every decoder layer carries its own modes.

    Args:
        device: the kind that the ranks run on; turns on what only some have.
        vp_stage: virtual stage of this rank; the configuration is the same for all of them, but each gets its own
            object, because the schedules hang functions on it.

    Raises:
        ConfigError: a model that only the planner knows; `require_transformer_engine`.
    """
    model, training = run.model, run.training
    if model.not_built:
        what = ", ".join(f"{name}={value}" for name, value in model.not_built.items())
        raise ConfigError(
            f"the training does not build a model with {what}", "model", "the planner takes it; leave it out here"
        )
    require_transformer_engine(run, device)
    dtype = compute_dtype(run)
    transformer_engine = has_transformer_engine(device)
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        # a model whose layers are all of experts may leave the dense width out
        ffn_hidden_size=model.ffn_hidden_size or expert_ffn_hidden_size(model),
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_dim,
        attention_dropout=model.attention_dropout,
        hidden_dropout=model.hidden_dropout,
        layernorm_epsilon=model.norm_epsilon,
        normalization="RMSNorm",
        # makes finalize_model_grads sum the gradients of q_layernorm and k_layernorm over the tensor-parallel group
        qk_layernorm=model.qk_layernorm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        # megatron-core would put a bias on every linear layer and on the router; ours are given in the spec
        add_bias_linear=False,
        init_method=leave_uninitialised,
        output_layer_init_method=leave_uninitialised,
        embedding_init_method=leave_uninitialised,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        # the loss is averaged over the tokens that count, whatever the layout
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=device.fuses_weight_gradients and _has_wgrad_kernel(),
        deterministic_mode=training.deterministic and device.needs_deterministic_mode,
        transformer_impl="transformer_engine" if transformer_engine else "local",
        **_fp8_fields(run, device),
        **_parallel_fields(run, state, dtype, device),
        **(_moe_fields(run) if model.is_moe else {}),
    )


def require_transformer_engine(run: RunConfig, device: DeviceTraits) -> None:
    """That Transformer Engine is here, where the run asks for something that only it does.

    Raises:
        ConfigError: it is not, or has no kernels for this kind of device.
    """
    if run.training.fp8_format is not None:
        require_for_fp8(device)
    if run.parallel.cp_implementation == "transformer_engine":
        require_for_context(device)


def _fp8_fields(run: RunConfig, device: DeviceTraits) -> dict[str, Any]:
    """The products of Transformer Engine's modules in FP8. megatron-core's `TransformerBlock` enters the recipe, around
    each layer or (delayed) around all of them; parameters stay as they are."""
    training = run.training
    if training.fp8_format is None:
        return {}
    return dict(
        fp8=training.fp8_format,
        fp8_recipe=training.fp8_recipe,
        fp8_margin=training.fp8_margin,
        fp8_amax_history_len=training.fp8_amax_history_len,
        fp8_amax_compute_algo=training.fp8_amax_compute_algo,
    )


def _has_wgrad_kernel() -> bool:
    """Whether apex's kernel is there; megatron-core's own output layer needs it, TransformerEngine or not."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def _parallel_fields(run: RunConfig, state: ParallelState, dtype: torch.dtype, device: DeviceTraits) -> dict[str, Any]:
    parallel = run.parallel
    fields: dict[str, Any] = dict(
        tensor_model_parallel_size=state.tp_size,
        pipeline_model_parallel_size=state.pp_size,
        context_parallel_size=state.cp_size,
        expert_model_parallel_size=state.ep_size,
        expert_tensor_parallel_size=state.etp_size,
        sequence_parallel=parallel.sequence_parallel_size > 1,
    )
    if state.pp_size == 1:
        return fields
    interleaved = parallel.num_virtual_stages_per_pipeline_rank > 1
    overlap = parallel.overlaps_p2p
    fields.update(
        pipeline_dtype=dtype,
        # explicit even where the split is even: megatron-core's own split leaves layers out silently
        pipeline_model_parallel_layout=str(pipeline_layout(run)),
        virtual_pipeline_model_parallel_size=(parallel.num_virtual_stages_per_pipeline_rank if interleaved else None),
        microbatch_group_size_per_vp_stage=parallel.microbatch_group,
        deallocate_pipeline_outputs=device.frees_sent_outputs or not overlap,
        overlap_p2p_comm=overlap,
        # With two ranks the previous and the next one are the same peer, and batched messages of the
        # interleaved schedule get mixed up silently.
        batch_p2p_comm=not interleaved,
        # a wait of the host after every batch of messages, for a fault of old versions of torch
        batch_p2p_sync=False,
    )
    return fields


def _moe_fields(run: RunConfig) -> dict[str, Any]:
    model = run.model
    return dict(
        num_moe_experts=model.num_experts,
        moe_ffn_hidden_size=expert_ffn_hidden_size(model),
        moe_shared_expert_intermediate_size=model.moe_shared_expert_intermediate_size,
        moe_layer_freq=[int(model.layer_is_moe(layer)) for layer in range(model.num_layers)],
        moe_router_topk=model.moe_router_topk,
        # softmax over the chosen logits: equal to softmax over all, top-k, normalised
        moe_router_pre_softmax=False,
        moe_router_score_function="softmax",
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="aux_loss" if model.moe_aux_loss_coeff else "none",
        moe_aux_loss_coeff=model.moe_aux_loss_coeff,
        moe_z_loss_coeff=model.moe_z_loss_coeff or None,
        moe_token_dispatcher_type="alltoall",
    )
