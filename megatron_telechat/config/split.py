"""Megatron's ways to split the layers over a pipeline without a layout string, as arithmetic.

Held to megatron-core's own (`TransformerConfig.__post_init__`, `get_num_layers_to_build`,
`get_transformer_layer_offset`) by tests/config/test_split.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_telechat.errors import ConfigError


@dataclass(frozen=True)
class SplitFlags:
    """What Megatron's flags say of an uneven split.

    Attributes:
        first, last: decoder layers of the first and of the last pipeline rank, all its virtual stages together
            (--decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers).
        embedding, loss: count as one layer each, in the first and in the last virtual stage
            (--account-for-embedding-in-pipeline-split, --account-for-loss-in-pipeline-split).
    """

    first: int | None = None
    last: int | None = None
    embedding: bool = False
    loss: bool = False

    def __bool__(self) -> bool:
        return self.sets_ends or self.embedding or self.loss

    @property
    def sets_ends(self) -> bool:
        """Whether the first or the last rank has a number of layers of its own."""
        return self.first is not None or self.last is not None

    @property
    def counted(self) -> int:
        """Layers that are counted beside those of the decoder."""
        return self.embedding + self.loss


def split_counts(layers: int, stages: int, virtual_stages: int, split: SplitFlags) -> tuple[int, ...]:
    """Decoder layers of every virtual stage, in the order a token passes them.

    Args:
        stages, virtual_stages: pipeline ranks, and virtual stages on each.

    Raises:
        ConfigError: the layers do not split so; says which number does not divide.
    """
    if split.sets_ends and split.counted:
        raise ConfigError(
            "a number of layers for the first or last rank cannot be combined with an embedding or loss that "
            "counts as a layer"
        )
    if None not in (split.first, split.last) and stages == 2 and virtual_stages > 1:
        # Megatron-Core divides by the number of ranks between there.
        raise ConfigError("of two pipeline ranks with virtual stages, only one may have its own number of layers")
    rows = _ends(layers, stages, split) if split.sets_ends else _accounted(layers, stages, split)
    for rank, row in enumerate(rows):
        if row % virtual_stages:
            whole = f"the {_counted(row, split)} of pipeline rank {rank}"
            raise ConfigError(f"{whole} do not split into {virtual_stages} virtual stages")
    counts = [row // virtual_stages for row in rows] * virtual_stages
    counts[0] -= split.embedding
    counts[-1] -= split.loss
    if min(counts) < 0:
        raise ConfigError(
            f"{layers} layers are too few for {stages * virtual_stages} virtual stages with embedding and loss as "
            "layers"
        )
    return tuple(counts)


def _accounted(layers: int, stages: int, split: SplitFlags) -> list[int]:
    """Layers of every pipeline rank, what is counted as one included."""
    share, rest = divmod(layers + split.counted, stages)
    if rest:
        raise ConfigError(f"{_counted(layers + split.counted, split)} do not split over {stages} pipeline ranks")
    return [share] * stages


def _ends(layers: int, stages: int, split: SplitFlags) -> list[int]:
    """Layers of every pipeline rank where the first or the last has its own number."""
    own = [size for size in (split.first, split.last) if size is not None]
    middle, rest = stages - len(own), layers - sum(own)
    if min(own) < 1:
        raise ConfigError("the first and the last pipeline rank need at least one layer")
    # Megatron-Core takes some of these, and then builds fewer layers than the model has.
    if middle < 0 or rest < 0 or bool(rest) != bool(middle):
        raise ConfigError(f"{rest} of {layers} layers are left for the {max(middle, 0)} pipeline ranks between")
    if middle and rest % middle:
        raise ConfigError(
            f"the {rest} layers that are left of {layers} do not split over the {middle} other pipeline ranks"
        )
    first = [] if split.first is None else [split.first]
    last = [] if split.last is None else [split.last]
    return [*first, *([rest // middle] * middle if middle else []), *last]


def num_virtual_stages(layers: int, stages: int, each: int, split: SplitFlags = SplitFlags()) -> int:
    """Virtual stages of a pipeline rank where each has `each` layers (--num-layers-per-virtual-pipeline-stage).

    Raises:
        ConfigError: the layers do not split so.
    """
    if split.sets_ends:
        raise ConfigError(
            "the layers of a virtual stage do not determine the number of virtual stages when the first or last rank "
            "has its own number of layers"
        )
    row = _accounted(layers, stages, split)[0]
    if row % each:
        raise ConfigError(f"the {_counted(row, split)} of a pipeline rank do not split into virtual stages of {each}")
    return row // each


def _counted(number: int, split: SplitFlags) -> str:
    ends = " and ".join(["the embedding"] * split.embedding + ["the loss"] * split.loss)
    return f"{number} layers ({ends} counted)" if ends else f"{number} layers"
