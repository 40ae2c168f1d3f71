"""Which datasets a run draws from, and in what proportion. No torch here: --dry-run uses it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_telechat.config.data_formats import INDEXED, DataFormat, data_format
from megatron_telechat.config.data_names import data_json_entries
from megatron_telechat.config.schema import DataConfig
from megatron_telechat.errors import ConfigError

SPLITS: tuple[str, ...] = ("train", "valid", "test")


@dataclass(frozen=True)
class Blend:
    """Prefixes and their weights.

    Attributes:
        prefixes: paths without suffix.
        weights: one a prefix, or None: then each dataset is read once at most.
        per_token: the weights count copies of a dataset (TeleChat's data.json), so its share of the samples is
            weight x tokens; otherwise a weight is the share itself.
    """

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    per_token: bool = False


Share = tuple[float, float]
"""Begin and end of a part of a dataset's sequences, in [0, 1]."""


@dataclass(frozen=True)
class Split:
    """What one of train, valid and test is drawn from."""

    name: str
    blend: Blend
    share: Share


@dataclass(frozen=True)
class DataPlan:
    """What the data section of a run says, read once: data.json included.

    Attributes:
        format: of all datasets of the run.
        blends: for train, valid and test; None where there is none.
        shares: of the sequences of each dataset, for the same; None where there is none.
    """

    format: DataFormat
    blends: tuple[Blend | None, ...]
    shares: tuple[Share | None, ...]

    @property
    def splits(self) -> dict[str, Split]:
        """The splits that there are, by name."""
        parts = zip(SPLITS, self.blends, self.shares, strict=True)
        return {name: Split(name, blend, share) for name, blend, share in parts if blend and share}

    @property
    def names(self) -> tuple[str, ...]:
        """The datasets of the run, each once, in the order they are named."""
        return tuple(dict.fromkeys(name for blend in self.blends if blend for name in blend.prefixes))


def data_plan(data: DataConfig) -> DataPlan:
    """What the data section says. The plan of a mock stream has no splits.

    Raises:
        ConfigError: no data, contradictory sources, a bad weight or split.
        DataError: data.json is missing or not of the form {prefix: weight}.
    """
    format = data_format(data)
    if data.mock_data:
        return DataPlan(format, (None,) * len(SPLITS), (None,) * len(SPLITS))
    ways = [name for name in ("data_path", "data_json", "train_data_path") if getattr(data, name)]
    if not ways:
        raise ConfigError(
            "no training data",
            fix="give --data-path, --data-json or --train-data-path (or --mock-data for a smoke test)",
        )
    if len(ways) > 1:
        raise ConfigError(f"{' and '.join(ways)} contradict each other", fix="keep one of them")
    if data.train_data_path:
        blends = (
            parse_blend(data.train_data_path, "train_data_path", format),
            parse_blend(data.valid_data_path, "valid_data_path", format) if data.valid_data_path else None,
            None,
        )
        return DataPlan(format, blends, tuple((0.0, 1.0) if blend else None for blend in blends))
    if data.valid_data_path:
        raise ConfigError(
            f"valid_data_path needs train_data_path and cannot be combined with {ways[0]}",
            fix="give --train-data-path, or drop --valid-data-path and let --split cut the validation off",
        )
    if data.data_json:
        blend = read_data_json(data.data_json, format)
    else:
        blend = parse_blend(data.data_path, "data_path", format)
    shares = split_shares(data.split)
    return DataPlan(format, tuple(blend if share else None for share in shares), shares)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def parse_blend(items: Sequence[str], where: str, format: DataFormat = INDEXED) -> Blend:
    """Prefixes alone, or weights and prefixes in turn (Megatron's rule).

    Args:
        where: the field that holds them, for messages.
        format: of the data that is named.

    Raises:
        ConfigError: weights for some prefixes only, or a weight that is not positive.
    """
    numbers = [_number(item) for item in items]
    if all(number is None for number in numbers):
        return Blend(tuple(map(format.prefix, items)))
    weights = tuple(number for number in numbers[0::2] if number is not None)
    if len(items) % 2 or len(weights) < len(items) // 2:
        raise ConfigError(
            f"{where} mixes weights and bare prefixes: {' '.join(items)}",
            where,
            "give each prefix a weight (0.7 en 0.3 zh), or none",
        )
    return _weighted(tuple(items[1::2]), weights, where, format, per_token=False)


def _weighted(
    prefixes: tuple[str, ...], weights: tuple[float, ...], where: str, format: DataFormat, per_token: bool
) -> Blend:
    for prefix, weight in zip(prefixes, weights, strict=True):
        if not 0 < weight < float("inf"):
            raise ConfigError(
                f"weight {weight:g} of {prefix} is not a positive number", where, "drop the prefix or fix the weight"
            )
    return Blend(tuple(map(format.prefix, prefixes)), weights, per_token)


def read_data_json(path: str, format: DataFormat = INDEXED) -> Blend:
    """The blend of a data.json, whose weights count copies of a dataset.

    Args:
        format: of the data that is named.

    Raises:
        DataError: it cannot be read (`config.data_names.data_json_entries`).
    """
    names, weights = zip(*data_json_entries(path, format), strict=True)
    return _weighted(names, weights, path, format, per_token=True)


def split_shares(split: str) -> tuple[Share | None, ...]:
    """``969,30,1`` as (begin, end) of train, valid and test in [0, 1]; None for a share of 0.

    Raises:
        ConfigError: not one to three numbers >= 0 with a positive sum.
    """
    parts = [part for part in re.split(r"[,\s]+", split.strip()) if part]
    numbers = [number for number in map(_number, parts) if number is not None and 0 <= number < float("inf")]
    if not 1 <= len(parts) <= 3 or len(numbers) < len(parts) or sum(numbers) <= 0:
        raise ConfigError(f"split={split!r} is not one to three numbers such as 969,30,1", "split", "--split 969,30,1")
    numbers += [0.0] * (3 - len(numbers))
    total = sum(numbers)
    edges = [0.0]
    for number in numbers:
        edges.append(edges[-1] + number / total)
    return tuple(
        (begin, end) if number > 0 else None for number, begin, end in zip(numbers, edges, edges[1:], strict=False)
    )
