"""One optimizer step, one evaluation: forward and backward on megatron-core's pipeline schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from megatron_telechat.backend import Backend
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.data.loader import BatchIterator
from megatron_telechat.errors import DataError, UserError
from megatron_telechat.model.attention import Segments
from megatron_telechat.moe.counted import CountedTokens, real_tokens
from megatron_telechat.moe.pooled import carried_rows
from megatron_telechat.parallel.state import ParallelState
from megatron_telechat.training.locate import Again, located_error
from megatron_telechat.training.numerics import FIX, finite_everywhere, require_finite_validation, step_error
from megatron_telechat.training.objective import TOKENS, Objective, Parts, objective_of
from megatron_telechat.training.param_gather import every_parameter_awaited, is_overlapped
from megatron_telechat.training.pulse import PULSE, Phase

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel

    from megatron_telechat.model.shards import LocalParameter
    from megatron_telechat.training.chain import ModelOptimizer

Batch = dict[str, Any]
MicroBatches = Sequence[Iterator[Batch] | None]
"""Of each virtual stage of this rank; None where it reads no data."""

OVERFLOW = "fp16 overflow"
"""Why a step was not taken: a gradient was too large for fp16 at this loss scale."""
_OF_THE_HOST = ("segment_lengths", "padding", "context", "real_tokens")
"""Parts of a batch that are read before the forward, by the host."""

ON_REQUEST = "iterations_to_skip"
"""Why a step was not taken: its data is passed over."""
NOTHING_LEARNED = "the loss mask leaves no token of the global batch to learn from"


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, the same on every rank.

    Attributes:
        loss: mean cross entropy over all tokens of the global batch that count, in nats, or mean loss of its pairs;
            None where none counted.
        tokens: how many tokens, or pairs, counted.
        grad_norm: global gradient norm before clipping; None where the step was not taken.
        skipped: why the step was not taken (parameters and optimizer are as before), such as :data:`OVERFLOW`; None
            where it was.
        stop, save: some rank was asked to stop, or to save.
        loss_scale: what the loss was multiplied by (fp16); None elsewhere.
        details: what else the objective reports.
    """

    loss: float | None
    tokens: int
    grad_norm: float | None
    skipped: str | None
    stop: bool
    save: bool
    loss_scale: float | None = None
    details: Mapping[str, float] = field(default_factory=dict)


class SavesBeside(Protocol):
    """Saves that go on beside the steps, as a step sees them (`training.saving`)."""

    def report(self) -> Sequence[bool]:
        """Of each save that may be under way: whether this rank's work on it is over, and whether it failed."""
        ...

    def heard(self, counts: Sequence[int]) -> None:
        """So many ranks reported each of them; the same on every rank."""
        ...

    def staged(self) -> None:
        """Wait until parameters and optimizer state may change."""
        ...


def forward_step(
    device: torch.device,
    data_iterator: Iterator[Batch] | None,
    model: torch.nn.Module,
    learned_share: torch.Tensor | None = None,
    objective: Objective = TOKENS,
) -> tuple[torch.Tensor, Callable[[torch.Tensor], Parts] | None]:
    """The schedules' forward function: one micro-batch through one virtual stage.

    Stages between the first and the last need no batch; their iterator is None.

    Args:
        learned_share: of the tokens of the global batch, where the routers must know of masks (`TrainStep`).
        objective: from the losses of tokens to what is minimised.
    """
    if data_iterator is None:
        return model(None, None), None
    PULSE.enter(Phase.BATCH)
    host = next(data_iterator, None)
    PULSE.enter(Phase.FORWARD)
    if host is None:
        raise _samples_end()
    lengths, plan = host.get("segment_lengths"), host.get("context")
    segments = plan if lengths is None else Segments.of(lengths, host["tokens"].shape[0])
    counted = None
    if learned_share is not None:
        ranks = 1 if plan is None else plan.row_length // host["tokens"].shape[1]
        counted = CountedTokens.of(host["tokens"], host.get("padding"), learned_share, host.get("real_tokens"), ranks)
    batch = {key: value.to(device, non_blocking=True) for key, value in host.items() if key not in _OF_THE_HOST}
    output = model(
        batch["tokens"],
        batch["position_ids"],
        labels=batch["labels"],
        segments=segments,
        counted=counted,
    )
    return output, partial(objective, batch)


