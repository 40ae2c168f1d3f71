"""The process groups of a rank, in megatron-core's form. Imported after the backend is installed."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from megatron_telechat.parallel.channel import Channel


@dataclass(frozen=True)
class ContextGroups:
    """The ranks that share the rows of this rank, as their attention uses them.

    Attributes:
        heads: those that exchange heads for tokens, neighbours of each other; None where that is this rank alone.
        ring: those that send each other keys and values; None where that is this rank alone.
    """

    heads: ProcessGroup | None = None
    ring: ProcessGroup | None = None


class ProcessGroups(ProcessGroupCollection):
    """megatron-core's collection with two things more, which modules get the way they get their groups.

    Attributes:
        expert_channel: the line for the exchange of this rank's expert group, one for all layers.
        context: the context-parallel group in its parts.
    """

    expert_channel: Channel
    context: ContextGroups
