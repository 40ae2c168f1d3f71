"""The optimizer's state as views on flat ranges of the parameters, for saving and for loading.

megatron-core keeps the fp32 master weights and Adam's moments in different places for
each of its optimizers. :func:`optimizer_slices` reduces all of them to one form, so that
switching the distributed optimizer on or off, or changing any parallel size, is only
another set of flat ranges over the same global tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from megatron_telechat.device_kinds import HOST
from megatron_telechat.model.shards import LocalParameter
from megatron_telechat.tensors.boxes import Box, flat_range_boxes

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
_FP32: Mapping[str, torch.dtype] = MappingProxyType(dict.fromkeys(MOMENTS, torch.float32))


class OptimizerSlice(NamedTuple):
    """State of elements [start, stop) of a local parameter.

    ``tensors`` holds 1-D views under "master" (absent where the parameter itself is fp32 and
    so its own master), "exp_avg" and "exp_avg_sq" (absent before the first step unless
    created), on the device or on the host. ``sharded``: the ranks of the parameter's data-parallel
    group own different ranges. ``moment_types``: of the moments, absent or not.
    """

    shard: LocalParameter
    start: int
    stop: int
    tensors: dict[str, torch.Tensor]
    sharded: bool
    moment_types: Mapping[str, torch.dtype] = _FP32


@dataclass(frozen=True)
class Leaf:
    """One parameter as its optimizer holds it: the tensor Adam steps on and the range that is."""

    parameter: torch.nn.Parameter
    stepped: torch.Tensor
    start: int
    sharded: bool

    @property
    def own_master(self) -> bool:
        """Whether the parameter is fp32, and what is stepped on."""
        return self.stepped is self.parameter or self.parameter.dtype == torch.float32


@runtime_checkable
class Resting(Protocol):
    """An optimizer whose state may rest elsewhere than in the tensors that it steps on (`training.resting`).

    Attributes:
        inner: the optimizer that computes; it has the state of the other tensors.
        steps: steps that are counted for the state at rest.
        moment_types: in which the moments rest.
    """

    inner: torch.optim.Optimizer
    steps: int
    moment_types: Mapping[str, torch.dtype]

    def at_rest(self, stepped: torch.Tensor) -> Mapping[str, torch.Tensor] | None:
        """1-D views on the state of this tensor, by the names of an `OptimizerSlice`; None where the tensor itself and
        ``inner`` have it."""
        ...

    def settle(self) -> None:
        """Wait until the state is where it rests."""
        ...


def leaf_optimizers(optimizer: Any) -> list[Any]:
    """The optimizers in a ChainedOptimizer (dense and expert parameters) that hold anything."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if part is not None and not part.is_stub_optimizer]


def optimizer_slices(
    optimizer: Any, shards: Sequence[LocalParameter], create_state: bool = False
) -> Iterator[OptimizerSlice]:
    """Every flat range whose state this rank's megatron-core optimizer owns.

    Args:
        optimizer: DistributedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer or a chain of them.
        shards: the LocalParameter of this rank.
        create_state: make Adam's state (zeros) where there has been no step yet.
    """
    by_parameter = {id(item.parameter): item for item in shards}
    for part in leaf_optimizers(optimizer):
        inner, resting = _optimizer_of(part)
        if resting is not None:
            resting.settle()
        groups = {id(p): group for group in inner.param_groups for p in group["params"]}
        for leaf in leaves_of(part):
            at_rest = None if resting is None else resting.at_rest(leaf.stepped)
            if resting is not None and at_rest is not None:
                shown = MOMENTS if create_state or resting.steps else ()
                tensors = {name: values for name, values in at_rest.items() if name in (*shown, MASTER)}
            else:
                state = inner.state[leaf.stepped] if leaf.stepped in inner.state else {}
                if create_state and "exp_avg" not in state:
                    state = _create_state(inner, groups[id(leaf.stepped)], leaf.stepped)
                tensors = {name: state[name].view(-1) for name in MOMENTS if name in state}
            if not leaf.own_master and MASTER not in tensors:
                tensors[MASTER] = leaf.stepped.detach().view(-1)
            types = _FP32 if at_rest is None or resting is None else resting.moment_types
            stop = leaf.start + leaf.stepped.numel()
            yield OptimizerSlice(by_parameter[id(leaf.parameter)], leaf.start, stop, tensors, leaf.sharded, types)


def weights_stepped_on(item: OptimizerSlice) -> torch.Tensor:
    """1-D: the fp32 weights of a range, where they rest between steps; the parameter itself where it is fp32."""
    return item.tensors[MASTER] if MASTER in item.tensors else weights_of(item)


