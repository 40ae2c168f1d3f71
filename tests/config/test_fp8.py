"""FP8 as configured: what is accepted, what a person is told, and what Megatron-LM's flags mean."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from megatron_telechat.backend.transformer_engine import require_for_fp8, require_recipe
from megatron_telechat.cli.dry_run import report
from megatron_telechat.config import load_run_config
from megatron_telechat.config.schema import TrainingConfig
from megatron_telechat.device_kinds import DEVICE_KINDS
from megatron_telechat.errors import ConfigError

DENSE, MOE = "telechat2-tiny", "telechat2-tiny-moe"


def load(*argv: str, preset: str = DENSE, planning: bool = False):
    return load_run_config(
        ["--preset", preset, "--mock-data", "--train-iters", "1000", "--bf16", *argv, "--dry-run"],
        {},
        planning=planning,
    )


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_every_recipe_is_accepted_where_transformer_engine_can_be(recipe, device):
    training = load("--fp8-format", "hybrid", "--fp8-recipe", recipe, "--device", device).run.training
    assert (training.fp8_format, training.fp8_recipe) == ("hybrid", recipe)
    assert training.precision_text == f"bf16, FP8 hybrid ({recipe})"


def test_without_the_flag_nothing_is_said_of_fp8():
    loaded = load()
    assert loaded.run.training.precision_text == "bf16" and not any("fp8" in note.lower() for note in loaded.notes)


@pytest.mark.parametrize("recompute", ["full", "core_attn", "mlp", "none"])
def test_recompute_of_layers_and_mlps_goes_with_fp8(recompute):
    assert load("--fp8-format", "e4m3", "--recompute-layout", f"{recompute}*4").run.training.fp8_format == "e4m3"


def test_a_dry_run_says_what_its_figures_leave_out():
    text = report(load("--fp8-format", "hybrid"))
    assert "type    bf16, FP8 hybrid (delayed)" in text
    assert "predicted times, MFU and memory are those of bf16 products" in text
    assert "a resume begins with scales of 1 and is not bitwise equal" in text
    text = report(load("--fp8-format", "hybrid", "--no-deterministic"))
    assert "a resume begins with scales of 1" in text and "bitwise" not in text
    assert "scales of 1" not in report(load("--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"))


@pytest.mark.parametrize("layers, rest", [((), True), (("--moe-layer-freq", "2", "--ffn-hidden-size", "384"), False)])
def test_experts_are_told_to_stay_as_they_are(layers, rest):
    (note,) = (note for note in load("--fp8-format", "hybrid", *layers, preset=MOE).notes if "experts" in note)
    assert "the experts stay bf16" in note and ("projections of the attention only" in note) == rest


def test_a_planner_leaves_fp8_out_and_says_so():
    loaded = load("--fp8-format", "hybrid", "--seq-length", "72", "--device", "cpu", planning=True)
    assert [note for note in loaded.notes if "is not modelled" in note]


def test_megatrons_defaults_and_other_flags():
    training = TrainingConfig()
    assert (training.fp8_recipe, training.fp8_margin) == ("delayed", 0)
    assert (training.fp8_amax_history_len, training.fp8_amax_compute_algo) == (1, "most_recent")
    notes = load("--fp8-format", "hybrid", "--fp8-interval", "1", "--moe-router-padding-for-fp8").notes
    assert len([note for note in notes if "--fp8-interval" in note or "--moe-router-padding-for-fp8" in note]) == 2


def test_a_run_without_transformer_engine_is_refused_before_it_starts(monkeypatch):
    with pytest.raises(ConfigError, match="has no kernels for npu"):
        require_for_fp8(DEVICE_KINDS["npu"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="not installed.*\n.*pip install"):
        require_for_fp8(DEVICE_KINDS["cuda"])


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_a_device_without_the_recipe_gives_transformer_engines_reason(recipe, monkeypatch):
    asked = {"blockwise": "check_fp8_block_scaling_support", "mxfp8": "check_mxfp8_support"}.get(
        recipe, "check_fp8_support"
    )
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.fp8"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for check in ("check_fp8_support", "check_fp8_block_scaling_support", "check_mxfp8_support"):
        setattr(sys.modules["transformer_engine.pytorch.fp8"], check, lambda own=check: (own != asked, "too old"))
    with pytest.raises(ConfigError, match=f"no FP8 of fp8_recipe={recipe}: too old"):
        require_recipe(recipe)


@pytest.mark.heavy
def test_a_run_ends_before_any_process_group(tmp_path, capsys):
    import torch.distributed as dist

    from megatron_telechat.cli.pretrain import main
    from megatron_telechat.errors import EXIT_CONFIG

    command = ["--preset", DENSE, "--bf16", "--mock-data", "--train-iters", "1000", "--run-dir", str(tmp_path / "run")]
    assert main([*command, "--fp8-format", "hybrid"]) == EXIT_CONFIG
    assert "FP8 is computed by Transformer Engine" in capsys.readouterr().err
    assert not dist.is_initialized() and not (tmp_path / "run").exists()


@pytest.mark.heavy
def test_calibration_measures_no_fp8(tmp_path, capsys):
    from megatron_telechat.cli.plan_pipeline import main
    from megatron_telechat.errors import EXIT_CONFIG

    output = tmp_path / "mine.yaml"
    command = ["--preset", DENSE, "--bf16", "--calibrate", "--output", str(output), "--fp8-format", "hybrid"]
    assert main(command) == EXIT_CONFIG
    assert "calibration measures bf16 products" in capsys.readouterr().err and not output.exists()
