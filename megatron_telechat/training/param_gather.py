"""The overlapped gather of parameters: held back where whole weights are read, and checked once in a forward.

With ``overlap_param_gather`` megatron-core gathers the weights of an optimizer step during the next forward. A hook
before the forward of each module awaits the gather of the parameters that the module owns itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from megatron_telechat.errors import ConfigError
from megatron_telechat.model.shards import LocalParameter
from megatron_telechat.parallel.agreement import together
from megatron_telechat.parallel.state import ParallelState

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel

_NAMED = 5
"""Parameters that the error names; their number is said besides."""


def is_overlapped(virtual_stages: Sequence[torch.nn.Module]) -> bool:
    """Whether these wrapped virtual stages gather their parameters during the forward."""
    return any(getattr(stage, "use_forward_hook", False) for stage in virtual_stages)


@contextmanager
def gathered_parameters(virtual_stages: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Hold the overlapped parameter gather back and complete it, so that every rank sees whole, current weights.

    With overlap_param_gather the gather of an optimizer step runs at the next forward;
    evaluation and saving come before that forward.
    """
    hooked = [stage for stage in virtual_stages if getattr(stage, "use_forward_hook", False)]
    for stage in hooked:
        stage.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for stage in hooked:
            stage.enable_forward_pre_hook()


def gather_parameters(virtual_stages: Sequence[DistributedDataParallel]) -> None:
    """Send what each rank holds of its parameters to its replicas, where the distributed optimizer has cut them.
    Collective; an overlapped gather is held back (`gathered_parameters`)."""
    for stage in virtual_stages:
        if stage.ddp_config.use_distributed_optimizer:
            stage.start_param_sync(force_sync=True)


@contextmanager
def every_parameter_awaited(
    virtual_stages: Sequence[torch.nn.Module], shards: Sequence[LocalParameter], state: ParallelState
) -> Iterator[None]:
    """Watch the forward that runs inside: each parameter must belong to a module that is called.

    A parameter whose module is never called is read without its gather having been started or awaited: from the second
    step on each rank would compute with the shares of the others as they were at the start. Watched is the first
    forward of a run, whose weights are whole on every rank, so that nothing was computed with wrong ones. Collective at
    its end.

    Raises:
        ConfigError: on every rank, naming the parameters.
    """
    owners: dict[int, list[torch.nn.Module]] = {}
    for stage in virtual_stages:
        for module in stage.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad:
                    owners.setdefault(id(parameter), []).append(module)
    called: set[torch.nn.Module] = set()
    modules = {module for found in owners.values() for module in found}
    handles = [module.register_forward_pre_hook(lambda module, _: called.add(module)) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    missed = [
        shard.piece.key
        for shard in shards
        if id(shard.parameter) in owners and called.isdisjoint(owners[id(shard.parameter)])
    ]
    with together(state):
        if missed:
            more = f" and {len(missed) - _NAMED} more" if len(missed) > _NAMED else ""
            raise ConfigError(
                f"the overlapped parameter gather would never reach {', '.join(missed[:_NAMED])}{more}: "
                "the module that owns the parameter is not called in the forward",
                "overlap_param_gather",
                "--no-overlap-param-gather, and please report this: a module of the model has to be fixed",
            )
