"""Our block and megatron-core's layer, at the same shapes, with the same weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from overlap.stand_in import StandInCoreExperts, StandInEngine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """One MoE layer and its input; `tokens` is of a rank."""

    tokens: int = 1024
    hidden: int = 512
    ffn: int = 768
    experts: int = 16
    topk: int = 4
    dtype: Literal["fp32", "bf16"] = "fp32"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def flops_per_row(hidden: int, ffn: int) -> int:
    """Of the forward of an expert row: gate, up and down projection."""
    return 6 * hidden * ffn


def transformer_config(shape: Shape, expert_ranks: int) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=1,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=8,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        params_dtype=shape.torch_dtype,
        bf16=shape.dtype == "bf16",
        gradient_accumulation_fusion=False,
        expert_model_parallel_size=expert_ranks,
        num_moe_experts=shape.experts,
        moe_ffn_hidden_size=shape.ffn,
        moe_router_topk=shape.topk,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.01,
        moe_token_dispatcher_type="alltoall",
    )


def random_weights(shape: Shape) -> dict[str, Tensor]:
    """The whole layer's, the same on every rank; one expert's after the other's, so that a smaller layer is a part of a
    larger."""
    generator = torch.Generator().manual_seed(1234)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator) / sizes[-1] ** 0.5

    return {
        "router": normal(shape.experts, shape.hidden),
        "fc1": normal(shape.experts, 2, shape.ffn, shape.hidden),
        "fc2": normal(shape.experts, shape.hidden, shape.ffn),
    }


def build_block(shape: Shape, config: Any, groups: Any, weights: dict[str, Tensor]) -> Any:
    """Our block."""
    from megatron_telechat.moe import MoEBlock

    block: Any = MoEBlock(config, pg_collection=groups)
    block.set_layer_number(1)
    mine = _local_experts(shape, groups)
    with torch.no_grad():
        block.router.weight.copy_(weights["router"])
        block.experts.linear_fc1.weight.copy_(weights["fc1"][mine])
        block.experts.linear_fc2.weight.copy_(weights["fc2"][mine])
    return block


def core_moe_layer(config: Any, groups: Any, number: int) -> Any:
    """megatron-core's MoELayer: alltoall dispatcher and SequentialMLP, its only experts without CUDA or
    TransformerEngine.

    Args:
        number: of the layer, from 1.
    """
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec

    spec = get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts, moe_grouped_gemm=False)
    layer = spec(config=config, pg_collection=groups)
    layer.set_layer_number(number)
    return layer


def build_core(shape: Shape, config: Any, groups: Any, weights: dict[str, Tensor]) -> Any:
    """megatron-core's layer with these weights."""
    layer = core_moe_layer(config, groups, 1)
    mine = _local_experts(shape, groups)
    with torch.no_grad():
        layer.router.weight.copy_(weights["router"])
        for expert, fc1, fc2 in zip(
            layer.experts.local_experts, weights["fc1"][mine], weights["fc2"][mine], strict=True
        ):
            expert.linear_fc1.weight.copy_(fc1.flatten(0, 1))
            expert.linear_fc2.weight.copy_(fc2)
    return layer


def _local_experts(shape: Shape, groups: Any) -> slice:
    count = shape.experts // groups.ep.size()
    return slice(groups.ep.rank() * count, (groups.ep.rank() + 1) * count)


def use_stand_in(block: Any, gflops: float) -> None:
    """From now on the products of our block take the time that a device of this rate would."""
    config = block.config
    block.engine = StandInEngine(flops_per_row(config.hidden_size, config.moe_ffn_hidden_size), gflops)
    for parameter in block.experts.parameters():
        if getattr(parameter, "main_grad", None) is None:
            # Where DDP has it, so that no gradient is allocated for products that do not happen.
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
            parameter.grad_added_to_main_grad = False


def use_core_stand_in(layer: Any, gflops: float) -> None:
    """The same for megatron-core's layer, whose experts are replaced."""
    config = layer.config
    layer.experts = StandInCoreExperts(flops_per_row(config.hidden_size, config.moe_ffn_hidden_size), gflops)


def block_gradients(block: Any) -> dict[str, Tensor]:
    """Of the router and, where the products are real, of the experts."""
    found = {"router": block.router.weight.grad}
    weights = {"fc1": block.experts.linear_fc1.weight, "fc2": block.experts.linear_fc2.weight}
    found |= {name: weight.grad for name, weight in weights.items() if not hasattr(weight, "main_grad")}
    return {name: gradient.clone() for name, gradient in found.items()}


def core_gradients(layer: Any) -> dict[str, Tensor]:
    found = {"router": layer.router.weight.grad.clone()}
    experts = getattr(layer.experts, "local_experts", None)
    if experts is not None:
        fc1 = torch.stack([expert.linear_fc1.weight.grad for expert in experts])
        found["fc1"] = fc1.unflatten(1, (2, -1))
        found["fc2"] = torch.stack([expert.linear_fc2.weight.grad for expert in experts])
    return found


def make_input(shape: Shape) -> tuple[Tensor, Tensor]:
    """This rank's tokens [s, 1, h] and the gradient of its output, the same in every run and for every arm."""
    generator = torch.Generator().manual_seed(77 + dist.get_rank())
    tokens, direction = (torch.randn(shape.tokens, 1, shape.hidden, generator=generator) for _ in range(2))
    return tokens.to(shape.torch_dtype), direction.to(shape.torch_dtype)
