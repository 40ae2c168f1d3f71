"""Small models to merge: Hugging Face folders of random weights, and checkpoints cut as ranks of a layout cut them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_telechat.checkpoint import commit
from megatron_telechat.checkpoint.format import PartWriter, versions
from megatron_telechat.checkpoint.manifest import Manifest
from megatron_telechat.checkpoint.parts import merge_parts
from megatron_telechat.config.schema import ModelConfig, RunConfig
from megatron_telechat.config.yaml_io import dump_run_config
from megatron_telechat.tensors.boxes import Box, flat_range_boxes
from megatron_telechat.tensors.pieces import is_writer, piece_at
from megatron_telechat.tensors.table import TensorSpec, tensor_table
from tests.huggingface.folders import telechat_config, telechat_shapes

MOE = telechat_config(8, 8, layers=2, num_experts=4, num_experts_per_tok=2)
DENSE = telechat_config(8, 2, layers=3)
MODEL = ModelConfig(
    name="small",
    num_layers=1,
    hidden_size=32,
    ffn_hidden_size=24,
    num_attention_heads=4,
    vocab_size=48,
    num_experts=4,
    moe_ffn_hidden_size=16,
    rotary_training_seqlen=64,
)


def hf_folder(
    path: Path,
    seed: int,
    config: Mapping[str, Any] = DENSE,
    dtype: Callable[[str], torch.dtype] = lambda name: torch.bfloat16,
    scale: float = 1.0,
) -> Path:
    """Random weights; another seed, others."""
    generator = torch.Generator().manual_seed(seed)
    path.mkdir(parents=True)
    tensors = {
        name: (torch.randn(shape, generator=generator) * scale).to(dtype(name))
        for name, shape in telechat_shapes(config).items()
    }
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path


@dataclass(frozen=True)
class Place:
    """A rank by its place."""

    tp_rank: int = 0
    tp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1
    etp_rank: int = 0
    etp_size: int = 1
    cp_rank: int = 0
    dp_rank: int = 0
    edp_rank: int = 0


def tp_ep(tp: int, ep: int) -> list[Place]:
    """TP, and beside it EP: the ranks that hold the first copy of everything."""
    return [
        Place(tp_rank, tp, ep_rank, ep, 0, 1, edp_rank=tp_rank, dp_rank=ep_rank)
        for tp_rank in range(tp)
        for ep_rank in range(ep)
    ]


ALONE = [Place()]
SHARDED = {"tp2 ep2": tp_ep(2, 2), "tp4": tp_ep(4, 1), "ep4": tp_ep(1, 4)}


def random_state(seed: int, model: ModelConfig = MODEL, optimizer: bool = True) -> dict[str, torch.Tensor]:
    """Tensors of a bf16 training by stored key: weights, and masters that round to them, and moments."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, spec in tensor_table(model).items():
        master = torch.randn(spec.shape, generator=generator)
        state[f"model/{key}"] = master.bfloat16()
        if optimizer:
            state[f"optimizer/master/{key}"] = master
            state[f"optimizer/exp_avg/{key}"] = torch.randn(spec.shape, generator=generator)
            state[f"optimizer/exp_avg_sq/{key}"] = torch.rand(spec.shape, generator=generator)
    return state


def random_averages(seed: int, model: ModelConfig = MODEL) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Two averages of the weights by stored key, and the ``extra`` of their checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        f"average/{kind}/{key}": torch.randn(spec.shape, generator=generator)
        for kind in ("ema", "window")
        for key, spec in tensor_table(model).items()
    }
    window = {"first": 6, "last": 10, "averaged": 5}
    return state, {"averages": {"ema": {"decay": 0.9, "since": 0, "updates": 10}, "window": window}}


def checkpoint(
    root: Path,
    state: Mapping[str, torch.Tensor],
    places: Sequence[Place] = ALONE,
    step: int = 10,
    model: ModelConfig = MODEL,
    extra: Mapping[str, Any] | None = None,
    run: RunConfig | None = None,
) -> Path:
    """Commit a state as the ranks of a layout write it: weights by their pieces, the optimizer's state and averages by
    flat halves of these, as over two data-parallel ranks."""
    attempt = commit.begin(root, step)
    table, parts = tensor_table(model), []
    for number, place in enumerate(places):
        writer = PartWriter(attempt, number)
        for key, tensor in state.items():
            name = key.removeprefix("model/") if key.startswith("model/") else key.split("/", 2)[2]
            spec = table[name]
            if is_writer(spec, place):
                for box in _boxes(spec, place, halves=not key.startswith("model/")):
                    writer.add(key, spec.shape, box.offset, tensor[box.slices()].contiguous())
        parts.append(writer.close())
    part = merge_parts(parts)
    with_optimizer = any(key.startswith("optimizer/") for key in state)
    manifest = Manifest(
        step=step,
        consumed_samples=8 * step,
        config=dump_run_config(run or RunConfig(model=model)),
        topology={"world_size": len(places)},
        versions=versions(),
        files=part.files,
        tensors=part.tensors,
        optimizer={"step": step, "grad_scaler": {}} if with_optimizer else None,
        extra=dict(extra or {}),
        save=attempt.save,
    )
    return commit.commit(attempt, manifest)


def _boxes(spec: TensorSpec, place: Place, halves: bool) -> list[Box]:
    piece = piece_at(spec, place).box
    middle = piece.numel // 2 + 1 if halves else piece.numel
    spans = [(0, middle), (middle, piece.numel)]
    return [box.shifted(piece.offset) for a, b in spans for _, box in flat_range_boxes(piece.shape, a, b)]
