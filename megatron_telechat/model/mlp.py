"""The dense SwiGLU block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_telechat.backend.kernels import kernels


class _SwiGLUFunction(torch.autograd.Function):
    """silu(gate) * up that keeps only its input; the backward writes both halves of one buffer."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        fused = kernels("swiglu", gate_up)
        if fused is not None:
            return fused.swiglu(gate_up.flatten(0, -2).contiguous()).unflatten(0, gate_up.shape[:-1])
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        fused = kernels("swiglu", gate_up)
        if fused is not None:
            flat, grad = gate_up.flatten(0, -2).contiguous(), grad.flatten(0, -2).contiguous()
            return fused.swiglu_gradients(grad, flat)[0].view(gate_up.shape)
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(torch.nn.functional.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_gate_up


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2*ffn] (gate, then up) -> silu(gate) * up, [..., ffn]."""
    return _SwiGLUFunction.apply(gate_up)


@dataclass
class MLPSubmodules:
    """The exchangeable parts: torch's or TransformerEngine's linear layers."""

    linear_fc1: ModuleSpec | type
    linear_fc2: ModuleSpec | type


class MLP(MegatronModule):
    """``fc2(swiglu(fc1(x)))``, tensor-parallel.

    linear_fc1 [2*ffn / tp, hidden] holds this rank's gate rows, then its up rows; no bias.
    linear_fc2 [hidden, ffn / tp], with a bias if `output_bias`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: ProcessGroupCollection,
        output_bias: bool,
    ):
        super().__init__(config=config)
        width = config.ffn_hidden_size
        assert width is not None, "model.transformer_config says it"
        self.linear_fc1 = build_module(
            submodules.linear_fc1,
            config.hidden_size,
            2 * width,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="fc1",
            tp_group=pg_collection.tp,
        )
        self.linear_fc2 = build_module(
            submodules.linear_fc2,
            width,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=output_bias,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="fc2",
            tp_group=pg_collection.tp,
        )

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor | None]:
        """[s (/ tp under sequence parallelism), b, hidden] -> the same, without the bias, and the bias."""
        gate_up, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(swiglu(gate_up))
