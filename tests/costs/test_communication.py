"""Seconds of exchanges by hand: who shares which link; and what a program hides of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megatron_telechat.costs.communication import Links, expert_exchange_seconds
from megatron_telechat.costs.devices import device_spec
from megatron_telechat.costs.parameters import LocalCount
from megatron_telechat.costs.software import (
    EXPERT_OVERLAP,
    EXPERT_OVERLAP_LATE_WEIGHTS,
    TENSOR_OVERLAP,
    megatron_software,
)
from megatron_telechat.costs.time import EXPERTS_EXPOSED, Software, TimeModel
from tests.costs.test_parameters import M39B, M115B
from tests.costs.test_time import ROUND, big, make

NODES = Links(intra=400.0, inter=50.0, latency=0.0, ranks_per_node=8)


@pytest.mark.parametrize(
    "size, stride, bandwidth",
    [
        (8, 1, 400), (4, 2, 400), (2, 4, 400),  # within a node
        (16, 1, 400), (64, 1, 400),  # eight members on a node, eight adapters: as fast as inside
        (16, 2, 200), (64, 4, 100), (64, 8, 50), (64, 16, 50),  # four, two, one; with wide strides one too
        (2, 8, 50), (3, 4, 100),
    ],
)  # fmt: skip
def test_a_group_has_as_many_adapters_as_members_on_a_node(size, stride, bandwidth):
    assert NODES.bandwidth(size, stride) == bandwidth
    assert NODES.gather(1000.0, size, stride) == pytest.approx(1000 * (size - 1) / size / bandwidth)


@pytest.mark.parametrize("size, stride, inside, outside", [(8, 1, 7, 0), (16, 1, 7, 8), (8, 2, 3, 4), (2, 8, 0, 1)])
def test_an_all_to_all_sends_each_rank_its_part_through_the_link_between_them(size, stride, inside, outside):
    assert NODES.all_to_all(100.0, size, stride) == pytest.approx(max(inside / 400, outside / 50) * 100 / size)
    assert NODES.all_to_all(100.0, 1, 8) == 0


@pytest.mark.parametrize("tensor, members", [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_gradients_of_dense_layers_by_hand(tensor, members):
    """DP ranks lie TP apart: eight, four, two or one of them share a node of eight."""
    times = TimeModel(make(world_size=64, ranks_per_node=8, tensor_model_parallel_size=tensor), ROUND)
    size = 64 // tensor
    bandwidth = min(5e8, members * 1.25e8)
    assert times.gradient_reduction(LocalCount(1000, 0)) == pytest.approx(8 * 1000 * (size - 1) / size / bandwidth)


@pytest.mark.parametrize("expert, members", [(1, 8), (2, 4), (4, 2), (8, 1), (16, 1)])
def test_gradients_of_experts_by_hand(expert, members):
    """Data ranks of an expert lie EP x ETP apart."""
    run = big(M39B, world_size=64, ranks_per_node=8, expert_model_parallel_size=expert)
    size, bandwidth = 64 // expert, min(5e8, members * 1.25e8)
    found = TimeModel(run, ROUND).gradient_reduction(LocalCount(0, 1000))
    assert found == pytest.approx(8 * 1000 * (size - 1) / size / bandwidth)


def test_dispatch_by_node_by_hand():
    """16 experts on 16 ranks, top 2, two nodes of 8: a token goes to the other node with the chance that one of its
    experts is there."""
    run = big(M39B, world_size=64, ranks_per_node=8, expert_model_parallel_size=16)
    links = Links.of(run, replace(ROUND, intra_node_bandwidth_gb_s=1e6))
    experts, chosen = M39B.num_experts, M39B.moe_router_topk
    rows = 8192 * (1 - math.comb(experts // 2, chosen) / math.comb(experts, chosen))
    assert expert_exchange_seconds(run, links, by_node=True) == pytest.approx(2 * rows * 2 * M39B.hidden_size / 1.25e8)
    assert expert_exchange_seconds(run, links, by_node=True) < expert_exchange_seconds(run, links)
    inside = big(M39B, world_size=64, ranks_per_node=8, expert_model_parallel_size=8)
    assert expert_exchange_seconds(inside, links, by_node=True) == expert_exchange_seconds(inside, links)


# ---- what a program hides ----------------------------------------------------------------------


def block(run, **software) -> tuple[float, float]:
    part = TimeModel(run, device_spec("h100-80g"), Software(**software)).layer_parts(0)["block"]
    return part.forward, part.backward


def test_overlap_with_another_micro_batch_hides_a_share_of_the_exchange():
    run = big(M39B, world_size=64, ranks_per_node=8, expert_model_parallel_size=16)
    exchange = expert_exchange_seconds(run, Links.of(run, device_spec("h100-80g")))
    for plain, hidden in zip(block(run), block(run, expert_overlap=0.65), strict=True):
        assert plain - hidden == pytest.approx(0.65 * EXPERTS_EXPOSED * exchange)


def test_a_shared_expert_runs_beside_the_exchange():
    model = replace(M39B, moe_shared_expert_intermediate_size=2048)
    run = big(model, world_size=64, ranks_per_node=8, expert_model_parallel_size=16)
    exchange = expert_exchange_seconds(run, Links.of(run, device_spec("h100-80g")))
    alone = block(big(M39B, world_size=64, ranks_per_node=8, expert_model_parallel_size=16))
    for none, behind, beside in zip(alone, block(run), block(run, shared_overlap=True), strict=True):
        shared = behind - none
        assert behind - beside == pytest.approx(min(exchange, shared))
    assert block(replace(run, model=M39B), shared_overlap=True) == alone


def flags(text: str) -> dict[str, tuple[str, ...]]:
    from megatron_telechat.config.flags import read_command_line

    return read_command_line(text.split()).given


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", {}),
        ("--tp-comm-overlap", {"tensor_overlap": TENSOR_OVERLAP}),
        ("--tp_comm_overlap --disable-tp-comm-overlap-rs", {"tensor_overlap": TENSOR_OVERLAP / 2}),
        ("--tp-comm-overlap --disable-tp-comm-overlap-rs --disable-tp-comm-overlap-ag", {}),
        ("--disable-tp-comm-overlap-rs", {}),
        ("--overlap-moe-expert-parallel-comm", {"expert_overlap": EXPERT_OVERLAP}),
        ("--overlap-moe-expert-parallel-comm --delay-wgrad-compute", {"expert_overlap": EXPERT_OVERLAP_LATE_WEIGHTS}),
        ("--delay-wgrad-compute", {}),
        ("--moe-token-dispatcher-type flex --moe-enable-deepep", {"expert_by_node": True}),
        ("--moe-token-dispatcher-type flex --moe-token-dispatcher-type alltoall", {}),
        ("--moe-shared-expert-overlap", {"shared_overlap": True}),
    ],
)
def test_flags_of_megatron_say_what_its_program_hides(text, expected):
    run = big(M39B, world_size=64, expert_model_parallel_size=8, tensor_model_parallel_size=2)
    software, said = megatron_software(run, flags(text))
    assert software == replace(Software.of(run), **expected)
    assert len(said) == (bool(expected) if "shared" not in text else 0)


def test_no_word_of_what_does_not_matter():
    run = big(M115B, world_size=64)
    assert (
        megatron_software(
            run, flags("--tp-comm-overlap --overlap-moe-expert-parallel-comm --moe-token-dispatcher-type flex")
        )[1]
        == ()
    )
