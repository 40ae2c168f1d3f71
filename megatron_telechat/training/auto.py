"""What ``auto`` leaves open of a run: measured before its first step, or taken from what was measured before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_telechat.backend import Backend
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.data.loader import EVEN_COSTS
from megatron_telechat.parallel.context.layout import Costs
from megatron_telechat.parallel.state import ParallelState
from megatron_telechat.training.chunks import ChunkSetting, set_chunks
from megatron_telechat.training.context import ContextSetting, set_context
from megatron_telechat.training.measured import note_measured, read_measured

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel


@dataclass(frozen=True)
class AutoSettings:
    """What was left open, and what it is now; the same on all ranks.

    Attributes:
        chunks: of the experts' input; None where nothing was open.
        context: pieces and costs of the attention over ranks; None where no rank sends keys and values.
    """

    chunks: ChunkSetting | None
    context: ContextSetting | None

    def __iter__(self) -> Iterator[ChunkSetting | ContextSetting]:
        return (each for each in (self.chunks, self.context) if each is not None)

    @property
    def extra(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {key: entry for each in self for key, entry in each.extra.items()}

    @property
    def row_costs(self) -> Costs:
        """By which rows of several documents are laid out."""
        return self.context.costs if self.context is not None else EVEN_COSTS

    def news(self, step: int) -> Iterator[tuple[str, dict[str, Any] | None]]:
        """For each a line for a person, empty where nothing was open, and the record of a measurement before step
        `step` + 1."""
        return ((each.message, each.event(step)) for each in self)


def settle_auto(
    virtual_stages: Sequence[DistributedDataParallel],
    run: RunConfig,
    state: ParallelState,
    backend: Backend,
    saved: Mapping[str, Any],
    run_dir: Path,
    trains: bool,
    may_write: Callable[[], bool],
) -> AutoSettings:
    """Set experts and attentions. Collective over all ranks.

    Args:
        saved: ``extra`` of the checkpoint that the run resumes from.
        run_dir: where measurements are noted, and found again by a run that ended before it saved.
        trains: whether something is left to train.
        may_write: whether the folder is still this run's.

    Raises:
        ConfigError: on all ranks, if they came to different settings.
    """
    first = state.rank == 0
    before = [saved, read_measured(run_dir) if first else {}]
    chunks = set_chunks(virtual_stages, run, state, backend, before) if trains else None
    found = AutoSettings(chunks, set_context(virtual_stages, run, state, backend, before))
    measured = {key: entry for each in found if each.event(0) is not None for key, entry in each.extra.items()}
    if measured and first and may_write():
        note_measured(run_dir, measured)
    return found
