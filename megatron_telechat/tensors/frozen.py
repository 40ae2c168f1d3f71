"""Which tensors of a model a run does not train."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

from megatron_telechat.config.schema import ModelConfig, RunConfig
from megatron_telechat.errors import ConfigError, Problem
from megatron_telechat.tensors.patterns import TensorPattern
from megatron_telechat.tensors.table import Table, tensor_table

_SHAPE = "patterns over the keys of docs/checkpoints.md, such as 'decoder.layers.0-11.*'"


def frozen_keys(run: RunConfig) -> frozenset[str]:
    """Keys of the tensors that keep their values: those that freeze names and freeze_except does not.

    freeze_except alone freezes all other tensors.

    Raises:
        ConfigError: a pattern cannot be read or names nothing, or nothing is left to train.
    """
    return _frozen(run.model, run.training.freeze, run.training.freeze_except)


def trained_part(run: RunConfig, table: Table) -> Table:
    """The rows of a table that the run trains."""
    frozen = frozen_keys(run)
    return {key: spec for key, spec in table.items() if key not in frozen} if frozen else table


def frozen_parameters(run: RunConfig) -> int:
    """Parameters of the whole model that keep their values."""
    frozen = frozen_keys(run)
    return sum(spec.numel for key, spec in tensor_table(run.model).items() if key in frozen) if frozen else 0


@cache
def _frozen(model: ModelConfig, freeze: tuple[str, ...], spare: tuple[str, ...]) -> frozenset[str]:
    if not freeze and not spare:
        return frozenset()
    problems: list[Problem] = []
    keys = tuple(tensor_table(model))
    named = frozenset(_named(freeze, keys, "freeze", problems)) if freeze else frozenset(keys)
    spared = frozenset(_named(spare, sorted(named), "freeze_except", problems))
    if not problems and not (frozenset(keys) - named | spared):
        problems.append(Problem("freeze names every tensor: there is nothing to train", "freeze", "--freeze-except"))
    if problems:
        raise ConfigError(problems)
    return named - spared


def _named(patterns: Sequence[str], keys: Sequence[str], field: str, problems: list[Problem]) -> Iterator[str]:
    """The keys that some pattern names."""
    for text in patterns:
        try:
            pattern = TensorPattern.of(text)
        except ValueError as error:
            problems.append(Problem(f"{field}: {text!r} names no layers: {error}", field, _SHAPE))
            continue
        found = [key for key in keys if pattern.fits(key)]
        if not found:
            among = " that is frozen" if field == "freeze_except" else ""
            problems.append(Problem(f"{field}: {text!r} names no tensor of the model{among}", field, _SHAPE))
        yield from found
