"""Rules of the stages of a run together; what is wrong with one of them the other rules say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from megatron_telechat.config.data_formats import data_format
from megatron_telechat.config.run_stages import Position, RunStages
from megatron_telechat.config.yaml_io import StageEntry
from megatron_telechat.errors import Problem

T = TypeVar("T")


def problems_once(found: Sequence[Sequence[Problem]], titles: Sequence[str]) -> list[Problem]:
    """Problems of all stages: one that every stage has without a title, any other under that of the first stage that
    has it."""
    return [replace(one, what=f"{title}: {one.what}") if title else one for title, one in _each_once(found, titles)]


def notes_once(found: Sequence[Sequence[str]], titles: Sequence[str]) -> tuple[str, ...]:
    """Notes of all stages, as `problems_once`."""
    return tuple(f"{title}: {one}" if title else one for title, one in _each_once(found, titles))


def _each_once(found: Sequence[Sequence[T]], titles: Sequence[str]) -> Iterator[tuple[str, T]]:
    everywhere = list(dict.fromkeys(one for one in found[0] if all(one in more for more in found[1:])))
    yield from (("", one) for one in everywhere)
    seen = set(everywhere)
    for title, ones in zip(titles, found, strict=True):
        for one in ones:
            if one not in seen:
                seen.add(one)
                yield title, one


def problems_of_stages(stages: RunStages, entries: Sequence[StageEntry]) -> Iterator[Problem]:
    """What is wrong with stages that are right by themselves."""
    if not entries:
        return
    if entries[0].start.count:
        yield Problem(f"{entries[0].title}: the first stage begins with the run", entries[0].origin, "from_tokens: 0")
    if stages.several:
        yield from _each_has_steps(stages, entries)
        yield from _rows_stay(stages, entries)
        yield from _nothing_is_recorded(stages)


def _each_has_steps(stages: RunStages, entries: Sequence[StageEntry]) -> Iterator[Problem]:
    """A stage without a step would be passed over, and its settings with it."""
    position = Position()
    for stage, later, entry in zip(stages.stages, stages.stages[1:], entries[1:], strict=False):
        steps = later.start.steps_to(position, stage.run)
        if not steps:
            yield Problem(
                f"{later.title} begins where {stage.title} begins, at step {position.step + 1} "
                f"({position.tokens:,} tokens, {position.samples:,} samples): {stage.title} has no step",
                entry.origin,
                "give the stages in order, each at least a step behind the one before, or drop one of them",
            )
        position = position.after(stage.run, steps)


def _rows_stay(stages: RunStages, entries: Sequence[StageEntry]) -> Iterator[Problem]:
    """Dialogs are packed into rows of one length: what a row has not taken is not a stretch that can be cut anew."""
    first = stages.stages[0].run
    format = data_format(first.data)
    if format.can_be_cut_anew:
        return
    for stage, entry in zip(stages.stages, entries, strict=True):
        length = stage.run.training.seq_length
        if length != first.training.seq_length:
            yield Problem(
                f"{stage.title}: seq_length={length}, but with {format.field} a run has one length of a sample, "
                f"{first.training.seq_length}: its rows are packed for it",
                entry.origin,
                "fine-tune in a run for each length: --finetune --load CHECKPOINTS --seq-length N",
            )


def _nothing_is_recorded(stages: RunStages) -> Iterator[Problem]:
    """A recording of routings is one of samples of one length and one batch."""
    run, origins = stages.stages[0].run, stages.stages[0].origins
    for name in ("moe_routing_record", "moe_routing_replay"):
        if getattr(run.logging, name) is not None:
            yield Problem(
                f"{name} is for a run without stages: a recording holds samples of one length and batch",
                origins.get(name, ""),
                f"drop it, or the stages for the steps to record: {'--no-' + name.replace('_', '-')}",
            )


def notes_on_stages(stages: RunStages) -> Iterator[str]:
    """What a person should know of stages that are right."""
    if not stages.several:
        return
    for stage, before in zip(stages.stages[1:], stages.stages, strict=False):
        model, length = stage.run.model, stage.run.training.seq_length
        trained, base = model.rotary_training_seqlen, model.rotary_base_seqlen
        if trained is None or base is None or model.rotary_base == before.run.model.rotary_base:
            continue
        if length > trained or max(length, trained) > base:
            yield (
                f"{stage.title} sets rotary_base={model.rotary_base:g}, and with seq_length={length:,}, "
                f"rotary_training_seqlen={trained:,} and rotary_base_seqlen={base:,} the NTK formula acts on top of "
                f"it; rotary_training_seqlen: {length} in this stage leaves rotary_base alone"
            )
    spans = stages.spans()
    reached = {span.stage.number for span in spans}
    for stage in stages.stages:
        if stage.number not in reached:
            end = spans[-1].end
            assert end is not None, "a run without an end reaches every stage"
            yield (
                f"{stage.title} is never reached: the run ends with step {end.step:,}, after {end.tokens:,} tokens and "
                f"{end.samples:,} samples"
            )
