"""Peak memory of the attention over ranks: ours, and with all keys and values on every rank.

Every arm is a launch of its own, in which every tensor comes from the system and goes back at once
(MALLOC_MMAP_THRESHOLD_): the resident set is the memory in use, buffers of the link included. The products are left
out, their results are not: gradients of a block are tensors, as the kernels return them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from processes import AT_ONCE, resident_mb
from throttled_links import run_ranks
from torch import Tensor

from context.arms import Arms
from context.peers import Gathered
from context.problem import Problem
from megatron_telechat.backend.block_attention import Block, Grads, Running, Saved

RANKS, LENGTH = 4, 32768
SHAPE = ["--tokens", str(LENGTH // RANKS), "--heads", "8", "--groups", "8", "--dtype", "bf16"]
"""As many groups as heads, in the type of training."""
KEEP_PIECES = 2
ARMS = ("ours 1 piece", "ours 2 pieces", "ours 4 pieces", "ours keep", "all-gather")
ROUNDS, WARM_UP = 3, 2


class _NoProducts:
    """A `BlockAttention` without its work."""

    def takes(self, query: Tensor) -> bool:
        return True

    def prepared(self, rows: Tensor) -> Tensor:
        return rows

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], causal: bool, total: Running
    ) -> None:
        for q0, q1, _, _ in blocks:
            lse = torch.zeros(query.shape[1], q1 - q0)
            (total.begin if causal else total.add)(slice(q0, q1), torch.empty_like(query[q0:q1]), lse)

    def backward(
        self, saved: Saved, key: Tensor, value: Tensor, blocks: Sequence[Block], causal: bool, grads: Grads
    ) -> None:
        for q0, q1, k0, k1 in blocks:
            found = [torch.zeros_like(each) for each in (saved.query[q0:q1], key[k0:k1], value[k0:k1])]
            grads.query[q0:q1] += found[0]
            grads.key[k0:k1] += found[1]
            grads.value[k0:k1] += found[2]


def rank(name: str, problem: Problem, result: Path) -> None:
    """One arm on one rank; rank 0 writes what it saw, in MB above the inputs."""
    arms = Arms(problem, None)
    arms.kernel = _NoProducts()
    if name == "all-gather":
        arm = arms.peer(Gathered)
    else:
        keep = name == "ours keep"
        arm = arms.ours(KEEP_PIECES if keep else int(name.split()[1]), keep)
    peaks = []
    for number in range(WARM_UP + ROUNDS):
        dist.barrier()
        before = resident_mb("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        arm.run()
        if number >= WARM_UP:
            peaks.append(resident_mb("VmHWM") - before)
    if dist.get_rank() == 0:
        result.write_text(json.dumps(median(peaks)))


def start(command: Sequence[str], timeout: float) -> dict[str, float]:
    """MB by arm.

    Args:
        command: starts a rank of this bench.
    """
    peaks = {}
    for name in ARMS:
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            code = run_ranks(
                [*command, *SHAPE, "--memory-arm", name, file.name], RANKS, pin=True, timeout=timeout, env=AT_ONCE
            )
            if code:
                raise SystemExit(code)
            peaks[name] = json.loads(Path(file.name).read_text())
    return peaks
