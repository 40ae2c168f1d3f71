"""Which layers recompute what."""

from __future__ import annotations

import pytest

from megatron_telechat.config import load_run_config
from megatron_telechat.config.recompute import parse_recompute_layout, recompute_plan

FULL = ("full",)


def plan(*flags: str, preset: str = "telechat2-tiny", world: int = 1) -> tuple[tuple[str, ...], ...]:
    return recompute_plan(load_run_config(["--preset", preset, "--mock-data", *flags], {"WORLD_SIZE": str(world)}).run)


def test_none() -> None:
    assert plan() == ((), (), (), ())


def test_full() -> None:
    assert plan("--recompute-granularity", "full") == (FULL,) * 4
    assert (
        plan("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
        == (FULL,) * 4
    )


def test_full_of_the_first_layers_of_each_virtual_stage() -> None:
    flags = (
        "--num-layers",
        "8",
        "--pipeline-model-parallel-size",
        "2",
        "--recompute-granularity",
        "full",
        "--recompute-num-layers",
        "1",
    )
    assert plan(*flags, world=2) == (FULL, (), (), (), FULL, (), (), ())
    virtual_stages = ("--num-virtual-stages-per-pipeline-rank", "2")
    assert plan(*flags, *virtual_stages, world=2) == (FULL, ()) * 4


def test_selective_keeps_to_what_a_layer_has() -> None:
    assert (
        plan("--recompute-granularity", "selective", "--recompute-modules", "core_attn", "mlp")
        == (("core_attn", "mlp"),) * 4
    )
    mixed = (
        "--recompute-granularity",
        "selective",
        "--recompute-modules",
        "mlp,moe",
        "--moe-layer-freq",
        "2",
        "--ffn-hidden-size",
        "256",
    )
    assert plan(*mixed, preset="telechat2-tiny-moe") == (("moe",), ("mlp",)) * 2


def test_layout_from_layer_to_layer() -> None:
    flags = ("--pipeline-model-parallel-size", "2", "--recompute-layout", "full,none|core_attn+layernorm,mlp")
    assert plan(*flags, world=2) == (FULL, (), ("core_attn", "layernorm"), ("mlp",))


def test_layout_over_an_uneven_pipeline() -> None:
    flags = (
        "--pipeline-model-parallel-size",
        "2",
        "--pipeline-model-parallel-layout",
        "Et|t*3L",
        "--recompute-layout",
        "none|full*2,none",
    )
    assert plan(*flags, world=2) == ((), FULL, FULL, ())


def test_published_recompute_of_the_39b() -> None:
    whole = recompute_plan(load_run_config(["--preset", "telechat2-39b-a12b", "--dry-run"], {}).run)
    assert whole == (FULL,) * 3 + ((),) * 27


def test_reading() -> None:
    assert parse_recompute_layout("full*2, none*3 | core_attn+mlp*2") == [
        [FULL] * 2 + [()] * 3,
        [("core_attn", "mlp")] * 2,
    ]


@pytest.mark.parametrize("flags", [("--recompute-granularity", "full"), ("--pipeline-model-parallel-size", "1")])
def test_a_presets_layout_gives_way(flags: tuple[str, ...]) -> None:
    loaded = load_run_config(["--preset", "telechat2-39b-a12b", "--dry-run", "--world-size", "64", *flags], {})
    assert loaded.run.training.recompute_layout is None
    assert any("recompute_layout" in note for note in loaded.notes)
