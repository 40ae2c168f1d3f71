"""Fine-tuning is the same run in every layout; dialogs of a row do not see each other where the attention is reset."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.chat_material import letters_tokenizer, numbered, single, write_lines
from tests.harness import reports_by_ranks
from tests.training.worker_finetune import RUNS, STEPS

WORKER = Path(__file__).with_name("worker_finetune.py")

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    letters_tokenizer(folder)
    write_lines(folder / "d.jsonl", numbered(120))
    write_lines(folder / "long.jsonl", [single("q" * 100, "a")])
    return reports_by_ranks(WORKER, timeout=240, env={"FINETUNE_DIR": str(folder)})


PAIRS = [
    (1, "plain_mbs8", "plain"), (1, "reset_recompute_full", "reset"), (1, "reset_recompute_selective", "reset"),
    (2, "plain_dp2", "plain"),
    (2, "plain_cp2", "plain"), (2, "alone_cp2_contiguous", "reset_alone"),
    *((2, name, "reset") for name in RUNS[2] if name.startswith("reset")),
]  # fmt: skip


@pytest.mark.parametrize("world,name,reference", PAIRS, ids=[name for _, name, _ in PAIRS])
def test_a_masked_run_is_the_same_in_every_layout(runs, world, name, reference):
    expected = runs(1).check(reference)[0]
    for found in runs(world).check(name):
        assert found["tokens"] == expected["tokens"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["norm"] == pytest.approx(expected["norm"], rel=5e-5)


def test_the_runs_learn_and_are_not_all_one(runs):
    found = {name: runs(1).check(name)[0] for name in ("plain", "plain_answer", "reset", "reset_alone")}
    assert all(run["loss"][-1] < run["loss"][0] - 0.1 for run in found.values())
    assert len({run["loss"][0] for run in found.values()}) == 4
    assert all(a < b for a, b in zip(found["plain_answer"]["tokens"], found["plain"]["tokens"], strict=True))


def test_positions_alone_do_not_matter_where_the_attention_is_reset(runs):
    """Rotary positions are relative: a dialog that starts at another position is the same dialog."""
    expected = runs(1).check("reset")[0]["loss"]
    assert runs(2).check("attention_alone_pp2")[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_packed_dialog_is_the_dialog_alone(runs):
    found = runs(1).check("a_row_alone")[0]
    assert len(found["segments"]) > 2 and found["error"] < 2e-5 < 1e-3 < found["leak"]


def test_a_resume_with_other_micro_batches_is_the_run_that_never_stopped(runs):
    found, expected = runs(1).check("stopped_and_resumed")[0], runs(1).check("reset")[0]
    assert found["from"] == 3 and len(found["loss"]) == STEPS - 3
    assert found["tokens"] == expected["tokens"][3:]
    assert found["loss"] == pytest.approx(expected["loss"][3:], rel=1e-5)


def test_finetune_begins_with_the_weights_of_load_and_goes_on_from_its_own_folder(runs):
    found = runs(1).check("begun_from_other_weights")[0]
    assert found["started"] == [0, True] and found["then"] == 2 and "begun" in found["load"]


def test_another_mask_is_other_data(runs):
    text = runs(1).check("other_mask_on_resume")[0]
    assert "settings.sft_loss_mask" in text and "--allow-data-change" in text


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_of_epochs_ends_with_them_stops_and_goes_on(runs, world):
    for found in runs(world).check("epochs"):
        assert found["codes"] == [0, 0, 0, 0]
        steps = len(found["whole"])
        assert found["stopped"] == found["whole"] and steps > STEPS
        assert found["whole"] == runs(1).check("epochs")[0]["whole"] or world == 2
        assert found["whole"]["1"][2] == 0.0 and found["whole"]["3"][2] > found["whole"][str(steps)][2], (
            "warm-up, decay"
        )
        # The rest of half an epoch, in batches of half the size.
        consumed = [record[3] for record in found["longer"].values()]
        assert consumed[steps - 1] == steps * 8 and consumed[-1] == steps * 8 + (len(consumed) - steps) * 4
        assert 1.4 < consumed[-1] / (steps * 8) < 1.6
        assert "train_epochs: 1.0" in found["config"] and "train_iters: 0" in found["config"]


def test_a_validation_without_a_dialog_is_none(runs):
    found = runs(1).check("no_dialog_to_validate_on")[0]
    assert found["code"] == 0 and found["losses"] == 4 and "valid_loss" not in found["keys"]
