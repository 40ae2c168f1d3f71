"""How many virtual stages a pipeline rank has and how the layers split, from all the ways to say it: a layout string, a
number of virtual stages, layers of a virtual stage, Megatron's uneven splits. They must agree, as in Megatron-LM, where
only one of them may be given."""

from __future__ import annotations

from typing import Any, Protocol

from megatron_telechat.config.flags import CommandLine
from megatron_telechat.config.layout import PipelineLayout, parse_stages
from megatron_telechat.config.origins import DERIVED, flag
from megatron_telechat.config.rules.pipeline import LAYOUT, PP, VIRTUAL_STAGES, proposal, working_layout
from megatron_telechat.config.split import num_virtual_stages, split_counts
from megatron_telechat.errors import ConfigError, Problem

EACH = "--num-layers-per-virtual-pipeline-stage"


class Merging(Protocol):
    """Values under way from preset, files and flags to a run (`config.merging`)."""

    line: CommandLine
    values: dict[str, Any]
    origins: dict[str, str]
    problems: list[Problem]
    notes: list[str]
    unreadable: set[str]
    planning: bool
    """Whether a planner chooses the layout; a given layout then only sets the number of virtual stages."""

    def by_person(self, name: str) -> bool:
        """Whether a person gave this value: not derived, not a default."""
        ...


def settle_stages(merging: Merging) -> None:
    """Set the number of virtual stages, and the layout where split flags say it; what does not split or disagrees
    becomes a problem."""
    stages, layers = merging.values.get(PP, 1), merging.values.get("num_layers", 0)
    if stages < 1 or layers < 1 or {PP, "num_layers", VIRTUAL_STAGES, LAYOUT} & merging.unreadable:
        return  # rules complain
    try:
        _settle(merging, layers, stages)
    except ConfigError as error:
        merging.problems += error.problems
        merging.unreadable |= {VIRTUAL_STAGES, LAYOUT}


def _settle(merging: Merging, layers: int, stages: int) -> None:
    line, said = merging.line, merging.by_person(LAYOUT) and merging.values.get(LAYOUT) is not None
    if line.split and said:
        words = " ".join(line.split_words.values())
        raise ConfigError(f"{words} and a layout string both set the split", f"flag; {LAYOUT}: "
                                                                                      f"{merging.origins[LAYOUT]}",
                          "keep one of the two")  # fmt: skip
    if said:
        _virtual_stages_of_layout(merging, stages)
    if line.layers_per_virtual_stage is not None and not said:
        _virtual_stages_of_layers(merging, layers, stages, line.layers_per_virtual_stage)
    if line.split and not merging.planning:
        _layout_of_split(merging, layers, stages)


def _virtual_stages_of_layout(merging: Merging, stages: int) -> None:
    """V = stages of the layout / P, unless a person says V, which a rule compares with the layout."""
    try:
        found = len(parse_stages(merging.values[LAYOUT]))
    except ConfigError:
        return  # a rule complains
    virtual_stages, rest = divmod(found, stages)
    if rest or stages == 1:
        return  # a rule complains
    each, layers = merging.line.layers_per_virtual_stage, merging.values["num_layers"]
    if each is not None and layers != each * found:
        raise ConfigError(
            f"the layout has {found} stages, not {layers / (each or 1):g} ({layers} layers, {EACH} {each})",
            f"{LAYOUT}: {merging.origins[LAYOUT]}; flag {EACH}",
            f"leave {EACH} out, or {flag(VIRTUAL_STAGES, virtual_stages)} in its place",
        )
    if not merging.by_person(VIRTUAL_STAGES):
        merging.values[VIRTUAL_STAGES] = virtual_stages
        merging.origins[VIRTUAL_STAGES] = DERIVED


def _virtual_stages_of_layers(merging: Merging, layers: int, stages: int, each: int) -> None:
    """V = layers of a rank / layers of a virtual stage."""
    where = f"flag {EACH}; num_layers: {merging.origins['num_layers']}"
    split = merging.line.split
    try:
        virtual_stages = num_virtual_stages(layers, stages, each, split)
    except ConfigError as error:
        what = (
            f"num_layers={layers} does not split into {each} layers per virtual stage of {stages} pipeline ranks: "
            f"{error.problems[0].what}"
        )
        fix = "--num-virtual-stages-per-pipeline-rank V and an uneven --pipeline-model-parallel-layout"
        if split.sets_ends:
            fix = f"--num-virtual-stages-per-pipeline-rank V in place of {EACH}"
        elif fitting := _fitting_layers(layers + split.counted, stages):
            fix = f"{EACH} {min(fitting, key=lambda number: abs(number - each))}"
        raise ConfigError(what, where, fix) from None
    if merging.by_person(VIRTUAL_STAGES) and merging.values[VIRTUAL_STAGES] != virtual_stages:
        raise ConfigError(
            f"{VIRTUAL_STAGES}={merging.values[VIRTUAL_STAGES]}, but {layers} layers on {stages} pipeline ranks with "
            f"{EACH} {each} make {virtual_stages} virtual stages",
            f"{VIRTUAL_STAGES}: {merging.origins[VIRTUAL_STAGES]}; {where}",
            "keep one of the two",
        )
    merging.values[VIRTUAL_STAGES] = virtual_stages
    merging.origins[VIRTUAL_STAGES] = f"flag {EACH}"


def _fitting_layers(layers: int, stages: int) -> list[int]:
    return [number for number in range(1, layers + 1) if layers % (stages * number) == 0]


def _layout_of_split(merging: Merging, layers: int, stages: int) -> None:
    """The layout string that Megatron's flags of an uneven split mean."""
    line, virtual_stages = merging.line, merging.values.get(VIRTUAL_STAGES, 1)
    words = " ".join(line.split_words.values())
    if virtual_stages < 1 or stages == 1 and virtual_stages > 1:
        return  # a rule complains
    try:
        counts = split_counts(layers, stages, virtual_stages, line.split)
    except ConfigError as error:
        works: PipelineLayout | None = working_layout(layers, stages, virtual_stages)
        where = f"flag; num_layers: {merging.origins['num_layers']}; {PP}: {merging.origins[PP]}"
        fix = f"in their place {proposal(works)}" if works else error.problems[0].fix or "fewer stages"
        raise ConfigError(f"{words}: {error.problems[0].what}", where, fix) from None
    layout = PipelineLayout.from_counts(counts, stages)
    merging.values[LAYOUT] = str(layout)
    merging.origins[LAYOUT] = "flag " + " ".join(word.split()[0] for word in line.split_words.values())
    merging.notes.append(f"{words}: taken as {flag(LAYOUT, layout)}")
