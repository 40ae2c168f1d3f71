"""A stand-in device: the experts' products take ``flops / rate`` of sleep; routing, gathers, sums and transfers stay
real.

What sleeps does not compete with the transfers for a core, as an accelerator does not. The result of a product that did
not happen is its input: such an expert gives back p * x, with the gradients that belong to it, so that the way of every
token through the exchange can still be checked.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

# Forward; gradients of inputs; gradients of weights: each two products over the same matrices.
_FORWARD, _INPUT_GRADIENTS, _WEIGHT_GRADIENTS = 1.0, 1.0, 1.0


class _Device:
    def __init__(self, flops_per_row: int, gflops: float):
        self._seconds_per_row = flops_per_row / (gflops * 1e9)

    def work(self, rows: int, passes: float) -> None:
        time.sleep(rows * passes * self._seconds_per_row)


class StandInEngine:
    """An :class:`megatron_telechat.moe.engine.Engine` that sleeps.

    Args:
        flops_per_row: of a forward of one expert row.
        gflops: rate of the device.
    """

    def __init__(self, flops_per_row: int, gflops: float):
        self._device = _Device(flops_per_row, gflops)

    def first_product(self, rows: Tensor, plan: Any, weights: Any) -> Tensor:
        self._device.work(plan.num_rows, _FORWARD * 2 / 3)
        return rows.index_select(0, plan.rows)

    def forward(self, rows: Tensor, scale: Tensor, plan: Any, weights: Any, keep: bool) -> tuple[Tensor, Tensor | None]:
        inputs = rows.index_select(0, plan.rows)
        self._device.work(plan.num_rows, _FORWARD)
        return (inputs * scale.unsqueeze(1)).to(rows.dtype), inputs if keep else None

    def input_gradients(self, grad: Tensor, scale: Tensor, gate_up: Tensor, plan: Any, weights: Any):
        grads = grad.index_select(0, plan.token_rows)
        self._device.work(plan.num_rows, _INPUT_GRADIENTS)
        grad_scale = torch.linalg.vecdot(grads, gate_up).to(scale.dtype)
        return grads.mul_(scale.unsqueeze(1)), grad_scale, gate_up

    def weight_gradients(self, grad, scale, rows, grad_gate_up, hidden, plan: Any, gradients: Any) -> None:
        grad.index_select(0, plan.token_rows)
        rows.index_select(0, plan.rows)
        self._device.work(plan.num_rows, _WEIGHT_GRADIENTS)


class StandInCoreExperts(torch.nn.Module):
    """In the place of megatron-core's experts, for rows that its dispatcher has already sorted by expert."""

    def __init__(self, flops_per_row: int, gflops: float):
        super().__init__()
        self._device = _Device(flops_per_row, gflops)

    def forward(self, rows: Tensor, tokens_per_expert: Tensor, probabilities: Tensor) -> tuple[Tensor, None]:
        return _StandInExpert.apply(rows, probabilities, self._device), None


class _StandInExpert(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, probabilities, device):
        ctx.device = device
        ctx.save_for_backward(rows, probabilities)
        device.work(rows.shape[0], _FORWARD)
        return (rows * probabilities.unsqueeze(-1)).to(rows.dtype)

    @staticmethod
    def backward(ctx, grad):
        rows, probabilities = ctx.saved_tensors
        ctx.device.work(rows.shape[0], _INPUT_GRADIENTS + _WEIGHT_GRADIENTS)
        grad_probabilities = torch.linalg.vecdot(grad, rows).to(probabilities.dtype)
        return (grad * probabilities.unsqueeze(-1)).to(rows.dtype), grad_probabilities, None