def _samples_end() -> DataError:
    return DataError(
        "the samples end before the run",
        "training data",
        "this is a bug, please report it; the last checkpoint is complete, and the same command resumes from it",
    )


def data_iterators(
    make_iterator: Callable[[], BatchIterator], num_virtual_stages: int, run: RunConfig, state: ParallelState
) -> list[BatchIterator | None]:
    """One iterator of micro-batches for each virtual stage of this rank that reads data, else None.

    The first stage reads tokens and the last one labels; every stage reads the borders of documents where
    positions or attention are reset there, and the masks where routers must know of them.
    """
    every = run.data.reset_position_ids or run.data.reset_attention_mask or run.routers_read_masks
    return [
        make_iterator() if state.is_first_stage(number) or state.is_last_stage(number) or every else None
        for number in range(num_virtual_stages)
    ]


def read_by_device(iterators: MicroBatches, backend: Backend) -> None:
    """Let the threads that prepare batches put them where the device copies them from while the host goes on."""
    for iterator in iterators:
        if isinstance(iterator, BatchIterator) and backend.traits.pins_uploads:
            iterator.finish_with(backend.pinned)


def close_iterators(iterators: Sequence[BatchIterator | None]) -> None:
    """Stop the threads that prepare batches."""
    for iterator in iterators:
        if iterator is not None:
            iterator.close()


