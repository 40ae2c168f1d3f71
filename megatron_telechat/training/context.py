"""How the attention over ranks is carried out: what ``auto`` leaves open is measured once, and kept in the checkpoints
of the run.

Three things are open: into how many pieces a step of the ring is cut, whether received keys and values are kept for the
backward, and what attention and transfers cost, by which rows of several documents are laid out over the ranks.
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
from megatron_telechat.costs.memory import stage_memory
from megatron_telechat.data.loader import EVEN_COSTS
from megatron_telechat.model import compute_dtype
from megatron_telechat.model.context_attention import ContextCoreAttention, context_attentions
from megatron_telechat.parallel.agreement import agree, from_rank_0
from megatron_telechat.parallel.clock import ExchangeClock, PassClock
from megatron_telechat.parallel.context.direct import Way, attend
from megatron_telechat.parallel.context.layout import Costs
from megatron_telechat.parallel.context.plan import LEAST_ROWS, ContextPlan, whole_rows
from megatron_telechat.parallel.state import ParallelState
from megatron_telechat.planner.context import keeping
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
KEEP_GAIN = 0.005
"""What keeping must win: it costs memory alone, and only memory that is there."""
KEEP_ROOM = 0.9
"""Of a device, what a run that keeps may take by the memory model."""

Arm = tuple[int, bool]
"""Pieces, and whether what is received is kept."""


@dataclass(frozen=True)
class ContextSetting:
    """What the attentions were set to.

    Attributes:
        pieces: of each step, on every layer and rank.
        keep: received keys and values for the backward.
        costs: for the layout of rows of several documents.
        message: one line for a person; empty where nothing was open.
        extra: what a checkpoint keeps of it.
        measured_ms: forward and backward of one attention by pieces and keeping, the slowest rank's; None where nothing
            was measured.
    """

    pieces: int
    keep: bool
    costs: Costs = EVEN_COSTS
    message: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    measured_ms: Mapping[Arm, float] | None = None

    def event(self, step: int) -> dict[str, Any] | None:
        """The record for metrics.jsonl of a measurement before step `step` + 1; None where there was none."""
        if self.measured_ms is None:
            return None
        measured = {_arm_name(arm): ms for arm, ms in self.measured_ms.items()}
        chosen = {"pieces": self.pieces, "keep": self.keep}
        return {"event": KEY, "step": step, **chosen, "measured_ms": measured, **asdict(self.costs)}


def set_context(
    virtual_stages: Sequence[nn.Module],
    run: RunConfig,
    state: ParallelState,
    backend: Backend,
    before: Sequence[Mapping[str, Any]] = (),
) -> ContextSetting | None:
    """Set all attentions over ranks to what the run has measured before, or to what is measured now, where it is open.

    Received keys and values are kept where that is faster and the memory model has the run with them within a share of
    every device. Collective over all ranks. The measurement leaves no trace in random generators. One of before is
    taken only where layout, shape of the batch, precision and device are those it was made with.

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
    given_pieces = None if parallel.cp_pieces == "auto" else parallel.cp_pieces
    given_keep = parallel.cp_keep_received
    open_costs = run.data.reset_attention_mask and parallel.cp_layout == "auto"
    attentions = context_attentions(virtual_stages)
    if given_pieces is not None and given_keep is not None and not open_costs:
        _apply(given_pieces, given_keep, attentions)
        return ContextSetting(given_pieces, given_keep)
    now = _conditions(run, state, backend)
    # One rank decides whether to measure: a device of another name would send some ranks into a collective alone.
    kept, _ = from_rank_0(holding(KEY, now, before, _is_setting))
    about = ""
    if kept is not None:
        measured, costs = None, Costs(**kept["costs"])
        # entries of before this was open were measured with what their conditions say
        pieces, keep = kept["pieces"], kept.get("keep", now["keep"])
    else:
        numbers = CANDIDATES if given_pieces is None else (given_pieces,)
        keeps = (False, True) if given_keep is None else (given_keep,)
        if given_keep is None and (about := _lacks_room(run, state, backend)):
            keeps = (False,)
        arms = [(number, keep) for keep in keeps for number in numbers]
        measured, costs = _measure(attentions[0] if attentions else None, arms, run, backend)
        pieces, keep = _fastest(measured)
    pieces = pieces if given_pieces is None else given_pieces
    keep = keep if given_keep is None else given_keep
    agree("the transfers of context parallelism", (pieces, keep, costs), state)
    _apply(pieces, keep, attentions)
    entry = {"pieces": pieces, "keep": keep, "costs": asdict(costs), "conditions": now}
    setting = ContextSetting(pieces, keep, costs, "", {KEY: entry}, measured)
    return replace(setting, message=_message(setting, about))


def _apply(pieces: int, keep: bool, attentions: Sequence[ContextCoreAttention]) -> None:
    for attention in attentions:
        attention.pieces, attention.keep = pieces, keep


