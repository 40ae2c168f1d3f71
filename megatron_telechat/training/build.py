"""From a run and its ranks to what takes a step: model, optimizer, step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_telechat.backend import Backend
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.model import build_model, parameter_shards, verify_tiling
from megatron_telechat.parallel.agreement import together
from megatron_telechat.parallel.state import ParallelState
from megatron_telechat.tensors.frozen import frozen_keys
from megatron_telechat.training.optimizer import build_optimizer, wrap_data_parallel
from megatron_telechat.training.resting import let_state_rest, require_host_memory
from megatron_telechat.training.step import TrainStep

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel

    from megatron_telechat.model.shards import LocalParameter
    from megatron_telechat.training.chain import ModelOptimizer


@dataclass(frozen=True)
class Trained:
    """What a rank trains, and what trains it.

    Attributes:
        virtual_stages: those of this rank, wrapped for data parallelism.
        shards: their parameters, and which piece of which tensor each holds.
        optimizer: over all of them.
        train_step: takes a step.
    """

    virtual_stages: Sequence[DistributedDataParallel]
    shards: Sequence[LocalParameter]
    optimizer: ModelOptimizer
    train_step: TrainStep


def build_trained(run: RunConfig, state: ParallelState, backend: Backend, initialize: bool = True) -> Trained:
    """Build model, optimizer and step; collective.

    Args:
        initialize: fill the weights.

    Raises:
        ConfigError: the ranks together do not hold the model.
        UserError: what one rank meets alone, on all of them.
    """
    with together(state):
        models = build_model(run, state, backend, initialize)
        shards = parameter_shards(models, run, state)
        frozen = frozen_keys(run)
        for shard in shards:
            # Before data parallelism and the optimizer ask for it.
            shard.parameter.requires_grad_(shard.piece.key not in frozen)
    verify_tiling(shards, run, state)
    virtual_stages = wrap_data_parallel(models, run, state)
    optimizer = build_optimizer(virtual_stages, run, state)
    require_host_memory(run, optimizer, backend)
    with together(state):
        let_state_rest(optimizer, run, backend)
    return Trained(virtual_stages, shards, optimizer, TrainStep(virtual_stages, optimizer, shards, run, state, backend))
