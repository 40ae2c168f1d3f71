"""From the format of a run's data to the code that reads it. No torch here: --dry-run uses it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from megatron_telechat.config.data_formats import DataFormat
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.data.blend import DataPlan
from megatron_telechat.data.corpus import CorpusFactory, DataFile
from megatron_telechat.data.order import Progress, order_of, samples_needed
from megatron_telechat.errors import DataError, Problem


def corpus_factory(format: DataFormat) -> CorpusFactory:
    """``FACTORY`` of the module that reads a format, loaded when a run needs it."""
    return import_module(f"megatron_telechat.data.{format.module}").FACTORY


def data_files(plan: DataPlan) -> list[DataFile]:
    """What can be told of the datasets of a run without opening them, each once.

    Raises:
        DataError: files that are missing or damaged; all of them at once.
    """
    factory = corpus_factory(plan.format)
    found: list[DataFile] = []
    problems: list[Problem] = []
    for name in plan.names:
        try:
            found.append(factory.describe(name))
        except DataError as error:
            problems.extend(error.problems)
    if problems:
        raise DataError(problems)
    return found


def require_enough(plan: DataPlan, files: Sequence[DataFile], ahead: Sequence[tuple[RunConfig, Progress]]) -> None:
    """Prefixes without weights are read once. What the headers say is the most there can be: a split may leave less.

    Args:
        ahead: the run, or each stage of it that is ahead, and how far it has read as that begins.

    Raises:
        DataError: the run would outlast them.
    """
    blend = plan.blends[0]
    tokens = {file.prefix: file.tokens for file in files if file.tokens is not None}
    if blend is None or blend.weights is not None or len(blend.prefixes) == 1 or len(tokens) < len(files):
        return
    for run, progress in ahead:
        length, order = run.training.seq_length, order_of(run, progress)
        begin = order.legs[-1].begin if order.legs else 0
        # Of the lengths before, whatever they were, that many tokens are gone from all of them together.
        gone = order.tokens(begin, length)
        needed = samples_needed(run, progress)[0] - begin
        there = sum(max(0, tokens[prefix] - 1) // length for prefix in blend.prefixes)
        if gone:
            there = max(0, sum(tokens[prefix] for prefix in blend.prefixes) - gone) // length
        if there < needed:
            raise DataError(
                f"the train data ends before the run: {there:,} samples ({there * length:,} tokens) are there at "
                f"most, {needed:,} samples ({needed * length:,} tokens) are needed",
                "prefixes without weights are read once",
                "give weights (0.7 en 0.3 zh) to read them more than once, add data, or lower --train-iters",
            )
