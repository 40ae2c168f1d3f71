"""How many chunks the experts' input is cut into: with ``auto`` measured once, and kept in the checkpoints of the
run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from megatron_telechat.backend import Backend
from megatron_telechat.checkpoint.train_state import topology
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.model import compute_dtype
from megatron_telechat.moe import moe_blocks
from megatron_telechat.moe.autotune import ChunkChoice, choose_num_chunks
from megatron_telechat.moe.overlap_model import PassCosts
from megatron_telechat.parallel.agreement import agree, from_rank_0
from megatron_telechat.parallel.state import ParallelState
from megatron_telechat.training.measured import holding
from megatron_telechat.training.param_gather import gathered_parameters

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel

KEY = "moe_input_chunks"
"""Of this choice, in the ``extra`` of a checkpoint and as the event in metrics.jsonl."""


@dataclass(frozen=True)
class ChunkSetting:
    """What the blocks were set to.

    Attributes:
        num_chunks: of every MoE layer, on every rank.
        message: one line for a person.
        extra: what a checkpoint keeps of it.
        choice: the measurement; None where the number was there before.
    """

    num_chunks: int
    message: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    choice: ChunkChoice | None = None

    def event(self, step: int) -> dict[str, Any] | None:
        """The record for metrics.jsonl of a choice made before step `step` + 1; None where nothing was measured."""
        if self.choice is None:
            return None
        tables = {
            name: {str(k): ms for k, ms in getattr(self.choice, name).items()}
            for name in ("measured_ms", "predicted_ms")
        }
        return {"event": KEY, "step": step, "num_chunks": self.num_chunks, "reason": self.choice.reason, **tables}


def set_chunks(
    virtual_stages: Sequence[DistributedDataParallel],
    run: RunConfig,
    state: ParallelState,
    backend: Backend,
    before: Sequence[Mapping[str, Any]] = (),
) -> ChunkSetting | None:
    """With ``--moe-input-chunks auto``, set all MoE layers to the number that the run has measured before, or to one
    that is measured now.

    Collective over all ranks. A measurement leaves no trace in random generators, counters or gradient buffers. One of
    before is taken only where layout, shape of the batch, precision and device are those it was made with.

    Args:
        virtual_stages: those of this rank, wrapped, with their optimizer.
        before: ``extra`` of the checkpoint that the run resumes from, and what else was measured (`measured`).

    Returns:
        None where the number is not to be chosen.

    Raises:
        ConfigError: on all ranks, if they came to different numbers.
    """
    if not run.model.is_moe or run.parallel.moe_input_chunks != "auto":
        return None
    now = _conditions(run, state, backend)
    # One rank decides whether to measure: a device of another name would send some ranks into a collective alone.
    kept, changed = from_rank_0(holding(KEY, now, before, _number))
    if kept is None:
        choice: ChunkChoice | None = _measure(virtual_stages, run, backend)
        number, costs = choice.num_chunks, choice.backward
    else:
        choice, number, costs = None, kept["num_chunks"], _kept_costs(kept)
    agree("the number of input chunks of the experts", number, state)
    for block in moe_blocks(virtual_stages):
        block.num_chunks, block.backward_costs = number, costs
    pieces = f"{number} chunk{'s' * (number > 1)} of the experts' input"
    if choice is None:
        message = f"moe_input_chunks auto: {pieces}, measured before"
    else:
        anew = f"; measured again because {changed} differs from before" if changed else ""
        message = f"moe_input_chunks auto: {pieces}, {choice.reason}{anew}"
    entry = {"num_chunks": number, "conditions": now, "backward_costs": None if costs is None else asdict(costs)}
    return ChunkSetting(number, message, {KEY: entry}, choice)


def tokens_of_a_rank(run: RunConfig) -> int:
    """Tokens of a micro-batch that reach a MoE layer on one rank."""
    parallel, training = run.parallel, run.training
    ranks = parallel.context_parallel_size * parallel.sequence_parallel_size
    return training.seq_length * training.micro_batch_size // ranks


def _conditions(run: RunConfig, state: ParallelState, backend: Backend) -> dict[str, Any]:
    """What the fastest number depends on, JSON."""
    training = run.training
    return {
        **topology(run, state),
        "tokens": tokens_of_a_rank(run),
        "precision": training.precision,
        "device": backend.device_name(),
    }


def _number(entry: Mapping[str, Any]) -> bool:
    """Whether an entry has a number that can be one."""
    number = entry.get("num_chunks")
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1


def _kept_costs(entry: Mapping[str, Any]) -> PassCosts | None:
    """The costs of an entry; None where it has none. They place work of this rank only."""
    costs = entry.get("backward_costs")
    names = {each.name for each in fields(PassCosts)}
    if not isinstance(costs, Mapping) or costs.keys() != names:
        return None
    if not all(isinstance(ms, int | float) and 0 <= ms < float("inf") for ms in costs.values()):
        return None
    return PassCosts(**costs)


def _measure(virtual_stages: Sequence[DistributedDataParallel], run: RunConfig, backend: Backend) -> ChunkChoice:
    blocks = moe_blocks(virtual_stages)
    generators = backend.rng_state()
    try:
        with gathered_parameters(virtual_stages):
            choice = choose_num_chunks(
                blocks[0] if blocks else None,
                tokens_of_a_rank(run),
                compute_dtype(run),
                backend.device,
                backend.synchronize,
            )
    finally:
        backend.set_rng_state(generators)
    for stage in virtual_stages:
        stage.zero_grad_buffer()
    for block in blocks:
        block.router.statistics.reset()
        block.clock.take_exposed_s()
    backend.empty_cache()
    backend.reset_peak_memory()
    return choice
