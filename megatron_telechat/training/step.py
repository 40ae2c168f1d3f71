"""One optimizer step, one evaluation: forward and backward on megatron-core's pipeline schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Callable, Iterator, Optional

import torch
import torch.distributed as dist

from megatron_telechat.backend import Backend
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.errors import NumericsError, Problem
from megatron_telechat.model.attention import Segments
from megatron_telechat.parallel.state import ParallelState

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, the same on every rank.

    Attributes:
        loss: mean cross entropy over all tokens of the global batch that count, in nats.
        tokens: how many tokens counted.
        grad_norm: global gradient norm before clipping; None where fp16 overflowed.
        skipped: the step was not taken because fp16 gradients overflowed.
        stop, save: some rank was asked to stop, or to save.
    """

    loss: float
    tokens: int
    grad_norm: Optional[float]
    skipped: bool
    stop: bool
    save: bool


def masked_loss(loss_mask: torch.Tensor, per_token_loss: torch.Tensor):
    """Sum of the losses that count, their number, and both for the report.

    Args:
        loss_mask: [micro_batch, seq], 1 where a token counts.
        per_token_loss: [micro_batch, seq], cross entropy in nats.

    megatron-core divides by the number of tokens of the whole global batch afterwards, so the
    mean does not depend on how the batch was spread.
    """
    total = torch.sum(per_token_loss.float() * loss_mask)
    tokens = loss_mask.sum()
    # The schedules change the loss tensor in place: the report keeps its own copy.
    report = torch.stack((total.detach().clone(), tokens))
    return total, tokens.to(torch.int), report


def forward_step(device: torch.device, data_iterator: Optional[Iterator[Batch]], model: torch.nn.Module):
    """The schedules' forward function: one micro-batch through one model chunk.

    Stages between the first and the last need no batch; their iterator is None.
    """
    if data_iterator is None:
        return model(None, None, None), None
    host = next(data_iterator)
    lengths = host.get("segment_lengths")
    segments = None if lengths is None else Segments.of(lengths, host["tokens"].shape[0])
    batch = {key: value.to(device, non_blocking=True) for key, value in host.items() if key != "segment_lengths"}
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=segments)
    return output, partial(masked_loss, batch["loss_mask"])


def chunk_iterators(
    make_iterator, chunks: int, run: RunConfig, state: ParallelState
) -> list[Optional[Iterator[Batch]]]:
    """One iterator of micro-batches for each model chunk of this rank that reads data, else None.

    The first stage reads tokens and the last one labels; every stage reads the borders of documents where
    positions or attention are reset there.
    """
    resets = run.data.reset_position_ids or run.data.reset_attention_mask
    return [
        make_iterator()
        if state.is_first_stage(chunk) or state.is_last_stage(chunk) or resets
        else None
        for chunk in range(chunks)
    ]


def close_iterators(iterators: list[Optional[Iterator[Batch]]]) -> None:
    """Stop the threads that prepare batches."""
    for iterator in iterators:
        if iterator is not None:
            iterator.close()


