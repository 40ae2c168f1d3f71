"""A loss or a gradient that is not finite stops every rank before the optimizer changes a parameter."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import run_cases

WORKER = Path(__file__).with_name("worker_numerics.py")
CASES = ("loss", "gradient_of_one_rank", "gradient_of_one_expert", "fp16_loss", "fp16_overflow_at_the_smallest_scale")

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run_cases(WORKER, 2, timeout=180, env={"RUN_DIR": str(tmp_path_factory.mktemp("numerics"))})


@pytest.mark.parametrize("name", CASES)
def test_stops_everywhere_with_parameters_unchanged(report, name):
    for found in report.check(name):
        assert found["raised"], "no rank may go on"
        assert found["unchanged"]
        assert found["exit_code"] == 5
        assert "the optimizer step was not taken" in found["message"]


def test_names_rank_and_parameter(report):
    message = report.check("gradient_of_one_expert")[0]["message"]
    assert "(rank 1: gradient of decoder.layers.2.mlp.experts.linear_fc2.weight)" in message


HOOKED = ("output_of_one_module", "output_of_one_module_once", "interleaved_pipeline", "gradient_of_one_module")


@pytest.mark.parametrize("name", HOOKED)
def test_the_step_is_taken_again_on_the_same_data(report, name):
    for found in report.check(name):
        assert found["raised"] and found["unchanged"] and found["exit_code"] == 5 and found["step"] == 0
        assert len(found["tries"]) == 2 and found["tries"][0] == found["tries"][1], "the random generators are rewound"
    event = report.check(name)[0]["event"]
    assert event["event"] == "not_finite" and event["step"] == 1


def test_names_rank_micro_batch_samples_and_module(report):
    """Rank 1 of 2, its second micro-batch of 2 samples: 6 and 7. Its peers saw the NaN later, in what it sent them."""
    found = report.check("output_of_one_module")[0]
    assert "repeated on the same data, the numbers are not finite again: data or mathematics" in found["message"]
    where = found["event"]["where"]
    assert where.startswith("rank 1, micro-batch 1, samples 6-7: output of decoder.layers.2.self_attention.linear_qkv")
    assert found["event"]["repeats"] and "--iterations-to-skip 1 " in found["message"]


def test_names_layers_of_the_whole_model_in_a_pipeline(report):
    """And the cause before the stage that got the NaN from it."""
    where = report.check("interleaved_pipeline")[0]["event"]["where"]
    assert where.startswith("rank 0, micro-batch 1, samples 2-3: output of decoder.layers.2.self_attention.linear_qkv;")
    assert "rank 1, micro-batch 1, samples 2-3: output of decoder.layers.3." in where


def test_names_the_module_whose_gradient_came_first(report):
    found = report.check("gradient_of_one_module")[0]
    assert found["event"]["where"].startswith(
        "rank 1, micro-batch 0, samples 2-3: gradient of the output of decoder.layers.1.self_attention.linear_proj"
    )


def test_what_does_not_repeat_is_no_mathematics(report):
    found = report.check("output_of_one_module_once")[0]
    assert "a device, its memory or a link is suspected" in found["message"] and not found["event"]["repeats"]
    assert found["event"]["where"] == "in the first try: rank 1: its own sum of losses"


def test_steps_are_passed_over_and_a_resume_does_the_same(report):
    for found in report.check("steps_passed_over"):
        whole, resumed = found["whole"], found["resumed"]
        assert whole["code"] == resumed["code"] == 0
        assert whole["changed"] == [True, True, False, False, True, True, False, True]
        assert [event["step"] for event in whole["events"]] == [3, 4, 7]
        assert {event["reason"] for event in whole["events"]} == {"iterations_to_skip"}
        assert resumed["records"] == whole["records"][3:], "bit for bit"
        assert resumed["taken"] == whole["taken"]
        assert whole["taken"] == {"taken": 5, "skipped_in_a_row": 0, "on_request": [[3, 4], [7, 7]]}
        assert resumed["window"] == whole["window"] and len(whole["window"]["loss"]) == 5
        # the warm-up of four steps counts those that were taken: 1, 2, 5 and 6
        rates = [record["lr"] for record in whole["records"]]
        assert rates[1] < rates[2] == rates[3] == rates[4] < rates[5] < rates[6] == rates[7] == pytest.approx(1e-3)
        assert whole["records"][-1]["consumed_samples"] == 64


def test_an_overflow_of_one_expert_moves_one_loss_scale(report):
    """megatron-core moved a scale for each optimizer by its own overflows: dense 64, experts 32 and on from there."""
    for found in report.check("fp16_overflow_of_one_expert"):
        steps = found["steps"]
        for step in steps:
            assert len(step["scalers"]) == 2 and step["scalers"][0] == step["scalers"][1]
        assert [step["skipped"] for step in steps] == ["fp16 overflow"] * 2 + [None] * 3
        assert [step["all_unchanged"] for step in steps] == [True] * 2 + [False] * 3
        assert [step["scale_of_the_step"] for step in steps] == [64, 64, 32, 32, 64]
        # hysteresis 2: the second overflow halves; a window of 2 steps without one doubles
        assert [step["scalers"][0]["scale"] for step in steps] == [64, 32, 32, 64, 64]
        assert [step["grad_norm"] is None for step in steps] == [True] * 2 + [False] * 3


def test_a_skipped_step_moves_the_samples_and_not_the_learning_rate(report):
    for found in report.check("fp16_overflow_of_one_expert"):
        assert [step["lr"] for step in found["steps"]] == pytest.approx([1e-4, 1e-4, 1e-4, 1.9e-4, 2.8e-4])
        assert found["taken"] == 3 and found["consumed"] == 5 * 8


def test_weights_that_are_not_finite_are_not_saved(report):
    for found in report.check("weights_that_are_not_finite_are_not_saved"):
        assert "rank 1: decoder.layers.2.mlp.experts.linear_fc2.weight" in found["message"] and found["saved"] == []


def test_a_parameter_that_no_hook_awaits_is_named(report):
    for found in report.check("gather_that_nobody_awaits"):
        assert "decoder.layers.0.mlp.experts.linear_fc1.weight" in found["message"], found
        assert "and 7 more" in found["message"] and "overlap_param_gather" in found["message"]
        assert "self_attention" not in found["message"] and found["step"] == 0


def test_clean_step_goes_through(report):
    for found in report.check("clean"):
        assert not found["raised"] and not found["unchanged"]
        assert found["asked"] == ["cpu"], "the device is asked for deterministic kernels, once"
