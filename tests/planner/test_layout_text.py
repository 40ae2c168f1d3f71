"""The layout as a person sees it."""

from __future__ import annotations

from megatron_telechat.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_telechat.planner.layout_text import layout_picture


def picture(layers: int, training: dict | None = None, **parallel) -> str:
    model = ModelConfig(num_layers=layers, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2, vocab_size=32)
    return layout_picture(
        RunConfig(model=model, parallel=ParallelConfig(**parallel), training=TrainingConfig(**(training or {})))
    )


def test_uneven_interleaved_layout():
    text = picture(
        9, pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2,
        pipeline_model_parallel_layout="Et|t*3|t*3|ttL",
    )  # fmt: skip
    assert text.splitlines() == [
        "stage 0   E t  0      |    ttt  4-6",
        "stage 1     ttt  1-3  |    tt  7-8 L",
    ]


def test_recompute_is_drawn_with_its_legend():
    text = picture(4, {"recompute_layout": "full,core_attn+mlp|none*2"}, pipeline_model_parallel_size=2)
    assert text.splitlines() == [
        "stage 0   E Rr  0-1",
        "stage 1     tt  2-3 L",
        "R: recomputed in full  r: recomputed in part (core_attn, mlp)",
    ]


def test_a_long_stage_is_shortened_and_a_stage_may_hold_no_layer():
    text = picture(40, {"recompute_layout": "|full*10,none*30"}, pipeline_model_parallel_size=2,
                   pipeline_model_parallel_layout="E|t*40L")  # fmt: skip
    assert text.splitlines()[:2] == ["stage 0   E   no layers", "stage 1     R*10 t*30  0-39 L"]
