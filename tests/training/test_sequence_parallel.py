"""Everybody who asks whether sequence parallelism is on gets one answer, for runs that were not loaded too."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_telechat.cli.dry_run import _head
from megatron_telechat.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_telechat.costs.activations import tokens_of
from megatron_telechat.device_kinds import DEVICE_KINDS
from megatron_telechat.model import transformer_config
from megatron_telechat.parallel.topology import Topology
from megatron_telechat.training.chunks import tokens_of_a_rank
from megatron_telechat.training.routing import routed_stretches

LENGTH = 128


@pytest.mark.parametrize(
    "tensor, said, size", [(2, None, 2), (2, True, 2), (2, False, 1), (1, None, 1), (1, True, 1), (1, False, 1)]
)
def test_all_readers_split_the_sequence_alike(tensor, said, size):
    run = RunConfig(
        model=ModelConfig(
            num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, num_query_groups=4, kv_channels=16
        ),
        parallel=ParallelConfig(world_size=tensor, tensor_model_parallel_size=tensor, sequence_parallel=said),
        training=TrainingConfig(seq_length=LENGTH),
    )
    state = SimpleNamespace(
        tp_size=tensor, tp_rank=tensor - 1, pp_size=1, cp_size=1, ep_size=1, etp_size=1, dp_rank=0, dp_size=1, rank=0
    )
    assert run.parallel.sequence_parallel_size == size
    assert transformer_config(run, state, DEVICE_KINDS["cpu"]).sequence_parallel == (size > 1)
    assert tokens_of(run).split == LENGTH / size
    assert tokens_of_a_rank(run) == LENGTH // size
    assert routed_stretches(run, state) == [((tensor - 1) * 64 if size > 1 else 0, LENGTH)]
    assert ("sequence parallel" in "\n".join(_head(run, Topology.from_config(run.parallel)))) == (size > 1)
