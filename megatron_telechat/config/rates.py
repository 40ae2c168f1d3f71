"""The learning rate along a schedule, by steps or by tokens: the warm-up, and where a schedule by tokens begins and
ends. Pure functions, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_telechat.config.lr_schedules import SCHEDULES, Moment
from megatron_telechat.config.run_stages import Position, RunStage, RunStages, Span
from megatron_telechat.config.schema import OptimizerConfig


def scheduled_rate(config: OptimizerConfig, warmup: int, decay: int, final: int, at: int) -> float:
    """Learning rate at a place of a schedule; all lengths in one unit, steps or tokens.

    Args:
        warmup: length of the linear warm-up.
        decay: where the decay ends.
        final: length of WSD's final decay.
        at: the place, from the begin of the schedule; the rate is that of the step that begins there.
    """
    if warmup > 0 and at <= warmup:
        return config.lr_warmup_init + (config.lr - config.lr_warmup_init) * at / warmup
    moment = Moment(at, warmup, decay, config.lr, config.min_lr, final, config.lr_wsd_decay_style)
    return SCHEDULES[config.lr_decay_style](moment)


@dataclass(frozen=True)
class TokenCurve:
    """A schedule by tokens.

    Attributes:
        optimizer: its rates and its style.
        begin, end: tokens of the run at which it begins and at which its decay ends.
    """

    optimizer: OptimizerConfig
    begin: int
    end: int

    @property
    def warmup(self) -> int:
        """Tokens of the warm-up."""
        share = self.optimizer.lr_warmup_fraction
        return int(share * (self.end - self.begin)) if share is not None else self.optimizer.lr_warmup_tokens or 0

    def rate(self, tokens: int) -> float:
        """The rate of the step that begins after so many tokens of the run."""
        decay, final = self.end - self.begin, self.optimizer.lr_wsd_decay_tokens or 0
        return scheduled_rate(self.optimizer, self.warmup, decay, final, max(0, tokens - self.begin))


def curve_of(stages: RunStages, stage: RunStage, position: Position) -> TokenCurve:
    """The schedule of a stage: of the last stage up to it that began one.

    Args:
        position: where the run is; what is ahead is counted from there.
    """
    owner = next(one for one in reversed(stages.stages[: stage.number]) if one.own_schedule)
    ahead = stages.spans(position)
    begin = _tokens_at_start(owner, ahead if any(span.stage is owner for span in ahead[1:]) else stages.spans())
    if owner.run.optimizer.lr_decay_tokens is not None:
        return TokenCurve(stage.run.optimizer, begin, begin + owner.run.optimizer.lr_decay_tokens)
    later = [span for span in ahead if span.stage.number > owner.number and span.stage.own_schedule]
    last = ahead[-1].end
    end = _tokens_at_start(later[0].stage, ahead) if later else last.tokens if last is not None else begin
    return TokenCurve(stage.run.optimizer, begin, max(begin, end))


def _tokens_at_start(stage: RunStage, spans: Sequence[Span]) -> int:
    """Where a stage is said to begin, in tokens; it begins with the first step that is not before."""
    if stage.start.unit == "tokens" or not stage.start.count:
        return stage.start.count
    for before, span in zip(spans, spans[1:], strict=False):
        if span.stage is stage:
            samples = stage.start.count - before.begin.samples
            return before.begin.tokens + samples * before.stage.run.training.seq_length
    raise ValueError(f"{stage.title} does not begin in these spans")
