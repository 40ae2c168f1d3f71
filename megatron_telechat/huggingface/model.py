"""A Hugging Face folder as a running model in this one process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_telechat.backend import get_backend
from megatron_telechat.checkpoint.loading import WeightSource, load_weights
from megatron_telechat.config.schema import ModelConfig, ParallelConfig, Precision, RunConfig, TrainingConfig
from megatron_telechat.device_kinds import HOST, DeviceChoice
from megatron_telechat.huggingface.weights import HfWeights
from megatron_telechat.model import build_model, parameter_shards
from megatron_telechat.parallel.state import destroy, initialize


@dataclass(frozen=True)
class HfModel:
    """A model with its weights; use through :func:`hf_model` or :func:`running_model`."""

    run: RunConfig
    module: torch.nn.Module
    device: torch.device

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """fp32 logits [batch, length, vocab] of token ids [batch, length], on the model's device."""
        tokens = tokens.to(self.device, torch.int64)
        positions = torch.arange(tokens.shape[1], device=self.device).expand_as(tokens)
        return self.module(tokens, positions, gather_logits=True).float()


@contextlib.contextmanager
def hf_model(
    folder: Path,
    *,
    device: DeviceChoice = HOST,
    precision: Precision = "fp32",
    rotary_table_dtype: str = "fp32",
    seq_length: int = 1,
) -> Iterator[HfModel]:
    """Build the model of a Hugging Face folder, fill it, and take the process group down at the end.

    Args:
        seq_length: longest sequence to come (rotary tables follow each sequence's own length).

    Raises CheckpointError for what does not fit.
    """
    weights = HfWeights(Path(folder))
    model = replace(weights.model, rotary_table_dtype=rotary_table_dtype)
    with running_model(weights, model, device=device, precision=precision, seq_length=seq_length) as running:
        yield running


@contextlib.contextmanager
def running_model(
    weights: WeightSource,
    model: ModelConfig,
    *,
    device: DeviceChoice = HOST,
    precision: Precision = "fp32",
    seq_length: int = 1,
) -> Iterator[HfModel]:
    """The same of any source of global tensors."""
    backend = get_backend(device)
    backend.install()
    run = RunConfig(
        model=model,
        parallel=ParallelConfig(world_size=1),
        training=TrainingConfig(device=device, precision=precision, seq_length=seq_length),
    )
    state = initialize(run, backend)
    try:
        (module,) = build_model(run, state, backend, initialize=False)
        with torch.no_grad():
            load_weights(weights, parameter_shards([module], run, state))
        module.eval()
        yield HfModel(run, module, backend.device)
    finally:
        destroy()