def run_schedule(
    virtual_stages: Sequence[torch.nn.Module],
    iterators: MicroBatches,
    run: RunConfig,
    backend: Backend,
    num_microbatches: int,
    forward_only: bool,
    learned_share: torch.Tensor | None = None,
    objective: Objective = TOKENS,
) -> torch.Tensor:
    """Forward, and backward unless ``forward_only``, of one global batch.

    Args:
        learned_share: fp32 [], what the routers' losses are weighed by (`TrainStep`); None: all tokens are learned.
        objective: from the losses of tokens to what is minimised.

    Returns:
        [width of the objective] on the device: the sum of this rank's reports; zeros off the last stage.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    single = len(virtual_stages) == 1
    # megatron-core takes None where a virtual stage reads no data; its annotation does not say so.
    data: Any = iterators[0] if single else iterators
    reports = get_forward_backward_func()(
        forward_step_func=partial(forward_step, backend.device, learned_share=learned_share, objective=objective),
        data_iterator=data,
        model=virtual_stages[0] if single else list(virtual_stages),
        num_microbatches=num_microbatches,
        seq_length=_sent_length(run),
        micro_batch_size=run.training.micro_batch_size,
        forward_only=forward_only,
    )
    if not reports:
        return torch.zeros(objective.width, device=backend.device)
    return torch.stack(reports).sum(dim=0)


def _sent_length(run: RunConfig) -> int:
    """Length of whole rows as megatron-core's schedules divide it over ranks for the messages between stages: that of
    the samples, and on every rank the rows that go with its part."""
    parts = run.parallel.context_parallel_size * run.parallel.sequence_parallel_size
    return run.training.seq_length + carried_rows(run) * parts


class TrainStep:
    """Takes optimizer steps on the wrapped virtual stages of this rank.

    Attributes:
        saves: what goes on beside the steps; None: nothing.
    """

    def __init__(
        self,
        virtual_stages: Sequence[DistributedDataParallel],
        optimizer: ModelOptimizer,
        shards: Sequence[LocalParameter],
        run: RunConfig,
        state: ParallelState,
        backend: Backend,
    ):
        self.virtual_stages = virtual_stages
        self.optimizer = optimizer
        self.shards = shards
        self.run = run
        self.state = state
        self.backend = backend
        self.saves: SavesBeside | None = None
        self.objective = objective_of(run, backend)
        self._gather_unproved = is_overlapped(virtual_stages)

    def forward_backward(self, iterators: MicroBatches) -> torch.Tensor:
        """Fill the gradient buffers from one global batch; returns the sum of this rank's reports of the objective."""
        for stage in self.virtual_stages:
            stage.zero_grad_buffer()
        self.optimizer.zero_grad()
        read_by_device(iterators, self.backend)
        learned_share = None
        if self.run.routers_read_masks:
            iterators, learned_share = self._look_ahead(iterators)
        watch = (
            every_parameter_awaited(self.virtual_stages, self.shards, self.state)
            if self._gather_unproved
            else nullcontext()
        )
        with watch:
            sums = run_schedule(
                self.virtual_stages,
                iterators,
                self.run,
                self.backend,
                self.run.num_microbatches,
                forward_only=False,
                learned_share=learned_share,
                objective=self.objective,
            )
        self._gather_unproved = False
        return sums

    def _look_ahead(self, iterators: MicroBatches) -> tuple[list[Iterator[Batch]], torch.Tensor]:
        """The micro-batches of this step, and how many times the global batch's tokens, padding left out, its divisor
        is: the share of them that is learned, or pairs a token.

        The schedules divide all gradients by the divisor of the global batch, which is known only at the end. A
        router's loss is a mean over all tokens that are no padding, so its gradients must be multiplied by that share,
        and before the first backward. One all-reduce of two numbers, which the host does not wait for.
        """
        readers = [iterator for iterator in iterators if iterator is not None]
        assert len(readers) == len(iterators), "every virtual stage reads the masks (`data_iterators`)"
        ahead = [list(islice(iterator, self.run.num_microbatches)) for iterator in readers]
        learned = sum(self.objective.count(batch) for batch in ahead[0])
        real = sum(real_tokens(batch["tokens"], batch.get("padding")) for batch in ahead[0])
        counts = torch.tensor([learned, real], dtype=self.backend.widest_float).to(
            self.backend.device, non_blocking=True
        )
        dist.all_reduce(counts, group=self.state.dp_cp_group)
        return [iter(batches) for batches in ahead], (counts[0] / counts[1].clamp(min=1)).float()

    def __call__(
        self, iterators, step: int, requests: tuple[bool, bool] = (False, False), again: Again | None = None
    ) -> StepResult:
        """One optimizer step; not taken where no token is learned, or where fp16 gradients overflow.

        Args:
            again: how to take the step once more where a number is not finite, to say where it comes from.

        Raises:
            NumericsError: loss or gradient norm is not finite, or fp16 overflowed at the smallest loss scale; the
                parameters are unchanged and every rank raises.
            ConfigError: at the first step, see `param_gather.every_parameter_awaited`.
        """
        local = self.forward_backward(iterators)
        PULSE.enter(Phase.LOSS_REDUCTION)
        sums, stop, save = self._reduce(local, requests)
        loss, tokens = sums[0] / max(sums[1], 1.0), int(sums[1])
        if not math.isfinite(loss):  # the same sum on every rank; no smaller loss scale would fix it
            raise self._not_finite(f"loss {loss}", step, local, again)
        loss_scale = self.optimizer.loss_scale
        if not tokens:
            return StepResult(None, 0, None, NOTHING_LEARNED, stop, save, loss_scale)
        details = self.objective.details(sums)
        if self.saves is not None:
            self.saves.staged()
        if self.optimizer.prepare_grads():
            assert loss_scale is not None, "only fp16 gradients are scaled, and overflow"
            if loss_scale <= self.run.optimizer.min_loss_scale:
                fix = "train in bf16, whose range is that of fp32; or allow a smaller scale: --min-loss-scale"
                found = f"{OVERFLOW} at the smallest loss scale {loss_scale:g}"
                raise self._not_finite(found, step, local, again, fix)
            return StepResult(loss, tokens, None, OVERFLOW, stop, save, loss_scale, details)
        PULSE.enter(Phase.GRADIENT_NORM)
        grad_norm = float(self.optimizer.get_grad_norm())
        if not finite_everywhere(grad_norm, self.backend.device):
            raise self._not_finite(f"loss {loss}, gradient norm {grad_norm}", step, local, again)
        PULSE.enter(Phase.OPTIMIZER)
        self._clip(grad_norm)
        self.optimizer.step_with_ready_grads()
        return StepResult(loss, tokens, grad_norm, None, stop, save, loss_scale, details)

    def pass_over(self, iterators: MicroBatches, requests: tuple[bool, bool] = (False, False)) -> StepResult:
        """Read the data of a step and do not train on it. Collective over all ranks."""
        read = [list(islice(each, self.run.num_microbatches)) for each in iterators if each is not None]
        if any(len(batches) < self.run.num_microbatches for batches in read):
            raise _samples_end()
        nothing = torch.zeros(self.objective.width, device=self.backend.device)
        _, stop, save = self._reduce(nothing, requests)
        return StepResult(None, 0, None, ON_REQUEST, stop, save, self.optimizer.loss_scale)

    def _not_finite(self, found: str, step: int, local: torch.Tensor, again: Again | None, fix: str = "") -> UserError:
        if again is None:
            return step_error(found, step, self.shards, fix or FIX)
        return located_error(self, again, found, step + 1, local, fix)

    def _reduce(self, local: torch.Tensor, requests: tuple[bool, bool]) -> tuple[list[float], bool, bool]:
        """One small all-reduce: the reports of the ranks that computed the loss, what any rank was asked, and how many
        ranks are done with the save under way."""
        contributes, width = self.state.tp_rank == 0, self.objective.width
        report = self.saves.report() if self.saves is not None else (False, False)
        flags = (*requests, *report)
        values = torch.zeros(width + len(flags), dtype=self.backend.widest_float, device=self.backend.device)
        if contributes:
            values[:width] = local
        for place, flag in enumerate(flags, width):
            if flag:
                values[place] = 1.0
        dist.all_reduce(values)
        found = values.tolist()
        sums, (stop, save, *counts) = found[:width], found[width:]
        if self.saves is not None:
            self.saves.heard([int(count) for count in counts])
        return sums, stop > 0, save > 0

    def _clip(self, grad_norm: float) -> None:
        from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

        limit = self.run.optimizer.clip_grad
        if limit <= 0:
            return
        for part in self.optimizer.parts:
            parameters = [] if part.is_stub_optimizer else part.get_parameters()
            if parameters:
                clip_grad_by_total_norm_fp32(parameters, max_norm=limit, total_norm=grad_norm)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found, the same on every rank.

    Attributes:
        loss: mean cross entropy over all tokens that count, in nats, or mean loss of the pairs; None where none
            counted, or where it was cut off.
        complete: whether all batches were read; a stop request cuts an evaluation off.
        details: what else the objective reports.
    """

    loss: float | None
    complete: bool = True
    details: Mapping[str, float] = field(default_factory=dict)


def evaluate(
    virtual_stages,
    iterators,
    batches: int,
    run: RunConfig,
    state: ParallelState,
    backend: Backend,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """The loss over ``batches`` global batches.

    Args:
        stop: asked before each batch, on all ranks alike; True ends the evaluation.

    Raises:
        NumericsError: on every rank, where the loss is not finite: such weights are not worth a checkpoint.
    """
    objective = objective_of(run, backend)
    total = torch.zeros(objective.width, dtype=backend.widest_float, device=backend.device)
    read_by_device(iterators, backend)
    with evaluating(virtual_stages):
        for _ in range(batches):
            if stop():
                return Evaluation(None, complete=False)
            total += run_schedule(
                virtual_stages, iterators, run, backend, run.num_microbatches, forward_only=True, objective=objective
            )
    if state.tp_rank != 0:
        total.zero_()
    dist.all_reduce(total)
    sums = total.tolist()
    require_finite_validation(sums[0])
    return Evaluation(sums[0] / sums[1] if sums[1] else None, details=objective.details(sums))


@contextmanager
def evaluating(virtual_stages) -> Iterator[None]:
    """Forwards inside have no dropout, and no backward follows them."""
    for stage in virtual_stages:
        stage.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for stage in virtual_stages:
            stage.train()
