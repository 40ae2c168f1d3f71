"""In which order a run reads its samples, and how far it has read. Checkpoints keep both. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from megatron_telechat.config.data_formats import data_format
from megatron_telechat.config.run_stages import Position, RunStages, Span
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.data.blend import SPLITS
from megatron_telechat.errors import CheckpointError, ConfigError

EPOCHS, MEGATRON = "epochs", "megatron"
SAVED_AS = "sample_order"
"""Name of the order among the extras of a checkpoint."""
_VERSION = 1
_WITH_LEGS = 2


@dataclass(frozen=True)
class Leg:
    """A part of a run that reads samples of one length.

    Attributes:
        seq_length: tokens of a sample.
        begin: samples of the run that come before it.
        ends: the sample of the run at which another length was to follow, as it began; None: none was. It then reads
            all of the data before that place, in any order, and nothing behind it: what is left is whole.
    """

    seq_length: int
    begin: int = 0
    ends: int | None = None


@dataclass(frozen=True)
class SampleOrder:
    """The rule that decides the samples of a run. It is settled once, at the first start.

    Attributes:
        kind: ``epochs``: each epoch of a source is shuffled on its own, so that the order has no end and does not
            depend on the length of the run. ``megatron``: Megatron's order for the numbers in ``built_for``, then
            ``epochs``.
        built_for: for each split, the samples that Megatron's order was made for.
        legs: the lengths of a sample, in order; empty where there was one only and no other is planned. What a leg has
            not read is cut anew for the next one.
    """

    kind: str = EPOCHS
    built_for: Mapping[str, int] = field(default_factory=dict)
    legs: tuple[Leg, ...] = ()

    def saved(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON."""
        body = {"version": _VERSION, "kind": self.kind, "built_for": dict(self.built_for)}
        if self.legs:
            # A program that does not know legs must not read on in the order of one length.
            body |= {"version": _WITH_LEGS, "legs": [asdict(leg) for leg in self.legs]}
        return {SAVED_AS: body}

    def tokens(self, samples: int, seq_length: int) -> int:
        """Tokens of the first samples of the run.

        Args:
            seq_length: of a run of one length.
        """
        legs = self.legs or (Leg(seq_length),)
        ends = [*(leg.begin for leg in legs[1:]), samples]
        return sum(max(0, min(end, samples) - leg.begin) * leg.seq_length for leg, end in zip(legs, ends, strict=True))

    def with_length(self, seq_length: int, samples: int, ends: int | None) -> SampleOrder:
        """The order of a run that goes on with samples of this length after so many samples."""
        legs = [leg for leg in self.legs if not leg.begin or leg.begin < samples]
        if not legs or legs[-1].seq_length == seq_length:
            return replace(self, legs=tuple(legs))
        if legs[-1].begin == samples:  # not a sample of it was read
            legs.pop()
        return replace(self, legs=(*legs, Leg(seq_length, samples, ends)))


@dataclass(frozen=True)
class Progress:
    """How far a run has read, and in which order.

    Attributes:
        steps: optimizer steps done.
        consumed_samples: training samples they consumed.
        order: the order so far; None for a run that begins.
        until: the step at which the samples that are asked for end; None: the end of the run.
        length_ends: the sample at which the length of a sample is to change next; None: never.
    """

    steps: int = 0
    consumed_samples: int = 0
    order: SampleOrder | None = None
    until: int | None = None
    length_ends: int | None = None


def samples_needed(run: RunConfig, progress: Progress = Progress()) -> tuple[int, int, int]:
    """Samples for train, from the first of the run to the last, and of one evaluation for valid and test (0: not used).

    The batch may have been another one before a resume: what was consumed and what the steps to come need are counted
    apart.
    """
    batch = run.training.global_batch_size
    # Validation data of its own is evaluated at the end, also where no interval is given.
    evaluates = run.evaluation.eval_interval or run.data.valid_data_path
    evaluation = run.evaluation.eval_iters * batch if evaluates else 0
    last = run.training.train_iters if progress.until is None else progress.until
    ahead = max(0 if progress.steps else 1, last - progress.steps)
    return progress.consumed_samples + ahead * batch, evaluation, evaluation


def progress_ahead(stages: RunStages, position: Position, order: SampleOrder | None) -> Iterator[tuple[Span, Progress]]:
    """The stages of a run from a place on, each with how far the run has read as it begins.

    Args:
        order: the order so far; None for a run that begins.
    """
    spans = stages.spans(position)
    for number, span in enumerate(spans):
        length = span.stage.run.training.seq_length
        others = (later.begin.samples for later in spans[number:] if later.stage.run.training.seq_length != length)
        until = None if span.end is None else span.end.step
        progress = Progress(span.begin.step, span.begin.samples, order, until, next(others, None))
        yield span, progress
        order = order_of(span.stage.run, progress)


def order_of(run: RunConfig, progress: Progress = Progress()) -> SampleOrder:
    """The order that a run reads in: the one it began with, with another leg where its samples have another length."""
    length, order = run.training.seq_length, progress.order or _order_of_new_run(run, progress)
    if not data_format(run.data).can_be_cut_anew:
        return order
    if progress.order is not None:
        return order.with_length(length, progress.consumed_samples, progress.length_ends)
    return order if progress.length_ends is None else replace(order, legs=(Leg(length, 0, progress.length_ends),))


def _order_of_new_run(run: RunConfig, progress: Progress) -> SampleOrder:
    if run.data.data_order == EPOCHS or not data_format(run.data).megatrons_order:
        return SampleOrder()
    return _megatrons(run, progress)


def _megatrons(run: RunConfig, progress: Progress = Progress()) -> SampleOrder:
    needed = dict(zip(SPLITS, samples_needed(run, progress), strict=True))
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
        order = SampleOrder(legs=() if order is None else order.legs)
    elif order is None:
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
    if order.legs or saved is None or saved.training.seq_length == run.training.seq_length:
        return order
    return replace(order, legs=(Leg(saved.training.seq_length),))


def saved_tokens(extra: Mapping[str, Any], samples: int, seq_length: int, where: str) -> int:
    """Tokens that the run of a checkpoint had consumed.

    Args:
        seq_length: of the run that saved it.

    Raises:
        CheckpointError: its order is not known here.
    """
    return (_read(extra, where) or SampleOrder()).tokens(samples, seq_length)


def _read(extra: Mapping[str, Any], where: str) -> SampleOrder | None:
    stored = extra.get(SAVED_AS)
    if stored is None:
        return None
    try:
        if stored["version"] not in (_VERSION, _WITH_LEGS) or stored["kind"] not in (EPOCHS, MEGATRON):
            raise ValueError(f"version {stored['version']}, kind {stored['kind']}")
        built_for = {str(split): int(number) for split, number in stored["built_for"].items()}
        legs = tuple(
            Leg(int(leg["seq_length"]), int(leg["begin"]), None if leg["ends"] is None else int(leg["ends"]))
            for leg in stored.get("legs", ())
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the checkpoint names an order of samples that this program does not know ({error})",
            where,
            "continue with the release that wrote it",
        ) from error
    return SampleOrder(stored["kind"], built_for, legs)
