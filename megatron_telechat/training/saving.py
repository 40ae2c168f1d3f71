"""How a run saves: in between the steps, or beside them (`checkpoint.asynchronous`)."""

from __future__ import annotations

import time

from megatron_telechat.backend import Backend
from megatron_telechat.checkpoint import TrainState, save_checkpoint
from megatron_telechat.checkpoint.asynchronous import AsynchronousSaves, CommittedSave, Report
from megatron_telechat.checkpoint.train_state import expected_bytes
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.parallel.agreement import together
from megatron_telechat.parallel.state import ParallelState
from megatron_telechat.training.save_mode import decide_save_mode
from megatron_telechat.training.signals import StopRequests
from megatron_telechat.training.tolerance import tolerated


class Saving:
    """The saves of one run, or of one stage; the same decisions on all ranks. The constructor is collective.

    Args:
        state: what a save would hold now.

    Attributes:
        about: how the run saves, a line for a person.
        answers_request: the save under way was asked for by a trigger file, which is still there.

    Raises:
        ResourceError: on every rank, see `decide_save_mode`.
    """

    def __init__(
        self, run: RunConfig, parallel: ParallelState, backend: Backend, requests: StopRequests, state: TrainState
    ):
        self._run, self._parallel, self._requests = run, parallel, requests
        needed = expected_bytes(state, run, parallel)
        mode = decide_save_mode(run, needed)
        self.about = mode.about
        self.answers_request = False
        self._counts = (0, 0)
        self._beside: AsynchronousSaves | None = None
        with together(parallel):
            if mode.asynchronous:
                self._beside = AsynchronousSaves(backend, parallel, needed)

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
        if wait or self._beside is None:
            folder = save_checkpoint(self._run.save_dir, state, self._run, self._parallel)
            with tolerated("the trigger files"):
                self._requests.clear_files()
            seconds = time.perf_counter() - started_s
            return CommittedSave(state.step, folder, seconds, seconds)
        self._beside.begin(self._run.save_dir, state, self._run, started_s)
        self.answers_request = requested
        return None

    def report(self) -> Report:
        """How far this rank is with the save under way, for the agreement of a step."""
        return self._beside.report() if self._beside is not None else Report()

    def staged(self) -> None:
        """Wait until the weights may change."""
        if self._beside is not None:
            self._beside.staged()

    def heard(self, over: int, failed: int) -> None:
        """So many ranks reported in the step that is being taken."""
        self._counts = over, failed

    def settle(self) -> CommittedSave | None:
        """After a step, on all ranks: the save under way, if it is committed. Raises as `save`."""
        (over, failed), self._counts = self._counts, (0, 0)
        return self._noted(self._beside.settle(over, failed)) if self._beside is not None else None

    def finish(self) -> CommittedSave | None:
        """Wait for the save under way; a collective. None where there is none. Raises as `save`."""
        return self._noted(self._beside.finish()) if self._beside is not None else None

    def close(self) -> None:
        """Give processes and memory back; this rank alone."""
        if self._beside is not None:
            self._beside.close()
            self._beside = None

    def _noted(self, committed: CommittedSave | None) -> CommittedSave | None:
        if committed is not None and self.answers_request:
            with tolerated("the trigger files"):
                self._requests.clear_files(save_only=True)
            self.answers_request = False
        return committed
