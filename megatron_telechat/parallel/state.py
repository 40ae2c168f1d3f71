"""Process groups and coordinates of this rank: the only file that reads megatron.core.parallel_state.

Everybody else receives a `ParallelState` and passes its groups on.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from megatron_telechat.backend import Backend
from megatron_telechat.config.schema import ParallelConfig, RunConfig
from megatron_telechat.errors import ConfigError, ResourceError
from megatron_telechat.parallel.agreement import agree, is_lost_rank
from megatron_telechat.parallel.channel import Channel
from megatron_telechat.parallel.topology import Topology

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from megatron_telechat.parallel.groups import ContextGroups, ProcessGroups


@dataclass(frozen=True)
class ParallelState:
    """Where this rank stands. ``edp`` is the data parallelism of the experts; groups are torch ProcessGroups."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    vpp_size: int
    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    ep_rank: int
    ep_size: int
    etp_rank: int
    etp_size: int
    edp_rank: int
    edp_size: int
    tp_group: ProcessGroup = field(repr=False)
    pp_group: ProcessGroup = field(repr=False)
    dp_group: ProcessGroup = field(repr=False)
    dp_cp_group: ProcessGroup = field(repr=False)
    cp_group: ProcessGroup = field(repr=False)
    ep_group: ProcessGroup = field(repr=False)
    etp_group: ProcessGroup = field(repr=False)
    edp_group: ProcessGroup = field(repr=False)
    mp_group: ProcessGroup = field(repr=False)
    process_groups: ProcessGroups = field(repr=False)
    """What model, DDP, optimizer and schedules take as pg_collection."""

    def is_first_stage(self, virtual_stage: int = 0) -> bool:
        """Whether this virtual stage of this rank holds the embedding."""
        return self.pp_rank == 0 and virtual_stage == 0

    def is_last_stage(self, virtual_stage: int | None = None) -> bool:
        """Whether this virtual stage (the last one by default) of this rank holds the output layer."""
        last = self.vpp_size - 1
        return self.pp_rank == self.pp_size - 1 and (last if virtual_stage is None else virtual_stage) == last

    def coordinates(self) -> dict[str, int]:
        """Rank numbers by dimension."""
        names = ("tp", "cp", "dp", "pp", "ep", "etp", "edp")
        return {name: getattr(self, f"{name}_rank") for name in names}

    def place(self) -> str:
        """Rank numbers of the dimensions that this layout uses, such as "tp 1, pp 0"; for messages."""
        return ", ".join(
            f"{name} {rank}" for name, rank in self.coordinates().items() if getattr(self, f"{name}_size") > 1
        )


def initialize(run: RunConfig, backend: Backend) -> ParallelState:
    """Join the ranks and build the process groups of the layout; a collective over all ranks.

    Ranks come from torchrun's variables (`cluster` makes them of those of other launchers); without them this is one
    process of its own. The default group of an earlier call is used again. Seeds every generator.

    Raises:
        ConfigError: the environment does not fit the configuration, or the ranks do not hold the same one.
        ResourceError: a rank cannot be reached.
    """
    timeout = timedelta(minutes=run.parallel.distributed_timeout_minutes)
    join(run, backend)
    with _reachable():
        agree("configuration", run)
        _build_groups(run.parallel, backend, timeout)
    state = _read_state(run.parallel, timeout)
    seed_generators(run.training.seed, state, backend)
    return state


def join(run: RunConfig, backend: Backend) -> None:
    """Join the ranks without groups of any layout, so that they can agree which layout it is; `initialize` does it too.

    Raises:
        ConfigError: the environment does not fit the configuration.
        ResourceError: a rank cannot be reached.
    """
    timeout = timedelta(minutes=run.parallel.distributed_timeout_minutes)
    backend.limit_waits(timeout)
    backend.install()
    with _reachable():
        _join(run.parallel, backend, timeout)


@contextlib.contextmanager
def _reachable() -> Iterator[None]:
    """Say in words that a rank was lost while the ranks join."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        raise ResourceError(
            f"the ranks cannot reach each other: {str(error).strip().splitlines()[0]}",
            "torch.distributed",
            "check that every node was started with the same --rdzv-endpoint and that its port is open",
        ) from error


def destroy(keep_world: bool = False) -> None:
    """Take the process groups down; with `keep_world` the default group stays for another `initialize`."""
    import torch.distributed as dist
    from megatron.core import parallel_state as mpu

    if not dist.is_initialized():
        return
    if keep_world and mpu.model_parallel_is_initialized():
        _destroy_subgroups(mpu)
    _parts_of_context.clear()
    mpu.destroy_model_parallel()
    if not keep_world:
        dist.destroy_process_group()


def rank_seed(seed: int, pp_rank: int, dp_rank: int, cp_rank: int) -> int:
    """Seed of the ranks of one tensor-parallel group, in [0, 2^31).

    Equal over TP, because dropout outside the tensor-parallel regions must be; different
    everywhere else, so that no two samples or stages share their dropout. The RNG tracker of
    megatron-core adds TP, EP and ETP ranks for the regions that need them.
    """
    text = f"{seed}/{pp_rank}/{dp_rank}/{cp_rank}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def seed_generators(seed: int, state: ParallelState, backend: Backend) -> None:
    """Seed every generator of this rank, and the RNG tracker of megatron-core, from the seed of the run."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    mine = rank_seed(seed, state.pp_rank, state.dp_rank, state.cp_rank)
    backend.seed(mine)
    model_parallel_cuda_manual_seed(mine, tp_rank=state.tp_rank, ep_rank=state.ep_rank, etp_rank=state.etp_rank)


