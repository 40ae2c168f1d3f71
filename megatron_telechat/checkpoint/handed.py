"""A manifest as rank 0 hands it to the others: the lists of boxes stay packed until a tensor is asked for. No torch.

The manifest of thousands of ranks is hundreds of megabytes of JSON, and a rank needs the boxes of a few hundred
tensors. So one rank reads and checks it; the others get each tensor's boxes as bytes, and unpack those they read.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from megatron_telechat.checkpoint.manifest import Manifest, StoredBox, TensorEntry, usual_name
from megatron_telechat.tensors.boxes import Box


class PackedBoxes(Sequence[StoredBox]):
    """The boxes of one tensor as bytes; looking at one unpacks them all.

    Args:
        key: the tensor.
        axes: number of its axes.
        files: names of all files of the checkpoint; shared by all tensors.
        places: for each box the number of its file, then its offset and its shape.
        names: of the boxes in their files, where they are not the usual ones.
    """

    def __init__(self, key: str, axes: int, files: Sequence[str], places: bytes, names: tuple[str, ...] | None):
        self._key, self._axes, self._files, self._places, self._names = key, axes, files, places, names

    @classmethod
    def of(cls, key: str, entry: TensorEntry, numbers: dict[str, int], files: Sequence[str]) -> PackedBoxes:
        """Pack the boxes of a tensor; ``numbers`` has the place of each name in ``files``."""
        places = array("q")
        for stored in entry.boxes:
            places.append(numbers[stored.file])
            places.extend(stored.box.offset)
            places.extend(stored.box.shape)
        names = tuple(stored.name for stored in entry.boxes)
        usual = all(stored.name == usual_name(key, stored.box.offset) for stored in entry.boxes)
        return cls(key, len(entry.shape), files, places.tobytes(), None if usual else names)

    def __len__(self) -> int:
        return len(self._places) // (8 * (1 + 2 * self._axes))

    def __getitem__(self, index):
        return self._boxes[index]

    @cached_property
    def _boxes(self) -> tuple[StoredBox, ...]:
        places, width, axes = array("q"), 1 + 2 * self._axes, self._axes
        places.frombytes(self._places)
        found = []
        for number in range(len(self)):
            file, *box = places[number * width : (number + 1) * width]
            offset, shape = tuple(box[:axes]), tuple(box[axes:])
            name = usual_name(self._key, offset) if self._names is None else self._names[number]
            found.append(StoredBox(self._files[file], name, Box(offset, shape)))
        return tuple(found)


def to_hand_out(manifest: Manifest) -> Manifest:
    """The same manifest with its boxes packed: small to send, quick to receive."""
    files = tuple(manifest.files)
    numbers = {name: number for number, name in enumerate(files)}
    tensors = {
        key: replace(entry, boxes=PackedBoxes.of(key, entry, numbers, files)) for key, entry in manifest.tensors.items()
    }
    return replace(manifest, tensors=tensors)
