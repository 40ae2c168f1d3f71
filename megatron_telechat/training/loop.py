"""The training run, or one stage of it: build everything in order, then step, evaluate and save until it is done."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from megatron_telechat.backend import get_backend
from megatron_telechat.checkpoint import LoadedInfo, TrainState
from megatron_telechat.checkpoint.asynchronous import CommittedSave
from megatron_telechat.checkpoint.lineage import Branch
from megatron_telechat.checkpoint.start import Start
from megatron_telechat.config.run_stages import Position, RunStages
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.config.trace import step_windows
from megatron_telechat.config.yaml_io import dump_run_config
from megatron_telechat.data import (
    Datasets,
    Progress,
    batches,
    build_datasets,
    data_fingerprint,
    data_plan,
)
from megatron_telechat.errors import EXIT_OK, EXIT_SIGNAL, CheckpointError, UserError
from megatron_telechat.locations import Location
from megatron_telechat.parallel.agreement import from_rank_0, together
from megatron_telechat.parallel.state import initialize
from megatron_telechat.training.auto import AutoSettings, settle_auto
from megatron_telechat.training.averages import Averages
from megatron_telechat.training.banner import banner, resume_differences, stage_event, stage_line, stages_lines
from megatron_telechat.training.beginning import Beginning, continued_branch, find_beginning
from megatron_telechat.training.build import build_trained
from megatron_telechat.training.console import Console
from megatron_telechat.training.evaluation import Evaluations
from megatron_telechat.training.forecast import Forecast
from megatron_telechat.training.learning_rate import StageRates
from megatron_telechat.training.local_tier import LocalTier
from megatron_telechat.training.locate import Again
from megatron_telechat.training.metrics import Meter
from megatron_telechat.training.numerics import require_finite_weights
from megatron_telechat.training.optimizer import set_learning_rate
from megatron_telechat.training.param_gather import gathered_parameters
from megatron_telechat.training.paths import RunPaths
from megatron_telechat.training.phases import ScheduleTimers
from megatron_telechat.training.progress import progress_at
from megatron_telechat.training.pulse import PULSE, Activity, Phase
from megatron_telechat.training.reference import reference_log_probs
from megatron_telechat.training.reports import Reports
from megatron_telechat.training.resuming import load_beginning
from megatron_telechat.training.routing import StepRouting
from megatron_telechat.training.saving import Saving
from megatron_telechat.training.signals import StopRequests
from megatron_telechat.training.spikes import SpikeWindow
from megatron_telechat.training.step import StepResult, close_iterators, data_iterators
from megatron_telechat.training.trace import exchange_traces
from megatron_telechat.training.unsaved import unsaved_note
from megatron_telechat.training.writers import MetricsWriter, recorded_at


class Trainer:
    """One training run on this rank, or one stage of it (`training.sequence` goes from stage to stage).

    The constructor reads top-down: device, ranks, model, optimizer, data, checkpoint, reports. Every
    phase that can fail on one rank alone ends in an agreement, so that all ranks fail together.

    Args:
        run: the whole run, or that of the stage.
        requests: stop requests that are listened to already; unset: from here on.
        stages: all stages of the run; unset: it has none.
        beginning: the checkpoint to go on from; unset: it is looked for.
        before: the trainer of the stage before in this process, whose reports go on.
        tier: the local checkpoints of the run; None: it has none.
    """

    def __init__(
        self,
        run: RunConfig,
        origins: Mapping[str, str] | None = None,
        requests: StopRequests | None = None,
        stages: RunStages | None = None,
        beginning: Beginning | None = None,
        before: Reports | None = None,
        tier: LocalTier | None = None,
    ):
        self.run, self.tier = run, tier
        self.stages = stages or RunStages.of(run, origins)
        self.stage = next(stage for stage in self.stages.stages if stage.run is run)
        self.backend = get_backend(run.training.device)
        self.backend.install()
        if run.training.deterministic:
            self.backend.use_deterministic_algorithms()
        self.state = initialize(run, self.backend)

        PULSE.enter(Phase.MODEL)
        self.paths = RunPaths.of(run)
        self.requests = requests or StopRequests(self.paths.run_dir, watch_files=self.state.rank == 0)
        first = self.state.rank == 0
        self.console = before.console if before else Console(first, run.training.train_iters, run.logging.progress)
        with together(self.state):
            self.paths.create()

        built = build_trained(run, self.state, self.backend)
        self.virtual_stages, self.shards = built.virtual_stages, built.shards
        self.optimizer, self.train_step = built.optimizer, built.train_step
        self.averages = Averages(self.optimizer, self.shards, run.average)
        self.timers = ScheduleTimers(self.backend.device)
        self.timers.install(self.virtual_stages)

        with together(self.state):
            self.data_plan = data_plan(run.data)
            self.fingerprint = data_fingerprint(run, self.data_plan) if first else None
        self.position = Position()
        self._passed_over = step_windows(run.training.iterations_to_skip)
        self.protected: Location | None = None
        self.saved: Location | None = None
        self.branch = Branch()
        PULSE.enter(Phase.LOADING)
        beginning = beginning or find_beginning(self.stages, self.tier)
        self.reference = reference_log_probs(
            *(run, self.data_plan, beginning.start, self._train_state({}), self.virtual_stages, self.state),
            *(self._asked_to_stop, self.console.say),
        )
        self.resumed: LoadedInfo | None = self._resume(beginning)
        PULSE.step = self.step
        PULSE.enter(Phase.DATA_INDEX)
        self.progress = self._progress()
        found = (self.progress, self.data_plan, self.reference.tables)
        self.datasets: Datasets = build_datasets(run, self.state, *found)
        PULSE.enter(Phase.MEASURING)

        with together(self.state):
            records = (self.paths.run_dir, first, self.step, self.requests.may_write)
            self.writer = before.writer if before else MetricsWriter(run, *records)
        self._iterators_open: list = []
        self.saving = Saving(run, self.state, self.backend, self.requests, self._train_state({}), tier)
        self.train_step.saves = self.saving
        self.evaluations = Evaluations(
            *(self.virtual_stages, self.averages, lambda dataset: self._iterators(dataset, 0)),
            *(run, self.state, self.backend, self.saving.staged, self._asked_to_stop),
        )
        self._introduce(origins or {}, before)
        self.auto = self._settle_auto()
        self.traces = exchange_traces(self.virtual_stages, run, self.state, self.paths.run_dir)
        self.routing = StepRouting(self.virtual_stages, run, self.state, self.fingerprint, self.step + 1)
        for line in self.routing.about():
            self.console.say(line)
        with together(self.state):
            self.forecast = Forecast.of(run, self.backend)
        self.rates = StageRates(self.stages, self.stage, self.position)
        self._reported = self.step
        self._warned = before is not None and before.warned
        self._warn_if_unsaved(self.forecast.iteration_s, "predicted")
        self.meter = Meter(run, self.state, self.backend, self.virtual_stages, self.timers.clock)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.position.step

    @property
    def consumed_samples(self) -> int:
        """Training samples they consumed."""
        return self.position.samples

    # ---- the run ----------------------------------------------------------------------------

    def fit(self) -> int | None:
        """Train to train_iters, or to a stop request, or to the end of the stage.

        Returns:
            The exit code; None: another stage goes on from the checkpoint just saved.

        Raises:
            UserError: where all ranks have the same error, the save under way was finished before.
        """
        if self._is_last():
            return self._already_done()
        try:
            return self._steps()
        except UserError as error:
            if error.agreed:
                self._settle(self.saving.finish())
            raise

    def _steps(self) -> int | None:
        PULSE.turn_to(Activity.TRAINING, Phase.BATCH)
        self._iterators_open = iterators = self.training_iterators()
        while not self._is_last():
            result, lr = self.take_step(iterators)
            save_asked = result.save and not self.saving.answers_request
            self.saving.settle_locally(self.console.say, self.writer.write)
            self._settle(self.saving.settle())
            if result.skipped is not None:
                self._say_skipped(result.skipped)
            for spike in self.spikes.observe(result.loss, result.grad_norm):
                self.console.say(spike.line(self.step, self.spikes.length))
                self.writer.write(spike.event(self.step))
            over = self._is_over()
            if self.step % self.run.logging.log_interval == 0 or self._is_last() or over:
                self._report(result, lr)
            if self._is_last():
                self.steps_taken.require_some_taken(self.step)
            stop = result.stop
            # At the last step the weights are saved before they are evaluated.
            evaluates = self.datasets.valid is not None and self._due(self.run.evaluation.eval_interval)
            if evaluates and not self._is_last() and not stop:
                stop = not self._evaluate()
            leave = stop or self._due(self.run.training.exit_interval)
            wait = leave or over or self._is_last()
            if wait or save_asked or self._due(self.run.checkpoint.save_interval):
                self._save(wait, save_asked)
                stop = stop or self._asked_to_stop()
            elif self.tier is not None and self.tier.is_due(self.step):
                self._save_locally()
            if (stop or leave) and not self._is_last():
                self._settle(self.saving.finish())
                self.console.say(self.forecast.line())
                return self._leave(stop)
            if over:
                self.console.say(self.forecast.line())
                return None
        self.console.say(self.forecast.line())
        return self._finish()

    def _already_done(self) -> int:
        """A run that is complete: nothing is trained, nothing saved; an evaluation that is still missing is made up
        for."""
        target = self.run.training.train_iters
        self.console.say(
            f"nothing to train: {self.resumed.path if self.resumed else 'the run'} is at step {self.step} of {target}"
        )
        found: set[str] = set()
        with together(self.state):
            if self.state.rank == 0:
                found = recorded_at(self.paths.run_dir, self.step)
        return self._finish(from_rank_0(found))

    def _finish(self, recorded: Collection[str] = ()) -> int:
        """Evaluate the final weights, once on each split there is. Returns the exit code."""
        for key, dataset in (("valid_loss", self.datasets.valid), ("test_loss", self.datasets.test)):
            if dataset is not None and key not in recorded and not self._evaluate(key):
                self.requests.clear_files()
                self.console.say("stop request: run the same command again for the final evaluation")
                return EXIT_SIGNAL
        if self.tier is not None:
            self.tier.remove()
        not_taken = self.step - self.steps_taken.taken
        steps = f"{self.step} steps" + (f", {not_taken} of them skipped" if not_taken else "")
        self.console.say(f"done: {steps}, checkpoints in {self.paths.save_dir}")
        return EXIT_OK

    def training_iterators(self):
        """Micro-batches from the first sample that was not consumed yet, for each virtual stage that reads data."""
        return self._iterators(self.datasets.train, self.consumed_samples)

    def _iterators(self, dataset, consumed_samples: int):
        return data_iterators(
            lambda: batches(dataset, self.run, self.state, consumed_samples, self.auto.row_costs),
            len(self.virtual_stages),
            self.run,
            self.state,
        )

    def take_step(self, iterators) -> tuple[StepResult, float]:
        """One optimizer step; moves the step and sample counters on. Returns the result and the learning rate.

        A step that is not taken moves these counters too, but not the learning rate.
        """
        PULSE.step = self.step
        lr = self.rates.at(self.steps_taken.taken, self.position.tokens)
        set_learning_rate(self.optimizer, self.run, lr)
        if any(self.step + 1 in window for window in self._passed_over):
            result = self.train_step.pass_over(iterators, self.requests.poll())
        else:
            step, make = self.train_step, self.training_iterators
            again = Again.of_step(step, make, self.consumed_samples, self.writer.write)
            with ExitStack() as watched:
                for each in (*self.traces, self.routing):
                    watched.enter_context(each.step(self.step + 1))
                result = step(iterators, self.step, self.requests.poll(), again)
        self.position = self.position.after(self.run)
        self.averages.follow(self.step, taken=result.skipped is None)
        self.meter.add(result)
        self.steps_taken.add(result, self.step, self.run.optimizer.max_skipped_steps)
        if self.run.training.empty_unused_memory_level:
            self.backend.empty_cache()
        return result, lr

    def release(self) -> None:
        """Give threads, files and signal handlers back; the process groups stay."""
        self.hand_over().close()

    @property
    def reports(self) -> Reports:
        """What goes on when this stage is over."""
        return Reports(self.stage, self.console, self.writer, self.requests, self._warned, self.tier)

    def hand_over(self) -> Reports:
        """Give threads back; files and signal handlers stay open for the next stage."""
        close_iterators(self._iterators_open)
        self.saving.close()
        return self.reports

    def continuation(self) -> Beginning:
        """What the next stage of this process begins with: the checkpoint just saved."""
        assert self.saved is not None, "a stage ends with a checkpoint"
        return Beginning(Start(self.saved), self.position, self.branch, self.protected)

    # ---- between steps ----------------------------------------------------------------------

    def _report(self, result: StepResult, lr: float) -> None:
        PULSE.enter(Phase.REPORT)
        record = {**self.meter.record(self.position, lr, result), **self.forecast.fields()}
        if self.tier is not None and self.tier.step is not None:
            record["local_step"] = self.tier.step
        self.writer.write(record)
        total = self.backend.memory().total_bytes
        self.console.step(record, total / 2**30 if total else None, self._steps_left())
        for slow in self.meter.slow_ranks:
            self.console.say(slow.line())
            self.writer.write(slow.event(self.step))
        self.console.say(self.forecast.observe(record, self.step - self._reported))
        self._warn_if_unsaved(self.forecast.measured_s, "measured")
        self._reported = self.step

    def _say_skipped(self, reason: str) -> None:
        """A step that was not taken, at once and whatever the log interval."""
        self.console.say(f"step {self.step} skipped: {reason}")
        self.writer.write({"event": "skipped_step", "step": self.step, "reason": reason})

    def _evaluate(self, key: str = "valid_loss") -> bool:
        """Evaluate the weights and their averages on the validation data, or for ``test_loss`` on the test data.
        False: a stop request cut it off."""
        dataset, name = (self.datasets.valid, "validation") if key == "valid_loss" else (self.datasets.test, "test")
        with self.meter.excluded(), PULSE.within(Activity.EVALUATION, Phase.BATCH):
            losses = self.evaluations.losses(dataset)
            if losses is not None:
                self.writer.write(losses.record(self.step, key))
                self.console.say(losses.lines(self.step, name))
        return losses is not None

    def _asked_to_stop(self) -> bool:
        return self.requests.asked_anywhere(self.backend.device)

    def _warn_if_unsaved(self, seconds: float | None, how: str) -> None:
        """Once, as soon as it is known that the run is long and saves nothing on its way."""
        note = None if self._warned else unsaved_note(self.run, self.step, seconds, how)
        if note is not None:
            self._warned = True
            self.console.say(f"note: {note}")

    def _save(self, wait: bool = True, requested: bool = False) -> None:
        """Save this step, after the save under way.

        Args:
            wait: for the commit, whatever the mode.
            requested: by a trigger file.
        """
        with self.meter.excluded(), PULSE.within(Activity.SAVING, Phase.WRITING):
            started = time.perf_counter()
            self._settle(self.saving.finish())
            with self._state_to_save() as state:
                self._settle(self.saving.save(state, wait, requested, started))

    def _save_locally(self) -> None:
        """Begin a save of this step onto the disks of the nodes."""
        with self.meter.excluded(), PULSE.within(Activity.SAVING, Phase.STAGING):
            started = time.perf_counter()
            with self._state_to_save() as state:
                self.saving.save_locally(state, started)

    @contextmanager
    def _state_to_save(self) -> Iterator[TrainState]:
        """What a checkpoint of this step holds; collective.

        Raises:
            NumericsError: a weight is not finite.
        """
        with gathered_parameters(self.virtual_stages):
            require_finite_weights(self.step, self.shards)
            parts = (self.steps_taken.extra, self.spikes.extra, self.datasets.order.saved(), self.auto.extra)
            parts += (self.averages.extra, self.reference.extra)
            extra = {key: value for part in parts for key, value in part.items()}
            yield replace(self._train_state(extra), averages=self.averages.slices(begun=True))

    def _settle(self, committed: CommittedSave | None) -> None:
        """A save has become the newest checkpoint."""
        if committed is None:
            return
        self.saved = committed.folder
        waited = f", waited {committed.blocked_s:.2f} s" if committed.blocked_s < committed.seconds else ""
        self.console.say(f"step {committed.step}  saved {committed.folder} in {committed.seconds:.1f} s{waited}")

    def _leave(self, stop: bool) -> int:
        reason = "stop request" if stop else f"exit_interval {self.run.training.exit_interval}"
        self.console.say(f"{reason}: stopped after step {self.step}; run the same command again to continue")
        return EXIT_SIGNAL if stop else EXIT_OK

    def _due(self, interval: int | None) -> bool:
        return bool(interval) and self.step % interval == 0

    def _is_last(self) -> bool:
        return self.step >= self.run.training.train_iters

    def _is_over(self) -> bool:
        """Whether the next step is one of another stage."""
        return not self._is_last() and self.stages.at(self.position) is not self.stage

    def _steps_left(self) -> float:
        """How many steps of the present size the rest of the run is, by its tokens."""
        end = self.stages.spans(self.position)[-1].end
        assert end is not None, "a training has an end"
        one = self.position.after(self.run).tokens - self.position.tokens
        return (end.tokens - self.position.tokens) / one

    # ---- start ------------------------------------------------------------------------------

    def _train_state(self, extra: Mapping[str, Any]) -> TrainState:
        """What a checkpoint holds.

        Args:
            extra: what the run keeps beside weights and optimizer, JSON; a load does not read it.
        """
        return TrainState(
            shards=self.shards,
            optimizer=self.optimizer,
            step=self.step,
            consumed_samples=self.consumed_samples,
            backend=self.backend,
            data_fingerprint=self.fingerprint,
            resumed_from=self.protected,
            extra=extra,
            branch=self.branch,
            averages=self.averages.slices(),
            require_writable=self.requests.claims,
        )

    def _resume(self, found: Beginning) -> LoadedInfo | None:
        """Go on from a checkpoint of this run, or begin with other weights, or from the initial ones."""
        resumed = load_beginning(found, self._train_state({}), self.run, self.state, self.stages, self.fingerprint)
        info, self.position, self.steps_taken = resumed.info, resumed.position, resumed.steps_taken
        extra = info.extra if info is not None and not info.weights_only else {}
        self.spikes = SpikeWindow.of(self.run.logging.spike_window, self.run.logging.spike_threshold, extra)
        if self.tier is not None:
            self.tier.begun(resumed.goes_on_from)
        self.averages.begin(self.step, extra)
        self.protected = found.protected or (info.path if info is not None else None)
        self.branch = continued_branch(found, info, self.paths.save_dir)
        return info

    def _progress(self) -> Progress:
        """How far the run has read: the samples it needs, and their order, follow from that."""
        info = self.resumed
        with together(self.state):
            if self.stages.at(self.position) is not self.stage:
                raise CheckpointError(
                    f"the checkpoint of step {self.step} is not one of {self.stage.title}",
                    str(info.path) if info is not None else "",
                    "a checkpoint was damaged or changed while the run began; run the same command again",
                )
            if info is None:
                return progress_at(self.stages, self.position, {}, None, "")
            return progress_at(self.stages, self.position, info.extra, info.config, str(info.path))

    def _settle_auto(self) -> AutoSettings:
        """What the run leaves to us, once its checkpoint is loaded."""
        saved, trains = self.resumed.extra if self.resumed else {}, not self._is_last()
        ranks = (self.virtual_stages, self.run, self.state, self.backend)
        found = settle_auto(*ranks, saved, self.paths.run_dir, trains, self.requests.may_write)
        for message, event in found.news(self.step):
            self.console.say(message)
            if event is not None:
                self.writer.write(event)
        return found

    def _introduce(self, origins: Mapping[str, str], before: Reports | None) -> None:
        """Banner, what a resume changed, and the resolved configuration in the run folder; between two stages of one
        process, what changes."""
        if before is not None:
            changes = self.stages.changes(self.stage, before.stage)
            self.console.say(f"step {self.step}  {stage_line(self.stages, self.stage, changes)}")
            notes = (self.resumed.message if self.resumed else "").splitlines()[1:]
            for line in (*notes, *(f"data  {each}" for each in self.datasets.summary)):
                self.console.say(f"  {line}")
            self.writer.write(stage_event(self.step, self.stage, changes))
            return
        self.console.say(banner(self.run, self.state, self.backend, self.paths, self.datasets, origins))
        for line in (*self.reference.about, *self.saving.about, *stages_lines(self.stages, self.position)):
            self.console.say(line)
        if self.resumed is not None:
            self.console.say(self.resumed.message)
            for line in resume_differences(self.run, self.resumed.config, origins, self.resumed.weights_only):
                self.console.say(f"  changed since the checkpoint: {line}")
        if self.state.rank == 0:
            self.paths.write_config(self.stages.document or dump_run_config(self.run))
