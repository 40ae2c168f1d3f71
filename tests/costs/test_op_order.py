"""The op order is Megatron-Core's, and its in-flight counts are those of the textbook."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_telechat.config.microbatch_groups import next_count, possible_groups, schedule_takes
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


def test_a_group_of_more_microbatches_keeps_more():
    # P=2, V=2, N=3, m=5, rank 1 (megatron-core, model_parallel_config.py): 0 1 2 0 1 2 3 4 3 4
    ops = rank_ops(1, 2, 2, 5, 3)
    forwards = [(op.microbatch, op.virtual_stage) for op in ops if op.forward]
    assert forwards == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (3, 0), (4, 0), (3, 1), (4, 1)]
    peaks = [peak_in_flight(0, 4, 3, 48, [1.0] * 3, group_size=group)[0] for group in (None, 4, 6, 8, 48)]
    assert peaks == [2 * 3 + 2 * group + 1 for group in (4, 4, 6, 8)] + [2 * 3 + 2 * 48 + 1]
    # the shorter last group makes the peak: of the whole order, and of the part that is looked at
    kept, working = [1.0, 1.0, 5.0, 20.0], [30.0, 0.0, 3.0, 3.0]
    held, most = [0] * 4, 0.0
    for op in rank_ops(2, 4, 4, 29, 5):
        held[op.virtual_stage] += op.forward
        now = sum(number * size for number, size in zip(held, kept, strict=True))
        most = max(most, now + (not op.forward) * working[op.virtual_stage])
        held[op.virtual_stage] -= not op.forward
    found = peak_in_flight(2, 4, 4, 29, kept, lambda op: (not op.forward) * working[op.virtual_stage], 5)
    assert found[0] == most == 140


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
                groups = [stages, *(possible_groups(microbatches, stages) if virtual_stages > 1 else [])]
                for group, rank in itertools.product(groups, range(stages)):
                    table = schedules.get_schedule_table(microbatches, virtual_stages, group)
                    _, _, warmup, _ = schedules.get_pp_rank_microbatches(
                        microbatches,
                        virtual_stages,
                        group,
                        p2p_communicator=Communicator(stages, rank, virtual_stages),
                    )
                    given = (rank, stages, virtual_stages, microbatches, None if group == stages else group)
                    assert num_warmup_forwards(*given) == warmup
                    ops = rank_ops(*given)
                    if virtual_stages > 1:
                        assert [(op.microbatch, op.virtual_stage) for op in ops if op.forward] == table
                        assert [
                            (op.microbatch, virtual_stages - 1 - op.virtual_stage) for op in ops if not op.forward
                        ] == table
                    else:
                        assert [op.microbatch for op in ops if op.forward] == list(range(microbatches))


class Passed(Exception):
    """megatron-core's schedule is past its checks."""


def test_groups_are_those_that_megatron_core_takes(monkeypatch):
    """Every size of a group that its interleaved schedule refuses, and no other, is refused here."""
    schedules = pytest.importorskip("megatron.core.pipeline_parallel.schedules")

    def passed(*args: object, **kwargs: object) -> None:
        raise Passed

    monkeypatch.setattr(schedules, "get_pp_rank_microbatches", passed)
    monkeypatch.setattr(schedules, "get_model_type", lambda model: None)
    monkeypatch.setattr(schedules.torch, "zeros", lambda *args, **kwargs: None)  # on the device
    for stages, count in itertools.product((2, 3, 4), range(1, 14)):
        for group in range(1, count + 3):
            try:
                _begin_interleaved(schedules, stages, count, group)
            except Passed:
                taken = True
            except (ValueError, RuntimeError) as error:
                assert "micro-batches" in str(error)
                taken = False
            assert schedule_takes(count, group, stages) == taken, (stages, count, group)
            assert (group in possible_groups(count, stages)) == taken
            if group >= stages:
                more = next_count(count, group, stages)
                assert schedule_takes(more, group, stages)
                assert not any(schedule_takes(one, group, stages) for one in range(count, more))


def _begin_interleaved(schedules: Any, stages: int, count: int, group: int) -> None:
    """The first lines of megatron-core's interleaved schedule, which check the sizes."""
    virtual_stage = schedules.torch.nn.Identity()
    virtual_stage.config = SimpleNamespace(
        microbatch_group_size_per_vp_stage=group, overlap_p2p_comm=True, batch_p2p_comm=False, hidden_size=8,
        no_sync_func=None, grad_sync_func=None, param_sync_func=None, finalize_model_grads_func=None, timers=None,
        sequence_parallel=False, overlap_moe_expert_parallel_comm=False,
    )  # fmt: skip
    one = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    pipeline = SimpleNamespace(size=lambda: stages, rank=lambda: 0)
    names = ("tp", "cp", "pp", "embd", "pos_embd", "dp_cp", "tp_dp_cp")
    schedules.forward_backward_pipelining_with_interleaving(
        forward_step_func=None,
        data_iterator=[None, None],
        model=[virtual_stage, virtual_stage],
        num_microbatches=count,
        seq_length=8,
        micro_batch_size=1,
        p2p_communicator=SimpleNamespace(pp_group=pipeline, config=virtual_stage.config),
        pg_collection=SimpleNamespace(**dict.fromkeys(names, one)),
    )
