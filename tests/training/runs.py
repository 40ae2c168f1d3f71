"""Small training runs for the distributed tests: from the flags a person would type to losses and gradients."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SMALL = (
    "--seq-length 32 --vocab-size 256 --hidden-size 64 --kv-channels 8 --init-method-std 0.05 "
    "--micro-batch-size 2 --global-batch-size 8 --train-iters 20 --lr 1e-3 --lr-decay-style constant "
    "--lr-warmup-iters 0 --mock-data --device cpu --fp32 --no-progress"
).split()
DENSE = ["--preset", "telechat2-tiny", *SMALL, "--ffn-hidden-size", "128"]
MOE = ["--preset", "telechat2-tiny-moe", *SMALL, "--moe-ffn-hidden-size", "32", "--ffn-hidden-size", "32"]
QKNORM = [*DENSE, "--qk-layernorm"]
SHARED = [*MOE, "--moe-shared-expert-intermediate-size", "32"]


def load(flags: Sequence[str], run_dir: Path):
    """The RunConfig of these flags, at the world size of this process."""
    from megatron_telechat.config import load_run_config

    return load_run_config([*flags, "--run-dir", str(run_dir)], os.environ).run


def make_trainer(flags: Sequence[str], run_dir: Path):
    from megatron_telechat.training.loop import Trainer

    return Trainer(load(flags, run_dir))


def gradient_boxes(trainer) -> dict[str, torch.Tensor]:
    """Boxes of the reduced gradients that this rank, and no other, owns; names are ``key@offset``."""
    from megatron_telechat.checkpoint.optimizer_state import flat_boxes, optimizer_slices

    boxes = {}
    for item in optimizer_slices(trainer.optimizer, trainer.shards):
        if not item.sharded and not item.shard.writer:
            continue
        flat = item.shard.parameter.main_grad.view(-1)
        for part in flat_boxes(item.shard, item.start, item.stop):
            offset = ",".join(str(number) for number in part.box.offset)
            boxes[f"{item.shard.piece.key}@{offset}"] = flat[part.start : part.stop].view(part.box.shape).clone()
    return boxes


def weight_boxes(trainer) -> dict[str, torch.Tensor]:
    """Boxes of the weights that this rank, and no other, writes; names are ``key@offset``. Collective."""
    from megatron_telechat.training.param_gather import gathered_parameters

    with gathered_parameters(trainer.virtual_stages):
        return {
            f"{piece.key}@{','.join(map(str, piece.box.offset))}": parameter.detach().view(piece.box.shape).clone()
            for piece, parameter in ((shard.piece, shard.parameter) for shard in trainer.shards if shard.writer)
        }  # fmt: skip


def run_and_keep(flags: Sequence[str], folder: Path, name: str) -> dict:
    """Losses and gradient norms of a run; its first gradients and last weights go to files of each rank, ``NAME.rank*``
    and ``NAME.weights.rank*``."""
    from safetensors.torch import save_file

    trainer = make_trainer(flags, folder / name)
    try:
        iterators = trainer.training_iterators()
        with trainer.routing.step(1):
            trainer.train_step.forward_backward(iterators)
        save_file(gradient_boxes(trainer), folder / f"{name}.rank{trainer.state.rank}.safetensors")
        iterators = trainer.training_iterators()
        results = [trainer.take_step(iterators)[0] for _ in range(trainer.run.training.train_iters)]
        save_file(weight_boxes(trainer), folder / f"{name}.weights.rank{trainer.state.rank}.safetensors")
        return {"loss": [r.loss for r in results], "grad_norm": [r.grad_norm for r in results]}
    finally:
        trainer.release()


def assemble(files: Sequence[Path], shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Global tensors from the boxes that all ranks wrote; fails where a number was written by nobody."""
    import torch
    from safetensors.torch import load_file

    whole = {key: torch.full(shape, float("nan")) for key, shape in shapes.items()}
    for path in files:
        for name, box in load_file(path).items():
            key, _, offset = name.partition("@")
            corner = [int(number) for number in offset.split(",")]
            whole[key][tuple(slice(at, at + size) for at, size in zip(corner, box.shape, strict=True))] = box
    empty = [key for key, tensor in whole.items() if torch.isnan(tensor).any()]
    assert not empty, f"no rank holds all of {empty}"
    return whole
