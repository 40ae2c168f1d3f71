"""Comparing our forward with a file of reference logits."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_telechat.checkpoint.files import dtype_of_tag, read_file_error
from megatron_telechat.errors import CheckpointError, Problem
from megatron_telechat.huggingface.model import HfModel

# fp32 sums in another order move a logit of 10 by about 1e-5. The published file rounds its rotary tables
# to fp16, which moves it by about 1e-2; with fp32 tables only that can be expected.
TOLERANCE = {"fp16": 1e-4, "fp32": 5e-2}
"""Dtype of the rotary tables → largest error of a logit that rounding explains."""

_NAME = re.compile(r"(input_ids|logits)_(\d+)")


@dataclass(frozen=True)
class Comparison:
    """One entry: ``error`` is the largest absolute difference of any logit, ``largest`` the largest reference logit."""

    name: str
    shape: tuple[int, ...]
    error: float
    largest: float

    def within(self, tolerance: float) -> bool:
        """Whether every logit is as near as that; false where one is NaN."""
        return self.error <= tolerance  # false for NaN


def read_golden(path: Path, vocab_size: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """``input_ids_S`` [batch, S] and ``logits_S`` [batch, S, vocab] by S.

    Raises CheckpointError with everything that is wrong: foreign names, a missing half, shapes, ids
    outside the vocabulary.
    """
    tensors = _read(Path(path))
    problems = []
    foreign = sorted(name for name in tensors if not _NAME.fullmatch(name))
    if foreign:
        problems.append(
            Problem(
                f"entries that are neither input_ids_S nor logits_S: {', '.join(foreign[:10])}",
                str(path),
                "S is the length, as in input_ids_32 and logits_32",
            )
        )
    lengths = sorted({int(match.group(2)) for match in map(_NAME.fullmatch, tensors) if match})
    if not lengths and not foreign:
        problems.append(Problem("the file holds no entries", str(path), "write input_ids_S and logits_S"))
    pairs = {}
    for length in lengths:
        names = [f"input_ids_{length}", f"logits_{length}"]
        missing = [name for name in names if name not in tensors]
        if missing:
            problems.append(
                Problem(f"{missing[0]} is missing", str(path), f"each length needs {names[0]} and {names[1]}")
            )
            continue
        ids, logits = tensors[names[0]], tensors[names[1]]
        fault = _fault(ids, logits, length, vocab_size)
        if fault:
            problems.append(
                Problem(fault, str(path), f"wanted: ids [batch, {length}], logits [batch, {length}, {vocab_size}]")
            )
        pairs[length] = (ids, logits)
    if problems:
        raise CheckpointError(problems)
    return pairs


def _fault(ids: torch.Tensor, logits: torch.Tensor, length: int, vocab_size: int) -> str:
    if ids.dtype.is_floating_point or ids.dtype == torch.bool or not logits.dtype.is_floating_point:
        return f"input_ids_{length} is {ids.dtype} and logits_{length} is {logits.dtype}"
    if ids.ndim != 2 or ids.shape[1] != length or ids.numel() == 0:
        return f"input_ids_{length} has the shape {list(ids.shape)}"
    if tuple(logits.shape) != (*ids.shape, vocab_size):
        return f"logits_{length} has the shape {list(logits.shape)}"
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        return f"input_ids_{length} holds ids from {low} to {high}, the vocabulary has {vocab_size}"
    return ""


def _read(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            odd = [name for name in handle.keys() if dtype_of_tag(handle.get_slice(name).get_dtype()) is None]
            if odd:
                raise ValueError(f"{odd[0]} has a dtype that is not read here")
            return {name: handle.get_tensor(name) for name in handle.keys()}
    except Exception as error:  # safetensors raises types of its own
        raise read_file_error(path, error, "give a safetensors file with input_ids_S and logits_S") from error


def compare(model: HfModel, pairs: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> list[Comparison]:
    """Run every entry through the model."""
    out = []
    for length, (ids, reference) in sorted(pairs.items()):
        ours = model.logits(ids).cpu().double()
        wanted = reference.double()
        out.append(
            Comparison(
                f"logits_{length}", tuple(ids.shape), float((ours - wanted).abs().max()), float(wanted.abs().max())
            )
        )
    return out
