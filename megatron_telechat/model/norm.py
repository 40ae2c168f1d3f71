"""RMSNorm in TeleChat2's order of operations."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_telechat.backend import traits_of
from megatron_telechat.backend.kernels import kernels


class CpuRMSNorm(torch.autograd.Function):
    """RMSNorm that keeps its input and one number a row; the normalised rows are computed again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`rms_norm`; keeps x, the weight and r = 1 / sqrt(mean(x^2) + eps), fp32 [..., 1]."""
        x32 = x.float()
        norm = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (x32 * rstd).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """With n = x * r and w the weight: dx = r * (dy * w - n * mean(dy * w * n)), dw = sum over the rows of dy * n.

        Computed in fp32.
        """
        x, weight, rstd = ctx.saved_tensors
        hidden = x.shape[-1]
        grad32 = grad.float()
        weight32 = weight.float()
        normalised = x.float() * rstd
        product = grad32 * normalised
        grad_weight = product.reshape(-1, hidden).sum(0)
        mean = (product @ weight32).unsqueeze_(-1).div_(hidden)
        grad_x = (grad32 * weight32).addcmul_(normalised, mean, value=-1).mul_(rstd)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class FusedRMSNorm(torch.autograd.Function):
    """RMSNorm by a fused kernel, torch's or the device's own, which normalises in fp32 and rounds; the weight stays
    outside of it to keep the order. Keeps only its input: the kernel is cheap to repeat."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`rms_norm`; keeps x and the weight."""
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        fused = kernels("norm", x)
        if fused is not None:
            return fused.rms_norm(x.contiguous(), eps).mul_(weight)
        return torch.nn.functional.rms_norm(x, x.shape[-1:], None, eps).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Runs the kernel again and takes its gradient by autograd. That of the weight is the sum over the rows of
        dy * n, where n is what the kernel returns."""
        x, weight = ctx.saved_tensors
        fused = kernels("norm", x)
        if fused is not None:
            grad_x, grad_weight = fused.rms_norm_gradients(grad, x.contiguous(), weight, ctx.eps)
            return grad_x, grad_weight.to(weight.dtype), None
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            normalised = torch.nn.functional.rms_norm(x, x.shape[-1:], None, ctx.eps)
        (grad_x,) = torch.autograd.grad(normalised, x, grad * weight)
        grad_weight = (grad * normalised.detach()).reshape(-1, x.shape[-1]).sum(0)
        return grad_x, grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * cast(x * rsqrt(mean(x^2) + eps))``: normalised in fp32, cast back to the type of x, then scaled.

    Args:
        x: [..., hidden].
        weight: [hidden], of the type of x.
    """
    function = FusedRMSNorm if traits_of(x.device).fused_rms_norm else CpuRMSNorm
    return function.apply(x, weight, eps)


def build_norm(spec: ModuleSpec | type, config: TransformerConfig, width: int) -> torch.nn.Module:
    """The norm of a spec over the last axis, `width` wide."""
    norm = build_module(spec, config=config, hidden_size=width, eps=config.layernorm_epsilon)
    assert isinstance(norm, torch.nn.Module), spec
    return norm


class RMSNorm(torch.nn.Module):
    """RMSNorm with a weight and no bias; see `rms_norm`.

    Under sequence parallelism each tensor-parallel rank sees a part of the sequence, so the
    weight is marked for megatron-core's gradient all-reduce over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - torch's stubs do not know it

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        return rms_norm(x, self.weight, self.eps)
