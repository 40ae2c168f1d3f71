"""From step results to records: throughput, MFU, memory, expert load; one record a logged step."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist

from megatron_telechat.backend import Backend
from megatron_telechat.config.run_stages import Position
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.devices import device_spec
from megatron_telechat.costs.flops import training_flops_per_token
from megatron_telechat.model.context_attention import context_attentions
from megatron_telechat.moe import collect_expert_load, moe_blocks
from megatron_telechat.parallel.agreement import gather_objects
from megatron_telechat.parallel.clock import ExchangeClock
from megatron_telechat.parallel.state import ParallelState
from megatron_telechat.training.phases import ComputeClock
from megatron_telechat.training.slow_ranks import SlowRank, SlowRanks
from megatron_telechat.training.step import StepResult


def peak_tflops(run: RunConfig, backend: Backend) -> float | None:
    """Dense peak of one device at the run's precision in TFLOP/s; None where it is not known."""
    if run.logging.peak_tflops is not None:
        return run.logging.peak_tflops
    spec = device_spec(backend.device_name())
    return spec.peak_tflops.get(run.training.precision) if spec is not None else None


@dataclass
class Window:
    """Steps since the last record."""

    started_s: float
    steps: int = 0
    tokens: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Steps that were not taken, by reason."""
    compute_s: float = 0.0
    """Time of forwards and backwards on this rank, as far as it was read."""
    exposed_s: Counter[str] = field(default_factory=Counter)
    """Time in which this rank's computation stood still for an exchange, by its kind, as far as it was read."""


