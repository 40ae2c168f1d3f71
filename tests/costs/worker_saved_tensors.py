"""Two ranks: what autograd saves, and what parameters, gradients and optimizer take, against costs."""

from __future__ import annotations

import torch

from megatron_telechat import parallel
from megatron_telechat.backend import get_backend
from megatron_telechat.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_telechat.costs.activations import embedding_bytes, layer_activations, output_layer_saved_bytes
from megatron_telechat.costs.memory import stage_memory
from tests.harness import Cases

cases = Cases()
MODES = ("none", "full", "core_attn", "layernorm", "block", "core_attn+layernorm+block")
EXPERTS = dict(num_experts=8, moe_ffn_hidden_size=96, moe_router_topk=2, moe_aux_loss_coeff=0.01)
TENSOR = dict(tensor_model_parallel_size=2)


def make_run(moe: bool, precision: str, recompute: str, layers: int, **parallel_sizes) -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            num_layers=layers, hidden_size=128, ffn_hidden_size=384, num_attention_heads=8, num_query_groups=4,
            vocab_size=1024, **(EXPERTS if moe else {}),
        ),
        parallel=ParallelConfig(world_size=2, **parallel_sizes),
        training=TrainingConfig(
            device="cpu", precision=precision, seq_length=256, micro_batch_size=2, global_batch_size=4,
            recompute_layout=recompute,
        ),
    )  # fmt: skip


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

    shape = (run.training.micro_batch_size, run.training.seq_length)
    tokens = torch.randint(0, run.model.vocab_size, shape)
    positions = torch.arange(shape[1]).expand(shape)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens, positions, None, labels=tokens)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    # sizes are read at the end: recomputed norms free their output after it was saved
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    loss.sum().backward()
    return sum(size for pointer, size in sizes.items() if pointer not in parameters)


def activations(moe: bool, precision: str, **parallel_sizes) -> dict[str, list[float]]:
    """For each recompute kind, of a layer: [measured, predicted] bytes; and of embedding and output layer."""
    found = {}
    for kind in MODES:
        modes = kind.replace("block", "moe" if moe else "mlp")
        runs = [make_run(moe, precision, f"{modes}*{layers}", layers, **parallel_sizes) for layers in (2, 3)]
        two, three = (saved_bytes(run) for run in runs)
        kept = layer_activations(runs[0], 0, () if kind == "none" else tuple(modes.split("+"))).kept
        found[kind] = [three - two, kept]
        if kind == "none":
            run = runs[0]
            tables = 2 * 4 * run.training.seq_length * run.model.head_dim // 2  # cos and sin, shared by all layers
            ends = embedding_bytes(run) + output_layer_saved_bytes(run)
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
    chunks = wrap_data_parallel(models, run, state)
    optimizer = build_optimizer(chunks, run, state)
    for chunk in chunks:
        chunk.zero_grad_buffer()
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


for precision in ("bf16", "fp32"):
    for moe in (False, True):
        name = f"{'moe' if moe else 'dense'}_{precision}"
        cases.add(f"activations_{name}", lambda m=moe, p=precision: activations(m, p))
        cases.add(f"resident_{name}_pp2", lambda m=moe, p=precision: resident(m, p, pipeline_model_parallel_size=2))
        cases.add(f"resident_{name}_tp2", lambda m=moe, p=precision: resident(m, p, **TENSOR))
cases.add("activations_dense_tp2", lambda: activations(False, "bf16", **TENSOR))
cases.add("activations_moe_folded", lambda: activations(True, "bf16", **TENSOR, fold_tensor_into_experts=True))

if __name__ == "__main__":
    cases.main()
