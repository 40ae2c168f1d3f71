"""Two ranks: what autograd saves, and what parameters, gradients and optimizer take, against costs."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch

from megatron_telechat import parallel
from megatron_telechat.backend import get_backend
from megatron_telechat.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_telechat.costs.activations import embedding_bytes, layer_activations, output_layer_activations
from megatron_telechat.costs.memory import stage_memory
from tests.harness import Cases

cases = Cases()
MODES = ("none", "full", "core_attn", "layernorm", "block", "core_attn+layernorm+block")
EXPERTS = dict(num_experts=8, moe_ffn_hidden_size=96, moe_router_topk=2, moe_aux_loss_coeff=0.01)
TENSOR = dict(tensor_model_parallel_size=2)


def make_run(
    moe: bool,
    precision: str,
    recompute: str,
    layers: int,
    dropout: float = 0.0,
    qk_layernorm: bool = False,
    loss_chunk_rows: int = 0,
    **parallel_sizes,
) -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            num_layers=layers,
            hidden_size=128,
            ffn_hidden_size=384,
            num_attention_heads=8,
            num_query_groups=4,
            vocab_size=1024,
            hidden_dropout=dropout,
            qk_layernorm=qk_layernorm,
            **(EXPERTS if moe else {}),
        ),
        parallel=ParallelConfig(world_size=2, **parallel_sizes),
        training=TrainingConfig(
            device="cpu",
            precision=precision,
            seq_length=256,
            micro_batch_size=2,
            global_batch_size=4,
            recompute_layout=recompute,
            loss_chunk_rows=loss_chunk_rows,
        ),
    )


def saved_bytes(run: RunConfig) -> int:
    """Bytes of the storages that a forward leaves for its backward, parameters apart, each counted once."""
    from megatron_telechat.model import build_model

    backend = get_backend("cpu")
    backend.install()
    parallel.destroy(keep_world=True)
    state = parallel.initialize(run, backend)
    (model,) = build_model(run, state, backend)
    held: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        return tensor

    shape = (run.training.micro_batch_size, run.training.seq_length // run.parallel.context_parallel_size)
    tokens = torch.randint(0, run.model.vocab_size, shape)
    positions = torch.arange(shape[1]).expand(shape)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens, positions, labels=tokens)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    # sizes are read at the end: recomputed norms free their output after it was saved
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    loss.sum().backward()
    return sum(size for pointer, size in sizes.items() if pointer not in parameters)


def activations(moe: bool, precision: str, dropout: float = 0.0, **more) -> dict[str, list[float]]:
    """For each recompute kind, of a layer: [measured, predicted] bytes; and of embedding and output layer."""
    found = {}
    for kind in MODES:
        modes = kind.replace("block", "moe" if moe else "mlp")
        runs = [make_run(moe, precision, f"{modes}*{layers}", layers, dropout, **more) for layers in (2, 3)]
        two, three = (saved_bytes(run) for run in runs)
        kept = layer_activations(runs[0], 0, () if kind == "none" else tuple(modes.split("+"))).kept
        found[kind] = [three - two, kept]
        if kind == "none":
            run = runs[0]
            length = run.training.seq_length // run.parallel.context_parallel_size
            tables = 2 * 4 * length * run.model.head_dim // 2  # cos and sin, shared by all layers
            ends = embedding_bytes(run) + output_layer_activations(run).kept
            found["ends"] = [two - 2 * (three - two) - tables, ends]
    return found


def resident(moe: bool, precision: str, **parallel_sizes) -> list[list[float]]:
    """[measured, predicted] bytes of parameters, gradients and optimizer on this rank, after a step."""
    from megatron_telechat.model import build_model
    from megatron_telechat.training.optimizer import build_optimizer, wrap_data_parallel

    run = make_run(moe, precision, "none*3", 3, **parallel_sizes)
    if run.parallel.pipeline_model_parallel_size == 2:
        run = make_run(moe, precision, "none*1|none*2", 3, **parallel_sizes, pipeline_model_parallel_layout="Et|ttL")
    backend = get_backend("cpu")
    backend.install()
    parallel.destroy(keep_world=True)
    state = parallel.initialize(run, backend)
    models = build_model(run, state, backend)
    virtual_stages = wrap_data_parallel(models, run, state)
    optimizer = build_optimizer(virtual_stages, run, state)
    for stage in virtual_stages:
        stage.zero_grad_buffer()
    optimizer.step()
    parameters = {id(parameter): parameter for model in models for parameter in model.parameters()}
    gradients = sum(parameter.main_grad.nbytes for parameter in parameters.values())
    state_bytes = 0
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state_bytes += parameter.nbytes * (id(parameter) not in parameters)  # a master weight
                state_bytes += sum(part.optimizer.state[parameter][name].nbytes for name in ("exp_avg", "exp_avg_sq"))
    stage = stage_memory(run)[state.pp_rank]
    return [
        [sum(parameter.nbytes for parameter in parameters.values()), stage.parameters_bytes],
        [gradients, stage.gradients_bytes],
        [state_bytes, stage.optimizer_bytes],
    ]


STOCK: dict[str, dict[str, Any]] = {
    "gpt": dict(
        activation="gelu",
        untie_embeddings_and_output_weights=False,
        position_embedding_type="learned_absolute",
        max_position_embeddings=48,
        normalization="LayerNorm",
        add_bias_linear=True,
    ),
    "qkv_bias": dict(add_qkv_bias=True, qk_layernorm=True, attention_output_bias=False, mlp_output_bias=False),
    "relu2": dict(
        activation="squared_relu", normalization="LayerNorm", attention_output_bias=False, mlp_output_bias=False
    ),
    "moe": dict(
        num_experts=4,
        moe_ffn_hidden_size=24,
        activation="gelu",
        add_bias_linear=True,
        normalization="LayerNorm",
        untie_embeddings_and_output_weights=False,
    ),
    "shared": dict(
        num_experts=4,
        moe_ffn_hidden_size=24,
        moe_shared_expert_intermediate_size=40,
        moe_shared_expert_gate=True,
        attention_output_bias=False,
        mlp_output_bias=False,
    ),
}
"""Models that only Megatron-Core builds, in fields of ours."""


def stock_parameters(**parallel_sizes) -> dict[str, list[int]]:
    """For each model [built, predicted]: parameters that this rank holds of Megatron-Core's own GPTModel."""
    backend = get_backend("cpu")
    backend.install()
    parallel.destroy(keep_world=True)
    run = RunConfig(model=ModelConfig(num_layers=4), parallel=ParallelConfig(world_size=2, **parallel_sizes))
    state = parallel.initialize(run, backend)
    return {name: _stock(changes, run.parallel, state) for name, changes in STOCK.items()}


