"""A Hugging Face folder as a running model, in one process or sharded over tensor-parallel ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from megatron_telechat.backend import get_backend
from megatron_telechat.checkpoint.loading import WeightSource, load_weights
from megatron_telechat.config.schema import ModelConfig, ParallelConfig, Precision, RunConfig, TrainingConfig
from megatron_telechat.device_kinds import HOST, DeviceChoice
from megatron_telechat.errors import ConfigError, Problem
from megatron_telechat.huggingface.weights import HfWeights
from megatron_telechat.model import TeleChatModel, build_model, parameter_shards
from megatron_telechat.model.key_value_cache import KeyValueCache
from megatron_telechat.parallel.state import destroy, initialize

WAIT_MINUTES = 7 * 24 * 60.0
"""Ranks wait for each other while a person thinks about the next message."""


@dataclass(frozen=True)
class HfModel:
    """A model with its weights; use through :func:`hf_model` or :func:`running_model`. Every rank calls all methods."""

    run: RunConfig
    module: TeleChatModel
    device: torch.device

    @property
    def is_first_rank(self) -> bool:
        """Whether this is the rank that reads and prints."""
        return dist.get_rank() == 0

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, cache: KeyValueCache | None = None) -> torch.Tensor:
        """fp32 logits [batch, length, vocab] of token ids [batch, length], on the model's device.

        Args:
            cache: the tokens follow those in it and are added to it; the logits are those of the last one,
                [batch, 1, vocab].
        """
        tokens = tokens.to(self.device, torch.int64)
        if cache is not None:
            before = 0 if cache.tokens is None else cache.tokens.shape[1]
            tokens = cache.to_read(tokens, self.module.rotary.scaling(before + tokens.shape[1]))
        positions = torch.arange(tokens.shape[1], device=self.device).expand_as(tokens)
        return self.module(tokens, positions, segments=cache, gather_logits=True).float()

    def of_first_rank(self, number: int) -> int:
        """What the first rank has, on every rank."""
        if self.run.parallel.world_size == 1:
            return number
        value = torch.tensor([number], device=self.device)
        dist.broadcast(value, src=0)
        return int(value)


@contextlib.contextmanager
def hf_model(
    folder: Path,
    *,
    device: DeviceChoice = HOST,
    precision: Precision = "fp32",
    rotary_table_dtype: Literal["fp32", "fp16"] | None = None,
    seq_length: int = 1,
    ranks: int = 1,
) -> Iterator[HfModel]:
    """Build the model of a Hugging Face folder, fill it, and take the process group down at the end.

    Args:
        rotary_table_dtype: of the rotary tables; None: as config.json says.
        seq_length: longest sequence to come (rotary tables follow each sequence's own length).
        ranks: all ranks of the job; more than one hold a tensor-parallel part of the model each.

    Raises:
        CheckpointError: configuration or weights that do not fit each other.
        ConfigError: the ranks do not divide the model.
    """
    weights = HfWeights(Path(folder))
    model = weights.model
    if rotary_table_dtype is not None:
        model = replace(model, rotary_table_dtype=rotary_table_dtype)
    with running_model(
        weights, model, device=device, precision=precision, seq_length=seq_length, ranks=ranks
    ) as running:
        yield running


@contextlib.contextmanager
def running_model(
    weights: WeightSource,
    model: ModelConfig,
    *,
    device: DeviceChoice = HOST,
    precision: Precision = "fp32",
    seq_length: int = 1,
    ranks: int = 1,
) -> Iterator[HfModel]:
    """The same of any source of global tensors."""
    parallel = tensor_parallel(model, ranks)
    backend = get_backend(device)
    backend.install()
    run = RunConfig(
        model=model,
        parallel=parallel,
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


def tensor_parallel(model: ModelConfig, ranks: int) -> ParallelConfig:
    """The layout of a generation: all ranks share every layer; experts are spread over them where they divide evenly,
    and else cut like the rest.

    Raises:
        ConfigError: every size that the ranks do not divide.
    """
    sizes = {
        "attention heads": model.num_attention_heads,
        "query groups": model.query_groups,
        "rows of the vocabulary": model.vocab_size,
    }
    if not all(map(model.layer_is_moe, range(model.num_layers))):
        sizes["columns of a dense MLP"] = model.ffn_hidden_size
    spread = model.num_experts is not None and model.num_experts % ranks == 0
    if model.is_moe and not spread:
        sizes["columns of an expert"] = model.moe_ffn_hidden_size or model.ffn_hidden_size
    if model.moe_shared_expert_intermediate_size:
        sizes["columns of the shared expert"] = model.moe_shared_expert_intermediate_size
    problems = [
        Problem(f"{size} {what} do not divide by {ranks} ranks", "torchrun", "start a number of ranks that divides it")
        for what, size in sizes.items()
        if size % ranks
    ]
    if problems:
        raise ConfigError(problems)
    return ParallelConfig(
        world_size=ranks,
        tensor_model_parallel_size=ranks,
        fold_tensor_into_experts=spread,
        sequence_parallel=False,  # a step has one token, which no ranks can share
        distributed_timeout_minutes=WAIT_MINUTES,
    )