class Meter:
    """Turns a window of steps into one metrics record.

    ``tokens_per_s`` counts every position of a sample, loss mask or not, over the whole machine, and the
    time between two records less evaluations and saves (:meth:`excluded`).

    ``a2a_exposed`` is the share of that time in which the computation of a rank stood still for a transfer of the
    experts (dispatch, combine, and the same for gradients), the mean over all ranks; only where the experts are spread
    over ranks. ``cp_exposed`` is the same for the attention of rows that are spread over ranks.

    ``stage_compute_s`` are, by pipeline rank, the seconds a step that its ranks were at forwards and backwards, their
    waits for exchanges inside of layers included (`planner.from_run` reads them).

    ``compute_s_max`` are the seconds a step that the slowest rank, ``slowest_rank``, was at forwards and backwards,
    without these waits, and ``compute_over_median`` how many times longer than the ranks with the same layers; not
    where no two ranks have the same. Tensor-parallel ranks wait for each other inside a layer: they are slow together.

    Attributes:
        slow_ranks: to be named with the last record.
    """

    def __init__(
        self,
        run: RunConfig,
        state: ParallelState,
        backend: Backend,
        virtual_stages: Sequence[torch.nn.Module],
        compute: ComputeClock,
    ):
        self._run, self._state, self._backend, self._virtual_stages = run, state, backend, virtual_stages
        self._flops_per_token = training_flops_per_token(run.model, run.training.seq_length)
        self._peak = peak_tflops(run, backend)
        expert, expert_tensor = run.parallel.expert_sizes
        self._clocks: dict[str, list[ExchangeClock]] = {}
        if run.model.is_moe and expert * expert_tensor > 1:
            self._clocks["a2a_exposed"] = [block.clock for block in moe_blocks(virtual_stages)]
        if run.parallel.context_parallel_size > 1:
            self._clocks["cp_exposed"] = [each.clock for each in context_attentions(virtual_stages)]
        self._take_exposed_s()
        self._compute = compute
        compute.take_s()
        places = gather_objects((state.pp_rank, socket.gethostname()))
        self._slow = SlowRanks(run.logging.straggler_factor, [pp for pp, _ in places], [host for _, host in places])
        self.slow_ranks: list[SlowRank] = []
        self._window = Window(time.perf_counter())

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Leave what runs inside out of the open window: its time, and its waits for exchanges."""
        self._backend.synchronize()
        self._window.exposed_s += self._take_exposed_s()
        self._window.compute_s += self._compute.take_s()
        started = time.perf_counter()
        yield
        self._backend.synchronize()
        self._take_exposed_s()
        self._compute.take_s()
        self._window.started_s += time.perf_counter() - started

    def _take_exposed_s(self) -> Counter[str]:
        return Counter({kind: sum(clock.take_exposed_s() for clock in of) for kind, of in self._clocks.items()})

    def add(self, result: StepResult) -> None:
        """Count a finished step into the current logging interval."""
        self._window.steps += 1
        self._window.tokens += self._run.training.global_batch_size * self._run.training.seq_length
        if result.skipped is not None:
            self._window.skipped[result.skipped] += 1

    def record(self, position: Position, lr: float, result: StepResult) -> dict[str, Any]:
        """Close the window. Collective: every rank calls it at the same step."""
        self._backend.synchronize()
        now = time.perf_counter()
        seconds = max(now - self._window.started_s, 1e-9)
        tokens_per_s = self._window.tokens / seconds
        record: dict[str, Any] = {
            "step": position.step,
            "loss": result.loss,
            **result.details,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "tokens_per_s": tokens_per_s,
            "iteration_time_s": seconds / self._window.steps,
            "mfu": self._mfu(tokens_per_s),
            "memory_peak_gib": self._peak_memory_gib(),
            "consumed_samples": position.samples,
            "consumed_tokens": position.tokens,
        }
        if self._run.parallel.optimizer_cpu_offload:
            record["memory_host_gib"] = self._backend.host_memory.nbytes / 2**30
        if result.loss_scale is not None:
            record["loss_scale"] = result.loss_scale
        if self._window.skipped:
            record["skipped_steps"] = self._window.skipped.total()
            record["skipped_reasons"] = dict(self._window.skipped)
        load = collect_expert_load(self._virtual_stages, self._state) if self._run.model.is_moe else None
        if load is not None:
            record["expert_load_max_over_mean"] = load.max_over_mean.max().item()
            record["aux_loss"] = load.aux_loss
        taken = self._take_exposed_s()
        mine = Counter({kind: self._window.exposed_s[kind] + taken[kind] for kind in self._clocks})
        if self._clocks:
            record |= {kind: exposed / seconds for kind, exposed in self._mean_exposed_s(mine).items()}
        record |= self._compare_ranks(self._window.compute_s + self._compute.take_s(), mine.total(), seconds)
        self._window = Window(time.perf_counter())
        return record

    def _mfu(self, tokens_per_s: float) -> float | None:
        if not self._peak:
            return None
        return tokens_per_s * self._flops_per_token / (self._peak * 1e12 * self._state.world_size)

    def _compare_ranks(self, compute_s: float, exposed_s: float, interval_s: float) -> dict[str, Any]:
        """How long the ranks of each pipeline rank computed, and which rank longest among those with the same layers;
        `slow_ranks` are those to be named."""
        steps = self._window.steps
        mine = torch.tensor([compute_s / steps, exposed_s / steps], device=self._backend.device)
        everyone = torch.empty(2 * self._state.world_size, device=self._backend.device)
        dist.all_gather_into_tensor(everyone, mine)
        whole, exposed = everyone.view(-1, 2).T.tolist()
        fields, self.slow_ranks = self._slow.observe([w - e for w, e in zip(whole, exposed, strict=True)], interval_s)
        return {"stage_compute_s": [fmean(whole[rank] for rank in ranks) for ranks in self._slow.stages], **fields}

    def _mean_exposed_s(self, mine: Counter[str]) -> dict[str, float]:
        exposed = torch.tensor([mine[kind] for kind in self._clocks], device=self._backend.device)
        dist.all_reduce(exposed)
        return dict(zip(self._clocks, (exposed / self._state.world_size).tolist(), strict=True))

    def _peak_memory_gib(self) -> float:
        """Largest peak over the ranks: the one that would run out first."""
        peak = torch.tensor([self._backend.memory().peak_bytes / 2**30], device=self._backend.device)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        return peak.item()
