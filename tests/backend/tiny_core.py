"""A tiny GPT of megatron-core's own parts, for tests of the backend: no code of model/ or moe/."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from typing import Any

import torch

CLEAR = 2e-5
"""Least gap between the last expert chosen and the next one; the few steps of these runs move a logit by 1e-8."""
VOCAB, SEQ, HIDDEN, LAYERS = 64, 16, 32, 4


class TinyNorm(torch.nn.Module):
    """RMSNorm in plain torch; megatron-core's own refuses sequence parallelism."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.weight.sequence_parallel = config.sequence_parallel
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


def transformer_config(
    state: Any, *, experts: int | None = None, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    from megatron.core.transformer import TransformerConfig

    values: dict[str, Any] = dict(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        add_bias_linear=False,
        activation_func=torch.nn.functional.gelu,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=state.tp_size,
        sequence_parallel=state.tp_size > 1,
        pipeline_model_parallel_size=state.pp_size,
        expert_model_parallel_size=state.ep_size,
        expert_tensor_parallel_size=state.etp_size,
    )
    if experts is not None:
        values.update(
            num_moe_experts=experts,
            moe_router_topk=2,
            moe_ffn_hidden_size=24,
            moe_token_dispatcher_type="alltoall",
            moe_router_dtype="fp32",
            moe_router_load_balancing_type="none",
        )
    return TransformerConfig(**{**values, **changes})


def layer_spec(config: Any) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=False, normalization="LayerNorm"
    )
    return dataclasses.replace(
        spec,
        submodules=dataclasses.replace(spec.submodules, input_layernorm=TinyNorm, pre_mlp_layernorm=TinyNorm),
    )


def gpt(state: Any, config: Any) -> Any:
    """GPTModel of this pipeline stage, with weights that do not depend on the layout."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    # 0.19 says that its GPTModel is deprecated; ours is another, and this is the stock one.
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    blocks = TransformerBlockSubmodules(
        layer_specs=[layer_spec(config)] * (LAYERS // state.pp_size), layer_norm=TinyNorm
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=blocks,
        vocab_size=VOCAB,
        max_sequence_length=SEQ,
        pre_process=state.is_first_stage(),
        post_process=state.is_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        pg_collection=state.process_groups,
    )
    _fill(model)
    return model


def _fill(model: Any) -> None:
    """Every global tensor from a generator of its own key, cut to the piece of this rank."""
    for key, piece in model.sharded_state_dict().items():
        if not hasattr(piece, "prepend_axis_num") or key.endswith("layernorm.weight"):
            continue
        seed = int.from_bytes(hashlib.sha256(piece.key.encode()).digest()[:4], "big")
        whole = torch.empty(piece.global_shape).normal_(std=0.05, generator=torch.Generator().manual_seed(seed))
        sizes = (1,) * piece.prepend_axis_num + tuple(piece.local_shape)
        box = tuple(slice(begin, begin + size) for begin, size in zip(piece.global_offset, sizes, strict=True))
        piece.data.detach().copy_(whole[box].reshape(piece.data.shape))


def train(
    state: Any, config: Any, steps: int = 3, distributed_optimizer: bool = False, micro_batches: int = 2
) -> list[float]:
    """Losses of a few steps over the whole group of ranks; equal on all ranks, for every layout."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    # 0.19 says that it computes the layout of the distributed optimizer's buffers itself.
    logging.getLogger("megatron.core.distributed.distributed_data_parallel").setLevel(logging.ERROR)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed_optimizer)
    model = DistributedDataParallel(config, ddp, gpt(state, config), pg_collection=state.process_groups)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            lr=1e-2,
            weight_decay=0.1,
            adam_beta2=0.95,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=distributed_optimizer,
        ),
        [model],
        use_gloo_process_groups=False,
        pg_collection=state.process_groups,
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    forward_backward = get_forward_backward_func()
    losses, gaps = [], gaps_of_choices(model)
    for step in range(steps):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        outputs = forward_backward(
            forward_step_func=_forward_step,
            data_iterator=_samples(state, step, micro_batches),
            model=[model],
            num_microbatches=micro_batches // state.dp_size,
            seq_length=SEQ,
            micro_batch_size=1,
            forward_only=False,
        )
        optimizer.step()
        mean = torch.stack([output["loss"] for output in outputs]).mean() if outputs else torch.zeros(())
        torch.distributed.all_reduce(mean, group=state.pp_group)
        torch.distributed.all_reduce(mean, group=state.dp_group)
        losses.append(float(mean) / state.dp_size)
    assert all(gap > CLEAR for gap in gaps), f"a near tie ({min(gaps):.1e}): rounding would choose the experts"
    return losses


def gaps_of_choices(model: Any) -> list[float]:
    """A list that gets, at every call of a router of this model, the smallest gap between a token's last choice and the
    next one."""
    gaps: list[float] = []

    def note(router: Any, inputs: tuple, output: Any) -> None:
        best = router.gating(inputs[0]).detach().flatten(0, -2).topk(router.topk + 1).values
        gaps.append(float((best[:, -2] - best[:, -1]).min()))

    for module in model.modules():
        if hasattr(module, "gating") and hasattr(module, "topk"):
            module.register_forward_hook(note)
    return gaps


def _samples(state: Any, step: int, micro_batches: int) -> Any:
    for sample in range(state.dp_rank, micro_batches, state.dp_size):
        generator = torch.Generator().manual_seed(1000 * step + sample)
        yield torch.randint(VOCAB, (1, SEQ + 1), generator=generator)


def _forward_step(data: Any, model: Any) -> Any:
    tokens = next(data)
    positions = torch.arange(SEQ)[None]
    output = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:])

    def loss_func(output: torch.Tensor) -> Any:
        loss = output.float().mean()
        # The schedule divides the loss in place: report a copy.
        return loss, {"loss": loss.detach().clone()}

    return output, loss_func
