"""The built model on four gloo ranks; the cases are in worker_model.py, one launch for all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import run_cases
from tests.model import worker_model as worker

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def report():
    return run_cases(Path(worker.__file__), nproc=worker.WORLD, timeout=600)


@pytest.mark.parametrize("name", worker.LAYOUTS)
def test_layouts_agree(report, name):
    for rank in report.check(name):
        assert rank["loss"] < 1e-6, rank
        assert rank["gradient"] < 1e-5, rank
        assert rank["unlike"] <= 5 and rank["clearest"] < 1e-5, rank  # other experts at near ties only


@pytest.mark.parametrize("name", worker.RECOMPUTE)
def test_recompute_changes_nothing(report, name):
    for rank in report.check(f"recompute_{name}"):
        assert rank["loss_equal"] and rank["different"] == [], rank
        if name in worker.LIGHTER:
            assert rank["kept"] < 0.9, rank


@pytest.mark.parametrize("name", worker.CHUNKED_LOSS)
def test_the_loss_in_chunks_is_that_of_all_logits(report, name):
    exact = worker.CHUNKED_LOSS[name][1] == "fp32"
    for rank in report.check(f"chunked_loss_{name}"):
        assert rank["loss"] <= (1e-6 if exact else 1e-2), rank
        assert rank["gradient"] <= (2e-6 if exact else 1e-2), rank


@pytest.mark.parametrize("layout", ["moe_dp4", "moe_tp2_pp2"])
def test_a_recomputed_layer_takes_the_experts_of_its_first_pass(report, layout):
    """Where the second pass rounds to the other side of a tie, the gradient is still that of the forward."""
    for rank in report.check(f"repeated_choices_{layout}"):
        assert rank["flipped"] > 10, rank
        assert rank["worst"] < 1e-4, rank


@pytest.mark.parametrize("folder", ["telechat2_tiny_gqa", "telechat2_tiny_mha"])
def test_golden_logits(report, folder):
    for rank in report.check(f"golden_{folder}_fp16"):
        assert rank and max(rank.values()) < 1e-4, rank
    # the tables of the training are not rounded: close, but not the published file's bits
    for rank in report.check(f"golden_{folder}_fp32"):
        assert 1e-4 < max(rank.values()) < 5e-2, rank


def test_golden_covers_lengths_past_the_training_length(report):
    assert "64" in report.check("golden_telechat2_tiny_mha_fp16")[0]


@pytest.mark.parametrize("name", ["telechat2-tiny", "telechat2-tiny-moe"])
def test_presets_have_the_parameters_they_count(report, name):
    for rank in report.check(f"preset_{name}"):
        assert rank["built"] == rank["counted"]


def test_low_precision(report):
    for rank in report.check("low_precision"):
        assert rank["bf16_types"] == ["torch.bfloat16"] and rank["fp16_types"] == ["torch.float16"]
        if rank["fp32"] is not None:
            assert rank["bf16"] == pytest.approx(rank["fp32"], rel=5e-3)
            assert rank["fp16"] == pytest.approx(rank["fp32"], rel=5e-3)


def test_a_missing_layer_is_an_error_on_every_rank(report):
    said = report.check("missing_layer_is_an_error_on_every_rank")
    assert len(set(said)) == 1 and "layer 1 was not built    (rank 1)" in said[0]


def test_weight_decay_follows_the_table(report):
    for rank in report.check("weight_decay_follows_the_table"):
        assert rank["unknown"] == 0 and 0 < rank["decay"] < rank["all"]


def test_a_parameter_without_a_row_is_an_error(report):
    said = report.check("unknown_parameter_is_an_error_on_every_rank")
    assert len(set(said)) == 1 and "decoder.layers.4.self_attention.q_norm.weight" in said[0]
    assert "megatron_telechat/tensors/table.py" in said[0]