def _stock(changes: dict[str, Any], sizes: ParallelConfig, state: parallel.ParallelState) -> list[int]:
    from megatron.core.activations import squared_relu
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer import TransformerConfig

    from megatron_telechat.costs.parameters import local_count
    from megatron_telechat.tensors.table import stage_table

    model = ModelConfig(
        num_layers=4,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=64,
        **changes,
    )
    functional = torch.nn.functional
    functions = {"swiglu": functional.silu, "gelu": functional.gelu, "squared_relu": squared_relu}
    config = TransformerConfig(
        num_layers=4,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        normalization=model.normalization,
        activation_func=functions[model.activation],
        gated_linear_unit=model.is_gated,
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.has_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        num_moe_experts=model.num_experts,
        moe_ffn_hidden_size=model.moe_ffn_hidden_size,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
        moe_shared_expert_intermediate_size=model.moe_shared_expert_intermediate_size,
        moe_shared_expert_gate=model.moe_shared_expert_gate,
        pipeline_dtype=torch.float32,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        transformer_impl="local",
        tensor_model_parallel_size=state.tp_size,
        pipeline_model_parallel_size=state.pp_size,
        expert_tensor_parallel_size=state.etp_size,
    )
    # the sharing of a tied matrix between stages moves it to a GPU that is not here
    with patch.object(torch.Tensor, "cuda", lambda tensor: tensor):
        built = GPTModel(
            config,
            get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=model.normalization),
            vocab_size=64,
            max_sequence_length=model.max_position_embeddings or 0,
            pre_process=state.is_first_stage(),
            post_process=state.is_last_stage(),
            share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
            position_embedding_type=model.position_embedding_type,
            pg_collection=state.process_groups,
        )
    each = 4 // state.pp_size
    layers = range(each * state.pp_rank, each * (state.pp_rank + 1))
    table = stage_table(model, layers, has_embedding=state.is_first_stage(), has_loss=state.is_last_stage())
    return [sum(parameter.numel() for parameter in built.parameters()), local_count(table, sizes).total]


for precision in ("bf16", "fp32"):
    for moe in (False, True):
        name = f"{'moe' if moe else 'dense'}_{precision}"
        cases.add(f"activations_{name}", lambda m=moe, p=precision: activations(m, p))
        cases.add(f"resident_{name}_pp2", lambda m=moe, p=precision: resident(m, p, pipeline_model_parallel_size=2))
        cases.add(f"resident_{name}_tp2", lambda m=moe, p=precision: resident(m, p, **TENSOR))
cases.add("activations_dense_tp2", lambda: activations(False, "bf16", **TENSOR))
cases.add("activations_dense_tp2_chunked_loss", lambda: activations(False, "bf16", loss_chunk_rows=100, **TENSOR))
cases.add("activations_dense_dropout", lambda: activations(False, "bf16", 0.1))
cases.add("activations_dense_tp2_qk_layernorm", lambda: activations(False, "bf16", qk_layernorm=True, **TENSOR))
cases.add("activations_moe_folded", lambda: activations(True, "bf16", **TENSOR, fold_tensor_into_experts=True))
cases.add("activations_dense_cp2", lambda: activations(False, "bf16", context_parallel_size=2, cp_keep_received=True))
cases.add("activations_dense_cp2_a2a", lambda: activations(False, "bf16", context_parallel_size=2, cp_comm_type="a2a"))

cases.add("stock_tp2", lambda: stock_parameters(**TENSOR, expert_tensor_parallel_size=1))
cases.add("stock_pp2", lambda: stock_parameters(pipeline_model_parallel_size=2))

if __name__ == "__main__":
    cases.main()
