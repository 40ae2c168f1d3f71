"""A tree of random-generator state as JSON and tensors, and back. Nothing is pickled."""

from __future__ import annotations

from typing import Any

import torch

_LONG = 32  # longer lists of whole numbers become tensors, to keep the manifest small


def flatten(state: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """(JSON value, tensors by name) of nested dicts, lists, tuples, numbers, tensors and numpy arrays."""
    tensors: dict[str, torch.Tensor] = {}
    return _flatten(state, "rng", tensors), tensors


def _flatten(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    import numpy

    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu()
        return {"tensor": name}
    if isinstance(value, numpy.ndarray):
        tensors[name] = torch.from_numpy(value.astype(numpy.int64))
        return {"integers": name}
    if isinstance(value, dict):
        return {"dict": {key: _flatten(item, f"{name}/{key}", tensors) for key, item in value.items()}}
    if isinstance(value, (list, tuple)):
        if len(value) > _LONG and all(type(item) is int for item in value):
            tensors[name] = torch.tensor(value, dtype=torch.int64)
            return {"integers": name}
        return {"list": [_flatten(item, f"{name}/{number}", tensors) for number, item in enumerate(value)]}
    return {"value": value.item() if isinstance(value, numpy.generic) else value}


def unflatten(state: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of :func:`flatten`; tuples and arrays come back as lists."""
    ((kind, value),) = state.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "integers":
        return tensors[value].tolist()
    if kind == "dict":
        return {key: unflatten(item, tensors) for key, item in value.items()}
    if kind == "list":
        return [unflatten(item, tensors) for item in value]
    return value