def run_schedule(
    chunks: list[torch.nn.Module],
    iterators: list[Optional[Iterator[Batch]]],
    run: RunConfig,
    backend: Backend,
    num_microbatches: int,
    forward_only: bool,
) -> torch.Tensor:
    """Forward, and backward unless ``forward_only``, of one global batch.

    Returns:
        [2] on the device: this rank's sum of losses and number of tokens; zeros off the last stage.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    single = len(chunks) == 1
    reports = get_forward_backward_func()(
        forward_step_func=partial(forward_step, backend.device),
        data_iterator=iterators[0] if single else iterators,
        model=chunks[0] if single else chunks,
        num_microbatches=num_microbatches,
        seq_length=run.training.seq_length,
        micro_batch_size=run.training.micro_batch_size,
        forward_only=forward_only,
    )
    if not reports:
        return torch.zeros(2, device=backend.device)
    return torch.stack(reports).sum(dim=0)


class TrainStep:
    """Takes optimizer steps on a set of wrapped chunks."""

    def __init__(self, chunks, optimizer, shards, run: RunConfig, state: ParallelState, backend: Backend):
        self.chunks = chunks
        self.optimizer = optimizer
        self.shards = shards
        self.run = run
        self.state = state
        self.backend = backend

    def forward_backward(self, iterators: list[Optional[Iterator[Batch]]]) -> torch.Tensor:
        """Fill the gradient buffers from one global batch; returns this rank's [loss sum, tokens]."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return run_schedule(
            self.chunks, iterators, self.run, self.backend, self.run.num_microbatches, forward_only=False
        )

    def __call__(self, iterators, step: int, requests: tuple[bool, bool] = (False, False)) -> StepResult:
        """One optimizer step.

        Raises:
            NumericsError: loss or gradient norm is not finite on some rank; the parameters are unchanged
                and every rank raises.
        """
        local = self.forward_backward(iterators)
        loss, tokens, stop, save = self._reduce(local, requests)
        found_inf = self._agree_on_overflow(self.optimizer.prepare_grads())
        if found_inf:
            return StepResult(loss, tokens, None, True, stop, save)
        grad_norm = float(self.optimizer.get_grad_norm())
        self._require_finite(loss, grad_norm, step)
        self._clip(grad_norm)
        self.optimizer.step_with_ready_grads()
        return StepResult(loss, tokens, grad_norm, False, stop, save)

    def _reduce(self, local: torch.Tensor, requests: tuple[bool, bool]) -> tuple[float, int, bool, bool]:
        """One small all-reduce: the loss over the ranks that computed it, and what any rank was asked."""
        contributes = self.state.tp_rank == 0
        values = torch.zeros(4, dtype=wide_dtype(self.backend), device=self.backend.device)
        if contributes:
            values[:2] = local
        values[2], values[3] = float(requests[0]), float(requests[1])
        dist.all_reduce(values)
        loss_sum, tokens, stop, save = values.tolist()
        return loss_sum / max(tokens, 1.0), int(tokens), stop > 0, save > 0

    def _agree_on_overflow(self, found_inf: bool) -> bool:
        # megatron-core reduces the flag inside one model replica only; an expert that overflowed
        # on one expert-parallel rank must hold back the step everywhere.
        if self.run.training.precision != "fp16":
            return False
        flag = torch.tensor([float(found_inf)], device=self.backend.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def _clip(self, grad_norm: float) -> None:
        from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

        limit = self.run.optimizer.clip_grad
        if limit <= 0:
            return
        for part in self.optimizer.chained_optimizers:
            parameters = [] if part.is_stub_optimizer else part.get_parameters()
            if parameters:
                clip_grad_by_total_norm_fp32(parameters, max_norm=limit, total_norm=grad_norm)

    def _require_finite(self, loss: float, grad_norm: float, step: int) -> None:
        """All ranks see the same loss; the norm may differ between model replicas, so it is agreed on."""
        bad = torch.tensor([float(not (math.isfinite(loss) and math.isfinite(grad_norm)))], device=self.backend.device)
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        if bad.item() == 0:
            return
        names: list[list[str]] = [[] for _ in range(self.state.world_size)]
        dist.all_gather_object(names, self._non_finite_parameters())
        culprits = [f"rank {rank}: {', '.join(found)}" for rank, found in enumerate(names) if found]
        raise NumericsError(
            Problem(
                what=f"step {step + 1}: loss {loss}, gradient norm {grad_norm}; the optimizer step was not taken",
                where="; ".join(culprits[:4]) or "no single gradient is non-finite: the norm overflowed",
                fix="resume from the last checkpoint; lower lr, look at the data of this step, or train in fp32 to compare",
            )
        ).on_every_rank()

    def _non_finite_parameters(self) -> list[str]:
        """Global keys of the first few parameters whose gradient on this rank is not finite."""
        found = []
        for shard in self.shards:
            gradient = getattr(shard.parameter, "main_grad", None)
            if gradient is not None and not torch.isfinite(gradient).all():
                found.append(shard.pieces[0].key)
                if len(found) == 3:
                    break
        return found


def evaluate(
    chunks, iterators, batches: int, run: RunConfig, state: ParallelState, backend: Backend, stop: Callable[[], bool] = lambda: False
) -> Optional[float]:
    """Mean loss over ``batches`` global batches, the same on every rank.

    Args:
        stop: asked before each batch, on all ranks alike; True ends the evaluation, which then gives None.
    """
    total = torch.zeros(2, dtype=wide_dtype(backend), device=backend.device)
    for chunk in chunks:
        chunk.eval()
    try:
        with torch.no_grad():
            for _ in range(batches):
                if stop():
                    return None
                total += run_schedule(chunks, iterators, run, backend, run.num_microbatches, forward_only=True)
    finally:
        for chunk in chunks:
            chunk.train()
    if state.tp_rank != 0:
        total.zero_()
    dist.all_reduce(total)
    return (total[0] / total[1].clamp(min=1)).item()


def wide_dtype(backend: Backend) -> torch.dtype:
    """The widest float the device reduces: fp64, or fp32 on NPUs."""
    return torch.float32 if backend.name == "npu" else torch.float64
