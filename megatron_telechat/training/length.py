"""The steps of a run whose length is given in epochs: rank 0 counts the samples, and all ranks go by its number."""

from __future__ import annotations

from megatron_telechat.config.length import counts_epochs, with_steps
from megatron_telechat.config.run_stages import Position, RunStages
from megatron_telechat.data import data_plan
from megatron_telechat.data.length import samples_of_epochs
from megatron_telechat.data.pieces import Say, quiet
from megatron_telechat.data.sources import open_sources
from megatron_telechat.parallel.agreement import together
from megatron_telechat.parallel.rank_zero import WordOfRankZero
from megatron_telechat.training.progress import saved_progress


def counted_for_tool(stages: RunStages, say: Say = quiet) -> RunStages:
    """The run with its steps, for a tool that looks at its data; as it is where its length is given in steps.

    Raises:
        UserError: see :func:`counted_alone`; its checkpoints cannot be read.
    """
    if not counts_epochs(stages.stages[0].run):
        return stages
    stage, progress = saved_progress(stages)
    consumed, length = progress.consumed_samples, stage.run.training.seq_length
    tokens = progress.order.tokens(consumed, length) if progress.order is not None else 0
    return counted_alone(stages, Position(progress.steps, consumed, tokens), say)


def counted_alone(stages: RunStages, position: Position, say: Say = quiet) -> RunStages:
    """The run with its steps, by one process; files of dialogs are encoded into the cache.

    Args:
        position: where the run goes on.

    Raises:
        UserError: the data cannot be read, or its length does not fit the rest of the run.
    """
    run = stages.stages[0].run
    plan = data_plan(run.data)
    length = samples_of_epochs(run, plan, open_sources(run, plan, say))
    return with_steps(stages, length.steps(run, position))


def counted_together(stages: RunStages, position: Position) -> RunStages:
    """The run with its steps; collective.

    Args:
        position: where the run goes on.

    Raises:
        UserError: on every rank; see :func:`counted_alone`.
    """
    word = WordOfRankZero(stages.stages[0].run.data.data_index_timeout_minutes * 60)
    found = stages
    with together():
        if word.first:
            try:
                found = counted_alone(stages, position, word.progress)
            except BaseException as error:
                word.say_failed(error)
                raise
            word.say(str(found.train_iters))
        else:
            found = with_steps(stages, int(word.hear()))
    return found
