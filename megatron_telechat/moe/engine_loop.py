"""The experts on the CPU: a loop that gathers the rows of one expert at a time.

Between its products an expert's rows and activations lie in the cache, where passes over all rows would go to memory.
It is also what keeps bf16 fast: see ``docs/performance.md``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_telechat.moe.dispatch import Arrivals
from megatron_telechat.moe.engine import ExpertWeights, Gradients


def _row_multiple(dtype: torch.dtype) -> int:
    """Rows that a product of the loop is rounded up to.

    oneDNN, which multiplies 16-bit types on the CPU, prepares a kernel for every new shape, and the experts' row
    counts are new at every call: a sixth of the time of the experts (docs/performance.md). MKL's fp32 does not.
    """
    return 16 if dtype in (torch.bfloat16, torch.float16) else 1


class _Turn(NamedTuple):
    """One expert: its rows [start, stop), and [start, end) rounded up.

    Products over rounded-up rows read and spill into the rows of the next expert, which come after it, or into the
    slack at the end of every buffer of :func:`_buffer`.
    """

    expert: int
    start: int
    stop: int
    end: int

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def padded(self) -> int:
        return self.end - self.start


def _turns(plan: Arrivals, multiple: int) -> Iterator[_Turn]:
    stop = 0
    for expert, count in enumerate(plan.counts):
        start, stop = stop, stop + count
        if count:
            yield _Turn(expert, start, stop, start + -(-count // multiple) * multiple)


def _buffer(like: Tensor, rows: int, columns: int) -> Tensor:
    """[rows + slack, columns]; the slack is zero: in a product over rows it must do no harm."""
    slack = _row_multiple(like.dtype) - 1
    buffer = like.new_empty(rows + slack, columns)
    buffer[rows:].zero_()
    return buffer


def _scratch(like: Tensor, plan: Arrivals, columns: int) -> Tensor:
    """Room for the rows of the largest expert; zeros, since what lies past an expert's rows must be finite."""
    multiple = _row_multiple(like.dtype)
    return like.new_zeros(-(-max(plan.counts) // multiple) * multiple, columns)


def _gather(rows: Tensor, index: Tensor, turn: _Turn, out: Tensor, clear: bool = False) -> Tensor:
    """Rows of one expert, rounded up; `clear` zeroes what was added."""
    torch.index_select(rows, 0, index[turn.start : turn.stop], out=out[: turn.count])
    if clear:
        out[turn.count : turn.padded].zero_()
    return out[: turn.padded]


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What lies between two products is computed in this type, and rounded once."""
    return torch.promote_types(dtype, torch.float32)


def _wide_scratch(like: Tensor, plan: Arrivals, columns: int) -> Tensor | None:
    """Room for a 16-bit type's rows of the largest expert in fp32; None for a type that is wide enough."""
    wide = _wide_dtype(like.dtype)
    return None if wide is like.dtype else like.new_empty(max(plan.counts), columns, dtype=wide)


def _widened(values: Tensor, room: Tensor | None) -> Tensor:
    """The values themselves if there is no room, else their copy in it."""
    return values if room is None else room[: values.shape[0]].copy_(values)


def _silu(gate: Tensor, out: Tensor) -> Tensor:
    return torch.ops.aten.silu.out(gate, out=out)


def first_product(rows: Tensor, plan: Arrivals, weights: ExpertWeights) -> Tensor:
    """[N (+ slack), 2 f]: gate and up of every expert row."""
    multiple = _row_multiple(rows.dtype)
    gate_up = _buffer(rows, plan.num_rows, 2 * weights.width)
    x = _scratch(rows, plan, rows.shape[1])
    for turn in _turns(plan, multiple):
        torch.mm(
            _gather(rows, plan.rows, turn, x), weights.flat_fc1[turn.expert].t(), out=gate_up[turn.start : turn.end]
        )
    return gate_up


def forward(
    rows: Tensor, scale: Tensor, plan: Arrivals, weights: ExpertWeights, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Weighted outputs [N, h] of the expert rows, and gate and up if `keep`."""
    multiple, width, hidden = _row_multiple(rows.dtype), weights.width, rows.shape[1]
    output = rows.new_empty(plan.num_rows + multiple - 1, hidden)
    gate_up = _buffer(rows, plan.num_rows, 2 * width) if keep else None
    x, activation = _scratch(rows, plan, hidden), _scratch(rows, plan, width)
    room = _scratch(rows, plan, 2 * width) if gate_up is None else gate_up
    wide_both, wide_out = _wide_scratch(rows, plan, 2 * width), _wide_scratch(rows, plan, hidden)
    bias = weights.bias if weights.adds_bias else None
    for turn in _turns(plan, multiple):
        count = turn.count
        both = room[turn.start : turn.end] if keep else room[: turn.padded]
        torch.mm(_gather(rows, plan.rows, turn, x), weights.flat_fc1[turn.expert].t(), out=both)
        gate, up = _widened(both[:count], wide_both).split(width, 1)
        factor = scale[turn.start : turn.stop].unsqueeze(1)
        if wide_both is None:
            _silu(gate, activation[:count]).mul_(up).mul_(factor)
        else:
            activation[:count].copy_(_silu(gate, gate).mul_(up).mul_(factor))
        out = torch.mm(activation[: turn.padded], weights.fc2[turn.expert].t(), out=output[turn.start : turn.end])[
            :count
        ]
        if bias is not None:
            sums = _widened(out, wide_out).addcmul_(factor, bias[turn.expert].to(scale.dtype))
            if wide_out is not None:
                out.copy_(sums)
    return output[: plan.num_rows], gate_up


def input_gradients(
    grad: Tensor, scale: Tensor, gate_up: Tensor, plan: Arrivals, weights: ExpertWeights
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the expert rows and of their probabilities; `gate_up` becomes its own gradient.

    Returns:
        [N, h], [N] in the type of `scale`, and the weighted activations [N (+ slack), f] for :func:`weight_gradients`.
    """
    multiple, width = _row_multiple(grad.dtype), weights.width
    grad_rows = grad.new_empty(plan.num_rows + multiple - 1, grad.shape[1])
    grad_scale = torch.empty_like(scale)
    hidden = _buffer(grad, plan.num_rows, width)
    g, grad_room = _scratch(grad, plan, grad.shape[1]), _scratch(grad, plan, width)
    silu_room = scale.new_empty(max(plan.counts), width)
    wide_g, wide_grad = _wide_scratch(grad, plan, grad.shape[1]), _wide_scratch(grad, plan, width)
    wide_both, wide_hidden = _wide_scratch(grad, plan, 2 * width), _wide_scratch(grad, plan, width)
    for turn in _turns(plan, multiple):
        count, mine = turn.count, slice(turn.start, turn.stop)
        factor = scale[mine].unsqueeze(1)
        out = _gather(grad, plan.token_rows, turn, g)
        grad_hidden = torch.mm(out, weights.fc2[turn.expert], out=grad_room[: turn.padded])[:count]
        grad_hidden = _widened(grad_hidden, wide_grad)
        gate, up = _widened(gate_up[mine], wide_both).split(width, 1)
        silu = _silu(gate, silu_room[:count])
        activation = torch.mul(silu, up, out=hidden[mine] if wide_hidden is None else wide_hidden[:count])
        torch.linalg.vecdot(grad_hidden, activation, out=grad_scale[mine])
        if weights.bias is not None and weights.adds_bias:
            grad_scale[mine] += _widened(out[:count], wide_g) @ weights.bias[turn.expert].to(scale.dtype)
        activation.mul_(factor)
        grad_hidden.mul_(factor)
        grad_up = silu.mul_(grad_hidden)
        grad_hidden.mul_(up)
        gate_up[mine, width:].copy_(grad_up)
        if wide_hidden is None:
            torch.ops.aten.silu_backward.grad_input(grad_hidden, gate, grad_input=gate)
        else:
            hidden[mine].copy_(activation)
            gate_up[mine, :width].copy_(torch.ops.aten.silu_backward.grad_input(grad_hidden, gate, grad_input=gate))
        torch.mm(gate_up[turn.start : turn.end], weights.flat_fc1[turn.expert], out=grad_rows[turn.start : turn.end])
    return grad_rows[: plan.num_rows], grad_scale, hidden


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
    g, x = _scratch(grad, plan, grad.shape[1]), _scratch(rows, plan, rows.shape[1])
    wide_g = None if gradients.bias is None else _wide_scratch(grad, plan, grad.shape[1])
    for expert, count in enumerate(plan.counts):
        if not count:
            for gradient in gradients:
                if gradient is not None:
                    gradient.add_nothing(expert)
    for turn in _turns(plan, _row_multiple(grad.dtype)):
        out = _gather(grad, plan.token_rows, turn, g, clear=True)
        gradients.fc2.add_product(turn.expert, out.t(), hidden[turn.start : turn.end])
        if gradients.bias is not None:
            gradients.bias.add_product(
                turn.expert, scale[turn.start : turn.stop].unsqueeze(0), _widened(out[: turn.count], wide_g)
            )
        inputs = _gather(rows, plan.rows, turn, x, clear=True)
        gradients.fc1.add_product(turn.expert, grad_gate_up[turn.start : turn.end].t(), inputs)
