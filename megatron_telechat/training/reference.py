"""Log-probabilities of all answers under the reference, computed once and kept in the cache.

They come before the run loads what it goes on with: where the cache lacks some, the reference is loaded into the model
and asked, and only then the run's own checkpoint follows. So they are never those of trained weights, whatever happened
to the run or to the cache in the meantime.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.distributed as dist

from megatron_telechat.backend import Backend
from megatron_telechat.checkpoint import TrainState, load_checkpoint
from megatron_telechat.checkpoint.lineage import look_at
from megatron_telechat.checkpoint.reference import Reference, reference_of
from megatron_telechat.checkpoint.start import Start, checkpoint_of
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.data import batches
from megatron_telechat.data.blend import DataPlan
from megatron_telechat.data.corpus import PairCorpus
from megatron_telechat.data.datasets import open_together
from megatron_telechat.data.pieces import Say
from megatron_telechat.data.reference_tables import read_table, table_folders, write_table
from megatron_telechat.data.samples import TokenDataset
from megatron_telechat.data.sources import Opened
from megatron_telechat.errors import CheckpointError, NumericsError, StopAtStart
from megatron_telechat.parallel.agreement import from_rank_0, together
from megatron_telechat.parallel.state import ParallelState
from megatron_telechat.training.objective import AnswerLogProbs
from megatron_telechat.training.param_gather import gathered_parameters
from megatron_telechat.training.pulse import PULSE, Activity, Phase
from megatron_telechat.training.step import close_iterators, data_iterators, evaluating, read_by_device, run_schedule

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel

_TOLD_S = 30.0


@dataclass(frozen=True)
class ReferenceLogProbs:
    """What the reference says of the answers of each dataset.

    Attributes:
        tables: of each dataset, by the name that the run gives it: float64 [pairs, 2], chosen and rejected; NaN for
            pairs that cannot be used.
        extra: what a checkpoint keeps.
        about: lines for a person; none where no pairs are trained.
    """

    tables: Mapping[str, np.ndarray] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    about: tuple[str, ...] = ()


def reference_log_probs(
    run: RunConfig,
    plan: DataPlan,
    start: Start,
    model: TrainState,
    virtual_stages: Sequence[DistributedDataParallel],
    state: ParallelState,
    stop: Callable[[], bool],
    say: Say,
) -> ReferenceLogProbs:
    """Look them up, or compute what is not there. Collective over all ranks, and before the run loads its own weights.

    Args:
        start: what the run begins with.
        model: is filled with the weights of the reference where something must be computed.
        stop: whether some rank was asked to stop; collective.

    Raises:
        CheckpointError: the reference is gone or damaged, or is not that of the run.
        DataError: a file of pairs cannot be used.
        NumericsError: it gives no finite log-probability.
        ResourceError: the cache cannot be written.
        StopAtStart: a stop was asked for; nothing is kept of a file that was not whole.
    """
    if not run.data.dpo:
        return ReferenceLogProbs()
    told: tuple[Reference, dict[str, Path], dict[str, np.ndarray | None]] | None = None
    with together(state):
        if state.rank == 0:
            reference = reference_of(run, start, checkpoint_of(start))
            assert reference is not None, "a run of pairs has one"
            folders = table_folders(run, plan, reference.digest)
            told = reference, folders, {name: read_table(folder) for name, folder in folders.items()}
    reference, folders, kept = from_rank_0(told)
    tables = {name: table for name, table in kept.items() if table is not None}
    began, missing = time.perf_counter(), [name for name in plan.names if name not in tables]
    if missing:
        if not reference.is_there:
            raise CheckpointError(
                f"the reference log-probabilities of {', '.join(missing)} are not in {run.cache_dir}, and the "
                "checkpoint that they are computed from is gone",
                str(reference.path),
                "bring the checkpoint back, or name a copy of it with --dpo-reference",
            ).on_every_rank()
        opened: Opened = {}
        with together(state):
            opened = open_together(run, plan)  # they wait for rank 0 at the store, not in a collective
        load_checkpoint(reference.path, model, run, state, weights_only=True)
        with together(state):
            if state.rank == 0 and look_at(reference.path).digest != reference.digest:
                raise CheckpointError(
                    "the reference was changed while it was read", str(reference.path), "run the same command again"
                )
        assert model.backend is not None, "a training has a device"
        for name in missing:
            corpus = cast(PairCorpus, opened[name])
            table = _Pass(run, virtual_stages, state, model.backend, stop, say).table(name, corpus)
            with together(state):
                if state.rank == 0:
                    write_table(folders[name], table, {"data": name, "reference": str(reference.path)})
            tables[name] = table
    pairs = sum(int(np.isfinite(table[:, 0]).sum()) for table in tables.values())
    how = f"computed in {time.perf_counter() - began:.1f} s" if missing else f"from {run.cache_dir}"
    about = f"  reference step {reference.step} of {reference.path}; log-probabilities of {pairs:,} pairs {how}"
    return ReferenceLogProbs(tables, reference.extra, (about,))


@dataclass(frozen=True)
class _Pass:
    """A forward over all pairs of a dataset, in the layout of the run."""

    run: RunConfig
    virtual_stages: Sequence[DistributedDataParallel]
    state: ParallelState
    backend: Backend
    stop: Callable[[], bool]
    say: Say

    def table(self, name: str, corpus: PairCorpus) -> np.ndarray:
        """float64 [pairs of the dataset, 2], the same on every rank."""
        run, batch = self.run, self.run.training.global_batch_size
        with together(self.state):
            usable = corpus.usable
        if not usable:  # of a validation file; it gives none, and that is said elsewhere
            return np.full((corpus.pairs, 2), math.nan)
        with together(self.state):
            source = corpus.whole(batch)
            borders = {"reset_position_ids": True, "reset_attention_mask": True}
            vocabulary, padding = run.model.vocab_size, run.routers_read_masks
            dataset = TokenDataset(source, len(source), vocabulary, tell_padding=padding, **borders)
        kept = AnswerLogProbs(self.backend.widest_float)
        with gathered_parameters(self.virtual_stages), PULSE.within(Activity.EVALUATION, Phase.BATCH):
            iterators = data_iterators(
                lambda: batches(dataset, run, self.state, 0), len(self.virtual_stages), run, self.state
            )
            try:
                self._forward(name, iterators, len(source) // batch, kept)
            finally:
                close_iterators(iterators)
        return self._gathered(corpus, kept)

    def _forward(self, name: str, iterators: Sequence[Any], steps: int, kept: AnswerLogProbs) -> None:
        run, told = self.run, time.monotonic()
        read_by_device(iterators, self.backend)
        with evaluating(self.virtual_stages):
            for step in range(steps):
                if self.stop():
                    raise StopAtStart
                if step and time.monotonic() - told > _TOLD_S:
                    told = time.monotonic()
                    self.say(f"reference log-probabilities of {name}: {step:,} of {steps:,} batches")
                run_schedule(
                    self.virtual_stages,
                    iterators,
                    run,
                    self.backend,
                    run.num_microbatches,
                    forward_only=True,
                    objective=kept,
                )

    def _gathered(self, corpus: PairCorpus, kept: AnswerLogProbs) -> np.ndarray:
        """What the ranks of the last stage computed, together. Each pair was computed by one replica: nothing is added
        to it but zeros."""
        pairs, dtype = corpus.pairs, self.backend.widest_float
        sums = torch.zeros(pairs, 3, dtype=dtype, device=self.backend.device)
        if self.state.tp_rank == 0:
            for numbers, log_probs in kept.found:
                sums[numbers, :2] = log_probs
                sums[numbers, 2] += 1
        dist.all_reduce(sums)
        table = sums.cpu().double().numpy()
        times = table[:, 2]
        assert times.max(initial=0) <= 1 and int(times.sum()) == corpus.usable, "each usable pair once"
        log_probs = np.where(times[:, None] > 0, table[:, :2], math.nan)
        bad = np.flatnonzero((times > 0) & ~np.isfinite(table[:, :2]).all(axis=1))
        if bad.size:
            raise NumericsError(
                f"the reference gives {bad.size:,} pairs a log-probability that is not finite",
                corpus.origin(int(bad[0])),
                "look at this pair with tools/show_sample.py, check the reference with tools/verify_checkpoint.py, or "
                "compute in fp32 to compare",
            ).on_every_rank()
        return log_probs
