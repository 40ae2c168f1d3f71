"""Frozen tensors keep their bits and take no gradient and no optimizer state; the others are trained as plain torch
trains them with ``requires_grad`` off, in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_telechat.tensors.table import tensor_table
from tests.harness import reports_by_ranks
from tests.training.runs import DENSE, assemble, load
from tests.training.worker_freeze import RUNS, STEPS

WORKER = Path(__file__).with_name("worker_freeze.py")

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("freeze")


@pytest.fixture(scope="module")
def runs(folder):
    return reports_by_ranks(WORKER, timeout=300, env={"FREEZE_DIR": str(folder)})


ALL = [(world, name) for world, layouts in RUNS.items() for name in layouts]


@pytest.mark.parametrize("world,name", ALL, ids=[name for _, name in ALL])
def test_frozen_tensors_stay_and_cost_nothing(runs, world, name):
    for found in runs(world).check(name):
        assert len(found["loss"]) == STEPS and None not in found["norm"]
        assert (found["moved"], found["stayed"], found["held"], found["gradients"]) == ([], [], [], 0)
        assert found["buffered"] == found["trained"]
    # A stage that is frozen as a whole trains nothing, and takes part.
    if name.startswith("dense_pp2") and "interleaved" not in name:
        assert [found["trained"] > 0 for found in runs(world).check(name)] == [False, True]


@pytest.mark.parametrize("world,name", ALL, ids=[name for _, name in ALL])
def test_every_layout_is_one_rank(runs, world, name):
    model = name.split("_")[0]
    expected, found = runs(1).check(f"{model}_one")[0], runs(world).check(name)[0]
    tolerance = 1e-5 if model != "half" else 2e-3
    assert found["loss"] == pytest.approx(expected["loss"], rel=tolerance)
    assert found["norm"] == pytest.approx(expected["norm"], rel=5 * tolerance if model != "half" else 0.02)


def test_the_others_are_trained_as_in_plain_torch(runs, folder, tmp_path):
    expected, found = runs(1).check("plain_torch")[0], runs(1).check("dense_one")[0]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert found["norm"] == pytest.approx(expected["norm"], rel=1e-5)
    shapes = {key: spec.shape for key, spec in tensor_table(load(DENSE, tmp_path).model).items()}
    ours, theirs = (assemble([folder / f"{name}.rank0.safetensors"], shapes) for name in ("dense_one", "plain_torch"))
    for key, tensor in theirs.items():
        if key.startswith(("embedding.", "decoder.layers.0.", "decoder.layers.1.")):
            assert torch.equal(ours[key], tensor), key
        else:
            assert float((ours[key] - tensor).norm() / tensor.norm()) < 2e-6, key


def test_the_runs_learn(runs):
    assert all(runs(1).check(f"{name}_one")[0]["loss"][-1] < runs(1).check(f"{name}_one")[0]["loss"][0] - 0.05
               for name in ("dense", "top", "moe"))  # fmt: skip


def test_a_checkpoint_holds_the_weights_alone_of_what_is_frozen(runs):
    expected = runs(1).check("dense_one")[0]["loss"]
    for found in runs(2).check("resumed_in_other_layouts"):
        assert found["stored"] == []
        assert found["tp2"]["from"] == 5 and found["tp2"]["loss"] == pytest.approx(expected[5:], rel=1e-5)
        assert found["more"] > 0
        assert "the run that saved it did not train" in found["off"] and "--no-load-optim" in found["off"]
