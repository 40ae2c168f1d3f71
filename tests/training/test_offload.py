"""Optimizer state on the host, or in 16 bits: the same numbers, bit for bit, and bytes where the memory model says."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.harness import launch, run_cases

WORKER = Path(__file__).with_name("worker_offload.py")
PAIRS = ("dp2_sharded_overlapped", "ep2_sharded", "fp16_skips", "half_of_it", "fp32_moments_alone", "narrow_moments")

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The cases of two ranks, after a run of them was killed."""
    environment = {"OFFLOAD_DIR": str(tmp_path_factory.mktemp("offload"))}
    killed = launch(WORKER, 2, "killed", env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.tails()
    return run_cases(WORKER, 2, timeout=240, env=environment)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return run_cases(WORKER, 4, timeout=240, env={"OFFLOAD_DIR": str(tmp_path_factory.mktemp("offload"))})


def same_numbers(ranks: list[dict]) -> None:
    for rank in ranks:
        none, offload = rank["none"], rank["offload"]
        assert offload["loss"] == none["loss"] and offload["grad_norm"] == none["grad_norm"]
        assert offload["digest"] == none["digest"]
        assert none["bytes"]["host"] == 0 < offload["bytes"]["host"] == offload["bytes"]["ledger"]


@pytest.mark.parametrize("name", PAIRS)
def test_the_numbers_of_a_run_without_offload(two, name):
    same_numbers(two.check(name))


@pytest.mark.slow
def test_the_numbers_over_tensor_and_pipeline_ranks(four):
    same_numbers(four.check("tp2_pp2"))


def test_steps_are_skipped_alike(two):
    for rank in two.check("fp16_skips"):
        assert rank["none"]["skipped"] == rank["offload"]["skipped"] > 0


@pytest.mark.parametrize("name", [*PAIRS, pytest.param("tp2_pp2", marks=pytest.mark.slow)])
def test_bytes_are_those_of_the_memory_model(request, name):
    """Every parameter begins at a multiple of 64 elements of its shelf; the parameters of this model are small."""
    for rank in request.getfixturevalue("four" if name == "tp2_pp2" else "two").check(name):
        for kind in ("none", "offload"):
            found = rank[kind]["bytes"]
            # A half is met to the nearest parameter.
            tolerance = 0.2 if name == "half_of_it" else 0.03
            assert found["device"] == pytest.approx(found["modelled device"], rel=tolerance, abs=4096)
            assert found["host"] == pytest.approx(found["modelled host"], rel=tolerance)


def test_moments_in_16_bits_are_other_numbers_in_less_memory(two):
    for rank in two.check("narrow_moments"):
        wide, narrow = rank["wide"], rank["none"]
        assert narrow["digest"] != wide["digest"]
        assert narrow["loss"] == pytest.approx(wide["loss"], rel=1e-3)
        assert narrow["bytes"]["device"] < 0.8 * wide["bytes"]["device"]


def test_a_kill_and_a_resume(two):
    for rank in two.check("resumed_after_a_kill"):
        assert rank == {"steps": 20, "same": True}, "resumed at step 10 of 30"


def test_offload_may_change_from_resume_to_resume(two):
    for rank in two.check("on_and_off_over_resumes"):
        assert rank["same"] and rank["saved alike"] and rank["tensors"] > 20


def test_moments_in_16_bits_are_saved_as_they_are(two):
    for rank in two.check("narrow_moments_over_a_resume"):
        assert rank == {"same": True, "types": ["torch.bfloat16", "torch.float32"]}


def test_a_run_begins_with_the_master_weights_that_it_loads(two):
    """Not with those of its own initial weights (Megatron-LM's issue 5071)."""
    for rank in two.check("loaded_masters"):
        assert rank["with_optimizer"] == {
            "masters are the weights": True,
            "16 bits": False,
            "moved": True,
            "same": True,
        }
        assert rank["weights_alone"] == {"masters are the weights": True, "16 bits": True, "moved": True, "same": True}
