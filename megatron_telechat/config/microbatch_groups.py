"""Groups of micro-batches in the interleaved schedule: a pipeline rank takes a whole group through one of its virtual
stages before it goes on to the next one.

The rules are those of megatron-core's forward_backward_pipelining_with_interleaving (0.16.1,
pipeline_parallel/schedules.py).
"""

from __future__ import annotations


def schedule_takes(num_microbatches: int, group: int, stages: int) -> bool:
    """Whether the interleaved schedule takes so many micro-batches in groups of this size: a group has at least as many
    as there are pipeline ranks (`stages`), the last one too, and at most all."""
    last = num_microbatches % group
    return stages <= group <= num_microbatches and (last == 0 or last >= stages)


def possible_groups(num_microbatches: int, stages: int) -> list[int]:
    """All sizes of a group that the schedule takes, ascending."""
    return [group for group in range(stages, num_microbatches + 1) if schedule_takes(num_microbatches, group, stages)]


def next_count(num_microbatches: int, group: int, stages: int) -> int:
    """The least number of micro-batches from this one on that the schedule takes in groups of this size (at least
    `stages`)."""
    full, last = divmod(max(num_microbatches, group), group)
    return full * group + (max(last, stages) if last else 0)
