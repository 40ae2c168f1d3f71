"""The pipeline of chunks on one device, with a copy in the place of the link."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from overlap.layers import Shape


class Device:
    """Clock and streams of the device under test."""

    def __init__(self, name: str):
        self.device = torch.device(name)
        self.cuda = self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def time_ms(self, run: Callable[[], Any], rounds: int, warmup: int = 2) -> float:
        """Median milliseconds of a call that may return before its work is done."""
        times = []
        for number in range(warmup + rounds):
            self.synchronize()
            begin = time.perf_counter()
            run()
            self.synchronize()
            if number >= warmup:
                times.append(time.perf_counter() - begin)
        return median(times) * 1e3


class StandInGroup(NamedTuple):
    """Size and rank of ranks that are not there."""

    ranks: int
    number: int = 0

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return self.number


def stand_in(ranks: int) -> Any:
    """A process group of this size without processes; its type is open, because torch's own cannot be derived from."""
    return StandInGroup(ranks)


@contextmanager
def ranks_alike() -> Iterator[None]:
    """Within, an all-gather answers as if every rank held what this one holds: equal routings, equal sizes."""
    real = dist.all_gather_into_tensor

    def gather(output: Tensor, message: Tensor, group: Any = None) -> None:
        output.view(group.size(), -1).copy_(message.flatten())

    dist.all_gather_into_tensor = gather
    try:
        yield
    finally:
        dist.all_gather_into_tensor = real


class _Arriving:
    def __init__(self, rows: Tensor, done: Any, cuda: bool):
        self._rows, self._done, self._cuda = rows, done, cuda

    @property
    def arrived(self) -> bool:
        return self._cuda or time.perf_counter() >= self._done

    def wait(self) -> Tensor:
        if self._cuda:
            torch.cuda.current_stream().wait_event(self._done)
            self._rows.record_stream(torch.cuda.current_stream())
        else:
            time.sleep(max(0.0, self._done - time.perf_counter()))
        return self._rows

    def when_done(self, report: Callable[[], None]) -> None:
        """Transfers of a stand-in are not traced by the block's clock; the profiler sees the copies."""

    def wait_beside(self) -> None:
        """As for :meth:`when_done`."""


