"""Local parameters and their rows in the table, and weights that do not depend on how a tensor is cut."""

from __future__ import annotations

import pytest
import torch

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.errors import ConfigError
from megatron_telechat.model import initialize
from megatron_telechat.model.shards import global_key, parameter_shards
from megatron_telechat.parallel.topology import Topology
from megatron_telechat.tensors import Box, Piece, TensorSpec, tensor_table
from megatron_telechat.tensors.table import Constant, Normal
from tests.tensors.test_pieces import MOE, place_of

STD = 0.02
PINNED = [0.012551401741802692, -0.0033349182922393084, -0.0064704809337854385]


def test_keys_of_both_implementations():
    assert global_key("decoder.layers.1.mlp.linear_fc2.bias", [4, 5]) == "decoder.layers.5.mlp.linear_fc2.bias"
    fused = "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
    assert global_key(fused, [4, 5]) == "decoder.layers.4.input_layernorm.weight"
    assert global_key("decoder.final_layernorm.weight", []) == "decoder.final_layernorm.weight"


def virtual_stage_of(**parameters: torch.Tensor) -> torch.nn.Module:
    """A virtual stage of layer 1 of MOE (a dense one) with these parameters."""
    layer = torch.nn.Module()
    layer.layer_number = 2
    for name, value in parameters.items():
        *path, last = name.split("__")
        owner = layer
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = getattr(owner, part)
        owner.register_parameter(last, torch.nn.Parameter(value))
    stage = torch.nn.Module()
    stage.decoder = torch.nn.Module()
    stage.decoder.layers = torch.nn.ModuleList([layer])
    return stage


def shards_of(stage: torch.nn.Module):
    return parameter_shards([stage], RunConfig(model=MOE), place_of(Topology(1, 1), 0))


def test_a_parameter_without_a_row_is_an_error():
    stage = virtual_stage_of(input_layernorm__weight=torch.ones(16), self_attention__q_norm__weight=torch.ones(4))
    with pytest.raises(ConfigError) as caught:
        shards_of(stage)
    (problem,) = caught.value.problems
    assert "decoder.layers.1.self_attention.q_norm.weight" in problem.what and "tensors/table.py" in problem.fix


def test_a_parameter_of_another_size_or_domain_is_an_error():
    marked = virtual_stage_of(pre_mlp_layernorm__weight=torch.ones(16), input_layernorm__weight=torch.ones(15))
    next(marked.parameters()).allreduce = False
    with pytest.raises(ConfigError) as caught:
        shards_of(marked)
    said = [problem.what for problem in caught.value.problems]
    assert said == [
        "decoder.layers.1.pre_mlp_layernorm.weight does not belong to the routed experts by the table of tensors, and "
        "its module says otherwise",
        "decoder.layers.1.input_layernorm.weight was built with shape (15,), its piece on this rank is (16,) of (16,)",
    ]


def filled(spec: TensorSpec, offset: tuple[int, ...], shape: tuple[int, ...], seed: int = 1) -> torch.Tensor:
    target = torch.full(shape, float("nan"))
    initialize.fill(Piece(spec, Box(offset, shape)), target, seed)
    return target


def normal(key: str, shape: tuple[int, ...], std: float = STD) -> TensorSpec:
    return TensorSpec(key, shape, None, Normal(std))


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
    spec = normal(key, shape)
    whole = filled(spec, (0,) * len(shape), shape)
    assert torch.isfinite(whole).all()
    for offset, box in boxes:
        assert torch.equal(filled(spec, offset, box), whole[Box(offset, box).slices()])


def test_distribution_and_seeds():
    at, shape = (0, 0), (512, 128)
    weight = filled(normal("output_layer.weight", shape), at, shape)
    wide = filled(normal("output_layer.weight", shape, 2 * STD), at, shape)
    assert weight.std().item() == pytest.approx(STD, rel=0.02) and torch.equal(wide, 2 * weight)
    assert abs(weight.mean().item()) < 1e-4 * STD / 0.0048
    other_key = filled(normal("embedding.word_embeddings.weight", shape), at, shape)
    other_seed = filled(normal("output_layer.weight", shape), at, shape, seed=2)
    assert not torch.equal(weight, other_key) and not torch.equal(weight, other_seed)
    for value in (1.0, 0.0):
        assert torch.equal(filled(TensorSpec("x", (8,), None, Constant(value)), (0,), (8,)), torch.full((8,), value))


def test_first_values_are_pinned():
    """A seed means these values: a run that begins anew with an old seed begins with the same weights."""
    spec = tensor_table(MOE)["decoder.layers.0.mlp.router.weight"]
    found = filled(spec, (0, 0), spec.shape, seed=1234)
    assert found.flatten()[:3].tolist() == PINNED
