"""What a virtual stage is made of, as megatron-core module specs."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_telechat.config.recompute import recompute_plan
from megatron_telechat.config.schema import ModelConfig, RunConfig
from megatron_telechat.device_kinds import DeviceTraits
from megatron_telechat.model.attention import (
    SelfAttention,
    SelfAttentionSubmodules,
    TorchCoreAttention,
    TransformerEngineCoreAttention,
)
from megatron_telechat.model.context_attention import ContextCoreAttention
from megatron_telechat.model.layer import DecoderLayer, DecoderLayerSubmodules
from megatron_telechat.model.mlp import MLP, MLPSubmodules
from megatron_telechat.model.norm import RMSNorm


@dataclass(frozen=True)
class Implementation:
    """The classes behind the matrix products and the core attention."""

    column_linear: type
    row_linear: type
    core_attention: type


TORCH = Implementation(ColumnParallelLinear, RowParallelLinear, TorchCoreAttention)


def has_transformer_engine(device: DeviceTraits) -> bool:
    """Whether TransformerEngine can be used: on a device that it has kernels for, with its compiled core in place."""
    if not device.transformer_engine or importlib.util.find_spec("transformer_engine") is None:
        return False
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, RuntimeError):  # the bare meta package raises RuntimeError
        return False
    return True


def implementation(transformer_engine: bool, segments: bool = False) -> Implementation:
    """TransformerEngine's classes, or torch's.

    Args:
        segments: documents or dialogs are kept apart, which torch's core attention does for rows of any length.
    """
    if not transformer_engine:
        return TORCH
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    attention = TorchCoreAttention if segments else TransformerEngineCoreAttention
    return Implementation(TEColumnParallelLinear, TERowParallelLinear, attention)


def block_spec(run: RunConfig, layers: Sequence[int], classes: Implementation = TORCH) -> TransformerBlockSubmodules:
    """The decoder layers with these global numbers; each carries its own recompute modes."""
    plan = recompute_plan(run)
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(run, layer, plan[layer], classes) for layer in layers],
        # megatron-core builds a class here; 0.16.1's annotation names its instances
        layer_norm=RMSNorm,  # pyright: ignore[reportArgumentType]
    )


def layer_spec(run: RunConfig, layer: int, recompute: tuple[str, ...], classes: Implementation) -> ModuleSpec:
    """One decoder layer: attention, then a dense SwiGLU or a block of experts."""
    model = run.model
    attention = ModuleSpec(
        module=SelfAttention,
        params={"output_bias": model.attention_output_bias},
        submodules=SelfAttentionSubmodules(
            linear_qkv=classes.column_linear,
            core_attention=context_attention_spec(run) or classes.core_attention,
            linear_proj=classes.row_linear,
        ),
    )
    return ModuleSpec(
        module=DecoderLayer,
        params={"global_layer": layer, "recompute": recompute},
        submodules=DecoderLayerSubmodules(
            norm=RMSNorm,
            self_attention=attention,
            mlp=moe_spec(run, recompute) if model.layer_is_moe(layer) else dense_spec(model, classes),
        ),
    )


def context_attention_spec(run: RunConfig) -> ModuleSpec | None:
    """The core attention of rows that are spread over ranks: ours, unless TransformerEngine's is asked for; None where
    they are whole. What is left open, pieces and whether to keep what arrives, the training chooses later."""
    parallel = run.parallel
    if parallel.context_parallel_size == 1:
        return None
    if parallel.cp_implementation == "transformer_engine":
        return ModuleSpec(module=TransformerEngineCoreAttention)
    pieces = 1 if parallel.cp_pieces == "auto" else parallel.cp_pieces
    return ModuleSpec(module=ContextCoreAttention, params={"pieces": pieces, "keep": parallel.keeps_received})


def dense_spec(model: ModelConfig, classes: Implementation) -> ModuleSpec:
    """A dense MLP. Tensor parallelism cuts fc1 by columns and fc2 by rows; a bias, if any, is on the output."""
    return ModuleSpec(
        module=MLP,
        params={"output_bias": model.mlp_output_bias},
        submodules=MLPSubmodules(linear_fc1=classes.column_linear, linear_fc2=classes.row_linear),
    )


def moe_spec(run: RunConfig, recompute: tuple[str, ...]) -> ModuleSpec:
    """A block of experts. With ``auto`` its input stays whole until the training has chosen a number of chunks."""
    from megatron_telechat.moe import MoEBlock

    chunks = run.parallel.moe_input_chunks
    return ModuleSpec(
        module=MoEBlock,
        params={
            "output_bias": run.model.mlp_output_bias,
            "num_chunks": 1 if chunks == "auto" else chunks,
            "recompute_experts": "moe" in recompute,
        },
    )
