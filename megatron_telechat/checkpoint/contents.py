"""What is in a checkpoint, whatever layout saved it: digests, norms, and the differences of two.

Tensors are read in slices along their first axis, so that memory does not grow with them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_telechat.checkpoint.averages import entries
from megatron_telechat.checkpoint.files import dtype_named
from megatron_telechat.checkpoint.format import CheckpointReader
from megatron_telechat.checkpoint.manifest import COMPANIONS, TensorEntry

_SLICE_BYTES = 64 << 20
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Facts:
    """The values of a global tensor.

    Attributes:
        digest: BLAKE2b, 16 bytes, of the tensor's bytes in row-major order, little-endian, as stored; the same in every
            layout.
        norm: root of the sum of squares, in fp64.
        largest: largest absolute value.
        not_finite: elements that are NaN or infinite; they are left out of the two numbers above.
    """

    digest: str
    norm: float
    largest: float
    not_finite: int


@dataclass(frozen=True)
class Difference:
    """How a global tensor differs between two checkpoints.

    Attributes:
        what: the reason in words.
        elements: how many differ in their bits; 0 where they could not be compared.
        largest: largest absolute difference of the finite ones.
        at: index of that element.
    """

    key: str
    what: str
    elements: int = 0
    largest: float = 0.0
    at: tuple[int, ...] = ()


def sizes_by_kind(reader: CheckpointReader, pieces: Mapping[str, TensorEntry] | None = None) -> dict[str, int]:
    """Bytes of the values: ``model``, ``optimizer/<name>``, the random generators, and the files of Hugging Face.

    Args:
        pieces: tensors of which the files hold a piece, and the reader none.
    """
    sizes: dict[str, int] = {}
    for key, entry in {**reader.entries, **(pieces or {})}.items():
        kind = key.split("/")[0] if key.startswith("model/") else "/".join(key.split("/")[:2])
        sizes[kind] = sizes.get(kind, 0) + elements_there(entry) * dtype_named(entry.dtype).itemsize
    files = reader.manifest.files
    companions = sum(entry.size for name, entry in files.items() if name.startswith(f"{COMPANIONS}/"))
    if companions:
        sizes[COMPANIONS] = companions
    sizes["headers and generators"] = sum(entry.size for entry in files.values()) - sum(sizes.values())
    return sizes


def elements_there(entry: TensorEntry) -> int:
    """Elements of a tensor that the files hold: all, but for a piece of one."""
    return sum(stored.box.numel for stored in entry.boxes)


def facts(reader: CheckpointReader, key: str) -> Facts:
    """Read a tensor whole. Raises CheckpointError."""
    digest, squares, largest, not_finite = hashlib.blake2b(digest_size=16), 0.0, 0.0, 0
    for _, values in _slices(reader, key):
        digest.update(_as_bits(values).numpy().tobytes())
        numbers = values.reshape(-1).double()
        finite = numbers.isfinite()
        not_finite += int((~finite).sum())
        numbers = torch.where(finite, numbers, 0.0)
        squares += float(numbers.square().sum())
        largest = max(largest, float(numbers.abs().max()))
    return Facts(digest.hexdigest(), math.sqrt(squares), largest, not_finite)


def differences(one: CheckpointReader, other: CheckpointReader, keys: Sequence[str]) -> Iterator[Difference]:
    """What differs, tensor by tensor, in the order of ``keys``. Raises CheckpointError."""
    for key in keys:
        if key not in one.entries or key not in other.entries:
            yield Difference(key, f"only in {(one if key in one.entries else other).path}")
            continue
        shapes = tuple(one.entries[key].shape), tuple(other.entries[key].shape)
        if shapes[0] != shapes[1]:
            yield Difference(key, f"shape {shapes[0]} and {shapes[1]}")
            continue
        found = _difference(one, other, key)
        if found is not None:
            yield found


def _difference(one: CheckpointReader, other: CheckpointReader, key: str) -> Difference | None:
    dtypes = one.dtype(key), other.dtype(key)
    elements, largest, at = 0, 0.0, ()
    for (start, first), (_, second) in zip(_slices(one, key), _slices(other, key, one), strict=True):
        if dtypes[0] == dtypes[1]:
            changed = _as_bits(first) != _as_bits(second)
        else:
            changed = first.reshape(-1).double() != second.reshape(-1).double()
        if not changed.any():
            continue
        elements += int(changed.sum())
        apart = (first.reshape(-1).double() - second.reshape(-1).double()).abs()
        apart = torch.where(apart.isfinite(), apart, 0.0)
        place = int(apart.argmax())
        if float(apart[place]) > largest:
            index: list[int] = [int(number) for number in torch.unravel_index(torch.tensor(place), first.shape)]
            largest, at = float(apart[place]), tuple([index[0] + start, *index[1:]] if index else [])
    if dtypes[0] != dtypes[1]:
        return Difference(key, f"dtype {dtypes[0]} and {dtypes[1]}", elements, largest, at)
    return Difference(key, "values differ", elements, largest, at) if elements else None


def _as_bits(values: torch.Tensor) -> torch.Tensor:
    """1-D, integers of the same width: NaN equals itself, and 0.0 is not -0.0."""
    flat = values.contiguous().reshape(-1)
    return flat.view(_BITS[values.element_size()])


def _slices(
    reader: CheckpointReader, key: str, sized_by: CheckpointReader | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows) of a tensor; the rows of ``sized_by``, whose dtype may be another, fit beside them."""
    shape = tuple(reader.entries[key].shape)
    if not shape:
        yield 0, reader.read(key)
        return
    width = max((sized_by or reader).dtype(key).itemsize, 1)
    rows = max(1, _SLICE_BYTES // (width * max(1, math.prod(shape[1:]))))
    for start in range(0, shape[0], rows):
        count = min(rows, shape[0] - start)
        yield start, reader.read(key, (start, *[0] * (len(shape) - 1)), (count, *shape[1:]))


def overview(reader: CheckpointReader, pieces: Mapping[str, TensorEntry] | None = None) -> dict[str, Any]:
    """What the manifest says, for a person or as JSON.

    Args:
        pieces: see `sizes_by_kind`.
    """
    manifest = reader.manifest
    tensors = {**reader.entries, **(pieces or {})}
    weights = [entry for key, entry in tensors.items() if key.startswith("model/")]
    return {
        "path": str(reader.path),
        "step": manifest.step,
        "consumed_samples": manifest.consumed_samples,
        "save": manifest.save,
        "digest": manifest.digest,
        "lineage": manifest.lineage,
        "topology": dict(manifest.topology),
        "versions": dict(manifest.versions),
        "optimizer": manifest.optimizer,
        "averages": dict(entries(manifest.extra)),
        "files": len(manifest.files),
        "tensors": len(tensors),
        "parameters": sum(math.prod(entry.shape) for entry in weights),
        "bytes": sizes_by_kind(reader, pieces),
    }
