"""An answer for each flag of Megatron-LM that is not one of ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Mapping, Optional, Union


@dataclass(frozen=True)
class Alias:
    """Another name of one of our fields.

    Attributes:
        field: the field.
        value: text of the value a flag without argument stands for; unset: the flag's own argument counts.
        translate: Megatron's words for a value → ours.
    """

    field: str
    value: Optional[str] = None
    translate: Mapping[str, str] = field(default_factory=dict)


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
    """Would change the run in a way that is not here; a problem."""

    because: str
    use: str = ""


@dataclass(frozen=True)
class LayersPerVirtualStage:
    """Megatron's way to say the number of chunks; resolved when num_layers is known."""


Answer = Union[Alias, Ignored, Always, Refused, LayersPerVirtualStage]

ANSWERS: dict[str, Answer] = {
    "expert-parallel": Alias("expert_model_parallel_size"),
    "bf16": Alias("precision", "bf16"),
    "fp16": Alias("precision", "fp16"),
    "fp32": Alias("precision", "fp32"),
}
