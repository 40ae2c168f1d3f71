"""Seconds of the exchanges between ranks, from message sizes and the links of a device file."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.activations import BYTES, Tokens, arriving_rows, tokens_of
from megatron_telechat.costs.devices import DeviceSpec

DEFAULT_RANKS_PER_NODE = 8
GRADIENT_BYTES = 4
"""Gradients are accumulated and reduced in fp32, whatever the compute type."""


@dataclass(frozen=True)
class Links:
    """The links that a run uses. Groups are taken as Megatron-Core places them: TP innermost, then CP, DP, PP.

    Attributes:
        intra, inter: bytes a second of one rank to others in its node and to other nodes, one direction, as reached.
        latency: seconds of one collective or message apart from its bytes.
        ranks_per_node: ranks of one node.
    """

    intra: float
    inter: float
    latency: float
    ranks_per_node: int

    @classmethod
    def of(cls, run: RunConfig, device: DeviceSpec) -> Links:
        """Links of this device; an unknown bandwidth counts as free."""
        share = device.efficiency.get("link", 1.0)
        world = max(run.parallel.world_size, 1)
        per_node = run.parallel.ranks_per_node or min(DEFAULT_RANKS_PER_NODE, world)
        intra = (device.intra_node_bandwidth_gb_s or float("inf")) * 1e9 * share
        inter = (device.inter_node_bandwidth_gb_s or float("inf")) * 1e9 * share
        return cls(intra, inter, device.collective_latency_s, per_node)

    def bandwidth(self, reach: int) -> float:
        """Bytes a second in a group whose ranks lie within `reach` consecutive ranks."""
        return self.intra if reach <= self.ranks_per_node else self.inter

    def gather(self, whole_bytes: float, size: int, reach: int) -> float:
        """All-gather or reduce-scatter of `whole_bytes` over `size` ranks, as a ring: (n - 1) / n of it passes each."""
        if size == 1:
            return 0.0
        return whole_bytes * (size - 1) / size / self.bandwidth(reach) + self.latency

    def all_to_all(self, sent_bytes: float, size: int, reach: int) -> float:
        """Each rank sends `sent_bytes`, evenly to all `size` ranks, itself included; both kinds of links run at once."""
        if size == 1:
            return 0.0
        near = max(1, round(size * min(1.0, self.ranks_per_node / reach)))
        inside = sent_bytes * (near - 1) / size / self.intra
        outside = sent_bytes * (size - near) / size / self.inter
        return max(inside, outside) + self.latency


def tensor_exchange_seconds(run: RunConfig, links: Links) -> float:
    """One way into and out of a tensor-parallel region: gather and reduce-scatter of [tokens, hidden], or the
    all-reduce of the same volume without sequence parallelism."""
    tokens, size = tokens_of(run), BYTES[run.training.precision]
    return 2 * links.gather(size * run.model.hidden_size * tokens.whole, tokens.tensor, tokens.tensor)


def expert_exchange_seconds(run: RunConfig, links: Links) -> float:
    """Dispatch of the token rows to the ranks of their experts and the way back, one pass; each rank sends and gets
    `arriving_rows`."""
    tokens, size = tokens_of(run), BYTES[run.training.precision]
    ranks = tokens.expert * tokens.expert_tensor
    return 2 * links.all_to_all(size * run.model.hidden_size * arriving_rows(run.model, tokens), ranks, ranks)


def context_exchange_seconds(run: RunConfig, links: Links, tokens: Tokens) -> float:
    """Keys and values once round the ring of context-parallel ranks."""
    size, ring = BYTES[run.training.precision], run.parallel.context_parallel_size
    key_value = 2 * run.model.query_groups * run.model.head_dim * tokens.whole / tokens.tensor
    return links.gather(size * key_value * ring, ring, tokens.tensor * ring)


def tied_embedding_seconds(run: RunConfig, links: Links) -> float:
    """Once a step, where the first and the last stage share the embedding's matrix: the sum of its fp32 gradients."""
    parallel = run.parallel
    if run.model.untie_embeddings_and_output_weights or parallel.pipeline_model_parallel_size == 1:
        return 0.0
    table = run.model.vocab_size * run.model.hidden_size / parallel.tensor_model_parallel_size
    return 2 * links.gather(GRADIENT_BYTES * table, 2, max(parallel.world_size, 1))


def p2p_seconds(run: RunConfig, links: Links) -> float:
    """One micro-batch's hidden states from a pipeline stage to the next."""
    tokens, size = tokens_of(run), BYTES[run.training.precision]
    stride = max(run.parallel.world_size // run.parallel.pipeline_model_parallel_size, 1)
    bandwidth = links.intra if stride < links.ranks_per_node else links.inter
    return size * run.model.hidden_size * tokens.split / bandwidth + links.latency