def _fastest(measured: Mapping[Arm, float]) -> Arm:
    """Of what is about as fast as the fastest, the least memory, then the fewest pieces."""
    best = {keep: min((ms for arm, ms in measured.items() if arm[1] == keep), default=math.inf)
            for keep in (False, True)}  # fmt: skip
    keep = best[True] < best[False] * (1 - KEEP_GAIN)
    numbers = (pieces for (pieces, kept), ms in measured.items() if kept == keep and ms * (1 - MIN_GAIN) <= best[keep])
    return min(numbers), keep


def _lacks_room(run: RunConfig, state: ParallelState, backend: Backend) -> str:
    """Why received keys and values are not kept, for a person; "" where all ranks have the memory. Collective."""
    stage = stage_memory(keeping(run, True))[state.pp_rank]
    total = backend.memory().total_bytes
    if backend.traits.ranks_share_cores:  # and the memory of the host
        total /= run.parallel.node_size
    needs = torch.tensor([stage.device_bytes / max(total, 1)], dtype=backend.widest_float, device=backend.device)
    dist.all_reduce(needs, op=dist.ReduceOp.MAX)
    share = float(needs)
    return "" if share <= KEEP_ROOM else f"keeping them needs {share:.0%} of a device, over {KEEP_ROOM:.0%}"


def _arm_name(arm: Arm) -> str:
    pieces, keep = arm
    return f"{pieces}{' kept' * keep}"


def _message(setting: ContextSetting, about: str) -> str:
    how = f"{setting.pieces} piece{'s' * (setting.pieces > 1)} of each transfer of keys and values"
    how += ", kept for the backward" if setting.keep else ", fetched again for the backward"
    how += f" ({about})" * bool(about)
    if setting.measured_ms is None:
        return f"attention over ranks: {how}; measured before"
    times = ", ".join(f"{_arm_name(arm)}: {ms:.3g} ms" for arm, ms in setting.measured_ms.items())
    return f"attention over ranks: {how}; a layer, forward and backward, by pieces: {times}"


def _conditions(run: RunConfig, state: ParallelState, backend: Backend) -> dict[str, Any]:
    """What the setting depends on, JSON."""
    training, parallel = run.training, run.parallel
    return {
        **topology(run, state),
        "sizes": list(parallel.context_sizes),
        "tokens": [training.micro_batch_size, training.seq_length],
        "keep": parallel.keeps_received,
        "precision": training.precision,
        "device": backend.device_name(),
    }


def _is_setting(entry: Mapping[str, Any]) -> bool:
    """Whether an entry has pieces and costs that can be some."""
    pieces, costs = entry.get("pieces"), entry.get("costs")
    if isinstance(pieces, bool) or not isinstance(pieces, int) or pieces < 1 or not isinstance(costs, Mapping):
        return False
    if not isinstance(entry.get("keep", False), bool):
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

    def ms(self, arm: Arm, plan: ContextPlan, products: bool = True) -> float:
        """Milliseconds of a forward and a backward.

        Args:
            plan: of the first tokens.
            products: whether blocks are computed.
        """
        device = self.backend.device
        clocks = tuple(PassClock(ExchangeClock(), None, late, device) for late in (False, True))
        kernel = self.attention.kernel_for(self.parts[0]) if products else _NoProducts()
        way = Way(self.attention.link, kernel, *arm, (clocks[0], clocks[1]))
        self.backend.synchronize()
        begin = time.perf_counter()
        with torch.enable_grad():
            query, key, value = parts = [part[: plan.positions.size] for part in self.parts]
            out = attend(query, key, value, plan, way)
        torch.autograd.grad(out, parts, self.grad[: plan.positions.size])
        self.backend.synchronize()
        return (time.perf_counter() - begin) * 1e3


def _measure(
    attention: ContextCoreAttention | None, open_: Sequence[Arm], run: RunConfig, backend: Backend
) -> tuple[dict[Arm, float], Costs]:
    """The slowest rank's times of what is open, in the fastest of several rounds; and what pairs and rows cost."""
    probe = _Probe(attention, run, backend) if attention is not None else None
    limits = torch.tensor([-_most_pieces(probe.plan) if probe else -CANDIDATES[-1]], device=backend.device)
    dist.all_reduce(limits, op=dist.ReduceOp.MAX)
    fewest = min(number for number, _ in open_)
    candidates = [(number, keep) for number, keep in open_ if number <= max(-int(limits), fewest)]
    arms: list[tuple[Arm, ContextPlan, bool]] = []
    if probe:
        whole, short, simple = probe.plan, probe.shortest, (1, open_[0][1])
        arms = [(candidate, whole, True) for candidate in candidates]
        arms += [(simple, replace(whole, steps=()), True), (simple, whole, False)]
        arms += [(simple, replace(short, steps=()), True), (simple, short, True)]
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
