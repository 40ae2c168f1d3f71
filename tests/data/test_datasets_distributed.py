"""Two ranks build the datasets together."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import run_cases

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    shared = tmp_path_factory.mktemp("shared")
    return run_cases(Path(__file__).with_name("worker_datasets.py"), nproc=2, env={"SHARED_FOLDER": str(shared)})


def test_all_ranks_read_the_same_samples_from_one_index(report):
    first, second = report.check("same_samples")
    assert first == second and first["indices"] == 1


@pytest.mark.parametrize(
    "name,zero,one",
    [
        (
            "failure_while_building",
            "DataError: sequence",
            "DataError: rank 0 could not build the sample index: data error: sequence",
        ),
        ("failure_before_building", "DataError: ", "DataError: rank 0 could not build the sample index: data error: "),
        (
            "cache_is_a_file",
            "ResourceError: ",
            "ResourceError: rank 0 could not build the sample index: resource error: ",
        ),
        ("other_files", "built", "DataError: rank 1 sees other data files"),
        ("cache_not_shared", "built", "DataError: the sample index that rank 0 wrote is not visible here"),
        (
            "time_limit",
            "built",
            "ResourceError: rank 1 waited 0.02 minutes for rank 0 to build the sample index: checking ",
        ),
        (
            "bad_dialogs",
            "DataError: none of the keys",
            "DataError: rank 0 could not build the sample index: data error: none of",
        ),
    ],
)
def test_ranks_fail_together_and_say_why(report, name, zero, one):
    found = report.check(name)
    assert found[0].startswith(zero) and found[1].startswith(one), found


def test_dialogs_are_read_by_rank_0_alone_and_are_the_same_for_all(report):
    first, second = report.check("dialogs_are_encoded_by_one_rank")
    assert first["read"] and not second["read"]
    assert first["digest"] == second["digest"] and first["summary"] == second["summary"]


def test_ranks_that_wait_say_for_what(report):
    first, second = report.check("waiting")
    assert "data: checking " in first and "waiting for" not in first
    assert "waiting for rank 0 to build the sample index (" in second and "30 dialogs, " in second


def test_a_stop_of_rank_0_is_heard_by_those_who_wait_for_its_index(report):
    assert all(seconds is not None and seconds < 20 for seconds in report.check("stopped"))
