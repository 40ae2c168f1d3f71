"""The stages of a run one after another in one process: each is a trainer of its own over one line of checkpoints.

At a switch the run is saved, the model and the process groups are taken down, and the next stage loads what was saved,
in its own layout. So a resume on either side of a switch does nothing else than the switch itself.
"""

from __future__ import annotations

import gc

from megatron_telechat.backend import Backend
from megatron_telechat.config.length import counts_epochs
from megatron_telechat.config.run_stages import RunStages
from megatron_telechat.data import progress_ahead
from megatron_telechat.data.sources import require_lasting
from megatron_telechat.parallel.agreement import agree, together
from megatron_telechat.parallel.state import destroy, join
from megatron_telechat.training.beginning import Beginning, find_beginning
from megatron_telechat.training.length import counted_together
from megatron_telechat.training.local_tier import open_local_tier
from megatron_telechat.training.loop import Trainer
from megatron_telechat.training.pulse import PULSE, Activity, Phase
from megatron_telechat.training.signals import StopRequests
from megatron_telechat.training.watch import Watch


class StageSequence:
    """The stages of a run from where it begins; the constructor is ready for the first step.

    Args:
        watch: over this rank, which gets its folder once the ranks are joined; None: nobody watches.

    Raises:
        UserError: on every rank.
    """

    def __init__(self, stages: RunStages, requests: StopRequests, backend: Backend, watch: Watch | None = None):
        self._stages, self._requests, self._backend = stages, requests, backend
        PULSE.enter(Phase.JOINING)
        join(stages.stages[0].run, backend)
        if watch is not None:
            watch.open_together()
        self._tier = open_local_tier(stages.stages[0].run, backend)
        beginning = self._beginning() if stages.several else None
        if counts_epochs(stages.stages[0].run):
            beginning = find_beginning(stages, self._tier)
            PULSE.enter(Phase.DATA_INDEX)
            self._stages = stages = counted_together(stages, beginning.position)
        stage = stages.at(beginning.position) if beginning is not None else stages.stages[0]
        self._trainer: Trainer | None = Trainer(stage.run, stage.origins, requests, stages, beginning, tier=self._tier)
        self._reports = self._trainer.reports
        if stages.several:
            self._require_data(self._trainer)

    def _beginning(self) -> Beginning:
        """Where the run goes on decides the layout of the ranks, so it is agreed before there are groups."""
        agree("stages", [(str(stage.start), stage.run) for stage in self._stages.stages])
        return find_beginning(self._stages, self._tier)

    def _require_data(self, trainer: Trainer) -> None:
        """What the stages to come will read must be there before the first step."""
        with together(trainer.state):
            if trainer.state.rank == 0:
                ahead = progress_ahead(self._stages, trainer.position, trainer.progress.order)
                require_lasting(trainer.data_plan, [(span.stage.run, progress) for span, progress in ahead])

    def fit(self) -> int:
        """Train to the end of the run, or to a stop request. Returns the exit code."""
        try:
            while True:
                assert self._trainer is not None, "a switch ends with a trainer"
                code = self._trainer.fit()
                if code is not None:
                    return code
                self._switch()
        finally:
            # The process groups stay as they are: after an error taking them down could wait for a rank that is gone.
            if self._trainer is not None:
                self._trainer.hand_over()
            self._reports.close()

    def _switch(self) -> None:
        """Go over to the stage of the next step."""
        PULSE.turn_to(Activity.SWITCHING_A_STAGE, Phase.MODEL)
        assert self._trainer is not None
        reports, beginning = self._trainer.hand_over(), self._trainer.continuation()
        reports.console.forget_speed()
        self._trainer = None
        gc.collect()  # model and optimizer lie in cycles, and two of them do not fit on a device
        self._backend.empty_cache()
        self._backend.reset_peak_memory()
        destroy(keep_world=True)
        stage = self._stages.at(beginning.position)
        self._trainer = Trainer(stage.run, stage.origins, self._requests, self._stages, beginning, reports, self._tier)
