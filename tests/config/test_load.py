"""Merging preset, YAML and flags; origins; derived values."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_telechat.config import LoadedConfig, load_run_config
from megatron_telechat.config.fields import fields_by_name, values_of
from megatron_telechat.config.presets import preset_names

TINY = ("--preset", "telechat2-tiny", "--mock-data")
MOE = ("--preset", "telechat2-tiny-moe", "--mock-data")


def load(*argv: str, world: int = 1, **environ: str) -> LoadedConfig:
    return load_run_config(list(argv), {"WORLD_SIZE": str(world), **environ})


class TestPrecedence:
    def test_preset_below_yaml_below_flags(self, tmp_path: Path) -> None:
        first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
        first.write_text("optimizer:\n  lr: 1e-4\n  min_lr: 1e-6\ntraining:\n  seed: 5\n")
        second.write_text("# later wins\noptimizer:\n  lr: 2e-4\n")
        loaded = load(*TINY, "--config", str(first), "--config", str(second), "--seed", "6")
        assert (loaded.run.optimizer.lr, loaded.run.optimizer.min_lr, loaded.run.training.seed) == (2e-4, 1e-6, 6)
        assert loaded.origins["lr"] == f"{second}:3"
        assert loaded.origins["min_lr"] == f"{first}:3"
        assert loaded.origins["seed"] == "flag"
        assert loaded.origins["hidden_size"] == "preset telechat2-tiny"
        assert loaded.origins["adam_beta1"] == "default"
        assert loaded.origins["world_size"] == "torchrun"

    def test_a_file_may_name_the_preset_and_a_flag_may_name_another(self, tmp_path: Path) -> None:
        path = tmp_path / "run.yaml"
        path.write_text("preset: telechat2-tiny-moe\ndata:\n  mock_data: true\n")
        assert load("--config", str(path)).preset == "telechat2-tiny-moe"
        assert load("--config", str(path), "--preset", "telechat2-tiny").run.model.num_experts is None

    def test_empty_file_and_empty_section(self, tmp_path: Path) -> None:
        path = tmp_path / "run.yaml"
        path.write_text("# nothing yet\n")
        load(*TINY, "--config", str(path))
        path.write_text("optimizer:\n")
        load(*TINY, "--config", str(path))

    def test_the_last_of_equal_flags_counts(self) -> None:
        assert load(*TINY, "--lr", "1e-3", "--lr", "5e-4").run.optimizer.lr == 5e-4

    def test_every_origin_is_told(self) -> None:
        for name in preset_names():
            loaded = load_run_config(["--preset", name, "--dry-run"], {})
            assert set(loaded.origins) == set(fields_by_name())


class TestFlagForms:
    @pytest.mark.parametrize(
        "argv",
        [
            "--tensor-model-parallel-size 2",
            "--tensor-model-parallel-size=2",
            "--tensor_model_parallel_size 2",
            "--tensor-parallel 2",
        ],
    )
    def test_spellings(self, argv: str) -> None:
        assert load(*TINY, *argv.split(), world=2).run.parallel.tensor_model_parallel_size == 2

    def test_switches(self) -> None:
        assert load(*TINY, "--use-distributed-optimizer").run.parallel.use_distributed_optimizer
        assert not load(*TINY, "--no-deterministic").run.training.deterministic
        assert not load(*TINY, "--deterministic=false").run.training.deterministic

    @pytest.mark.parametrize(
        "argv, value", [("--bf16", "bf16"), ("--fp16", "fp16"), ("--fp32", "fp32"), ("--precision bf16", "bf16")]
    )
    def test_precision(self, argv: str, value: str) -> None:
        assert load(*TINY, *argv.split()).run.training.precision == value

    def test_numbers(self) -> None:
        run = load(*TINY, "--lr", "1e-3", "--min-lr", "0", "--split", "90,10", "--clip-grad", ".5").run
        assert (run.optimizer.lr, run.optimizer.min_lr, run.data.split, run.optimizer.clip_grad) == (
            1e-3,
            0.0,
            "90,10",
            0.5,
        )

    def test_lists(self) -> None:
        flags = ("--recompute-granularity", "selective", "--recompute-modules")
        for words in (("core_attn", "mlp"), ("core_attn,mlp",), ("core_attn mlp",)):
            assert load(*TINY, *flags, *words).run.training.recompute_modules == ("core_attn", "mlp")

    def test_unset(self) -> None:
        for flag in (
            ("--rotary-training-seqlen", "none", "--rotary-base-seqlen", "none"),
            ("--no-rotary-training-seqlen", "--no-rotary-base-seqlen"),
        ):
            assert load(*TINY, *flag).run.model.rotary_training_seqlen is None

    def test_every_field_is_a_flag(self) -> None:
        for info in fields_by_name().values():
            argv = (
                [info.flag]
                if info.kind is bool
                else [info.flag, (info.choices or {int: "1", float: "0.5", str: "x"}[info.kind])[0]]
            )
            try:
                load_run_config([*TINY, *argv], {})
            except Exception as error:  # noqa: BLE001 - only the flag's name matters here
                assert "unknown flag" not in str(error)


class TestDerived:
    def test_nothing_that_can_be_derived_stays_unset(self) -> None:
        values = values_of(
            load(*MOE, "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", world=4).run
        )
        assert values["expert_model_parallel_size"] == 2
        assert values["expert_tensor_parallel_size"] == 1
        assert values["sequence_parallel"] is True
        assert values["overlap_p2p_communication"] is False
        assert values["ranks_per_node"] == 4
        assert values["lr_decay_iters"] == 200
        assert values["run_dir"] == "runs/telechat2-tiny-moe"
        assert values["save"] == values["load"] == "runs/telechat2-tiny-moe/checkpoints"
        assert values["rotary_base_seqlen"] == 256

    def test_origin_is_derived(self) -> None:
        assert load(*MOE).origins["expert_model_parallel_size"] == "derived"

    def test_experts_without_folding_keep_megatrons_rule(self) -> None:
        run = load(*MOE, "--no-fold-tensor-into-experts", "--tensor-model-parallel-size", "2", world=2).run
        assert (run.parallel.expert_model_parallel_size, run.parallel.expert_tensor_parallel_size) == (1, 2)

    def test_interleaving_overlaps(self) -> None:
        flags = ("--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2")
        assert load(*TINY, *flags, world=2).run.parallel.overlap_p2p_communication is True

    def test_layers_for_each_virtual_stage(self) -> None:
        flags = ("--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1")
        loaded = load(*TINY, *flags, world=2)
        assert loaded.run.parallel.num_virtual_stages_per_pipeline_rank == 2
        assert loaded.origins["num_virtual_stages_per_pipeline_rank"] == "flag --num-layers-per-virtual-pipeline-stage"

    def test_sequence_parallel_without_tensor_parallel_is_off(self) -> None:
        loaded = load(*TINY, "--sequence-parallel")
        assert loaded.run.parallel.sequence_parallel is False
        assert any("sequence_parallel" in note for note in loaded.notes)

    def test_a_batch_nobody_gave_grows_with_a_note(self) -> None:
        loaded = load(*TINY, world=8)
        assert loaded.run.training.global_batch_size == 16
        assert any("global_batch_size=8" in note for note in loaded.notes)
        assert loaded.run.num_microbatches == 1

    def test_no_evaluation(self) -> None:
        assert load(*TINY, "--eval-iters", "0", "--eval-interval", "100").run.evaluation.eval_interval is None

    @pytest.mark.parametrize(
        "name, kind",
        [
            ("t.model", "SentencePieceTokenizer"),
            ("t.json", "HuggingFaceTokenizer"),
            ("t.tiktoken", "TikTokenizer"),
            ("", "HuggingFaceTokenizer"),
        ],
    )
    def test_tokenizer_type(self, tmp_path: Path, name: str, kind: str) -> None:
        path = tmp_path / name
        if name:
            path.touch()
        assert load(*TINY, "--tokenizer-model", str(path)).run.data.tokenizer_type == kind


class TestWorld:
    def test_dry_run_takes_any_size(self) -> None:
        assert load_run_config([*TINY, "--dry-run", "--world-size", "1024"], {}).run.parallel.world_size == 1024
        assert (
            load_run_config([*TINY, "--dry-run", "--world-size", "1024"], {"WORLD_SIZE": "2"}).run.parallel.world_size
            == 1024
        )

    def test_dry_run_without_a_size_takes_the_fewest_ranks(self) -> None:
        loaded = load_run_config(["--preset", "telechat2-39b-a12b", "--dry-run"], {})
        assert loaded.run.parallel.world_size == 16 and loaded.origins["world_size"] == "derived"

    def test_a_file_of_another_run_does_not_say_the_size(self, tmp_path: Path) -> None:
        path = tmp_path / "config.yaml"
        path.write_text("parallel:\n  world_size: 64\n  ranks_per_node: 8\n")
        run = load(*TINY, "--config", str(path), world=2, LOCAL_WORLD_SIZE="2").run
        assert (run.parallel.world_size, run.parallel.ranks_per_node) == (2, 2)

    def test_a_single_process(self) -> None:
        assert load_run_config(list(TINY), {}).run.parallel.world_size == 1


class TestPresetsGiveWay:
    def test_layout_of_another_pipeline(self) -> None:
        loaded = load_run_config(
            ["--preset", "telechat2-115b", "--dry-run", "--pipeline-model-parallel-size", "4", "--world-size", "64"], {}
        )
        assert loaded.run.parallel.pipeline_model_parallel_layout is None
        assert any("pipeline_model_parallel_layout" in note for note in loaded.notes)

    @pytest.mark.parametrize("flag", ["--no-use-distributed-optimizer", "--no-overlap-grad-reduce"])
    def test_overlap_of_a_gather_that_is_not_there(self, flag: str) -> None:
        loaded = load_run_config(["--preset", "telechat2-39b-a12b", "--dry-run", flag], {})
        assert not loaded.run.parallel.overlap_param_gather
        assert any("overlap_param_gather=True of preset" in note for note in loaded.notes)

    def test_warmup_of_another_kind(self) -> None:
        loaded = load(*TINY, "--lr-warmup-fraction", "0.1")
        assert loaded.run.optimizer.lr_warmup_iters == 0

    def test_heads_of_another_width(self) -> None:
        assert load(*TINY, "--hidden-size", "256").run.model.head_dim == 32


@pytest.mark.parametrize("text, value", [("4", 4), ("auto", "auto"), ("1", 1)])
def test_chunks_are_a_number_or_auto_from_flag_and_file(tmp_path: Path, text: str, value: object) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"preset: telechat2-tiny-moe\nparallel:\n  moe_input_chunks: {text}\n")
    from_file, from_flag = load("--mock-data", "--config", str(path)), load(*MOE, "--moe-input-chunks", text)
    assert from_file.run.parallel.moe_input_chunks == value == from_flag.run.parallel.moe_input_chunks
    assert from_file.origins["moe_input_chunks"] == f"{path}:3"


def test_production_presets_choose_chunks_and_the_tiny_one_repeats_itself() -> None:
    runs = {name: load_run_config(["--preset", name, "--dry-run"], {}).run for name in preset_names()}
    chunks = {name: run.parallel.moe_input_chunks for name, run in runs.items()}
    production = ("telechat2-39b-a12b", "mixtral-8x7b", "mixtral-8x7b-32k", "mixtral-8x22b")
    assert {chunks.pop(name) for name in production} == {"auto"}
    assert set(chunks.values()) == {1}, "a dense model has none, the tiny one is the same run every time"
