"""How a run saves: in between the steps, or beside them (`checkpoint.asynchronous`); and onto the disks of its nodes
(`training.local_tier`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from megatron_telechat.backend import Backend
from megatron_telechat.checkpoint import TrainState, save_checkpoint
from megatron_telechat.checkpoint.asynchronous import AsynchronousSaves, CommittedSave, Report
from megatron_telechat.checkpoint.train_state import expected_bytes
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.parallel.agreement import together
from megatron_telechat.parallel.state import ParallelState
from megatron_telechat.training.local_tier import LocalTier
from megatron_telechat.training.save_mode import decide_save_mode
from megatron_telechat.training.signals import StopRequests
from megatron_telechat.training.tolerance import tolerated


class Saving:
    """The saves of one run, or of one stage; the same decisions on all ranks. The constructor is collective.

    Args:
        state: what a save would hold now.
        tier: the local checkpoints of the run; None: it has none.

    Attributes:
        about: how the run saves, lines of the banner.
        answers_request: the save under way was asked for by a trigger file, which is still there.

    Raises:
        ResourceError: on every rank, see `decide_save_mode`.
    """

    def __init__(
        self,
        run: RunConfig,
        parallel: ParallelState,
        backend: Backend,
        requests: StopRequests,
        state: TrainState,
        tier: LocalTier | None = None,
    ):
        self.tier = tier
        self._run, self._parallel, self._requests = run, parallel, requests
        needed = expected_bytes(state, run, parallel)
        mode = decide_save_mode(run, needed)
        self.about = [f"  saves     {mode.about}"] + ([] if tier is None else [f"  local     {tier.about}"])
        self._branch = state.branch
        self.answers_request = False
        self._counts: Sequence[int] = (0, 0, 0, 0)
        self._beside: AsynchronousSaves | None = None
        if tier is not None:
            tier.require_memory(needed, mode.asynchronous)
        with together(parallel):
            if mode.asynchronous:
                self._beside = AsynchronousSaves(backend, parallel, needed, run.save_dir)

    def save(self, state: TrainState, wait: bool, requested: bool, started_s: float) -> CommittedSave | None:
        """Save; a collective over all ranks. None is under way (`finish`).

        Args:
            wait: return with the commit, whatever the mode.
            requested: by a trigger file.
            started_s: when training stopped for it (time.perf_counter).

        Returns:
            None where the save goes on beside the steps.

        Raises:
            ResourceError, CheckpointError: on every rank.
        """
        self._branch = state.branch
        if self.tier is not None:
            self.tier.staged()
        if wait or self._beside is None:
            folder = save_checkpoint(self._run.save_dir, state, self._run, self._parallel)
            self._continue()
            with tolerated("the trigger files"):
                self._requests.clear_files()
            seconds = time.perf_counter() - started_s
            return CommittedSave(state.step, folder, seconds, seconds)
        self._beside.begin(self._run.save_dir, state, self._run, started_s)
        self.answers_request = requested
        return None

    def save_locally(self, state: TrainState, started_s: float) -> None:
        """Begin a save onto the disks of the nodes; on all ranks, where `LocalTier.is_due` said so."""
        assert self.tier is not None
        if self._beside is not None:
            self._beside.staged()
        under_way = self._beside.save_id if self._beside is not None else ""
        self.tier.save(state, self._run, self._parallel, under_way, started_s)

    def report(self) -> tuple[bool, ...]:
        """How far this rank is with the saves under way, for the agreement of a step. A run without local checkpoints
        has two flags: its sums are those of releases before them, bit for bit."""
        shared = self._beside.report() if self._beside is not None else Report()
        return (*shared, *self.tier.report()) if self.tier is not None else shared

    def staged(self) -> None:
        """Wait until the weights may change."""
        if self._beside is not None:
            self._beside.staged()
        if self.tier is not None:
            self.tier.staged()

    def heard(self, counts: Sequence[int]) -> None:
        """So many ranks reported each flag in the step that is being taken."""
        self._counts = counts

    def settle_locally(self, say: Callable[[str], None], write: Callable[[dict[str, Any]], None]) -> None:
        """After a step, on all ranks: the local save under way, told once all nodes have committed it. To be called
        before `settle`, which forgets what was reported.

        Args:
            say: a line for a person; the first time.
            write: a record for the metrics.
        """
        if self.tier is None:
            return
        over, failed = self._counts[2:]
        first = self.tier.step is None
        saved = self.tier.settle(over, failed, self._parallel.world_size)
        if saved is None:
            return
        seconds, waited = round(saved.seconds, 3), round(saved.blocked_s, 3)
        write({"event": "local_save", "step": saved.step, "seconds": seconds, "waited_s": waited})
        if first:
            told = "the lines of the steps tell the newest from here on"
            say(f"step {saved.step}  saved on the nodes in {seconds:.1f} s, waited {waited:.2f} s; {told}")

    def settle(self) -> CommittedSave | None:
        """After a step, on all ranks: the save under way, if it is committed. Raises as `save`."""
        (over, failed), self._counts = self._counts[:2], (0, 0, 0, 0)
        return self._noted(self._beside.settle(over, failed)) if self._beside is not None else None

    def finish(self) -> CommittedSave | None:
        """Wait for the save under way; a collective. None where there is none. Raises as `save`."""
        return self._noted(self._beside.finish()) if self._beside is not None else None

    def close(self) -> None:
        """Give processes and memory back; this rank alone. The local checkpoints of the run stay open."""
        if self.tier is not None:
            self.tier.staged()
        if self._beside is not None:
            self._beside.close()
            self._beside = None

    def _noted(self, committed: CommittedSave | None) -> CommittedSave | None:
        if committed is not None:
            self._continue()
        if committed is not None and self.answers_request:
            with tolerated("the trigger files"):
                self._requests.clear_files(save_only=True)
            self.answers_request = False
        return committed

    def _continue(self) -> None:
        """What is saved onto the nodes from now on goes on from the newest shared checkpoint."""
        if self.tier is not None and self._branch is not None:
            self.tier.goes_on_from(self._branch.newest)
