"""Context parallelism in the cost model: bytes against the plan of each rank, memory and seconds by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_telechat.costs.communication import Links
from megatron_telechat.costs.communicators import communicators, sending_pairs
from megatron_telechat.costs.conditions import conditions
from megatron_telechat.costs.context import ContextExchange
from megatron_telechat.costs.devices import device_spec
from megatron_telechat.costs.memory import stage_memory
from megatron_telechat.costs.time import TimeModel
from megatron_telechat.costs.volumes import stage_volumes
from megatron_telechat.parallel.context.plan import whole_rows
from tests.costs.test_memory import TINY, make
from tests.costs.test_parameters import M115B
from tests.costs.test_time import big


def shared(heads: int, ring: int, recompute: str | None = None, length: int = 48, batch: int = 1, **parallel):
    """The small model with rows over `heads` x `ring` ranks; recompute of one layer of four."""
    training = {"seq_length": length, "micro_batch_size": batch, "global_batch_size": 8 * batch}
    if recompute:
        training["recompute_layout"] = f"none*3,{recompute}"
    size = heads * ring
    sizes = {"context_parallel_size": size, "hierarchical_context_parallel_sizes": (heads, ring), "world_size": size}
    return make(training=training, **{**sizes, **parallel})


@pytest.mark.parametrize("keeps", [False, True], ids=["sent again", "kept"])
@pytest.mark.parametrize("recompute", [None, "core_attn", "full", "mlp"])
@pytest.mark.parametrize("heads, ring", [(1, 2), (1, 3), (1, 4), (1, 8), (2, 2), (2, 3), (2, 1)])
def test_bytes_of_a_step_are_those_of_the_plan_of_each_rank(heads, ring, recompute, keeps):
    passes = 4 + (recompute in ("core_attn", "full"))  # forwards of four layers
    for length, batch in ((48, 1), (96, 3)):
        run = shared(heads, ring, recompute, length, batch, cp_keep_received=keeps)
        row = 2 * 2 * TINY.head_dim * TINY.query_groups // heads  # keys and values, bf16
        tokens = batch * length // (heads * ring)
        brought = 2 * tokens * TINY.head_dim * (2 * TINY.num_attention_heads + 2 * TINY.query_groups)
        for rank in range(heads * ring):
            plan = whole_rows(length, batch, ring, rank // heads)
            out, arrived = (sum(getattr(step, way) for step in plan.steps) for way in ("rows_out", "rows_in"))
            fetches = passes + 4 * (not keeps)
            found = {kind: one.per_microbatch for (_, kind), one in stage_volumes(run, 0, rank).items() if _ == "cp"}
            expected = {
                "send": row * (fetches * out + 4 * arrived),
                "receive": row * (fetches * arrived + 4 * out),
                "all-to-all": brought * (passes + 4) * (heads > 1),
            }
            assert found == {kind: size for kind, size in expected.items() if size}


def test_without_context_parallelism_nothing_is_exchanged():
    assert not any(group == "cp" for group, _ in stage_volumes(make(), 0))
    assert "heads for tokens" not in communicators(make())


def test_groups_of_the_exchange_take_their_buffers():
    run = shared(2, 4, world_size=64, pipeline_model_parallel_size=4)
    assert communicators(run)["heads for tokens"] == 2
    assert sending_pairs(run) == 2 + 3
    assert sending_pairs(shared(2, 1)) == 0


# ---- memory -----------------------------------------------------------------------------------


LAYER = 2 * (8 + 16 + 8 + 8 + 8 + 8 + 36) + 16
"""Bytes a token that a layer keeps: input, norm outputs, residual, query, key and value, output, MLP; log-sum-exp."""
PIECE = 2 * 8 * 3 // 4 // 2
"""Bytes a token of a piece of keys and values: of two pieces, three quarters of them needed."""
PASSING = 4 * (8 + 8) + 12 * PIECE
"""Bytes a token of a backward: fp32 gradients of query, key and value; pieces, their gradients and buffers."""
ENDS = 4 * 32 + 2 * 2 * 8 + 8
"""Bytes a token of the softmax, last norm and token ids. The logits in bf16, 64, are free before a layer's backward,
which never needs less here."""


@pytest.mark.parametrize("ring", [2, 4])
def test_a_rank_holds_its_part_of_a_row_and_what_passes_in_a_backward(ring):
    tokens = 48 // ring
    (stage,) = stage_memory(shared(1, ring))
    assert stage.activations_bytes == tokens * (4 * LAYER + ENDS + PASSING)
    assert stage.transient_bytes == tokens * PASSING
    (kept,) = stage_memory(shared(1, ring, cp_keep_received=True))
    # of each layer the keys and values of all others, and none under way in the backward
    assert kept.activations_bytes - stage.activations_bytes == tokens * (4 * 2 * 8 * (ring - 1) - 5 * PIECE)
    (whole,) = stage_memory(shared(1, ring, cp_pieces=1))
    assert whole.transient_bytes == tokens * (4 * (8 + 8) + 12 * 2 * PIECE)


@pytest.mark.parametrize("heads, ring, batch", [(2, 2, 1), (2, 1, 2)])
def test_the_output_is_kept_twice_where_heads_are_exchanged(heads, ring, batch):
    tokens = 48 * batch // (heads * ring)
    (stage,) = stage_memory(shared(heads, ring, batch=batch))
    passing = PASSING if ring > 1 else 4 * (8 + 8)
    assert stage.activations_bytes == tokens * (4 * (LAYER + 2 * 8) + ENDS + passing)


def test_recompute_drops_what_the_exchange_keeps():
    keeps = {"cp_keep_received": True}
    plain, core, full = (stage_memory(shared(2, 2, name, **keeps))[0] for name in (None, "core_attn", "full"))
    tokens = 48 // 4
    dropped = 16 + 2 * 8 + 2 * 8  # log-sum-exp, own order of the output, received keys and values
    held = [stage.activations_bytes - stage.transient_bytes for stage in (plain, core, full)]
    assert held[0] - held[1] == tokens * dropped
    passing = PASSING - 5 * PIECE
    assert core.transient_bytes == tokens * (passing + dropped)
    assert held[0] - held[2] == tokens * (LAYER - 16 + dropped - 2 * 8)
    assert full.transient_bytes == tokens * (LAYER - 16 + dropped - 2 * 8 + passing)


# ---- seconds ----------------------------------------------------------------------------------

NODE = Links(intra=100.0, inter=10.0, latency=0.0, ranks_per_node=8)
RING = ContextExchange(heads=1, ring=2, tensor=1, inputs=400.0, output=200.0, chunk=100.0, keeps=False, pieces=2)


def test_the_longer_of_products_and_transfers_decides():
    # two chunks of a second each go to rank 0; one of two pieces comes first, and a quarter of the products is last
    assert RING.forward_seconds(NODE, 10.0) == 10.0
    assert RING.forward_seconds(NODE, 1.0) == 2.0 + 0.25
    assert replace(RING, pieces=1).forward_seconds(NODE, 3.0) == 2.0 + 1.5
    # fetched once more and sent home: three chunks each way
    assert RING.backward_seconds(NODE, 10.0) == 10.0
    assert RING.backward_seconds(NODE, 2.0) == 3.0 + 0.5
    assert replace(RING, keeps=True).backward_seconds(NODE, 2.0) == 2.0 + 0.5
    # in one piece: two seconds each for the first and the last one, and one second of own tokens beside each
    assert replace(RING, pieces=1).backward_seconds(NODE, 4.0) == 4.0 + 2 * 1.0
    assert replace(RING, pieces=1, keeps=True).backward_seconds(NODE, 4.0) == 4.0 + 1.0
    assert replace(RING, keeps=True).forward_seconds(NODE, 1.0) == RING.forward_seconds(NODE, 1.0)


def test_heads_are_exchanged_before_and_after_and_hide_nothing():
    both = replace(RING, heads=2, ring=1)
    exchange = (400.0 + 200.0) / 2 / 100
    assert both.forward_seconds(NODE, 5.0) == 5.0 + exchange
    assert both.backward_seconds(NODE, 5.0) == 5.0 + exchange
    assert replace(RING, heads=2).forward_seconds(NODE, 10.0) == 10.0 + exchange


@pytest.mark.parametrize(
    "tensor, heads, ring, near, far",
    [
        (1, 1, 8, 14, 0),  # within a node
        (4, 1, 4, 2, 4),  # two members on a node: rank 0 gets two chunks from its neighbour, four from the others
        (2, 2, 4, 2, 4),  # the same with the heads' ranks between them
        (8, 1, 4, 0, 6),  # each on its own node
    ],
)
def test_ranks_of_a_ring_use_the_link_between_them(tensor, heads, ring, near, far):
    exchange = replace(RING, tensor=tensor, heads=heads, ring=ring, inputs=0.0, output=0.0)
    assert exchange.forward_seconds(NODE, 0.0) == max(near * 100 / 100, far * 100 / 10)
    links = replace(NODE, latency=0.5)
    assert exchange.forward_seconds(links, 0.0) - exchange.forward_seconds(NODE, 0.0) == pytest.approx(
        0.5 * (ring - 1) + (heads > 1)
    )


def test_heads_of_ranks_on_several_nodes_use_both_links():
    exchange = replace(RING, tensor=4, heads=4, ring=1)
    assert exchange.forward_seconds(NODE, 0.0) == sum(max(size / 4 / 100, size / 2 / 10) for size in (400.0, 200.0))


def test_a_long_row_costs_as_much_work_on_every_split():
    """115B, 131,072 tokens: transfers hide behind the products, so that the ranks share the work evenly."""
    device = device_spec("h100-80g")
    assert device is not None

    def attention(context: int) -> float:
        run = big(M115B, world_size=512, tensor_model_parallel_size=8, context_parallel_size=context)
        run = replace(run, training=replace(run.training, seq_length=131072))
        return TimeModel(run, device).layer_parts(0)["core_attn"].backward

    alone = attention(1)
    assert [context * attention(context) / alone for context in (2, 4, 8)] == pytest.approx([1, 1, 1], abs=0.1)


def test_measured_times_are_for_one_way_of_sharing():
    ways = [shared(1, 4), shared(2, 2), shared(1, 4, cp_keep_received=True)]
    assert len({str(conditions(run)) for run in ways}) == 3
    assert not {"a2a_ranks", "cp_keep_received"} & set(conditions(make()))
