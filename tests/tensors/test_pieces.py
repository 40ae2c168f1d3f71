"""Pieces by arithmetic: every rank of a world by its place, writers that tile, faults that are named."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_telechat.config.layout import pipeline_layout
from megatron_telechat.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_telechat.costs.parameters import local_count
from megatron_telechat.errors import ConfigError
from megatron_telechat.parallel.topology import Topology
from megatron_telechat.tensors.boxes import Box, tiling_fault
from megatron_telechat.tensors.pieces import is_writer, piece_at, tiling_problems, virtual_stage_table
from megatron_telechat.tensors.table import tensor_table

DENSE = ModelConfig(
    num_layers=30, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4, num_query_groups=2, vocab_size=64
)
MOE = replace(
    DENSE, num_layers=3, num_experts=4, moe_ffn_hidden_size=8, moe_layer_freq=2, moe_shared_expert_intermediate_size=8
)
LAYOUTS = {
    "one": dict(world_size=1),
    "folded": dict(
        world_size=4, tensor_model_parallel_size=2, expert_model_parallel_size=4, expert_tensor_parallel_size=1
    ),
    "etp2": dict(world_size=4, tensor_model_parallel_size=2, expert_tensor_parallel_size=2),
    "etp2 ep2 dp2": dict(
        world_size=8, tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=2
    ),
    "cp2 pp2 interleaved": dict(
        world_size=16,
        context_parallel_size=2,
        tensor_model_parallel_size=2,
        expert_model_parallel_size=4,
        expert_tensor_parallel_size=1,
        pipeline_model_parallel_size=2,
        num_virtual_stages_per_pipeline_rank=2,
        pipeline_model_parallel_layout="Et|t|t|L",
    ),
}


def place_of(topology: Topology, rank: int) -> SimpleNamespace:
    at = topology.coordinates(rank)
    ranks = {f"{axis}_rank": getattr(at, axis) for axis in ("tp", "cp", "dp", "pp", "ep", "etp", "edp")}
    return SimpleNamespace(**ranks, tp_size=topology.tp, ep_size=topology.ep, etp_size=topology.etp)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_writers_of_a_world_tile_the_model(layout):
    """By the topology's places of all ranks, replicas included; `tiling_problems` looks at the first replica only."""
    run = RunConfig(model=MOE, parallel=ParallelConfig(**LAYOUTS[layout]))
    topology, stages = Topology.from_config(run.parallel), pipeline_layout(run)
    boxes: dict[str, list[Box]] = defaultdict(list)
    for rank in range(topology.world_size):
        place = place_of(topology, rank)
        for virtual_stage in range(stages.num_virtual_stages):
            table = virtual_stage_table(run.model, stages, place.pp_rank, virtual_stage)
            pieces = [piece_at(spec, place) for spec in table.values()]
            for piece in pieces:
                if is_writer(piece.spec, place):
                    boxes[piece.key].append(piece.box)
            assert sum(piece.numel for piece in pieces) == local_count(table, run.parallel).total
    wanted = tensor_table(MOE)
    assert {key: tiling_fault(wanted[key].shape, held) for key, held in boxes.items()} == dict.fromkeys(wanted)
    assert tiling_problems(run) == []


def test_layers_that_the_layout_leaves_out_are_named():
    layout = "E" + "|".join(["t" * 7] * 4) + "L"
    run = RunConfig(
        model=DENSE,
        parallel=ParallelConfig(
            world_size=4, pipeline_model_parallel_size=4, pipeline_model_parallel_layout=layout
        ),
    )  # fmt: skip
    (problem,) = tiling_problems(run)
    assert problem.what == "30 layers on 4 pipeline stages give only 28: layers 28, 29 are missing"
    assert "layout" in problem.fix


def test_tensors_on_two_stages_and_layers_beyond_the_model_are_named():
    parallel = ParallelConfig(world_size=2, pipeline_model_parallel_size=2, pipeline_model_parallel_layout="Ett|EttL")
    said = [problem.what for problem in tiling_problems(RunConfig(model=MOE, parallel=parallel))]
    assert said[0] == "embedding.word_embeddings.weight: the boxes at (0, 0) and (0, 0) overlap"
    assert len(said) > 1 and all("decoder.layers.3." in what and "has no such tensor" in what for what in said[1:])


def test_an_axis_that_does_not_divide_is_named():
    place = SimpleNamespace(tp_size=3, tp_rank=0, ep_size=1, ep_rank=0, etp_size=1, etp_rank=0)
    with pytest.raises(ConfigError, match=r"output_layer.weight \(64, 16\) cannot be cut into 3 along axis 0"):
        piece_at(tensor_table(MOE)["output_layer.weight"], place)
