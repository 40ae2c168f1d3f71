"""The whole model on two gloo ranks, with the kernels of torch_npu (a stand-in) and without: losses and gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from tests.harness import Cases
from tests.model.worker_model import DENSE, MOE, build, forward_backward, one_routing, run_of

WORLD = 2
cases = Cases()

LAYOUTS: dict[str, tuple[dict, dict, dict]] = {
    "dense_tp2_bf16": (DENSE, dict(tensor_model_parallel_size=2), dict(precision="bf16")),
    "dense_qk_norm_recompute_bf16": (
        dict(DENSE, qk_layernorm=True),
        dict(tensor_model_parallel_size=2),
        dict(precision="bf16", recompute_granularity="selective", recompute_modules=("core_attn", "mlp", "layernorm")),
    ),
    "moe_ep2_chunks_fp32": (MOE, dict(expert_model_parallel_size=2, moe_input_chunks=3), dict(precision="fp32")),
    "moe_ep2_recompute_bf16": (
        MOE,
        dict(expert_model_parallel_size=2),
        dict(precision="bf16", recompute_granularity="selective", recompute_modules=("moe",)),
    ),
}


def loss_and_gradients(run, chosen: dict, here: AbstractContextManager) -> tuple[float, dict[str, Any]]:
    """A model built and run inside `here`, under the routing of the first."""
    from megatron_telechat import parallel

    with here:
        state, virtual_stages, shards = build(run)
        with one_routing(chosen, virtual_stages, state):
            loss = forward_backward(run, virtual_stages)
    parallel.destroy(keep_world=True)
    return loss, {shard.piece.key: shard.parameter.grad.float() for shard in shards}


def compare(name: str) -> dict[str, Any]:
    import torch

    from tests.backend import torch_npu_stand_in
    from tests.backend.ascend_here import ascend_here

    model, parallel, training = LAYOUTS[name]
    run = run_of(model, parallel, **training)
    run = replace(run, parallel=replace(run.parallel, world_size=WORLD))
    chosen: dict = {}
    loss, expected = loss_and_gradients(run, chosen, nullcontext())
    other_loss, found = loss_and_gradients(run, chosen, ascend_here())
    error = torch.stack([(found[key] - expected[key]).square().sum() for key in expected]).sum().sqrt()
    size = torch.stack([expected[key].square().sum() for key in expected]).sum().sqrt()
    return {
        "loss": abs(other_loss / loss - 1),
        "gradient": float(error / size),
        "calls": {call.split()[0]: count for call, count in torch_npu_stand_in.calls.items()},
    }


for _name in LAYOUTS:
    cases.add(_name, partial(compare, _name))

if __name__ == "__main__":
    cases.main()
