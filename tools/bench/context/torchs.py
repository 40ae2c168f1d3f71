"""torch's own context parallelism (torch.distributed.tensor.experimental), as far as it runs on the CPU.

``context_parallel()`` itself does not: it replaces the CUDA operators of scaled_dot_product_attention, and DTensor has
no rule for the one of the CPU. What those replacements call does: the ring with its ways of rotation, balanced by
head-tail chunks (the same as zigzag), merging in fp32. It is called here as they call it, with the operator of the CPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from context.problem import Inputs, Result
from context.stand_in import StandIn

ALL_GATHER, ALL_TO_ALL = "allgather", "alltoall"


class TorchRing:
    """torch's ring.

    Args:
        rotation: `ALL_GATHER` (its default) or `ALL_TO_ALL`.
        stand_in: takes the place of the operator, or None.
        group: the ranks.
    """

    def __init__(self, rotation: str, stand_in: StandIn | None, group: dist.ProcessGroup):
        self.rotation, self.group = rotation, group
        self._forward, self._backward = _ring_functions()
        aten = torch.ops.aten
        self._op: Callable[..., Any] = aten._scaled_dot_product_flash_attention_for_cpu
        self._op_backward: Callable[..., Any] = _backward_of_cpu
        if stand_in is not None:
            self._op, self._op_backward = _as_operators(stand_in)
        self.kept: tuple[Tensor, ...] = ()

    def forward(self, inputs: Inputs) -> Tensor:
        """Attention of this rank's tokens, [t, heads, d]; what the backward needs is kept."""
        self._set_rotation()
        rows = [_to_operator(each) for each in inputs[:3]]
        out, lse = self._forward(self.group, 2, self._op, *rows, is_causal=True)[:2]
        self.kept = (*rows, out, lse)
        return _from_operator(out)

    def backward(self, inputs: Inputs) -> Result:
        """Gradients for that of the output; ends a step."""
        query, key, value, out, lse = self.kept
        self.kept = ()
        self._set_rotation()
        grads = self._backward(
            self.group,
            2,
            self._op_backward,
            grad_out=_to_operator(inputs.grad),
            grad_out_name="grad_out",
            query=query,
            key=key,
            value=value,
            out=out,
            logsumexp=lse,
            is_causal=True,
        )
        return Result(*(_from_operator(each) for each in (out, *grads[:3])))

    def _set_rotation(self) -> None:
        from torch.distributed.tensor.experimental._attention import set_rotate_method

        set_rotate_method(self.rotation)


def _ring_functions() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward; private to torch, so another release may have others.

    Raises:
        TypeError: they are not those of torch 2.13.
    """
    from torch.distributed.tensor.experimental._context_parallel import _attention

    forward, backward = _attention._templated_ring_attention, _attention._templated_ring_attention_backward
    for function in (forward, backward):
        if list(inspect.signature(function).parameters)[:3] != ["group", "seq_dim", "op"]:
            raise TypeError(f"{function.__name__} takes other arguments")
    return forward, backward


def _backward_of_cpu(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor,
                     is_causal: bool) -> tuple[Tensor, ...]:  # fmt: skip
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, query, key, value, out, logsumexp, 0.0, is_causal
    )


def _as_operators(stand_in: StandIn) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
        query, key, value = (_from_operator(each) for each in (query, key, value))
        out, lse = stand_in.attention(query, key, value, is_causal)
        return _to_operator(out), lse.unsqueeze(0)

    def backward(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor,
                 is_causal: bool) -> tuple[Tensor, ...]:  # fmt: skip
        grad, query, out, key, value = (_from_operator(each) for each in (grad_out, query, out, key, value))
        found = stand_in.gradients(grad, query, out, logsumexp[0], key, value, is_causal)
        return tuple(_to_operator(each) for each in found)

    return forward, backward


def _to_operator(rows: Tensor) -> Tensor:
    """[n, heads, d] as [1, heads, n, d]."""
    return rows.transpose(0, 1).unsqueeze(0)


def _from_operator(rows: Tensor) -> Tensor:
    return rows[0].transpose(0, 1)
