"""In which order a run reads its samples, and how far it has read. Checkpoints keep both. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_telechat.config.data_formats import data_format
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.data.blend import SPLITS
from megatron_telechat.errors import CheckpointError, ConfigError

EPOCHS, MEGATRON = "epochs", "megatron"
SAVED_AS = "sample_order"
"""Name of the order among the extras of a checkpoint."""
_VERSION = 1


@dataclass(frozen=True)
class SampleOrder:
    """The rule that decides the samples of a run. It is settled once, at the first start.

    Attributes:
        kind: ``epochs``: each epoch of a source is shuffled on its own, so that the order has no end and does not
            depend on the length of the run. ``megatron``: Megatron's order for the numbers in ``built_for``, then
            ``epochs``.
        built_for: for each split, the samples that Megatron's order was made for.
    """

    kind: str = EPOCHS
    built_for: Mapping[str, int] = field(default_factory=dict)

    def saved(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON."""
        return {SAVED_AS: {"version": _VERSION, "kind": self.kind, "built_for": dict(self.built_for)}}


@dataclass(frozen=True)
class Progress:
    """How far a run has read, and in which order.

    Attributes:
        steps: optimizer steps done.
        consumed_samples: training samples they consumed.
        order: the order so far; None for a run that begins.
    """

    steps: int = 0
    consumed_samples: int = 0
    order: SampleOrder | None = None


def samples_needed(run: RunConfig, progress: Progress = Progress()) -> tuple[int, int, int]:
    """Samples for train, from the first of the run to the last, and of one evaluation for valid and test (0: not used).

    The batch may have been another one before a resume: what was consumed and what the steps to come need are counted
    apart.
    """
    batch = run.training.global_batch_size
    # Validation data of its own is evaluated at the end, also where no interval is given.
    evaluates = run.evaluation.eval_interval or run.data.valid_data_path
    evaluation = run.evaluation.eval_iters * batch if evaluates else 0
    ahead = max(0 if progress.steps else 1, run.training.train_iters - progress.steps)
    return progress.consumed_samples + ahead * batch, evaluation, evaluation


def order_of(run: RunConfig, progress: Progress = Progress()) -> SampleOrder:
    """The order that a run reads in: the one it began with."""
    return progress.order or _order_of_new_run(run)


def _order_of_new_run(run: RunConfig) -> SampleOrder:
    if run.data.data_order == EPOCHS or not data_format(run.data).megatrons_order:
        return SampleOrder()
    return _megatrons(run)


def _megatrons(run: RunConfig) -> SampleOrder:
    needed = dict(zip(SPLITS, samples_needed(run), strict=True))
    return SampleOrder(MEGATRON, {name: number for name, number in needed.items() if number})


def resumed_order(run: RunConfig, extra: Mapping[str, Any], saved: RunConfig | None, where: str) -> SampleOrder:
    """The order of the run that wrote a checkpoint.

    Args:
        run: the run that goes on.
        extra: the extras of the checkpoint. One without an order was read in Megatron's, for the number of samples of
            its run.
        saved: the configuration of that run; None where this program cannot read it.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: the order is not known here.
        ConfigError: the run asks for Megatron's order and the checkpoint was not begun with it.
    """
    order = _read(extra, where)
    if not data_format(run.data).megatrons_order:
        return SampleOrder()
    if order is None:
        if saved is None and not run.checkpoint.allow_data_change:
            raise CheckpointError(
                "the checkpoint does not say in which order its samples were read, and its configuration cannot be "
                "read",
                where,
                "continue with the release that wrote it, or --allow-data-change: some samples are then read twice, "
                "others never",
            )
        order = SampleOrder() if saved is None else _megatrons(saved)
    if run.data.data_order == MEGATRON and order.kind != MEGATRON:
        raise ConfigError(
            f"data_order=megatron, but the run began with data_order={order.kind}: some samples would be read twice, "
            f"others never",
            where,
            "drop --data-order: a run keeps the order it began with",
        )
    return order


def _read(extra: Mapping[str, Any], where: str) -> SampleOrder | None:
    stored = extra.get(SAVED_AS)
    if stored is None:
        return None
    try:
        if stored["version"] != _VERSION or stored["kind"] not in (EPOCHS, MEGATRON):
            raise ValueError(f"version {stored['version']}, kind {stored['kind']}")
        built_for = {str(split): int(number) for split, number in stored["built_for"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the checkpoint names an order of samples that this program does not know ({error})",
            where,
            "continue with the release that wrote it",
        ) from error
    return SampleOrder(stored["kind"], built_for)
