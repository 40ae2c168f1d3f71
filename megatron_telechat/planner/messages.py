"""What the processes of a search say to each other, as JSON: data only, so that nothing that is read can run code."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

_CLASSES: dict[str, type] = {}
_KIND = "kind"
_ARRAY = "array"


def register(*classes: type) -> None:
    """Let messages hold dataclasses of these kinds."""
    _CLASSES.update({one.__name__: one for one in classes})


def encode(message: Any) -> bytes:
    """Of registered dataclasses, tuples, arrays of one dimension, numbers, texts and None; numbers stay the same to the
    last bit."""
    return json.dumps(_plain(message)).encode()


def decode(data: bytes) -> Any:
    """What was encoded; lists are tuples."""
    return _whole(json.loads(data))


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {_KIND: _ARRAY, "values": value.tolist()}
    if is_dataclass(value):
        name = type(value).__name__
        assert _CLASSES.get(name) is type(value), f"{name} is not registered"
        return {_KIND: name, **{field.name: _plain(getattr(value, field.name)) for field in fields(value)}}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return value


def _whole(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_whole(one) for one in value)
    if not isinstance(value, dict):
        return value
    kind = value.pop(_KIND)
    if kind == _ARRAY:
        return np.array(value["values"])
    return _CLASSES[kind](**{name: _whole(one) for name, one in value.items()})
