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
    assert "rank 1: decoder.layers.2.mlp.experts.linear_fc2.weight" in message
    assert "rank 0" not in message


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
