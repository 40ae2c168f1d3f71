"""Which steps of a run were taken: what the learning rate follows, and when too many were not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_telechat.checkpoint import LoadedInfo
from megatron_telechat.errors import NumericsError
from megatron_telechat.training.step import ON_REQUEST, StepResult

KEY = "steps"
"""Of these counts in the ``extra`` of a checkpoint."""


@dataclass
class StepsTaken:
    """Counts of steps, the same on every rank.

    Attributes:
        taken: optimizer steps that changed the parameters. The learning rate is a function of it.
        skipped_in_a_row: steps since the last one that was taken; those passed over on request do not count.
        on_request: first and last step of each window that was passed over on request.
    """

    taken: int = 0
    skipped_in_a_row: int = 0
    on_request: list[list[int]] = field(default_factory=list)

    def add(self, result: StepResult, step: int, limit: int) -> None:
        """Count one step.

        Args:
            step: its number, from 1.
            limit: so many skipped steps in a row end the run; 0: none do.

        Raises:
            NumericsError: on every rank, at the limit.
        """
        if result.skipped is None:
            self.taken += 1
            self.skipped_in_a_row = 0
            return
        if result.skipped == ON_REQUEST:
            if self.on_request and self.on_request[-1][1] == step - 1:
                self.on_request[-1][1] = step
            else:
                self.on_request.append([step, step])
            return
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == limit:
            raise NumericsError(
                f"step {step}: {limit} steps in a row were skipped, the last one because of: {result.skipped}",
                "max_skipped_steps",
                "resume from the last checkpoint; lower lr, look at the data of these steps, or train in bf16 or fp32",
            ).on_every_rank()

    def require_some_taken(self, step: int) -> None:
        """At the end of a run: its last checkpoint must hold something that was learned.

        Raises:
            NumericsError: on every rank, where not one of `step` steps was taken.
        """
        if step and not self.taken:
            raise NumericsError(
                f"none of the {step} steps was taken (all were skipped); nothing was learned, and nothing is saved",
                f"step {step}",
                "the step lines give the reasons; with fp16, start from a smaller --initial-loss-scale, or train "
                "in bf16",
            ).on_every_rank()

    @property
    def extra(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        counts: dict[str, Any] = {"taken": self.taken, "skipped_in_a_row": self.skipped_in_a_row}
        return {KEY: counts | ({"on_request": self.on_request} if self.on_request else {})}

    @classmethod
    def of(cls, info: LoadedInfo) -> tuple[StepsTaken, str | None]:
        """Where a run goes on, and a line for its person where the checkpoint is of a release that did not count.

        There every step counts as taken in bf16 and fp32. In fp16 Adam counted those that were, unless the run that
        saved it had begun with a fresh optimizer.
        """
        saved = info.extra.get(KEY)
        if isinstance(saved, Mapping):
            windows = [[int(first), int(last)] for first, last in saved.get("on_request", ())]
            return cls(int(saved["taken"]), int(saved["skipped_in_a_row"]), windows), None
        config = info.config
        if config is None or config.training.precision != "fp16" or config.checkpoint.no_load_optim:
            return cls(info.step), None
        if info.adam_step is None or info.adam_step >= info.step:
            return cls(info.step), None
        return cls(info.adam_step), (
            f"{info.adam_step} of its {info.step} steps were taken, by Adam's count; so far the learning "
            "rate counted all steps, from here on it counts these only"
        )
