"""The optimizers of the dense and of the expert parameters, acting as one.

megatron-core makes two and chains them. What belongs to the whole model is kept here once: the loss scale of fp16,
which it keeps and moves for each of them alone, and the tensor group over which a parameter is cut or held several
times. Imported after the backend is installed, as everything that imports megatron-core.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig
from megatron.core.optimizer.grad_scaler import DynamicGradScaler


class LossScale(DynamicGradScaler):
    """The one dynamic loss scale of a model (fp16).

    Scale, growth and hysteresis follow megatron-core's rules. Every optimizer of the chain divides its gradients by
    this scale; none of them moves it, since each has seen its own gradients only. :meth:`settle` does, with the agreed
    answer.
    """

    def update(self, found_inf: bool) -> None:
        """Called by each optimizer of the chain, with what it found alone: too early to move anything."""

    def settle(self, found_inf: bool) -> None:
        """Move scale, growth and hysteresis after one step.

        Args:
            found_inf: some gradient, on some rank, dense or expert, was not finite.
        """
        super().update(found_inf)


class ModelOptimizer(ChainedOptimizer):
    """megatron-core's chain with one loss scale, moved by one answer of all ranks.

    Args:
        parts: the optimizers of the dense and, if there are any, of the expert parameters.
        expert_tensor_group: ranks that hold slices, or copies, of the same experts.

    Attributes:
        parts: ``chained_optimizers``, whose classes have more than the base class that megatron-core declares for them.
    """

    def __init__(self, parts: Sequence[Any], config: OptimizerConfig, expert_tensor_group: dist.ProcessGroup):
        self.parts = list(parts)
        super().__init__(self.parts)
        self.grad_scaler: LossScale | None = _loss_scale(config) if config.fp16 else None
        for part in self.parts:
            if self.grad_scaler is not None:
                part.grad_scaler = self.grad_scaler
            if any(group["is_expert_parallel"] for group in part.param_groups):
                # Who counts a replicated parameter in gradient norm and number of zeros. megatron-core asks the
                # attention's tensor group for all parameters, also where the experts are cut over another one.
                part.tp_group = expert_tensor_group

    @property
    def loss_scale(self) -> float | None:
        """What the loss is multiplied by; None outside of fp16."""
        return None if self.grad_scaler is None else float(self.grad_scaler.scale)

    def count_zeros(self) -> float:
        """Zeros in the gradients of the whole model; collective. megatron-core's chain forgets the tensor groups of its
        parts."""
        return sum(part.count_zeros() for part in self.chained_optimizers)

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Unscale the gradients of all parts; with fp16 also agree on an overflow, then move the loss scale.

        A collective over all ranks with fp16. An expert that overflowed on one rank holds back the step of every rank
        and of the dense parameters too.

        Returns:
            Whether a gradient of some rank is not finite (fp16 only): the step must not be taken.
        """
        found_inf = super().prepare_grads()
        if self.grad_scaler is None:
            return found_inf
        flag = torch.tensor([float(found_inf)], device=self.grad_scaler.scale.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        agreed = bool(flag.item())
        self.grad_scaler.settle(agreed)
        return agreed

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Take the step of every part; where parameters are not gathered in the next forward, gather them once.

        Each of megatron-core's distributed optimizers gathers the parameters of all virtual stages after its own step:
        with experts the whole model twice, of which the first time sends experts that have not moved yet.
        """
        *others, last = self.parts
        for part in others:
            with _gathers_nothing(part):
                part.step_with_ready_grads()
        return last.step_with_ready_grads()


@contextmanager
def _gathers_nothing(part: Any) -> Iterator[None]:
    """Inside, a distributed optimizer knows of no virtual stage to gather; it asks for them in no other place of a
    step."""
    virtual_stages = getattr(part, "model_chunks", None)
    if virtual_stages is None:
        yield
        return
    part.model_chunks = []
    try:
        yield
    finally:
        part.model_chunks = virtual_stages


def _loss_scale(config: OptimizerConfig) -> LossScale:
    return LossScale(
        initial_scale=config.initial_loss_scale,
        min_scale=config.min_loss_scale,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=int(config.loss_scale_window),
        hysteresis=config.hysteresis,
    )
