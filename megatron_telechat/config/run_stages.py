"""A run in stages: from given points of the data on, another length, layout, batch or learning rate. Pure arithmetic,
no torch.

A stage of a run is not a stage of the pipeline (`config.stages`); where both could be meant, this one is a *run stage*.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_telechat.config.fields import values_of
from megatron_telechat.config.schema import OptimizerConfig, RunConfig

STAGES_KEY = "stages"
"""Of the list in a YAML file."""
START_KEYS: Mapping[str, Literal["tokens", "samples"]] = {"from_tokens": "tokens", "from_samples": "samples"}
SCHEDULE_LENGTHS = ("lr_warmup_tokens", "lr_warmup_fraction", "lr_decay_tokens", "lr_wsd_decay_tokens")
"""Of a schedule, counted from where it begins; a stage that begins another schedule does not keep them."""
SCHEDULE_FIELDS = ("lr", "min_lr", "lr_decay_style", "lr_warmup_init", *SCHEDULE_LENGTHS, "lr_wsd_decay_style")
"""A stage that gives one of these begins a schedule of its own."""
STAGE_FIELDS = (
    *("seq_length", "rotary_base", "rotary_training_seqlen", "rotary_base_seqlen"),
    *("global_batch_size", "micro_batch_size"),
    *("plan", "context_parallel_size", "cp_comm_type", "hierarchical_context_parallel_sizes", "cp_pieces"),
    *("cp_keep_received", "cp_layout"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank"),
    "microbatch_group_size_per_virtual_pipeline_stage",
    *("pipeline_model_parallel_layout", "expert_model_parallel_size", "expert_tensor_parallel_size"),
    *("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules", "recompute_layout"),
    *("loss_chunk_rows", "moe_input_chunks"),
    *SCHEDULE_FIELDS,
)
"""Fields that a stage may set; what it sets holds until a later stage sets it again."""


@dataclass(frozen=True)
class Position:
    """A place between two optimizer steps, counted from the begin of the run; ``tokens`` are inputs, masked ones
    too."""

    step: int = 0
    samples: int = 0
    tokens: int = 0

    def after(self, run: RunConfig, steps: int = 1) -> Position:
        """The place so many steps of this run later; earlier where ``steps`` is negative."""
        samples = steps * run.training.global_batch_size
        return Position(self.step + steps, self.samples + samples, self.tokens + samples * run.training.seq_length)


@dataclass(frozen=True)
class StageStart:
    """Where a stage begins: at the first step at or behind ``count`` tokens or samples of the whole run."""

    unit: Literal["tokens", "samples"] = "tokens"
    count: int = 0

    def reached(self, position: Position) -> bool:
        """Whether the stage has begun at a place."""
        return getattr(position, self.unit) >= self.count

    def steps_to(self, position: Position, run: RunConfig) -> int:
        """Steps of this run from a place to the start."""
        one = run.training.global_batch_size * (run.training.seq_length if self.unit == "tokens" else 1)
        return max(0, -(-(self.count - getattr(position, self.unit)) // one))

    def title_of(self, number: int) -> str:
        """What a person calls the stage of this number that begins here: ``stage 2 (from 8,192 tokens)``."""
        return f"stage {number} ({self})"

    def __str__(self) -> str:
        return f"from {self.count:,} {self.unit}"


@dataclass(frozen=True)
class RunStage:
    """One stage of a run.

    Attributes:
        number: from 1.
        run: everything in this stage.
        origins: field name → where its value comes from.
        own_schedule: whether a learning-rate schedule begins with it.
    """

    number: int
    start: StageStart
    run: RunConfig
    origins: Mapping[str, str] = field(default_factory=dict)
    own_schedule: bool = True

    @property
    def title(self) -> str:
        """``stage 2 (from 8,192 tokens)``."""
        return self.start.title_of(self.number)


@dataclass(frozen=True)
class Span:
    """The steps of one stage, ``end`` not included; None: no end is known."""

    stage: RunStage
    begin: Position
    end: Position | None

    @property
    def steps(self) -> int | None:
        """How many steps it has."""
        return None if self.end is None else self.end.step - self.begin.step


@dataclass(frozen=True)
class RunStages:
    """All stages of a run, in order; a run that has none is one stage.

    Attributes:
        document: the configuration as YAML, which ``--config`` reads back; empty where that is the run of the one
            stage.
    """

    stages: tuple[RunStage, ...]
    document: str = ""

    @classmethod
    def of(cls, run: RunConfig, origins: Mapping[str, str] | None = None) -> RunStages:
        """A run without stages."""
        return cls((RunStage(1, StageStart(), run, origins or {}),))

    @property
    def several(self) -> bool:
        """Whether anything changes on the way."""
        return len(self.stages) > 1

    @property
    def train_iters(self) -> int:
        """Optimizer steps of the whole run; 0: not said."""
        return self.stages[0].run.training.train_iters

    def at(self, position: Position) -> RunStage:
        """The stage of the step that begins at a place."""
        found = self.stages[0]
        for stage in self.stages[1:]:
            if not stage.start.reached(position):
                break
            found = stage
        return found

    def before(self, position: Position) -> RunStage:
        """The stage of the step that ends at a place; at the begin of the run the first."""
        found = self.at(position)
        for stage in reversed(self.stages[: found.number]):
            if self.at(position.after(stage.run, -1)) is stage:
                return stage
        return found

    def spans(self, position: Position = Position()) -> tuple[Span, ...]:
        """The stages from a place to the end of the run. One that has no step left is not among them."""
        spans: list[Span] = []
        stage = self.at(position)
        while True:
            left = max(0, self.train_iters - position.step) if self.train_iters else None
            later = self.stages[stage.number : stage.number + 1]
            steps = later[0].start.steps_to(position, stage.run) if later else None
            if steps is None or (left is not None and steps >= left):
                spans.append(Span(stage, position, None if left is None else position.after(stage.run, left)))
                return tuple(spans)
            end = position.after(stage.run, steps)
            spans.append(Span(stage, position, end))
            stage, position = self.at(end), end

    def changes(self, stage: RunStage, earlier: RunStage | None = None) -> dict[str, tuple[Any, Any]]:
        """Field → (before, in this stage) of what differs from an earlier stage (unset: the one before)."""
        if earlier is None:
            earlier = self.stages[max(0, stage.number - 2)]
        before, now = values_of(earlier.run), values_of(stage.run)
        return {name: (before[name], now[name]) for name in now if before[name] != now[name]}

    @property
    def rates_by_tokens(self) -> bool:
        """Whether the learning rate follows the tokens consumed, not the steps taken."""
        return self.several or counts_tokens(self.stages[0].run.optimizer)


def counts_tokens(optimizer: OptimizerConfig) -> bool:
    """Whether a schedule is given in tokens."""
    lengths = (optimizer.lr_warmup_tokens, optimizer.lr_decay_tokens, optimizer.lr_wsd_decay_tokens)
    return any(length is not None for length in lengths)