def weights_of(item: OptimizerSlice) -> torch.Tensor:
    """1-D: the elements of the parameter that a range is of."""
    return item.shard.parameter.detach().view(-1)[item.start : item.stop]


def _optimizer_of(part: Any) -> tuple[torch.optim.Optimizer, Resting | None]:
    """What steps on the tensors of a part, and what keeps their state where that is something else."""
    if isinstance(part.optimizer, Resting):
        return part.optimizer.inner, part.optimizer
    return part.optimizer, None


def leaves_of(part: Any) -> Iterator[Leaf]:
    """The parameters of one of megatron-core's optimizers, in a fixed order."""
    if hasattr(part, "shard_fp32_from_float16_groups"):  # DistributedOptimizer
        pairs = (
            (part.model_float16_groups, part.shard_fp32_from_float16_groups),
            (part.model_fp32_groups, part.shard_fp32_groups),
        )
        for models, shards in pairs:
            for parameter, stepped in _zip_groups(models, shards):
                yield Leaf(parameter, stepped, part._get_model_param_range_map(parameter)["param"].start, True)
    elif hasattr(part, "fp32_from_float16_groups"):  # Float16OptimizerWithFloat16Params
        for parameter, stepped in _zip_groups(part.float16_groups, part.fp32_from_float16_groups):
            yield Leaf(parameter, stepped, 0, False)
        for group in part.fp32_from_fp32_groups:
            yield from (Leaf(parameter, parameter, 0, False) for parameter in group)
    else:  # FP32Optimizer
        for group in part.optimizer.param_groups:
            yield from (Leaf(parameter, parameter, 0, False) for parameter in group["params"])


def _zip_groups(first: Sequence[Sequence[Any]], second: Sequence[Sequence[Any]]) -> Iterator[tuple[Any, Any]]:
    for some, others in zip(first, second, strict=True):
        yield from zip(some, others, strict=True)


def _create_state(inner: torch.optim.Optimizer, group: Mapping[str, Any], stepped: torch.Tensor) -> dict:
    state = inner.state[stepped]
    for name in MOMENTS:
        state[name] = torch.zeros_like(stepped, memory_format=torch.preserve_format)
    if steps_per_parameter(inner):
        # One tensor for each parameter: torch increments it in place, and a shared one would count
        # every parameter's step.
        on_device = group.get("fused") or group.get("capturable")
        state["step"] = torch.zeros((), dtype=torch.float32, device=stepped.device if on_device else HOST)
    return state


def steps_per_parameter(inner: torch.optim.Optimizer) -> bool:
    """torch's Adam counts steps in each parameter's state; TE's and apex's FusedAdam in the group."""
    return isinstance(inner, (torch.optim.Adam, torch.optim.AdamW))


def adam_steps(optimizer: Any) -> set[int]:
    """The step counts in the optimizer's state: one number, none before the first step."""
    counts: set[int] = set()
    for part in leaf_optimizers(optimizer):
        inner, resting = _optimizer_of(part)
        if resting is not None and resting.steps:
            counts.add(resting.steps)
        if steps_per_parameter(inner):
            counts.update(int(state["step"]) for state in inner.state.values() if "step" in state)
        else:
            counts.update(int(group["step"]) for group in inner.param_groups if group["params"] and "step" in group)
    return counts


def set_adam_step(optimizer: Any, step: int) -> None:
    """Set the number of steps that Adam has counted (its bias correction reads it) for all parameters.

    torch's Adam needs its state for that: see ``create_state`` of `optimizer_slices`.
    """
    for part in leaf_optimizers(optimizer):
        inner, resting = _optimizer_of(part)
        if resting is not None:
            resting.steps = step
        if steps_per_parameter(inner):
            for state in inner.state.values():
                state["step"].fill_(step)
        else:
            for group in inner.param_groups:
                group["step"] = step


class FlatBox(NamedTuple):
    """Elements [start, stop) of a local parameter, and the box of the global tensor that they are."""

    start: int
    stop: int
    box: Box


def flat_boxes(shard: LocalParameter, start: int = 0, stop: int | None = None) -> Iterator[FlatBox]:
    """Cut a flat range of a local parameter into boxes of its global tensor."""
    piece = shard.piece.box
    for flat, box in flat_range_boxes(piece.shape, start, piece.numel if stop is None else stop):
        yield FlatBox(flat, flat + box.numel, box.shifted(piece.offset))
