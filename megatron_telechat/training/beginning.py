"""Where a training begins: the checkpoint, the place in the run, and so the stage. Rank 0 decides it for all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_telechat.checkpoint.find import find_checkpoint
from megatron_telechat.checkpoint.lineage import Branch, look_at
from megatron_telechat.checkpoint.start import Start, position_of, require_start
from megatron_telechat.config.run_stages import Position, RunStages


@dataclass(frozen=True)
class Beginning:
    """What a training begins with.

    Attributes:
        start: what is loaded.
        position: the place of that checkpoint in the run; the begin of the run where only weights are loaded.
        branch: the line of saves that goes on, where another stage of this process saved the checkpoint.
        protected: the checkpoint that the process began with, where it was another one.
    """

    start: Start
    position: Position
    branch: Branch | None = None
    protected: Path | None = None


def find_beginning(stages: RunStages) -> Beginning:
    """Decide where a training begins; by one rank, because a stale cache of a shared folder would part the ranks.

    Raises:
        CheckpointError: see :func:`require_start`.
    """
    start, saved = require_start(stages)
    if start.root is None or saved is None or start.weights_only:
        return Beginning(start, Position())
    if stages.several:
        # A load passes damaged checkpoints over, and an older one may be of another stage.
        folder, _ = find_checkpoint(start.root, start.step)
        if folder is not None and folder != saved.path:
            saved = look_at(folder)
            start = replace(start, step=saved.step)
    return Beginning(start, position_of(saved))
