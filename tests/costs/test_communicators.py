"""Communicators of a rank, and the buffers that their library takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_telechat.config.schema import ParallelConfig, RunConfig, TrainingConfig
from megatron_telechat.costs.communicators import buffer_bytes, communicators, sending_pairs
from megatron_telechat.costs.devices import device_spec
from megatron_telechat.costs.memory import stage_memory
from megatron_telechat.device_kinds import DEVICE_KINDS
from megatron_telechat.errors import ConfigError
from megatron_telechat.planner.build import RESERVE_GIB, balance_problem
from tests.costs.test_memory import TINY
from tests.costs.test_parameters import M39B

MIB = 2**20
LAYOUT = dict(world_size=1024, tensor_model_parallel_size=4, pipeline_model_parallel_size=2,
              expert_model_parallel_size=8, expert_tensor_parallel_size=1)  # fmt: skip


def make(model=M39B, device="npu", **parallel) -> RunConfig:
    training = replace(TrainingConfig(seq_length=16, global_batch_size=1024), device=device)
    return RunConfig(model=model, parallel=ParallelConfig(**{**LAYOUT, **parallel}), training=training)


def test_communicators_of_a_mixture_at_1024_ranks():
    """TP4 x PP2 x DP128, experts EP8 x EDP64: ranks of a group by its purpose."""
    assert communicators(make()) == {
        "all ranks": 1024,
        "tensor-parallel activations": 4,
        "token counts of the pipeline": 2,
        "gradients": 128,
        "gradient norm": 8,
        "experts' exchange": 8,
        "experts' gradients": 64,
        "experts' gradient norm": 16,
    }
    sharded = communicators(make(use_distributed_optimizer=True))
    assert sharded["gradient norm"] == 1024 and "experts' gradient norm" not in sharded


def test_what_opens_a_communicator():
    balanced = replace(M39B, moe_aux_loss_coeff=0.01)
    assert communicators(make(balanced))["losses of the router"] == 4
    tied = replace(TINY, untie_embeddings_and_output_weights=False)
    assert communicators(make(tied))["tied embedding"] == 2
    assert "tied embedding" not in communicators(make(tied, pipeline_model_parallel_size=1))
    alone = dict.fromkeys(LAYOUT, 1)
    assert communicators(make(TINY, **alone)) == {} and sending_pairs(make(TINY, **alone)) == 0
    assert [sending_pairs(make(TINY, pipeline_model_parallel_size=size)) for size in (2, 4, 8)] == [1, 2, 2]


def test_buffers_by_hand_and_by_environment():
    run = make()
    assert buffer_bytes(run, {}) == (8 * 2 * 200 + 2 * 20) * MIB
    assert buffer_bytes(run, {"HCCL_BUFFSIZE": "64", "P2P_HCCL_BUFFSIZE": "0"}) == 8 * 2 * 64 * MIB
    assert buffer_bytes(run, {"HCCL_BUFFSIZE": ""}) == buffer_bytes(run, {})
    assert all(buffer_bytes(make(device=kind), {}) == 0 for kind in (*DEVICE_KINDS, "auto") if kind != "npu")


@pytest.mark.parametrize("variable, text", [("HCCL_BUFFSIZE", "0"), ("HCCL_BUFFSIZE", "200M"),
                                            ("P2P_HCCL_BUFFSIZE", "-1")])  # fmt: skip
def test_a_variable_that_is_no_size_is_refused(variable, text):
    with pytest.raises(ConfigError, match=f"{variable}='{text}' is no size of a buffer"):
        buffer_bytes(make(), {variable: text})


def test_the_device_holds_them_beside_what_the_training_allocates(monkeypatch):
    monkeypatch.delenv("HCCL_BUFFSIZE", raising=False)
    monkeypatch.delenv("P2P_HCCL_BUFFSIZE", raising=False)
    for stage in stage_memory(make()):
        assert stage.device_bytes - stage.total_bytes == stage.buffers_bytes == 3240 * MIB
    (other, *_) = stage_memory(make(device="cuda"))
    assert other.device_bytes == other.total_bytes


def test_plans_leave_room_for_them(monkeypatch):
    monkeypatch.delenv("HCCL_BUFFSIZE", raising=False)
    monkeypatch.delenv("P2P_HCCL_BUFFSIZE", raising=False)
    device = device_spec("ascend-910b-64g")
    assert device is not None
    assert balance_problem(make(), device).const_mem == RESERVE_GIB * 2**30 + 3240 * MIB
    assert balance_problem(make(), device, reserve_bytes=5.0).const_mem == 5.0


def test_statistics_of_the_attention_are_the_devices():
    """HCCL's devices keep 16 fp32 numbers of the softmax for a head of a token, where others keep one."""
    tokens, heads = 16, M39B.num_attention_heads / LAYOUT["tensor_model_parallel_size"]
    here, there = (
        stage_memory(make(device=device, pipeline_model_parallel_size=1, world_size=512))[0].activations_bytes
        for device in ("npu", "cuda")
    )
    assert here - there == M39B.num_layers * tokens * heads * 60
