"""From a run to the virtual stages of this rank."""

from __future__ import annotations

import os

import torch

from megatron_telechat.backend import Backend
from megatron_telechat.backend.transformer_engine import require_recipe
from megatron_telechat.config.layout import pipeline_layout
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.model.gpt import TeleChatModel
from megatron_telechat.model.initialize import initialize_weights
from megatron_telechat.model.shards import parameter_shards
from megatron_telechat.model.spec import block_spec, has_transformer_engine, implementation
from megatron_telechat.model.transformer_config import transformer_config
from megatron_telechat.parallel.state import ParallelState


def build_model(run: RunConfig, state: ParallelState, backend: Backend, initialize: bool = True) -> list[TeleChatModel]:
    """The virtual stages of this rank, in the order of the interleaved schedule: on the device, in the compute type.

    Args:
        initialize: fill the weights; they do not depend on the layout. Without it, they are undefined.

    Raises:
        ConfigError: a parameter that the table of tensors does not have; on the ranks that build it. FP8 of a recipe
            that the device has not.
    """
    device = backend.device
    transformer_engine = has_transformer_engine(backend.traits)
    if transformer_engine and run.training.deterministic:
        os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    if transformer_engine and run.training.fp8_format is not None:
        require_recipe(run.training.fp8_recipe)
    classes = implementation(transformer_engine, run.data.reset_attention_mask)
    layout = pipeline_layout(run)
    virtual_stages: list[TeleChatModel] = []
    for virtual_stage in range(layout.num_virtual_stages):
        vp_stage = virtual_stage if layout.num_virtual_stages > 1 else None
        with device:
            model = TeleChatModel(
                run,
                transformer_config(run, state, backend.traits, vp_stage),
                block_spec(run, layout.layers_of(state.pp_rank, virtual_stage), classes),
                state.process_groups,
                pre_process=layout.has_embedding(state.pp_rank, virtual_stage),
                post_process=layout.has_loss(state.pp_rank, virtual_stage),
                vp_stage=vp_stage,
            )
        _require_device(model, device)
        virtual_stages.append(model)
    shards = parameter_shards(virtual_stages, run, state)
    if initialize:
        initialize_weights(shards, run)
    return virtual_stages


def _require_device(model: torch.nn.Module, device: torch.device) -> None:
    """Everything was made on the device, and nothing has to be moved there: a second copy would be the peak."""
    elsewhere = [
        name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.device != device
    ]
    assert not elsewhere, f"made on another device than {device}: {', '.join(elsewhere[:5])}"
