"""The steps of a run whose length was given in epochs: filled in once its data has been counted."""

from __future__ import annotations

import math
from dataclasses import replace

from megatron_telechat.config.derive import derive
from megatron_telechat.config.origins import DERIVED, Check, apply_rules
from megatron_telechat.config.rules import LENGTH_RULES
from megatron_telechat.config.run_stages import Position, RunStages
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.config.yaml_io import dump_run_config
from megatron_telechat.errors import ConfigError


def counts_epochs(run: RunConfig) -> bool:
    """Whether the steps of a run are still to be counted in its data."""
    return run.training.train_epochs is not None and not run.training.train_iters


def steps_for(samples: int, run: RunConfig, position: Position, *, whole: bool = False) -> int:
    """Optimizer steps of a run that reads so many samples, from its first step on.

    What was read before a resume counts as it was read: the batch may have been another one.

    Args:
        position: where the run goes on.
        whole: leave out a last batch that the samples do not fill; else it is filled up with samples behind them.
    """
    batch = run.training.global_batch_size
    left = max(0, samples - position.samples)
    return position.step + (left // batch if whole else math.ceil(left / batch))


def with_steps(stages: RunStages, steps: int) -> RunStages:
    """A run of one stage with its length in steps, and with all that follows from it.

    Raises:
        ConfigError: a warm-up, a decay or a range of steps does not fit the length.
    """
    [stage] = stages.stages
    run = replace(stage.run, training=replace(stage.run.training, train_iters=steps))
    check = Check(run, {**stage.origins, "train_iters": DERIVED})
    derive(check)
    problems = list(apply_rules(LENGTH_RULES, check))
    if problems:
        raise ConfigError(problems)
    # As it was given: what is read back must count again.
    return RunStages((replace(stage, run=check.run, origins=check.origins),), dump_run_config(stage.run))
