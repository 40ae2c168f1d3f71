"""Saves beside the training: the same files, checks and commit as `train_state.save_checkpoint`, of a step that is
over.

A save goes through three phases, the same on all ranks:

* *copying*: a thread of each rank copies what the rank writes into its staging buffer. The weights must not change
  before that is over (`AsynchronousSaves.staged`); forward and backward of the next step only read them.
* *writing*: the writer process of each rank writes the files and syncs them.
* *committing*: the writer process of rank 0 merges the parts, writes the manifest, renames the folder and removes what
  is beyond --keep-last.

Each rank adds to an all-reduce that is there anyway, that of a step, whether its work is over (`report`); all ranks
pass the sums to `settle`, and so go from phase to phase at the same step. A save that was not committed leaves a
temporary folder, like one that training waits for.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatron_telechat.checkpoint import commit as protocol
from megatron_telechat.checkpoint.committing import commit_parts
from megatron_telechat.checkpoint.disk import disk_error, is_of_one_host
from megatron_telechat.checkpoint.lineage import look_at
from megatron_telechat.checkpoint.names import FileEntry
from megatron_telechat.checkpoint.parts import Part
from megatron_telechat.checkpoint.staging import CopyBeside, FileImages, StagingBuffer
from megatron_telechat.checkpoint.train_state import (
    BegunSave,
    TrainState,
    begin_save,
    write_part,
)
from megatron_telechat.checkpoint.verify import remember_files
from megatron_telechat.checkpoint.writer_process import WriterProcess, write_images
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.locations import Location
from megatron_telechat.parallel.agreement import gather_on_rank_0, together
from megatron_telechat.parallel.state import ParallelState

if TYPE_CHECKING:
    from megatron_telechat.backend import Backend

_ROOM_FOR_HEADERS = 1 << 20
_PATIENCE_S = 120.0
"""How long a rank that has to leave waits for a commit that needs no other rank any more."""


class Report(NamedTuple):
    """What a rank says of the phase of the save under way; sums over the ranks are passed to `settle`."""

    over: bool = False
    failed: bool = False


@dataclass(frozen=True)
class CommittedSave:
    """A save that has become a checkpoint.

    Attributes:
        step: of the checkpoint.
        seconds: from its begin to the step that heard of the commit.
        blocked_s: of these, how long this rank's training waited.
    """

    step: int
    folder: Location
    seconds: float
    blocked_s: float


@dataclass
class _UnderWay:
    begun: BegunSave
    images: FileImages
    part: Part
    started_s: float
    copy: CopyBeside | None = None
    error: Exception | None = None
    """Of the files."""
    entries: dict[str, FileEntry] | None = None
    """Of the files, once they are written."""
    committing: bool = False
    blocked_s: float = 0.0


class AsynchronousSaves:
    """The asynchronous saves of this rank, one at a time. To be made on the main thread.

    Args:
        expected_bytes: what a save of this rank is expected to hold (`train_state.expected_bytes`).
        root: where the saves go.
    """

    def __init__(self, backend: Backend, parallel: ParallelState, expected_bytes: int, root: Location):
        self._backend, self._parallel = backend, parallel
        self._buffer = StagingBuffer(backend, expected_bytes + _ROOM_FOR_HEADERS)
        first = parallel.rank == 0
        preload = [commit_parts.__module__] if first else []
        # Through the page cache a lower priority was seen to slow the steps down (docs/checkpoints.md).
        passes_the_cache = isinstance(root, Path) and is_of_one_host(root)
        self._writer = WriterProcess(self._buffer.fd, self._buffer.nbytes, preload, gives_way=passes_the_cache)
        self._save: _UnderWay | None = None

    @property
    def save_id(self) -> str:
        """Id of the save under way; "" where there is none."""
        return self._save.begun.attempt.save if self._save is not None else ""

    @property
    def under_way(self) -> bool:
        """Whether a save has begun and is not committed yet; the same on all ranks."""
        return self._save is not None

    def begin(self, root: Location, state: TrainState, run: RunConfig, started_s: float) -> None:
        """Begin a save; a collective over all ranks. None may be under way (`finish`).

        With overlap_param_gather the parameters must have been gathered before. Tensors of the state must not change
        before `staged`.

        Args:
            started_s: when training stopped for it (time.perf_counter).

        Raises:
            ResourceError: on every rank: no folder, space or memory for it.
        """
        assert self._save is None, "one save at a time"
        begun = begin_save(root, state, run, self._parallel)
        try:
            with together(self._parallel):
                images = FileImages()
                save = _UnderWay(begun, images, write_part(begun, self._parallel.rank, images.add), started_s)
                memory = self._buffer.memory(images.nbytes)
        except BaseException:
            self._abandon(begun)
            raise
        # The copies have a stream of their own: what they read is there, and nothing else writes to it.
        self._backend.synchronize()

        def copy() -> None:
            images.copy_to(memory, self._backend)
            self._writer.submit(write_images, self._buffer.fd, images.images)

        save.copy = CopyBeside(copy, "checkpoint copy")
        save.blocked_s = time.perf_counter() - started_s
        self._save = save

    def staged(self) -> None:
        """Wait until nothing of the save under way reads the tensors of the state any more; this rank alone."""
        if self._save is not None and self._save.copy is not None:
            self._save.blocked_s += self._save.copy.wait()

    def report(self) -> Report:
        """How far this rank is."""
        save = self._save
        if save is None or save.copy is None or not save.copy.is_over:
            return Report()
        save.error = save.error or save.copy.error
        if save.error is None and save.entries is None and self._writer.is_over():
            try:
                save.entries = self._written(save)
            except Exception as error:
                save.error = error
        if save.error is not None:
            return Report(failed=True)
        if save.committing and self._parallel.rank == 0:
            return Report(over=self._writer.is_over())
        return Report(over=save.entries is not None)

    def settle(self, over: int, failed: int) -> CommittedSave | None:
        """Go on to the next phase where all ranks are there; a collective where `over` counts all ranks, or one failed.

        Args:
            over: ranks that reported their work to be over.
            failed: ranks that reported an error.

        Returns:
            The save, once it is committed.

        Raises:
            ResourceError, CheckpointError: on every rank; the save is given up, older checkpoints are untouched.
        """
        save = self._save
        if save is None or not (failed or over == self._parallel.world_size):
            return None
        if failed or save.committing:
            return self.finish()
        self._hand_parts_over(save)
        return None

    def finish(self) -> CommittedSave | None:
        """Wait for the save under way; a collective. None where there is none. Raises as `settle`."""
        save = self._save
        if save is None:
            return None
        started = time.perf_counter()
        self.staged()
        try:
            if not save.committing:
                with together(self._parallel):
                    if failed := save.error or (save.copy.error if save.copy is not None else None):
                        raise failed
                    save.entries = save.entries or self._written(save)
                self._hand_parts_over(save)
            with together(self._parallel):
                if self._parallel.rank == 0:
                    save.begun.branch.saved(look_at(self._writer.result()))
        except BaseException:
            self._abandon(save.begun)
            raise
        finally:
            self._save = None
        remember_files(save.begun.attempt.final, save.entries or {})
        now = time.perf_counter()
        blocked = save.blocked_s + now - started
        return CommittedSave(save.begun.record.step, save.begun.attempt.final, now - save.started_s, blocked)

    def close(self) -> None:
        """End the writer process and give the memory back. This rank alone, also after an error.

        A commit that has begun is waited for: it needs no other rank any more.
        """
        save, self._save = self._save, None
        if save is not None:
            if save.copy is not None:
                save.copy.wait()
            if save.committing and self._parallel.rank == 0:
                self._writer.wait(_PATIENCE_S)
        self._writer.close()
        self._buffer.close()

    def _written(self, save: _UnderWay) -> dict[str, FileEntry]:
        """Wait for the files of this rank."""
        try:
            return self._writer.result()
        except OSError as error:
            place = Path(error.filename) if error.filename else save.begun.attempt.temporary
            raise disk_error(place, error) from error

    def _hand_parts_over(self, save: _UnderWay) -> None:
        """All ranks have written: rank 0 gets their parts and lets its process commit them. Collective."""
        assert save.entries is not None
        assert save.entries.keys() == save.part.files.keys()
        assert all(save.part.files[name].size == entry.size for name, entry in save.entries.items())
        part = replace(save.part, files=save.entries)
        gathered = gather_on_rank_0((part, save.begun.scalars))
        if self._parallel.rank == 0:
            self._writer.submit(commit_parts, save.begun.attempt, gathered, save.begun.record)
        save.committing = True

    def _abandon(self, begun: BegunSave) -> None:
        """Rank 0 removes the folder; every rank has ended its writing, or could not be asked."""
        if self._parallel.rank == 0:
            protocol.abandon(begun.attempt)
