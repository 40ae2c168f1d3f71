"""LM-Cocktail: weights from the losses of our own forward against a plain one, in any layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import run_cases

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("losses")
    worker = Path(__file__).with_name("worker_losses.py")
    return run_cases(worker, 1, timeout=240, env={"MERGING_TEST_FOLDER": str(folder)})


def test_weights_are_those_of_a_plain_computation(report):
    found = report.check("cocktail")[0]
    assert found["code"] == 0
    assert found["losses"] == pytest.approx(found["plain_losses"], abs=1e-6)
    assert found["weights"] == pytest.approx(found["plain_weights"], abs=1e-6)
    assert len({round(weight, 2) for weight in found["weights"]}) == 3 and min(found["weights"]) > 0.01


def test_a_sharded_checkpoint_has_the_loss_of_its_folder(report):
    found = report.check("of_a_sharded_checkpoint")[0]
    assert found["code"] == 0 and found["inputs"][0] == found["inputs"][1]
    assert found["inputs"][0][1] == 0.5


def test_odd_examples_are_refused_by_line(report):
    found = report.check("odd_examples")[0]
    for name, (code, err, left) in found.items():
        assert code == 3 and err.startswith("data error") and not left, (name, err)
    assert "neither.jsonl:2" in found["neither"][1] and "neither.jsonl:3" in found["neither"][1]
