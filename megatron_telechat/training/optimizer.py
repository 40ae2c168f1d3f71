"""Data-parallel wrapping and the optimizer, from megatron-core's parts.

AdamW is TransformerEngine's or apex's fused one where they are installed; else
torch's own, switched to its fused kernel (megatron-core builds it unfused).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from megatron_telechat.backend.core_versions import installed_line
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.model import compute_dtype, parameter_shards
from megatron_telechat.parallel.state import ParallelState

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_telechat.training.chain import ModelOptimizer


def wrap_data_parallel(
    virtual_stages: Sequence[MegatronModule], run: RunConfig, state: ParallelState
) -> list[DistributedDataParallel]:
    """Wrap every virtual stage in megatron-core's DistributedDataParallel.

    Gradients are kept and reduced in fp32 whatever the compute type. Only the first
    virtual stage of a rank is bucketed: the later ones reduce outside the critical path.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    parallel = run.parallel
    wrapped: list[DistributedDataParallel] = []
    for number, stage in enumerate(virtual_stages):
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            bucket_size=_bucket_size(state),
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            use_distributed_optimizer=parallel.use_distributed_optimizer,
        )
        wrapped.append(
            DistributedDataParallel(
                config=stage.config,
                ddp_config=ddp_config,
                module=stage,
                disable_bucketing=number > 0,
                pg_collection=state.process_groups,
                **_parameter_layout(stage, ddp_config, bucketed=number == 0 and state.pp_rank == 0, state=state),
            )
        )
    for stage in wrapped:
        _install_schedule_hooks(stage.config, wrapped, run)
    return wrapped


def _bucket_size(state: ParallelState) -> int:
    """Parameters of a bucket: megatron-core's default, large enough that a ring over many ranks stays busy."""
    return max(40_000_000, 1_000_000 * state.dp_size)


def _parameter_layout(
    virtual_stage: torch.nn.Module, ddp_config: DistributedDataParallelConfig, bucketed: bool, state: ParallelState
) -> dict[str, Any]:
    """Where each parameter lies in the gradient buffers; megatron-core 0.19 wants to be told, 0.16 cannot be.

    The same as it computes on its own; told, 0.19 does not warn.
    """
    if installed_line() == "0.16" or not ddp_config.use_distributed_optimizer:
        return {}
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    layout = DistributedOptimizer.compute_full_param_layout(  # pyright: ignore[reportAttributeAccessIssue] (0.19's)
        [parameter for parameter in virtual_stage.parameters() if parameter.requires_grad],
        ddp_config.bucket_size if bucketed and ddp_config.overlap_grad_reduce else None,
        state.process_groups.dp_cp.size(),
        ddp_config,
        expert_data_parallel_world_size=state.process_groups.expt_dp.size(),
    )
    return {"full_param_layout": layout}


def _install_schedule_hooks(
    config: TransformerConfig, virtual_stages: Sequence[DistributedDataParallel], run: RunConfig
) -> None:
    """Tell the pipeline schedules how to hold back and to finish the gradient reduction."""
    from megatron.core.distributed import finalize_model_grads

    config.finalize_model_grads_func = finalize_model_grads
    if run.parallel.overlap_grad_reduce:
        no_sync = [stage.no_sync for stage in virtual_stages]
        # The interleaved schedule takes one a virtual stage; megatron-core's annotation knows one function only.
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]  # pyright: ignore[reportAttributeAccessIssue]


def build_optimizer(
    virtual_stages: Sequence[DistributedDataParallel], run: RunConfig, state: ParallelState
) -> ModelOptimizer:
    """AdamW over the wrapped virtual stages: megatron-core's optimizers of dense and expert parameters, chained to
    one (`training.chain`).

    Weight decay acts where the table of tensors says so: not on biases and norms (megatron-core's standard rule).
    """
    from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
    from megatron.core.optimizer_param_scheduler import ParamGroupOverride

    from megatron_telechat.training.chain import ModelOptimizer

    settings = run.optimizer
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=run.training.precision == "bf16",
        fp16=run.training.precision == "fp16",
        params_dtype=compute_dtype(run),
        use_distributed_optimizer=run.parallel.use_distributed_optimizer,
        overlap_param_gather=run.parallel.overlap_param_gather,
        initial_loss_scale=settings.initial_loss_scale,
        min_loss_scale=settings.min_loss_scale,
        loss_scale_window=settings.loss_scale_window,
        hysteresis=settings.hysteresis,
    )
    shards = parameter_shards(virtual_stages, run, state)
    undecayed = {id(shard.parameter) for shard in shards if not shard.piece.spec.decays}
    no_decay = ParamPredicate("no weight decay", lambda parameter: id(parameter) in undecayed)
    made = get_megatron_optimizer(
        config,
        [*virtual_stages],
        config_overrides={ParamKey(predicate=no_decay): cast(ParamGroupOverride, {"wd_mult": 0.0})},
        use_gloo_process_groups=False,
        pg_collection=state.process_groups,
    )
    assert isinstance(made, ChainedOptimizer), "also of one optimizer"
    optimizer = ModelOptimizer(made.chained_optimizers, config, state.process_groups.expt_tp)
    _use_fused_kernel(optimizer)
    for stage in virtual_stages:
        stage.config.grad_scale_func = optimizer.scale_loss if run.training.precision == "fp16" else None
    return optimizer


def _use_fused_kernel(optimizer: ModelOptimizer) -> None:
    # megatron-core has no switch for it. The per-parameter state is made at the first
    # step and reads this flag, so setting it on the groups is enough.
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group["fused"] = True
                group["foreach"] = False


def set_learning_rate(optimizer: ModelOptimizer, run: RunConfig, rate: float) -> None:
    """Set learning rate and weight decay of every parameter group for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate
        group["weight_decay"] = run.optimizer.weight_decay * group.get("wd_mult", 1.0)
