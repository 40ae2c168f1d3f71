"""How many chunks: measured on the real layer, link and device, and the same on all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_telechat.backend import traits_of
from megatron_telechat.moe.block import MoEBlock
from megatron_telechat.moe.chunks import chunk_parts
from megatron_telechat.moe.dispatch import Arrivals
from megatron_telechat.moe.engine import Engine, ExpertWeights, Gradients
from megatron_telechat.moe.gradients import main_grad_of, set_added_to_main_grad
from megatron_telechat.moe.link import Link
from megatron_telechat.moe.overlap_model import PassCosts, predicted_ms
from megatron_telechat.parallel.clock import ExchangeClock

FIRST = (1, 2, 4, 8)
CANDIDATES = (1, 2, 3, 4, 6, 8, 12, 16)
ROUNDS = 5
BUDGET_S = 30.0
"""Of measuring, for each of the two rounds of questions."""
SLACK = 1.05
"""How much slower than the best a neighbour may look to the model and still be tried."""
MIN_GAIN = 0.01
"""What a larger number of chunks must win over a smaller one; less is noise, and costs memory for its indices."""


@dataclass(frozen=True)
class ChunkChoice:
    """What was chosen, and from what.

    Attributes:
        num_chunks: for all blocks of the model.
        reason: one line for a person.
        measured_ms: forward and backward of one block, by number of chunks; the slowest rank's, in the fastest of
            several rounds.
        predicted_ms: what the model says, for the candidates.
        forward, backward: the fitted costs; None where nothing had to be measured.
    """

    num_chunks: int
    reason: str
    measured_ms: Mapping[int, float] = field(default_factory=dict)
    predicted_ms: Mapping[int, float] = field(default_factory=dict)
    forward: PassCosts | None = None
    backward: PassCosts | None = None


class _Here:
    """A transfer that arrives at once."""

    arrived = True

    def __init__(self, rows: Tensor):
        self.rows = rows

    def wait(self) -> Tensor:
        return self.rows

    def when_done(self, report: Callable[[], None]) -> None:
        report()

    def wait_beside(self) -> None:
        """There is nothing to wait for."""


class _NoLink:
    """A :class:`Link` whose transfers take no time: the computation alone."""

    def start(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> _Here:
        return _Here(rows.new_zeros((sum(receive), *rows.shape[1:])))


class _NoExperts:
    """An :class:`Engine` whose products take no time: the transfers alone."""

    def first_product(self, rows: Tensor, arrivals: Arrivals, weights: ExpertWeights, /) -> Tensor:
        return rows.new_empty(0)

    def forward(
        self, rows: Tensor, scale: Tensor, arrivals: Arrivals, weights: ExpertWeights, keep: bool, /
    ) -> tuple[Tensor, Tensor | None]:
        return rows.new_zeros(arrivals.num_rows, rows.shape[1]), rows.new_empty(0) if keep else None

    def input_gradients(
        self, grad: Tensor, scale: Tensor, gate_up: Tensor, arrivals: Arrivals, weights: ExpertWeights, /
    ) -> tuple[Tensor, Tensor, Tensor]:
        return grad.new_zeros(arrivals.num_rows, grad.shape[1]), torch.zeros_like(scale), gate_up

    def weight_gradients(self, *_: Any) -> None:
        pass


class _Arm(NamedTuple):
    """What is timed: the block with this link and this engine; None takes the block's own."""

    link: Link | None = None
    engine: Engine | None = None


_BLOCK, _COMPUTE, _LINK = _Arm(), _Arm(link=_NoLink()), _Arm(engine=_NoExperts())


class _Probe:
    """Forwards and backwards of one block outside of autograd; leaves its parameters and statistics as they were."""

    def __init__(self, block: MoEBlock, num_tokens: int, dtype: torch.dtype, synchronize: Callable[[], None]):
        self.block, self.synchronize = block, synchronize
        device = block.router.weight.device
        generator = torch.Generator().manual_seed(1234 + block.groups.all.rank())
        hidden = block.config.hidden_size
        self.tokens, self.grad = (
            torch.randn(num_tokens, hidden, generator=generator).to(device=device, dtype=dtype) for _ in range(2)
        )
        with torch.no_grad():
            self.routing = block.router(self.tokens.unsqueeze(1))
        self.weights = block.experts.weights

    def run(self, k: int, arm: _Arm) -> tuple[float, float]:
        """Milliseconds of a forward and of a backward."""
        with torch.no_grad():
            pipeline = self.block.pipeline(self.routing, self.tokens.dtype, k)
            pipeline = replace(
                pipeline,
                link=arm.link or pipeline.link,
                engine=arm.engine or pipeline.engine,
                clock=ExchangeClock(),  # these waits are none of the training's
            )
            self.synchronize()
            begin = time.perf_counter()
            _, kept = pipeline.forward(self.tokens, self.routing.weights, self.weights.detached(), True)
            self.synchronize()
            middle = time.perf_counter()
            gradients = Gradients.of(self.weights, k)
            pipeline.backward(self.grad, self.weights.detached(), kept, gradients)
            self.synchronize()
        return (middle - begin) * 1e3, (time.perf_counter() - middle) * 1e3

    def clean(self) -> None:
        """The probes went into the gradient buffers, as the real passes do."""
        for parameter in self.block.experts.parameters():
            main = main_grad_of(parameter)
            if main is not None:
                main.zero_()
                set_added_to_main_grad(parameter, False)


