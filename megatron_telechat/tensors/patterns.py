"""Patterns over the global keys of tensors: a glob, and ranges of decoder layers."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass

from megatron_telechat.tensors.table import layer_key, layer_of

_IN_LAYERS = re.compile(re.escape(layer_key(0, "")).replace("0", r"([\d,-]+)") + "(.+)")
"""``decoder.layers.<numbers and ranges>.<glob>``."""


def layer_numbers(text: str) -> frozenset[int]:
    """The layers of a list of numbers and ranges such as ``0-3,7``; both ends belong to a range.

    Raises:
        ValueError: it is none, or one of its ranges is empty.
    """
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers = range(int(first), int(last or first) + 1)
        if not numbers:
            raise ValueError(f"the range {part} is empty")
        found.update(numbers)
    return frozenset(found)


@dataclass(frozen=True)
class TensorPattern:
    """Names tensors of the model by layer, by key, or both.

    Attributes:
        layers: the decoder layers it names; None: all tensors, those of no layer too.
        glob: of the keys, as in a shell (``*``, ``?``, ``[a-z]``), where ``*`` spans dots; None: all.
        within: the glob is of the name within the layer, not of the whole key.
    """

    layers: frozenset[int] | None = None
    glob: str | None = None
    within: bool = False

    @classmethod
    def of(cls, text: str) -> TensorPattern:
        """A pattern as it is typed: a glob of keys, or ``decoder.layers.0-11,20.*`` with ranges of layers.

        Raises:
            ValueError: the layers cannot be read.
        """
        found = _IN_LAYERS.fullmatch(text)
        return cls(glob=text) if found is None else cls(layer_numbers(found[1]), found[2], within=True)

    def fits(self, key: str) -> bool:
        """Whether it names the tensor of the model with this key."""
        layer = layer_of(key)
        if self.layers is not None and layer not in self.layers:
            return False
        name = key.removeprefix(layer_key(layer, "")) if self.within and layer is not None else key
        return self.glob is None or fnmatch.fnmatchcase(name, self.glob)
