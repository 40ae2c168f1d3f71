"""The experts on an accelerator: every step over the rows of all experts, no device-to-host copy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_telechat.backend.grouped import grouped_product
from megatron_telechat.backend.kernels import kernels
from megatron_telechat.moe.dispatch import Arrivals
from megatron_telechat.moe.engine import ExpertWeights, Gradients


def _row_scales(scale: Tensor, offsets: Tensor) -> Tensor:
    """[N, experts]: each row's probability in the column of its expert, so that the bias is one product."""
    scales = scale.new_zeros(scale.numel(), offsets.numel())
    return scales.scatter_(1, _expert_of_row(scale, offsets).unsqueeze(1), scale.unsqueeze(1))


def _expert_of_row(scale: Tensor, offsets: Tensor) -> Tensor:
    positions = torch.arange(scale.numel(), device=scale.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, positions, right=True)


def first_product(rows: Tensor, plan: Arrivals, weights: ExpertWeights) -> Tensor:
    """[N, 2 f]: gate and up of every expert row."""
    x = rows.index_select(0, plan.rows)
    return grouped_product(x, weights.flat_fc1.transpose(1, 2), plan.offsets, plan.counts)


def forward(
    rows: Tensor, scale: Tensor, plan: Arrivals, weights: ExpertWeights, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Weighted outputs [N, h] of the expert rows, and gate and up if `keep`."""
    gate_up = first_product(rows, plan, weights)
    output = grouped_product(_activated(gate_up, scale), weights.fc2.transpose(1, 2), plan.offsets, plan.counts)
    if weights.bias is not None and weights.adds_bias:
        output = output.addmm_(_row_scales(scale.to(output.dtype), plan.offsets), weights.bias)
    return output, gate_up if keep else None


def input_gradients(
    grad: Tensor, scale: Tensor, gate_up: Tensor, plan: Arrivals, weights: ExpertWeights
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the expert rows and of their probabilities; `gate_up` becomes its own gradient.

    Returns:
        [N, h], [N] in the type of `scale`, and the weighted activations [N, f] for :func:`weight_gradients`.
    """
    g = grad.index_select(0, plan.token_rows)
    grad_hidden = grouped_product(g, weights.fc2, plan.offsets, plan.counts)
    hidden, grad_scale = _activation_gradients(grad_hidden, scale, gate_up)
    if weights.bias is not None and weights.adds_bias:
        dots = (g @ weights.bias.t()).gather(1, _expert_of_row(scale, plan.offsets).unsqueeze(1))
        grad_scale += dots.squeeze(1).to(scale.dtype)
    return grouped_product(gate_up, weights.flat_fc1, plan.offsets, plan.counts), grad_scale, hidden


def _activated(gate_up: Tensor, scale: Tensor) -> Tensor:
    """[N, f]: SwiGLU of every row, times its probability."""
    fused = kernels("swiglu", gate_up)
    if fused is not None:
        return fused.swiglu(gate_up, scale)
    gate, up = gate_up.chunk(2, 1)
    return F.silu(gate).mul_(up).mul_(scale.unsqueeze(1))


def _activation_gradients(grad_hidden: Tensor, scale: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`_activated` gave, once more, and the gradient of the probabilities; `gate_up` becomes its own
    gradient, `grad_hidden` is used up."""
    fused = kernels("swiglu", gate_up)
    if fused is not None:
        _, hidden, grad_scale = fused.swiglu_gradients(grad_hidden, gate_up, scale, out=gate_up)
        return hidden, grad_scale
    gate, up = gate_up.chunk(2, 1)
    factor = scale.unsqueeze(1)
    silu = F.silu(gate)
    hidden = silu * up
    grad_scale = (grad_hidden * hidden).sum(1, dtype=scale.dtype)
    hidden.mul_(factor)
    grad_hidden.mul_(factor)
    grad_up = silu.mul_(grad_hidden)
    grad_hidden.mul_(up)
    up.copy_(grad_up)
    gate.copy_(torch.ops.aten.silu_backward(grad_hidden, gate))
    return hidden, grad_scale


def weight_gradients(
    grad: Tensor,
    scale: Tensor,
    rows: Tensor,
    grad_gate_up: Tensor,
    hidden: Tensor,
    plan: Arrivals,
    gradients: Gradients,
) -> None:
    """Add one chunk's share of the weights' gradients."""
    g = grad.index_select(0, plan.token_rows)
    gradients.fc2.add_grouped_product(g, hidden, plan)
    if gradients.bias is not None:
        gradients.bias.add(_row_scales(scale.to(g.dtype), plan.offsets).t() @ g)
    x = rows.index_select(0, plan.rows)
    gradients.fc1.add_grouped_product(grad_gate_up, x, plan)
