"""Which datasets a run draws from, and in what proportion. No torch here: --dry-run uses it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_telechat.config.data_names import data_json_entries, dataset_prefix
from megatron_telechat.config.schema import DataConfig
from megatron_telechat.errors import ConfigError

SPLITS = ("train", "valid", "test")


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


@dataclass(frozen=True)
class DataPlan:
    """For train, valid and test: the blend, and the share (begin, end) of its sequences; None where there is none."""

    blends: tuple[Blend | None, Blend | None, Blend | None]
    shares: tuple[tuple[float, float] | None, ...]


def data_plan(data: DataConfig) -> DataPlan:
    """What the data section says.

    Raises:
        ConfigError: no data, contradictory sources, a bad weight or split.
        DataError: data.json is missing or not of the form {prefix: weight}.
    """
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
            parse_blend(data.train_data_path, "train_data_path", data.sft),
            parse_blend(data.valid_data_path, "valid_data_path", data.sft) if data.valid_data_path else None,
            None,
        )
        return DataPlan(blends, tuple((0.0, 1.0) if blend else None for blend in blends))
    if data.valid_data_path:
        raise ConfigError(
            f"valid_data_path needs train_data_path and cannot be combined with {ways[0]}",
            fix="give --train-data-path, or drop --valid-data-path and let --split cut the validation off",
        )
    if data.data_json:
        blend = read_data_json(data.data_json, data.sft)
    else:
        blend = parse_blend(data.data_path, "data_path", data.sft)
    shares = split_shares(data.split)
    return DataPlan(tuple(blend if share else None for share in shares), shares)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def parse_blend(items: Sequence[str], where: str, dialogs: bool = False) -> Blend:
    """Prefixes alone, or weights and prefixes in turn (Megatron's rule).

    Args:
        dialogs: the prefixes are whole paths of jsonl files.

    Raises:
        ConfigError: weights for some prefixes only, or a weight that is not positive.
    """
    weights = [_number(item) for item in items[0::2]]
    if len(items) % 2 or all(weight is None for weight in weights):
        if any(_number(item) is not None for item in items):
            raise ConfigError(
                f"{where} mixes weights and bare prefixes: {' '.join(items)}",
                where,
                "give each prefix a weight (0.7 en 0.3 zh), or none",
            )
        return Blend(tuple(items) if dialogs else tuple(dataset_prefix(item) for item in items))
    if any(weight is None for weight in weights):
        raise ConfigError(
            f"{where} mixes weights and bare prefixes: {' '.join(items)}",
            where,
            "give each prefix a weight (0.7 en 0.3 zh), or none",
        )
    return _weighted(tuple(items[1::2]), tuple(weights), where, per_token=False, dialogs=dialogs)


def _weighted(
    prefixes: tuple[str, ...], weights: tuple[float, ...], where: str, per_token: bool, dialogs: bool
) -> Blend:
    for prefix, weight in zip(prefixes, weights, strict=True):
        if not 0 < weight < float("inf"):
            raise ConfigError(
                f"weight {weight:g} of {prefix} is not a positive number", where, "drop the prefix or fix the weight"
            )
    return Blend(prefixes if dialogs else tuple(dataset_prefix(prefix) for prefix in prefixes), weights, per_token)


def read_data_json(path: str, dialogs: bool = False) -> Blend:
    """The blend of a data.json, whose weights count copies of a dataset.

    Args:
        dialogs: the paths are those of jsonl files (fine-tuning), not prefixes of indexed datasets.

    Raises:
        DataError: it cannot be read (`config.data_names.data_json_entries`).
    """
    names, weights = zip(*data_json_entries(path, dialogs), strict=True)
    return _weighted(names, weights, path, True, dialogs)


def split_shares(split: str) -> tuple[tuple[float, float] | None, ...]:
    """``969,30,1`` as (begin, end) of train, valid and test in [0, 1]; None for a share of 0.

    Raises:
        ConfigError: not one to three numbers >= 0 with a positive sum.
    """
    numbers = [_number(part) for part in re.split(r"[,\s]+", split.strip()) if part]
    if not 1 <= len(numbers) <= 3 or any(n is None or not 0 <= n < float("inf") for n in numbers) or sum(numbers) <= 0:
        raise ConfigError(f"split={split!r} is not one to three numbers such as 969,30,1", "split", "--split 969,30,1")
    numbers += [0.0] * (3 - len(numbers))
    total = sum(numbers)
    edges = [0.0]
    for number in numbers:
        edges.append(edges[-1] + number / total)
    return tuple(
        (begin, end) if number > 0 else None for number, begin, end in zip(numbers, edges, edges[1:], strict=False)
    )
