"""Pieces of global tensors, the tiling check, and weights that do not depend on how a tensor is cut."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_telechat.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_telechat.costs.parameters import parameter_table
from megatron_telechat.model import initialize
from megatron_telechat.model.shards import Piece, global_key, is_writer, local_piece, tiling_problems

DENSE = ModelConfig(
    num_layers=30, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4, num_query_groups=2, vocab_size=64
)
MOE = replace(
    DENSE, num_layers=3, num_experts=4, moe_ffn_hidden_size=8, moe_layer_freq=2, moe_shared_expert_intermediate_size=8
)


def coordinates(**changes: int) -> SimpleNamespace:
    names = [f"{group}_{what}" for group in ("tp", "dp", "cp", "ep", "etp", "edp") for what in ("rank", "size")]
    return SimpleNamespace(**{**{name: int(name.endswith("size")) for name in names}, **changes})


def boxes_of(model: ModelConfig, states: list[SimpleNamespace]) -> list[tuple]:
    """What the writers among these ranks would report."""
    out = []
    for key, shape in parameter_table(model).items():
        for state in states:
            if is_writer(key, state):
                piece = local_piece(key, shape, state)
                out.append((piece.key, piece.global_shape, piece.global_offset, piece.shape))
    return out


FOLDED = [coordinates(tp_size=2, ep_size=2, tp_rank=rank, ep_rank=rank) for rank in (0, 1)]
EXPERT_TENSOR = [coordinates(tp_size=2, etp_size=2, tp_rank=rank, etp_rank=rank) for rank in (0, 1)]


@pytest.mark.parametrize("states", [[coordinates()], FOLDED, EXPERT_TENSOR], ids=["one", "folded", "etp2"])
def test_writers_tile_the_model(states):
    assert tiling_problems(boxes_of(MOE, states), RunConfig(model=MOE)) == []


def test_layers_left_out_are_named():
    run = RunConfig(model=DENSE, parallel=ParallelConfig(world_size=4, pipeline_model_parallel_size=4))
    boxes = [box for box in boxes_of(DENSE, [coordinates()]) if ".28." not in box[0] and ".29." not in box[0]]
    (problem,) = tiling_problems(boxes, run)
    assert problem.what == "30 layers on 4 pipeline stages built only 28: layers 28, 29 are missing"
    assert "layout" in problem.fix


def test_every_kind_of_fault_is_named():
    boxes = boxes_of(MOE, FOLDED)
    key = "decoder.layers.0.mlp.experts.linear_fc1.weight"
    dropped = [box for box in boxes if box[0] != "output_layer.weight"]
    half = [box for box in boxes if not (box[0] == key and box[2][0] == 0)]
    wrong = [
        (name, (65, 16), *rest) if name == "output_layer.weight" else (name, shape, *rest)
        for name, shape, *rest in boxes
    ]
    run = RunConfig(model=MOE)
    for faulty, words in (
        (dropped, "output_layer.weight: not built on any rank"),
        (half, f"{key}: only a part"),
        ([*boxes, boxes[-1]], "built more than once"),
        (wrong, "output_layer.weight was built with global shape (65, 16)"),
    ):
        assert words in tiling_problems(faulty, run)[0].what


def test_keys_of_both_implementations():
    assert global_key("decoder.layers.1.mlp.linear_fc2.bias", [4, 5]) == "decoder.layers.5.mlp.linear_fc2.bias"
    fused = "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
    assert global_key(fused, [4, 5]) == "decoder.layers.4.input_layernorm.weight"
    assert global_key("decoder.final_layernorm.weight", []) == "decoder.final_layernorm.weight"


def filled(piece: Piece, seed: int = 1) -> torch.Tensor:
    target = torch.full(piece.shape, float("nan"))
    initialize.fill(piece, target, RunConfig(model=MOE, training=TrainingConfig(seed=seed)))
    return target


@pytest.mark.parametrize(
    "key, shape, boxes",
    [
        ("output_layer.weight", (37, 16), [((0, 0), (37, 16)), ((11, 0), (20, 16)), ((5, 4), (30, 8))]),
        ("decoder.layers.0.mlp.linear_fc1.weight", (2, 24, 16), [((0, 12, 0), (2, 12, 16)), ((1, 3, 0), (1, 9, 16))]),
        (
            "decoder.layers.0.mlp.experts.linear_fc2.weight",
            (4, 16, 8),
            [((2, 0, 0), (2, 16, 8)), ((1, 0, 4), (3, 16, 4))],
        ),
    ],
)
@pytest.mark.parametrize("block_elements", [8, 100, 1 << 20])
def test_a_box_gets_the_values_of_the_whole(monkeypatch, key, shape, boxes, block_elements):
    monkeypatch.setattr(initialize, "BLOCK_ELEMENTS", block_elements)
    whole = filled(Piece(key, shape, (0,) * len(shape), shape, 0))
    assert torch.isfinite(whole).all()
    for offset, box in boxes:
        window = tuple(slice(at, at + size) for at, size in zip(offset, box, strict=True))
        assert torch.equal(filled(Piece(key, shape, offset, box, 0)), whole[window])


def test_distribution_and_seeds():
    weight = filled(Piece("output_layer.weight", (512, 128), (0, 0), (512, 128), 0))
    router = filled(Piece("decoder.layers.0.mlp.router.weight", (512, 128), (0, 0), (512, 128), 0))
    assert weight.std().item() == pytest.approx(MOE.init_method_std, rel=0.02)
    assert router.std().item() == pytest.approx(MOE.router_init_std, rel=0.02)
    assert abs(weight.mean().item()) < 1e-4
    other_key = filled(Piece("embedding.word_embeddings.weight", (512, 128), (0, 0), (512, 128), 0))
    other_seed = filled(Piece("output_layer.weight", (512, 128), (0, 0), (512, 128), 0), seed=2)
    assert not torch.equal(weight, other_key) and not torch.equal(weight, other_seed)
    assert torch.equal(filled(Piece("decoder.final_layernorm.weight", (8,), (0,), (8,), 0)), torch.ones(8))
    assert torch.equal(filled(Piece("decoder.layers.0.mlp.linear_fc2.bias", (8,), (0,), (8,), 0)), torch.zeros(8))
