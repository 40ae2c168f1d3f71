"""Rank 1 dies between two transfers of the experts; rank 0 must end with an error, not wait."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_telechat import parallel
from megatron_telechat.backend import get_backend
from megatron_telechat.config.schema import ParallelConfig, RunConfig
from megatron_telechat.parallel.channel import Channel
from tests.moe import worker_block as plain
from tests.moe.reference import random_weights


def main(how: str) -> None:
    """`how`: "killed", or "stopped", which only the timeout ends."""
    run = RunConfig(parallel=ParallelConfig(world_size=2, expert_model_parallel_size=2))
    state = parallel.initialize(run, get_backend("cpu"))
    block = plain.build_block(
        plain.make_config(state, torch.float32), state, random_weights(plain.EXPERTS, plain.HIDDEN, plain.WIDTH)
    )
    block.num_chunks = 4
    block.link = Channel(state.process_groups.tp_ep, "short", timedelta(seconds=5))
    block(torch.randn(12, 1, plain.HIDDEN))[0].sum().backward()
    if dist.get_rank() == 1:
        start, started = block.link.start, []

        def dies(*arguments):
            started.append(1)
            if len(started) == 6:  # the four dispatches are out, and one combine
                os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
            return start(*arguments)

        block.link.start = dies
    begin = time.monotonic()
    try:
        block(torch.randn(12, 1, plain.HIDDEN))[0].sum().backward()
    except RuntimeError as error:
        print(f"lost after {time.monotonic() - begin:.1f} s: {str(error).splitlines()[0]}", flush=True)
        os._exit(7)
    print("nothing was noticed", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
