"""What the configuration accepts, megatron-core accepts: a run is refused before its ranks meet, or not at all."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_telechat.config import load_run_config
from megatron_telechat.config.layout import pipeline_layout
from megatron_telechat.device_kinds import DEVICE_KINDS
from megatron_telechat.errors import ConfigError
from megatron_telechat.model import transformer_config

SHAPE = {
    "--num-layers": (1, 2, 4, 6, 8),
    "--num-attention-heads": (1, 2, 4, 16),
    "--num-query-groups": (1, 2, 4),
    "--kv-channels": (2, 4, 6, 16),
    "--hidden-size": (2, 7, 64),
    "--ffn-hidden-size": (0, 1, 32),
    "--seq-length": (1, 2, 32),
    "--precision": ("fp32", "bf16", "fp16"),
    "--micro-batch-size": (1, 2),
    "--global-batch-size": (1, 16, 64),
    "--tensor-model-parallel-size": (1, 2, 4),
    "--pipeline-model-parallel-size": (1, 2, 4),
    "--num-virtual-stages-per-pipeline-rank": (1, 2),
    "--pipeline-model-parallel-layout": ("Et|tt|tL", "E|tttt|L", "E||tttt|L"),
    "--recompute-granularity": ("full", "selective"),
    "--recompute-num-layers": (1, 9),
}
EXPERTS = {
    "--num-experts": (1, 2, 8, 16),
    "--moe-router-topk": (1, 2, 3, 8),
    "--moe-layer-freq": (1, 2, 5),
    "--moe-ffn-hidden-size": (1, 7, 32),
    "--moe-shared-expert-intermediate-size": (1, 2, 32),
    "--moe-aux-loss-coeff": (0, 0.1),
    "--moe-z-loss-coeff": (0, 0.1),
    "--expert-model-parallel-size": (1, 2, 4),
    "--expert-tensor-parallel-size": (1, 2),
}


def drawn(rng: random.Random, experts: bool) -> list[str]:
    flags = ["--preset", "telechat2-tiny-moe" if experts else "telechat2-tiny", "--mock-data", "--dry-run"]
    flags += ["--world-size", str(rng.choice((1, 2, 4, 8)))]
    options = {**SHAPE, **EXPERTS} if experts else SHAPE
    for name in rng.sample(sorted(options), rng.randrange(7)):
        flags += [name, str(rng.choice(options[name]))]
    return flags


def built(flags: list[str]) -> Any:
    """megatron-core's configuration of every virtual stage; None where the run is refused."""
    try:
        run = load_run_config(flags, {}).run
    except ConfigError:
        return None
    parallel, (expert, expert_tensor) = run.parallel, run.parallel.expert_sizes
    state = SimpleNamespace(
        tp_size=parallel.tensor_model_parallel_size,
        pp_size=parallel.pipeline_model_parallel_size,
        cp_size=1,
        ep_size=expert,
        etp_size=expert_tensor,
    )
    virtual_stages = pipeline_layout(run).num_virtual_stages
    return [
        transformer_config(run, state, DEVICE_KINDS["cpu"], virtual_stage if virtual_stages > 1 else None)
        for virtual_stage in range(virtual_stages)
    ]


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
def test_what_is_accepted_can_be_built(experts):
    rng = random.Random(7)
    accepted = 0
    for _ in range(200):
        flags = drawn(rng, experts)
        try:
            accepted += built(flags) is not None
        except Exception as error:
            raise AssertionError(f"accepted, but not built: {' '.join(flags)}") from error
    assert accepted > 30, "too few were accepted to say anything"


@pytest.mark.parametrize("topk", (2, 3, 16))
def test_every_other_number_of_experts_a_token_is_built(topk):
    flags = ["--preset", "telechat2-tiny-moe", "--mock-data", "--dry-run", "--moe-router-topk", str(topk)]
    assert built(flags)[0].moe_router_topk == topk


@pytest.mark.parametrize("virtual_stages", (1, 2))
def test_the_host_waits_for_no_batch_of_messages(virtual_stages):
    """megatron-core's default is a synchronize after every one, on every device that has one."""
    flags = ["--preset", "telechat2-tiny", "--mock-data", "--dry-run", "--world-size", "2"]
    flags += ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", str(virtual_stages)]
    configs = built(flags)
    assert len(configs) == virtual_stages and not any(config.batch_p2p_sync for config in configs)
