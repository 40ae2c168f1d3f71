"""Which layers live on which pipeline stage: Megatron's layout strings.

A layout lists the virtual stages in the order a token passes them, ``|`` between
them, each with its layers: ``E`` embedding, ``t`` decoder layer, ``L`` output layer
and loss. ``x*n`` repeats a letter, ``(...)*n`` a group. The same may be written as lists, one a stage, of
Megatron-Core's names of layers. Stage ``c`` of the layout is virtual
stage ``c // P`` of pipeline rank ``c % P``, as in megatron-core.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.errors import ConfigError

MAX_LETTERS = 65536
"""Longest unrolled layout that is believed; a slip such as t*99999999 must not eat the memory."""


@dataclass(frozen=True)
class PipelineLayout:
    """The layers of every virtual stage.

    Attributes:
        stages: for each virtual stage its letters, unrolled (``"Ett"``).
        pipeline_size: pipeline ranks; the number of stages is a multiple of it.
    """

    stages: tuple[str, ...]
    pipeline_size: int

    @classmethod
    def parse(cls, text: str, pipeline_size: int) -> PipelineLayout:
        """Read a layout string.

        Raises:
            ConfigError: if the text is not a layout string, or its stages do not go round ``pipeline_size`` ranks.
        """
        stages = parse_stages(text)
        if len(stages) % pipeline_size:
            raise ConfigError(
                f"the layout has {len(stages)} stages, which is not a multiple of "
                f"pipeline_model_parallel_size={pipeline_size}",
                fix="one entry per virtual stage, separated by |",
            )
        return cls(stages, pipeline_size)

    @classmethod
    def from_counts(cls, counts: tuple[int, ...], pipeline_size: int) -> PipelineLayout:
        """The layout with these numbers of decoder layers in the virtual stages."""
        letters = ["t" * count for count in counts]
        letters[0] = "E" + letters[0]
        letters[-1] = letters[-1] + "L"
        return cls(tuple(letters), pipeline_size)

    @property
    def num_virtual_stages(self) -> int:
        """Virtual stages on each pipeline rank."""
        return len(self.stages) // self.pipeline_size

    @property
    def num_layers(self) -> int:
        """Decoder layers of all virtual stages."""
        return sum(stage.count("t") for stage in self.stages)

    @property
    def counts(self) -> tuple[int, ...]:
        """Decoder layers of each virtual stage, in the order a token passes them."""
        return tuple(stage.count("t") for stage in self.stages)

    def stage_index(self, stage_rank: int, virtual_stage: int) -> int:
        """Where this virtual stage of this pipeline rank is in `stages`."""
        if not (0 <= stage_rank < self.pipeline_size and 0 <= virtual_stage < self.num_virtual_stages):
            raise IndexError(f"no virtual stage {virtual_stage} on pipeline rank {stage_rank} in {self}")
        return virtual_stage * self.pipeline_size + stage_rank

    def layers_of(self, stage_rank: int, virtual_stage: int = 0) -> range:
        """Global zero-based numbers of the decoder layers of a virtual stage of a pipeline rank."""
        stage = self.stage_index(stage_rank, virtual_stage)
        first = sum(self.counts[:stage])
        return range(first, first + self.counts[stage])

    def has_embedding(self, stage_rank: int, virtual_stage: int = 0) -> bool:
        """Whether this virtual stage of this pipeline rank holds the embedding."""
        return "E" in self.stages[self.stage_index(stage_rank, virtual_stage)]

    def has_loss(self, stage_rank: int, virtual_stage: int = 0) -> bool:
        """Whether this virtual stage of this pipeline rank holds the output layer and the loss."""
        return "L" in self.stages[self.stage_index(stage_rank, virtual_stage)]

    def problems(self, num_layers: int, num_virtual_stages: int) -> list[str]:
        """What is wrong with the layout for this many layers and virtual stages a rank; empty if nothing."""
        out = []
        expected = self.pipeline_size * num_virtual_stages
        if len(self.stages) != expected:
            out.append(
                f"the layout has {len(self.stages)} stages, not {expected} "
                f"(pipeline_model_parallel_size={self.pipeline_size} x "
                f"num_virtual_stages_per_pipeline_rank={num_virtual_stages})"
            )
        text = "".join(self.stages)
        for letter, what, place, at in (("E", "embedding", "first", 0), ("L", "loss", "last", -1)):
            if text.count(letter) != 1:
                out.append(f"the layout must hold {letter} ({what}) exactly once, not {text.count(letter)} times")
            elif text[at] != letter:
                out.append(f"{letter} ({what}) must come {place} in the layout")
        if self.num_layers != num_layers:
            out.append(f"the layout holds {self.num_layers} decoder layers, the model num_layers={num_layers}")
        empty = [str(number + 1) for number, stage in enumerate(self.stages) if not stage]
        if empty:
            out.append(f"stage {', '.join(empty)} of the layout is empty: the pipeline would deadlock")
        return out

    def __str__(self) -> str:
        """The canonical string, such as ``Et*3|t*4|t*4|t*3L``."""
        return "|".join(_compress(stage) for stage in self.stages)


def _compress(stage: str) -> str:
    out = ""
    at = 0
    while at < len(stage):
        run = len(stage[at:]) - len(stage[at:].lstrip(stage[at]))
        out += stage[at] if run == 1 else f"{stage[at]}*{run}"
        at += run
    return out


def parse_stages(text: str) -> tuple[str, ...]:
    """Unroll a layout string into the letters of its stages.

    Raises:
        ConfigError: for a letter or a bracket that means nothing.
    """
    if text.lstrip().startswith("["):
        text = text_of_lists(_read_lists(text))
    unrolled, rest = _unroll(text.replace(",", "").replace(" ", ""), 0, 0)
    assert rest == ""
    return tuple(unrolled.split("|"))


WORDS = {"embedding": "E", "decoder": "t", "loss": "L", "mtp": "m"}
"""Megatron-Core's names of layers, which layouts written as lists use."""


