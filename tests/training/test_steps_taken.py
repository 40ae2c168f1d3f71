"""Steps that were not taken: the learning rate stays, too many end the run, a checkpoint keeps the count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_telechat.checkpoint import LoadedInfo
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.errors import NumericsError
from megatron_telechat.training.step import StepResult
from megatron_telechat.training.steps_taken import StepsTaken
from tests.harness import launch
from tests.training.runs import DENSE
from tests.training.test_resume import PRETRAIN, records

TAKEN = StepResult(1.0, 8, 1.0, None, False, False)
SKIPPED = replace(TAKEN, skipped="fp16 overflow", grad_norm=None)


def loaded(precision="fp16", step=100, extra=None, adam_step=97, **checkpoint) -> LoadedInfo:
    run = RunConfig()
    run = replace(
        run, training=replace(run.training, precision=precision), checkpoint=replace(run.checkpoint, **checkpoint)
    )
    return LoadedInfo(Path("iter_0000100"), step, 800, run, "", extra=extra or {}, adam_step=adam_step)


def test_counts_taken_steps_and_those_skipped_since():
    taken_so_far = StepsTaken()
    for step, result in enumerate([TAKEN, SKIPPED, SKIPPED, TAKEN, SKIPPED], 1):
        taken_so_far.add(result, step, limit=3)
    assert (taken_so_far.taken, taken_so_far.skipped_in_a_row) == (2, 1)


def test_the_limit_ends_the_run_also_over_a_resume():
    first = StepsTaken()
    first.add(SKIPPED, 1, limit=3)
    first.add(SKIPPED, 2, limit=3)
    resumed, note = StepsTaken.of(loaded(extra=first.extra))
    assert resumed == first and note is None
    with pytest.raises(NumericsError, match="step 3: 3 steps in a row were skipped.*fp16 overflow") as caught:
        resumed.add(SKIPPED, 3, limit=3)
    assert caught.value.exit_code == 5 and caught.value.agreed


def test_without_a_limit_nothing_ends():
    taken_so_far = StepsTaken()
    for step in range(200):
        taken_so_far.add(SKIPPED, step, limit=0)
    assert taken_so_far.skipped_in_a_row == 200


@pytest.mark.parametrize(
    "info,taken,said",
    [
        (loaded(), 97, True),
        (loaded(adam_step=100), 100, False),
        (loaded(adam_step=None), 100, False),
        (loaded(adam_step=40, no_load_optim=True), 100, False),
        (loaded("bf16", adam_step=40), 100, False),
    ],
    ids=["fp16", "fp16_none_skipped", "fp16_no_optimizer", "fp16_adam_began_anew", "bf16"],
)
def test_checkpoints_of_releases_that_did_not_count(info, taken, said):
    taken_so_far, note = StepsTaken.of(info)
    assert taken_so_far == StepsTaken(taken) and (note is not None) == said
    assert not said or "97 of its 100 steps were taken" in note


def test_a_run_without_a_single_taken_step_is_no_run():
    StepsTaken(taken=1, skipped_in_a_row=19).require_some_taken(20)
    with pytest.raises(NumericsError, match="none of the 20 steps was taken") as caught:
        StepsTaken(skipped_in_a_row=20).require_some_taken(20)
    assert caught.value.exit_code == 5


@pytest.mark.gloo
@pytest.mark.parametrize(
    "more,logged,said",
    [
        (["--max-skipped-steps", "4"], 3, "step 4: 4 steps in a row were skipped"),
        (["--train-iters", "5"], 5, "none of the 5 steps was taken"),
    ],
    ids=["limit", "end"],
)
def test_a_run_that_takes_no_step_ends_with_5_and_saves_nothing(tmp_path, more, logged, said):
    """The real command: a loss scale that no gradient of fp16 survives, so that every step is skipped."""
    flags = [*(flag for flag in DENSE if flag != "--fp32"), "--fp16", "--initial-loss-scale", "1e30", *more]
    result = launch(PRETRAIN, 1, *flags, "--run-dir", str(tmp_path / "run"), timeout=120)
    assert result.returncode == 5, result.tails()
    assert said in result.stderr and "Traceback" not in result.stderr
    assert f"step {logged}/" in result.stdout and "skipped 1 (fp16 overflow)" in result.stdout
    assert [record[2] for record in records(tmp_path / "run").values()] == [1e-3] * logged
    assert not list((tmp_path / "run" / "checkpoints").glob("iter_*"))
