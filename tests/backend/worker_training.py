"""Training of a stock megatron-core GPT on the CPU backend, over layouts."""

from __future__ import annotations

import os

from tests.harness import Cases

cases = Cases()

LAYOUTS = {
    # name: (world size, ParallelConfig changes, experts, distributed optimizer, bf16)
    "dense_one": (1, {}, None, False, False),
    "moe_one": (1, {}, 4, False, False),
    "dense_bf16_one": (1, {}, None, True, True),
    "dp2": (2, {}, None, False, False),
    "dp2_distributed_optimizer": (2, {}, None, True, False),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2}, None, False, False),
    "pp2": (2, {"pipeline_model_parallel_size": 2}, None, False, False),
    "ep2": (2, {"expert_model_parallel_size": 2}, 4, False, False),
    "tp2_folded_into_ep2": (2, {"tensor_model_parallel_size": 2, "fold_tensor_into_experts": True}, 4, True, False),
    "tp2_ep2_etp2": (
        4,
        {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
        4,
        True,
        False,
    ),
}


def _register(name: str, world: int, changes: dict, experts: int | None, distributed: bool, bf16: bool) -> None:
    def case() -> list[float]:
        import torch

        from megatron_telechat import parallel
        from megatron_telechat.backend import get_backend
        from megatron_telechat.config.schema import ParallelConfig, RunConfig

        run = RunConfig(parallel=ParallelConfig(world_size=world, **changes))
        state = parallel.initialize(run, get_backend("cpu"))
        from tests.backend import tiny_core

        dtype = torch.bfloat16 if bf16 else torch.float32
        config = tiny_core.transformer_config(state, experts=experts, dtype=dtype)
        return tiny_core.train(state, config, distributed_optimizer=distributed)

    cases.add(name, case)


for _name, _layout in LAYOUTS.items():
    if _layout[0] == int(os.environ.get("WORLD_SIZE", _layout[0])):
        _register(_name, *_layout)

if __name__ == "__main__":
    cases.main()
