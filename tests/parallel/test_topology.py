"""Ranks stand where Megatron-Core puts them."""

from __future__ import annotations

import itertools

import pytest

from megatron_telechat.config.schema import ParallelConfig
from megatron_telechat.errors import ConfigError
from megatron_telechat.parallel.topology import ATTENTION_AXES, EXPERT_AXES, Topology, placement_warnings


def topologies():
    for tp, cp, pp, ep, etp in itertools.product((1, 2, 4), (1, 2), (1, 2, 3), (1, 2, 8), (1, 2)):
        for dp in (1, 2, 8):
            world = tp * cp * pp * dp
            if world % (ep * etp * pp) == 0:
                yield Topology(world, 8, tp=tp, cp=cp, pp=pp, ep=ep, etp=etp)


def test_groups_are_megatron_cores():
    parallel_state = pytest.importorskip("megatron.core.parallel_state")
    checked = 0
    for topology in topologies():
        order = "tp-cp-ep-dp-pp"
        attention = parallel_state.RankGenerator(topology.tp, 1, topology.dp, topology.pp, topology.cp, order)
        expert = parallel_state.RankGenerator(topology.etp, topology.ep, topology.edp, topology.pp, 1, order)
        for kind in ("tp", "cp", "dp", "pp", "dp-cp", "tp-cp", "tp-pp", "tp-dp-cp"):
            assert topology.groups(kind) == attention.get_ranks(kind), (topology, kind)
        for kind, theirs in (("etp", "tp"), ("ep", "ep"), ("edp", "dp"), ("etp-ep", "tp-ep"), ("etp-ep-pp", "tp-ep-pp")):
            assert topology.groups(kind) == expert.get_ranks(theirs), (topology, kind)
        checked += 1
    assert checked > 100


def test_coordinates_agree_with_the_groups():
    for topology in topologies():
        for axis in dict.fromkeys(ATTENTION_AXES + EXPERT_AXES):
            for group in topology.groups(axis):
                assert [getattr(topology.coordinates(rank), axis) for rank in group] == list(range(topology.size(axis)))


def test_published_39b_layout_keeps_experts_in_the_node():
    parallel = ParallelConfig(
        world_size=1024,
        tensor_model_parallel_size=4,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=8,
        fold_tensor_into_experts=True,
    )
    topology = Topology.from_config(parallel)
    assert (topology.dp, topology.ep, topology.etp, topology.edp, topology.num_nodes) == (128, 8, 1, 64, 128)
    assert topology.crossing("ep") == 0
    assert placement_warnings(topology, is_moe=True) == []


def test_crossing_groups_are_told_with_a_better_size():
    wide = Topology(64, 8, tp=16, ep=16)
    tensor, expert = placement_warnings(wide, is_moe=True)
    assert "4 of 4 tensor-parallel groups" in tensor and "--tensor-model-parallel-size 8" in tensor
    assert "4 of 4 expert groups" in expert and "--expert-model-parallel-size 8" in expert
    assert len(placement_warnings(wide, is_moe=False)) == 1
    assert placement_warnings(Topology(64, 8, tp=8, ep=8), is_moe=True) == []
    (context,) = placement_warnings(Topology(64, 8, tp=8, cp=2), is_moe=False)
    assert "context-parallel" in context
    (part,) = placement_warnings(Topology(12, 8, tp=2), is_moe=False)
    assert "last node" in part


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="multiple of"):
        Topology.from_config(ParallelConfig(world_size=6, tensor_model_parallel_size=4))
    with pytest.raises(ConfigError, match="expert"):
        Topology.from_config(ParallelConfig(world_size=6, tensor_model_parallel_size=2, expert_model_parallel_size=4))


def test_a_large_cluster_is_quick():
    topology = Topology(1024, 8, tp=4, pp=2, ep=8)
    assert topology.coordinates(1023).pp == 1
    assert len(topology.groups("ep")) == 128
