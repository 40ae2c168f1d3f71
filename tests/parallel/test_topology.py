"""Ranks stand where Megatron-Core puts them."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from megatron_telechat.config.schema import ParallelConfig
from megatron_telechat.errors import ConfigError
from megatron_telechat.parallel.topology import (
    ATTENTION_AXES,
    EXPERT_AXES,
    Topology,
    expert_groups_text,
    placement_warnings,
)


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
        for kind, theirs in (
            ("etp", "tp"),
            ("ep", "ep"),
            ("edp", "dp"),
            ("etp-ep", "tp-ep"),
            ("etp-ep-pp", "tp-ep-pp"),
        ):
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


def sizes_of(fix: str) -> dict[str, int]:
    words = fix.split()
    return {word: int(words[at + 1]) for at, word in enumerate(words) if word.startswith("--")}


def test_the_proposed_expert_groups_stay_in_a_node_and_keep_what_the_layout_needs():
    """Over all layouts: the proposal crosses no node, divides what was asked for, and holds whole folded tensor
    domains."""
    told = 0
    for topology, node in itertools.product(topologies(), (3, 4, 8)):
        topology = dataclasses.replace(topology, ranks_per_node=node)
        for folded in (False, True):
            if folded and (topology.etp != 1 or topology.ep % topology.tp):
                continue
            found = [text for text in placement_warnings(topology, True, folded) if "expert groups" in text]
            assert bool(found) == (topology.crossing("etp-ep") > 0)
            for text in found:
                sizes = sizes_of(text.partition("uses the network. ")[2].partition(" stays")[0])
                tensor = sizes.get("--tensor-model-parallel-size", topology.tp)
                etp, ep = (
                    sizes.get("--expert-tensor-parallel-size", topology.etp),
                    sizes["--expert-model-parallel-size"],
                )
                assert topology.ep % ep == 0 and topology.etp % etp == 0 and node % (ep * etp) == 0
                assert not folded or ep % tensor == 0
                told += 1
    assert told > 50
    (text,) = placement_warnings(Topology(16, 4, tp=2, ep=4, etp=2), is_moe=True)
    assert "EP4 x ETP2" in text and "--expert-model-parallel-size 2 stays" in text
    *_, text = placement_warnings(Topology(64, 4, tp=8, ep=8), is_moe=True, folded=True)
    assert "--tensor-model-parallel-size 4 --expert-model-parallel-size 4 stays" in text


def test_expert_groups_are_named_with_their_nodes():
    assert (
        expert_groups_text(Topology(4, 4, tp=2, pp=2, ep=2)) == "2 groups of 2: ranks 0-1, 2-3; none crosses nodes of 4"
    )
    assert expert_groups_text(Topology(16, 4, ep=4, etp=2)) == (
        "2 groups of 8: ranks 0-7 (nodes 0, 1), 8-15 (nodes 2, 3); all cross nodes of 4"
    )
    many = expert_groups_text(Topology(1024, 8, tp=4, pp=2, ep=8))
    assert many.startswith("128 groups of 8: ranks 0-7 (node 0), ") and "..," in many and "1016-1023 (node 127)" in many


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="multiple of"):
        Topology.from_config(ParallelConfig(world_size=6, tensor_model_parallel_size=4))
    with pytest.raises(ConfigError, match="expert"):
        Topology.from_config(ParallelConfig(world_size=6, tensor_model_parallel_size=2, expert_model_parallel_size=4))


def test_a_large_cluster_is_quick():
    topology = Topology(1024, 8, tp=4, pp=2, ep=8)
    assert topology.coordinates(1023).pp == 1
    assert len(topology.groups("ep")) == 128
