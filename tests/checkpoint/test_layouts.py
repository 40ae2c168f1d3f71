"""Any layout loads what any layout saved, bitwise; Hugging Face weights pass through every layout unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_telechat.huggingface import import_hf
from tests.checkpoint.worker_layouts import HF_LAYOUTS, PAIRS, PRECISION_CHANGES, SHARED_WRITING, SLOW
from tests.harness import run_cases
from tests.huggingface.folders import PRESET_HEADS, telechat_config, telechat_shapes, write_folder

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def report(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("layouts")
    configs = {f"heads_{heads}_{groups}": telechat_config(heads, groups) for heads, groups in PRESET_HEADS}
    configs["moe"] = telechat_config(8, 8, num_experts=4, num_experts_per_tok=2)
    for name, config in configs.items():
        write_folder(folder / "hf" / name, config, telechat_shapes(config))
        import_hf(folder / "hf" / name, folder / "imported" / name)
    worker = Path(__file__).with_name("worker_layouts.py")
    slow = any(item.get_closest_marker("slow") for item in request.session.items if item.path == request.path)
    environment = {"CHECKPOINT_TEST_FOLDER": str(folder), "CHECKPOINT_TEST_SLOW": "1" if slow else ""}
    return run_cases(worker, 4, timeout=300, env=environment)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in PAIRS])
def test_another_layout_loads_the_same_tensors_and_goes_on_alike(report, name):
    assert report.check(name)[0]["tensors"] > 40


def test_there_are_thirty_pairs():
    assert len(PAIRS) >= 30


@pytest.mark.parametrize("name", SHARED_WRITING)
def test_replicas_share_the_writing(report, name):
    found = report.check("replicas_share_the_writing")[0][name]
    mean = sum(found["written"]) / 4
    assert all(0.9 * mean < written < 1.1 * mean for written in found["written"]), found
    assert found["boxes"] < 40, "large tensors are cut, and no more"


def test_a_checkpoint_of_the_first_release_loads(report):
    report.check("as_the_first_release_wrote_it")


@pytest.mark.parametrize("name", PRECISION_CHANGES)
def test_the_most_exact_weights_survive_a_change_of_precision(report, name):
    report.check(name)


def test_weights_only_takes_the_weights_and_nothing_else(report):
    assert "fresh optimizer" in report.check("weights_only_begins_anew")[0]["message"]


def test_a_checkpoint_without_optimizer_state_says_that_the_optimizer_is_fresh(report):
    report.check("without_optimizer_state")


def test_random_generators_go_on_in_the_same_layout(report):
    report.check("generators_go_on_in_the_same_layout")


def test_random_generators_of_another_kind_of_device_are_seeded_anew(report):
    for notes in report.check("generators_of_another_device_are_not_restored"):
        assert "another kind of device" in notes[0]


def test_a_rank_that_cannot_write_fails_the_save_on_all(report):
    messages = report.check("an_error_on_one_rank_is_an_error_on_all")
    assert len(set(messages)) == 1 and "rank 1" in messages[0] and "No space left" in messages[0]


def test_a_checkpoint_of_another_model_is_refused_naming_the_tensors(report):
    for message in report.check("another_model_is_refused_on_all_ranks"):
        assert "missing: model/decoder.layers.0.mlp.router.weight" in message and "not of this model" in message


def test_loss_scales_that_have_parted_are_refused_with_what_it_means(report):
    for found in report.check("loss_scales_that_have_parted"):
        for text in (found["refused"], found["note"]):
            assert "2048 of the dense and 1.34218e+08 of the expert parameters" in text
            assert "gradients too small, last by 65536 times" in text
        assert "--load-step" in found["refused"] and "--no-load-optim" in found["refused"]


def test_two_loss_scales_that_agree_go_on_as_one(report):
    for found in report.check("loss_scales_that_agree"):
        assert found["states"] == [{"scale": 512, "growth_tracker": 0, "hysteresis_tracker": 1}] * 2
        assert found["adam_step"] == 1


def test_every_number_counts_once_in_the_gradient_norm_whatever_the_two_tensor_groups(report):
    for found in report.check("every_number_counts_once"):
        for layout, (squared_norm, zeros, parameters) in found.items():
            assert squared_norm == pytest.approx(parameters, rel=1e-5), layout
            assert zeros == parameters, layout


@pytest.mark.parametrize("name", HF_LAYOUTS)
def test_hugging_face_weights_pass_through_models_of_every_layout_unchanged(report, name):
    report.check(f"hf_{name}")