def _join(parallel: ParallelConfig, backend: Backend, timeout: timedelta) -> None:
    """init_process_group from torchrun's environment, or a world of one."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    if not dist.is_initialized():
        options: dict[str, Any] = {"backend": backend.distributed_backend, "timeout": timeout}
        options.update(backend.process_group_options())
        if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
            names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
            missing = [name for name in names if not os.environ.get(name)]
            if missing:
                raise ConfigError(f"{', '.join(missing)} not set", "environment", "start the ranks with torchrun")
            dist.init_process_group(init_method="env://", **options)
        else:
            dist.init_process_group(store=HashStore(), rank=0, world_size=1, **options)
    if dist.get_world_size() != parallel.world_size:
        raise ConfigError(
            f"world_size is {parallel.world_size}, but {dist.get_world_size()} rank(s) were started",
            "torchrun",
            f"start {parallel.world_size} ranks, or omit --world-size",
        )


def _build_groups(parallel: ParallelConfig, backend: Backend, timeout: timedelta) -> None:
    from megatron.core import parallel_state as mpu

    if mpu.model_parallel_is_initialized():
        raise RuntimeError("parallel.initialize was called twice without parallel.destroy")
    ep, etp = parallel.expert_sizes
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    try:
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
            context_parallel_size=parallel.context_parallel_size,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=etp,
            # megatron-core makes a timedelta of it, which takes parts of a minute too.
            distributed_timeout_minutes=timeout.total_seconds() / 60,  # pyright: ignore[reportArgumentType]
            # For mcore's own optimizer checkpoints only; ours are written from the shards of each rank.
            create_gloo_process_groups=False,
            # The experts' exchange (megatron-core's name of that group) must not queue behind the kernels it overlaps
            # with.
            high_priority_stream_groups=["tp_ep_mp"] if backend.traits.high_priority_streams else None,
        )
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"the layout does not fit the ranks: {error}", "parallel") from error
    except RuntimeError as error:
        if is_lost_rank(error):
            raise
        raise ConfigError(f"the layout does not fit the ranks: {error}", "parallel") from error


def _read_state(parallel: ParallelConfig, timeout: timedelta) -> ParallelState:
    import torch.distributed as dist

    from megatron_telechat.parallel.groups import ProcessGroups

    groups = ProcessGroups.use_mpu_process_groups()
    groups.expert_channel = Channel(groups.tp_ep, timeout=timeout)
    groups.context = _context_groups(parallel, groups, timeout)
    named = {
        "tp": groups.tp,
        "pp": groups.pp,
        "dp": groups.dp,
        "cp": groups.cp,
        "ep": groups.ep,
        "etp": groups.expt_tp,
        "edp": groups.expt_dp,
    }
    fields: dict[str, Any] = {f"{name}_group": group for name, group in named.items()}
    for name, group in named.items():
        fields[f"{name}_rank"], fields[f"{name}_size"] = group.rank(), group.size()
    return ParallelState(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        vpp_size=parallel.num_virtual_stages_per_pipeline_rank,
        **fields,
        dp_cp_group=groups.dp_cp,
        mp_group=groups.mp,
        process_groups=groups,
    )


_parts_of_context: list[ProcessGroup] = []
"""Groups that megatron-core does not know, and so does not close."""


def _context_groups(parallel: ParallelConfig, groups: ProcessGroups, timeout: timedelta) -> ContextGroups:
    """The context-parallel group as its attention uses it: of neighbours, and across them. megatron-core's own
    hierarchical groups need a package that it does not ask for (einops)."""
    import torch.distributed as dist

    from megatron_telechat.parallel.groups import ContextGroups

    heads, ring = parallel.context_sizes
    if min(heads, ring) == 1:
        return ContextGroups(groups.cp if heads > 1 else None, groups.cp if ring > 1 else None)
    found: dict[str, ProcessGroup] = {}
    for ranks in Topology.from_config(parallel).groups("cp"):
        parts = {"heads": [ranks[n : n + heads] for n in range(0, len(ranks), heads)]}
        parts["ring"] = [ranks[n::heads] for n in range(heads)]
        for name, members in ((name, members) for name, sets in parts.items() for members in sets):
            group = dist.new_group(members, timeout=timeout, group_desc=f"CONTEXT_{name.upper()}")
            if dist.get_rank() in members:
                assert isinstance(group, dist.ProcessGroup), "this rank is in it"
                found[name] = group
                _parts_of_context.append(group)
    return ContextGroups(**found)


def _destroy_subgroups(mpu: Any) -> None:
    """Close the groups of one layout; megatron.core only forgets them."""
    import torch.distributed as dist
    from megatron.core.process_groups_config import ProcessGroupCollection

    for group in _parts_of_context:
        dist.destroy_process_group(group)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    closed: list[Any] = [dist.group.WORLD]
    # By name: every rank must close them in the same order.
    for _, group in sorted(vars(groups).items()):
        for one in group if isinstance(group, list) else [group]:
            if one is not None and all(one is not other for other in closed):
                closed.append(one)
                dist.destroy_process_group(one)
