"""Bytes of the model that is really built against those of costs: exact where resident, 5 % where kept for a
backward."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.costs.worker_saved_tensors import MODES, STOCK, cases
from tests.harness import run_cases

SLOW = {f"activations_{name}" for name in ("dense_tp2", "dense_fp32", "moe_fp32", "dense_cp2_a2a")}
"""What others hold too: with the tests marked slow."""
ACTIVATIONS = [
    pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW))
    for name in cases.names
    if name.startswith("activations")
]


@pytest.fixture(scope="module")
def report(request):
    slow = any(item.get_closest_marker("slow") for item in request.session.items if item.path == request.path)
    names = [name for name in cases.names if slow or name not in SLOW]
    return run_cases(Path(__file__).with_name("worker_saved_tensors.py"), 2, names)


@pytest.mark.gloo
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_saved_tensors_of_every_recompute_kind(report, name):
    ranks = report.check(name)
    for kind in (*MODES, "ends"):
        # the routing of a random router is not even: the mean over the ranks of an expert group is
        measured, predicted = (sum(rank[kind][column] for rank in ranks) / len(ranks) for column in (0, 1))
        if "cp2" in name:  # the rank that receives most
            measured = max(rank[kind][0] for rank in ranks)
        assert predicted == pytest.approx(measured, rel=0.05), kind


@pytest.mark.gloo
@pytest.mark.parametrize("name", [name for name in cases.names if name.startswith("resident")])
def test_parameters_gradients_and_optimizer_to_the_byte(report, name):
    for rank in report.check(name):
        for measured, predicted in rank:
            assert measured == predicted


@pytest.mark.gloo
@pytest.mark.parametrize("name", [name for name in cases.names if name.startswith("stock")])
def test_parameters_of_models_that_megatron_core_builds(report, name):
    for rank in report.check(name):
        assert len(rank) == len(STOCK)
        for model, (built, predicted) in rank.items():
            assert built == predicted, model
