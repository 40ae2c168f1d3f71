"""The presets: published shapes, each value with its source, each usable as it stands."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from megatron_telechat.config import load_run_config
from megatron_telechat.config.fields import fields_by_name
from megatron_telechat.config.layout import pipeline_layout
from megatron_telechat.config.presets import preset_names, preset_text
from megatron_telechat.config.recompute import recompute_plan
from megatron_telechat.config.yaml_io import dump_run_config, read_yaml, run_config_from_yaml
from megatron_telechat.costs.memory import stage_memory
from megatron_telechat.errors import ConfigError

SHAPES = {  # layers, hidden, ffn, heads, groups, experts, top-k, expert ffn
    "telechat2-3b": (24, 3072, 6144, 24, 24, None, None, None),
    "telechat2-7b": (30, 4096, 12288, 32, 32, None, None, None),
    "telechat2-35b": (64, 6144, 20480, 48, 48, None, None, None),
    "telechat2-115b": (96, 8192, 40960, 64, 8, None, None, None),
    "telechat2-39b-a12b": (30, 4096, 6144, 32, 32, 16, 4, 6144),
    "mixtral-8x7b": (32, 4096, 14336, 32, 8, 8, 2, 14336),
    "mixtral-8x7b-32k": (32, 4096, 14336, 32, 8, 8, 2, 14336),
    "mixtral-8x22b": (56, 6144, 16384, 48, 8, 8, 2, 16384),
}


def test_the_presets_of_the_readme_are_there_and_there_may_be_more() -> None:
    assert {*SHAPES, "telechat2-tiny", "telechat2-tiny-moe"} <= set(preset_names())


@pytest.mark.parametrize("name", SHAPES)
def test_published_shape(name: str) -> None:
    model = load_run_config(["--preset", name, "--dry-run"], {}).run.model
    topk = model.moe_router_topk if model.is_moe else None
    assert (
        model.num_layers,
        model.hidden_size,
        model.ffn_hidden_size,
        model.num_attention_heads,
        model.query_groups,
        model.num_experts,
        topk,
        model.moe_ffn_hidden_size,
    ) == SHAPES[name]
    assert model.head_dim == 128 and model.norm_epsilon == 1e-5


def test_published_pipelines() -> None:
    def counts(name: str) -> list[int]:
        layout = pipeline_layout(load_run_config(["--preset", name, "--dry-run"], {}).run)
        return [
            sum(len(layout.layers_of(rank, virtual_stage)) for virtual_stage in range(layout.num_virtual_stages))
            for rank in range(layout.pipeline_size)
        ]

    assert counts("telechat2-35b") == [15, 17, 17, 15]
    assert counts("telechat2-115b") == [10, 11, 12, 13, 13, 13, 13, 11]
    assert counts("telechat2-39b-a12b") == [15, 15]


def test_the_long_mixtral_is_mixtral_at_its_published_length_and_fits() -> None:
    run, short = (
        load_run_config(["--preset", name, "--dry-run", "--world-size", "32"], {}).run
        for name in ("mixtral-8x7b-32k", "mixtral-8x7b")
    )
    assert replace(run.model, name=short.model.name) == short.model and run.model.rotary_base == 1e6
    assert run.optimizer == short.optimizer
    length, batch = run.training.seq_length, run.training.global_batch_size
    assert length == 32768 and length * batch == short.training.seq_length * short.training.global_batch_size
    for imbalance, limit in ((1.0, 60), (2.0, 76)):  # of 64 and of 80 GB, in GiB
        assert max(stage.total_bytes for stage in stage_memory(run, imbalance)) < limit * 2**30
    unsplit = replace(run, parallel=replace(run.parallel, context_parallel_size=1))
    assert max(stage.total_bytes for stage in stage_memory(unsplit)) > 141e9, "no device holds it without"


@pytest.mark.parametrize("name", SHAPES)
def test_a_published_model_hides_its_reductions_and_gathers(name: str) -> None:
    parallel = load_run_config(["--preset", name, "--dry-run"], {}).run.parallel
    assert parallel.use_distributed_optimizer and parallel.overlap_grad_reduce and parallel.overlap_param_gather


@pytest.mark.parametrize("name", SHAPES)
def test_every_value_of_a_published_model_names_its_source(name: str) -> None:
    lines = preset_text(name).splitlines()
    for number, line in enumerate(lines):
        if re.match(r"  \w+:", line) and not re.match(r"  (name|architecture):", line):
            assert "#" in line or lines[number - 1].lstrip().startswith("#"), line


@pytest.mark.parametrize("name", preset_names())
def test_holds_every_rule_at_any_size(name: str) -> None:
    smallest = load_run_config(["--preset", name, "--dry-run"], {}).run.parallel.world_size
    for factor in (1, 2, 8):
        run = load_run_config(["--preset", name, "--dry-run", "--world-size", str(smallest * factor)], {}).run
        assert run.num_microbatches >= 1
        assert len(recompute_plan(run)) == run.model.num_layers
    load_run_config(["--preset", name, "--dry-run", "--world-size", "1024"], {})


@pytest.mark.parametrize("name", preset_names())
def test_resolved_yaml_reads_back_equal(name: str) -> None:
    run = load_run_config(["--preset", name, "--dry-run"], {}).run
    text = dump_run_config(run)
    assert run_config_from_yaml(text) == run
    assert len(read_yaml(text, "config.yaml").said) == len(fields_by_name())


def test_resolved_yaml_is_a_configuration(tmp_path) -> None:
    flags = [
        "--preset",
        "telechat2-tiny-moe",
        "--mock-data",
        "--name",
        "null",
        "--lr",
        "1e-5",
        "--min-lr",
        "1e-7",
        "--recompute-granularity",
        "selective",
        "--recompute-modules",
        "core_attn",
        "layernorm",
    ]
    run = load_run_config(flags, {}).run
    path = tmp_path / "config.yaml"
    path.write_text(dump_run_config(run), encoding="utf-8")
    assert load_run_config(["--config", str(path)], {}).run == run


def test_resolved_yaml_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ConfigError, match="unknown key model.num_layer in old.yaml:2: did you mean num_layers"):
        run_config_from_yaml("model:\n  num_layer: 3\n", "old.yaml")


@pytest.mark.parametrize("name", ["telechat2-tiny", "telechat2-tiny-moe"])
@pytest.mark.parametrize(
    "world, flags",
    [
        (2, "--tensor-model-parallel-size 2"),
        (4, "--tensor-model-parallel-size 4"),
        (4, "--pipeline-model-parallel-size 4"),
        (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
        (2, "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|t*3L"),
        (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --use-distributed-optimizer"),
    ],
)
def test_tiny_models_fit_small_layouts(name: str, world: int, flags: str) -> None:
    load_run_config(["--preset", name, "--mock-data", *flags.split()], {"WORLD_SIZE": str(world)})
