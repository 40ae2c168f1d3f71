"""Saves onto the disks of the nodes, beside the training: what `asynchronous.AsynchronousSaves` is for the shared
folder, but that nothing of it may end a run or hold it up.

A save goes through the same phases on all ranks, at the same steps:

* *writing*: each rank copies what it writes into its staging buffer; its process writes that to the disk of the node,
  and sends it to the processes that mirror it;
* *committing*: each process renames what it wrote and what it received, and removes what is older than the save before;
* *giving up*, where one rank has failed: each process removes what it wrote.

No phase waits: the ranks say in the all-reduce of a step how far they are, as for the other saves, and a save that is
due while one is under way is left out. Two saves are kept, so that a kill between the renames of two nodes leaves the
one before whole.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_telechat.checkpoint import rng as rng_tree
from megatron_telechat.checkpoint.asynchronous import Report
from megatron_telechat.checkpoint.commit import Attempt
from megatron_telechat.checkpoint.format import PartWriter, versions
from megatron_telechat.checkpoint.local import parts
from megatron_telechat.checkpoint.local.peers import Address
from megatron_telechat.checkpoint.local.worker import LocalSave, commit_part, give_up_part, write_part
from megatron_telechat.checkpoint.manifest import Manifest
from megatron_telechat.checkpoint.meaning import TOKENIZER, tokenizer_of
from megatron_telechat.checkpoint.owned import owned_tensors
from megatron_telechat.checkpoint.parts import Part
from megatron_telechat.checkpoint.staging import CopyBeside, FileImages, StagingBuffer
from megatron_telechat.checkpoint.train_state import TrainState, optimizer_scalars, saved_optimizer, topology
from megatron_telechat.checkpoint.writer_process import WriterProcess, take_memory
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.config.yaml_io import dump_run_config
from megatron_telechat.errors import ResourceError
from megatron_telechat.parallel.state import ParallelState

if TYPE_CHECKING:
    from megatron_telechat.backend import Backend


PART, COPY = "the part of this rank could not be written", "a copy could not be written to another node"


class _Phase(enum.Enum):
    WRITING = enum.auto()
    COMMITTING = enum.auto()
    GIVING_UP = enum.auto()


@dataclass(frozen=True)
class LocalTarget:
    """Where a rank writes, for the whole run.

    Attributes:
        root: the folder of the run on this node.
        run: identifier of the run.
        incarnation: of this start of the job, the same on all ranks; ids of saves are made from it.
        mirrors: processes beside the ranks that keep a copy of what this rank writes.
        prunes: whether this rank's process removes what is too old on this node.
    """

    root: Path
    run: str
    incarnation: str
    secret: str
    mirrors: tuple[Address, ...]
    prunes: bool


@dataclass(frozen=True)
class LocalSaved:
    """A local save that all ranks have committed.

    Attributes:
        seconds: from its begin to the step that heard of it.
        blocked_s: of these, how long this rank's training waited.
    """

    step: int
    save: str
    seconds: float
    blocked_s: float


@dataclass
class _UnderWay:
    """A save of this rank.

    Attributes:
        busy: whether the process was given work whose answer is not there yet; ``work`` is the phase it belongs to.
        done: whether the work of the phase is done.
    """

    step: int
    save: str
    number: int
    started_s: float
    phase: _Phase = _Phase.WRITING
    copy: CopyBeside | None = None
    part: LocalSave | None = None
    work: _Phase = _Phase.WRITING
    busy: bool = False
    done: bool = False
    error: Exception | None = None
    blocked_s: float = 0.0


@dataclass
class LocalSaves:
    """The saves of one rank; the same calls on all ranks.

    Args:
        target: see the class.
        buffer, writer: this rank's alone.
        number: of the newest local save there is, on all nodes.
        kept: that of the newest whole one.

    Attributes:
        problems: what went wrong since they were last taken: with the part of this rank, or with a copy; in words.
        lost: whether a process that writes has ended: there will be no more saves.
    """

    target: LocalTarget
    buffer: StagingBuffer
    writer: WriterProcess
    backend: Backend
    number: int
    kept: int
    problems: list[tuple[str, str]] = field(default_factory=list)
    lost: bool = False
    _save: _UnderWay | None = None
    _tokenizer: Mapping[str, Any] | None = None

    def expect(self, nbytes: int) -> None:
        """Take the memory for copies of so many bytes from the system now, and not at the first save."""
        if self.buffer.nbytes < nbytes and not self.under_way:
            with contextlib.suppress(OSError, ResourceError):
                self.buffer.expect(nbytes)
                self.writer.submit(take_memory, self.buffer.fd, nbytes)
                self.writer.result()

    @property
    def under_way(self) -> bool:
        """Whether a save has begun and is not over."""
        return self._save is not None

    def begin(
        self,
        state: TrainState,
        run: RunConfig,
        parallel: ParallelState,
        continues: Sequence[str],
        under_way: str,
        started_s: float,
    ) -> None:
        """Begin a save; on all ranks, without a collective. None may be under way.

        The parameters must have been gathered, and the tensors of the state must not change before `staged`.

        Args:
            continues, under_way: see `parts.LocalPart`; those of rank 0 count.
            started_s: when training stopped for it (time.perf_counter).
        """
        assert self._save is None
        self.number += 1
        text = f"{self.target.run}/{self.target.incarnation}/{self.number}"
        identifier = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self._save = save = _UnderWay(state.step, identifier, self.number, started_s)
        images = FileImages()
        try:
            attempt = Attempt(parts.part_folder(self.target.root, parallel.rank), state.step, identifier)
            part = self._part(attempt, images, state, run, parallel)
            description = parts.description(
                self.target.run, parallel.rank, parallel.world_size, self.number, continues, under_way,
                optimizer_scalars(state, run),
            )  # fmt: skip
            manifest = self._manifest(part, identifier, description, state, run, parallel)
            mirrors, secret = self.target.mirrors, self.target.secret
            save.part = LocalSave(
                self.target.root, self.target.run, manifest, images.images, mirrors, secret, state.require_writable
            )
            memory = self.buffer.memory(images.nbytes)
            self.backend.synchronize()
        except Exception as error:  # this rank alone: the others hear of it in a step
            save.error = error
            return

        def copy() -> None:
            images.copy_to(memory, self.backend)
            self.writer.submit(write_part, self.buffer.fd, save.part)
            save.busy = True

        save.copy = CopyBeside(copy, "local checkpoint copy")
        save.blocked_s = time.perf_counter() - started_s

    def staged(self) -> None:
        """Wait until nothing reads the tensors of the state any more; this rank alone."""
        if self._save is not None and self._save.copy is not None:
            self._save.blocked_s += self._save.copy.wait()

    def report(self) -> Report:
        """How far this rank is with the phase."""
        save = self._save
        if save is None or (save.copy is not None and not save.copy.is_over):
            return Report()
        if save.copy is not None and save.copy.error is not None:
            save.error, save.copy = save.copy.error, None
        if save.busy and self.writer.is_over():
            self._hear(save)
        if save.phase is _Phase.GIVING_UP:
            return self._give_up(save)
        return Report(over=save.done, failed=save.error is not None)

    def settle(self, over: int, failed: int, ranks: int) -> LocalSaved | None:
        """Go on to the next phase where all ranks are there; the same on all ranks, nothing is waited for.

        Args:
            over, failed: ranks that reported so.

        Returns:
            The save, once all have committed it.
        """
        save = self._save
        if save is None:
            return None
        if save.phase is _Phase.GIVING_UP:
            if over == ranks:
                self._save, self.lost = None, failed > 0
            return None
        if failed:
            if save.error is not None:
                self.problems.append((PART, _in_words(save.error)))
            save.phase, save.done, save.error = _Phase.GIVING_UP, False, None
            return None
        if over < ranks:
            return None
        if save.phase is _Phase.WRITING:
            save.phase, save.done = _Phase.COMMITTING, False
            self._submit(save, commit_part, save.part, self.kept if self.target.prunes else None)
            return None
        self._save, self.kept = None, save.number
        return LocalSaved(save.step, save.save, time.perf_counter() - save.started_s, save.blocked_s)

    def close(self) -> None:
        """End the process and give the memory back; this rank alone. A save under way is lost."""
        if self._save is not None and self._save.copy is not None:
            self._save.copy.wait()
        self.writer.close()
        self.buffer.close()
        if self._save is not None and self._save.part is not None:
            give_up_part(self._save.part)
        self._save = None

    def _submit(self, save: _UnderWay, function: Callable[..., Any], *args: Any) -> None:
        save.work, save.busy = save.phase, True
        self.writer.submit(function, *args)

    def _hear(self, save: _UnderWay) -> None:
        """The process has ended its work; what belongs to an earlier phase counts no more."""
        save.busy = False
        try:
            answer = self.writer.result()
        except Exception as error:
            save.error = error if save.work is save.phase else save.error
            return
        self.problems += [(COPY, text) for text in answer or ()]
        save.done = save.work is save.phase

    def _give_up(self, save: _UnderWay) -> Report:
        """Let the process remove what it wrote, once it is free; a process that has ended is reported as failed."""
        if not save.busy and not save.done:
            if not self.writer.is_alive():
                return Report(over=True, failed=True)
            if save.part is None:
                save.done = True
            else:
                self._submit(save, give_up_part, save.part)
        return Report(over=save.done)

    def _part(
        self, attempt: Attempt, images: FileImages, state: TrainState, run: RunConfig, parallel: ParallelState
    ) -> Part:
        writer = PartWriter(attempt, parallel.rank, write_file=images.add)
        for item in owned_tensors(state.shards, saved_optimizer(state, run), state.averages, parallel):
            writer.add(item.key, item.global_shape, item.offset, item.tensor)
        if state.backend is not None:
            writer.add_rng(parallel.rank, *rng_tree.flatten(state.backend.rng_state()))
        return writer.close()

    def _manifest(
        self,
        part: Part,
        save: str,
        description: Mapping[str, Any],
        state: TrainState,
        run: RunConfig,
        parallel: ParallelState,
    ) -> Manifest:
        """That of a part. What is said once for the whole run is in that of rank 0."""
        first = parallel.rank == 0
        if first and self._tokenizer is None:
            self._tokenizer = tokenizer_of(run) or {}
        tokenizer = {TOKENIZER: self._tokenizer} if self._tokenizer else {}
        return Manifest(
            step=state.step,
            consumed_samples=state.consumed_samples,
            config=dump_run_config(run) if first else "",
            topology=topology(run, parallel),
            versions=versions() if first else {},
            files=part.files,
            tensors=part.tensors,
            rng=(part.rng,) if part.rng else (),
            data_fingerprint=state.data_fingerprint if first else None,
            extra={**state.extra, **tokenizer} if first else {},
            lineage=state.branch.next().to_json() if first and state.branch is not None else None,
            save=save,
            part=description,
        )


def _in_words(error: Exception) -> str:
    problems = getattr(error, "problems", None)
    if problems:
        return f"{problems[0].what} ({problems[0].where})" if problems[0].where else problems[0].what
    place = getattr(error, "filename", None)
    text = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    return f"{text} ({place})" if place else text
