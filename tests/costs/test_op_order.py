"""The op order is Megatron-Core's, and its in-flight counts are those of the textbook."""

from __future__ import annotations

import pytest

from megatron_telechat.costs.op_order import Op, num_warmup_forwards, peak_in_flight, rank_ops
from megatron_telechat.errors import ConfigError


def test_one_f_one_b_keeps_at_most_the_depth_of_the_pipeline():
    for stages in (1, 2, 4, 8):
        for microbatches in (1, 3, 8, 64):
            for rank in range(stages):
                peak, _ = peak_in_flight(rank, stages, 1, microbatches, [1.0])
                assert peak == min(stages - rank, microbatches)


def test_interleaved_by_hand():
    # P=2, V=2, m=4, rank 1: two warm-up forwards, both of virtual stage 0
    ops = rank_ops(1, 2, 2, 4)
    assert ops[:6] == [
        Op(True, 0, 0),
        Op(True, 0, 1),
        Op(True, 1, 0),
        Op(False, 1, 0),
        Op(True, 1, 1),
        Op(False, 1, 1),
    ]
    assert peak_in_flight(0, 2, 2, 4, [1.0, 1.0])[0] == 5  # 2 (P-1) + (V-1) P + 1


@pytest.mark.parametrize(
    "stages, virtual_stages, microbatches", [(2, 2, 3), (4, 2, 8), (4, 3, 4), (8, 3, 8), (4, 1, 2)]
)
def test_every_microbatch_goes_forward_then_backward_once(stages, virtual_stages, microbatches):
    for rank in range(stages):
        ops = rank_ops(rank, stages, virtual_stages, microbatches)
        assert len(ops) == len(set(ops)) == 2 * virtual_stages * microbatches
        for op in ops:
            if not op.forward:
                assert ops.index(Op(True, op.virtual_stage, op.microbatch)) < ops.index(op)


def test_many_microbatches_do_not_change_the_peak():
    sizes = [3.0, 2.0, 5.0]
    assert peak_in_flight(1, 4, 3, 16, sizes) == peak_in_flight(1, 4, 3, 4096, sizes)


def test_interleaving_without_a_pipeline_is_refused():
    with pytest.raises(ConfigError, match="virtual stages"):
        rank_ops(0, 1, 2, 4)


def test_order_is_megatron_cores():
    schedules = pytest.importorskip("megatron.core.pipeline_parallel.schedules")

    class Group:
        def __init__(self, size, rank):
            self.size, self.rank = (lambda: size), (lambda: rank)

    class Communicator:
        def __init__(self, size, rank, virtual_stages):
            self.pp_group = Group(size, rank)
            self.virtual_pipeline_model_parallel_size = virtual_stages if virtual_stages > 1 else None

    for stages in (2, 3, 4, 8):
        for virtual_stages in (1, 2, 3):
            for microbatches in (1, stages, 2 * stages, 2 * stages + 1, 4 * stages):
                table = schedules.get_schedule_table(microbatches, virtual_stages, stages)
                for rank in range(stages):
                    _, _, warmup, _ = schedules.get_pp_rank_microbatches(
                        microbatches,
                        virtual_stages,
                        stages,
                        p2p_communicator=Communicator(stages, rank, virtual_stages),
                    )
                    assert num_warmup_forwards(rank, stages, virtual_stages, microbatches) == warmup
                    ops = rank_ops(rank, stages, virtual_stages, microbatches)
                    if virtual_stages > 1:
                        assert [(op.microbatch, op.virtual_stage) for op in ops if op.forward] == table
                        assert [
                            (op.microbatch, virtual_stages - 1 - op.virtual_stage) for op in ops if not op.forward
                        ] == table
                    else:
                        assert [op.microbatch for op in ops if op.forward] == list(range(microbatches))
