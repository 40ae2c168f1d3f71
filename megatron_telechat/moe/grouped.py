"""SwiGLU experts over rows sorted by expert: one autograd function, two engines.

Both compute, for a row x of expert e with routing probability p,

    y = p * (W2_e (silu(W1_e,gate x) * (W1_e,up x)) + b_e)

and keep only x, p and the output of the first product for the backward; the probability
multiplies the activation before the second product, with which it commutes.

* CPU: a loop over the experts that writes into shared buffers. Between its products an
  expert's activations lie in the cache, where passes over all rows would go to memory. It is
  also what keeps bf16 fast: see ``docs/performance.md``.
* elsewhere: ``torch.nn.functional.grouped_mm``, no device-to-host copy.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def _accumulate(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _row_multiple(dtype: torch.dtype) -> int:
    """Rows that a product of the loop is rounded up to.

    oneDNN, which multiplies 16-bit types on the CPU, prepares a kernel for every new shape, and the experts' row
    counts are new at every call: a sixth of the time of the experts (docs/performance.md). MKL's fp32 does not.
    """
    return 16 if dtype in (torch.bfloat16, torch.float16) else 1


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _window(rows: Tensor, start: int, count: int) -> Tensor:
    """Rows from `start` on. A rounded-up window reads rows of the next expert, which the caller must make harmless,
    or zeros past the end."""
    if start + count <= rows.shape[0]:
        return rows[start : start + count]
    window = rows.new_zeros(count, rows.shape[1])
    window[: rows.shape[0] - start] = rows[start:]
    return window


def _silu(gate: Tensor, out: Tensor) -> Tensor:
    return torch.ops.aten.silu.out(gate, out=out)


def _forward_loop(rows, weights, fc1, fc2, bias, counts):
    width, multiple = fc2.shape[2], _row_multiple(rows.dtype)
    # A rounded-up product spills into the rows of the next expert, which come after it, or into the slack at the end.
    gate_up = rows.new_empty(rows.shape[0] + multiple - 1, 2 * width)
    output = rows.new_empty(rows.shape[0] + multiple - 1, rows.shape[1])
    scratch = rows.new_zeros(_round_up(max(counts), multiple), width)
    stop = 0
    for expert, count in enumerate(counts):
        start, stop = stop, stop + count
        if not count:
            continue
        padded = _round_up(count, multiple)
        spill = slice(start, start + padded)
        both = torch.mm(_window(rows, start, padded), fc1[expert].t(), out=gate_up[spill])[:count]
        scale = weights[start:stop].unsqueeze(1)
        _silu(both[:, :width], scratch[:count]).mul_(both[:, width:]).mul_(scale)
        out = torch.mm(scratch[:padded], fc2[expert].t(), out=output[spill])
        if bias is not None:
            out[:count].addcmul_(scale, bias[expert])
    return output[: rows.shape[0]], gate_up[: rows.shape[0]]


def _backward_loop(grad, rows, weights, fc1, fc2, bias, gate_up, counts):
    width, multiple = fc2.shape[2], _row_multiple(rows.dtype)
    grad_rows = rows.new_empty(rows.shape[0] + multiple - 1, rows.shape[1])
    grad_weights = torch.empty_like(weights, dtype=_accumulate(weights))
    grad_fc1, grad_fc2 = torch.empty_like(fc1), torch.empty_like(fc2)
    grad_bias = None if bias is None else torch.zeros_like(bias)
    largest = _round_up(max(counts), multiple)
    silu_buffer, hidden_buffer, grad_buffer, both_buffer = (
        rows.new_empty(largest, columns) for columns in (width, width, width, 2 * width)
    )
    stop = 0
    for expert, count in enumerate(counts):
        start, stop = stop, stop + count
        if not count:
            grad_fc1[expert].zero_()
            grad_fc2[expert].zero_()
            continue
        padded = _round_up(count, multiple)
        gate, up = gate_up[start:stop, :width], gate_up[start:stop, width:]
        scale = weights[start:stop].unsqueeze(1)
        out = _window(grad, start, padded)
        grad_hidden = torch.mm(out, fc2[expert], out=grad_buffer[:padded])[:count]
        silu = _silu(gate, silu_buffer[:count])
        hidden = torch.mul(silu, up, out=hidden_buffer[:count])
        grad_weights[start:stop] = torch.linalg.vecdot(grad_hidden, hidden)
        hidden.mul_(scale)
        # Rows of the next expert in `out` and in the window of `rows` meet these zeros.
        hidden_buffer[count:padded].zero_()
        both_buffer[count:padded].zero_()
        torch.mm(out.t(), hidden_buffer[:padded], out=grad_fc2[expert])
        if bias is not None:
            torch.mm(scale.t(), grad[start:stop], out=grad_bias[expert : expert + 1])
        grad_hidden.mul_(scale)
        both = both_buffer[:count]
        torch.mul(grad_hidden, silu, out=both[:, width:])
        torch.ops.aten.silu_backward.grad_input(grad_hidden.mul_(up), gate, grad_input=both[:, :width])
        torch.mm(both_buffer[:padded].t(), _window(rows, start, padded), out=grad_fc1[expert])
        torch.mm(both_buffer[:padded], fc1[expert], out=grad_rows[start : start + padded])
    return grad_rows[: rows.shape[0]], grad_weights, grad_fc1, grad_fc2, grad_bias


def _row_scales(weights: Tensor, offsets: Tensor) -> Tensor:
    """[rows, experts]: each row's probability in the column of its expert, so that the bias is one product."""
    positions = torch.arange(weights.numel(), device=weights.device, dtype=offsets.dtype)
    expert = torch.searchsorted(offsets, positions, right=True)
    scales = weights.new_zeros(weights.numel(), offsets.numel())
    return scales.scatter_(1, expert.unsqueeze(1), weights.unsqueeze(1))