def max_chunks(block: MoEBlock, num_tokens: int) -> int:
    """The largest candidate that leaves an expert enough rows in the smallest chunk, with an even load.

    Args:
        block: a MoE layer of this rank.
        num_tokens: tokens of a call on this rank.
    """
    router = block.router
    rows = num_tokens * router.topk * block.groups.all.size() / router.num_experts
    minimum = traits_of(router.weight.device).min_rows_per_expert_chunk
    # The smallest chunk is one part of all: megatron_telechat.moe.chunks.
    fitting = [k for k in CANDIDATES if k <= num_tokens and sum(chunk_parts(k)) * minimum <= rows]
    return max(fitting, default=1)


def choose_num_chunks(
    block: MoEBlock | None,
    num_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    synchronize: Callable[[], None] = lambda: None,
) -> ChunkChoice:
    """Time the block with 1, 2, 4 and 8 chunks, the computation and the transfers alone; fit the model; try the numbers
    next to the best, where the model does not rule them out.

    Collective over all ranks: every rank sees the slowest rank's times, and so comes to the same choice.

    Args:
        block: a MoE layer of this rank; None where it has none.
        num_tokens: tokens of a call on this rank.
        dtype: of the tokens.
        device: of the model.
        synchronize: waits for the device.
    """
    limits = torch.tensor(
        [block.groups.all.size() if block else 1, -(max_chunks(block, num_tokens) if block else 1 << 30)], device=device
    )
    _reduce(limits)
    group_size, limit = int(limits[0]), -int(limits[1])
    if group_size == 1:
        return ChunkChoice(1, "the experts of a layer share a rank: there is no exchange to hide")
    if limit < 2:
        return ChunkChoice(1, f"{num_tokens} tokens a rank leave too few rows for an expert in a chunk")
    probe = _Probe(block, num_tokens, dtype, synchronize) if block else None
    first = [k for k in FIRST if k <= limit]
    ends = [first[0], first[-1]]
    arms = [(_BLOCK, k) for k in first] + [(_COMPUTE, k) for k in ends] + [(_LINK, k) for k in ends]
    times = _measure(probe, arms, device)
    forward, backward = (
        PassCosts.fit({k: times[_COMPUTE, k][way] for k in ends}, {k: times[_LINK, k][way] for k in ends})
        for way in (0, 1)
    )
    predicted = {k: predicted_ms(forward, backward, k) for k in CANDIDATES if k <= limit}
    measured = {k: sum(times[_BLOCK, k]) for k in first}
    best = min(measured, key=measured.__getitem__)
    further = _neighbours(best, first, predicted)
    if further:  # beside the best again: what is compared is measured side by side
        times |= _measure(probe, [(_BLOCK, k) for k in sorted({1, best, *further})], device)
    if probe is not None:
        probe.clean()
    measured = {k: sum(times[_BLOCK, k]) for k in sorted(k for arm, k in times if arm == _BLOCK)}
    best = _smallest_good(measured)
    reason = _reason(best, measured, (forward, backward))
    return ChunkChoice(best, reason, measured, predicted, forward, backward)


def _measure(
    probe: _Probe | None, arms: Sequence[tuple[_Arm, int]], device: torch.device
) -> dict[tuple[_Arm, int], tuple[float, float]]:
    """Forward and backward of every arm: in each round the slowest rank's, of the rounds the fastest.

    A round is over all arms, so that drift hits all alike; and what disturbs a round only adds to its time.
    """
    rounds: list[list[tuple[float, float]]] = []
    wide = getattr(torch, traits_of(device).widest_float)
    spent = torch.zeros(1, dtype=wide, device=device)
    for number in range(ROUNDS + 1):
        begin = time.perf_counter()
        times = [probe.run(k, arm) if probe else (0.0, 0.0) for arm, k in arms]
        if number:  # the first one warms up
            rounds.append(times)
        spent += time.perf_counter() - begin
        total = spent.clone()
        _reduce(total)  # ranks must stop together
        if number >= 2 and float(total) * (number + 2) / (number + 1) > BUDGET_S:
            break
    slowest = torch.tensor(rounds, dtype=wide, device=device)  # [rounds, arms, 2]
    _reduce(slowest)
    fastest = slowest.sum(-1).min(0).indices.tolist()
    return {arm: tuple(slowest[fastest[number], number].tolist()) for number, arm in enumerate(arms)}


def _reduce(values: Tensor) -> None:
    if dist.get_world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)


def _neighbours(best: int, measured: Sequence[int], predicted: Mapping[int, float]) -> list[int]:
    """The candidates next to the best of what was measured, unless the model sees them well behind it."""
    known = sorted({*predicted, *measured})
    place = known.index(best)
    beside = [known[at] for at in (place - 1, place + 1) if 0 <= at < len(known)]
    return [k for k in beside if k not in measured and predicted[k] <= SLACK * predicted[best]]


def _smallest_good(measured: Mapping[int, float]) -> int:
    fastest = min(measured.values())
    return min(k for k, ms in measured.items() if ms <= fastest * (1 + MIN_GAIN))


def _reason(best: int, measured: Mapping[int, float], parts: Sequence[PassCosts]) -> str:
    compute, link = (sum(getattr(part, name) for part in parts) for name in ("compute", "link"))
    table = ", ".join(f"{k}: {ms:.1f}" for k, ms in measured.items())
    gain = measured[1] / measured[best]
    what = f"{gain:.2f}x as fast as whole" if best > 1 else "chunks would not pay"
    return f"{what} (one layer, ms by chunks: {table}; computation {compute:.1f} ms, exchange {link:.1f} ms)"
