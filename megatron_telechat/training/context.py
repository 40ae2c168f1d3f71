"""How the attention over ranks is carried out: what ``auto`` leaves open is measured once, and kept in the checkpoints
of the run.

Two things are open: into how many pieces a step of the ring is cut, and what attention and transfers cost, by which
rows of several documents are laid out over the ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_telechat.backend import Backend
from megatron_telechat.backend.block_attention import Block, Grads, Running, Saved
from megatron_telechat.checkpoint.train_state import topology
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.data.loader import EVEN_COSTS
from megatron_telechat.model import compute_dtype
from megatron_telechat.model.context_attention import ContextCoreAttention, context_attentions
from megatron_telechat.parallel.agreement import agree, from_rank_0
from megatron_telechat.parallel.clock import ExchangeClock, PassClock
from megatron_telechat.parallel.context.direct import Way, attend
from megatron_telechat.parallel.context.layout import Costs
from megatron_telechat.parallel.context.plan import LEAST_ROWS, ContextPlan, whole_rows
from megatron_telechat.parallel.state import ParallelState
from megatron_telechat.training.measured import holding

KEY = "context"
"""Of this choice, in the ``extra`` of a checkpoint and as the event in metrics.jsonl."""
CANDIDATES = (1, 2, 4, 8)
ROUNDS = 5
SHORTEST_TOKENS = 16
"""Of a rank, in a row that costs nothing but its transfers."""
LEAST_TRANSFER_S = 1e-7
"""Noise may make a transfer cost less than nothing."""
MIN_GAIN = 0.02
"""What more pieces must win over fewer; less is noise, and costs smaller products and messages."""


@dataclass(frozen=True)
class ContextSetting:
    """What the attentions were set to.

    Attributes:
        pieces: of each step, on every layer and rank.
        costs: for the layout of rows of several documents.
        message: one line for a person; empty where nothing was open.
        extra: what a checkpoint keeps of it.
        measured_ms: forward and backward of one attention by pieces, the slowest rank's; None where nothing was
            measured.
    """

    pieces: int
    costs: Costs = EVEN_COSTS
    message: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    measured_ms: Mapping[int, float] | None = None

    def event(self, step: int) -> dict[str, Any] | None:
        """The record for metrics.jsonl of a measurement before step `step` + 1; None where there was none."""
        if self.measured_ms is None:
            return None
        measured = {str(pieces): ms for pieces, ms in self.measured_ms.items()}
        return {"event": KEY, "step": step, "pieces": self.pieces, "measured_ms": measured, **asdict(self.costs)}


def set_context(
    virtual_stages: Sequence[nn.Module],
    run: RunConfig,
    state: ParallelState,
    backend: Backend,
    before: Sequence[Mapping[str, Any]] = (),
) -> ContextSetting | None:
    """Set all attentions over ranks to the pieces that the run has measured before, or to those that are measured now,
    where they are open.

    Collective over all ranks. The measurement leaves no trace in random generators. One of before is taken only where
    layout, shape of the batch, precision and device are those it was made with.

    Args:
        virtual_stages: those of this rank.
        before: ``extra`` of the checkpoint that the run resumes from, and what else was measured (`measured`).

    Returns:
        None where rows are whole, where no rank sends keys and values, and where the attention is not ours.

    Raises:
        ConfigError: on all ranks, if they came to different settings.
    """
    parallel = run.parallel
    if parallel.context_sizes[1] == 1 or parallel.cp_implementation != "own":
        return None
    open_pieces = parallel.cp_pieces == "auto"
    open_costs = run.data.reset_attention_mask and parallel.cp_layout == "auto"
    if not open_pieces and not open_costs:
        assert parallel.cp_pieces != "auto"
        return ContextSetting(parallel.cp_pieces)
    now = _conditions(run, state, backend)
    # One rank decides whether to measure: a device of another name would send some ranks into a collective alone.
    kept, _ = from_rank_0(holding(KEY, now, before, _is_setting))
    attentions = context_attentions(virtual_stages)
    if kept is not None:
        measured, pieces, costs = None, kept["pieces"], Costs(**kept["costs"])
    else:
        measured, costs = _measure(attentions[0] if attentions else None, run, backend)
        fastest = min(measured.values())
        pieces = min(number for number, ms in measured.items() if ms * (1 - MIN_GAIN) <= fastest)
    if not open_pieces:
        assert parallel.cp_pieces != "auto"
        pieces = parallel.cp_pieces
    agree("the pieces of context-parallel transfers", (pieces, costs), state)
    for attention in attentions:
        attention.pieces = pieces
    entry = {"pieces": pieces, "costs": asdict(costs), "conditions": now}
    setting = ContextSetting(pieces, costs, "", {KEY: entry}, measured)
    return replace(setting, message=_message(setting))


def _message(setting: ContextSetting) -> str:
    pieces = f"{setting.pieces} piece{'s' * (setting.pieces > 1)} of each transfer of keys and values"
    if setting.measured_ms is None:
        return f"cp_pieces: {pieces}, measured before"
    times = ", ".join(f"{number}: {ms:.3g} ms" for number, ms in setting.measured_ms.items())
    return f"cp_pieces: {pieces}; attention of a layer, forward and backward: {times}"


def _conditions(run: RunConfig, state: ParallelState, backend: Backend) -> dict[str, Any]:
    """What the setting depends on, JSON."""
    training, parallel = run.training, run.parallel
    return {
        **topology(run, state),
        "sizes": list(parallel.context_sizes),
        "tokens": [training.micro_batch_size, training.seq_length],
        "keep": parallel.cp_keep_received,
        "precision": training.precision,
        "device": backend.device_name(),
    }


def _is_setting(entry: Mapping[str, Any]) -> bool:
    """Whether an entry has pieces and costs that can be some."""
    pieces, costs = entry.get("pieces"), entry.get("costs")
    if isinstance(pieces, bool) or not isinstance(pieces, int) or pieces < 1 or not isinstance(costs, Mapping):
        return False
    if costs.keys() != asdict(EVEN_COSTS).keys():
        return False
    return all(isinstance(each, float) and 0 < each < math.inf for each in costs.values())


class _NoProducts:
    """A kernel whose products take no time: the transfers alone."""

    def takes(self, query: Tensor) -> bool:
        return True

    def prepared(self, rows: Tensor) -> Tensor:
        return rows

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], causal: bool, total: Running
    ) -> None:
        if causal:
            total.out.zero_()

    def backward(
        self, saved: Saved, key: Tensor, value: Tensor, blocks: Sequence[Block], causal: bool, grads: Grads
    ) -> None:
        pass


class _Probe:
    """Forwards and backwards of one attention over the ring, on random rows of one document each."""

    def __init__(self, attention: ContextCoreAttention, run: RunConfig, backend: Backend):
        self.attention, self.backend = attention, backend
        training, place = run.training, attention.place
        self.plan = place.whole_rows(training.seq_length, training.micro_batch_size)
        split = run.parallel.tensor_model_parallel_size * place.heads
        heads, groups = run.model.num_attention_heads // split, run.model.query_groups // split
        generator = torch.Generator().manual_seed(1234 + place.ring_rank)
        tokens, width = self.plan.positions.size, run.model.head_dim
        self.parts = [
            torch.randn(tokens, count, width, generator=generator)
            .to(device=backend.device, dtype=compute_dtype(run))
            .requires_grad_()
            for count in (heads, groups, groups)
        ]
        self.grad = torch.randn(tokens, heads, width, generator=generator).to(self.parts[0])

    @property
    def shortest(self) -> ContextPlan:
        """The plan of a row that is next to nothing: what is left is the cost of a transfer."""
        place = self.attention.place
        length = min(self.plan.row_length, place.ring * SHORTEST_TOKENS)
        return whole_rows(length, 1, place.ring, place.ring_rank)

    def ms(self, pieces: int, plan: ContextPlan, products: bool = True) -> float:
        """Milliseconds of a forward and a backward.

        Args:
            plan: of the first tokens.
            products: whether blocks are computed.
        """
        device = self.backend.device
        clocks = tuple(PassClock(ExchangeClock(), None, late, device) for late in (False, True))
        kernel = self.attention.kernel_for(self.parts[0]) if products else _NoProducts()
        way = Way(self.attention.link, kernel, pieces, self.attention.keep, (clocks[0], clocks[1]))
        self.backend.synchronize()
        begin = time.perf_counter()
        with torch.enable_grad():
            query, key, value = parts = [part[: plan.positions.size] for part in self.parts]
            out = attend(query, key, value, plan, way)
        torch.autograd.grad(out, parts, self.grad[: plan.positions.size])
        self.backend.synchronize()
        return (time.perf_counter() - begin) * 1e3


def _measure(
    attention: ContextCoreAttention | None, run: RunConfig, backend: Backend
) -> tuple[dict[int, float], Costs]:
    """The slowest rank's times by pieces, in the fastest of several rounds; and what pairs and rows cost."""
    probe = _Probe(attention, run, backend) if attention is not None else None
    limits = torch.tensor([-_most_pieces(probe.plan) if probe else -CANDIDATES[-1]], device=backend.device)
    dist.all_reduce(limits, op=dist.ReduceOp.MAX)
    candidates = [number for number in CANDIDATES if number <= -int(limits)]
    arms: list[tuple[int, ContextPlan, bool]] = []
    if probe:
        whole, short = probe.plan, probe.shortest
        arms = [(number, whole, True) for number in candidates]
        arms += [(1, replace(whole, steps=()), True), (1, whole, False)]
        arms += [(1, replace(short, steps=()), True), (1, short, True)]
    best = torch.full((len(candidates) + 4,), math.inf, dtype=backend.widest_float)
    for round_ in range(ROUNDS + 1):
        times = torch.tensor([probe.ms(*arm) for arm in arms] if probe else [0.0] * best.numel()).to(best.dtype)
        times = times.to(backend.device)
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
        if round_:  # the first one warms up
            best = torch.minimum(best, times.cpu())
    *of_pieces, own, link, without, short = best.tolist()
    measured = dict(zip(candidates, of_pieces, strict=True))
    costs = (
        (*_per_unit(own, link, probe.plan), (short - without) / 1e3 / len(probe.plan.steps)) if probe else (0.0,) * 3
    )
    units = torch.tensor(costs, dtype=backend.widest_float, device=backend.device)
    dist.all_reduce(units, op=dist.ReduceOp.MAX)
    pair, row, transfer = units.tolist()
    backend.empty_cache()
    backend.reset_peak_memory()
    return measured, Costs(pair, row, max(transfer, LEAST_TRANSFER_S))


def _most_pieces(plan: ContextPlan) -> int:
    """Into how many pieces the largest step can be cut."""
    return max(1, max(step.rows_in for step in plan.steps) // LEAST_ROWS)


def _per_unit(own_ms: float, link_ms: float, plan: ContextPlan) -> tuple[float, float]:
    """Seconds of a pair of a query and a key, and of a row that travels, forward and backward."""
    pairs = sum((q1 - q0) * (k1 - k0) - (q1 - q0) * (q1 - q0 - 1) / 2 for q0, q1, k0, k1 in plan.own)
    rows = sum(step.rows_in for step in plan.steps)
    return own_ms / 1e3 / pairs, link_ms / 1e3 / max(rows, 1)