def _forward_grouped(rows, weights, fc1, fc2, bias, offsets):
    width = fc2.shape[2]
    gate_up = F.grouped_mm(rows, fc1.transpose(1, 2), offs=offsets)
    hidden = F.silu(gate_up[:, :width]).mul_(gate_up[:, width:]).mul_(weights.unsqueeze(1))
    output = F.grouped_mm(hidden, fc2.transpose(1, 2), offs=offsets)
    if bias is not None:
        output = output.addmm_(_row_scales(weights, offsets), bias)
    return output, gate_up


def _backward_grouped(grad, rows, weights, fc1, fc2, bias, gate_up, offsets):
    width = fc2.shape[2]
    gate, up, scale = gate_up[:, :width], gate_up[:, width:], weights.unsqueeze(1)
    silu = F.silu(gate)
    hidden = silu * up
    grad_hidden = F.grouped_mm(grad, fc2, offs=offsets)
    grad_weights = (grad_hidden * hidden).sum(1, dtype=_accumulate(weights))
    grad_fc2 = F.grouped_mm(grad.t(), hidden.mul_(scale), offs=offsets)
    grad_bias = None if bias is None else _row_scales(weights, offsets).t() @ grad
    grad_hidden.mul_(scale)
    both = torch.empty_like(gate_up)
    torch.mul(grad_hidden, silu, out=both[:, width:])
    both[:, :width] = torch.ops.aten.silu_backward(grad_hidden.mul_(up), gate)
    grad_fc1 = F.grouped_mm(both.t(), rows, offs=offsets)
    return F.grouped_mm(both, fc1, offs=offsets), grad_weights, grad_fc1, grad_fc2, grad_bias


class _GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, probabilities, fc1, fc2, bias, tokens_per_expert, adds_bias, loop):
        rows = rows.contiguous()
        weights = probabilities.to(rows.dtype)
        flat_fc1 = fc1.flatten(1, 2)
        added = bias if adds_bias else None
        if not rows.shape[0]:
            groups, output = (), torch.empty_like(rows)
            gate_up = rows.new_empty(0, 2 * fc2.shape[2])
            ctx.save_for_backward(rows, weights, fc1, fc2, bias, gate_up)
        elif loop:
            groups = tuple(tokens_per_expert.tolist())
            output, gate_up = _forward_loop(rows, weights, flat_fc1, fc2, added, groups)
            ctx.groups = groups
            ctx.save_for_backward(rows, weights, fc1, fc2, bias, gate_up)
        else:
            groups = tokens_per_expert.cumsum(0).to(torch.int32)
            output, gate_up = _forward_grouped(rows, weights, flat_fc1, fc2, added, groups)
            ctx.save_for_backward(rows, weights, fc1, fc2, bias, gate_up, groups)
        ctx.adds_bias, ctx.loop, ctx.probabilities_dtype = adds_bias, loop, probabilities.dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, weights, fc1, fc2, bias, gate_up, *rest = ctx.saved_tensors
        if not rows.shape[0]:
            grads = [None if t is None else torch.zeros_like(t) for t in (rows, weights, fc1, fc2, bias)]
            return grads[0], grads[1].to(ctx.probabilities_dtype), *grads[2:], None, None, None
        # A broadcast gradient (stride 0, as from a sum) is refused by the grouped products.
        grad = grad.contiguous()
        engine, groups = (_backward_loop, ctx.groups) if ctx.loop else (_backward_grouped, rest[0])
        grads = engine(grad, rows, weights, fc1.flatten(1, 2), fc2, bias, gate_up, groups)
        grad_rows, grad_weights, grad_fc1, grad_fc2, grad_bias = grads
        if bias is not None and ctx.adds_bias:
            grad_weights += _bias_dot(grad, bias, groups, ctx.loop)
        grad_weights = grad_weights.to(ctx.probabilities_dtype)
        return grad_rows, grad_weights, grad_fc1.view_as(fc1), grad_fc2, grad_bias, None, None, None


def _bias_dot(grad: Tensor, bias: Tensor, groups, loop: bool) -> Tensor:
    """[rows] fp32: the gradient of each row's probability through the bias of its expert."""
    dots = grad @ bias.t()
    if loop:
        experts = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(groups))
    else:
        positions = torch.arange(dots.shape[0], device=dots.device, dtype=groups.dtype)
        experts = torch.searchsorted(groups, positions, right=True)
    return dots.gather(1, experts.unsqueeze(1)).squeeze(1).to(_accumulate(grad))


def grouped_swiglu(
    rows: Tensor,
    probabilities: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    bias: Optional[Tensor],
    tokens_per_expert: Tensor,
    adds_bias: bool = True,
    loop: Optional[bool] = None,
) -> Tensor:
    """Every expert on its own rows, weighted by the routing probability.

    Args:
        rows: [rows, h], sorted by expert.
        probabilities: [rows], fp32.
        fc1: [experts, 2, f, h], gate and up projection.
        fc2: [experts, h, f], down projection.
        bias: [experts, h] or None, of the down projection; multiplied by the probability too.
        tokens_per_expert: [experts] int64, on the device of the rows; sums to the number of rows.
        adds_bias: whether this rank adds the bias. Where several ranks hold slices of f and their
            outputs are summed, one of them does. The bias gets its whole gradient on all of them.
        loop: engine; None takes the loop on the CPU and ``grouped_mm`` elsewhere.

    Returns:
        [rows, h].
    """
    if loop is None:
        loop = rows.device.type == "cpu"
    return _GroupedSwiGLU.apply(rows, probabilities, fc1, fc2, bias, tokens_per_expert, adds_bias, loop)
