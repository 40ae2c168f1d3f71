"""What is asked of a merge. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_telechat.checkpoint.averages import KINDS
from megatron_telechat.config.schema import Precision
from megatron_telechat.device_kinds import HOST, DeviceChoice
from megatron_telechat.locations import Location
from megatron_telechat.merging.weighting import Sum

METHODS = ("linear", "slerp", "task-arithmetic", "ties", "dare", "dare-ties")
ON_A_BASE = ("task-arithmetic", "ties", "dare", "dare-ties")
"""Methods on task vectors: what each input has learned beyond a common base."""
FORMATS = ("checkpoint", "hf")
VALUES = ("auto", "weights", "master", *KINDS)

Method = Literal["linear", "slerp", "task-arithmetic", "ties", "dare", "dare-ties"]
Format = Literal["checkpoint", "hf"]
Values = Literal["auto", "weights", "master", "ema", "window"]


@dataclass(frozen=True)
class Examples:
    """A few examples by whose loss the inputs are weighed (LM-Cocktail).

    Attributes:
        file: jsonl; a line is a dialog in one of the shapes of fine-tuning, or ``{"text": ...}``.
        temperature: of the softmax.
        tokenizer: file or folder; None: that of the inputs.
        template, loss_mask: of dialogs, as in fine-tuning.
        precision: of the forward; None: fp32 on the CPU, else bf16.
    """

    file: Path
    temperature: float = 5.0
    tokenizer: Path | None = None
    template: str = "telechat2"
    loss_mask: str = "telechat"
    device: DeviceChoice = HOST
    precision: Precision | None = None


@dataclass(frozen=True)
class Window:
    """Checkpoints of one run.

    Attributes:
        last: the newest so many of its lineage.
        steps: or those of these steps.
        decay: shape of the learning-rate decay that their average stands for (WSM).
    """

    last: int | None = None
    steps: tuple[int, ...] | None = None
    decay: str = "mean"


@dataclass(frozen=True)
class MergeRequest:
    """A merge as a person asks for it.

    Attributes:
        inputs: checkpoints, folders of checkpoints (the newest is taken) or Hugging Face folders.
        output: a folder that does not exist yet, or is empty.
        format: None: a checkpoint where every input is one, else a Hugging Face folder.
        method: one of METHODS.
        weights: one an input; None: all alike (task vectors: 1 each).
        weights_sum: what they must add up to; None: one, of task vectors any.
        layer_weights: YAML file with weights by layer and tensor.
        examples: weigh by loss.
        window: the inputs are checkpoints of the one run that ``inputs`` names.
        base: what task vectors are differences to.
        scale: factor of the merged task vector (lambda).
        density: share of a task vector that TIES keeps.
        trim: whether TIES ranks the elements of the whole model or tensor by tensor.
        drop: share of a task vector that DARE drops.
        seed: of what DARE drops.
        values: weights as stored, the fp32 master weights, (auto) the masters where every input has them, or an average
            that each input's run has kept.
        dtype: keep, bf16, fp16 or fp32.
        optimizer: average the optimizer's state, too.
        allow_model_change: inputs may differ in what `--allow-model-change` of a training allows.
        verify: compare the checksum of every byte of a checkpoint before merging it.
        max_shard_bytes: largest file of a Hugging Face folder.
        command: the command line, for the provenance file.
    """

    inputs: tuple[Location, ...]
    output: Location
    format: Format | None = None
    method: Method = "linear"
    weights: tuple[float, ...] | None = None
    weights_sum: Sum | None = None
    layer_weights: Path | None = None
    examples: Examples | None = None
    window: Window | None = None
    base: Location | None = None
    scale: float = 1.0
    density: float = 0.2
    trim: Literal["model", "tensor"] = "model"
    drop: float = 0.9
    seed: int = 0
    values: Values = "auto"
    dtype: str = "keep"
    optimizer: bool = False
    allow_model_change: bool = False
    verify: bool = True
    max_shard_bytes: int = 5 * 10**9
    command: tuple[str, ...] = ()
