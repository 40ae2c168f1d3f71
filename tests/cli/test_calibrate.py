"""Calibration on two ranks: every time a prediction needs is there, and a device file keeps it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import run_cases

WANTED = {
    "pipeline_dense": {"dense": {"full", "mlp"}},
    "pipeline_dense_and_experts": {"dense": {"full", "mlp", "core_attn+mlp"}, "moe": {"full", "moe", "core_attn+moe"}},
    "tensor_parallel_experts": {"moe": {"moe"}},
    "context_parallel": {"dense": {"core_attn"}},
}


@pytest.fixture(scope="module")
def report():
    return run_cases(Path(__file__).with_name("worker_calibrate.py"), nproc=2)


@pytest.mark.gloo
@pytest.mark.parametrize("name", WANTED)
def test_every_time_is_measured_and_kept(report, name):
    first, second = report.check(name)
    assert first["layers"] == second["layers"]
    for found in (first, second):
        assert found["same"] and found["replaced"] == 1
        assert {kind: set(times) for kind, times in found["layers"].items()} == {
            kind: {"forward", "backward", *(f"extra.{modes}" for modes in kinds)}
            for kind, kinds in WANTED[name].items()
        }
        for times in found["layers"].values():
            assert times["forward"] > 0 and times["backward"] > 0
            assert all(value >= 0 for value in times.values())
        assert all(value > 0 for value in (*found["ends"], found["p2p"], found["optimizer"], found["iteration"]))
        assert "2 ranks, medians of 5 rounds" in found["source"]
        shared = name in (
            "tensor_parallel_experts",
            "context_parallel",
        )  # both ranks work on one micro-batch: no one can wait
        assert found["alone"] == 1.0 if shared else 0 < found["alone"] <= 1.0
        assert 0 < found["jitter"] < 2
        # the ranks of the probe hold the same parameters, but those of the run only where they share a row
        assert found["gradients"] is None if name == "tensor_parallel_experts" else found["gradients"] > 0
        assert (found["reduction"] > 0) == (name == "context_parallel")


@pytest.mark.gloo
def test_context_parallel_ranks_compute_their_part_of_a_row(report):
    for found in report.check("context_parallel"):
        assert [tuple(shape) for shape in found["shapes"]] == [(1, 128 // 2)]


@pytest.mark.gloo
def test_ranks_that_do_not_hold_a_stage_are_refused(report):
    for said in report.check("wrong_number_of_ranks"):
        assert "tensor x context parallel ranks of this run come in 4s" in said
        assert "torchrun --nproc-per-node 4" in said
