"""Bytes that one rank exchanges in a step, by group and kind of exchange.

The counterpart of `communication`, which has the seconds: what `--dry-run --execute` counts on a virtual rank is held
to these figures. Bytes are those of the larger buffer of a call: the whole tensor of an all-gather, a reduce-scatter or
an all-reduce; of an all-to-all what a rank sends, itself included; of a message its content.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron_telechat.config.layout import PipelineLayout, pipeline_layout
from megatron_telechat.config.recompute import recompute_plan
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.activations import BYTES, Tokens, arriving_rows, tokens_of
from megatron_telechat.costs.communication import GRADIENT_BYTES
from megatron_telechat.costs.context import ContextExchange
from megatron_telechat.costs.memory import stage_parameters
from megatron_telechat.tensors.pieces import virtual_stage_table

GATHER, SCATTER, REDUCE, EXCHANGE = "all-gather", "reduce-scatter", "all-reduce", "all-to-all"
SEND, RECEIVE = "send", "receive"
_LOSS_REDUCTIONS = 3
"""The vocabulary-parallel cross entropy sums the maximum, the label's logit and the exponentials over the tensor ranks,
one fp32 number a token each; in chunks, too."""
_PROBABILITY_BYTES = 4


@dataclass(frozen=True)
class Volume:
    """Bytes of one kind of exchange of one group.

    Attributes:
        per_microbatch: for each micro-batch.
        per_step: once a step, on top.
    """

    per_microbatch: float = 0.0
    per_step: float = 0.0

    def of_step(self, microbatches: int) -> float:
        """Bytes of a step of so many micro-batches."""
        return self.per_microbatch * microbatches + self.per_step


class _Volumes:
    """Sums by (group, kind)."""

    def __init__(self) -> None:
        self.microbatch: dict[tuple[str, str], float] = defaultdict(float)
        self.step: dict[tuple[str, str], float] = defaultdict(float)

    def each(self, group: str, kinds: Mapping[str, int], size: float) -> None:
        """`size` bytes, so many times a micro-batch, of each kind."""
        for kind, count in kinds.items():
            self.microbatch[group, kind] += count * size

    def once(self, group: str, kind: str, size: float) -> None:
        """`size` bytes a step."""
        self.step[group, kind] += size

    def result(self) -> dict[tuple[str, str], Volume]:
        """Those that are not empty."""
        keys = sorted({*self.microbatch, *self.step})
        found = {key: Volume(self.microbatch[key], self.step[key]) for key in keys}
        return {key: volume for key, volume in found.items() if volume.per_microbatch or volume.per_step}


def stage_volumes(run: RunConfig, stage: int, context_rank: int = 0) -> dict[tuple[str, str], Volume]:
    """What one rank of a pipeline stage exchanges: (group, kind) → bytes.

    Groups: "tp", "cp", "ep" (all ranks that share experts), "pp", "dp" (dense parameters), "edp" (experts' parameters).
    The routing is balanced and random, as in `activations.arriving_rows`; rows are of one document.

    Not counted: the choices of experts (a byte each), the counts of the auxiliary loss (with the formula hf a row
    behind the hidden states), loss and gradient norm.

    Args:
        run: the run.
        stage: pipeline rank.
        context_rank: context-parallel rank.
    """
    layout, plan, tokens = pipeline_layout(run), recompute_plan(run), tokens_of(run)
    out = _Volumes()
    whole = BYTES[run.training.precision] * run.model.hidden_size * tokens.whole
    for virtual_stage in range(layout.num_virtual_stages):
        for layer in layout.layers_of(stage, virtual_stage):
            _layer(out, run, layer, plan[layer], whole, tokens)
            _attention(out, ContextExchange.of(run), plan[layer], context_rank)
        if layout.has_embedding(stage, virtual_stage):
            _embedding(out, tokens, run, whole)
        if layout.has_loss(stage, virtual_stage):
            _head(out, tokens, run, whole)
    _pipeline(out, run, layout, stage, whole / run.parallel.sequence_parallel_size)
    _gradients(out, run, stage)
    if tokens.tensor > 1 and run.parallel.sequence_parallel_size > 1:
        out.once("tp", REDUCE, GRADIENT_BYTES * _replicated(run, layout, stage))
    return out.result()


def _layer(out: _Volumes, run: RunConfig, layer: int, modes: Iterable[str], whole: float, tokens: Tokens) -> None:
    routed = run.model.layer_is_moe(layer)
    regions = 1 if routed else 2  # attention, and the dense MLP
    regions += bool(routed and run.model.moe_shared_expert_intermediate_size)
    full = "full" in modes
    again = regions if full else regions - 1 if {"mlp", "moe"} & {*modes} else 0
    if tokens.tensor > 1:
        if run.parallel.sequence_parallel_size > 1:
            # Korthikanti et al. (arXiv 2205.05198, section 4.2.2): gather into a region and scatter out of it; the
            # backward does both the other way round, and gathers the input once more for the weights' gradients.
            out.each("tp", {GATHER: 3, SCATTER: 2}, regions * whole)
            out.each("tp", {GATHER: 1, SCATTER: 1}, again * whole)
        else:
            out.each("tp", {REDUCE: 2}, regions * whole)
            out.each("tp", {REDUCE: 1}, again * whole)
    if routed and tokens.expert * tokens.expert_tensor > 1:
        _experts(out, run, tokens, passes=1 + full)


def _attention(out: _Volumes, exchange: ContextExchange, modes: Iterable[str], context_rank: int) -> None:
    """Heads for tokens and back, in each pass; keys and values in each pass that does not have them yet, their
    gradients once."""
    forwards = 1 + bool({"full", "core_attn"} & {*modes})
    fetches = forwards + (not exchange.keeps)
    out.each("cp", {EXCHANGE: forwards + 1}, exchange.exchanged_heads())
    sent, received = exchange.sent(context_rank), exchange.received(context_rank)
    out.each("cp", {SEND: 1}, fetches * sent + received)
    out.each("cp", {RECEIVE: 1}, fetches * received + sent)


def _experts(out: _Volumes, run: RunConfig, tokens: Tokens, passes: int) -> None:
    """Dispatch and combine, forward (`passes` times) and backward; each row's probabilities ride with it one way."""
    row = BYTES[run.training.precision] * run.model.hidden_size
    rows = row * arriving_rows(run.model, tokens)
    probabilities = _PROBABILITY_BYTES * tokens.routed
    out.each("ep", {EXCHANGE: 1}, (passes + 1) * (2 * rows + probabilities))


def _embedding(out: _Volumes, tokens: Tokens, run: RunConfig, whole: float) -> None:
    if tokens.tensor == 1:
        return
    split = run.parallel.sequence_parallel_size > 1
    out.each("tp", {SCATTER: 1, GATHER: 1} if split else {REDUCE: 1}, whole)


def _head(out: _Volumes, tokens: Tokens, run: RunConfig, whole: float) -> None:
    if tokens.tensor == 1:
        return
    split = run.parallel.sequence_parallel_size > 1
    out.each("tp", {GATHER: 2, SCATTER: 1} if split else {REDUCE: 1}, whole)
    out.each("tp", {REDUCE: _LOSS_REDUCTIONS}, 4 * tokens.whole)


def _pipeline(out: _Volumes, run: RunConfig, layout: PipelineLayout, stage: int, message: float) -> None:
    """Hidden states to the next virtual stage and their gradients back; the first one gets none, the last sends
    none."""
    if layout.pipeline_size == 1:
        return
    virtual_stages = layout.num_virtual_stages
    entering = virtual_stages - (stage == 0)
    leaving = virtual_stages - (stage == layout.pipeline_size - 1)
    # Forward in and backward in; forward out and backward out.
    out.each("pp", {RECEIVE: entering + leaving, SEND: leaving + entering}, message)


def _gradients(out: _Volumes, run: RunConfig, stage: int) -> None:
    count, parallel = stage_parameters(run)[stage], run.parallel
    for group, parameters, size in zip(
        ("dp", "edp"), (count.dense, count.expert), parallel.gradient_ranks, strict=True
    ):
        if size == 1 or not parameters:
            continue
        if parallel.use_distributed_optimizer:
            out.once(group, SCATTER, GRADIENT_BYTES * parameters)
            out.once(group, GATHER, BYTES[run.training.precision] * parameters)
        else:
            out.once(group, REDUCE, GRADIENT_BYTES * parameters)


def _replicated(run: RunConfig, layout: PipelineLayout, stage: int) -> int:
    """Parameters that every tensor-parallel rank holds whole, whose gradients are sums over its part of the sequence:
    norms, biases behind a row-parallel product, routers."""
    return sum(
        spec.numel
        for virtual_stage in range(layout.num_virtual_stages)
        for spec in virtual_stage_table(run.model, layout, stage, virtual_stage).values()
        if spec.tensor_axis is None and not spec.expert
    )
