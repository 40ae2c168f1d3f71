"""The kinds of answer that a flag of Megatron-LM can get."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Alias:
    """Another name of one or more of our fields.

    Attributes:
        fields: the fields.
        value: text of the value a flag without argument stands for; unset: the flag's own argument counts.
        but: said in a note where the two flags do not mean quite the same; the flag's own argument is then dropped.
    """

    fields: tuple[str, ...]
    value: str | None = None
    but: str = ""


@dataclass(frozen=True)
class Ignored:
    """Changes nothing here; a note says why and the run goes on."""

    because: str


@dataclass(frozen=True)
class Always:
    """Says what is always so here: accepted with these values, a problem with others (empty: the flag has no value)."""

    because: str
    values: tuple[str, ...] = ()
    fix: str = ""


@dataclass(frozen=True)
class Refused:
    """Would change the run in a way that is not here; a problem.

    Attributes:
        another_model: what is asked for is a model that the planner does not know either; without it the planner leaves
            the flag out, with a note.
    """

    because: str
    use: str = ""
    another_model: bool = False


@dataclass(frozen=True)
class LayersPerVirtualStage:
    """Megatron's way to say the number of virtual stages; resolved when num_layers is known."""


@dataclass(frozen=True)
class UnevenSplit:
    """Megatron's way to say an uneven split; becomes a layout string when the sizes are known.

    Attributes:
        part: the field of `config.split.SplitFlags` that it sets.
    """

    part: str


Answer = Alias | Ignored | Always | Refused | LayersPerVirtualStage | UnevenSplit
