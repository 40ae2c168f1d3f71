"""RMSNorm without a weight, and its gradients with one: ``npu_rms_norm`` and its backward.

The weight stays outside of the forward: TeleChat2 rounds the normalised rows before it multiplies.
"""

from __future__ import annotations

from functools import lru_cache

# torch_npu is installed on Ascend machines only.
# pyright: reportMissingImports=false
import torch
import torch_npu
from torch import Tensor


@lru_cache
def _ones(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones(width, dtype=dtype, device=device)


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The rows, and one fp32 number a row."""
    return torch_npu.npu_rms_norm(x, _ones(x.shape[-1], x.dtype, x.device), epsilon=eps)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """[..., width]: ``x * rsqrt(mean(x^2) + eps)``, computed in fp32.

    Args:
        x: [..., width], contiguous.
    """
    return _normalised(x, eps)[0]


def rms_norm_gradients(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of ``rms_norm(x) * weight``: of x, and of the weight in fp32.

    Args:
        grad: [..., width], of the result.
        x: [..., width], contiguous.
        weight: [width], of the type of x.
    """
    rstd = _normalised(x, eps)[1]
    grad_x, grad_weight = torch_npu.npu_rms_norm_backward(grad.contiguous(), x, weight, rstd)
    return grad_x, grad_weight


def check(device: torch.device) -> None:
    """Against fp32 on the host. Raises ArithmeticError."""
    from megatron_telechat.backend.kernels import require_close

    width, eps = 96, 1e-5
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        numbers = torch.arange(2 * 6 * width + width, dtype=torch.float32).mul_(0.7).sin_()
        x, grad = (part.view(2, 3, width).to(dtype) for part in numbers[: 2 * 6 * width].chunk(2))
        weight = (1 + numbers[-width:] / 4).to(dtype)
        rows = x.float().requires_grad_()
        scale = weight.float().requires_grad_()
        normalised = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
        expected = torch.autograd.grad(normalised * scale, (rows, scale), grad.float())
        require_close(rms_norm(x.to(device), eps).cpu(), normalised.detach(), "RMSNorm")
        grad_x, grad_weight = rms_norm_gradients(grad.to(device), x.to(device), weight.to(device), eps)
        require_close(grad_x.cpu(), expected[0], "RMSNorm, back")
        require_close(grad_weight.to(dtype).cpu(), expected[1], "RMSNorm, weight")
