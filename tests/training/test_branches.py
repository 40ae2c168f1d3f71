"""A command may be given again: it goes on, it does not begin again; a complete run is left as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import run_cases

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("branches")
    return run_cases(Path(__file__).with_name("worker_branches.py"), 2, timeout=240, env={"BRANCHES_DIR": str(folder)})


def test_a_roll_back_lasts_and_what_was_saved_last_is_kept(report):
    for found in report.check("roll_back"):
        assert (found["first"]["from"], found["first"]["to"]) == (4, 6)
        assert "6, 8 are set aside" in found["first"]["message"]
        assert found["there"] == ["iter_0000004", "iter_0000006", "iter_0000006.aside", "iter_0000008.aside"]
        assert found["latest"] == "iter_0000006"
        assert (found["without"]["from"], found["without"]["to"]) == (6, 7)
        assert (found["again"]["from"], found["again"]["to"]) == (7, 8) and "--load-step 4 was applied" in found[
            "again"
        ]["message"]
        assert found["then"] == ["iter_0000006.aside", "iter_0000007", "iter_0000008", "iter_0000008.aside"]


def test_a_requeued_command_that_begins_in_another_run_ends(report):
    for found in report.check("begins_in_another_run"):
        assert [(start["from"], start["to"]) for start in found["starts"]] == [(4, 6), (6, 8)]
        assert found["b"] == {step: loss for step, loss in found["whole"].items() if int(step) > 4}
        assert found["a"] == ["iter_0000002", "iter_0000004"], "the other run's folder is read only"


def test_the_final_weights_are_evaluated_once_on_each_split_and_a_complete_run_is_left_alone(report):
    for found in report.check("complete_run"):
        assert [(record["step"], *sorted(record)) for record in found["told"]] == [
            (4, "step", "valid_loss"),
            (8, "step", "valid_loss"),
            (8, "step", "test_loss"),
        ]
        assert found["untouched"] and (found["again"]["from"], found["again"]["to"], found["again"]["code"]) == (
            8,
            8,
            0,
        )
        assert found["lines"] == 8 + 3 + 1, "records, evaluations, and that the run was resumed"
        assert found["told_again"] == found["told"][1:], "the same weights on the same samples, bit for bit"
        assert found["made_up"]["code"] == 0


def test_weights_of_another_meaning_are_refused_on_all_ranks(report):
    for found in report.check("other_meaning"):
        for name in ("resume", "pretrained"):
            assert "num_attention_heads is 8 in the checkpoint and 4 in the run" in found[name]
            assert "kv_channels is 8 in the checkpoint and 16 in the run" in found[name]
        assert (
            "rotary_base is 10000 in the checkpoint and 50000" in found["rotary"]
            and "--allow-model-change" in found["rotary"]
        )
        assert (found["allowed"]["from"], found["then"]["from"]) == (2, 4)
