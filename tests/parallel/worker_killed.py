"""Three ranks exchange data for ever; one of them is killed, or stops answering."""

from __future__ import annotations

import os
import signal
import sys
import time

from megatron_telechat import parallel
from megatron_telechat.backend import get_backend
from megatron_telechat.config.schema import ParallelConfig, RunConfig
from megatron_telechat.errors import UserError


def main(what: str) -> int:
    import torch
    import torch.distributed as dist

    limit = ParallelConfig(world_size=3, distributed_timeout_minutes=0.05)
    state = parallel.initialize(RunConfig(parallel=limit), get_backend("cpu"))
    with parallel.lost_ranks_reported():
        for turn in range(100_000):
            if turn == 5 and state.rank == 1:
                if what == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(7)
                return 0
            dist.all_reduce(torch.ones(1), group=state.dp_group)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1]))
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        # The way out of a broken process group: no destructor waits for a peer that is gone.
        os._exit(error.exit_code)
