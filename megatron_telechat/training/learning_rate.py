"""The learning rate as a pure function of how far a run is: of the steps taken, or of the tokens consumed.

Being a pure function it has no state: a resumed run cannot continue on another curve than the one it left. The warm-up
is in ``config/rates.py``, the schedules after it are in ``config/lr_schedules.py``.
"""

from __future__ import annotations

from megatron_telechat.config.rates import curve_of, scheduled_rate
from megatron_telechat.config.run_stages import Position, RunStage, RunStages
from megatron_telechat.config.schema import OptimizerConfig


def warmup_steps(config: OptimizerConfig, train_iters: int) -> int:
    """Steps of linear warm-up, from lr_warmup_iters or lr_warmup_fraction."""
    if config.lr_warmup_fraction is not None:
        return int(config.lr_warmup_fraction * (config.lr_decay_iters or train_iters))
    return config.lr_warmup_iters


def learning_rate(config: OptimizerConfig, train_iters: int, step: int) -> float:
    """Learning rate of the optimizer step that comes after ``step`` others.

    Args:
        config: the optimizer section.
        train_iters: steps of the whole run; the decay ends there unless lr_decay_iters says otherwise.
        step: optimizer steps taken before; 0 for the first step of a run. One that was skipped is none: Megatron's
            scheduler does not move then either.
    """
    warmup, decay = warmup_steps(config, train_iters), config.lr_decay_iters or train_iters
    return scheduled_rate(config, warmup, decay, config.lr_wsd_decay_iters or 0, step)


class StageRates:
    """The learning rate of one stage of a run.

    By tokens it follows all tokens consumed, those of skipped steps too: it is a function of the place in the data, as
    the begin of the stage is.

    Args:
        position: where the run is as this stage begins, or is resumed.
    """

    def __init__(self, stages: RunStages, stage: RunStage, position: Position):
        self._run = stage.run
        self._curve = curve_of(stages, stage, position) if stages.rates_by_tokens else None

    def at(self, steps_taken: int, tokens: int) -> float:
        """The rate of the step that comes after so many steps taken and tokens consumed."""
        if self._curve is not None:
            return self._curve.rate(tokens)
        return learning_rate(self._run.optimizer, self._run.training.train_iters, steps_taken)
