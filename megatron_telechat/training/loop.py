"""The training run: build everything in order, then step, evaluate and save until it is done."""

from __future__ import annotations

import time
from typing import Mapping, Optional

from ..backend import get_backend
from ..checkpoint import LoadedInfo, TrainState, latest_checkpoint, load_checkpoint, save_checkpoint
from ..config.schema import RunConfig
from ..data import batches, build_datasets
from ..errors import EXIT_OK, EXIT_SIGNAL, CheckpointError
from ..model import build_model, parameter_shards, verify_tiling
from ..parallel.agreement import all_ranks, agree
from ..parallel.state import destroy, initialize
from .banner import banner, resume_differences
from .console import Console
from .metrics import Meter
from .optimizer import build_optimizer, gathered_parameters, set_learning_rate, wrap_data_parallel
from .paths import RunPaths
from .signals import StopRequests
from .step import StepResult, TrainStep, chunk_iterators, evaluate
from .writers import MetricsWriter


class Trainer:
    """One training run on this rank.

    The constructor reads top-down: device, ranks, model, optimizer, data, checkpoint, reports. Every
    phase that can fail on one rank alone ends in an agreement, so that all ranks fail together.
    """

    def __init__(self, run: RunConfig, origins: Optional[Mapping[str, str]] = None):
        self.run = run
        self.backend = get_backend(run.training.device)
        self.backend.install()
        self.state = initialize(run, self.backend)
        agree("configuration", run, self.state)

        self.paths = RunPaths.of(run)
        self.console = Console(self.state.rank == 0, run.training.train_iters, run.logging.progress)
        with all_ranks(self.state):
            self.paths.create()

        with all_ranks(self.state):
            models = build_model(run, self.state, self.backend)
        self.shards = parameter_shards(models, run, self.state)
        verify_tiling(self.shards, run, self.state)
        self.chunks = wrap_data_parallel(models, run, self.state)
        self.optimizer = build_optimizer(self.chunks, run, self.state)
        self.train_step = TrainStep(self.chunks, self.optimizer, self.shards, run, self.state, self.backend)

        self.datasets = build_datasets(run, self.state)
        self.step = 0
        self.consumed_samples = 0
        self.resumed = self._resume()

        self.requests = StopRequests(self.paths.run_dir, watch_files=self.state.rank == 0)
        self.writer = MetricsWriter(run, self.paths.run_dir, enabled=self.state.rank == 0)
        self.meter = Meter(run, self.state, self.backend, self.chunks)
        self._introduce(origins or {})

    # ---- the run ----------------------------------------------------------------------------

    def fit(self) -> int:
        """Train to train_iters, or to a stop request. Returns the exit code."""
        iterators = self.training_iterators()
        while self.step < self.run.training.train_iters:
            result, lr = self.take_step(iterators)
            if self.step % self.run.logging.log_interval == 0 or self._is_last():
                self._report(result, lr)
            if self._due(self.run.evaluation.eval_interval):
                self._evaluate()
            leave = result.stop or self._due(self.run.training.exit_interval)
            if leave or result.save or self._due(self.run.checkpoint.save_interval) or self._is_last():
                self._save()
            if leave and not self._is_last():
                return self._leave(result)
        self.console.say(f"done: {self.step} steps, checkpoints in {self.paths.save_dir}")
        return EXIT_OK

    def training_iterators(self):
        """Micro-batches from the first sample that was not consumed yet, for each chunk that reads data."""
        return chunk_iterators(
            lambda: batches(self.datasets.train, self.run, self.state, self.consumed_samples),
            len(self.chunks),
            self.state,
        )

    def take_step(self, iterators) -> tuple[StepResult, float]:
        """One optimizer step; moves the step and sample counters on. Returns the result and the learning rate."""
        lr = set_learning_rate(self.optimizer, self.run, self.step)
        result = self.train_step(iterators, self.step, self.requests.poll())
        self.step += 1
        self.consumed_samples += self.run.training.global_batch_size
        self.meter.add(result)
        if self.run.training.empty_unused_memory_level:
            self.backend.empty_cache()
        return result, lr

    def close(self) -> None:
        """Give files, signals and process groups back."""
        self.writer.close()
        self.requests.close()
        destroy()

    # ---- between steps ----------------------------------------------------------------------

    def _report(self, result: StepResult, lr: float) -> None:
        record = self.meter.record(self.step, lr, self.consumed_samples, result)
        self.writer.write(record)
        total = self.backend.memory().total_bytes
        self.console.step(record, total / 2**30 if total else None)

    def _evaluate(self) -> None:
        started = time.perf_counter()
        iterators = chunk_iterators(
            lambda: batches(self.datasets.valid, self.run, self.state, 0), len(self.chunks), self.state
        )
        with gathered_parameters(self.chunks):
            loss = evaluate(
                self.chunks, iterators, self.run.evaluation.eval_iters, self.run, self.state, self.backend
            )
        self.writer.write({"step": self.step, "valid_loss": loss})
        self.console.say(f"step {self.step}  validation loss {loss:.4f}")
        self.meter.exclude(time.perf_counter() - started)

    def _save(self) -> None:
        started = time.perf_counter()
        with gathered_parameters(self.chunks):
            folder = save_checkpoint(self.paths.save_dir, self._train_state(), self.run, self.state)
        if self.state.rank == 0:
            self.requests.clear_files()
        seconds = time.perf_counter() - started
        self.console.say(f"step {self.step}  saved {folder} in {seconds:.1f} s")
        self.meter.exclude(seconds)

    def _leave(self, result: StepResult) -> int:
        reason = "stop request" if result.stop else f"exit_interval {self.run.training.exit_interval}"
        self.console.say(f"{reason}: stopped after step {self.step}; the same command goes on from here")
        return EXIT_SIGNAL if result.stop else EXIT_OK

    def _due(self, interval: Optional[int]) -> bool:
        return bool(interval) and self.step % interval == 0

    def _is_last(self) -> bool:
        return self.step >= self.run.training.train_iters

    # ---- start ------------------------------------------------------------------------------

    def _train_state(self) -> TrainState:
        return TrainState(
            shards=self.shards,
            optimizer=self.optimizer,
            step=self.step,
            consumed_samples=self.consumed_samples,
            backend=self.backend,
        )

    def _resume(self) -> Optional[LoadedInfo]:
        """Go on from a checkpoint of this run, or begin with other weights, or from the initial ones."""
        settings = self.run.checkpoint
        if latest_checkpoint(self.paths.load_dir) is not None:
            info = load_checkpoint(
                self.paths.load_dir, self._train_state(), self.run, self.state, step=settings.load_step
            )
            self.step, self.consumed_samples = info.step, info.consumed_samples
            return info
        if settings.load or settings.load_step is not None:
            raise CheckpointError(
                f"no complete checkpoint in {self.paths.load_dir}",
                where="load",
                fix="point --load at the folder that holds iter_* folders, or leave it out to start a new run",
            )
        if settings.pretrained_checkpoint:
            from pathlib import Path

            return load_checkpoint(
                Path(settings.pretrained_checkpoint), self._train_state(), self.run, self.state, weights_only=True
            )
        return None

    def _introduce(self, origins: Mapping[str, str]) -> None:
        """Banner, what a resume changed, and the resolved configuration in the run folder."""
        self.console.say(banner(self.run, self.state, self.backend, self.paths, self.datasets, origins))
        if self.resumed is not None:
            self.console.say(self.resumed.message)
            for line in resume_differences(self.run, self.resumed.config):
                self.console.say(f"  changed since the checkpoint: {line}")
            if self.step:
                self.writer.write({"event": "resume", "step": self.step})
        if self.state.rank == 0:
            from ..config.yaml_io import dump_run_config

            (self.paths.run_dir / "config.yaml").write_text(dump_run_config(self.run), encoding="utf-8")


def train(run: RunConfig, origins: Optional[Mapping[str, str]] = None) -> int:
    """Run a training from start, or resume, to end. Returns the exit code; raises UserError on every rank."""
    trainer = Trainer(run, origins)
    try:
        return trainer.fit()
    finally:
        trainer.close()
