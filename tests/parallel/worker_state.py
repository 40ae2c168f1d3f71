"""Distributed cases of parallel/state.py."""

from __future__ import annotations

from tests.harness import Cases

cases = Cases()


@cases.case
def smoke():
    from megatron_telechat import parallel
    from megatron_telechat.backend import get_backend
    from megatron_telechat.config.schema import ParallelConfig, RunConfig

    state = parallel.initialize(RunConfig(parallel=ParallelConfig(world_size=2)), get_backend("cpu"))
    return state.coordinates()


@cases.case
def smoke2():
    from megatron_telechat import parallel
    from megatron_telechat.backend import get_backend
    from megatron_telechat.config.schema import ParallelConfig, RunConfig

    state = parallel.initialize(RunConfig(parallel=ParallelConfig(world_size=2, tensor_model_parallel_size=2)), get_backend("cpu"))
    return state.coordinates()

if __name__ == "__main__":
    cases.main()
