"""Where a number that is not finite comes from: the step once more, on the same data, with checks before anything is
summed over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megatron_telechat.data.loader import BatchIterator, micro_batch_samples
from megatron_telechat.errors import NumericsError, UserError
from megatron_telechat.moe import moe_blocks
from megatron_telechat.parallel.agreement import gather_objects
from megatron_telechat.training.numerics import culprits
from megatron_telechat.training.phases import ScheduleTimers
from megatron_telechat.training.pulse import PULSE, Activity, Phase

if TYPE_CHECKING:
    from megatron_telechat.training.step import TrainStep

_OF_A_RANK, _SHOWN = 3, 4
_REPEATS = (
    "repeated on the same data, the numbers are not finite again: data or mathematics",
    "look at these samples (tools/show_sample.py) and lower lr, or train in fp32 to compare; pass the step over with "
    "--iterations-to-skip {step} from the last checkpoint",
)
_DOES_NOT_REPEAT = (
    "repeated on the same data, all numbers of all ranks are finite before they are summed: a device, its memory or a "
    "link is suspected",
    "resume from the last checkpoint; if it comes again with this rank, take its host or device out",
)


@dataclass(frozen=True)
class Again:
    """How a step is taken again.

    Attributes:
        iterators: makes the micro-batches of the step anew, for each virtual stage.
        samples: sample ids of a micro-batch of this rank, by its number in the step.
        generators: state of the random generators before the step.
        tell: writes an event of metrics.jsonl, on the rank that does.
    """

    iterators: Callable[[], Sequence[BatchIterator | None]]
    samples: Callable[[int], Sequence[int]]
    generators: dict[str, Any]
    tell: Callable[[dict[str, Any]], None]

    @classmethod
    def of_step(
        cls,
        step: TrainStep,
        iterators: Callable[[], Sequence[BatchIterator | None]],
        consumed_samples: int,
        tell: Callable[[dict[str, Any]], None],
    ) -> Again:
        """The step that begins now, after so many samples."""
        size, dp_rank, dp_size = step.run.training.micro_batch_size, step.state.dp_rank, step.state.dp_size
        return cls(
            iterators,
            lambda number: micro_batch_samples(number, dp_rank, dp_size, size, consumed_samples),
            step.backend.rng_state(),
            tell,
        )


@dataclass(frozen=True, order=True)
class Fault:
    """The first place of a micro-batch at which a rank saw a number that is not finite.

    Attributes:
        place: sorts the faults of all ranks by cause: forward before backward, then by micro-batch, then in the order
            of the computation.
    """

    place: tuple[int, int, int, int]
    rank: int
    what: str
    samples: tuple[int, ...] = ()

    def text(self) -> str:
        """``rank 1, micro-batch 2, samples 12-13: output of decoder.layers.2.mlp``."""
        where = f"rank {self.rank}"
        if self.samples:
            first, last = self.samples[0], self.samples[-1]
            where += f", micro-batch {self.place[1]}, sample{f's {first}-{last}' if last > first else f' {first}'}"
        return f"{where}: {self.what}"


def located_error(step: TrainStep, again: Again, found: str, number: int, local: Tensor, fix: str = "") -> UserError:
    """The error of a step that was not taken; takes the step again. Collective over all ranks.

    Args:
        found: what is not finite.
        number: of the step, from 1.
        local: [width of the objective], the sum of this rank's reports in the first try.
        fix: what to do, if that is known already.
    """
    with PULSE.within(Activity.LOCATING, Phase.BATCH):
        first = culprits((shard, getattr(shard.parameter, "main_grad", None)) for shard in step.shards)
        mine = None if torch.isfinite(local).all() else f"rank {step.state.rank}: its own sum of losses"
        lost = [text for text in gather_objects(mine) if text is not None][:_SHOWN]
        faults = sorted(fault for of_rank in gather_objects(_faults(step, again)) for fault in of_rank)
    if faults:
        # Where a forward went wrong, its backward had to.
        faults = [fault for fault in faults if fault.place[0] == faults[0].place[0]]
        what, remedy = _REPEATS
        where = "; ".join(fault.text() for fault in faults[:_SHOWN])
    else:
        what, remedy = _DOES_NOT_REPEAT
        where = f"in the first try: {'; '.join(lost) or first or 'no single gradient'}"
    event = {"event": "not_finite", "step": number, "found": found, "repeats": bool(faults), "where": where}
    again.tell(event)
    return NumericsError(
        f"step {number}: {found}; the optimizer step was not taken; {what}", where, fix or remedy.format(step=number)
    ).on_every_rank()


def _faults(step: TrainStep, again: Again) -> list[Fault]:
    """What this rank finds when the step is taken again: the first faults, at most three."""
    weights = (
        Fault((0, -1, 0, 0), step.state.rank, f"the weight {shard.piece.key}")
        for shard in step.shards
        if not torch.isfinite(shard.parameter).all()
    )
    found = list(islice(weights, _OF_A_RANK))
    search = _Search(step, again.samples)
    step.backend.set_rng_state(again.generators)
    for block in moe_blocks(step.virtual_stages):
        if block.router.tape is not None:
            block.router.tape.rewind()
    iterators = again.iterators()
    try:
        with search.attached(), _nothing_reduced(step, search.after_backward):
            sums = step.forward_backward(iterators)
    finally:
        for iterator in iterators:
            if iterator is not None:
                iterator.close()
    search.look_at_gradients(None)
    found += search.faults
    if not found and not torch.isfinite(sums).all():
        found.append(Fault((0, -1, 0, 0), step.state.rank, "the sum of its losses"))
    return sorted(found)[:_OF_A_RANK]


@contextmanager
def _nothing_reduced(step: TrainStep, after_backward: Callable[[], None]) -> Iterator[None]:
    """Gradients stay those of this rank: the schedules finish none, and no micro-batch is the last one."""
    config = step.virtual_stages[0].config
    names = ("finalize_model_grads_func", "no_sync_func", "grad_sync_func", "timers")
    before = {name: getattr(config, name) for name in names}
    timers = ScheduleTimers(step.backend.device)
    timers.after_backward = after_backward
    with ExitStack() as held:
        for stage in step.virtual_stages:
            held.enter_context(stage.no_sync())
        for one in step.virtual_stages:
            for name in names:
                setattr(one.config, name, timers if name == "timers" else None)
        try:
            yield
        finally:
            for one in step.virtual_stages:
                for name in names:
                    setattr(one.config, name, before[name])


class _Search:
    """Hooks on every module: outputs as they are made, gradients of outputs as they arrive."""

    def __init__(self, step: TrainStep, samples: Callable[[int], Sequence[int]]):
        self._step, self._samples = step, samples
        self.faults: list[Fault] = []
        self._seen: set[tuple[int, int, int]] = set()
        self._calls = 0
        self._forwards = [0] * len(step.virtual_stages)
        self._backward_of = [0] * len(step.virtual_stages)
        self._last = 0

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, every module is watched."""
        handles = []
        for number, stage in enumerate(self._step.virtual_stages):
            handles.append(stage.register_forward_hook(self._end_of(number)))
            names = _global_names(stage)
            for module, name in names.items():
                handles.append(module.register_forward_hook(self._after(number, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def after_backward(self) -> None:
        """A micro-batch went backward: its gradients are in the buffers, of this rank alone."""
        self.look_at_gradients(self._last)

    def look_at_gradients(self, micro_batch: int | None) -> None:
        """Note the first parameter whose gradient is not finite; None: the micro-batch is not known."""
        for shard in self._step.shards:
            gradient = getattr(shard.parameter, "main_grad", None)
            if gradient is not None and not torch.isfinite(gradient).all():
                if micro_batch is not None or not any(fault.place[0] == 1 for fault in self.faults):
                    self._note(1, micro_batch, 1 << 30, f"gradient of {shard.piece.key}")
                return

    def _after(self, stage: int, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            # A layer that is computed again in the backward belongs to the micro-batch that goes backward.
            backward = torch._C._current_graph_task_id() != -1
            micro_batch = self._backward_of[stage] if backward else self._forwards[stage]
            self._calls += 1
            place = self._position(stage)
            for tensor in _tensors(output):
                if not torch.isfinite(tensor).all():
                    self._note(0, micro_batch, place, f"output of {name}")
                if tensor.requires_grad:
                    tensor.register_hook(self._gradient(stage, micro_batch, name))

        return hook

    def _gradient(self, stage: int, micro_batch: int, name: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            self._calls += 1
            if not torch.isfinite(gradient).all():
                self._note(1, micro_batch, -self._position(stage), f"gradient of the output of {name}")

        return hook

    def _end_of(self, stage: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            micro_batch = self._forwards[stage]
            self._forwards[stage] += 1

            def begins(gradient: Tensor) -> None:
                self._backward_of[stage] = self._last = micro_batch

            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(begins)

        return hook

    def _position(self, stage: int) -> int:
        """Of a virtual stage along the model."""
        return stage * self._step.state.pp_size + self._step.state.pp_rank

    def _note(self, backward: int, micro_batch: int | None, position: int, what: str) -> None:
        key = (backward, -1 if micro_batch is None else micro_batch, position)
        if key in self._seen:
            return
        self._seen.add(key)
        samples = () if micro_batch is None else tuple(self._samples(micro_batch))
        self.faults.append(Fault((*key, self._calls), self._step.state.rank, what, samples))


def _global_names(stage: nn.Module) -> dict[nn.Module, str]:
    """Modules within a wrapped virtual stage and their names in the whole model, where layers count from 0."""
    found: dict[nn.Module, str] = {}
    numbers: dict[str, str] = {}
    for name, module in stage.named_modules():
        name = name.removeprefix("module.").replace(".module.", ".")
        parent, _, last = name.rpartition(".")
        if parent.endswith("layers") and last.isdigit() and hasattr(module, "layer_number"):
            numbers[f"{name}."] = f"{parent}.{int(str(module.layer_number)) - 1}."
        if name in ("", "module"):
            continue
        prefix = next((prefix for prefix in numbers if f"{name}.".startswith(prefix)), "")
        found[module] = (numbers[prefix] + f"{name}."[len(prefix) :]).rstrip(".") if prefix else name
    return found


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        # A module that hands its weights out makes no output; what autograd carries as their gradient is not it.
        if output.is_floating_point() and not isinstance(output, nn.Parameter):
            yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)
