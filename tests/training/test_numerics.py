"""A loss or a gradient that is not finite stops every rank before the optimizer changes a parameter."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import run_cases

WORKER = Path(__file__).with_name("worker_numerics.py")
CASES = ("loss", "gradient_of_one_rank", "gradient_of_one_expert")

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


def test_clean_step_goes_through(report):
    for found in report.check("clean"):
        assert not found["raised"] and not found["unchanged"]