class StandInChannel:
    """A :class:`megatron_telechat.moe.link.Link` without ranks: a transfer takes its rows' share of a given time, one
    after another.

    On CUDA that is a copy from pinned memory on a high-priority stream, which the copy engines do beside the products;
    on the CPU a deadline. What arrives are small random numbers.

    Args:
        device: under test.
        shape: of the layer.
        ms_per_row: link time of a row; 0 for no link.
        copy_bytes_per_ms: measured rate of such copies; CUDA only.
    """

    def __init__(self, device: Device, shape: Shape, ms_per_row: float, copy_bytes_per_ms: float = 0.0):
        self.device, self.ms_per_row = device, ms_per_row
        self._free = 0.0
        if device.cuda:
            self.stream = torch.cuda.Stream(priority=-1)
            self.bytes_per_row = ms_per_row * copy_bytes_per_ms
            self.host = torch.empty(COPY_BLOCK, dtype=torch.uint8, pin_memory=True)
            self.scratch = torch.empty(COPY_BLOCK, dtype=torch.uint8, device=device.device)
        most = 2 * shape.tokens * 2 + shape.experts
        generator = torch.Generator().manual_seed(5)
        self._content = torch.randn(most, shape.hidden, generator=generator).to(device.device, shape.torch_dtype) * 0.1

    def start(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> _Arriving:
        received = self._content[: sum(receive)].clone()
        if not self.device.cuda:
            self._free = max(self._free, time.perf_counter()) + sum(send) * self.ms_per_row / 1e3
            return _Arriving(received, self._free, False)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self._copy(int(sum(send) * self.bytes_per_row))
            done = torch.cuda.Event()
            done.record()
        return _Arriving(received, done, True)

    def _copy(self, count: int) -> None:
        while count > 0:
            part = min(count, COPY_BLOCK)
            self.scratch[:part].copy_(self.host[:part], non_blocking=True)
            count -= part


COPY_BLOCK = 64 << 20


def copy_rate(device: Device, rounds: int) -> float:
    """Bytes a millisecond from pinned memory to the device."""
    host = torch.empty(COPY_BLOCK, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(COPY_BLOCK, dtype=torch.uint8, device=device.device)
    return COPY_BLOCK / device.time_ms(lambda: there.copy_(host, non_blocking=True), rounds)


class OneDevice:
    """The pipeline of one rank out of two, on this device.

    Args:
        shape: of the layer.
        device: under test.
    """

    def __init__(self, shape: Shape, device: Device):
        from megatron_telechat.moe.dispatch import ExpertGroups
        from megatron_telechat.moe.engine import ExpertWeights
        from megatron_telechat.moe.router import Routing

        self.shape, self.device = shape, device
        generator = torch.Generator().manual_seed(3)

        def normal(*sizes: int) -> Tensor:
            return (torch.randn(*sizes, generator=generator) / sizes[-1] ** 0.5).to(device.device, shape.torch_dtype)

        local = shape.experts // 2
        self.weights = ExpertWeights(
            normal(local, 2, shape.ffn, shape.hidden), normal(local, shape.hidden, shape.ffn), None
        )
        self.tokens, self.grad = normal(shape.tokens, shape.hidden), normal(shape.tokens, shape.hidden)
        logits = torch.randn(shape.tokens, shape.experts, generator=generator).to(device.device)
        best = logits.topk(shape.topk)
        counts = torch.bincount(best.indices.flatten(), minlength=shape.experts)
        self.routing = Routing(best.values.softmax(-1), best.indices, counts)
        self.groups = ExpertGroups(stand_in(2), stand_in(1), stand_in(2))

    def dispatch(self, k: int) -> Any:
        """Which rows go where; every rank holds what this one holds."""
        from megatron_telechat.moe.dispatch import Dispatch, RowFormat

        with ranks_alike():
            form = RowFormat(self.shape.hidden, self.shape.torch_dtype)
            return Dispatch(self.routing, self.groups, k, form)

    def forward(self, k: int, channel: Any) -> tuple[Any, list[Any]]:
        from megatron_telechat.moe.engines import engine_for
        from megatron_telechat.moe.pipeline import ChunkPipeline

        with torch.no_grad():
            pipeline = ChunkPipeline(self.dispatch(k), channel, engine_for(self.device.device))
            _, kept = pipeline.forward(self.tokens, self.routing.weights, self.weights, True)
        return pipeline, kept

    def backward(self, pipeline: Any, kept: list[Any]) -> None:
        from megatron_telechat.moe.engine import Gradients

        with torch.no_grad():
            pipeline.backward(self.grad, self.weights, kept, Gradients.of(self.weights, len(kept)))

    def times_ms(self, k: int, channel: Any, rounds: int) -> tuple[float, float]:
        """Medians of forward and backward."""
        forward, backward = [], []
        for number in range(rounds + 2):
            begin = self._now()
            state = self.forward(k, channel)
            middle = self._now()
            self.backward(*state)
            if number >= 2:
                forward.append(middle - begin)
                backward.append(self._now() - middle)
        return median(forward) * 1e3, median(backward) * 1e3

    def _now(self) -> float:
        self.device.synchronize()
        return time.perf_counter()

    def peak_bytes(self, k: int, channel: Any) -> int | None:
        """Largest memory of a forward and backward above what is there before; CUDA only."""
        if not self.device.cuda:
            return None
        self.backward(*self.forward(k, channel))
        self.device.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.backward(*self.forward(k, channel))
        self.device.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def host_syncs(self, k: int, channel: Any) -> tuple[int, int] | None:
        """How often a forward and a backward stop the host for the device; CUDA only."""
        if not self.device.cuda:
            return None
        import warnings

        counts = []
        state = self.forward(k, channel)
        self.backward(*state)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for part in ("forward", "backward"):
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    if part == "forward":
                        state = self.forward(k, channel)
                    else:
                        self.backward(*state)
                counts.append(sum("synchroniz" in str(warning.message) for warning in caught))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return counts[0], counts[1]
