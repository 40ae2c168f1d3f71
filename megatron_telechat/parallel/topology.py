"""Where every rank stands, in Megatron's order, worked out without torch or any process.

The attention domain counts tp fastest, then cp, dp, pp. The expert domain of the same ranks counts
etp fastest, then ep, edp, pp (megatron-core 0.16.1, parallel_state.py: two RankGenerators of order
"tp-cp-ep-dp-pp"). Both cut the ranks into the same pipeline stages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_telechat.config.schema import ParallelConfig
from megatron_telechat.errors import ConfigError

ATTENTION_AXES = ("tp", "cp", "dp", "pp")
EXPERT_AXES = ("etp", "ep", "edp", "pp")


@dataclass(frozen=True)
class Coordinates:
    """One rank's place in every domain."""

    rank: int
    node: int
    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int


@dataclass(frozen=True)
class Topology:
    """Sizes of all domains over `world_size` ranks, `ranks_per_node` to a node."""

    world_size: int
    ranks_per_node: int
    tp: int = 1
    cp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1

    @classmethod
    def from_config(cls, parallel: ParallelConfig) -> Topology:
        """The topology of a run.

        Raises:
            ConfigError: the sizes do not divide the number of ranks.
        """
        ep, etp = parallel.expert_sizes
        topology = cls(
            world_size=parallel.world_size,
            ranks_per_node=parallel.node_size,
            tp=parallel.tensor_model_parallel_size,
            cp=parallel.context_parallel_size,
            pp=parallel.pipeline_model_parallel_size,
            ep=ep,
            etp=etp,
        )
        for what, size in (
            ("tensor x context x pipeline", topology.tp * topology.cp * topology.pp),
            ("expert x expert-tensor x pipeline", topology.ep * topology.etp * topology.pp),
        ):
            if topology.world_size % size:
                raise ConfigError(
                    f"world_size={topology.world_size} is not a multiple of {what} parallel size = {size}",
                    fix=f"a multiple of {size} ranks, or smaller parallel sizes",
                )
        return topology

    @property
    def dp(self) -> int:
        """Data-parallel size outside the experts, context parallelism left out."""
        return self.world_size // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        """Data-parallel size of the experts."""
        return self.world_size // (self.etp * self.ep * self.pp)

    @property
    def num_nodes(self) -> int:
        """Nodes that the ranks stand on; the last one may be partly used."""
        return math.ceil(self.world_size / self.ranks_per_node)

    def size(self, axis: str) -> int:
        """Size of one of ATTENTION_AXES or EXPERT_AXES."""
        return getattr(self, axis)

    def node_of(self, rank: int) -> int:
        """Node of a rank: nodes are filled one after the other."""
        return rank // self.ranks_per_node

    def coordinates(self, rank: int) -> Coordinates:
        """Place of `rank` in both domains."""
        if not 0 <= rank < self.world_size:
            raise IndexError(f"rank {rank} of {self.world_size}")
        places: dict[str, int] = {}
        for axes in (ATTENTION_AXES, EXPERT_AXES):
            rest = rank
            for axis in axes:
                rest, places[axis] = divmod(rest, self.size(axis))
        return Coordinates(rank=rank, node=self.node_of(rank), **places)

    def groups(self, kind: str) -> list[list[int]]:
        """All groups of a kind, as megatron-core orders them: ``tp``, ``dp``, ``ep``, or joined axes such as ``dp-cp``.

        The ranks of a group differ in the named axes alone; joined axes must be of one domain.
        """
        named = kind.split("-")
        domain = ATTENTION_AXES if all(axis in ATTENTION_AXES for axis in named) else EXPERT_AXES
        if not set(named) <= set(domain):
            raise ValueError(f"no group of kind {kind!r}")
        strides, stride = {}, 1
        for axis in domain:
            strides[axis] = stride
            stride *= self.size(axis)
        inner = self._offsets([axis for axis in domain if axis in named], strides)
        outer = self._offsets([axis for axis in domain if axis not in named], strides)
        return [[start + offset for offset in inner] for start in outer]

    def _offsets(self, axes: Sequence[str], strides: dict[str, int]) -> list[int]:
        """Rank offsets of every combination of places on these axes, the first axis fastest."""
        offsets = [0]
        for axis in axes:
            offsets = [step * strides[axis] + offset for step in range(self.size(axis)) for offset in offsets]
        return offsets

    def nodes_of(self, ranks: Iterable[int]) -> list[int]:
        """Nodes these ranks stand on, in order."""
        return sorted({self.node_of(rank) for rank in ranks})

    def crossing(self, kind: str) -> int:
        """Groups of a kind whose ranks stand on more than one node."""
        return sum(len(self.nodes_of(group)) > 1 for group in self.groups(kind))


