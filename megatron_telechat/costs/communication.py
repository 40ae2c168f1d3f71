"""Seconds of the exchanges between ranks, from message sizes and the links of a device file."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.activations import BYTES, Tokens, arriving_rows, tokens_of
from megatron_telechat.costs.devices import DeviceSpec

GRADIENT_BYTES = 4
"""Gradients are accumulated and reduced in fp32, whatever the compute type."""


@dataclass(frozen=True)
class Links:
    """The links that a run uses. Groups are taken as Megatron-Core places them: TP innermost, then CP, DP, PP; for
    experts ETP, then EP, then data. Ranks of a group lie a *stride* apart: 1 for TP, TP for the gradients of the dense
    layers (over DP x CP), EP x ETP for those of the experts.

    Attributes:
        intra, inter: bytes a second of one rank to others in its node and, through its own adapter, to other nodes, one
            direction, as reached.
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
        intra = (device.intra_node_bandwidth_gb_s or float("inf")) * 1e9 * share
        share = device.efficiency.get("link_between_nodes", share)
        inter = (device.inter_node_bandwidth_gb_s or float("inf")) * 1e9 * share
        ranks = run.parallel.ranks_per_node or device.node_devices or run.parallel.node_size
        return cls(intra, inter, device.collective_latency_s, ranks)

    def members(self, stride: int) -> int:
        """Ranks of a group that share a node."""
        return max(1, self.ranks_per_node // stride)

    def bandwidth(self, size: int, stride: int = 1) -> float:
        """Bytes a second in a ring of `size` ranks, `stride` apart.

        A group that leaves the node is as many rings as it has members on a node: each leaves through the adapter of
        another one, and together they are no faster than the links inside.
        """
        members = self.members(stride)
        return self.intra if size <= members else min(self.intra, members * self.inter)

    def between(self, apart: int) -> float:
        """Bytes a second from one rank to the one that is so many ranks further."""
        return self.intra if apart < self.ranks_per_node else self.inter

    def gather(self, whole_bytes: float, size: int, stride: int = 1) -> float:
        """All-gather or reduce-scatter of `whole_bytes` over `size` ranks, as a ring: (n - 1) / n of it passes each."""
        if size == 1:
            return 0.0
        return whole_bytes * (size - 1) / size / self.bandwidth(size, stride) + self.latency

    def all_to_all(self, sent_bytes: float, size: int, stride: int = 1) -> float:
        """Each of `size` ranks, `stride` apart, sends `sent_bytes`, evenly to all of them, itself included, through its
        own links; both kinds run at once."""
        if size == 1:
            return 0.0
        near = min(size, self.members(stride))
        inside = sent_bytes * (near - 1) / size / self.intra
        outside = sent_bytes * (size - near) / size / self.inter
        return max(inside, outside) + self.latency


def tensor_exchange_seconds(run: RunConfig, links: Links) -> float:
    """One way into and out of a tensor-parallel region: gather and reduce-scatter of [tokens, hidden], or the
    all-reduce of the same volume without sequence parallelism."""
    tokens, size = tokens_of(run), BYTES[run.training.precision]
    return 2 * links.gather(size * run.model.hidden_size * tokens.whole, tokens.tensor)


def expert_exchange_seconds(run: RunConfig, links: Links, by_node: bool = False) -> float:
    """Dispatch of the token rows to the ranks of their experts and the way back, one pass; each rank sends and gets
    `arriving_rows`.

    by_node: a row crosses to each node that holds one of its experts once, and is passed on inside it (DeepEP).
    """
    tokens, row = tokens_of(run), BYTES[run.training.precision] * run.model.hidden_size
    ranks = tokens.expert * tokens.expert_tensor
    arriving = row * arriving_rows(run.model, tokens)
    if not by_node or ranks <= links.ranks_per_node:
        return 2 * links.all_to_all(arriving, ranks)
    inside = arriving * (links.ranks_per_node - 1) / links.ranks_per_node / links.intra
    outside = row * _rows_to_nodes(run, tokens, ranks / links.ranks_per_node) / links.inter
    return 2 * (max(inside, outside) + links.latency)


def _rows_to_nodes(run: RunConfig, tokens: Tokens, nodes: float) -> float:
    """Rows that a rank sends to other nodes, one for each node that holds an expert of the token, for a balanced and
    random routing: T (n - 1) (1 - C(E - E/n, k) / C(E, k))."""
    experts, chosen = run.model.num_experts or 1, run.model.moe_router_topk
    elsewhere = experts - round(experts / nodes)
    missed = math.comb(elsewhere, chosen) / math.comb(experts, chosen)
    return tokens.split * (nodes - 1) * (1 - missed)


def tied_embedding_seconds(run: RunConfig, links: Links) -> float:
    """Once a step, where the first and the last stage share the embedding's matrix: the sum of its fp32 gradients."""
    parallel = run.parallel
    if run.model.untie_embeddings_and_output_weights or parallel.pipeline_model_parallel_size == 1:
        return 0.0
    table = run.model.vocab_size * run.model.hidden_size / parallel.tensor_model_parallel_size
    stages = parallel.pipeline_model_parallel_size
    apart = parallel.ranks_per_stage * (stages - 1)
    # an all-reduce of two ranks: each sends half of the sum, then half of the result
    return GRADIENT_BYTES * table / links.between(apart) + 2 * links.latency


def p2p_seconds(run: RunConfig, links: Links, in_pieces: bool = False) -> float:
    """One micro-batch's hidden states from a pipeline stage to the next.

    in_pieces: where tensor-parallel ranks hold all of them, each sends a part, and they gather it (scatter and gather,
    arXiv 2104.04473, section 4.1).
    """
    tokens, size = tokens_of(run), BYTES[run.training.precision]
    whole = size * run.model.hidden_size * tokens.split
    apart = run.parallel.ranks_per_stage
    if not in_pieces or tokens.split < tokens.whole or tokens.tensor == 1:
        return whole / links.between(apart) + links.latency
    return whole / tokens.tensor / links.between(apart) + links.latency + links.gather(whole, tokens.tensor)
