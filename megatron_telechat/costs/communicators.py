"""The communicators that a rank of a run opens, and the device memory that their library takes for them.

HCCL takes two buffers of HCCL_BUFFSIZE (200 MiB) for each communicator, and two of P2P_HCCL_BUFFSIZE (20 MiB) for each
pair of ranks that sends point to point, beside torch's allocator (CANN's manual of environment variables, 9.0, and
torch_npu's, 7.1). A communicator is opened at the first collective of its group; a group of one rank opens none. Of
other libraries nothing is counted: `DeviceTraits.communicator_buffer`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.device_kinds import CommunicatorBuffer, planned_device
from megatron_telechat.errors import ConfigError

MIB = 2**20


def communicators(run: RunConfig) -> dict[str, int]:
    """What a rank opens a communicator for → ranks of it, those of one rank left out.

    Groups with the same ranks but another purpose are communicators of their own: Megatron-Core makes a group for each.
    """
    parallel = run.parallel
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    pipeline, world = parallel.pipeline_model_parallel_size, parallel.world_size
    expert, expert_tensor = parallel.expert_sizes
    dense, routed = parallel.gradient_ranks
    sharded = parallel.use_distributed_optimizer
    found = {
        "all ranks": world,
        "tensor-parallel activations": tensor,
        "heads for tokens": parallel.context_sizes[0],
        "token counts of the pipeline": pipeline,
        "gradients": dense,
        "gradient norm": world if sharded else tensor * pipeline,
    }
    if pipeline > 1 and not run.model.untie_embeddings_and_output_weights:
        found["tied embedding"] = 2
    if run.model.is_moe:
        found["experts' exchange"] = expert * expert_tensor
        found["experts' gradients"] = routed
        found["experts' gradient norm"] = 1 if sharded else expert * expert_tensor * pipeline
        found["losses of the router"] = tensor * context if run.model.moe_aux_loss_coeff > 0 else 1
    return {purpose: ranks for purpose, ranks in found.items() if ranks > 1}


def sending_pairs(run: RunConfig) -> int:
    """Other ranks that one of the middle pipeline stages sends to or receives from: activations of its neighbours, keys
    and values of the context-parallel ranks."""
    parallel = run.parallel
    return min(2, parallel.pipeline_model_parallel_size - 1) + parallel.context_sizes[1] - 1


def buffer_bytes(run: RunConfig, environment: Mapping[str, str] | None = None) -> float:
    """Bytes of the buffers of all communicators of a rank.

    Args:
        environment: variables that change the size of a buffer; unset: those of this process.

    Raises:
        ConfigError: a variable that is no size.
    """
    device = planned_device(run.training.device)
    environment = os.environ if environment is None else environment
    whole = _bytes_of(device.communicator_buffer, environment, least=1) * len(communicators(run))
    return whole + _bytes_of(device.pair_buffer, environment, least=0) * sending_pairs(run)


def _bytes_of(buffer: CommunicatorBuffer | None, environment: Mapping[str, str], least: int) -> float:
    if buffer is None:
        return 0.0
    text = environment.get(buffer.variable, "").strip() or str(buffer.mib)
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(
            f"{buffer.variable}={text!r} is no size of a buffer", "environment",
            f"a whole number of MiB from {least}, or unset it (then {buffer.mib})",
        )  # fmt: skip
    return float(buffer.count * int(text) * MIB)
