"""How a context-parallel size is split into ranks that exchange heads and ranks that send keys and values."""

from __future__ import annotations

from megatron_telechat.config.schema import RunConfig


def head_sizes(run: RunConfig) -> list[int]:
    """Sizes of an a2a group that this model allows, ascending: they divide the context-parallel size, and the heads
    and the groups of a tensor-parallel rank."""
    parallel, model = run.parallel, run.model
    tensor = parallel.tensor_model_parallel_size
    heads, groups = model.num_attention_heads // tensor, model.query_groups // tensor
    size = parallel.context_parallel_size
    return [n for n in range(1, size + 1) if size % n == heads % n == groups % n == 0]


def least_traffic(run: RunConfig) -> tuple[int, int]:
    """The split (a2a ranks, p2p ranks) with the least traffic of a layer, forward and backward; a2a inside a node.

    Counted in heads of a rank's own tokens. An a2a group of U carries queries, keys, values and the output, forward and
    backward: 4 (heads + groups) (U - 1) / U. Keys and values travel to R - 1 ranks twice, their gradients once, and on
    average three quarters of them are needed: 4.5 groups (R - 1). An a2a hides behind nothing, so it must be cheaper,
    not equal. TransformerEngine's attention is a ring of all ranks.
    """
    parallel, model = run.parallel, run.model
    tensor, size = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    if parallel.cp_implementation != "own":
        return 1, size
    heads, groups = model.num_attention_heads // tensor, model.query_groups // tensor

    def traffic(n: int) -> float:
        return 4 * (heads + groups) * (n - 1) / n + 4.5 * groups * (size // n - 1)

    allowed = [n for n in head_sizes(run) if n * tensor <= parallel.node_size]
    best = min(allowed or [1], key=traffic)
    return best, size // best
