"""The process groups of a rank, in megatron-core's form. Imported after the backend is installed."""

from __future__ import annotations

from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_telechat.parallel.channel import Channel


class ProcessGroups(ProcessGroupCollection):
    """megatron-core's collection with one thing more, which modules get the way they get their groups.

    Attributes:
        expert_channel: the line for the exchange of this rank's expert group, one for all layers.
    """

    expert_channel: Channel
