"""Rules of the batch and of the length of the run."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_telechat.config.microbatch_groups import next_count, possible_groups, schedule_takes
from megatron_telechat.config.origins import Check, Rule, flag
from megatron_telechat.config.rules.parallel import CP, PP, TP
from megatron_telechat.config.rules.pipeline import GROUP, VIRTUAL_STAGES
from megatron_telechat.errors import Problem

BATCH = "global_batch_size"
MICRO = "micro_batch_size"


def batch_splits(check: Check) -> Iterator[Problem]:
    """Micro-batch size x data-parallel size divides the global batch."""
    batch, micro = check.take(BATCH, MICRO)
    check.take("world_size", TP, PP, CP)
    data = check.run.parallel.data_parallel_size
    if batch % (micro * data):
        yield check.problem(
            f"{BATCH}={batch} does not divide by {MICRO}={micro} x data parallel size {data}",
            BATCH,
            MICRO,
            "world_size",
            fix=flag(BATCH, -(-batch // (micro * data)) * micro * data),
        )
        check.bad.add(BATCH)


def interleaving_fills_the_pipeline(check: Check) -> Iterator[Problem]:
    """megatron-core's interleaved schedule works through micro-batches in groups of the pipeline size, or of a size
    that is given; the last group has one for each pipeline rank too."""
    batch, micro, stages, virtual_stages, given = check.take(BATCH, MICRO, PP, VIRTUAL_STAGES, GROUP)
    check.take("world_size", TP, CP)
    unit = micro * check.run.parallel.data_parallel_size
    count, group = batch // unit, given or stages
    if virtual_stages == 1 or schedule_takes(count, group, stages):
        return
    fixes = [flag(BATCH, next_count(count, group, stages) * unit)]
    if possible := possible_groups(count, stages):
        fixes.append(flag(GROUP, min(possible, key=lambda size: abs(size - group))))
    if given is None:
        what = (
            f"the interleaved schedule ({VIRTUAL_STAGES}={virtual_stages}) needs a number of micro-batches that "
            f"{PP}={stages} divides; {BATCH}={batch} gives {count}"
        )
    elif group > count:
        what = f"{GROUP}={group} is more than the {count} micro-batches that {BATCH}={batch} gives"
    else:
        what = (
            f"{GROUP}={group} leaves {count % group} of the {count} micro-batches to the last group; it needs none, "
            f"or at least {PP}={stages}"
        )
    names = (BATCH, VIRTUAL_STAGES, PP) if given is None else (GROUP, BATCH, PP)
    yield check.problem(what, *names, fix=", or ".join(fixes))


def run_has_a_length(check: Check) -> Iterator[Problem]:
    """A training needs train_iters or train_epochs; a dry run does not."""
    steps, epochs = check.take("train_iters", "train_epochs")
    if steps == 0 and epochs is None and not check.dry_run:
        yield check.problem(
            "train_iters is 0: there is nothing to train",
            "train_iters",
            fix="--train-iters N (optimizer steps of the whole run), or --train-epochs E (passes over the data)",
        )


def one_length(check: Check) -> Iterator[Problem]:
    """The length of a run is given in steps, samples or epochs. The stages of a run count neither samples nor epochs,
    and epochs need data that has an end."""
    samples, steps, epochs = check.take("train_samples", "train_iters", "train_epochs")
    said = {"train_iters": steps if check.said_by_person("train_iters") else 0, "train_samples": samples}
    said["train_epochs"] = epochs
    given = {name: value for name, value in said.items() if value}
    if len(given) > 1:
        texts = [f"{name}={value}" for name, value in given.items()]
        every = "both" if len(texts) == 2 else "all"
        yield check.problem(f"{' and '.join(texts)} {every} give the length of the run", *given, fix="keep one of them")
    if samples is not None:
        yield from _whole_steps_of_samples(check)
    if epochs is not None:
        yield from _epochs_of_the_data(check)


def _whole_steps_of_samples(check: Check) -> Iterator[Problem]:
    samples, batch = check.take("train_samples", BATCH)
    if check.staged:
        yield check.problem(
            f"train_samples={samples}: the steps of this run's stages differ",
            "train_samples",
            fix=f"{flag('train_iters', samples // batch)}, and the schedule in tokens",
        )
    elif samples < batch:
        yield check.problem(
            f"train_samples={samples} is less than one step of {BATCH}={batch}",
            "train_samples",
            BATCH,
            fix=flag("train_samples", batch),
        )


def _epochs_of_the_data(check: Check) -> Iterator[Problem]:
    epochs, mock = check.take("train_epochs", "mock_data")
    if mock:
        yield check.problem(
            f"train_epochs={epochs:g}, but mock_data is a stream without an end",
            "train_epochs",
            "mock_data",
            fix="--train-iters N",
        )
    if check.staged:
        yield check.problem(
            f"train_epochs={epochs:g} counts samples of one length and batch, and this run has stages",
            "train_epochs",
            fix="--train-iters N",
        )


RULES: tuple[Rule, ...] = (batch_splits, interleaving_fills_the_pipeline, run_has_a_length, one_length)
