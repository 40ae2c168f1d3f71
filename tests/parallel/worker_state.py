"""Distributed cases of parallel/: groups, seeds, agreement, ranks that fail together. Four ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

from tests.harness import Cases

cases = Cases()

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp4": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2_interleaved": {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
    "cp2": {"context_parallel_size": 2},
    "ep2": {"expert_model_parallel_size": 2},
    "tp2_pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "tp2_folded_into_ep4": {
        "tensor_model_parallel_size": 2,
        "expert_model_parallel_size": 4,
        "fold_tensor_into_experts": True,
    },
    "tp2_pp2_folded_into_ep2": {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    },
    "tp2_ep2_etp2": {
        "tensor_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 2,
    },
}


def run_config(**changes: Any) -> Any:
    from megatron_telechat.config.schema import ParallelConfig, RunConfig

    return RunConfig(parallel=ParallelConfig(world_size=4, **changes))


def join(**changes: Any) -> Any:
    from megatron_telechat import parallel
    from megatron_telechat.backend import get_backend

    return parallel.initialize(run_config(**changes), get_backend("cpu"))


def failure(function: Any, *args: Any) -> str:
    """Class and text of the error that a call ends in."""
    try:
        function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def draws() -> dict[str, list[float]]:
    """A draw of every generator that seeding is about."""
    import random

    import torch
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    drawn = {"default": torch.rand(2).tolist(), "python": [random.random()]}
    for name in ("model-parallel-rng", "expert-parallel-rng"):
        with get_cuda_rng_tracker().fork(name):
            drawn[name] = torch.rand(2).tolist()
    return drawn


def _register(name: str, changes: dict[str, Any]) -> None:
    def case() -> dict[str, Any]:
        import torch
        import torch.distributed as dist

        state = join(**changes)
        groups = {
            field.name.removesuffix("_group"): dist.get_process_group_ranks(getattr(state, field.name))
            for field in dataclasses.fields(state)
            if field.name.endswith("_group")
        }
        # The groups carry data, and every rank of a group stands where its number says.
        total = torch.tensor([float(state.rank)])
        dist.all_reduce(total, group=state.dp_group)
        assert float(total) == sum(groups["dp"])
        sizes = {key: getattr(state, f"{key}_size") for key in ("tp", "cp", "dp", "pp", "ep", "etp", "edp")}
        return {
            "coordinates": state.coordinates(),
            "sizes": sizes,
            "groups": groups,
            "ends": [state.is_first_stage(0), state.is_last_stage(0), state.is_last_stage()],
            "draws": draws(),
        }

    cases.add(f"layout_{name}", case)


for _name, _changes in LAYOUTS.items():
    _register(_name, _changes)


@cases.case
def same_seed_same_draws() -> list[Any]:
    from megatron_telechat import parallel

    join(tensor_model_parallel_size=2)
    first = draws()
    parallel.destroy(keep_world=True)
    join(tensor_model_parallel_size=2)
    return [first, draws()]


@cases.case
def layout_that_does_not_fit() -> str:
    return failure(lambda: join(tensor_model_parallel_size=3))


@cases.case
def wrong_world_size() -> str:
    from megatron_telechat import parallel
    from megatron_telechat.backend import get_backend

    run = dataclasses.replace(run_config(), parallel=dataclasses.replace(run_config().parallel, world_size=8))
    return failure(parallel.initialize, run, get_backend("cpu"))


@cases.case
def another_configuration_on_one_rank() -> str:
    import os

    from megatron_telechat import parallel
    from megatron_telechat.backend import get_backend

    run = run_config()
    if os.environ["RANK"] == "2":
        run = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, lr=0.5))
    return failure(parallel.initialize, run, get_backend("cpu"))


@cases.case
def agreement() -> list[str]:
    from megatron_telechat import parallel

    state = join(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    parallel.agree("weights", {"a": [1, 2], "b": None}, state)
    return [
        failure(parallel.agree, "weights", {"a": [1, 2 if state.rank < 3 else 9]}, state),
        failure(parallel.agree, "keys", {"a": 1, **({"b": 2} if state.rank == 1 else {})}, state),
        failure(parallel.agree, "digest", "x" if state.rank else "y", state),
    ]


@cases.case
def one_rank_fails_and_all_raise() -> list[str]:
    from megatron_telechat import parallel
    from megatron_telechat.errors import DataError

    state = join(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    parallel.all_ranks_ok(None, state)

    def user_error() -> None:
        with parallel.together(state):
            if state.rank == 1:
                raise DataError("cannot read the file", "data.bin", "copy it again")

    def our_error() -> None:
        with parallel.together(state):
            if state.rank in (2, 3):
                raise KeyError("lost")

    return [failure(user_error), failure(our_error)]


if __name__ == "__main__":
    cases.main()
