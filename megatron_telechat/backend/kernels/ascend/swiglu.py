"""SwiGLU of rows, each with a factor of its own or none, and its gradients: ``npu_swiglu`` and its backward."""

from __future__ import annotations

# torch_npu is installed on Ascend machines only.
# pyright: reportMissingImports=false
import torch
import torch_npu
from torch import Tensor


def swiglu(gate_up: Tensor, factors: Tensor | None = None) -> Tensor:
    """``silu(gate) * up * factor`` of every row.

    Args:
        gate_up: [N, 2 f] contiguous: gate, then up.
        factors: [N], or None for ones.

    Returns:
        [N, f] in the type of `gate_up`.
    """
    if not gate_up.numel():
        return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    hidden = torch_npu.npu_swiglu(gate_up, dim=-1)
    return hidden if factors is None else hidden.mul_(factors.unsqueeze(1))


def swiglu_gradients(
    grad: Tensor, gate_up: Tensor, factors: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of :func:`swiglu`.

    Args:
        grad: [N, f] contiguous, of its result.
        out: [N, 2 f] for the gradient of `gate_up`, which it may be itself; None: a new one.

    Returns:
        The gradient of `gate_up`; with `factors` also what :func:`swiglu` gave, and the [N] gradient of the factors.
    """
    hidden = grad_factors = None
    if factors is not None:
        hidden = swiglu(gate_up)
        grad_factors = (grad * hidden).sum(1, dtype=factors.dtype)
        hidden.mul_(factors.unsqueeze(1))
        grad = (grad * factors.unsqueeze(1)).to(grad.dtype)
    if not grad.numel():
        return torch.empty_like(gate_up) if out is None else out, hidden, grad_factors
    grad_gate_up = torch_npu.npu_swiglu_backward(grad, gate_up, dim=-1)
    return grad_gate_up if out is None else out.copy_(grad_gate_up), hidden, grad_factors


def check(device: torch.device) -> None:
    """Against fp32 on the host, with factors and without. Raises ArithmeticError."""
    from megatron_telechat.backend.kernels import require_close

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        numbers = torch.arange(3 * 3 * 72, dtype=torch.float32).mul_(0.7).sin_().view(3, -1)
        gate_up, grad = ((part * 2).to(dtype).contiguous() for part in (numbers[:, :144], numbers[:, 144:]))
        gate, up = gate_up.float().chunk(2, 1)
        silu = torch.nn.functional.silu(gate)
        for factors in (None, numbers[:, 7].contiguous()):
            scale = torch.ones(3, 1) if factors is None else factors.unsqueeze(1)
            there = None if factors is None else factors.to(device)
            require_close(swiglu(gate_up.to(device), there).cpu(), silu * up * scale, "SwiGLU")
            grad_gate_up, again, grad_factors = swiglu_gradients(grad.to(device), gate_up.to(device), there)
            scaled = grad.float() * scale
            expected = torch.cat((torch.ops.aten.silu_backward(scaled * up, gate), scaled * silu), 1)
            require_close(grad_gate_up.cpu(), expected, "SwiGLU, back")
            if again is not None and grad_factors is not None:
                require_close(again.cpu(), silu * up * scale, "SwiGLU, again")
                expected = (grad.float() * silu * up).sum(1)
                require_close(grad_factors.to(dtype).cpu(), expected, "SwiGLU, factors")
