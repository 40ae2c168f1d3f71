"""SwiGLU of rows, each with a factor of its own or none, and its gradients, in one pass each."""

from __future__ import annotations

# Triton is optional and has no types; a compiled function is launched by `[grid]`.
# pyright: reportMissingImports=false, reportIndexIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _forward(gate_up, factors, out, width, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, inside, 0.0).to(tl.float32)
    hidden = gate * tl.sigmoid(gate) * tl.load(gate_up + row * 2 * width + width + columns, inside, 0.0).to(tl.float32)
    if SCALED:
        hidden *= tl.load(factors + row).to(tl.float32)
    tl.store(out + row * width + columns, hidden.to(out.dtype.element_ty), inside)


@triton.jit
def _backward(
    grad, gate_up, factors, grad_gate_up, hidden, grad_factors, width,
    SCALED: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    factor = 1.0
    if SCALED:
        factor = tl.load(factors + row).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for block in tl.static_range(BLOCKS):
        columns = block * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        at = row * 2 * width + columns
        gate = tl.load(gate_up + at, inside, 0.0).to(tl.float32)
        up = tl.load(gate_up + at + width, inside, 0.0).to(tl.float32)
        g = tl.load(grad + row * width + columns, inside, 0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        if SCALED:
            total += g * silu * up
            tl.store(hidden + row * width + columns, (silu * up * factor).to(hidden.dtype.element_ty), inside)
            g *= factor
        grad_gate = g * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        tl.store(grad_gate_up + at, grad_gate.to(grad_gate_up.dtype.element_ty), inside)
        tl.store(grad_gate_up + at + width, (g * silu).to(grad_gate_up.dtype.element_ty), inside)
    if SCALED:
        tl.store(grad_factors + row, tl.sum(total, 0).to(grad_factors.dtype.element_ty))


def swiglu(gate_up: Tensor, factors: Tensor | None = None) -> Tensor:
    """``silu(gate) * up * factor`` of every row, in fp32, rounded once.

    Args:
        gate_up: [N, 2 f] contiguous: gate, then up.
        factors: [N], or None for ones.

    Returns:
        [N, f] in the type of `gate_up`.
    """
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    if out.numel():
        grid = (rows, triton.cdiv(width, BLOCK))
        _forward[grid](gate_up, factors, out, width, SCALED=factors is not None, BLOCK=BLOCK, num_warps=4)
    return out


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
    rows, width = grad.shape
    scaled = factors is not None
    out = torch.empty_like(gate_up) if out is None else out
    hidden = torch.empty_like(grad) if scaled else None
    grad_factors = torch.empty_like(factors) if scaled else None
    if grad.numel():
        _backward[(rows,)](grad, gate_up, factors, out, hidden, grad_factors, width,
                           SCALED=scaled, BLOCKS=triton.cdiv(width, BLOCK), BLOCK=BLOCK, num_warps=4)  # fmt: skip
    return out, hidden, grad_factors


def check(device: torch.device) -> None:
    """Against torch in fp32, with factors and without. Raises ArithmeticError."""
    from megatron_telechat.backend.kernels import require_close

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        numbers = torch.arange(3 * 3 * 1032, device=device, dtype=torch.float32).mul_(0.7).sin().view(3, -1)
        gate_up, grad = (part.to(dtype).contiguous() for part in (numbers[:, :2064] * 2, numbers[:, 2064:]))
        gate, up = gate_up.float().chunk(2, 1)
        silu = torch.nn.functional.silu(gate)
        for factors in (None, numbers[:, 7].contiguous()):
            scale = torch.ones(3, 1, device=device) if factors is None else factors.unsqueeze(1)
            require_close(swiglu(gate_up, factors), silu * up * scale, "SwiGLU")
            grad_gate_up, again, grad_factors = swiglu_gradients(grad, gate_up, factors)
            scaled = grad.float() * scale
            expected = torch.cat((torch.ops.aten.silu_backward(scaled * up, gate), scaled * silu), 1)
            require_close(grad_gate_up, expected, "SwiGLU, back")
            if again is not None and grad_factors is not None:
                require_close(again, silu * up * scale, "SwiGLU, again")
                require_close(grad_factors, (grad.float() * silu * up).sum(1), "SwiGLU, factors")