def _read_lists(text: str) -> list[object]:
    try:
        found = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise ConfigError(
            "the layout begins with [ but is not a list", fix=f"{LISTS}, names quoted; or a string such as {EXAMPLE}"
        )
    return found


def text_of_lists(stages: Sequence[object]) -> str:
    """The layout string of a list with one entry a virtual stage: a list of layers (names or letters), or letters.

    Raises:
        ConfigError: lists within the lists of layers.
    """
    rows = [stage if isinstance(stage, (list, tuple)) else [stage] for stage in stages]
    if not all(isinstance(layer, str) for row in rows for layer in row):
        raise ConfigError("a layout in lists is one list of layers for each stage", fix=LISTS)
    return "|".join("".join(_letters(str(layer)) for layer in row) for row in rows)


def _letters(layer: str) -> str:
    name, times, number = layer.partition("*")
    letters = WORDS.get(name.strip().lower(), name.strip())
    if set(letters) - set("EtLm|()*0123456789, "):
        raise ConfigError(f"{name.strip()!r} is not valid in a layout", fix=f"layers are {', '.join(WORDS)}: {LISTS}")
    return letters + times + number.strip()


LISTS = "as in [[embedding, decoder], [decoder, loss]]"


def _unroll(text: str, depth: int, size: int) -> tuple[str, str]:
    """Unroll up to the closing bracket of this depth; returns (letters, unread rest)."""
    out = ""
    while text:
        char, text = text[0], text[1:]
        if char == ")" and depth:
            return out, text
        if char == "(":
            item, text = _unroll(text, depth + 1, size + len(out))
        elif char in "EtL|":
            item = char
        else:
            raise ConfigError(_bad_letter(char), fix=f"letters are E, t, L, | and n in *n: {EXAMPLE}")
        if text.startswith("*"):
            digits = text[1 : 1 + len(text[1:]) - len(text[1:].lstrip("0123456789"))]
            if not digits:
                raise ConfigError("a * without a number in the layout", fix=f"as in {EXAMPLE}")
            if size + len(out) + len(item) * int(digits[:9]) > MAX_LETTERS:
                raise ConfigError(f"the layout unrolls to more than {MAX_LETTERS} letters", fix=f"as in {EXAMPLE}")
            item, text = item * int(digits), text[1 + len(digits) :]
        out += item
    if depth:
        raise ConfigError("a ( without its ) in the layout", fix=f"as in {EXAMPLE}")
    return out, text


EXAMPLE = "Et*7|t*8|t*8|t*7L"


def _bad_letter(char: str) -> str:
    if char == "m":
        return "the layout asks for a multi-token-prediction layer (m), which these models do not have"
    if char == ")":
        return "a ) without its ( in the layout"
    return f"{char!r} is not valid in a layout"


@lru_cache(maxsize=256)
def default_layout(num_layers: int, pipeline_size: int, num_virtual_stages: int) -> PipelineLayout:
    """The layers split as evenly as they go.

    Layers left over go to the later middle stages first (in 1F1B a later stage holds
    fewer activations), then to the first stage; the last, which has the output layer
    and the loss, gets none.

    Raises:
        ConfigError: if there are so many stages that one would be empty.
    """
    stages = pipeline_size * num_virtual_stages
    share, left_over = divmod(num_layers, stages)
    counts = [share] * stages
    for stage in [*range(stages - 2, 0, -1), 0][:left_over]:
        counts[stage] += 1
    layout = PipelineLayout.from_counts(tuple(counts), pipeline_size)
    if not all(layout.stages):
        raise ConfigError(
            f"num_layers={num_layers} cannot fill {stages} pipeline stages "
            f"(pipeline_model_parallel_size={pipeline_size} x "
            f"num_virtual_stages_per_pipeline_rank={num_virtual_stages})",
            fix="fewer stages: an empty one would deadlock",
        )
    return layout


def pipeline_layout(run: RunConfig) -> PipelineLayout:
    """The layout of a run: the one it names, else the default one."""
    parallel = run.parallel
    if parallel.pipeline_model_parallel_layout is not None:
        return PipelineLayout.parse(parallel.pipeline_model_parallel_layout, parallel.pipeline_model_parallel_size)
    return default_layout(
        run.model.num_layers, parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    )