def expert_groups_text(topology: Topology, most: int = 4) -> str:
    """The expert groups, which exchange tokens, in a line: their ranks and nodes, and how many of them cross nodes.

    Groups of the expert domain are runs of ranks; with many groups the first ones and the last one stand for all.
    """
    groups, crossing = topology.groups("etp-ep"), topology.crossing("etp-ep")
    shown = groups if len(groups) <= most else [*groups[: most - 1], groups[-1]]
    texts = [_group_text(topology, group) for group in shown]
    if len(groups) > most:
        texts.insert(most - 1, "..")
    across = (
        "none crosses nodes"
        if not crossing
        else "all cross nodes"
        if crossing == len(groups)
        else f"{crossing} cross nodes"
    )
    count = f"{len(groups)} group{'s' * (len(groups) > 1)} of {len(groups[0])}"
    return f"{count}: ranks {', '.join(texts)}; {across} of {topology.ranks_per_node}"


def _group_text(topology: Topology, group: Sequence[int]) -> str:
    nodes = topology.nodes_of(group)
    ranks = str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}"
    return ranks if topology.num_nodes == 1 else f"{ranks} (node{'s' * (len(nodes) > 1)} {', '.join(map(str, nodes))})"


def placement_warnings(topology: Topology, is_moe: bool, folded: bool = False) -> list[str]:
    """Arrangements that put busy traffic on the slow links, each with one that would not.

    Args:
        folded: the tensor domain is folded into the expert domain, so EP has to stay a multiple of TP.
    """
    warnings = []
    node = topology.ranks_per_node
    if topology.tp > 1 and topology.crossing("tp"):
        best = max(size for size in range(1, topology.tp + 1) if topology.tp % size == 0 and node % size == 0)
        warnings.append(
            f"{topology.crossing('tp')} of {len(topology.groups('tp'))} tensor-parallel groups cross nodes of {node} "
            f"ranks: every layer waits for the network. --tensor-model-parallel-size {best} stays within a node"
        )
    if is_moe and topology.ep * topology.etp > 1 and topology.crossing("etp-ep"):
        domain = topology.ep * topology.etp
        crossing, total = topology.crossing("etp-ep"), len(topology.groups("etp-ep"))
        warnings.append(
            f"{crossing} of {total} expert groups ({domain} ranks: EP{topology.ep} x ETP{topology.etp}) cross nodes of "
            f"{node} ranks: the all-to-all uses the network. {_experts_in_a_node(topology, folded)} stays within a node"
        )
    if topology.cp > 1 and topology.crossing("tp-cp") and not topology.crossing("tp"):
        warnings.append(
            f"context-parallel groups cross nodes of {node} ranks (TP{topology.tp} x CP{topology.cp} = "
            f"{topology.tp * topology.cp}): keys and values travel over the network in every layer"
        )
    if topology.world_size % node and topology.world_size > node:
        warnings.append(
            f"world_size={topology.world_size} does not fill nodes of {node} ranks: the last node is partly used"
        )
    return warnings


def _experts_in_a_node(topology: Topology, folded: bool) -> str:
    """The flags of the largest expert groups that do not cross nodes."""
    node, tensor = topology.ranks_per_node, topology.tp
    for etp in [size for size in range(topology.etp, 0, -1) if topology.etp % size == 0]:
        ep = max(
            (s for s in _divisors(topology.ep) if node % (s * etp) == 0 and not (folded and s % tensor)), default=0
        )
        if ep:
            changed = f" --expert-tensor-parallel-size {etp}" if etp != topology.etp else ""
            return f"--expert-model-parallel-size {ep}{changed}"
    # A folded tensor domain that is itself too large for a node: the experts follow it.
    tensor = max(s for s in _divisors(tensor) if node % s == 0)
    return f"--tensor-model-parallel-size {tensor} --expert-model-parallel-size {tensor}"


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
